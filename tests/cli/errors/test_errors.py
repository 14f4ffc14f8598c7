"""Every error that a user can make, made for real; tests/golden/errors.md is what was printed.

`DREAMTEACHER_WRITE_DOCS=1 python -m pytest tests/cli/errors/test_errors.py` writes the page anew.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dreamteacher.cli.main import main
from dreamteacher.reports import report
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.run_folder import read_rows
from dreamteacher.teachers import registry
from tests.cli.errors.cases import CASES, SECTIONS, Case
from tests.cli.errors.commands import pretrain
from tests.cli.errors.test_odd_images import ODD
from tests.cli.errors.world import SECRET, contents, make_world
from tests.places import GOLDEN, ROOT

PAGE = GOLDEN / "errors.md"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"


# --- what is printed -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    code: int | None
    out: str
    err: str
    before: dict[str, str]
    after: dict[str, str]


def run_command(command: list[str], patch: pytest.MonkeyPatch) -> int | None:
    """The exit code of `dreamteacher`, or of a script, run here; in a process of its own where it is one of several."""
    if "WORLD_SIZE" in os.environ:  # its error ends the process
        done = subprocess.run(
            [sys.executable, "-m", "dreamteacher", *command], capture_output=True, text=True
        )
        sys.stdout.write(done.stdout)
        sys.stderr.write(done.stderr)
        return done.returncode
    if not command[0].endswith(".py"):
        return main(command)
    patch.setattr(sys, "argv", command)
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, image_folder: Path) -> Path:
    root = tmp_path_factory.mktemp("world")
    make_world(root, tiny_teacher, image_folder)
    return root


@pytest.fixture(scope="module")
def provoke(world: Path, tiny_teacher: Path) -> Callable[[Case], Outcome]:
    """Runs a case once, in the world, and keeps what came of it."""
    outcomes: dict[int, Outcome] = {}

    def run(c: Case) -> Outcome:
        if id(c) not in outcomes:
            out, err = io.StringIO(), io.StringIO()
            before = contents(world)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(world)
                patch.delenv("DREAMTEACHER_TRACEBACK", raising=False)
                patch.setenv("DREAMTEACHER_CACHE", "cache")
                # The embedded teacher's name is all that is needed of it here.
                patch.setattr(registry, "EMBEDDED", {"chest-xray-64": tiny_teacher})
                if c.patch:
                    c.patch(patch)
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    code = run_command(c.command, patch)
            outcomes[id(c)] = Outcome(code, out.getvalue(), err.getvalue(), before, contents(world))
            if not c.kept:
                shutil.rmtree(world / "new")
        return outcomes[id(c)]

    return run


@pytest.mark.parametrize("key", CASES, ids=lambda key: f"{key[0]}-{key[1]}".lower().replace(" ", "_"))
def test_error(key: tuple[str, str], provoke: Callable[[Case], Outcome]) -> None:
    c = CASES[key]
    it = provoke(c)
    assert it.code == 2, it
    lines = it.err.splitlines()
    assert it.err.startswith("error: "), it.err
    assert 2 <= len(lines) <= 3, it.err  # what is wrong, and what to do
    assert all(line.strip() for line in lines)
    assert all(len(line) < 400 for line in lines)
    assert "Traceback" not in it.out + it.err
    for words in c.says:
        assert words in it.err, it.err
    if c.kept:
        assert it.after == it.before  # nothing is made, nothing is touched
    assert not any(SECRET in name for name in it.after)  # no code of a file ran


def test_traceback_only_when_asked_for(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreamteacher.runtime.errors import UserError

    monkeypatch.chdir(world)
    monkeypatch.setenv("DREAMTEACHER_TRACEBACK", "1")
    with pytest.raises(UserError, match="nowhere"):
        main(pretrain(images="nowhere"))


# --- a disk that is really full --------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB, on which two checkpoints find room."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)]
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root can mount a small file system")
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this machine does not let root mount a file system: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(
    world: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 10**9))  # it filled up afterwards
    monkeypatch.setattr(report, "write_report", lambda run, **_: run)
    run = small_disk / "run"
    command = pretrain(out=str(run), epochs="4", save_every="1", keep_checkpoints="9")
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert len(said.splitlines()) <= 3
    assert "the disk is full" in said
    assert str(run) in said
    assert not list(run.glob(".*.tmp"))
    earlier = checkpoint.latest(run)
    assert earlier is not None
    _, meta = checkpoint.load(earlier)
    assert 1 <= meta["step"] < 8
    # With space again, the same command goes on from there.
    subprocess.run(["mount", "-o", "remount,size=96m", str(small_disk)], check=True)
    assert main(command) == 0
    assert f"Resuming from step {meta['step']} of 8" in capsys.readouterr().out
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")][-1] == 8
    # Bitwise the run that had space from the start.
    assert main(pretrain(out=str(small_disk / "whole"), epochs="4", save_every="9")) == 0
    for name in ("backbone", "regressor"):
        assert torch.equal(
            *(_flat(small_disk / folder / f"{name}.safetensors") for folder in ("run", "whole"))
        )


def _flat(path: Path) -> torch.Tensor:

    return torch.cat([v.flatten().double() for _, v in sorted(load_file(path).items())])


# --- the page --------------------------------------------------------------------------------------------


HEAD = """\
# What is said when something is wrong

