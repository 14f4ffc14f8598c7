"""`train-teacher` of a StyleGAN2: discriminator, losses, augmentation, resume, what a training leaves behind."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dreamteacher.data import batches, image_set, seeds
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.distributed.world import World
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.run_folder import RunDir, read_rows
from dreamteacher.runtime.signals import signals_handled
from dreamteacher.teachers.registry import load_teacher, read_card
from dreamteacher.teachers.stylegan2.teacher import Generator, StyleGan2Spec, StyleGan2Teacher
from dreamteacher.teachers.training import config as training_config
from dreamteacher.teachers.training import stylegan2, train
from dreamteacher.teachers.training.augment import Adaptation, _blit, _warp, augment
from dreamteacher.teachers.training.config import TrainTeacherConfig
from dreamteacher.teachers.training.discriminator import Discriminator, EqualConv, append_deviation
from dreamteacher.teachers.training.objective import Objective, TrainingPlan
from dreamteacher.teachers.training.stylegan2 import (
    StyleGan2Objective,
    StyleGan2Preset,
    discriminator_loss,
    ema_weight,
    generator_loss,
    lazy_adam,
    network_spec,
    r1_penalty,
)
from dreamteacher.teachers.training.train import PRESETS, train_teacher
from dreamteacher.testing import check_teacher
from tests.builders.runs import assert_refused

# Six blocks from 2 x 2 as in stylegan2-cpu-64, in networks that take milliseconds.
TINY = StyleGan2Preset(
    channels=(8, 8, 8, 8, 4, 4), z_dim=8, w_dim=8, mapping_layers=2, size=(64, 64), batch_size=8, lr=2.5e-3,
    gamma=0.1, half_life=100, ramp=0.5, ada_images=200, steps=10,
)  # fmt: skip

NORMS = {"grad_norm/g", "grad_norm/d", "grad_norm/r1"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "stylegan2-cpu-64", TINY)


@pytest.fixture
def config(image_folder: Path, tmp_path: Path) -> TrainTeacherConfig:
    return TrainTeacherConfig(
        preset="stylegan2-cpu-64", images=image_folder, out=tmp_path / "teacher", device="cpu",
        precision="float32", save_every=4, sample_every=1000,
    )  # fmt: skip


def plan(**changes: object) -> TrainingPlan:
    settings = {"seed": 0, "steps": 10, "batch_size": 4, "lr": 2e-3, "device": torch.device("cpu")}
    return TrainingPlan(**(settings | {"precision": "float32"} | changes))  # type: ignore[arg-type]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def discriminator(**spec: object) -> Discriminator:
    settings = {"size": (8, 8), "channels": (4, 3), "z_dim": 2, "w_dim": 2, "image_channels": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Discriminator(StyleGan2Spec(**(settings | spec)))  # type: ignore[arg-type]


# --- the discriminator --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "blocks", "halvings", "cells"),
    [
        ((64, 64), 6, 4, 16),  # the generator begins at 2 x 2, the discriminator ends at 4 x 4
        ((64, 64), 5, 4, 16),
        ((32, 96), 4, 3, 48),
        ((96, 64), 6, 4, 24),
        ((16, 16), 2, 1, 64),  # not below the generator's first block
    ],
)
def test_discriminator_shapes(size: tuple[int, int], blocks: int, halvings: int, cells: int) -> None:
    channels = tuple(range(3, 3 + blocks))
    d = discriminator(size=size, channels=channels, image_channels=3)
    assert len(d.blocks) == halvings
    assert d.hidden.weight.shape[1] == channels[blocks - 1 - halvings] * cells
    assert d.from_image.weight.shape == (channels[-1], 3, 1, 1)
    logits = d(torch.rand(6, 3, *size, generator=seeded(0)) * 2 - 1)
    assert logits.shape == (6,)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("taps", [1, 3])
def test_downsampling_equals_loops(taps: int) -> None:
    """Zeros around, the filter [1, 3, 3, 1] on both axes, then every second place of the convolution."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = EqualConv(1, 1, taps, gain=0.7, down=True)
    x = torch.rand(6, 8, generator=seeded(0))
    row = [1, 3, 3, 1]

    def pixel(i: int, j: int) -> float:
        return x[i, j].item() if 0 <= i < 6 and 0 <= j < 8 else 0.0

    def blurred(i: int, j: int) -> float:  # at the corner between pixels (i - 1, j - 1) and (i, j)
        return sum(
            row[a] * row[b] / 64 * pixel(i + a - 2, j + b - 2)
            for a, b in itertools.product(range(4), repeat=2)
        )

    with torch.no_grad():
        conv.bias.fill_(0.5)  # type: ignore[union-attr]
        got = conv(x[None, None])[0, 0]
    assert got.shape == (3, 4)
    weight = conv.weight.detach()[0, 0] * 0.7 / taps
    reach = taps // 2
    for i, j in itertools.product(range(3), range(4)):
        expected = 0.5 * 0.7
        for a, b in itertools.product(range(taps), repeat=2):
            expected += weight[a, b].item() * blurred(2 * i + 1 + a - reach, 2 * j + 1 + b - reach)
        assert got[i, j].item() == pytest.approx(expected, abs=1e-5)


