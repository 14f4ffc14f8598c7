"""Bright squares on dark noise: the smallest scenes with objects."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from dreamteacher.downstream.detection.config import DetectConfig
from dreamteacher.downstream.detection.data import (
    InstanceSet,
    instances_of_ids,
)

TINY = DetectConfig(
    steps=2, batch_size=2, lr=3e-3, layer_decay=1.0, short_side=(64, 64), test_side=64, longest_side=96, width=16, fc=32,
    rois=16, anchors=32, proposals=32, anchor=6.0, workers=1,
)  # fmt: skip


def draw_scene(seed: int, size: tuple[int, int], objects: int = 2) -> tuple[Tensor, Tensor]:
    """Bright squares on dark noise, and the numbers of the squares."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 60, (3, *size), generator=generator, dtype=torch.uint8)
    ids = torch.zeros(size, dtype=torch.int64)
    for k in range(objects):
        side = int(torch.randint(18, 26, (), generator=generator))
        y, x = (int(torch.randint(0, whole - side + 1, (), generator=generator)) for whole in size)
        if not ids[y : y + side, x : x + side].any():
            ids[y : y + side, x : x + side] = 3 * k + 1
            image[:, y : y + side, x : x + side] = 220
    return image, ids


def scenes(*seeds: int) -> InstanceSet:
    sizes = [(64, 80) if seed % 2 else (80, 64) for seed in seeds]
    drawn = [draw_scene(seed, size) for seed, size in zip(seeds, sizes, strict=True)]
    objects = [instances_of_ids(ids) for _, ids in drawn]
    counts = [len(o.masks) for o in objects]
    images = [image for image, _ in drawn]
    return InstanceSet(
        images=images, sizes=sizes, counts=counts, truth=objects.__getitem__, classes=("square",)
    )


def save_folder(folder: Path, *seeds: int) -> tuple[Path, Path]:
    images, instances = folder / "images", folder / "instances"
    for path in (images, instances):
        path.mkdir(parents=True)
    for seed in seeds:
        image, ids = draw_scene(seed, (64, 80) if seed % 2 else (72, 64))
        to_pil_image(image).save(images / f"{seed}.png")
        Image.fromarray((300 * ids).numpy().astype("uint16")).save(instances / f"{seed}.png")
    return images, instances


def save_coco(folder: Path, *seeds: int, names: tuple[str, ...] = ("square",)) -> tuple[Path, Path]:
    """As `save_folder`, but squares as polygons, the second of an image a crowd in run lengths."""
    images, ids = save_folder(folder, *seeds)
    records, listed = [], []
    for seed in seeds:
        drawn = instances_of_ids(torch.from_numpy(_array(ids / f"{seed}.png")).long())
        height, width = _array(ids / f"{seed}.png").shape
        listed.append({"id": seed + 5, "file_name": f"{seed}.png", "height": height, "width": width})
        for k, (x0, y0, x1, y1) in enumerate(drawn.boxes.tolist()):
            flat = drawn.masks[k].whole((height, width)).t().flatten().int().tolist()
            changes = [0, *(i for i in range(1, len(flat)) if flat[i] != flat[i - 1]), len(flat)]
            runs = [b - a for a, b in itertools.pairwise(changes)]
            outline = {"size": [height, width], "counts": ([0] if flat[0] else []) + runs}
            records.append(
                {
                    "id": len(records) + 1, "image_id": seed + 5, "category_id": 7, "iscrowd": int(k == 1),
                    "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0),
                    "segmentation": outline if k == 1 else [[x0, y0, x1, y0, x1, y1, x0, y1]],
                }
            )  # fmt: skip
    categories = [{"id": 7 + i, "name": name} for i, name in enumerate(names)]
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": listed, "annotations": records, "categories": categories}))
    return images, path


def _array(path: Path):
    import numpy as np

    return np.asarray(Image.open(path)).astype("int64")
