"""Images with masks from the disk: random crops of random scale to train on, whole images to test on."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

from dreamteacher.data.draws import draw_images
from dreamteacher.data.images import BadImage, BadImageError, nearest
from dreamteacher.data.loader import load_ahead
from dreamteacher.data.masks.reader import MaskedImages
from dreamteacher.data.seeds import step_generator
from dreamteacher.downstream.classification.finetune import shuffled_batches
from dreamteacher.downstream.segmentation.config import CropConfig
from dreamteacher.runtime.errors import UserError

# What lies beyond an image: close to 0 once a student has normalised it.
FILL = (124, 116, 104)
# Crops that are drawn until one is not nearly all of one class.
_TRIES = 10


def drawn_files(files: MaskedImages, masks: int | None, seed: int) -> MaskedImages:
    """Those of `masks` labelled images drawn by the seed; all for None."""
    return files.take(draw_images(len(files), masks or len(files), seed))


def scaled_size(size: Sequence[int], short_side: int, factor: float = 1.0) -> tuple[int, int]:
    """(height, width) of an image whose shorter side becomes `short_side` (0: stays), times `factor`.

    Example:
        >>> scaled_size((600, 800), 300, 0.5)
        (150, 200)
    """
    ratio = factor * (short_side / min(size) if short_side else 1)
    return max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio))


def scaled(image: Tensor, size: tuple[int, int], top: int, left: int, part: tuple[int, int]) -> Tensor:
    """The part at (top, left) of an image scaled to `size`; computed alone, equal to scaling all of it."""
    y, x = image.shape[1] / size[0], image.shape[2] / size[1]
    box = (left * x, top * y, (left + part[1]) * x, (top + part[0]) * y)
    box = (*box[:2], min(box[2], image.shape[2]), min(box[3], image.shape[1]))
    return pil_to_tensor(to_pil_image(image).resize((part[1], part[0]), Image.Resampling.BILINEAR, box=box))


def scaled_mask(mask: Tensor, size: tuple[int, int], top: int, left: int, part: tuple[int, int]) -> Tensor:
    """The same of a mask, nearest neighbour."""
    rows, columns = (
        nearest(have, whole, first, length)
        for have, whole, first, length in zip(mask.shape, size, (top, left), part, strict=True)
    )
    return mask[rows][:, columns]


def random_crop(
    image: Tensor, mask: Tensor, config: CropConfig, *, ignore_index: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A crop of an image at a random scale, and of its mask; mirrored or not; filled up where it is too small.

    The image is uint8 3 x H x W, the mask int64 class ids of the same scene, at any resolution;
    `ignore_index` is no class, and what is filled up. Returns uint8 3 x size and int64 size.
    """
    low, high = config.scale
    factor = low + (high - low) * float(torch.rand((), generator=generator))
    size = scaled_size(image.shape[1:], config.short_side, factor)
    part = min(size[0], config.size[0]), min(size[1], config.size[1])
    for _ in range(_TRIES if config.most_of_one_class < 1 else 1):
        top, left = (
            int(torch.randint(0, have - taken + 1, (), generator=generator))
            for have, taken in zip(size, part, strict=True)
        )
        target = scaled_mask(mask, size, top, left, part)
        counts = target[target != ignore_index].unique(return_counts=True)[1]
        if len(counts) > 1 and int(counts.max()) <= config.most_of_one_class * int(counts.sum()):
            break
    pixels = torch.tensor(FILL, dtype=torch.uint8)[:, None, None].repeat(1, *config.size)
    pixels[:, : part[0], : part[1]] = scaled(image, size, top, left, part)
    ids = torch.full(config.size, ignore_index)
    ids[: part[0], : part[1]] = target
    if config.flip and bool(torch.rand((), generator=generator) < 0.5):
        pixels, ids = pixels.flip(2), ids.flip(1)
    return pixels, ids


@functools.cache
def _say(path: Path, reason: str) -> None:
    print(f"'{path}' is damaged ({reason}): other images take its place.", file=sys.stderr)


class _Made(Dataset[Any]):
    """Item k is what a function makes of k, wherever that is; a bad image where it can be made of none."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.make(item)
        except BadImageError as error:
            return BadImage(error.path, error.reason)


def _crop_batch(
    files: MaskedImages, config: CropConfig, seed: int, item: tuple[int, Tensor]
) -> tuple[Tensor, Tensor]:
    step, index = item
    made = []
    for place, first in enumerate(index.tolist()):
        generator = step_generator(seed, step, f"crop/{place}")
        image, mask = _readable(files, first)
        made.append(random_crop(image, mask, config, ignore_index=files.ignore_index, generator=generator))
    images, masks = zip(*made, strict=True)
    return torch.stack(images), torch.stack(masks)


def _readable(files: MaskedImages, first: int) -> tuple[Tensor, Tensor]:
    """The pair of this number, or where it is damaged the next."""
    for i in range(first, first + len(files) - 1):
        try:
            return files.read(i % len(files))
        except BadImageError as error:
            _say(error.path, error.reason)
    return files.read((first - 1) % len(files))


def _scaled_pair(files: MaskedImages, short_side: int, index: int) -> tuple[Tensor, Tensor]:
    image, mask = files.read(index)
    size = scaled_size(image.shape[1:], short_side)
    return scaled(image, size, 0, 0, size), mask


def crops(
    files: MaskedImages,
    config: CropConfig,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    workers: int = 0,
    first: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches `first` to `steps` - 1 of crops, uint8 N x 3 x H x W, and masks, int64 N x H x W.

    The same for every number of workers, and wherever they begin. A pair found damaged gives way to the next,
    which is said on stderr; a UserError where nothing can be read any more.
    """
    order = shuffled_batches(len(files), batch_size, steps, step_generator(seed, 0, "semantic"))
    wanted = itertools.islice(enumerate(order), first, None)
    stream = load_ahead(_Made(functools.partial(_crop_batch, files, config, seed)), wanted, workers)
    for batch in stream:
        if isinstance(batch, BadImage):
            raise UserError(
                f"None of {len(files)} images with masks can be read any more ({batch.path}).",
                "Check that the disk is still there.",
            )
        yield batch


def whole_images(
    files: MaskedImages, short_side: int, *, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each image, uint8 3 x H x W scaled to `short_side` (0: as it is), and its mask, as large as it is.

    A UserError where one of them cannot be read any more.
    """
    stream = load_ahead(_Made(functools.partial(_scaled_pair, files, short_side)), range(len(files)), workers)
    for item in tqdm(stream, total=len(files), desc="testing", disable=not sys.stderr.isatty()):
        if isinstance(item, BadImage):
            raise UserError(
                f"'{item.path}' cannot be read any more: {item.reason}.",
                "Check that the disk is still there.",
            )
        yield item
