"""Feature datasets: pairs of (images, teacher maps), encoded from real images, synthesized, both, or stored."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dreamteacher.data import batches as data_batches
from dreamteacher.data import image_set
from dreamteacher.data.images import to_float
from dreamteacher.data.seeds import device_generator
from dreamteacher.distill.store.items import Kept, unpack
from dreamteacher.distill.store.reader import FeatureStore
from dreamteacher.losses import FeatureLoss, feature_loss, projected_loss, whiten
from dreamteacher.runtime.distributed.device import autocast
from dreamteacher.runtime.distributed.world import ALONE, World
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.prefetch import Copies, Sent, prefetch
from dreamteacher.runtime.settings import Precision
from dreamteacher.spec import AtReduction, WhitenAxes
from dreamteacher.teachers.base import Teacher
from dreamteacher.teachers.in_parts import InParts


class FeatureBatch(NamedTuple):
    """Images (float RGB in [0, 1], N x 3 x H x W) and the teacher's maps of exactly these images.

    `waited` is the time in seconds that was spent waiting for images, the teacher's work not counted; `step`
    counts batches from 0. Of a store that holds projected maps, `maps` are their coefficients and `kept` has
    what the loss needs besides.
    """

    images: Tensor
    maps: list[Tensor]
    waited: float
    step: int
    kept: Kept | None = None

    def target(self, level: int, axes: WhitenAxes) -> Tensor:
        """What the student's map of a level is compared with in eq. 1."""
        return whiten(self.maps[level], axes) if self.kept is None else self.maps[level]


# Each forgets a batch before it makes the next: else the maps of two would be in memory at once.
Stream = Generator[FeatureBatch, None, None]


@dataclass
class Part:
    """What a step works on at once: one of the `accumulate` parts of its batch.

    Args:
        batch: images and the teacher's maps.
        last: whether no further part of the step follows.
        maps: the student's, once they are made.
    """

    batch: FeatureBatch | None
    last: bool
    maps: Sequence[Tensor] = ()

    def forget(self) -> None:
        """Gives back its memory."""
        self.batch, self.maps = None, ()


