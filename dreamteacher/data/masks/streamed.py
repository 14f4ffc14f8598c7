"""Images with masks that stay on the disk: every mask is checked at the start, and decoded again on the way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dreamteacher.data.images import BadImage, BadImageError, read_image, read_mask
from dreamteacher.data.layouts.table import MaskFiles, Part, mask_files
from dreamteacher.data.masks.pairs import (
    check_pairs,
    count_classes,
    find_pairs,
    label_header,
    refuse_bad,
    say_unpaired,
)
from dreamteacher.data.npy import read_npy
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.threads import in_threads


@dataclass(frozen=True, kw_only=True)
class SegmentationFiles:
    """Images with masks that stay on the disk.

    Args:
        pairs: (image, mask).
        classes: number of classes.
        names: their names in id order.
        ignore_index: class id that is neither learned nor scored.
        values: of a layout, what its masks' values mean; None: they are class ids, or pictures.
        threshold: masks are pictures, of class 1 where brighter than this; None: they hold values.
    """

    pairs: tuple[tuple[Path, Path], ...]
    classes: int
    names: tuple[str, ...]
    ignore_index: int = 255
    values: MaskFiles | None = None
    threshold: int | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """An image, uint8 3 x H x W as large as it is, and its mask, int64 class ids or `ignore_index`.

        The mask may have another resolution than the image.

        Raises:
            BadImageError: one of them cannot be read.
        """
        return read_image(self.pairs[index][0], None), self.read_ids(index)

    def read_ids(self, index: int) -> Tensor:
        """The mask alone.

        Raises:
            BadImageError: it cannot be read, or holds values that mean nothing.
        """
        path = self.pairs[index][1]
        if self.threshold is not None:
            return (read_mask(path, None, binary=True) > self.threshold).long()
        if self.values is None:
            return read_mask(path, None)
        found = read_npy(path) if path.suffix == ".npy" else read_mask(path, None)
        try:
            return self.values.class_ids(found, self.ignore_index)
        except ValueError as error:
            raise BadImageError(path, f"it holds {error}") from None


def find_segmentation(
    images: Path,
    masks: Path | None,
    *,
    ignore_index: int = 255,
    binary: bool = False,
    part: Part = "train",
    whole: bool = False,
    workers: int = 2,
) -> SegmentationFiles:
    """Images and masks as `labelled.load_labelled` pairs them; decodes every mask once, of images the headers.

    So what is wrong with a mask shows before the first step. Images without a mask are left out, which is said
    on stderr.

    Args:
        images: a folder, or LAYOUT:ROOT (see `layouts.mask_files`), whose classes are then known.
        masks: a folder; none for a layout.
        ignore_index: id in the masks that is no class.
        binary: as in `labelled.load_labelled`.
        part: of a layout.
        whole: decode the images too: of a test set none may be missing.
        workers: threads.

    Raises:
        UserError: as `labelled.load_labelled`.
    """
    source = images if masks is None else Path(masks)
    if masks is None:
        values = mask_files(images, part)
        if binary or 0 <= ignore_index < len(values.names):
            raise UserError(
                f"The masks of '{images}' have {len(values.names)} classes of their own.",
                "Leave out --binary-masks, and the id to be ignored at 255.",
            )
        check_pairs(source, source, values.pairs, False, label_header)
        names = values.names
        files = SegmentationFiles(
            pairs=tuple(values.pairs),
            classes=len(names),
            names=names,
            ignore_index=ignore_index,
            values=values,
        )
    else:
        pairs, unpaired = find_pairs(Path(images), source)
        check_pairs(Path(images), source, pairs, binary)
        say_unpaired(Path(images), unpaired, len(pairs) + len(unpaired))
        files = SegmentationFiles(pairs=tuple(pairs), classes=0, names=(), ignore_index=ignore_index)

    def values_of(i: int) -> BadImage | set[int]:
        try:
            if whole:
                read_image(files.pairs[i][0], None)
            ids = read_mask(files.pairs[i][1], None, binary=True) if binary else files.read_ids(i)
        except BadImageError as error:
            return BadImage(error.path, error.reason)
        if int(ids.min()) < 0 or int(ids.max()) > 65535:
            return BadImage(files.pairs[i][1], "values outside 16 bits")
        return set(torch.bincount(ids.flatten()).nonzero().flatten().tolist())

    found = in_threads(values_of, range(len(files)), workers, "reading masks")
    refuse_bad(found, source)
    if files.values is not None:
        return files
    seen = set().union(*(f for f in found if isinstance(f, set)))
    if binary:
        threshold = 0 if max(seen) <= 1 else 127
        return replace(files, classes=2, names=("background", "foreground"), threshold=threshold)
    classes = count_classes(sorted(seen), source, ignore_index)
    return replace(files, classes=classes, names=tuple(f"class {i}" for i in range(classes)))
