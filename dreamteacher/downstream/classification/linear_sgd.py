"""Linear probe by gradient descent, the published recipe: frozen pooled features, LARS, 90 epochs, batch 4096.

`linear` finds the optimum of a few labels exactly; this one is for all labels of a large set, where the recipe is part
of what is reported.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamteacher.data.seeds import step_generator
from dreamteacher.downstream.classification.config import LinearSgdConfig
from dreamteacher.downstream.classification.data import CLASSIFICATION
from dreamteacher.downstream.classification.linear import standardisation
from dreamteacher.downstream.features import class_metrics
from dreamteacher.downstream.loop import UNKEPT, LongRun, run_steps
from dreamteacher.downstream.task import Task
from dreamteacher.downstream.tasks import Metric
from dreamteacher.runtime.optim import lr_at


def fit_lars(
    x: Tensor, y: Tensor, config: LinearSgdConfig, *, classes: int, run: LongRun = UNKEPT
) -> tuple[Tensor, Tensor]:
    """A linear layer trained by timm's LARS from weights of 0: weight (classes x C) and bias (classes), float32.

    The minimised objective, mean cross-entropy + weight_decay / 2 * ||weight||^2, is that of `fit_logistic`, and so is
    the optimum: LARS scales steps, not where they end. `x` is N x C float32, on the device that trains.

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
    """Accuracy, top-5, balanced accuracy and AUROC of the published linear probe, on all labels; see `knn`."""
    mean, deviation = standardisation(train_x) if config.standardise else (0.0, 1.0)
    x, z = (((part - mean) / deviation).float() for part in (train_x, test_x))
    weight, bias = fit_lars(x, train_y, config, classes=classes, run=run)
    yield from class_metrics((z @ weight.T + bias).softmax(1), test_y)


TASK = Task(
    name="linear-sgd",
    what="linear probe, LARS",
    group=CLASSIFICATION,
    config=LinearSgdConfig,
    long=True,
    run=lambda bench, _budget, seed: linear_sgd(
        *bench.features(), bench.settings, classes=len(bench.data.classes), run=bench.long_run(seed)
    ),
)
