"""The data of the segmentation tasks: read once, in memory or from the disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from dreamteacher.data.draws import check_draw
from dreamteacher.data.labelled_set import LabelledSet
from dreamteacher.data.masks.reader import MaskedImages
from dreamteacher.data.split import Split
from dreamteacher.downstream.sources import check_masks, load_masks
from dreamteacher.downstream.task import Budgets, Group

if TYPE_CHECKING:
    from dreamteacher.downstream.config import EvaluateConfig


def _places(config: EvaluateConfig) -> tuple[Path | None, Path | None, Path | None, Path | None]:
    return config.images, config.masks, config.test_images, config.test_masks


def _given(config: EvaluateConfig) -> bool:
    return config.masks is not None or (config.images is not None and config.instances is None)


def _check(config: EvaluateConfig, _budgets: Budgets) -> None:
    check_masks(*_places(config))


def _load(config: EvaluateConfig, budgets: Budgets) -> Split[LabelledSet]:
    found = load_masks(
        *_places(config), config.size, ignore_index=config.ignore_index, binary=config.binary_masks
    )
    check_draw(len(found.pool), budgets)
    return Split(pool=found.pool.load(), test=found.test.load())


def _load_streamed(config: EvaluateConfig, budgets: Budgets) -> Split[MaskedImages]:
    data = load_masks(
        *_places(config),
        ignore_index=config.ignore_index,
        binary=config.binary_masks,
        workers=config.workers,
    )
    check_draw(len(data.pool), budgets)
    return data


IN_MEMORY = Group(
    name="segmentation",
    needs=("The segmentation tasks need masks.", "Give --images and --masks."),
    headline="miou",
    places=("images", "masks", "test_images", "test_masks"),
    settings=("binary_masks", "ignore_index"),
    given=_given,
    check=_check,
    load=_load,
)

STREAMED = dataclasses.replace(
    IN_MEMORY,
    name="streamed",
    needs=("semantic and readout need masks in folders.", "Give --images and --masks."),
    load=_load_streamed,
)
