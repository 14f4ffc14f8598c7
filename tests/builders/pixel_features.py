"""DDPM-seg's features of every pixel, the plain way: what a diffusion teacher's `blocks` are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamteacher.teachers.base import Teacher
from dreamteacher.teachers.diffusion.teacher import DiffusionTeacher
from dreamteacher.teachers.diffusion.walk import decoder_outputs


def pixel_features(
    unet: torch.nn.Module, x: Tensor, t: Tensor, *, steps: int, blocks: tuple[int, ...], size: tuple[int, int]
) -> Tensor:
    """N x (steps x sum of widths) x height x width: step by step, block by block within a step.

    Args:
        x: the same N images at `steps` noise levels, level by level: (steps N) x C x H x W; t: (steps N,).

    Source: Baranchuk et al. 2022; bilinear, align_corners False.
    """
    maps = decoder_outputs(unet, x, t, blocks)
    large = [F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps]
    by_step = zip(*(m.chunk(steps) for m in large), strict=True)
    return torch.cat([m for step in by_step for m in step], dim=1)


def features_of(
    teacher: Teacher, images: Tensor, *, blocks: tuple[int, ...], generator: torch.Generator
) -> Tensor:
    """Those of images N x 3 x H x W at the teacher's timesteps, one noise draw for all."""
    assert isinstance(teacher, DiffusionTeacher)
    x, t = teacher._noisy(images, generator)
    height, width = images.shape[-2:]
    return pixel_features(
        teacher.unet, x, t, steps=len(teacher.timesteps), blocks=blocks, size=(height, width)
    )
