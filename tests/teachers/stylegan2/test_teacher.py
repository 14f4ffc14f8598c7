"""StyleGAN2: golden numbers of the published networks, loops in float64, symmetry, and the teacher's contract."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from dreamteacher.runtime.config import from_json, to_json
from dreamteacher.runtime.errors import UserError
from dreamteacher.teachers.registry import load_teacher, save_teacher
from dreamteacher.teachers.stylegan2.teacher import (
    Generator,
    StyleGan2Spec,
    StyleGan2Teacher,
    load,
    spec_of,
    upsample_image,
)
from dreamteacher.testing import check_teacher
from tests.places import GOLDEN

NETWORKS = (
    "stylegan2_skip64",
    "stylegan2_orig32_cond",
    "icgan_stylegan2_instance",
    "icgan_stylegan2_class_instance",
)
TINY = StyleGan2Spec(size=(64, 64), channels=(12, 12, 8, 8, 8, 4), z_dim=8, w_dim=8, mapping_layers=2)
NAMED: Any = {"name": "tiny", "licence": "CC0-1.0"}


def build(spec: StyleGan2Spec, *, seed: int = 0) -> Generator:
    """Seeded weights; noise strengths, biases and the mean style are not zero, so that nothing hides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Generator(spec)
        with torch.no_grad():
            network.mapping.w_avg.normal_()
            for name, parameter in network.named_parameters():
                if name.endswith(("noise_strength", "bias")):
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    return network


def tiny(folder: Path, *, spec: StyleGan2Spec = TINY) -> None:
    """A teacher's folder with seeded random weights: 64 x 64 pixels, levels at strides 4, 8, 16 and 32."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = build(spec).state_dict()
    if spec.h_dim:
        weights["bank"] = torch.randn(5, spec.h_dim, generator=torch.Generator().manual_seed(1))
    save_teacher(folder, weights, spec, NAMED)


def teacher_of(spec: StyleGan2Spec, **options: Any) -> StyleGan2Teacher:
    return StyleGan2Teacher(build(spec), **NAMED, **options)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- golden parity --------------------------------------------------------------------------------------


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """(state dict, the other tensors, published flags) of a golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        meta = file.metadata()
    state = {k[3:]: v for k, v in tensors.items() if k.startswith("sd.")}
    return state, tensors, json.loads(meta.get("flags") or meta["init_kwargs_G_ema"])


