"""The family "stylegan2": StyleGAN2 generators, IC-GAN's variant among them."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamteacher.teachers.cost import channels_by_stride
from dreamteacher.teachers.family import Cost, Family
from dreamteacher.teachers.stylegan2.convert import convert
from dreamteacher.teachers.stylegan2.teacher import Generator, StyleGan2Spec, StyleGan2Teacher, load


def cost(spec: StyleGan2Spec) -> Cost:
    """Of one image."""
    with torch.device("meta"):
        network = Generator(spec)
    bank = torch.zeros(1, spec.h_dim) if spec.h_dim else None
    teacher = StyleGan2Teacher(network, name="", licence="", bank=bank)
    gmacs = macs(spec) / 1e9
    return Cost(channels_by_stride(teacher.specs), ("sample",), gmacs, gmacs)


def macs(spec: StyleGan2Spec) -> int:
    """Multiply-accumulates of one image of a StyleGAN2, added up layer by layer.

    Its layers cannot run without values (they leave mixed precision, which the meta device does not have).
    Test: equal to the operations counted while a small one runs.
    """
    w = spec.w_dim
    embeds = [n for n in (spec.c_dim, spec.h_dim) if n]
    total = w * sum(embeds)
    total += (
        (spec.z_dim + w * len(embeds)) * w + (spec.mapping_layers - 1) * w * w if spec.mapping_layers else 0
    )
    for i, channels in enumerate(spec.channels):
        height, width = spec.block_size(i)
        pixels = height * width
        if i:  # doubles: a transposed convolution of the smaller map, then the filter on every channel
            before = spec.channels[i - 1]
            total += before * (w + channels) + pixels // 4 * 9 * before * channels + pixels * 16 * channels
        total += channels * (w + channels) + pixels * 9 * channels * channels
        if spec.architecture == "skip" or i == len(spec.channels) - 1:
            total += channels * (w + pixels * spec.image_channels)
    return total


def tiny() -> tuple[dict[str, Tensor], StyleGan2Spec]:
    """A generator of 64 px with levels at strides 4 to 32; noise strengths, biases and the mean style are not zero."""
    spec = StyleGan2Spec(size=(64, 64), channels=(12, 12, 8, 8, 8, 4), z_dim=8, w_dim=8, mapping_layers=2)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = Generator(spec)
        network.mapping.w_avg.normal_()
        for name, parameter in network.named_parameters():
            if name.endswith(("noise_strength", "bias")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return network.state_dict(), spec


FAMILY = Family(
    name="stylegan2",
    spec=StyleGan2Spec,
    load=load,
    settings=frozenset({"psi"}),
    convert={"stylegan2": convert, "icgan-stylegan2": convert},
    tiny=tiny,
    cost=cost,
    instances=lambda spec: (spec.h_dim, 0),  # the classes of an IC-GAN of this family are drawn freely
)
