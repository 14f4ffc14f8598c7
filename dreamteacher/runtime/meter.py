"""What is measured between two lines of a log: named sums on the device, reduced over processes at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dreamteacher.runtime.distributed.group import all_reduce_mean, earliest
from dreamteacher.runtime.distributed.world import ALONE, World

_NEVER = 2**62  # a step that is never reached
_PREFIX = "meter/"


class Means(dict[str, float]):
    """The mean of each name, and the sums that they are of."""

    def __init__(self, totals: Mapping[str, float], counts: Mapping[str, int]) -> None:
        super().__init__({name: total / counts[name] for name, total in totals.items()})
        self.totals, self.counts = totals, counts

    def difference(self, name: str, other: str) -> float:
        """The mean of one less that of another, of as many steps, rounded once."""
        return (self.totals[name] - self.totals[other]) / self.counts[name]


class Meter:
    """Sums of named scalars, and the first step at which a watched one was not finite.

    Adding never waits for the device; reading does. A name is averaged over the steps in which it occurred.
    Sums are replaced, not changed in place: so what `note` remembers costs nothing.

    Args:
        dtype: of the sums; None: torch's default.
        world: the processes that measure together.

    Example:
        >>> meter = Meter()
        >>> meter.add(0, {"loss": torch.tensor(1.0)})
        >>> meter.add(1, {"loss": torch.tensor(2.0)})
        >>> meter.means()
        {'loss': 1.5}
    """

    def __init__(self, dtype: torch.dtype | None = None, world: World = ALONE) -> None:
        self.world = world
        self.dtype = dtype or torch.get_default_dtype()
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self._counted: dict[str, int] = {}  # the last step that was counted
        self._bad: dict[tuple[str, ...], Tensor] = {}
        self._noted: tuple[dict[Any, Any], ...] = ({}, {}, {}, {})

    @torch.no_grad()
    def add(self, step: int, values: Mapping[str, Tensor], divisor: float = 1.0) -> None:
        """Adds scalars, each divided by `divisor`.

        Args:
            step: from 0; several values of one step count once, as parts of a sum.
        """
        new = [value.detach().to(self.dtype) for value in values.values()]
        old = [
            self.sums[name].to(value.device) if name in self.sums else torch.zeros_like(value)
            for name, value in zip(values, new, strict=True)
        ]
        if divisor != 1.0:
            new = list(torch._foreach_div(new, divisor))
        self.sums |= dict(zip(values, torch._foreach_add(old, new), strict=True))
        for name in values:
            if self._counted.get(name) != step:
                self.counts[name] = self.counts.get(name, 0) + 1
                self._counted[name] = step

    @torch.no_grad()
    def watch(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Remembers the first step at which each of these scalars is not finite, without reading them."""
        names = tuple(values)
        good = torch.stack([value.detach().float() for value in values.values()]).isfinite()
        first = self._bad.get(names)
        if first is None:
            first = torch.full((len(names),), _NEVER, device=good.device)
        self._bad[names] = first.where(good, first.clamp(max=step + 1))

    def _means(self) -> Tensor:
        sums = torch.stack(list(self.sums.values()))
        return all_reduce_mean(sums) if self.world.ranks > 1 else sums

    def bad(self) -> tuple[str, int] | None:
        """Which watched scalar was not finite first, and at which step (from 1); None: all were."""
        found: list[tuple[str, int]] = []
        for names, first in self._bad.items():
            steps = earliest(first.clone()) if self.world.ranks > 1 else first
            found += zip(names, steps.tolist(), strict=True)
        name, step = min(found, key=lambda pair: pair[1], default=("", _NEVER))
        return (name, step) if step < _NEVER else None

    def means(self) -> Means:
        """The mean of each name over the steps since `zero`, and over the processes."""
        if not self.sums:
            return Means({}, {})
        return Means(dict(zip(self.sums, self._means().tolist(), strict=True)), dict(self.counts))

    def zero(self) -> None:
        """Begins anew."""
        self.sums.clear()
        self.counts.clear()

    def note(self) -> None:
        """Remembers the present state, for `undo`."""
        self._noted = dict(self.sums), dict(self.counts), dict(self._counted), dict(self._bad)

    def undo(self) -> None:
        """Goes back to what was noted."""
        self.sums, self.counts, self._counted, self._bad = map(dict, self._noted)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Tensors (meter/NAME) and counts for a checkpoint; every process then goes on from the mean of all."""
        if self.sums:
            self.sums = dict(zip(self.sums, self._means().unbind(), strict=True))
        return {_PREFIX + name: value for name, value in self.sums.items()}, dict(self.counts)

    def unpack(self, tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        """Restores what `pack` gave."""
        self.sums = {name: tensors[_PREFIX + name] for name in counts}
        self.counts = dict(counts)
