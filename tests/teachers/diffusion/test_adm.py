"""Published diffusion networks: every golden number of ADM, the two orders of qkv, what flags and files may be."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreamteacher.runtime.errors import UserError
from dreamteacher.teachers.diffusion import adm
from dreamteacher.teachers.diffusion import teacher as diffusion
from dreamteacher.teachers.diffusion.teacher import (
    DiffusionSpec,
    DiffusionTeacher,
    alphas_cumprod,
    build_unet,
    load,
    noised,
    q_sample,
)
from dreamteacher.teachers.diffusion.walk import decoder_maps, decoder_outputs
from dreamteacher.teachers.registry import load_teacher, save_teacher
from dreamteacher.testing import check_teacher
from tests.builders.pixel_features import pixel_features
from tests.places import GOLDEN

NETWORKS = [
    "adm_legacy",
    "adm_legacy_nonsquare",
    "adm_new_order_classcond",
    "adm_fixed_heads",
    "adm_conv_resample",
    "adm_half_first_mult",
]
NEEDED = ("image_size", "noise_schedule", "use_new_attention_order", "num_head_channels", "num_heads")


# --- golden files -----------------------------------------------------------------------------------------------


@functools.cache
def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """Inputs and expected values, the published flags, the state dict of a golden file."""
    path = GOLDEN / f"{name}.safetensors"
    with safe_open(path, framework="pt") as file:
        meta = file.metadata()
    tensors = load_file(path)
    flags = {**json.loads(meta["flags"]), "noise_schedule": meta["noise_schedule"]} if "flags" in meta else {}
    flags["learn_sigma"] = meta.get("learn_sigma") == "true"
    weights = {k.removeprefix("sd."): v for k, v in tensors.items() if k.startswith("sd.")}
    rest = {k: v for k, v in tensors.items() if not k.startswith("sd.")}
    return rest, flags, weights or golden("adm_legacy")[2]


@functools.cache
def network(name: str, **changes: Any) -> tuple[UNet2DModel, DiffusionSpec]:
    """The converted network of a golden file, in float32."""
    _, flags, weights = golden(name)
    found, spec = converted(weights, flags | changes)
    with torch.device("meta"):
        unet = build_unet(spec)
    unet.load_state_dict({k: v.float() for k, v in found.items()}, assign=True)
    return unet.eval().requires_grad_(False), spec


def converted(weights: dict[str, Tensor], flags: dict[str, Any]) -> tuple[dict[str, Tensor], DiffusionSpec]:
    """`adm.convert` of weights in memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adm.checkpoint, "read_state_dict", lambda path: dict(weights))
        return adm.convert(Path("network.pt"), flags)


def thin(m: Tensor) -> Tensor:
    """Maps of golden files are cut by their longer side (shared rule of all files)."""
    every = 8 if max(m.shape[-2:]) > 32 else 4 if max(m.shape[-2:]) > 16 else 1
    return m[..., ::every, ::every]


def full_forward(unet: UNet2DModel, x: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Oracle: the network's own forward and, by hooks, the map before each upsampler, coarse to fine."""
    caught: dict[int, Tensor] = {}
    hooks = []
    for i, block in enumerate(unet.up_blocks):
        attentions = getattr(block, "attentions", None)
        last = attentions[-1] if attentions else block.resnets[-1]
        hooks.append(last.register_forward_hook(lambda _m, _a, out, i=i: caught.__setitem__(i, out)))
    sample = unet(x, t, class_labels=y).sample
    for hook in hooks:
        hook.remove()
    return sample, [caught[i] for i in range(len(caught))]


@pytest.mark.parametrize("name", NETWORKS)
def test_golden(name):
    values, _, _ = golden(name)
    unet, spec = network(name)
    tolerance = 5e-4 if name.startswith("adm_legacy") else 1e-4
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=tolerance)
    t, y = values["in.t"], values.get("in.y")
    bar = alphas_cumprod(spec.schedule)[t].float()
    x = values["in.x_t"]
    torch.testing.assert_close(q_sample(values["in.x0"], bar, values["in.noise"]), x, rtol=0, atol=1e-5)
    sample, before = full_forward(unet, x, t, y)
    close(sample, values["out.sample"])
    levels, a_level = len(unet.up_blocks), len(unet.up_blocks[0].resnets)
    ends = [a_level * (i + 1) - 1 for i in range(levels)]
    maps = decoder_maps(unet, x, t, levels, labels=y)
    after = decoder_outputs(unet, x, t, tuple(ends), labels=y)
    checked = 0
    for k, ours, whole in zip(ends, maps, after, strict=True):
        for value, kind in ((ours, "pre_up"), (whole, "post_up")):
            if f"out.dec{k}.{kind}" in values:
                close(thin(value), values[f"out.dec{k}.{kind}"])
                checked += 1
    assert checked == sum(k.startswith("out.dec") for k in values) == 2 * levels - 1
    # Early exit at every level: the same numbers as the full forward.
    assert all(map(torch.equal, maps, before))
    for count in range(1, levels):
        assert all(map(torch.equal, decoder_maps(unet, x, t, count, labels=y), before[:count]))


