"""torchvision's names for a backbone's weights, as its models have them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dreamteacher.exports.config import ExportConfig
from dreamteacher.exports.format import Exported, Format, architecture, image_lines, state_of
from dreamteacher.exports.networks import CONVNEXTS, RESNETS, RESNEXTS, WIDE_RESNETS, convnext_shape
from dreamteacher.models.student import Student

_TORCHVISION_CONVNEXTS = ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")
_NAMES = (*RESNETS, *(n for n in RESNEXTS if n != "resnext101_32x4d"), *WIDE_RESNETS, *CONVNEXTS)


def _make(student: Student, facts: Mapping[str, Any], config: ExportConfig) -> Exported:
    name, state = architecture(student), state_of(student)
    if name not in CONVNEXTS:
        tensors, head, nodes = state, "model.fc", [f"layer{i}" for i in (1, 2, 3, 4)]
        imports, make = f"from torchvision.models import {name}", f"{name}(weights=None)"
    else:
        tensors, head = _torchvision_convnext(state), "model.classifier[2]"
        nodes = [f"features.{i}" for i in (1, 3, 5, 7)]
        imports, make = f"from torchvision.models import {name}", f"{name}(weights=None)"
        if name not in _TORCHVISION_CONVNEXTS:
            depths, widths = convnext_shape(student)
            imports = "from torchvision.models.convnext import CNBlockConfig, ConvNeXt"
            after = [*widths[1:], None]
            blocks = ", ".join(f"CNBlockConfig{block}" for block in zip(widths, after, depths, strict=True))
            make = f"ConvNeXt([{blocks}])"
    snippet = f"""import torch
{imports}
from torchvision.models.feature_extraction import create_feature_extractor
from safetensors.torch import load_file

model = {make}
{head} = torch.nn.Identity()  # the classifier, which the weights do not have
model.load_state_dict(load_file("model.safetensors"), strict=True)
model.eval()

{image_lines(student)}levels = create_feature_extractor(model, {nodes})
with torch.no_grad():
    maps = list(levels((images - mean) / std).values())  # strides 4, 8, 16, 32
    vectors = model((images - mean) / std)
print([tuple(m.shape) for m in maps], tuple(vectors.shape))
"""
    notes = f"""To fine-tune, put a classifier in after loading: `{head} = torch.nn.Linear({student.features_channels}, 10)`.
torchvision's detectors take the network through `torchvision.models.detection.backbone_utils`; they normalise
by themselves, with ImageNet's mean and standard deviation unless told otherwise (`image_mean`, `image_std`)."""
    return Exported(
        tensors=tensors,
        install="torchvision safetensors",
        snippet=snippet,
        notes=notes,
        library="torchvision",
    )


def _torchvision_convnext(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's ConvNeXt -> torchvision's: stem, stages and downsamplings are one list, 1x1 convolutions Linear."""
    # Its block is a list as well: 0 depthwise, 1 permute, 2 norm, 3 Linear, 4 GELU, 5 Linear, 6 permute.
    places = {"conv_dw": "block.0", "norm": "block.2", "mlp.fc1": "block.3", "mlp.fc2": "block.5"}
    tensors = {}
    for key, value in state.items():
        if found := re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.(.+?)(?:\.(weight|bias))?", key):
            block = f"features.{2 * int(found[1]) + 1}.{found[2]}"
            if found[3] == "gamma":
                tensors[f"{block}.layer_scale"] = value.reshape(-1, 1, 1)
            else:
                linear = found[3].startswith("mlp") and found[4] == "weight"
                tensors[f"{block}.{places[found[3]]}.{found[4]}"] = value.flatten(1) if linear else value
        elif found := re.fullmatch(r"stages\.(\d)\.downsample\.(.+)", key):
            tensors[f"features.{2 * int(found[1])}.{found[2]}"] = value
        elif key.startswith("stem."):
            tensors[key.replace("stem.", "features.0.")] = value
        else:
            tensors[key.replace("head.norm.", "classifier.0.")] = value
    return tensors


FORMAT = Format(
    name="torchvision",
    takes="torchvision's plain ResNet, ResNeXt and ConvNeXt",
    knows=lambda student: architecture(student) in _NAMES,
    make=_make,
)
