"""Stable Diffusion teachers: decoder maps of a text-conditional U-Net in the latent space of an autoencoder.

The networks are diffusers' `UNet2DConditionModel` with `AutoencoderKL` or `AutoencoderTiny` (TAESD).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.config import from_json
from dreamteacher.runtime.errors import UserError
from dreamteacher.spec import FeatureSpec, Noise
from dreamteacher.teachers.base import STRIDES, Teacher
from dreamteacher.teachers.diffusers_folder import arguments_of, read_config
from dreamteacher.teachers.diffusion.adm import read_schedule
from dreamteacher.teachers.diffusion.teacher import Schedule, alphas_cumprod, draw_noise, noised
from dreamteacher.teachers.stable_diffusion.files import (
    check_pipeline,
    embed_prompt,
    read_file,
    read_vae,
)
from dreamteacher.teachers.stable_diffusion.network import Kind, Network, decoder_maps, time_ids
from dreamteacher.teachers.vae import latents as vae_latents
from dreamteacher.teachers.vae import part_weights

TIMESTEP = 150  # ours: the paper does not state it for Stable Diffusion; its t for ImageNet
CLEAN_TIMESTEP = 261  # at which CleanDIFT's networks take images without noise


@dataclass(frozen=True, kw_only=True)
class StableDiffusionSpec:
    """Everything that rebuilds the two networks and is not in their weights (teacher.json, "network").

    Args:
        unet: keyword arguments of UNet2DConditionModel; vae: of the autoencoder.
        vae_kind: kl (AutoencoderKL) or tiny (AutoencoderTiny, TAESD).
        scaling_factor: latents are multiplied by it (0.18215; SDXL 0.13025; TAESD 1).
        enlarge: images are enlarged by this first: the autoencoder reduces by 8 and the decoder's levels lie at
            1 to 8 times that, so 2 puts them on strides 4, 8, 16, 32 of the image.
        size: (height, width) in pixels of the images, before they are enlarged.
        schedule, steps: of the noise.
        timestep: t at which features are taken unless the user names another. The paper does not state it for
            Stable Diffusion; ours is 150, its t for ImageNet.
        clean: the U-Net was trained to take images without noise, at `timestep` alone (CleanDIFT, t = 261).
        prompt: what the kept embedding says; empty, as no guidance is wanted.
    """

    family: ClassVar[str] = "stable-diffusion"
    unet: dict[str, Any]
    vae: dict[str, Any]
    vae_kind: Kind = "kl"
    scaling_factor: float = 0.18215
    enlarge: int = 2
    size: tuple[int, int] = (256, 256)
    schedule: Schedule = "scaled_linear"
    steps: int = 1000
    timestep: int = TIMESTEP
    clean: bool = False
    prompt: str = ""


@dataclass(frozen=True, kw_only=True)
class StableDiffusionSettings:
    """What may be asked of a pipeline folder.

    Args:
        prompt: to condition on; at most 75 tokens.
        vae: a folder or file of another autoencoder in the place of the pipeline's (TAESD: 9 times cheaper).
        unet: a safetensors file in the place of the U-Net's weights (CleanDIFT).
        clean: that file is CleanDIFT's: no noise, t = 261.
        timestep: t of the features; none: 150, or 261 where `clean`.
        size: (height, width) of the images in pixels; none: what the U-Net was trained at, over `enlarge`.
        enlarge: see StableDiffusionSpec.
    """

    prompt: str = ""
    vae: str = ""
    unet: str = ""
    clean: bool = False
    timestep: int | None = None
    size: tuple[int, int] | None = None
    enlarge: int = 2


def levels_of(network: Network, enlarge: int) -> tuple[list[tuple[int, FeatureSpec]], int]:
    """The levels that a teacher takes, and what its heights and widths must be multiples of.

    Returns: (place among the decoder's levels, FeatureSpec), coarse to fine; the multiple, in pixels.

    Raises:
        UserError: where no level lies at stride 4, 8, 16 or 32 of the image.
    """
    widths = list(reversed(network.unet.config["block_out_channels"]))
    coarse = network.latent_stride * 2 ** (len(widths) - 1)  # stride of the coarsest in the enlarged image
    taken, strides = [], [coarse / 2**i / enlarge for i in range(len(widths))]
    for i, (stride, channels) in enumerate(zip(strides, widths, strict=True)):
        if stride in STRIDES:
            taken.append((i, FeatureSpec(f"s{int(stride)}", channels, int(stride))))
    if not taken:
        raise UserError(
            f"With images enlarged by {enlarge}, no level lies at stride 4, 8, 16 or 32: "
            f"{', '.join(f'{s:g}' for s in strides)}.",
            "Stable Diffusion's own is enlarge 2.",
        )
    return taken, coarse // math.gcd(coarse, enlarge)


def build_network(spec: StableDiffusionSpec) -> Network:
    """The networks of a spec with fresh weights, cut after the last level that is taken."""
    if spec.enlarge < 1:
        raise UserError(f"Images cannot be enlarged by {spec.enlarge}.", "Use a whole number from 1.")
    network = Network(spec.unet, spec.vae, spec.vae_kind)
    levels, _ = levels_of(network, spec.enlarge)
    network.stop_after(levels[-1][0] + 1)
    return network


class StableDiffusionTeacher(Teacher):
    """Feature maps of Stable Diffusion's U-Net at one or several timesteps, without guidance.

    An image is enlarged (bicubic as Pillow's, clamped to [0, 1]), encoded to the mode of its posterior, noised,
    and passes the U-Net once, up to the last wanted level. Of a network that predicts v the features are the
    same places: what it predicts is made after them.

    Args:
        network: its two networks; they become the teacher's own.
        spec: how images enter them.
        timesteps: t of the features; several are concatenated on channels, sharing one noise draw.
        noise: "stochastic" (fresh at every call), "fixed" (one noise image for all) or "none" (x_t = x_0). With
            `spec.clean` always "none".

    Raises:
        UserError: for timesteps out of range, noise that the network cannot take, or sizes that do not divide.
    """

    family = StableDiffusionSpec.family
    alpha_bar: Tensor
    t: Tensor
    compile_targets = ("latents", "walk")

    def __init__(
        self,
        network: Network,
        spec: StableDiffusionSpec,
        *,
        name: str,
        licence: str,
        timesteps: tuple[int, ...] = (),
        noise: Noise = "stochastic",
    ) -> None:
        super().__init__()
        self.network, self.spec, self.name, self.licence = network, spec, name, licence
        self.modes, self.size = frozenset({"encode"}), spec.size
        self.timesteps = timesteps or (spec.timestep,)
        # "stochastic" is what is passed when nothing was asked for.
        self.noise: Noise = "none" if spec.clean and noise == "stochastic" else noise
        self._check_noise()
        self.register_buffer("alpha_bar", alphas_cumprod(spec.schedule, spec.steps), persistent=False)
        self.register_buffer("t", torch.tensor(self.timesteps), persistent=False)
        self._levels, self.multiple = levels_of(network, spec.enlarge)
        self.specs = tuple(
            replace(level, channels=level.channels * len(self.timesteps))
            for _, level in reversed(self._levels)
        )
        self.check_size(*self.size)
        self.freeze()

    def _check_noise(self) -> None:
        """Raises UserError for timesteps or noise that the network was not made for."""
        spec = self.spec
        for t in self.timesteps:
            if not 0 <= t < spec.steps:
                raise UserError(f"Timestep {t} is out of range.", f"Use 0 to {spec.steps - 1}.")
        if spec.clean and (self.noise != "none" or self.timesteps != (spec.timestep,)):
            steps = ", ".join(str(t) for t in self.timesteps)
            raise UserError(
                f"'{self.name}' was trained for images without noise at t = {spec.timestep} alone, "
                f"not for noise {self.noise} at t = {steps}.",
                "Leave timesteps and noise out.",
            )
        if self.noise == "inversion":
            raise UserError(
                f"'{self.name}' cannot invert images: that takes the end of the U-Net, which is not kept.",
                "Use noise stochastic, fixed or none.",
            )

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Scaled latents of images, float32 N x C x h x w; no random number is drawn, so they can be kept.

        Args:
            images: as `encode` takes them.

        Test: equal to the library's posterior mode times the scaling factor.
        """
        self.check_size(*images.shape[-2:])
        x = images
        if self.spec.enlarge > 1:
            x = F.interpolate(x, scale_factor=self.spec.enlarge, mode="bicubic", antialias=True).clamp(0, 1)
        x = (x * 2 - 1).contiguous(memory_format=torch.channels_last)
        return vae_latents(self.network.vae, x).float() * self.spec.scaling_factor

    @torch.no_grad()
    def encode_latents(self, latents: Tensor, *, generator: torch.Generator) -> list[Tensor]:
        """Feature maps of images by their latents, as `encode` gives them.

        Args:
            latents: what `latents` gave.
        """
        x0 = latents.float()
        if self.noise == "none":
            x = torch.cat([x0] * len(self.timesteps))
        else:
            x = noised(x0, self.alpha_bar[self.t], draw_noise(x0, self.noise, generator))
        # In one layout, so that kept latents give the same last bits as fresh ones.
        x = x.contiguous(memory_format=torch.channels_last)
        added = None
        if self.network.xl:
            height, width = (side * self.network.latent_stride for side in x0.shape[-2:])
            sizes = time_ids(height, width, x0.device, x0.dtype)
            added = self.network.pooled.expand(len(x), -1), sizes.expand(len(x), -1)
        context = self.network.prompt.expand(len(x), -1, -1)
        maps = self.walk(x, self.t.repeat_interleave(len(x0)), context, added)
        wanted = [maps[i] for i, _ in reversed(self._levels)]
        if len(self.timesteps) == 1:
            return wanted
        return [torch.cat(m.chunk(len(self.timesteps)), dim=1) for m in wanted]

    def walk(
        self, x: Tensor, t: Tensor, context: Tensor, added: tuple[Tensor, Tensor] | None
    ) -> list[Tensor]:
        """The U-Net's maps of noisy latents x at timesteps t (N,), coarse to fine; see `decoder_maps`."""
        return decoder_maps(self.network.unet, x, t, context, self._levels[-1][0] + 1, added)

    def encode(self, images: Tensor, *, generator: torch.Generator) -> list[Tensor]:
        return self.encode_latents(self.latents(images), generator=generator)


def load(
    weights: Mapping[str, Tensor],
    spec: StableDiffusionSpec,
    where: Path,
    *,
    name: str,
    licence: str,
    timesteps: tuple[int, ...] = (),
    noise: Noise = "stochastic",
) -> StableDiffusionTeacher:
    """See `Family`; weights: "unet." and "vae." of the parts that run, "prompt" and for SDXL "pooled"."""
    # On the meta device no memory is taken and no random weight is drawn: SDXL has 2.6 G of them.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        network = build_network(spec)
    checkpoint.adopt_exactly(network, weights, where)
    return StableDiffusionTeacher(network, spec, name=name, licence=licence, timesteps=timesteps, noise=noise)


def convert(path: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Tensor], StableDiffusionSpec]:
    """Weights of the parts that run, in the precision of their files, and spec of a local pipeline.

    The prompt is encoded here, once, and its embedding kept with the weights; the text encoder is not.

    Args:
        path: a folder in diffusers' layout: unet/, vae/, text_encoder/, tokenizer/, scheduler/, for SDXL also
            text_encoder_2/ and tokenizer_2/; safetensors, full or half (fp16) precision.
        settings: see StableDiffusionSettings.
    """
    asked = from_json(StableDiffusionSettings, dict(settings))
    check_pipeline(path, ("unet", "text_encoder") if asked.vae else ("unet", "text_encoder", "vae"))
    _, config = read_config(
        path / "unet",
        ["UNet2DConditionModel"],
        repair="Download the whole folder again.",
        others="Stable Diffusion 1.x, 2.x and SDXL can be read, in diffusers' layout.",
    )
    unet = arguments_of(UNet2DConditionModel, config)
    kind, vae, encoder = read_vae(Path(asked.vae) if asked.vae else path / "vae")
    # What is predicted is of no consequence: features are taken before the last layer.
    _, steps, _ = read_schedule(path / "scheduler" / "scheduler_config.json", ["scaled_linear"])
    usual = CLEAN_TIMESTEP if asked.clean else TIMESTEP
    spec = StableDiffusionSpec(
        unet=unet,
        vae=vae,
        vae_kind=kind,
        enlarge=asked.enlarge,
        steps=steps,
        timestep=usual if asked.timestep is None else asked.timestep,
        clean=asked.clean,
        prompt=asked.prompt,
    )
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        network = build_network(spec)
    side = unet.get("sample_size") or 64
    sides = (side, side) if isinstance(side, int) else side
    height, width = (s * network.latent_stride // asked.enlarge for s in sides)
    spec = replace(
        spec, size=asked.size or (height, width), scaling_factor=network.vae.config["scaling_factor"]
    )
    StableDiffusionTeacher(network, spec, name=path.name, licence="")  # raises for what we cannot run
    body = read_file(Path(asked.unet)) if asked.unet else part_weights(path / "unet")
    weights = {f"unet.{k}": v for k, v in body.items()} | {f"vae.{k}": v for k, v in encoder.items()}
    weights = {k: v for k, v in weights.items() if not k.startswith(network.dropped())}
    weights |= embed_prompt(path, asked.prompt, xl=network.xl)
    checkpoint.check_fits(network, weights, path)
    return weights, spec
