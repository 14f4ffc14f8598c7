"""Panoptic segmentation: the format, the merging against a loop over pixels, the model on a trivial scene."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from dreamteacher.data.layouts.table import panoptic_files
from dreamteacher.data.panoptic_set import PanopticSet, read_panoptic
from dreamteacher.data.split import Split
from dreamteacher.downstream import evaluate
from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.downstream.detection.config import PANOPTIC_PRESETS, DetectConfig, PanopticConfig
from dreamteacher.downstream.detection.data import Draw
from dreamteacher.downstream.loop import LongRun
from dreamteacher.downstream.panoptic import (
    SEGMENTS,
    TASK,
    PanopticFPN,
    SemanticBranch,
    checked,
    merge,
    panoptic_example,
    train_panoptic,
)
from dreamteacher.downstream.task import Bench
from dreamteacher.metrics import panoptic_counts, panoptic_quality
from dreamteacher.models.student import Student, create_student
from dreamteacher.runtime.distributed.device import seeded
from dreamteacher.testing import check_task
from tests.builders.layouts import cityscapes, coco
from tests.builders.pictures import cut, refused
from tests.builders.students import left_alone, run_task

NAME = "test_resnet"
TINY = PanopticConfig(
    detect=DetectConfig(
        steps=2, batch_size=2, lr=3e-3, layer_decay=1.0, short_side=(64, 64), test_side=64, longest_side=96,
        width=16, fc=32, rois=16, anchors=32, proposals=32, anchor=6.0, workers=0,
    ),
    width=16, stuff_area=100,
)  # fmt: skip
CATEGORIES = [
    {"id": 5, "name": "square", "isthing": 1},
    {"id": 9, "name": "sky", "isthing": 0},
    {"id": 2, "name": "ground", "isthing": 0},
]
GROUND, SQUARE, SKY = 0, 1, 2  # in the order of the category ids


def write_scenes(folder: Path, seeds: range) -> Path:
    """Sky above, ground below, two bright squares; one pixel row is void. Numbers of segments pass 256 and 65536."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    images, annotations = [], []
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        height, width = ((64, 80), (80, 64))[seed % 2]
        image = torch.randint(0, 50, (3, height, width), generator=g)
        ids = torch.full((height, width), 70_000)
        ids[height // 2 :] = 300
        image[2, : height // 2] += 120
        image[1, height // 2 :] += 60
        for number in (1, 257):
            side = int(torch.randint(18, 26, (), generator=g))
            y, x = (int(torch.randint(0, whole - side, (), generator=g)) for whole in (height, width))
            if not (ids[y : y + side, x : x + side] < 300).any():
                ids[y : y + side, x : x + side] = number
                image[:, y : y + side, x : x + side] = 230
        ids[0] = 0
        colours = torch.stack([ids % 256, ids // 256 % 256, ids // 65536]).to(torch.uint8)
        to_pil_image(image.to(torch.uint8)).save(folder / "images" / f"{seed}.png")
        to_pil_image(colours).save(folder / "masks" / f"{seed}.png")
        known = {70_000: 9, 300: 2, 1: 5, 257: 5}
        infos = [{"id": n, "category_id": known[n]} for n in ids.unique().tolist() if n]
        images.append({"id": 100 + seed, "file_name": f"{seed}.png", "height": height, "width": width})
        annotations.append({"image_id": 100 + seed, "file_name": f"{seed}.png", "segments_info": infos})
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "panoptic.json").write_text(json.dumps(content))
    return folder


def read(folder: Path, **settings: Any) -> PanopticSet:
    return read_panoptic(folder / "panoptic.json", folder / "images", folder / "masks", **settings)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("panoptic")
    write_scenes(folder / "train", range(8))
    write_scenes(folder / "test", range(50, 54))
    return folder


@pytest.fixture(scope="module")
def data(root: Path) -> Split[PanopticSet]:
    return Split(pool=read(root / "train"), test=read(root / "test", whole=True))


@pytest.fixture(scope="module")
def student() -> Student:
    return create_student(NAME, seed=0)


@pytest.fixture(autouse=True)
def untouched(student: Student) -> Iterator[None]:
    with left_alone(student):
        yield


# --- files --------------------------------------------------------------------------------------------------


def test_the_format_is_read(data: Split[PanopticSet]) -> None:
    pool = data.pool
    assert (len(pool), pool.names, pool.things) == (8, ("ground", "square", "sky"), (False, True, False))
    image, segments = pool.read(3)
    assert image.shape[1:] == segments.ids.shape == (80, 64)
    assert segments.classes[70_000] == SKY
    assert segments.classes[300] == GROUND
    assert {segments.classes[n] for n in (1, 257) if n in segments.classes} == {SQUARE}
    bright = (image > 200).all(0)
    assert torch.equal(bright, (segments.ids == 1) | (segments.ids == 257))
    assert (segments.ids[0] == 0).all()


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / "panoptic.json").read_text())
        change(content)
        (folder / "panoptic.json").write_text(json.dumps(content))

    return apply


def first(content: dict[str, Any]) -> dict[str, Any]:
    return content["annotations"][0]


FLAWS: list[tuple[Callable[[Path], None], str]] = [
    (lambda f: (f / "panoptic.json").unlink(), "cannot be read"),
    (lambda f: cut(f / "panoptic.json", 0.5), "not JSON"),
    (lambda f: (f / "panoptic.json").write_text("[]"), "no lists images, annotations, categories"),
    (edited(lambda c: c["categories"][0].pop("isthing")), "no 'isthing'"),
    (edited(lambda c: c["categories"].append(c["categories"][0])), "taken twice"),
    (edited(lambda c: c["images"].pop(0)), "image 100 is not listed"),
    (edited(lambda c: c["annotations"].append(first(c))), "two of one image"),
    (edited(lambda c: first(c).pop("segments_info")), "no 'segments_info'"),
    (edited(lambda c: first(c)["segments_info"][0].update(category_id=77)), "category 77 is not listed"),
    (edited(lambda c: first(c)["segments_info"][0].update(id=0)), "segment 0"),
    (edited(lambda c: first(c)["segments_info"][0].update(iscrowd=2)), "'iscrowd'"),
    (edited(lambda c: first(c).update(file_name="../0.png")), "leads out of the folder"),
    (edited(lambda c: first(c)["segments_info"].pop()), "does not list: 70000"),
    (lambda f: (f / "masks" / "1.png").unlink(), "missing file"),
    (lambda f: cut(f / "images" / "1.png", 0.5), "truncated"),
    (lambda f: to_pil_image(torch.zeros(1, 64, 80)).save(f / "masks" / "0.png"), "no RGB PNG but PNG, L"),
    (
        lambda f: to_pil_image(torch.zeros(3, 32, 40)).save(f / "masks" / "0.png"),
        "40 x 32, its image 80 x 64",
    ),
]


@pytest.mark.parametrize(("harm", "words"), FLAWS, ids=[words for _, words in FLAWS])
def test_every_flaw_is_named(harm: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    folder = write_scenes(tmp_path / "set", range(2))
    assert len(read(folder, whole=True)) == 2
    harm(folder)
    refused(lambda: read(folder, whole=True), words)


@pytest.mark.parametrize("make", [cityscapes, coco])
def test_layouts_are_read(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path)
    source = Path(f"{make.__name__}:{tmp_path}")
    found = SEGMENTS.load(EvaluateConfig(images=source), ())
    for part, files in ((found.pool, panoptic_files(source)), (found.test, panoptic_files(source, "val"))):
        assert (part.names, part.things) == (files.names, files.things)
        assert len(part) == len(files.images) > 0
        kept = part.take(torch.tensor([len(part) - 1]))
        image, segments = kept.read(0)
        ids, listed = files.read(len(part) - 1)
        assert image.shape[1:] == segments.ids.shape
        assert torch.equal(segments.ids, ids)
        assert segments.classes == {s.id: s.label for s in listed}
        assert segments.crowds == {s.id for s in listed if s.crowd}


# --- merging ------------------------------------------------------------------------------------------------


def merged_by_loop(
    masks: Tensor, classes: list[int], scores: list[float], stuff: Tensor, limits: tuple[float, float, int]
) -> list[list[tuple[int, int]]]:
    """Pixel by pixel: which (rank of the segment, class) it belongs to."""
    score, overlap, area = limits
    taken: dict[tuple[int, int], tuple[int, int]] = {}
    rank = 0
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        mine = [(int(y), int(x)) for y, x in masks[i].nonzero().tolist()]
        free = [p for p in mine if p not in taken]
        if scores[i] < score or not free or len(mine) - len(free) > overlap * len(mine):
            continue
        rank += 1
        taken |= dict.fromkeys(free, (rank, classes[i]))
    for c in sorted(set(stuff.flatten().tolist()) - {-1}):
        free = [(y, x) for y, x in (stuff == c).nonzero().tolist() if (y, x) not in taken]
        if len(free) >= max(1, area):
            rank += 1
            taken |= dict.fromkeys(free, (rank, c))
    height, width = stuff.shape
    return [[taken.get((y, x), (0, -1)) for x in range(width)] for y in range(height)]


@settings(max_examples=60)
@given(st.data())
def test_merging_equals_a_loop_over_pixels(draw: st.DataObject) -> None:
    count = draw.draw(st.integers(0, 4))
    masks = torch.zeros(count, 6, 7, dtype=torch.bool)
    for mask in masks:
        y, x = draw.draw(st.integers(0, 5)), draw.draw(st.integers(0, 6))
        mask[y : y + draw.draw(st.integers(0, 6)), x : x + draw.draw(st.integers(1, 7))] = True
    classes = draw.draw(st.lists(st.integers(3, 5), min_size=count, max_size=count))
    scores = draw.draw(st.lists(st.sampled_from([0.2, 0.5, 0.6, 0.9, 1.0]), min_size=count, max_size=count))
    stuff = torch.tensor(draw.draw(st.lists(st.integers(-1, 2), min_size=42, max_size=42))).reshape(6, 7)
    limits = 0.5, draw.draw(st.sampled_from([0.0, 0.5, 1.0])), draw.draw(st.integers(0, 12))
    found = merge(
        masks,
        torch.tensor(classes, dtype=torch.int64),
        torch.tensor(scores, dtype=torch.float64),
        stuff,
        PanopticConfig(score=limits[0], overlap=limits[1], stuff_area=limits[2]),
    )
    expected = merged_by_loop(masks, classes, scores, stuff, limits)
    got = [[(n, found.classes.get(n, -1)) for n in row] for row in found.ids.tolist()]
    assert got == expected


# --- the model ----------------------------------------------------------------------------------------------


def test_the_semantic_branch_against_a_composition() -> None:
    with seeded(0, torch.device("cpu")):
        branch = SemanticBranch([4, 8, 16, 32], 6, 3, width=16)
    g = torch.Generator().manual_seed(1)
    maps = [torch.randn(2, 6, 64 // s, 96 // s, generator=g) for s in (4, 8, 16, 32)]
    sd = branch.state_dict()
    total = torch.zeros(2, 16, 16, 24)
    for i, m in enumerate(maps):
        x = m
        for k in range(max(1, i)):
            at = f"levels.{i}.{(4 if i else 3) * k}"
            norm = f"levels.{i}.{(4 if i else 3) * k + 1}"
            x = F.conv2d(x, sd[f"{at}.weight"], padding=1)
            x = F.relu(F.group_norm(x, 16, sd[f"{norm}.weight"], sd[f"{norm}.bias"]))
            if i:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        total += x
    expected = F.conv2d(total, sd["classify.weight"], sd["classify.bias"])
    expected = F.interpolate(expected, (64, 96), mode="bilinear", align_corners=False)
    with torch.no_grad():
        torch.testing.assert_close(branch(maps, (64, 96)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mirror", [False, True])
def test_examples_show_things_and_stuff(data: Split[PanopticSet], mirror: bool) -> None:
    image, segments = data.pool.read(2)
    example = panoptic_example(data.pool, Draw(2, 64, mirror), 96)
    assert example.image.shape == image.shape
    turned = segments.ids.flip(1) if mirror else segments.ids
    target = example.target
    numbers = [n for n in (1, 257) if n in segments.classes]
    assert target["labels"].tolist() == [1] * len(numbers)
    for number, mask, box in zip(numbers, target["masks"], target["boxes"].tolist(), strict=True):
        assert torch.equal(mask.bool(), turned == number)
        rows, columns = (turned == number).any(1).nonzero(), (turned == number).any(0).nonzero()
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    expected = torch.full(turned.shape, 255)
    for number, label in ((70_000, 2), (300, 1), (1, 0), (257, 0)):  # the order of the stuff: ground, sky
        expected[turned == number] = label
    assert torch.equal(target["semantic"], expected)


def test_crowds_are_no_examples(data: Split[PanopticSet]) -> None:
    crowd = data.pool.scenes[0]._replace(crowds=frozenset({1, 257}))
    changed = dataclasses.replace(data.pool, scenes=(crowd, *data.pool.scenes[1:]))
    assert changed.shown() == list(range(1, 8))
    example = panoptic_example(changed, Draw(0, 64, False), 96)
    assert len(example.target["boxes"]) == 0
    assert example.target["masks"].shape == (0, 64, 80)
    assert (example.target["semantic"] == 0).any()


def test_panoptic_solves_the_toy(student: Student, data: Split[PanopticSet]) -> None:
    detect = dataclasses.replace(TINY.detect, steps=60, batch_size=4)
    config = dataclasses.replace(TINY, detect=detect, semantic_weight=1.0)
    found = run_task("panoptic", student, data, panoptic=config)
    assert found["pq_stuff"] > 0.8
    assert found["pq_things"] > 0.6
    assert found["pq"] == pytest.approx((2 * found["pq_stuff"] + found["pq_things"]) / 3)


def test_a_perfect_prediction_has_quality_one(data: Split[PanopticSet]) -> None:
    counts = sum(panoptic_counts(s, s, 3) for _, s in map(data.test.read, range(4)))
    assert set(panoptic_quality(counts, data.test.things).values()) == {1.0}


def test_training_is_reproducible(student: Student, data: Split[PanopticSet]) -> None:
    def weights(seed: int) -> Tensor:
        model: PanopticFPN = train_panoptic(
            student, data.pool, TINY, run=LongRun(seed=seed, precision="float32")
        )
        assert not any(part.training for part in model.modules())
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


# --- evaluate -----------------------------------------------------------------------------------------------


def on_disk(root: Path, **changes: Any) -> EvaluateConfig:
    return EvaluateConfig(
        **{
            "student": NAME,
            "tasks": ("panoptic",),
            "images": root / "train" / "images",
            "masks": root / "train" / "masks",
            "segments": root / "train" / "panoptic.json",
            "test_images": root / "test" / "images",
            "test_masks": root / "test" / "masks",
            "test_segments": root / "test" / "panoptic.json",
            "seeds": (0,),
            "precision": "float32",
            "device": "cpu",
            "workers": 0,
            "panoptic": TINY,
            **changes,
        }
    )


def test_the_task_keeps_its_contract(student: Student, data: Split[PanopticSet], root: Path) -> None:
    config = on_disk(root)
    # Stuff comes out of any network, so that there is a number after two steps.
    check_task(
        lambda s: TASK.run(Bench(s, config, {"panoptic": data}, task=TASK), 4, 0),
        student,
    )
    refused(
        lambda: list(TASK.run(Bench(student, config, {}, task=TASK), 4, 0)),
        "needs segments",
    )


def test_evaluate_runs_it_from_files(root: Path, tmp_path: Path) -> None:
    few = dataclasses.replace(TINY, detect=dataclasses.replace(TINY.detect, image_counts=(4, 6)))
    rows = evaluate.evaluate(on_disk(root, panoptic=few, out=tmp_path), log=lambda line: None)
    assert {(r["labels"], r["seed"]) for r in rows if r["metric"] == "pq"} == {(4, 0), (6, 0)}
    assert "panoptic, 4 images, pq" in evaluate.summary_table(rows)


def test_without_a_test_file_half_is_set_aside(root: Path) -> None:
    folder = root / "train"
    config = EvaluateConfig(
        images=folder / "images", masks=folder / "masks", segments=folder / "panoptic.json"
    )
    found = SEGMENTS.load(config, ())
    assert (len(found.pool), len(found.test)) == (4, 4)
    assert not {s.image for s in found.pool.scenes} & {s.image for s in found.test.scenes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"segments": None}, "Give --images, --masks and --segments"),
        ({"segments": Path("absent.json")}, "absent.json"),
        (
            {
                "panoptic": dataclasses.replace(
                    TINY, detect=dataclasses.replace(TINY.detect, image_counts=(9,))
                )
            },
            "9 labelled images asked for",
        ),
        ({"test_masks": Path("absent")}, "missing file"),
    ],
)
def test_wrong_settings_fail_before_anything_is_made(
    root: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    refused(lambda: evaluate.evaluate(on_disk(root, out=tmp_path / "out", **changes)), words)
    assert not (tmp_path / "out").exists()


def test_categories_must_agree_and_have_both_kinds(data: Split[PanopticSet]) -> None:
    other = dataclasses.replace(data.test, names=("ground", "circle", "sky"))
    refused(lambda: checked(Split(pool=data.pool, test=other)), "differ")
    stuff = dataclasses.replace(data.pool, things=(False,) * 3)
    refused(lambda: checked(Split(pool=stuff, test=stuff)), "things and of stuff")


@pytest.mark.parametrize("change", [{"width": 12}, {"stuff_area": -1}, {"score": 1.5}])
def test_settings_are_checked(change: dict[str, Any]) -> None:
    refused(lambda: PanopticConfig(**change), "Give")
    assert PANOPTIC_PRESETS["bdd100k-36"].detect.optimizer == "sgd"
