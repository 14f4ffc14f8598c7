"""The interpreter and the label losses: float64 loops, empty classes, ignored pixels, temperature, learning."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dreamteacher.losses import dice_loss, interpreter_loss, label_distillation
from dreamteacher.models.interpreter import Interpreter
from dreamteacher.models.regressor import resize
from dreamteacher.spec import FeatureSpec

G = torch.Generator().manual_seed(0)
IGNORE = 255


def draw(
    classes: int = 4, seed: int = 0, missing: int | None = 2, ignored: float = 0.2
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, classes, 5, 6, generator=g, dtype=torch.float64)
    target = torch.randint(classes, (2, 5, 6), generator=g)
    if missing is not None:
        target[target == missing] = 0
    target[torch.rand(target.shape, generator=g) < ignored] = IGNORE
    return logits, target


def loop(logits: Tensor, target: Tensor, weights: list[float] | None) -> tuple[float, float]:
    """Cross-entropy and Dice loss, cell by cell."""
    n, k, h, w = logits.shape
    entropy, total = 0.0, 0.0
    inter, p_sum, y_sum = [0.0] * k, [0.0] * k, [0] * k
    for i in range(n):
        for y in range(h):
            for x in range(w):
                truth = int(target[i, y, x])
                if truth == IGNORE:
                    continue
                scores = [math.exp(float(logits[i, c, y, x])) for c in range(k)]
                p = [s / sum(scores) for s in scores]
                weight = weights[truth] if weights else 1.0
                entropy, total = entropy - weight * math.log(p[truth]), total + weight
                y_sum[truth] += 1
                inter[truth] += p[truth]
                for c in range(k):
                    p_sum[c] += p[c]
    dice = [1 - 2 * inter[c] / (p_sum[c] + y_sum[c]) for c in range(k) if y_sum[c]]
    return entropy / total, sum(dice) / len(dice)


@pytest.mark.parametrize("missing", [None, 2])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_against_a_loop(missing, ignored, weighted):
    logits, target = draw(missing=missing, ignored=ignored)
    weights = [0.5, 2.0, 1.0, 3.0] if weighted else None
    entropy, dice = loop(logits, target, weights)
    assert dice_loss(logits, target).item() == pytest.approx(dice, rel=1e-12)
    tensor = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    got = interpreter_loss(logits, target, class_weights=tensor)
    assert got.item() == pytest.approx(entropy + 3 * dice, rel=1e-12)
    assert interpreter_loss(logits.float(), target).item() == pytest.approx(
        interpreter_loss(logits, target).item(), rel=1e-5
    )


def test_edges_of_the_losses():
    logits, target = draw()
    nothing = torch.full_like(target, IGNORE)
    assert interpreter_loss(logits, nothing).item() == 0.0
    right = 100.0 * torch.nn.functional.one_hot(target.where(target != IGNORE, 0), 4).movedim(3, 1).double()
    assert dice_loss(right, target).item() == pytest.approx(0, abs=1e-12)
    # What is predicted where nothing is labelled changes nothing, and gets no gradient.
    changed = logits.clone().requires_grad_()
    interpreter_loss(changed, target).backward()
    assert changed.grad.movedim(1, 3)[target == IGNORE].abs().max() == 0
    # Rows of logits (image-level labels) are a special case of maps.
    rows, labels = logits[:, :, 0, 0], torch.tensor([1, 3])
    as_map = interpreter_loss(rows[..., None, None], labels[:, None, None])
    assert interpreter_loss(rows, labels).item() == pytest.approx(as_map.item())


def test_gradients_are_right():
    logits, target = draw()
    assert torch.autograd.gradcheck(lambda x: interpreter_loss(x, target), (logits.requires_grad_(),))


def test_distillation_against_a_loop():
    student, _ = draw(seed=1)
    teacher, _ = draw(seed=2)
    total = 0.0
    for i in range(2):
        for y in range(5):
            for x in range(6):
                t = [math.exp(float(v) / 4) for v in teacher[i, :, y, x]]
                s = [math.exp(float(v) / 4) for v in student[i, :, y, x]]
                total -= sum(a / sum(t) * math.log(b / sum(s)) for a, b in zip(t, s, strict=True))
    assert label_distillation(student, teacher).item() == pytest.approx(total / 60, rel=1e-12)
    with pytest.raises(ValueError, match="teacher logits"):
        label_distillation(student, teacher[:, :3])


def test_temperature_and_the_absent_tau_squared():
    """d/ds of the loss is (softmax(s/tau) - softmax(t/tau)) / tau: a factor tau^2 would make it tau."""
    student, teacher = (draw(seed=s)[0] for s in (1, 2))
    for tau in (1.0, 2.0, 4.0, 8.0):
        s = student.clone().requires_grad_()
        label_distillation(s, teacher, tau=tau).backward()
        expected = ((student / tau).softmax(1) - (teacher / tau).softmax(1)) / tau / 60
        torch.testing.assert_close(s.grad, expected, rtol=1e-10, atol=1e-14)
    near = (teacher + 1e-3 * student).requires_grad_()
    norms = {}
    for tau in (4.0, 8.0):
        near.grad = None
        label_distillation(near, teacher, tau=tau).backward()
        norms[tau] = near.grad.norm().item()
    assert norms[4.0] / norms[8.0] == pytest.approx(4, rel=0.35)  # it falls with tau^2 near agreement
    assert teacher.grad is None


SPECS = [FeatureSpec("s4", 5, 4), FeatureSpec("s8", 9, 8), FeatureSpec("s16", 3, 16)]


def maps(n: int = 2, size: tuple[int, int] = (32, 48), seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s.shape(n, size), generator=g) for s in SPECS]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shapes_for_any_number_of_levels(count):
    interpreter = Interpreter(SPECS[:count], 6, width=32)
    assert interpreter(maps()[:count]).shape == (2, 6, 8, 12)
    rows = Interpreter(SPECS[:count], 6, width=32, pooled=True)
    assert rows(maps()[:count]).shape == (2, 6)
    with pytest.raises(ValueError, match="reads"):
        interpreter(maps()[: count - 1])


def test_parts_are_the_papers():
    interpreter = Interpreter(SPECS, 6)
    norms = [m for m in interpreter.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {(m.num_groups, m.num_channels) for m in norms} == {(32, 256)}
    assert len(norms) == 3 + 2
    depthwise = [m for m in interpreter.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1]
    assert [(m.groups, m.in_channels) for m in depthwise] == [(512, 512)] * 2
    assert interpreter.dropout.p == 0.1


def test_the_seed_decides_the_weights_and_nothing_else():
    state = torch.get_rng_state()
    a, b, c = (Interpreter(SPECS, 3, width=32, seed=s) for s in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, a.parameters(), b.parameters()))
    assert not torch.equal(a.classify.weight, c.classify.weight)


def test_it_learns_what_is_in_a_coarse_level_only():
    interpreter = Interpreter(SPECS, 2, width=32, groups=8, dropout=0.0)
    optimizer = torch.optim.AdamW(interpreter.parameters(), lr=4e-3)
    for step in range(120):
        x = maps(4, seed=step)
        target = resize(x[2][:, :1], (8, 12)).squeeze(1).gt(0).long()
        loss = interpreter_loss(interpreter(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = maps(8, seed=999)
    target = resize(x[2][:, :1], (8, 12)).squeeze(1).gt(0).long()
    assert (interpreter.eval()(x).argmax(1) == target).float().mean() > 0.85
