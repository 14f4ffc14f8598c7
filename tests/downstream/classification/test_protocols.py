"""The published classification protocols: the LARS probe, fine-tuning from timm's parts, what they augment with."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import top_k_accuracy_score
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor, nn

from dreamteacher import metrics
from dreamteacher.cli import main as cli
from dreamteacher.data.image_set import load_images
from dreamteacher.downstream import evaluate, features
from dreamteacher.downstream.classification import augment, finetune_full, probes
from dreamteacher.downstream.classification.augment import Augmentation
from dreamteacher.downstream.classification.config import FinetuneFullConfig, LinearSgdConfig
from dreamteacher.downstream.classification.finetune_full import TimmClassifier, recipe_of
from dreamteacher.downstream.classification.probes import fit_logistic
from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.downstream.features import ClassificationData
from dreamteacher.downstream.loop import LongRun
from dreamteacher.models.student import Student, create_student
from dreamteacher.runtime.distributed.device import seeded
from dreamteacher.testing import check_task
from tests.builders.pictures import refused
from tests.builders.students import noted_losses

NAME = "test_resnet"
SIDE = 32
RESIZE_ONLY = Augmentation(size=(SIDE, SIDE), scale=(1.0, 1.0), flip=0.0)
# What a few dozen steps on 40 images can learn with.
QUICK = FinetuneFullConfig(
    optimizer="adamw", epochs=10, batch_size=8, lr=2e-3, warmup_epochs=1, drop_path=0.05, repeats=1,
    rand_augment="off", mixup=0.1, cutmix=0.1,
)  # fmt: skip


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coloured(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with a slight tint: class 0 red, class 1 blue."""
    labels = torch.arange(count) % 2
    images = torch.randint(60, 160, (count, 3, SIDE, SIDE), generator=generator(seed))
    images[labels == 0, 0] += 60
    images[labels == 1, 2] += 60
    return images.to(torch.uint8), labels


@pytest.fixture(scope="module")
def student() -> Student:
    return create_student(NAME, seed=0)


@pytest.fixture(scope="module")
def data() -> ClassificationData:
    train, train_labels = coloured(40, 1)
    test, test_labels = coloured(40, 2)
    return ClassificationData(
        train=train, train_labels=train_labels, test=test, test_labels=test_labels, classes=("red", "blue")
    )


# ---- metrics


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_against_sklearn(k: int) -> None:
    scores = torch.randn(200, 7, generator=generator(0))
    target = torch.randint(0, 7, (200,), generator=generator(1))
    expected = top_k_accuracy_score(target.numpy(), scores.numpy(), k=k, labels=range(7))
    assert metrics.topk_accuracy(scores, target, k) == pytest.approx(expected, abs=1e-12)
    if k == 1:
        assert metrics.topk_accuracy(scores, target, 1) == metrics.accuracy(scores.argmax(1), target)


def test_top_k_of_constant_scores_is_never_right() -> None:
    scores, target = torch.zeros(4, 6), torch.tensor([0, 1, 4, 5])
    assert metrics.topk_accuracy(scores, target, 5) == 0.0
    assert metrics.topk_accuracy(scores, target, 6) == 1.0
    with pytest.raises(ValueError, match="top 7 of 6"):
        metrics.topk_accuracy(scores, target, 7)


@pytest.mark.parametrize(("classes", "expected"), [(5, False), (6, True)])
def test_top_5_is_told_where_it_says_something(classes: int, expected: bool) -> None:
    scores = torch.eye(classes).repeat(2, 1)
    found = dict(features.class_metrics(scores, torch.arange(classes).repeat(2)))
    assert ("top5_accuracy" in found) == expected
    assert set(found.values()) == {1.0}
    assert {"accuracy", "balanced_accuracy", "auroc"} <= set(found)


# ---- the probe by LARS


def overlapping(count: int = 120, channels: int = 4) -> tuple[Tensor, Tensor]:
    """Features of three classes that no line separates."""
    y = torch.arange(count) % 3
    x = torch.randn(count, channels, generator=generator(0))
    return x + 0.8 * F.one_hot(y, channels).float(), y


