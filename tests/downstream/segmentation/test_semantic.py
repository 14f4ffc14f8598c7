"""Full-size segmentation: crops, schedule, windows and scores against plain loops and other libraries."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from dreamteacher.data.masks.reader import MaskedImages, read_masks
from dreamteacher.data.seeds import step_generator
from dreamteacher.data.split import Split
from dreamteacher.downstream import evaluate
from dreamteacher.downstream.classification import config as classification_config
from dreamteacher.downstream.classification import finetune
from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.downstream.loop import LongRun
from dreamteacher.downstream.segmentation import crops, few_masks, semantic
from dreamteacher.downstream.segmentation.config import PRESETS, CropConfig, ReadoutConfig, SemanticConfig
from dreamteacher.downstream.segmentation.crops import random_crop
from dreamteacher.downstream.segmentation.data import STREAMED
from dreamteacher.downstream.task import Bench, find_task
from dreamteacher.models.student import Student, create_student
from dreamteacher.runtime.distributed.device import seeded
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.optim import poly_lr_at
from dreamteacher.testing import check_task
from tests.builders.layouts import H, W, ade20k, cityscapes
from tests.builders.pictures import cut, refused
from tests.builders.students import left_alone, run_task

NAME = "test_resnet"
SMALL = CropConfig(short_side=64, scale=(0.75, 1.5), size=(64, 64), most_of_one_class=1.0)
QUICK = SemanticConfig(steps=2, batch_size=2, lr=1e-3, width=8, crops=SMALL)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scenes(folder: Path, count: int, *, first: int = 0, sizes: tuple[int, ...] = (64, 80, 96)) -> None:
    """Noisy pictures of changing width with one bright box; masks hold 1 in it, 0 around, 255 in the first row."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(first, first + count):
        g = generator(i)
        height, width = 64, sizes[i % len(sizes)]
        image = torch.randint(0, 90, (3, height, width), generator=g)
        mask = torch.zeros(height, width, dtype=torch.int64)
        y, x = (int(torch.randint(0, side - 32, (), generator=g)) for side in (height, width))
        image[:, y : y + 32, x : x + 32] += 130
        mask[y : y + 32, x : x + 32] = 1
        mask[0] = 255
        to_pil_image(image.to(torch.uint8)).save(folder / "images" / f"{i}.png")
        to_pil_image(mask.to(torch.uint8)[None]).save(folder / "masks" / f"{i}.png")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    scenes(folder / "train", 8)
    scenes(folder / "test", 4, first=50)
    return folder


@pytest.fixture(scope="module")
def data(root: Path) -> Split[MaskedImages]:
    train, test = (read_masks(root / part / "images", root / part / "masks") for part in ("train", "test"))
    return Split(pool=train, test=test)


@pytest.fixture(scope="module")
def student() -> Student:
    return create_student(NAME, seed=0)


# ---- masks on the disk


def test_images_and_masks_are_read_as_they_are(data: Split[MaskedImages], root: Path) -> None:
    assert (len(data.pool), data.pool.classes) == (8, ("class 0", "class 1"))
    image, mask = data.pool.read(2)
    assert torch.equal(image, pil_to_tensor(Image.open(root / "train" / "images" / "2.png")))
    assert torch.equal(mask, pil_to_tensor(Image.open(root / "train" / "masks" / "2.png"))[0].long())
    assert mask.unique().tolist() == [0, 1, 255]
    places = root / "train" / "images", root / "train" / "masks"
    assert len(read_masks(*places, ignore_index=0, absent_ok=True).classes) == 256
    refused(
        lambda: read_masks(*places, ignore_index=0),
        "253 of 256 classes occur in none of the 8 masks of",
        "masks'",
    )


def test_black_and_white_masks(root: Path, tmp_path: Path) -> None:
    for i in range(8):
        mask = Image.new("RGB", (64 + 16 * (i % 3), 64), (255, 255, 255) if i else (0, 0, 0))
        mask.save(tmp_path / f"{i}.png")
    two = read_masks(root / "train" / "images", tmp_path, binary=True)
    assert two.classes == ("background", "foreground")
    assert two.read(0)[1].unique().tolist() == [0]
    assert two.read(1)[1].unique().tolist() == [1]


