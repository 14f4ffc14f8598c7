"""Diffusion teachers: a pixel-space U-Net whose decoder maps are read in ONE denoising pass.

The network is diffusers' `UNet2DModel` (ADM, DDPM and what `train-teacher` trains).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_blocks import AttnUpBlock2D, ResnetUpsampleBlock2D, UpBlock2D
from torch import Tensor, nn

from dreamteacher import checkpoint
from dreamteacher.errors import UserError
from dreamteacher.features import FeatureSpec
from dreamteacher.teachers.base import STRIDES, Noise, Teacher

Schedule = Literal["linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class DiffusionSpec:
    """Everything that rebuilds a diffusion network and is not in its weights (teacher.json, "network").

    Args:
        unet: keyword arguments of diffusers' UNet2DModel.
        patch: pixels per side folded into channels before the network (1: none).
        image_channels: 1 (grey) or 3 (RGB).
        size: (height, width) in pixels that it was trained at.
        schedule: beta schedule of the 1000 (`steps`) diffusion steps.
        timestep: t at which features are taken unless the user names another.
    """

    unet: dict[str, Any]
    patch: int = 1
    image_channels: int = 3
    size: tuple[int, int] = (64, 64)
    schedule: Schedule = "linear"
    steps: int = 1000
    timestep: int = 100


def alphas_cumprod(schedule: Schedule, steps: int = 1000) -> Tensor:
    """alpha-bar of every timestep, float64 (steps,): the share of signal power left at t.

    Source: linear, Ho et al. 2020 (beta from 1e-4 to 0.02 at 1000 steps, scaled for others);
    cosine, Nichol & Dhariwal 2021. Golden: adm_legacy `out.alphas_cumprod.*`.

    Example:
        >>> [round(float(alphas_cumprod("linear")[t]), 3) for t in (50, 150, 250, 350)]
        [0.97, 0.786, 0.521, 0.283]
    """
    if schedule == "linear":
        scale = 1000 / steps
        beta = torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)
    else:
        bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        betas = [min(1 - b / a, 0.999) for a, b in pairwise(bar)]
        beta = torch.tensor(betas, dtype=torch.float64)
    return torch.cumprod(1 - beta, dim=0)


def q_sample(x0: Tensor, alpha_bar: Tensor, noise: Tensor) -> Tensor:
    """x_t ~ q(x_t | x_0) = N(sqrt(alpha_bar) x_0, 1 - alpha_bar); x0 in [-1, 1], alpha_bar (N,)."""
    a = alpha_bar.view(-1, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def time_embedding(unet: UNet2DModel, t: Tensor) -> Tensor:
    """The network's embedding of timesteps t (N,), as in its own forward."""
    return unet.time_embedding(unet.time_proj(t).to(unet.dtype))


def decoder_maps(unet: UNet2DModel, x: Tensor, t: Tensor, count: int) -> list[Tensor]:
    """The last block's output of the first `count` decoder levels, each BEFORE its upsampler, coarse to fine.

    The walk stops there: nothing after the last wanted map is computed.

    Args:
        x: network input, N x C x H x W; t: timesteps (N,).
        count: decoder levels to take, counted from the coarsest.

    Source: the paper's "decoder blocks 3, 6, 9, 12" at strides 32 to 4 (spec: before the up-sampling block).
    Test: equal (0.0) to what the network's own full forward computes at those places.
    """
    emb = time_embedding(unet, t)
    x = unet.conv_in(x)
    skips: tuple[Tensor, ...] = (x,)
    for down in unet.down_blocks:
        x, new = down(hidden_states=x, temb=emb)
        skips += new
    if unet.mid_block is not None:
        x = unet.mid_block(x, emb)
    maps = []
    for i in range(count):
        up = cast(UpBlock2D | AttnUpBlock2D | ResnetUpsampleBlock2D, unet.up_blocks[i])
        attentions = up.attentions if isinstance(up, AttnUpBlock2D) else [None] * len(up.resnets)
        for resnet, attention in zip(up.resnets, attentions, strict=True):
            x = resnet(torch.cat([x, skips[-1]], dim=1), emb)
            skips = skips[:-1]
            if attention is not None:
                x = attention(x)
        maps.append(x)
        if i + 1 < count:
            for upsampler in cast(nn.ModuleList, up.upsamplers):
                with_time = isinstance(up, ResnetUpsampleBlock2D) or (
                    isinstance(up, AttnUpBlock2D) and up.upsample_type == "resnet"
                )
                x = upsampler(x, temb=emb) if with_time else upsampler(x)
    return maps