@pytest.mark.parametrize(("l2", "lr"), [(0.0, 1.0), (0.05, 30.0)], ids=["plain", "with trust ratios"])
def test_lars_ends_where_lbfgs_does(l2: float, lr: float) -> None:
    x, y = overlapping()
    weight, bias = fit_logistic(x, y, classes=3, l2=l2)
    config = LinearSgdConfig(epochs=1500, batch_size=1000, lr=lr, weight_decay=l2)
    w, b = probes.fit_lars(x, y, config, classes=3)
    # Without a penalty a constant may be added to every class: compare what is seen of it.
    ours, theirs = x @ w.T + b, x.double() @ weight.T + bias
    assert torch.allclose(
        ours.double() - ours.double().mean(1, True), theirs - theirs.mean(1, True), atol=2e-3
    )
    start = F.cross_entropy(torch.zeros(len(x), 3), y)
    assert F.cross_entropy(ours, y) < start - 0.05


def test_lars_steps_against_a_loop() -> None:
    x, y = overlapping(30)
    config = LinearSgdConfig(epochs=4, batch_size=30, lr=10.0, weight_decay=0.1, momentum=0.9)
    w, b = probes.fit_lars(x, y, config, classes=3)
    weight, bias = torch.zeros(3, 4).double(), torch.zeros(3).double()
    moving = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step in range(4):
        wanted, given = torch.eye(3).double()[y], (x.double() @ weight.T + bias).softmax(1)
        error = (given - wanted) / 30
        slope, drift = error.T @ x.double(), error.sum(0)
        ratio = 1.0
        if weight.norm() > 0:
            ratio = float(0.001 * weight.norm() / (slope.norm() + 0.1 * weight.norm() + 1e-8))
        moving[0] = 0.9 * moving[0] + ratio * (slope + 0.1 * weight)
        moving[1] = 0.9 * moving[1] + drift
        lr = 10.0 * 0.5 * (1 + math.cos(math.pi * step / 4))
        weight, bias = weight - lr * moving[0], bias - lr * moving[1]
    assert torch.allclose(w.double(), weight, atol=1e-6)
    assert torch.allclose(b.double(), bias, atol=1e-6)


def probe(
    student: Student, data: ClassificationData, config: LinearSgdConfig, seed: int = 0
) -> dict[str, float]:
    x, z = (features.extract_features(student, part) for part in (data.train, data.test))
    parts = x, data.train_labels, z, data.test_labels
    return dict(probes.linear_sgd(*parts, config, classes=2, run=LongRun(seed=seed)))


def test_the_probe_solves_the_toy(student: Student, data: ClassificationData) -> None:
    config = LinearSgdConfig(epochs=60, batch_size=16, lr=0.3, standardise=True)
    assert probe(student, data, config)["accuracy"] > 0.9


def test_the_probe_leaves_the_backbone_alone(student: Student, data: ClassificationData) -> None:
    config = LinearSgdConfig(epochs=2)
    check_task(lambda backbone: list(probe(backbone, data, config).items()), student)
    assert probe(student, data, config) == probe(student, data, config)


# ---- what is shown


def everything(
    images: object, augmentation: Augmentation, steps: int = 3, **settings: object
) -> list[Tensor]:
    shown = augment.augmented_batches(images, augmentation, batch_size=4, steps=steps, seed=3, **settings)
    return [part for pair in shown for part in pair]


def test_batches_depend_on_seed_and_step_alone(image_folder: Path) -> None:
    images = load_images(image_folder, (SIDE, SIDE), cache_gb=0)
    policy = Augmentation(size=(SIDE, SIDE), rand_augment="rand-m7-mstd0.5-inc1", erase=0.5)
    random.seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    once = everything(images, policy)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    random.seed(2)
    torch.manual_seed(5)
    for again in (everything(images, policy), everything(images, policy, workers=2)):
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert len(once) == 6
    assert once[0].shape == (4, 3, SIDE, SIDE)
    assert once[0].dtype == torch.float32
    assert len(torch.cat(once[1::2]).unique()) == 12  # an epoch shows an image once
    other = augment.augmented_batches(images, policy, batch_size=4, steps=1, seed=4)
    assert not torch.equal(next(iter(other))[0], once[0])


def test_without_any_draw_the_image_itself_is_shown() -> None:
    images, _ = coloured(8, 0)
    shown, index = everything(images, RESIZE_ONLY, steps=1)
    assert torch.allclose(shown, images[index] / 255, atol=1e-6)
    normalised = dataclasses.replace(RESIZE_ONLY, mean=(0.5, 0.4, 0.3), std=(0.2, 0.5, 1.0))
    shown, index = everything(images, normalised, steps=1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (normalised.mean, normalised.std))
    assert torch.allclose(shown, (images[index] / 255 - mean) / std, atol=1e-5)


