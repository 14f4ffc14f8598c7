"""Public data sets as they are downloaded: miniatures of each are read pixel by pixel, broken ones are refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from dreamteacher.data.coco.annotations import CocoAnnotation
from dreamteacher.data.coco.run_lengths import Rle
from dreamteacher.data.image_set import load_images
from dreamteacher.data.images import Size
from dreamteacher.data.labelled_set import LabelledSet
from dreamteacher.data.layouts import table as layouts_table
from dreamteacher.data.layouts.label_maps import run_lengths
from dreamteacher.data.layouts.table import (
    check,
    image_files,
    instance_files,
    layout_of,
    mask_files,
    panoptic_files,
)
from dreamteacher.data.masks.reader import read_masks
from dreamteacher.data.sources import MaskFiles, label_fraction
from dreamteacher.downstream.classification.data import CLASSIFICATION, class_counts
from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.downstream.evaluate import evaluate
from tests.builders.layouts import (
    ADE20K,
    BDD100K,
    BEDROOM,
    CAT,
    CITYSCAPES,
    WNIDS,
    H,
    Made,
    W,
    ade20k,
    at,
    bdd100k,
    bedroom,
    bitmask,
    cat,
    cityscapes,
    coco,
    imagenet,
    instance_ids,
    photo,
    save,
)
from tests.builders.pictures import cut, fill, noise, refused

# pycocotools' own way with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def load_layout(source: Path, size: Size, **options: Any) -> LabelledSet:
    return read_masks(source, None, size, **options).load()


def by_loop(values: np.ndarray, meaning: dict[int, int]) -> Tensor:
    """What each pixel means, one by one."""
    return torch.tensor([[meaning[int(v)] for v in row] for row in values])


# --- semantic segmentation ----------------------------------------------------------------------------------


SEMANTIC: dict[str, tuple[Callable[[Path], Made], dict[int, int], int]] = {
    "ade20k": (ade20k, ADE20K, 150), "cityscapes": (cityscapes, CITYSCAPES, 19), "bdd100k": (bdd100k, BDD100K, 19),
    "bedroom_28": (bedroom, BEDROOM, 28), "cat_15": (cat, CAT, 15),
}  # fmt: skip


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("name", SEMANTIC)
def test_masks_are_read_pixel_by_pixel(name: str, part: layouts_table.Part, tmp_path: Path) -> None:
    make, meaning, classes = SEMANTIC[name]
    made = make(tmp_path)
    found = load_layout(at(name, tmp_path), (H, W), part=part)
    assert (len(found.classes), len(set(found.classes))) == (classes, classes)
    assert len(found.targets) == len(made[part])
    for mask, values in zip(found.targets, made[part], strict=True):
        assert torch.equal(mask, by_loop(values, meaning))
    seeds = [0, 1] * (len(made[part]) // 2)
    for image, (path, _), seed in zip(
        found.images, mask_files(at(name, tmp_path), part).pairs, seeds, strict=True
    ):
        if path.suffix == ".png":  # the image is the one that the mask was made with
            assert torch.equal(image, torch.from_numpy(np.asarray(noise(seed, H, W)).copy()).permute(2, 0, 1))


@pytest.mark.parametrize("name", SEMANTIC)
def test_another_ignored_id(name: str, tmp_path: Path) -> None:
    make, meaning, classes = SEMANTIC[name]
    values = make(tmp_path)["train"][0]
    found = load_layout(at(name, tmp_path), (H, W), ignore_index=classes + 3)
    other = {k: classes + 3 if v == 255 else v for k, v in meaning.items()}
    assert torch.equal(found.targets[0], by_loop(values, other))
    refused(lambda: load_layout(at(name, tmp_path), (H, W), ignore_index=1), "1 is to be ignored")
    refused(lambda: load_layout(at(name, tmp_path), (H, W), binary=True), "--binary-masks")


def test_class_names(tmp_path: Path) -> None:
    ade20k(tmp_path)
    assert mask_files(at("ade20k", tmp_path)).names[:2] == ("class 0", "class 1")
    head, words = (
        "Idx\tRatio\tTrain\tVal\tName\n",
        ["wall", "building, edifice", *(f"thing {i}" for i in range(148))],
    )
    table = tmp_path / "objectInfo150.txt"
    table.write_text(head + "".join(f"{i + 1}\t0.1\t2\t3\t{word} \n" for i, word in enumerate(words)))
    assert mask_files(at("ade20k", tmp_path)).names[:3] == ("wall", "building", "thing 0")
    table.write_text("\n".join(table.read_text().splitlines()[:100]))
    refused(lambda: mask_files(at("ade20k", tmp_path)), "names 99 classes, not 150")
    cityscapes(tmp_path)
    names = mask_files(at("cityscapes", tmp_path)).names
    assert (names[0], names[11], names[18]) == ("road", "person", "bicycle")


@pytest.mark.parametrize(
    ("name", "value"), [("ade20k", 151), ("cityscapes", 34), ("bdd100k", 19), ("bdd100k", 254)]
)
def test_values_that_mean_nothing(name: str, value: int, tmp_path: Path) -> None:
    make, _, _ = SEMANTIC[name]
    values = make(tmp_path)["train"][0].copy()
    path = mask_files(at(name, tmp_path)).pairs[0][1]
    values[3, 4] = value
    save(path, values)
    refused(lambda: load_layout(at(name, tmp_path), (H, W)), path.name, f"the values {value}")


@pytest.mark.parametrize("flaw", ["float", "deep", "pickle", "cut", "empty"])
def test_damaged_arrays(flaw: str, tmp_path: Path) -> None:
    cat(tmp_path)
    path = tmp_path / "real" / "train" / "0.npy"
    match flaw:
        case "float":
            np.save(path, np.full((H, W), 0.5))
        case "deep":
            np.save(path, np.zeros((H, W, 3), np.uint8))
        case "pickle":
            np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
        case "cut":
            cut(path, 0.5)
        case "empty":
            path.write_bytes(b"")
    refused(lambda: load_layout(at("cat_15", tmp_path), (H, W)), "0.npy", "Replace or remove")


def test_label_fractions() -> None:
    files = MaskFiles(
        pairs=tuple((Path(f"{i}"), Path(f"{i}.png")) for i in range(2975)), names=("a", "b"), ids={0: 0}
    )
    drawn_ = {parts: label_fraction(files, parts, seed=3).pairs for parts in (1, 4, 8, 30)}
    assert [len(pairs) for pairs in drawn_.values()] == [2975, 744, 372, 100]  # the literature's numbers
    assert set(drawn_[30]) < set(drawn_[8]) < set(drawn_[4]) < set(drawn_[1])
    assert drawn_[30] == label_fraction(files, 30, seed=3).pairs != label_fraction(files, 30, seed=4).pairs
    assert list(drawn_[30]) == sorted(drawn_[30], key=lambda pair: int(pair[0].name))
    with pytest.raises(ValueError, match="0 parts"):
        label_fraction(files, 0, seed=0)


# --- images and classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("val", ["sorted", "kaggle", "devkit"])
def test_imagenet(val: str, tmp_path: Path) -> None:
    truth, source = imagenet(tmp_path, val), at("imagenet", tmp_path)
    train = load_images(source, (8, 8))
    assert train.classes == WNIDS
    assert train.labels is not None
    assert train.labels.tolist() == [0] * 2 + [1] * 3 + [2] * 4
    test = load_images(source, (8, 8), part="val")
    assert test.classes == WNIDS
    assert test.labels is not None
    assert {p.stem: WNIDS[k] for p, k in zip(test.paths, test.labels.tolist(), strict=True)} == truth  # type: ignore[union-attr]
    assert dict(class_counts(source)) == dict(zip(WNIDS, (2, 3, 4), strict=True))
    config = EvaluateConfig(train=source, test=source)
    CLASSIFICATION.check(config, [2])
    refused(lambda: CLASSIFICATION.check(config, [3]), "3 labels per class", WNIDS[0])
    assert check(source, "classes") == (9, 4)


def test_a_damaged_image_leaves_the_other_labels_right(tmp_path: Path) -> None:
    imagenet(tmp_path, "kaggle")
    paths = [Path(str(p)) for p in image_files(at("imagenet", tmp_path), "val").paths]
    paths[1].write_bytes(b"")
    found = load_images(at("imagenet", tmp_path), (8, 8), part="val")
    assert found.labels is not None
    assert ([b.path for b in found.bad], found.labels.tolist()) == ([paths[1]], [2, 1, 2])


def test_lsun(tmp_path: Path) -> None:
    for category in ("bedroom", "church"):
        photo(tmp_path / f"{category}_train" / "a" / "b" / f"ab{category}.webp")
        photo(tmp_path / f"{category}_val" / "c" / f"cd{category}.webp")
    for part in ("train", "val"):
        found = load_images(at("lsun", tmp_path), (8, 8), part=part)  # type: ignore[arg-type]
        assert found.labels is not None
        assert (found.classes, found.labels.tolist()) == (("bedroom", "church"), [0, 1])
    one = load_images(at("lsun", tmp_path / "bedroom_train"), (8, 8))
    photo(tmp_path / "bedroom_train" / "b" / "x.webp")
    assert (
        one.labels is load_images(at("lsun", tmp_path / "bedroom_train"), (8, 8)).labels is None
    )  # keys, no classes
    refused(lambda: image_files(at("lsun", tmp_path / "bedroom_train"), "val"), "no images for val")
    lmdb = tmp_path / "lmdb" / "bedroom_train_lmdb"
    lmdb.mkdir(parents=True)
    (lmdb / "data.mdb").write_bytes(b"x")
    for root in (lmdb, lmdb.parent):
        refused(lambda root=root: image_files(at("lsun", root)), "data.mdb", "data.py export")


@pytest.mark.parametrize("inner", ["images1024x1024", "thumbnails128x128", "."])
def test_ffhq(inner: str, tmp_path: Path) -> None:
    for i in (*range(1002),):
        path = tmp_path / inner / f"{i - i % 1000:05}" / f"{i:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")  # names are looked at, not the pixels
    source = at("ffhq", tmp_path)
    assert [p.name for p in map(Path, map(str, image_files(source).paths))] == [
        f"{i:05}.png" for i in range(1002)
    ]
    assert not image_files(source).by_folder
    (tmp_path / inner / "00000" / "00017.png").unlink()
    refused(lambda: image_files(source), "1 of 1002 images are missing (00000/00017.png)", "ffhq-dataset")
    photo(tmp_path / inner / "me.png")
    refused(lambda: image_files(source), "1 of 1002 images have other names (me.png)")


def test_images_of_every_layout(tmp_path: Path) -> None:
    """What pretraining takes: the training images, and no masks."""
    for name, (make, _, _) in SEMANTIC.items():
        make(tmp_path / name)
        train, val = image_files(at(name, tmp_path / name)), image_files(at(name, tmp_path / name), "val")
        assert len(train.paths) == (4 if name == "cityscapes" else 2)
        assert len(val.paths) == 2
        assert not train.by_folder
        assert load_images(at(name, tmp_path / name), (8, 8)).classes == ()
    folders = {
        str(Path(str(p)).parent.relative_to(tmp_path))
        for p in image_files(at("bdd100k", tmp_path / "bdd100k")).paths
    }
    assert folders == {"bdd100k/images/100k/train"}


# --- instances and panoptic segments ------------------------------------------------------------------------


def decoded(annotation: CocoAnnotation) -> np.ndarray:
    """The object's mask, by pycocotools."""
    assert isinstance(annotation.segmentation, Rle)
    size, counts = list(annotation.segmentation.size), list(annotation.segmentation.counts)
    return coco_mask.decode(coco_mask.frPyObjects({"size": size, "counts": counts}, *size)).astype(bool)


