"""Groups, the schedule, both optimizers, and the moving average against independent arithmetic."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dreamteacher.runtime.optim import Ema, build_optimizer, lr_at, parameter_groups, set_lr
from dreamteacher.runtime.settings import OptimizerName


class Net(nn.Module):
    """One of each kind: kernels, matrices, biases, two norms, a table, a lone scale, and something frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.ln = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 2)
        self.table = nn.Embedding(5, 4)
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_groups_hold_every_trained_parameter_once() -> None:
    net, other = Net(), nn.Linear(3, 3)
    decayed, plain = parameter_groups([net, other], 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    ids = [id(p) for group in (decayed, plain) for p in group["params"]]  # type: ignore[attr-defined]
    assert len(ids) == len(set(ids))
    names = {id(p): k for m in (net, other) for k, p in m.named_parameters() if p.requires_grad}
    assert set(ids) == set(names)
    decayed_ids = {id(p) for p in decayed["params"]}  # type: ignore[attr-defined]
    kernels = (net.conv.weight, net.linear.weight, net.table.weight, other.weight)
    assert decayed_ids == {id(p) for p in kernels}


def test_only_the_first_group_decays() -> None:
    net = Net()
    optimizer = build_optimizer("adamw", parameter_groups([net], 0.5), 0.1, (0.9, 0.95))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in net.named_parameters():
        factor = 1 - 0.1 * 0.5 if p.requires_grad and p.ndim > 1 else 1
        torch.testing.assert_close(p.detach(), before[name] * factor, rtol=1e-6, atol=0)


@settings(max_examples=40)
@given(
    total=st.integers(1, 60),
    share=st.floats(0, 1),
    peak=st.floats(1e-5, 10),
    low=st.floats(0, 1),
)
def test_schedule_equals_the_formula(total: int, share: float, peak: float, low: float) -> None:
    warmup, final = int(share * total), low * peak
    rates = [lr_at(s, total=total, warmup=warmup, peak=peak, final=final) for s in range(total)]
    for step, rate in enumerate(rates):
        if step < warmup:
            expected = peak / warmup * (step + 1)
        else:  # cos^2(x / 2) instead of (1 + cos x) / 2
            angle = math.pi / 2 * (step - warmup) / (total - warmup)
            expected = final * math.sin(angle) ** 2 + peak * math.cos(angle) ** 2
        assert rate == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert min(rates) > 0
    assert max(rates) <= peak * (1 + 1e-12)
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    assert all(a >= b for a, b in pairwise(rates[warmup:]))


def test_schedule_defaults_to_falling_to_zero() -> None:
    assert lr_at(99, total=100, warmup=0, peak=1.0) == pytest.approx(0.000247, abs=1e-6)
    assert lr_at(0, total=100, warmup=0, peak=1.0) == 1.0
    assert lr_at(0, total=1, warmup=1, peak=1.0) == 1.0


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_optimizers_reduce_a_quadratic(name: OptimizerName) -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(6, 5, generator=generator)
    weight = nn.Parameter(torch.randn(6, 5, generator=generator))
    optimizer = build_optimizer(name, [{"params": [weight], "weight_decay": 0.0}], 0.1, (0.9, 0.95))
    losses = []
    for step in range(200):
        set_lr(optimizer, lr_at(step, total=200, warmup=10, peak=0.1))
        optimizer.zero_grad()
        loss = (weight - target).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-3 * losses[0]


def test_the_names_choose_the_optimizer() -> None:
    groups = parameter_groups([nn.Linear(2, 2)], 0.1)
    adamw = build_optimizer("adamw", [dict(g) for g in groups], 0.3, (0.8, 0.9))
    lamb = build_optimizer("lamb", [dict(g) for g in groups], 0.3, (0.8, 0.9))
    assert [type(o).__name__ for o in (adamw, lamb)] == ["AdamW", "Lamb"]
    for optimizer in (adamw, lamb):
        assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
        assert {g["betas"] for g in optimizer.param_groups} == {(0.8, 0.9)}
        set_lr(optimizer, 0.7)
        assert {g["lr"] for g in optimizer.param_groups} == {0.7}


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_ema_equals_a_float64_loop(decay: float) -> None:
    generator = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2))
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = Ema(net, decay)
    names = dict(net.named_parameters())
    expected = {k: v.detach().double().clone() for k, v in names.items()}
    for n in range(1, 31):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn(p.shape, generator=generator))
            net[1].running_mean.add_(torch.randn(8, generator=generator))
            net[1].num_batches_tracked += 1
        ema.update(net)
        keep = min(decay, (1 + n) / (10 + n))
        for key, p in names.items():
            expected[key] = keep * expected[key] + (1 - keep) * p.detach().double()
    assert ema.updates == 30
    assert set(ema.tensors) == set(net.state_dict())
    for key, value in expected.items():
        torch.testing.assert_close(ema.tensors[key].double(), value, rtol=1e-5, atol=1e-5)
        assert not ema.tensors[key].requires_grad
    for key, buffer in net.named_buffers():
        assert torch.equal(ema.tensors[key], buffer), key
        assert ema.tensors[key].dtype == buffer.dtype
    assert ema.tensors["1.num_batches_tracked"].item() == 30


def test_ema_starts_as_a_copy_of_its_own() -> None:
    net = nn.Linear(3, 3)
    ema = Ema(net, 0.9)
    before = net.weight.detach().clone()
    with torch.no_grad():
        net.weight.add_(1)
    assert torch.equal(ema.tensors["weight"], before)
    ema.update(net)
    net.load_state_dict(ema.tensors)
    weight = min(0.9, 2 / 11)
    torch.testing.assert_close(net.weight.detach(), before + (1 - weight))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_adamw_equals_a_float64_loop_in_every_layout(layout: torch.memory_format, autocast: bool) -> None:
    """A fused kernel walks memory: weight, gradient and moments must lie alike, or it is silently wrong."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 4, 1)
    )
    net.to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = build_optimizer("adamw", parameter_groups([net], 0.1), 0.05, (0.9, 0.95))
    start = {k: p.detach().double().contiguous() for k, p in net.named_parameters()}
    weights = {k: v.clone() for k, v in start.items()}
    first, second = ({k: torch.zeros_like(v) for k, v in start.items()} for _ in range(2))
    for n in range(1, 5):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = net(torch.randn(2, 3, 8, 8, generator=generator))
        out.float().square().mean().backward()
        for key, p in net.named_parameters():
            assert p.grad is not None
            assert p.grad.stride() == p.stride() or p.shape[-1] == 1
            grad = p.grad.double().contiguous()
            first[key] = 0.9 * first[key] + 0.1 * grad
            second[key] = 0.95 * second[key] + 0.05 * grad**2
            decay = 0.1 if p.ndim > 1 else 0.0
            step = (first[key] / (1 - 0.9**n)) / ((second[key] / (1 - 0.95**n)).sqrt() + 1e-8)
            weights[key] = weights[key] * (1 - 0.05 * decay) - 0.05 * step
        optimizer.step()
    for key, p in net.named_parameters():
        torch.testing.assert_close(p.detach().double().contiguous(), weights[key], rtol=1e-4, atol=1e-5)
        assert not torch.equal(weights[key], start[key])
