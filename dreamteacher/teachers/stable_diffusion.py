"""Stable Diffusion teachers: decoder maps of a text-conditional U-Net in the latent space of an autoencoder.

The networks are diffusers' `UNet2DConditionModel` with `AutoencoderKL` or `AutoencoderTiny` (TAESD).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from dreamteacher import checkpoint
from dreamteacher.config import from_json
from dreamteacher.errors import UserError
from dreamteacher.features import FeatureSpec
from dreamteacher.teachers.adm import read_weights
from dreamteacher.teachers.base import STRIDES, Noise, Teacher
from dreamteacher.teachers.diffusion import Schedule, alphas_cumprod, noised
from dreamteacher.teachers.stable_diffusion_files import (
    check_parts,
    embed_prompt,
    part_weights,
    read_config,
    schedule_steps,
)
from dreamteacher.teachers.vae import ORIGINAL, modern_attention, tiny_from_original
from dreamteacher.teachers.vae import latents as vae_latents

UpBlock = UpBlock2D | CrossAttnUpBlock2D
TOKENS = 77  # of a prompt, padded
TIME_IDS = 6  # what SDXL is told of its image: height and width, crop, height and width again
CLEAN_TIMESTEP = 261  # at which CleanDIFT's networks take images without noise
# Arguments of the U-Net that change its forward; all published Stable Diffusion networks have these values.
PLAIN: dict[str, Any] = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_act_fn": None,
    "time_cond_proj_dim": None,
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim": None,
    "dual_cross_attention": False,
    "attention_type": "default",
}


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

    unet: dict[str, Any]
    vae: dict[str, Any]
    vae_kind: Literal["kl", "tiny"] = "kl"
    scaling_factor: float = 0.18215
    enlarge: int = 2
    size: tuple[int, int] = (256, 256)
    schedule: Schedule = "scaled_linear"
    steps: int = 1000
    timestep: int = 150
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


def decoder_maps(
    unet: UNet2DConditionModel,
    x: Tensor,
    t: Tensor,
    context: Tensor,
    count: int,
    added: tuple[Tensor, Tensor] | None = None,
) -> list[Tensor]:
    """The maps of the first `count` decoder levels, each BEFORE its upsampler, coarse to fine.

    The walk stops there: nothing after the last wanted map is computed.

    Args:
        x: noisy latents, N x C x h x w; t: timesteps (N,); context: the prompt's embedding, N x 77 x D.
        count: decoder levels to take, counted from the coarsest.
        added: for SDXL the pooled prompt (N, P) and the six sizes (N, 6); see `time_ids`.

    Test: equal (0.0) to what the network's own full forward computes at those places.
    """
    emb = unet.time_embedding(unet.time_proj(t).to(x.dtype))
    if added is not None:
        pooled, sizes = added
        parts = unet.add_time_proj(sizes.flatten()).reshape(len(sizes), -1)
        emb = emb + unet.add_embedding(torch.cat([pooled, parts], dim=-1).to(emb.dtype))
    x = unet.conv_in(x)
    skips = [x]
    for down in unet.down_blocks:
        if isinstance(down, CrossAttnDownBlock2D):
            x, new = down(hidden_states=x, temb=emb, encoder_hidden_states=context)
        else:
            x, new = down(hidden_states=x, temb=emb)
        skips += new
    if isinstance(unet.mid_block, UNetMidBlock2DCrossAttn):
        x = unet.mid_block(x, emb, encoder_hidden_states=context)
    elif unet.mid_block is not None:
        x = unet.mid_block(x, emb)
    maps: list[Tensor] = []
    for i in range(count):
        up = cast(UpBlock, unet.up_blocks[i])
        attentions = up.attentions if isinstance(up, CrossAttnUpBlock2D) else [None] * len(up.resnets)
        for resnet, attention in zip(up.resnets, attentions, strict=True):
            x = resnet(torch.cat([x, skips.pop()], dim=1), emb)
            if attention is not None:
                x = attention(x, encoder_hidden_states=context, return_dict=False)[0]
        maps.append(x)
        if i + 1 < count and up.upsamplers is not None:
            for upsampler in up.upsamplers:
                x = upsampler(x)
    return maps


def time_ids(height: int, width: int, like: Tensor) -> Tensor:
    """What SDXL is told of an image that is neither resized nor cropped: (1, 6), sizes in pixels."""
    return like.new_tensor([[height, width, 0, 0, height, width]])


def levels_of(spec: StableDiffusionSpec) -> tuple[list[tuple[int, FeatureSpec]], int]:
    """(place among the decoder levels, FeatureSpec) of every level that is taken, coarse to fine; and the number
    that heights and widths must be multiples of.

    Raises:
        UserError: where no level lies at stride 4, 8, 16 or 32 of the image.
    """
    widths = list(reversed(spec.unet.get("block_out_channels", (320, 640, 1280, 1280))))
    if spec.vae_kind == "tiny":
        halvings = len(spec.vae.get("num_encoder_blocks", (1, 3, 3, 3))) - 1
    else:
        halvings = len(spec.vae.get("block_out_channels", (64,))) - 1
    coarse = 2 ** (halvings + len(widths) - 1)  # stride of the coarsest level in the enlarged image
    taken, strides = [], [coarse / 2**i / spec.enlarge for i in range(len(widths))]
    for i, (stride, channels) in enumerate(zip(strides, widths, strict=True)):
        if stride in STRIDES:
            taken.append((i, FeatureSpec(f"s{int(stride)}", channels, int(stride))))
    if not taken:
        raise UserError(
            f"With images enlarged by {spec.enlarge}, no level lies at stride 4, 8, 16 or 32: "
            f"{', '.join(f'{s:g}' for s in strides)}.",
            "Stable Diffusion's own is enlarge 2.",
        )
    return taken, coarse // math.gcd(coarse, spec.enlarge)


class Network(nn.Module):
    """The parts that run: U-Net without what follows its last wanted level, encoder, embedding of the prompt.

    Args:
        spec: what to build; its weights are drawn as any module's.

    Raises:
        UserError: when diffusers refuses the settings, or for networks whose forward is not the one written here.
    """

    prompt: Tensor
    pooled: Tensor

    def __init__(self, spec: StableDiffusionSpec) -> None:
        super().__init__()
        kind: type[AutoencoderKL | AutoencoderTiny]
        kind = AutoencoderTiny if spec.vae_kind == "tiny" else AutoencoderKL
        try:
            unet, vae = UNet2DConditionModel(**spec.unet), kind(**spec.vae)
        except (ValueError, TypeError, RuntimeError, LookupError, ZeroDivisionError) as error:
            raise UserError(
                f"The networks cannot be built: {type(error).__name__} {str(error).splitlines()[0]}",
                "Mend 'network' in teacher.json, or convert the published files again.",
            ) from None
        _check_walkable(unet, vae)
        levels, _ = levels_of(spec)
        unet.up_blocks = unet.up_blocks[: levels[-1][0] + 1]
        cast(UpBlock, unet.up_blocks[-1]).upsamplers = None  # type: ignore[assignment]
        unet.conv_norm_out = unet.conv_out = None  # type: ignore[assignment]
        del vae.decoder
        if isinstance(vae, AutoencoderKL):
            vae.post_quant_conv = None
        self.unet, self.vae = unet, vae
        width = unet.config["cross_attention_dim"]
        width = width if isinstance(width, int) else width[0]
        self.register_buffer("prompt", torch.zeros(1, TOKENS, width))
        if unet.config["addition_embed_type"] == "text_time":
            sizes = TIME_IDS * unet.config["addition_time_embed_dim"]
            wide = unet.config["projection_class_embeddings_input_dim"] - sizes
            self.register_buffer("pooled", torch.zeros(1, wide))

    @property
    def xl(self) -> bool:
        """Whether the U-Net is told of sizes and the pooled prompt (SDXL)."""
        return self.unet.config["addition_embed_type"] == "text_time"


def _check_walkable(unet: UNet2DConditionModel, vae: AutoencoderKL | AutoencoderTiny) -> None:
    """Raises UserError for networks that `decoder_maps` and `latents` do not run as the library does."""
    known = (CrossAttnDownBlock2D, DownBlock2D, CrossAttnUpBlock2D, UpBlock2D)
    mids = (UNetMidBlock2DCrossAttn, UNetMidBlock2D, type(None))
    odd = [type(b).__name__ for b in (*unet.down_blocks, *unet.up_blocks) if not isinstance(b, known)]
    odd += [] if isinstance(unet.mid_block, mids) else [type(unet.mid_block).__name__]
    problem = f"blocks of type {odd[0]}" if odd else ""
    for key, value in PLAIN.items():
        if unet.config[key] != value:
            problem = f"{key} {unet.config[key]}"
    if unet.config["addition_embed_type"] not in (None, "text_time"):
        problem = f"addition_embed_type {unet.config['addition_embed_type']}"
    if vae.config.get("shift_factor") or vae.config.get("latents_mean") or vae.config.get("latents_std"):
        problem = "an autoencoder whose latents are shifted"
    if unet.config["in_channels"] != vae.config["latent_channels"]:
        problem = (
            f"a U-Net of {unet.config['in_channels']} channels on latents of {vae.config['latent_channels']}"
        )
    if problem:
        raise UserError(
            f"The network has {problem}, which cannot be read.",
            "Use Stable Diffusion 1.x, 2.x or SDXL (base), not its inpainting, refiner or other variants.",
        )


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

    family = "stable-diffusion"
    alpha_bar: Tensor

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
        self._levels, self.multiple = levels_of(spec)
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
        x0 = latents.contiguous(memory_format=torch.channels_last)  # kept or fresh, the same last bits
        steps = torch.tensor(self.timesteps, device=x0.device)
        if self.noise == "none":
            x = torch.cat([x0] * len(self.timesteps))
        else:
            x = noised(x0, self.alpha_bar[steps], self._draw(x0, generator))
        added = None
        if self.network.xl:
            height, width = (s * 2**self._halvings for s in x0.shape[-2:])
            sizes = time_ids(height, width, x0)
            added = self.network.pooled.expand(len(x), -1), sizes.expand(len(x), -1)
        context = self.network.prompt.expand(len(x), -1, -1)
        t = steps.repeat_interleave(len(x0))
        maps = decoder_maps(self.network.unet, x, t, context, self._levels[-1][0] + 1, added)
        wanted = [maps[i] for i, _ in reversed(self._levels)]
        if len(self.timesteps) == 1:
            return wanted
        return [torch.cat(m.chunk(len(self.timesteps)), dim=1) for m in wanted]

    def encode(self, images: Tensor, *, generator: torch.Generator) -> list[Tensor]:
        return self.encode_latents(self.latents(images), generator=generator)

    def _draw(self, x0: Tensor, generator: torch.Generator) -> Tensor:
        if self.noise == "fixed":  # the same noise for every call, every image, every device
            fixed = torch.randn((1, *x0.shape[1:]), generator=torch.Generator().manual_seed(0))
            return fixed.to(x0).expand_as(x0)
        return torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
