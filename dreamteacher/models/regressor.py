"""The feature regressor: UPerNet's neck (PPM and FPN) and one projection per teacher level.

It turns a student's maps into maps shaped exactly as the teacher's, and is thrown away after pretraining.
Source: section 3 and appendix of arXiv 2307.07487; UPerNet (arXiv 1807.10221), PSPNet (arXiv 1612.01105).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamteacher.models.pyramid import SimplePyramid
from dreamteacher.spec import FeatureSpec


def conv_bn_relu(channels_in: int, channels_out: int, kernel: int) -> nn.Sequential:
    """Convolution of the same size without bias, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear to `size` = (height, width), corners not aligned; the map itself when it has that size."""
    if x.shape[-2:] == size:
        return x
    if x.shape[-2:] == (1, 1) and x.dtype == torch.bfloat16:
        # The same bits; but bilinear's backward adds in bfloat16.
        return F.interpolate(x, size=size, mode="nearest")
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class PyramidPooling(nn.Module):
    """PSPNet's pooling: the map beside its averages over coarse grids, mixed by a 3x3 convolution.

    The average over the whole map (scale 1) leaves one value per image and channel, so that BatchNorm needs a
    batch of at least 2 images in training mode; in evaluation mode any batch will do.

    Args:
        channels: channels of the incoming map.
        width: channels of each pooled branch and of the result.
        scales: cells per side of each pooling grid.

    Raises:
        ValueError: from BatchNorm, in training mode with a batch of 1.
    """

    def __init__(self, channels: int, width: int = 256, scales: Sequence[int] = (1, 2, 3, 6)) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), conv_bn_relu(channels, width, 1)) for scale in scales
        )
        self.bottleneck = conv_bn_relu(channels + len(scales) * width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """N x channels x H x W -> N x width x H x W."""
        size = (x.shape[-2], x.shape[-1])
        pooled = [resize(branch(x), size) for branch in self.branches]
        return self.bottleneck(torch.cat([x, *pooled], dim=1))


class Neck(nn.Module):
    """UPerNet's neck: PPM on the coarsest level, 1x1 laterals, top-down addition, 3x3 output convolutions.

    As in UPerNet the coarsest level has no lateral and no output convolution of its own: the PPM, which ends
    in a 3x3 convolution, is both. A student with one map (a plain ViT) is given four levels first, by the simple
    pyramid, which is part of the neck; its `specs` are then those four.

    Args:
        specs: the student's levels, fine to coarse.
        width: channels of every map that comes out.
        ppm_scales: see `PyramidPooling`, also for the batch of at least 2 in training mode.
    """

    def __init__(
        self, specs: Sequence[FeatureSpec], width: int = 256, ppm_scales: Sequence[int] = (1, 2, 3, 6)
    ) -> None:
        super().__init__()
        self.pyramid = SimplePyramid(specs)
        self.specs = self.pyramid.specs
        self.laterals = nn.ModuleList(conv_bn_relu(spec.channels, width, 1) for spec in self.specs[:-1])
        self.ppm = PyramidPooling(self.specs[-1].channels, width, ppm_scales)
        self.outputs = nn.ModuleList(conv_bn_relu(width, width, 3) for _ in self.specs[:-1])

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The student's maps, fine to coarse -> one map of `width` channels per level of `specs`, sizes unchanged.

        Raises:
            ValueError: when there are not as many maps as the student has levels.
        """
        features = self.pyramid(features)
        above = self.ppm(features[-1])
        maps = [above]
        for i in range(len(self.specs) - 2, -1, -1):
            lateral = self.laterals[i](features[i])
            above = lateral + resize(above, (lateral.shape[-2], lateral.shape[-1]))
            maps.append(self.outputs[i](above))
        return maps[::-1]


