"""What a public data set gives: files of images, masks, instances, panoptic maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from dreamteacher.data.coco.annotations import CocoAnnotation
from dreamteacher.data.images import ImageFile
from dreamteacher.runtime.errors import shorten

Part: TypeAlias = Literal["train", "val"]


IGNORED = -1


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """The images of a source, in a fixed order, and what is known of their classes.

    Args:
        folder: what their names in messages start from.
        paths: N files.
        labels: N class ids, or None.
        classes: class names in id order, or ().
        by_folder: the first folder below `folder` names an image's class, if there are several.
    """

    folder: Path
    paths: Sequence[ImageFile]
    labels: Sequence[int] | None = None
    classes: tuple[str, ...] = ()
    by_folder: bool = False


@dataclass(frozen=True, kw_only=True)
class MaskFiles:
    """Images with the files of their masks, and what the values in those mean.

    Args:
        pairs: (image, mask), in order. Masks are grey or palette pictures, or .npy arrays.
        names: of the classes, in id order.
        ids: value in the file -> class id, or IGNORED. Any other value is an error.
    """

    pairs: tuple[tuple[Path, Path], ...]
    names: tuple[str, ...]
    ids: Mapping[int, int]

    def class_ids(self, values: Tensor, ignore_index: int) -> Tensor:
        """A mask's values (int64, any shape) as class ids; what is to be ignored becomes `ignore_index`.

        Raises:
            ValueError: a value that means nothing.

        Example:
            >>> files = MaskFiles(pairs=(), names=("a", "b"), ids={0: IGNORED, 1: 0, 2: 1})
            >>> files.class_ids(torch.tensor([0, 1, 2]), 255).tolist()
            [255, 0, 1]
        """
        table = torch.full((max(self.ids) + 2,), -2)  # the last place stands for all larger values
        for value, number in self.ids.items():
            table[value] = ignore_index if number == IGNORED else number
        mapped = table[values.clamp(0, len(table) - 1)]
        wrong = (mapped == -2) | (values < 0)
        if wrong.any():
            raise ValueError(
                f"the values {shorten(map(str, values[wrong].unique().tolist()))}, which are no label"
            )
        return mapped


def label_fraction(files: MaskFiles, parts: int, *, seed: int) -> MaskFiles:
    """One of `parts` equal shares of the labelled images (rounded up), drawn by a seed, in the files' order.

    With one seed, a smaller share is a part of every larger one. Cityscapes' 2,975 images give 744, 372 and
    100 for 1/4, 1/8 and 1/30, the numbers that the literature uses.

    Raises:
        ValueError: `parts` is below 1.
    """
    if parts < 1:
        raise ValueError(f"one of {parts} parts")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(files.pairs), generator=generator)
    kept = order[: -(-len(files.pairs) // parts)].sort().values.tolist()
    return replace(files, pairs=tuple(files.pairs[i] for i in kept))


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
