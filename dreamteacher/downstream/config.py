"""What `evaluate` is asked for, and the checks of it that read no image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from dreamteacher.data.layouts.table import check, layout_of
from dreamteacher.downstream.classification.finetune import FinetuneConfig
from dreamteacher.downstream.classification.finetune_full import FinetuneFullConfig, recipe_of
from dreamteacher.downstream.classification.linear_sgd import LinearSgdConfig
from dreamteacher.downstream.detection.config import DetectConfig, check_detect
from dreamteacher.downstream.detection.scores import check_scores
from dreamteacher.downstream.features import check_classes
from dreamteacher.downstream.panoptic.train import PanopticConfig
from dreamteacher.downstream.segmentation.few_masks import SegmentConfig
from dreamteacher.downstream.segmentation.readout import ReadoutConfig
from dreamteacher.downstream.segmentation.semantic import SemanticConfig
from dreamteacher.downstream.sources import check_masks, test_source
from dreamteacher.downstream.tasks import (
    CLASSIFICATION,
    DETECTION,
    DISTILLED,
    PANOPTIC,
    PUBLISHED,
    SEGMENTATION,
    STREAMED,
)
from dreamteacher.models.distilled import has_head, is_pooled
from dreamteacher.runtime.distributed.device import Precision, pick_device
from dreamteacher.runtime.errors import UserError, did_you_mean

Task = Literal[
    "knn", "linear", "finetune", "segment-frozen", "segment-finetune", "segment-linear", "distilled",
    "distilled-classes", "semantic", "readout", "detect", "detect-cascade", "panoptic", "linear-sgd",
    "finetune-full",
]  # fmt: skip
TASK_NAMES: tuple[str, ...] = get_args(Task)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluate any backbone: kNN, linear probe, fine-tuning, segmentation, detection, with a few labels."""

    preset: str | None = None
    """Begin with the published settings of a benchmark (`list presets`); settings that are given win."""
    student: str | None = None
    """timm name of the backbone; none: the one that a run or export in `init` was made with."""
    init: str = "random"
    """random, imagenet (timm's weights), or the path of weights, an export folder or a run folder."""
    tasks: tuple[Task, ...] = ()
    """Which tasks; none: all that the folders allow, but linear-sgd, finetune-full, semantic, readout, panoptic (long)."""
    train: Path | None = None
    """Folder with one subfolder of images per class, or imagenet:ROOT: for knn, linear, finetune."""
    test: Path | None = None
    """Folder with the same classes, for their scores; none: the validation part of the layout in `train`."""
    images: Path | None = None
    """Images that have masks (or instances); or LAYOUT:ROOT (ade20k ...), masks included."""
    masks: Path | None = None
    """Their masks: a folder of images of class ids, a COCO-style JSON file, or a folder of .npy files."""
    test_images: Path | None = None
    """Images for these scores; none: a layout's own, half of `images`, or where `test_instances` are."""
    test_masks: Path | None = None
    """Their masks."""
    binary_masks: bool = False
    """Masks are black and white: class 0 and class 1."""
    instances: Path | None = None
    """COCO JSON file, or folder of PNGs (0 = background, k = k-th object) under the images' names; none for a layout."""
    test_instances: Path | None = None
    """As `instances`, for the detection scores; none: half of the images is set aside."""
    segments: Path | None = None
    """COCO-panoptic JSON file, for panoptic; its PNGs are in `masks`."""
    test_segments: Path | None = None
    """As `segments`, of `test_images` and `test_masks`; none: half of the images is set aside."""
    labels: tuple[int, ...] = (10, 50)
    """Labelled images per class for linear and finetune; each number is a result of its own."""
    mask_counts: tuple[int, ...] = (10,)
    """Labelled images for the segmentation tasks; each number is a result of its own."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of draws, heads and batches; a random backbone is a new one for each."""
    size: tuple[int, int] = (224, 224)
    """Height and width in pixels, multiples of 32."""
    neck: bool = False
    """Start the segmentation head's neck from the run's (what mixed pretraining transfers beside the backbone)."""
    knn_k: int = 20
    """Neighbours of knn."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Training of finetune."""
    linear_sgd: LinearSgdConfig = field(default_factory=LinearSgdConfig)
    """Training of linear-sgd."""
    finetune_full: FinetuneFullConfig = field(default_factory=FinetuneFullConfig)
    """Training of finetune-full."""
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    """Training of segment-frozen and segment-finetune."""
    detect: DetectConfig = field(default_factory=DetectConfig)
    """Detector and training of detect and detect-cascade."""
    semantic: SemanticConfig = field(default_factory=SemanticConfig)
    """Training and test of semantic."""
    readout: ReadoutConfig = field(default_factory=ReadoutConfig)
    """Training of readout."""
    panoptic: PanopticConfig = field(default_factory=PanopticConfig)
    """Model and training of panoptic."""
    batch_size: int = 128
    """Images at once where nothing is trained: changes speed and memory only."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    precision: Precision = "auto"
    """Autocast dtype; auto: bfloat16 where the hardware has it."""
    strict: bool = False
    """Stop at a damaged image instead of leaving it out."""
    cache_gb: float = 2.0
    """Decoded images are kept in memory up to this size."""
    workers: int = 2
    """Processes that decode images."""
    method: str | None = None
    """What the rows are called in tables; none: random init, ImageNet, DreamTeacher or the path's name."""
    out: Path | None = None
    """Folder whose results.jsonl the rows are added to; rows that are there already are not computed again."""
    save_minutes: float = 10.0
    """Minutes between checkpoints of a long training in `out`; the same command resumes it."""
    dry_run: bool = False
    """Only check settings, data and weights, and print what would be done."""


