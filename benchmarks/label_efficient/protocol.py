"""Data and score of the label-efficient comparison: DDPM-seg's four sets, and two that run anywhere.

bedroom_28, ffhq_34, cat_15, horse_21 (Baranchuk et al. 2022; Section 8 and Table 5 of the DreamTeacher paper) in
the published layout, which is obtained from the authors:

    ROOT/NAME/real/train/*.png|jpg with a .npy mask of the same name beside each
    ROOT/NAME/real/test/ the same

lungs: the demo's chest X-rays, one half of the 299 lung masks to draw from, the other half to test on, 64 x 64.
camvid: 367 driving scenes to draw from and 233 to test on, 11 classes, 64 x 96.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dreamteacher.cli.demo import xray_folders
from dreamteacher.data.images import Size, below, find_images
from dreamteacher.data.labelled_set import LabelledSet
from dreamteacher.data.masks.reader import read_masks
from dreamteacher.data.seeds import step_generator
from dreamteacher.data.split import halved
from dreamteacher.metrics import confusion
from dreamteacher.runtime.errors import UserError, shorten

CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Published:
    """What the published settings say of one set.

    Args:
        classes: ids 0 to classes - 1, an ignored id among them included.
        ignore: the id that is neither learned nor a class of the score.
        train: labelled images; test: those of the score.
    """

    classes: int
    ignore: int
    train: int
    test: int


# Test sizes are named in the order bedroom, FFHQ, cat, horse.
PUBLISHED = {
    "bedroom_28": Published(classes=29, ignore=0, train=40, test=20),
    "ffhq_34": Published(classes=34, ignore=255, train=20, test=20),
    "cat_15": Published(classes=15, ignore=255, train=30, test=20),
    "horse_21": Published(classes=21, ignore=255, train=30, test=30),
}
PUBLISHED_SIZE = (256, 256)
SETS = (*PUBLISHED, "lungs", "camvid")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One set of the comparison.

    Args:
        name: of SETS.
        classes: number of ids (with an ignored one below it, that one counts too).
        ignore: id in the masks that is neither learned nor a class of the score.
        size: (height, width) of images and masks.
        unlabelled: folder of the images that pretraining may see; none: not given.
        pool: where labelled images are drawn from.
        test: seen by nothing but the score.
    """

    name: str
    classes: int
    ignore: int
    size: Size
    unlabelled: Path | None
    pool: LabelledSet
    test: LabelledSet

    @property
    def scored(self) -> list[int]:
        """The ids that have an IoU."""
        return [c for c in range(self.classes) if c != self.ignore]


class Scores(NamedTuple):
    """Of one method on the test set.

    Args:
        miou: over the classes that occur in target or prediction; ignored pixels count for nothing.
        miou_published: as DDPM-seg's code has it: predictions on ignored pixels are false positives of the class
            predicted, and a class that occurs nowhere has IoU 0.
        iou: id -> IoU as in `miou` (NaN where the class does not occur).
    """

    miou: float
    miou_published: float
    iou: dict[int, float]


def score(predictions: Iterable[tuple[Tensor, Tensor]], benchmark: Benchmark) -> Scores:
    """Both readings of the mIoU, accumulated over all (class ids, target ids)."""
    classes, ignore = benchmark.classes, benchmark.ignore
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    stray = torch.zeros(classes, dtype=torch.int64)
    for predicted, target in predictions:
        predicted, target = predicted.cpu(), target.cpu()
        matrix += confusion(predicted, target, classes, ignore)
        stray += torch.bincount(predicted[target == ignore].flatten(), minlength=classes)
    hits = matrix.diagonal().double()
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    ids = benchmark.scored
    iou = hits / union.double()
    published = hits / (union + stray).double().clamp_min(1)
    return Scores(
        miou=float(iou[ids].nanmean()),
        miou_published=float(published[ids].mean()),
        iou={c: float(iou[c]) for c in ids},
    )