def spec_of_flags(flags: dict[str, Any]) -> StyleGan2Spec:
    """The oracle of spec_of: sizes worked out from the published flags alone."""
    size, synthesis = flags["img_resolution"], flags["synthesis_kwargs"]
    sides = [4 * 2**i for i in range(int(math.log2(size)) - 1)]
    return StyleGan2Spec(
        size=(size, size),
        channels=tuple(min(synthesis["channel_base"] // s, synthesis["channel_max"]) for s in sides),
        z_dim=flags["z_dim"],
        w_dim=flags["w_dim"],
        c_dim=flags["c_dim"],
        h_dim=flags.get("h_dim", 0),
        mapping_layers=flags["mapping_kwargs"]["num_layers"],
        image_channels=flags["img_channels"],
        architecture=synthesis.get("architecture", "skip"),
        conv_clamp=synthesis.get("conv_clamp"),
    )


def thinned(x: Tensor) -> Tensor:
    side = max(x.shape[-2:])
    step = 8 if side > 32 else 4 if side > 16 else 1
    return x[..., ::step, ::step]


def network_of(state: dict[str, Tensor], spec: StyleGan2Spec) -> Generator:
    network = build(spec)
    network.load_state_dict(state)
    return network.requires_grad_(False)


def worst(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_golden_styles_images_and_maps(name, channels_last):
    state, t, flags = golden(name)
    spec = spec_of(state, conv_clamp=flags["synthesis_kwargs"].get("conv_clamp"))
    network = network_of(state, spec)
    if channels_last:
        network.to(memory_format=torch.channels_last)
    c, h = t.get("in.c"), t.get("in.h")
    ws = network.mapping(t["in.z"], c, h)
    truncated = network.mapping(t["in.z"], c, h, psi=0.7)
    image, maps = network.synthesis(ws, noise="const")
    assert worst(ws, t["out.w.psi1"]) < 1e-4
    assert worst(truncated, t["out.w.psi07"]) < 1e-4
    assert worst(image, t["out.image.psi1"]) < 1e-4
    assert worst(network.synthesis(truncated, noise="const")[0], t["out.image.psi07"]) < 1e-4
    assert worst(network.synthesis(ws, noise="none")[0], t["out.image.psi1_nonoise"]) < 1e-4
    assert len(maps) == sum(k.startswith("out.b") for k in t) == len(spec.channels)
    for i, x in enumerate(maps):
        assert worst(thinned(x), t[f"out.b{4 * 2**i}.conv1"]) < 1e-4


@pytest.mark.parametrize("name", [*NETWORKS, "stylegan2_format_expected"])
def test_every_size_is_read_from_the_state_dict(name):
    state, _, flags = golden(name)
    clamp = flags["synthesis_kwargs"].get("conv_clamp")
    assert spec_of(state, conv_clamp=clamp) == spec_of_flags(flags)


def test_golden_image_of_the_published_file_format():
    state, t, flags = golden("stylegan2_format_expected")
    network = network_of(state, spec_of(state, conv_clamp=flags["synthesis_kwargs"]["conv_clamp"]))
    image, _ = network.synthesis(network.mapping(t["in.z"], t["in.c"]), noise="const")
    assert worst(image, t["out.image"]) < 1e-4


def test_golden_numbers_notice_what_is_wrong():
    state, t, _ = golden("stylegan2_orig32_cond")

    def off(spec: StyleGan2Spec, noise: Any = "const", c: Tensor = t["in.c"]) -> float:
        network = network_of(state, spec)
        return worst(network.synthesis(network.mapping(t["in.z"], c), noise=noise)[0], t["out.image.psi1"])

    spec = spec_of(state, conv_clamp=1.5)
    assert off(spec) < 1e-4
    assert off(replace(spec, conv_clamp=None)) > 1e-2
    assert off(spec, "none") > 1e-2
    assert off(spec, c=t["in.c"].roll(1, dims=1)) > 1e-2
    flip = {k: v.flip(2, 3) if "conv0.weight" in k else v for k, v in state.items()}
    flipped = network_of(flip, spec)  # a correlation in the upsampling layers
    image = flipped.synthesis(flipped.mapping(t["in.z"], t["in.c"]), noise="const")[0]
    assert worst(image, t["out.image.psi1"]) > 1e-2


# --- oracles and properties -----------------------------------------------------------------------------


def filtered_loop(x: Tensor) -> Tensor:
    """float64 (H, W) on the grid with zeros between pixels -> low-passed with gain 4, by loops; zeros outside."""
    taps = [1 / 8, 3 / 8, 3 / 8, 1 / 8]
    height, width = x.shape
    out = torch.zeros(height - 1, width - 1, dtype=torch.float64)
    for i in range(height - 1):
        for j in range(width - 1):
            for a in range(4):
                for b in range(4):
                    y, z = i + a - 1, j + b - 1
                    if 0 <= y < height and 0 <= z < width:
                        out[i, j] += 4 * taps[a] * taps[b] * x[y, z]
    return out


def layer_loop(x: Tensor, weight: Tensor, style: Tensor, bias: Tensor) -> Tensor:
    """One image (I, H, W) through an upsampling layer in the paper's order: modulate and demodulate the WEIGHTS,
    spread every pixel with the kernel at stride 2, filter, bias, leaky ReLU with gain sqrt(2)."""
    w = weight * style[None, :, None, None]
    w = w / (w.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
    inputs, height, width = x.shape
    out = []
    for o in range(len(w)):
        wide = torch.zeros(2 * height + 1, 2 * width + 1, dtype=torch.float64)
        for c in range(inputs):
            for i in range(height):
                for j in range(width):
                    wide[2 * i : 2 * i + 3, 2 * j : 2 * j + 3] += x[c, i, j] * w[o, c]
        y = filtered_loop(wide) + bias[o]
        out.append(torch.where(y > 0, y, 0.2 * y) * math.sqrt(2))
    return torch.stack(out)


def test_an_upsampling_layer_equals_the_loop_in_float64():
    spec = StyleGan2Spec(size=(6, 8), channels=(3, 2), z_dim=4, w_dim=4, mapping_layers=1)
    layer = build(spec).double().synthesis.blocks()[1].conv0
    assert layer is not None
    x = torch.randn(2, 3, 3, 4, generator=seeded(), dtype=torch.float64)
    w = torch.randn(2, 4, generator=seeded(1), dtype=torch.float64)
    with torch.no_grad():
        ours = layer(x, w, None)
        styles = w @ (layer.affine.weight / 2).T + layer.affine.bias
        theirs = torch.stack(
            [layer_loop(a, layer.weight, s, layer.bias) for a, s in zip(x, styles, strict=True)]
        )
    assert worst(ours, theirs) < 1e-12


def test_upsampling_an_image_equals_the_loop_in_float64():
    x = torch.randn(1, 2, 3, 5, generator=seeded(), dtype=torch.float64)
    for ours, image in zip(upsample_image(x)[0], x[0], strict=True):
        wide = torch.zeros(7, 11, dtype=torch.float64)
        wide[1::2, 1::2] = image  # the filter takes one row and column off: pixel (0, 0) lies between 0 and 1
        assert worst(ours, filtered_loop(wide)) < 1e-12


@pytest.mark.parametrize("architecture", ["skip", "orig"])
def test_non_square_by_symmetry(architecture):
    wide = StyleGan2Spec(
        size=(8, 24), channels=(6, 5, 4), z_dim=4, w_dim=4, mapping_layers=2, architecture=architecture
    )
    network = build(wide)
    state = network.state_dict()
    turned = {k: v.mT if v.ndim > 2 or k.endswith("noise_const") else v for k, v in state.items()}
    tall = network_of(turned, replace(wide, size=(24, 8)))
    z = torch.randn(2, 4, generator=seeded())
    with torch.no_grad():
        image, maps = network.synthesis(network.mapping(z), noise="const")
        other, theirs = tall.synthesis(tall.mapping(z), noise="const")
    assert image.shape == (2, 3, 8, 24)
    assert [tuple(m.shape[2:]) for m in maps] == [(2, 6), (4, 12), (8, 24)]
    assert worst(image, other.mT) < 1e-4
    assert all(worst(a, b.mT) < 1e-4 for a, b in zip(maps, theirs, strict=True))
    assert spec_of(state) == wide  # and a base that is not square is read from the weights


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"architecture": "orig", "image_channels": 1},
        {"c_dim": 3},
        {"h_dim": 6, "c_dim": 2, "mapping_layers": 3, "conv_clamp": 2.5},
    ],
)
def test_spec_round_trips(change):
    spec = replace(TINY, **change)
    assert spec_of(build(spec).state_dict(), conv_clamp=spec.conv_clamp) == spec
    assert from_json(StyleGan2Spec, json.loads(json.dumps(to_json(spec)))) == spec


def test_fresh_weights_keep_the_scale_and_all_of_them_train():
    spec = replace(TINY, channels=(64,) * 5, z_dim=64, w_dim=64, c_dim=3, h_dim=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Generator(spec)
    z, h = torch.randn(8, 64, generator=seeded()), torch.randn(8, 4, generator=seeded(1))
    ws = network.mapping(z, F.one_hot(torch.arange(8) % 3, 3).float(), h)
    assert 0.5 < ws.square().mean().sqrt() < 2
    image, maps = network.synthesis(ws, noise="random", generator=seeded())
    assert all(0.25 < m.square().mean().sqrt() < 2 for m in maps)
    assert all(float(p.detach()) == 0 for k, p in network.named_parameters() if k.endswith("noise_strength"))
    (image * torch.randn(image.shape, generator=seeded(2))).sum().backward()
    still = [k for k, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert still == []


def test_bfloat16_stays_close_and_images_add_up_in_float32():
    network = build(TINY).requires_grad_(False).to(memory_format=torch.channels_last)
    z = torch.randn(2, 8, generator=seeded())
    exact, exact_maps = network.synthesis(network.mapping(z), noise="const")
    with torch.autocast("cpu", torch.bfloat16):
        ws = network.mapping(z)
        image, maps = network.synthesis(ws, noise="const")
    assert ws.dtype == image.dtype == torch.float32
    assert worst(ws, network.mapping(z)) == 0.0
    for a, b in zip([image, *maps], [exact, *exact_maps], strict=True):
        assert (a.float() - b).norm() < 0.02 * b.norm()
    assert all(m.dtype == torch.bfloat16 for m in maps)
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_compiles_in_one_graph(bfloat16):
    network = build(replace(TINY, channels=(8, 8, 4), c_dim=2, conv_clamp=256.0)).requires_grad_(False)
    z, c = torch.randn(2, 8, generator=seeded()), torch.eye(2)
    noises = network.synthesis.draw_noise(2, noise="random", generator=seeded())

    def run(z: Tensor, c: Tensor, noises: list[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return network.synthesis.walk(network.mapping(z, c, psi=0.7), noises)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    image, maps = run(z, c, noises)
    again, theirs = compiled(z, c, noises)
    assert worst(image, again) == 0.0
    assert all(worst(a, b) == 0.0 for a, b in zip(maps, theirs, strict=True))


def test_noise_comes_from_the_generator_alone():
    network = build(TINY).requires_grad_(False)
    ws = network.mapping(torch.randn(2, 8, generator=seeded()))
    first, again, other = (network.synthesis(ws, noise="random", generator=seeded(s))[0] for s in (0, 0, 1))
    assert worst(first, again) == 0.0
    assert worst(first, other) > 1e-2
    with pytest.raises(ValueError, match="generator"):
        network.synthesis(ws, noise="random")
    with pytest.raises(ValueError, match="classes"):
        network.mapping(torch.randn(2, 8, generator=seeded()), torch.eye(2))


# --- the teacher ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{}, {"c_dim": 3}, {"h_dim": 6}, {"c_dim": 3, "h_dim": 6, "architecture": "orig"}, {"image_channels": 1}],
)
def test_contract_of_a_folder(tmp_path, change):
    tiny(tmp_path, spec=replace(TINY, **change))
    teacher = load_teacher(str(tmp_path))
    check_teacher(teacher)
    assert [(s.stride, s.channels) for s in teacher.specs] == [(4, 8), (8, 8), (16, 12), (32, 12)]
    assert teacher.modes == {"sample"}
    assert teacher.size == (64, 64)
    images, _ = teacher.sample(2, generator=seeded())
    grey = worst(images[:, 0], images[:, 1]) == 0
    assert grey == (change.get("image_channels") == 1)


def test_maps_are_those_of_the_forward_that_made_the_images():
    teacher = teacher_of(TINY)
    caught: list[Tensor] = []
    for block in teacher.generator.synthesis.blocks():
        block.conv1.register_forward_hook(lambda _m, _a, out: caught.append(out))
    images, maps = teacher.sample(2, generator=seeded(3))
    for ours, theirs, spec in zip(maps, caught[3::-1], teacher.specs, strict=True):
        assert ours.shape == spec.shape(2, (64, 64))
        assert worst(ours, theirs) == 0.0
    assert len(caught) == 6  # one pass gave both
    network, draws = teacher.generator, seeded(3)
    z = torch.randn(2, 8, generator=draws)
    with torch.no_grad():
        image, _ = network.synthesis(network.mapping(z), noise="random", generator=draws)
    assert worst(images, (image / 2 + 0.5).clamp(0, 1)) < 1e-6
    assert 0 < (images == 0).float().mean() < 0.5  # these weights leave the range: clamping is seen


def test_channels_last_changes_rounding_only():
    plain = build(TINY).requires_grad_(False)
    teacher = teacher_of(TINY)
    assert teacher.generator.synthesis.blocks()[1].conv1.weight.is_contiguous(
        memory_format=torch.channels_last
    )
    ws = plain.mapping(torch.randn(2, 8, generator=seeded()))
    a, b = plain.synthesis(ws, noise="const"), teacher.generator.synthesis(ws, noise="const")
    assert worst(a[0], b[0]) < 1e-4
    assert all(worst(x, y) < 1e-4 for x, y in zip(a[1], b[1], strict=True))


def test_truncation_moves_towards_the_mean_style():
    z = torch.randn(3, 8, generator=seeded())
    network = build(TINY).requires_grad_(False)
    full, mean = network.mapping(z), network.mapping.w_avg
    for psi in (0.0, 0.4, 1.0):
        torch.testing.assert_close(network.mapping(z, psi=psi), mean + psi * (full - mean))
    ones = [teacher_of(TINY, psi=psi).sample(2, generator=seeded())[0] for psi in (1.0, 0.5)]
    assert worst(*ones) > 1e-2


def test_classes_are_uniform_and_features_come_from_the_bank():
    bank = torch.randn(4, 6, generator=seeded(7))
    teacher = teacher_of(replace(TINY, c_dim=3, h_dim=6), bank=bank)
    _, c, h = teacher.draw(3000, generator=seeded())
    assert c is not None
    assert h is not None
    assert bool((c.sum(1) == 1).all())
    assert bool((c.mean(0) - 1 / 3).abs().max() < 0.04)
    same = (h[:, None] == bank).all(2)
    assert bool((same.sum(1) == 1).all())
    assert bool((same.float().mean(0) - 1 / 4).abs().max() < 0.04)
    one = teacher_of(replace(TINY, h_dim=6), bank=bank[:1]).sample(2, generator=seeded())[0]
    two = teacher_of(replace(TINY, h_dim=6), bank=bank[1:2]).sample(2, generator=seeded())[0]
    assert worst(one, two) > 1e-2  # the feature decides the image


def test_absent_levels_are_absent():
    spec = replace(TINY, size=(32, 64), channels=(8, 7, 6, 5))
    assert [(s.stride, s.channels) for s in teacher_of(spec).specs] == [(4, 7), (8, 8)]
    with pytest.raises(UserError, match="no level at stride"):
        teacher_of(replace(TINY, channels=(8, 8)))


# --- errors ---------------------------------------------------------------------------------------------


def broken(key: str, value: Tensor | None) -> dict[str, Tensor]:
    state = build(TINY).state_dict()
    if value is None:
        del state[key]
    else:
        state[key] = value
    return state


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({}, "no StyleGAN2 generator"),
        ({"conv.weight": torch.ones(3)}, "no StyleGAN2 generator"),
        ({"b4.conv.weight": torch.ones(3), "b4.out.bias": torch.ones(1)}, "no StyleGAN2 generator"),
        (broken("synthesis.b4.const", None), "synthesis.b4.const"),
        (broken("synthesis.b4.const", torch.ones(3)), "no StyleGAN2 generator"),
        (broken("mapping.w_avg", torch.ones(())), "no StyleGAN2 generator"),
        (broken("synthesis.b16.conv0.noise_const", None), "b16.conv0.noise_const"),
        (broken("synthesis.b8.conv1.weight", torch.ones(9, 9, 3, 3)), "do not fit"),
        (broken("synthesis.b8.extra", torch.ones(1)), "synthesis.b8.extra"),
        (broken("synthesis.b8.skip.weight", torch.ones(8, 8, 1, 1)), "resnet"),
        (broken("synthesis.b8.conv0.resample_filter", torch.ones(4, 4) / 16), r"\[1, 3, 3, 1\]"),
        (broken("mapping.embed.weight", torch.ones(99, 2)), "no StyleGAN2 generator"),
    ],
)
def test_what_is_no_generator_is_refused(state, says):
    with pytest.raises(UserError, match=says) as caught:
        spec_of(state)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"size": (64, 60)}, "multiples of"),
        ({"size": (16, 16)}, "16 x 16"),
        ({"channels": ()}, "0 blocks"),
        ({"image_channels": 4}, "image_channels"),
    ],
)
def test_impossible_specs_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        replace(TINY, **change)


