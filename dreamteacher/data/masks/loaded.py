"""Labelled images from whatever there is: folders of masks, COCO JSON, .npy files; all checked before decoding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dreamteacher.data.coco.annotations import CocoImage, instance_mask, read_coco
from dreamteacher.data.images import (
    IMAGE_SUFFIXES,
    BadImage,
    BadImageError,
    Header,
    Size,
    below,
    find_images,
    read_image,
    read_mask,
    scale_mask,
)
from dreamteacher.data.layouts.table import Part, mask_files
from dreamteacher.data.masks.pairs import (
    check_pairs,
    count_classes,
    find_pairs,
    label_header,
    refuse_bad,
    say_unpaired,
)
from dreamteacher.data.npy import read_npy, read_npy_header
from dreamteacher.runtime.errors import UserError, shorten
from dreamteacher.runtime.threads import in_threads


class _Labels(NamedTuple):
    """Where the labels of each image come from."""

    images: Sequence[Path]
    read: Callable[[int], Tensor]  # class ids, or for binary masks 0 and more, at their own size
    shown: Sequence[str]  # what holds an image's labels, for messages
    unpaired: tuple[Path, ...]
    names: tuple[str, ...] = ()


def load_labelled(
    images: Path,
    masks: Path,
    size: Size,
    *,
    ignore_index: int = 255,
    binary: bool = False,
    classes: int | None = None,
    names: tuple[str, ...] = (),
    background: int = 0,
    absent_ok: bool = False,
) -> SegmentationSet:
    """Images and their class ids. What `masks` is decides how they are read:

    - a folder of grey or palette pictures, paired with the images by name (a/1.jpg with a/1.png);
    - a folder of .npy files (whole numbers, height x width), paired in the same way; it may be the images'
      folder itself, as in the data of DDPM-seg (Baranchuk et al., ICLR 2022);
    - a .json file in COCO's format. Objects are painted over larger ones and, where they are equally large,
      over earlier ones. Images without annotations count as images without a mask.

    Images without a mask are left out, which is said on stderr.

    Args:
        size: (height, width) that images and masks are brought to, alike.
        ignore_index: id in the masks that is no class.
        binary: class 1 where a mask is bright, its .npy is not 0, or anything is annotated; 0 elsewhere.
        classes: how many there are; None: as many as `names`, or as the masks or the JSON file hold.
        names: of the classes in id order. With a JSON file its categories are found in them by name.
        background: JSON only: the id where nothing is annotated. The categories take the other ids from 0 in
            the order of their category ids; one that is called background is the background. If it is
            `ignore_index`, such pixels are ignored.
        absent_ok: classes that occur in none of the masks are allowed (test sets); otherwise an error.

    Raises:
        UserError: what is missing, unreadable, of another shape, coloured, JPEG; palettes that differ;
            ids or categories that are no class; classes that occur nowhere. Images are decoded last.
    """
    images, masks = Path(images), Path(masks)
    if names and classes not in (None, len(names)):
        raise UserError(f"{classes} classes, but {len(names)} names.", "Give one name for each class.")
    if len(set(names)) < len(names):
        twice = [name for name, count in Counter(names).items() if count > 1]
        raise UserError(f"Names are given twice: {shorten(twice)}.", "Give each class its own name.")
    if binary:
        if classes not in (None, 2) or len(names) not in (0, 2):
            raise UserError(
                f"Binary masks have 2 classes, not {classes or len(names)}.", "Leave out one or the other."
            )
        classes, names = 2, names or ("background", "foreground")
    elif names:
        classes = len(names)
    if masks.suffix.lower() == ".json" and not masks.is_dir():
        labels = _from_coco(images, masks, binary, classes, names, background, ignore_index)
    else:
        labels = _from_folder(images, masks, binary)
    names = names or labels.names
    known = classes or len(names) or None
    say_unpaired(images, labels.unpaired, len(labels.images) + len(labels.unpaired))
    ids = _read_ids(labels, masks, size, None if binary else known, ignore_index)
    if binary:
        ids = (ids > (0 if ids.max() <= 1 else 127)).long()
    found = ids.unique().tolist()
    count = known or count_classes(found, masks, ignore_index)
    names = names or tuple(f"class {i}" for i in range(count))
    absent = sorted(set(range(count)) - set(found) - {ignore_index})
    if absent and not absent_ok:
        raise UserError(
            f"{len(absent)} of {count} classes occur in none of the {len(ids)} masks of '{masks}' at "
            f"{size[1]} x {size[0]} pixels: {shorten(f'{i} ({names[i]})' for i in absent)}.",
            "Add masks that hold them, or number the classes from 0 without gaps.",
        )
    return SegmentationSet(
        images=_read_images(labels.images, images, size),
        masks=ids,
        classes=count,
        names=names,
        unpaired=labels.unpaired,
        paths=tuple(labels.images),
    )


def _read_ids(labels: _Labels, masks: Path, size: Size, classes: int | None, ignore_index: int) -> Tensor:
    """Class ids int64 N x H x W at `size`. Ids that are no class are refused, also where scaling loses them."""
    ids = torch.empty(len(labels.images), *size, dtype=torch.int64)

    def load(i: int) -> list[int] | BadImage:
        try:
            whole = labels.read(i)
        except BadImageError as error:
            return BadImage(error.path, error.reason)
        ids[i] = scale_mask(whole, size)
        return [v for v in whole.unique().tolist() if v != ignore_index]

    found = in_threads(load, range(len(labels.images)), 2, "reading masks")
    refuse_bad(found, masks)
    unknown = []
    for shown, held in zip(labels.shown, found, strict=True):
        foreign = [
            v for v in held if isinstance(v, int) and (v < 0 or (classes is not None and v >= classes))
        ]
        if foreign:
            unknown.append(f"{shown} ({shorten(map(str, foreign))})")
    if unknown:
        valid = "negative ids" if classes is None else f"ids that are no class (0 to {classes - 1} are)"
        raise UserError(
            f"{len(unknown)} of {len(found)} masks in '{masks}' hold {valid}, and {ignore_index} is ignored: "
            f"{shorten(unknown)}.",
            "Name all of the classes, correct the masks, or say which id is to be ignored.",
        )
    return ids


def _read_images(paths: Sequence[Path], folder: Path, size: Size) -> Tensor:
    images = torch.empty(len(paths), 3, *size, dtype=torch.uint8)

    def load(i: int) -> BadImage | None:
        try:
            images[i] = read_image(paths[i], size)
        except BadImageError as error:
            return BadImage(error.path, error.reason)
        return None

    refuse_bad(in_threads(load, range(len(paths)), 2, "reading images"), folder)
    return images


# --- folders ------------------------------------------------------------------------------------------------


def _from_folder(images: Path, masks: Path, binary: bool) -> _Labels:
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
    if True in held:
        pairs, unpaired = find_pairs(images, masks, (".npy",))
        check_pairs(images, masks, pairs, binary, read_npy_header)
    else:
        pairs, unpaired = find_pairs(images, masks)
        headers = check_pairs(images, masks, pairs, binary)
        if not binary:
            _refuse_palettes(masks, [mask for _, mask in pairs], headers)

    def read(i: int) -> Tensor:
        path = pairs[i][1]
        if True not in held:
            return read_mask(path, None, binary=binary)
        return (read_npy(path) != 0).long() if binary else read_npy(path)

    return _Labels([image for image, _ in pairs], read, [below(masks, mask) for _, mask in pairs], unpaired)


def _refuse_palettes(folder: Path, masks: Sequence[Path], headers: Sequence[Header]) -> None:
    """Indices mean the same only under one palette. One that ends earlier but begins alike is the same."""
    palettes = Counter(header.palette for header in headers if header.mode == "P")
    if not palettes:
        return
    most = max(palettes, key=lambda p: (sum(n for q, n in palettes.items() if _alike(p, q)), len(p)))
    other = [
        below(folder, mask)
        for mask, header in zip(masks, headers, strict=True)
        if header.mode == "P" and not _alike(most, header.palette)
    ]
    if other:
        raise UserError(
            f"{len(other)} of {sum(palettes.values())} palette masks in '{folder}' have another palette than "
            f"the rest, so that their ids may not mean the same: {shorten(other)}.",
            "Save all masks with one palette, or as grey PNG whose values are the ids.",
        )


def _alike(one: bytes, two: bytes) -> bool:
    length = min(len(one), len(two))
    return one[:length] == two[:length]


# --- COCO ---------------------------------------------------------------------------------------------------


def _from_coco(
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
        ids, names = _coco_ids(path, found.names, classes, names, background, ignore_index)
        ground = background
    labelled = [image for image in found.images if image.annotations]
    known = {image.path for image in labelled}
    unpaired = tuple(p for p in find_images(images) if p not in known)
    return _Labels(
        images=[image.path for image in labelled],
        read=lambda i: paint(labelled[i], ids, ground),
        shown=[f"{below(images, image.path)} in '{path}'" for image in labelled],
        unpaired=unpaired,
        names=names,
    )


def _coco_ids(
    path: Path,
    categories: tuple[str, ...],
    classes: int | None,
    names: tuple[str, ...],
    background: int,
    ignore_index: int,
) -> tuple[list[int], tuple[str, ...]]:
    """The id of each category, and the names in id order."""
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


@dataclass(frozen=True, kw_only=True)
class SegmentationSet:
    """Images with masks, decoded in memory.

    Args:
        images: uint8 N x 3 x H x W.
        masks: int64 N x H x W, class ids and perhaps the id that is to be ignored.
        classes: number of classes.
        names: their names in id order.
        unpaired: images that had no mask and were left out.
        paths: of the images; () where they are not from files.
    """

    images: Tensor
    masks: Tensor
    classes: int
    names: tuple[str, ...]
    unpaired: tuple[Path, ...] = ()
    paths: tuple[Path, ...] = ()


def load_layout(
    source: Path, size: Size, *, part: Part = "train", ignore_index: int = 255, binary: bool = False
) -> SegmentationSet:
    """The images and masks of LAYOUT:ROOT (see `layouts.mask_files`), whose classes are known.

    Folders and files of one's own: `labelled.load_labelled`.

    Args:
        source: LAYOUT:ROOT.
        size: (height, width) that images and masks are brought to, alike.
        part: training or validation.
        ignore_index: id of what the data set does not count.
        binary: refused.

    Raises:
        UserError: files that are missing or cannot be read, shapes that differ, values that mean nothing.
    """
    if binary:
        raise UserError(f"The masks of '{source}' are not black and white.", "Leave out --binary-masks.")
    files = mask_files(source, part)
    if 0 <= ignore_index < len(files.names):
        raise UserError(
            f"{ignore_index} is to be ignored, but is '{files.names[ignore_index]}' in '{source}'.",
            "Leave the id to be ignored at 255: what a data set does not count becomes that.",
        )
    check_pairs(source, source, files.pairs, False, label_header)
    images = torch.empty(len(files.pairs), 3, *size, dtype=torch.uint8)
    masks = torch.empty(len(files.pairs), *size, dtype=torch.int64)

    def load(i: int) -> BadImage | None:
        image, mask = files.pairs[i]
        try:
            values = read_npy(mask) if mask.suffix == ".npy" else read_mask(mask, None)
            masks[i] = scale_mask(files.class_ids(values, ignore_index), size)
            images[i] = read_image(image, size)
        except BadImageError as error:
            return BadImage(error.path, error.reason)
        except ValueError as error:
            return BadImage(mask, f"it holds {error}")
        return None

    refuse_bad(in_threads(load, range(len(files.pairs)), 2, "reading masks"), source)
    paths = tuple(image for image, _ in files.pairs)
    return SegmentationSet(
        images=images, masks=masks, classes=len(files.names), names=files.names, paths=paths
    )
