"""What goes wrong around a run costs at most what came after its last checkpoint, and says why."""

from __future__ import annotations

import ast
import csv
import dataclasses
import errno
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dreamteacher
from dreamteacher.cli.main import main
from dreamteacher.distill import step as distill_step
from dreamteacher.distill.config import PretrainConfig
from dreamteacher.distill.dataset import PartStream
from dreamteacher.distill.pretrain import pretrain
from dreamteacher.reports import report
from dreamteacher.runtime import checkpoint, tensor_file
from dreamteacher.runtime.config import parse_json
from dreamteacher.runtime.progress import Progress
from dreamteacher.runtime.run_folder import RunDir, read_rows
from dreamteacher.runtime.signals import signals_handled
from dreamteacher.teachers.diffusion.teacher import DiffusionTeacher
from tests.builders.pictures import refused
from tests.builders.runs import assert_equal
from tests.distill.test_pretrain import everything
from tests.places import ROOT

FAULTS = ROOT / "benchmarks" / "faults"


@pytest.fixture(scope="module")
def settled(
    image_folder: Path, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> PretrainConfig:
    return PretrainConfig(
        images=image_folder, out=tmp_path_factory.mktemp("whole") / "run", teacher=str(tiny_teacher),
        student="test_resnet", width=8, batch_size=8, epochs=6, warmup_epochs=1, device="cpu",
        precision="float32", log_every=3, save_every=4, probe_every=6,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(settled: PretrainConfig) -> dict[str, object]:
    """All that a run leaves to which nothing happened."""
    pretrain(settled)
    return everything(settled.out)


@pytest.fixture
def config(settled: PretrainConfig, tmp_path: Path) -> PretrainConfig:
    return dataclasses.replace(settled, out=tmp_path / "run")


def flags(config: PretrainConfig, **more: Any) -> list[str]:
    """The command that is this config."""
    names = (
        "images", "out", "teacher", "student", "width", "batch_size", "epochs", "warmup_epochs", "device",
        "precision", "log_every", "save_every", "probe_every",
    )  # fmt: skip
    values = {name: getattr(config, name) for name in names} | more
    return ["pretrain", *itertools.chain(*((f"--{k.replace('_', '-')}", str(v)) for k, v in values.items()))]


def spoil(path: Path, how: str) -> None:
    raw = bytearray(path.read_bytes())
    if how == "altered":
        raw[-100] ^= 1
    path.write_bytes(raw[: len(raw) // 2] if how == "truncated" else b"" if how == "emptied" else raw)


# --- kills --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_runs_end_as_those_that_were_not(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FAULTS / "run.py"), "--kills", "4", "--steps", "12", "--images", "16", "--out",
         str(tmp_path / "kills.csv")],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader((tmp_path / "kills.csv").read_text().splitlines()))
    assert [row["equal"] for row in rows] == ["True"] * 4
    assert parse_json((tmp_path / "environment.json").read_text())["kills"] == 4


def test_the_committed_kills_are_fifty_and_all_equal() -> None:
    rows = list(csv.DictReader((FAULTS / "kills.csv").read_text().splitlines()))
    assert len(rows) >= 50
    assert {row["verb"] for row in rows} == {"pretrain", "train-teacher", "make-features"}
    assert sum(row["saving"] == "True" for row in rows) >= 10
    assert all(row["equal"] == "True" and row["litter"] == "0" for row in rows)


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    names = (".checkpoint-00000004.safetensors.7.tmp", ".metrics.jsonl.7.tmp", ".other.json.7.tmp")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / ".tmpAbC").write_bytes(b"half")
    (tmp_path / ".config.json.8.tmp").write_text("{")  # as earlier versions had them
    (tmp_path / "kept.tmp").touch()
    checkpoint.sweep(tmp_path, "other.json")
    assert not (tmp_path / names[2]).exists()
    assert (tmp_path / names[0]).exists()
    run = RunDir(tmp_path)
    run.open({})
    run.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "config.json", "kept.tmp"]


