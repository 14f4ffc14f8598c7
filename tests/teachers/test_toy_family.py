"""A family of teachers is added by one file and one line: the toy of docs/add_a_teacher.md, through the command line."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest

from dreamteacher.cli import main as cli
from dreamteacher.runtime.download.http import cache_folder
from dreamteacher.runtime.run_folder import read_rows
from dreamteacher.teachers.registry import FAMILIES, Entry, family_of, save_teacher
from dreamteacher.testing import check_teacher, tiny_teacher
from tests.places import ROOT


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The family's file on the path and its line in the table."""
    page = (ROOT / "docs" / "add_a_teacher.md").read_text()
    file = next(b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "FAMILY = Family(" in b)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "toy.py").write_text(file)
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.setenv("DREAMTEACHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(FAMILIES, "toy", Entry("toy"))
    monkeypatch.delitem(sys.modules, "toy", raising=False)
    return "toy"


def test_a_toy_family_is_one_file_and_one_line(toy, image_folder, tmp_path, capsys, monkeypatch):
    check_teacher(tiny_teacher(toy))
    weights, spec = family_of(toy).tiny()
    place = cache_folder() / "teachers" / "my-toy"  # where --teacher finds it by its name
    place.mkdir(parents=True)
    save_teacher(place, weights, spec, {"name": "my-toy", "licence": "CC0-1.0"})
    monkeypatch.delitem(sys.modules, "toy")

    assert cli.main(["list", "teachers"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("my-toy"))
    assert row.split()[1:5] == ["fetched", "toy", "encode", "4:"]

    command = [
        "pretrain", "--teacher", "my-toy", "--student", "test_resnet", "--images", str(image_folder), "--out",
        str(tmp_path / "run"), "--width", "8", "--batch-size", "8", "--epochs", "1", "--warmup-epochs", "0",
        "--log-every", "1", "--device", "cpu", "--precision", "float32", "--size", "64", "64",
    ]  # fmt: skip
    assert cli.main([*command, "--dry-run"]) == 0, capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert cli.main(command) == 0, capsys.readouterr().err
    assert "my-toy" in capsys.readouterr().out
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row[f"r2/{level}"]) for row in rows for level in ("s4", "s8"))

    seen = ["inspect", "--teacher", "my-toy", "--images", str(image_folder), "--out", str(tmp_path / "seen")]
    assert cli.main([*seen, "--labels", "2", "--device", "cpu"]) == 0, capsys.readouterr().err


def test_settings_that_it_lacks_are_refused(toy, tmp_path, image_folder, capsys):
    weights, spec = family_of(toy).tiny()
    (tmp_path / "teacher").mkdir()
    save_teacher(tmp_path / "teacher", weights, spec, {"name": "my-toy", "licence": "CC0-1.0"})
    command = [
        "pretrain",
        "--teacher",
        str(tmp_path / "teacher"),
        "--images",
        str(image_folder),
        "--blocks",
        "1",
    ]
    assert cli.main([*command, "--out", str(tmp_path / "run")]) == 2
    assert "of the family 'toy'" in capsys.readouterr().err
