"""Other libraries' names for a backbone's weights, and the code that loads them there.

Every format is (tensors under the library's names, a snippet that loads them, notes). None of the libraries need
be installed; ONNX is no matter of names, and its file is made in `export_onnx`.

Source of the names: torchvision's models; Detectron2's `tools/convert-torchvision-to-d2.py` and
`modeling/backbone/resnet.py`; detrex's `modeling/backbone/convnext.py`; MMPretrain's `models/backbones/resnet.py`
and `convnext.py`; segmentation-models-pytorch's `TimmUniversalEncoder`, which wraps timm's `features_only`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, get_args

import timm
import torch
from timm.layers import Conv2dSame
from torch import Tensor

from dreamteacher.exports.config import Format
from dreamteacher.exports.onnx import OPSET
from dreamteacher.models.student import Student, normalisation
from dreamteacher.runtime.errors import UserError, did_you_mean

FORMATS: tuple[str, ...] = get_args(Format)

# By name and not by shape: resnetblur50 has resnet50's tensors and computes something else with them.
_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
_RESNEXTS = ("resnext50_32x4d", "resnext101_32x4d", "resnext101_32x8d", "resnext101_64x4d")
_WIDE = ("wide_resnet50_2", "wide_resnet101_2")
_CONVNEXTS = tuple(
    f"convnext_{size}"
    for size in ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large", "xlarge")
)
_TORCHVISION_CONVNEXTS = ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")
# What segmentation-models-pytorch has under its own name, with torchvision's (and so timm's) parameter names.
_SMP_OWN = (*_RESNETS, "resnext50_32x4d", "resnext101_32x4d", "resnext101_32x8d")
# The strides that its wrapper of timm takes; it refuses others.
_SMP_STRIDES = ([2, 4, 8, 16, 32], [4, 8, 16, 32])
_NAMES: Mapping[str, tuple[str, ...]] = {
    "torchvision": (*_RESNETS, *(n for n in _RESNEXTS if n != "resnext101_32x4d"), *_WIDE, *_CONVNEXTS),
    "detectron2": (*_RESNETS, *_RESNEXTS, *_WIDE, *_CONVNEXTS),
    "mmdetection": (*_RESNETS, *_RESNEXTS, *_CONVNEXTS),
}
_SAID = {
    "torchvision": "torchvision's plain ResNet, ResNeXt and ConvNeXt",
    "detectron2": "Detectron2's plain ResNet and ResNeXt, and detrex's ConvNeXt",
    "mmdetection": "MMDetection's plain ResNet and ResNeXt, and MMPretrain's ConvNeXt",
    "smp": "networks with maps at strides (2,) 4, 8, 16, 32 whose features timm names as the whole",
    "onnx": "networks whose padding does not depend on the image's size",
}


class Layout(NamedTuple):
    """A backbone in another library's form."""

    tensors: dict[str, Tensor]
    """Weights under that library's names; empty for ONNX, whose file is made by `export_onnx`."""
    install: str
    """What to install to run the snippet, as arguments of pip."""
    snippet: str
    """Python that loads the files from its working directory; complete."""
    notes: str
    """What a reader has to know besides: Markdown."""
    library: str | None = None
    """The library's name in the model hub's metadata, if it has one."""


def check_format(name: str) -> None:
    """Refuses what is no format.

    Raises:
        UserError: with the closest name and all of them.
    """
    if name not in FORMATS:
        raise UserError(
            f"There is no format '{name}'.{did_you_mean(name, FORMATS)}", f"Formats: {', '.join(FORMATS)}."
        )


def formats_for(student: Student) -> list[str]:
    """The formats that know a student's network.

    Example:
        >>> from dreamteacher.models.student import create_student
        >>> formats_for(create_student("mobilenetv3_small_100"))
        ['timm', 'smp', 'onnx', 'hub']
    """
    return [name for name in FORMATS if _knows(name, student)]


def layout(name: str, student: Student) -> Layout:
    """A student in the form of another library.

    Args:
        name: one of FORMATS, but timm and hub: those are timm's own names.
        student: with the weights to write. Tensors are shared with it where their shape stays.

    Raises:
        UserError: when that library has no such network, naming the formats that do.
    """
    makers: dict[str, Callable[[Student], Layout]] = {
        "torchvision": _torchvision,
        "detectron2": _detectron2,
        "mmdetection": _mmdetection,
        "smp": _smp,
        "onnx": _onnx,
    }
    if not _knows(name, student):
        raise UserError(
            f"The format {name} has no {student.name}: it takes {_SAID[name]}.",
            f"Formats that know it: {', '.join(formats_for(student))}.",
        )
    return makers[name](student)


