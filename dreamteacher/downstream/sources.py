"""Where masks of an evaluation come from: folders, or LAYOUT:ROOT with a validation part of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dreamteacher.data.images import IMAGE_SUFFIXES, Size, find_images
from dreamteacher.data.labelled_set import LabelledSet
from dreamteacher.data.layouts.table import Part, check, layout_of
from dreamteacher.data.masks.reader import read_masks
from dreamteacher.downstream.segmentation.few_masks import SegmentationData, split_masks
from dreamteacher.runtime.errors import UserError


def check_masks(
    images: Path | None, masks: Path | None, test_images: Path | None, test_masks: Path | None
) -> None:
    """Checks folders of images and masks by their names alone, and all that a layout needs.

    Raises:
        UserError: one of a pair is not given, a folder is missing or empty, a layout is not whole.
    """
    if images is None or (masks is None and layout_of(images) is None):
        raise UserError("The segmentation tasks need masks.", "Give both --images and --masks.")
    places: tuple[tuple[Path | None, Path | None, Part], ...] = (
        (images, masks, "train"), (test_images, test_masks, "val"),
    )  # fmt: skip
    for one, two, part in places:
        if one is not None and layout_of(one) is not None:
            if two is not None:
                raise UserError(f"'{one}' comes with its masks.", f"Leave out '{two}'.")
            check(one, "masks", (part,))
        elif (one is None) != (two is None):
            raise UserError("Only one of --test-images and --test-masks is given.", "Give both, or neither.")
        else:
            if one is not None and two is not None:
                find_images(one)
                if two.suffix.lower() != ".json":
                    find_images(two, (*IMAGE_SUFFIXES, ".npy"))
    if test_images is None and layout_of(images) is not None:
        check(images, "masks", ("val",))


def load_masks(
    images: Path | None,
    masks: Path | None,
    test_images: Path | None,
    test_masks: Path | None,
    size: Size,
    *,
    ignore_index: int,
    binary: bool,
) -> SegmentationData:
    """The images to draw labels from and those to score on: given ones, a layout's two parts, or two halves.

    Args:
        size: (height, width) that images and masks are brought to.
        ignore_index: id in the masks that is no class.
        binary: masks are black and white.

    Raises:
        UserError: see `data.masks.reader.read_masks`.
    """

    def load(images: Path | None, masks: Path | None, part: Part) -> LabelledSet:
        assert images is not None
        return read_masks(
            images, masks, size, ignore_index=ignore_index, binary=binary, absent_ok=True, part=part
        ).load()

    pool = load(images, masks, "train")
    if test_images is not None:
        data = SegmentationData(pool=pool, test=load(test_images, test_masks, "val"))
    elif masks is None:
        data = SegmentationData(pool=pool, test=load(images, None, "val"))
    else:
        data = split_masks(pool)
    # A small set may lack the last classes: both take the larger number.
    classes = max(data.pool.classes, data.test.classes, key=len)
    pool, test = (replace(part, classes=classes) for part in (data.pool, data.test))
    return SegmentationData(pool=pool, test=test)