def test_golden_schedules():
    values, _, _ = golden("adm_legacy")
    for schedule in ("linear", "cosine"):
        expected = values[f"out.alphas_cumprod.{schedule}"]
        torch.testing.assert_close(alphas_cumprod(schedule), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["adm_legacy", "adm_new_order_classcond", "adm_fixed_heads"])
def test_the_wrong_qkv_order_is_far_off(name):
    values, flags, _ = golden(name)
    unet, _ = network(name, use_new_attention_order=not flags["use_new_attention_order"])
    found = unet(values["in.x_t"], values["in.t"], class_labels=values.get("in.y")).sample
    assert (found - values["out.sample"]).abs().max() > 0.1


@pytest.mark.parametrize("which", ["analogous", "literal"])
def test_golden_pixel_features(which):
    values, _, _ = golden("ddpm_seg_features")
    unet, spec = network("adm_legacy")
    steps = (50, 150, 250)
    x = noised(values["in.x0"], alphas_cumprod(spec.schedule)[list(steps)], values["in.noise"])
    blocks = tuple(values[f"in.{which}.blocks"].tolist())
    found = pixel_features(unet, x, torch.tensor(steps), steps=3, blocks=blocks, size=(64, 64))
    assert found.shape == (1, 384, 64, 64)
    row, column = values["in.positions"].T
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=5e-4)
    close(found[0][:, row, column].T, values[f"out.{which}.features"])
    close(found.mean((0, 2, 3)), values[f"out.{which}.channel_mean"])
    close(found.flatten(2).std(2, correction=0)[0], values[f"out.{which}.channel_std"])


def test_golden_pixel_features_are_the_levels_that_an_interpreter_reads(monkeypatch):
    """`blocks` of a teacher: each stride's blocks side by side, step by step; made large they are the golden ones."""
    values, _, _ = golden("ddpm_seg_features")
    unet, spec = network("adm_legacy")
    steps, blocks = (50, 150, 250), tuple(values["in.analogous.blocks"].tolist())
    teacher = DiffusionTeacher(unet, spec, name="golden", licence="none", timesteps=steps, blocks=blocks)
    teacher.keep_only("encode")
    monkeypatch.setattr(diffusion, "draw_noise", lambda *_: values["in.noise"])
    maps = teacher.encode((values["in.x0"] + 1) / 2, generator=torch.Generator())
    large = [torch.nn.functional.interpolate(m, (64, 64), mode="bilinear", align_corners=False) for m in maps]
    by_step = [m.chunk(3, dim=1) for m in reversed(large)]  # coarse levels hold the earlier blocks
    found = torch.cat([level[t] for t in range(3) for level in by_step], dim=1)
    assert [s.stride for s in teacher.specs] == sorted({s.stride for s in teacher.specs})
    row, column = values["in.positions"].T
    torch.testing.assert_close(
        found[0][:, row, column].T, values["out.analogous.features"], rtol=0, atol=5e-4
    )


