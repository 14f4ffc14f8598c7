"""The model that label distillation leaves, scored as it is on images with masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dreamteacher.data.labelled_set import LabelledSet
from dreamteacher.data.split import Split
from dreamteacher.downstream.features import device_of
from dreamteacher.downstream.segmentation.data import IN_MEMORY
from dreamteacher.downstream.segmentation.few_masks import score_segmenter
from dreamteacher.downstream.task import Bench, Task
from dreamteacher.downstream.tasks import Metric
from dreamteacher.models.distilled import HEAD, REGRESSOR, Distilled, has_head, is_pooled, load_distilled
from dreamteacher.models.student import Student
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.settings import Precision

if TYPE_CHECKING:
    from dreamteacher.downstream.config import EvaluateConfig


def distilled(
    model: Distilled,
    data: Split[LabelledSet],
    *,
    ignore_index: int = 255,
    precision: Precision = "auto",
    batch_size: int = 64,
) -> Iterator[Metric]:
    """mIoU and per-class IoU of a distilled model as it is, on the test images: nothing is trained.

    Args:
        model: of a run that was distilled from masks.
        data: its training images are not looked at.
        ignore_index: mask id that is not scored.
        precision: of the matrix products.
        batch_size: test images at once.

    Raises:
        UserError: the model tells whole images apart, or fewer classes than there are.
    """
    test = data.test
    if model.pooled:
        raise UserError("The run's head labels images, not pixels.", "Use the task distilled-classes.")
    if len(test.classes) > len(model.classes):
        raise UserError(
            f"The run's head tells {len(model.classes)} classes of pixels apart.",
            "Give --images and --masks with these classes.",
        )
    if len(model.classes) > len(test.classes):  # a small test set may lack the last ones
        test = replace(test, classes=model.classes)
    yield from score_segmenter(model, test, ignore_index, precision=precision, batch_size=batch_size)


def run_files(config: EvaluateConfig) -> Sequence[Path]:
    """The neck and the label head of the run in `init`."""
    run = Path(config.init).expanduser()
    return run / REGRESSOR, run / HEAD


def check_run(_student: Student, config: EvaluateConfig) -> None:
    """Raises UserError where `init` is no run with a label head that can be read."""
    load_distilled(Path(config.init).expanduser())


def _of_pixels(config: EvaluateConfig) -> bool:
    run = Path(config.init).expanduser()
    return has_head(run) and not is_pooled(run)


def _run(bench: Bench, _budget: int | None, _seed: int) -> Iterator[Metric]:
    model = load_distilled(bench.run_folder()).to(device_of(bench.student))
    return distilled(model, bench.data, ignore_index=bench.config.ignore_index, **bench.passes())


TASK = Task(
    name="distilled",
    what="segmentation, as distilled",
    group=IN_MEMORY,
    whole="as pretrained",
    default=_of_pixels,
    seeded=False,
    files=run_files,
    fits=check_run,
    run=_run,
)
