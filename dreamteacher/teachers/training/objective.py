"""What `train-teacher` asks of an objective: the one loop trains whatever keeps this contract."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamteacher.runtime.distributed.world import ALONE, World
from dreamteacher.runtime.settings import Precision


@dataclass(frozen=True, kw_only=True)
class Preset(ABC):
    """What every family's preset has.

    Args:
        size: (height, width) in pixels; batch_size: images a step; lr: (peak) learning rate; steps: of training.
    """

    size: tuple[int, int]
    batch_size: int
    lr: float
    steps: int

    @property
    @abstractmethod
    def unit(self) -> int:
        """Heights and widths must be multiples of this."""

    @abstractmethod
    def line(self) -> str:
        """What `list presets` says of the network."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How one training runs: the preset's numbers after the user's, and where.

    Args:
        seed: of weights and every draw; steps: in all; batch_size: images a step; lr: (peak) learning rate.
        world: this process's part of every batch.
    """

    seed: int
    steps: int
    batch_size: int
    lr: float
    device: torch.device
    precision: Precision
    world: World = ALONE


class Objective(ABC):
    """Networks in training, their optimizers, and what one step does to them.

    What changes a network in a step happens within `update()`, which is the loop's where one runs.
    Every draw depends on (seed, step) alone, and `state` holds all the rest: a resumed run is bitwise the same.
    """

    update: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext

    @abstractmethod
    def step(self, step: int, images: Tensor) -> dict[str, Tensor]:
        """One step (from 0) on this process's images, N x 3 x H x W, RGB in [0, 1], on the plan's device.

        Returns: losses and what else the log shows, by name, as scalars on the device, read by the loop alone.
        """

    @abstractmethod
    def validate(self, images: Tensor, generator: torch.Generator) -> tuple[dict[str, float], Tensor]:
        """A row for the log, and 64 samples (64 x 3 x H x W in [0, 1]) that can be compared over the steps.

        Args:
            images: the same real ones at every call, as `step` takes them; generator: seeded alike at every call.
        """

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values from which training goes on."""

    @abstractmethod
    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], path: Path) -> None:
        """Restores what `state` gave; `path` names the file in errors.

        Raises:
            UserError: when the tensors are another network's.
        """

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The teacher's weights: the averaged ones."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the teacher's card tells beyond size, steps and batch: JSON values."""
