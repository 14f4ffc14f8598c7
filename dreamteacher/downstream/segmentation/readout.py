"""Foreground/background read-out: how well a light head finds objects in the maps of a frozen backbone."""

from __future__ import annotations

from collections.abc import Iterator

from dreamteacher.data.masks.reader import MaskedImages
from dreamteacher.data.split import Split
from dreamteacher.downstream.loop import UNKEPT, LongRun
from dreamteacher.downstream.segmentation.config import ReadoutConfig
from dreamteacher.downstream.segmentation.crops import drawn_files
from dreamteacher.downstream.segmentation.data import STREAMED
from dreamteacher.downstream.segmentation.semantic import FCNHead, score_files, train_dense
from dreamteacher.downstream.task import Task
from dreamteacher.downstream.tasks import Metric
from dreamteacher.models.student import Student
from dreamteacher.runtime.errors import UserError


def level_of(student: Student, config: ReadoutConfig) -> int:
    """The number of the map that is read; a UserError where the backbone has none of that stride."""
    strides = [spec.stride for spec in student.specs]
    if config.stride not in strides:
        raise UserError(
            f"'{student.name}' has no map of stride {config.stride}.",
            f"Set --readout.stride to one of {', '.join(map(str, strides))}.",
        )
    return strides.index(config.stride)


def readout(
    student: Student,
    data: Split[MaskedImages],
    config: ReadoutConfig,
    *,
    masks: int | None = None,
    run: LongRun = UNKEPT,
) -> Iterator[Metric]:
    """mIoU, accuracy and IoU per class of a head on the frozen backbone's map of one stride, on usually two classes.

    `masks` images to train on (None: all) are drawn by the run's seed.

    Source: section 8 of arXiv 2307.07487: frozen backbone, FCN, SGD 0.01, poly 0.9, 20k iterations. Neither the
    head's layers nor the map are stated: torchvision's FCN head on the coarsest map, not dilated.
    """
    level, files, training = level_of(student, config), data.pool, config.training()
    model = train_dense(
        student, drawn_files(files, masks, run.seed), training,
        lambda: FCNHead(student.specs, len(files.classes), level, config.dropout), freeze=True, run=run,
    )  # fmt: skip
    yield from score_files(model, data.test, training, precision=run.precision, workers=run.workers)


TASK = Task(
    name="readout",
    what="read-out, frozen backbone",
    group=STREAMED,
    unit="masks",
    config=ReadoutConfig,
    budgets=lambda config: config.readout.mask_counts,
    long=True,
    fits=lambda student, config: level_of(student, config.readout),
    run=lambda bench, masks, seed: readout(
        bench.student, bench.data, bench.settings, masks=masks, run=bench.long_run(seed)
    ),
)
