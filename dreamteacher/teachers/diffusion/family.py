"""The family "diffusion": pixel-space U-Nets (ADM, DDPM and what `train-teacher` trains)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dreamteacher.teachers.cost import channels_by_stride, gmacs
from dreamteacher.teachers.diffusion import adm
from dreamteacher.teachers.diffusion.teacher import DiffusionSpec, DiffusionTeacher, build_unet, load
from dreamteacher.teachers.diffusion.walk import decoder_maps
from dreamteacher.teachers.family import Cost, Family


def cost(spec: DiffusionSpec) -> Cost:
    """Of a denoising step, and of its part up to the finest level."""
    p = spec.patch
    with torch.device("meta"):
        unet = build_unet(spec)
        teacher = DiffusionTeacher(unet, spec, name="", licence="")
        x = torch.empty(1, spec.image_channels * p * p, spec.size[0] // p, spec.size[1] // p)
        t = torch.zeros(1, dtype=torch.long)
    # The coarsest level is up_blocks[0]; strides halve from there to `patch`.
    count = len(unet.up_blocks) - int(math.log2(teacher.specs[0].stride // p))
    full = gmacs(lambda: unet(x, t, t if spec.classes else None))
    needed = gmacs(lambda: decoder_maps(unet, x, t, count))
    return Cost(channels_by_stride(teacher.specs), ("encode", "sample"), full, needed)


def tiny() -> tuple[dict[str, Tensor], DiffusionSpec]:
    """A network like ADM's, of 64 px: residual resampling, 3 classes, 2 heads; levels at strides 4 to 32."""
    down, up = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
    spec = DiffusionSpec(
        unet={
            "sample_size": 64,
            "in_channels": 3,
            "out_channels": 6,
            "block_out_channels": [32] * 6,
            "layers_per_block": 1,
            "down_block_types": [down] * 4 + ["AttnDownBlock2D"] * 2,
            "up_block_types": ["AttnUpBlock2D"] * 2 + [up] * 4,
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "resnet_time_scale_shift": "scale_shift",
            "attention_head_dim": None,
            "norm_num_groups": 32,
            "attn_norm_num_groups": 32,
        },
        timestep=50,
        heads=2,
        classes=3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_unet(spec).state_dict(), spec


FAMILY = Family(
    name="diffusion",
    spec=DiffusionSpec,
    load=load,
    settings=frozenset({"timesteps", "noise", "blocks"}),
    convert={"adm": adm.convert, "ddpm": adm.convert_diffusers},
    tiny=tiny,
    cost=cost,
)
