"""Published settings of a benchmark by name: what `evaluate --preset NAME` begins with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from dreamteacher.downstream.classification.config import FinetuneFullConfig
from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.downstream.detection.config import PANOPTIC_PRESETS as PANOPTIC
from dreamteacher.downstream.detection.config import PRESETS as DETECT
from dreamteacher.downstream.segmentation.config import PRESETS as SEMANTIC
from dreamteacher.downstream.segmentation.config import SegmentConfig
from dreamteacher.runtime.errors import UserError, did_you_mean


class EvaluatePreset(NamedTuple):
    """What it is, in words; its task; settings of `EvaluateConfig`."""

    what: str
    task: str
    settings: Mapping[str, Any] = {}


# One seed each: the paper gives none. DDPM-seg's images are scored at 256 x 256, after 20k steps of UPerNet, as
# wide as the pretraining's neck; batch and learning rate are not stated (ours).
PRESETS: dict[str, EvaluatePreset] = {
    "imagenet-a2": EvaluatePreset(
        "fine-tuning on ImageNet, ResNet-50, 300 epochs", "finetune-full",
        {"finetune_full": FinetuneFullConfig(preset="a2")},
    ),
    "imagenet-convnext": EvaluatePreset(
        "fine-tuning on ImageNet, ConvNeXt, 300 epochs", "finetune-full",
        {"finetune_full": FinetuneFullConfig(preset="convnext")},
    ),
    "imagenet-convnext-short": EvaluatePreset(
        "fine-tuning on ImageNet, ConvNeXt, 30 epochs, after a supervised pretraining", "finetune-full",
        {"finetune_full": FinetuneFullConfig(preset="convnext-short")},
    ),
    "imagenet-linear": EvaluatePreset("linear probe on ImageNet, LARS, 90 epochs", "linear-sgd"),
    "readout": EvaluatePreset("foreground and background read off a frozen backbone", "readout"),
    "ade20k": EvaluatePreset("UPerNet on ADE20K, 160k steps", "semantic", {"semantic": SEMANTIC["ade20k"]}),
    "cityscapes": EvaluatePreset(
        "UPerNet on Cityscapes, 80k steps", "semantic", {"semantic": SEMANTIC["cityscapes"]}
    ),
    "cityscapes-fractions": EvaluatePreset(
        "UPerNet on 1/4, 1/8 and 1/30 of Cityscapes, 20k steps", "semantic",
        {"semantic": SEMANTIC["cityscapes-fractions"]},
    ),
    "bdd100k-semantic": EvaluatePreset(
        "UPerNet on BDD100K, 80k steps", "semantic", {"semantic": SEMANTIC["bdd100k"]}
    ),
    "bdd100k-instance": EvaluatePreset(
        "Mask R-CNN on BDD100K, 36 epochs", "detect", {"detect": DETECT["bdd100k-36"]}
    ),
    "bdd100k-panoptic": EvaluatePreset(
        "Panoptic FPN on BDD100K, 36 epochs", "panoptic", {"panoptic": PANOPTIC["bdd100k-36"]}
    ),
    "coco-1x": EvaluatePreset("Mask R-CNN on COCO, 12 epochs", "detect", {"detect": DETECT["coco-1x"]}),
    "coco-2x": EvaluatePreset("Mask R-CNN on COCO, 24 epochs", "detect", {"detect": DETECT["coco-2x"]}),
    "coco-cascade-1x": EvaluatePreset(
        "Cascade Mask R-CNN on COCO, 12 epochs", "detect-cascade", {"detect": DETECT["coco-cascade-1x"]}
    ),
    "label-efficient": EvaluatePreset(
        "UPerNet on DDPM-seg's images, 20k steps", "segment-finetune",
        {"size": (256, 256), "segment": SegmentConfig(steps=20_000, width=256)},
    ),
}  # fmt: skip


def preset_config(name: str, **settings: Any) -> EvaluateConfig:
    """The settings of a preset, with others beside or instead of them; a UserError where there is none.

    Example:
        >>> preset_config("coco-2x", student="resnet50").detect.steps
        180000
    """
    if name not in PRESETS:
        raise UserError(
            f"There is no preset '{name}'.{did_you_mean(name, PRESETS)}", f"Presets: {', '.join(PRESETS)}."
        )
    found = PRESETS[name]
    return EvaluateConfig(
        **{"preset": name, "seeds": (0,), "tasks": (found.task,), **found.settings, **settings}
    )


def check_preset(config: EvaluateConfig) -> None:
    """Raises UserError where a config names no preset that there is, or one of a task not asked for."""
    if config.preset is not None:
        (task,) = preset_config(config.preset).tasks
        if task not in config.tasks:
            raise UserError(
                f"The preset '{config.preset}' is one of {task}, and the tasks are {', '.join(config.tasks) or 'not named'}.",
                f"Add {task} to the tasks; in Python: preset_config('{config.preset}', ...).",
            )
