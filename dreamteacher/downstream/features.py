"""What the tasks share: data with classes, frozen features, scores of classes.

A task yields (metric, value) pairs and leaves the backbone exactly as it was (weights, buffers, mode): probes
freeze it, fine-tuning works on a copy. It knows no teacher: every backbone is measured by the same code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from dreamteacher import metrics
from dreamteacher.data.image_set import ImageSet
from dreamteacher.data.images import to_float
from dreamteacher.downstream.tasks import Metric
from dreamteacher.models.student import Student
from dreamteacher.runtime.distributed.device import autocast
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.settings import Precision

Images: TypeAlias = Tensor | ImageSet  # a tensor is uint8 N x 3 x H x W


@dataclass(frozen=True, kw_only=True)
class ClassificationData:
    """Labelled images in two parts that share their classes."""

    train: Images  # labels are drawn from here, and the probes may look at all of these images without labels
    train_labels: Tensor  # class ids (int64)
    test: Images  # seen by nothing but the final score
    test_labels: Tensor
    classes: tuple[str, ...]  # names in id order


def labelled_data(train: ImageSet, test: ImageSet) -> ClassificationData:
    """Two image sets whose folders are their classes; a UserError where these are not the same."""
    if train.labels is None or test.labels is None or train.classes != test.classes:
        raise UserError(
            f"'{train.folder}' and '{test.folder}' do not have the same classes.",
            "Put the images of both into the same subfolders, one per class.",
        )
    return ClassificationData(
        train=train, train_labels=train.labels, test=test, test_labels=test.labels, classes=train.classes
    )


def take(images: Images, indices: Tensor) -> Tensor:
    """The uint8 batch K x 3 x H x W of these indices, on the CPU."""
    return images[indices] if isinstance(images, Tensor) else images.get(indices)


def to_input(images: Tensor, device: torch.device) -> Tensor:
    """uint8 images as a student wants them: float32 in [0, 1], channels last, on `device`."""
    return to_float(images.to(device, non_blocking=True), torch.channels_last)


def device_of(module: nn.Module) -> torch.device:
    """Where the module's parameters lie."""
    return next(module.parameters()).device


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within: evaluation mode (BatchNorm uses and keeps its statistics) and no gradients."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True


def extract_features(
    student: Student, images: Images, *, batch_size: int = 128, precision: Precision = "auto"
) -> Tensor:
    """The coarsest map of all images, averaged over its positions: N x C float32 on the student's device."""
    device = device_of(student)
    batches = torch.arange(len(images)).split(batch_size)
    with frozen(student), autocast(device, precision):
        return torch.cat([student.pooled(to_input(take(images, i), device)).float() for i in batches])


def class_metrics(scores: Tensor, target: Tensor) -> Iterator[Metric]:
    """Accuracy, top-5 (of more than 5 classes), balanced accuracy and AUROC (if the target has every class).

    Args:
        scores: N x classes, larger is likelier; probabilities where there are more than two classes.
        target: N class ids (int64).
    """
    scores, target = scores.cpu(), target.cpu()
    pred = scores.argmax(1)
    yield "accuracy", metrics.accuracy(pred, target)
    if scores.shape[1] > 5:
        yield "top5_accuracy", metrics.topk_accuracy(scores, target, 5)
    yield "balanced_accuracy", metrics.balanced_accuracy(pred, target)
    if int((torch.bincount(target, minlength=scores.shape[1]) > 0).sum()) == scores.shape[1]:
        yield "auroc", metrics.auroc(scores, target)