def same_objects(
    found: tuple[CocoAnnotation, ...], expected: dict[tuple[int, bool], list[np.ndarray]]
) -> None:
    """Label and crowd -> masks; boxes and areas are those of the masks."""
    have: dict[tuple[int, bool], list[bytes]] = {}
    for annotation in found:
        mask = decoded(annotation)
        rows, columns = np.nonzero(mask)
        left, top, width, height = annotation.box
        assert (left, top, left + width, top + height) == (
            columns.min(),
            rows.min(),
            columns.max() + 1,
            rows.max() + 1,
        )
        assert annotation.area == mask.sum()
        have.setdefault((annotation.label, annotation.crowd), []).append(mask.tobytes())
    assert {k: sorted(v) for k, v in have.items()} == {
        k: sorted(m.tobytes() for m in v) for k, v in expected.items()
    }


def test_run_lengths_against_pycocotools() -> None:
    for seed in range(20):
        mask = np.random.default_rng(seed).random((5, 7)) < (0.1, 0.5, 0.9)[seed % 3]
        ours = run_lengths(torch.from_numpy(mask))
        theirs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert coco_mask.frPyObjects({"size": [5, 7], "counts": list(ours.counts)}, 5, 7) == theirs
    assert run_lengths(torch.zeros(2, 3, dtype=torch.bool)).counts == (6,)


