"""Detectron2's names for a ResNet's weights, and detrex's for a ConvNeXt's.

Source of the names: Detectron2's `tools/convert-torchvision-to-d2.py` and `modeling/backbone/resnet.py`; detrex's
`modeling/backbone/convnext.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dreamteacher.exports.config import ExportConfig
from dreamteacher.exports.format import Exported, Format, architecture, state_of
from dreamteacher.exports.networks import (
    CONVNEXTS,
    RESNETS,
    RESNEXTS,
    WIDE_RESNETS,
    convnext_official,
    convnext_shape,
    pixels,
    resnet_shape,
)
from dreamteacher.models.student import Student, normalisation

_NAMES = (*RESNETS, *RESNEXTS, *WIDE_RESNETS, *CONVNEXTS)


def _make(student: Student, facts: Mapping[str, Any], config: ExportConfig) -> Exported:
    prefix = "backbone.bottom_up."
    if architecture(student) in CONVNEXTS:
        names = {"conv_dw": "dwconv", "mlp.fc1": "pwconv1", "mlp.fc2": "pwconv2"}
        tensors = convnext_official(state_of(student), prefix, names, last_norm=None)
        snippet, notes = _detrex(student, prefix)
        return Exported(tensors=tensors, install="safetensors detrex", snippet=snippet, notes=notes)
    tensors = {}
    for key, value in state_of(student).items():
        if key.endswith("num_batches_tracked"):
            continue  # FrozenBN has none, and BN and SyncBN do without
        name = re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", key)
        name = name if name.startswith("res") else f"stem.{name}"
        name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
        name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
        tensors[prefix + name] = value
    snippet, notes = _detectron2_resnet(student, prefix)
    return Exported(tensors=tensors, install="safetensors detectron2", snippet=snippet, notes=notes)


def _detectron2_resnet(student: Student, prefix: str) -> tuple[str, str]:
    mean, std = normalisation(student.model)
    depth, groups, width = resnet_shape(student)
    snippet = f"""from detectron2 import model_zoo
from detectron2.modeling import build_model
from safetensors.torch import load_file

cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml")  # or another with FPN
cfg.MODEL.WEIGHTS = ""
cfg.MODEL.RESNETS.DEPTH = {depth}
cfg.MODEL.RESNETS.NUM_GROUPS = {groups}
cfg.MODEL.RESNETS.WIDTH_PER_GROUP = {width}
cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = {student.specs[0].channels}
cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False  # the stride is in the 3x3 convolution
cfg.MODEL.RESNETS.NORM = "FrozenBN"  # or "SyncBN", to train the normalisation as well
cfg.INPUT.FORMAT = "RGB"  # not Detectron2's BGR
cfg.MODEL.PIXEL_MEAN = {pixels(mean)}
cfg.MODEL.PIXEL_STD = {pixels(std)}

model = build_model(cfg)
missing, unexpected = model.load_state_dict(load_file("model.safetensors"), strict=False)
assert not unexpected and not [k for k in missing if k.startswith("{prefix}")]
"""
    notes = """The names are those of a model with an FPN; without one (the C4 models) take `bottom_up.` out of
them. FrozenBN keeps the statistics of the pretraining; SyncBN and BN go on from them. By default Detectron2
freezes the stem and `res2` (`cfg.MODEL.BACKBONE.FREEZE_AT = 2`). For its own trainer, which reads no safetensors
through `cfg.MODEL.WEIGHTS`, write once `torch.save(load_file("model.safetensors"), "model.pth")`, and give that.
Pixels are 0 to 255 there: mean and deviation above are 255 times those of images in [0, 1]."""
    return snippet, notes


def _detrex(student: Student, prefix: str) -> tuple[str, str]:
    mean, std = normalisation(student.model)
    depths, widths = convnext_shape(student)
    snippet = f"""import torch
from detrex.modeling.backbone import ConvNeXt
from safetensors.torch import load_file

backbone = ConvNeXt(depths={depths}, dims={widths}, out_indices=(0, 1, 2, 3))
state = load_file("model.safetensors")
state = {{key.removeprefix("{prefix}"): value for key, value in state.items()}}
missing, unexpected = backbone.load_state_dict(state, strict=False)
assert not unexpected and all(key.startswith("norm") for key in missing)
"""
    notes = f"""Detectron2 has no ConvNeXt of its own: the names are those of the paper's authors, which detrex's
Detectron2 backbone has too, behind `{prefix}`, where an FPN puts it. Its `norm0` to `norm3` after the four stages are
part of the detector and start fresh. Images there are RGB (`cfg.INPUT.FORMAT = "RGB"`) with pixels of 0 to 255:
pixel mean {pixels(mean)}, pixel standard deviation {pixels(std)}."""
    return snippet, notes


FORMAT = Format(
    name="detectron2",
    takes="Detectron2's plain ResNet and ResNeXt, and detrex's ConvNeXt",
    knows=lambda student: architecture(student) in _NAMES,
    make=_make,
)
