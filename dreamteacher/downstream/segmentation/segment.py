"""Segmentation with a few masks and a light UPerNet head: the backbone frozen, or fine-tuned with it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from dreamteacher.data.draws import draw_images
from dreamteacher.data.labelled_set import LabelledSet
from dreamteacher.data.split import Split
from dreamteacher.downstream.segmentation.config import SegmentConfig
from dreamteacher.downstream.segmentation.data import IN_MEMORY
from dreamteacher.downstream.segmentation.few_masks import score_segmenter, train_segmenter
from dreamteacher.downstream.task import Bench, Task, always
from dreamteacher.downstream.tasks import Metric
from dreamteacher.models.distilled import REGRESSOR, neck_weights
from dreamteacher.models.student import Student
from dreamteacher.runtime.settings import Precision


def segment(
    student: Student,
    data: Split[LabelledSet],
    config: SegmentConfig,
    *,
    masks: int,
    freeze: bool,
    seed: int,
    ignore_index: int = 255,
    precision: Precision = "auto",
    batch_size: int = 64,
    neck: Mapping[str, Tensor] | None = None,
) -> Iterator[Metric]:
    """mIoU and per-class IoU on the test set after `train_segmenter` with `masks` images drawn from the pool."""
    pool = data.pool
    drawn = draw_images(len(pool.images), masks, seed)
    model = train_segmenter(
        student, pool.images[drawn], pool.targets[drawn], config, classes=len(pool.classes), freeze=freeze,
        seed=seed, ignore_index=ignore_index, precision=precision, neck=neck,
    )  # fmt: skip
    yield from score_segmenter(model, data.test, ignore_index, precision=precision, batch_size=batch_size)


def _run(bench: Bench, masks: int | None, seed: int, *, freeze: bool) -> Iterator[Metric]:
    config = bench.config
    assert masks is not None
    return segment(
        bench.student, bench.data, config.segment, masks=masks, freeze=freeze, seed=seed,
        ignore_index=config.ignore_index, neck=neck_weights(bench.run_folder()) if config.neck else None,
        **bench.passes(),
    )  # fmt: skip


TASK = Task(
    name="segment-finetune",
    what="segmentation, fine-tuned",
    group=IN_MEMORY,
    unit="masks",
    settings=("segment",),
    budgets=lambda config: config.mask_counts,
    default=always,
    files=lambda config: (Path(config.init).expanduser() / REGRESSOR,) if config.neck else (),
    run=functools.partial(_run, freeze=False),
)

FROZEN = dataclasses.replace(
    TASK,
    name="segment-frozen",
    what="segmentation, frozen backbone",
    run=functools.partial(_run, freeze=True),
)