@pytest.mark.parametrize(
    ("name", "make", "classes"), [("ade20k", ade20k, 150), ("cityscapes", cityscapes, 19)]
)
def test_layouts_are_streamed(
    name: str, make: Callable[[Path], object], classes: int, tmp_path: Path
) -> None:
    make(tmp_path)
    source = Path(f"{name}:{tmp_path}")
    found = STREAMED.load(EvaluateConfig(images=source, workers=1), ())
    assert (len(found.pool.classes), len(found.test.classes)) == (classes, classes)
    for files, part in ((found.pool, "train"), (found.test, "val")):
        whole = read_masks(source, None, (H, W), part=part).load()
        assert files.classes == whole.classes
        read = [files.read(i) for i in range(len(files))]
        assert torch.equal(torch.stack([image for image, _ in read]), whole.images)
        assert torch.equal(torch.stack([mask for _, mask in read]), whole.targets)
    refused(lambda: read_masks(source, None, binary=True), f"{classes} classes of their own")
    refused(lambda: read_masks(source, None, ignore_index=0), f"{classes} classes of their own")
    path = found.pool.labels[0]
    to_pil_image(torch.full((1, H, W), 200, dtype=torch.uint8)).save(path)
    refused(lambda: read_masks(source, None), path.name, "200")


def test_presets_are_the_papers() -> None:
    expected = {"ade20k": 160_000, "cityscapes": 80_000, "cityscapes-fractions": 20_000}
    expected["bdd100k"] = 80_000
    assert {name: config.steps for name, config in PRESETS.items()} == expected
    for config in PRESETS.values():
        assert (config.optimizer, config.lr, config.power, config.width) == ("sgd", 0.01, 0.9, 512)
    shallow = ReadoutConfig()
    assert (shallow.lr, shallow.power, shallow.steps) == (0.01, 0.9, 20_000)
    assert shallow.training().optimizer == "sgd"


def test_bad_masks_are_refused_before_work(tmp_path: Path) -> None:
    scenes(tmp_path, 3)

    def find(whole: bool = False, ignore_index: int = 255) -> object:
        return read_masks(tmp_path / "images", tmp_path / "masks", whole=whole, ignore_index=ignore_index)

    cut(tmp_path / "images" / "1.png", 0.5)
    find()
    refused(lambda: find(whole=True), "1.png", "truncated")
    cut(tmp_path / "masks" / "2.png", 0.7)
    refused(find, "2.png")
    for i in range(3):
        Image.new("L", (64 + 16 * (i % 3), 64), 0).save(tmp_path / "masks" / f"{i}.png")
    refused(find, "at least two classes")


# ---- crops


@pytest.mark.parametrize("short_side", [0, 40, 150])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_crop_is_cut_from_the_whole_scaled_image(short_side: int, seed: int) -> None:
    image = torch.randint(0, 256, (3, 70, 101), generator=generator(9), dtype=torch.uint8)
    mask = torch.randint(0, 5, (70, 101), generator=generator(8))
    config = CropConfig(short_side=short_side, size=(64, 96), most_of_one_class=1.0)
    pixels, ids = random_crop(image, mask, config, ignore_index=255, generator=generator(seed))
    g = generator(seed)
    factor = (short_side / 70 if short_side else 1) * (0.5 + 1.5 * float(torch.rand((), generator=g)))
    height, width = round(70 * factor), round(101 * factor)
    top = int(torch.randint(0, height - min(height, 64) + 1, (), generator=g))
    left = int(torch.randint(0, width - min(width, 96) + 1, (), generator=g))
    whole = to_pil_image(image).resize((width, height), Image.Resampling.BILINEAR)
    rows, columns = (
        [math.floor(Fraction(2 * i + 1, 2) * have / side) for i in range(side)]
        for have, side in ((70, height), (101, width))
    )
    whole_mask = mask[rows][:, columns]
    box = (left, top, left + 96, top + 64)
    expected = torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None, None].repeat(1, 64, 96)
    expected_ids = torch.full((64, 96), 255)
    inside = slice(0, min(height, 64)), slice(0, min(width, 96))
    expected[:, *inside] = pil_to_tensor(whole.crop(box))[:, *inside]
    expected_ids[inside] = whole_mask[top : top + 64, left : left + 96]
    if bool(torch.rand((), generator=g) < 0.5):
        expected, expected_ids = expected.flip(2), expected_ids.flip(1)
    assert torch.equal(ids, expected_ids)
    assert (pixels.int() - expected.int()).abs().max() <= 1


