"""`train-teacher`: the loss, what a training leaves behind, kill -9 and resume, what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from dreamteacher.cli import main as cli
from dreamteacher.data import batches, image_set
from dreamteacher.distill.config import PretrainConfig
from dreamteacher.distill.pretrain import pretrain
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.config import from_json, to_json
from dreamteacher.runtime.distributed.world import World
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.run_folder import read_rows
from dreamteacher.runtime.signals import signals_handled
from dreamteacher.teachers.diffusion.teacher import (
    DiffusionSpec,
    DiffusionTeacher,
    alphas_cumprod,
    build_unet,
)
from dreamteacher.teachers.registry import load_teacher, read_card, sha256
from dreamteacher.teachers.training import diffusion
from dreamteacher.teachers.training.config import TrainTeacherConfig
from dreamteacher.teachers.training.diffusion import DiffusionObjective, DiffusionPreset, epsilon_loss
from dreamteacher.teachers.training.objective import TrainingPlan
from dreamteacher.teachers.training.train import PRESETS, train_teacher
from tests.builders.runs import assert_equal, assert_refused, left_by

# Strides 2 to 32 as in cpu-64, in a network that takes milliseconds.
TINY = DiffusionPreset(
    channels=(8, 8, 8, 8, 8), layers=1, attention=(4,), head=8, patch=2, groups=4, resample=False,
    dropout=0.0, size=(64, 64), batch_size=8, lr=4e-3, steps=10, ema=0.8, timestep=100,
)  # fmt: skip

RUN = """
import sys, json
from dreamteacher.runtime.config import from_json
from dreamteacher.teachers.training import train
from dreamteacher.teachers.diffusion.teacher import DiffusionTeacher
from dreamteacher.teachers.training.diffusion import DiffusionPreset
import torch
torch.set_num_threads(1)
train.PRESETS["cpu-64"] = from_json(DiffusionPreset, json.loads(sys.argv[2]))
DiffusionTeacher.__init__.__kwdefaults__["sampling_steps"] = 2
train.train_teacher(from_json(train.TrainTeacherConfig, json.loads(sys.argv[1])))
"""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "cpu-64", TINY)
    monkeypatch.setitem(DiffusionTeacher.__init__.__kwdefaults__, "sampling_steps", 2)


@pytest.fixture
def config(image_folder: Path, tmp_path: Path) -> TrainTeacherConfig:
    return TrainTeacherConfig(
        images=image_folder, out=tmp_path / "teacher", device="cpu", precision="float32", save_every=4,
        sample_every=1000,
    )  # fmt: skip


def everything(run: Path) -> dict[str, object]:
    """All that a training leaves, as comparable values."""
    return left_by(run, "teacher") | {"samples": picture(run / "samples.png").tobytes()}


def picture(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


def test_epsilon_loss_equals_a_float64_loop(tiny_spec: DiffusionSpec) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet = build_unet(tiny_spec).double().eval()
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(3, 4, 32, 32, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 137, 999])
    # Ho et al. 2020: alpha-bar from its definition, the sum over pixels one by one.
    bar, product = [], 1.0
    for i in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        bar.append(product)
    with torch.no_grad():
        got = epsilon_loss(unet, x0, t, noise.float().double(), alphas_cumprod("linear"))
        for i in range(3):
            a = bar[int(t[i])]
            e = noise[i].float().double()
            predicted = unet((a**0.5 * x0[i] + (1 - a) ** 0.5 * e)[None], t[i : i + 1]).sample[0]
            total, count = 0.0, 0
            for p, q in zip(predicted.flatten().tolist(), e.flatten().tolist(), strict=True):
                total, count = total + (p - q) ** 2, count + 1
            assert got[i].item() == pytest.approx(total / count, rel=1e-5)  # the loss itself is float32


def test_loss_falls_and_the_command_writes_all(
    config: TrainTeacherConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """60 steps of the command line on flat images: noise on them is easy to tell."""
    easy = tmp_path / "easy"
    easy.mkdir()
    for i in range(16):
        Image.new("L", (64, 64), 16 * i).save(easy / f"{i}.png")
    arguments = ["--images", str(easy), "--out", str(config.out), "--steps", "60", "--sample-every", "20"]
    assert cli.main(["train-teacher", *arguments, "--device", "cpu", "--precision", "float32"]) == 0
    said = capsys.readouterr().out
    assert "channels grey" in said
    assert "Report: " in said
    names = {p.name for p in config.out.iterdir()}
    files = {
        "config.json",
        "teacher.json",
        "teacher.safetensors",
        "samples.png",
        "metrics.jsonl",
        "timing.jsonl",
    }
    assert files | {"report.html", "checkpoint-00000060.safetensors"} <= names
    rows = read_rows(config.out / "metrics.jsonl")
    assert [(row["step"], row["images_seen"]) for row in rows if "loss" in row] == [(50, 400), (60, 480)]
    checks = [row for row in rows if "loss/t250" in row]
    assert [row["step"] for row in checks] == [20, 40, 60]
    for t in (50, 100, 250, 500):  # from a network that does not know the noise: 1
        assert checks[-1][f"loss/t{t}"] < checks[0][f"loss/t{t}"] < 1.2
    assert checks[-1]["loss/t500"] < 0.7
    first, last = (row["loss"] for row in rows if "loss" in row)
    assert last < first
    assert picture(config.out / "samples.png").size == (8 * 66 + 2, 8 * 66 + 2)  # 64, each in a frame


def test_the_folder_rebuilds_the_network(config: TrainTeacherConfig, image_folder: Path) -> None:
    assert train_teacher(config) == config.out
    last = checkpoint.latest(config.out)
    assert last is not None
    tensors, meta = checkpoint.load(last)
    assert (meta["kind"], meta["step"]) == ("train-teacher", 10)
    ema = {k.removeprefix("ema/"): v for k, v in tensors.items() if k.startswith("ema/")}
    trained = {k.removeprefix("unet/"): v for k, v in tensors.items() if k.startswith("unet/")}
    assert ema.keys() == trained.keys()
    assert any(not torch.equal(ema[k], trained[k]) for k in ema)

    card = read_card(config.out)
    assert card["sha256"] == sha256(config.out / "teacher.safetensors")
    assert (card["name"], card["images"], card["steps"], card["batch_size"]) == ("teacher", 16, 10, 8)
    spec = from_json(DiffusionSpec, card["network"])
    unet = build_unet(spec)
    unet.load_state_dict({k: v.half().float() for k, v in ema.items()})
    expected = DiffusionTeacher(unet, spec, name="teacher", licence="-")
    teacher = load_teacher(str(config.out))
    assert teacher.size == (64, 64)
    assert [s.stride for s in teacher.specs] == [4, 8, 16, 32]
    assert not teacher.training
    images = image_set.load_images(image_folder, (64, 64)).get(torch.arange(4)).float() / 255
    for a, b in zip(
        teacher.encode(images, generator=torch.Generator().manual_seed(0)),
        expected.encode(images, generator=torch.Generator().manual_seed(0)),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert teacher.licence == TrainTeacherConfig.__dataclass_fields__["licence"].default


@pytest.mark.slow
def test_kill_and_resume_is_bitwise(config: TrainTeacherConfig) -> None:
    config = dataclasses.replace(config, steps=24, sample_every=12)
    whole = train_teacher(dataclasses.replace(config, out=config.out.with_name("whole")))
    arguments = [json.dumps(to_json(config)), json.dumps(to_json(TINY))]
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, *arguments], stdout=subprocess.DEVNULL, start_new_session=True
    )
    while not (config.out / "checkpoint-00000008.safetensors").exists() and process.poll() is None:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the training ended before it could be killed"
    killed_at = checkpoint.latest(config.out)
    assert killed_at is not None
    assert "checkpoint-00000004" < killed_at.name < "checkpoint-00000024"
    assert not (config.out / "teacher.safetensors").exists()
    assert train_teacher(config) == config.out
    assert whole is not None
    expected, got = everything(whole), everything(config.out)
    assert_equal(expected, got)
    # A finished training is not trained further, and its name is its folder's.
    train_teacher(config)
    assert_equal(got, everything(config.out))


def signalled_at(step: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process gets a signal when it asks for the images of a step."""
    original = batches.batches

    def signalled(*args, **kwargs):  # type: ignore[no-untyped-def]
        for batch in original(*args, **kwargs):
            if batch.step == step:
                os.kill(os.getpid(), number)
            yield batch

    monkeypatch.setattr(batches, "batches", signalled)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_exit_with_128_plus_n(
    config: TrainTeacherConfig, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    signalled_at(5, number, monkeypatch)
    with signals_handled(), pytest.raises(SystemExit) as stop:
        train_teacher(config)
    assert stop.value.code == 128 + number
    assert checkpoint.latest(config.out) == checkpoint.checkpoint_path(config.out, 6)


@pytest.mark.parametrize(
    ("colour", "asked", "channels"),
    [(False, "auto", 1), (True, "auto", 3), (True, "grey", 1), (False, "rgb", 3)],
)
def test_grey_and_rgb(
    config: TrainTeacherConfig, tmp_path: Path, colour: bool, asked: str, channels: int, image_folder: Path
) -> None:
    folder = image_folder
    if colour:  # one image of 16 is enough
        folder = tmp_path / "coloured"
        folder.mkdir()
        for i in range(16):
            Image.new("RGB", (64, 64), (9, 9, 9) if i else (9, 9, 50)).save(folder / f"{i}.png")
    config = dataclasses.replace(config, images=folder, channels=asked, steps=1)  # type: ignore[arg-type]
    train_teacher(config)
    network = read_card(config.out)["network"]
    assert network["image_channels"] == channels
    assert network["unet"]["in_channels"] == network["unet"]["out_channels"] == channels * 4
    teacher = load_teacher(str(config.out))
    images, maps = teacher.sample(2, generator=torch.Generator().manual_seed(0))
    assert images.shape == (2, 3, 64, 64)
    assert torch.equal(images[:, 0], images[:, 1]) == (channels == 1)
    assert len(maps) == 4


def test_a_size_that_is_not_square_then_pretraining(config: TrainTeacherConfig, tmp_path: Path) -> None:
    train_teacher(dataclasses.replace(config, size=(32, 96), steps=2, name="wide", licence="CC0-1.0"))
    teacher = load_teacher(str(config.out))
    assert (teacher.name, teacher.licence, teacher.size) == ("wide", "CC0-1.0", (32, 96))
    assert picture(config.out / "samples.png").size == (8 * 98 + 2, 8 * 34 + 2)
    run = pretrain(PretrainConfig(
        images=config.images, out=tmp_path / "run", teacher=str(config.out), student="test_resnet", width=8,
        batch_size=8, epochs=1, warmup_epochs=0, device="cpu", precision="float32",
    ))  # fmt: skip
    assert run is not None
    facts = json.loads((run / "config.json").read_text())
    assert facts["data"]["size"] == [32, 96]
    assert facts["teacher"]["name"] == "wide"
    assert read_rows(run / "metrics.jsonl")[-1]["step"] == 2


def test_dry_run_leaves_nothing(config: TrainTeacherConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_teacher(dataclasses.replace(config, dry_run=True)) is None
    said = capsys.readouterr().out
    for word in ("parameters", "steps 10", "batch 8", "epochs 5", "disk", "grey"):
        assert word in said
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": (64, 72)}, "multiples of 32"),
        ({"size": (40, 64)}, "multiples of 32"),
        ({"preset": "gpu-64", "size": (64, 80)}, "multiples of 32"),
        ({"preset": "adm-bdd100k", "size": (128, 272)}, "multiples of 32"),
        ({"batch_size": 17}, "16 readable images"),
        ({"images": Path("nowhere")}, "nowhere"),
        ({"device": "warp"}, "doctor"),
    ],
)
def test_bad_settings_are_refused_before_a_folder_is_made(
    config: TrainTeacherConfig, change: dict[str, object], words: str
) -> None:
    assert_refused(dataclasses.replace(config, **change), words)  # type: ignore[arg-type]


