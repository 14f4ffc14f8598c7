"""Small pictures with classes, masks, instances and segments, the same on every machine: Python's own random numbers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

GROUND, SKY, SQUARE, VOID = 0, 1, 2, 255
THINGS = [{"id": 5, "name": "square", "isthing": 1}]
STUFF = [{"id": 9, "name": "sky", "isthing": 0}, {"id": 2, "name": "ground", "isthing": 0}]


def write_all(folder: Path) -> None:
    """`classes` and `scenes`, each with train/ and test/."""
    write_classes(folder / "classes" / "train", 24, seed=1)
    write_classes(folder / "classes" / "test", 12, seed=2)
    write_scenes(folder / "scenes" / "train", 16, seed=3)
    write_scenes(folder / "scenes" / "test", 8, seed=4)


def write_classes(folder: Path, count: int, seed: int) -> None:
    """Two classes of grey noise on a slope; their brightness overlaps, so that scores lie between chance and 1."""
    draw = random.Random(seed)
    for name, low in (("dark", 0), ("light", 24)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            level, slope = low + draw.randrange(60), draw.uniform(-0.8, 0.8)
            pixels = bytes(
                max(0, min(255, int(level + draw.randrange(100) + slope * (x - 32))))
                for _ in range(64)
                for x in range(64)
            )
            Image.frombytes("L", (64, 64), pixels).save(folder / name / f"{i:02}.png")


def write_scenes(folder: Path, count: int, seed: int) -> None:
    """Sky above, ground below, two bright squares, a row of void; labelled in every format that is read.

    images/, classes/ (PNGs of class ids), arrays/ (the same as .npy), instances/ (PNGs of object numbers),
    instances.json (COCO), segments/ with panoptic.json (COCO's panoptic format).
    """
    draw = random.Random(seed)
    for name in ("images", "classes", "arrays", "instances", "segments"):
        (folder / name).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    segments: list[dict[str, Any]] = []
    for i in range(count):
        height, width = ((64, 80), (80, 64))[i % 2]
        picture = numpy.array([draw.randrange(50) for _ in range(3 * height * width)], numpy.uint8)
        picture = picture.reshape(height, width, 3)
        classes = numpy.full((height, width), SKY, numpy.uint8)
        classes[height // 2 :] = GROUND
        picture[: height // 2, :, 2] += 120
        picture[height // 2 :, :, 1] += 60
        numbers = numpy.zeros((height, width), numpy.uint8)
        for number in (1, 2):
            side = draw.randrange(16, 24)
            y, x = draw.randrange(1, height - side), draw.randrange(width - side)
            part = (slice(y, y + side), slice(x, x + side))
            if numbers[part].any():
                continue
            numbers[part], classes[part] = number, SQUARE
            picture[part] += 100
            corners = [x, y, x + side, y, x + side, y + side, x, y + side]
            objects.append({
                "id": len(objects) + 1, "image_id": i + 1, "category_id": 5, "iscrowd": 0, "area": side * side,
                "bbox": [x, y, side, side], "segmentation": [corners],
            })  # fmt: skip
        classes[0] = VOID
        infos = [{"id": n, "category_id": 5} for n in sorted(set(numbers.flatten().tolist()) - {0})]
        ids = numbers.copy()
        for number, value, category in ((3, SKY, 9), (4, GROUND, 2)):
            ids[classes == value] = number
            infos.append({"id": number, "category_id": category})
        colours = numpy.stack([ids, numpy.zeros_like(ids), numpy.zeros_like(ids)], -1)
        name = f"{i:02}.png"
        Image.fromarray(picture).save(folder / "images" / name)
        Image.fromarray(classes).save(folder / "classes" / name)
        Image.fromarray(numbers).save(folder / "instances" / name)
        Image.fromarray(colours).save(folder / "segments" / name)
        numpy.save(folder / "arrays" / f"{i:02}.npy", classes.astype(numpy.int64))
        images.append({"id": i + 1, "file_name": name, "height": height, "width": width})
        segments.append({"image_id": i + 1, "file_name": name, "segments_info": infos})
    _write(
        folder / "instances.json",
        {"images": images, "annotations": objects, "categories": THINGS},
    )
    _write(
        folder / "panoptic.json",
        {"images": images, "annotations": segments, "categories": [*THINGS, *STUFF]},
    )


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))