def test_a_mask_of_another_resolution_stays_on_its_image() -> None:
    ids = torch.randint(0, 3, (4, 6), generator=generator(0))
    image = (ids.repeat_interleave(16, 0).repeat_interleave(16, 1) * 100).to(torch.uint8).expand(3, -1, -1)
    config = CropConfig(short_side=48, size=(32, 32), most_of_one_class=1.0)
    for seed in range(6):
        pixels, found = random_crop(image, ids, config, ignore_index=255, generator=generator(seed))
        drawn = (pixels[0].float() / 100).round().long()
        assert (drawn == found)[found != 255].float().mean() > 0.85  # edges are blurred
        assert (found != 255).float().mean() > 0.5


def test_crops_of_one_class_are_drawn_again() -> None:
    mask = torch.zeros(64, 256, dtype=torch.int64)
    mask[:, 248:] = 1
    image = torch.zeros(3, 64, 256, dtype=torch.uint8)
    both = {}
    for most in (0.9, 1.0):
        config = CropConfig(short_side=0, scale=(1.0, 1.0), size=(64, 32), most_of_one_class=most)
        found = [
            random_crop(image, mask, config, ignore_index=255, generator=generator(s)) for s in range(60)
        ]
        both[most] = sum(len(ids.unique()) == 2 for _, ids in found)
    assert both[0.9] > 3 * both[1.0]


def test_the_stream_depends_on_the_seed_alone(data: Split[MaskedImages]) -> None:
    def batches(seed: int, workers: int) -> Tensor:
        stream = crops.crops(data.pool, SMALL, steps=5, batch_size=3, seed=seed, workers=workers)
        found = list(stream)
        assert [tuple(images.shape) for images, _ in found] == [(3, 3, 64, 64)] * 5
        assert all(masks.shape == (3, 64, 64) for _, masks in found)
        return torch.cat([images.flatten() for images, _ in found])

    state = torch.get_rng_state()
    first = batches(0, 0)
    assert torch.equal(first, batches(0, 2))
    assert not torch.equal(first, batches(1, 0))
    assert torch.equal(state, torch.get_rng_state())


def test_damaged_images_give_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenes(tmp_path, 3)
    files = read_masks(tmp_path / "images", tmp_path / "masks")
    cut(tmp_path / "images" / "1.png", 0.5)
    assert len(list(crops.crops(files, SMALL, steps=3, batch_size=3, seed=0))) == 3
    said = capsys.readouterr().err
    assert "1.png" in said
    refused(lambda: list(crops.whole_images(files, 0)), "1.png", "truncated")
    for i in range(3):
        (tmp_path / "masks" / f"{i}.png").unlink()
    refused(lambda: list(crops.crops(files, SMALL, steps=1, batch_size=2, seed=0)), "any more")


