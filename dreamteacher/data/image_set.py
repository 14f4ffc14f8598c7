"""Folders of images as sets and batches, which depend on seed and step alone; damaged files are named."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dreamteacher.data.images import BadImage, BadImageError, ImageFile, Size, below, read_header, read_image
from dreamteacher.data.layouts.table import Part, image_files
from dreamteacher.runtime.errors import UserError, shorten
from dreamteacher.runtime.threads import in_threads

_MOST_TRIED = 1000


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """The readable images of a folder, decoded in memory or on the way.

    Args:
        folder: where they lie; of a layout, the folder of the part.
        paths: N files, sorted; what lies in shards or tables stands for itself.
        size: (height, width) of every image.
        labels: int64 N, or None when the folders name no classes.
        classes: class names in id order, or ().
        cache: uint8 N x 3 x H x W, or None: decoded when asked for.
        bad: files that could not be read. Without a cache this grows, in `get` and `batches`: a damaged file
            whose header was good is found only when its turn comes.
    """

    folder: Path
    paths: list[ImageFile]
    size: Size
    labels: Tensor | None
    classes: tuple[str, ...]
    cache: Tensor | None
    bad: tuple[BadImage, ...]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def files(self) -> list[Path]:
        """The images' own files.

        Raises:
            UserError: they have none: they lie in shards or tables.
        """
        files = [path for path in self.paths if isinstance(path, Path)]
        if len(files) < len(self.paths):
            raise UserError(
                f"The images of '{self.folder}' lie in larger files; here each must be a file of its own.",
                "Unpack them into a folder.",
            )
        return files

    def get(self, indices: Tensor) -> Tensor:
        """The uint8 batch K x 3 x H x W of these indices (int64 K).

        An image found damaged only now gives way to the next readable one of its class, and is recorded.

        Raises:
            UserError: too many in a row cannot be read, or none of a class.
            IndexError: there are not so many.
        """
        if self.cache is not None:
            return self.cache.index_select(0, indices)  # 40 times faster than by indexing
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"indices {indices.min()} to {indices.max()} of {len(self)} images")
        decode = functools.partial(_decode, self, own_class=True)  # labels are of the images asked for
        parts = in_threads(decode, [[i] for i in indices.tolist()], 2)
        return torch.cat([self._record(part)[0] for part in parts]).contiguous()

    def _record(self, decoded: _Decoded) -> tuple[Tensor, Tensor]:
        known = {b.path for b in self.bad}
        new = tuple(b for b in dict.fromkeys(decoded.bad) if b.path not in known)
        if new:  # the one thing that changes: knowledge about the files, not what the set holds
            object.__setattr__(self, "bad", self.bad + new)
        if decoded.images is None:
            path, reason = decoded.bad[-1]
            if len(decoded.bad) < _MOST_TRIED:
                raise UserError(
                    f"'{path}' cannot be read ({reason}), nor any image that could take its place.",
                    "Remove or replace it.",
                )
            raise UserError(
                f"'{path}' and {len(decoded.bad) - 1} images before it cannot be read ({reason}).",
                "Check that the disk is still there; the same command resumes from the last checkpoint.",
            )
        return decoded.images, decoded.index


@dataclass(frozen=True)
class _Decoded:
    images: Tensor | None
    index: Tensor
    bad: list[BadImage]


def _decode(images: ImageSet, indices: Sequence[int], own_class: bool) -> _Decoded:
    """Reads images, damaged ones replaced by the next readable one; None if there is none near.

    Args:
        own_class: only images of the same class take a place; else those of others do after them.
    """
    found: list[Tensor] = []
    index: list[int] = []
    bad: list[BadImage] = []
    for i in indices:
        for j in _replacements(images, i, own_class):
            try:
                found.append(read_image(images.paths[j], images.size))
                index.append(j)
                break
            except BadImageError as error:
                bad.append(BadImage(images.paths[j], error.reason))
        else:
            return _Decoded(None, torch.tensor(index), bad)
    # As they lie in memory: 10 times faster.
    pixels = torch.stack([image.permute(1, 2, 0) for image in found])
    return _Decoded(pixels.permute(0, 3, 1, 2), torch.tensor(index), bad)


def _replacements(images: ImageSet, i: int, own_class: bool) -> Iterator[int]:
    yield i
    others = [*range(i + 1, len(images)), *range(i)]
    if images.labels is not None:
        strange = (images.labels != images.labels[i]).tolist()
        others.sort(key=strange.__getitem__)
        others = [j for j in others if not strange[j]] if own_class else others
    yield from others[: _MOST_TRIED - 1]  # more are no damage: the disk is gone


def load_images(
    folder: Path,
    size: Size,
    *,
    strict: bool = False,
    cache_gb: float = 2.0,
    workers: int = 2,
    part: Part = "train",
) -> ImageSet:
    """Every readable image below `folder`; the damaged ones are left out and kept in `.bad`.

    Args:
        folder: a folder, or LAYOUT:ROOT (see `layouts.image_files`): then its training images.
        size: (height, width) that every image is brought to.
        strict: refuse any damaged image.
        cache_gb: images that take at most this many 10^9 bytes, decoded, are decoded now and kept, so that
            every damaged file is known. Otherwise headers are checked now (with `strict`: everything).
        workers: threads.
        part: which images of a layout.

    Raises:
        UserError: no folder, no images, none readable, or a damaged one with `strict`.
    """
    folder = Path(folder)
    if min(size) < 1:
        raise UserError(f"The size {size[0]} x {size[1]} is empty.", "Give height and width of at least 1.")
    found = image_files(folder, part)
    paths = found.paths
    fits = len(paths) * 3 * size[0] * size[1] <= cache_gb * 1e9
    cache = torch.empty(len(paths), 3, *size, dtype=torch.uint8) if fits else None

    def check(i: int) -> BadImage | None:
        try:
            if cache is not None:
                cache[i] = read_image(paths[i], size)
            elif strict:
                read_image(paths[i], size)
            else:
                read_header(paths[i])
        except BadImageError as error:
            return BadImage(paths[i], error.reason)
        return None

    checked = in_threads(check, range(len(paths)), workers, "reading images")
    bad = tuple(b for b in checked if b is not None)
    if len(bad) == len(paths) or (bad and strict):
        raise UserError(
            f"{len(bad)} of {len(paths)} images in '{folder}' cannot be read: {_some(found.folder, bad)}.",
            "Replace or remove them" + (", or leave out --strict." if len(bad) < len(paths) else "."),
        )
    good = [i for i, b in enumerate(checked) if b is None]
    if cache is not None and bad:
        for new, old in enumerate(good):  # in place: a copy would need the memory twice
            cache[new] = cache[old]
        cache = cache[: len(good)]
    kept = [paths[i] for i in good]
    labels, classes = None, found.classes
    if found.labels is not None:
        labels = torch.tensor(found.labels)[good]
    elif found.by_folder:
        labels, classes = folder_labels(found.folder, kept)
    return ImageSet(
        folder=found.folder, paths=kept, size=size, labels=labels, classes=classes, cache=cache, bad=bad
    )


def _some(folder: Path, bad: Sequence[BadImage]) -> str:
    return shorten(f"{below(folder, b.path)} ({b.reason})" for b in bad)


def folder_labels(folder: Path, paths: Sequence[ImageFile]) -> tuple[Tensor | None, tuple[str, ...]]:
    """Class ids (int64 N) and names from the first folder below `folder`, names in sorted order.

    (None, ()) unless every image lies in such a folder and there are at least two of them.
    """
    parts = [path.relative_to(folder).parts for path in paths]
    classes = tuple(sorted({p[0] for p in parts}))
    if len(classes) < 2 or any(len(p) < 2 for p in parts):
        return None, ()
    ids = {name: i for i, name in enumerate(classes)}
    return torch.tensor([ids[p[0]] for p in parts]), classes