@pytest.mark.parametrize("count", [10, 256, 700])
def test_repeated_augmentation_against_timm(count: int) -> None:
    sampler = RepeatAugSampler(range(count), num_replicas=1, rank=0, num_repeats=3, selected_round=0)
    sampler.set_epoch(5)
    order = torch.randperm(count, generator=generator(5))
    assert augment.repeated_order(order, 3).tolist() == list(sampler)
    assert torch.equal(augment.repeated_order(order, 1), order)


def test_repeats_are_other_augmentations_of_one_image() -> None:
    images, _ = coloured(12, 0)
    shown, index, *_ = everything(images, Augmentation(size=(SIDE, SIDE)), repeats=2)
    assert index[0] == index[1]
    assert index[1] != index[2]
    assert not torch.equal(shown[0], shown[1])


def test_crops_come_from_the_file(tmp_path: Path) -> None:
    pixels = torch.arange(48 * 64, dtype=torch.float32).view(48, 64).mul(255 / 3071).to(torch.uint8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels.numpy()).save(tmp_path / name / "0.png")
        Image.fromarray(pixels.numpy()).save(tmp_path / name / "1.png")
    images = load_images(tmp_path, (16, 16), cache_gb=0)

    def shown(i: int) -> Tensor:
        return features.take(augment.whole_images(images), torch.tensor([i]))[0]

    assert torch.equal(shown(0), pixels.expand(3, -1, -1))
    (tmp_path / "b" / "0.png").write_bytes(b"no picture")
    assert torch.equal(shown(2), pixels.expand(3, -1, -1))
    (tmp_path / "b" / "1.png").write_bytes(b"no picture")
    refused(lambda: shown(2), "b/1.png", "nor any image that could take its place")


# ---- fine-tuning: its parts


def test_the_classifier_is_timms_with_the_backbone_in_it(student: Student) -> None:
    x = torch.rand(2, 3, 64, 64, generator=generator(0))
    model = TimmClassifier(student, 5).eval()
    own = create_student(NAME, seed=0).eval()
    with torch.no_grad():
        expected = own.pooled(x) @ model.model.fc.weight.T + model.model.fc.bias
        assert torch.allclose(model(x), expected, atol=1e-5)
    assert all(torch.equal(v, model.model.state_dict()[k]) for k, v in student.model.state_dict().items())
    assert model.model.fc.weight.data_ptr() != student.model.conv1[0].weight.data_ptr()


def test_stochastic_depth_is_timms_or_refused() -> None:
    model = TimmClassifier(create_student("test_convnext"), 3, drop_path=0.4).model
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.4)
    refused(
        lambda: TimmClassifier(create_student("densenet121"), 3, drop_path=0.1), "--finetune-full.drop-path 0"
    )


def test_layer_decay_scales_from_the_classifier_down() -> None:
    model = timm.create_model("test_convnext", num_classes=3)
    recipe = dataclasses.replace(recipe_of(FinetuneFullConfig(preset="convnext-short")), layer_decay=0.5)
    groups = finetune_full.layer_groups(model, recipe)
    scale = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(scale) == len(list(model.parameters()))
    assert scale[id(model.head.fc.weight)] == (1.0, 1e-8)
    assert scale[id(model.head.fc.bias)] == (1.0, 0.0)
    depth = [scale[id(stage.blocks[0].conv_dw.weight)][0] for stage in model.stages]
    assert depth == sorted(depth)
    assert len(set(depth)) == len(depth)
    assert scale[id(model.stem[0].weight)][0] < depth[0]
    assert all(math.log2(s).is_integer() for s, _ in scale.values())