class FeatureRegressor(nn.Module):
    """Student maps in, maps shaped as the teacher's out: the neck, then one 1x1 convolution per level.

    Each teacher level is read from the neck's level of its stride, or from the nearest one (the finer of two
    equally near) resampled bilinearly.

    Args:
        student_specs: the student's levels, fine to coarse.
        teacher_specs: the teacher's levels, fine to coarse.
        width: channels inside the neck.
        ppm_scales: see `PyramidPooling`, also for the batch of at least 2 in training mode.
        seed: of the initial weights; the global random state is left as it was.

    Example:
        >>> student = [FeatureSpec("s8", 16, 8), FeatureSpec("s16", 24, 16)]
        >>> regressor = FeatureRegressor(student, [FeatureSpec("s16", 40, 16)], width=8)
        >>> maps = regressor([torch.zeros(2, 16, 8, 8), torch.zeros(2, 24, 4, 4)])
        >>> [tuple(m.shape) for m in maps]
        [(2, 40, 4, 4)]
    """

    def __init__(
        self,
        student_specs: Sequence[FeatureSpec],
        teacher_specs: Sequence[FeatureSpec],
        width: int = 256,
        ppm_scales: Sequence[int] = (1, 2, 3, 6),
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.teacher_specs = tuple(teacher_specs)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.neck = Neck(student_specs, width, ppm_scales)
            self.projections = nn.ModuleList(
                nn.Conv2d(width, spec.channels, 1) for spec in self.teacher_specs
            )
        self.sources = [_nearest_level(self.neck.specs, spec.stride) for spec in self.teacher_specs]

    def fused(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The neck's maps, one of `width` channels per level of it, fine to coarse."""
        return self.neck(features)

    def forward(
        self, features: Sequence[Tensor], sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[Tensor]:
        """One map per teacher level, fine to coarse.

        Args:
            features: the student's maps.
            sizes: (height, width) of the teacher's maps. None takes the student's own sizes, scaled by the
                ratio of the strides where a level is missing.

        Raises:
            ValueError: when the number of maps or sizes does not fit the specs.
        """
        return self.project(self.fused(features), sizes)

    def project(self, maps: Sequence[Tensor], sizes: Sequence[tuple[int, int]] | None = None) -> list[Tensor]:
        """The second half of `forward`: fused maps -> one map per teacher level."""
        if sizes is None:
            sizes = [self._own_size(maps, level) for level in range(len(self.teacher_specs))]
        return [
            projection(resize(maps[source], (size[0], size[1])))
            for projection, source, size in zip(self.projections, self.sources, sizes, strict=True)
        ]

    def _own_size(self, maps: Sequence[Tensor], level: int) -> tuple[int, int]:
        source = self.sources[level]
        ratio = self.neck.specs[source].stride / self.teacher_specs[level].stride
        height, width = maps[source].shape[-2:]
        return max(1, round(height * ratio)), max(1, round(width * ratio))


class LabelHead(nn.Module):
    """Logits from the neck's maps: side by side at the finest stride, a 3x3 convolution, a 1x1 to classes.

    Args:
        levels: maps that come in; width: channels of each, and inside.
        classes: number of classes.
        dropout: probability of dropping a channel before the last layer.
        pooled: image-level labels: what the 1x1 sees is averaged over positions, one row of logits an image.

    Source: UPerNet's fusion, arXiv 1807.10221. The paper's student reads labels "through the regressor's fused
    maps" and says no more.

    Example:
        >>> head = LabelHead(2, 8, classes=3)
        >>> head([torch.zeros(2, 8, 16, 24), torch.zeros(2, 8, 8, 12)]).shape
        torch.Size([2, 3, 16, 24])
    """

    def __init__(
        self, levels: int, width: int, classes: int, *, dropout: float = 0.0, pooled: bool = False
    ) -> None:
        super().__init__()
        self.pooled = pooled
        self.fuse = conv_bn_relu(levels * width, width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps fine to coarse -> N x classes x H x W of the finest map's size, or N x classes with `pooled`."""
        finest = (maps[0].shape[-2], maps[0].shape[-1])
        x = self.fuse(torch.cat([resize(m, finest) for m in maps], dim=1))
        if self.pooled:
            return self.classify(self.dropout(x.mean((2, 3), keepdim=True))).flatten(1)
        return self.classify(self.dropout(x))


def _nearest_level(specs: Sequence[FeatureSpec], stride: int) -> int:
    return min(range(len(specs)), key=lambda i: (abs(math.log2(specs[i].stride / stride)), specs[i].stride))
