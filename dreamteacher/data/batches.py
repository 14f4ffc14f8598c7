"""Batches of an image set in a seeded order, decoded beside the training."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dreamteacher.data.image_set import ImageSet, _decode, _Decoded
from dreamteacher.data.images import to_float
from dreamteacher.data.loader import load_ahead
from dreamteacher.data.seeds import step_generator
from dreamteacher.runtime.distributed.world import ALONE, World
from dreamteacher.runtime.errors import UserError


class Batch(NamedTuple):
    """float32 N x 3 x H x W in [0, 1], channels last (raw: uint8); int64 N, the images' places in their set; the step."""

    images: Tensor
    index: Tensor  # type: ignore[assignment]  # a tuple's own `index` is not needed here
    step: int


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


def batches(
    images: ImageSet,
    *,
    batch_size: int,
    seed: int,
    first_step: int,
    last_step: int,
    flip: bool,
    workers: int = 0,
    world: World = ALONE,
    raw: bool = False,
) -> Iterator[Batch]:
    """Batches of steps `first_step` to `last_step` - 1, over as many epochs as that takes.

    Step k is the same batch, bit for bit, wherever the iteration began, cached or streamed, with any number
    of workers. (Files with a good header and damaged pixels are the exception: a cache leaves them out from
    the start, which changes the order; a stream puts another image in their place.)

    Args:
        flip: mirror each image with probability 1/2.
        workers: processes that decode when the set has no cache; 0: this one.
        world: whose rows of each batch are read and given.
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
    return _batches(images, batch_size, seed, steps, flip, workers, world, raw)


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
    world: World,
    raw: bool,
) -> Iterator[Batch]:
    stream: Iterable[_Decoded] = ()
    if images.cache is None:
        stream = load_ahead(_Steps(images, batch_size, seed, world), steps, workers)
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
            index = batch_indices(len(images), batch_size=batch_size, seed=seed, step=step)[world.rows]
            pixels = images.get(index)
        if flip:
            flips = torch.rand(batch_size, generator=step_generator(seed, step, "flip")) < 0.5
            pixels = flip_images(pixels, flips[world.rows])
        yield Batch(pixels if raw else to_float(pixels, torch.channels_last), index, step)


class _Steps(Dataset[_Decoded]):
    """Item k is what step k shows: a loader that begins at any step needs no history."""

    def __init__(self, images: ImageSet, batch_size: int, seed: int, world: World) -> None:
        self.images, self.batch_size, self.seed, self.world = images, batch_size, seed, world

    def __getitem__(self, step: int) -> _Decoded:
        index = batch_indices(len(self.images), batch_size=self.batch_size, seed=self.seed, step=step)
        return _decode(self.images, index[self.world.rows].tolist(), own_class=False)