def test_other_settings_on_resume_are_refused(config: TrainTeacherConfig) -> None:
    train_teacher(config)
    before = everything(config.out)
    with pytest.raises(UserError, match="steps: None -> 20"):
        train_teacher(dataclasses.replace(config, steps=20))
    assert_equal(before, everything(config.out))


def test_nan_stops_and_keeps_the_checkpoint(
    config: TrainTeacherConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = diffusion.epsilon_loss

    def poisoned(unet, x0, t, noise, alpha_bar):  # type: ignore[no-untyped-def]
        poisoned.calls += 1  # type: ignore[attr-defined]
        loss = original(unet, x0, t, noise, alpha_bar)
        return loss * float("nan") if poisoned.calls == 7 else loss  # type: ignore[attr-defined]

    poisoned.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(diffusion, "epsilon_loss", poisoned)
    with pytest.raises(
        UserError, match=r"loss is not finite at step 7\.\n.*The last checkpoint is from before"
    ):
        train_teacher(config)
    assert checkpoint.latest(config.out) == checkpoint.checkpoint_path(config.out, 4)
    poisoned.calls = 4  # type: ignore[attr-defined]
    none = dataclasses.replace(config, out=config.out.with_name("none"))
    with pytest.raises(UserError, match=r"loss is not finite at step 3\.\n.*No checkpoint was written"):
        train_teacher(none)
    assert checkpoint.latest(none.out) is None


@pytest.mark.parametrize("last", [4, 10])
def test_a_gradient_that_is_not_finite_is_never_saved(
    config: TrainTeacherConfig, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is, in the very step that a checkpoint, or the finished teacher, is written after."""
    original, count = diffusion.epsilon_loss, itertools.count(1)

    def poisoned(unet, x0, t, noise, alpha_bar):  # type: ignore[no-untyped-def]
        loss = original(unet, x0, t, noise, alpha_bar)
        return loss + (loss * 0).sqrt() if next(count) == last else loss

    monkeypatch.setattr(diffusion, "epsilon_loss", poisoned)
    with pytest.raises(UserError, match=f"grad_norm is not finite at step {last}"):
        train_teacher(config)
    assert not (config.out / f"checkpoint-{last:08}.safetensors").exists()
    assert not (config.out / "teacher.safetensors").exists()


def test_dropout_depends_on_the_seed_the_step_and_the_process_alone(
    config: TrainTeacherConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed it is bitwise the same, whatever torch's global generator did before."""
    monkeypatch.setitem(PRESETS, "cpu-64", dataclasses.replace(TINY, dropout=0.5))
    with torch.random.fork_rng(devices=[]):
        whole = train_teacher(dataclasses.replace(config, out=config.out.with_name("whole")))
        signalled_at(5, signal.SIGTERM, monkeypatch)
        with signals_handled(), pytest.raises(SystemExit):
            train_teacher(config)
        torch.manual_seed(1)
        before = torch.get_rng_state()
        train_teacher(config)
        assert torch.equal(torch.get_rng_state(), before)
    assert whole is not None
    assert_equal(everything(whole), everything(config.out))

    spec = diffusion.network_spec(PRESETS["cpu-64"], (64, 64), 1, "linear")  # type: ignore[arg-type]
    images, found = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)), set()
    monkeypatch.setattr(diffusion, "randint", lambda high, shape, *_, **__: torch.arange(*shape))
    monkeypatch.setattr(diffusion, "randn", lambda shape, *_, **__: torch.ones(shape))
    for world in (World(0, 2), World(1, 2), World(1, 2)):
        plan = TrainingPlan(
            seed=0, steps=9, batch_size=8, lr=1e-3, device=torch.device("cpu"), precision="float32"
        )
        objective = DiffusionObjective(PRESETS["cpu-64"], spec, plan)  # type: ignore[arg-type]
        objective.plan = dataclasses.replace(plan, world=world)
        found.add(objective.step(3, images)["loss"].item())
    assert len(found) == 2


def test_a_step_out_of_memory_says_what_to_do(
    config: TrainTeacherConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hungry(self, step, images):  # type: ignore[no-untyped-def]
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nand more")

    monkeypatch.setattr(DiffusionObjective, "step", hungry)
    arguments = ["--images", str(config.images), "--out", str(config.out), "--device", "cpu"]
    assert cli.main(["train-teacher", *arguments]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[0].startswith("error: Steps of 8 images run out of memory: CUDA out of memory. Tried")
    assert "smaller --batch-size" in said[1]
