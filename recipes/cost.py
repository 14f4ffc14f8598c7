"""What a recipe costs: operations of its networks, times images, over an assumed speed. Estimates, not measurements."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TypeAlias

from dreamteacher.distill.config import PretrainConfig, TrainInterpreterConfig
from dreamteacher.downstream.classification.finetune_full import recipe_of
from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.downstream.detection.config import DetectConfig
from dreamteacher.teachers.published.known import KNOWN, Shape
from dreamteacher.teachers.training.config import TrainTeacherConfig
from dreamteacher.teachers.training.stylegan2 import StyleGan2Preset
from dreamteacher.teachers.training.train import PRESETS

Config: TypeAlias = PretrainConfig | TrainTeacherConfig | TrainInterpreterConfig | EvaluateConfig

# Assumed, not measured: what one H100 sustains in bfloat16, in operations a second (its dense peak is 989e12).
# Large denoisers do better than backbones whose BatchNorms wait for memory. An A100 has about a third of the peak.
DENOISER_SPEED = 250e12
BACKBONE_SPEED = 75e12
# Training is three forward passes. A StyleGAN2's step trains a discriminator that costs as much as the generator:
# four passes of the generator and nine of the discriminator.
TRAINING, STYLEGAN2_STEP = 3, 13

# Teachers that `train-teacher` makes; tests compute them anew, as those of `teachers.published.known`.
TRAINED: dict[str, Shape] = {
    "adm-bdd100k": Shape((128, 256), {4: 256, 8: 256, 16: 384, 32: 512}, 135.51, 56.34),
    "stylegan2-bdd100k": Shape((512, 1024), {4: 256, 8: 512, 16: 512, 32: 512}, 120.37, 120.37),
}
# GMACs of one forward pass of 256 x 256 pixels, by network and backbone; tests compute them anew. They grow with
# the pixels. "regressor": to ADM's levels; "upernet": width 512, 150 classes, auxiliary head; "pyramid": FPN and
# region proposals, width 256.
GMACS: dict[str, dict[str, float]] = {
    "backbone": {"resnet50": 5.34, "resnet101": 10.19, "convnext_base": 20.05},
    "regressor": {"resnet50": 4.87, "resnet101": 4.87, "convnext_base": 4.48},
    "upernet": {"resnet50": 54.46, "convnext_base": 53.21},
    "pyramid": {"resnet50": 6.95, "convnext_base": 6.7},
}
# Of one picture, whatever its size: 512 rois through a box head, 128 through a mask head.
BOX_HEAD, MASK_HEAD = 65.98, 67.85


def read_csv(name: str) -> list[dict[str, str]]:
    """The rows of a table beside this file."""
    with open(Path(__file__).parent / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


DATA_SETS = {row["name"]: row for row in read_csv("data_sets.csv")}


def data_set(images: Path) -> str:
    """The name of the data set that a recipe's command reads.

    Example:
        >>> data_set(Path("lsun:/data/lsun/cat"))
        'lsun/cat'
    """
    (name,) = (name for name in DATA_SETS if str(images).endswith(f"/{name}"))
    return name


def images_of(images: Path | None) -> int:
    """Training images of a data set, as published."""
    assert images is not None
    return int(DATA_SETS[data_set(images)]["images"])


def shape_of(teacher: str) -> Shape:
    """A published teacher's, or that of a run that a preset of `train-teacher` makes."""
    own = Path(teacher).name.removeprefix("teacher-")
    return TRAINED[own] if own in TRAINED else KNOWN[teacher].shape


def hours(value: float) -> str:
    """GPU-hours with two digits that mean something.

    Example:
        >>> hours(1234.5), hours(0.0123), hours(12.3)
        ('1,200', '0.012', '12')
    """
    return f"{float(f'{value:.2g}'):,.10g}"


def gpu_hours(config: Config) -> float:
    """H100-hours of one command, without those before it.

    What is left out: reading images, scores on test images, heads of a few layers.
    """
    match config:
        case PretrainConfig():
            seconds = _pretraining(config)
        case TrainTeacherConfig():
            seconds = _teacher(config)
        case TrainInterpreterConfig():
            assert config.images is not None
            images = config.epochs * int(DATA_SETS[data_set(config.images)]["labelled"])
            seconds = images * _operations(shape_of(config.teacher).gmacs_levels) / DENOISER_SPEED
        case EvaluateConfig():
            seconds = _operations(_evaluation(config)) / BACKBONE_SPEED
    return seconds / 3600


def _operations(gmacs: float) -> float:
    return 2e9 * gmacs


def _pretraining(config: PretrainConfig) -> float:
    shape = shape_of(config.teacher)
    images = config.epochs * (config.samples if config.dataset == "synthesized" else images_of(config.images))
    trained = _backbone(config.student, config.size or shape.size, "backbone", "regressor")
    ddim = 10 if config.noise == "inversion" else 0  # steps of the whole network before the levels are read
    taught = shape.gmacs_levels + ddim * shape.gmacs_full
    return images * (_operations(taught) / DENOISER_SPEED + _operations(TRAINING * trained) / BACKBONE_SPEED)


def _teacher(config: TrainTeacherConfig) -> float:
    preset, shape = PRESETS[config.preset], TRAINED[config.preset]
    passes = STYLEGAN2_STEP if isinstance(preset, StyleGan2Preset) else TRAINING
    return preset.steps * preset.batch_size * _operations(passes * shape.gmacs_full) / DENOISER_SPEED


def _backbone(student: str, size: tuple[int, int], *parts: str) -> float:
    """GMACs of a forward pass of these parts at a size."""
    return sum(GMACS[part][student] for part in parts) * size[0] * size[1] / 256**2


def _evaluation(config: EvaluateConfig) -> float:
    """GMACs of a whole training."""
    (task,), student = config.tasks, str(config.student)
    match task:
        case "linear-sgd":  # features are computed once
            return images_of(config.train) * _backbone(student, config.size, "backbone")
        case "finetune-full":
            images = recipe_of(config.finetune_full).epochs * images_of(config.train)
            return images * TRAINING * _backbone(student, config.size, "backbone")
        case "readout":  # frozen
            c = config.readout
            return c.steps * c.batch_size * _backbone(student, c.crops.size, "backbone")
        case "semantic":
            s = config.semantic
            images = s.steps * s.batch_size * max(1, len(s.mask_counts))
            return images * TRAINING * _backbone(student, s.crops.size, "backbone", "upernet")
        case "segment-finetune":
            images = config.segment.steps * config.segment.batch_size * len(config.mask_counts)
            return images * TRAINING * _backbone(student, config.size, "backbone", "regressor")
        case "detect" | "detect-cascade" | "panoptic":
            detect = config.panoptic.detect if task == "panoptic" else config.detect
            return detect.steps * detect.batch_size * TRAINING * _detection(detect, student, task)
    raise AssertionError(f"no cost of {task}")


def _detection(detect: DetectConfig, student: str, task: str) -> float:
    """Of one training image of the mean shorter side, its longer side 4/3 of that."""
    short = sum(detect.short_side) / 2
    size = round(short), round(min(short * 4 / 3, detect.longest_side))
    heads = BOX_HEAD * (3 if task == "detect-cascade" else 1) + MASK_HEAD
    return _backbone(student, size, "backbone", "pyramid") + heads * detect.rois / 512
