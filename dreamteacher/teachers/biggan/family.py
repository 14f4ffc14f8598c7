"""The family "biggan": BigGAN, BigBiGAN and IC-GAN."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamteacher.teachers.biggan.teacher import (
    BigGanSpec,
    BigGanTeacher,
    build_network,
    convert,
    load,
)
from dreamteacher.teachers.cost import channels_by_stride, gmacs
from dreamteacher.teachers.family import Cost, Family


def cost(spec: BigGanSpec) -> Cost:
    """Of one image."""
    network = build_network(spec)
    with torch.device("meta"):
        z = torch.empty(1, spec.dim_z)
        label = torch.zeros(1, dtype=torch.long) if spec.classes else None
        feature = torch.empty(1, spec.features) if spec.features else None
    bank, labels = torch.zeros(1, max(spec.features, 1)), torch.zeros(1, dtype=torch.long)
    teacher = BigGanTeacher(network, name="", licence="", bank=bank, bank_labels=labels)
    needed = gmacs(lambda: network(z, label, feature, []))
    return Cost(channels_by_stride(teacher.specs), ("sample",), needed, needed)


def tiny() -> tuple[dict[str, Tensor], BigGanSpec]:
    """A class-conditional BigGAN without a hierarchical latent: 32 px, a level at stride 4 only."""
    spec = BigGanSpec(channels=(8, 8, 8, 4), latent=6, hierarchical=False, classes=3, class_width=5)
    return random_weights(spec), spec


def random_weights(spec: BigGanSpec, seed: int = 0) -> dict[str, Tensor]:
    """Seeded values of unit gain for every weight; BatchNorm's means and gains are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, like in build_network(spec).state_dict().items():
        value = torch.randn(like.shape, generator=generator)
        if like.dim() > 1:
            value = value * like[0].numel() ** -0.5
        weights[name] = value.abs() + 0.5 if name.endswith("scale.bias") else value
    return weights


FAMILY = Family(
    name="biggan",
    spec=BigGanSpec,
    load=load,
    settings=frozenset({"psi"}),
    convert={"biggan": convert},
    tiny=tiny,
    cost=cost,
    instances=lambda spec: (spec.features, spec.classes),
)
