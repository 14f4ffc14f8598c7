"""The label branch end to end: interpreters trained, their labels distilled, datasets labelled, errors before work."""

from __future__ import annotations

import dataclasses
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
from safetensors.torch import load_file
from torch import Tensor

from dreamteacher.data import batches, seeds
from dreamteacher.data.draws import draw_images, draw_labels
from dreamteacher.data.labelled import draw
from dreamteacher.data.labelled_set import LabelledSet
from dreamteacher.data.masks.reader import read_masks
from dreamteacher.distill.config import MakeLabelsConfig, PretrainConfig, TrainInterpreterConfig
from dreamteacher.distill.dataset import FeatureBatch, Part
from dreamteacher.distill.make_labels import make_labels
from dreamteacher.distill.pretrain import pretrain
from dreamteacher.distill.step import loss_weights
from dreamteacher.distill.train_interpreter import prepare, train_interpreter
from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.downstream.evaluate import check_config, evaluate
from dreamteacher.downstream.segmentation.config import SegmentConfig
from dreamteacher.losses import feature_loss, interpreter_loss, label_distillation, total_loss
from dreamteacher.models import distilled
from dreamteacher.models.distilled import load_distilled
from dreamteacher.models.interpreter import load_interpreter, read_interpreter_spec
from dreamteacher.models.regressor import FeatureRegressor, resize
from dreamteacher.models.student import create_student
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.config import to_json
from dreamteacher.runtime.run_folder import read_rows
from dreamteacher.runtime.signals import signals_handled
from dreamteacher.teachers.registry import load_teacher
from tests.builders.pictures import refused
from tests.builders.pixel_features import features_of
from tests.builders.steps import Stepper
from tests.test_docs import masked

GAN = "chest-xray-gan-64"
RUN = """
import sys, json
from dreamteacher.runtime.config import from_json
from dreamteacher.distill.config import TrainInterpreterConfig
from dreamteacher.distill.train_interpreter import train_interpreter
from tests.builders.pixel_features import features_of
from tests.builders.steps import Stepper
import torch
torch.set_num_threads(1)
train_interpreter(from_json(TrainInterpreterConfig, json.loads(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 images with a bright square, and black and white masks of it."""
    root = tmp_path_factory.mktemp("squares")
    masked(root / "images", root / "masks", 16)
    return root


