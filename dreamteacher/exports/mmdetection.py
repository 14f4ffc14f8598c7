"""MMDetection's names for a ResNet's weights, and MMPretrain's for a ConvNeXt's.

Source of the names: MMPretrain's `models/backbones/resnet.py` and `convnext.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dreamteacher.exports.config import ExportConfig
from dreamteacher.exports.format import Exported, Format, architecture, state_of
from dreamteacher.exports.networks import (
    CONVNEXTS,
    RESNETS,
    RESNEXTS,
    convnext_official,
    pixels,
    resnet_shape,
)
from dreamteacher.models.student import Student, normalisation

_NAMES = (*RESNETS, *RESNEXTS, *CONVNEXTS)


def _make(student: Student, facts: Mapping[str, Any], config: ExportConfig) -> Exported:
    prefix, name = "backbone.", architecture(student)
    mean, std = normalisation(student.model)
    init = 'init_cfg=dict(type="Pretrained", checkpoint="backbone.pth", prefix="backbone."),'
    if name in CONVNEXTS:
        names = {"conv_dw": "depthwise_conv", "mlp.fc1": "pointwise_conv1", "mlp.fc2": "pointwise_conv2"}
        tensors = convnext_official(state_of(student), prefix, names, last_norm="norm3")
        first = 'custom_imports = dict(imports=["mmpretrain.models"], allow_failed_imports=False)\n'
        lines = [
            "_delete_=True,", f'type="mmpretrain.ConvNeXt", arch="{name.removeprefix("convnext_")}",',
            "out_indices=[0, 1, 2, 3], gap_before_final_norm=False, layer_scale_init_value=1.0,", init,
        ]  # fmt: skip
        more = """`norm0` to `norm2`, which MMPretrain puts behind the first three stages, are part of the detector and
start fresh; `norm3` is timm's last norm, which the pretraining did not touch."""
    else:
        tensors = {prefix + key: value for key, value in state_of(student).items()}
        depth, groups, width = resnet_shape(student)
        kind = f'type="ResNeXt", groups={groups}, base_width={width}' if groups > 1 else 'type="ResNet"'
        first, lines = "", [f'{kind}, depth={depth}, style="pytorch",', init]
        more = """MMDetection's own ResNet configurations freeze the first stage and every BatchNorm statistic
(`frozen_stages=1`, `norm_eval=True`)."""
    inner = "\n        ".join(lines)
    snippet = f"""import torch
from safetensors.torch import load_file

# Once: MMEngine reads no safetensors.
torch.save({{"state_dict": load_file("model.safetensors")}}, "backbone.pth")

# In your configuration, whose base is one of MMDetection's with an FPN (mask-rcnn_r50_fpn and others):
{first}model = dict(
    data_preprocessor=dict(mean={pixels(mean)}, std={pixels(std)}, bgr_to_rgb=True),
    backbone=dict(
        {inner}
    ),
    neck=dict(in_channels={[spec.channels for spec in student.specs]}),
)
"""
    notes = f"""The part above `model` runs without MMDetection; the rest is a configuration file's text. Images are read
as BGR there and turned to RGB by `bgr_to_rgb=True`, which these weights need. MMPretrain and MMSegmentation take
the same `backbone` entry. {more}"""
    return Exported(tensors=tensors, install="torch safetensors", snippet=snippet, notes=notes)


FORMAT = Format(
    name="mmdetection",
    takes="MMDetection's plain ResNet and ResNeXt, and MMPretrain's ConvNeXt",
    knows=lambda student: architecture(student) in _NAMES,
    make=_make,
)