# ---- training


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_polynomial_decay_is_torchs(optimizer: classification_config.Optimizer) -> None:
    x, y = torch.randn(12, 3, generator=generator(0)), torch.randn(12, 1, generator=generator(1))
    with seeded(0, torch.device("cpu")):
        ours, theirs = nn.Linear(3, 1), nn.Linear(3, 1)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        with torch.no_grad():
            p.copy_(torch.full_like(p, 0.3))
            q.copy_(p)
    finetune.train(
        [(ours, 1.0)],
        lambda step: (ours(x) - y).square().mean(),
        steps=7,
        lr=0.05,
        weight_decay=0.1,
        warmup=0.0,
        optimizer=optimizer,
        power=0.9,
    )
    groups = [
        {"params": [theirs.weight], "weight_decay": 0.1},
        {"params": [theirs.bias], "weight_decay": 0.0},
    ]
    makers = {"sgd": lambda g: torch.optim.SGD(g, lr=0.05, momentum=0.9), "adamw": torch.optim.AdamW}
    update = makers[optimizer](groups)
    for group in update.param_groups:
        group["lr"] = 0.05
    schedule = torch.optim.lr_scheduler.PolynomialLR(update, total_iters=7, power=0.9)
    for _ in range(7):
        update.zero_grad()
        (theirs(x) - y).square().mean().backward()
        update.step()
        schedule.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_warm_up_then_decay() -> None:
    found = [poly_lr_at(s, total=10, warmup=4, peak=2.0, power=2.0) for s in range(10)]
    assert found[:4] == [0.5, 1.0, 1.5, 2.0]
    assert found[4:] == pytest.approx([2.0 * (1 - s / 10) ** 2 for s in range(4, 10)])


def test_the_loss_is_averaged_over_what_counts() -> None:
    logits = torch.randn(2, 3, 4, 4, generator=generator(0))
    target = torch.randint(0, 3, (2, 4, 4), generator=generator(1))
    target[0, :2] = 255
    terms = [
        -float(logits[n, :, y, x].double().log_softmax(0)[target[n, y, x]])
        for n in range(2)
        for y in range(4)
        for x in range(4)
        if target[n, y, x] != 255
    ]
    assert float(few_masks.pixel_loss(logits, target, 255)) == pytest.approx(
        sum(terms) / len(terms), rel=1e-5
    )
    assert float(few_masks.pixel_loss(logits, torch.full_like(target, 255), 255)) == 0.0


# ---- test


