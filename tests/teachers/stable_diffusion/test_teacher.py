"""Stable Diffusion teachers: maps exactly the library's, nothing beyond the last level, published folders read.

The oracles are the library's own networks, schedulers and pipelines, whole and with random weights, and Pillow.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dreamteacher.runtime.config import from_json, to_json
from dreamteacher.teachers.registry import load_teacher, save_teacher
from dreamteacher.teachers.stable_diffusion.network import decoder_maps, time_ids
from dreamteacher.teachers.stable_diffusion.teacher import (
    StableDiffusionSpec,
    StableDiffusionTeacher,
    build_network,
    convert,
    load,
)
from dreamteacher.testing import check_teacher
from tests.builders.pictures import cut, refused
from tests.builders.stable_diffusion import (
    KL,
    STRIDES,
    TAESD,
    UNETS,
    make,
    spec_of,
    unet,
    weights_of,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_of(n: int, height: int, width: int) -> Tensor:
    return torch.rand(n, 3, height, width, generator=seeded(7))


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all((a - b).abs().max().item() == 0.0 for a, b in zip(ours, theirs, strict=True))


# --- the library as the oracle ------------------------------------------------------------------------------


def maps_of_full_forward(
    whole: UNet2DConditionModel, x: Tensor, t: Tensor, prompt: Tensor, pooled: Tensor | None, side: int
) -> list[Tensor]:
    """Outputs of the last module before each upsampler in the network's own whole forward, fine to coarse."""
    caught: dict[int, Tensor] = {}
    hooks = []
    for i, block in enumerate(whole.up_blocks):
        last = block.attentions[-1] if type(block).__name__.startswith("Cross") else block.resnets[-1]
        hooks.append(
            last.register_forward_hook(
                lambda _m, _a, out, i=i: caught.__setitem__(i, out if torch.is_tensor(out) else out[0])
            )
        )
    added = None
    if pooled is not None:  # what the SDXL pipeline passes: original size, crop, target size; in pixels
        height, width = (s * side for s in x.shape[-2:])
        ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
        added = {"text_embeds": pooled.expand(len(x), -1), "time_ids": ids.expand(len(x), -1)}
    with torch.no_grad():
        whole(x, t, encoder_hidden_states=prompt.expand(len(x), -1, -1), added_cond_kwargs=added)
    for hook in hooks:
        hook.remove()
    return [caught[i] for i in reversed(range(len(caught)))]


def whole_unet(teacher: StableDiffusionTeacher) -> UNet2DConditionModel:
    """The library's network with the teacher's weights and an end of its own."""
    with torch.random.fork_rng(devices=[]):
        whole = UNet2DConditionModel(**teacher.spec.unet)
    left = whole.load_state_dict(teacher.network.unet.state_dict(), strict=False)
    assert not left.unexpected_keys
    assert all(k.startswith(("conv_out", "conv_norm_out", "up_blocks")) for k in left.missing_keys)
    return whole.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", UNETS)
def test_maps_equal_the_full_forward(kind):
    teacher = make(kind)
    whole = whole_unet(teacher)
    assert tuple(s.stride for s in teacher.specs) == STRIDES[kind]
    assert [s.channels for s in teacher.specs] == UNETS[kind]["block_out_channels"]
    pooled = teacher.network.pooled if teacher.network.xl else None
    for size in ((64, 64), (32, 96)):
        images = images_of(2, *size)
        maps = teacher.encode(images, generator=seeded(5))
        x0 = teacher.latents(images)
        a = teacher.alpha_bar[150].float()
        noise = torch.randn(x0.shape, generator=seeded(5))
        x = (a.sqrt() * x0 + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        theirs = maps_of_full_forward(whole, x, torch.tensor(150), teacher.network.prompt, pooled, 8)
        assert same(maps, theirs)
        assert [m.shape for m in maps] == [s.shape(2, size) for s in teacher.specs]
        assert all(m.std() > 1e-2 for m in maps)


def test_what_the_prompt_and_the_size_say_reaches_the_maps():
    teacher = make("sdxl", noise="none")
    images = images_of(1, 64, 64)
    before = teacher.encode(images, generator=seeded())
    teacher.network.prompt += 1
    after = teacher.encode(images, generator=seeded())
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(after, before, strict=True))
    teacher.network.prompt -= 1
    teacher.network.pooled += 1
    after = teacher.encode(images, generator=seeded())
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(after, before, strict=True))
    assert time_ids(96, 128, images.device, images.dtype).tolist() == [[96, 128, 0, 0, 96, 128]]


