"""Words and settings that several verbs have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OptimizerName = Literal["adamw", "lamb"]


BatchNorm = Literal["global", "local"]


Precision = Literal["auto", "float32", "bfloat16"]


Compile = Literal["auto", "on", "off"]


LoggerName = Literal["tensorboard", "wandb", "mlflow"]


@dataclass(frozen=True, kw_only=True)
class OnDevice:
    """Where a verb computes."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    precision: Precision = "auto"
    """Autocast dtype; auto: bfloat16 where the hardware has it."""


@dataclass(frozen=True, kw_only=True)
class Resumable(OnDevice):
    """What a training leaves while it runs."""

    save_every: int = 200
    """Steps between checkpoints; 0: by minutes alone."""
    save_minutes: float = 10.0
    """Minutes between checkpoints, beside --save-every; 0: by steps alone."""
    log_to: tuple[LoggerName, ...] = ()
    """Services that the log also goes to; each is an extra of its name (pip install 'dreamteacher[wandb]')."""


@dataclass(frozen=True, kw_only=True)
class ReadsImages:
    """How a folder of images is read."""

    workers: int = 2
    """Processes or threads that decode images."""
    cache_gb: float = 2.0
    """Images are kept decoded in memory up to this size, else streamed."""
    strict: bool = False
    """Stop before the first step when any image is damaged."""
