"""Pretraining from a store is pretraining with its teacher."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dreamteacher.data import batches as data_batches
from dreamteacher.distill import dataset
from dreamteacher.distill.config import MakeFeaturesConfig, PretrainConfig
from dreamteacher.distill.pretrain import pretrain
from dreamteacher.distill.store import make
from dreamteacher.runtime import run_folder
from dreamteacher.runtime.signals import signals_handled
from tests.builders.pictures import refused


@pytest.fixture
def run(image_folder: Path, tiny_teacher: Path, tmp_path: Path) -> PretrainConfig:
    return PretrainConfig(
        images=image_folder, out=tmp_path / "run", teacher=str(tiny_teacher), student="test_resnet", width=8,
        batch_size=8, epochs=6, warmup_epochs=2, lr=2e-3, device="cpu", precision="float32", log_every=2,
        save_every=4, probe_every=0,
    )  # fmt: skip


def features_for(run: PretrainConfig, **asked: Any) -> PretrainConfig:
    """The same run, from a store that is made for it."""
    assert run.images is not None
    folder = run.out.with_name("features")
    config = MakeFeaturesConfig(
        **{"batch_size": 8} | asked,
        images=run.images,
        out=folder,
        teacher=run.teacher,
        device="cpu",
        precision="float32",
    )
    make.make_features(config)
    return replace(run, features=folder)


def rows_of(run: PretrainConfig) -> list[dict[str, float]]:
    folder = pretrain(run)
    assert folder is not None
    return run_folder.read_rows(folder / "metrics.jsonl")


def test_pretraining_from_raw_maps_is_pretraining_with_the_teacher(run, monkeypatch):
    """Bit for bit, if the teacher sees each image alone both times and its maps lie in memory alike."""

    def laid_out(images, maps, *rest):
        return batch(images, [m.contiguous() for m in maps], *rest)

    batch = dataset.FeatureBatch
    monkeypatch.setattr(dataset, "FeatureBatch", laid_out)
    online = replace(run, noise="none", flip=False, teacher_batch=1, out=run.out.with_name("online"))
    how = {"keep": "all", "store": ("float32",), "noise": "none", "flip": False, "batch_size": 1}
    stored = replace(features_for(online, **how), out=run.out)
    assert rows_of(online) == rows_of(stored)


def test_pretraining_from_projected_maps_learns_stops_and_resumes_bitwise(run, monkeypatch, capsys):
    config = replace(features_for(run, channels=5, draws=3), epochs=40)
    whole = rows_of(replace(config, out=run.out.with_name("whole")))
    assert whole[-1]["loss"] < 0.8 * whole[0]["loss"]
    assert whole[-1]["r2/s4"] > whole[0]["r2/s4"]
    assert "compared with the teacher, at most" in capsys.readouterr().out
    original = data_batches.batches

    def signalled(*args, **kwargs):
        for batch in original(*args, **kwargs):
            if batch.step == 9:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(data_batches, "batches", signalled)
    with signals_handled(), pytest.raises(SystemExit) as stop:
        pretrain(config)
    assert stop.value.code == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert rows_of(config) == whole
    facts = json.loads((run.out / "config.json").read_text())["features"]
    assert (facts["keep"], facts["draws"]) == ("pca", 3)
    before = len(list(run.out.iterdir()))
    assert pretrain(replace(config, dry_run=True)) is None
    assert len(list(run.out.iterdir())) == before


def test_features_that_cannot_serve_a_run_are_refused(run, tiny_teacher):
    config = features_for(run, channels=5)

    def told(**change: Any) -> str:
        text = refused(lambda: pretrain(replace(config, **change)))
        assert not run.out.exists()
        return text

    assert "cannot serve --whiten c" in told(whiten="c")
    assert "cannot serve --distill label" in told(distill="label", labelled=run.images)
    assert "of real images" in told(dataset="synthesized", samples=16)
    assert "mirrored images too" in told(flip=False)
    assert "made with --t 100, not 50" in told(t=(50,))
    assert "made with --noise stochastic, not fixed" in told(noise="fixed")
    assert "made with --blocks none, not 1 2" in told(blocks=(1, 2))
    assert "of the teacher 'tiny'" in told(teacher="chest-xray-64")
    assert "no finished features" in told(features=run.out.with_name("nowhere"))
