"""Images with masks of class ids, whatever holds them: pictures, .npy files, COCO JSON, a public data set.

There is one reader, `read_masks`, and one set of guards: every mask is decoded once at the start, so that what is wrong
with any of them shows before anything else is done. What it returns is read image by image, or all into memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from dreamteacher.data.coco.annotations import CocoImage, read_coco
from dreamteacher.data.coco.class_ids import category_ids, paint
from dreamteacher.data.images import (
    IMAGE_SUFFIXES,
    BadImage,
    BadImageError,
    Size,
    below,
    find_images,
    read_image,
    read_mask,
    scale_mask,
)
from dreamteacher.data.labelled_set import LabelledSet
from dreamteacher.data.layouts.table import MaskFiles, Part, mask_files
from dreamteacher.data.masks.pairs import (
    check_pairs,
    find_pairs,
    refuse_bad,
    refuse_palettes,
    say_unpaired,
)
from dreamteacher.data.npy import read_npy
from dreamteacher.runtime.errors import UserError, shorten
from dreamteacher.runtime.threads import in_threads

Label: TypeAlias = Path | CocoImage  # what holds the class ids of an image

# Where nothing says how many classes there are, ids beyond this are no ids of classes.
_LARGEST_ID = 65_535


@dataclass(frozen=True, kw_only=True)
class MaskedImages:
    """Images with masks that stay on the disk; every mask was decoded once and is good.

    Args:
        images: N files.
        labels: what holds the mask of each.
        decode: a label -> its class ids, int64 H x W; BadImageError where it is damaged. It can be pickled, for
            processes that read.
        classes: their names in id order.
        folder: where they were looked for, for messages.
        ignore_index: class id that is neither learned nor scored.
        unpaired: images that had no mask and were left out.
        kept: the masks at the size that `read_masks` was asked for, int64 N x H x W; None: at none.
    """

    images: tuple[Path, ...]
    labels: tuple[Label, ...]
    decode: Callable[[Any], Tensor]
    classes: tuple[str, ...]
    folder: Path
    ignore_index: int = 255
    unpaired: tuple[Path, ...] = ()
    kept: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """An image, uint8 3 x H x W as large as it is, and its mask, int64 class ids or `ignore_index`.

        The mask may have another resolution than the image.

        Raises:
            BadImageError: one of them cannot be read.
        """
        return read_image(self.images[index], None), self.decode(self.labels[index])

    def take(self, index: Tensor) -> MaskedImages:
        """Some of them (int64 K), in this order."""
        chosen = index.tolist()
        return replace(
            self,
            images=tuple(self.images[i] for i in chosen),
            labels=tuple(self.labels[i] for i in chosen),
            kept=None if self.kept is None else self.kept[index],
        )

    def load(self) -> LabelledSet:
        """All of them in memory, at the size that `read_masks` was asked for.

        Raises:
            UserError: images that cannot be read.
        """
        if self.kept is None:
            raise ValueError("read_masks was asked for no size")
        size = (self.kept.shape[1], self.kept.shape[2])
        images = torch.empty(len(self), 3, *size, dtype=torch.uint8)

        def load(i: int) -> BadImage | None:
            try:
                images[i] = read_image(self.images[i], size)
            except BadImageError as error:
                return BadImage(error.path, error.reason)
            return None

        refuse_bad(in_threads(load, range(len(self)), 2, "reading images"), self.folder)
        return LabelledSet(
            images=images, targets=self.kept, classes=self.classes, paths=self.images, unpaired=self.unpaired
        )


def read_masks(
    images: Path,
    masks: Path | None = None,
    size: Size | None = None,
    *,
    ignore_index: int = 255,
    binary: bool = False,
    classes: int | None = None,
    names: tuple[str, ...] = (),
    background: int = 0,
    absent_ok: bool = False,
    part: Part = "train",
    whole: bool = False,
    workers: int = 2,
) -> MaskedImages:
    """Images and their class ids. What `masks` is decides how they are read:

    - a folder of grey or palette pictures, paired with the images by name (a/1.jpg with a/1.png);
    - a folder of .npy files (whole numbers, height x width), paired in the same way; it may be the images'
      folder itself, as in the data of DDPM-seg (Baranchuk et al., ICLR 2022);
    - a .json file in COCO's format. Objects are painted over larger ones and, where they are equally large,
      over earlier ones. Images without annotations count as images without a mask;
    - None: `images` is LAYOUT:ROOT, whose classes are known.

    Images without a mask are left out, which is said on stderr.

    Args:
        images: a folder, or LAYOUT:ROOT.
        masks: see above.
        size: (height, width) that `load` brings images and masks to, alike; None: they are read one by one.
        ignore_index: id in the masks that is no class; of a layout, what becomes of that which does not count.
        binary: class 1 where a mask is bright, its .npy is not 0, or anything is annotated; 0 elsewhere.
        classes: how many there are; None: as many as `names`, or as the masks or the JSON file hold.
        names: of the classes in id order. With a JSON file its categories are found in them by name.
        background: JSON only: the id where nothing is annotated. The categories take the other ids from 0 in
            the order of their category ids; one that is called background is the background. If it is
            `ignore_index`, such pixels are ignored.
        absent_ok: classes that occur in none of the masks are allowed (test sets; always of a layout);
            otherwise an error. With a `size`, they must occur at that size.
        part: of a layout.
        whole: decode the images too: of a streamed test set none may be damaged.
        workers: threads.

    Raises:
        UserError: what is missing, unreadable, of another shape, coloured, JPEG; palettes that differ;
            ids or categories that are no class; classes that occur nowhere.
    """
    images = Path(images)
    if masks is None:
        source, known, names, absent_ok = images, None, (), True
        labels = _of_layout(images, part, ignore_index, binary)
    else:
        source = masks = Path(masks)
        known, names = _wanted(classes, names, binary)
        if masks.suffix.lower() == ".json" and not masks.is_dir():
            labels = _of_coco(images, masks, binary, known, names, background, ignore_index)
        else:
            labels = _of_folder(images, masks, binary)
    names = names or labels.names
    known = known or len(names) or None
    say_unpaired(images, labels.unpaired, len(labels.images) + len(labels.unpaired))
    held, kept = _decode_all(labels, source, size, whole, workers)
    _refuse_foreign(labels.shown, held, source, None if binary else known, ignore_index)
    decode = labels.decode
    seen = set(kept.unique().tolist()) if kept is not None else set().union(*held)
    if decode is _brightness:
        threshold = 0 if max(seen) <= 1 else 127
        decode = partial(_brighter, threshold=threshold)
        kept = None if kept is None else (kept > threshold).long()
        seen = {int(value > threshold) for value in seen}
    count = known or _count_classes(sorted(seen), source, ignore_index)
    names = names or tuple(f"class {i}" for i in range(count))
    absent = sorted(set(range(count)) - seen - {ignore_index})
    if absent and not absent_ok:
        scale = "" if size is None else f" at {size[1]} x {size[0]} pixels"
        raise UserError(
            f"{len(absent)} of {count} classes occur in none of the {len(held)} masks of '{source}'{scale}: "
            f"{shorten(f'{i} ({names[i]})' for i in absent)}.",
            "Add masks that hold them, or number the classes from 0 without gaps.",
        )
    return MaskedImages(
        images=labels.images,
        labels=labels.labels,
        decode=decode,
        classes=names,
        folder=images,
        ignore_index=ignore_index,
        unpaired=labels.unpaired,
        kept=kept,
    )


# --- guards -------------------------------------------------------------------------------------------------


def _wanted(classes: int | None, names: tuple[str, ...], binary: bool) -> tuple[int | None, tuple[str, ...]]:
    """How many classes the caller wants, if that is said, and their names."""
    if names and classes not in (None, len(names)):
        raise UserError(f"{classes} classes, but {len(names)} names.", "Give one name for each class.")
    if len(set(names)) < len(names):
        twice = [name for name, count in Counter(names).items() if count > 1]
        raise UserError(f"Names are given twice: {shorten(twice)}.", "Give each class its own name.")
    if classes is not None and classes > _LARGEST_ID + 1:
        raise UserError(f"{classes} classes are too many.", f"Give at most {_LARGEST_ID + 1}.")
    if binary:
        if classes not in (None, 2) or len(names) not in (0, 2):
            raise UserError(
                f"Binary masks have 2 classes, not {classes or len(names)}.", "Leave out one or the other."
            )
        return 2, names or ("background", "foreground")
    return (len(names) if names else classes), names


def _decode_all(
    labels: _Labels, source: Path, size: Size | None, whole: bool, workers: int
) -> tuple[list[list[int]], Tensor | None]:
    """The values of every mask, as large as it is, and all masks at `size`; refuses those that are damaged."""
    kept = None if size is None else torch.empty(len(labels.images), *size, dtype=torch.int64)

    def load(i: int) -> list[int] | BadImage:
        try:
            if whole:
                read_image(labels.images[i], None)
            ids = labels.decode(labels.labels[i])
        except BadImageError as error:
            return BadImage(error.path, error.reason)
        if kept is not None and size is not None:
            kept[i] = scale_mask(ids, size)
        return _values(ids)

    found = in_threads(load, range(len(labels.images)), workers, "reading masks")
    refuse_bad(found, source)
    return [values for values in found if not isinstance(values, BadImage)], kept


def _values(ids: Tensor) -> list[int]:
    """The different values of a mask, in order."""
    if int(ids.min()) >= 0 and int(ids.max()) <= _LARGEST_ID:  # 20 times faster than by sorting
        return torch.bincount(ids.flatten()).nonzero().flatten().tolist()
    return ids.unique().tolist()


def _refuse_foreign(
    shown: Sequence[str], held: Sequence[list[int]], source: Path, classes: int | None, ignore_index: int
) -> None:
    """Ids that are no class are refused, also those that scaling would lose."""
    unknown = []
    for name, values in zip(shown, held, strict=True):
        foreign = [
            v for v in values if v != ignore_index and (v < 0 or (classes is not None and v >= classes))
        ]
        if foreign:
            unknown.append(f"{name} ({shorten(map(str, foreign))})")
    if unknown:
        valid = "negative ids" if classes is None else f"ids that are no class (0 to {classes - 1} are)"
        raise UserError(
            f"{len(unknown)} of {len(held)} masks in '{source}' hold {valid}, and {ignore_index} is ignored: "
            f"{shorten(unknown)}.",
            "Name all of the classes, correct the masks, or say which id is to be ignored.",
        )


def _count_classes(ids: Sequence[int], source: Path, ignore_index: int) -> int:
    """The largest id and one, where nothing else says how many classes there are."""
    classes = max((i for i in ids if i != ignore_index), default=-1) + 1
    if classes < 2:
        raise UserError(
            f"The masks in '{source}' hold the ids {shorten(map(str, ids))}; "
            f"{ignore_index} is ignored, and at least two classes from 0 are needed.",
            "If they are black and white pictures, use --binary-masks.",
        )
    if classes > _LARGEST_ID + 1:
        raise UserError(
            f"The masks in '{source}' hold ids up to {classes - 1}, which are no ids of classes.",
            f"Number the classes from 0 without gaps; {_LARGEST_ID} is the largest id.",
        )
    return classes


# --- what holds the ids -------------------------------------------------------------------------------------


class _Labels(NamedTuple):
    """Images, what holds the class ids of each, and how those are read; `shown` is for messages."""

    images: tuple[Path, ...]
    labels: tuple[Label, ...]
    decode: Callable[[Any], Tensor]
    shown: Sequence[str]
    names: tuple[str, ...] = ()
    unpaired: tuple[Path, ...] = ()


def _file_ids(path: Path) -> Tensor:
    return read_npy(path) if path.suffix.lower() == ".npy" else read_mask(path, None)


def _brightness(path: Path) -> Tensor:
    return read_mask(path, None, binary=True)


def _brighter(path: Path, threshold: int) -> Tensor:
    return (_brightness(path) > threshold).long()


def _not_zero(path: Path) -> Tensor:
    return (read_npy(path) != 0).long()


def _counted_ids(path: Path, meaning: MaskFiles, ignore_index: int) -> Tensor:
    values = _file_ids(path)
    try:
        return meaning.class_ids(values, ignore_index)
    except ValueError as error:
        raise BadImageError(path, f"it holds {error}") from None


def _of_layout(source: Path, part: Part, ignore_index: int, binary: bool) -> _Labels:
    found = mask_files(source, part)
    own = f"The masks of '{source}' have {len(found.names)} classes of their own"
    if binary:
        raise UserError(f"{own} and are not black and white.", "Leave out --binary-masks.")
    if 0 <= ignore_index < len(found.names):
        raise UserError(
            f"{own}: {ignore_index} is to be ignored, but is '{found.names[ignore_index]}'.",
            "Leave the id to be ignored at 255: what a data set does not count becomes that.",
        )
    check_pairs(source, source, found.pairs, False)
    images, masks = zip(*found.pairs, strict=True)
    meaning = replace(found, pairs=())  # goes along to every process that reads
    decode = partial(_counted_ids, meaning=meaning, ignore_index=ignore_index)
    return _Labels(images, masks, decode, [str(mask) for mask in masks], found.names)


def _of_folder(images: Path, masks: Path, binary: bool) -> _Labels:
    held = {path.suffix.lower() == ".npy" for path in find_images(masks, (*IMAGE_SUFFIXES, ".npy"))}
    same = images.is_dir() and images.resolve() == masks.resolve()
    if same and held == {False}:
        raise UserError(
            f"'{masks}' is given as the folder of the images and of the masks, but it holds no .npy files.",
            "Give the folder of the masks; only .npy masks may lie beside their images.",
        )
    if not same and len(held) == 2:
        raise UserError(
            f"'{masks}' holds pictures and .npy files: either could be the masks.",
            "Keep only the masks there; .npy masks may lie beside their images if both folders are the same.",
        )
    arrays = True in held
    pairs, unpaired = find_pairs(images, masks, (".npy",) if arrays else IMAGE_SUFFIXES)
    headers = check_pairs(images, masks, pairs, binary)
    if not binary:
        refuse_palettes(masks, [mask for _, mask in pairs], headers)
    decode = (_not_zero if arrays else _brightness) if binary else _file_ids
    shown = [below(masks, mask) for _, mask in pairs]
    return _Labels(
        tuple(image for image, _ in pairs), tuple(mask for _, mask in pairs), decode, shown, unpaired=unpaired
    )


def _of_coco(
    images: Path,
    path: Path,
    binary: bool,
    classes: int | None,
    names: tuple[str, ...],
    background: int,
    ignore_index: int,
) -> _Labels:
    found = read_coco(path, images)
    if binary:
        ids, ground = [1] * len(found.names), 0
    else:
        ids, names = category_ids(path, found.names, classes, names, background, ignore_index)
        ground = background
    labelled = tuple(image for image in found.images if image.annotations)
    known = {image.path for image in labelled}
    return _Labels(
        images=tuple(image.path for image in labelled),
        labels=labelled,
        decode=partial(paint, ids=ids, background=ground),
        shown=[f"{below(images, image.path)} in '{path}'" for image in labelled],
        names=names,
        unpaired=tuple(p for p in find_images(images) if p not in known),
    )