def load_benchmark(
    name: str, *, root: Path | None = None, unlabelled: Path | None = None, split: int = 0
) -> Benchmark:
    """A set of SETS.

    Args:
        root: the folder that holds the published sets, or CamVid's {images,labels}/{train,test}, or the demo's
            images (none: the installed package).
        unlabelled: for the published sets: images of the domain (LSUN's or FFHQ's), for pretraining.
        split: for the published sets; 0 is theirs, any other number draws train and test anew from both.

    Raises:
        UserError: an unknown name, or what of the layout is missing.
    """
    if name in PUBLISHED:
        if root is None:
            raise UserError(f"'{name}' needs its data.", "Name the folder that holds it with --data-root.")
        return published_benchmark(name, root, unlabelled=unlabelled, split=split)
    if name == "lungs":
        train, _, images, masks = xray_folders(root)
        halves = halved(read_masks(images, masks, (64, 64), binary=True).load())
        return Benchmark(
            name=name,
            classes=2,
            ignore=255,
            size=(64, 64),
            unlabelled=train,
            pool=halves.pool,
            test=halves.test,
        )
    if name == "camvid":
        return _camvid(root)
    raise UserError(f"There is no set '{name}'.", f"Use one of: {', '.join(SETS)}.")


def _camvid(root: Path | None) -> Benchmark:
    if root is None:
        raise UserError(
            "'camvid' needs its data.", "Name the folder that holds images/ and labels/ with --data-root."
        )
    size = (64, 96)
    parts = {}
    for part in ("train", "test"):
        found = read_masks(
            root / "images" / part, root / "labels" / part, size, ignore_index=11, absent_ok=True
        ).load()
        if len(found.classes) > len(CAMVID_CLASSES):
            raise UserError(
                f"The masks in '{root / 'labels' / part}' hold ids up to {len(found.classes) - 1}.",
                "CamVid has the classes 0 to 10, and 11 for what is ignored.",
            )
        parts[part] = replace(found, classes=CAMVID_CLASSES, paths=(), unpaired=())
    return Benchmark(
        name="camvid", classes=len(CAMVID_CLASSES), ignore=11, size=size, unlabelled=root / "images" / "train",
        pool=parts["train"], test=parts["test"],
    )  # fmt: skip


def published_benchmark(
    name: str, root: Path, *, unlabelled: Path | None = None, split: int = 0, size: Size = PUBLISHED_SIZE
) -> Benchmark:
    """One of the four sets, as large a train and a test part as published, 256 x 256.

    Of more images the first in sorted order are taken, as the published code does. Masks of another size are
    brought to 256 by the nearest pixel at each centre (there: OpenCV's, at each corner).

    Args:
        root: holds a folder `name`.
        unlabelled, split: see `load_benchmark`.
        size: (height, width).

    Raises:
        UserError: see `check_published` and `data.masks.reader.read_masks`.
    """
    check_published(name, root)
    facts = PUBLISHED[name]
    pool, test = (
        _first(
            read_masks(
                folder := root / name / "real" / part, folder, size, ignore_index=facts.ignore,
                classes=facts.classes, absent_ok=True,
            ).load(),
            count,
        )
        for part, count in (("train", facts.train), ("test", facts.test))
    )  # fmt: skip
    if split:
        images, masks = torch.cat([pool.images, test.images]), torch.cat([pool.targets, test.targets])
        order = torch.randperm(len(images), generator=step_generator(split, 0, "published split"))
        train, held = order[: facts.train].sort().values, order[facts.train :].sort().values
        pool = replace(pool, images=images[train], targets=masks[train], paths=())
        test = replace(test, images=images[held], targets=masks[held], paths=())
    return Benchmark(
        name=name,
        classes=facts.classes,
        ignore=facts.ignore,
        size=size,
        unlabelled=unlabelled,
        pool=pool,
        test=test,
    )


def _first(part: LabelledSet, count: int) -> LabelledSet:
    return replace(part.take(torch.arange(min(count, len(part)))), unpaired=())


def check_published(name: str, root: Path) -> None:
    """Whether both parts are there: as many images as published, each with its mask.

    Raises:
        UserError: says which folder, how many images, or which masks are missing.
    """
    facts = PUBLISHED[name]
    for part, count in (("train", facts.train), ("test", facts.test)):
        folder = root / name / "real" / part
        if not folder.is_dir():
            raise UserError(
                f"'{name}' is not complete: the folder '{folder}' is missing.",
                f"It must hold {count} images with a .npy mask beside each, as DDPM-seg's authors publish them.",
            )
        images = find_images(folder)
        bare = [below(folder, p) for p in images if not p.with_suffix(".npy").is_file()]
        if len(images) < count or bare:
            masks = f", without a .npy mask: {shorten(bare)}" if bare else ""
            raise UserError(
                f"'{name}' is not complete: {len(images)} of {count} images are in '{folder}'{masks}.",
                "Copy the published folder again, images and .npy files.",
            )