def _knows(name: str, student: Student) -> bool:
    if name == "smp":
        return _smp_names(student) is not None
    if name == "onnx":
        # Padding that depends on the size (TensorFlow's) keeps torch's exporter busy for minutes and more.
        return not any(isinstance(module, Conv2dSame) for module in student.modules())
    return name not in _NAMES or _architecture(student) in _NAMES[name]


def _architecture(student: Student) -> str:
    return student.name.split(".", 1)[0]


def _state(student: Student) -> dict[str, Tensor]:
    return {k: v.detach() for k, v in student.model.state_dict().items()}


def _images(student: Student) -> str:
    """The lines that every snippet shares."""
    mean, std = normalisation(student.model)
    return f"""images = torch.rand(1, 3, 224, 224)  # yours: RGB in [0, 1]
mean = torch.tensor({list(mean)}).view(3, 1, 1)
std = torch.tensor({list(std)}).view(3, 1, 1)
"""


def _pixels(values: Iterable[float]) -> list[float]:
    """Mean or deviation in pixel values of 0 to 255."""
    return [round(255 * v, 3) for v in values]


def _resnet_shape(student: Student) -> tuple[int, int, int]:
    """Depth, groups, and width per group in the first stage."""
    model: Any = student.model
    conv = model.layer1[0].conv2
    depth = int(re.findall(r"\d+", student.name)[0])
    return depth, conv.groups, conv.out_channels // conv.groups


def _convnext_shape(student: Student) -> tuple[list[int], list[int]]:
    """Depths and channels of the four stages."""
    model: Any = student.model
    return [len(stage.blocks) for stage in model.stages], [spec.channels for spec in student.specs]


# --- torchvision ----------------------------------------------------------------------------------------------


def _torchvision(student: Student) -> Layout:
    name, state = _architecture(student), _state(student)
    if name not in _CONVNEXTS:
        tensors, head, nodes = state, "model.fc", [f"layer{i}" for i in (1, 2, 3, 4)]
        imports, make = f"from torchvision.models import {name}", f"{name}(weights=None)"
    else:
        tensors, head, nodes = _torchvision_convnext(state), "model.classifier[2]", []
        nodes = [f"features.{i}" for i in (1, 3, 5, 7)]
        imports, make = f"from torchvision.models import {name}", f"{name}(weights=None)"
        if name not in _TORCHVISION_CONVNEXTS:
            depths, widths = _convnext_shape(student)
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

{_images(student)}levels = create_feature_extractor(model, {nodes})
with torch.no_grad():
    maps = list(levels((images - mean) / std).values())  # strides 4, 8, 16, 32
    vectors = model((images - mean) / std)
print([tuple(m.shape) for m in maps], tuple(vectors.shape))
"""
    notes = f"""To fine-tune, put a classifier in after loading: `{head} = torch.nn.Linear({student.features_channels}, 10)`.
torchvision's detectors take the network through `torchvision.models.detection.backbone_utils`; they normalise
by themselves, with ImageNet's mean and standard deviation unless told otherwise (`image_mean`, `image_std`)."""
    return Layout(tensors, "torchvision safetensors", snippet, notes, "torchvision")


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


# --- Detectron2 -----------------------------------------------------------------------------------------------


def _detectron2(student: Student) -> Layout:
    prefix = "backbone.bottom_up."
    if _architecture(student) in _CONVNEXTS:
        names = {"conv_dw": "dwconv", "mlp.fc1": "pwconv1", "mlp.fc2": "pwconv2"}
        tensors = _convnext_official(_state(student), prefix, names, last_norm=None)
        return Layout(tensors, "safetensors detrex", *_detrex(student, prefix))
    tensors = {}
    for key, value in _state(student).items():
        if key.endswith("num_batches_tracked"):
            continue  # FrozenBN has none, and BN and SyncBN do without
        name = re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", key)
        name = name if name.startswith("res") else f"stem.{name}"
        name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
        name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
        tensors[prefix + name] = value
    return Layout(tensors, "safetensors detectron2", *_detectron2_resnet(student, prefix))


