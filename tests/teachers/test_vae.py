"""VAE teachers: maps and images exactly the library's, nothing beyond the last level, published files read.

The oracles are the library's own `encode` and `decode` with hooks before each upsampler, and for TAESD's
original files a network of that layout, written out below.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_dc import DCUpBlock2d
from diffusers.models.upsampling import Upsample2D
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dreamteacher.runtime.config import from_json, to_json
from dreamteacher.teachers.registry import load_teacher, save_teacher
from dreamteacher.teachers.vae import (
    CLASSES,
    VaeSpec,
    VaeTeacher,
    build_vae,
    convert,
    decode,
    latents,
    load,
    tiny_from_original,
)
from dreamteacher.testing import check_teacher
from tests.builders.pictures import pixels, refused
from tests.places import SHARED


def unet(channels: list[int], *, attention: bool = False, **options) -> dict:
    """Arguments that AutoencoderKL and VQModel share; channels fine to coarse, attention in the coarsest two."""
    plain, attentive = len(channels) - 2 * attention, 2 * attention
    return {
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * plain + ["AttnDownEncoderBlock2D"] * attentive,
        "up_block_types": ["AttnUpDecoderBlock2D"] * attentive + ["UpDecoderBlock2D"] * plain,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        **options,
    }


SIZE = (64, 64)
DC = {
    "latent_channels": 4,
    "attention_head_dim": 4,
    "encoder_block_out_channels": [8] * 6,
    "decoder_block_out_channels": [4, 4, 8, 8, 8, 8],
    "encoder_layers_per_block": [1] * 6,
    "decoder_layers_per_block": [1] * 6,
    "decoder_block_types": ["ResBlock"] * 4 + ["EfficientViTBlock"] * 2,
    "encoder_qkv_multiscales": [[]] * 6,
    "decoder_qkv_multiscales": [[]] * 4 + [[5]] * 2,
}
TINY = {
    "encoder_block_out_channels": [8] * 4,
    "decoder_block_out_channels": [8] * 4,
    "num_encoder_blocks": [1, 1, 1, 1],
    "num_decoder_blocks": [1, 2, 1, 1],
}
# Name -> spec and levels (stride: channels).
SPECS: dict[str, tuple[VaeSpec, dict[int, int]]] = {
    "kl": (VaeSpec(kind="kl", config=unet([4, 8, 12, 16]), size=SIZE), {4: 12, 8: 16}),
    "kl-f32": (
        VaeSpec(
            kind="kl", config=unet([4, 4, 8, 12, 16, 20], attention=True, use_quant_conv=False), size=SIZE
        ),
        {4: 8, 8: 12, 16: 16, 32: 20},
    ),
    "vq": (
        VaeSpec(
            kind="vq",
            config=unet([4, 8, 12, 16], num_vq_embeddings=16, mid_block_add_attention=False),
            size=SIZE,
        ),
        {4: 12, 8: 16},
    ),
    "vq-spatial": (
        VaeSpec(
            kind="vq",
            config=unet([32] * 3, norm_type="spatial", vq_embed_dim=3, attention=True),
            size=(32, 32),
        ),
        {4: 32},
    ),
    "tiny": (VaeSpec(kind="tiny", config=TINY, size=SIZE), {4: 8, 8: 8}),
    "dc": (VaeSpec(kind="dc", config=DC, size=SIZE), {4: 8, 8: 8, 16: 8, 32: 8}),
}


def weights_of(spec: VaeSpec) -> dict[str, Tensor]:
    """Seeded weights, large enough that every part of the network matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = CLASSES[spec.kind](**spec.config)
        if spec.kind == "vq":
            vae.quantize.embedding.weight.data.normal_()
        return vae.state_dict()


def make(name: str, size: tuple[int, int] | None = None) -> VaeTeacher:
    spec = SPECS[name][0] if size is None else replace(SPECS[name][0], size=size)
    return load(weights_of(spec), spec, Path("memory"), name=name, licence="-")


def write(folder: Path, name: str) -> None:
    spec = SPECS[name][0]
    save_teacher(folder, weights_of(spec), spec, {"name": f"tiny-{name}", "licence": "CC0-1.0"})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_of(n: int, height: int, width: int) -> Tensor:
    return torch.rand(n, 3, height, width, generator=seeded(7))


