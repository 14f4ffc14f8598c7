"""Masks of class ids from COCO annotations: which id each category has, and who is painted over whom."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dreamteacher.data.coco.annotations import CocoImage, instance_mask
from dreamteacher.runtime.errors import UserError, shorten


def category_ids(
    path: Path,
    categories: tuple[str, ...],
    classes: int | None,
    names: tuple[str, ...],
    background: int,
    ignore_index: int,
) -> tuple[list[int], tuple[str, ...]]:
    """The id of each category, and the names of all ids in order.

    Args:
        path: the file, for messages.
        categories: its names, in the order of its category ids.
        classes, names, background, ignore_index: see `masks.reader.read_masks`.

    Raises:
        UserError: categories that are not among the names, another number of classes, ids that are taken.
    """
    if names:
        unknown = [name for name in categories if name not in names]
        if unknown:
            raise UserError(
                f"{len(unknown)} of {len(categories)} categories of '{path}' are not among the {len(names)} "
                f"names given: {shorten(unknown)}.",
                "Name all of the classes, the background among them, as the file does.",
            )
        ids, count = [names.index(name) for name in categories], len(names)
    else:
        others = [name for name in categories if name != "background"]
        ignored = background == ignore_index and background >= len(others)
        count = len(others) + (not ignored)
        free = [i for i in range(count) if i != background]
        by_name = {"background": background} | dict(zip(others, free, strict=False))
        ids = [by_name[name] for name in categories]
        by_id = {i: name for name, i in by_name.items()}
        names = tuple(by_id.get(i, "") for i in range(count))
    if classes not in (None, count):
        raise UserError(
            f"'{path}' makes {count} classes ({shorten(names)}), not {classes}.",
            "Leave out the number of classes, or give the file that has so many categories.",
        )
    if background != ignore_index and not 0 <= background < count:
        raise UserError(
            f"The background cannot be {background}: the ids are 0 to {count - 1}, and {ignore_index} is ignored.",
            "Give one of these.",
        )
    taken = [
        f"{name} ({i})"
        for name, i in zip(categories, ids, strict=True)
        if i in (background, ignore_index) and name != "background"
    ]
    if taken:
        raise UserError(
            f"Categories of '{path}' have the id of the background ({background}) or of what is ignored "
            f"({ignore_index}): {shorten(taken)}.",
            "Choose other ids for these two, or another order of the names.",
        )
    return ids, names


def paint(image: CocoImage, ids: Sequence[int], background: int) -> Tensor:
    """Class ids int64 H x W of one image: larger objects first, equally large ones in the file's order.

    Args:
        ids: the class id of each of the set's names.
        background: the id where nothing is annotated.
    """
    masks = [(instance_mask(a, image.size), ids[a.label]) for a in image.annotations]
    painted = torch.full(image.size, background, dtype=torch.int64)
    for mask, i in sorted(masks, key=lambda pair: -int(pair[0].sum())):
        painted[mask] = i
    return painted
