"""The diffusion teacher: maps equal to the full forward's, nothing computed after the last level, exact noise."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dreamteacher.runtime.config import from_json, to_json
from dreamteacher.runtime.errors import UserError
from dreamteacher.teachers.diffusion.teacher import (
    DiffusionSpec,
    DiffusionTeacher,
    alphas_cumprod,
    build_unet,
    draw_noise,
    load,
    noised,
    q_sample,
)
from dreamteacher.teachers.diffusion.walk import decoder_maps, decoder_outputs
from dreamteacher.teachers.training.diffusion import PRESETS, network_spec
from dreamteacher.testing import check_teacher
from tests.builders.pixel_features import features_of

KINDS = {
    "conv": ("DownBlock2D", "UpBlock2D", "conv"),
    "resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D", "resnet"),
}


def make(
    kind: str = "conv",
    *,
    patch: int = 1,
    grey: bool = False,
    levels: int = 6,
    layers: int = 1,
    classes: int = 0,
    null_class: int | None = None,
    heads: int | None = None,
    head: int | None = 16,
    **options: Any,
):
    down, up, resample = KINDS[kind]
    attention = (levels - 2, levels - 1)
    channels = patch**2 * (1 if grey else 3)
    spec = DiffusionSpec(
        unet={
            "in_channels": channels,
            "out_channels": channels * options.pop("out_factor", 1),
            "block_out_channels": [16, 16, 32, 32, 48, 48][:levels],
            "layers_per_block": layers,
            "down_block_types": ["AttnDownBlock2D" if i in attention else down for i in range(levels)],
            "up_block_types": ["AttnUpBlock2D" if levels - 1 - i in attention else up for i in range(levels)],
            "downsample_type": resample,
            "upsample_type": resample,
            "resnet_time_scale_shift": "scale_shift",
            "attention_head_dim": head,
            "norm_num_groups": 8,
            "attn_norm_num_groups": 8,
        },
        patch=patch,
        image_channels=1 if grey else 3,
        classes=classes,
        null_class=null_class,
        heads=heads,
    )
    torch.manual_seed(0)
    return DiffusionTeacher(build_unet(spec), spec, name="test", licence="-", **options)


def maps_of_full_forward(teacher: DiffusionTeacher, x: Tensor, t: Tensor) -> tuple[list[Tensor], Tensor]:
    """Oracle: hooks on the last module before each upsampler, during the network's own whole forward."""
    caught: dict[int, Tensor] = {}
    hooks = []
    for i, block in enumerate(teacher.unet.up_blocks):
        attentions = getattr(block, "attentions", None)
        last = attentions[-1] if attentions else block.resnets[-1]
        hooks.append(last.register_forward_hook(lambda _m, _a, out, i=i: caught.__setitem__(i, out)))
    with torch.no_grad():
        sample = teacher.unet(x, t).sample
    for hook in hooks:
        hook.remove()
    return [caught[i] for i in range(len(caught))], sample


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "layers"), [((64, 64), 1), ((32, 96), 2)])
def test_maps_equal_the_full_forward(kind, size, layers):
    teacher = make(kind, layers=layers)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, *size, generator=generator)
    noise = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(5))
    maps = teacher.encode(images, generator=torch.Generator().manual_seed(5))
    t = torch.full((2,), 100)
    x = q_sample(images * 2 - 1, teacher.alpha_bar[t].float(), noise)
    full, _ = maps_of_full_forward(teacher, x.contiguous(memory_format=torch.channels_last), t)
    assert [s.stride for s in teacher.specs] == [4, 8, 16, 32]
    for spec, ours, theirs in zip(teacher.specs, maps, full[:4][::-1], strict=True):
        assert ours.shape == spec.shape(2, size)
        assert (ours - theirs).abs().max().item() == 0.0


def test_nothing_runs_after_the_last_level():
    teacher = make("resnet")
    calls: list[str] = []
    for name, module in teacher.unet.named_modules():
        if any(True for _ in module.parameters(recurse=False)):  # layers with weights of their own
            module.register_forward_hook(lambda _m, _a, _o, name=name: calls.append(name))
    teacher.encode(torch.rand(1, 3, 64, 64), generator=torch.Generator())
    unused = ("up_blocks.3.upsamplers", "up_blocks.4", "up_blocks.5", "conv_norm_out", "conv_out")
    assert not [c for c in calls if c.startswith(unused)]
    assert any(c.startswith("up_blocks.3.resnets") for c in calls)
    assert len(calls) == len(set(calls))  # and nothing twice