This page is generated by `tests/cli/errors/test_errors.py`, which makes every one of these mistakes and keeps what was
printed. Errors go to stderr in at most three lines, the exit code is 2, and nothing is left behind: the
output folder is not made, or stays as it was. `DREAMTEACHER_TRACEBACK=1` shows where an error arose.
"""
NO_ERROR = """\
## What is no error

Without `--strict`, damaged images are left out, counted, and listed in the run's `skipped.txt`. The following
are not damaged; they are accepted, with `--strict` too:

| image | how it is read |
| --- | --- |"""


OTHERS = {
    r"(Error while deserializing header).*?\)\.": r"\1 ...).",
    r"(JSONDecodeError) .*": r"\1 ...",
    r"\(damaged: .*?\)\.": "(damaged: ...).",
    r"(Device '.*' cannot be used:) .*": r"\1 ...",
    r"(cannot be fetched:) .*": r"\1 ...",
    r"(could not meet:) .*": r"\1 ...",
    r"None of \d+ students": "None of ... students",
}


def stable(text: str) -> str:
    """Without the words of other libraries, which change with their versions."""
    for pattern, replacement in OTHERS.items():
        text = re.sub(pattern, replacement, text)
    return text


def cell(text: str) -> str:
    """Lines as code in a table's cell."""
    fence = "``" if "`" in text else "`"
    pad = " " if "`" in text else ""
    return "<br>".join(f"{fence}{pad}{line}{pad}{fence}" for line in text.replace("|", "\\|").splitlines())


def test_page_is_what_was_printed(provoke: Callable[[Case], Outcome]) -> None:
    lines = [HEAD]
    for section, cases in SECTIONS.items():
        lines += [f"## {section}", "", "| what happened | what is printed |", "| --- | --- |"]
        lines += [f"| {c.what} | {cell(stable(provoke(c).err))} |" for c in cases]
        lines.append("")
    lines += [NO_ERROR, *(f"| {kind} | {how} |" for kind, how in ODD.items())]
    text = "\n".join(lines) + "\n"
    if os.environ.get("DREAMTEACHER_WRITE_DOCS"):
        PAGE.write_text(text)
    assert PAGE.is_file(), "DREAMTEACHER_WRITE_DOCS=1 writes it"
    assert PAGE.read_text() == text, (
        "tests/golden/errors.md is not what is printed: DREAMTEACHER_WRITE_DOCS=1 rewrites it"
    )


def test_troubleshooting_quotes_what_is_printed() -> None:
    """Fifteen sections; every message in them is one of the golden file, whole and to the letter."""
    text, golden = TROUBLESHOOTING.read_text(), PAGE.read_text()
    sections = text.split("\n## ")[1:]
    assert len(sections) == 15
    for section in sections:
        quoted = re.findall(r"^```text\n(error: .*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
        assert quoted, section
        for message in quoted:
            assert f"| {cell(message)} |" in golden, message
