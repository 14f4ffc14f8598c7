"""Published settings of a benchmark by name: what `evaluate --preset NAME` begins with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from dreamteacher.downstream.classification.config import FinetuneFullConfig
from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.downstream.detection import config as detection
from dreamteacher.downstream.panoptic import config as panoptic
from dreamteacher.downstream.segmentation import config as segmentation
from dreamteacher.runtime.errors import UserError, did_you_mean


class EvaluatePreset(NamedTuple):
    """What it is, in words; settings of `EvaluateConfig`, with a single task."""

    what: str
    settings: Mapping[str, Any]


def _semantic(name: str, what: str) -> EvaluatePreset:
    return EvaluatePreset(what, {"tasks": ("semantic",), "semantic": segmentation.PRESETS[name]})


def _detect(name: str, what: str, task: str = "detect") -> EvaluatePreset:
    return EvaluatePreset(what, {"tasks": (task,), "detect": detection.PRESETS[name]})


def _finetune(name: Any, what: str) -> EvaluatePreset:
    return EvaluatePreset(
        what, {"tasks": ("finetune-full",), "finetune_full": FinetuneFullConfig(preset=name)}
    )


# One seed each: the paper gives none. DDPM-seg's images are scored at 256 x 256, after 20k steps of UPerNet, as
# wide as the pretraining's neck; batch and learning rate are not stated (ours).
PRESETS: dict[str, EvaluatePreset] = {
    "imagenet-a2": _finetune("a2", "fine-tuning on ImageNet, ResNet-50, 300 epochs"),
    "imagenet-convnext": _finetune("convnext", "fine-tuning on ImageNet, ConvNeXt, 300 epochs"),
    "imagenet-convnext-short": _finetune(
        "convnext-short", "fine-tuning on ImageNet, ConvNeXt, 30 epochs, after a supervised pretraining"
    ),
    "imagenet-linear": EvaluatePreset("linear probe on ImageNet, LARS, 90 epochs", {"tasks": ("linear-sgd",)}),
    "readout": EvaluatePreset("foreground and background read off a frozen backbone", {"tasks": ("readout",)}),
    "ade20k": _semantic("ade20k", "UPerNet on ADE20K, 160k steps"),
    "cityscapes": _semantic("cityscapes", "UPerNet on Cityscapes, 80k steps"),
    "cityscapes-fractions": _semantic(
        "cityscapes-fractions", "UPerNet on 1/4, 1/8 and 1/30 of Cityscapes, 20k steps"
    ),
    "bdd100k-semantic": _semantic("bdd100k", "UPerNet on BDD100K, 80k steps"),
    "bdd100k-instance": _detect("bdd100k-36", "Mask R-CNN on BDD100K, 36 epochs"),
    "bdd100k-panoptic": EvaluatePreset(
        "Panoptic FPN on BDD100K, 36 epochs",
        {"tasks": ("panoptic",), "panoptic": panoptic.PRESETS["bdd100k-36"]},
    ),
    "coco-1x": _detect("coco-1x", "Mask R-CNN on COCO, 12 epochs"),
    "coco-2x": _detect("coco-2x", "Mask R-CNN on COCO, 24 epochs"),
    "coco-cascade-1x": _detect("coco-cascade-1x", "Cascade Mask R-CNN on COCO, 12 epochs", "detect-cascade"),
    "label-efficient": EvaluatePreset(
        "UPerNet on DDPM-seg's images, 20k steps",
        {
            "tasks": ("segment-finetune",),
            "size": (256, 256),
            "segment": segmentation.SegmentConfig(steps=20_000, width=256),
        },
    ),
}  # fmt: skip


def preset_config(name: str, **settings: Any) -> EvaluateConfig:
    """The settings of a preset, with others beside or instead of them.

    Raises:
        UserError: there is no such preset.

    Example:
        >>> preset_config("coco-2x", student="resnet50").detect.steps
        180000
    """
    if name not in PRESETS:
        raise UserError(
            f"There is no preset '{name}'.{did_you_mean(name, PRESETS)}", f"Presets: {', '.join(PRESETS)}."
        )
    return EvaluateConfig(**{"preset": name, "seeds": (0,), **PRESETS[name].settings, **settings})


def check_preset(config: EvaluateConfig) -> None:
    """Whether a config that names a preset began with it.

    Raises:
        UserError: there is no such preset, or it is one of a task that is not asked for.
    """
    if config.preset is not None:
        (task,) = preset_config(config.preset).tasks
        if task not in config.tasks:
            raise UserError(
                f"The preset '{config.preset}' is one of {task}, and the tasks are {', '.join(config.tasks) or 'not named'}.",
                f"Add {task} to the tasks; in Python: preset_config('{config.preset}', ...).",
            )