def test_cityscapes_objects(tmp_path: Path) -> None:
    cityscapes(tmp_path)
    source = at("cityscapes", tmp_path)
    found, whole = instance_files(source, "val"), panoptic_files(source, "val")
    assert found.names == ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
    assert found.images == whole.images == tuple(image for image, _ in mask_files(source, "val").pairs)
    assert whole.names[11:] == found.names
    assert whole.things == (False,) * 11 + (True,) * 8
    for i in range(2):
        v = instance_ids(i)
        cars = {(2, False): [v == 26000, v == 26001], (2, True): [v == 26], (0, False): [v == 24000]}
        same_objects(found.read(i), cars)
        ids, segments = whole.read(i)
        expected = {
            7: (0, False),
            23: (10, False),
            26000: (13, False),
            26001: (13, False),
            26: (13, True),
            24000: (11, False),
        }
        assert {s.id: (s.label, s.crowd) for s in segments} == expected
        assert torch.equal(
            ids, by_loop(v, {int(k): int(k) if int(k) in expected else 0 for k in np.unique(v)})
        )
    save(
        next(tmp_path.rglob("munster_000000_000019_gtFine_instanceIds.png")),
        np.full((H, W), 34001, np.uint16),
    )
    refused(lambda: found.read(0), "34001", "no instance id")