def test_convolutions_keep_the_variance() -> None:
    """The equalised learning rate: weights of variance 1, outputs of variance gain squared."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = EqualConv(64, 64, 3, gain=2.0)
    assert conv.weight.var().item() == pytest.approx(1, rel=0.05)
    y = conv(torch.randn(4, 64, 16, 16, generator=seeded(0)))[..., 1:-1, 1:-1]
    assert y.var().item() == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize(("n", "group"), [(8, 4), (6, 3), (4, 4), (5, 1), (1, 1)])
def test_minibatch_deviation_equals_a_loop(n: int, group: int) -> None:
    x = torch.randn(n, 3, 2, 4, generator=seeded(0), dtype=torch.float64)
    got = append_deviation(x)
    assert got.shape == (n, 4, 2, 4)
    assert torch.equal(got[:, :3], x)
    for i in range(n):
        mates = [j for j in range(n) if j % (n // group) == i % (n // group)]
        assert len(mates) == group
        total = 0.0
        for c, h, w in itertools.product(range(3), range(2), range(4)):
            values = [x[j, c, h, w].item() for j in mates]
            mean = sum(values) / group
            total += math.sqrt(sum((v - mean) ** 2 for v in values) / group + 1e-8)
        assert torch.allclose(got[i, 3], torch.tensor(total / 24, dtype=torch.float64))


def test_equal_images_have_no_deviation_and_a_finite_gradient() -> None:
    x = torch.ones(4, 2, 2, 2, requires_grad=True)
    y = append_deviation(x)
    y.sum().backward()
    assert y[:, 2].max().item() == pytest.approx(1e-4, rel=1e-3)
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


# --- losses, optimizer, average -----------------------------------------------------------------------------


def test_losses_equal_their_formulas() -> None:
    real, fake = torch.tensor([1.5, -0.5]), torch.tensor([-2.0, 0.25])

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    for_g = -(math.log(sigmoid(-2.0)) + math.log(sigmoid(0.25))) / 2
    for_d = -(math.log(sigmoid(1.5)) + math.log(sigmoid(-0.5))) / 2
    for_d -= (math.log(1 - sigmoid(-2.0)) + math.log(1 - sigmoid(0.25))) / 2
    assert generator_loss(fake).item() == pytest.approx(for_g, rel=1e-6)
    assert discriminator_loss(real, fake).item() == pytest.approx(for_d, rel=1e-6)


def test_r1_of_a_quadratic_is_known() -> None:
    """D(x) = a sum x^2 has the gradient 2 a x: R1 = mean of 4 a^2 |x|^2, and dR1/da = 8 a mean |x|^2."""

    class Quadratic(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.tensor(1.5))

        def forward(self, x: Tensor) -> Tensor:
            return self.a * x.square().sum((1, 2, 3))

    d, x = Quadratic(), torch.randn(3, 2, 4, 4, generator=seeded(0))
    square = x.square().sum((1, 2, 3)).mean().item()
    penalty = r1_penalty(d, x)
    penalty.backward()
    assert penalty.item() == pytest.approx(4 * 1.5**2 * square, rel=1e-5)
    assert d.a.grad is not None
    assert d.a.grad.item() == pytest.approx(8 * 1.5 * square, rel=1e-5)
    assert not x.requires_grad


def test_r1_of_the_discriminator_equals_differences() -> None:
    d = discriminator().double()
    x = torch.randn(2, 1, 8, 8, generator=seeded(0), dtype=torch.float64)
    total, h = 0.0, 1e-5
    with torch.no_grad():
        for i in range(x.numel()):
            step = torch.zeros(x.numel(), dtype=x.dtype)
            step[i] = h
            step = step.view_as(x)
            total += ((d(x + step).sum() - d(x - step).sum()).item() / (2 * h)) ** 2
    penalty = r1_penalty(d, x)
    assert penalty.item() == pytest.approx(total / 2, rel=1e-6)
    # Its own gradient, along one direction of all weights.
    names, weights = zip(*d.named_parameters(), strict=True)
    gradient = torch.autograd.grad(penalty, weights, allow_unused=True)
    moves = [torch.randn(w.shape, generator=seeded(i), dtype=w.dtype) for i, w in enumerate(weights)]
    slope = sum((g * m).sum().item() for g, m in zip(gradient, moves, strict=True) if g is not None)
    ends = []
    for sign in (1, -1):
        moved = {n: w + sign * 1e-6 * m for n, w, m in zip(names, weights, moves, strict=True)}
        other = discriminator().double()
        other.load_state_dict(moved)
        ends.append(r1_penalty(other, x).item())
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4)


def test_lazy_adam_corrects_rate_and_betas() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    group = lazy_adam([weight], 2e-3, 16).param_groups[0]
    assert group["lr"] == pytest.approx(2e-3 * 16 / 17)
    assert group["betas"] == (0.0, pytest.approx(0.99 ** (16 / 17)))
    group = lazy_adam([weight], 2e-3, None).param_groups[0]
    assert (group["lr"], group["betas"]) == (2e-3, (0.0, 0.99))


def test_the_average_halves_after_its_half_life() -> None:
    kept = math.prod(ema_weight(seen, 32, 3200, None) for seen in range(0, 3200, 32))
    assert kept == pytest.approx(0.5)
    assert ema_weight(0, 32, 3200, 0.05) == 0  # nothing to keep at the start
    assert ema_weight(6400, 32, 3200, 0.05) == 0.5 ** (32 / 320)
    assert ema_weight(10**6, 32, 3200, 0.05) == ema_weight(0, 32, 3200, None)


# --- augmentation -------------------------------------------------------------------------------------------


def test_augment_leaves_all_alone_at_0() -> None:
    x = torch.rand(4, 1, 8, 12, generator=seeded(0))
    assert torch.equal(augment(x, torch.zeros(()), seeded(1)), x)


@pytest.mark.parametrize("size", [(8, 8), (8, 16)])
def test_augment_at_1_is_differentiable_and_decided_by_its_generator(size: tuple[int, int]) -> None:
    x = torch.rand(5, 2, *size, generator=seeded(0), dtype=torch.float64, requires_grad=True)
    p = torch.ones(())
    y = augment(x, p, seeded(1))
    assert y.shape == x.shape
    assert torch.equal(y, augment(x, p, seeded(1)))
    assert not torch.equal(y, augment(x, p, seeded(2)))
    assert all((a - b).abs().max() > 0.01 for a, b in zip(x, y, strict=True))
    # It is affine in the images, so a difference of any length is the derivative.
    weights, move = torch.randn(2, *x.shape, generator=seeded(3), dtype=x.dtype)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    difference = (augment(x + move, p, seeded(1)) - y).mul(weights).sum().item()
    assert (gradient * move).sum().item() == pytest.approx(difference, rel=1e-5)


def test_augment_gates_each_image_with_p() -> None:
    x = torch.rand(4000, 1, 4, 4, generator=seeded(0))
    changed = (augment(x, torch.tensor(0.05), seeded(1)) != x).flatten(1).any(1).float().mean().item()
    # Of seven gates, flips change half of the images, turns 3/4, shifts (to whole pixels) none at this size.
    alone = (1 - 0.05 / 2) * (1 - 0.05 * 3 / 4) * (1 - 0.05) ** 3 * math.sqrt(1 - 0.05)
    assert changed == pytest.approx(1 - alone, abs=0.04)


def test_blits_move_whole_pixels() -> None:
    def blit(x: Tensor, flip: bool, turn: float, shift: tuple[float, float]) -> Tensor:
        off = torch.tensor([turn > 0])
        draws = torch.tensor(shift).view(2, 1)
        return _blit(x, torch.tensor([flip]), off, torch.tensor([turn]), torch.tensor([True]), draws)

    x = torch.rand(1, 2, 8, 8, generator=seeded(0))
    still = (0.5, 0.5)
    assert torch.equal(blit(x, True, 0, still), x.flip(-1))
    for turn, count in ((0.3, 1), (0.6, 2), (0.9, 3)):
        turned = blit(x, False, turn, still)
        assert any(torch.equal(turned, torch.rot90(x, k, (2, 3))) for k in (count, -count))
    wide = torch.rand(1, 2, 8, 16, generator=seeded(0))
    assert torch.equal(blit(wide, False, 0.9, still), wide.flip(-1, -2))
    moved = blit(wide, False, 0, (1.0, 0.0))  # 1 down, 2 to the left, edges mirrored
    assert torch.equal(moved[..., 1:, :-2], wide[..., :-1, 2:])
    assert torch.equal(moved[..., 0, :-2], wide[..., 1, 2:])
    assert torch.equal(moved[..., 1:, -1], wide[..., :-1, -3])


def test_warps_turn_and_scale() -> None:
    x = torch.rand(1, 1, 8, 8, generator=seeded(0))
    quarter, zero = torch.tensor([math.pi / 2]), torch.zeros(1)
    turned = _warp(x, zero, quarter)
    assert any(torch.allclose(turned, torch.rot90(x, k, (2, 3)), atol=1e-5) for k in (1, -1))
    wide = torch.rand(1, 1, 8, 16, generator=seeded(0))
    assert torch.allclose(_warp(wide, zero, 2 * quarter), wide.flip(-1, -2), atol=1e-5)
    # A quarter turn of an image that is not square does not squash it: its middle square turns.
    middle = _warp(wide, zero, quarter)[..., 4:12]
    assert any(torch.allclose(middle, torch.rot90(wide[..., 4:12], k, (2, 3)), atol=1e-5) for k in (1, -1))
    # Twice as large: the middle of the image fills it.
    smooth = F.interpolate(torch.rand(1, 1, 4, 4, generator=seeded(1)), size=(8, 8))
    large = _warp(smooth, torch.ones(1), zero)
    expected = F.interpolate(smooth[..., 1:7, 1:7], size=(12, 12), mode="bilinear")[..., 2:10, 2:10]
    assert torch.allclose(large, expected, atol=1e-5)


def test_adaptation_moves_p_towards_its_target() -> None:
    zeros = torch.zeros(3)
    ada = Adaptation(target=0.6, images=320, p=zeros[0], signs=zeros[1], count=zeros[2])
    sure = torch.tensor([2.0] * 7 + [-1.0])  # mean sign 0.75
    for step in range(3):
        ada.observe(step, sure)
    assert ada.p.item() == 0  # not yet due
    ada.observe(3, sure)
    assert ada.p.item() == pytest.approx(4 * 8 / 320)
    for step in range(4, 8):
        ada.observe(step, sure * torch.tensor([1.0] * 6 + [-1.0, 1.0]))  # mean sign 0.5
    assert ada.p.item() == pytest.approx(0, abs=1e-7)
    for step in range(8, 12):
        ada.observe(step, -sure)
    assert ada.p.item() == 0  # never below
    for step in range(12, 100):
        ada.observe(step, sure)
    assert ada.p.item() == 1  # never above


# --- steps --------------------------------------------------------------------------------------------------


def test_one_step_touches_what_it_should(image_folder: Path) -> None:
    """Both networks move; the mean style and the averaged generator follow as published."""
    spec = network_spec(TINY, (64, 64), 1)
    objective = StyleGan2Objective(TINY, spec, plan(), gamma=0.1, ada=None)
    before = {k: v.clone() for k, v in objective.g.state_dict().items()}
    d_before = {k: v.clone() for k, v in objective.d.state_dict().items()}
    images = image_set.load_images(image_folder, (64, 64)).get(torch.arange(4)).float() / 255
    latents = torch.randn(4, 8, generator=seeds.step_generator(0, 0, "latents/g"))
    with torch.no_grad():
        styles = objective.g.mapping(latents)[:, 0]
    seen = objective.step(0, images)
    assert seen.keys() == {"loss/g", "loss/d", "real_sign", "r1", *NORMS}
    now = objective.g.state_dict()
    moved = {k for k in now if not torch.equal(now[k], before[k])}
    assert {k for k in moved if k.endswith(("weight", "bias"))} >= {
        "mapping.fc0.weight",
        "synthesis.b4.conv1.weight",
    }
    assert not any("noise_const" in k or "resample" in k for k in moved)
    assert torch.allclose(now["mapping.w_avg"], styles.mean(0) * 0.005, atol=1e-6)
    assert all(not torch.equal(v, d_before[k]) for k, v in objective.d.state_dict().items() if "weight" in k)
    for key, value in objective.weights().items():  # nothing was seen before: the average is the present
        assert torch.equal(value, now[key]), key
    first = objective.weights()["synthesis.b4.const"].clone()
    assert "r1" not in objective.step(1, images)
    kept = 0.5 ** (4 / min(100, 4 * 0.5))  # 4 images a step, 4 seen before: half-life 2
    expected = kept * first + (1 - kept) * objective.g.state_dict()["synthesis.b4.const"]
    assert torch.allclose(objective.weights()["synthesis.b4.const"], expected, atol=1e-6)
    assert all(p.requires_grad for p in objective.d.parameters())


def test_each_phase_has_its_own_gradient(image_folder: Path) -> None:
    """Weights of the phases as published: gamma / 2 times 16 on the penalty; no phase reaches the other network."""
    objective = StyleGan2Objective(TINY, network_spec(TINY, (64, 64), 1), plan(), gamma=0.5, ada=None)
    images = image_set.load_images(image_folder, (64, 64)).get(torch.arange(4)).float() / 255
    real = (images[:, :1] * 2 - 1).contiguous(memory_format=torch.channels_last)
    weight = objective.d.blocks[0].conv0.weight  # type: ignore[union-attr]
    (expected,) = torch.autograd.grad(r1_penalty(objective.d, real) * 4.0, weight)  # 0.5 / 2 * 16
    seen = objective._penalise(0, real)
    assert torch.allclose(weight.grad, expected, rtol=1e-4)  # type: ignore[arg-type]
    squares = [p.grad.square().sum() for p in objective.d.parameters() if p.grad is not None]
    assert seen["grad_norm/r1"].item() == pytest.approx(sum(squares).sqrt().item(), rel=1e-5)  # type: ignore[union-attr]
    assert objective.g.mapping.get_parameter("fc0.weight").grad is None
    before = weight.grad.clone()  # type: ignore[union-attr]
    objective._step_generator(1)
    assert torch.equal(weight.grad, before)  # type: ignore[arg-type]
    g_weight = objective.g.mapping.get_parameter("fc0.weight")
    assert g_weight.grad is not None
    g_before = g_weight.grad.clone()
    objective._step_discriminator(1, real)
    assert not torch.equal(weight.grad, before)  # type: ignore[arg-type]
    assert torch.equal(g_weight.grad, g_before)


def test_the_gan_learns_a_brightness() -> None:
    """Flat images at 0.8: samples begin around 0.5 and come near."""
    preset = dataclasses.replace(TINY, channels=(8, 8, 8), size=(16, 16))
    spec = network_spec(preset, (16, 16), 1)
    objective = StyleGan2Objective(preset, spec, plan(batch_size=8, lr=1e-2), gamma=0.1, ada=None)
    images = torch.full((8, 3, 16, 16), 0.8)
    _, sheet = objective.validate(images, seeded(0))
    first = (sheet - 0.8).abs().mean().item()
    for step in range(40):
        objective.step(step, images)
    row, sheet = objective.validate(images, seeded(0))
    assert sheet.shape == (64, 3, 16, 16)
    assert (sheet - 0.8).abs().mean().item() < 0.5 * first
    assert row.keys() == {"logit/real", "logit/fake"}


# --- the command --------------------------------------------------------------------------------------------


def everything(run: Path) -> dict[str, object]:
    """All that a training leaves, as comparable values."""
    last = checkpoint.latest(run)
    assert last is not None
    tensors, meta = checkpoint.load(last)
    found: dict[str, object] = {f"checkpoint/{k}": v for k, v in tensors.items()} | {"meta": meta}
    found |= {f"teacher/{k}": v for k, v in load_file(run / "teacher.safetensors").items()}
    found["samples"] = (run / "samples.png").read_bytes()
    return found | {"metrics": (run / "metrics.jsonl").read_bytes()}


def test_the_folder_is_a_teacher(config: TrainTeacherConfig) -> None:
    assert train_teacher(config) == config.out
    names = {p.name for p in config.out.iterdir()}
    assert names >= {"config.json", "teacher.json", "teacher.safetensors", "samples.png", "metrics.jsonl"}
    with Image.open(config.out / "samples.png") as picture:
        assert picture.size == (8 * 66 + 2, 8 * 66 + 2)  # 64, each in a frame
    card = read_card(config.out)
    assert (card["family"], card["images"], card["steps"], card["gamma"]) == ("stylegan2", 16, 10, 0.1)
    assert card["ada"] is None
    assert card["network"]["image_channels"] == 1  # the images are grey
    rows = read_rows(config.out / "metrics.jsonl")
    assert [set(row) for row in rows] == [
        {"step", "images_seen", "loss/g", "loss/d", "real_sign", "r1", *NORMS},
        {"step", "images_seen", "logit/real", "logit/fake"},
    ]
    assert (rows[0]["step"], rows[0]["images_seen"]) == (10, 80)
    teacher = load_teacher(str(config.out))
    assert isinstance(teacher, StyleGan2Teacher)
    assert teacher.size == (64, 64)
    assert [(s.stride, s.channels) for s in teacher.specs] == [(4, 8), (8, 8), (16, 8), (32, 8)]
    check_teacher(teacher)
    images, _ = teacher.sample(2, generator=seeded(0))
    assert torch.equal(images[:, 0], images[:, 1])
    last = checkpoint.latest(config.out)
    assert last is not None
    tensors, _ = checkpoint.load(last)
    weights = load_file(config.out / "teacher.safetensors")
    assert weights["mapping.w_avg"].abs().max() > 0  # truncation has something to go to
    for key, value in weights.items():
        assert torch.equal(value, tensors[f"ema/{key}"].half()), key


@pytest.mark.parametrize("ada", [None, 0.6])
def test_stop_and_resume_is_bitwise(
    config: TrainTeacherConfig, ada: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7 steps, a signal, then 11 more equal 18 in one go: also p, though it was between two adjustments."""
    config = dataclasses.replace(config, steps=18, ada=ada, batch_size=4)
    whole = dataclasses.replace(config, out=config.out.with_name("whole"))
    train_teacher(whole)
    original = batches.batches

    def signalled(*args, **kwargs):  # type: ignore[no-untyped-def]
        for batch in original(*args, **kwargs):
            if batch.step == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(batches, "batches", signalled)
        with signals_handled(), pytest.raises(SystemExit) as stop:
            train_teacher(config)
    assert stop.value.code == 128 + signal.SIGTERM
    assert checkpoint.latest(config.out) == checkpoint.checkpoint_path(config.out, 7)
    assert not (config.out / "teacher.safetensors").exists()
    assert train_teacher(config) == config.out
    expected, got = everything(whole.out), everything(config.out)
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        other = got[key]
        same = (
            torch.equal(value, other)
            if isinstance(value, Tensor) and isinstance(other, Tensor)
            else value == other
        )
        assert same, key
    rows = [row for row in read_rows(config.out / "metrics.jsonl") if "loss/g" in row]
    assert ("ada_p" in rows[-1]) == (ada is not None)
    assert ("checkpoint/ada/p" in got) == (ada is not None)
    if ada is not None:
        assert read_card(config.out)["ada"] == 0.6