class Painter(nn.Module):
    """Logits that depend on where in its window a pixel lies, and on its colour."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, 3, 1, 1, generator=generator(4)))

    def forward(self, images: Tensor) -> Tensor:
        place = torch.linspace(0, 1, images.shape[-1]) + torch.linspace(0, 2, images.shape[-2])[:, None]
        return nn.functional.conv2d(images, self.weight) * (1 + place)


@pytest.mark.parametrize("size", [(50, 70), (64, 96), (100, 131)])
def test_sliding_windows_against_a_loop(size: tuple[int, int]) -> None:
    model = Painter()
    image = torch.randint(0, 256, (3, *size), generator=generator(0), dtype=torch.uint8)
    config = dataclasses.replace(QUICK, test="slide", overlap=0.5, crops=CropConfig(size=(64, 64)))
    tall, wide = max(size[0], 64), max(size[1], 64)
    pixels = torch.tensor([124.0, 116.0, 104.0])[:, None, None].repeat(1, tall, wide)
    pixels[:, : size[0], : size[1]] = image
    sums, seen = torch.zeros(3, tall, wide), torch.zeros(tall, wide)
    top = 0
    with torch.no_grad():
        while True:
            left = 0
            while True:
                y, x = min(top, tall - 64), min(left, wide - 64)
                sums[:, y : y + 64, x : x + 64] += model(pixels[None, :, y : y + 64, x : x + 64] / 255)[0]
                seen[y : y + 64, x : x + 64] += 1
                left += 32
                if x + 64 == wide:
                    break
            top += 32
            if y + 64 == tall:
                break
        found = semantic.predict_logits(model, image, config)
    assert found.shape == (1, 3, *size)
    torch.testing.assert_close(found[0], (sums / seen)[:, : size[0], : size[1]])


def test_whole_images_are_filled_up_to_the_stride() -> None:
    model = Painter()
    image = torch.randint(0, 256, (3, 50, 64), generator=generator(0), dtype=torch.uint8)
    pixels = torch.tensor([124.0, 116.0, 104.0])[:, None, None].repeat(1, 64, 64)
    pixels[:, :50] = image
    with torch.no_grad():
        found = semantic.predict_logits(model, image, QUICK)
        torch.testing.assert_close(found, model(pixels[None] / 255)[..., :50, :])


def test_classes_in_parts_are_those_of_all() -> None:
    logits = torch.randn(1, 37, 9, 12, generator=generator(0))
    logits[:, 20] = logits[:, 3]  # a tie goes to the first, as in argmax
    whole = nn.functional.interpolate(logits, (20, 31), mode="bilinear", align_corners=False).argmax(1)
    assert torch.equal(semantic.classes_at(logits, (20, 31)), whole)
    assert not (whole == 20).any()


def test_scores_against_scikit_learn(data: Split[MaskedImages]) -> None:
    model = Painter(2)
    config = dataclasses.replace(QUICK, crops=CropConfig(short_side=32, size=(32, 32)))
    found = dict(semantic.score_files(model, data.test, config, precision="float32"))
    truth, guess = [], []
    for i in range(len(data.test)):
        image, mask = data.test.read(i)
        small = crops.scaled_size(image.shape[1:], 32)
        seen = pil_to_tensor(to_pil_image(image).resize(small[::-1], Image.Resampling.BILINEAR))
        with torch.no_grad():
            logits = semantic.predict_logits(model, seen, config)
        pred = nn.functional.interpolate(logits, mask.shape, mode="bilinear", align_corners=False).argmax(1)[
            0
        ]
        truth.append(mask[mask != 255])
        guess.append(pred[mask != 255])
    y, z = torch.cat(truth).numpy(), torch.cat(guess).numpy()
    scores = jaccard_score(y, z, average=None)
    assert found["miou"] == pytest.approx(scores.mean())
    assert [found["iou/class 0"], found["iou/class 1"]] == pytest.approx(scores.tolist())
    assert found["accuracy"] == pytest.approx((y == z).mean())
    assert found["mean_accuracy"] == pytest.approx(((z[y == 0] == 0).mean() + (z[y == 1] == 1).mean()) / 2)


# ---- the tasks


@pytest.fixture(autouse=True)
def untouched(student: Student) -> Iterator[None]:
    with left_alone(student):
        yield


def test_semantic_solves_the_toy(student: Student, data: Split[MaskedImages]) -> None:
    config = dataclasses.replace(QUICK, steps=40, batch_size=4, lr=0.02, width=16)
    found = run_task("semantic", student, data, semantic=config)
    assert found["miou"] > 0.8
    assert found["accuracy"] > found["miou"]


def test_readout_solves_the_toy(student: Student, data: Split[MaskedImages]) -> None:
    config = ReadoutConfig(steps=60, batch_size=4, lr=0.05, stride=8, crops=SMALL)
    found = run_task("readout", student, data, readout=config)
    assert found["miou"] > 0.6
    refused(lambda: ReadoutConfig(stride=7), "stride is 7")


def head_weights(
    student: Student, data: Split[MaskedImages], seed: int, *, freeze: bool, steps: int = 2
) -> Tensor:
    model = semantic.train_dense(
        student,
        data.pool,
        dataclasses.replace(QUICK, steps=steps),
        lambda: semantic.ReadoutHead(student.specs, 2),
        freeze=freeze,
        run=LongRun(seed=seed, precision="float32"),
    )
    assert not any(part.training for part in model.modules())
    moved = [not torch.equal(v, student.state_dict()[k]) for k, v in model.student.state_dict().items()]
    assert any(moved) != freeze
    assert (model.auxiliary is None) == freeze
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("freeze", [True, False])
def test_training_is_reproducible(student: Student, data: Split[MaskedImages], freeze: bool) -> None:
    first = head_weights(student, data, 0, freeze=freeze)
    assert torch.equal(first, head_weights(student, data, 0, freeze=freeze))
    assert not torch.equal(first, head_weights(student, data, 1, freeze=freeze))


CONFIG = EvaluateConfig(
    student=NAME,
    tasks=("semantic", "readout"),
    seeds=(0, 1),
    precision="float32",
    device="cpu",
    workers=0,
    semantic=dataclasses.replace(QUICK, mask_counts=(3, 6)),
    readout=ReadoutConfig(steps=2, batch_size=2, crops=SMALL),
)


def on_disk(root: Path, **changes: object) -> EvaluateConfig:
    config = dataclasses.replace(
        CONFIG,
        images=root / "train" / "images",
        masks=root / "train" / "masks",
        test_images=root / "test" / "images",
        test_masks=root / "test" / "masks",
    )
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize("task", ["semantic", "readout"])
def test_tasks_keep_their_contract(student: Student, data: Split[MaskedImages], task: str) -> None:
    found = find_task(task)
    check_task(lambda s: found.run(Bench(s, CONFIG, {"streamed": data}, task=found), 4, 0), student)
    with pytest.raises(UserError, match="need masks in folders"):
        list(found.run(Bench(student, CONFIG, {}, task=found), 4, 0))


def test_evaluate_runs_them_from_folders(root: Path, tmp_path: Path) -> None:
    rows = evaluate.evaluate(on_disk(root, out=tmp_path), log=lambda line: None)
    seen = {(r["task"], r["labels"], r["seed"]) for r in rows if r["metric"] == "miou"}
    assert seen == {
        (t, n, s) for t, n in (("semantic", 3), ("semantic", 6), ("readout", None)) for s in (0, 1)
    }
    table = evaluate.summary_table(rows)
    assert "semantic, 3 masks, miou" in table
    assert "readout, all labels, miou" in table


def test_without_a_test_set_half_is_set_aside(root: Path) -> None:
    config = on_disk(root, test_images=None, test_masks=None, tasks=("readout",), seeds=(0,))
    assert evaluate.evaluate(config, log=lambda line: None)
    found = STREAMED.load(config, ())
    assert (len(found.pool), len(found.test)) == (4, 4)
    assert not set(found.pool.images) & set(found.test.images)


def test_both_parts_have_the_larger_number_of_classes(root: Path, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    for i in range(50, 54):
        Image.new("L", (64 + 16 * (i % 3), 64), 9 * (i % 2)).save(tmp_path / "masks" / f"{i}.png")
    found = STREAMED.load(on_disk(root, test_masks=tmp_path / "masks"), ())
    assert (len(found.pool.classes), len(found.test.classes)) == (10, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": None}, "Give both --images and --masks"),
        ({"test_masks": None}, "Only one of --test-images"),
        ({"semantic": dataclasses.replace(QUICK, mask_counts=(9,))}, "9 labelled images asked for"),
        ({"tasks": ("semantics",)}, "Did you mean 'semantic'"),
    ],
)
def test_wrong_settings_fail_before_anything_is_made(
    root: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    refused(lambda: evaluate.evaluate(on_disk(root, out=tmp_path / "out", **changes)), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"lr": 0.0}, "lr"),
        ({"warmup": 1.0}, "warmup"),
        ({"overlap": -0.1}, "overlap"),
        ({"auxiliary": -1.0}, "auxiliary"),
        ({"mask_counts": (1,)}, "at least 2"),
    ],
)
def test_settings_are_checked(change: dict[str, object], message: str) -> None:
    refused(lambda: SemanticConfig(**change), message)


@pytest.mark.parametrize(
    "change", [{"size": (50, 64)}, {"scale": (0.0, 1.0)}, {"scale": (2.0, 1.0)}, {"most_of_one_class": 0.0}]
)
def test_crop_settings_are_checked(change: dict[str, object]) -> None:
    refused(lambda: CropConfig(**change), "Give")


def test_draws_are_nested(data: Split[MaskedImages]) -> None:
    files: MaskedImages = data.pool
    assert set(crops.drawn_files(files, 3, 0).images) < set(crops.drawn_files(files, 6, 0).images)
    assert crops.drawn_files(files, None, 5).images == files.images
    assert step_generator(0, 1, "crop/0").initial_seed() != step_generator(0, 1, "crop/1").initial_seed()
