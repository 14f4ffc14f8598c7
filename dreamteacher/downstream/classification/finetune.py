"""Fine-tuning: the whole backbone and a linear head, trained on a few labelled images per class.

From a random initialisation the same code is the baseline of training with the labels only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamteacher.data.draws import draw_labels
from dreamteacher.data.seeds import step_generator
from dreamteacher.downstream.classification.config import FinetuneConfig, Optimizer
from dreamteacher.downstream.classification.data import CLASSIFICATION
from dreamteacher.downstream.features import (
    Images,
    class_metrics,
    device_of,
    frozen,
    take,
    to_input,
)
from dreamteacher.downstream.loop import Saved, run_steps
from dreamteacher.downstream.task import Bench, Task, always
from dreamteacher.downstream.tasks import Metric
from dreamteacher.models.student import Student
from dreamteacher.runtime.distributed.device import autocast, seeded
from dreamteacher.runtime.optim import build_optimizer, lr_at, parameter_groups, poly_lr_at
from dreamteacher.runtime.settings import Precision


def shuffled_batches(count: int, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`steps` batches of indices below `count`, from one permutation after another, none of them partial."""
    batch_size = min(batch_size, count)
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(left) < batch_size:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        yield left[:batch_size]
        left = left[batch_size:]


def adamw_or_sgd(name: Optimizer, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """AdamW with betas 0.9 and 0.999, or SGD with momentum 0.9."""
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9)
    return build_optimizer("adamw", groups, lr, (0.9, 0.999))


def train(
    modules: Sequence[tuple[nn.Module, float]],
    loss_at: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    weight_decay: float,
    warmup: float = 0.1,
    optimizer: Optimizer = "adamw",
    power: float | None = None,
    saved: Saved | None = None,
    title: str = "",
) -> None:
    """Trains with a linear warm-up (a share of the steps) and a decay: polynomial with `power`, or cosine.

    `modules` are pairs (module, factor on its learning rate), whose vectors (biases, norms) have no weight
    decay; what is not listed is not trained. `loss_at`, step -> loss with a graph, is called for each step in
    turn, from `saved.step` on.
    """
    groups: list[dict[str, Any]] = []
    for module, factor in modules:
        groups += [{**group, "factor": factor} for group in parameter_groups([module], weight_decay)]
    groups = [group for group in groups if group["params"]]
    first = max(1, round(warmup * steps))

    def rate_at(step: int) -> float:
        if power is None:
            return lr_at(step, total=steps, warmup=first, peak=lr)
        return poly_lr_at(step, total=steps, warmup=first, peak=lr, power=power)

    run_steps(
        [module for module, _ in modules], adamw_or_sgd(optimizer, groups, lr),
        lambda step: [loss_at(step)], rate_at, steps=steps, saved=saved, title=title,
    )  # fmt: skip


def recalibrate(model: nn.Module, forward: Callable[[], object]) -> None:
    """Sets the running statistics of every BatchNorm to the average over the batches of `forward`.

    After a few dozen steps on tiny batches a running average still lags behind the weights. Everything else
    in the model runs in evaluation mode, in which it stays.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    with torch.no_grad():
        forward()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


class Classifier(nn.Module):
    """A backbone, which is taken in and not copied, and a linear head on its globally averaged last map."""

    def __init__(self, student: Student, classes: int) -> None:
        super().__init__()
        self.student = student
        self.head = nn.Linear(student.specs[-1].channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1], N x 3 x H x W -> logits N x classes."""
        return self.head(self.student.pooled(images))


def augment(images: Tensor, *, flip: bool, crop: float, generator: torch.Generator) -> Tensor:
    """Mirrors half of N x 3 x H x W at random; shifts each by up to a share `crop` of its sides."""
    count, _, height, width = images.shape
    if flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
        images = torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(3), images)
    down, right = round(crop * height), round(crop * width)
    if not down and not right:
        return images
    rows = _shifted(height, down, count, generator).to(images.device)
    columns = _shifted(width, right, count, generator).to(images.device)
    each = torch.arange(count, device=images.device)
    return images[each[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _shifted(length: int, most: int, count: int, generator: torch.Generator) -> Tensor:
    """Source positions (count x length) of shifts in [-most, most], reflected at the border."""
    shift = torch.randint(-most, most + 1, (count, 1), generator=generator)
    position = (torch.arange(length)[None] + shift).abs()
    return torch.where(position >= length, 2 * (length - 1) - position, position)


def train_classifier(
    student: Student,
    images: Tensor,
    labels: Tensor,
    config: FinetuneConfig,
    *,
    classes: int,
    seed: int,
    precision: Precision = "auto",
) -> Classifier:
    """A classifier trained from a copy of the backbone on uint8 images with class ids, in evaluation mode."""
    device = device_of(student)
    images, labels = images.to(device), labels.to(device)
    generator = step_generator(seed, 0, "finetune")
    with seeded(seed, device):
        model = Classifier(copy.deepcopy(student), classes).to(device).train()
        batches = shuffled_batches(len(images), config.batch_size, config.steps, generator)

        def loss_at(step: int) -> Tensor:
            index = next(batches).to(device)
            batch = augment(images[index], flip=config.flip, crop=config.crop, generator=generator)
            with autocast(device, precision):
                logits = model(to_input(batch, device))
            return F.cross_entropy(logits.float(), labels[index])

        parts = [(model.student, config.backbone_lr_factor), (model.head, 1.0)]
        train(parts, loss_at, steps=config.steps, lr=config.lr, weight_decay=config.weight_decay)

        def calibrate() -> None:
            with autocast(device, precision):
                for part in images.tensor_split(-(-len(images) // 128)):  # even parts: never one image alone
                    model(to_input(part, device))

        recalibrate(model, calibrate)
    return model


def predict(
    model: nn.Module, images: Images, *, batch_size: int = 128, precision: Precision = "auto"
) -> Tensor:
    """Class probabilities N x classes (float32, on the CPU) of images in evaluation mode."""
    device, scores = device_of(model), []
    with frozen(model), autocast(device, precision):
        for index in torch.arange(len(images)).split(batch_size):
            scores.append(model(to_input(take(images, index), device)).float().softmax(1).cpu())
    return torch.cat(scores)


def finetune(bench: Bench, labels: int | None, seed: int) -> Iterator[Metric]:
    """Accuracy, balanced accuracy and AUROC after fine-tuning on labelled images drawn by the seed."""
    assert labels is not None
    data, classes = bench.data, len(bench.data.classes)
    drawn = draw_labels(data.train_labels, labels, classes=classes, seed=seed)
    images, targets, precision = take(data.train, drawn), data.train_labels[drawn], bench.config.precision
    model = train_classifier(
        bench.student, images, targets, bench.settings, classes=classes, seed=seed, precision=precision
    )
    return class_metrics(predict(model, data.test, **bench.passes()), data.test_labels)


TASK = Task(
    name="finetune", what="fine-tuning", group=CLASSIFICATION, unit="labels per class", config=FinetuneConfig,
    budgets=lambda config: config.labels,
    default=always,
    run=finetune,
)  # fmt: skip
