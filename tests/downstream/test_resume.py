"""Long downstream tasks stop and go on bitwise, and what is in results.jsonl is not computed twice."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from dreamteacher.downstream import evaluate, loop, results
from dreamteacher.downstream.classification.config import FinetuneFullConfig, LinearSgdConfig
from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.downstream.segmentation.config import ReadoutConfig, SemanticConfig
from dreamteacher.downstream.task import Bench, Task, find_task
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.loop import Loop
from dreamteacher.runtime.run_folder import read_rows
from dreamteacher.runtime.signals import signals_handled
from tests.builders.pictures import refused
from tests.builders.squares import TINY as DETECT
from tests.builders.squares import save_folder
from tests.downstream.classification.test_protocols import coloured
from tests.downstream.segmentation.test_semantic import SMALL, scenes
from tests.downstream.test_panoptic import TINY as PANOPTIC
from tests.downstream.test_panoptic import write_scenes
from tests.places import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
TRAINED = dataclasses.replace(DETECT, steps=4, optimizer="sgd")
TASKS = ("semantic", "readout", "detect", "panoptic", "linear-sgd", "finetune-full")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    scenes(root / "semantic", 6, sizes=(64,))
    save_folder(root / "detect", 0, 1, 2, 4)
    write_scenes(root / "panoptic", range(6))
    for part, seed in (("train", 1), ("test", 2)):
        for i, (image, label) in enumerate(zip(*coloured(12, seed), strict=True)):
            folder = root / part / ("red", "blue")[int(label)]
            folder.mkdir(parents=True, exist_ok=True)
            to_pil_image(image).save(folder / f"{i}.png")
    return root


def config_of(root: Path, task: str, **changes: object) -> EvaluateConfig:
    """Each task trains 4 steps, with all that a checkpoint must hold: dropout, momenta, BatchNorm, an average."""
    data = {
        "semantic": {"images": root / "semantic" / "images", "masks": root / "semantic" / "masks"},
        "detect": {"images": root / "detect" / "images", "instances": root / "detect" / "instances"},
        "panoptic": {
            "images": root / "panoptic" / "images", "masks": root / "panoptic" / "masks",
            "segments": root / "panoptic" / "panoptic.json",
        },
        "linear-sgd": {"train": root / "train", "test": root / "test"},
    }  # fmt: skip
    data["readout"], data["finetune-full"] = data["semantic"], data["linear-sgd"]
    settings = {
        "student": "test_resnet", "tasks": (task,), "seeds": (0,), "size": (32, 32), "device": "cpu",
        "precision": "float32", "workers": 0, "save_minutes": 60.0,
        "semantic": SemanticConfig(steps=4, batch_size=2, lr=1e-3, width=8, crops=SMALL, dropout=0.5),
        "readout": ReadoutConfig(steps=4, batch_size=2, crops=SMALL, dropout=0.5),
        "detect": dataclasses.replace(DETECT, steps=4),
        "panoptic": dataclasses.replace(PANOPTIC, detect=dataclasses.replace(TRAINED, workers=0)),
        "linear_sgd": LinearSgdConfig(epochs=2, batch_size=6, lr=1.0, weight_decay=1e-3),
        "finetune_full": FinetuneFullConfig(
            optimizer="lamb", epochs=4 / 3, batch_size=4, lr=1e-3, drop_path=0.3, ema=0.9, accumulate=2, mixup=0.5,
            rand_augment="off",
        ),
    }  # fmt: skip
    return EvaluateConfig(**{**settings, **data[task], **changes})  # type: ignore[arg-type]


class KilledError(BaseException):
    """Stands for a kill: nothing of ours catches it."""


@pytest.fixture
def last(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The last checkpoint of each training that was finished."""
    found: list[dict[str, Tensor]] = []
    add = results.Results.add

    def keep(self: results.Results, rows: list[Any], facts: dict[str, Any]) -> list[Any]:
        (path,) = self.out.glob("training-*/*.safetensors")
        found.append(checkpoint.load(path)[0])
        return add(self, rows, facts)

    monkeypatch.setattr(results.Results, "add", keep)
    return found


def quiet(config: EvaluateConfig) -> list[dict[str, object]]:
    return evaluate.evaluate(config, log=lambda _: None)


def values(rows: list[dict[str, object]]) -> list[tuple[object, object]]:
    return [(row["metric"], row["value"]) for row in rows]


@pytest.mark.parametrize("task", TASKS)
def test_a_killed_training_goes_on_bitwise(
    task: str, root: Path, tmp_path: Path, last: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(root, task)
    whole = quiet(dataclasses.replace(config, out=tmp_path / "whole"))
    assert [p.name for p in (tmp_path / "whole").iterdir() if p.name[0] != "."] == ["results.jsonl"]

    asked: list[int] = []

    def due(self: Loop) -> bool:
        asked.append(len(asked))
        if len(asked) == 3:
            raise KilledError
        return len(asked) == 1

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "late", due)
        with pytest.raises(KilledError):
            quiet(dataclasses.replace(config, out=out))
    (folder,) = out.glob(f"training-{task}-all-seed0-*")
    assert [p.name for p in sorted(folder.glob("*.safetensors"))] == ["checkpoint-00000001.safetensors"]
    assert json.loads((folder / "config.json").read_text())["config"]["task"] == task
    assert not (out / "results.jsonl").exists()

    resumed = quiet(dataclasses.replace(config, out=out))
    assert values(resumed) == values(whole)
    assert not list(out.glob("training-*"))
    first, second = last
    assert first.keys() == second.keys()
    assert any(key.startswith("optimizer/") for key in first)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert (task == "finetune-full") == any(key.startswith("ema/") for key in first)


