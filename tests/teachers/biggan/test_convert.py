"""BigGAN, BigBiGAN, IC-GAN: golden numbers, spectral norm divided out exactly, sizes read, files refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dreamteacher.runtime.config import from_json, to_json
from dreamteacher.teachers.biggan.convert import BigGanSettings, spectral_norm
from dreamteacher.teachers.biggan.teacher import (
    BigGanNetwork,
    BigGanSpec,
    build_network,
    convert,
)
from tests.builders.pictures import cut, refused
from tests.places import GOLDEN

LAYOUTS = {
    "biggan_hier64": "biggan-pytorch",
    "bigbigan128": "bigbigan",
    "icgan_biggan64_instance": "icgan",
    "icgan_biggan64_class_instance": "icgan",
}


# --- golden numbers -----------------------------------------------------------------------------------------


class Golden(NamedTuple):
    name: str
    state: dict[str, Tensor]
    inputs: dict[str, Tensor]
    out: dict[str, Tensor]
    flags: dict[str, Any]

    def settings(self, **more: Any) -> dict[str, Any]:
        """The layout alone, and what a test adds."""
        return {"layout": LAYOUTS[self.name], **more}

    def given(self) -> dict[str, Any]:
        """Every flag of the golden file that describes the network."""
        known = BigGanSettings.__dataclass_fields__
        return self.settings(**{k: v for k, v in self.flags.items() if k in known})

    def arguments(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        labels = self.inputs.get("y")
        if self.name == "bigbigan128":
            labels = torch.zeros(2, dtype=torch.long)
        return self.inputs["z"], labels, self.inputs.get("feats")


def golden(name: str) -> Golden:
    parts: dict[str, dict[str, Tensor]] = {"sd": {}, "in": {}, "out": {}}
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            kind, _, rest = key.partition(".")
            parts[kind][rest] = file.get_tensor(key)
        flags = json.loads(file.metadata()["flags"])
    return Golden(name, parts["sd"], parts["in"], parts["out"], flags)


@pytest.fixture(scope="module")
def case() -> Golden:
    """IC-GAN told of instances: the case that most tests of the conversion use. Copy before changing."""
    return golden("icgan_biggan64_instance")


def converted(tmp_path: Path, state: dict[str, Tensor], settings: dict[str, Any]) -> BigGanNetwork:
    path = tmp_path / "G_ema.pth"
    torch.save(state, path)
    weights, spec = convert(path, settings)
    network = build_network(spec)
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def thinned(x: Tensor) -> Tensor:
    """Maps as the golden files keep them: by the longer side, every 8th above 32, every 4th above 16."""
    step = 8 if max(x.shape[-2:]) > 32 else 4 if max(x.shape[-2:]) > 16 else 1
    return x[..., ::step, ::step]


def outputs(network: BigGanNetwork, *arguments: Tensor | None) -> dict[str, Tensor]:
    """The network's results under the golden files' names; a hook catches what enters each attention."""
    found: dict[str, Tensor] = {}
    hooks = [
        block.attention.register_forward_pre_hook(
            lambda _m, args, i=i: found.__setitem__(f"block{i}.before_attention", thinned(args[0]))
        )
        for i, block in enumerate(network.blocks)
        if block.attention is not None
    ]
    image, maps = network(*arguments, range(len(network.blocks)))
    for hook in hooks:
        hook.remove()
    return {"image": image, **{f"block{i}": thinned(m) for i, m in enumerate(maps)}, **found}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("all_flags", [False, True], ids=["layout", "flags"])
def test_golden(name, all_flags, tmp_path):
    g = golden(name)
    ours = outputs(converted(tmp_path, g.state, g.given() if all_flags else g.settings()), *g.arguments())
    assert ours.keys() == g.out.keys()
    for key, value in g.out.items():
        assert (ours[key] - value).abs().max() < 1e-4, key
    assert sum("before_attention" in key for key in ours) == 1


def sigma(weight: Tensor, u: Tensor, steps: int = 1) -> Tensor:
    """Float64: the length of u after `steps` rounds of v = W^T u / |..|, u = W v, from u / |u|."""
    matrix, u = weight.double().flatten(1), u.double().flatten()
    for _ in range(steps):
        v = torch.einsum("o,oi->i", u / u.norm(), matrix)
        u = torch.einsum("i,oi->o", v / v.norm(), matrix)
    return u.norm()


def reference(
    state: dict[str, Tensor], told: list[Tensor], z: Tensor, *, hier: bool, eps: float, steps: int = 1
) -> dict[str, Tensor]:
    """The published arithmetic in float64, step by step: normalise, then gain and bias; enlarge, then convolve.

    Args:
        told: what every block is told besides its piece of z; steps: power iterations, 0 for none.
    """
    state = {k: v.double() for k, v in state.items()}

    def weight(key: str) -> Tensor:
        w = state[f"{key}.weight"]
        return w / sigma(w, state[f"{key}.u0"], steps) if steps else w

    def statistics(key: str) -> list[Tensor]:
        prefix = f"{key}.bn.running_" if f"{key}.bn.running_mean" in state else f"{key}.stored_"
        return [state[f"{prefix}{what}"][:, None, None] for what in ("mean", "var")]

    def norm(x: Tensor, key: str, condition: Tensor) -> Tensor:
        mean, var = statistics(key)
        gain, bias = 1 + condition @ weight(f"{key}.gain").T, condition @ weight(f"{key}.bias").T
        return (x - mean) / (var + eps).sqrt() * gain[..., None, None] + bias[..., None, None]

    def conv(x: Tensor, key: str) -> Tensor:
        w = weight(key)
        return F.conv2d(x, w, state.get(f"{key}.bias"), padding=w.shape[-1] // 2)

    def twice(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2)

    depth = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    pieces = z.double().chunk(depth + 1, 1) if hier else [z.double()]
    found: dict[str, Tensor] = {}
    x = (pieces[0] @ weight("linear").T + state["linear.bias"]).view(len(z), -1, 4, 4)
    for i in range(depth):
        condition = torch.cat([*told, *([pieces[i + 1]] if hier else [])], 1)
        key = f"blocks.{i}.0"
        h = conv(twice(norm(x, f"{key}.bn1", condition).relu()), f"{key}.conv1")
        h = conv(norm(h, f"{key}.bn2", condition).relu(), f"{key}.conv2")
        x = h + conv(twice(x), f"{key}.conv_sc")
        key = f"blocks.{i}.1"
        if f"{key}.gamma" in state:
            found[f"block{i}.before_attention"] = thinned(x)
            query = conv(x, f"{key}.theta").flatten(2)
            keys, values = (F.max_pool2d(conv(x, f"{key}.{k}"), 2).flatten(2) for k in ("phi", "g"))
            share = torch.einsum("ncq,nck->nqk", query, keys).softmax(-1)
            mixed = torch.einsum("nck,nqk->ncq", values, share).unflatten(2, x.shape[2:])
            x = x + state[f"{key}.gamma"] * conv(mixed, f"{key}.o")
        found[f"block{i}"] = thinned(x)
    mean, var = statistics("output_layer.0")
    names = ("bn.weight", "bn.bias") if "output_layer.0.bn.weight" in state else ("gain", "bias")
    gain, bias = (state[f"output_layer.0.{n}"][:, None, None] for n in names)
    x = ((x - mean) / (var + 1e-5).sqrt() * gain + bias).relu()
    return {"image": conv(x, "output_layer.2").tanh(), **found}


def told(g: Golden, state: dict[str, Tensor], steps: int = 1) -> list[Tensor]:
    """The class embedding, then that of the feature, as far as the golden network uses them; float64."""
    _, labels, feats = g.arguments()
    parts = [] if labels is None else [state["shared.weight"].double()[labels]]
    if feats is not None:
        w, u = state["shared_feat.weight"].double(), state["shared_feat.u0"]
        w = w / sigma(w, u, steps) if steps else w
        parts.append(feats.double() @ w.T + state["shared_feat.bias"].double())
    return parts


def roughened(g: Golden) -> dict[str, Tensor]:
    """The golden weights with rows of unlike lengths, so that no spectrally normed one has norm 1.

    Three of the four golden networks have orthogonal weights: their sigma is 1 after any number of rounds,
    and their numbers alone would not show a wrong one. (bigbigan128 has other weights.)
    """
    generator = torch.Generator().manual_seed(0)
    state = dict(g.state)
    for key in [k.replace(".u0", ".weight") for k in g.state if k.endswith(".u0")]:
        rows = torch.rand(len(state[key]), generator=generator) + 0.5
        state[key] = state[key] * rows.view(-1, *[1] * (state[key].dim() - 1))
    return state


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_power_iteration_is_divided_out(name, tmp_path):
    g = golden(name)
    z = g.inputs["z"]
    eps = g.flags["BN_eps"]
    for key, value in reference(g.state, told(g, g.state), z, hier=True, eps=eps).items():
        assert (value - g.out[key]).abs().max() < 1e-5, key  # the float64 arithmetic is the published one
    state = roughened(g)
    ours = outputs(converted(tmp_path, state, g.settings()), *g.arguments())
    for steps in (0, 1, 2):
        expected = reference(state, told(g, state, steps), z, hier=True, eps=eps, steps=steps)
        worst = max((ours[k] - v).abs().max().item() for k, v in expected.items())
        assert worst < 2e-5 if steps == 1 else worst > 0.1


def test_two_power_iterations_or_none_miss_the_golden_numbers(tmp_path):
    """Of BigBiGAN, whose weights are not orthogonal."""
    g = golden("bigbigan128")
    two = dict(g.state)
    for key in [k for k in g.state if k.endswith(".u0")]:
        weight = g.state[key.replace(".u0", ".weight")].flatten(1)
        two[key] = (g.state[key] @ weight) @ weight.T
    none = {k: v for k, v in g.state.items() if not k.endswith((".u0", ".sv0"))}
    for state in (two, none):
        ours = outputs(converted(tmp_path, state, g.settings()), *g.arguments())
        assert (ours["image"] - g.out["image"]).abs().max() > 0.1
        assert (ours["block0"] - g.out["block0"]).abs().max() > 0.1


def test_the_converted_weights_one_by_one(tmp_path):
    g = golden("bigbigan128")
    weights = converted(tmp_path, g.state, g.settings()).state_dict()

    def weight(key: str) -> Tensor:
        value = g.state[f"{key}.weight"]
        return value.double() / sigma(value, g.state[f"{key}.u0"])

    def equal(ours: str, expected: Tensor) -> None:
        torch.testing.assert_close(weights[ours].double(), expected.double(), rtol=1e-6, atol=1e-9)

    equal("blocks.1.conv1.weight", weight("blocks.1.0.conv1"))
    equal("blocks.2.shortcut.weight", weight("blocks.2.0.conv_sc"))
    equal("blocks.0.norm2.shift.weight", weight("blocks.0.0.bn2.bias"))
    equal("linear.weight", weight("linear"))
    equal("conv.weight", weight("output_layer.2"))
    equal("blocks.3.attention.key.weight", weight("blocks.3.1.phi"))
    equal("blocks.3.attention.out.weight", weight("blocks.3.1.o") * g.state["blocks.3.1.gamma"])
    inverse = (g.state["blocks.1.0.bn1.stored_var"].double() + 1e-4).rsqrt()
    equal("blocks.1.norm1.scale.weight", weight("blocks.1.0.bn1.gain") * inverse[:, None])
    equal("blocks.1.norm1.scale.bias", inverse)
    equal("blocks.1.norm1.mean", g.state["blocks.1.0.bn1.stored_mean"])
    inverse = (g.state["output_layer.0.stored_var"].double() + 1e-5).rsqrt()  # not 1e-4 here
    equal("norm.scale", g.state["output_layer.0.gain"] * inverse)
    equal("classes.weight", g.state["shared.weight"][:1])  # trained without classes: row 0 alone
    assert not [k for k in weights if k.endswith(("u0", "sv0", "var", "gamma"))]
    other = converted(tmp_path, g.state, g.settings(BN_eps=1e-5)).state_dict()
    assert not torch.allclose(
        other["blocks.1.norm1.scale.bias"], weights["blocks.1.norm1.scale.bias"], rtol=1e-6
    )


def test_spectral_norm_against_loops():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, 2, 2, generator=generator, dtype=torch.float64)
    u = torch.randn(1, 5, generator=generator, dtype=torch.float64)
    rows, start = weight.flatten(1).tolist(), u[0].tolist()
    v = [sum(a * row[j] for a, row in zip(start, rows, strict=True)) for j in range(12)]
    v = [x / sum(y * y for y in v) ** 0.5 for x in v]
    back = [sum(a * b for a, b in zip(row, v, strict=True)) for row in rows]
    u_ = [x / sum(y * y for y in back) ** 0.5 for x in back]
    expected = sum(v[j] * rows[i][j] * u_[i] for i in range(5) for j in range(12))
    assert spectral_norm(weight, u, 1e-12).item() == pytest.approx(expected, rel=1e-12)
    assert sigma(weight, u, 1).item() == pytest.approx(expected, rel=1e-12)
    top = torch.linalg.matrix_norm(weight.flatten(1), 2).item()
    assert sigma(weight, u, 500).item() == pytest.approx(top, rel=1e-9)
    assert abs(expected / top - 1) > 0.01


def test_logged_singular_values_are_ignored(case, tmp_path):
    first = converted(tmp_path, case.state, case.settings()).state_dict()
    state = {k: torch.full_like(v, 7.0) if k.endswith("sv0") else v for k, v in case.state.items()}
    again = converted(tmp_path, state, case.settings()).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_without_a_hierarchical_latent(tmp_path):
    """Cut from the golden network: every block is told of the class alone."""
    g = golden("biggan_hier64")
    state = {k: v[:, :24] if ".bn" in k and k.endswith(".weight") else v for k, v in roughened(g).items()}
    network = converted(tmp_path, state, g.settings(hier=False))
    assert not network.spec.hierarchical
    assert network.spec.dim_z == 16
    z, labels = g.inputs["z"][:, :16], g.inputs["y"]
    ours = outputs(network, z, labels, None)
    expected = reference(state, told(g, state), z, hier=False, eps=1e-5)
    assert ours.keys() == expected.keys()
    assert all((ours[k] - expected[k]).abs().max() < 2e-5 for k in ours)
    refused(lambda: converted(tmp_path, state, g.settings(hier=True)), "hier True", "hier False")


def test_without_spectral_norm(tmp_path):
    g = golden("biggan_hier64")
    state = {k: v for k, v in roughened(g).items() if not k.endswith((".u0", ".sv0"))}
    ours = outputs(converted(tmp_path, state, g.settings(G_param="none")), *g.arguments())
    expected = reference(state, told(g, state), g.inputs["z"], hier=True, eps=1e-5, steps=0)
    assert (ours["image"] - expected["image"]).abs().max() < 2e-5
    refused(lambda: converted(tmp_path, state, g.settings(G_param="SN")), "G_param none, not SN")


# --- settings -----------------------------------------------------------------------------------------------


def test_sizes_are_read_from_shapes(tmp_path):
    common = {"bottom": 4, "latent": 16, "hierarchical": True, "attention": (2,)}
    expected = {
        "biggan_hier64": BigGanSpec(channels=(64, 64, 32, 16, 8), classes=10, class_width=24, **common),
        "bigbigan128": BigGanSpec(
            channels=(64, 64, 32, 16, 8, 4), latent=20, attention=(3,), classes=1, class_width=24
        ),
        "icgan_biggan64_instance": BigGanSpec(
            channels=(64, 64, 32, 16, 8), features=2048, feature_width=24, **common
        ),
        "icgan_biggan64_class_instance": BigGanSpec(
            channels=(64, 64, 32, 16, 8),
            classes=10,
            class_width=20,
            features=2048,
            feature_width=24,
            **common,
        ),
    }
    for name, spec in expected.items():
        g = golden(name)
        assert converted(tmp_path, g.state, g.settings()).spec == spec
        assert spec.dim_z == g.flags["dim_z"]
        assert spec.size == g.flags["resolution"]
        assert from_json(BigGanSpec, json.loads(json.dumps(to_json(spec)))) == spec


@pytest.mark.parametrize(
    ("flag", "wrong", "right"),
    [
        ("resolution", 128, "64"),
        ("bottom_width", 8, "4"),
        ("G_ch", 96, "4"),
        ("G_attn", "64", "32"),
        ("G_attn", "32_64", "32"),
        ("G_attn", "0", "32"),
        ("dim_z", 120, "80"),
        ("shared_dim", 128, "20"),
        ("shared_dim_feat", 512, "24"),
        ("n_classes", 1000, "10"),
        ("cross_replica", False, "True"),
        ("G_param", "none", "SN"),
    ],
)
def test_a_given_size_must_agree(flag, wrong, right, case, tmp_path):
    text = refused(lambda: converted(tmp_path, case.state, case.settings(**{flag: wrong})), f"{flag} {right}")
    assert f"not {wrong}" in text


def test_sizes_may_be_given_as_training_was_told(case, tmp_path):
    # dim_z is rounded down to pieces, 0 means "not said", attention at sizes that are not there is none.
    network = converted(
        tmp_path, case.state, case.settings(dim_z=84, shared_dim=0, G_attn="32_128", resolution=64)
    )
    assert network.spec.dim_z == 80


def test_an_ambiguous_condition_must_be_said(case, tmp_path):
    """With a class embedding as wide as a piece of the latent, feature + class and feature + piece look alike."""
    state = {**case.state, "shared.weight": case.state["shared.weight"][:, :16].contiguous()}
    refused(
        lambda: converted(tmp_path, state, case.settings()),
        "2 ways",
        "class_cond False, instance_cond True, hier True",
    )
    refused(lambda: converted(tmp_path, state, case.settings(instance_cond=True)), "2 ways")
    for said in ({"class_cond": False}, {"hier": True}):
        ours = outputs(converted(tmp_path, state, case.settings(**said)), *case.arguments())
        assert (ours["image"] - case.out["image"]).abs().max() < 1e-4
    other = converted(tmp_path, state, case.settings(hier=False)).spec
    assert (other.classes, other.hierarchical, other.condition) == (10, False, 40)


def test_wrong_conditions_are_named(case, tmp_path):
    refused(
        lambda: converted(tmp_path, case.state, case.settings(class_cond=True)), "class_cond True", "From the"
    )
    refused(
        lambda: converted(tmp_path, case.state, case.settings(instance_cond=False)), "instance_cond False"
    )
    both = golden("icgan_biggan64_class_instance").state
    refused(lambda: converted(tmp_path, both, {"layout": "biggan-pytorch"}), "does not fit the layout")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "layout"),
        ({"layout": "BigGAN"}, "icgan"),
        ({"layout": "icgan", "G_chh": 4}, "G_ch"),
        ({"layout": "icgan", "mybn": True}, "mybn"),
        ({"layout": "icgan", "norm_style": "gn"}, "norm_style"),
    ],
)
def test_unusable_settings(settings, words, case, tmp_path):
    refused(lambda: converted(tmp_path, case.state, settings), words)


def test_cross_replica_is_refused_where_its_evaluation_is_broken(case, tmp_path):
    g = golden("biggan_hier64")
    refused(lambda: converted(tmp_path, g.state, g.settings(cross_replica=True)), "adds", "gain")
    refused(lambda: converted(tmp_path, case.state, {"layout": "biggan-pytorch"}), "adds", "layout icgan")


# --- files --------------------------------------------------------------------------------------------------


def test_files_folders_and_wrappers(case, tmp_path):
    settings = case.settings()
    first = converted(tmp_path, case.state, settings).state_dict()
    folder = tmp_path / "archive" / "icgan_res64"
    folder.mkdir(parents=True)
    save_file(case.state, tmp_path / "G.safetensors")
    torch.save({f"module.{k}": v for k, v in case.state.items()}, folder / "state_dict_G_ema_best0.pth")
    torch.save({"state": {}}, folder / "G_optim.pth")
    torch.save({"state_dict": case.state}, tmp_path / "wrapped.pt")
    for path in (tmp_path / "G.safetensors", tmp_path / "archive", tmp_path / "wrapped.pt"):
        weights, _ = convert(path, settings)
        assert weights.keys() == first.keys()
        assert all(torch.equal(weights[k], first[k]) for k in first)
    torch.save(case.state, folder / "G_ema_copy.pth")
    refused(lambda: convert(tmp_path / "archive", settings), "2 files", "G_ema_copy.pth")
    refused(lambda: convert(tmp_path / "nothing", settings), "no file")
    (tmp_path / "empty").mkdir()
    refused(lambda: convert(tmp_path / "empty", settings), "0 files")


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (Path("PWNED"),))  # type: ignore[return-value]


def test_damaged_and_foreign_files(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "G_ema.pth"
    torch.save(case.state, path)
    cut(path, 0.6)
    refused(lambda: convert(path, case.settings()), "cannot be read")
    path.write_bytes(b"")
    refused(lambda: convert(path, case.settings()), "cannot be read")
    path.write_text("<html>404</html>")
    refused(lambda: convert(path, case.settings()), "cannot be read")
    path.write_bytes(pickle.dumps({"a": Evil()}))
    refused(lambda: convert(path, case.settings()), "cannot be read")
    torch.save({"a": Evil()}, path)
    refused(lambda: convert(path, case.settings()), "cannot be read")
    assert not (tmp_path / "PWNED").exists()
    torch.save({"epoch": 3}, path)
    refused(lambda: convert(path, case.settings()), "no state dict")
    torch.save([torch.zeros(2)], path)
    refused(lambda: convert(path, case.settings()), "no state dict")
    torch.save({"blocks.0.0.conv1.weight": torch.zeros(4, 3, 3, 3), "embed.weight": torch.zeros(2, 2)}, path)
    refused(lambda: convert(path, case.settings()), "no generator", "discriminator")
    save_file(case.state, tmp_path / "G.safetensors")
    cut(tmp_path / "G.safetensors", 0.5)
    refused(lambda: convert(tmp_path / "G.safetensors", case.settings()), "cannot be read")


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("blocks.1.0.conv2.weight", None, "is missing"),
        ("blocks.3.0.bn2.bn.running_var", None, "is missing"),
        ("shared.weight", None, "shared embedding"),
        ("blocks.0.0.extra.weight", lambda _: torch.zeros(2), "does not have (blocks.0.0.extra.weight)"),
        ("blocks.1.0.conv2.weight", lambda v: v[0], "is torch.float32 (32, 3, 3)"),
        ("blocks.1.0.conv2.weight", lambda v: v * float("nan"), "NaN"),
        ("blocks.1.0.conv2.u0", lambda v: v[:, 1:], "u0"),
        ("blocks.1.0.bn1.bn.running_var", lambda v: v[1:], "does not fit together"),
        ("blocks.1.0.conv_sc.weight", lambda v: v[:, 1:], "blocks.1.shortcut.weight"),
        ("blocks.2.0.bn2.bn.running_var", lambda v: v - 100, "NaN"),
        ("output_layer.0.bn.bias", lambda v: v[1:], "norm.shift"),
    ],
)
def test_damaged_states(key, change, words, case, tmp_path):
    state = dict(case.state)
    if change is None:
        del state[key]
    else:
        state[key] = change(state.get(key))
    refused(lambda: converted(tmp_path, state, case.settings()), words)