def test_losses_against_loops() -> None:
    logits = torch.randn(3, 4, generator=generator(0))
    y = torch.tensor([2, 0, 3])
    mixed = torch.tensor([[0.9, 0.1, 0, 0], [0.3, 0, 0.7, 0], [0, 0, 0.25, 0.75]])
    base = recipe_of(FinetuneFullConfig())

    def loop(target: Tensor, binary: bool) -> float:
        total = 0.0
        for row, wanted in zip(logits.double().tolist(), target.double().tolist(), strict=True):
            norm = math.log(sum(math.exp(v) for v in row))
            for v, t in zip(row, wanted, strict=True):
                p = 1 / (1 + math.exp(-v))
                total -= (t * math.log(p) + (1 - t) * math.log(1 - p)) / 4 if binary else t * (v - norm)
        return total / 3

    hot = F.one_hot(y, 4).float()
    cases = [
        ({"loss": "bce", "mixup": 0.0, "cutmix": 0.0}, y, hot, True),
        ({"loss": "bce", "mixup": 0.1}, mixed, (mixed > 0.2).float(), True),
        ({"loss": "ce", "mixup": 0.1}, mixed, mixed, False),
        ({"loss": "ce", "mixup": 0.0, "cutmix": 0.0, "smoothing": 0.2}, y, 0.8 * hot + 0.05, False),
    ]
    for change, target, meant, binary in cases:
        loss = finetune_full.loss_of(dataclasses.replace(base, **change))
        assert float(loss(logits, target)) == pytest.approx(loop(meant, binary), abs=1e-6), change


def test_presets_are_the_published_ones() -> None:
    a2, convnext = recipe_of(FinetuneFullConfig()), recipe_of(FinetuneFullConfig(preset="convnext"))
    assert (a2.optimizer, a2.epochs, a2.batch_size, a2.lr, a2.weight_decay) == ("lamb", 300, 2048, 5e-3, 0.02)
    assert (a2.mixup, a2.cutmix, a2.repeats, a2.drop_path, a2.smoothing) == (0.1, 1.0, 3, 0.05, 0.0)
    assert (convnext.optimizer, convnext.batch_size, convnext.lr) == ("adamw", 4096, 4e-3)
    assert (convnext.mixup, convnext.cutmix, convnext.smoothing, convnext.ema) == (0.8, 1.0, 0.1, 0.9999)


def test_what_is_set_replaces_the_preset() -> None:
    changed = recipe_of(FinetuneFullConfig(batch_size=512, mixup=0.0, rand_augment="off"))
    assert changed.lr == pytest.approx(5e-3 / 4)  # linear in the batch
    assert (changed.mixup, changed.rand_augment, changed.cutmix) == (0.0, "", 1.0)
    assert recipe_of(FinetuneFullConfig(batch_size=512, lr=0.1)).lr == 0.1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epochs": 0.0}, "epochs is 0.0"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"mixup": -0.1}, "mixup is -0.1"),
        ({"batch_size": 9}, "no 1 even parts"),
        ({"batch_size": 8, "accumulate": 3}, "no 3 even parts"),
        ({"rand_augment": "rand-q7"}, "no augmentation policy 'rand-q7'"),
        ({"rand_augment": "something"}, "no augmentation policy 'something'"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, object], said: str) -> None:
    refused(lambda: recipe_of(FinetuneFullConfig(**change)), said)


# ---- fine-tuning: the whole


def train(
    student: Student, data: ClassificationData, config: FinetuneFullConfig, **settings: object
) -> nn.Module:
    return finetune_full.train_full(
        student, data.train, data.train_labels, config, classes=2, size=(SIDE, SIDE), run=LongRun(**settings)
    )


