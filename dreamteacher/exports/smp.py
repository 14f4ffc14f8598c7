"""segmentation-models-pytorch's names for a backbone's weights.

Source of the names: its `TimmUniversalEncoder`, which wraps timm's `features_only`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch

from dreamteacher.exports.config import ExportConfig
from dreamteacher.exports.format import Exported, Format, architecture, image_lines, state_of
from dreamteacher.exports.networks import RESNETS
from dreamteacher.models.student import Student

# What segmentation-models-pytorch has under its own name, with torchvision's (and so timm's) parameter names.
_SMP_OWN = (*RESNETS, "resnext50_32x4d", "resnext101_32x4d", "resnext101_32x8d")
# The strides that its wrapper of timm takes; it refuses others.
_SMP_STRIDES = ([2, 4, 8, 16, 32], [4, 8, 16, 32])


def _make(student: Student, facts: Mapping[str, Any], config: ExportConfig) -> Exported:
    names, state = _smp_names(student), state_of(student)
    assert names is not None  # `FORMAT.knows` has looked
    own = architecture(student) in _SMP_OWN
    encoder = architecture(student) if own else f"tu-{architecture(student)}"
    tensors = {new: state[old] for new, old in names.items()}
    snippet = f"""import segmentation_models_pytorch as smp
import torch
from safetensors.torch import load_file

model = smp.Unet(encoder_name="{encoder}", encoder_weights=None, classes=2)  # or another architecture
model.encoder.load_state_dict(load_file("model.safetensors"), strict=True)
model.eval()

{image_lines(student)}with torch.no_grad():
    maps = model.encoder((images - mean) / std)[-4:]  # strides 4, 8, 16, 32
    masks = model((images - mean) / std)
print([tuple(m.shape) for m in maps], tuple(masks.shape))
"""
    notes = """Keep `encoder_depth` at 5, its default: with less, the last stage has no place. The library does not
normalise images: do as above, in training too. Height and width have to be multiples of 32."""
    return Exported(
        tensors=tensors, install="segmentation-models-pytorch safetensors", snippet=snippet, notes=notes,
        library="segmentation-models-pytorch",
    )  # fmt: skip


def _smp_names(student: Student) -> dict[str, str] | None:
    """The encoder's name -> timm's name of every tensor; None when the library cannot have the network."""
    shapes = {key: value.shape for key, value in student.model.state_dict().items()}
    name = architecture(student)
    if name in _SMP_OWN:
        return {key: key for key in shapes}
    with torch.device("meta"):
        try:
            features: Any = timm.create_model(name, features_only=True)
        except (RuntimeError, AttributeError, AssertionError, NotImplementedError):
            return None
    # timm's wrapper flattens lists of modules: stages.0 becomes stages_0.
    flat = {key.replace(".", "_"): key for key in shapes}
    found = {f"model.{key}": flat.get(key.replace(".", "_")) for key in features.state_dict()}
    fits = all(
        old is not None and shapes[old] == value.shape
        for old, value in zip(found.values(), features.state_dict().values(), strict=True)
    )
    if not fits or list(features.feature_info.reduction()) not in _SMP_STRIDES or len(flat) != len(shapes):
        return None
    return {new: old for new, old in found.items() if old is not None}


FORMAT = Format(
    name="smp",
    takes="networks with maps at strides (2,) 4, 8, 16, 32 whose features timm names as the whole",
    knows=lambda student: _smp_names(student) is not None,
    make=_make,
)
