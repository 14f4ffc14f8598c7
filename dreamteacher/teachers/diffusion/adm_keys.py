"""Where every tensor of a guided-diffusion (ADM) U-Net goes in diffusers' `UNet2DModel`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from torch import Tensor

from dreamteacher.runtime.errors import UserError

Kind = Literal["layer", "block", "attention"]
# Layers of a residual block of guided-diffusion and their names in diffusers.
_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


@dataclass(frozen=True)
class AdmNetwork:
    """What the shapes of a guided-diffusion state dict tell about the network.

    Args:
        model_channels: width of the sinusoids of t; time_width: of the embedding made from them.
        widths: channels of each level, fine to coarse; attention: which of them have it.
        blocks: residual blocks of a level of the encoder (the decoder has one more).
        updown: residual blocks resample, not plain convolutions; scale_shift: t scales and shifts the norms.
        classes: rows of the class embedding, 0 where there is none.
    """

    model_channels: int
    time_width: int
    widths: tuple[int, ...]
    blocks: int
    attention: tuple[bool, ...]
    updown: bool
    scale_shift: bool
    classes: int
    in_channels: int
    out_channels: int


def foreign(path: Path, what: str) -> NoReturn:
    """Raises the UserError for weights that are of another network, or not whole."""
    raise UserError(
        f"'{path}' is not the guided-diffusion U-Net that was expected: {what}.",
        "Give the diffusion model's own checkpoint (no classifier or upsampler), whole, with its own flags.",
    )


def network_of(weights: Mapping[str, Tensor], path: Path) -> AdmNetwork:
    """What a state dict tells; `path` is the file that errors name.

    Raises:
        UserError: naming what a guided-diffusion U-Net has and these weights do not.
    """

    def dims(key: str, count: int) -> tuple[int, ...]:
        if key not in weights:
            foreign(path, f"it lacks '{key}'")
        if weights[key].ndim != count:
            foreign(path, f"'{key}' has the shape {tuple(weights[key].shape)}")
        return tuple(weights[key].shape)

    time_width, model_channels = dims("time_embed.0.weight", 2)
    ends = ("in_layers.2.weight", "conv.weight")
    numbers = {int(m[1]) for k in weights if (m := re.match(r"output_blocks\.(\d+)\.", k))}
    count = len(numbers)
    ups = [
        k for k in range(count) if any(f"output_blocks.{k}.{j}.{e}" in weights for j in (1, 2) for e in ends)
    ]
    a_level = ups[0] + 1 if ups else count  # the first upsampler ends the first level
    levels = count // a_level if a_level > 1 else 0
    if (
        not levels
        or numbers != set(range(count))
        or ups != [a_level * (i + 1) - 1 for i in range(levels - 1)]
    ):
        foreign(path, f"its {count} output_blocks are not levels of one length")
    firsts = [f"input_blocks.{1 + i * a_level}" for i in range(levels)]
    widths = tuple(dims(f"{first}.0.out_layers.3.weight", 4)[0] for first in firsts)
    return AdmNetwork(
        model_channels=model_channels,
        time_width=time_width,
        widths=widths,
        blocks=a_level - 1,
        attention=tuple(f"{first}.1.qkv.weight" in weights for first in firsts),
        updown=levels > 1 and f"input_blocks.{a_level}.0.op.weight" not in weights,
        scale_shift=dims("input_blocks.1.0.emb_layers.1.weight", 2)[0] == 2 * widths[0],
        classes=dims("label_emb.weight", 2)[0] if "label_emb.weight" in weights else 0,
        in_channels=dims("input_blocks.0.0.weight", 4)[1],
        out_channels=dims("out.2.weight", 4)[0],
    )


def pairs(network: AdmNetwork) -> Iterator[tuple[str, str, Kind]]:
    """(name in guided-diffusion, name in diffusers, what it is), module by module, in network order.

    With n residual blocks a level, level i of the input blocks begins at 1 + i (n + 1) and ends in a
    downsampler; output_blocks.k is block k mod (n + 1) of level k // (n + 1) from the coarsest, and the last of
    a level also holds the upsampler.
    """
    n, levels = network.blocks, len(network.widths)
    yield "time_embed.0", "time_embedding.linear_1", "layer"
    yield "time_embed.2", "time_embedding.linear_2", "layer"
    yield "label_emb", "class_embedding", "layer"
    yield "input_blocks.0.0", "conv_in", "layer"
    for i, attention in enumerate(network.attention):
        for j in range(n):
            k = 1 + i * (n + 1) + j
            yield f"input_blocks.{k}.0", f"down_blocks.{i}.resnets.{j}", "block"
            if attention:
                yield f"input_blocks.{k}.1", f"down_blocks.{i}.attentions.{j}", "attention"
        if i + 1 < levels:
            yield from _resampler(
                f"input_blocks.{(i + 1) * (n + 1)}.0", "op", f"down_blocks.{i}.down", network
            )
    yield "middle_block.0", "mid_block.resnets.0", "block"
    yield "middle_block.1", "mid_block.attentions.0", "attention"
    yield "middle_block.2", "mid_block.resnets.1", "block"
    for i, attention in enumerate(reversed(network.attention)):
        for j in range(n + 1):
            k = i * (n + 1) + j
            yield f"output_blocks.{k}.0", f"up_blocks.{i}.resnets.{j}", "block"
            if attention:
                yield f"output_blocks.{k}.1", f"up_blocks.{i}.attentions.{j}", "attention"
        if i + 1 < levels:
            end = f"output_blocks.{(i + 1) * (n + 1) - 1}.{2 if attention else 1}"
            yield from _resampler(end, "conv", f"up_blocks.{i}.up", network)
    yield "out.0", "conv_norm_out", "layer"
    yield "out.2", "conv_out", "layer"


def _resampler(
    theirs: str, convolution: str, ours: str, network: AdmNetwork
) -> Iterator[tuple[str, str, Kind]]:
    if network.updown:
        yield theirs, f"{ours}samplers.0", "block"
    else:
        yield f"{theirs}.{convolution}", f"{ours}samplers.0.conv", "layer"


def renamed(
    weights: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    network: AdmNetwork,
    heads_of: Callable[[int], int],
    path: Path,
    *,
    new_order: bool,
) -> dict[str, Tensor]:
    """The weights under diffusers' names, qkv layers taken apart; every shape is checked.

    Args:
        shapes: of the network that they are for; heads_of: heads at an attention of that many channels.
        new_order: see `split_qkv`; path: the file that errors name.

    Raises:
        UserError: naming the first tensor that is missing, of another shape, or has no place.
    """
    left, out = dict(weights), {}

    def take(key: str, shape: tuple[int, ...]) -> Tensor:
        if key not in left:
            foreign(path, f"it lacks '{key}'")
        if tuple(left[key].shape) != shape:
            foreign(path, f"'{key}' has the shape {tuple(left[key].shape)}, not {shape}")
        return left.pop(key)

    def plain(theirs: str, ours: str) -> None:
        for part in (".weight", ".bias"):
            if ours + part in shapes:  # else there is no such layer, or it has no bias
                out[ours + part] = take(theirs + part, shapes[ours + part])

    for theirs, ours, kind in pairs(network):
        if kind == "layer":
            plain(theirs, ours)
        elif kind == "block":
            for a, b in _RESIDUAL.items():
                plain(f"{theirs}.{a}", f"{ours}.{b}")
        else:
            plain(f"{theirs}.norm", f"{ours}.group_norm")
            width = shapes[f"{ours}.to_q.bias"][0]
            for part, rest in ((".weight", (width, 1)), (".bias", ())):
                qkv = take(f"{theirs}.qkv{part}", (3 * width, *rest))
                split = split_qkv(qkv, heads_of(width), new_order=new_order)
                for name, rows in zip(("to_q", "to_k", "to_v"), split, strict=True):
                    out[f"{ours}.{name}{part}"] = rows.reshape(shapes[f"{ours}.{name}{part}"])
                last = take(f"{theirs}.proj_out{part}", (width, *rest))
                out[f"{ours}.to_out.0{part}"] = last.reshape(shapes[f"{ours}.to_out.0{part}"])
    if left:
        foreign(path, f"'{next(iter(left))}' has no place in it")
    return out


def split_qkv(qkv: Tensor, heads: int, *, new_order: bool) -> tuple[Tensor, ...]:
    """Queries, keys and values of a joint layer, each with its rows in the order [head][channel].

    Args:
        qkv: 3C rows (weight or bias): [q, k, v][head][channel] in the new order, [head][q, k, v][channel] in
            the legacy order.

    Source: the two orders of guided-diffusion; a wrong one runs and changes the output by more than 1.
    """
    if new_order:
        return qkv.chunk(3)
    return tuple(part.flatten(0, 1) for part in qkv.unflatten(0, (heads, 3, -1)).unbind(1))
