"""Layouts of instances and panoptic segments: COCO, Cityscapes and BDD100K, as they are downloaded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dreamteacher.data.coco.annotations import CocoAnnotation, read_coco
from dreamteacher.data.coco.run_lengths import Rle
from dreamteacher.data.coco.segments import parse_panoptic, segment_numbers
from dreamteacher.data.images import BadImageError, read_channels, read_mask
from dreamteacher.data.layouts.cityscapes import (
    BDD100K,
    CITYSCAPES,
    CITYSCAPES_TRAIN_IDS,
    STREET,
    bdd100k_pairs,
    cityscapes_pairs,
)
from dreamteacher.data.layouts.layout import IGNORED, ImageFiles, Layout, Part, images_below
from dreamteacher.runtime.errors import UserError, shorten

COCO = Layout(
    what="COCO 2017",
    tree="{train,val}2017/*.jpg, annotations/{instances,panoptic}_{train,val}2017.json and annotations/panoptic_*2017/*.png",
    get="train2017.zip, val2017.zip, annotations_trainval2017.zip, panoptic_annotations_trainval2017.zip from the COCO site",
    counts=dict.fromkeys(("images", "instances", "panoptic"), (118_287, 5_000)),
)
# Cityscapes' classes with instances are its train ids from here on; BDD100K calls the first one pedestrian.
_FIRST_THING = 11
_CAR_LIKE = ("pedestrian", *STREET[_FIRST_THING + 1 :])
# fmt: off
_BDD_PANOPTIC = (
    "dynamic", "ego vehicle", "ground", "static", "parking", "rail track", "road", "sidewalk", "bridge",
    "building", "fence", "garage", "guard rail", "tunnel", "wall", "banner", "billboard", "lane divider",
    "parking sign", "pole", "polegroup", "street light", "traffic cone", "traffic device", "traffic light",
    "traffic sign", "traffic sign frame", "terrain", "vegetation", "sky", "person", "rider", "bicycle", "bus",
    "car", "caravan", "motorcycle", "trailer", "train", "truck",
)
# fmt: on
_BDD_STUFF = 30


@dataclass(frozen=True, kw_only=True)
class InstanceFiles:
    """Images with objects, read one image at a time.

    Args:
        images: N files.
        names: of the classes, in id order.
        read: place in `images` -> its objects (`label` is a class id; the mask is polygons or run lengths).
            UserError if the label file is damaged or holds values that mean nothing.
    """

    images: tuple[Path, ...]
    names: tuple[str, ...]
    read: Callable[[int], tuple[CocoAnnotation, ...]]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A thing, or all of a kind of stuff, in one image.

    Args:
        id: its value in the map of segments.
        label: class id.
        crowd: a region of many things, or one that does not count.
    """

    id: int
    label: int
    crowd: bool


@dataclass(frozen=True, kw_only=True)
class PanopticFiles:
    """Images with panoptic labels, read one image at a time.

    Args:
        images: N files.
        names: of the classes, in id order.
        things: for each class, whether its objects are told apart.
        read: place in `images` -> map of segments (int64 H x W, 0: nothing) and the segments in it, by id.
            UserError if the label file is damaged or does not fit.
    """

    images: tuple[Path, ...]
    names: tuple[str, ...]
    things: tuple[bool, ...]
    read: Callable[[int], tuple[Tensor, tuple[Segment, ...]]]


def run_lengths(mask: Tensor) -> Rle:
    """The run lengths of a mask (bool H x W), down the columns; `coco_masks.rle_mask` undoes it.

    Example:
        >>> run_lengths(torch.tensor([[0, 1, 0], [1, 1, 0]]).bool()).counts
        (1, 3, 2)
    """
    flat = mask.t().flatten()
    edges = (flat[1:] != flat[:-1]).nonzero().flatten() + 1
    places = torch.cat([torch.tensor([0]), edges, torch.tensor([len(flat)])])
    counts = places.diff().tolist()
    return Rle(size=(mask.shape[0], mask.shape[1]), counts=tuple([0, *counts] if flat[0] else counts))


def _objects(segments: Tensor, found: tuple[Segment, ...]) -> tuple[CocoAnnotation, ...]:
    annotations = []
    for segment in found:
        mask = segments == segment.id
        rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
        left, top = float(columns[0]), float(rows[0])
        box = (left, top, columns[-1] + 1 - left, rows[-1] + 1 - top)
        annotations.append(
            CocoAnnotation(
                id=segment.id, label=segment.label, box=box, area=float(mask.sum()), crowd=segment.crowd,
                segmentation=run_lengths(mask),
            )
        )  # fmt: skip
    return tuple(annotations)


# --- COCO ---------------------------------------------------------------------------------------------------


def coco_images(root: Path, part: Part) -> ImageFiles:
    """The images of train2017 or val2017.

    Raises:
        UserError: there are none.
    """
    paths = images_below(COCO, root, f"{part}2017")
    COCO.say_count("images", part, len(paths))
    return ImageFiles(folder=root / f"{part}2017", paths=paths)


