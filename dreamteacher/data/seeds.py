"""Generators derived from (seed, step, stream): a resumed run needs no stored random state."""

from __future__ import annotations

import hashlib

import torch

from dreamteacher.runtime.distributed.world import ALONE, Draws, World


def step_generator(seed: int, step: int, stream: str = "") -> torch.Generator:
    """The random numbers of one step, for one purpose: independent of every other (seed, step, stream)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{stream}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def device_generator(
    seed: int, step: int, stream: str, device: torch.device, world: World = ALONE
) -> torch.Generator:
    """The random numbers of one step on `device`: the same for a run and its resumption, for one process and many."""
    return Draws(device, step_generator(seed, step, stream).initial_seed(), world)
