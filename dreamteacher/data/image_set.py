"""Folders of images as sets and batches, which depend on seed and step alone; damaged files are named."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dreamteacher.data.images import BadImage, BadImageError, ImageFile, Size, below, read_header, read_image
from dreamteacher.data.layouts.table import Part, image_files
from dreamteacher.runtime.distributed.share import ALONE, Share
from dreamteacher.runtime.errors import UserError, shorten
from dreamteacher.runtime.threads import in_threads

_MOST_TRIED = 1000


class Batch(NamedTuple):
    """float32 N x 3 x H x W in [0, 1], channels last (raw: uint8); int64 N, the images' places in their set; the step."""

    images: Tensor
    index: Tensor  # type: ignore[assignment]  # a tuple's own `index` is not needed here
    step: int


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


def step_generator(seed: int, step: int, stream: str = "") -> torch.Generator:
    """The random numbers of one step, for one purpose: independent of every other (seed, step, stream)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{stream}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@functools.lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=step_generator(seed, epoch, "order"))


def batch_indices(count: int, *, batch_size: int, seed: int, step: int) -> Tensor:
    """int64 indices of a step (from 0): a new order in every epoch; its incomplete last batch is dropped."""
    epoch, part = divmod(step, count // batch_size)
    return _epoch_order(count, seed, epoch)[part * batch_size : (part + 1) * batch_size]


def flip_images(images: Tensor, flips: Tensor) -> Tensor:
    """Mirrors those images (N x C x H x W, left and right) whose entry in `flips` (bool N) is true."""
    mirrored = images.clone()
    mirrored[flips] = images[flips].flip(-1)
    return mirrored


def to_float(pixels: Tensor) -> Tensor:
    """uint8 N x 3 x H x W as float32 in [0, 1], channels last; floats stay as they are."""
    if pixels.is_floating_point():
        return pixels
    return pixels.to(torch.float32, memory_format=torch.channels_last).div_(255)


def batches(
    images: ImageSet,
    *,
    batch_size: int,
    seed: int,
    first_step: int,
    last_step: int,
    flip: bool,
    workers: int = 0,
    share: Share = ALONE,
    raw: bool = False,
) -> Iterator[Batch]:
    """Batches of steps `first_step` to `last_step` - 1, over as many epochs as that takes.

    Step k is the same batch, bit for bit, wherever the iteration began, cached or streamed, with any number
    of workers. (Files with a good header and damaged pixels are the exception: a cache leaves them out from
    the start, which changes the order; a stream puts another image in their place.)

    Args:
        flip: mirror each image with probability 1/2.
        workers: processes that decode when the set has no cache; 0: this one.
        share: whose rows of each batch are read and given.
        raw: leave `to_float` to whoever has the images on a device: a quarter of the bytes to copy.

    Raises:
        UserError: at once, when the batch is larger than the set.
    """
    if not 1 <= batch_size <= len(images):
        raise UserError(
            f"A batch of {batch_size} cannot be drawn from {len(images)} images.",
            f"Use a batch size of 1 to {len(images)}.",
        )
    steps = range(first_step, last_step)
    return _batches(images, batch_size, seed, steps, flip, workers, share, raw)


_GONE = (
    ConnectionError,
    EOFError,
    FileNotFoundError,
)  # a batch whose sender is dead: decoding raises none of them


def worker_died(error: Exception) -> UserError | None:
    """What torch says of a process of a loader that was killed, as an error of ours; none for other errors.

    It may be raised wherever the main thread is, for torch notices by a signal.
    """
    if "DataLoader worker" not in str(error) and not isinstance(error, _GONE):
        return None
    return UserError(
        "A process that decodes images has died (was it killed, or is the machine's memory full?).",
        "Run the same command again: it resumes from the last checkpoint. Fewer --workers need less memory.",
    )


def _batches(
    images: ImageSet,
    batch_size: int,
    seed: int,
    steps: range,
    flip: bool,
    workers: int,
    share: Share,
    raw: bool,
) -> Iterator[Batch]:
    stream: Iterable[_Decoded] = ()
    if images.cache is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        stream = DataLoader(
            _Steps(images, batch_size, seed, share), batch_size=None, sampler=steps, num_workers=min(workers, cores),
            collate_fn=_as_it_is, generator=torch.Generator(),
        )  # fmt: skip
    decoded = iter(stream)
    for step in steps:
        if images.cache is None:
            try:
                pixels, index = images._record(next(decoded))
            except (RuntimeError, *_GONE) as error:
                died = worker_died(error)
                if died is None:
                    raise
                with contextlib.suppress(RuntimeError, AttributeError):  # or torch raises it again, anywhere
                    decoded._shutdown_workers()  # type: ignore[attr-defined]
                raise died from None
        else:
            index = batch_indices(len(images), batch_size=batch_size, seed=seed, step=step)[share.rows]
            pixels = images.get(index)
        if flip:
            flips = torch.rand(batch_size, generator=step_generator(seed, step, "flip")) < 0.5
            pixels = flip_images(pixels, flips[share.rows])
        yield Batch(pixels if raw else to_float(pixels), index, step)


class _Steps(Dataset[_Decoded]):
    """Item k is what step k shows: a loader that begins at any step needs no history."""

    def __init__(self, images: ImageSet, batch_size: int, seed: int, share: Share) -> None:
        self.images, self.batch_size, self.seed, self.share = images, batch_size, seed, share

    def __getitem__(self, step: int) -> _Decoded:
        index = batch_indices(len(self.images), batch_size=self.batch_size, seed=self.seed, step=step)
        return _decode(self.images, index[self.share.rows].tolist(), own_class=False)


def _as_it_is(decoded: Any) -> Any:
    return decoded
