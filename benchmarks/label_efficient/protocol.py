"""Data and score of the label-efficient comparison: DDPM-seg's four sets, and two that run anywhere.

bedroom_28, ffhq_34, cat_15, horse_21 (Baranchuk et al. 2022; Section 8 and Table 5 of the DreamTeacher paper) in
the published layout, which is obtained from the authors:

    ROOT/NAME/real/train/*.png|jpg with a .npy mask of the same name beside each
    ROOT/NAME/real/test/ the same

lungs: the demo's chest X-rays, one half of the 299 lung masks to draw from, the other half to test on, 64 x 64.
camvid: 367 driving scenes to draw from and 233 to test on, 11 classes, 64 x 96.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamteacher.data import step_generator
from dreamteacher.demo import xray_folders
from dreamteacher.downstream.segmentation import split_masks
from dreamteacher.errors import UserError, shorten
from dreamteacher.images import BadImageError, Size, below, find_images, read_image
from dreamteacher.masks import SegmentationSet, load_segmentation
from dreamteacher.metrics import confusion

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
    pool: SegmentationSet
    test: SegmentationSet

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
        halves = split_masks(load_segmentation(images, masks, (64, 64), binary=True))
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
        found = load_segmentation(root / "images" / part, root / "labels" / part, size, ignore_index=11)
        if found.classes > len(CAMVID_CLASSES):
            raise UserError(
                f"The masks in '{root / 'labels' / part}' hold ids up to {found.classes - 1}.",
                "CamVid has the classes 0 to 10, and 11 for what is ignored.",
            )
        parts[part] = SegmentationSet(
            images=found.images, masks=found.masks, classes=len(CAMVID_CLASSES), names=CAMVID_CLASSES
        )
    return Benchmark(
        name="camvid", classes=len(CAMVID_CLASSES), ignore=11, size=size, unlabelled=root / "images" / "train",
        pool=parts["train"], test=parts["test"],
    )  # fmt: skip


def published_benchmark(
    name: str, root: Path, *, unlabelled: Path | None = None, split: int = 0, size: Size = PUBLISHED_SIZE
) -> Benchmark:
    """One of the four sets, as large a train and a test part as published, 256 x 256.

    Args:
        root: holds a folder `name`.
        unlabelled, split: see `load_benchmark`.
        size: (height, width); the published code takes square images only.

    Raises:
        UserError: see `check_published`; a mask with unknown ids, or not of its image's shape.
    """
    facts = PUBLISHED[name]
    train, test = check_published(name, root)
    if split:
        both = [*train, *test]
        order = torch.randperm(len(both), generator=step_generator(split, 0, "published split")).tolist()
        chosen = [both[i] for i in order]
        train, test = sorted(chosen[: facts.train]), sorted(chosen[facts.train :])
    pool, held = (_read(name, paths, size) for paths in (train, test))
    return Benchmark(
        name=name,
        classes=facts.classes,
        ignore=facts.ignore,
        size=size,
        unlabelled=unlabelled,
        pool=pool,
        test=held,
    )


def check_published(name: str, root: Path) -> tuple[list[Path], list[Path]]:
    """The images of the train and the test part: the first ones in sorted order, as the published code takes.

    Raises:
        UserError: says which folder, how many images, or which masks are missing.
    """
    facts = PUBLISHED[name]
    parts = []
    for part, count in (("train", facts.train), ("test", facts.test)):
        folder = root / name / "real" / part
        if not folder.is_dir():
            raise UserError(
                f"'{name}' is not complete: the folder '{folder}' is missing.",
                f"It must hold {count} images with a .npy mask beside each, as DDPM-seg's authors publish them.",
            )
        images = sorted(find_images(folder))
        bare = [below(folder, p) for p in images[:count] if not p.with_suffix(".npy").is_file()]
        if len(images) < count or bare:
            lack = f"{len(images)} of {count} images are there" if len(images) < count else "images are there"
            masks = f"; without a .npy mask: {shorten(bare)}" if bare else ""
            raise UserError(
                f"'{name}' is not complete: in '{folder}' {lack}{masks}.",
                "Copy the published folder again, images and .npy files.",
            )
        parts.append(images[:count])
    return parts[0], parts[1]


def _read(name: str, paths: list[Path], size: Size) -> SegmentationSet:
    facts = PUBLISHED[name]
    images = torch.empty(len(paths), 3, *size, dtype=torch.uint8)
    masks = torch.empty(len(paths), *size, dtype=torch.int64)
    for i, path in enumerate(paths):
        file = path.with_suffix(".npy")
        try:
            whole = read_image(path, None)
            images[i] = read_image(path, size)
        except BadImageError as error:
            raise UserError(f"'{path}' cannot be read: {error.reason}.", "Replace it.") from None
        mask = _read_npy(file)
        if whole.shape[1] != whole.shape[2] or mask.shape[0] != mask.shape[1]:
            raise UserError(
                f"'{path}' is {whole.shape[2]} x {whole.shape[1]} and its mask {mask.shape[1]} x {mask.shape[0]}.",
                "The protocol takes square images and masks.",
            )
        # Nearest as OpenCV's, which the published code uses.
        masks[i] = F.interpolate(mask[None, None].float(), size=size, mode="nearest")[0, 0].long()
        unknown = [v for v in masks[i].unique().tolist() if not 0 <= v < facts.classes and v != facts.ignore]
        if unknown:
            raise UserError(
                f"'{file}' holds the ids {shorten(map(str, unknown))}.",
                f"'{name}' has 0 to {facts.classes - 1}, and {facts.ignore} is ignored.",
            )
    names = tuple(f"class {i}" for i in range(facts.classes))
    return SegmentationSet(images=images, masks=masks, classes=facts.classes, names=names)


def _read_npy(path: Path) -> Tensor:
    """A mask H x W of whole numbers; nothing in the file can run code."""
    numpy: Any = importlib.import_module("numpy")
    try:
        array = numpy.load(path, allow_pickle=False)
        values = torch.from_numpy(array.astype("int64"))
    except (OSError, ValueError, EOFError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"'{path}' cannot be read: {reason}", "Copy it again.") from None
    if values.ndim != 2 or bool((array != array.astype("int64")).any()):
        raise UserError(f"'{path}' is no mask: {tuple(array.shape)} {array.dtype}.", "Give H x W class ids.")
    return values