@pytest.mark.parametrize("preset", ["a2", "convnext"])
def test_full_finetuning_solves_the_toy(
    student: Student, data: ClassificationData, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(QUICK, preset=preset, ema=0.9)
    losses = noted_losses(monkeypatch, finetune_full)
    model = train(student, data, config)
    assert len(losses) == 50
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    scores = evaluate_scores(model, data.test)
    assert metrics.accuracy(scores.argmax(1), data.test_labels) > 0.9
    assert not model.training


def evaluate_scores(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images / 255)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_full_finetuning_repeats_bitwise(student: Student, data: ClassificationData, optimizer: str) -> None:
    config = dataclasses.replace(
        QUICK, preset="a2", optimizer=optimizer, epochs=0.6, accumulate=2, rand_augment=None, repeats=None,
        mixup=0.3, cutmix=0.5,
    )  # fmt: skip
    random_state = torch.get_rng_state()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    a, b = train(student, data, config), train(student, data, config, workers=1)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not torch.equal(a.model.conv1[0].weight, student.model.conv1[0].weight)


def test_the_scored_weights_are_the_average(student: Student, data: ClassificationData) -> None:
    """One step: the average warms up as 2 / 11, so that it is 2/11 of the start and 9/11 of the end."""
    config = dataclasses.replace(QUICK, epochs=0.2, drop_path=0.0)
    plain = train(student, data, config).model.fc.weight
    averaged = train(student, data, dataclasses.replace(config, ema=0.999)).model.fc.weight
    with seeded(0, torch.device("cpu")):
        start = TimmClassifier(student, 2).model.fc.weight
    assert not torch.equal(start, plain)
    assert torch.allclose(averaged, start * 2 / 11 + plain * 9 / 11, atol=1e-7)


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m0", "augmix-m10"])
def test_the_strongest_posterisation_is_one_bit(policy: str) -> None:
    """timm asks Pillow for 0 bits, which Pillow 13 refuses: ConvNeXt's policy would end after a few batches."""
    image = Image.new("RGB", (SIDE, SIDE), (200, 100, 50))
    (part,) = (
        p
        for p in Augmentation(size=(SIDE, SIDE), rand_augment=policy).transform().transforms
        if hasattr(p, "ops")
    )
    found = [op for op in part.ops if op.name.startswith("Posterize")]
    assert found
    kept = [tuple(v & -(1 << 8 - bits) for v in (200, 100, 50)) for bits in range(1, 9)]
    for op in found:
        op.prob = 1.0
        assert op(image).getpixel((0, 0)) in kept


def test_too_few_images_for_the_parts(student: Student, data: ClassificationData) -> None:
    few = dataclasses.replace(data, train=data.train[:6], train_labels=data.train_labels[:6])
    refused(lambda: train(student, few, dataclasses.replace(QUICK, accumulate=4)), "6 training images")


# ---- through `evaluate`


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for part, seed in (("train", 1), ("test", 2)):
        images, labels = coloured(12, seed)
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            folder = tmp_path / part / ("red", "blue")[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return tmp_path


def test_evaluate_runs_them_when_they_are_named(folders: Path) -> None:
    config = EvaluateConfig(
        student=NAME, train=folders / "train", test=folders / "test", size=(SIDE, SIDE), seeds=(0, 1),
        tasks=("linear-sgd", "finetune-full"), linear_sgd=LinearSgdConfig(epochs=2),
        finetune_full=dataclasses.replace(QUICK, epochs=1), cache_gb=0, workers=0, out=folders / "out",
    )  # fmt: skip
    lines: list[str] = []
    rows = evaluate.evaluate(config, log=lines.append)
    assert {(r["task"], r["labels"], r["seed"]) for r in rows} == {
        (task, None, seed) for task in config.tasks for seed in config.seeds
    }
    assert {r["metric"] for r in rows} == {"accuracy", "balanced_accuracy", "auroc"}
    assert any("linear-sgd, all labels, accuracy" in line for line in lines)
    assert len((folders / "out" / "results.jsonl").read_text().splitlines()) == len(rows)
    named = evaluate.check_config(dataclasses.replace(config, tasks=(), labels=(2,)))
    assert named == ("linear", "finetune", "knn")  # they take hours: never by themselves


def test_evaluate_refuses_a_wrong_recipe_before_it_reads_anything(folders: Path) -> None:
    config = EvaluateConfig(
        student=NAME, train=folders / "train", test=folders / "gone", tasks=("finetune-full",),
        finetune_full=FinetuneFullConfig(lr=-1.0),
    )  # fmt: skip
    refused(lambda: evaluate.check_config(config), "finetune-full: lr is -1.0")
    refused(lambda: LinearSgdConfig(momentum=1.0), "momentum is 1.0")
    refused(lambda: LinearSgdConfig(epochs=0), "epochs is 0")
    refused(lambda: LinearSgdConfig(warmup_epochs=-1), "warmup_epochs is -1")


def test_the_command_line_knows_their_settings() -> None:
    flags = [
        "--finetune-full.preset",
        "convnext",
        "--finetune-full.layer-decay",
        "0.9",
        "--linear-sgd.epochs",
        "3",
    ]
    config = cli.parse(EvaluateConfig, "evaluate", [*flags, "--tasks", "linear-sgd", "finetune-full"])
    assert config.finetune_full == FinetuneFullConfig(preset="convnext", layer_decay=0.9)
    assert config.linear_sgd.epochs == 3
    assert json.loads(json.dumps(config.tasks)) == ["linear-sgd", "finetune-full"]
