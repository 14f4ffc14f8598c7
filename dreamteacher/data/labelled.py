"""Labelled images for the label branch: masks, classes of subfolders, or a teacher's own annotated samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dreamteacher.data import image_set
from dreamteacher.data.draws import draw_images, draw_labels
from dreamteacher.data.labelled_set import LabelledSet
from dreamteacher.data.layouts.table import has_masks
from dreamteacher.data.masks.reader import read_masks
from dreamteacher.runtime.config import parse_json
from dreamteacher.runtime.errors import UserError, shorten

SAMPLES = "samples.json"  # beside images that a teacher drew: whose they are, and the seed of each


def read_labelled(
    images: Path,
    masks: Path | None,
    size: tuple[int, int],
    *,
    binary: bool = False,
    ignore_index: int = 255,
    classes: int | None = None,
    absent_ok: bool = False,
    seeded: bool = False,
) -> LabelledSet:
    """Labelled images from disk.

    Args:
        images: a folder; without masks one subfolder per class. Or LAYOUT:ROOT, with the masks of a layout that has any.
        masks: see `masks.reader.read_masks`; None: classes.
        size: (height, width) that images and masks are brought to.
        binary, ignore_index, classes, absent_ok: of masks.
        seeded: the images are a teacher's samples, which it draws again: their seeds are read too.

    Raises:
        UserError: for labels that are missing, damaged or do not fit, before anything is trained.
    """
    if masks is not None:
        found = read_masks(
            images,
            masks,
            size,
            ignore_index=ignore_index,
            binary=binary,
            classes=classes,
            absent_ok=absent_ok,
        ).load()
        return replace(found, seeds=read_seeds(images, found.paths) if seeded else None)
    if has_masks(images):
        return read_masks(images, None, size, ignore_index=ignore_index, binary=binary).load()
    folder = image_set.load_images(images, size)
    if folder.labels is None:
        raise UserError(
            f"'{images}' holds no labels: its images are not sorted into at least two subfolders.",
            "Give --masks, or put every image into a subfolder that names its class.",
        )
    index = torch.arange(len(folder))
    seeds = read_seeds(images, folder.files) if seeded else None
    return LabelledSet(images=folder.get(index), targets=folder.labels, classes=folder.classes, seeds=seeds)


def read_seeds(images: Path, paths: Sequence[Path]) -> Tensor:
    """The seed of each sample (int64 N), from the list that `make-labels --samples` wrote beside them.

    Raises:
        UserError: there is no such list, or it lacks some of the images.
    """
    try:
        seeds = parse_json((images / SAMPLES).read_text("utf-8"))["seeds"]
        found = {str(name): int(seed) for name, seed in seeds.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"'{images}' holds no samples of the teacher ({SAMPLES} is not there or cannot be read), and it has "
            "maps of its own samples only.",
            "Draw samples to annotate: `dreamteacher make-labels --samples 40`, and give its folder of images.",
        ) from None
    missing = [path.name for path in paths if path.name not in found]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(paths)} images in '{images}' are no samples: {shorten(missing)}.",
            f"Remove them; {SAMPLES} lists the others.",
        )
    return torch.tensor([found[path.name] for path in paths])


def draw(labelled: LabelledSet, count: int | None, seed: int) -> tuple[LabelledSet, LabelledSet]:
    """`count` of them by the seed (one label an image: `count` of each class), and the rest; none: all.

    Same seed, same draw as the downstream tasks make of a pool of as many images; larger ones contain smaller.

    Raises:
        UserError: when there are not so many.
    """
    every = torch.arange(len(labelled))
    if count is None:
        return labelled, labelled.take(every[:0])
    if labelled.pooled:
        index = draw_labels(labelled.targets, count, classes=labelled.classes, seed=seed)
    else:
        index = draw_images(len(labelled), count, seed, least=1)
    rest = torch.ones(len(labelled), dtype=torch.bool)
    rest[index] = False
    return labelled.take(index), labelled.take(every[rest])
