"""BigGAN, BigBiGAN, IC-GAN as teachers: the contract, samples by generator, banks, published widths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dreamteacher.runtime.config import from_json, to_json
from dreamteacher.teachers.biggan.teacher import (
    BigGanNetwork,
    BigGanSpec,
    BigGanTeacher,
    load,
)
from dreamteacher.testing import check_teacher
from tests.builders.biggan import (
    ALL_LEVELS,
    TINY,
    instances,
    made,
    random_weights,
    tiny,
    tiny_bigbigan,
    tiny_biggan,
    tiny_class_instance,
    tiny_unconditional,
)
from tests.builders.pictures import refused

# --- the teacher --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", TINY, ids=[b.__name__ for b in TINY])
def test_contract(build, tmp_path):
    teacher = made(build, tmp_path)
    check_teacher(teacher)
    assert tuple(s.stride for s in teacher.specs) == TINY[build]
    assert teacher.modes == {"sample"}
    refused(lambda: teacher.encode(torch.rand(1, 3, 64, 64), generator=torch.Generator()), "cannot encode")


def test_maps_are_those_of_the_pass_that_made_the_image(tmp_path):
    teacher = made(tiny, tmp_path)
    caught: dict[int, Tensor] = {}
    calls: list[str] = []
    for i, block in enumerate(teacher.network.blocks):
        block.register_forward_hook(lambda _m, _a, out, i=i: caught.__setitem__(i, out))
    for name, module in teacher.network.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _m, _a, _o, name=name: calls.append(name))
    _, maps = teacher.sample(3, generator=torch.Generator().manual_seed(4))
    for ours, stride in zip(maps, (4, 8, 16, 32), strict=True):
        hooked = next(m for m in caught.values() if m.shape[-1] == 64 // stride)
        assert (ours - hooked).abs().max().item() == 0.0
    assert len(calls) == len(set(calls))  # one pass: no layer ran twice
    assert "blocks.3.attention.out" in calls


def test_what_is_drawn(tmp_path):
    teacher = made(tiny_class_instance, tmp_path)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    teacher.network.register_forward_pre_hook(lambda _m, args: seen.append(args[:3]))
    a, _ = teacher.sample(120, generator=torch.Generator().manual_seed(0))
    b, _ = teacher.sample(120, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(a, b)
    z, labels, features = seen[0]
    assert z.mean().abs() < 0.05
    assert z.std().item() == pytest.approx(1, abs=0.05)
    # Every feature is one of the bank's, all are used, and each comes with its own class.
    place = (features[:, None] == teacher.bank).all(-1).float().argmax(1)
    assert torch.equal(features, teacher.bank[place])
    assert torch.equal(labels, teacher.bank_labels[place])
    counts = torch.bincount(place, minlength=6)
    assert counts.min() >= 10


def test_classes_are_drawn_uniformly(tmp_path):
    teacher = made(tiny_biggan, tmp_path)
    seen: list[Tensor] = []
    teacher.network.register_forward_pre_hook(lambda _m, args: seen.append(args[1]))
    teacher.sample(90, generator=torch.Generator().manual_seed(0))
    assert torch.bincount(seen[0], minlength=3).min() >= 10
    bigbigan = made(tiny_bigbigan, tmp_path)
    bigbigan.network.register_forward_pre_hook(lambda _m, args: seen.append(args[1]))
    bigbigan.sample(5, generator=torch.Generator().manual_seed(0))
    assert seen[1].tolist() == [0] * 5


def test_truncation(tmp_path):
    seen: list[Tensor] = []
    for psi in (1.0, 0.5, 0.0):
        teacher = made(tiny_unconditional, tmp_path, psi=psi)
        teacher.network.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        teacher.sample(100, generator=torch.Generator().manual_seed(0))
    assert seen[0].abs().max() > 3
    assert seen[1].abs().max() < 1
    # The standard deviation of a normal cut off at 2: sqrt(1 - 4 phi(2) / (2 Phi(2) - 1)).
    assert seen[1].std().item() == pytest.approx(0.5 * 0.8796, abs=0.02)
    assert seen[2].abs().max() == 0
    refused(lambda: made(tiny_unconditional, tmp_path, psi=1.5), "psi")


def test_banks_that_are_missing_or_do_not_fit():
    spec = from_json(BigGanSpec, {**to_json(ALL_LEVELS), "classes": 3, "class_width": 5})
    weights, bank = random_weights(spec), instances(6, 16)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])

    def teacher(**more: Tensor) -> BigGanTeacher:
        return load({**weights, **more}, spec, Path("teacher.safetensors"), name="icgan", licence="-")

    assert teacher(bank=bank, bank_labels=labels).bank is not None
    refused(teacher, "no bank", "--bank-images", "--embedder")
    refused(lambda: teacher(bank=bank[:, :8], bank_labels=labels), "(6, 8)", "16")
    refused(lambda: teacher(bank=bank[:0], bank_labels=labels[:0]), "(0, 16)")
    refused(lambda: teacher(bank=bank), "classes", "--bank-images")
    refused(lambda: teacher(bank=bank, bank_labels=labels[:5]), "0 to 2")
    refused(lambda: teacher(bank=bank, bank_labels=labels + 1), "0 to 2")
    refused(
        lambda: load({}, spec, Path("x.safetensors"), name="icgan", licence="-"), "x.safetensors", "missing"
    )


def test_networks_that_cannot_be():
    refused(lambda: BigGanSpec(channels=(8,)), "channels")
    refused(lambda: BigGanSpec(channels=(8, 8), attention=(1,)), "attention")
    refused(lambda: BigGanSpec(channels=(8, 4), attention=(0,)), "attention")
    refused(lambda: BigGanSpec(channels=(8, 4), hierarchical=False), "told of nothing")
    spec = BigGanSpec(channels=(4, 4), latent=2)
    refused(
        lambda: load(random_weights(spec), spec, Path("x"), name="flat", licence="-"), "no level at stride 4"
    )


def test_loading_draws_nothing_and_keeps_every_bit(tmp_path):
    state = torch.get_rng_state()
    weights = random_weights(ALL_LEVELS)
    teacher = made(tiny, tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, weights[k]) for k, v in teacher.network.state_dict().items())
    assert torch.equal(teacher.bank, instances(6, 16))


def test_forward_compiles_without_graph_breaks(tmp_path):
    teacher = made(tiny_class_instance, tmp_path)
    network = teacher.network
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    z = torch.randn(2, network.spec.dim_z, generator=torch.Generator().manual_seed(0))
    arguments = z, torch.tensor([0, 2]), instances(2, 16), (1, 3)
    with torch.no_grad():
        (image, maps), (image_, maps_) = compiled(*arguments), network(*arguments)
    assert torch.equal(image, image_)
    assert all(map(torch.equal, maps, maps_))
    assert len(maps) == 2


def test_half_precision_stays_close(tmp_path):
    teacher = made(tiny_class_instance, tmp_path)
    exact, maps = teacher.sample(4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        rough, rough_maps = teacher.sample(4, generator=torch.Generator().manual_seed(0))
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().mean() < 0.02 * exact.std()
    for a, b in zip(rough_maps, maps, strict=True):
        assert (a.float() - b).abs().mean() < 0.02 * b.std()


# --- published widths ---------------------------------------------------------------------------------------

ICGAN = {"attention": (3,), "latent": 17, "features": 2048, "feature_width": 512}
BIG = (16, 16, 8, 8, 4, 2, 1)


@pytest.mark.parametrize(
    ("spec", "levels", "gmacs"),
    [
        (
            BigGanSpec(channels=tuple(96 * m for m in BIG), **ICGAN),
            {4: 384, 8: 768, 16: 768, 32: 1536},
            69.7,
        ),
        (
            BigGanSpec(channels=tuple(64 * m for m in BIG), **ICGAN),
            {4: 256, 8: 512, 16: 512, 32: 1024},
            31.2,
        ),
        (
            BigGanSpec(
                channels=tuple(96 * m for m in (16, 16, 8, 4, 2, 1)),
                attention=(3,),
                classes=1,
                class_width=128,
            ),
            {4: 384, 8: 768, 16: 1536},
            20.1,
        ),
    ],
    ids=["icgan-256", "icgan-256-half", "bigbigan-128"],
)
def test_published_networks(spec, levels, gmacs):
    """Shapes and cost without memory for them."""
    with torch.device("meta"):
        bank = torch.empty(5, spec.features) if spec.features else None
        teacher = BigGanTeacher(BigGanNetwork(spec), name="big", licence="-", bank=bank)
        arguments = (
            torch.empty(1, spec.dim_z),
            torch.zeros(1, dtype=torch.long),
            torch.empty(1, spec.features or 1),
        )
    assert {s.stride: s.channels for s in teacher.specs} == levels
    with FlopCounterMode(display=False) as counter:
        image, maps = teacher.network(*arguments, range(spec.blocks))
    assert image.shape == (1, 3, *teacher.size)
    shapes = [s.shape(1, teacher.size) for s in teacher.specs]
    assert [m.shape for m in maps[-3::-1]][: len(shapes)] == shapes
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, abs=0.05)
