"""What data layouts yield, and what they share: files that must be there, pairs by name, counts."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dreamteacher.data.coco.annotations import CocoAnnotation
from dreamteacher.data.coco.run_lengths import Rle
from dreamteacher.data.images import BadImageError, find_images
from dreamteacher.data.sources import Part, Segment
from dreamteacher.runtime.errors import UserError, shorten


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A data set's own arrangement of files.

    Args:
        what: its name and what of it is meant.
        tree: what lies below the root, in one line.
        get: the files to download, and where, by name.
        counts: use -> official numbers of images, training and validation: a difference is said, not refused.
    """

    what: str
    tree: str
    get: str
    counts: Mapping[str, tuple[int, int]]

    def need(self, root: Path, *inside: str) -> None:
        """Refuses a root that lacks one of these files or folders.

        Raises:
            UserError: naming what is missing, what is expected, and where to get it.
        """
        if not root.is_dir():
            raise self.lacks(root, "there is no such folder")
        missing = [name for name in inside if not (root / name).exists()]
        if missing:
            raise self.lacks(root, f"there is no {shorten(missing)}")

    def lacks(self, root: Path, problem: str) -> UserError:
        """The error for a root that is not whole: what is wrong, what is expected, where to get it."""
        return UserError(
            f"'{root}' is not {self.what} as it is downloaded: {problem}.",
            f"Expected: {self.tree}\nGet {self.get}.",
        )

    def say_count(self, use: str, part: Part, count: int) -> None:
        """Says on stderr, once, that a set does not have its official number of images."""
        official = self.counts.get(use, (count, count))[part == "val"]
        if count != official:
            _say(f"{self.what}: {count} images for {part} ({use}); the whole set has {official}")


@functools.lru_cache(maxsize=256)
def _say(text: str) -> None:
    print(text, file=sys.stderr)


def images_below(layout: Layout, root: Path, folder: str) -> list[Path]:
    """All images below a folder of a layout, in order.

    Raises:
        UserError: the folder is missing or has none.
    """
    layout.need(root, folder)
    try:
        return find_images(root / folder)
    except UserError:
        raise layout.lacks(root, f"there are no images in {folder}") from None


def pairs_by_name(
    layout: Layout, root: Path, images: Mapping[str, Path], labels: Mapping[str, Path], where: str
) -> tuple[tuple[Path, Path], ...]:
    """(image, label) in the images' order; every one has its other.

    Args:
        images: by name.
        labels: by the same names.
        where: the folder of the labels, for messages.

    Raises:
        UserError: images without a label, or labels without an image; counts and some names.
    """
    for have, other, what in ((images, labels, "images"), (labels, images, "label files")):
        alone = [name for name in have if name not in other]
        if alone:
            lack = f"lack their label in {where}" if have is images else f"of {where} lack their image"
            raise layout.lacks(root, f"{len(alone)} of {len(have)} {what} {lack} ({shorten(alone)})")
    return tuple((path, labels[name]) for name, path in images.items())


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


def _read(path: Path, how: Callable[[Path], Tensor]) -> Tensor:
    try:
        return how(path)
    except BadImageError as error:
        raise UserError(
            f"The label file '{path}' cannot be read: {error.reason}.", "Unpack it again."
        ) from None