class PartStream:
    """The batches of a run, step after step, in parts. A part is emptied before the teacher makes the next.

    Args:
        begin: number of a part -> the stream of parts from there.
        accumulate: parts of a step.
        waited: is told the seconds of waiting for data.
    """

    def __init__(
        self,
        begin: Callable[[int], Stream],
        accumulate: int,
        waited: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.begin, self.accumulate, self.waited = begin, accumulate, waited
        self._stream: Stream | None = None
        self._part: Part | None = None

    def of(self, step: int) -> Iterator[Part]:
        """The parts of step `step` (from 0)."""
        self.forget()
        if self._stream is None:
            self._stream = self.begin(step * self.accumulate)
        for k in range(self.accumulate):
            self.forget()
            batch = next(self._stream)
            self.waited(batch.waited)
            self._part = Part(batch, last=k + 1 == self.accumulate)
            del batch
            yield self._part

    def forget(self) -> None:
        """Empties the present part."""
        if self._part is not None:
            self._part.forget()


def batch_loss(
    maps: list[Tensor], batch: FeatureBatch, *, axes: WhitenAxes, at_weight: float, at_reduction: AtReduction
) -> FeatureLoss:
    """Eq. 3 of the student's maps against a batch, computed live or stored; of a store `axes` are its own."""
    if batch.kept is None:
        return feature_loss(maps, batch.maps, axes=axes, at_weight=at_weight, at_reduction=at_reduction)
    assert batch.kept.residuals is not None  # a store has them wherever it projects
    return projected_loss(
        maps, batch.maps, batch.kept.energies, batch.kept.residuals, factors=batch.kept.factors,
        at_weight=at_weight, at_reduction=at_reduction,
    )  # fmt: skip


def synthesized_part(batch_size: int, fraction: float) -> int:
    """How many images of a batch of both kinds the teacher makes.

    Raises:
        UserError: when a batch would hold none of one kind.
    """
    made = round(fraction * batch_size)
    if not 0 < made < batch_size:
        raise UserError(
            f"--synthesized-fraction {fraction:g} of a batch of {batch_size} leaves no room for one of the two kinds.",
            "Use a --synthesized-fraction nearer 0.5, a larger --batch-size, or --dataset encoded or synthesized.",
        )
    return made


def encoded(
    teacher: Teacher | InParts, batches: Iterator[data_batches.Batch], *, seed: int, device: torch.device,
    precision: Precision, world: World = ALONE,
) -> Stream:  # fmt: skip
    """Real images, already flipped, and the teacher's maps of what the student will see.

    On a GPU a thread fetches the next batch and starts its copy while this one is worked on. Raw batches
    (`data.batches(raw=True)`) travel as bytes.

    Source: the paper's encoded feature dataset (sec. 3.1): q(x_t | x_0), one denoising pass, fresh noise.
    """
    copies = Copies(device)

    def send(batch: data_batches.Batch) -> tuple[Sent, int]:
        return copies.send([batch.images]), batch.step

    for (sent, step), waited in prefetch(batches, send, threaded=device.type == "cuda"):
        images = to_float(copies.receive(sent)[0], torch.channels_last)
        generator = device_generator(seed, step, "teacher", device, world)
        with autocast(device, precision):
            maps = teacher.encode(images, generator=generator)
        yield FeatureBatch(images, maps, waited, step)
        del sent, images, maps


def synthesized(
    teacher: Teacher | InParts, *, batch_size: int, first_step: int, last_step: int, seed: int,
    device: torch.device, precision: Precision, world: World = ALONE,
) -> Stream:  # fmt: skip
    """New images from the teacher and their maps, made on the fly and never filtered.

    Source: the paper's synthesized feature dataset (sec. 3.1).
    """
    for step in range(first_step, last_step):
        generator = device_generator(seed, step, "teacher", device, world)
        with autocast(device, precision):
            images, maps = teacher.sample(world.of(batch_size), generator=generator)
        yield FeatureBatch(images.float(), maps, 0.0, step)
        del images, maps


def both(
    teacher: Teacher | InParts, batches: Iterator[data_batches.Batch], *, made: int, seed: int, device: torch.device,
    precision: Precision, world: World = ALONE,
) -> Stream:  # fmt: skip
    """Batches of real images and, behind them, `made` of the teacher's own, with the maps of all.

    Source: ours; the paper reports either kind alone. A teacher that can both encode and sample serves it.
    """
    for real in encoded(teacher, batches, seed=seed, device=device, precision=precision, world=world):
        generator = device_generator(seed, real.step, "samples", device, world)
        with autocast(device, precision):
            images, maps = teacher.sample(world.of(made), generator=generator)
        both = [torch.cat([a, b.to(a.dtype)]) for a, b in zip(real.maps, maps, strict=True)]
        seen, waited, step = torch.cat([real.images, images.float()]), real.waited, real.step
        del real, images, maps
        yield FeatureBatch(seen, both, waited, step)
        del seen, both


def stored(
    store: FeatureStore, images: image_set.ImageSet, *, batch_size: int, first_step: int, last_step: int, seed: int,
    device: torch.device, workers: int = 0, teacher: Teacher | InParts | None = None, precision: Precision = "auto",
    world: World = ALONE,
) -> Stream:  # fmt: skip
    """Images and what a store holds of them; step k is the same batch wherever the iteration began.

    The order is that of `data.batches`; which draw an image is seen with follows from seed and epoch; the image is
    mirrored as the draw was, for a map that is mirrored is not the map of the mirrored image.

    Args:
        teacher: of a store of latents: it noises them and makes the maps, at its own t, as `encoded` does.

    Raises:
        UserError: for images that the store does not have.
    """
    batches = data_batches.batches(
        images, batch_size=batch_size, seed=seed, first_step=first_step, last_step=last_step, flip=False,
        workers=workers, world=world, raw=True,
    )  # fmt: skip
    places, copies = store.places(images), Copies(device)

    def read(batch: data_batches.Batch) -> tuple[Sent, int]:
        """The items beside their images, mirrored as recorded."""
        at = places[batch.index]
        rows, flips = store.rows(at, store.draws_of(at, batch.step // (len(images) // batch_size), seed))
        return copies.send([data_batches.flip_images(batch.images, flips), rows]), batch.step

    for (sent, step), waited in prefetch(batches, read, threaded=True):
        pixels, rows = copies.receive(sent)
        seen, kept = to_float(pixels, torch.channels_last), unpack(store.plan, rows)
        if store.plan.what == "latents":
            assert teacher is not None
            generator = device_generator(seed, step, "teacher", device, world)
            with autocast(device, precision):
                maps = teacher.encode_latents(kept.maps[0], generator=generator)
            yield FeatureBatch(seen, maps, waited, step)
            del maps
        else:
            yield FeatureBatch(seen, kept.maps, waited, step, None if store.plan.raw else kept)
        del sent, pixels, rows, seen, kept
