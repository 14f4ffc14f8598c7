"""The feature losses against golden numbers, plain float64 loops, and their own properties."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file
from torch import Tensor

from dreamteacher.losses import attention_transfer, energy, feature_loss, mse, whiten, whitened_mse
from tests.places import GOLDEN

GOLDEN = load_file(GOLDEN / "losses.safetensors")
LEVELS = ("s4", "s8", "s16", "s32")
AXES = ("c", "chw")


def golden_maps(side: str, dtype: torch.dtype) -> list[Tensor]:
    return [GOLDEN[f"in.{side}.{level}"].to(dtype) for level in LEVELS]


def random_maps(seed: int, shapes: list[tuple[int, ...]], scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) * scale for shape in shapes]


def computed(dtype: torch.dtype) -> dict[str, Tensor]:
    """Every value of the golden file, under its key there."""
    student, teacher = golden_maps("student", dtype), golden_maps("teacher", dtype)
    targets = {"raw": teacher} | {axes: [whiten(t, axes) for t in teacher] for axes in AXES}
    out: dict[str, Tensor] = {}
    for axes in AXES:
        out[f"mse.{axes}.levels"] = whitened_mse(student, teacher, axes)
        out[f"mse_both_whitened.{axes}.levels"] = mse([whiten(s, axes) for s in student], targets[axes])
        out[f"feature_loss.{axes}"] = feature_loss(student, teacher, axes=axes).total
        out |= {f"teacher_whitened.{axes}.{k}": t for k, t in zip(LEVELS, targets[axes], strict=True)}
    out["mse.raw.levels"] = mse(student, teacher)
    for name, target in targets.items():
        out[f"at.{name}.levels"] = attention_transfer(student, target)
        out[f"at_public.{name}.levels"] = attention_transfer(student, target, reduction="public")
        for level, s, t in zip(LEVELS, student, target, strict=True):
            per_image = [attention_transfer([s[n : n + 1]], [t[n : n + 1]])[0] for n in range(len(s))]
            out[f"at_per_image.{name}.{level}"] = torch.stack(per_image)
    for side, maps in (("student", student), ("teacher", teacher)):
        out |= {f"energy.{side}.{level}": energy(f) for level, f in zip(LEVELS, maps, strict=True)}
    out |= {key.removesuffix(".levels"): v.mean() for key, v in out.items() if key.endswith(".levels")}
    return {f"out.{key}": value for key, value in out.items()}


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_every_golden_value(dtype: torch.dtype, rtol: float) -> None:
    values = computed(dtype)
    assert set(values) == {key for key in GOLDEN if key.startswith("out.")}
    for key, value in values.items():
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), GOLDEN[key], rtol=rtol, atol=rtol / 10, msg=key)


def loop_whiten(x: Tensor, axes: str, eps: float) -> list[list[list[list[float]]]]:
    n, c, h, w = x.shape
    values = x.tolist()

    def stats(cells: list[float]) -> tuple[float, float]:
        mean = sum(cells) / len(cells)
        return mean, sum((v - mean) ** 2 for v in cells) / len(cells)

    out = [[[[0.0] * w for _ in range(h)] for _ in range(c)] for _ in range(n)]
    for i in range(n):
        whole = [values[i][k][y][z] for k in range(c) for y in range(h) for z in range(w)]
        for y in range(h):
            for z in range(w):
                cells = whole if axes == "chw" else [values[i][k][y][z] for k in range(c)]
                mean, variance = stats(cells)
                for k in range(c):
                    out[i][k][y][z] = (values[i][k][y][z] - mean) / math.sqrt(variance + eps)
    return out


def loop_attention(s: Tensor, t: Tensor, p: float, reduction: str) -> float:
    def unit(f: Tensor) -> list[float]:
        c, h, w = f.shape
        q = [sum(abs(float(f[k, y, z])) ** p for k in range(c)) for y in range(h) for z in range(w)]
        length = math.sqrt(sum(v * v for v in q))
        return [v / length for v in q]

    total = 0.0
    for si, ti in zip(s, t, strict=True):
        gaps = [abs(a - b) for a, b in zip(unit(si), unit(ti), strict=True)]
        distance = sum(g**p for g in gaps) ** (1 / p)
        total += distance if reduction == "distance" else sum(g * g for g in gaps) / len(gaps)
    return total / len(s)


@pytest.mark.parametrize("axes", AXES)
def test_whitened_mse_equals_a_plain_loop(axes: str) -> None:
    shapes = [(2, 3, 4, 5), (2, 4, 2, 3)]
    student, teacher = random_maps(0, shapes), random_maps(1, shapes, scale=3.0)
    expected = []
    for s, t in zip(student, teacher, strict=True):
        target = torch.tensor(loop_whiten(t, axes, 1e-5), dtype=torch.float64)
        pairs = list(zip(s.flatten().tolist(), target.flatten().tolist(), strict=True))
        expected.append(sum((a - b) ** 2 for a, b in pairs) / len(pairs))
    torch.testing.assert_close(whitened_mse(student, teacher, axes).tolist(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", ["distance", "public"])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_attention_transfer_equals_a_plain_loop(p: float, reduction: str) -> None:
    shapes = [(2, 3, 4, 5), (2, 4, 2, 3)]
    student, teacher = random_maps(2, shapes), random_maps(3, shapes, scale=3.0)
    expected = [loop_attention(s, t, p, reduction) for s, t in zip(student, teacher, strict=True)]
    got = attention_transfer(student, teacher, p, reduction=reduction)
    torch.testing.assert_close(got.tolist(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("reduction", ["distance", "public"])
def test_gradients(axes: str, reduction: str) -> None:
    shapes = [(2, 3, 2, 3), (2, 2, 1, 2)]
    student = [s.requires_grad_() for s in random_maps(4, shapes)]
    teacher = random_maps(5, shapes)

    def total(*maps: Tensor) -> Tensor:
        return feature_loss(maps, teacher, axes=axes, at_reduction=reduction).total

    assert torch.autograd.gradcheck(total, tuple(student))


@pytest.mark.parametrize("axes", AXES)
def test_gradient_through_whitening(axes: str) -> None:
    x = random_maps(6, [(2, 3, 2, 2)])[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda v: whiten(v, axes), (x,))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 3), st.integers(4, 9), st.integers(1, 6), st.integers(1, 6)),
    scale=st.floats(0.5, 1e3),
    shift=st.floats(-10, 10),
    axes=st.sampled_from(AXES),
)
def test_whitened_maps_have_mean_0_and_variance_1(
    seed: int, shape: tuple[int, ...], scale: float, shift: float, axes: str
) -> None:
    x = random_maps(seed, [shape], scale)[0] + shift
    dims = (1,) if axes == "c" else (1, 2, 3)
    variance, mean = torch.var_mean(whiten(x, axes, eps=1e-12), dim=dims, correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-6)
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), s_scale=st.floats(1e-2, 1e3), t_scale=st.floats(1e-2, 1e3))
def test_attention_transfer_sees_places_not_scales(seed: int, s_scale: float, t_scale: float) -> None:
    student, teacher = random_maps(seed, [(2, 3, 4, 3)]), random_maps(seed + 1, [(2, 3, 4, 3)])
    distance = attention_transfer(student, teacher)
    scaled = attention_transfer([s * s_scale for s in student], [t * -t_scale for t in teacher])
    torch.testing.assert_close(scaled, distance, rtol=1e-8, atol=1e-12)
    assert 0 <= distance.item() <= math.sqrt(2)
    same = attention_transfer([s * s_scale for s in student], student)
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-12)


@pytest.mark.parametrize("reduction", ["distance", "public"])
@pytest.mark.parametrize("fill", [0.0, 1.0, 1e-30])
def test_gradient_is_finite_where_maps_are_equal(fill: float, reduction: str) -> None:
    teacher = [torch.full((2, 3, 4, 4), fill)]
    student = [torch.full((2, 3, 4, 4), fill, requires_grad=True)]
    loss = feature_loss(student, teacher, at_reduction=reduction)
    loss.total.backward()
    assert loss.total.isfinite()
    assert loss.at.item() == 0
    assert student[0].grad is not None
    assert student[0].grad.isfinite().all()


def test_gradient_is_finite_for_a_student_of_zeros() -> None:
    student = [torch.zeros(2, 3, 4, 4, requires_grad=True)]
    feature_loss(student, [random_maps(7, [(2, 3, 4, 4)])[0].float()]).total.backward()
    assert student[0].grad is not None
    assert student[0].grad.isfinite().all()


def test_whitening_survives_constant_maps() -> None:
    for axes in AXES:
        assert whiten(torch.full((2, 3, 2, 2), 7.0), axes).abs().max() < 1e-3


def test_half_precision_and_autocast_are_computed_in_float32() -> None:
    shapes = [(2, 8, 4, 4)]
    student, teacher = random_maps(8, shapes, 300.0), random_maps(9, shapes, 300.0)
    half = ([s.half() for s in student], [t.half() for t in teacher])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = feature_loss(*half)
    exact = feature_loss([s.double() for s in half[0]], [t.double() for t in half[1]])
    assert loss.total.dtype == torch.float32
    for value, reference in zip(loss, exact, strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-6)


def test_total_is_the_mean_over_levels_and_inputs_stay_as_they_were() -> None:
    student, teacher = golden_maps("student", torch.float64), golden_maps("teacher", torch.float64)
    copies = [m.clone() for m in (*student, *teacher)]
    weights = (1.0, 0.5, 2.0, 0.0)
    loss = feature_loss(student, teacher, axes="c", at_weight=3.0, weights=weights)
    expected = sum(w * (m + 3.0 * a) for w, m, a in zip(weights, loss.mse, loss.at, strict=True)) / 4
    torch.testing.assert_close(loss.total, expected)
    assert all(torch.equal(a, b) for a, b in zip(copies, (*student, *teacher), strict=True))


def test_only_the_teacher_is_whitened() -> None:
    student, teacher = golden_maps("student", torch.float64), golden_maps("teacher", torch.float64)
    scaled = whitened_mse(student, [5 * t + 2 for t in teacher], "chw", eps=0.0)
    torch.testing.assert_close(scaled, whitened_mse(student, teacher, "chw", eps=0.0))
    assert not torch.allclose(whitened_mse([2 * s for s in student], teacher), whitened_mse(student, teacher))


def test_what_does_not_match_is_refused() -> None:
    a, b = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 1, 1)
    with pytest.raises(ValueError, match="do not match"):
        whitened_mse([a], [b])
    with pytest.raises(ValueError, match="student levels"):
        attention_transfer([a], [a, b])
    with pytest.raises(ValueError, match="student levels"):
        mse([], [])
    with pytest.raises(ValueError, match="level weights"):
        feature_loss([a], [a], weights=(1.0, 2.0))
    with pytest.raises(ValueError, match="axes"):
        whiten(a, "hw")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="N x C x H x W"):
        whiten(a[0])
    with pytest.raises(ValueError, match="reduction"):
        attention_transfer([a], [a], reduction="mean")  # type: ignore[arg-type]
