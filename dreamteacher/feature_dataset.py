"""Feature datasets, online: pairs of (images, teacher maps), encoded from real images, synthesized, or both."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dreamteacher import data
from dreamteacher.distributed import Precision, autocast
from dreamteacher.errors import UserError
from dreamteacher.teachers.base import Teacher

DatasetKind = Literal["encoded", "synthesized", "mixture"]
MODES = {"encoded": {"encode"}, "synthesized": {"sample"}, "mixture": {"encode", "sample"}}


class FeatureBatch(NamedTuple):
    """Images (float RGB in [0, 1], N x 3 x H x W) and the teacher's maps of exactly these images.

    `waited` is the time in seconds that was spent waiting for images, the teacher's work not counted; `step`
    counts batches from 0.
    """

    images: Tensor
    maps: list[Tensor]
    waited: float
    step: int


def device_generator(seed: int, step: int, stream: str, device: torch.device) -> torch.Generator:
    """The random numbers of one step on `device`: the same for a run and for its resumption."""
    return torch.Generator(device).manual_seed(data.step_generator(seed, step, stream).initial_seed())


def check_mode(teacher: Teacher, kind: DatasetKind, size: tuple[int, int]) -> None:
    """Raises UserError when the teacher cannot serve this kind of dataset, or not at this size in pixels."""
    if not MODES[kind] <= teacher.modes:
        able = [f"--dataset {other}" for other, modes in MODES.items() if modes <= teacher.modes]
        raise UserError(
            f"The teacher '{teacher.name}' ({teacher.family}) cannot make a dataset that is {_WORDS[kind]}.",
            f"Use {' or '.join(able)}.",
        )
    if "sample" in MODES[kind] and size != teacher.size:
        height, width = teacher.size
        raise UserError(
            f"The teacher '{teacher.name}' makes images of {height} x {width}, not {size[0]} x {size[1]}.",
            "Leave out --size" + (", or use --dataset encoded." if "encode" in teacher.modes else "."),
        )
    teacher.check_size(*size)


_WORDS = {"encoded": "encoded", "synthesized": "synthesized", "mixture": "a mixture"}


def synthesized_part(batch_size: int, share: float) -> int:
    """How many images of a mixture's batch the teacher makes.

    Raises:
        UserError: when a batch would hold none of one kind.
    """
    made = round(share * batch_size)
    if not 0 < made < batch_size:
        raise UserError(
            f"--share {share:g} of a batch of {batch_size} leaves no room for one of the two kinds.",
            "Use a --share nearer 0.5, a larger --batch-size, or --dataset encoded or synthesized.",
        )
    return made


def encoded(
    teacher: Teacher, batches: Iterator[data.Batch], *, seed: int, device: torch.device, precision: Precision
) -> Iterator[FeatureBatch]:
    """Real images, already flipped, and the teacher's maps of what the student will see.

    Source: the paper's encoded feature dataset (sec. 3.1): q(x_t | x_0), one denoising pass, fresh noise.
    """
    while True:
        begin = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        images = batch.images.to(device, non_blocking=True)
        waited = time.perf_counter() - begin
        generator = device_generator(seed, batch.step, "teacher", device)
        with autocast(device, precision):
            maps = teacher.encode(images, generator=generator)
        yield FeatureBatch(images, maps, waited, batch.step)


def synthesized(
    teacher: Teacher, *, batch_size: int, first_step: int, last_step: int, seed: int,
    device: torch.device, precision: Precision,
) -> Iterator[FeatureBatch]:  # fmt: skip
    """New images from the teacher and their maps, made on the fly and never filtered.

    Source: the paper's synthesized feature dataset (sec. 3.1).
    """
    for step in range(first_step, last_step):
        generator = device_generator(seed, step, "teacher", device)
        with autocast(device, precision):
            images, maps = teacher.sample(batch_size, generator=generator)
        yield FeatureBatch(images.float(), maps, 0.0, step)


def mixture(
    teacher: Teacher, batches: Iterator[data.Batch], *, made: int, seed: int, device: torch.device,
    precision: Precision,
) -> Iterator[FeatureBatch]:  # fmt: skip
    """Batches of real images and, behind them, `made` of the teacher's own, with the maps of all.

    Source: ours; the paper reports either kind alone. A teacher that can both encode and sample serves it.
    """
    for real in encoded(teacher, batches, seed=seed, device=device, precision=precision):
        generator = device_generator(seed, real.step, "samples", device)
        with autocast(device, precision):
            images, maps = teacher.sample(made, generator=generator)
        both = [torch.cat([a, b.to(a.dtype)]) for a, b in zip(real.maps, maps, strict=True)]
        yield FeatureBatch(torch.cat([real.images, images.float()]), both, real.waited, real.step)
