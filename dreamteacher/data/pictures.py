"""Whatever a person has at hand as one batch of images: a path, a PIL picture, a tensor, or several of them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import Image
from torch import Tensor

from dreamteacher.data.images import BadImageError, from_pil, read_image, to_float
from dreamteacher.runtime.errors import UserError

Picture: TypeAlias = str | os.PathLike[str] | Image.Image | Tensor
Pictures: TypeAlias = Picture | Sequence[Picture]


def to_batch(pictures: Pictures, size: tuple[int, int]) -> Tensor:
    """Pictures as float RGB in [0, 1], N x 3 x height x width; each covers the size, its centre is kept.

    Args:
        pictures: one or several of: a path of an image; a PIL picture; a tensor, C x H x W or N x C x H x W of one or
            three channels, uint8 or float in [0, 1].
        size: (height, width).

    Raises:
        UserError: for what cannot be read, or is none of these.

    Example:
        >>> to_batch([Image.new("RGB", (64, 48)), torch.zeros(1, 40, 40)], (32, 32)).shape
        torch.Size([2, 3, 32, 32])
    """
    several = pictures if isinstance(pictures, Sequence) and not isinstance(pictures, str) else [pictures]
    if not several:
        raise UserError("There is no picture in an empty list.", "Give at least one.")
    return torch.cat([_one(picture, size) for picture in several])


def _one(picture: Picture, size: tuple[int, int]) -> Tensor:
    if isinstance(picture, Tensor):
        return _tensor(picture, size)
    try:
        if isinstance(picture, Image.Image):
            pixels = from_pil(picture, size)
        elif isinstance(picture, str | os.PathLike):
            pixels = read_image(Path(picture).expanduser(), size)
        else:
            raise UserError(
                f"A {type(picture).__name__} is no picture.",
                "Give a path, a PIL image, a tensor C x H x W, or a list of them.",
            )
    except BadImageError as error:
        raise UserError(f"'{error.path}' is no picture: {error.reason}.", "Give another one.") from None
    return to_float(pixels.unsqueeze(0))


def _tensor(images: Tensor, size: tuple[int, int]) -> Tensor:
    x = images.unsqueeze(0) if images.ndim == 3 else images
    if x.ndim != 4 or x.shape[1] not in (1, 3) or 0 in x.shape:
        raise UserError(
            f"A tensor of shape {tuple(images.shape)} is no picture.",
            "Give C x H x W or N x C x H x W, with one or three channels.",
        )
    x = to_float(x) if x.dtype == torch.uint8 else x.float()
    low, high = x.aminmax()
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"The values of the tensor run from {low:.3g} to {high:.3g}.",
            "Give float RGB in [0, 1], or uint8, without any normalisation.",
        )
    height, width = x.shape[-2:]
    if (height, width) != size:
        scale = max(size[0] / height, size[1] / width)
        large = (max(size[0], math.ceil(height * scale)), max(size[1], math.ceil(width * scale)))
        x = torch.nn.functional.interpolate(x, large, mode="bilinear", antialias=True).clamp(0, 1)
        top, left = (large[0] - size[0]) // 2, (large[1] - size[1]) // 2
        x = x[..., top : top + size[0], left : left + size[1]]
    return x.expand(-1, 3, -1, -1)
