"""Public data sets as they are downloaded: LAYOUT:ROOT in place of a folder; nothing is converted."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

from dreamteacher.data.images import find_images
from dreamteacher.data.layouts.ade20k import ade20k, ade20k_images
from dreamteacher.data.layouts.bdd100k import bdd100k, bdd100k_images, bdd100k_instances, bdd100k_panoptic
from dreamteacher.data.layouts.cityscapes import (
    cityscapes,
    cityscapes_images,
    cityscapes_instances,
    cityscapes_panoptic,
)
from dreamteacher.data.layouts.coco import coco_images, coco_instances, coco_panoptic
from dreamteacher.data.layouts.ddpm_seg import DDPM_SEG, ddpm_seg, ddpm_seg_images
from dreamteacher.data.layouts.ffhq import ffhq
from dreamteacher.data.layouts.imagenet import imagenet
from dreamteacher.data.layouts.lsun import lsun
from dreamteacher.data.shards import table_images, tar_images
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
    "ImageFiles",
    "InstanceFiles",
    "MaskFiles",
    "PanopticFiles",
    "Part",
    "check",
    "has_parts",
    "image_files",
    "instance_files",
    "label_fraction",
    "layout_of",
    "mask_files",
    "panoptic_files",
]

Use: TypeAlias = Literal["images", "classes", "masks", "instances", "panoptic"]
T = TypeVar("T")
Reader: TypeAlias = Callable[[Path, Part], T]

IMAGES: dict[str, Reader[ImageFiles]] = {
    "imagenet": imagenet,
    "coco": coco_images,
    "ade20k": ade20k_images,
    "bdd100k": bdd100k_images,
    "cityscapes": cityscapes_images,
    "lsun": lsun,
    "ffhq": ffhq,
    **{name: functools.partial(ddpm_seg_images, name) for name in DDPM_SEG},
    "shards": lambda root, part: tar_images(root),
    "hf": lambda root, part: table_images(str(root)),
}
MASKS: dict[str, Reader[MaskFiles]] = {
    "ade20k": ade20k,
    "bdd100k": bdd100k,
    "cityscapes": cityscapes,
    **{name: functools.partial(ddpm_seg, name) for name in DDPM_SEG},
}
INSTANCES: dict[str, Reader[InstanceFiles]] = {
    "coco": coco_instances,
    "bdd100k": bdd100k_instances,
    "cityscapes": cityscapes_instances,
}
PANOPTIC: dict[str, Reader[PanopticFiles]] = {
    "coco": coco_panoptic,
    "bdd100k": bdd100k_panoptic,
    "cityscapes": cityscapes_panoptic,
}


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
    if name not in IMAGES:
        raise UserError(
            f"There is no folder '{source}', and no layout '{name}'.{did_you_mean(name, IMAGES)}",
            f"Give a folder, or LAYOUT:ROOT with one of {', '.join(IMAGES)}.",
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
    return found is not None and found[0] not in ("shards", "hf", "ffhq")


def image_files(source: Path, part: Part = "train") -> ImageFiles:
    """The images of a folder, found recursively, or those of a part of LAYOUT:ROOT.

    Layouts: imagenet, coco, ade20k, bdd100k, cityscapes, lsun, ffhq, bedroom_28, ffhq_34, cat_15, horse_21;
    and shards:FOLDER (tar files) and hf:FOLDER-OR-NAME (Hugging Face datasets), which have one part.

    Raises:
        UserError: nothing there, or something is missing; what, and where to get it.
    """
    found = layout_of(source)
    if found is None:
        return ImageFiles(folder=Path(source), paths=find_images(source), by_folder=True)
    name, root = found
    return IMAGES[name](root, part)


def mask_files(source: Path, part: Part = "train") -> MaskFiles:
    """The images with masks of a part of LAYOUT:ROOT, for semantic segmentation.

    Raises:
        UserError: no such layout, or something is missing; what, and where to get it.
    """
    return _labels(MASKS, source, part, "masks of classes")


def instance_files(source: Path, part: Part = "train") -> InstanceFiles:
    """The images with objects of a part of LAYOUT:ROOT, for detection and instance segmentation.

    Raises:
        UserError: no such layout, or something is missing; what, and where to get it.
    """
    return _labels(INSTANCES, source, part, "instances")


def panoptic_files(source: Path, part: Part = "train") -> PanopticFiles:
    """The images with panoptic segments of a part of LAYOUT:ROOT.

    Raises:
        UserError: no such layout, or something is missing; what, and where to get it.
    """
    return _labels(PANOPTIC, source, part, "panoptic segments")


def _labels(table: Mapping[str, Reader[T]], source: Path, part: Part, what: str) -> T:
    name, root = layout_of(source) or ("", source)
    if name not in table:
        raise UserError(f"'{source}' has no {what}.", f"Give LAYOUT:ROOT with one of {', '.join(table)}.")
    return table[name](root, part)


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
