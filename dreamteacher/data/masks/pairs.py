"""Images and masks: paired by name, and all that their headers tell."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from dreamteacher.data.images import (
    IMAGE_SUFFIXES,
    BadImage,
    BadImageError,
    Header,
    below,
    find_images,
    read_header,
)
from dreamteacher.data.npy import read_npy_header
from dreamteacher.runtime.errors import UserError, shorten
from dreamteacher.runtime.threads import in_threads


def _label_header(path: Path) -> Header:
    """The header of a mask, a picture or an .npy array.

    Raises:
        BadImageError: it cannot be read.
    """
    return read_npy_header(path) if path.suffix.lower() == ".npy" else read_header(path)


def say_unpaired(folder: Path, unpaired: Sequence[Path], images: int) -> None:
    """Says on stderr which of so many images are left out, if any are."""
    if unpaired:
        some = shorten(below(folder, p) for p in unpaired)
        print(
            f"{len(unpaired)} of {images} images have no mask and are left out: {some}",
            file=sys.stderr,
        )


def find_pairs(
    images_folder: Path, masks_folder: Path, mask_suffixes: Sequence[str] = IMAGE_SUFFIXES
) -> tuple[list[tuple[Path, Path]], tuple[Path, ...]]:
    """(image, mask) in order, and the images without a mask.

    Raises:
        UserError: masks without an image, or files whose names differ in nothing but their suffix.
    """
    by_name: list[dict[str, Path]] = []
    for folder, suffixes in ((images_folder, IMAGE_SUFFIXES), (masks_folder, mask_suffixes)):
        paths = find_images(folder, suffixes)
        by_name.append({below(folder, p.with_suffix("")): p for p in paths})
        if len(by_name[-1]) < len(paths):
            same = (below(folder, p) for p in paths if by_name[-1][below(folder, p.with_suffix(""))] != p)
            raise UserError(
                f"Files in '{folder}' differ in nothing but their suffix: {shorten(same)}.",
                "Keep one of each: images and masks are paired by name without suffix.",
            )
    images, masks = by_name
    alone = [below(masks_folder, path) for name, path in masks.items() if name not in images]
    if alone:
        raise UserError(
            f"{len(alone)} of {len(masks)} masks in '{masks_folder}' have no image of the same name in "
            f"'{images_folder}': {shorten(alone)}.",
            "Name mask and image alike (a/1.png for a/1.jpg), or remove those masks.",
        )
    unpaired = tuple(path for name, path in images.items() if name not in masks)
    return [(path, masks[name]) for name, path in images.items() if name in masks], unpaired


def check_pairs(
    images_folder: Path,
    masks_folder: Path,
    pairs: Sequence[tuple[Path, Path]],
    binary: bool,
) -> list[Header]:
    """Everything that the headers tell, before anything is decoded. Returns those of the masks.

    Raises:
        UserError: files that cannot be read, shapes that differ, coloured or JPEG masks where ids are wanted.
    """

    def check(i: int) -> Header | BadImage:
        path = pairs[i // 2][i % 2]
        try:
            return _label_header(path) if i % 2 else read_header(path)
        except BadImageError as error:
            return BadImage(path, error.reason)

    found = in_threads(check, range(2 * len(pairs)), 2, "checking masks")
    refuse_bad(found, masks_folder)
    headers = [h for h in found if isinstance(h, Header)]
    coloured, oblong = [], []
    for (image, mask), one, two in zip(pairs, headers[::2], headers[1::2], strict=True):
        (h, w), (height, width) = one.size, two.size
        if abs(h * width - w * height) > max(h, w, height, width):  # more than a pixel of rounding
            oblong.append(f"{_seen(images_folder, image)} {w} x {h} and its mask {width} x {height}")
        if two.format in ("JPEG", "MPO") or not (two.mode in ("1", "L", "P") or two.mode.startswith("I")):
            coloured.append(f"{_seen(masks_folder, mask)} ({two.format}, {two.mode})")
    if coloured and not binary:
        raise UserError(
            f"{len(coloured)} of {len(pairs)} masks in '{masks_folder}' have no class ids: "
            f"{shorten(coloured)}.",
            "Save ids as grey or palette PNG; or, if these are black and white, use --binary-masks.",
        )
    if oblong:
        raise UserError(
            f"{len(oblong)} of {len(pairs)} masks are not of their image's shape: {shorten(oblong)}.",
            "Mask and image must show the same part of the scene: width / height must be the same.",
        )
    return headers[1::2]


def refuse_palettes(folder: Path, masks: Sequence[Path], headers: Sequence[Header]) -> None:
    """Indices mean the same only under one palette. One that ends earlier but begins alike is the same.

    Raises:
        UserError: there are several.
    """
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


def _seen(folder: Path, path: Path) -> str:
    """As `below`; where the folder is a layout, the path itself."""
    return below(folder, path) if path.is_relative_to(folder) else str(path)


def refuse_bad(found: Iterable[object], folder: Path) -> None:
    """Raises a UserError if there is a BadImage among what was found."""
    bad = [b for b in found if isinstance(b, BadImage)]
    if bad:
        raise UserError(
            f"{len(bad)} images or masks of '{folder}' cannot be read: "
            f"{shorten(f'{b.path} ({b.reason})' for b in bad)}.",
            "Replace or remove them.",
        )
