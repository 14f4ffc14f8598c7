"""The data of the classification tasks: folders of classes, or LAYOUT:ROOT with a validation part of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dreamteacher.data.image_set import ImageSet, load_images
from dreamteacher.data.images import Size
from dreamteacher.data.layouts.table import Part, has_parts
from dreamteacher.downstream.features import ClassificationData, check_classes, labelled_data
from dreamteacher.downstream.task import Budgets, Group
from dreamteacher.runtime.errors import UserError

if TYPE_CHECKING:
    from dreamteacher.downstream.config import EvaluateConfig

_NEEDS = "The classification tasks need labelled images.", "Give both --train and --test."


def test_source(train: Path | None, test: Path | None) -> Path | None:
    """What classification is scored on: `test`, or else the layout in `train`, whose validation part it then is."""
    return train if test is None and train is not None and has_parts(train) else test


def load_classes(
    train: Path | None, test: Path | None, size: Size, *, strict: bool, cache_gb: float, workers: int
) -> ClassificationData:
    """The labelled images to learn from, and those to score on (see `test_source`).

    Raises:
        UserError: see `data.load_images`; the classes differ.
    """

    def load(source: Path | None, part: Part) -> ImageSet:
        assert source is not None
        return load_images(source, size, strict=strict, cache_gb=cache_gb, workers=workers, part=part)

    return labelled_data(load(train, "train"), load(test_source(train, test), "val"))


def _given(config: EvaluateConfig) -> bool:
    return config.train is not None or config.test is not None


def _check(config: EvaluateConfig, budgets: Budgets) -> None:
    test = test_source(config.train, config.test)
    if config.train is None or test is None:
        raise UserError(*_NEEDS)
    check_classes(config.train, test, max((count or 1 for count in budgets), default=1))


def _load(config: EvaluateConfig, _budgets: Budgets) -> ClassificationData:
    return load_classes(
        config.train,
        config.test,
        config.size,
        strict=config.strict,
        cache_gb=config.cache_gb,
        workers=config.workers,
    )


CLASSIFICATION = Group(
    name="classification",
    needs=_NEEDS,
    headline="accuracy",
    places=("train", "test"),
    given=_given,
    check=_check,
    load=_load,
)
