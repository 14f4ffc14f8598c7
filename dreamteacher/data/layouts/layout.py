"""What data layouts yield, and what they share: files that must be there, pairs by name, counts."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from dreamteacher.data.images import ImageFile, find_images
from dreamteacher.runtime.errors import UserError, shorten

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
