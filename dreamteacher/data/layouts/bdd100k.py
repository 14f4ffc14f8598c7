"""BDD100K as it is downloaded."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from dreamteacher.data.images import read_channels
from dreamteacher.data.layouts import label_maps
from dreamteacher.data.layouts.cityscapes import FIRST_THING, STREET
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

_CAR_LIKE = ("pedestrian", *STREET[FIRST_THING + 1 :])
# fmt: off
_PANOPTIC = (
    "dynamic", "ego vehicle", "ground", "static", "parking", "rail track", "road", "sidewalk", "bridge",
    "building", "fence", "garage", "guard rail", "tunnel", "wall", "banner", "billboard", "lane divider",
    "parking sign", "pole", "polegroup", "street light", "traffic cone", "traffic device", "traffic light",
    "traffic sign", "traffic sign frame", "terrain", "vegetation", "sky", "person", "rider", "bicycle", "bus",
    "car", "caravan", "motorcycle", "trailer", "train", "truck",
)
# fmt: on
_STUFF = 30


def _images(root: Path, part: Part) -> ImageFiles:
    """The 100K images, on which this method pretrains; not the 10K that have masks.

    Raises:
        UserError: there are none.
    """
    paths = LAYOUT.images_below(root, f"images/100k/{part}")
    LAYOUT.say_count("images", part, len(paths))
    return ImageFiles(folder=root / "images" / "100k" / part, paths=paths)


def _masks(root: Path, part: Part) -> MaskFiles:
    """Cityscapes' 19 classes by train id, 255 for unknown; the 10K images.

    Source: doc.bdd100k.com, "Data Download" and "Label Format" (current layout). Older archives (seg/labels,
    *_train_id.png) are not read, and older 10K images lack some of the labelled ones (bdd100k/bdd100k #127).

    Raises:
        UserError: folders, images or masks are missing.
    """
    pairs = LAYOUT.same_names(root, f"images/10k/{part}", f"labels/sem_seg/masks/{part}")
    LAYOUT.say_count("masks", part, len(pairs))
    return MaskFiles(pairs=pairs, names=STREET, ids={i: i for i in range(19)} | {255: IGNORED})


def _pairs(root: Path, part: Part, kind: str) -> tuple[tuple[Path, Path], ...]:
    """(image, RGBA bitmask) of a part; kinds: ins_seg, pan_seg.

    Raises:
        UserError: folders, images or bitmasks are missing.
    """
    return LAYOUT.same_names(root, f"images/10k/{part}", f"labels/{kind}/bitmasks/{part}")


def _label_map(path: Path, *, classes: int, stuff: int) -> tuple[Tensor, tuple[Segment, ...]]:
    """R: class from 1, 0: nothing; G: bits ignore 1, crowd 2, occluded 4, truncated 8; B * 256 + A: object."""
    channels = label_maps.read_label(path, read_channels).long()
    if len(channels) != 4:
        raise UserError(f"'{path}' is no bitmask: RGBA is expected.", "Give bitmasks, not colormaps.")
    red, green, blue, alpha = channels
    if int(red.max()) > classes:
        raise UserError(
            f"'{path}' holds class {int(red.max())} of {classes}.", "Is it of another task? Unpack it again."
        )
    number = blue * 256 + alpha
    ids = torch.where(red > stuff, red * 65536 + number, red)  # stuff is one segment per class
    segments = []
    for value in (v for v in ids.unique().tolist() if v):
        label = (value >> 16 or value) - 1
        flags = green[ids == value]
        segments.append(Segment(id=value, label=label, crowd=label >= stuff and bool((flags & 3).any())))
    return ids, tuple(segments)


def _instances(root: Path, part: Part) -> InstanceFiles:
    """8 classes from labels/ins_seg/bitmasks; what is marked as crowd or to be ignored is a crowd.

    The JSON polygons beside them are Bezier curves that overlap; BDD100K's evaluation uses the bitmasks, and
    so does this. Source: doc.bdd100k.com, "Label Format", Instance Segmentation Format.

    Raises:
        UserError: folders, images or bitmasks are missing.
    """
    pairs = _pairs(root, part, "ins_seg")
    LAYOUT.say_count("instances", part, len(pairs))
    read = functools.partial(_label_map, classes=len(_CAR_LIKE), stuff=0)
    return label_maps.instance_files(pairs, _CAR_LIKE, read)


def _panoptic(root: Path, part: Part) -> PanopticFiles:
    """40 classes from labels/pan_seg/bitmasks, the last 10 of them things; 0 is unlabelled.

    Source: doc.bdd100k.com, "Label Format", Panoptic Segmentation.

    Raises:
        UserError: folders, images or bitmasks are missing.
    """
    pairs = _pairs(root, part, "pan_seg")
    LAYOUT.say_count("panoptic", part, len(pairs))
    read = functools.partial(_label_map, classes=len(_PANOPTIC), stuff=_STUFF)
    return label_maps.panoptic_files(pairs, _PANOPTIC, _STUFF, read)


LAYOUT = Layout(
    name="bdd100k",
    what="BDD100K",
    tree="images/{100k,10k}/{train,val}/*.jpg, labels/sem_seg/masks, labels/{ins_seg,pan_seg}/bitmasks/{train,val}/*.png",
    get="100K Images, 10K Images, and Semantic, Instance or Panoptic Segmentation from the BDD100K portal",
    counts={"images": (70_000, 10_000)} | dict.fromkeys(("masks", "instances", "panoptic"), (7_000, 1_000)),
    images=_images,
    masks=_masks,
    instances=_instances,
    panoptic=_panoptic,
)