# Tasks that depend on no draw of labels.
UNDRAWN = ("knn", *DISTILLED)


def with_masks(tasks: Sequence[str]) -> bool:
    """Whether one of these tasks needs images with masks."""
    return bool({*SEGMENTATION, "distilled"} & set(tasks))


def with_classes(tasks: Sequence[str]) -> bool:
    """Whether one of these tasks needs classes of images."""
    return bool({*CLASSIFICATION, *PUBLISHED, "distilled-classes"} & set(tasks))


def check_config(config: EvaluateConfig) -> tuple[str, ...]:
    """The tasks that will run; reads no image.

    Raises:
        UserError: for an unknown task, missing or differing folders, or more labels than there are.
    """
    for task in config.tasks:
        if task not in TASK_NAMES:
            raise UserError(
                f"There is no task '{task}'.{did_you_mean(task, TASK_NAMES)}",
                f"Tasks: {', '.join(TASK_NAMES)}.",
            )
    pick_device(config.device)
    _check_numbers(config)
    tasks: tuple[str, ...] = config.tasks or (
        *(CLASSIFICATION if config.train or config.test else ()),
        *(SEGMENTATION if _masked(config) else ()),
        *_distilled_task(config),
        *(DETECTION if config.instances else ()),
    )
    if not tasks:
        raise UserError(
            "There is nothing to evaluate on.",
            "Give --train and --test (one folder per class), or --images and --masks (or --instances).",
        )
    if "finetune-full" in tasks:
        recipe_of(config.finetune_full)
    if with_classes(tasks):
        test = test_source(config.train, config.test)
        if config.train is None or test is None:
            raise UserError("knn, linear and finetune need labelled images.", "Give both --train and --test.")
        drawn = set(tasks) & {"linear", "finetune"}
        check_classes(config.train, test, max(config.labels) if drawn else 1)
    if with_masks(tasks) or set(tasks) & set(STREAMED):
        check_masks(*mask_places(config))
    if set(tasks) & set(DETECTION):
        check_detect(config.detect)
        check_scores()
        if config.images is not None and layout_of(config.images) is not None:
            if config.instances is not None:
                raise UserError(f"'{config.images}' comes with its instances.", "Leave out --instances.")
            check(config.images, "instances")
        elif config.images is None or config.instances is None:
            raise UserError("The detection tasks need instances.", "Give both --images and --instances.")
        elif config.test_images is not None and config.test_instances is None and config.test_masks is None:
            raise UserError("The test images have no instances.", "Give --test-instances too.")
    if set(tasks) & set(PANOPTIC):
        check_detect(config.panoptic.detect)
        if config.images is not None and layout_of(config.images) is not None:
            check(config.images, "panoptic")
        elif None in (config.images, config.masks, config.segments):
            raise UserError("panoptic needs segments.", "Give --images, --masks and --segments.")
    for place in (config.out, *config.out.parents) if config.out is not None else ():
        if place.exists():
            if not place.is_dir() or not os.access(place, os.W_OK):
                raise UserError(f"'{place}' is no folder that can be written.", "Choose another --out.")
            break
    return tasks


def _check_numbers(config: EvaluateConfig) -> None:
    wanted = {"labels": 1, "mask_counts": 2, "seeds": 0}
    for name, least in wanted.items():
        values = getattr(config, name)
        if not values or min(values) < least or len(set(values)) < len(values):
            raise UserError(
                f"{name} = {values or 'nothing'}: expected different numbers, each at least {least}.",
                f"Give for example {EvaluateConfig.__dataclass_fields__[name].default}.",
            )
    if any(side < 32 or side % 32 for side in config.size):
        raise UserError(
            f"size {config.size[0]}x{config.size[1]} does not fit strides up to 32.",
            "Give height and width as multiples of 32.",
        )
    if min(config.batch_size, config.knn_k) < 1:
        raise UserError("batch_size or knn_k is below 1.", "Give at least 1.")
    if config.save_minutes < 0:
        raise UserError(f"save_minutes is {config.save_minutes}.", "Give 0 (after every step) or more.")


def mask_places(config: EvaluateConfig) -> tuple[Path | None, Path | None, Path | None, Path | None]:
    """Images, masks, test images, test masks."""
    return config.images, config.masks, config.test_images, config.test_masks


def _masked(config: EvaluateConfig) -> bool:
    """Whether the folders are those of the segmentation tasks."""
    return config.masks is not None or (config.images is not None and config.instances is None)


def _distilled_task(config: EvaluateConfig) -> tuple[str, ...]:
    """The task that scores the label head of the run in `init`, where it has one and there is data for it."""
    run = Path(config.init).expanduser()
    if not has_head(run):
        return ()
    if is_pooled(run):
        return ("distilled-classes",) if config.train or config.test else ()
    return ("distilled",) if _masked(config) else ()


def budgets(task: str, config: EvaluateConfig) -> tuple[int | None, ...]:
    """Labels per class, masks or images that a task runs with."""
    if task in UNDRAWN or task in PUBLISHED:
        return (None,)
    if task in STREAMED:
        return {"semantic": config.semantic.masks, "readout": config.readout.masks}[task] or (None,)
    if task in PANOPTIC:
        return config.panoptic.detect.images or (None,)
    if task in DETECTION:
        return config.detect.images or (None,)
    return config.mask_counts if task in SEGMENTATION else config.labels
