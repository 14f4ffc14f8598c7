"""The parts of Stable Diffusion that a teacher runs: encoder, and U-Net up to the last level that is wanted."""

from __future__ import annotations

import functools
from typing import Any, Literal, cast

import torch
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

from dreamteacher.runtime.errors import UserError, first_line

Kind = Literal["kl", "tiny"]
VAES: dict[Kind, type[AutoencoderKL | AutoencoderTiny]] = {"kl": AutoencoderKL, "tiny": AutoencoderTiny}
UpBlock = UpBlock2D | CrossAttnUpBlock2D
TOKENS = 77  # of a prompt, padded
TIME_IDS = 6  # what SDXL is told of its image: height and width, crop, height and width again
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


@functools.lru_cache(maxsize=4)  # made once: a copy to a GPU in every pass would wait for it
def time_ids(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What SDXL is told of an image that is neither resized nor cropped: (1, 6), sizes in pixels."""
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=dtype, device=device)


class Network(nn.Module):
    """The parts that run: U-Net without its last layers, the autoencoder's encoder, the prompt's embedding.

    Args:
        unet: keyword arguments of UNet2DConditionModel; vae: of the autoencoder; kind: which one.

    Raises:
        UserError: when diffusers refuses the arguments, or for networks whose forward is another than ours.
    """

    prompt: Tensor
    pooled: Tensor

    def __init__(self, unet: dict[str, Any], vae: dict[str, Any], kind: Kind) -> None:
        super().__init__()
        try:
            self.unet, self.vae = UNet2DConditionModel(**unet), VAES[kind](**vae)
            width = self.unet.config["cross_attention_dim"]
            width = width if isinstance(width, int) else width[0]
            self.register_buffer("prompt", torch.zeros(1, TOKENS, width))
            if self.xl:
                config = self.unet.config  # the embedding takes the pooled prompt and the sizes
                sizes = TIME_IDS * config["addition_time_embed_dim"]
                pooled = config["projection_class_embeddings_input_dim"] - sizes
                self.register_buffer("pooled", torch.zeros(1, pooled))
        except (ValueError, TypeError, RuntimeError, LookupError, ZeroDivisionError) as error:
            raise UserError(
                f"The networks cannot be built: {type(error).__name__} {first_line(error)}",
                "Mend 'network' in teacher.json, or convert the published files again.",
            ) from None
        _check_walkable(self.unet, self.vae)
        self.unet.conv_norm_out = self.unet.conv_out = None  # type: ignore[assignment]
        del self.vae.decoder
        if isinstance(self.vae, AutoencoderKL):
            self.vae.post_quant_conv = None

    @property
    def xl(self) -> bool:
        """Whether the U-Net is told of sizes and of the pooled prompt (SDXL)."""
        return self.unet.config["addition_embed_type"] == "text_time"

    @property
    def latent_stride(self) -> int:
        """Pixels of the encoder's input per latent: 8 for all published networks."""
        tiny = isinstance(self.vae, AutoencoderTiny)
        return 2 ** (len(self.vae.config["num_encoder_blocks" if tiny else "block_out_channels"]) - 1)

    def stop_after(self, count: int) -> None:
        """Drops what runs after the first `count` decoder levels, counted from the coarsest."""
        self.unet.up_blocks = self.unet.up_blocks[:count]
        cast(UpBlock, self.unet.up_blocks[-1]).upsamplers = None  # type: ignore[assignment]

    def dropped(self) -> tuple[str, ...]:
        """How the published keys begin that have no place here."""
        count, whole = len(self.unet.up_blocks), len(self.unet.config["block_out_channels"])
        beyond = [f"unet.up_blocks.{i}." for i in range(count, whole)]
        ends = ("unet.conv_norm_out.", "unet.conv_out.", "vae.decoder.", "vae.post_quant_conv.")
        return (*ends, *beyond, f"unet.up_blocks.{count - 1}.upsamplers.")


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
