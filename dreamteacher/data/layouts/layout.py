"""What is known of a public data set: where its files lie, what is in them, and who has it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, TypeVar

from dreamteacher.data.images import find_images
from dreamteacher.data.sources import ImageFiles, InstanceFiles, MaskFiles, PanopticFiles, Part
from dreamteacher.runtime.errors import UserError, shorten

T = TypeVar("T")
Reader: TypeAlias = Callable[[Path, Part], T]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A data set as it is downloaded.

    Its file ends in one of these, named LAYOUT, and `layouts.table` has one line for it. The readers take the
    root and the part, look at names and headers alone, and say what is missing by `need` and `lacks`.

    Args:
        name: before the colon of LAYOUT:ROOT; small letters, digits, _ and -.
        what: its name and what of it is meant.
        tree: what lies below the root, in one line.
        get: the files to download, and where, by name.
        counts: use -> official numbers of images, training and validation: a difference is said, not refused.
        images: reads the images, with their classes where it has any.
        masks: reads the masks of classes; None: it has none.
        instances: reads the objects; None: it has none.
        panoptic: reads the panoptic segments; None: it has none.
        parts: with "val", it has a validation part of its own, which scores are computed on.
    """

    name: str
    what: str
    tree: str
    get: str
    counts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    images: Reader[ImageFiles]
    masks: Reader[MaskFiles] | None = None
    instances: Reader[InstanceFiles] | None = None
    panoptic: Reader[PanopticFiles] | None = None
    parts: tuple[Part, ...] = ("train", "val")

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

    def images_below(self, root: Path, folder: str) -> list[Path]:
        """All images below a folder of the root, in order.

        Raises:
            UserError: the folder is missing or has none.
        """
        self.need(root, folder)
        try:
            return find_images(root / folder)
        except UserError:
            raise self.lacks(root, f"there are no images in {folder}") from None

    def pairs_by_name(
        self, root: Path, images: Mapping[str, Path], labels: Mapping[str, Path], where: str
    ) -> tuple[tuple[Path, Path], ...]:
        """(image, label) in the images' order; every one has its other.

        Args:
            root: for messages.
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
                raise self.lacks(root, f"{len(alone)} of {len(have)} {what} {lack} ({shorten(alone)})")
        return tuple((path, labels[name]) for name, path in images.items())

    def same_names(self, root: Path, images: str, labels: str) -> tuple[tuple[Path, Path], ...]:
        """Pairs of two flat folders whose files differ in their suffix alone.

        Raises:
            UserError: a folder is missing or empty; and as `pairs_by_name`.
        """
        self.need(root, images, labels)
        one, two = ({p.stem: p for p in self.images_below(root, folder)} for folder in (images, labels))
        return self.pairs_by_name(root, one, two, labels)


@functools.lru_cache(maxsize=256)
def _say(text: str) -> None:
    print(text, file=sys.stderr)
