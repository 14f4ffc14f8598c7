"""The family "stylegan2": StyleGAN2 generators, IC-GAN's variant among them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dreamteacher.teachers.cost import channels_by_stride, gmacs
from dreamteacher.teachers.family import Cost, Family
from dreamteacher.teachers.stylegan2.convert import convert
from dreamteacher.teachers.stylegan2.teacher import Generator, StyleGan2Spec, StyleGan2Teacher, load


def cost(spec: StyleGan2Spec) -> Cost:
    """Of one image."""
    with torch.device("meta"):
        bank = torch.empty(1, spec.h_dim) if spec.h_dim else None
        teacher = StyleGan2Teacher(Generator(spec), name="", licence="", bank=bank)
    with FakeTensorMode():  # layers leave mixed precision, which the meta device does not have
        network = Generator(spec).requires_grad_(False)
        z, c, h = (torch.zeros(1, n) if n else None for n in (spec.z_dim, spec.c_dim, spec.h_dim))
        image = gmacs(lambda: network.synthesis(network.mapping(z, c, h), noise="const"))
    return Cost(channels_by_stride(teacher.specs), ("sample",), image, image)


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
