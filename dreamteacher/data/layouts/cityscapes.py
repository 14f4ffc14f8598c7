"""Cityscapes as it is downloaded."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from dreamteacher.data.images import below, read_mask
from dreamteacher.data.layouts import label_maps
from dreamteacher.data.layouts.layout import Layout
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

# The 19 classes that count, in the order of their train ids, and their ids in the files.
_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# fmt: off
STREET = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
    "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)
# fmt: on
# Classes with instances are those from here on; BDD100K calls the first one pedestrian.
FIRST_THING = 11
# Value in *_labelIds.png -> train id; 34 ids, the other 15 do not count.
_TRAIN_IDS = dict.fromkeys(range(34), IGNORED) | {v: i for i, v in enumerate(_IDS)}


def _images(root: Path, part: Part) -> ImageFiles:
    """The left images of all cities of a part.

    Raises:
        UserError: there are none.
    """
    paths = LAYOUT.images_below(root, f"leftImg8bit/{part}")
    LAYOUT.say_count("images", part, len(paths))
    return ImageFiles(folder=root / "leftImg8bit" / part, paths=paths)


def _masks(root: Path, part: Part) -> MaskFiles:
    """The 19 classes of the benchmark, by train id; *_labelIds.png as downloaded, no conversion is needed.

    `data.sources.label_fraction` draws 1/4, 1/8, 1/30 of the labels by a seed.

    Source: mcordts/cityscapesScripts, README and helpers/labels.py (ids 0 to 33, the train ids of 19 of
    them).

    Raises:
        UserError: folders, images or masks are missing.
    """
    pairs = _pairs(root, part, "labelIds")
    LAYOUT.say_count("masks", part, len(pairs))
    return MaskFiles(pairs=pairs, names=STREET, ids=_TRAIN_IDS)


def _pairs(root: Path, part: Part, kind: str) -> tuple[tuple[Path, Path], ...]:
    """(image, *_gtFine_KIND.png) of a part; kinds: labelIds, instanceIds.

    Raises:
        UserError: folders, images or label files are missing.
    """
    folder = f"gtFine/{part}"
    LAYOUT.need(root, f"leftImg8bit/{part}", folder)
    ends = ("_leftImg8bit.png", f"_gtFine_{kind}.png")
    found = (LAYOUT.images_below(root, f"leftImg8bit/{part}"), LAYOUT.images_below(root, folder))
    images, labels = (
        {below(root, p).split("/", 2)[2].removesuffix(end): p for p in paths if p.name.endswith(end)}
        for paths, end in zip(found, ends, strict=True)
    )
    if not images:
        raise LAYOUT.lacks(root, f"no image in leftImg8bit/{part} is named *{ends[0]}")
    return LAYOUT.pairs_by_name(root, images, labels, f"{folder} (*{ends[1]})")


def _label_map(path: Path, *, things_only: bool) -> tuple[Tensor, tuple[Segment, ...]]:
    """Values from 1000 on are class * 1000 + number; smaller ones a class: stuff, or a group of things."""
    values = label_maps.read_label(path, lambda p: read_mask(p, None))
    kept, segments = torch.zeros_like(values), []
    for value in values.unique().tolist():
        number = value // 1000 if value >= 1000 else value
        if number not in _TRAIN_IDS:
            raise UserError(
                f"'{path}' holds {value}, which is no instance id of Cityscapes.", "Unpack it again."
            )
        label = _TRAIN_IDS[number]
        thing = label >= FIRST_THING
        if label == IGNORED or (things_only and not thing):
            continue
        kept[values == value] = value
        label = label - FIRST_THING if things_only else label
        segments.append(Segment(id=value, label=label, crowd=thing and value < 1000))
    return kept, tuple(segments)


def _instances(root: Path, part: Part) -> InstanceFiles:
    """The 8 classes of things; a group whose members are not told apart is a crowd.

    Source: mcordts/cityscapesScripts, preparation/json2instanceImg.py (id * 1000 + number; groups: the id
    alone).

    Raises:
        UserError: folders, images or label files are missing.
    """
    pairs = _pairs(root, part, "instanceIds")
    LAYOUT.say_count("instances", part, len(pairs))
    read = functools.partial(_label_map, things_only=True)
    return label_maps.instance_files(pairs, STREET[FIRST_THING:], read)


def _panoptic(root: Path, part: Part) -> PanopticFiles:
    """The 19 classes, 8 of them things, from *_instanceIds.png.

    Source: as `_instances`; preparation/createPanopticImgs.py makes the same segments.

    Raises:
        UserError: folders, images or label files are missing.
    """
    pairs = _pairs(root, part, "instanceIds")
    LAYOUT.say_count("panoptic", part, len(pairs))
    read = functools.partial(_label_map, things_only=False)
    return label_maps.panoptic_files(pairs, STREET, FIRST_THING, read)


LAYOUT = Layout(
    name="cityscapes",
    what="Cityscapes",
    tree="leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/*_gtFine_labelIds.png",
    get="leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from the Cityscapes site",
    counts=dict.fromkeys(("images", "masks", "instances", "panoptic"), (2_975, 500)),
    images=_images,
    masks=_masks,
    instances=_instances,
    panoptic=_panoptic,
)
