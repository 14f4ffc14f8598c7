"""A linear classifier of each pixel's frozen features, with a few masks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamteacher.data.draws import draw_images
from dreamteacher.data.seeds import step_generator
from dreamteacher.downstream.classification.probes import choose_l2, fit_logistic, standardisation
from dreamteacher.downstream.features import device_of, frozen, to_input
from dreamteacher.downstream.segmentation.data import IN_MEMORY
from dreamteacher.downstream.segmentation.few_masks import score
from dreamteacher.downstream.task import Bench, Task, always
from dreamteacher.downstream.tasks import Metric
from dreamteacher.models.regressor import resize
from dreamteacher.models.student import Student
from dreamteacher.runtime.distributed.device import autocast
from dreamteacher.runtime.settings import Precision

# Pixels that the linear probe is fitted on, at most: bounds its memory (float64) and time.
_LINEAR_PIXELS = 20_000
_L2_GRID = (1.0, 0.1, 0.01, 0.001)


def segment_linear(bench: Bench, masks: int | None, seed: int) -> Iterator[Metric]:
    """mIoU and per-class IoU of a linear classifier of each pixel's frozen features.

    Every level is resized to the finest one and concatenated; the classifier is fitted there and its logits are resized
    to the image. Its L2 strength is chosen by cross-validation over whole labelled images.
    """
    assert masks is not None
    student, precision, ignore_index = bench.student, bench.config.precision, bench.config.ignore_index
    pool, test = bench.data.pool, bench.data.test
    drawn = draw_images(len(pool.images), masks, seed)
    columns = _columns(student, pool.images[drawn], precision)
    finest = (columns.shape[-2], columns.shape[-1])
    coarse = F.interpolate(pool.targets[drawn].float()[:, None], size=finest, mode="nearest-exact")[:, 0]
    y = coarse.long().flatten().to(columns.device)
    x = columns.movedim(1, 3).flatten(0, 2)
    image = torch.arange(len(drawn), device=x.device).repeat_interleave(finest[0] * finest[1])
    keep = (y != ignore_index).nonzero().flatten()
    if len(keep) > _LINEAR_PIXELS:
        order = torch.randperm(len(keep), generator=step_generator(seed, 0, "pixels"))
        keep = keep[order[:_LINEAR_PIXELS].to(keep.device)]
    x, y, image = x[keep], y[keep], image[keep]
    mean, deviation = standardisation(x)
    x = (x.double() - mean) / deviation
    l2 = choose_l2(x, y, image % min(3, masks), classes=len(pool.classes), grid=_L2_GRID)
    weight, bias = fit_logistic(x, y, classes=len(pool.classes), l2=l2, tolerance=1e-4)
    scaled = (weight / deviation).float()
    shift = (bias - (weight / deviation) @ mean).float()

    def predictions() -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.arange(len(test.images)).split(bench.config.batch_size):
            maps = _columns(student, test.images[index], precision)
            logits = torch.einsum("nchw,kc->nkhw", maps, scaled) + shift[:, None, None]
            target = test.targets[index]
            yield resize(logits, (target.shape[-2], target.shape[-1])).argmax(1), target

    yield from score(predictions(), pool.classes, ignore_index)


def _columns(student: Student, images: Tensor, precision: Precision, batch_size: int = 64) -> Tensor:
    """All levels of each position of the finest one: N x (sum of channels) x H/4 x W/4, float32."""
    device = device_of(student)
    parts = []
    for batch in images.split(batch_size):
        with frozen(student), autocast(device, precision):
            maps = [m.float() for m in student(to_input(batch, device))]
        finest = (maps[0].shape[-2], maps[0].shape[-1])
        parts.append(torch.cat([resize(m, finest) for m in maps], dim=1))
    return torch.cat(parts)


TASK = Task(
    name="segment-linear",
    what="segmentation, linear per pixel",
    group=IN_MEMORY,
    unit="masks",
    budgets=lambda config: config.mask_counts,
    default=always,
    run=segment_linear,
)
