"""timm's own names, and config.json beside the weights: timm's hub style, from a folder or the model hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch

from dreamteacher.exports.config import ExportConfig
from dreamteacher.exports.format import Exported, Format
from dreamteacher.models.plain_vit import fitting, grid_of, rebuilt_with, size_settings
from dreamteacher.models.student import Student, level_indices, normalisation

CONFIG_FILE = "config.json"


def load_snippet(folder: Path | str, name: str, file: str = "model.safetensors") -> str:
    """Python that loads the weights with timm alone, complete and ready to copy.

    Args:
        folder: folder of the weights, as the reader would type it.
        name: timm name of the student.
        file: "backbone.safetensors" for a run folder.
    """
    settings = "".join(f", {key}={value}" for key, value in size_settings(name).items())
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, **size_settings(name))
    indices, grid = level_indices(name, model), grid_of(model)
    mean, std = normalisation(model)
    strides = f"strides {', '.join(map(str, indices))}"
    norm, (side, _) = "", fitting((224, 224), grid)
    vectors = "maps[-1].mean(dim=(2, 3))"
    if grid is not None:
        strides, norm = f"one map, a position for {grid.patch} x {grid.patch} pixels", ", norm=True"
        if model.global_pool:
            vectors = "model.forward_head(model.forward_features((images - mean) / std), pre_logits=True)"
    return f"""import timm
import torch
from safetensors.torch import load_file

folder = {json.dumps(str(folder), ensure_ascii=False)}  # where {file} lies
model = timm.create_model("{name}", num_classes=0{settings})
model.load_state_dict(load_file(folder + "/{file}"), strict=True)
model.eval()

images = torch.rand(1, 3, {side}, {side})  # yours: RGB in [0, 1]
mean = torch.tensor({list(mean)}).view(3, 1, 1)
std = torch.tensor({list(std)}).view(3, 1, 1)
with torch.no_grad():
    maps = model.forward_intermediates(
        (images - mean) / std, indices={list(indices.values())}, intermediates_only=True{norm}
    )  # {strides}
    vectors = {vectors}
print([tuple(m.shape) for m in maps], tuple(vectors.shape))
"""


def make_timm(student: Student, facts: Mapping[str, Any], config: ExportConfig) -> Exported:
    """A student as it is, and what timm's hub loader reads."""
    notes = """With timm 1.0.16 or newer, `timm.create_model("local-dir:.", pretrained=True, num_classes=10)` makes the
same with a new classifier, to fine-tune. Layers after the last map, where there are any, were not trained."""
    return Exported(
        tensors=student.model.state_dict(),
        install="timm safetensors",
        snippet=load_snippet(".", student.name),
        notes=notes,
        library="timm",
        files={CONFIG_FILE: json.dumps(_timm_config(student, facts), indent=2) + "\n"},
    )


def _timm_config(student: Student, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What timm's hub loader reads; the images' size is that of the pretraining where it is known."""
    model: Any = student.model
    cfg = dict(model.pretrained_cfg)
    mean, std = normalisation(model)
    size = (facts.get("data") or {}).get("size") or (facts.get("config") or {}).get("size")
    height, width = (size, size) if isinstance(size, int) else size or cfg["input_size"][1:]
    height, width = fitting((height, width), student.grid)
    settings = rebuilt_with(student.name, model)
    return {
        "architecture": cfg["architecture"],
        "num_classes": 0,
        "num_features": model.num_features,
        **({"model_args": settings} if settings else {}),
        "pretrained_cfg": {
            "input_size": [3, height, width],
            "fixed_input_size": False,
            "interpolation": cfg["interpolation"],
            "crop_pct": 1.0,
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": cfg["first_conv"],
            "classifier": cfg["classifier"],
            "custom_load": False,
        },
    }


FORMAT = Format(name="timm", make=make_timm, files=(CONFIG_FILE,))
