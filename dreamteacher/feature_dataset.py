"""Feature datasets, online: pairs of (images, teacher maps), encoded from real images or synthesized."""

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

DatasetKind = Literal["encoded", "synthesized"]


class FeatureBatch(NamedTuple):
    """Images (float RGB in [0, 1], N x 3 x H x W) and the teacher's maps of exactly these images.

    `waited` is the time in seconds that was spent waiting for images, the teacher's work not counted.
    """

    images: Tensor
    maps: list[Tensor]
    waited: float


def device_generator(seed: int, step: int, stream: str, device: torch.device) -> torch.Generator:
    """The random numbers of one step on `device`: the same for a run and for its resumption."""
    return torch.Generator(device).manual_seed(data.step_generator(seed, step, stream).initial_seed())


def check_mode(teacher: Teacher, kind: DatasetKind) -> None:
    """Raises UserError when the teacher cannot serve this kind of dataset."""
    mode = "encode" if kind == "encoded" else "sample"
    if mode not in teacher.modes:
        able = {"encode": "encoded", "sample": "synthesized"}
        raise UserError(
            f"The teacher '{teacher.name}' ({teacher.family}) cannot make a dataset that is {kind}.",
            f"Use --dataset {' or '.join(sorted(able[m] for m in teacher.modes))}.",
        )


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
        yield FeatureBatch(images, maps, waited)


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
        yield FeatureBatch(images.float(), maps, 0.0)
