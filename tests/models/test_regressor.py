"""The neck against two independent compositions, and the shapes and levels of the feature regressor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamteacher.models.regressor import FeatureRegressor, Neck, PyramidPooling, resize
from dreamteacher.spec import FeatureSpec

STUDENT = tuple(FeatureSpec(f"s{s}", c, s) for s, c in ((4, 6), (8, 8), (16, 10), (32, 12)))


def student_maps(size: tuple[int, int] = (64, 96), batch: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s.shape(batch, size), generator=generator) for s in STUDENT]


def randomise(module: nn.Module, seed: int) -> None:
    """Random values everywhere, BatchNorm's statistics included, so that nothing hides behind a 0 or a 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(noise.abs() + 0.5 if name.endswith("running_var") else 0.3 * noise)


def by_hand(sd: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    """Convolution, BatchNorm of evaluation mode, ReLU, from a state dict alone."""
    weight = sd[f"{prefix}.0.weight"]
    x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    mean, variance, gain, bias = (
        sd[f"{prefix}.1.{k}"].view(1, -1, 1, 1) for k in ("running_mean", "running_var", "weight", "bias")
    )
    return torch.relu((x - mean) / torch.sqrt(variance + 1e-5) * gain + bias)


def up(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def ppm_by_hand(sd: dict[str, Tensor], prefix: str, x: Tensor, scales: tuple[int, ...]) -> Tensor:
    pooled = [
        up(by_hand(sd, f"{prefix}branches.{i}.1", F.adaptive_avg_pool2d(x, scale)), x)
        for i, scale in enumerate(scales)
    ]
    return by_hand(sd, f"{prefix}bottleneck", torch.cat([x, *pooled], dim=1))


def test_regressor_equals_a_functional_composition() -> None:
    teacher = [FeatureSpec(f"s{s}", 5 + s, s) for s in (4, 8, 16, 32)]
    regressor = FeatureRegressor(STUDENT, teacher, width=16).eval()
    randomise(regressor, 1)
    sd = {k.removeprefix("neck."): v for k, v in regressor.state_dict().items()}
    features = student_maps()
    sums = [by_hand(sd, f"laterals.{i}", features[i]) for i in range(3)]
    sums.append(ppm_by_hand(sd, "ppm.", features[3], (1, 2, 3, 6)))
    for i in (2, 1, 0):
        sums[i] = sums[i] + up(sums[i + 1], sums[i])
    fused = [by_hand(sd, f"outputs.{i}", sums[i]) for i in range(3)] + [sums[3]]
    expected = [
        F.conv2d(m, sd[f"projections.{i}.weight"], sd[f"projections.{i}.bias"]) for i, m in enumerate(fused)
    ]
    with torch.no_grad():
        got, neck = regressor(features), regressor.fused(features)
    for a, b in zip([*got, *neck], [*expected, *fused], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_neck_equals_upernet_of_segmentation_models() -> None:
    upernet = pytest.importorskip("segmentation_models_pytorch.decoders.upernet.decoder")
    # Theirs normalises the encoder's maps first and fuses the levels last: both are outside the neck.
    channels = [spec.channels for spec in STUDENT]
    theirs = upernet.UPerNetDecoder([3, 3, *channels], encoder_depth=5, decoder_channels=16).eval()
    randomise(theirs, 2)
    source = theirs.state_dict()
    names = {"ppm.bottleneck": "psp.out_conv"}
    names |= {f"ppm.branches.{i}.1": f"psp.blocks.{i}.1" for i in range(4)}
    names |= {f"laterals.{i}": f"fpn_lateral_blocks.{2 - i}.conv_norm_relu" for i in range(3)}
    names |= {f"outputs.{i}": f"fpn_conv_blocks.{2 - i}" for i in range(3)}
    neck = Neck(STUDENT, width=16).eval()
    neck.load_state_dict(
        {
            f"{ours}.{key.removeprefix(f'{prefix}.')}": value
            for ours, prefix in names.items()
            for key, value in source.items()
            if key.startswith(f"{prefix}.")
        }
    )
    features = student_maps(seed=3)
    with torch.no_grad():
        got = neck(features)
        state = theirs.psp(features[3])
        expected = [state]
        for i in range(3):
            state = theirs.fpn_lateral_blocks[i](state, features[2 - i])
            expected.insert(0, theirs.fpn_conv_blocks[i](state))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_maps_are_shaped_as_the_teachers() -> None:
    teacher = [FeatureSpec("s4", 7, 4), FeatureSpec("s8", 9, 8), FeatureSpec("s16", 11, 16)]
    regressor = FeatureRegressor(STUDENT, teacher, width=8)
    assert [tuple(m.shape) for m in regressor(student_maps())] == [s.shape(2, (64, 96)) for s in teacher]
    rounded = [(16, 25), (9, 12), (4, 6)]
    maps = regressor(student_maps(), rounded)
    assert [tuple(m.shape) for m in maps] == [
        (2, s.channels, *size) for s, size in zip(teacher, rounded, strict=True)
    ]


def test_a_missing_stride_is_read_from_the_nearest_level() -> None:
    student, maps = STUDENT[1:3], student_maps()[1:3]  # strides 8 and 16
    teacher = [FeatureSpec(f"s{s}", 5, s) for s in (4, 8, 11, 12, 32, 64)]
    regressor = FeatureRegressor(student, teacher, width=8).eval()
    assert regressor.sources == [0, 0, 0, 1, 1, 1]
    with torch.no_grad():
        got, fused = regressor(maps), regressor.fused(maps)
    assert [tuple(m.shape[-2:]) for m in got] == [(16, 24), (8, 12), (6, 9), (5, 8), (2, 3), (1, 2)]
    expected = regressor.projections[0](
        F.interpolate(fused[0], (16, 24), mode="bilinear", align_corners=False)
    )
    torch.testing.assert_close(got[0], expected)


def test_two_equally_near_levels_take_the_finer() -> None:
    student = [STUDENT[0], STUDENT[2]]
    assert FeatureRegressor(student, [FeatureSpec("s8", 3, 8)], width=4).sources == [0]


def test_every_parameter_learns() -> None:
    regressor = FeatureRegressor(STUDENT, [FeatureSpec(f"s{s}", 3, s) for s in (4, 8, 16, 32)], width=8)
    features = [m.requires_grad_() for m in student_maps()]
    sum(m.square().mean() for m in regressor(features)).backward()
    for name, parameter in regressor.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(m.grad is not None and m.grad.abs().sum() > 0 for m in features)


def test_training_needs_two_images_and_evaluation_one() -> None:
    ppm = PyramidPooling(6, 8)
    one = torch.rand(1, 6, 2, 3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ppm(one)
    assert ppm(one.expand(2, -1, -1, -1)).shape == (2, 8, 2, 3)
    assert ppm.eval()(one).shape == (1, 8, 2, 3)
    assert PyramidPooling(6, 8)(torch.rand(2, 6, 1, 1)).shape == (2, 8, 1, 1)


def test_the_seed_decides_and_the_global_random_state_stays() -> None:
    teacher = [FeatureSpec("s4", 3, 4)]
    state = torch.random.get_rng_state()
    first, again, other = (
        FeatureRegressor(STUDENT, teacher, width=4, seed=s).state_dict() for s in (1, 1, 2)
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["projections.0.weight"], other["projections.0.weight"])


def test_a_wrong_number_of_maps_or_sizes_is_refused() -> None:
    regressor = FeatureRegressor(STUDENT, [FeatureSpec("s4", 3, 4)], width=4)
    with pytest.raises(ValueError, match="takes 4 levels, got 3"):
        regressor(student_maps()[:3])
    with pytest.raises(ValueError, match="zip"):
        regressor(student_maps(), [(4, 4), (2, 2)])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (17, 31)])
def test_one_value_spread_in_bfloat16_has_bilinear_s_bits_and_an_exact_gradient(size, layout) -> None:
    x = torch.randn(4, 24, 1, 1, generator=torch.Generator().manual_seed(0))
    x = x.bfloat16().to(memory_format=layout).requires_grad_()
    found, expected = resize(x, size), F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()
    towards = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found.backward(towards)
    whole = towards.double().sum((2, 3), keepdim=True)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), whole, rtol=2**-8, atol=1e-3)
