"""Masks as COCO stores them, polygons and run lengths, drawn as bool tensors without its library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamteacher.data.images import Size


@dataclass(frozen=True, kw_only=True)
class Rle:
    """A mask as run lengths down the columns, left to right, the first run outside the object.

    Args:
        size: (height, width).
        counts: length of each run in pixels; they sum to height times width.
    """

    size: Size
    counts: tuple[int, ...]


def rle_mask(rle: Rle) -> Tensor:
    """Run lengths as bool H x W.

    Example:
        >>> rle_mask(Rle(size=(2, 3), counts=(1, 3, 2))).int().tolist()
        [[0, 1, 0], [1, 1, 0]]
    """
    height, width = rle.size
    counts = torch.tensor(rle.counts)
    values = torch.arange(len(counts)) % 2 == 1
    return values.repeat_interleave(counts).view(width, height).t().contiguous()


def polygon_mask(points: Sequence[float], size: Size) -> Tensor:
    """The pixels (bool H x W) whose centres are inside of a polygon x1, y1, x2, y2, ... by the even-odd rule.

    Example:
        >>> polygon_mask([0, 0, 3, 0, 3, 1, 0, 1], (2, 4)).int().tolist()
        [[1, 1, 1, 0], [0, 0, 0, 0]]
    """
    height, width = size
    start = torch.tensor(points, dtype=torch.float64).view(-1, 2)
    end = start.roll(-1, 0)
    backwards = (start[:, 0] > end[:, 0])[:, None]
    left, right = torch.where(backwards, end, start), torch.where(backwards, start, end)
    corners = (start - 0.5).ceil().long()
    (c0, r0), (c1, r1) = corners.amin(0).clamp(min=0).tolist(), corners.amax(0).tolist()
    c1, r1 = min(c1, width), min(r1, height)
    mask = torch.zeros(size, dtype=torch.bool)
    if c0 >= c1 or r0 >= r1:
        return mask
    flips = torch.zeros(r1 - r0 + 1, c1 - c0, dtype=torch.int32)  # the state changes from this row downwards
    for (x0, y0), (x1, y1) in zip(  # in parts, so that memory stays bounded
        (part.unbind(1) for part in left.split(512)),
        (part.unbind(1) for part in right.split(512)),
        strict=True,
    ):
        first = (x0 - 0.5).ceil().clamp(c0, c1).long()  # columns whose centre is in [x0, x1)
        count = (x1 - 0.5).ceil().clamp(c0, c1).long() - first
        edge = torch.arange(len(count)).repeat_interleave(count)
        column = torch.arange(len(edge)) + (first - count.cumsum(0) + count)[edge]
        y = y0[edge] + (column + 0.5 - x0[edge]) * ((y1 - y0) / (x1 - x0))[edge]
        row = (y - 0.5).ceil().clamp(r0, r1).long()
        flips.index_put_((row - r0, column - c0), torch.ones_like(row, dtype=torch.int32), accumulate=True)
    mask[r0:r1, c0:c1] = flips[:-1].cumsum(0) % 2 == 1
    return mask


def decode_counts(text: str) -> tuple[int, ...]:
    """Run lengths from COCO's compressed text.

    Each character holds five bits (its code minus 48), lowest first, and a bit that says that more follow;
    the highest of a number's bits is its sign. From the fourth number on, it is the difference to the last
    but one.

    Raises:
        ValueError: a foreign character, a number that is too long or cut off.

    Example:
        >>> decode_counts("132")
        (1, 3, 2)
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"a foreign character {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            if shift > 50:
                raise ValueError("a number that is too long")
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("it is cut off")
    return tuple(counts)
