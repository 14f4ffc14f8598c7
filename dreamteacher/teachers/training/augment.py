"""Adaptive augmentation for GANs on small sets: what the discriminator sees is disturbed with a probability p."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamteacher.runtime.distributed.world import world_of

SHIFT = 0.125  # largest translation, as a share of the side
SCALE, CONTRAST = 0.2, 0.5  # standard deviations of log2
BRIGHTNESS = 0.2  # standard deviation, of images in [-1, 1]


def augment(images: Tensor, p: Tensor, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W in about [-1, 1]), each disturbed in several ways with probability p each.

    Mirroring, quarter turns (half turns where H and W differ), whole-pixel shifts, scaling, any rotation,
    brightness, contrast. Differentiable (once) in the images; what is left alone stays the same bit for bit.

    Args:
        p: scalar tensor in [0, 1] on the images' device; generator: on their device; of `Draws`, its rows.

    Source: Karras et al. 2020 (arXiv 2006.06676), appendix B: its pixel blitting, isotropic scaling and
    rotation, brightness and contrast, with its strengths.
    """
    with torch.autocast(images.device.type, enabled=False):  # places of pixels: not in bfloat16
        return _augment(images.to(torch.promote_types(images.dtype, torch.float32)), p, generator)


def _augment(x: Tensor, p: Tensor, generator: torch.Generator) -> Tensor:
    n, device, world = len(x), x.device, world_of(generator)

    def uniform(count: int) -> Tensor:
        return torch.rand(count, n * world.ranks, generator=generator, device=device)[:, world.rows]

    gates = uniform(7) < torch.stack([p, p, p, p, 1 - (1 - p).clamp_min(0).sqrt(), p, p])[:, None]
    draws = uniform(5)
    normal = torch.randn(3, n * world.ranks, generator=generator, device=device)[:, world.rows]
    x = _blit(x, gates[0] & (draws[0] < 0.5), gates[1], draws[1], gates[2], draws[2:4])
    log_scale = torch.where(gates[3], normal[0] * SCALE, 0)
    angle = torch.where(gates[4], (draws[4] * 2 - 1) * math.pi, 0)
    x = torch.where((gates[3] | gates[4]).view(-1, 1, 1, 1), _warp(x, log_scale, angle), x)
    brightness = torch.where(gates[5], normal[1] * BRIGHTNESS, 0)
    contrast = torch.where(gates[6], normal[2] * CONTRAST, 0).exp2()
    return (x + brightness.view(-1, 1, 1, 1)) * contrast.view(-1, 1, 1, 1)


def _blit(
    x: Tensor, flip: Tensor, turn: Tensor, turn_draw: Tensor, shift: Tensor, shift_draw: Tensor
) -> Tensor:
    """Moves whole pixels: the place that every pixel comes from is computed, and read once."""
    height, width = x.shape[-2:]
    square = height == width
    turns = (turn_draw * 4).long().clamp(max=3) if square else (turn_draw * 2).long().clamp(max=1) * 2
    turns = torch.where(turn, turns, 0).view(-1, 1, 1)
    down, right = (
        torch.where(shift, ((draw * 2 - 1) * (side * SHIFT)).round().long(), 0).view(-1, 1, 1)
        for draw, side in zip(shift_draw, (height, width), strict=True)
    )
    rows = _reflect(torch.arange(height, device=x.device).view(1, -1, 1) - down, height)
    columns = _reflect(torch.arange(width, device=x.device).view(1, 1, -1) - right, width)
    rows, columns = torch.broadcast_tensors(rows, columns)
    if square:  # a quarter turn brings row r, column c from row c, column W - 1 - r
        odd = turns % 2 == 1
        rows, columns = torch.where(odd, columns, rows), torch.where(odd, width - 1 - rows, columns)
    half = turns >= 2
    rows = torch.where(half, height - 1 - rows, rows)
    columns = torch.where(half ^ flip.view(-1, 1, 1), width - 1 - columns, columns)
    places = (rows * width + columns).flatten(1)[:, None].expand(-1, x.shape[1], -1)
    return x.flatten(2).gather(2, places).view(x.shape)


def _reflect(index: Tensor, length: int) -> Tensor:
    """Indices past an edge, mirrored at its outermost pixel."""
    index = index.abs()
    return torch.where(index >= length, 2 * (length - 1) - index, index)


def _warp(x: Tensor, log_scale: Tensor, angle: Tensor) -> Tensor:
    """Scales and rotates about the centre, bilinearly, edges mirrored."""
    height, width = x.shape[-2:]
    cos, sin = angle.cos() * (-log_scale).exp2(), angle.sin() * (-log_scale).exp2()
    zero = torch.zeros_like(cos)
    matrix = torch.stack([
        torch.stack([cos, -sin * height / width, zero], dim=1),  # in units of half the sides
        torch.stack([sin * width / height, cos, zero], dim=1),
    ], dim=1)  # fmt: skip
    grid = F.affine_grid(matrix.to(x.dtype), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


@dataclass
class Adaptation:
    """The probability p and the measure that steers it, on the device: nothing here waits for it.

    Args:
        target: wanted mean of sign(D(real)); p rises above it (the discriminator knows the images by heart).
        images: real images over which p may go from 0 to 1.
        every: steps between adjustments.
        p: now; signs, count: since the last adjustment.

    Source: Karras et al. 2020 (arXiv 2006.06676), section 3.1: r_t with target 0.6, every 4 steps.
    """

    target: float
    images: int
    p: Tensor
    signs: Tensor
    count: Tensor
    every: int = 4

    def observe(self, step: int, logits: Tensor) -> None:
        """Takes in the logits of the real images of a step (from 0), and adjusts p where it is due."""
        self.signs += logits.sign().sum()
        self.count += len(logits)
        if (step + 1) % self.every == 0:
            direction = (self.signs / self.count - self.target).sign()
            self.p += direction * self.count / self.images
            self.p.clamp_(0, 1)
            self.signs.zero_()
            self.count.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"p": self.p, "signs": self.signs, "count": self.count}
