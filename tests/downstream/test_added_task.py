"""A task is added by one file and one line, and is then one of `evaluate`'s: its settings, rows and tables."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dreamteacher
from dreamteacher.downstream.task import find_task
from dreamteacher.downstream.tasks import TASKS
from dreamteacher.runtime.run_folder import read_rows
from tests.builders.pictures import refused

# What somebody writes: the nearest class centre, on a share of each feature's deviation.
FILE = '''
from dataclasses import dataclass

import torch

from dreamteacher.downstream.classification.data import CLASSIFICATION
from dreamteacher.downstream.features import class_metrics
from dreamteacher.downstream.task import Bench, Task


@dataclass(frozen=True, kw_only=True)
class CentreConfig:
    """How the classes' centres are compared."""

    power: float = 2.0
    """Of the distance."""


def run(bench: Bench, budget: int | None, seed: int):
    x, y, test_x, test_y = bench.features()
    centres = torch.stack([x[(y == c).to(x.device)].mean(0) for c in range(len(bench.data.classes))])
    yield from class_metrics((-torch.cdist(test_x, centres, p=bench.settings.power)).softmax(1), test_y)
    yield "power", bench.settings.power


TASK = Task(
    name="class-centres", what="nearest class centre", group=CLASSIFICATION, headline="accuracy", config=CentreConfig,
    seeded=False, run=run,
)
'''
LINE = '    "class-centres": "class_centres:TASK",\n'


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the file, and a copy of the package with the line."""
    root = tmp_path_factory.mktemp("added")
    package = Path(dreamteacher.__file__).parent
    shutil.copytree(package, root / "dreamteacher", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "class_centres.py").write_text(FILE)
    table = root / "dreamteacher" / "downstream" / "tasks.py"
    start = "ADDED: dict[str, str] = {"
    assert f"{start}}}" in table.read_text()
    table.write_text(table.read_text().replace(start, f"{start}\n{LINE}"))
    return root


def dreamteacher_of(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dreamteacher", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, check=False)


def test_an_added_task_is_used_through_the_command_line(
    added: Path, image_folder: Path, tmp_path: Path
) -> None:
    common = (
        f"evaluate --student test_resnet --train {image_folder} --test {image_folder} --size 32 32 --seeds 0 1 "
        f"--device cpu --precision float32 --workers 0 --out {tmp_path} --tasks class-centres"
    ).split()
    done = dreamteacher_of(added, *common, "knn", "--class-centres.power", "1")
    assert done.returncode == 0, done.stderr
    assert "| class-centres, all labels, accuracy |" in done.stdout
    rows = read_rows(tmp_path / "results.jsonl")
    assert [(r["seed"], r["value"]) for r in rows if r["metric"] == "power"] == [(0, 1.0), (1, 1.0)]
    assert {row["task"] for row in rows} == {"class-centres", "knn"}
    again = dreamteacher_of(added, *common, "--class-centres.power", "1")
    assert again.stdout.count("already there") == 2
    other = dreamteacher_of(added, *common, "--class-centres.power", "3")  # its settings decide its rows
    assert "already there" not in other.stdout
    wrong = dreamteacher_of(added, *common, "--class-centres.powr", "1")
    assert wrong.returncode == 2
    assert "Did you mean '--class-centres.power'" in wrong.stderr
    assert "Of the distance." in dreamteacher_of(added, "evaluate", "--help").stdout


def test_every_task_is_what_its_line_says() -> None:
    for name in TASKS:
        task = find_task(name)
        assert task.name == name
        assert task.amount(None)
    refused(lambda: find_task("knnn"), "Did you mean 'knn'")


def test_the_table_and_the_settings_need_no_torch() -> None:
    code = "import sys, dreamteacher.downstream.presets as p; p.preset_config('ade20k'); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
