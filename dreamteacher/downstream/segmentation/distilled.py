"""The model that label distillation leaves: backbone, neck and label head of a run, ready to label images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dreamteacher.downstream.features import (
    ClassificationData,
    class_metrics,
    device_of,
    frozen,
    take,
    to_input,
)
from dreamteacher.downstream.segmentation.few_masks import SegmentationData, score_segmenter
from dreamteacher.downstream.tasks import Metric
from dreamteacher.models.distilled import Distilled
from dreamteacher.runtime.distributed.device import autocast
from dreamteacher.runtime.errors import UserError, shorten
from dreamteacher.runtime.settings import Precision


def distilled(
    model: Distilled,
    *,
    segmentation: SegmentationData | None,
    classification: ClassificationData | None,
    ignore_index: int = 255,
    precision: Precision = "auto",
    batch_size: int = 64,
) -> Iterator[Metric]:
    """Scores of a distilled model as it is, on the test images: nothing is trained.

    Masks: mIoU and per-class IoU. One label an image: accuracy, balanced accuracy, AUROC.

    Raises:
        UserError: when the test set is missing or has other classes.
    """
    if model.pooled:
        if classification is None or set(classification.classes) != set(model.classes):
            raise UserError(
                f"The run's head tells {shorten(model.classes)} apart.",
                "Give --train and --test with these subfolders.",
            )
        order = torch.tensor([model.classes.index(name) for name in classification.classes])
        yield from class_metrics(_scores(model, classification, precision, batch_size)[:, order],
                                 classification.test_labels)  # fmt: skip
        return
    if segmentation is None or len(segmentation.test.classes) > len(model.classes):
        raise UserError(
            f"The run's head tells {len(model.classes)} classes of pixels apart.",
            "Give --images and --masks with these classes.",
        )
    test = segmentation.test
    if len(model.classes) > len(test.classes):  # a small test set may lack the last ones
        test = replace(test, classes=model.classes)
    yield from score_segmenter(model, test, ignore_index, precision=precision, batch_size=batch_size)


def _scores(model: Distilled, data: ClassificationData, precision: Precision, batch_size: int) -> Tensor:
    device, scores = device_of(model), []
    for index in torch.arange(len(data.test)).split(batch_size):
        with frozen(model), autocast(device, precision):
            scores.append(model(to_input(take(data.test, index), device)).softmax(1).cpu())
    return torch.cat(scores)