def test_bdd100k_objects(tmp_path: Path) -> None:
    bdd100k(tmp_path)
    source = at("bdd100k", tmp_path)
    # Nothing is written as crowd, ignored, object 1; objects beyond 255 use the third byte.
    things = [(0, 3, 1), (3, 0, 2), (3, 12, 258), (1, 2, 4), (8, 1, 5)]
    kinds = [(0, 0, 0), (7, 0, 2), (7, 0, 3), (30, 3, 4), (31, 0, 5), (31, 0, 261), (35, 2, 7)]
    for part in ("train", "val"):
        for i in range(2):
            save(tmp_path / "labels" / "ins_seg" / "bitmasks" / part / f"{i}.png", bitmask(i, things)[0])
            save(tmp_path / "labels" / "pan_seg" / "bitmasks" / part / f"{i}.png", bitmask(i, kinds)[0])
    assert check(source, "instances") == check(source, "panoptic") == check(source, "masks") == (2, 2)
    found, whole = instance_files(source), panoptic_files(source)
    assert (found.names[0], found.names[2], len(found.names)) == ("pedestrian", "car", 8)
    which = bitmask(1, things)[1]
    objects = {(2, False): [which == 1, which == 2], (0, True): [which == 3], (7, True): [which == 4]}
    same_objects(found.read(1), objects)
    assert (whole.names[6], whole.names[29], whole.names[30], len(whole.names)) == (
        "road",
        "sky",
        "person",
        40,
    )
    assert whole.things == (False,) * 30 + (True,) * 10
    ids, segments = whole.read(1)
    which = bitmask(1, kinds)[1]
    masks = {s.id: (ids == s.id).numpy() for s in segments}
    labelled = sorted((s.label, s.crowd, masks[s.id].tobytes()) for s in segments)
    road = (which == 1) | (which == 2)  # two objects of stuff are one segment
    expected = [
        (6, False, road),
        (29, False, which == 3),
        (30, False, which == 4),
        (30, False, which == 5),
        (34, True, which == 6),
    ]
    assert labelled == sorted((label, crowd, mask.tobytes()) for label, crowd, mask in expected)
    assert ((ids == 0).numpy() == (which == 0)).all()
    path = tmp_path / "labels" / "ins_seg" / "bitmasks" / "train" / "0.png"
    save(path, bitmask(0, [(9, 0, 1)])[0])
    refused(lambda: found.read(0), "class 9 of 8")
    save(path, np.zeros((H, W, 3), np.uint8))
    refused(lambda: found.read(0), "RGBA is expected")
    cut(path, 0.5)
    refused(lambda: found.read(0), "0.png", "cannot be read: ")