@pytest.mark.parametrize(("kind", "enlarge"), [("sd1", 2), ("sd1", 4), ("sdxl", 2), ("sd2", 1)])
def test_nothing_runs_after_the_last_level_and_nothing_else_is_kept(kind, enlarge):
    teacher = make(kind, options={"enlarge": enlarge})
    calls: list[str] = []
    for name, module in teacher.network.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_hook(lambda _m, _a, _o, name=name: calls.append(name))
    teacher.encode(images_of(1, 64, 64), generator=seeded())
    kept = {k.rpartition(".")[0] for k in teacher.network.state_dict()} - {""}  # without the prompt
    assert len(calls) == len(set(calls))
    assert set(calls) == kept
    strides = {1: (8, 16, 32), 2: STRIDES[kind], 4: (4, 8, 16)}[enlarge]
    assert tuple(s.stride for s in teacher.specs) == strides
    assert ("unet.up_blocks.3.resnets.0.conv1" in kept) == (kind != "sdxl" and enlarge < 4)
    assert "unet.up_blocks.2.upsamplers.0.conv" not in kept or enlarge < 4
    assert (
        teacher.multiple == {("sd1", 2): 32, ("sd1", 4): 16, ("sdxl", 2): 16, ("sd2", 1): 64}[kind, enlarge]
    )


def test_walk_compiles_without_graph_breaks():
    config = unet(
        [8, 8], [False, True], cross_attention_dim=6, addition_embed_type="text_time",
        addition_time_embed_dim=2, projection_class_embeddings_input_dim=5 + 6 * 2,
    )  # fmt: skip
    network = load(weights_of(spec := spec_of(unet=config)), spec, Path("-"), name="-", licence="-").network
    compiled = torch.compile(decoder_maps, fullgraph=True, backend="eager")
    x, t, added = (
        torch.rand(1, 4, 8, 8),
        torch.tensor([7]),
        (network.pooled, time_ids(64, 64, torch.device("cpu"), torch.float32)),
    )
    with torch.no_grad():
        ours, plain = (f(network.unet, x, t, network.prompt, 2, added) for f in (compiled, decoder_maps))
        assert same(ours, plain)


# --- latents ------------------------------------------------------------------------------------------------


def enlarged(images: Tensor, times: int) -> Tensor:
    """By Pillow, channel by channel, clamped."""
    n, c, h, w = images.shape
    out = torch.empty(n, c, h * times, w * times)
    for i in range(n):
        for j in range(c):
            plane = Image.frombytes("F", (w, h), images[i, j].contiguous().numpy().tobytes())
            large = plane.resize((w * times, h * times), Image.Resampling.BICUBIC)
            values = torch.frombuffer(bytearray(large.tobytes()), dtype=torch.float32)
            out[i, j] = values.view(h * times, w * times).clamp(0, 1)
    return out


