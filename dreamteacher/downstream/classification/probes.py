"""Probes of frozen features: k nearest neighbours and linear classifiers; the backbone stays as it is.

`linear` finds the optimum of a few labels exactly; `linear_sgd` is the published recipe for all labels of a
large set (LARS, 90 epochs, batch 4096), whose steps are part of what is reported.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamteacher.data.draws import draw_labels
from dreamteacher.data.seeds import step_generator
from dreamteacher.downstream.classification.config import LinearSgdConfig
from dreamteacher.downstream.classification.data import CLASSIFICATION
from dreamteacher.downstream.features import class_metrics
from dreamteacher.downstream.loop import UNKEPT, LongRun, run_steps
from dreamteacher.downstream.task import Bench, Task, always
from dreamteacher.downstream.tasks import Metric
from dreamteacher.metrics import knn_predict
from dreamteacher.runtime.optim import lr_at

# On standardised features, strongest first; chosen strengths lay between 0.3 and 10 for 10 to 50 labels.
L2_GRID = (10.0, 3.0, 1.0, 0.3, 0.1, 0.01)


def knn(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, classes: int, k: int = 20
) -> Iterator[Metric]:
    """Accuracy, balanced accuracy and AUROC of the weighted vote of the `k` nearest training images.

    Features N x C and M x C are those of `extract_features`, classes are int64.
    """
    scores = knn_predict(train_x, train_y.to(train_x.device), test_x, classes=classes, k=k, temperature=0.07)
    yield from class_metrics(scores, test_y)


def fit_logistic(
    x: Tensor, y: Tensor, *, classes: int, l2: float, tolerance: float = 1e-8, max_iter: int = 1000
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression: mean cross-entropy + l2 / 2 * ||weight||^2, the bias not penalised.

    scikit-learn's C is 1 / (l2 * N); for two classes 2 / (l2 * N), because there it penalises one weight
    vector, the difference of our two. LBFGS stops when no gradient element exceeds `tolerance`.

    Returns:
        Weight (classes x C) and bias (classes), float64, on the device of `x`, N x C.
    """
    x = x.double()
    basis = None
    if x.shape[0] < x.shape[1]:
        # The optimal weight lies in the span of the rows: N instead of C unknowns per class, nothing lost.
        u, s, basis = torch.linalg.svd(x, full_matrices=False)
        x = u * s
    weight = x.new_zeros(classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iter, tolerance_grad=tolerance, tolerance_change=0.0, history_size=20,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, y) + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[arg-type]
    found = weight.detach() if basis is None else weight.detach() @ basis
    return found, bias.detach()


def choose_l2(x: Tensor, y: Tensor, folds: Tensor, *, classes: int, grid: Sequence[float] = L2_GRID) -> float:
    """The strength of `grid` with the lowest cross-entropy on held-out folds (the mean over all rows).

    Rows that belong together share a fold id. With one fold there is nothing to hold out, and the middle of
    the grid is taken; of equals the first wins.
    """
    names = folds.unique().tolist()
    if len(names) < 2:
        return grid[len(grid) // 2]
    losses = dict.fromkeys(grid, 0.0)
    for fold in names:
        held_out = folds == fold
        for l2 in grid:
            weight, bias = fit_logistic(x[~held_out], y[~held_out], classes=classes, l2=l2, tolerance=1e-4)
            scores = x[held_out].double() @ weight.T + bias
            losses[l2] += float(F.cross_entropy(scores, y[held_out], reduction="sum"))
    return min(grid, key=lambda l2: losses[l2])


def balanced_folds(y: Tensor, count: int, seed: int) -> Tensor:
    """Fold ids (N) that spread each class evenly and at random over at most `count` folds."""
    generator = step_generator(seed, 0, "folds")
    count = max(1, min(count, int(torch.bincount(y).max())))
    folds = torch.empty_like(y)
    for c in y.unique().tolist():
        members = (y == c).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator).to(y.device)
        folds[members[order]] = torch.arange(len(members), device=y.device) % count
    return folds


def linear(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, classes: int, labels: int, seed: int
) -> Iterator[Metric]:
    """Accuracy, balanced accuracy and AUROC of a linear probe on `labels` images per class, by the seed.

    The features (see `knn`) are standardised by mean and deviation over ALL training images, which takes no
    label. The test images serve for the final score alone.
    """
    drawn = draw_labels(train_y, labels, classes=classes, seed=seed).to(train_x.device)
    mean, deviation = standardisation(train_x)
    x = (train_x[drawn].double() - mean) / deviation
    y = train_y.to(train_x.device)[drawn]
    l2 = choose_l2(x, y, balanced_folds(y, 5, seed), classes=classes)
    weight, bias = fit_logistic(x, y, classes=classes, l2=l2)
    scores = ((test_x.double() - mean) / deviation) @ weight.T + bias
    yield from class_metrics(scores.softmax(1), test_y)


