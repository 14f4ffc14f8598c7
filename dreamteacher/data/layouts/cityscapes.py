"""Layouts of semantic segmentation: ADE20K, Cityscapes, BDD100K and DDPM-seg's four sets."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dreamteacher.data.images import below, read_mask
from dreamteacher.data.layouts.layout import Layout, _objects, _read, images_below, pairs_by_name
from dreamteacher.data.sources import (
    IGNORED,
    ImageFiles,
    InstanceFiles,
    MaskFiles,
    PanopticFiles,
    Part,
    Segment,
)
from dreamteacher.runtime.errors import UserError

CITYSCAPES = Layout(
    what="Cityscapes",
    tree="leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/*_gtFine_labelIds.png",
    get="leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from the Cityscapes site",
    counts=dict.fromkeys(("images", "masks", "instances", "panoptic"), (2_975, 500)),
)

# The 19 classes that count, in the order of their train ids, and their ids in the files.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# fmt: off
STREET = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
    "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)
# fmt: on
# Value in *_labelIds.png -> train id; 34 ids, the other 15 do not count.
CITYSCAPES_TRAIN_IDS = dict.fromkeys(range(34), IGNORED) | {v: i for i, v in enumerate(_CITYSCAPES_IDS)}


def cityscapes_images(root: Path, part: Part) -> ImageFiles:
    """The left images of all cities of a part.

    Raises:
        UserError: there are none.
    """
    paths = images_below(CITYSCAPES, root, f"leftImg8bit/{part}")
    CITYSCAPES.say_count("images", part, len(paths))
    return ImageFiles(folder=root / "leftImg8bit" / part, paths=paths)


def cityscapes(root: Path, part: Part) -> MaskFiles:
    """The 19 classes of the benchmark, by train id; *_labelIds.png as downloaded, no conversion is needed.

    `layouts_files.label_fraction` draws 1/4, 1/8, 1/30 of the labels by a seed.

    Source: mcordts/cityscapesScripts, README and helpers/labels.py (ids 0 to 33, the train ids of 19 of
    them).

    Raises:
        UserError: folders, images or masks are missing.
    """
    pairs = cityscapes_pairs(root, part, "labelIds")
    CITYSCAPES.say_count("masks", part, len(pairs))
    return MaskFiles(pairs=pairs, names=STREET, ids=CITYSCAPES_TRAIN_IDS)


def cityscapes_pairs(root: Path, part: Part, kind: str) -> tuple[tuple[Path, Path], ...]:
    """(image, *_gtFine_KIND.png) of a part; kinds: labelIds, instanceIds.

    Raises:
        UserError: folders, images or label files are missing.
    """
    folder = f"gtFine/{part}"
    CITYSCAPES.need(root, f"leftImg8bit/{part}", folder)
    ends = ("_leftImg8bit.png", f"_gtFine_{kind}.png")
    found = (images_below(CITYSCAPES, root, f"leftImg8bit/{part}"), images_below(CITYSCAPES, root, folder))
    images, labels = (
        {below(root, p).split("/", 2)[2].removesuffix(end): p for p in paths if p.name.endswith(end)}
        for paths, end in zip(found, ends, strict=True)
    )
    if not images:
        raise CITYSCAPES.lacks(root, f"no image in leftImg8bit/{part} is named *{ends[0]}")
    return pairs_by_name(CITYSCAPES, root, images, labels, f"{folder} (*{ends[1]})")


# --- DDPM-seg -----------------------------------------------------------------------------------------------


# fmt: on


# Cityscapes' classes with instances are its train ids from here on; BDD100K calls the first one pedestrian.
_FIRST_THING = 11


def _cityscapes_map(path: Path, *, things_only: bool) -> tuple[Tensor, tuple[Segment, ...]]:
    """Values from 1000 on are class * 1000 + number; smaller ones a class: stuff, or a group of things."""
    values = _read(path, lambda p: read_mask(p, None))
    kept, segments = torch.zeros_like(values), []
    for value in values.unique().tolist():
        number = value // 1000 if value >= 1000 else value
        if number not in CITYSCAPES_TRAIN_IDS:
            raise UserError(
                f"'{path}' holds {value}, which is no instance id of Cityscapes.", "Unpack it again."
            )
        label = CITYSCAPES_TRAIN_IDS[number]
        thing = label >= _FIRST_THING
        if label == IGNORED or (things_only and not thing):
            continue
        kept[values == value] = value
        label = label - _FIRST_THING if things_only else label
        segments.append(Segment(id=value, label=label, crowd=thing and value < 1000))
    return kept, tuple(segments)


def cityscapes_instances(root: Path, part: Part) -> InstanceFiles:
    """The 8 classes of things; a group whose members are not told apart is a crowd.

    Source: mcordts/cityscapesScripts, preparation/json2instanceImg.py (id * 1000 + number; groups: the id
    alone).

    Raises:
        UserError: folders, images or label files are missing.
    """
    pairs = cityscapes_pairs(root, part, "instanceIds")
    CITYSCAPES.say_count("instances", part, len(pairs))
    return InstanceFiles(
        images=tuple(image for image, _ in pairs),
        names=STREET[_FIRST_THING:],
        read=lambda i: _objects(*_cityscapes_map(pairs[i][1], things_only=True)),
    )


def cityscapes_panoptic(root: Path, part: Part) -> PanopticFiles:
    """The 19 classes, 8 of them things, from *_instanceIds.png.

    Source: as `cityscapes_instances`; preparation/createPanopticImgs.py makes the same segments.

    Raises:
        UserError: folders, images or label files are missing.
    """
    pairs = cityscapes_pairs(root, part, "instanceIds")
    CITYSCAPES.say_count("panoptic", part, len(pairs))
    return PanopticFiles(
        images=tuple(image for image, _ in pairs),
        names=STREET,
        things=tuple(i >= _FIRST_THING for i in range(len(STREET))),
        read=lambda i: _cityscapes_map(pairs[i][1], things_only=False),
    )
