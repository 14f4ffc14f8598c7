"""Public data sets as they are downloaded: LAYOUT:ROOT in place of a folder; nothing is converted."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

from dreamteacher.data.images import find_images
from dreamteacher.data.layouts.layout import Layout, Reader
from dreamteacher.data.sources import (
    ImageFiles,
    InstanceFiles,
    MaskFiles,
    PanopticFiles,
    Part,
    label_fraction,
)
from dreamteacher.runtime.errors import UserError, did_you_mean

__all__ = [
    "LAYOUTS",
    "ImageFiles",
    "InstanceFiles",
    "MaskFiles",
    "PanopticFiles",
    "Part",
    "check",
    "has_masks",
    "has_parts",
    "image_files",
    "instance_files",
    "label_fraction",
    "layout_named",
    "layout_of",
    "mask_files",
    "panoptic_files",
]

Use: TypeAlias = Literal["images", "classes", "masks", "instances", "panoptic"]
T = TypeVar("T")

# The name before the colon -> the module that ends in its LAYOUT, imported when it is asked for.
LAYOUTS: dict[str, str] = {
    "imagenet": "dreamteacher.data.layouts.imagenet",
    "coco": "dreamteacher.data.layouts.coco",
    "ade20k": "dreamteacher.data.layouts.ade20k",
    "bdd100k": "dreamteacher.data.layouts.bdd100k",
    "cityscapes": "dreamteacher.data.layouts.cityscapes",
    "lsun": "dreamteacher.data.layouts.lsun",
    "ffhq": "dreamteacher.data.layouts.ffhq",
    "bedroom_28": "dreamteacher.data.layouts.bedroom_28",
    "ffhq_34": "dreamteacher.data.layouts.ffhq_34",
    "cat_15": "dreamteacher.data.layouts.cat_15",
    "horse_21": "dreamteacher.data.layouts.horse_21",
    "shards": "dreamteacher.data.layouts.shards",
    "hf": "dreamteacher.data.layouts.hf",
}


def layout_named(name: str) -> Layout:
    """The layout of a name in the table."""
    found = importlib.import_module(LAYOUTS[name]).LAYOUT
    assert isinstance(found, Layout)
    assert found.name == name, f"{LAYOUTS[name]} calls itself {found.name}"
    return found


def layout_of(source: Path) -> tuple[str, Path] | None:
    """The layout and root of LAYOUT:ROOT; None for a plain folder. A folder of that very name is a plain one.

    Raises:
        UserError: a layout that does not exist, or no root.

    Example:
        >>> layout_of(Path("coco:/data/coco"))
        ('coco', PosixPath('/data/coco'))
        >>> layout_of(Path("photos")) is None
        True
    """
    match = re.fullmatch(r"([a-z][a-z0-9_-]+):(.*)", str(source), re.DOTALL)
    if match is None or Path(source).exists():
        return None
    name, root = match[1], match[2]
    if name not in LAYOUTS:
        raise UserError(
            f"There is no folder '{source}', and no layout '{name}'.{did_you_mean(name, LAYOUTS)}",
            f"Give a folder, or LAYOUT:ROOT with one of {', '.join(LAYOUTS)}.",
        )
    if not root:
        raise UserError(f"'{source}' names a layout and no root.", f"Give {name}:FOLDER.")
    return name, Path(root).expanduser()


def has_parts(source: Path) -> bool:
    """Whether it is a layout that holds training and validation images.

    Raises:
        UserError: as `layout_of`.

    Example:
        >>> has_parts(Path("imagenet:/data/imagenet")), has_parts(Path("shards:/data/shards"))
        (True, False)
    """
    found = layout_of(source)
    return found is not None and "val" in layout_named(found[0]).parts


def has_masks(source: Path) -> bool:
    """Whether it is a layout that has masks of classes.

    Raises:
        UserError: as `layout_of`.
    """
    found = layout_of(source)
    return found is not None and layout_named(found[0]).masks is not None


def image_files(source: Path, part: Part = "train") -> ImageFiles:
    """The images of a folder, found recursively, or those of a part of LAYOUT:ROOT.

    Raises:
        UserError: nothing there, or something is missing; what, and where to get it.
    """
    found = layout_of(source)
    if found is None:
        return ImageFiles(folder=Path(source), paths=find_images(source), by_folder=True)
    name, root = found
    return layout_named(name).images(root, part)


def mask_files(source: Path, part: Part = "train") -> MaskFiles:
    """The images with masks of a part of LAYOUT:ROOT, for semantic segmentation.

    Raises:
        UserError: no such layout, or something is missing; what, and where to get it.
    """
    return _labels(lambda layout: layout.masks, source, part, "masks of classes")


def instance_files(source: Path, part: Part = "train") -> InstanceFiles:
    """The images with objects of a part of LAYOUT:ROOT, for detection and instance segmentation.

    Raises:
        UserError: no such layout, or something is missing; what, and where to get it.
    """
    return _labels(lambda layout: layout.instances, source, part, "instances")


def panoptic_files(source: Path, part: Part = "train") -> PanopticFiles:
    """The images with panoptic segments of a part of LAYOUT:ROOT.

    Raises:
        UserError: no such layout, or something is missing; what, and where to get it.
    """
    return _labels(lambda layout: layout.panoptic, source, part, "panoptic segments")


def _labels(reader_of: Callable[[Layout], Reader[T] | None], source: Path, part: Part, what: str) -> T:
    found = layout_of(source)
    read = None if found is None else reader_of(layout_named(found[0]))
    if found is None or read is None:
        able = [name for name in LAYOUTS if reader_of(layout_named(name)) is not None]
        raise UserError(f"'{source}' has no {what}.", f"Give LAYOUT:ROOT with one of {', '.join(able)}.")
    return read(found[1], part)


def check(source: Path, use: Use, parts: tuple[Part, ...] = ("train", "val")) -> tuple[int, ...]:
    """Whether all is there that a use of LAYOUT:ROOT needs: by names and headers alone, before any work.

    Args:
        use: images (labels do not matter), classes (of whole images), masks, instances or panoptic.
        parts: of the data set.

    Returns:
        Images of each part.

    Raises:
        UserError: what is missing, what was expected, and where to get it.
    """
    match use:
        case "images":
            return tuple(len(image_files(source, part).paths) for part in parts)
        case "classes":
            found = [image_files(source, part) for part in parts]
            if any(files.labels is None and not files.by_folder for files in found):
                raise UserError(
                    f"'{source}' has no classes of images.", "Give imagenet:ROOT, or folders of classes."
                )
            return tuple(len(files.paths) for files in found)
        case "masks":
            return tuple(len(mask_files(source, part).pairs) for part in parts)
        case "instances":
            return tuple(len(instance_files(source, part).images) for part in parts)
        case "panoptic":
            return tuple(len(panoptic_files(source, part).images) for part in parts)
