"""The diffusion teacher: maps equal to the full forward's, nothing computed after the last level, exact noise."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dreamteacher.errors import UserError
from dreamteacher.teachers.diffusion import (
    DiffusionSpec,
    DiffusionTeacher,
    alphas_cumprod,
    build_unet,
    decoder_maps,
    q_sample,
)
from dreamteacher.teachers.train_diffusion import PRESETS, network_spec

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
            "attention_head_dim": 16,
            "norm_num_groups": 8,
            "attn_norm_num_groups": 8,
        },
        patch=patch,
        image_channels=1 if grey else 3,
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
    teacher = make(levels=5, patch=2, grey=True)
    walk = torch.compile(decoder_maps, fullgraph=True, backend="eager")
    x, t = torch.rand(2, 4, 32, 32), torch.tensor([7, 7])
    with torch.no_grad():
        for ours, plain in zip(walk(teacher.unet, x, t, 4), decoder_maps(teacher.unet, x, t, 4), strict=True):
            assert torch.equal(ours, plain)


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
    # One noise image for all: two equal images have equal maps; fresh noise tells them apart.
    twins = images[:1].expand(2, -1, -1, -1)
    maps = make(noise="fixed").encode(twins, generator=g)[0]
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-4, atol=1e-4)
    maps = make(noise="stochastic").encode(twins, generator=g)[0]
    assert (maps[0] - maps[1]).abs().max() > 1e-3


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


def test_a_level_as_wide_as_a_head_has_one():
    assert narrow((16, 16, 16, 32), ()).unet["attention_head_dim"] == 32


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: make(timesteps=(1000,)), "out of range"),
        (lambda: make(levels=2), "no decoder level"),
        (lambda: make().encode(torch.rand(1, 3, 48, 64), generator=torch.Generator()), "--size 64 64"),
        (lambda: narrow((32, 32, 32, 16), ()), "level 3 .* no head: 16 channels, heads of 32"),
        (lambda: narrow((32, 16, 32, 32), (1,)), "level 1 .* no head"),
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