# --- the library as the oracle -----------------------------------------------------------------------------


def library_latent(teacher: VaeTeacher, x: Tensor) -> Tensor:
    """What the library's `encode` gives, as its `decode` takes it."""
    found = teacher.vae.encode(x)
    match teacher.spec.kind:
        case "kl":
            return found.latent_dist.mode()
        case "dc":
            return found.latent
        case _:
            return found.latents


def reconstruct(teacher: VaeTeacher, images: Tensor) -> Tensor:
    """Images encoded and decoded again."""
    with torch.no_grad():
        z = latents(teacher.vae, teacher.to_network(images))
        return teacher.to_images(decode(teacher.vae, z, teacher._count, whole=True)[1])


def library_decode(teacher: VaeTeacher, z: Tensor, **options) -> tuple[list[Tensor], Tensor]:
    """Inputs of every upsampler, coarse to fine, during the library's whole `decode`; and its result."""
    caught: list[Tensor] = []
    ups = [m for m in teacher.vae.decoder.modules() if isinstance(m, (Upsample2D, nn.Upsample, DCUpBlock2d))]
    hooks = [m.register_forward_pre_hook(lambda _m, args: caught.append(args[0])) for m in ups]
    with torch.no_grad():
        result = teacher.vae.decode(z, **options).sample
    for hook in hooks:
        hook.remove()
    return caught, result


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all((a - b).abs().max().item() == 0.0 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", SPECS)
def test_encode_is_the_library_s_decoding(name):
    teacher = make(name)
    levels = SPECS[name][1]
    assert {s.stride: s.channels for s in teacher.specs} == levels
    for size in (teacher.size, (32, 64)):
        images = images_of(2, *size)
        maps = teacher.encode(images, generator=seeded())
        with torch.no_grad():
            z = library_latent(teacher, teacher.to_network(images))
        theirs, result = library_decode(teacher, z)
        strides = [size[0] // m.shape[2] for m in theirs]
        assert same(maps, [theirs[strides.index(s)] for s in levels])
        assert [m.shape for m in maps] == [s.shape(2, size) for s in teacher.specs]
        assert all(m.std() > 1e-3 for m in maps)
        reconstructed = reconstruct(teacher, images)
        assert torch.equal(reconstructed, ((result + 1) / 2).clamp(0, 1))


@pytest.mark.parametrize("name", SPECS)
def test_sample_is_one_pass_of_the_library_s_decoder(name):
    teacher = make(name)
    images, maps = teacher.sample(2, generator=seeded(3))
    z = teacher.draw(2, generator=seeded(3)).contiguous(memory_format=torch.channels_last)
    options = {"force_not_quantize": True} if teacher.spec.kind == "vq" else {}
    theirs, result = library_decode(teacher, z, **options)
    strides = [teacher.size[0] // m.shape[2] for m in theirs]
    assert same(maps, [theirs[strides.index(s)] for s in SPECS[name][1]])
    assert torch.equal(images, ((result + 1) / 2).clamp(0, 1))
    other, _ = teacher.sample(2, generator=seeded(4))
    assert not torch.equal(images, other)


@pytest.mark.parametrize("name", SPECS)
def test_contract_also_of_one_half(name, tmp_path):
    write(tmp_path, name)
    teacher = load_teacher(str(tmp_path))
    check_teacher(teacher)
    images = images_of(1, *teacher.size)
    whole = sum(p.numel() for p in teacher.parameters())
    maps, (made, dreamt) = teacher.encode(images, generator=seeded()), teacher.sample(1, generator=seeded())
    teacher.keep_only("encode")
    check_teacher(teacher)
    assert same(teacher.encode(images, generator=seeded()), maps)
    assert sum(p.numel() for p in teacher.parameters()) < whole
    half = load_teacher(str(tmp_path))
    half.keep_only("sample")
    check_teacher(half)
    again, maps = half.sample(1, generator=seeded())
    assert torch.equal(again, made)
    assert same(maps, dreamt)
    assert not [k for k in half.state_dict() if k.startswith(("vae.encoder", "vae.quant_conv"))]


@pytest.mark.parametrize("name", SPECS)
def test_nothing_runs_after_the_last_level_and_encode_draws_nothing(name):
    teacher = make(name)
    calls: list[str] = []
    for key, module in teacher.vae.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_hook(lambda _m, _a, _o, key=key: calls.append(key))
    generator = seeded(5)
    before = generator.get_state()
    teacher.encode(images_of(1, *teacher.size), generator=generator)
    assert torch.equal(before, generator.get_state())
    assert calls
    assert len(calls) == len(set(calls))
    ran = set(calls)
    teacher.keep_only("encode")  # what is left is what ran
    left = {k.rpartition(".")[0] for k in teacher.vae.state_dict()}
    assert left - ran <= {"quantize.embedding"}  # read without being called
    assert ran <= left


@pytest.mark.parametrize("name", ["kl", "tiny", "dc"])
def test_walk_compiles_without_graph_breaks(name):
    teacher = make(name)

    def walk(x: Tensor) -> list[Tensor]:
        return decode(teacher.vae, latents(teacher.vae, x), 1, whole=False)[0]

    compiled = torch.compile(walk, fullgraph=True, backend="eager")
    with torch.no_grad():
        x = teacher.to_network(images_of(1, 32, 32))
        assert all(map(torch.equal, compiled(x), walk(x)))


def test_priors():
    spec = VaeSpec(
        kind="kl", config=unet([4, 4, 4, 4], scaling_factor=0.5, shift_factor=3.0), size=(512, 512)
    )
    z = load(weights_of(spec), spec, Path("-"), name="-", licence="-").draw(4, generator=seeded())
    assert z.shape == (4, 4, 64, 64)
    assert z.mean().item() == pytest.approx(3, abs=0.05)
    assert z.std().item() == pytest.approx(2, abs=0.05)
    mean, std = [0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 1.0, 0.5]
    spec = replace(spec, config=unet([4] * 4, scaling_factor=0.5, latents_mean=mean, latents_std=std))
    z = load(weights_of(spec), spec, Path("-"), name="-", licence="-").draw(4, generator=seeded())
    assert z.mean((0, 2, 3)).tolist() == pytest.approx(mean, abs=0.1)
    assert z.std((0, 2, 3)).tolist() == pytest.approx([2 * s for s in std], rel=0.05)
    teacher = make("vq", size=(256, 256))
    z, book = teacher.draw(8, generator=seeded()), teacher.vae.quantize.embedding.weight
    vectors = z.permute(0, 2, 3, 1).reshape(-1, 3)
    distances = torch.cdist(vectors, book, compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.min(1).values.max() == 0
    counts = distances.argmin(1).bincount(minlength=len(book))
    assert counts.sum() == 8 * 32 * 32
    assert counts.min() > 0.8 * 8192 / 16  # 4 deviations: uniform
    assert counts.max() < 1.2 * 8192 / 16


def test_grey_and_loading_leaves_the_global_generator_alone():
    spec = VaeSpec(kind="kl", config=unet([4, 4, 4], in_channels=1, out_channels=1), size=(32, 64))
    weights, state = weights_of(spec), torch.get_rng_state()
    teacher = load(weights, spec, Path("-"), name="-", licence="-")
    assert torch.equal(state, torch.get_rng_state())
    images = reconstruct(teacher, images_of(1, 32, 64))
    assert torch.equal(images[:, 0], images[:, 2])
    check_teacher(teacher)
    assert all(torch.equal(v, teacher.vae.state_dict()[k]) for k, v in weights.items())
    assert from_json(VaeSpec, json.loads(json.dumps(to_json(spec)))) == spec


# --- TAESD's original files ---------------------------------------------------------------------------------


class Block(nn.Module):
    """TAESD's residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for _ in range(3):
            parts += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.conv = nn.Sequential(*parts[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def original(width: int = 8, latent: int = 5) -> tuple[nn.Sequential, nn.Sequential]:
    """TAESD's encoder and decoder as they were published: two plain Sequentials, images in [0, 1]."""

    def conv(a: int, b: int, **options) -> nn.Conv2d:
        return nn.Conv2d(a, b, 3, padding=1, **options)

    def down() -> nn.Conv2d:
        return conv(width, width, stride=2, bias=False)

    def up() -> list[nn.Module]:
        return [nn.Upsample(scale_factor=2), conv(width, width, bias=False)]

    def three() -> list[nn.Module]:
        return [Block(width) for _ in range(3)]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        encoder = nn.Sequential(
            conv(3, width), Block(width), down(), *three(), down(), *three(), down(), *three(), conv(width, latent)
        )  # fmt: skip
        decoder = nn.Sequential(
            Clamp(), conv(latent, width), nn.ReLU(), *three(), *up(), *three(), *up(), *three(), *up(),
            Block(width), conv(width, 3),
        )  # fmt: skip
    return encoder, decoder


def write_original(folder: Path) -> tuple[nn.Sequential, nn.Sequential]:
    pair = original()
    for half, name in zip(pair, ("encoder", "decoder"), strict=True):
        save_file(half.state_dict(), folder / f"taesd_{name}.safetensors")
    return pair


def test_original_taesd_files_compute_what_they_did(tmp_path):
    encoder, decoder = write_original(tmp_path)
    weights, spec = convert(tmp_path, {"size": [64, 96]})
    assert spec.size == (64, 96)
    assert spec.config["latent_channels"] == 5
    teacher = load(weights, spec, tmp_path, name="-", licence="-")
    images = images_of(2, 64, 96)
    with torch.no_grad():
        z = encoder(images)
        torch.testing.assert_close(latents(teacher.vae, images * 2 - 1), z, rtol=1e-5, atol=1e-5)
        expected = decoder(z).clamp(0, 1)
        maps = [decoder[:11](z), decoder[:6](z)]  # up to each upsampler
    torch.testing.assert_close(reconstruct(teacher, images), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(teacher.encode(images, generator=seeded()), maps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_original_encoder_alone():
    encoder, _ = original()
    alone = tiny_from_original(encoder.state_dict(), None)
    assert set(alone) == {f"encoder.layers.{k}" for k in encoder.state_dict()}
    assert all(torch.equal(v, alone[f"encoder.layers.{k}"]) for k, v in encoder.state_dict().items())


# How many decibels depends on the scene (dusk has little detail, daylight leaves and railings) and on its size: the
# teacher of Stable Diffusion enlarges its images x2, and so enlarged a mean frame has 30.5 dB (dev/LOG.md).
FRAMES = {
    ("train/0001TP_006690.jpg", 1): 29.5,
    ("val/0016E5_07959.jpg", 1): 22.5,
    ("val/0016E5_07959.jpg", 2): 29.0,
}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published weights are not in ../shared/data")
@pytest.mark.parametrize(("frame", "enlarged"), FRAMES)
def test_real_taesd_reconstructs_real_frames(frame, enlarged):
    weights, spec = convert(SHARED / "weights", {})
    teacher = load(weights, spec, SHARED, name="taesd", licence="MIT")
    assert [(s.stride, s.channels) for s in teacher.specs] == [(4, 64), (8, 64)]
    with Image.open(SHARED / "camvid" / "images" / frame) as file:
        image = pixels(file.convert("RGB"))[None].float() / 255
    assert image.shape == (1, 3, 360, 480)
    if enlarged > 1:  # the middle, enlarged: as many pixels as a whole frame
        image = F.interpolate(image[..., 90:270, 120:360], scale_factor=enlarged, mode="bilinear")
    psnr = -10 * (reconstruct(teacher, image) - image).square().mean().log10().item()
    print(f"{frame} x {enlarged}: {psnr:.2f} dB")
    assert psnr >= FRAMES[frame, enlarged]


# --- diffusers' folders -------------------------------------------------------------------------------------


def published(folder: Path, name: str = "kl") -> dict[str, Tensor]:
    """A folder as the library writes it."""
    spec = SPECS[name][0]
    vae = build_vae(weights_of(spec), spec, folder)
    vae.save_pretrained(folder)
    return vae.state_dict()


@pytest.mark.parametrize("name", ["kl", "vq", "tiny", "dc"])
def test_a_folder_of_diffusers(name, tmp_path):
    weights = published(tmp_path / "vae", name)
    got, spec = convert(tmp_path, {"size": [96, 64]})  # the folder of a whole pipeline
    same_folder, _ = convert(tmp_path / "vae", {"size": [96, 64]})
    assert spec.kind == SPECS[name][0].kind
    assert spec.size == (96, 64)
    assert got.keys() == same_folder.keys() == weights.keys()
    assert all(torch.equal(got[k], v) for k, v in weights.items())
    teacher = load(got, spec, tmp_path, name="-", licence="-")
    images = images_of(1, 64, 64)
    assert same(teacher.encode(images, generator=seeded()), make(name).encode(images, generator=seeded()))
    assert from_json(VaeSpec, json.loads(json.dumps(to_json(spec)))) == spec


def test_half_precision_and_the_names_of_before_2023(tmp_path):
    weights = published(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", r"to_out\.0": "proj_attn"}
    old = {}
    for key, value in load_file(file).items():
        for new, before in names.items():
            key = re.sub(rf"\.{new}\.", f".{before}.", key)
        old[key] = value.half()
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in old
    save_file(old, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    file.unlink()
    got, spec = convert(tmp_path, {})
    assert spec.size == (32, 32)  # sample_size
    assert {k: v.half() for k, v in weights.items()}.keys() == got.keys()
    assert all(torch.equal(got[k], v.half()) for k, v in weights.items())


def truncate(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def drop_a_tensor(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["decoder.conv_in.bias"]
    save_file(tensors, file)


def edit(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (truncate, "cannot be read as plain weights"),
    (drop_a_tensor, "1 missing (decoder.conv_in.bias)"),
    (
        lambda f: (f / "diffusion_pytorch_model.safetensors").write_text("<html>"),
        "cannot be read as plain weights",
    ),
    (
        lambda f: (f / "diffusion_pytorch_model.safetensors").unlink(),
        "has no diffusion_pytorch_model.safetensors",
    ),
    (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    (lambda f: (f / "config.json").unlink(), "neither config.json"),
    (lambda f: edit(f, _class_name="UNet2DModel"), "a UNet2DModel, which is not"),
    (lambda f: edit(f, block_out_channels=[4, 8, 12]), "cannot be built"),
    (lambda f: edit(f, latent_channels=7), "of another shape"),
    (lambda f: edit(f, in_channels=2), "of another shape"),
    (lambda f: edit(f, sample_size=50), "multiples of 8"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGE, ids=[words for _, words in DAMAGE])
def test_damaged_and_foreign_folders_are_named(damage, words, tmp_path):
    published(tmp_path)
    damage(tmp_path)
    refused(lambda: convert(tmp_path, {}), words)


def test_bad_requests_say_what_to_do(tmp_path):
    write_original(tmp_path)
    refused(lambda: convert(tmp_path, {"sise": [64, 64]}), "Did you mean 'size'")
    pair = {half: (tmp_path / f"taesd_{half}.safetensors").read_bytes() for half in ("encoder", "decoder")}
    for half, other in (("encoder", "decoder"), ("decoder", "encoder")):
        (tmp_path / f"taesd_{half}.safetensors").write_bytes(pair[other])
    refused(lambda: convert(tmp_path, {}), "no TAESD encoder", "the other half")
    foreign = {"0.bias": torch.zeros(8), "conv_in.weight": torch.zeros(8)}
    refused(lambda: tiny_from_original(foreign, None), "unexpected conv_in.weight")
    teacher = make("kl")
    refused(
        lambda: teacher.encode(torch.rand(1, 3, 60, 64), generator=seeded()), "multiples of 8", "--size 64 64"
    )
    spec = VaeSpec(kind="kl", config=unet([4, 4]))
    refused(
        lambda: load(weights_of(spec), spec, Path("-"), name="f2", licence="-"), "no level at stride", "2, 1"
    )
    spec = VaeSpec(kind="kl", config=unet([4, 4, 4], in_channels=2, out_channels=2))
    refused(lambda: load(weights_of(spec), spec, Path("-"), name="-", licence="-"), "images of 2 channels")
    spec = VaeSpec(kind="tiny", config=TINY | {"upsampling_scaling_factor": 4})
    refused(lambda: load(weights_of(spec), spec, Path("-"), name="-", licence="-"), "reduces by 8", "by 64")
    spec = VaeSpec(kind="dream", config={})  # type: ignore[arg-type]
    refused(lambda: build_vae({}, spec, Path("here")), "'here' cannot be built", "dream")
