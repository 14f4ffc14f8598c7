"""What a backbone is worth: k nearest neighbours, linear probes, fine-tuning, segmentation, detection.

A task is a function (backbone, data, settings) that yields (metric, value) pairs. It leaves the backbone it
was given exactly as it was (weights, buffers, mode): probes freeze it, fine-tuning works on a copy. It knows
no teacher, so every backbone is measured by the same code. This file holds what the tasks share: data,
frozen features and scores of classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from dreamteacher import metrics
from dreamteacher.data.image_set import ImageSet
from dreamteacher.data.images import below, to_float
from dreamteacher.data.layouts.table import Part, image_files
from dreamteacher.downstream.tasks import Metric
from dreamteacher.models.student import Student
from dreamteacher.runtime.distributed.device import autocast
from dreamteacher.runtime.errors import UserError, shorten
from dreamteacher.runtime.settings import Precision

Images: TypeAlias = Tensor | ImageSet
Levels = Literal["last", "all"]


@dataclass(frozen=True, kw_only=True)
class ClassificationData:
    """Labelled images in two parts that share their classes.

    Args:
        train: uint8 N x 3 x H x W or an image set; labels are drawn from here, and the probes may look at all
            of these images without labels.
        train_labels: N class ids (int64).
        test: as `train`; seen by nothing but the final score.
        test_labels: M class ids (int64).
        classes: class names in id order.
    """

    train: Images
    train_labels: Tensor
    test: Images
    test_labels: Tensor
    classes: tuple[str, ...]


def labelled_data(train: ImageSet, test: ImageSet) -> ClassificationData:
    """Two image sets whose folders are their classes.

    Raises:
        UserError: one of them has no classes, or not those of the other.
    """
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
    student: Student,
    images: Images,
    *,
    batch_size: int = 128,
    precision: Precision = "auto",
    levels: Levels = "last",
) -> Tensor:
    """Frozen global features of all images: extract once, then reuse for every probe.

    Args:
        student: left as it is; runs in evaluation mode.
        images: uint8 N x 3 x H x W, or an image set.
        batch_size: images at once; changes speed and memory only.
        precision: of the forward pass.
        levels: "last" averages the coarsest map over its positions; "all" does so with every map and
            concatenates, fine to coarse.

    Returns:
        N x C float32 on the student's device.
    """
    device = device_of(student)
    features = []
    with frozen(student), autocast(device, precision):
        for index in torch.arange(len(images)).split(batch_size):
            batch = to_input(take(images, index), device)
            if levels == "last":
                features.append(student.pooled(batch).float())
            else:
                features.append(torch.cat([m.float().mean((2, 3)) for m in student(batch)], dim=1))
    return torch.cat(features)


def class_counts(folder: Path, part: Part = "train") -> Counter[str]:
    """Images per class of a folder with one subfolder per class, or of LAYOUT:ROOT; only paths are read.

    Raises:
        UserError: there are fewer than two subfolders, or images beside them; a layout has no classes.
    """
    files = image_files(folder, part)
    if files.labels is not None:
        return Counter(files.classes[label] for label in files.labels)
    parts = [below(files.folder, path).split("/") for path in files.paths]
    counts = Counter(names[0] for names in parts if len(names) > 1)
    if not files.by_folder or len(counts) < 2 or any(len(names) == 1 for names in parts):
        raise UserError(
            f"'{folder}' is not sorted into classes.",
            "Put every image into one of at least two subfolders, one per class.",
        )
    return counts


def check_classes(train: Path, test: Path, per_class: int) -> None:
    """Checks two folders of classes by their paths alone.

    Raises:
        UserError: the classes differ, or a training class has fewer than `per_class` images.
    """
    counts, others = class_counts(train), class_counts(test, "val")
    if set(counts) != set(others):
        only = shorten(sorted(set(counts) ^ set(others)))
        raise UserError(
            f"Classes of '{train}' and '{test}' differ: {only} in one of them only.",
            "Give both the same subfolders.",
        )
    name, count = min(counts.items(), key=lambda item: item[1])
    if count < per_class:
        raise UserError(
            f"{per_class} labels per class asked for; class '{name}' of '{train}' has {count} images.",
            "Ask for fewer labels, or add images to that class.",
        )


def class_metrics(scores: Tensor, target: Tensor) -> Iterator[Metric]:
    """Accuracy, top-5 accuracy (of more than 5 classes), balanced accuracy and AUROC.

    AUROC needs every class in the target and is left out otherwise.

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
