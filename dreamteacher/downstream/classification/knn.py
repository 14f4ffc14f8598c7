"""k nearest neighbours in frozen features: nothing is trained, so only the representation counts."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from dreamteacher.downstream.classification.data import CLASSIFICATION
from dreamteacher.downstream.features import class_metrics
from dreamteacher.downstream.task import Task, always
from dreamteacher.downstream.tasks import Metric
from dreamteacher.metrics import knn_predict


def knn(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, classes: int, k: int = 20
) -> Iterator[Metric]:
    """Accuracy, balanced accuracy and AUROC of the weighted vote of all training images.

    Args:
        train_x: N x C features from `extract_features`.
        train_y: N class ids (int64).
        test_x: M x C features.
        test_y: M class ids (int64).
        classes: number of classes.
        k: neighbours.
    """
    scores = knn_predict(train_x, train_y.to(train_x.device), test_x, classes=classes, k=k, temperature=0.07)
    yield from class_metrics(scores, test_y)


TASK = Task(
    name="knn",
    what="nearest neighbours",
    group=CLASSIFICATION,
    settings=("knn_k",),
    default=always,
    seeded=False,
    run=lambda bench, _budget, _seed: knn(
        *bench.features(), classes=len(bench.data.classes), k=bench.config.knn_k
    ),
)
