"""The model that label distillation leaves, scored as it is on images with masks or with classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dreamteacher.downstream.classification.data import CLASSIFICATION
from dreamteacher.downstream.classification.finetune import predict
from dreamteacher.downstream.features import class_metrics, device_of
from dreamteacher.downstream.segmentation.data import IN_MEMORY
from dreamteacher.downstream.segmentation.few_masks import score_segmenter
from dreamteacher.downstream.task import Bench, Task
from dreamteacher.downstream.tasks import Metric
from dreamteacher.models.distilled import HEAD, REGRESSOR, has_head, is_pooled, load_distilled
from dreamteacher.models.student import Student
from dreamteacher.runtime.errors import UserError, shorten

if TYPE_CHECKING:
    from dreamteacher.downstream.config import EvaluateConfig


def distilled(bench: Bench, _budget: int | None, _seed: int) -> Iterator[Metric]:
    """mIoU and per-class IoU of the run's model; a UserError where its head does not fit the images."""
    model = load_distilled(bench.run_folder()).to(device_of(bench.student))
    test = bench.data.test
    if model.pooled:
        raise UserError("The run's head labels images, not pixels.", "Use the task distilled-classes.")
    if len(test.classes) > len(model.classes):
        raise UserError(
            f"The run's head tells {len(model.classes)} classes of pixels apart.",
            "Give --images and --masks with these classes.",
        )
    if len(model.classes) > len(test.classes):  # a small test set may lack the last ones
        test = dataclasses.replace(test, classes=model.classes)
    return score_segmenter(model, test, bench.config.ignore_index, **bench.passes())


def distilled_classes(bench: Bench, _budget: int | None, _seed: int) -> Iterator[Metric]:
    """Accuracy, balanced accuracy and AUROC of it; a UserError where it labels pixels, or other classes."""
    model, data = load_distilled(bench.run_folder()).to(device_of(bench.student)), bench.data
    if not model.pooled:
        raise UserError("The run's head labels pixels, not images.", "Use the task distilled.")
    if set(data.classes) != set(model.classes):
        raise UserError(
            f"The run's head tells {shorten(model.classes)} apart.",
            "Give --train and --test with these subfolders.",
        )
    order = torch.tensor([model.classes.index(name) for name in data.classes])
    return class_metrics(predict(model, data.test, **bench.passes())[:, order], data.test_labels)


def run_files(config: EvaluateConfig) -> Sequence[Path]:
    """The neck and the label head of the run in `init`."""
    run = Path(config.init).expanduser()
    return run / REGRESSOR, run / HEAD


def _check_run(_student: Student, config: EvaluateConfig) -> None:
    load_distilled(Path(config.init).expanduser())


def _pooled(config: EvaluateConfig) -> bool | None:
    """Whether the run's head labels images instead of pixels; None where it has none."""
    run = Path(config.init).expanduser()
    return is_pooled(run) if has_head(run) else None


TASK = Task(
    name="distilled", what="segmentation, as distilled", group=IN_MEMORY, whole="as pretrained",
    default=lambda config: _pooled(config) is False,
    seeded=False,
    files=run_files,
    fits=_check_run,
    run=distilled,
)  # fmt: skip

CLASSES = dataclasses.replace(
    TASK, name="distilled-classes", what="classification, as distilled", group=CLASSIFICATION, headline="",
    default=lambda config: _pooled(config) is True,
    run=distilled_classes,
)  # fmt: skip
