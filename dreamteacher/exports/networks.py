"""Plain ResNet, ResNeXt and ConvNeXt, which several libraries have: their names and shapes."""

from __future__ import annotations

from typing import Any

from dreamteacher.models.student import Student

# By name and not by shape: resnetblur50 has resnet50's tensors and computes something else with them.
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
RESNEXTS = ("resnext50_32x4d", "resnext101_32x4d", "resnext101_32x8d", "resnext101_64x4d")
WIDE_RESNETS = ("wide_resnet50_2", "wide_resnet101_2")
CONVNEXTS = tuple(
    f"convnext_{size}"
    for size in ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large", "xlarge")
)


def convnext_shape(student: Student) -> tuple[list[int], list[int]]:
    """Depths and channels of the four stages."""
    model: Any = student.model
    return [len(stage.blocks) for stage in model.stages], [spec.channels for spec in student.specs]
