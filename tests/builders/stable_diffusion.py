"""Tiny Stable Diffusions with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamteacher.teachers.stable_diffusion.teacher import (
    StableDiffusionSpec,
    StableDiffusionTeacher,
    build_network,
    load,
)

CROSS, PLAIN = ("CrossAttnDownBlock2D", "DownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")


def unet(widths: list[int], attention: list[bool], **options: Any) -> dict[str, Any]:
    """Arguments of UNet2DConditionModel; widths and whether there is attention, fine to coarse."""
    return {
        "sample_size": 16,
        "block_out_channels": widths,
        "layers_per_block": 1,
        "down_block_types": [CROSS[0] if a else CROSS[1] for a in attention],
        "up_block_types": [PLAIN[0] if a else PLAIN[1] for a in reversed(attention)],
        "norm_num_groups": 4,
        **options,
    }


LIKE_SD = [True, True, True, False]
UNETS = {
    "small": unet([8, 8], [True, False], cross_attention_dim=12),
    "sd1": unet([8, 8, 16, 16], LIKE_SD, cross_attention_dim=12, attention_head_dim=2),
    "sd2": unet(
        [8, 8, 16, 16], LIKE_SD, cross_attention_dim=16, attention_head_dim=[1, 2, 2, 4],
        use_linear_projection=True,
    ),
    "sdxl": unet(
        [8, 16, 16], [False, True, True], cross_attention_dim=22, attention_head_dim=[1, 2, 4],
        transformer_layers_per_block=[1, 2, 3], use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=10 + 6 * 4,
    ),
    "plain-mid": unet([8, 8], [True] * 2, cross_attention_dim=12, mid_block_type="UNetMidBlock2D", layers_per_block=2),
    "no-mid": unet([8, 8], [False, True], cross_attention_dim=12, mid_block_type=None),
}  # fmt: skip
STRIDES = {kind: (4, 8, 16, 32)[: len(config["block_out_channels"])] for kind, config in UNETS.items()}
KL = {
    "block_out_channels": [4, 4, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.2,
}
TAESD = {
    "encoder_block_out_channels": [4] * 4,
    "decoder_block_out_channels": [4] * 4,
    "num_encoder_blocks": [1, 1, 1, 1],
    "num_decoder_blocks": [1, 1, 1, 1],
}


def spec_of(kind: str = "small", **options: Any) -> StableDiffusionSpec:
    fields = {"unet": UNETS[kind], "vae": KL, "scaling_factor": 0.2, "size": (64, 64)}
    return StableDiffusionSpec(**(fields | options))


def weights_of(spec: StableDiffusionSpec) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network(spec)
        for name, buffer in network.named_buffers():
            assert name in ("prompt", "pooled")
            buffer.normal_()
        return network.state_dict()


def make(
    kind: str = "small", *, options: dict[str, Any] | None = None, **asked: Any
) -> StableDiffusionTeacher:
    spec = spec_of(kind, **(options or {}))
    return load(weights_of(spec), spec, Path("memory"), name=kind, licence="-", **asked)