def test_coco(tmp_path: Path) -> None:
    maps, source = coco(tmp_path), at("coco", tmp_path)
    assert check(source, "images") == check(source, "instances") == check(source, "panoptic") == (2, 2)
    found, whole = instance_files(source), panoptic_files(source)
    assert found.names == ("person", "toothbrush")
    assert [p.name for p in found.images] == ["000000000007.jpg", "000000000003.jpg"]
    (annotation,) = found.read(0)
    assert (annotation.label, annotation.box, annotation.crowd) == (1, (2, 3, 10, 8), False)
    assert (whole.names, whole.things) == (("person", "toothbrush", "banner"), (True, True, False))
    for i in range(2):
        ids, segments = whole.read(i)
        assert torch.equal(ids, torch.from_numpy(maps[i]))
        assert {s.id: (s.label, s.crowd) for s in segments} == {
            5: (2, False),
            300: (1, False),
            70_000: (0, True),
        }


def change_panoptic(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = root / "annotations" / "panoptic_train2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["annotations"][0].update(file_name="../../x.png"), ("leads out of the folder: ../../x.png",)),
        (lambda c: c["annotations"][0].update(file_name="/etc/passwd"), ("leads out of the folder: /etc/passwd",)),
        (lambda c: c["images"][1].update(file_name="..\\x.jpg"), ("leads out of the folder",)),
        (lambda c: c["annotations"][0].update(file_name="no.png"), ("1 of 2 PNG files", "missing (no.png)")),
        (lambda c: c["images"][0].update(file_name="no.jpg"), ("1 of 2 images", "missing (no.jpg)")),
        (lambda c: c["annotations"].pop(), ("1 annotations for 2 images",)),
        (lambda c: c["annotations"][0].update(image_id=99), ("image 99 is not listed",)),
        (lambda c: c["annotations"][0]["segments_info"][0].update(category_id=2), ("category 2 is not listed",)),
        (lambda c: c.pop("categories"), ("has no lists images, annotations, categories",)),
    ],
)  # fmt: skip
def test_wrong_panoptic_files(
    change: Callable[[dict[str, Any]], object], words: tuple[str, ...], tmp_path: Path
) -> None:
    coco(tmp_path)
    change_panoptic(tmp_path, change)
    refused(lambda: panoptic_files(at("coco", tmp_path)), *words)


def test_more_wrong_panoptic_files(tmp_path: Path) -> None:
    coco(tmp_path)
    change_panoptic(tmp_path, lambda c: c["annotations"][0]["segments_info"].pop())
    refused(lambda: panoptic_files(at("coco", tmp_path)).read(0), "differ in the segments 70000")
    path = tmp_path / "annotations" / "panoptic_train2017.json"
    cut(path, 0.5)
    refused(lambda: panoptic_files(at("coco", tmp_path)), "is not JSON")
    path.with_suffix("").rename(tmp_path / "elsewhere")
    path.with_suffix(".zip").write_bytes(b"PK")
    refused(lambda: panoptic_files(at("coco", tmp_path)), "panoptic_train2017.zip is not unpacked")


# --- what is missing ----------------------------------------------------------------------------------------


def remove(*names: str) -> Callable[[Path], None]:
    def run(root: Path) -> None:
        for name in names:
            for path in sorted(root.glob(name)):
                path.rename(root.parent / f"gone-{len(list(root.parent.iterdir()))}")

    return run


def add(*names: str) -> Callable[[Path], None]:
    return lambda root: [photo(root / name) for name in names] and None


