"""ViTDet's simple feature pyramid: levels at strides 4 to 32 from the one map of a plain ViT."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dreamteacher.spec import FeatureSpec

STRIDES = (4, 8, 16, 32)


class SimplePyramid(nn.Module):
    """One map -> maps at strides 4, 8, 16 and 32; several maps (a student with levels of its own) as they are.

    From stride 16: two deconvolutions 2x2 with a LayerNorm and a GELU between them give stride 4, one gives
    stride 8, nothing is done for 16, and max pooling gives 32. Each deconvolution halves the channels. From
    another stride there are more or fewer of each.

    It is no part of a backbone: it stands at the front of every neck, is trained with it, and is kept or
    thrown away with it.

    Args:
        specs: the student's levels, fine to coarse.

    Source: section 3 of ViTDet (arXiv 2203.16527). Its 1x1 and 3x3 convolutions of each level are not here: the
    necks that follow have lateral and output convolutions of their own, and a top-down path besides.

    Example:
        >>> pyramid = SimplePyramid([FeatureSpec("s16", 32, 16)])
        >>> [(s.name, s.channels) for s in pyramid.specs]
        [('s4', 8), ('s8', 16), ('s16', 32), ('s32', 32)]
    """

    def __init__(self, specs: Sequence[FeatureSpec]) -> None:
        super().__init__()
        self.specs = tuple(specs)
        self.branches = nn.ModuleList()
        if len(specs) == 1:
            channels, stride = specs[0].channels, specs[0].stride
            made = [_branch(channels, stride, target) for target in STRIDES]
            self.branches.extend(branch for branch, _ in made)
            self.specs = tuple(FeatureSpec(f"s{s}", c, s) for s, (_, c) in zip(STRIDES, made, strict=True))
        self.incoming = len(specs)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The student's maps, N x C x H x W each -> one map per level of `specs`.

        Raises:
            ValueError: when there are not as many maps as the student has levels.
        """
        if len(features) != self.incoming:
            raise ValueError(f"the neck takes {self.incoming} levels, got {len(features)} maps")
        if not self.branches:
            return list(features)
        return [branch(features[0]) for branch in self.branches]


def _branch(channels: int, stride: int, target: int) -> tuple[nn.Sequential, int]:
    """What brings a map from one stride to another (both powers of two), and the channels that it gives."""
    from timm.layers import LayerNorm2d

    layers: list[nn.Module] = []
    while stride > target:
        if layers:
            layers += [LayerNorm2d(channels), nn.GELU()]
        half = max(1, channels // 2)
        layers.append(nn.ConvTranspose2d(channels, half, 2, stride=2))
        channels, stride = half, stride // 2
    while stride < target:
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
        stride *= 2
    return nn.Sequential(*layers), channels