def test_flops_are_those_of_the_walk():
    teacher = make()
    x, t = torch.rand(1, 3, 64, 64), torch.tensor([10])
    with FlopCounterMode(display=False) as full, torch.no_grad():
        teacher.unet(x, t)
    with FlopCounterMode(display=False) as walk:
        teacher.encode(x, generator=torch.Generator())
    tail = FlopCounterMode(display=False)
    with tail, torch.no_grad():
        up = teacher.unet.up_blocks
        emb = teacher.unet.time_embedding(teacher.unet.time_proj(t))
        h = up[3].upsamplers[0](torch.rand(1, 32, 16, 16))
        h = up[4](h, tuple(torch.rand(1, 16, 32, 32) for _ in range(2)), emb)
        h = up[5](h, tuple(torch.rand(1, 16, 64, 64) for _ in range(2)), emb)
        teacher.unet.conv_out(h)
        embedding = FlopCounterMode(display=False)
        with embedding:
            teacher.unet.time_embedding(teacher.unet.time_proj(t))
    expected = full.get_total_flops() - (tail.get_total_flops() - 2 * embedding.get_total_flops())
    assert walk.get_total_flops() == expected
    assert walk.get_total_flops() < 0.6 * full.get_total_flops()


def test_walk_compiles_without_graph_breaks():
    teacher = make("resnet", levels=3, classes=3)

    walk = torch.compile(decoder_maps, fullgraph=True, backend="eager")
    x, t = torch.rand(2, 3, 16, 16), torch.tensor([7, 7])
    with torch.no_grad():
        assert all(map(torch.equal, walk(teacher.unet, x, t, 2), decoder_maps(teacher.unet, x, t, 2)))


def test_block_outputs_equal_the_full_forward():
    teacher = make("resnet", levels=4, layers=2)
    x, t = torch.rand(1, 3, 32, 32), torch.tensor([7])
    caught: dict[int, Tensor] = {}
    hooks = []
    for i, block in enumerate(teacher.unet.up_blocks):
        for j, resnet in enumerate(block.resnets):
            attentions = getattr(block, "attentions", None)
            last = attentions[j] if attentions else resnet
            last = block.upsamplers[0] if j == 2 and block.upsamplers else last
            hooks.append(last.register_forward_hook(lambda _m, _a, o, k=3 * i + j: caught.__setitem__(k, o)))
    with torch.no_grad():
        teacher.unet(x, t)
        for hook in hooks:
            hook.remove()
        for blocks in [(0,), (2,), (1, 2, 3, 7), tuple(range(12))]:
            outputs = decoder_outputs(teacher.unet, x, t, blocks)
            assert all(torch.equal(o, caught[k]) for o, k in zip(outputs, blocks, strict=True))


def test_block_outputs_stop_within_a_level():
    teacher = make("resnet", levels=4, layers=2)
    calls: list[str] = []
    for name, module in teacher.unet.up_blocks.named_modules():
        module.register_forward_hook(lambda _m, _a, _o, name=name: calls.append(name))
    decoder_outputs(teacher.unet, torch.rand(1, 3, 32, 32), torch.tensor([7]), (1, 4))
    assert "1.resnets.1" in calls
    assert not [c for c in calls if c.startswith(("1.resnets.2", "1.attentions.2", "1.upsamplers", "2", "3"))]