# --- flags ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_what_the_weights_tell_need_not_be_said(name):
    _, flags, weights = golden(name)
    few, few_spec = converted(weights, {k: v for k, v in flags.items() if k in NEEDED})
    whole, spec = converted(weights, flags)
    assert few_spec == spec
    assert few.keys() == whole.keys()
    assert all(torch.equal(v, whole[k]) for k, v in few.items())
    assert {v.dtype for v in whole.values()} == {torch.float16}  # as published, nothing rounded


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_channels": 64}, "model_channels is 64, .* have 32"),
        ({"channel_mult": [1, 1, 1, 1, 1, 2]}, "channel_mult"),
        ({"num_res_blocks": 2}, "num_res_blocks is 2, .* have 1"),
        ({"attention_resolutions": [16, 32]}, r"attention_resolutions is \(16, 32\), .* have \(8, 16, 32\)"),
        ({"num_classes": 1000}, "num_classes is 1000, .* have 0"),
        ({"learn_sigma": False}, "learn_sigma"),
        ({"out_channels": 3}, "out_channels"),
        ({"resblock_updown": False}, "resblock_updown"),
        ({"use_scale_shift_norm": False}, "use_scale_shift_norm"),
        ({"num_head_channels": 12}, "heads of 12 channels over 32"),
        ({"num_head_channels": -1, "num_heads": 5}, "5 heads over 32"),
        ({"num_heads_upsample": 4}, "4 in the decoder"),
        ({"image_size": None}, "do not say: image_size"),
        (
            {"noise_schedule": None, "use_new_attention_order": None},
            "noise_schedule, use_new_attention_order",
        ),
        ({"num_heads": None, "num_head_channels": None}, "num_head_channels or num_heads"),
        ({"noise_schedule": "scaled_linear"}, "scaled_linear"),
        ({"image_size": "64"}, "'64'"),
        ({"num_channels": 32}, "no setting 'num_channels'"),
    ],
)
def test_flags_that_contradict_the_weights(changes, words):
    _, flags, weights = golden("adm_legacy")
    with pytest.raises(UserError, match=words) as caught:
        converted(weights, flags | changes)
    assert len(str(caught.value).splitlines()) <= 3


# --- files ------------------------------------------------------------------------------------------------------


def changed(key: str, value: Tensor | None) -> dict[str, Tensor]:
    weights = {**golden("adm_legacy")[2], key: torch.zeros(0) if value is None else value}
    return weights if value is not None else {k: v for k, v in weights.items() if k != key}


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (lambda: {"a": torch.zeros(1)}, "lacks 'time_embed.0.weight'"),
        (lambda: changed("time_embed.0.weight", torch.zeros(3)), r"'time_embed.0.weight' has the shape \(3,\)"),
        (lambda: changed("out.2.bias", None), "lacks 'out.2.bias'"),
        (lambda: changed("middle_block.1.qkv.weight", None), "lacks 'middle_block.1.qkv.weight'"),
        (lambda: changed("output_blocks.3.0.in_layers.2.weight", torch.zeros(32, 48, 3, 3)), r"32, 48, 3, 3\), not"),
        (lambda: changed("output_blocks.6.1.in_layers.2.weight", torch.zeros(1)), "levels of one length"),
        (lambda: changed("extra.weight", torch.zeros(1)), "'extra.weight' has no place"),
        (lambda: {k: v for k, v in golden("adm_legacy")[2].items() if "output" not in k}, "0 output_blocks"),
        (lambda: changed("input_blocks.0.0.weight", torch.zeros(32, 6, 3, 3)), "6 channels, not an image"),
    ],
)  # fmt: skip
def test_weights_of_another_network_are_named(weights, words):
    flags = {k: v for k, v in golden("adm_legacy")[1].items() if k in NEEDED}
    with pytest.raises(UserError, match=words) as caught:
        converted(weights(), flags)
    assert len(str(caught.value).splitlines()) <= 3


def test_files_are_read_and_damaged_ones_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, flags, weights = golden("adm_fixed_heads")
    torch.save(weights, tmp_path / "n.pt")
    save_file(weights, tmp_path / "n.safetensors")
    whole, _ = converted(weights, flags)
    for name in ("n.pt", "n.safetensors"):
        found, _ = adm.convert(tmp_path / name, flags)
        assert all(torch.equal(v, whole[k]) for k, v in found.items())
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
    (tmp_path / "text.pt").write_text("nothing")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "hostile.pt").write_bytes((GOLDEN / "hostile_builtins_eval.pkl").read_bytes())
    for name in ("n.pt", "n.safetensors", "text.pt", "list.pt", "hostile.pt", "absent.pt", "."):
        with pytest.raises(UserError) as caught:
            adm.convert(tmp_path / name, flags)
        assert str(tmp_path) in str(caught.value)
        assert len(str(caught.value).splitlines()) <= 3
    assert not (tmp_path / "PWNED").exists()