@pytest.mark.parametrize("vae_kind", ["kl", "tiny"])
@pytest.mark.parametrize("enlarge", [1, 2])
def test_latents_are_the_library_s(vae_kind, enlarge):
    vae = {"kl": KL | {"scaling_factor": 0.3}, "tiny": TAESD}[vae_kind]
    scale = {"kl": 0.3, "tiny": 1.0}[vae_kind]
    options = {"vae": vae, "vae_kind": vae_kind, "enlarge": enlarge, "scaling_factor": scale}
    teacher = make(options=options)
    with torch.random.fork_rng(devices=[]):
        whole = (AutoencoderTiny if vae_kind == "tiny" else AutoencoderKL)(**vae)
    left = whole.load_state_dict(teacher.network.vae.state_dict(), strict=False)
    assert all(k.startswith(("decoder.", "post_quant_conv.")) for k in left.missing_keys)
    whole = whole.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    images = images_of(2, 64, 128)
    images[0, :, :32] = images[0, :, :32].round()  # edges, where bicubic filters overshoot
    latents = teacher.latents(images)
    assert latents.shape == (2, 4, 64 * enlarge // 8, 128 * enlarge // 8)
    assert latents.dtype == torch.float32
    with torch.no_grad():
        x = images if enlarge == 1 else enlarged(images, enlarge)
        x = (x * 2 - 1).contiguous(memory_format=torch.channels_last)
        found = whole.encode(x)
        expected = (found.latents if vae_kind == "tiny" else found.latent_dist.mode()) * scale
    if enlarge == 1:
        assert torch.equal(latents, expected)
    else:
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("noise", ["stochastic", "fixed", "none"])
def test_kept_latents_give_the_same_maps(noise, tmp_path):
    teacher = make(noise=noise, timesteps=(50, 150))
    images = images_of(2, 64, 64)
    maps = teacher.encode(images, generator=seeded(3))
    save_file({"latents": teacher.latents(images).contiguous()}, tmp_path / "kept.safetensors")
    kept = load_file(tmp_path / "kept.safetensors")["latents"]
    layouts: list[bool] = []
    teacher.network.unet.conv_in.register_forward_pre_hook(
        lambda _m, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    assert same(teacher.encode_latents(kept, generator=seeded(3)), maps)
    assert layouts == [True]


# --- noise --------------------------------------------------------------------------------------------------


def test_schedule_is_the_scheduler_s():
    scheduler = DDIMScheduler(1000, 0.00085, 0.012, beta_schedule="scaled_linear")
    teacher = make()
    torch.testing.assert_close(
        teacher.alpha_bar.float(), scheduler.alphas_cumprod.float(), rtol=1e-5, atol=1e-7
    )
    images = images_of(1, 64, 64)
    x0 = teacher.latents(images)
    noise = torch.randn(x0.shape, generator=seeded(2))
    x = scheduler.add_noise(x0, noise, torch.tensor([150]))
    network = teacher.network
    with torch.no_grad():
        maps = decoder_maps(network.unet, x, torch.tensor([150]), network.prompt, 2)
    ours = teacher.encode(images, generator=seeded(2))
    for a, b in zip(ours, reversed(maps), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_several_timesteps_share_one_draw_and_concatenate():
    images = images_of(2, 64, 64)
    both, first, second = (
        make(timesteps=t).encode(images, generator=seeded(3)) for t in ((50, 400), (50,), (400,))
    )
    for two, a, b in zip(both, first, second, strict=True):
        torch.testing.assert_close(two, torch.cat([a, b], dim=1), rtol=1e-4, atol=1e-4)
    assert [m.shape[1] for m in both] == [s.channels for s in make(timesteps=(50, 400)).specs] == [16, 16]


def test_noise_kinds():
    images = images_of(2, 64, 64)
    maps = {}
    for noise in ("stochastic", "fixed", "none"):
        teacher = make(noise=noise)
        a, b = (teacher.encode(images, generator=seeded(i))[0] for i in (0, 1))
        maps[noise] = a
        assert torch.equal(a, b) == (noise != "stochastic")
    assert not torch.equal(maps["fixed"], maps["none"])
    refused(lambda: make(noise="inversion"), "cannot invert", "stochastic, fixed or none")
    refused(lambda: make(timesteps=(1000,)), "Timestep 1000", "0 to 999")
    generator = seeded()
    state = generator.get_state()
    make(noise="fixed").encode(images, generator=generator)
    assert torch.equal(state, generator.get_state())


def test_clean_networks_take_no_noise():
    clean = {"clean": True, "timestep": 261}
    teacher = make(options=clean)
    images = images_of(1, 64, 64)
    assert teacher.noise == "none"
    maps = teacher.encode(images, generator=seeded(1))
    assert same(maps, teacher.encode(images, generator=seeded(2)))
    x = teacher.latents(images)
    theirs = maps_of_full_forward(whole_unet(teacher), x, torch.tensor(261), teacher.network.prompt, None, 8)
    assert same(maps, theirs)
    assert same(maps, make(options=clean, noise="none", timesteps=(261,)).encode(images, generator=seeded()))
    refused(lambda: make(options=clean, noise="fixed"), "without noise at t = 261")
    refused(lambda: make(options=clean, timesteps=(50,)), "t = 261 alone", "t = 50")


# --- the contract, and building -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["small", "sdxl"])
def test_contract(kind, tmp_path):
    spec = spec_of(kind, size=(64, 96))
    save_teacher(tmp_path, weights_of(spec), spec, {"name": kind, "licence": "CC0-1.0"}, half=False)
    teacher = load_teacher(str(tmp_path))
    assert isinstance(teacher, StableDiffusionTeacher)
    assert teacher.size == (64, 96)
    check_teacher(teacher)
    teacher.keep_only("encode")
    check_teacher(teacher)
    images = images_of(1, 64, 64)
    maps, expected = (m.encode(images, generator=seeded(1)) for m in (teacher, make(kind)))
    for a, b in zip(maps, expected, strict=True):  # weights lie elsewhere in memory: the last bits may differ
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert from_json(StableDiffusionSpec, json.loads(json.dumps(to_json(spec)))) == spec


def test_autocast_leaves_latents_and_noise_in_float32():
    teacher = make()
    images = images_of(1, 64, 64)
    plain = teacher.encode(images, generator=seeded(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert teacher.latents(images).dtype == torch.float32
        low = teacher.encode(images, generator=seeded(1))
    for a, b in zip(plain, low, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", ["small", "sdxl"])
def test_loading_leaves_no_meta_tensor_and_the_global_generator_alone(kind):
    spec = spec_of(kind)
    weights, state = weights_of(spec), torch.get_rng_state()
    teacher = load(weights, spec, Path("-"), name="-", licence="-")
    assert torch.equal(state, torch.get_rng_state())
    assert not [k for k, v in [*teacher.named_parameters(), *teacher.named_buffers()] if v.is_meta]
    found = teacher.network.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(v, found[k]) for k, v in weights.items())
    assert ("pooled" in found) == (kind == "sdxl")


def test_sizes_and_networks_that_do_not_fit_are_refused():
    teacher = make()
    refused(lambda: teacher.encode(images_of(1, 60, 64), generator=seeded()), "multiples of 8", "--size")
    refused(lambda: make(options={"size": (68, 64)}), "multiples of 8")
    refused(lambda: make(options={"enlarge": 3}), "no level lies at stride")
    refused(lambda: make(options={"enlarge": 0}), "cannot be enlarged by 0")
    spec = spec_of()
    weights = weights_of(spec)
    del weights["prompt"]
    refused(lambda: load(weights, spec, Path("f"), name="-", licence="-"), "'f'", "1 missing (prompt)")
    refused(
        lambda: load(weights | {"prompt": torch.zeros(1, 77, 5)}, spec, Path("f"), name="-", licence="-"),
        "(1, 77, 5)",
    )


FOREIGN = [
    ({"in_channels": 9}, "9 channels on latents of 4"),  # inpainting
    ({"time_cond_proj_dim": 8}, "time_cond_proj_dim"),  # latent consistency
    ({"class_embed_type": "timestep"}, "class_embed_type"),  # unclip
    ({"num_class_embeds": 4}, "num_class_embeds"),  # upscaling
    ({"addition_embed_type": "text", "addition_embed_type_num_heads": 2}, "addition_embed_type text"),
    ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "UNetMidBlock2DSimpleCrossAttn"),  # DeepFloyd
    ({"dual_cross_attention": True}, "dual_cross_attention"),
    ({"block_out_channels": [8, 8, 8]}, "cannot be built"),
    ({"colour": "red"}, "cannot be built"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), FOREIGN, ids=[w for _, w in FOREIGN])
def test_other_networks_are_refused(change, words):
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        refused(lambda: build_network(spec_of(unet=UNETS["small"] | change)), words)


def test_shifted_latents_are_refused():
    with torch.device("meta"):
        refused(lambda: build_network(spec_of(vae=KL | {"shift_factor": 0.1})), "latents are shifted")


def test_published_sizes_and_costs():
    """Stable Diffusion 1.5 as published, on the meta device; costs as in the project's table, at 512 px."""
    config = {
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }
    vae = {
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    spec = StableDiffusionSpec(unet=config, vae=vae)
    with torch.device("meta"):
        network = build_network(spec)
        images, x, t = torch.empty(1, 3, 256, 256), torch.empty(1, 4, 64, 64), torch.empty(1)
    teacher = StableDiffusionTeacher(network, spec, name="-", licence="-").to("meta")
    assert {s.stride: s.channels for s in teacher.specs} == {4: 320, 8: 640, 16: 1280, 32: 1280}
    assert teacher.multiple == 32
    encoder, walk = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with encoder:
        assert teacher.latents(images).shape == x.shape
    with walk, torch.no_grad():
        maps = decoder_maps(network.unet, x, t, network.prompt, 4)
    assert [m.shape for m in reversed(maps)] == [s.shape(1, (256, 256)) for s in teacher.specs]
    assert encoder.get_total_flops() / 2e9 == pytest.approx(558, rel=0.001)
    assert walk.get_total_flops() / 2e9 == pytest.approx(401.6, rel=0.001)


# --- published folders --------------------------------------------------------------------------------------


def write_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """Letters, the word "cat", the two marks."""
    folder.mkdir(parents=True)
    letters = "!abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{c}</w>" for c in letters), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return CLIPTokenizer.from_pretrained(folder)


def text_encoder(width: int, tokens: CLIPTokenizer, *, projects: bool) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=width, intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=2, projection_dim=10, bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id,
    )  # fmt: skip
    encoder = (CLIPTextModelWithProjection if projects else CLIPTextModel)(config).eval()
    for parameter in encoder.parameters():  # its own initial weights hardly differ from zero
        parameter.data.normal_(std=0.5)
    return encoder


def publish(folder: Path, kind: str) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """A pipeline with random weights, written as the library writes it; SD 2 pads with "!" and predicts v."""
    xl = kind == "sdxl"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        tokens = write_tokenizer(folder / "tokenizer", "!" if kind == "sd2" else "<|endoftext|>")
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel(**UNETS[kind]).eval(),
            "vae": AutoencoderKL(**KL).eval(),
            "text_encoder": text_encoder(16 if kind == "sd2" else 12, tokens, projects=False),
            "scheduler": DDIMScheduler(
                1000, 0.00085, 0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
                prediction_type="v_prediction" if kind == "sd2" else "epsilon",
            ),
        }  # fmt: skip
        if xl:
            parts["tokenizer_2"] = write_tokenizer(folder / "tokenizer_2", "!")
            parts["text_encoder_2"] = text_encoder(10, parts["tokenizer_2"], projects=True)
    for name, part in parts.items():
        if not name.startswith("tokenizer"):
            part.save_pretrained(folder / name)
    parts["tokenizer"] = tokens
    if xl:
        return StableDiffusionXLPipeline(**parts)
    return StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Folder and pipeline of each kind. Do not write into the folders."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("small", "sd1", "sd2", "sdxl")}
    return {kind: (folder, publish(folder, kind)) for kind, folder in folders.items()}


@pytest.mark.parametrize(
    ("kind", "prompt"), [("sd1", "a cat"), ("sd2", ""), ("sdxl", ""), ("sdxl", "A  Cat")]
)
def test_a_folder_gives_what_its_pipeline_computes(kind, prompt, pipelines):
    folder, pipeline = pipelines[kind]
    weights, spec = convert(folder, {"prompt": prompt} if prompt else {})
    assert (spec.prompt, spec.timestep, spec.size) == (prompt, 150, (64, 64))
    assert spec.scaling_factor == 0.2
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with torch.no_grad():
        found = pipeline.encode_prompt(prompt, **options)
    assert (weights["prompt"] - found[0]).abs().max() < 1e-6
    assert weights["prompt"].shape == (1, 77, UNETS[kind]["cross_attention_dim"])
    assert weights["prompt"].std() > 0.1
    assert ("pooled" in weights) == (kind == "sdxl")
    if kind == "sdxl":
        assert (weights["pooled"] - found[2]).abs().max() < 1e-6
    for part, library in (("unet", pipeline.unet), ("vae", pipeline.vae)):
        published = library.state_dict()
        kept = {k.removeprefix(f"{part}."): v for k, v in weights.items() if k.startswith(f"{part}.")}
        assert all(torch.equal(v, published[k]) for k, v in kept.items())
        left = {k.split(".")[0] for k in published.keys() - kept.keys()}
        assert left == {"unet": {"conv_norm_out", "conv_out"}, "vae": {"decoder", "post_quant_conv"}}[part]
    teacher = load(weights, spec, folder, name=kind, licence="-", noise="none")
    images = images_of(1, 64, 64)
    whole = whole_unet(teacher)
    whole.load_state_dict(pipeline.unet.state_dict())
    pooled = found[2] if kind == "sdxl" else None
    theirs = maps_of_full_forward(whole, teacher.latents(images), torch.tensor(150), found[0], pooled, 8)
    for a, b in zip(teacher.encode(images, generator=seeded()), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert from_json(StableDiffusionSpec, json.loads(json.dumps(to_json(spec)))) == spec


def copied(pipelines: dict[str, tuple[Path, Any]], kind: str, to: Path) -> Path:
    shutil.copytree(pipelines[kind][0], to / kind)
    return to / kind


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_half_precision_variants_and_several_files(pipelines, tmp_path):
    folder = copied(pipelines, "small", tmp_path)
    whole, _ = convert(folder, {})
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        file = folder / part / f"{name}.safetensors"
        half = {k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}
        save_file(half, folder / part / f"{name}.fp16.safetensors", {"format": "pt"})
        file.unlink()
    edit(folder / "text_encoder" / "config.json", dtype="float16")
    weights, spec = convert(folder, {})
    assert weights["unet.conv_in.weight"].dtype == torch.float16
    assert all(torch.equal(v, whole[k].half()) for k, v in weights.items() if k != "prompt")
    assert weights["prompt"].dtype == torch.float32
    torch.testing.assert_close(weights["prompt"], whole["prompt"], rtol=0.02, atol=0.02)
    check_teacher(load(weights, spec, folder, name="half", licence="-"))
    shutil.rmtree(folder / "unet")
    pipelines["small"][1].unet.save_pretrained(folder / "unet", max_shard_size="20KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    weights, _ = convert(folder, {})
    assert all(torch.equal(weights[k], v) for k, v in whole.items() if k.startswith("unet."))


def test_old_names_of_attention(pipelines, tmp_path):
    """Stable Diffusion 1.x's autoencoder was published before the library renamed them."""
    folder = copied(pipelines, "small", tmp_path)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = {}
    for key, value in load_file(file).items():
        for new, before in names.items():
            key = key.replace(new, before)
        old[key] = value
    assert "encoder.mid_block.attentions.0.query.weight" in old
    save_file(old, file)
    weights, _ = convert(folder, {})
    expected, _ = convert(pipelines["small"][0], {})
    assert weights.keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in weights.items())


def test_text_encoders_as_they_were_published(pipelines, tmp_path):
    """With another beginning of their keys than today's library writes, the first ones with a table of positions."""
    for kind, parts in (("small", ["text_encoder"]), ("sdxl", ["text_encoder", "text_encoder_2"])):
        folder = copied(pipelines, kind, tmp_path)
        for part in parts:
            file = folder / part / "model.safetensors"
            found = load_file(file)
            old = {
                k if k.startswith(("text_model.", "text_projection.")) else f"text_model.{k}": v
                for k, v in found.items()
            }
            old["text_model.embeddings.position_ids"] = torch.arange(77)[None]
            save_file(old, file, {"format": "pt"})
        weights, _ = convert(folder, {"prompt": "cat"})
        expected, _ = convert(pipelines[kind][0], {"prompt": "cat"})
        for key in {"prompt", "pooled"} & expected.keys():
            torch.testing.assert_close(weights[key], expected[key], rtol=1e-5, atol=1e-6)


def test_another_autoencoder(pipelines, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        vae = AutoencoderTiny(**TAESD).eval()
        original = AutoencoderTiny(encoder_block_out_channels=[4] * 4).eval()  # its usual depth
    vae.save_pretrained(tmp_path / "taesd")
    folder = copied(pipelines, "small", tmp_path)
    shutil.rmtree(folder / "vae")
    refused(lambda: convert(folder, {}), "lacks vae/config.json")
    weights, spec = convert(folder, {"vae": str(tmp_path / "taesd")})
    assert (spec.vae_kind, spec.scaling_factor, spec.size) == ("tiny", 1.0, (64, 64))
    assert not [k for k in weights if k.startswith("vae.decoder")]
    teacher = load(weights, spec, folder, name="-", licence="-")
    check_teacher(teacher)
    assert torch.equal(teacher.network.vae.encoder.layers[0].weight, vae.encoder.layers[0].weight)
    file = tmp_path / "taesd_encoder.safetensors"
    save_file({k.removeprefix("layers."): v for k, v in original.encoder.state_dict().items()}, file)
    for place in (file, tmp_path):
        weights, spec = convert(folder, {"vae": str(place)})
        teacher = load(weights, spec, folder, name="-", licence="-")
        images = images_of(1, 64, 64)
        with torch.no_grad():
            x = torch.nn.functional.interpolate(images, scale_factor=2, mode="bicubic", antialias=True)
            expected = original.encode(x.clamp(0, 1) * 2 - 1).latents
        torch.testing.assert_close(teacher.latents(images), expected, rtol=1e-4, atol=1e-5)


def test_clean_weights_in_the_place_of_the_u_net_s(pipelines, tmp_path):
    folder, pipeline = pipelines["small"]
    other = {k: v + 0.01 for k, v in pipeline.unet.state_dict().items()}
    file = tmp_path / "cleandift.safetensors"
    save_file(other, file)
    weights, spec = convert(folder, {"unet": str(file), "clean": True})
    assert (spec.clean, spec.timestep) == (True, 261)
    assert torch.equal(weights["unet.conv_in.weight"], other["conv_in.weight"])
    teacher = load(weights, spec, folder, name="-", licence="-")
    assert (teacher.noise, teacher.timesteps) == ("none", (261,))
    _, spec = convert(folder, {"size": [32, 96], "timestep": 50, "enlarge": 2})
    assert (spec.clean, spec.timestep, spec.size) == (False, 50, (32, 96))
    save_file({"conv_in.weight": other["conv_in.weight"]}, file)
    refused(lambda: convert(folder, {"unet": str(file)}), "missing (unet.")
    torch.save(other, tmp_path / "unet.pt")
    refused(lambda: convert(folder, {"unet": str(tmp_path / "unet.pt")}), "not a safetensors file")
    refused(lambda: convert(folder, {"unet": str(tmp_path / "no.safetensors")}), "cannot be read")


WEIGHTS = "diffusion_pytorch_model.safetensors"


def as_bin(file: Path) -> None:
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def without(file: Path, key: str) -> None:
    tensors = load_file(file)
    del tensors[key]
    save_file(tensors, file, {"format": "pt"})


DAMAGE: list[tuple[Callable[[Path], object], tuple[str, ...]]] = [
    (lambda f: shutil.rmtree(f / "unet"), ("lacks unet/config.json",)),
    (lambda f: shutil.rmtree(f / "text_encoder"), ("lacks text_encoder/config.json",)),
    (lambda f: (f / "tokenizer" / "merges.txt").unlink(), ("lacks tokenizer/merges.txt",)),
    (lambda f: shutil.rmtree(f / "scheduler"), ("lacks scheduler/",)),
    (lambda f: as_bin(f / "unet" / WEIGHTS), ("diffusion_pytorch_model.bin may run code",)),
    (lambda f: as_bin(f / "text_encoder" / "model.safetensors"), ("model.bin may run code",)),
    (lambda f: cut(f / "unet" / WEIGHTS, 0.6), ("unet", "cannot be read")),
    (lambda f: cut(f / "vae" / WEIGHTS, 0.6), ("vae", "cannot be read")),
    (lambda f: cut(f / "text_encoder" / "model.safetensors", 0.6), ("text_encoder", "cannot be read")),
    (lambda f: without(f / "unet" / WEIGHTS, "conv_in.bias"), ("1 missing (unet.conv_in.bias)",)),
    (lambda f: edit(f / "unet" / "config.json", cross_attention_dim=10), ("of another shape",)),
    (lambda f: edit(f / "unet" / "config.json", _class_name="UNet2DModel"), ("a UNet2DModel, not",)),
    (lambda f: edit(f / "unet" / "config.json", in_channels=9), ("9 channels on latents of 4",)),
    (lambda f: edit(f / "vae" / "config.json", _class_name="VQModel"), ("a VQModel, which is not",)),
    (lambda f: (f / "unet" / "config.json").write_text("{"), ("config.json", "cannot be read")),
    (lambda f: (f / "unet" / "config.json").write_text("[1]"), ("config.json", "cannot be read")),
    (lambda f: edit(f / "scheduler" / "scheduler_config.json", beta_end=0.02), ("0.00085 to 0.02",)),
    (lambda f: edit(f / "scheduler" / "scheduler_config.json", beta_start=None), ("from None",)),
    (lambda f: edit(f / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True), ("zero_snr",)),
    (lambda f: without(f / "text_encoder" / "model.safetensors", "final_layer_norm.weight"), ("lacks",)),
    (lambda f: edit(f / "text_encoder" / "config.json", vocab_size=60), ("text_encoder",)),
    (lambda f: edit(f / "text_encoder" / "config.json", hidden_size=8), ("text_encoder",)),
    (lambda f: edit(f / "unet" / "config.json", sample_size=15), ("multiples of 8",)),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), DAMAGE, ids=[str(i) for i in range(len(DAMAGE))])
def test_damaged_and_foreign_folders_are_named(damage, words, pipelines, tmp_path):
    folder = copied(pipelines, "small", tmp_path)
    damage(folder)
    refused(lambda: convert(folder, {}), *words)


def test_bad_requests_say_what_to_do(pipelines, tmp_path, monkeypatch):
    folder = pipelines["small"][0]
    refused(lambda: convert(folder, {"promt": "a"}), "Did you mean 'prompt'")
    refused(lambda: convert(folder, {"prompt": "cat " * 76}), "76 tokens", "at most 75")
    refused(lambda: convert(folder, {"timestep": 1000}), "Timestep 1000")
    refused(lambda: convert(folder, {"size": [52, 64]}), "multiples of 8")
    refused(lambda: convert(tmp_path / "none", {}), "not a whole Stable Diffusion pipeline")
    refused(lambda: convert(folder, {"vae": str(tmp_path / "none")}), "config.json", "cannot be read")
    lacking = copied(pipelines, "sdxl", tmp_path)
    shutil.rmtree(lacking / "text_encoder_2")
    refused(lambda: convert(lacking, {}), "lacks text_encoder_2/config.json")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(lambda: convert(folder, {}), "needs transformers", "pip install 'dreamteacher[text]'")
