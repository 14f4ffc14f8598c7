"""Diffusion teachers: a pixel-space U-Net whose decoder maps are read in ONE denoising pass.

The network is diffusers' `UNet2DModel` (ADM, DDPM and what `train-teacher` trains).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_blocks import AttnUpBlock2D, ResnetUpsampleBlock2D, UpBlock2D
from torch import Tensor, nn

from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.distributed.world import randint, randn
from dreamteacher.runtime.errors import UserError
from dreamteacher.spec import FeatureSpec, Noise
from dreamteacher.teachers.base import Teacher
from dreamteacher.teachers.diffusion.walk import UpBlock, decoder_maps, decoder_outputs

Schedule = Literal["linear", "cosine", "scaled_linear"]


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
        heads: of every attention; none: as `unet` says (attention_head_dim, the width of a head).
        classes: rows of the class embedding, which is added to the time embedding; 0: unconditional.
        null_class: the row that means "no label"; none: there is none, and unlabelled images take the
            mean of all rows (guided-diffusion's ImageNet networks have none: the mean is our choice).
        time_width: width of the sinusoids of t; none: that of the first level. Wider in networks whose
            first channel multiplier is below 1 (the 512 px network of guided-diffusion: 256 against 128).
    """

    family: ClassVar[str] = "diffusion"
    unet: dict[str, Any]
    patch: int = 1
    image_channels: int = 3
    size: tuple[int, int] = (64, 64)
    schedule: Schedule = "linear"
    steps: int = 1000
    timestep: int = 100
    heads: int | None = None
    classes: int = 0
    null_class: int | None = None
    time_width: int | None = None


def alphas_cumprod(schedule: Schedule, steps: int = 1000) -> Tensor:
    """alpha-bar of every timestep, float64 (steps,): the share of signal power left at t.

    Source: linear, Ho et al. 2020 (beta from 1e-4 to 0.02 at 1000 steps, scaled for others);
    cosine, Nichol & Dhariwal 2021; scaled_linear, Stable Diffusion (linear in the square root, 0.00085
    to 0.012). Golden: adm_legacy `out.alphas_cumprod.*`.

    Example:
        >>> [round(float(alphas_cumprod("linear")[t]), 3) for t in (50, 150, 250, 350)]
        [0.97, 0.786, 0.521, 0.283]
    """
    if schedule == "linear":
        scale = 1000 / steps
        beta = torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)
    elif schedule == "scaled_linear":
        beta = torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2
    else:
        bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        beta = torch.tensor([min(1 - b / a, 0.999) for a, b in pairwise(bar)], dtype=torch.float64)
    return torch.cumprod(1 - beta, dim=0)


