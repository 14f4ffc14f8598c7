"""What a teacher has and what an image costs, from its spec alone: networks without weights, operations counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from dreamteacher.spec import FeatureSpec

if TYPE_CHECKING:
    from dreamteacher.teachers.biggan.teacher import BigGanSpec
    from dreamteacher.teachers.diffusion.teacher import DiffusionSpec
    from dreamteacher.teachers.stable_diffusion.teacher import StableDiffusionSpec
    from dreamteacher.teachers.stylegan2.teacher import StyleGan2Spec
    from dreamteacher.teachers.vae import VaeSpec


class Cost(NamedTuple):
    """What one image costs at the teacher's own size.

    Args:
        levels: stride -> channels of the maps, fine to coarse.
        modes: of "encode" and "sample".
        full: GMACs (10^9 multiply-accumulates) of a whole pass: a denoising step, an autoencoder's encoding and
            decoding, a GAN's image.
        needed: GMACs up to the last level that is taken; what a teacher computes.
    """

    levels: dict[int, int]
    modes: tuple[str, ...]
    full: float
    needed: float


def measure(family: str, spec: Any) -> Cost:
    """The cost of a teacher of one of the families of `teachers.SPECS`; no weight is allocated.

    Raises:
        UserError: for a spec that gives no teacher.
        KeyError: for a family that is not known.
    """
    by_family: dict[str, Callable[[Any], Cost]] = {
        "diffusion": _diffusion,
        "stable-diffusion": _stable_diffusion,
        "stylegan2": _stylegan2,
        "biggan": _biggan,
        "vae": _vae,
    }
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        return by_family[family](spec)


def _gmacs(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2e9


def _levels(specs: tuple[FeatureSpec, ...]) -> dict[int, int]:
    return {s.stride: s.channels for s in specs}


def _diffusion(spec: DiffusionSpec) -> Cost:
    from dreamteacher.teachers.diffusion.teacher import DiffusionTeacher, build_unet
    from dreamteacher.teachers.diffusion.walk import decoder_maps

    p = spec.patch
    with torch.device("meta"):
        unet = build_unet(spec)
        teacher = DiffusionTeacher(unet, spec, name="", licence="")
        x = torch.empty(1, spec.image_channels * p * p, spec.size[0] // p, spec.size[1] // p)
        t = torch.zeros(1, dtype=torch.long)
    # The coarsest level is up_blocks[0]; strides halve from there to `patch`.
    count = len(unet.up_blocks) - int(math.log2(teacher.specs[0].stride // p))
    full = _gmacs(lambda: unet(x, t, t if spec.classes else None))
    needed = _gmacs(lambda: decoder_maps(unet, x, t, count))
    return Cost(_levels(teacher.specs), ("encode", "sample"), full, needed)


def _stable_diffusion(spec: StableDiffusionSpec) -> Cost:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from dreamteacher.teachers.stable_diffusion.network import decoder_maps, time_ids
    from dreamteacher.teachers.stable_diffusion.teacher import StableDiffusionTeacher, build_network
    from dreamteacher.teachers.vae import latents

    height, width = (side * spec.enlarge for side in spec.size)
    with torch.device("meta"):
        network = build_network(spec)
        whole = UNet2DConditionModel(**spec.unet)
        image = torch.empty(1, 3, height, width)
        t = torch.zeros(1, dtype=torch.long)
        ids = time_ids(height, width, torch.empty(1))
    teacher = StableDiffusionTeacher(network, spec, name="", licence="")
    z = latents(network.vae, image)
    prompt, count = network.prompt.to("meta"), len(network.unet.up_blocks)
    added = (network.pooled.to("meta"), ids) if network.xl else None
    told = {"text_embeds": added[0], "time_ids": added[1]} if added else None
    encoder = _gmacs(lambda: latents(network.vae, image))
    full = _gmacs(lambda: whole(z, t, encoder_hidden_states=prompt, added_cond_kwargs=told))
    needed = _gmacs(lambda: decoder_maps(network.unet, z, t, prompt, count, added))
    return Cost(_levels(teacher.specs), ("encode",), encoder + full, encoder + needed)


def _vae(spec: VaeSpec) -> Cost:
    from dreamteacher.teachers.vae import CLASSES, VaeTeacher, decode, latents, levels_of

    with torch.device("meta"):
        vae = CLASSES[spec.kind](**spec.config)
        image = torch.empty(1, vae.config["in_channels"], *spec.size)
    teacher = VaeTeacher(vae, spec, name="", licence="")
    z = latents(vae, image)
    finest = teacher.specs[0].stride
    count = sum(stride >= finest for stride, _ in levels_of(vae))
    encoder = _gmacs(lambda: latents(vae, image))
    full, needed = (_gmacs(lambda: decode(vae, z, count, whole=w)) for w in (True, False))  # noqa: B023
    return Cost(_levels(teacher.specs), ("encode", "sample"), encoder + full, encoder + needed)


def _biggan(spec: BigGanSpec) -> Cost:
    from dreamteacher.teachers.biggan.teacher import BigGanNetwork, BigGanTeacher

    with torch.device("meta"):
        network = BigGanNetwork(spec)
        z = torch.empty(1, spec.dim_z)
        label = torch.zeros(1, dtype=torch.long) if spec.classes else None
        feature = torch.empty(1, spec.features) if spec.features else None
    bank, labels = torch.zeros(1, max(spec.features, 1)), torch.zeros(1, dtype=torch.long)
    teacher = BigGanTeacher(network, name="", licence="", bank=bank, bank_labels=labels)
    gmacs = _gmacs(lambda: network(z, label, feature, []))
    return Cost(_levels(teacher.specs), ("sample",), gmacs, gmacs)


def _stylegan2(spec: StyleGan2Spec) -> Cost:
    from dreamteacher.teachers.stylegan2.teacher import Generator, StyleGan2Teacher

    with torch.device("meta"):
        network = Generator(spec)
    bank = torch.zeros(1, spec.h_dim) if spec.h_dim else None
    teacher = StyleGan2Teacher(network, name="", licence="", bank=bank)
    gmacs = stylegan2_macs(spec) / 1e9
    return Cost(_levels(teacher.specs), ("sample",), gmacs, gmacs)


def stylegan2_macs(spec: StyleGan2Spec) -> int:
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
