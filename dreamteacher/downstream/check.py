"""What `evaluate` can know before it reads an image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dreamteacher.data.layouts.table import check, layout_of
from dreamteacher.downstream.classification.finetune_full import recipe_of
from dreamteacher.downstream.config import TASK_NAMES, EvaluateConfig
from dreamteacher.downstream.detection.config import check_detect
from dreamteacher.downstream.detection.scores import check_scores
from dreamteacher.downstream.features import check_classes
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
from dreamteacher.runtime.distributed.device import pick_device
from dreamteacher.runtime.errors import UserError, did_you_mean

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