def test_a_line_that_a_kill_cut_off_costs_no_other(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for step in (1, 2):
        run.append("metrics.jsonl", {"step": step})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    run.append("metrics.jsonl", {"step": 3})
    assert [row["step"] for row in read_rows(path)] == [1, 3]
    path.write_text('{"step": 1}\n7\n{"no": 1}\n{"step": "x"}\n{"step": 2}\n{"step": 3}\n')
    run.rewind("metrics.jsonl", 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_logs_reach_the_disk_before_the_checkpoint_after_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunDir(tmp_path).append("metrics.jsonl", {"step": 1})
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def renamed(old: Path, new: Path) -> None:
        order.append(f"-> {new.name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    name = "checkpoint-00000001.safetensors"
    checkpoint.save(tmp_path / name, {"x": torch.zeros(3)}, {})
    assert order == ["metrics.jsonl", name, f"-> {name}", tmp_path.name]


# --- damaged checkpoints, failing disks ---------------------------------------------------------------------


@pytest.mark.parametrize("how", ["altered", "truncated", "emptied"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    config: PretrainConfig, whole: dict[str, object], how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(config)
    spoil(config.out / "checkpoint-00000012.safetensors", how)
    capsys.readouterr()
    pretrain(dataclasses.replace(config, keep_checkpoints=1))
    said = capsys.readouterr().out
    assert "checkpoint-00000012.safetensors' is damaged (" in said
    assert ("changed since it was written" in said) == (how == "altered")
    assert "'checkpoint-00000008.safetensors' serves" in said
    assert "Resuming from step 8 of 12" in said
    assert_equal(whole, everything(config.out))
    assert sorted(p.name for p in config.out.glob("*checkpoint*")) == [
        "checkpoint-00000012.safetensors", "damaged-checkpoint-00000012.safetensors",
    ]  # fmt: skip


def test_a_checkpoint_on_a_bad_block_gives_way_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [checkpoint.checkpoint_path(tmp_path, step) for step in (4, 8)]
    for path in paths:
        checkpoint.save(path, {"x": torch.zeros(9)}, {})
    opened, bad = tensor_file.safe_open, [paths[1]]

    def failing(path: Path, framework: str) -> Any:
        if path in bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path, framework=framework)

    monkeypatch.setattr(tensor_file, "safe_open", failing)
    assert checkpoint.latest(tmp_path) == paths[0]
    assert checkpoint.latest(tmp_path, whole=True) == paths[0]
    assert "Input/output error" in capsys.readouterr().out
    bad[:] = [paths[0]]
    refused(lambda: checkpoint.latest(tmp_path, whole=True), "None of the checkpoints", "Input/output error")
    assert paths[0].exists()  # what may be the last one is never renamed


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.ENOSPC])
def test_a_disk_that_fails_in_the_middle_is_named(
    config: PretrainConfig,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    append = RunDir.append

    def failing(self: RunDir, name: str, row: dict[str, Any]) -> None:
        if row["step"] == 9:
            raise OSError(number, os.strerror(number), str(self.path / name))
        append(self, name, row)

    monkeypatch.setattr(RunDir, "append", failing)
    assert main(flags(config)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: The disk is full" if number == errno.ENOSPC else "error: A disk fails")
    assert "metrics.jsonl" in said
    assert len(said.splitlines()) <= 3
    assert checkpoint.latest(config.out, whole=True) == checkpoint.checkpoint_path(config.out, 8)


# --- numbers that are none ----------------------------------------------------------------------------------


def poison_teacher(patch: pytest.MonkeyPatch, level: int, call: int) -> None:
    """One map of the teacher's call number `call` (from 1) gets one NaN."""
    encode, calls = DiffusionTeacher.encode, itertools.count(1)

    def poisoned(self: Any, images: torch.Tensor, *, generator: torch.Generator) -> list[torch.Tensor]:
        maps = encode(self, images, generator=generator)
        if next(calls) == call:
            maps[level] = maps[level].clone()
            maps[level][0, 0, 0, 0] = float("nan")
        return maps

    patch.setattr(DiffusionTeacher, "encode", poisoned)


def poison_loss(patch: pytest.MonkeyPatch, call: int) -> None:
    original, calls = distill_step.batch_loss, itertools.count(1)

    def poisoned(*args: Any, **options: Any) -> Any:
        found = original(*args, **options)
        return found._replace(mse=found.mse * float("inf")) if next(calls) == call else found

    patch.setattr(distill_step, "batch_loss", poisoned)


def poison_gradient(patch: pytest.MonkeyPatch, call: int) -> None:
    original, calls = distill_step.batch_loss, itertools.count(1)

    def poisoned(*args: Any, **options: Any) -> Any:
        found = original(*args, **options)
        if next(calls) == call:
            found.mse.register_hook(lambda g: g * float("nan"))
        return found

    patch.setattr(distill_step, "batch_loss", poisoned)


@pytest.mark.parametrize(
    ("poison", "says"),
    [
        (lambda patch: poison_teacher(patch, 1, 5), "The teacher's map s8 is not finite at step 5"),
        (lambda patch: poison_loss(patch, 6), "The loss is not finite at step 6"),
        (lambda patch: poison_gradient(patch, 5), "The gradient is not finite at step 5"),
    ],
    ids=["teacher", "loss", "gradient"],
)
def test_nan_is_named_with_its_step_and_cause(
    config: PretrainConfig,
    whole: dict[str, object],
    poison: Callable[[pytest.MonkeyPatch], None],
    says: str,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        poison(patch)
        refused(lambda: pretrain(config), says, "The last checkpoint is from before")
    assert checkpoint.latest(config.out, whole=True) == checkpoint.checkpoint_path(config.out, 4)
    pretrain(config)
    assert_equal(whole, everything(config.out))


def test_a_stop_after_a_loss_that_is_not_finite_says_so_and_saves_nothing(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison_loss(monkeypatch, 5)
    poisoned, calls = distill_step.batch_loss, itertools.count(1)

    def stopped(*args: Any, **options: Any) -> Any:
        if next(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return poisoned(*args, **options)

    monkeypatch.setattr(distill_step, "batch_loss", stopped)
    with signals_handled():
        refused(lambda: pretrain(config), "The loss is not finite at step 5", "Lower --lr")
    assert "saved in" not in capsys.readouterr().out
    assert checkpoint.latest(config.out) == checkpoint.checkpoint_path(config.out, 4)


# --- processes and clocks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [True, False], ids=["noticed at once", "noticed later"])
def test_a_process_that_decodes_is_killed(
    config: PretrainConfig,
    whole: dict[str, object],
    at_once: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(report, "write_report", lambda run, **_: run)
    streamed = flags(config, cache_gb=0, workers=1)
    of = PartStream.of

    def killing(self: PartStream, step: int) -> Any:
        if step == 6:
            (worker,) = multiprocessing.active_children()
            worker.kill()
            if at_once:
                worker.join()
        return of(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartStream, "of", killing)
        assert main(streamed) == 2
    said = capsys.readouterr().err
    assert "error: A process that decodes images has died" in said
    assert len(said.splitlines()) <= 3
    assert checkpoint.latest(config.out) == checkpoint.checkpoint_path(config.out, 4)
    assert main(streamed) == 0
    assert_equal(whole, everything(config.out))


def test_a_clock_that_jumps_changes_nothing(
    config: PretrainConfig, whole: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps = itertools.cycle([1e9, -1e9, 0.0, 4e9])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    monkeypatch.setattr(Progress.__init__, "__defaults__", (0.0,))  # a line at every look
    pretrain(config)
    assert_equal(whole, everything(config.out))
    assert all(row["seconds"] >= 0 for row in read_rows(config.out / "timing.jsonl"))


def test_no_code_asks_the_clock_of_the_wall() -> None:
    """perf_counter and monotonic never go back; time.time, datetime.now and files' times may."""
    words = {"time.time", "datetime.now", "datetime.datetime.now", "datetime.today", "os.path.getmtime"}
    for path in Path(dreamteacher.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            asks = isinstance(node, ast.Attribute) and ast.unparse(node) in words
            assert not asks or path.name == "loggers.py", path  # a service wants the time of each number
            stamp = isinstance(node, ast.Attribute) and node.attr.startswith("st_mtime")
            # There a time only says whether a file is the same, and is never compared with another time.
            assert not stamp or path.name == "results.py", path
