"""What a feature map is called, how wide it is, and where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class FeatureSpec:
    """One level of a feature pyramid.

    Args:
        name: the level's name in metrics and files, "s4" for stride 4.
        channels: channels of the map.
        stride: input pixels per feature pixel (the same on both axes).

    Example:
        >>> FeatureSpec("s4", 64, 4).shape(2, (64, 96))
        (2, 64, 16, 24)
    """

    name: str
    channels: int
    stride: int

    def shape(self, batch: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """The map's shape (N, C, H, W) for images of `size` = (height, width) pixels."""
        return batch, self.channels, size[0] // self.stride, size[1] // self.stride


WhitenAxes = Literal["c", "chw"]


AtReduction = Literal["distance", "public"]


Noise = Literal["stochastic", "fixed", "inversion", "none"]