def test_a_signal_saves_and_ends(
    root: Path,
    tmp_path: Path,
    last: list[dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = config_of(root, "readout", save_minutes=60.0)
    whole = quiet(dataclasses.replace(config, out=tmp_path / "whole"))
    config = dataclasses.replace(config, out=tmp_path / "stopped")

    sent: list[int] = []

    def due(self: Loop) -> bool:
        if not sent:  # a second signal would act at once
            sent.append(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # seen after the next step
        return False

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "late", due)
        with signals_handled(), pytest.raises(SystemExit) as stop:
            quiet(config)
    assert stop.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert "Stopped at step 2 of 4" in capsys.readouterr().out
    (folder,) = (tmp_path / "stopped").glob("training-*")

    damaged = folder / "checkpoint-00000002.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    refused(lambda: quiet(config), "None of the checkpoints", "start the run anew")
    damaged.write_bytes(content)
    other = loop.Saved(folder, {})
    refused(lambda: quiet(config), "Another process")
    other.run.close()

    assert values(quiet(config)) == values(whole)
    assert all(torch.equal(value, last[1][key]) for key, value in last[0].items())


SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {repository!r})
import torch
torch.set_num_threads(1)
from tests.downstream.test_resume import Loop, config_of, quiet
save = Loop._save
def then_die(self, done):
    save(self, done)
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
Loop._save = then_die
quiet(config_of(Path({root!r}), "linear-sgd", out=Path({out!r}), save_minutes=1e-9))
"""


@pytest.mark.slow
def test_a_process_that_is_killed(root: Path, tmp_path: Path) -> None:
    script = SCRIPT.format(repository=str(ROOT), root=str(root), out=str(tmp_path / "killed"))
    done = subprocess.run([sys.executable, "-c", script], check=False, env={**os.environ})
    assert done.returncode == -signal.SIGKILL
    assert list((tmp_path / "killed").glob("training-*/checkpoint-00000002.safetensors"))
    config = config_of(root, "linear-sgd")
    rows = quiet(dataclasses.replace(config, out=tmp_path / "killed"))
    assert values(rows) == values(quiet(dataclasses.replace(config, out=tmp_path / "whole")))


def test_rows_are_not_computed_twice(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[tuple[str, int, int]] = []
    counting: dict[str, Task] = {}
    for name in ("knn", "linear"):

        def counted(_: Bench, budget: int, seed: int, name: str = name) -> list[tuple[str, float]]:
            computed.append((name, budget, seed))
            return [("accuracy", 0.5 + len(computed) / 100), ("auroc", 0.5)]

        counting[name] = dataclasses.replace(find_task(name), run=counted)
    monkeypatch.setattr(evaluate, "find_task", counting.__getitem__)

    def new(config: EvaluateConfig) -> int:
        before = len(computed)
        lines.clear()
        rows.append(evaluate.evaluate(config, log=lines.append))
        return len(computed) - before

    rows: list[list[dict[str, object]]] = []
    lines: list[str] = []
    out = tmp_path / "out"
    config = config_of(root, "linear-sgd", tasks=("knn", "linear"), labels=(2,), seeds=(0, 1), out=out)
    assert new(config) == 4
    path = out / "results.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows[0]
    assert not any("already there" in line for line in lines)

    text = path.read_text()
    assert new(config) == 0
    assert rows[1] == rows[0]
    assert path.read_text() == text
    assert sum("already there" in line for line in lines) == 4

    # What decides nothing changes nothing; what is new is computed, and nothing else.
    assert new(dataclasses.replace(config, workers=1, batch_size=4, save_minutes=5.0, cache_gb=0.0)) == 0
    assert new(dataclasses.replace(config, labels=(2, 3), seeds=(0, 1, 2))) == 4 + 1
    assert new(dataclasses.replace(config, knn_k=3)) == 2
    assert new(dataclasses.replace(config, method="another name")) == 4
    assert new(dataclasses.replace(config, size=(64, 64))) == 4

    # A line that a kill cut off is written again, and the next one begins on a line of its own.
    others = [line for line in text.splitlines() if '"linear"' not in line]
    path.write_text("".join(f"{line}\n" for line in others) + '{"met')
    assert new(config) == 2
    assert [(row["task"], row["seed"], row["metric"]) for row in read_rows(path)] == [
        (row["task"], row["seed"], row["metric"])
        for row in sorted(rows[0], key=lambda row: row["task"] == "linear")
    ]

    # Other data, other rows: an image that changes is enough.
    image = next((root / "test" / "red").glob("*.png"))
    os.utime(image, ns=(0, 0))
    assert new(config) == 4
