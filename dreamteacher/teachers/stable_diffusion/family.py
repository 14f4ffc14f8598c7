"""The family "stable-diffusion": text-conditional U-Nets in the latent space of an autoencoder."""

from __future__ import annotations

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from dreamteacher.teachers.cost import channels_by_stride, gmacs
from dreamteacher.teachers.family import Cost, Family
from dreamteacher.teachers.stable_diffusion.network import decoder_maps, time_ids
from dreamteacher.teachers.stable_diffusion.teacher import (
    StableDiffusionSpec,
    StableDiffusionTeacher,
    build_network,
    convert,
    load,
)
from dreamteacher.teachers.vae import latents


def cost(spec: StableDiffusionSpec) -> Cost:
    """Of the encoder and a denoising step, and of its part up to the finest level."""
    height, width = (side * spec.enlarge for side in spec.size)
    with torch.device("meta"):
        network = build_network(spec)
        whole = UNet2DConditionModel(**spec.unet)
        image = torch.empty(1, 3, height, width)
        t = torch.zeros(1, dtype=torch.long)
        ids = time_ids(height, width, torch.device("meta"), torch.float32)
    teacher = StableDiffusionTeacher(network, spec, name="", licence="")
    z = latents(network.vae, image)
    prompt, count = network.prompt.to("meta"), len(network.unet.up_blocks)
    added = (network.pooled.to("meta"), ids) if network.xl else None
    told = {"text_embeds": added[0], "time_ids": added[1]} if added else None
    encoder = gmacs(lambda: latents(network.vae, image))
    full = gmacs(lambda: whole(z, t, encoder_hidden_states=prompt, added_cond_kwargs=told))
    needed = gmacs(lambda: decoder_maps(network.unet, z, t, prompt, count, added))
    return Cost(channels_by_stride(teacher.specs), ("encode",), encoder + full, encoder + needed)


def tiny() -> tuple[dict[str, Tensor], StableDiffusionSpec]:
    """A network like Stable Diffusion 2's, of 64 px, with levels at strides 4 to 32 of 8 and 16 channels."""
    spec = StableDiffusionSpec(
        unet={
            "sample_size": 16,
            "block_out_channels": [8, 8, 16, 16],
            "layers_per_block": 1,
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
            "attention_head_dim": [1, 2, 2, 4],
            "use_linear_projection": True,
        },
        vae={
            "block_out_channels": [4, 4, 8, 8],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "norm_num_groups": 4,
            "scaling_factor": 0.2,
        },
        scaling_factor=0.2,
        size=(64, 64),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network(spec)
        network.prompt.normal_()
        return network.state_dict(), spec


FAMILY = Family(
    name="stable-diffusion",
    spec=StableDiffusionSpec,
    load=load,
    settings=frozenset({"timesteps", "noise"}),
    convert={"stable-diffusion": convert},
    tiny=tiny,
    cost=cost,
)