@pytest.fixture
def config(squares: Path, tiny_teacher: Path, tmp_path: Path) -> TrainInterpreterConfig:
    return TrainInterpreterConfig(
        images=squares / "images", masks=squares / "masks", binary_masks=True, labels=8,
        out=tmp_path / "interpreter", teacher=str(tiny_teacher), width=16, batch_size=4, epochs=15,
        warmup_epochs=2, look_every=5, save_every=4, device="cpu", precision="float32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(squares: Path, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter of squares."""
    out = tmp_path_factory.mktemp("trained") / "interpreter"
    train_interpreter(
        TrainInterpreterConfig(
            images=squares / "images", masks=squares / "masks", binary_masks=True, out=out,
            teacher=str(tiny_teacher), width=16, batch_size=8, epochs=40, warmup_epochs=4, device="cpu",
        )
    )  # fmt: skip
    return out


def mixed(squares: Path, tiny: Path, out: Path, **settings: object) -> PretrainConfig:
    base = PretrainConfig(
        images=squares / "images", out=out, teacher=str(tiny), student="test_resnet", width=8, batch_size=8,
        epochs=2, warmup_epochs=0, lr=2e-3, device="cpu", precision="float32", log_every=1, distill="mixed",
    )  # fmt: skip
    return dataclasses.replace(base, **settings)  # type: ignore[arg-type]


# --- the interpreter -------------------------------------------------------------------------------------


def test_it_learns_squares_and_says_so_early(config: TrainInterpreterConfig) -> None:
    config = dataclasses.replace(config, epochs=40)
    out = train_interpreter(config)
    assert out is not None
    rows = read_rows(out / "metrics.jsonl")
    looks = [row for row in rows if "val_miou" in row]
    assert [row["step"] for row in looks] == list(range(10, 81, 10))  # every 5 epochs of 2 steps
    assert looks[-1]["val_miou"] > 0.8
    assert looks[-1]["val_miou"] > looks[0]["val_miou"] or looks[0]["val_miou"] > 0.95
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    interpreter, spec = load_interpreter(out)
    assert (spec.classes, spec.labelled, spec.pooled) == (("background", "foreground"), 8, False)
    assert not any(p.requires_grad for p in interpreter.parameters())


def test_a_step_is_equation_4_on_the_teachers_maps(config: TrainInterpreterConfig) -> None:
    """The first loss from its parts: this step's draw of images, flips and noise, and the fresh network."""
    config = dataclasses.replace(config, dropout=0.0, seed=1)
    job = prepare(config)
    chosen = batches.batch_indices(8, batch_size=4, seed=1, step=0)
    flips = torch.rand(4, generator=seeds.step_generator(1, 0, "flip")) < 0.5
    assert flips.any()
    assert not flips.all()
    images = batches.flip_images(job.labelled.images[chosen], flips).float() / 255
    target = torch.stack(
        [m.flip(-1) if f else m for m, f in zip(job.labelled.targets[chosen], flips, strict=True)]
    )
    seed = seeds.step_generator(1, 0, "teacher").initial_seed()
    teacher = load_teacher(config.teacher)
    maps = teacher.encode(images, generator=torch.Generator().manual_seed(seed))
    logits = resize(job.spec.build(config.seed)(maps), (64, 64))
    expected = interpreter_loss(logits.double(), target)
    assert job.loss(0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_teacher_batches_change_nothing_but_memory(config: TrainInterpreterConfig) -> None:
    """With fixed noise the maps are the same, one image at a time or all together."""
    config = dataclasses.replace(config, noise="fixed", t=(50, 150))
    whole = prepare(config)
    part = prepare(dataclasses.replace(config, teacher_batch=1))
    index, flips = torch.arange(4), torch.tensor([True, False, True, False])
    for a, b in zip(
        whole.maps(whole.labelled, index, flips, torch.Generator()),
        part.maps(part.labelled, index, flips, torch.Generator()), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert whole.spec.levels == tuple(2 * 8 for _ in whole.teacher.specs)


@pytest.mark.slow
def test_kill_and_resume_is_bitwise(config: TrainInterpreterConfig) -> None:
    config = dataclasses.replace(config, ema=0.9, class_weights="balanced")
    whole = train_interpreter(dataclasses.replace(config, out=config.out.with_name("whole")))
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, json.dumps(to_json(config))],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not list(config.out.glob("checkpoint-*")) and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert checkpoint.latest(config.out) is not None
    assert not (config.out / "interpreter.json").exists()
    train_interpreter(config)
    assert whole is not None
    a, b = (load_file(folder / "interpreter.safetensors") for folder in (whole, config.out))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (whole / "metrics.jsonl").read_bytes() == (config.out / "metrics.jsonl").read_bytes()


def test_class_labels_of_whole_images(image_folder: Path, config: TrainInterpreterConfig) -> None:
    config = dataclasses.replace(
        config, images=image_folder, masks=None, binary_masks=False, labels=4, epochs=30
    )
    out = train_interpreter(config)
    assert out is not None
    spec = read_interpreter_spec(out)
    assert (spec.classes, spec.pooled, spec.labelled) == (("bright", "dark"), True, 8)
    assert read_rows(out / "metrics.jsonl")[-1]["val_accuracy"] == 1.0


def test_balanced_weights_are_inverse_shares(config: TrainInterpreterConfig) -> None:
    masks = torch.zeros(4, 64, 64, dtype=torch.int64)
    masks[:, :16] = 1
    masks[0, :32] = 255
    labelled = LabelledSet(
        images=torch.zeros(4, 3, 64, 64, dtype=torch.uint8), targets=masks, classes=("a", "b", "never")
    )
    config = dataclasses.replace(config, labels=None, class_weights="balanced")
    weights = prepare(config, labelled=labelled).weights
    assert weights is not None
    ones, zeros = 3 * 16 * 64, 3 * 48 * 64 + 32 * 64
    total = ones + zeros
    assert weights.tolist() == pytest.approx([total / (2 * zeros), total / (2 * ones), 0.0])
    assert (weights[0] * zeros + weights[1] * ones).item() == pytest.approx(total, rel=1e-6)


def test_draws_are_those_of_the_downstream_tasks() -> None:
    images = torch.arange(30, dtype=torch.uint8).view(30, 1, 1, 1).expand(30, 3, 4, 4)
    masks = LabelledSet(images=images, targets=torch.zeros(30, 4, 4, dtype=torch.int64), classes=("a", "b"))
    for seed in range(3):
        chosen, rest = draw(masks, 12, seed)
        assert torch.equal(chosen.images[:, 0, 0, 0].long(), draw_images(30, 12, seed))
        assert sorted([*chosen.images[:, 0, 0, 0].tolist(), *rest.images[:, 0, 0, 0].tolist()]) == list(
            range(30)
        )
        labels = torch.arange(30) % 3
        rows = dataclasses.replace(masks, targets=labels, classes=("a", "b", "c"))
        found = draw(rows, 4, seed)[0].images[:, 0, 0, 0].long()
        assert torch.equal(found, draw_labels(labels, 4, classes=3, seed=seed))
    refused(lambda: draw(masks, 31, 0), "31 labelled images asked for", "1 to 30 can be drawn")
    refused(lambda: draw(rows, 11, 0), "11 labels per class asked for", "has 10 images")


def test_maps_of_decoder_blocks_are_ddpm_segs(tiny_teacher: Path) -> None:
    """Levels by `blocks`, made as large as the image and put in order, are its pixel features."""
    blocks, steps = (1, 2, 3), (50, 150, 250)
    teacher = load_teacher(str(tiny_teacher), timesteps=steps, blocks=blocks)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    maps = teacher.encode(images, generator=torch.Generator().manual_seed(1))
    whole = load_teacher(str(tiny_teacher), timesteps=steps)
    expected = features_of(whole, images, blocks=blocks, generator=torch.Generator().manual_seed(1))
    assert [(s.stride, s.channels) for s in teacher.specs] == [(8, 8 * 3), (16, 2 * 8 * 3)]
    assert sum(s.channels for s in teacher.specs) == expected.shape[1]
    torch.testing.assert_close(by_step_and_block(maps, len(steps)), expected, rtol=1e-4, atol=1e-5)
    teacher.keep_only("encode")
    again = teacher.encode(images, generator=torch.Generator().manual_seed(1))
    assert all(map(torch.equal, maps, again))


def by_step_and_block(maps: list[Tensor], steps: int) -> Tensor:
    """Levels, fine to coarse, as DDPM-seg stacks them: step by step, coarse blocks first within a step."""
    large = [torch.nn.functional.interpolate(m, (64, 64), mode="bilinear", align_corners=False) for m in maps]
    by_step = [
        m.chunk(steps, dim=1) for m in reversed(large)
    ]  # in a level: step by step, then block by block
    return torch.cat([level[t] for t in range(steps) for level in by_step], dim=1)


# --- distillation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["feature", "label", "mixed"])
def test_the_loss_of_a_step_is_equation_3_5_or_6(
    mode: str, squares: Path, trained: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    config = mixed(squares, tiny_teacher, tmp_path / "run", distill=mode, label_weight=0.7, tau=2.0)
    teacher, student = load_teacher(str(tiny_teacher)), create_student("test_resnet")
    regressor = FeatureRegressor(student.specs, teacher.specs, width=8)
    interpreter = load_interpreter(trained)[0] if mode != "feature" else None
    training = Stepper(config, student, regressor, 10, interpreter)
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    maps = teacher.encode(images, generator=torch.Generator().manual_seed(1))
    part = Part(FeatureBatch(images, maps, 0.0, 0), last=True)
    losses = training.distillation.losses(part)
    total = total_loss(losses, loss_weights(config))
    fused = regressor.fused(student(images))
    feature = feature_loss(regressor.project(fused), maps).total.double()
    if interpreter is None:
        assert total.item() == pytest.approx(feature.item(), rel=1e-5)
        return
    assert training.network.head is not None
    label = label_distillation(training.network.head(fused).double(), interpreter(maps).double(), tau=2.0)
    expected = label if mode == "label" else feature + 0.7 * label
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses["label"].item() == pytest.approx(label.item(), rel=1e-5)
    assert losses["entropy"].item() <= losses["label"].item()
    assert bool(part.maps) == (mode == "mixed")
    total.backward()
    assert all(p.grad is not None for p in training.network.head.parameters())
    assert all(p.grad is None for p in interpreter.parameters())
    projected = [p.grad is not None for p in regressor.projections.parameters()]
    assert all(projected) if mode == "mixed" else not any(projected)


@pytest.mark.slow
def test_one_command_from_images_and_masks_to_a_segmentation_model(
    squares: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    config = mixed(
        squares, tiny_teacher, tmp_path / "run", labelled=squares / "images", masks=squares / "masks",
        binary_masks=True, epochs=60, lr=4e-3, log_every=40,
    )  # fmt: skip
    config = dataclasses.replace(
        config, label=dataclasses.replace(config.label, epochs=40, warmup_epochs=4, width=16, batch_size=8)
    )
    out = pretrain(config)
    assert out is not None
    rows = read_rows(out / "metrics.jsonl")
    assert rows[-1]["label_kl"] < 0.5 * rows[0]["label_kl"]
    assert rows[-1]["label_kl"] > 0
    results = evaluate(
        EvaluateConfig(
            init=str(out), images=squares / "images", masks=squares / "masks", binary_masks=True, size=(64, 64),
            seeds=(0,), mask_counts=(4,), neck=True, segment=SegmentConfig(steps=3),
            tasks=("distilled", "segment-finetune"), out=out,
        )
    )  # fmt: skip
    scores = {(r["task"], r["metric"]): r["value"] for r in results}
    assert scores["distilled", "miou"] > 0.8
    assert ("segment-finetune", "miou") in scores
    # The same command again changes nothing and does not train the interpreter anew.
    before = (out / "interpreter" / "interpreter.safetensors").stat().st_mtime_ns
    pretrain(config)
    assert (out / "interpreter" / "interpreter.safetensors").stat().st_mtime_ns == before
    # What it learned labels images without the teacher.
    folder = make_labels(
        MakeLabelsConfig(run=out, images=squares / "images", out=tmp_path / "labels", batch_size=5)
    )
    truth = read_masks(squares / "images", squares / "masks", (64, 64), binary=True).load()
    found = read_masks(folder / "images", folder / "masks", (64, 64)).load()
    assert (found.targets == truth.targets).float().mean() > 0.9


@pytest.mark.slow
def test_a_mixed_run_resumes_bitwise(
    squares: Path, trained: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = mixed(
        squares, tiny_teacher, tmp_path / "run", interpreter=trained, epochs=4, save_every=3, ema=0.9
    )
    whole = pretrain(dataclasses.replace(config, out=tmp_path / "whole"))
    original = batches.batches

    def stopped(*args, **kwargs):
        for batch in original(*args, **kwargs):
            if batch.step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(batches, "batches", stopped)
    with signals_handled(), pytest.raises(SystemExit) as stop:
        pretrain(config)
    assert stop.value.code == 128 + signal.SIGTERM
    monkeypatch.setattr(batches, "batches", original)
    pretrain(config)
    assert whole is not None
    for name in ("backbone", "regressor", "head"):
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (whole, config.out))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a), name
    assert (whole / "metrics.jsonl").read_bytes() == (config.out / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_classes_are_distilled_too(image_folder: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    config = mixed(
        image_folder.parent, tiny_teacher, tmp_path / "run", images=image_folder, labelled=image_folder, distill="label",
        epochs=30, lr=4e-3, log_every=10,
    )  # fmt: skip
    config = dataclasses.replace(
        config, label=dataclasses.replace(config.label, epochs=20, warmup_epochs=2, width=16, batch_size=8)
    )
    out = pretrain(config)
    assert out is not None
    assert "mse/s4" not in read_rows(out / "metrics.jsonl")[-1]
    rows = evaluate(
        EvaluateConfig(init=str(out), train=image_folder, test=image_folder, size=(64, 64), seeds=(0,),
                       labels=(2,), tasks=("distilled-classes",))
    )  # fmt: skip
    assert {r["metric"]: r["value"] for r in rows}["accuracy"] == 1.0
    assert load_distilled(out).classes == ("bright", "dark")
    # What the head labels is in the file's metadata: no model is made to find out.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distilled, "create_student", lambda *_, **__: pytest.fail("a model was made"))
        config = EvaluateConfig(
            init=str(out), train=image_folder, test=image_folder, size=(64, 64), labels=(2,)
        )
        assert check_config(config) == ("linear", "finetune", "knn", "distilled-classes")


# --- datasets that a model labels ------------------------------------------------------------------------


@pytest.mark.slow
def test_samples_are_annotated_and_then_endless_ones_are_labelled(tmp_path: Path) -> None:
    """The DatasetGAN way, with the embedded GAN: bright pixels stand for what a person would have drawn."""
    drawn = make_labels(MakeLabelsConfig(teacher=GAN, samples=6, out=tmp_path / "drawn", batch_size=4))
    manifest = json.loads((drawn / "images" / "samples.json").read_text())
    assert list(manifest["seeds"]) == [f"{i:06d}.png" for i in range(6)]
    (tmp_path / "masks").mkdir()
    for path in sorted((drawn / "images").glob("*.png")):
        Image.open(path).convert("L").point(lambda v: 255 * (v > 128)).save(tmp_path / "masks" / path.name)
    out = train_interpreter(
        TrainInterpreterConfig(
            images=drawn / "images", masks=tmp_path / "masks", binary_masks=True, teacher=GAN, width=16,
            out=tmp_path / "interpreter", epochs=30, warmup_epochs=3, batch_size=3, device="cpu",
        )
    )  # fmt: skip
    assert out is not None
    config = MakeLabelsConfig(
        interpreter=out, samples=5, seed=1, out=tmp_path / "endless", soft=True, batch_size=2
    )
    folder = make_labels(config)
    rows = read_rows(folder / "labels.jsonl")
    assert [row["name"] for row in rows] == [f"{i:06d}.png" for i in range(5)]
    good = []
    for row in rows:
        bright = torch.frombuffer(
            bytearray(Image.open(folder / "images" / row["name"]).convert("L").tobytes()), dtype=torch.uint8
        )
        ids = torch.frombuffer(
            bytearray(Image.open(folder / "masks" / row["name"]).tobytes()), dtype=torch.uint8
        )
        good.append((ids.bool() == (bright > 128)).float().mean())
        soft = load_file((folder / "soft" / row["name"]).with_suffix(".safetensors"))["probabilities"]
        assert soft.shape[0] == 2
        assert (soft.int().sum(0) - 255).abs().max() <= 1
        assert sum(row["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert sum(good) / len(good) > 0.8
    assert "mean confidence" in (folder / "index.html").read_text()
    # Stopped half-way and run again: the same files.
    whole = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.png")}
    text = (folder / "labels.jsonl").read_text().splitlines(keepends=True)
    (folder / "labels.jsonl").write_text("".join(text[:2]))
    (folder / "masks" / "000003.png").unlink()
    make_labels(config)
    assert {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.png")} == whole
    assert (folder / "labels.jsonl").read_text() == "".join(text)
    refused(lambda: make_labels(dataclasses.replace(config, seed=2)), "other settings", "seed: 1 -> 2")


def test_a_gan_cannot_learn_from_images_that_it_did_not_draw(squares: Path, tmp_path: Path) -> None:
    config = TrainInterpreterConfig(
        images=squares / "images", masks=squares / "masks", binary_masks=True, teacher=GAN, out=tmp_path / "x"
    )
    refused(lambda: prepare(config), "samples.json", "make-labels --samples")
    (tmp_path / "images").mkdir()
    for path in (squares / "images").glob("*.png"):
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "images" / "samples.json").write_text(json.dumps({"seeds": {"1.png": 3}}))
    refused(
        lambda: prepare(dataclasses.replace(config, images=tmp_path / "images")),
        "15 of 16 images",
        "no samples",
    )


# --- what is refused before anything runs ----------------------------------------------------------------


def test_labels_and_modes_that_do_not_go_together(
    squares: Path, trained: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def wrong(*parts: str, **settings: object) -> None:
        refused(lambda: pretrain(mixed(squares, tiny_teacher, run, **settings)), *parts)
        assert not run.exists()

    wrong("--distill mixed learns from", "--interpreter FOLDER")
    wrong("--interpreter is given", "--distill mixed", distill="feature", interpreter=trained)
    wrong("holds no finished interpreter", interpreter=tmp_path)
    wrong("channels at stride", "--t 100", interpreter=trained, t=(50, 150))
    wrong("another teacher", interpreter=trained, teacher="chest-xray-64")
    wrong("--tau must be above 0", interpreter=trained, tau=0.0)
    wrong("not sorted into at least two subfolders", labelled=squares / "masks")
    refused(lambda: load_distilled(squares), "head.safetensors", "--distill label")


def test_memory_of_labels_is_checked_first(squares: Path, config: TrainInterpreterConfig) -> None:
    found = read_masks(squares / "images", squares / "masks", (64, 64), binary=True).load()
    job = prepare(dataclasses.replace(config, dry_run=True), labelled=found)
    assert len(job.labelled) == 8
    assert not config.out.exists()
    refused(lambda: prepare(dataclasses.replace(config, width=0)), "--width must be above 0")
    refused(lambda: prepare(dataclasses.replace(config, warmup_epochs=99)), "--warmup-epochs 99")
