"""Where the work runs: device, precision and, with torchrun, which part of every batch is this process's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dreamteacher.runtime.errors import UserError


@dataclass(frozen=True)
class World:
    """The part of every batch that one of several processes works on: rows rank, rank + ranks, rank + 2 ranks ...

    Rows are taken at intervals, so that a batch norm or a deviation over groups of images n, n + N / 4 ... meets the
    same groups in one process and in several.

    Example:
        >>> list(range(8))[World(1, 2).rows]
        [1, 3, 5, 7]
    """

    rank: int = 0
    ranks: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    @property
    def rows(self) -> slice:
        """Its rows of a batch."""
        return slice(self.rank, None, self.ranks)

    def of(self, count: int) -> int:
        """How many of `count` rows are its own; `count` is a multiple of `ranks`."""
        return count // self.ranks


ALONE = World()


def launched() -> World:
    """This process among those that torchrun started (RANK and WORLD_SIZE), or alone."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return World(int(os.environ.get("RANK", "0")), ranks) if ranks > 1 else ALONE


def check_batch(what: str, batch: int, world: World, *, together: int = 1) -> None:
    """Raises UserError when a batch (or a part of one) cannot be split evenly over the processes.

    Args:
        together: images that belong in one process, such as those of a group; one process alone may leave a rest.
    """
    if world.ranks > 1 and batch % (together * world.ranks):
        raise UserError(
            f"{what} has {batch} images, which {world.ranks} processes cannot share evenly"
            + (f" in groups of {together}." if together > 1 else "."),
            f"Use a multiple of {together * world.ranks}, or another number of processes.",
        )


class Draws(torch.Generator):
    """The random numbers of one process's rows: `randn`, `rand` and `randint` draw for the whole batch and keep these.

    So what an image meets does not depend on how many processes there are. Torch's own functions take it for a plain
    generator, and would give the same numbers to every process.
    """

    world: World

    def __new__(cls, device: torch.device | str, seed: int, world: World = ALONE) -> Draws:
        self = super().__new__(cls, torch.device(device))  # type: ignore[call-arg]
        self.manual_seed(seed)
        self.world = world
        return self


def world_of(generator: torch.Generator | None) -> World:
    """Whose rows a generator draws."""
    return generator.world if isinstance(generator, Draws) else ALONE


def randn(shape: Sequence[int], generator: torch.Generator, **where: Any) -> torch.Tensor:
    """`torch.randn`, where the first axis is the batch's: with `Draws` these rows of the whole batch.

    Example:
        >>> whole = randn((4, 2), Draws("cpu", 0))
        >>> bool((whole[1::2] == randn((2, 2), Draws("cpu", 0, World(1, 2)))).all())
        True
    """
    return _own(torch.randn(_whole(shape, generator), generator=generator, **where), generator)


def rand(shape: Sequence[int], generator: torch.Generator, **where: Any) -> torch.Tensor:
    """`torch.rand`, as `randn`."""
    return _own(torch.rand(_whole(shape, generator), generator=generator, **where), generator)


def randint(high: int, shape: Sequence[int], generator: torch.Generator, **where: Any) -> torch.Tensor:
    """`torch.randint` from 0, as `randn`."""
    return _own(torch.randint(high, _whole(shape, generator), generator=generator, **where), generator)


def _whole(shape: Sequence[int], generator: torch.Generator) -> tuple[int, ...]:
    return (shape[0] * world_of(generator).ranks, *shape[1:])


def _own(drawn: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    world = world_of(generator)
    return drawn if world.ranks == 1 else drawn[world.rows].clone()
