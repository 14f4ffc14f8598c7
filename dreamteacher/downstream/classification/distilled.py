"""The model that label distillation leaves, scored as it is on images with classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dreamteacher.downstream.classification.data import CLASSIFICATION
from dreamteacher.downstream.features import (
    ClassificationData,
    class_metrics,
    device_of,
    frozen,
    take,
    to_input,
)
from dreamteacher.downstream.segmentation.distilled import check_run, run_files
from dreamteacher.downstream.task import Bench, Task
from dreamteacher.downstream.tasks import Metric
from dreamteacher.models.distilled import Distilled, has_head, is_pooled, load_distilled
from dreamteacher.runtime.distributed.device import autocast
from dreamteacher.runtime.errors import UserError, shorten
from dreamteacher.runtime.settings import Precision

if TYPE_CHECKING:
    from dreamteacher.downstream.config import EvaluateConfig


def distilled_classes(
    model: Distilled,
    data: ClassificationData,
    *,
    precision: Precision = "auto",
    batch_size: int = 64,
) -> Iterator[Metric]:
    """Accuracy, balanced accuracy and AUROC of a distilled model as it is, on the test images: nothing is trained.

    Args:
        model: of a run that was distilled from one label an image.
        data: its training images are not looked at.
        precision: of the matrix products.
        batch_size: test images at once.

    Raises:
        UserError: the model labels pixels, or has other classes.
    """
    if not model.pooled:
        raise UserError("The run's head labels pixels, not images.", "Use the task distilled.")
    if set(data.classes) != set(model.classes):
        raise UserError(
            f"The run's head tells {shorten(model.classes)} apart.",
            "Give --train and --test with these subfolders.",
        )
    order = torch.tensor([model.classes.index(name) for name in data.classes])
    yield from class_metrics(_scores(model, data, precision, batch_size)[:, order], data.test_labels)


def _scores(model: Distilled, data: ClassificationData, precision: Precision, batch_size: int) -> Tensor:
    device, scores = device_of(model), []
    for index in torch.arange(len(data.test)).split(batch_size):
        with frozen(model), autocast(device, precision):
            scores.append(model(to_input(take(data.test, index), device)).softmax(1).cpu())
    return torch.cat(scores)


def _of_images(config: EvaluateConfig) -> bool:
    run = Path(config.init).expanduser()
    return has_head(run) and is_pooled(run)


def _run(bench: Bench, _budget: int | None, _seed: int) -> Iterator[Metric]:
    model = load_distilled(bench.run_folder()).to(device_of(bench.student))
    return distilled_classes(model, bench.data, **bench.passes())


TASK = Task(
    name="distilled-classes",
    what="classification, as distilled",
    group=CLASSIFICATION,
    whole="as pretrained",
    default=_of_images,
    seeded=False,
    files=run_files,
    fits=check_run,
    run=_run,
)