def _detectron2_resnet(student: Student, prefix: str) -> tuple[str, str]:
    mean, std = normalisation(student.model)
    depth, groups, width = _resnet_shape(student)
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
cfg.MODEL.PIXEL_MEAN = {_pixels(mean)}
cfg.MODEL.PIXEL_STD = {_pixels(std)}

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
    depths, widths = _convnext_shape(student)
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
pixel mean {_pixels(mean)}, pixel standard deviation {_pixels(std)}."""
    return snippet, notes


def _convnext_official(
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


# --- MMDetection ----------------------------------------------------------------------------------------------


def _mmdetection(student: Student) -> Layout:
    prefix, name = "backbone.", _architecture(student)
    mean, std = normalisation(student.model)
    init = 'init_cfg=dict(type="Pretrained", checkpoint="backbone.pth", prefix="backbone."),'
    if name in _CONVNEXTS:
        names = {"conv_dw": "depthwise_conv", "mlp.fc1": "pointwise_conv1", "mlp.fc2": "pointwise_conv2"}
        tensors = _convnext_official(_state(student), prefix, names, last_norm="norm3")
        first = 'custom_imports = dict(imports=["mmpretrain.models"], allow_failed_imports=False)\n'
        lines = [
            "_delete_=True,", f'type="mmpretrain.ConvNeXt", arch="{name.removeprefix("convnext_")}",',
            "out_indices=[0, 1, 2, 3], gap_before_final_norm=False, layer_scale_init_value=1.0,", init,
        ]  # fmt: skip
        more = """`norm0` to `norm2`, which MMPretrain puts behind the first three stages, are part of the detector and
start fresh; `norm3` is timm's last norm, which the pretraining did not touch."""
    else:
        tensors = {prefix + key: value for key, value in _state(student).items()}
        depth, groups, width = _resnet_shape(student)
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
    data_preprocessor=dict(mean={_pixels(mean)}, std={_pixels(std)}, bgr_to_rgb=True),
    backbone=dict(
        {inner}
    ),
    neck=dict(in_channels={[spec.channels for spec in student.specs]}),
)
"""
    notes = f"""The part above `model` runs without MMDetection; the rest is a configuration file's text. Images are read
as BGR there and turned to RGB by `bgr_to_rgb=True`, which these weights need. MMPretrain and MMSegmentation take
the same `backbone` entry. {more}"""
    return Layout(tensors, "torch safetensors", snippet, notes)


# --- segmentation-models-pytorch ------------------------------------------------------------------------------


def _smp(student: Student) -> Layout:
    names, state = _smp_names(student), _state(student)
    assert names is not None  # `layout` has looked
    own = _architecture(student) in _SMP_OWN
    encoder = _architecture(student) if own else f"tu-{_architecture(student)}"
    tensors = {new: state[old] for new, old in names.items()}
    snippet = f"""import segmentation_models_pytorch as smp
import torch
from safetensors.torch import load_file

model = smp.Unet(encoder_name="{encoder}", encoder_weights=None, classes=2)  # or another architecture
model.encoder.load_state_dict(load_file("model.safetensors"), strict=True)
model.eval()

{_images(student)}with torch.no_grad():
    maps = model.encoder((images - mean) / std)[-4:]  # strides 4, 8, 16, 32
    masks = model((images - mean) / std)
print([tuple(m.shape) for m in maps], tuple(masks.shape))
"""
    notes = """Keep `encoder_depth` at 5, its default: with less, the last stage has no place. The library does not
normalise images: do as above, in training too. Height and width have to be multiples of 32."""
    install = "segmentation-models-pytorch safetensors"
    return Layout(tensors, install, snippet, notes, "segmentation-models-pytorch")


def _smp_names(student: Student) -> dict[str, str] | None:
    """The encoder's name -> timm's name of every tensor; None when the library cannot have the network."""
    shapes = {key: value.shape for key, value in student.model.state_dict().items()}
    name = _architecture(student)
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


# --- ONNX -----------------------------------------------------------------------------------------------------


def _onnx(student: Student) -> Layout:
    free = f"multiples of {student.grid.stride}" if student.grid else "all three free"
    outputs = "\n".join(
        f"| `{spec.name}` | batch x {spec.channels} x height/{spec.stride} x width/{spec.stride} |"
        for spec in student.specs
    )
    snippet = """import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])

images = np.random.default_rng(0).random((1, 3, 224, 224), dtype=np.float32)  # yours: RGB in [0, 1]
maps = session.run(None, {"images": images})
vectors = maps[-1].mean(axis=(2, 3))
print([m.shape for m in maps], vectors.shape)
"""
    notes = f"""Opset {OPSET}, float32, evaluation mode. The normalisation is part of the graph: give RGB in [0, 1].

| name | shape |
| --- | --- |
| `images` (input) | batch x 3 x height x width, {free} |
{outputs}"""
    return Layout({}, "onnxruntime numpy", snippet, notes, "onnx")
