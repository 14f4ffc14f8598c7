"""THE loop end to end: kill -9 and resume bitwise, signals, damaged images, what is refused before it starts."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dreamteacher.data import batches, image_set, seeds
from dreamteacher.distill.config import PretrainConfig
from dreamteacher.distill.pretrain import pretrain
from dreamteacher.losses import feature_loss, whiten
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.config import to_json
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.run_folder import read_rows
from dreamteacher.runtime.signals import signals_handled
from dreamteacher.teachers.registry import load_teacher
from tests.builders.runs import assert_equal, left_by

RUN = """
import sys, json
from dreamteacher.runtime.config import from_json
from dreamteacher.distill.pretrain import PretrainConfig, pretrain
import torch
torch.set_num_threads(1)
pretrain(from_json(PretrainConfig, json.loads(sys.argv[1])))
"""


@pytest.fixture
def config(image_folder: Path, tiny_teacher: Path, tmp_path: Path) -> PretrainConfig:
    return PretrainConfig(
        images=image_folder, out=tmp_path / "run", teacher=str(tiny_teacher), student="test_resnet",
        width=8, batch_size=8, epochs=20, warmup_epochs=2, lr=2e-3, device="cpu", precision="float32",
        log_every=3, save_every=4, probe_every=6,
    )  # fmt: skip


def everything(run: Path) -> dict[str, object]:
    """All that a run leaves, as comparable values: weights, optimizer, averages, metrics."""
    return left_by(run, "backbone", "regressor")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_kill_and_resume_is_bitwise(config, optimizer):
    config = dataclasses.replace(config, optimizer=optimizer, epochs=8, ema=0.9, accumulate=2, clip=1.0)
    whole = pretrain(dataclasses.replace(config, out=config.out.with_name("whole")))
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, json.dumps(to_json(config))],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not list(config.out.glob("checkpoint-0000000[48]*")) and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (config.out / "backbone.safetensors").exists()
    killed_at = checkpoint.latest(config.out)
    assert killed_at is not None
    assert killed_at.name < "checkpoint-00000016"
    resumed = pretrain(config)
    assert whole is not None
    assert resumed is not None
    assert_equal(everything(whole), everything(resumed))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_exit_with_128_plus_n(config, number, monkeypatch):
    whole = pretrain(dataclasses.replace(config, out=config.out.with_name("whole"), epochs=4))
    config = dataclasses.replace(config, epochs=4)
    original = batches.batches

    def signalled(*args, **kwargs):
        for batch in original(*args, **kwargs):
            if batch.step == 5:
                os.kill(os.getpid(), number)
            yield batch

    monkeypatch.setattr(batches, "batches", signalled)
    with signals_handled(), pytest.raises(SystemExit) as stop:
        pretrain(config)
    assert stop.value.code == 128 + number
    assert checkpoint.latest(config.out) == checkpoint.checkpoint_path(config.out, 6)
    monkeypatch.setattr(batches, "batches", original)
    pretrain(config)
    assert whole is not None
    assert_equal(everything(whole), everything(config.out))


def test_loss_falls_and_metrics_mean_something(config):
    config = dataclasses.replace(config, epochs=60, log_every=10, lr=4e-3)
    pretrain(config)
    rows = read_rows(config.out / "metrics.jsonl")
    assert rows[-1]["step"] == 120
    assert rows[-1]["images_seen"] == 960
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    for name in ("s4", "s8", "s16", "s32"):
        assert rows[-1][f"mse/{name}"] < rows[0][f"mse/{name}"]
        assert rows[-1][f"loss/{name}"] == pytest.approx(
            rows[-1][f"mse/{name}"] + 10 * rows[-1][f"at/{name}"], rel=1e-5
        )  # each is a sum of ten in float32
        assert rows[-1][f"r2/{name}"] <= 1
        assert -1 <= rows[-1][f"cosine/{name}"] <= 1
    assert rows[-1]["loss"] == pytest.approx(
        sum(rows[-1][f"loss/s{s}"] for s in (4, 8, 16, 32)) / 4, rel=1e-5
    )
    assert rows[-1]["knn"] >= 0.9  # bright and dark are easy
    assert 1 <= rows[-1]["rankme"] <= 16


def test_first_loss_is_that_of_the_parts(config):
    """Oracle: the first logged loss, recomputed outside the loop from the contracts alone."""
    from dreamteacher.models.regressor import FeatureRegressor
    from dreamteacher.models.student import create_student

    pretrain(dataclasses.replace(config, epochs=1, warmup_epochs=0, log_every=1))
    images = image_set.load_images(config.images, (64, 64))
    batch = next(batches.batches(images, batch_size=8, seed=0, first_step=0, last_step=1, flip=True))
    teacher = load_teacher(config.teacher)
    generator = seeds.device_generator(0, 0, "teacher", torch.device("cpu"))
    maps = teacher.encode(batch.images, generator=generator)
    student = create_student("test_resnet", seed=0)
    regressor = FeatureRegressor(student.specs, teacher.specs, width=8, seed=0).train()
    loss = feature_loss(regressor(student.train()(batch.images)), maps)
    rows = read_rows(config.out / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(loss.total.item(), rel=1e-5)
    assert rows[0]["at/s4"] == pytest.approx(loss.at[0].item(), rel=1e-5)
    expected = regressor.train()(student(batch.images))[0]  # after no step: the very same maps
    target = whiten(maps[0])
    r2 = 1 - ((expected - target) ** 2).sum() / ((target - target.mean((0, 2, 3), keepdim=True)) ** 2).sum()
    assert rows[0]["r2/s4"] == pytest.approx(r2.item(), abs=1e-4)


def test_teacher_sees_what_the_student_sees(config, monkeypatch):
    seen: dict[str, list[torch.Tensor]] = {"teacher": [], "student": []}
    from dreamteacher.models.student import Student
    from dreamteacher.teachers.diffusion.teacher import DiffusionTeacher

    encode, forward = DiffusionTeacher.encode, Student.forward

    def watched_encode(self, images, *, generator):
        seen["teacher"].append(images.clone())
        return encode(self, images, generator=generator)

    def watched_forward(self, images):
        if self.training and len(images) == 8:  # not the probe image of the constructor
            seen["student"].append(images.clone())
        return forward(self, images)

    monkeypatch.setattr(DiffusionTeacher, "encode", watched_encode)
    monkeypatch.setattr(Student, "forward", watched_forward)
    pretrain(dataclasses.replace(config, epochs=2, warmup_epochs=0))
    assert len(seen["teacher"]) == 4  # once a step: nothing is encoded twice
    for a, b in zip(seen["teacher"], seen["student"], strict=True):
        assert torch.equal(a, b)
    originals = image_set.load_images(config.images, (64, 64)).get(torch.arange(16)).float() / 255
    batch = torch.cat(seen["teacher"])
    plain = sum(any(torch.equal(x, y) for y in originals) for x in batch)
    flipped = sum(any(torch.equal(x.flip(-1), y) for y in originals) for x in batch)
    assert plain + flipped == len(batch)
    assert 4 <= flipped <= len(batch) - 4


@pytest.mark.slow
def test_damaged_files_are_counted_and_listed(config, image_folder, tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    files = sorted(image_folder.rglob("*.png"))
    for i in range(200):
        shutil.copy(files[i % 16], folder / f"good{i:03d}.png")
    good = files[0].read_bytes()
    for i in range(10):
        (folder / f"zero{i}.png").write_bytes(b"")
        (folder / f"text{i}.jpg").write_text("this is no picture")
        (folder / f"cut{i}.png").write_bytes(good[: len(good) // 2])
    strict = dataclasses.replace(config, images=folder, strict=True, epochs=1, warmup_epochs=0)
    with pytest.raises(UserError, match="30"):
        pretrain(strict)
    assert not config.out.exists()  # a failed start leaves nothing behind
    pretrain(dataclasses.replace(strict, strict=False, batch_size=50))
    listed = (config.out / "skipped.txt").read_text().splitlines()
    assert len(listed) == 30
    assert {Path(line.split(": ")[0]).name[:4].rstrip("0123456789") for line in listed} == {
        "zero",
        "text",
        "cut",
    }
    assert "30 images could not be read" in capsys.readouterr().out
    assert read_rows(config.out / "metrics.jsonl")[-1]["step"] == 4
    facts = json.loads((config.out / "config.json").read_text())
    assert facts["data"]["images"] == 200
    assert facts["data"]["skipped"] == 30


def test_dry_run_prints_and_leaves_nothing(config, capsys):
    assert pretrain(dataclasses.replace(config, dry_run=True)) is None
    said = capsys.readouterr().out
    for word in ("parameters", "steps 40", "memory", "time about", "disk"):
        assert word in said
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"student": "resnet81"}, "resnet"),
        ({"teacher": "chest-xray-46"}, "chest-xray-64"),
        ({"images": Path("nowhere")}, "nowhere"),
        ({"images": None}, "--images"),
        ({"size": (60, 64)}, "multiples of 32"),
        ({"batch_size": 64}, "64"),
        ({"accumulate": 3}, "does not divide"),
        ({"accumulate": 8}, "at least 2"),
        ({"t": (5000,)}, "out of range"),
        ({"device": "warp"}, "doctor"),
        ({"lr": -1.0}, "above 0"),
        ({"init": "nothing.safetensors"}, "nothing"),
    ],
)
def test_bad_settings_are_refused_before_a_folder_is_made(config, change, words):
    with pytest.raises(UserError, match=words) as caught:
        pretrain(dataclasses.replace(config, **change))
    assert len(str(caught.value).splitlines()) <= 3
    assert not config.out.exists()


def test_changed_config_on_resume_is_refused_and_named(config):
    config = dataclasses.replace(config, epochs=2, warmup_epochs=0)
    pretrain(config)
    before = everything(config.out)
    with pytest.raises(UserError, match=r"lr: 0.002 -> 0.001"):
        pretrain(dataclasses.replace(config, lr=1e-3))
    assert_equal(before, everything(config.out))
    pretrain(dataclasses.replace(config, workers=1, save_every=7))  # what changes no number may change
    assert_equal(before, everything(config.out))


def test_nan_stops_with_the_step_and_keeps_the_checkpoint(config, monkeypatch):
    original = batches.batches

    def poisoned(*args, **kwargs):
        for batch in original(*args, **kwargs):
            yield batch._replace(images=batch.images * float("nan")) if batch.step == 9 else batch

    monkeypatch.setattr(batches, "batches", poisoned)
    with pytest.raises(UserError, match="map s4 is not finite at step 10"):
        pretrain(config)
    last = checkpoint.latest(config.out)
    assert last == checkpoint.checkpoint_path(config.out, 8)
    tensors, _ = checkpoint.load(last)
    assert all(torch.isfinite(v).all() for v in tensors.values())


@pytest.mark.slow
def test_synthesized_dataset_needs_no_images(config):
    config = dataclasses.replace(
        config, images=None, dataset="synthesized", samples=8, epochs=2, warmup_epochs=0, log_every=1
    )
    pretrain(config)
    rows = read_rows(config.out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[-1]["loss"] < 20
