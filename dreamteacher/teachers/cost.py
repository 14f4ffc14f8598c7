"""What a teacher has and what an image costs, from its spec alone: networks without weights, operations counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dreamteacher.spec import FeatureSpec
from dreamteacher.teachers.family import Cost
from dreamteacher.teachers.registry import family_of


def measure(family: str, spec: Any) -> Cost:
    """The cost of a teacher of one of the families of `registry.FAMILIES`; no weight is allocated."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        return family_of(family).cost(spec)


def gmacs(run: Callable[[], object]) -> float:
    """10^9 multiply-accumulates of what `run` computes, which may be on the meta device."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2e9


def channels_by_stride(specs: tuple[FeatureSpec, ...]) -> dict[int, int]:
    """Stride -> channels of a teacher's levels."""
    return {s.stride: s.channels for s in specs}