# --- the published networks -------------------------------------------------------------------------------------


def adm_shapes(
    mult: tuple[float, ...], *, channels: int, blocks: int, attention: tuple[int, ...], classes: int = 0
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a guided-diffusion state dict (residual resampling, scale-shift norm, learned sigma),
    written down as that network is built: block after block, with the stack of skip widths.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    width = 4 * channels

    def layer(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    def residual(name: str, given: int, made: int) -> None:
        layer(f"{name}.in_layers.0", given)
        layer(f"{name}.in_layers.2", made, given, 3, 3)
        layer(f"{name}.emb_layers.1", 2 * made, width)
        layer(f"{name}.out_layers.0", made)
        layer(f"{name}.out_layers.3", made, made, 3, 3)
        if given != made:
            layer(f"{name}.skip_connection", made, given, 1, 1)

    def attend(name: str, c: int) -> None:
        layer(f"{name}.norm", c)
        layer(f"{name}.qkv", 3 * c, c, 1)
        layer(f"{name}.proj_out", c, c, 1)

    layer("time_embed.0", width, channels)
    layer("time_embed.2", width, width)
    if classes:
        shapes["label_emb.weight"] = (classes, width)
    now = int(mult[0] * channels)
    layer("input_blocks.0.0", now, 3, 3, 3)
    skips, k = [now], 0
    for i, m in enumerate(mult):
        for _ in range(blocks):
            k += 1
            residual(f"input_blocks.{k}.0", now, now := int(m * channels))
            if 2**i in attention:
                attend(f"input_blocks.{k}.1", now)
            skips.append(now)
        if i + 1 < len(mult):
            k += 1
            residual(f"input_blocks.{k}.0", now, now)
            skips.append(now)
    residual("middle_block.0", now, now)
    attend("middle_block.1", now)
    residual("middle_block.2", now, now)
    k = -1
    for i, m in reversed(list(enumerate(mult))):
        for j in range(blocks + 1):
            k += 1
            residual(f"output_blocks.{k}.0", now + skips.pop(), now := int(m * channels))
            if 2**i in attention:
                attend(f"output_blocks.{k}.1", now)
            if i and j == blocks:
                residual(f"output_blocks.{k}.{2 if 2**i in attention else 1}", now, now)
    layer("out.0", now)
    layer("out.2", 6, now, 3, 3)
    return shapes


@pytest.mark.parametrize(
    ("millions", "mult", "channels", "blocks", "attention", "classes", "flags"),
    [
        (296, (1, 2, 3, 4), 192, 3, (2, 4, 8), 1000, {"image_size": 64, "use_new_attention_order": True}),
        (422, (1, 1, 2, 3, 4), 256, 2, (4, 8, 16), 1000, {"image_size": 128, "num_heads": 4}),
        (554, (1, 1, 2, 2, 4, 4), 256, 2, (8, 16, 32), 1000, {"image_size": 256}),
        (553, (1, 1, 2, 2, 4, 4), 256, 2, (8, 16, 32), 0, {"image_size": 256}),
        (559, (0.5, 1, 1, 2, 2, 4, 4), 256, 2, (16, 32, 64), 1000, {"image_size": 512}),
    ],
    ids=["64", "128", "256", "256-uncond", "512"],
)
def test_the_published_networks(millions, mult, channels, blocks, attention, classes, flags):
    shapes = adm_shapes(mult, channels=channels, blocks=blocks, attention=attention, classes=classes)
    weights = {k: torch.empty(s, device="meta") for k, s in shapes.items()}
    heads = {} if "num_heads" in flags else {"num_head_channels": 64}
    settings = {"noise_schedule": "linear", "use_new_attention_order": False, **heads, **flags}
    found, spec = converted(weights, settings)
    # Size as in the table of the paper (Dhariwal & Nichol 2021), in millions.
    assert round(sum(v.numel() for v in found.values()) / 1e6) == millions
    with torch.device("meta"):
        teacher = DiffusionTeacher(build_unet(spec), spec, name="x", licence="-")
    assert {k: v.shape for k, v in teacher.unet.state_dict().items()} == {
        k: v.shape for k, v in found.items()
    }
    at = {4 * 2**i: int(m * channels) for i, m in enumerate(mult[2:])}
    assert {s.stride: s.channels for s in teacher.specs} == {s: c for s, c in at.items() if s <= 32}
    counts = {a.inner_dim // (4 if "num_heads" in flags else 64) for a in attentions(teacher.unet)}
    if "num_heads" in flags:
        assert {a.heads for a in attentions(teacher.unet)} == {4}
    else:
        assert {a.heads for a in attentions(teacher.unet)} == counts


def attentions(unet: UNet2DModel) -> list[Any]:
    return [m for m in unet.modules() if type(m).__name__ == "Attention"]


# --- as a teacher -----------------------------------------------------------------------------------------------


def tiny(folder: Path) -> None:
    """A converted ADM of 64 px with random weights: residual resampling, 3 classes, 2 heads everywhere."""
    shapes = adm_shapes((1,) * 6, channels=32, blocks=1, attention=(16, 32), classes=3)
    generator = torch.Generator().manual_seed(0)

    def fill(key: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            around = 1.0 if key.endswith("weight") else 0.0
            return around + 0.1 * torch.randn(shape, generator=generator)
        return torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5

    flags = {"image_size": 64, "noise_schedule": "linear", "use_new_attention_order": False, "num_heads": 2}
    weights, spec = converted({k: fill(k, s) for k, s in shapes.items()}, flags)
    save_teacher(folder, weights, spec, {"name": "tiny-adm", "licence": "CC0-1.0"}, half=False)


def test_a_converted_network_is_a_teacher(tmp_path):
    tiny(tmp_path)
    teacher = load_teacher(str(tmp_path), noise="fixed")
    assert isinstance(teacher, DiffusionTeacher)
    assert [(s.stride, s.channels) for s in teacher.specs] == [(4, 32), (8, 32), (16, 32), (32, 32)]
    assert not any(v.is_meta for v in [*teacher.parameters(), *teacher.buffers()])
    assert {a.heads for a in attentions(teacher.unet)} == {2}
    teacher.sampling_steps = 2
    check_teacher(teacher)
    before = teacher.encode(torch.ones(1, 3, 64, 64), generator=torch.Generator())
    teacher.keep_only("encode")
    check_teacher(teacher)
    again = teacher.encode(torch.ones(1, 3, 64, 64), generator=torch.Generator())
    assert all(map(torch.equal, before, again))


def test_a_converted_network_encodes_as_the_golden_maps_say(monkeypatch):
    values, _, _ = golden("adm_legacy")
    found, spec = converted(golden("adm_legacy")[2], golden("adm_legacy")[1])
    teacher = load(found, spec, Path("n"), name="n", licence="-", timesteps=(50,))
    monkeypatch.setattr(diffusion, "draw_noise", lambda x0, kind, generator: values["in.noise"][:1])
    maps = teacher.encode((values["in.x0"][:1] + 1) / 2, generator=torch.Generator())
    assert values["in.t"][0] == 50
    for level, k in zip(maps, (7, 5, 3, 1), strict=True):
        torch.testing.assert_close(thin(level), values[f"out.dec{k}.pre_up"][:1], rtol=0, atol=5e-4)


# --- folders of diffusers ---------------------------------------------------------------------------------------


def ddpm(**changes: Any) -> UNet2DModel:
    """A tiny network of the kind of google/ddpm-*-256: one head, padding 0, sines before cosines."""
    down, up = ["DownBlock2D"] * 2 + ["AttnDownBlock2D"], ["AttnUpBlock2D"] + ["UpBlock2D"] * 2
    settings = {
        "sample_size": 32, "block_out_channels": (8, 8, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": down, "up_block_types": up, "attention_head_dim": None, "downsample_padding": 0,
        "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6, **changes,
    }  # fmt: skip
    torch.manual_seed(0)
    return UNet2DModel(**settings).eval().requires_grad_(False)


def old_keys(folder: Path) -> None:
    """Rewrites a saved network as the first releases of diffusers wrote it: .bin, old names in attention."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    for new, old in names.items():
        weights = {k.replace(f".{new}.", f".{old}."): v for k, v in weights.items()}
    assert any("proj_attn" in k for k in weights)
    torch.save(weights, folder / "diffusion_pytorch_model.bin")
    (folder / "diffusion_pytorch_model.safetensors").unlink()


@pytest.mark.parametrize("layout", ["flat", "pipeline"])
@pytest.mark.parametrize("age", ["new", "old"])
def test_diffusers_folders(tmp_path, layout, age):
    unet, scheduler = ddpm(), DDPMScheduler()
    if layout == "pipeline":
        DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    else:
        unet.save_pretrained(tmp_path)
        scheduler.save_pretrained(tmp_path)
    if age == "old":
        old_keys(tmp_path / "unet" if layout == "pipeline" else tmp_path)
    weights, spec = adm.convert_diffusers(tmp_path, {"timestep": 77})
    assert (spec.size, spec.schedule, spec.steps, spec.timestep) == ((32, 32), "linear", 1000, 77)
    teacher = load(weights, spec, tmp_path, name="ddpm", licence="-", noise="none")
    assert [(s.stride, s.channels) for s in teacher.specs] == [(4, 16)]
    x = torch.rand(2, 3, 32, 32)
    t = torch.full((2,), 77)
    sample, maps = full_forward(unet.to(memory_format=torch.channels_last), x * 2 - 1, t, None)
    torch.testing.assert_close(teacher.epsilon(x * 2 - 1, t), sample, rtol=1e-4, atol=1e-4)
    (found,) = teacher.encode(x, generator=torch.Generator())
    torch.testing.assert_close(found, maps[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (DDPMScheduler(beta_schedule="squaredcos_cap_v2"), ("cosine", 1000)),
        (DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear"), ("scaled_linear", 1000)),
        (DDPMScheduler(500, 2e-4, 0.04), ("linear", 500)),
        (None, ("cosine", 1000)),
    ],
    ids=["cosine", "scaled-linear", "500 steps", "flag"],
)
def test_diffusers_schedules(tmp_path, scheduler, expected):
    ddpm(num_class_embeds=4).save_pretrained(tmp_path)
    if scheduler is not None:
        scheduler.save_pretrained(tmp_path)
    settings = {} if scheduler is not None else {"noise_schedule": "cosine"}
    weights, spec = adm.convert_diffusers(tmp_path, settings)
    assert (spec.schedule, spec.steps) == expected
    assert spec.classes == 4
    assert load(weights, spec, tmp_path, name="n", licence="-").unet.class_embedding.num_embeddings == 4
    if scheduler is not None:
        ours = alphas_cumprod(spec.schedule, spec.steps).float()
        torch.testing.assert_close(ours, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)


def spoil(file: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(change((folder / file).read_text())) and None


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json' cannot be read"),
        (spoil("config.json", lambda s: s[:50]), "config.json' cannot be read"),
        (spoil("config.json", lambda s: s.replace("UNet2DModel", "UNet2DConditionModel")), "not a UNet2DModel"),
        (spoil("config.json", lambda s: s.replace('"freq_shift"', '"frequency"')), "cannot be built"),
        (spoil("config.json", lambda s: s.replace('"sample_size": 32', '"sample_size": null')), "no sample_size"),
        (spoil("config.json", lambda s: s.replace('"in_channels": 3', '"in_channels": 4')), "4 channels"),
        (spoil("config.json", lambda s: s.replace('"layers_per_block": 1', '"layers_per_block": 2')), "does not fit"),
        (spoil("config.json", lambda s: s.replace("positional", "fourier")), "fourier"),
        (lambda f: (f / "diffusion_pytorch_model.safetensors").write_bytes(b"12"), "cannot be read"),
        (lambda f: (f / "diffusion_pytorch_model.safetensors").unlink(), "cannot be read"),
        (lambda f: (f / "scheduler_config.json").unlink(), "Give noise_schedule"),
        (spoil("scheduler_config.json", lambda s: s.replace("0.02", "0.03")), "linear from 0.0001 to 0.03"),
        (spoil("scheduler_config.json", lambda s: s.replace('"linear"', '"sigmoid"')), "schedule sigmoid"),
        (spoil("scheduler_config.json", lambda s: s.replace("epsilon", "v_prediction")), "v_prediction"),
        (spoil("scheduler_config.json", lambda s: s.replace("1000", '"many"')), "in many steps"),
    ],
)  # fmt: skip
def test_damaged_folders_are_named(tmp_path, damage, words):
    ddpm().save_pretrained(tmp_path)
    DDPMScheduler().save_pretrained(tmp_path)
    adm.convert_diffusers(tmp_path, {})
    damage(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        adm.convert_diffusers(tmp_path, {})
    assert len(str(caught.value).splitlines()) <= 3