class DiffusionTeacher(Teacher):
    """Feature maps of a diffusion U-Net at one or several timesteps.

    Args:
        unet: a UNet2DModel that predicts epsilon (extra output channels, a learned sigma, are ignored).
        spec: how images enter it.
        timesteps: t of the features; several are concatenated on channels, sharing one noise draw.
        noise: "stochastic" (fresh at every call, the paper's default), "fixed" (one noise image for all),
            or "inversion" (deterministic DDIM inversion, `inversion_steps` more full passes).
        sampling_steps: DDIM steps of `sample`.

    Raises:
        UserError: for timesteps out of range or blocks whose decoder cannot be walked.
    """

    family = "diffusion"
    modes = frozenset({"encode", "sample"})
    alpha_bar: Tensor

    def __init__(
        self,
        unet: UNet2DModel,
        spec: DiffusionSpec,
        *,
        name: str,
        licence: str,
        timesteps: tuple[int, ...] = (),
        noise: Noise = "stochastic",
        inversion_steps: int = 10,
        sampling_steps: int = 50,
    ) -> None:
        super().__init__()
        self.unet, self.spec, self.name, self.licence = unet, spec, name, licence
        self.size, self.noise = spec.size, noise
        self.timesteps = timesteps or (spec.timestep,)
        self.inversion_steps, self.sampling_steps = inversion_steps, sampling_steps
        self.register_buffer("alpha_bar", alphas_cumprod(spec.schedule, spec.steps), persistent=False)
        for t in self.timesteps:
            if not 0 <= t < spec.steps:
                raise UserError(f"Timestep {t} is out of range.", f"Use 0 to {spec.steps - 1}.")
        for block in unet.up_blocks:
            if not isinstance(block, (AttnUpBlock2D, UpBlock2D, ResnetUpsampleBlock2D)):
                raise UserError(
                    f"'{name}' has a decoder block of type {type(block).__name__}.",
                    "UpBlock2D, AttnUpBlock2D and ResnetUpsampleBlock2D can be read.",
                )
        channels = list(reversed(unet.config["block_out_channels"]))
        self.multiple = spec.patch * 2 ** (len(channels) - 1)
        # up_blocks[i] runs at stride patch * 2^(levels - 1 - i) until its upsampler.
        self._levels = [
            (i, FeatureSpec(f"s{s}", c * len(self.timesteps), s))
            for i, c in enumerate(channels)
            if (s := spec.patch * 2 ** (len(channels) - 1 - i)) in STRIDES
        ]
        if not self._levels:
            raise UserError(
                f"'{name}' has no decoder level at stride 4, 8, 16 or 32.", "Use a deeper network."
            )
        self.specs = tuple(level for _, level in reversed(self._levels))
        self.freeze()

    def to_network(self, images: Tensor) -> Tensor:
        """RGB in [0, 1] -> the network's input space: [-1, 1], grey if it is, patches folded into channels."""
        x = images.mean(1, keepdim=True) if self.spec.image_channels == 1 else images
        return F.pixel_unshuffle(x * 2 - 1, self.spec.patch).contiguous(memory_format=torch.channels_last)

    def to_images(self, x: Tensor) -> Tensor:
        """The inverse of `to_network`, clamped to [0, 1]."""
        x = (F.pixel_shuffle(x.float(), self.spec.patch) + 1) / 2
        return x.clamp(0, 1).expand(-1, 3, -1, -1)

    def epsilon(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's full forward: predicted noise for x at timesteps t (N,)."""
        return self.unet(x, t).sample[:, : x.shape[1]]

    @torch.no_grad()
    def encode(self, images: Tensor, *, generator: torch.Generator) -> list[Tensor]:
        self.check_size(*images.shape[-2:])
        x0 = self.to_network(images)
        count = self._levels[-1][0] + 1
        steps = torch.tensor(self.timesteps, device=images.device)
        if self.noise == "inversion":
            noisy = torch.cat([self.invert(x0, t) for t in self.timesteps])
        else:
            noise = self._draw(x0, generator)
            noisy = torch.cat(
                [q_sample(x0, a.expand(len(x0)).to(x0.dtype), noise) for a in self.alpha_bar[steps]]
            )
        maps = decoder_maps(self.unet, noisy, steps.repeat_interleave(len(x0)), count)
        wanted = [maps[i] for i, _ in reversed(self._levels)]
        if len(self.timesteps) == 1:
            return wanted
        return [torch.cat(m.chunk(len(self.timesteps)), dim=1) for m in wanted]

    def _draw(self, x0: Tensor, generator: torch.Generator) -> Tensor:
        if self.noise == "fixed":  # the same noise image for every call, every image, every device
            fixed = torch.randn((1, *x0.shape[1:]), generator=torch.Generator().manual_seed(0))
            return fixed.to(x0).expand_as(x0)
        return torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)

    @torch.no_grad()
    def invert(self, x0: Tensor, t: int) -> Tensor:
        """DDIM inversion: x_0 -> x_t deterministically, in `inversion_steps` equal steps.

        Source: Song et al. 2021, eq. 14 run backwards; the deterministic encoding of the paper's ablation.
        """
        times = torch.linspace(0, t, self.inversion_steps + 1).round().long().unique().tolist()
        one, x = x0.new_ones(()), x0
        for now, then in pairwise(times):
            x = self._ddim(x, now, self.alpha_bar[now] if now else one, self.alpha_bar[then], clip=False)
        return x

    def _ddim(self, x: Tensor, t: int, a_now: Tensor, a_then: Tensor, *, clip: bool) -> Tensor:
        """One deterministic step between noise levels (Song et al. 2021, eq. 12 with sigma 0)."""
        eps = self.epsilon(x, torch.full((len(x),), t, device=x.device)).float()
        a_now, a_then = a_now.to(x.dtype), a_then.to(x.dtype)
        x0 = (x - (1 - a_now).sqrt() * eps) / a_now.sqrt()
        if clip:  # keep the estimate in the range of images
            x0 = x0.clamp(-1, 1)
            eps = (x - a_now.sqrt() * x0) / (1 - a_now).sqrt()
        return a_then.sqrt() * x0 + (1 - a_then).sqrt() * eps

    @torch.no_grad()
    def generate(self, n: int, *, generator: torch.Generator, size: tuple[int, int] | None = None) -> Tensor:
        """n images by deterministic DDIM in `sampling_steps` steps, float RGB in [0, 1]."""
        height, width = size or self.size
        self.check_size(height, width)
        p = self.spec.patch
        shape = (n, self.spec.image_channels * p * p, height // p, width // p)
        x = torch.randn(shape, generator=generator, device=self.alpha_bar.device)
        x = x.contiguous(memory_format=torch.channels_last)
        times = torch.linspace(self.spec.steps - 1, 0, self.sampling_steps).round().long().tolist()
        for now, then in zip(times, [*times[1:], -1], strict=True):
            a_then = self.alpha_bar[then] if then >= 0 else x.new_ones(())
            x = self._ddim(x, now, self.alpha_bar[now], a_then, clip=True)
        return self.to_images(x)

    def sample(self, n: int, *, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        """n new images and the maps of encoding them (a diffusion model has no one pass that gives both)."""
        images = self.generate(n, generator=generator)
        return images, self.encode(images, generator=generator)


def build_unet(spec: DiffusionSpec) -> UNet2DModel:
    """The network of a spec with fresh weights.

    Raises:
        UserError: when diffusers refuses the settings.
    """
    try:
        return UNet2DModel(**spec.unet)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"The U-Net cannot be built: {str(error).splitlines()[0]}", "Mend 'network' in teacher.json."
        ) from None


def load(
    weights: Mapping[str, Tensor],
    spec: DiffusionSpec,
    where: Path,
    *,
    name: str,
    licence: str,
    timesteps: tuple[int, ...] = (),
    noise: Noise = "stochastic",
) -> DiffusionTeacher:
    """The teacher of a state dict; `where` is named when the weights do not fit the spec."""
    with torch.random.fork_rng(devices=[]):  # fresh weights are drawn before ours replace them
        unet = build_unet(spec)
    checkpoint.load_exactly(unet, dict(weights), where)
    return DiffusionTeacher(unet, spec, name=name, licence=licence, timesteps=timesteps, noise=noise)