def test_pixel_features_are_joined_step_by_step_then_block_by_block():
    teacher = make("resnet", timesteps=(50, 200), noise="fixed")
    images = torch.rand(2, 3, 64, 96)
    found = features_of(teacher, images, blocks=(3, 8), generator=torch.Generator())
    assert found.shape == (2, 2 * (48 + 16), 64, 96)
    x0, noise = teacher.to_network(images), draw_noise(images, "fixed", torch.Generator())
    parts = []
    for t in (50, 200):
        a = teacher.alpha_bar[t].float()
        x = a.sqrt() * x0 + (1 - a).sqrt() * noise
        for block in (3, 8):
            (one,) = decoder_outputs(teacher.unet, x, torch.full((2,), t), (block,))
            parts.append(torch.nn.functional.interpolate(one, (64, 96), mode="bilinear"))
    torch.testing.assert_close(found, torch.cat(parts, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule_against_a_loop(schedule):
    bar, expected = 1.0, []
    for i in range(1000):
        if schedule == "linear":
            beta = 1e-4 + (0.02 - 1e-4) * i / 999
        else:
            f = [math.cos((s / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for s in (i, i + 1)]
            beta = min(1 - f[1] / f[0], 0.999)
        bar *= 1 - beta
        expected.append(bar)
    got = alphas_cumprod(schedule)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("ours", "theirs", "ends"),
    [
        ("linear", "linear", (1e-4, 0.02)),
        ("cosine", "squaredcos_cap_v2", (1e-4, 0.02)),
        ("scaled_linear", "scaled_linear", (0.00085, 0.012)),
    ],
)
def test_schedule_against_diffusers(ours, theirs, ends):
    other = DDPMScheduler(1000, *ends, beta_schedule=theirs)  # float32
    torch.testing.assert_close(alphas_cumprod(ours).float(), other.alphas_cumprod, rtol=1e-4, atol=1e-7)


def test_q_sample_has_the_stated_moments():
    x0 = torch.full((20000, 1, 4, 4), 0.5)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    x = q_sample(x0, torch.full((20000,), 0.36), noise)
    assert x.mean().item() == pytest.approx(0.6 * 0.5, abs=0.01)
    assert x.std().item() == pytest.approx(0.8, abs=0.01)


def test_several_timesteps_share_one_draw_and_concatenate():
    images = torch.rand(2, 3, 64, 64)
    both = make(timesteps=(50, 200)).encode(images, generator=torch.Generator().manual_seed(3))
    first = make(timesteps=(50,)).encode(images, generator=torch.Generator().manual_seed(3))
    second = make(timesteps=(200,)).encode(images, generator=torch.Generator().manual_seed(3))
    for two, a, b in zip(both, first, second, strict=True):
        torch.testing.assert_close(two, torch.cat([a, b], dim=1), rtol=1e-4, atol=1e-4)
    assert [s.channels for s in make(timesteps=(50, 200)).specs] == [64, 64, 96, 96]


def test_noise_kinds():
    images = torch.rand(2, 3, 64, 64)
    g = torch.Generator().manual_seed(0)

    def difference(noise: str) -> float:
        teacher = make(noise=noise)
        a, b = teacher.encode(images, generator=g), teacher.encode(images, generator=g)
        return (a[0] - b[0]).abs().max().item()

    assert difference("stochastic") > 1e-3
    assert difference("fixed") == 0.0
    assert difference("inversion") == 0.0
    assert difference("none") == 0.0
    # One noise image for all: two equal images have equal maps; fresh noise tells them apart.
    twins = images[:1].expand(2, -1, -1, -1)
    maps = make(noise="fixed").encode(twins, generator=g)[0]
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-4, atol=1e-4)
    maps = make(noise="stochastic").encode(twins, generator=g)[0]
    assert (maps[0] - maps[1]).abs().max() > 1e-3


def test_no_noise_reads_the_clean_image():
    images = torch.rand(2, 3, 64, 64)
    teacher = make(noise="none", timesteps=(50, 261))
    maps = teacher.encode(images, generator=torch.Generator())
    x = teacher.to_network(images)
    one, two = (decoder_maps(teacher.unet, x, torch.tensor([t, t]), 4) for t in (50, 261))
    expected = [torch.cat(pair, 1) for pair in zip(one, two, strict=True)][::-1]
    assert all(map(torch.equal, maps, expected))
    assert torch.equal(noised(images, torch.ones(2), torch.rand(2, 3, 64, 64)), torch.cat([images, images]))


class Shrinking(torch.nn.Module):
    """A perfect denoiser of N(0, sigma^2) data: DDIM steps then have a closed form."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, x: Tensor, t: Tensor):
        a = alphas_cumprod("linear")[t].view(-1, 1, 1, 1).to(x.dtype)
        eps = x * (1 - a).sqrt() / (a * self.sigma**2 + 1 - a)
        return type("Out", (), {"sample": eps})


def test_inversion_follows_the_probability_flow():
    teacher = make(noise="inversion", inversion_steps=400)
    x0 = torch.linspace(-0.8, 0.8, 3 * 64 * 64).view(1, 3, 64, 64)
    teacher.unet = Shrinking(0.5)  # type: ignore[assignment]
    x = teacher.invert(x0, 600)
    a = teacher.alpha_bar[600].item()
    # The flow scales Gaussian data so that its deviation at t is sqrt(a sigma^2 + 1 - a).
    expected = x0 * math.sqrt(a * 0.25 + 1 - a) / 0.5
    torch.testing.assert_close(x, expected, rtol=0.02, atol=0.01)


def test_generate_is_seeded_and_in_range():
    teacher = make(levels=5, patch=2, grey=True, sampling_steps=3)
    images, maps = teacher.sample(2, generator=torch.Generator().manual_seed(1))
    again, _ = teacher.sample(2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(images, again)
    assert images.shape == (2, 3, 64, 64)
    assert 0 <= images.min() <= images.max() <= 1
    assert torch.equal(images[:, 0], images[:, 2])  # grey
    assert [m.shape for m in maps] == [s.shape(2, (64, 64)) for s in teacher.specs]


def test_learned_sigma_is_left_out_of_epsilon():
    teacher = make(out_factor=2)
    eps = teacher.epsilon(torch.rand(1, 3, 64, 64), torch.tensor([3]))
    full = teacher.unet(torch.rand(1, 3, 64, 64), torch.tensor([3])).sample
    assert eps.shape[1] == 3
    assert full.shape[1] == 6


# --- classes, heads, widths -----------------------------------------------------------------------------------


def test_labels_give_the_networks_own_forward():
    teacher = make("resnet", classes=5, out_factor=2)
    x, t, labels = torch.rand(3, 3, 64, 64), torch.tensor([3, 500, 999]), torch.tensor([4, 0, 2])
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        full = teacher.unet(x, t, class_labels=labels).sample
        assert torch.equal(teacher.epsilon(x, t, labels), full[:, :3])
        assert (teacher.epsilon(x, t, labels.flip(0)) - full[:, :3]).abs().max() > 1e-3


@pytest.mark.parametrize("null_class", [None, 1])
def test_unlabelled_images_take_the_null_class_or_the_mean(null_class):
    teacher = make("resnet", classes=5, null_class=null_class, noise="fixed")
    images = torch.rand(2, 3, 64, 64)
    maps = teacher.encode(images, generator=torch.Generator())
    table = teacher.unet.class_embedding.weight
    # Oracle: a network whose every class is that one, in its own forward.
    table.data[:] = table.mean(0) if null_class is None else table[null_class].clone()
    x, t = teacher._noisy(images, torch.Generator())
    whole = teacher.unet.forward
    teacher.unet.forward = lambda x, t: whole(x, t, class_labels=torch.zeros(2, dtype=torch.long))  # type: ignore[method-assign]
    full, _ = maps_of_full_forward(teacher, x, t)
    for ours, theirs in zip(maps, full[:4][::-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_samples_draw_every_class_but_the_null_class():
    teacher = make("resnet", classes=4, null_class=2, sampling_steps=2)
    labels = teacher._draw_labels(200, torch.Generator().manual_seed(0))
    assert set(labels.tolist()) == {0, 1, 3}
    assert set(make(classes=3)._draw_labels(100, torch.Generator().manual_seed(0)).tolist()) == {0, 1, 2}
    check_teacher(teacher)


def test_a_number_of_heads_is_the_same_as_their_width_where_the_width_is_one():
    fixed, wide = make(levels=4, heads=2, head=None, noise="fixed"), make(levels=4, head=16, noise="fixed")
    one = make(levels=4, head=None, noise="fixed")
    images = torch.rand(1, 3, 64, 64)
    maps = [t.encode(images, generator=torch.Generator())[-1] for t in (fixed, wide, one)]
    assert torch.equal(maps[0], maps[1])  # attention at 32 channels only: 2 heads of 16
    assert (maps[0] - maps[2]).abs().max() > 1e-5


def test_sinusoids_of_t_wider_than_the_first_level():
    narrow = make(levels=4).spec
    spec = replace(narrow, time_width=40, unet={**narrow.unet, "time_embedding_dim": 160})
    unet = build_unet(spec)
    assert unet.conv_in.out_channels == 16
    assert unet.time_embedding.linear_1.weight.shape == (160, 40)
    half = torch.exp(-math.log(10000) * torch.arange(20) / 20) * 7
    torch.testing.assert_close(unet.time_proj(torch.tensor([7]))[0], torch.cat([half.cos(), half.sin()]))


# --- memory and loading -----------------------------------------------------------------------------------------


def test_keep_only_encode_frees_what_it_never_runs():
    teacher = make("resnet", noise="fixed")
    images = torch.rand(1, 3, 64, 64)
    before = teacher.encode(images, generator=torch.Generator())
    names = {k for k, _ in teacher.named_parameters()}
    teacher.keep_only("encode")
    gone = names - {k for k, _ in teacher.named_parameters()}
    unused = ("up_blocks.3.upsamplers", "up_blocks.4", "up_blocks.5", "conv_norm_out", "conv_out")
    assert gone == {k for k in names if k.startswith(tuple(f"unet.{u}" for u in unused))}
    assert all(map(torch.equal, before, teacher.encode(images, generator=torch.Generator())))
    with pytest.raises(UserError, match="cannot sample images; it can encode"):
        teacher.sample(1, generator=torch.Generator())
    with pytest.raises(UserError, match="0 to 6"):  # block 7 ended in the upsampler that is gone
        decoder_outputs(teacher.unet, images, torch.tensor([3]), (7,))
    check_teacher(teacher)


def test_keep_only_leaves_inversion_its_whole_network():
    teacher = make(noise="inversion", inversion_steps=2)
    images = torch.rand(1, 3, 64, 64)
    before, count = teacher.encode(images, generator=torch.Generator()), len(list(teacher.parameters()))
    teacher.keep_only("encode")
    assert len(list(teacher.parameters())) == count
    assert all(map(torch.equal, before, teacher.encode(images, generator=torch.Generator())))
    with pytest.raises(UserError, match="cannot sample"):
        teacher.sample(1, generator=torch.Generator())


def test_keep_only_sample():
    teacher = make(sampling_steps=2)
    teacher.keep_only("sample")
    check_teacher(teacher)


def test_load_takes_the_tensors_as_they_are():
    made = make("resnet", classes=3, noise="fixed")
    weights = {k: v.clone() for k, v in made.unet.state_dict().items()}
    state = torch.get_rng_state()
    teacher = load(weights, made.spec, Path("w"), name="n", licence="-", noise="fixed")
    assert torch.equal(state, torch.get_rng_state())
    assert not any(v.is_meta for v in [*teacher.parameters(), *teacher.buffers()])
    assert teacher.unet.conv_in.bias.data_ptr() == weights["conv_in.bias"].data_ptr()
    images = torch.rand(1, 3, 64, 64)
    maps = made.encode(images, generator=torch.Generator())
    assert all(map(torch.equal, maps, teacher.encode(images, generator=torch.Generator())))
    half = load({k: v.half() for k, v in weights.items()}, made.spec, Path("w"), name="n", licence="-")
    assert {p.dtype for p in half.parameters()} == {torch.float32}


def test_specs_round_trip_and_old_ones_load():
    spec = make("resnet", classes=3, null_class=0, heads=2).spec
    assert from_json(DiffusionSpec, to_json(spec)) == spec
    old = {k: v for k, v in to_json(make().spec).items() if k in ("unet", "patch", "image_channels", "size")}
    assert from_json(DiffusionSpec, old) == make().spec


def test_group_norm_computes_in_float32_under_autocast():
    # On a CPU it takes and gives bfloat16; what is between must not be bfloat16, whose sums would be off by
    # far more than one rounding of the result.
    norm = make("resnet").unet.conv_norm_out
    x = (torch.randn(2, 16, 32, 32, generator=torch.Generator().manual_seed(0)) + 3).bfloat16()
    exact = torch.nn.functional.group_norm(x.double(), 8, norm.weight.double(), norm.bias.double(), norm.eps)
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
    once = norm(x.float()).to(found.dtype)
    assert (found != once).float().mean() < 1e-3
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-3).all()
    mean = x.unflatten(1, (8, 2)).mean((2, 3, 4), keepdim=True)  # what bfloat16 statistics would give
    centred = x.unflatten(1, (8, 2)) - mean
    poor = (centred / centred.square().mean((2, 3, 4), keepdim=True).sqrt()).flatten(1, 2)
    assert (poor.double() - exact).abs().max() > 1.4 * (found.double() - exact).abs().max()


def test_network_space_round_trip():
    teacher = make(patch=2, levels=5)
    images = torch.rand(2, 3, 32, 64)
    torch.testing.assert_close(teacher.to_images(teacher.to_network(images)), images)
    grey = make(patch=2, levels=5, grey=True)
    same = images[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(grey.to_images(grey.to_network(same)), same)


def test_teacher_stays_frozen():
    teacher = make()
    teacher.train()
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(
        m.requires_grad for m in teacher.encode(torch.rand(1, 3, 64, 64), generator=torch.Generator())
    )


def narrow(channels: tuple[int, ...], attention: tuple[int, ...]) -> DiffusionSpec:
    preset = replace(PRESETS["cpu-64"], patch=4, channels=channels, attention=attention, head=32)
    return network_spec(preset, (64, 64), 3, "linear")


def unusual(**changes: Any) -> DiffusionTeacher:
    spec = make(levels=4).spec
    spec = replace(spec, unet={**spec.unet, **changes})
    return DiffusionTeacher(build_unet(spec), spec, name="x", licence="-")


def test_a_level_as_wide_as_a_head_has_one():
    assert narrow((16, 16, 16, 32), ()).unet["attention_head_dim"] == 32


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: make(timesteps=(1000,)), "out of range"),
        (lambda: make(levels=2), "no level at stride"),
        (lambda: make().encode(torch.rand(1, 3, 48, 64), generator=torch.Generator()), "--size 64 64"),
        (lambda: narrow((32, 32, 32, 16), ()), "level 3 .* no head: 16 channels, heads of 32"),
        (lambda: narrow((32, 16, 32, 32), (1,)), "level 1 .* no head"),
        (lambda: make(heads=5), "5 heads do not divide an attention of 48 channels"),
        (lambda: make(classes=3, null_class=3), "3 classes and no class 3"),
        (lambda: build_unet(DiffusionSpec(unet={"rows": 3})), "cannot be built.*rows"),
        (lambda: unusual(up_block_types=["SkipUpBlock2D"] * 4), "block of type SkipUpBlock2D"),
        (lambda: unusual(time_embedding_type="fourier"), "time_embedding_type fourier"),
        (lambda: unusual(center_input_sample=True), "center_input_sample True"),
        (lambda: unusual(num_class_embeds=3), "embeds 3 classes, and its spec says 0"),
        (lambda: load({}, make().spec, Path("w"), name="n", licence="-"), "'w' does not fit .* missing"),
        (lambda: decoder_outputs(make().unet, torch.rand(1), torch.rand(1), (3, 12)), "0 to 11"),
        (lambda: decoder_outputs(make().unet, torch.rand(1), torch.rand(1), (3, 2)), "ascending"),
    ],
)
def test_bad_requests_say_what_to_do(act, words):
    with pytest.raises(UserError, match=words) as caught:
        act()
    assert len(str(caught.value).splitlines()) <= 3


def test_presets_build_the_networks_they_promise():
    # The paper's networks, on the meta device: nothing is allocated.
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            spec = network_spec(preset, preset.size, 3, "linear")
            unet = build_unet(spec)
        strides = [preset.patch * 2**i for i in range(len(preset.channels))]
        assert {4, 8, 16, 32} <= set(strides), name
        assert all(s % (strides[-1]) == 0 for s in preset.size), name
        millions = sum(p.numel() for p in unet.parameters()) / 1e6
        if name == "adm-256":  # 552.8 M in the published network, which has 6 outputs (learned sigma)
            assert millions == pytest.approx(552.8, abs=0.1)
