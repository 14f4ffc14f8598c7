"""Plain ResNet, ResNeXt and ConvNeXt, which several libraries have: their names, shapes, and the authors' tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from dreamteacher.models.student import Student

# By name and not by shape: resnetblur50 has resnet50's tensors and computes something else with them.
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
RESNEXTS = ("resnext50_32x4d", "resnext101_32x4d", "resnext101_32x8d", "resnext101_64x4d")
WIDE_RESNETS = ("wide_resnet50_2", "wide_resnet101_2")
CONVNEXTS = tuple(
    f"convnext_{size}"
    for size in ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large", "xlarge")
)


def pixels(values: Iterable[float]) -> list[float]:
    """Mean or deviation in pixel values of 0 to 255."""
    return [round(255 * v, 3) for v in values]


def resnet_shape(student: Student) -> tuple[int, int, int]:
    """Depth, groups, and width per group in the first stage."""
    model: Any = student.model
    conv = model.layer1[0].conv2
    depth = int(re.findall(r"\d+", student.name)[0])
    return depth, conv.groups, conv.out_channels // conv.groups


def convnext_shape(student: Student) -> tuple[list[int], list[int]]:
    """Depths and channels of the four stages."""
    model: Any = student.model
    return [len(stage.blocks) for stage in model.stages], [spec.channels for spec in student.specs]


def convnext_official(
    state: Mapping[str, Tensor], prefix: str, names: Mapping[str, str], *, last_norm: str | None
) -> dict[str, Tensor]:
    """timm's ConvNeXt -> the authors' layout (`downsample_layers`, `stages`), 1x1 convolutions as Linear.

    Args:
        names: what the layers of a block are called, by timm's name; others keep it.
        last_norm: where the norm before the classifier goes; None leaves it out.
    """
    tensors = {}
    for key, value in state.items():
        if found := re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.(.+?)(?:\.(weight|bias))?", key):
            linear = found[3].startswith("mlp") and found[4] == "weight"
            ends = [names.get(found[3], found[3]), *filter(None, [found[4]])]
            name, value = (
                ".".join(["stages", found[1], found[2], *ends]),
                value.flatten(1) if linear else value,
            )
        elif key.startswith("head.norm."):
            if last_norm is None:
                continue
            name = key.replace("head.norm", last_norm)
        else:
            name = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", key)
            name = re.sub(r"^stem\.", "downsample_layers.0.", name)
        tensors[prefix + name] = value
    return tensors