def test_bfloat16_and_a_size_that_is_not_square(config: TrainTeacherConfig, tmp_path: Path) -> None:
    folder = tmp_path / "coloured"
    folder.mkdir()
    for i in range(8):
        Image.new("RGB", (96, 32), (9 * i, 200, 50)).save(folder / f"{i}.png")
    config = dataclasses.replace(
        config, images=folder, size=(32, 96), steps=2, ada=0.5, precision="bfloat16", gamma=2.0
    )
    train_teacher(config)
    teacher = load_teacher(str(config.out), psi=0.7)
    images, maps = teacher.sample(2, generator=seeded(0))
    assert images.shape == (2, 3, 32, 96)
    assert not torch.equal(images[:, 0], images[:, 1])
    assert [m.shape[-2:] for m in maps] == [(8, 24), (4, 12), (2, 6), (1, 3)]
    card = read_card(config.out)
    assert (card["gamma"], card["ada"], card["network"]["image_channels"]) == (2.0, 0.5, 3)
    with Image.open(config.out / "samples.png") as picture:
        assert picture.size == (8 * 98 + 2, 8 * 34 + 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schedule": "cosine"}, "--schedule is a setting of diffusion teachers"),
        ({"preset": "cpu-64", "gamma": 1.0}, "--gamma is a setting of StyleGAN2 teachers"),
        ({"preset": "cpu-64", "ada": 0.6}, "--ada is a setting of StyleGAN2 teachers"),
        ({"gamma": -1.0}, "--gamma -1"),
        ({"gamma": math.nan}, "--gamma nan"),
        ({"ada": 0.0}, "--ada 0"),
        ({"ada": 1.0}, "--ada 1"),
        ({"size": (64, 72)}, "multiples of 32"),
        ({"batch_size": 17}, "16 readable images"),
    ],
)
def test_bad_settings_are_refused_before_a_folder_is_made(
    config: TrainTeacherConfig, change: dict[str, object], words: str
) -> None:
    assert_refused(dataclasses.replace(config, **change), words)  # type: ignore[arg-type]


