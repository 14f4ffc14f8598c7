"""Maps in which each pixel holds the number of its object: read, and taken apart into objects."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from dreamteacher.data.coco.annotations import CocoAnnotation
from dreamteacher.data.coco.run_lengths import Rle
from dreamteacher.data.images import BadImageError
from dreamteacher.data.sources import InstanceFiles, PanopticFiles, Segment
from dreamteacher.runtime.errors import UserError

# A label file as a map of segment ids (int64 H x W), and what its segments are.
ReadMap: TypeAlias = Callable[[Path], tuple[Tensor, tuple[Segment, ...]]]
Pairs: TypeAlias = Sequence[tuple[Path, Path]]  # (image, label file)


def run_lengths(mask: Tensor) -> Rle:
    """The run lengths of a mask (bool H x W), down the columns; `coco.run_lengths.rle_mask` undoes it.

    Example:
        >>> run_lengths(torch.tensor([[0, 1, 0], [1, 1, 0]]).bool()).counts
        (1, 3, 2)
    """
    flat = mask.t().flatten()
    edges = (flat[1:] != flat[:-1]).nonzero().flatten() + 1
    places = torch.cat([torch.tensor([0]), edges, torch.tensor([len(flat)])])
    counts = places.diff().tolist()
    return Rle(size=(mask.shape[0], mask.shape[1]), counts=tuple([0, *counts] if flat[0] else counts))


def objects_of(segments: Tensor, found: tuple[Segment, ...]) -> tuple[CocoAnnotation, ...]:
    """The objects of a map of segments (int64 H x W) as annotations with run lengths."""
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


def read_label(path: Path, how: Callable[[Path], Tensor]) -> Tensor:
    """`how(path)`, the values of a label file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return how(path)
    except BadImageError as error:
        raise UserError(
            f"The label file '{path}' cannot be read: {error.reason}.", "Unpack it again."
        ) from None


def instance_files(pairs: Pairs, names: tuple[str, ...], read: ReadMap) -> InstanceFiles:
    """Instances by label files that `read` makes maps of."""
    return InstanceFiles(
        images=tuple(image for image, _ in pairs), names=names, read=lambda i: objects_of(*read(pairs[i][1]))
    )


def panoptic_files(pairs: Pairs, names: tuple[str, ...], first_thing: int, read: ReadMap) -> PanopticFiles:
    """Panoptic maps by label files that `read` makes maps of; classes from `first_thing` on are things."""
    return PanopticFiles(
        images=tuple(image for image, _ in pairs),
        names=names,
        things=tuple(i >= first_thing for i in range(len(names))),
        read=functools.partial(_map, pairs, read),
    )


def _map(pairs: Pairs, read: ReadMap, i: int) -> tuple[Tensor, tuple[Segment, ...]]:
    return read(pairs[i][1])
