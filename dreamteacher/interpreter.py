"""The interpreter: a small head that reads labels off the maps of a frozen generative teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dreamteacher.features import FeatureSpec
from dreamteacher.regressor import resize


def _normed(*layers: nn.Module, channels: int, groups: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.GroupNorm(groups, channels), nn.SiLU())


class Interpreter(nn.Module):
    """Teacher maps, fine to coarse -> logits at the finest map's size.

    From the coarsest level up: a 1x1 convolution per level, bilinear enlargement, concatenation with the next level,
    a depth-wise separable convolution; GroupNorm and Swish after each; dropout, then a 1x1 convolution to classes.
    With `pooled` the finest map is averaged before that: one row of logits an image, for image-level labels.

    Args:
        specs: the teacher's levels, fine to coarse (of all timesteps that it reads).
        classes: number of classes.
        width: channels of every inner map, a multiple of 32 or of `groups`.
        dropout: probability of dropping a channel before the last layer.
        groups: of GroupNorm.
        pooled: image-level labels.
        seed: of the initial weights; the global random state is left as it was.

    Source: the paper, section 7 of its appendix (after BigDatasetGAN): width 256, GroupNorm(32), dropout 0.1.

    Example:
        >>> specs = [FeatureSpec("s4", 12, 4), FeatureSpec("s8", 20, 8)]
        >>> interpreter = Interpreter(specs, classes=3, width=32)
        >>> interpreter([torch.zeros(2, 12, 16, 24), torch.zeros(2, 20, 8, 12)]).shape
        torch.Size([2, 3, 16, 24])
    """

    def __init__(
        self,
        specs: Sequence[FeatureSpec],
        classes: int,
        *,
        width: int = 256,
        dropout: float = 0.1,
        groups: int = 32,
        pooled: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.specs, self.classes, self.pooled = tuple(specs), classes, pooled
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.enter = nn.ModuleList(
                _normed(nn.Conv2d(s.channels, width, 1, bias=False), channels=width, groups=groups)
                for s in specs
            )
            self.merge = nn.ModuleList(
                _normed(
                    nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width, bias=False),
                    nn.Conv2d(2 * width, width, 1, bias=False),
                    channels=width, groups=groups,
                )
                for _ in specs[1:]
            )  # fmt: skip
            self.dropout = nn.Dropout2d(dropout)
            self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits N x classes x H x W of the finest map's size, or N x classes with `pooled`.

        Raises:
            ValueError: when there are not as many maps as levels.
        """
        if len(maps) != len(self.specs):
            raise ValueError(f"the interpreter reads {len(self.specs)} levels, got {len(maps)} maps")
        x = self.enter[-1](maps[-1])
        for i in range(len(maps) - 2, -1, -1):
            finer = self.enter[i](maps[i])
            x = self.merge[i](torch.cat([resize(x, (finer.shape[-2], finer.shape[-1])), finer], dim=1))
        if self.pooled:
            x = x.mean((2, 3), keepdim=True)
            return self.classify(self.dropout(x)).flatten(1)
        return self.classify(self.dropout(x))
