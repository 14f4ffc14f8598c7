"""Miniatures of public data sets, laid out as they are downloaded."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from tests.builders.pictures import noise

H, W = 24, 32


def at(name: str, root: Path) -> Path:
    return Path(f"{name}:{root}")


def save(path: Path, values: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return values


def photo(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(seed, H, W).save(path)
    return path


def drawn(seed: int, values: list[int]) -> np.ndarray:
    """A label map with all of these values, in blocks."""
    grid = np.random.default_rng(seed).permutation(np.resize(values, (H // 2) * (W // 2)))
    return np.kron(grid.reshape(H // 2, W // 2), np.ones((2, 2), dtype=np.int64))


# As the data sets' own pages list them: (id in the file, train id), all others do not count.
CITYSCAPES = dict.fromkeys(range(34), 255) | {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
    28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip
ADE20K = {0: 255} | {k: k - 1 for k in range(1, 151)}
BDD100K = {k: k for k in range(19)} | {255: 255}
BEDROOM = {0: 255, 255: 255} | {k: k - 1 for k in range(1, 29)}
CAT = {k: k for k in range(15)} | {255: 255}
Made = dict[str, list[np.ndarray]]


def ade20k(root: Path, count: int = 2) -> Made:
    made: Made = {"train": [], "val": []}
    for part, folder, prefix in (("train", "training", "train"), ("val", "validation", "val")):
        for i in range(count):
            name = f"ADE_{prefix}_{i + 1:08}"
            photo(root / "images" / folder / f"{name}.jpg", i)
            values = drawn(i, list(ADE20K)).astype(np.uint8)
            made[part].append(save(root / "annotations" / folder / f"{name}.png", values))
    return made


def cityscapes(root: Path, count: int = 2) -> Made:
    made: Made = {"train": [], "val": []}
    for part, cities in (("train", ("aachen", "zurich")), ("val", ("munster",))):
        for city in cities:
            for i in range(count):
                name = f"{city}_{i:06}_000019"
                photo(root / "leftImg8bit" / part / city / f"{name}_leftImg8bit.png", i)
                stem = root / "gtFine" / part / city / f"{name}_gtFine"
                values = drawn(i, list(CITYSCAPES)).astype(np.uint8)
                made[part].append(save(stem.with_name(f"{stem.name}_labelIds.png"), values))
                save(stem.with_name(f"{stem.name}_color.png"), np.zeros((H, W, 4), np.uint8))
                save(stem.with_name(f"{stem.name}_instanceIds.png"), instance_ids(i))
    return made


def instance_ids(seed: int) -> np.ndarray:
    """Road, sky, two cars, a group of cars, a person, a caravan (not counted), the ego vehicle."""
    return drawn(seed, [7, 23, 26000, 26001, 26, 24000, 29000, 1]).astype(np.uint16)


def bdd100k(root: Path, count: int = 2) -> Made:
    made: Made = {"train": [], "val": []}
    for part in made:
        for i in range(count):
            photo(root / "images" / "100k" / part / f"other{i}.jpg", i)
            photo(root / "images" / "10k" / part / f"{i}.jpg", i)
            values = drawn(i, list(BDD100K)).astype(np.uint8)
            made[part].append(save(root / "labels" / "sem_seg" / "masks" / part / f"{i}.png", values))
    return made


def ddpm_seg(root: Path, meaning: dict[int, int], kind: type = np.uint8, count: int = 2) -> Made:
    made: Made = {"train": [], "val": []}
    for part, folder in (("train", "train"), ("val", "test")):
        for i in range(count):
            path = photo(root / "real" / folder / f"{i}.png", i)
            made[part].append(drawn(i, list(meaning)))
            np.save(path.with_suffix(".npy"), made[part][-1].astype(kind))
    return made


def bedroom(root: Path) -> Made:
    return ddpm_seg(root, BEDROOM)


def cat(root: Path) -> Made:
    return ddpm_seg(root, CAT, np.int64)


WNIDS = ("n01440764", "n01443537", "n01484850")


def imagenet(root: Path, val: str = "sorted") -> dict[str, str]:
    """Three classes; returns the WNID of each validation image. ILSVRC ids count against the sorted WNIDs."""
    data = root / "ILSVRC" / "Data" / "CLS-LOC" if val == "kaggle" else root
    for k, wnid in enumerate(WNIDS):
        for i in range(k + 2):
            photo(data / "train" / wnid / f"{wnid}_{i}.JPEG", 10 * k + i)
    truth = [WNIDS[i] for i in (2, 0, 1, 2)]
    names = [f"ILSVRC2012_val_{i + 1:08}" for i in range(4)]
    for name, wnid in zip(names, truth, strict=True):
        photo(data / "val" / (wnid if val == "sorted" else "") / f"{name}.JPEG")
    if val == "kaggle":
        with (root / "LOC_val_solution.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["ImageId", "PredictionString"])
            writer.writerows(
                [name, f"{wnid} 85 1 499 272 "]
                for name, wnid in reversed(list(zip(names, truth, strict=True)))
            )
    if val == "devkit":
        devkit = root / "ILSVRC2012_devkit_t12" / "data"
        devkit.mkdir(parents=True)
        kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("num_children", "f8")]
        rows = [
            (3.0, WNIDS[0], "tench", 0),
            (1.0, WNIDS[1], "goldfish", 0),
            (2.0, WNIDS[2], "shark", 0),
            (4, "n1", "x", 2),
        ]
        savemat(devkit / "meta.mat", {"synsets": np.array(rows, dtype=kinds)})
        (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n3\n1\n2\n")
    return dict(zip(names, truth, strict=True))


def bitmask(seed: int, classes: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """RGBA of (class, flags, object) in blocks, and which of them each pixel is."""
    which = drawn(seed, list(range(len(classes))))
    rgba = np.zeros((H, W, 4), np.uint8)
    for k, (label, flags, number) in enumerate(classes):
        rgba[which == k] = (label, flags, number >> 8, number & 255)
    return rgba, which


def coco(root: Path) -> list[np.ndarray]:
    """Two images and their objects in two categories; panoptic maps, which are returned."""
    maps = []
    categories = [{"id": 90, "name": "toothbrush", "isthing": 1}, {"id": 1, "name": "person", "isthing": 1}]
    stuff = [{"id": 92, "name": "banner", "isthing": 0}]
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for part in ("train", "val"):
        images, panoptic, instances = [], [], []
        for i in (7, 3):
            photo(root / f"{part}2017" / f"{i:012}.jpg", i)
            images.append({"id": i, "file_name": f"{i:012}.jpg", "height": H, "width": W})
            values = drawn(i, [0, 5, 300, 70_000])
            rgb = np.stack([values % 256, values // 256 % 256, values // 65536], -1).astype(np.uint8)
            save(root / "annotations" / f"panoptic_{part}2017" / f"{i:012}.png", rgb)
            maps.append(values)
            info = [
                {"id": 5, "category_id": 92, "iscrowd": 0}, {"id": 300, "category_id": 90, "iscrowd": 0},
                {"id": 70_000, "category_id": 1, "iscrowd": 1},
            ]  # fmt: skip
            panoptic.append({"image_id": i, "file_name": f"{i:012}.png", "segments_info": info})
            box = {
                "bbox": [2, 3, 10, 8],
                "area": 80,
                "segmentation": [[2, 3, 12, 3, 12, 11, 2, 11]],
                "iscrowd": 0,
            }
            instances.append({"id": i, "image_id": i, "category_id": 90, **box})
        for kind, parts in (
            ("instances", {"annotations": instances, "categories": categories}),
            ("panoptic", {"annotations": panoptic, "categories": stuff + categories}),
        ):
            path = root / "annotations" / f"{kind}_{part}2017.json"
            path.write_text(json.dumps({"images": images, **parts}))
    return maps