def coco_instances(root: Path, part: Part) -> InstanceFiles:
    """80 classes, in the order of their category ids (1 to 90 with gaps); images without objects are kept.

    Source: COCO's "Data format"; the file is read by `coco.read_coco`, which checks it against the images.

    Raises:
        UserError: files are missing; anything wrong in the JSON file.
    """
    name = f"annotations/instances_{part}2017.json"
    COCO.need(root, f"{part}2017", name)
    found = read_coco(root / name, root / f"{part}2017", skip_degenerate=True)
    COCO.say_count("instances", part, len(found.images))
    images = tuple(image.path for image in found.images)
    return InstanceFiles(images=images, names=found.names, read=lambda i: found.images[i].annotations)


def coco_panoptic(root: Path, part: Part) -> PanopticFiles:
    """133 classes, in the order of their category ids; a PNG's segment id is R + 256 G + 65536 B.

    Source: COCO's "Data format", panoptic; cocodataset/panopticapi, utils.rgb2id.

    Raises:
        UserError: files are missing, names lead out of their folder, records do not fit together.
    """
    stem = f"annotations/panoptic_{part}2017"
    if (root / f"{stem}.zip").is_file() and not (root / stem).is_dir():
        raise COCO.lacks(root, f"{stem}.zip is not unpacked")
    COCO.need(root, f"{part}2017", f"{stem}.json", stem)
    path = root / f"{stem}.json"
    parsed = parse_panoptic(path, root / f"{part}2017", root / stem)
    images = tuple(scene.image for scene in parsed.scenes)
    masks = tuple(scene.mask for scene in parsed.scenes)
    for kind, paths in (("images", images), ("PNG files", masks)):
        gone = [p.name for p in paths if not p.is_file()]
        if gone:
            raise COCO.lacks(
                root, f"{len(gone)} of {len(paths)} {kind} of {path.name} are missing ({shorten(gone)})"
            )
    if len(images) != parsed.images:
        raise COCO.lacks(root, f"{path.name} has {len(images)} annotations for {parsed.images} images")
    COCO.say_count("panoptic", part, len(images))

    def read(i: int) -> tuple[Tensor, tuple[Segment, ...]]:
        ids, scene = segment_numbers(_read(masks[i], read_channels)[:3]), parsed.scenes[i]
        have, listed = set(ids.unique().tolist()) - {0}, set(scene.classes)
        if have != listed:
            raise UserError(
                f"'{masks[i]}' and '{path.name}' differ in the segments {shorten(map(str, sorted(have ^ listed)))}.",
                "Unpack both again: they must be of one release.",
            )
        found = (Segment(id=n, label=c, crowd=n in scene.crowds) for n, c in scene.classes.items())
        return ids, tuple(found)

    return PanopticFiles(images=images, names=parsed.names, things=parsed.things, read=read)


# --- label maps ---------------------------------------------------------------------------------------------


def _read(path: Path, how: Callable[[Path], Tensor]) -> Tensor:
    try:
        return how(path)
    except BadImageError as error:
        raise UserError(
            f"The label file '{path}' cannot be read: {error.reason}.", "Unpack it again."
        ) from None


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


def _bdd_map(path: Path, *, classes: int, stuff: int) -> tuple[Tensor, tuple[Segment, ...]]:
    """R: class from 1, 0: nothing; G: bits ignore 1, crowd 2, occluded 4, truncated 8; B * 256 + A: object."""
    channels = _read(path, read_channels).long()
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


def bdd100k_instances(root: Path, part: Part) -> InstanceFiles:
    """8 classes from labels/ins_seg/bitmasks; what is marked as crowd or to be ignored is a crowd.

    The JSON polygons beside them are Bezier curves that overlap; BDD100K's evaluation uses the bitmasks, and
    so does this. Source: doc.bdd100k.com, "Label Format", Instance Segmentation Format.

    Raises:
        UserError: folders, images or bitmasks are missing.
    """
    pairs = bdd100k_pairs(root, part, "ins_seg")
    BDD100K.say_count("instances", part, len(pairs))
    return InstanceFiles(
        images=tuple(image for image, _ in pairs),
        names=_CAR_LIKE,
        read=lambda i: _objects(*_bdd_map(pairs[i][1], classes=len(_CAR_LIKE), stuff=0)),
    )


def bdd100k_panoptic(root: Path, part: Part) -> PanopticFiles:
    """40 classes from labels/pan_seg/bitmasks, the last 10 of them things; 0 is unlabelled.

    Source: doc.bdd100k.com, "Label Format", Panoptic Segmentation.

    Raises:
        UserError: folders, images or bitmasks are missing.
    """
    pairs = bdd100k_pairs(root, part, "pan_seg")
    BDD100K.say_count("panoptic", part, len(pairs))
    return PanopticFiles(
        images=tuple(image for image, _ in pairs),
        names=_BDD_PANOPTIC,
        things=tuple(i >= _BDD_STUFF for i in range(len(_BDD_PANOPTIC))),
        read=functools.partial(_bdd_panoptic, pairs),
    )


def _bdd_panoptic(pairs: tuple[tuple[Path, Path], ...], i: int) -> tuple[Tensor, tuple[Segment, ...]]:
    return _bdd_map(pairs[i][1], classes=len(_BDD_PANOPTIC), stuff=_BDD_STUFF)
