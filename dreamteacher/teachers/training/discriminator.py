"""The discriminator that a StyleGAN2 is trained against: residual, with blurred downsampling."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamteacher.teachers.stylegan2.teacher import FullyConnected, StyleGan2Spec, fir_kernel

GROUP = 4  # images that the minibatch standard deviation is taken over


class EqualConv(nn.Module):
    """A convolution with the equalised learning rate; `down` blurs and halves first.

    Args:
        gain: the output is multiplied by this. The gain of the leaky ReLU that follows goes in here too: the
            activation commutes with positive factors.
    """

    kernel: Tensor

    def __init__(
        self, inputs: int, outputs: int, size: int, *, gain: float, bias: bool = True, down: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, size, size))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.scale, self.gain, self.down = gain / math.sqrt(inputs * size**2), gain, down
        self.register_buffer("kernel", fir_kernel(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, inputs, H, W) -> (N, outputs, H, W), halved where `down`."""
        weight = self.weight * self.scale
        bias = None if self.bias is None else self.bias * self.gain
        padding = self.weight.shape[-1] // 2
        if not self.down:
            return F.conv2d(x, weight, bias, padding=padding)
        # Odd sums of padding and taps: with 4 taps, 1 pixel more on each side keeps the centre in place.
        blurred = F.conv2d(x, self.kernel.expand(x.shape[1], 1, 4, 4), padding=padding + 1, groups=x.shape[1])
        return F.conv2d(blurred, weight, bias, stride=2)


class ResidualBlock(nn.Module):
    """Two convolutions beside a 1 x 1 one, all halving once; both branches weigh sqrt(1/2)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv0 = EqualConv(inputs, inputs, 3, gain=math.sqrt(2))
        self.conv1 = EqualConv(inputs, outputs, 3, gain=1.0, down=True)  # sqrt(2) sqrt(1/2)
        self.skip = EqualConv(inputs, outputs, 1, gain=math.sqrt(0.5), bias=False, down=True)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.conv0(x), 0.2)
        return F.leaky_relu(self.conv1(y), 0.2) + self.skip(x)


def append_deviation(x: Tensor, group: int = GROUP) -> Tensor:
    """One more channel: how much the images of a group differ, (N, C, H, W) -> (N, C + 1, H, W).

    Image n belongs to the group n modulo N / group. The group is the largest divisor of N up to `group`.

    Source: Karras et al. 2018 (arXiv 1710.10196), section 3; groups as in StyleGAN2. At least in float32.
    """
    n, _, height, width = x.shape
    group = next(g for g in range(min(group, n), 0, -1) if n % g == 0)
    y = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(group, -1, *x.shape[1:])
    variance = y.var(0, unbiased=False)
    deviation = (variance + 1e-8).sqrt().mean((1, 2, 3))
    channel = deviation.repeat(group).view(n, 1, 1, 1).expand(n, 1, height, width)
    return torch.cat([x, channel.to(x.dtype)], dim=1)


class Discriminator(nn.Module):
    """Images (N, image_channels, H, W) in about [-1, 1] -> logits (N,), higher for real ones.

    Its widths mirror the generator's; it halves until a side would fall below 4 pixels.

    Construct it inside `torch.random.fork_rng` with a seed.

    Source: Karras et al. 2020 (arXiv 1912.04958), the residual discriminator of figure 7.

    Example:
        >>> d = Discriminator(StyleGan2Spec(size=(16, 32), channels=(8, 8, 4), z_dim=4, w_dim=4))
        >>> d(torch.zeros(2, 3, 16, 32)).shape, len(d.blocks)
        (torch.Size([2]), 2)
    """

    def __init__(self, spec: StyleGan2Spec) -> None:
        super().__init__()
        widths = list(reversed(spec.channels))  # fine to coarse
        halvings = max(0, min(len(widths) - 1, int(math.log2(min(spec.size) / 4))))
        self.from_image = EqualConv(spec.image_channels, widths[0], 1, gain=math.sqrt(2))
        self.blocks = nn.ModuleList(ResidualBlock(widths[i], widths[i + 1]) for i in range(halvings))
        last = widths[halvings]
        cells = (spec.size[0] >> halvings) * (spec.size[1] >> halvings)
        self.conv = EqualConv(last + 1, last, 3, gain=math.sqrt(2))
        self.hidden = FullyConnected(last * cells, last)
        self.logit = FullyConnected(last, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = F.leaky_relu(self.from_image(images), 0.2)
        for block in self.blocks:
            x = block(x)
        x = F.leaky_relu(self.conv(append_deviation(x)), 0.2)
        x = F.leaky_relu(self.hidden(x.flatten(1)), 0.2) * math.sqrt(2)
        return self.logit(x).squeeze(1)