BROKEN: list[tuple[str, Callable[[Path], object], layouts_table.Use, Callable[[Path], None], tuple[str, ...]]] = [
    ("ade20k", ade20k, "masks", remove("annotations"), ("no annotations/training", "ADEChallengeData2016.zip")),
    ("ade20k", ade20k, "images", remove("images/training"), ("no images/training",)),
    ("ade20k", ade20k, "masks", remove("annotations/validation/*1.png"), ("1 of 2 images lack", "ADE_val_00000001")),
    ("ade20k", ade20k, "masks", remove("images/training/*2.jpg"), ("1 of 2 label files", "ADE_train_00000002")),
    ("ade20k", ade20k, "masks", remove("images/training/*.jpg"), ("no images in images/training",)),
    ("cityscapes", cityscapes, "masks", remove("gtFine"), ("no gtFine/train", "gtFine_trainvaltest.zip")),
    ("cityscapes", cityscapes, "masks", remove("gtFine/train/*/*labelIds.png"), ("4 of 4 images lack", "labelIds")),
    ("cityscapes", cityscapes, "panoptic", remove("gtFine/val/*/*instanceIds.png"), ("2 of 2 images lack",)),
    ("cityscapes", cityscapes, "images", remove("leftImg8bit/val"), ("no leftImg8bit/val",)),
    ("bdd100k", bdd100k, "images", remove("images/100k"), ("no images/100k/train", "100K Images")),
    ("bdd100k", bdd100k, "masks", remove("labels"), ("no labels/sem_seg/masks/train",)),
    ("bdd100k", bdd100k, "instances", remove(), ("no labels/ins_seg/bitmasks/train", "Instance")),
    ("bdd100k", bdd100k, "panoptic", remove(), ("no labels/pan_seg/bitmasks/train",)),
    ("bdd100k", bdd100k, "masks", remove("images/10k/val/1.jpg"), ("1 of 2 label files", "(1)")),
    ("bedroom_28", bedroom, "masks", remove("real/test"), ("no real/test", "datasets.tar.gz")),
    ("bedroom_28", bedroom, "masks", remove("real/train/0.npy"), ("1 of 2 images lack", "(0)")),
    ("cat_15", cat, "masks", remove("real/train/0.png"), ("1 of 2 label files",)),
    ("coco", coco, "instances", remove("annotations/instances*"), ("no annotations/instances_train2017.json",)),
    ("coco", coco, "instances", remove("train2017/*7.jpg"), ("1 of 2 images", "000000000007.jpg")),
    ("coco", coco, "panoptic", remove("annotations/panoptic_val2017"), ("no annotations/panoptic_val2017",)),
    ("coco", coco, "images", remove("val2017"), ("no val2017", "val2017.zip")),
    ("imagenet", imagenet, "classes", remove("val"), ("no val",)),
    ("imagenet", imagenet, "images", remove("train/n*"), ("train has 0 WNID folders",)),
    ("imagenet", imagenet, "classes", remove(f"train/{WNIDS[0]}"), ("val has 1 classes that train has not", WNIDS[0])),
    ("imagenet", imagenet, "classes", remove(f"val/{WNIDS[0]}"), ("1 of 3 classes have no images in val", WNIDS[0])),
    ("imagenet", lambda root: imagenet(root, "kaggle"), "classes", remove("*.csv"), ("val is flat", "LOC_val_solution.csv")),
    ("imagenet", lambda root: imagenet(root, "kaggle"), "classes", remove("ILSVRC/Data/CLS-LOC/val/*1.JPEG"),
     ("val has 3 images for 4 labels",)),
    ("imagenet", lambda root: imagenet(root, "devkit"), "classes", add("val/x.JPEG"),
     ("val has 5 images for 4 labels", "1 of them without one (x.JPEG)")),
    ("imagenet", lambda root: imagenet(root, "devkit"), "classes", remove("*/data/meta.mat"), ("meta.mat' cannot be read",)),
    ("imagenet", lambda root: imagenet(root, "devkit"), "classes",
     lambda root: cut(root / "ILSVRC2012_devkit_t12" / "data" / "meta.mat", 0.5), ("meta.mat' cannot be read",)),
    ("imagenet", imagenet, "classes", lambda root: (root / "train" / "n02.tar").write_bytes(b"x") and None,
     ("1 tars in train are not unpacked (n02.tar)",)),
]  # fmt: skip


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: f"{case[0]}-{case[2]}-{case[4][0]}")
def test_what_is_missing_is_named(
    case: tuple[str, Callable[[Path], object], layouts_table.Use, Callable[[Path], None], tuple[str, ...]],
    tmp_path: Path,
) -> None:
    name, make, use, spoil, words = case
    root = tmp_path / "root"
    make(root)
    if spoil.__qualname__.startswith("remove") and use not in ("instances", "panoptic"):
        check(at(name, root), use)  # whole before
    spoil(root)
    refused(lambda: check(at(name, root), use), *words)