def q_sample(x0: Tensor, alpha_bar: Tensor, noise: Tensor) -> Tensor:
    """x_t ~ q(x_t | x_0) = N(sqrt(alpha_bar) x_0, 1 - alpha_bar); x0 in [-1, 1], alpha_bar (N,)."""
    a = alpha_bar.view(-1, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def draw_noise(x0: Tensor, kind: Noise, generator: torch.Generator) -> Tensor:
    """Standard normal noise like x0; "fixed": the same image for every call, every image and every device."""
    if kind == "fixed":
        return _fixed_noise(x0.shape[1:], x0.device, x0.dtype).expand_as(x0)
    return randn(x0.shape, generator, device=x0.device, dtype=x0.dtype)


@functools.lru_cache(maxsize=4)
def _fixed_noise(shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(0)).to(device, dtype)


def noised(x0: Tensor, alpha_bar: Tensor, noise: Tensor) -> Tensor:
    """x_0 at noise levels alpha_bar (T,), all with the same noise: (T N) x C x H x W, t by t."""
    return torch.cat([q_sample(x0, a.expand(len(x0)).to(x0.dtype), noise) for a in alpha_bar])


class DiffusionTeacher(Teacher):
    """Feature maps of a diffusion U-Net at one or several timesteps.

    Args:
        unet: a UNet2DModel that predicts epsilon (extra output channels, a learned sigma, are ignored).
        spec: how images enter it.
        timesteps: t of the features; several are concatenated on channels, sharing one noise draw.
        noise: "stochastic" (fresh at every call, the paper's default), "fixed" (one noise image for all),
            "inversion" (deterministic DDIM inversion, `inversion_steps` more full passes), or "none"
            (x_t = x_0: what networks trained for clean images want).
        blocks: decoder blocks whose outputs are the maps, ascending from 0 (DDPM-seg's choice of maps; for
            ADM-256 5, 6, 7, 8, 12); those of one stride are one level. Empty: the paper's four levels.
        sampling_steps: DDIM steps of `sample`.

    Raises:
        UserError: for timesteps or blocks out of range, or blocks whose decoder cannot be walked.
    """

    family = DiffusionSpec.family
    modes = frozenset({"encode", "sample"})
    alpha_bar: Tensor
    t: Tensor
    compile_targets = ("walk",)

    def __init__(
        self,
        unet: UNet2DModel,
        spec: DiffusionSpec,
        *,
        name: str,
        licence: str,
        timesteps: tuple[int, ...] = (),
        noise: Noise = "stochastic",
        blocks: tuple[int, ...] = (),
        inversion_steps: int = 10,
        sampling_steps: int = 50,
    ) -> None:
        super().__init__()
        self.unet, self.spec, self.name, self.licence = unet, spec, name, licence
        self.size, self.noise = spec.size, noise
        self.timesteps = timesteps or (spec.timestep,)
        self.inversion_steps, self.sampling_steps = inversion_steps, sampling_steps
        self.register_buffer("alpha_bar", alphas_cumprod(spec.schedule, spec.steps), persistent=False)
        self.register_buffer("t", torch.tensor(self.timesteps), persistent=False)
        for t in self.timesteps:
            if not 0 <= t < spec.steps:
                raise UserError(f"Timestep {t} is out of range.", f"Use 0 to {spec.steps - 1}.")
        _check_walkable(unet, spec, name)
        channels = list(reversed(unet.config["block_out_channels"]))
        self.multiple = spec.patch * 2 ** (len(channels) - 1)
        self.blocks = blocks
        # Of each level, fine to coarse, the places of its maps in what the walk returns.
        self._places: list[list[int]] = []
        if blocks:
            self._places, self.specs = block_levels(unet, spec, blocks, len(self.timesteps))
        else:  # up_blocks[i] runs at stride patch * 2^(levels - 1 - i) until its upsampler
            strides = [spec.patch * 2**i for i in reversed(range(len(channels)))]
            widths = [c * len(self.timesteps) for c in channels]
            self._places = [[i] for i in self.take_levels(list(zip(strides, widths, strict=True)))]
        self.freeze()

    def to_network(self, images: Tensor) -> Tensor:
        """RGB in [0, 1] -> the network's input space: [-1, 1], grey if it is, patches folded into channels."""
        x = images.mean(1, keepdim=True) if self.spec.image_channels == 1 else images
        return F.pixel_unshuffle(x * 2 - 1, self.spec.patch).contiguous(memory_format=torch.channels_last)

    def to_images(self, x: Tensor) -> Tensor:
        """The inverse of `to_network`, clamped to [0, 1]."""
        x = (F.pixel_shuffle(x.float(), self.spec.patch) + 1) / 2
        return x.clamp(0, 1).expand(-1, 3, -1, -1)

    def keep_only(self, mode: str) -> None:
        """Frees what `mode` never runs; encoding by inversion needs the whole network, so nothing then."""
        super().keep_only(mode)
        if mode != "encode" or self.noise == "inversion":
            return
        a_level = len(cast(UpBlock, self.unet.up_blocks[0]).resnets)
        last = self.blocks[-1] // a_level if self.blocks else self._places[0][0]
        self.unet.up_blocks = self.unet.up_blocks[: last + 1]
        if not self.blocks or (self.blocks[-1] + 1) % a_level:
            cast(UpBlock, self.unet.up_blocks[last]).upsamplers = None  # type: ignore[assignment]
        self.unet.conv_norm_out = self.unet.conv_out = None  # type: ignore[assignment]

    def epsilon(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The network's full forward: predicted noise for x at timesteps t (N,), a learned sigma left out.

        Args:
            labels: class of each image (N,); none: unlabelled, as `encode`.
        """
        unet = self.unet
        if not self.spec.classes:
            return unet(x, t).sample[:, : x.shape[1]]
        # The network's own forward takes a class per image, and the mean of all classes is none.
        levels = len(unet.up_blocks)
        last = decoder_maps(unet, x, t, levels, labels=labels, null_class=self.spec.null_class)[-1]
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(last)))[:, : x.shape[1]]

    @torch.no_grad()
    def encode(self, images: Tensor, *, generator: torch.Generator) -> list[Tensor]:
        if "encode" not in self.modes:
            raise self._cannot("encode")
        return self._maps(images, generator)

    def _maps(self, images: Tensor, generator: torch.Generator) -> list[Tensor]:
        x, t = self._noisy(images, generator)
        steps = len(self.timesteps)  # one by one: memory for one step
        found = [self.walk(now, at) for now, at in zip(x.chunk(steps), t.chunk(steps), strict=True)]
        wanted = [[maps[i] for maps in found for i in places] for places in self._places]
        return [torch.cat(level, dim=1) if len(level) > 1 else level[0] for level in wanted]

    def walk(self, x: Tensor, t: Tensor) -> list[Tensor]:
        """The maps of network inputs x at timesteps t (N,), in the order of the walk."""
        null = self.spec.null_class
        if self.blocks:
            return decoder_outputs(self.unet, x, t, self.blocks, null_class=null)
        return decoder_maps(self.unet, x, t, self._places[0][0] + 1, null_class=null)

    def _noisy(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The network's input for images at every timestep, (T N) x C x H x W, and its t."""
        self.check_size(*images.shape[-2:])
        x0 = self.to_network(images)
        if self.noise == "inversion":
            x = torch.cat([self.invert(x0, t) for t in self.timesteps])
        elif self.noise == "none":
            x = torch.cat([x0] * len(self.timesteps))
        else:
            x = noised(x0, self.alpha_bar[self.t], draw_noise(x0, self.noise, generator))
        return x, self.t.repeat_interleave(len(x0))

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

    def _ddim(
        self, x: Tensor, t: int, a_now: Tensor, a_then: Tensor, *, clip: bool, labels: Tensor | None = None
    ) -> Tensor:
        """One deterministic step between noise levels (Song et al. 2021, eq. 12 with sigma 0)."""
        eps = self.epsilon(x, torch.full((len(x),), t, device=x.device), labels).float()
        a_now, a_then = a_now.to(x.dtype), a_then.to(x.dtype)
        x0 = (x - (1 - a_now).sqrt() * eps) / a_now.sqrt()
        if clip:  # keep the estimate in the range of images
            x0 = x0.clamp(-1, 1)
            eps = (x - a_now.sqrt() * x0) / (1 - a_now).sqrt()
        return a_then.sqrt() * x0 + (1 - a_then).sqrt() * eps

    @torch.no_grad()
    def generate(self, n: int, *, generator: torch.Generator, size: tuple[int, int] | None = None) -> Tensor:
        """n images by deterministic DDIM in `sampling_steps` steps, float RGB in [0, 1].

        A class-conditional network draws a class for each image.
        """
        height, width = size or self.size
        self.check_size(height, width)
        p = self.spec.patch
        shape = (n, self.spec.image_channels * p * p, height // p, width // p)
        x = randn(shape, generator, device=self.alpha_bar.device)
        x = x.contiguous(memory_format=torch.channels_last)
        labels = self._draw_labels(n, generator)
        times = torch.linspace(self.spec.steps - 1, 0, self.sampling_steps).round().long().tolist()
        for now, then in zip(times, [*times[1:], -1], strict=True):
            a_then = self.alpha_bar[then] if then >= 0 else x.new_ones(())
            x = self._ddim(x, now, self.alpha_bar[now], a_then, clip=True, labels=labels)
        return self.to_images(x)

    def _draw_labels(self, n: int, generator: torch.Generator) -> Tensor | None:
        """A class for each of n images, never the null class; none for an unconditional network."""
        if not self.spec.classes:
            return None
        null = self.spec.null_class
        real = self.spec.classes - (null is not None)
        labels = randint(real, (n,), generator, device=self.alpha_bar.device)
        return labels if null is None else labels + (labels >= null)

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        """n new images and the maps of encoding them (a diffusion model has no one pass that gives both).

        The maps are those of unlabelled images, as `encode` gives, so that one student can learn from both.
        """
        if "sample" not in self.modes:
            raise self._cannot("sample")
        images = self.generate(n, generator=generator)
        return images, self._maps(images, generator)


def block_levels(
    unet: UNet2DModel, spec: DiffusionSpec, blocks: tuple[int, ...], steps: int
) -> tuple[list[list[int]], tuple[FeatureSpec, ...]]:
    """Decoder blocks grouped by the stride of their outputs, fine to coarse: places in `blocks`, and the levels.

    Args:
        blocks: ascending, counted from 0 at the coarsest; steps: timesteps, whose maps lie side by side.

    Raises:
        UserError: for a block that the network does not have.
    """
    channels = list(reversed(unet.config["block_out_channels"]))
    a_level = len(cast(UpBlock, unet.up_blocks[0]).resnets)
    most = a_level * len(channels)
    if list(blocks) != sorted(set(blocks)) or not 0 <= blocks[0] <= blocks[-1] < most:
        raise UserError(
            f"Decoder blocks {', '.join(map(str, blocks))} cannot be read: the network has 0 to {most - 1}.",
            "Name them in ascending order, each once.",
        )
    groups: dict[int, list[int]] = {}
    widths: dict[int, int] = {}
    for place, k in enumerate(blocks):
        level, j = divmod(k, a_level)
        enlarged = j + 1 == a_level and level + 1 < len(channels)  # the upsampler that ends the level
        stride = spec.patch * 2 ** (len(channels) - 1 - level - enlarged)
        groups.setdefault(stride, []).append(place)
        widths[stride] = widths.get(stride, 0) + channels[level] * steps
    strides = sorted(groups)
    return [groups[s] for s in strides], tuple(FeatureSpec(f"s{s}", widths[s], s) for s in strides)


def _check_walkable(unet: UNet2DModel, spec: DiffusionSpec, name: str) -> None:
    """Raises UserError for a network that `decoder_maps` cannot run as its own forward does."""
    for block in unet.up_blocks:
        if not isinstance(block, (AttnUpBlock2D, UpBlock2D, ResnetUpsampleBlock2D)):
            raise UserError(
                f"'{name}' has a decoder block of type {type(block).__name__}.",
                "UpBlock2D, AttnUpBlock2D and ResnetUpsampleBlock2D can be read.",
            )
    config = unet.config
    if config["time_embedding_type"] != "positional" or config["center_input_sample"]:
        raise UserError(
            f"'{name}' has time_embedding_type {config['time_embedding_type']} and center_input_sample "
            f"{config['center_input_sample']}.",
            "Networks that take images in [-1, 1] and sinusoids of t can be read.",
        )
    rows = unet.class_embedding.num_embeddings if isinstance(unet.class_embedding, nn.Embedding) else 0
    if rows != spec.classes or (unet.class_embedding is None) == bool(spec.classes):
        raise UserError(
            f"'{name}' embeds {rows} classes, and its spec says {spec.classes}.",
            "Mend 'classes' of 'network' in teacher.json.",
        )
    if spec.null_class is not None and not 0 <= spec.null_class < spec.classes:
        raise UserError(
            f"'{name}' has {spec.classes} classes and no class {spec.null_class} to be the null class.",
            "Mend 'null_class' of 'network' in teacher.json.",
        )


def build_unet(spec: DiffusionSpec) -> UNet2DModel:
    """The network of a spec with fresh weights.

    Raises:
        UserError: when diffusers refuses the settings, or the heads do not divide a width.
    """
    settings = {**spec.unet, "num_class_embeds": spec.classes} if spec.classes else spec.unet
    try:
        if min(spec.patch, spec.image_channels, spec.steps, *spec.size) < 1 or spec.heads == 0:
            raise ValueError("its numbers are those of no network")
        unet = UNet2DModel(**settings)
    except Exception as error:  # diffusers refuses odd settings in many ways
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"The U-Net cannot be built: {reason}", "Mend 'network' in teacher.json.") from None
    if spec.time_width is not None:
        old = unet.time_proj
        unet.time_proj = Timesteps(spec.time_width, old.flip_sin_to_cos, old.downscale_freq_shift)
        unet.time_embedding = TimestepEmbedding(spec.time_width, unet.time_embedding.linear_2.out_features)
    if spec.heads is not None:
        for module in unet.modules():
            if isinstance(module, Attention):
                if module.inner_dim % spec.heads:
                    raise UserError(
                        f"{spec.heads} heads do not divide an attention of {module.inner_dim} channels.",
                        "Mend 'heads' of 'network' in teacher.json.",
                    )
                module.heads = spec.heads
                module.scale = (module.inner_dim // spec.heads) ** -0.5
    return unet


def load(
    weights: Mapping[str, Tensor],
    spec: DiffusionSpec,
    where: Path,
    *,
    name: str,
    licence: str,
    timesteps: tuple[int, ...] = (),
    noise: Noise = "stochastic",
    blocks: tuple[int, ...] = (),
) -> DiffusionTeacher:
    """See `Family`."""
    # On the meta device no memory is taken and no random weight is drawn: ADM-256 has 552 M of them.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        unet = build_unet(spec)
    checkpoint.adopt_exactly(unet, weights, where)
    return DiffusionTeacher(
        unet, spec, name=name, licence=licence, timesteps=timesteps, noise=noise, blocks=blocks
    )
