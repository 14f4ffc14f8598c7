"""Linear probe by gradient descent, the published recipe: frozen pooled features, LARS, 90 epochs, batch 4096.

`linear` finds the optimum of a few labels exactly; this one is for all labels of a large set, where the recipe
(its steps and its augmentation) is part of what is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamteacher.data.images import Size
from dreamteacher.data.seeds import step_generator
from dreamteacher.downstream.classification.augment import Augmentation, augmented_pass
from dreamteacher.downstream.classification.config import LinearSgdConfig, Source
from dreamteacher.downstream.classification.data import CLASSIFICATION
from dreamteacher.downstream.classification.linear import standardisation
from dreamteacher.downstream.features import ClassificationData, Images, class_metrics, device_of, frozen
from dreamteacher.downstream.loop import UNKEPT, LongRun, Saved, run_steps
from dreamteacher.downstream.task import Bench, Task
from dreamteacher.downstream.tasks import Metric
from dreamteacher.models.student import Student
from dreamteacher.runtime.distributed.device import autocast
from dreamteacher.runtime.optim import lr_at
from dreamteacher.runtime.settings import Precision


def fit_lars(
    features: Callable[[int], Tensor],
    y: Tensor,
    config: LinearSgdConfig,
    *,
    classes: int,
    seed: int,
    saved: Saved | None = None,
) -> tuple[Tensor, Tensor]:
    """A linear layer trained by timm's LARS on the mean cross-entropy, from weights of 0.

    The minimised objective, mean cross-entropy + weight_decay / 2 * ||weight||^2, is that of `fit_logistic`,
    and so is the optimum: LARS scales steps, not where they end.

    Args:
        features: epoch -> N x C float32, on the device that trains.
        y: N class ids (int64).
        config: see `LinearSgdConfig`.
        classes: number of classes.
        seed: of the order of the batches.
        saved: where the training is kept; None: it is not.

    Returns:
        Weight (classes x C) and bias (classes), float32.

    Source: You et al., LARS, arXiv 1708.03888; recipe: DreamTeacher, arXiv 2307.07487, appendix.
    """
    from timm.optim import Lars

    batch = min(config.batch_size, len(y))
    whole = -(-len(y) // batch)  # the last batch of an epoch holds what is left
    total = max(1, round(config.epochs * whole))
    warmup = round(config.warmup_epochs * whole)

    def of_epoch(epoch: int) -> tuple[Tensor, Tensor]:
        x = features(epoch)
        return x, torch.randperm(len(x), generator=step_generator(seed, epoch, "linear-sgd")).to(x.device)

    x, order = of_epoch(min(saved.step if saved else 0, total - 1) // whole)
    y = y.to(x.device)
    weight = nn.Parameter(torch.zeros(classes, x.shape[1], device=x.device))
    bias = nn.Parameter(torch.zeros(classes, device=x.device))
    groups = [
        {"params": [weight], "weight_decay": config.weight_decay, "always_adapt": config.always_adapt},
        {"params": [bias], "weight_decay": 0.0},
    ]
    optimizer = Lars(groups, lr=config.lr, momentum=config.momentum, trust_coeff=config.trust)

    def losses_at(step: int) -> list[Tensor]:
        nonlocal x, order
        epoch, part = divmod(step, whole)
        if part == 0 and step:
            x, order = of_epoch(epoch)
        index = order[part * batch : (part + 1) * batch]
        with torch.enable_grad():
            return [F.cross_entropy(F.linear(x[index], weight, bias), y[index])]

    run_steps(
        [nn.ParameterList([weight, bias])], optimizer, losses_at,
        lambda step: lr_at(step, total=total, warmup=warmup, peak=config.lr), steps=total, saved=saved,
    )  # fmt: skip
    return weight.detach(), bias.detach()


def augmented_features(
    student: Student,
    images: Images,
    size: Size,
    *,
    seed: int,
    view: int,
    source: Source = "file",
    batch_size: int = 128,
    precision: Precision = "auto",
    workers: int = 0,
) -> Tensor:
    """Frozen pooled features of all images, each cropped and mirrored at random.

    Args:
        student: left as it is; runs in evaluation mode.
        images: uint8 N x 3 x H x W, or an image set.
        size: (height, width) of the crops.
        seed: of the draws.
        view: another number, another draw.
        source: what the crops are cut from, see `augmented_batches`.
        batch_size: images at once; changes speed and memory only.
        precision: of the forward pass.
        workers: processes that decode and augment.

    Returns:
        N x C float32 on the CPU.
    """
    device = device_of(student)
    batches = augmented_pass(
        images, Augmentation(size=size), batch_size=batch_size, seed=seed, view=view, source=source,
        workers=workers,
    )  # fmt: skip
    with frozen(student), autocast(device, precision):
        return torch.cat([student.pooled(batch.to(device)).float().cpu() for batch, _ in batches])


def linear_sgd(
    student: Student,
    data: ClassificationData,
    config: LinearSgdConfig,
    *,
    train_x: Tensor,
    test_x: Tensor,
    size: Size,
    batch_size: int = 128,
    run: LongRun = UNKEPT,
) -> Iterator[Metric]:
    """Accuracy, top-5, balanced accuracy and AUROC of the published linear probe, on all labels.

    Features of an augmented pass are extracted once; they are kept when later epochs need them again.

    Args:
        student: left as it is; used for augmented features only.
        data: see `ClassificationData`.
        config: see `LinearSgdConfig`.
        train_x: N x C features of the plain images, from `extract_features`.
        test_x: M x C features.
        size: (height, width) of the augmented images.
        batch_size: images at once.
        run: see `LongRun`; the layer's training is kept.
    """
    mean, deviation = standardisation(train_x) if config.standardise else (0.0, 1.0)
    device = train_x.device
    kept: dict[int, Tensor] = {}

    def features(epoch: int) -> Tensor:
        view = epoch % config.views if config.views else 0
        if view not in kept:
            x = train_x
            if config.views:
                x = augmented_features(
                    student, data.train, size, seed=run.seed, view=view, source=config.crop_from,
                    batch_size=batch_size, precision=run.precision, workers=run.workers,
                ).to(device)  # fmt: skip
            if config.views >= config.epochs:
                kept.clear()  # none comes again
            kept[view] = ((x - mean) / deviation).float()
        return kept[view]

    weight, bias = fit_lars(
        features, data.train_labels, config, classes=len(data.classes), seed=run.seed, saved=run.saved
    )
    scores = ((test_x - mean) / deviation).float() @ weight.T + bias
    yield from class_metrics(scores.softmax(1), data.test_labels)


def _run(bench: Bench, _budget: int | None, seed: int) -> Iterator[Metric]:
    train_x, _, test_x, _ = bench.features()
    return linear_sgd(
        bench.student,
        bench.data,
        bench.settings,
        train_x=train_x,
        test_x=test_x,
        size=bench.config.size,
        batch_size=bench.config.batch_size,
        run=bench.long_run(seed),
    )


TASK = Task(
    name="linear-sgd",
    what="linear probe, LARS",
    group=CLASSIFICATION,
    config=LinearSgdConfig,
    long=True,
    run=_run,
)