def test_loading_refuses_what_does_not_fit():
    where, state = Path("teacher.safetensors"), build(TINY).state_dict()
    before = torch.get_rng_state()
    teacher = load(state, TINY, where, **NAMED)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in teacher.generator.state_dict().items())
    with pytest.raises(UserError, match="encode"):
        teacher.encode(torch.rand(1, 3, 64, 64), generator=seeded())
    with pytest.raises(UserError, match="does not fit"):
        load(state, replace(TINY, z_dim=9), where, **NAMED)
    for psi in (-0.1, 1.5, math.nan):
        with pytest.raises(UserError, match="psi"):
            load(state, TINY, where, psi=psi, **NAMED)
    with pytest.raises(UserError, match="bank"):
        load({**state, "bank": torch.ones(2, 6)}, TINY, where, **NAMED)
    instance = replace(TINY, h_dim=6)
    state = build(instance).state_dict()
    with pytest.raises(UserError, match="--bank-images FOLDER --embedder FILE"):
        load(state, instance, where, **NAMED)
    for bank in (torch.ones(2, 5), torch.ones(0, 6), torch.ones(6)):
        with pytest.raises(UserError, match="bank"):
            load({**state, "bank": bank}, instance, where, **NAMED)
    assert load({**state, "bank": torch.ones(1, 6)}, instance, where, **NAMED).bank is not None