def test_ground_truth_of_another_kind(tmp_path: Path) -> None:
    imagenet(tmp_path, "devkit")
    truth = next(tmp_path.rglob("*ground_truth.txt"))
    for text in ("2\n3\n1\n9\n", "2\n3\n1\nx\n"):
        truth.write_text(text)
        refused(lambda: image_files(at("imagenet", tmp_path), "val"), "which is no ILSVRC id")
    imagenet(tmp_path / "k", "kaggle")
    (tmp_path / "k" / "LOC_val_solution.csv").write_text("a,b\n1,2\n")
    refused(lambda: image_files(at("imagenet", tmp_path / "k"), "val"), "ImageId and PredictionString")


def test_other_counts_are_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ade20k(tmp_path, 3)
    for _ in range(2):
        mask_files(at("ade20k", tmp_path))
    said = capsys.readouterr().err
    assert said.count("3 images for train (masks); the whole set has 20210") == 1


def test_names_of_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert layout_of(tmp_path) is None
    assert layout_of(Path("C:/photos")) is None
    refused(lambda: layout_of(Path("adek20:/data")), "no layout 'adek20'. Did you mean 'ade20k'?")
    refused(lambda: layout_of(Path("coco:")), "names a layout and no root")
    refused(lambda: image_files(Path("coco:/no/such/folder")), "no such folder", "COCO 2017", "train2017.zip")
    refused(lambda: mask_files(at("imagenet", tmp_path)), "has no masks of classes", "ade20k")
    refused(lambda: mask_files(tmp_path), "has no masks of classes")
    refused(lambda: instance_files(at("ade20k", tmp_path)), "has no instances", "coco")
    refused(lambda: panoptic_files(at("ade20k", tmp_path)), "has no panoptic segments")
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "coco:x", 2)  # a folder of that very name
    assert len(image_files(Path("coco:x")).paths) == 2
    monkeypatch.setenv("HOME", str(tmp_path))
    assert layout_of(Path("coco:~/data")) == ("coco", tmp_path / "data")
    ade20k(tmp_path / "ade")
    refused(lambda: check(at("ade20k", tmp_path / "ade"), "classes"), "has no classes of images")
    refused(lambda: class_counts(at("ade20k", tmp_path / "ade")), "not sorted into classes")


# --- evaluation ---------------------------------------------------------------------------------------------

QUICK = EvaluateConfig(
    student="test_resnet", size=(32, 32), seeds=(0,), labels=(2,), mask_counts=(2,), device="cpu", precision="float32"
)  # fmt: skip


def test_evaluation_on_layouts(tmp_path: Path) -> None:
    cityscapes(tmp_path / "city")
    imagenet(tmp_path / "net", "devkit")
    config = dataclasses.replace(
        QUICK, tasks=("knn", "segment-linear"), train=at("imagenet", tmp_path / "net"), knn_k=1,
        images=at("cityscapes", tmp_path / "city"), out=tmp_path / "out",
    )  # fmt: skip
    rows = evaluate(config, log=lambda line: None)
    names = {row["metric"] for row in rows}
    assert {"accuracy", "miou", "iou/road", "iou/bicycle"} <= names
    bdd100k(tmp_path / "bdd")  # another data set of the same classes to test on
    other = dataclasses.replace(
        config, test_images=at("bdd100k", tmp_path / "bdd"), tasks=("segment-linear",), out=None
    )
    scores = {row["metric"]: row["value"] for row in evaluate(other, log=lambda line: None)}
    assert scores != {row["metric"]: row["value"] for row in rows if row["task"] == "segment-linear"}


def test_evaluation_refuses_before_anything_is_made(tmp_path: Path) -> None:
    cityscapes(tmp_path / "city")
    city = at("cityscapes", tmp_path / "city")
    out = tmp_path / "out"
    base = dataclasses.replace(QUICK, out=out, tasks=("segment-linear",), images=city)

    def problem(**changes: Any) -> str:
        return refused(lambda: evaluate(dataclasses.replace(base, **changes), log=lambda line: None))

    assert "comes with its masks" in problem(masks=tmp_path / "city" / "gtFine")
    assert "Give both --images and --masks" in problem(images=tmp_path / "city")
    assert "Only one of" in problem(test_images=tmp_path / "city")
    assert "has no masks" in problem(images=at("coco", tmp_path))
    assert "Give both --train and --test" in problem(tasks=("knn",), train=at("shards", tmp_path))
    remove("gtFine/val")(tmp_path / "city")
    assert "no gtFine/val" in problem()
    assert not out.exists()
