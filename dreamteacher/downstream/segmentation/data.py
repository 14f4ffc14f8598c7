"""The data of the segmentation tasks, in memory or from the disk: folders, or LAYOUT:ROOT."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from dreamteacher.data.draws import check_draw
from dreamteacher.data.images import IMAGE_SUFFIXES, Size, find_images
from dreamteacher.data.labelled_set import LabelledSet
from dreamteacher.data.layouts.table import Part, check, layout_of
from dreamteacher.data.masks.reader import MaskedImages, read_masks
from dreamteacher.data.split import Split, halved
from dreamteacher.downstream.task import Budgets, Group
from dreamteacher.runtime.errors import UserError

if TYPE_CHECKING:
    from dreamteacher.downstream.config import EvaluateConfig


def _check(config: EvaluateConfig, _budgets: Budgets) -> None:
    """Checks folders of images and masks by their names alone, and all that a layout needs."""
    images, masks = config.images, config.masks
    if images is None or (masks is None and layout_of(images) is None):
        raise UserError("The segmentation tasks need masks.", "Give both --images and --masks.")
    places: tuple[tuple[Path | None, Path | None, Part], ...] = (
        (images, masks, "train"), (config.test_images, config.test_masks, "val"),
    )  # fmt: skip
    for one, two, part in places:
        if one is not None and layout_of(one) is not None:
            if two is not None:
                raise UserError(f"'{one}' comes with its masks.", f"Leave out '{two}'.")
            check(one, "masks", (part,))
        elif (one is None) != (two is None):
            raise UserError("Only one of --test-images and --test-masks is given.", "Give both, or neither.")
        elif one is not None and two is not None:
            find_images(one)
            if two.suffix.lower() != ".json":
                find_images(two, (*IMAGE_SUFFIXES, ".npy"))
    if config.test_images is None and layout_of(images) is not None:
        check(images, "masks", ("val",))


def _load_streamed(config: EvaluateConfig, budgets: Budgets, size: Size | None = None) -> Split[MaskedImages]:
    """The images to draw labels from and those to score on: given ones, a layout's two parts, or two halves.

    Without a `size` they stay on the disk, and every test image is decoded once, for none may be damaged.
    """

    images, masks, test_images = config.images, config.masks, config.test_images
    assert images is not None
    read = functools.partial(
        read_masks, size=size, ignore_index=config.ignore_index, binary=config.binary_masks, absent_ok=True,
        workers=config.workers,
    )  # fmt: skip
    if test_images is None and masks is not None:
        data = halved(read(images, masks, whole=size is None))
    else:
        pool = read(images, masks)
        test_masks = config.test_masks if test_images else None
        test = read(test_images or images, test_masks, part="val", whole=size is None)
        # A small set may lack the last classes: both take the larger number.
        classes = max(pool.classes, test.classes, key=len)
        pool, test = (dataclasses.replace(part, classes=classes) for part in (pool, test))
        data = Split(pool=pool, test=test)
    check_draw(len(data.pool), budgets)
    return data


def _load(config: EvaluateConfig, budgets: Budgets) -> Split[LabelledSet]:
    found = _load_streamed(config, budgets, config.size)
    return Split(pool=found.pool.load(), test=found.test.load())


IN_MEMORY = Group(
    name="segmentation", needs=("The segmentation tasks need masks.", "Give --images and --masks."),
    headline="miou", places=("images", "masks", "test_images", "test_masks"),
    settings=("binary_masks", "ignore_index"),
    given=lambda config: config.masks is not None or (config.images is not None and config.instances is None),
    check=_check,
    load=_load,
)  # fmt: skip

STREAMED = dataclasses.replace(
    IN_MEMORY, name="streamed",
    needs=("semantic and readout need masks in folders.", "Give --images and --masks."),
    load=_load_streamed,
)  # fmt: skip