def test_other_settings_on_resume_are_refused(config: TrainTeacherConfig) -> None:
    train_teacher(dataclasses.replace(config, steps=1))
    with pytest.raises(UserError, match=r"gamma: None -> 3\.0"):
        train_teacher(dataclasses.replace(config, steps=1, gamma=3.0))


def test_nan_stops_and_keeps_the_checkpoint(
    config: TrainTeacherConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = stylegan2.discriminator_loss
    calls: list[int] = []

    def poisoned(real: Tensor, fake: Tensor) -> Tensor:
        calls.append(1)
        return original(real, fake) * (math.nan if len(calls) == 6 else 1)

    monkeypatch.setattr(stylegan2, "discriminator_loss", poisoned)
    with pytest.raises(UserError, match="loss/d is not finite at step 6"):
        train_teacher(config)
    assert checkpoint.latest(config.out) == checkpoint.checkpoint_path(config.out, 4)


@pytest.mark.parametrize(
    ("name", "norm", "calls"),
    [("generator_loss", "g", 4), ("discriminator_loss", "d", 4), ("r1_penalty", "r1", 1)],
)
def test_a_gradient_that_is_not_finite_is_never_saved(
    config: TrainTeacherConfig, name: str, norm: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses are, in the very step that a checkpoint is written after."""
    original, count = getattr(stylegan2, name), itertools.count(1)

    def poisoned(*args: Tensor) -> Tensor:
        loss = original(*args)
        return loss + (loss * 0).sqrt() if next(count) == calls else loss

    monkeypatch.setattr(stylegan2, name, poisoned)
    with pytest.raises(UserError, match=f"grad_norm/{norm} is not finite at step {calls}"):
        train_teacher(config)
    assert checkpoint.latest(config.out) is None


def test_processes_share_a_gans_step_in_fours(
    config: TrainTeacherConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten images of two processes would be compared in groups that one process does not make."""
    dry = dataclasses.replace(config, dry_run=True)
    train_teacher(dataclasses.replace(dry, batch_size=10))
    monkeypatch.setattr(train, "join", lambda device: World(0, 2))
    monkeypatch.setattr(train, "agree", lambda *_: None)
    for batch in (10, 12):
        with pytest.raises(UserError, match=r"in groups of 4\.\nUse a multiple of 8"):
            train_teacher(dataclasses.replace(dry, batch_size=batch))
    train_teacher(dataclasses.replace(dry, batch_size=16))
    train_teacher(dataclasses.replace(dry, preset="cpu-64", batch_size=10))


class Elsewhere(Objective):
    """An objective on a device that is not the CPU, whose loss is lost in its seventh step."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self, step: int, images: Tensor) -> dict[str, Tensor]:
        assert images.device.type == "meta"
        self.steps += 1
        return {"loss": torch.tensor(math.inf if step == 6 else 1.0)}

    def validate(self, images: Tensor, generator: torch.Generator) -> tuple[dict[str, float], Tensor]:
        return {}, torch.zeros(64, 3, 4, 4)

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        return {"steps": torch.tensor(self.steps)}, {}

    def load_state(self, tensors: object, meta: object, path: Path) -> None:
        raise AssertionError("nothing to resume")

    def weights(self) -> dict[str, Tensor]:
        return {}

    def facts(self) -> dict[str, object]:
        return {}


def test_losses_on_a_device_are_read_before_a_save_only(config: TrainTeacherConfig) -> None:
    """The loop runs on past a lost step, names it when it reads, and saves nothing that came after."""
    images = image_set.load_images(config.images, (64, 64))
    objective, run = Elsewhere(), RunDir(config.out)
    elsewhere = plan(device=torch.device("meta"), batch_size=8, steps=20)
    with pytest.raises(UserError, match="The loss is not finite at step 7"):
        train._train(config, elsewhere, objective, images, run, {"config": {}})
    run.close()
    assert objective.steps == 8
    assert checkpoint.latest(config.out) == checkpoint.checkpoint_path(config.out, 4)


# --- presets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, p in PRESETS.items() if isinstance(p, StyleGan2Preset)])
def test_presets_build_with_all_levels(name: str) -> None:
    preset = stylegan2.PRESETS[name]
    spec = network_spec(preset, preset.size, 3)
    with torch.device("meta"):
        generator, d = Generator(spec), Discriminator(spec)
        teacher = StyleGan2Teacher(generator, name=name, licence="-")
    assert [s.stride for s in teacher.specs] == [4, 8, 16, 32]
    assert teacher.size == preset.size
    assert all(s % preset.unit == 0 for s in preset.size)
    parameters = sum(p.numel() for m in (generator, d) for p in m.parameters())
    assert stylegan2.parameter_count(spec) == parameters
    assert preset.line().startswith("StyleGAN2")
    assert min(preset.size) >> len(d.blocks) == 4


def test_the_papers_preset() -> None:
    """Table 16: 512 x 1024, batch 32, gamma 10; ADA is never on unless asked for."""
    paper = stylegan2.PRESETS["stylegan2-bdd100k"]
    assert (paper.size, paper.batch_size, paper.gamma) == ((512, 1024), 32, 10.0)
    assert network_spec(paper, paper.size, 3).block_size(0) == (4, 8)
    assert TrainTeacherConfig.__dataclass_fields__["ada"].default is None
    assert set(PRESETS) == set(training_config.PresetName.__args__)
