"""Walking a pixel-space U-Net's decoder and stopping after the last map that is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_blocks import AttnUpBlock2D, ResnetUpsampleBlock2D, UpBlock2D
from torch import Tensor, nn

from dreamteacher.runtime.errors import UserError

UpBlock = UpBlock2D | AttnUpBlock2D | ResnetUpsampleBlock2D


def time_embedding(
    unet: UNet2DModel, t: Tensor, *, labels: Tensor | None = None, null_class: int | None = None
) -> Tensor:
    """The network's embedding of timesteps t (N,), as in its own forward: N x D.

    Args:
        labels: class of each image (N,), for class-conditional networks; none: unlabelled.
        null_class: what unlabelled images take; none: the mean of all classes (see DiffusionSpec).
    """
    emb = unet.time_embedding(unet.time_proj(t).to(unet.dtype))
    if unet.class_embedding is None:
        return emb
    table = cast(nn.Embedding, unet.class_embedding)
    if labels is not None:
        return emb + table(labels)
    return emb + (table.weight.mean(0) if null_class is None else table.weight[null_class])


def _upsample(up: UpBlock, x: Tensor, emb: Tensor) -> Tensor:
    with_time = isinstance(up, ResnetUpsampleBlock2D) or (
        isinstance(up, AttnUpBlock2D) and up.upsample_type == "resnet"
    )
    for upsampler in cast(nn.ModuleList, up.upsamplers):
        x = upsampler(x, temb=emb) if with_time else upsampler(x)
    return x


def _walk(unet: UNet2DModel, x: Tensor, emb: Tensor, wanted: Sequence[int], *, before: bool) -> list[Tensor]:
    """Outputs of the `wanted` decoder blocks, in network order; what follows the last is not computed.

    A decoder block is a residual block and its attention, and the upsampler if it ends a level; they are
    counted from the coarsest. `before`: without the upsampler.
    """
    x = unet.conv_in(x)
    skips = [x]
    for down in unet.down_blocks:
        x, new = down(hidden_states=x, temb=emb)
        skips += new
    if unet.mid_block is not None:
        x = unet.mid_block(x, emb)
    a_level = len(cast(UpBlock, unet.up_blocks[0]).resnets)
    outputs, last = [], max(wanted)
    for k in range(last + 1):
        up, j = cast(UpBlock, unet.up_blocks[k // a_level]), k % a_level
        x = up.resnets[j](torch.cat([x, skips.pop()], dim=1), emb)
        if isinstance(up, AttnUpBlock2D):
            x = up.attentions[j](x)
        if before and k in wanted:
            outputs.append(x)
        if j + 1 == a_level and up.upsamplers is not None and not (before and k == last):
            x = _upsample(up, x, emb)
        if not before and k in wanted:
            outputs.append(x)
    return outputs


def decoder_maps(
    unet: UNet2DModel,
    x: Tensor,
    t: Tensor,
    count: int,
    *,
    labels: Tensor | None = None,
    null_class: int | None = None,
) -> list[Tensor]:
    """The last block's output of the first `count` decoder levels, each BEFORE its upsampler, coarse to fine.

    The walk stops there: nothing after the last wanted map is computed.

    Args:
        x: network input, N x C x H x W; t: timesteps (N,).
        count: decoder levels to take, counted from the coarsest.
        labels, null_class: see `time_embedding`.

    Source: the paper's "decoder blocks 3, 6, 9, 12" at strides 32 to 4 (spec: before the up-sampling block).
    Test: equal (0.0) to what the network's own full forward computes at those places. Golden: adm_*.
    """
    emb = time_embedding(unet, t, labels=labels, null_class=null_class)
    a_level = len(cast(UpBlock, unet.up_blocks[0]).resnets)
    return _walk(unet, x, emb, [a_level * (i + 1) - 1 for i in range(count)], before=True)


def decoder_outputs(
    unet: UNet2DModel,
    x: Tensor,
    t: Tensor,
    blocks: tuple[int, ...],
    *,
    labels: Tensor | None = None,
    null_class: int | None = None,
) -> list[Tensor]:
    """Whole outputs of decoder blocks, AFTER the upsampler that ends a level; early exit as `decoder_maps`.

    Args:
        x, t, labels, null_class: see `decoder_maps`.
        blocks: ascending, counted from 0 at the coarsest: guided-diffusion's `output_blocks`. UserError for one that
            the network does not have, or that `keep_only` freed.

    Source: Baranchuk et al. 2022 (DDPM-seg). Golden: adm_* `out.decK.post_up`, ddpm_seg_features.
    """
    a_level = len(cast(UpBlock, unet.up_blocks[0]).resnets)
    most = a_level * len(unet.up_blocks)
    whole = len(unet.up_blocks) == len(unet.config["block_out_channels"])
    if not whole and cast(UpBlock, unet.up_blocks[-1]).upsamplers is None:
        most -= 1  # keep_only freed the upsampler of the last level that is left
    if not blocks or list(blocks) != sorted(set(blocks)) or not 0 <= blocks[0] <= blocks[-1] < most:
        raise UserError(
            f"Decoder blocks {blocks} cannot be read: the network has 0 to {most - 1}.",
            "Name them in ascending order; a teacher reduced to encoding lacks those after its last level.",
        )
    emb = time_embedding(unet, t, labels=labels, null_class=null_class)
    return _walk(unet, x, emb, blocks, before=False)