def standardisation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each column of N x C (float64); a constant column gets deviation 1."""
    x = x.double()
    deviation = x.std(0, unbiased=False)
    return x.mean(0), torch.where(deviation > 1e-8, deviation, 1.0)


def fit_lars(
    x: Tensor, y: Tensor, config: LinearSgdConfig, *, classes: int, run: LongRun = UNKEPT
) -> tuple[Tensor, Tensor]:
    """A layer trained by timm's LARS from weights of 0: weight (classes x C) and bias (classes), float32.

    The minimised objective, mean cross-entropy + weight_decay / 2 * ||weight||^2, is that of `fit_logistic`,
    and so is the optimum: LARS scales steps, not where they end. `x` is N x C float32, on the device that
    trains.

    Source: You et al., LARS, arXiv 1708.03888; recipe: DreamTeacher, arXiv 2307.07487, appendix.
    """
    from timm.optim import Lars

    batch = min(config.batch_size, len(y))
    per_epoch = -(-len(y) // batch)  # the last batch of an epoch holds what is left
    total = max(1, round(config.epochs * per_epoch))
    warmup = round(config.warmup_epochs * per_epoch)
    y = y.to(x.device)
    weight = nn.Parameter(torch.zeros(classes, x.shape[1], device=x.device))
    bias = nn.Parameter(torch.zeros(classes, device=x.device))
    groups = [
        {"params": [weight], "weight_decay": config.weight_decay},
        {"params": [bias], "weight_decay": 0.0},
    ]
    optimizer = Lars(groups, lr=config.lr, momentum=config.momentum)

    @functools.lru_cache(maxsize=1)
    def order_of(epoch: int) -> Tensor:
        return torch.randperm(len(x), generator=step_generator(run.seed, epoch, "linear-sgd")).to(x.device)

    def losses_at(step: int) -> list[Tensor]:
        epoch, part = divmod(step, per_epoch)
        index = order_of(epoch)[part * batch : (part + 1) * batch]
        with torch.enable_grad():
            return [F.cross_entropy(F.linear(x[index], weight, bias), y[index])]

    run_steps(
        [nn.ParameterList([weight, bias])], optimizer, losses_at,
        lambda step: lr_at(step, total=total, warmup=warmup, peak=config.lr), steps=total, saved=run.saved,
    )  # fmt: skip
    return weight.detach(), bias.detach()


def linear_sgd(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    config: LinearSgdConfig,
    *,
    classes: int,
    run: LongRun = UNKEPT,
) -> Iterator[Metric]:
    """Accuracy, top-5, balanced accuracy and AUROC of the published linear probe; see `knn`."""
    mean, deviation = standardisation(train_x) if config.standardise else (0.0, 1.0)
    x, z = (((part - mean) / deviation).float() for part in (train_x, test_x))
    weight, bias = fit_lars(x, train_y, config, classes=classes, run=run)
    yield from class_metrics((z @ weight.T + bias).softmax(1), test_y)


def _run(bench: Bench, labels: int | None, seed: int) -> Iterator[Metric]:
    assert labels is not None
    return linear(*bench.features(), classes=len(bench.data.classes), labels=labels, seed=seed)


KNN = Task(
    name="knn", what="nearest neighbours", group=CLASSIFICATION, settings=("knn_k",), default=always,
    seeded=False,
    run=lambda bench, _budget, _seed: knn(
        *bench.features(), classes=len(bench.data.classes), k=bench.config.knn_k
    ),
)  # fmt: skip

LINEAR = Task(
    name="linear", what="linear probe", group=CLASSIFICATION, unit="labels per class",
    budgets=lambda config: config.labels,
    default=always,
    run=_run,
)  # fmt: skip

LINEAR_SGD = Task(
    name="linear-sgd", what="linear probe, LARS", group=CLASSIFICATION, config=LinearSgdConfig, long=True,
    run=lambda bench, _budget, seed: linear_sgd(
        *bench.features(), bench.settings, classes=len(bench.data.classes), run=bench.long_run(seed)
    ),
)  # fmt: skip
