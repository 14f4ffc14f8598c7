"""Tiny BigGANs, BigBiGANs and IC-GANs with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamteacher.runtime.config import from_json, to_json
from dreamteacher.teachers.biggan.family import random_weights
from dreamteacher.teachers.biggan.teacher import (
    BigGanSpec,
    BigGanTeacher,
)
from dreamteacher.teachers.registry import load_teacher, save_teacher

CARD = {"name": "tiny", "licence": "CC0-1.0"}


# Four levels in 64 x 64 pixels take a first map of 1 x 1; published networks begin with 4 x 4.
ALL_LEVELS = BigGanSpec(
    channels=(8, 8, 8, 8, 8, 4, 4), bottom=1, attention=(3,), latent=4, features=16, feature_width=6
)


def instances(count: int, width: int, seed: int = 1) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def tiny(folder: Path) -> None:
    """An IC-GAN with random weights: 64 px, levels at strides 4, 8, 16 and 32, a bank of 6 instances."""
    save_teacher(
        folder, {**random_weights(ALL_LEVELS), "bank": instances(6, 16)}, ALL_LEVELS, CARD, half=False
    )


def tiny_class_instance(folder: Path) -> None:
    """The same, told of classes as well."""
    spec = from_json(BigGanSpec, {**to_json(ALL_LEVELS), "classes": 3, "class_width": 5})
    bank = {"bank": instances(6, 16), "bank_labels": torch.tensor([0, 1, 2, 2, 1, 0])}
    save_teacher(folder, {**random_weights(spec), **bank}, spec, CARD, half=False)


def tiny_biggan(folder: Path) -> None:
    """A class-conditional BigGAN without a hierarchical latent: 32 px, levels at strides 4 only."""
    spec = BigGanSpec(channels=(8, 8, 8, 4), latent=6, hierarchical=False, classes=3, class_width=5)
    save_teacher(folder, random_weights(spec), spec, CARD, half=False)


def tiny_bigbigan(folder: Path) -> None:
    """An unconditional one in BigBiGAN's form (one class): 128 px, levels at strides 4, 8 and 16."""
    spec = BigGanSpec(channels=(8, 8, 8, 8, 8, 4), attention=(3,), latent=4, classes=1, class_width=5)
    save_teacher(folder, random_weights(spec), spec, CARD, half=False)


def tiny_unconditional(folder: Path) -> None:
    """Told of nothing but its pieces of the latent: 64 px, levels at strides 4 and 8."""
    spec = BigGanSpec(channels=(8, 8, 8, 4, 4), latent=4)
    save_teacher(folder, random_weights(spec), spec, CARD, half=False)


TINY: dict[Callable[[Path], None], tuple[int, ...]] = {
    tiny: (4, 8, 16, 32),
    tiny_class_instance: (4, 8, 16, 32),
    tiny_biggan: (4,),
    tiny_bigbigan: (4, 8, 16),
    tiny_unconditional: (4, 8),
}


def made(build: Callable[[Path], None], tmp_path: Path, **options: Any) -> BigGanTeacher:
    folder = tmp_path / build.__name__
    folder.mkdir(exist_ok=True)
    build(folder)
    teacher = load_teacher(str(folder), **options)
    assert isinstance(teacher, BigGanTeacher)
    return teacher
