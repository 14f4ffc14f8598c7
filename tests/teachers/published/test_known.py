"""The table of published teachers: what it says of levels and cost is computed anew; names, aliases, the document."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dreamteacher.cli import main as cli
from dreamteacher.cli.config import DoctorConfig, ListConfig
from dreamteacher.cli.lists import doctor, print_list, teacher_table
from dreamteacher.runtime.config import from_json
from dreamteacher.runtime.download.http import alternatives
from dreamteacher.runtime.errors import UserError
from dreamteacher.teachers.biggan.convert import BigGanSettings
from dreamteacher.teachers.biggan.teacher import BigGanSpec
from dreamteacher.teachers.cost import measure
from dreamteacher.teachers.diffusion.adm import AdmFlags, DiffusersFlags, _spec
from dreamteacher.teachers.diffusion.adm_keys import AdmNetwork
from dreamteacher.teachers.diffusion.teacher import DiffusionSpec, build_unet
from dreamteacher.teachers.published import known
from dreamteacher.teachers.published.config import GetTeacherConfig
from dreamteacher.teachers.published.known import ALIASES, KNOWN, Known
from dreamteacher.teachers.registry import EMBEDDED, families_by_kind, save_teacher
from dreamteacher.teachers.stable_diffusion.teacher import StableDiffusionSettings, StableDiffusionSpec
from dreamteacher.teachers.stylegan2.convert import StyleGan2Settings
from dreamteacher.teachers.stylegan2.teacher import Generator, StyleGan2Spec
from dreamteacher.teachers.vae import VaeSettings, VaeSpec
from tests.places import ROOT

PAGE = ROOT / "docs" / "teachers.md"
SETTINGS = {
    "adm": AdmFlags,
    "ddpm": DiffusersFlags,
    "stable-diffusion": StableDiffusionSettings,
    "stylegan2": StyleGan2Settings,
    "icgan-stylegan2": StyleGan2Settings,
    "biggan": BigGanSettings,
    "vae": VaeSettings,
}


# --- levels and cost ----------------------------------------------------------------------------------------

# The published configurations that are files of their own, not flags.
_SD_1 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
_SD_2 = {
    "sample_size": 64, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}  # fmt: skip
_SDXL = {
    "sample_size": 128, "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816, "use_linear_projection": True,
}  # fmt: skip
_KL = {
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "latent_channels": 4, "layers_per_block": 2,
}  # fmt: skip
_DDPM = {
    "sample_size": 256, "block_out_channels": [128, 128, 256, 256, 512, 512], "layers_per_block": 2,
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4, "attention_head_dim": None,
}  # fmt: skip


def adm_spec(entry: Known) -> DiffusionSpec:
    """The spec that the weights of a network with these flags give."""
    flags = from_json(AdmFlags, dict(entry.settings))
    assert flags.model_channels
    assert flags.channel_mult
    assert flags.attention_resolutions
    layout = AdmNetwork(
        model_channels=flags.model_channels,
        time_width=4 * flags.model_channels,
        widths=tuple(int(m * flags.model_channels) for m in flags.channel_mult),
        blocks=flags.num_res_blocks or 0,
        attention=tuple(2**i in flags.attention_resolutions for i in range(len(flags.channel_mult))),
        updown=bool(flags.resblock_updown),
        scale_shift=bool(flags.use_scale_shift_norm),
        classes=flags.num_classes or 0,
        in_channels=3,
        out_channels=6,
    )
    return _spec(flags, layout)


def stable_diffusion_spec(entry: Known, unet: dict[str, Any]) -> StableDiffusionSpec:
    return StableDiffusionSpec(unet=unet, vae=_KL, size=entry.shape.size)


def stylegan2_spec(side: int, base: int, *, h_dim: int = 0, layers: int = 8) -> StyleGan2Spec:
    """The published widths: base / resolution, at most 512."""
    channels = tuple(min(base // 2**i, 512) for i in range(2, side.bit_length()))
    return StyleGan2Spec(size=(side, side), channels=channels, h_dim=h_dim, mapping_layers=layers)


def biggan_spec(side: int, ch: int, *, classes: int = 0, features: int = 0) -> BigGanSpec:
    """The published widths, 64 pixels of attention, latents in pieces of 20 (17 for 256 pixels)."""
    widths = {128: (16, 16, 8, 4, 2, 1), 256: (16, 16, 8, 8, 4, 2, 1)}[side]
    return BigGanSpec(
        channels=tuple(ch * w for w in widths), attention=(3,), latent={128: 20, 256: 17}[side],
        classes=classes, class_width=128 if classes else 0, features=features,
        feature_width=512 if features else 0,
    )  # fmt: skip


def published(name: str) -> Any:
    """The spec of a published network."""
    entry = KNOWN[name]
    specs = {
        "ddpm-cat-256": lambda: DiffusionSpec(unet=_DDPM, size=(256, 256)),
        "sd-1.4": lambda: stable_diffusion_spec(entry, _SD_1),
        "sd-2.1-base": lambda: stable_diffusion_spec(entry, _SD_2),
        "sdxl-base": lambda: stable_diffusion_spec(entry, _SDXL),
        "kl-f8": lambda: VaeSpec(kind="kl", config=_KL),
        "taesd": lambda: VaeSpec(kind="tiny", config={}),
        "stylegan2-ffhq-256": lambda: stylegan2_spec(256, 16384),
        "stylegan2-afhqcat-512": lambda: stylegan2_spec(512, 32768),
        "stylegan2-ffhq-1024": lambda: stylegan2_spec(1024, 32768),
        "icgan-coco-256": lambda: stylegan2_spec(256, 16384, h_dim=2048, layers=2),
        "bigbigan-128": lambda: biggan_spec(128, 96, classes=1),
        "biggan-128": lambda: biggan_spec(128, 96, classes=1000),
        "icgan-256": lambda: biggan_spec(256, 96, features=2048),
        "icgan-256-half": lambda: biggan_spec(256, 64, features=2048),
        "icgan-256-class": lambda: biggan_spec(256, 96, classes=1000, features=2048),
    }
    return specs[name]() if name in specs else adm_spec(entry)


# One of each shape; the others of the table share them.
MEASURED = (
    "adm-imagenet-64", "adm-imagenet-128", "adm-imagenet-256", "adm-imagenet-512", "ddpm-cat-256", "sd-1.4",
    "sd-2.1-base", "sdxl-base", "kl-f8", "taesd", "stylegan2-ffhq-256", "stylegan2-afhqcat-512",
    "stylegan2-ffhq-1024", "icgan-coco-256", "bigbigan-128", "biggan-128", "icgan-256", "icgan-256-half",
    "icgan-256-class",
)  # fmt: skip


@pytest.mark.parametrize("name", MEASURED)
def test_levels_and_cost_are_those_of_the_network(name: str) -> None:
    """Networks without weights on the meta device, operations counted; within 1 %."""
    entry, spec = KNOWN[name], published(name)
    found = measure(families_by_kind()[entry.kind], spec)
    assert (found.levels, found.modes) == (entry.shape.levels, entry.modes)
    assert found.full == pytest.approx(entry.shape.gmacs_full, rel=0.01)
    assert found.needed == pytest.approx(entry.shape.gmacs_levels, rel=0.01)
    side = spec.size
    assert (side if isinstance(side, tuple) else (side, side)) == entry.shape.size


def test_every_shape_is_measured() -> None:
    measured = [KNOWN[name].shape for name in MEASURED]
    assert [name for name, entry in KNOWN.items() if entry.shape not in measured] == []


def test_costs_known_from_elsewhere() -> None:
    """Numbers that were found apart from this code: whole networks, and ADM-256 up to its stride 4."""
    assert KNOWN["adm-imagenet-256"].shape[2:] == pytest.approx((1119.8, 486.5), rel=0.001)
    assert KNOWN["ddpm-cat-256"].shape.gmacs_full == pytest.approx(248.5, rel=0.001)
    assert KNOWN["sd-1.5"].shape.gmacs_full == pytest.approx(401.6 + 558, rel=0.002)
    assert [KNOWN[f"stylegan2-{n}"].shape.gmacs_full for n in ("ffhq-256", "afhqcat-512", "ffhq-1024")] == (
        pytest.approx([15, 60, 75], rel=0.01)
    )
    assert [KNOWN[n].shape.gmacs_full for n in ("icgan-256", "icgan-256-half")] == pytest.approx(
        [70, 31], rel=0.01
    )


@pytest.mark.parametrize(
    "spec",
    [
        StyleGan2Spec(
            size=(32, 64), channels=(8, 6, 4, 5), z_dim=7, w_dim=9, c_dim=3, h_dim=4, mapping_layers=3
        ),
        StyleGan2Spec(
            size=(16, 16), channels=(8, 6, 4), z_dim=8, w_dim=8, architecture="orig", image_channels=1
        ),
    ],
    ids=["skip, classes and instances", "orig, grey"],
)
def test_the_sum_for_a_stylegan2_is_what_it_computes(spec: StyleGan2Spec) -> None:
    with torch.random.fork_rng(devices=[]):
        generator = Generator(spec).requires_grad_(False)
    c, h = (torch.zeros(1, n) if n else None for n in (spec.c_dim, spec.h_dim))
    with FlopCounterMode(display=False) as counter:
        generator.synthesis(generator.mapping(torch.ones(1, spec.z_dim), c, h), noise="const")
    assert counter.get_total_flops() / 2e9 == measure("stylegan2", spec).full


def test_patches_and_grey_images_are_counted(tiny_spec: DiffusionSpec) -> None:
    """A network on patches of 2 has its finest wanted level before its last."""
    found = measure("diffusion", tiny_spec)
    assert found.levels == {4: 8, 8: 8, 16: 8, 32: 8}
    with torch.random.fork_rng(devices=[]):
        unet = build_unet(tiny_spec)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(torch.zeros(1, 4, 32, 32), 0)
    # Some versions of torch do not count the fused attention of the CPU: 0.01 % here.
    assert found.full == pytest.approx(counter.get_total_flops() / 2e9, rel=1e-3)
    assert 0 < found.needed < found.full


# --- the table ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOWN)
def test_an_entry_is_whole(name: str) -> None:
    entry = KNOWN[name]
    assert re.fullmatch(known.NAME, name)
    assert name not in EMBEDDED
    assert entry.kind in families_by_kind()
    assert bool(entry.url) + bool(entry.hub) + bool(entry.page) == 1
    assert entry.files
    assert entry.licence
    assert entry.what
    assert re.fullmatch(r"(https://\S+)?", entry.url)
    if entry.url:
        assert entry.url.endswith(f"/{entry.files[0]}")
    if entry.hub:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry.hub)
    assert bool(entry.inside) == (
        entry.kind in ("biggan", "icgan-stylegan2") and entry.files[0] != "BigBiGAN_x1.pth"
    )
    settings = from_json(SETTINGS[entry.kind], dict(entry.settings))
    t = getattr(settings, "timestep", None)
    assert entry.timestep == (261 if entry.other_unet else t)
    assert (entry.timestep is not None) == (entry.kind in ("adm", "ddpm", "stable-diffusion"))
    assert list(entry.shape.levels) == sorted(set(entry.shape.levels) & {4, 8, 16, 32})
    assert entry.sha256 is None  # nobody has published one; never a guess


def test_timesteps_are_the_papers() -> None:
    """150 on ImageNet, 50 elsewhere."""
    for name, entry in KNOWN.items():
        if entry.kind == "adm":
            assert entry.timestep == (150 if "imagenet" in name else 50), name


def test_flags_of_guided_diffusion_as_published() -> None:
    def flags(name: str, *keys: str) -> list[Any]:
        return [KNOWN[name].settings.get(key) for key in keys]

    order, schedule, heads = "use_new_attention_order", "noise_schedule", "num_head_channels"
    assert flags("adm-imagenet-64", order, schedule, heads, "num_heads") == [True, "cosine", 64, None]
    assert flags("adm-imagenet-128", order, schedule, heads, "num_heads") == [False, "linear", None, 4]
    for name in ("256", "512", "256-uncond"):
        assert flags(f"adm-imagenet-{name}", order, schedule, heads, "num_heads") == [
            False,
            "linear",
            64,
            None,
        ]
    assert flags("adm-imagenet-512", "channel_mult") == [[0.5, 1, 1, 2, 2, 4, 4]]
    assert [flags(f"adm-{n}", "num_classes") for n in ("imagenet-256", "imagenet-256-uncond", "ffhq")] == [
        [1000], [0], [0],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("runwayml/stable-diffusion-v1-5", "sd-1.5"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd-1.5"),
        ("stabilityai/stable-diffusion-2-1-base", "sd-2.1-base"),
        ("compvis/Stable-Diffusion-v1-4", "sd-1.4"),
        ("google/ddpm-church-256", "ddpm-church-256"),
        ("madebyollin/taesd", "taesd"),
        ("sd-1.4", "sd-1.4"),
        ("mine", "mine"),
    ],
)
def test_aliases(alias: str, name: str) -> None:
    assert known.canonical(alias) == name


def test_aliases_lead_into_the_table() -> None:
    assert set(ALIASES.values()) <= set(KNOWN)
    assert not set(ALIASES) & set(KNOWN)


# --- what is here -------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DREAMTEACHER_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_not_here_is_told_in_three_lines(name: str, cache: Path) -> None:
    assert known.fetched_folder(name) is None
    error = known.missing_message(name)
    assert isinstance(error, UserError)
    lines = str(error).splitlines()
    assert len(lines) == 3
    assert all(len(line) < 400 for line in lines)
    entry = KNOWN[name]
    assert entry.licence in lines[0]
    assert f"dreamteacher get-teacher {name}" in lines[1]
    assert f"{entry.gigabytes:g} GB" in lines[1]
    assert entry.host in lines[1]
    assert str(cache / "downloads" / name) in lines[2]
    if len(entry.files) < 4:
        assert all(alternatives(file)[0] in lines[2] for file in entry.files)
    assert ("--embedder" in lines[1]) == entry.bank


def test_aliases_are_not_here_either(cache: Path) -> None:
    assert "'sd-1.5' is not here yet" in str(known.missing_message("runwayml/stable-diffusion-v1-5"))
    assert known.missing_message("mine") is None


def fetch_tiny(cache: Path, name: str, tiny_spec: DiffusionSpec, card: dict[str, Any]) -> Path:
    folder = cache / "teachers" / name
    folder.mkdir(parents=True)
    save_teacher(folder, {"w": torch.zeros(1)}, tiny_spec, {"name": name, **card})
    return folder


def test_what_is_fetched_is_found_by_name(cache: Path, tiny_spec: DiffusionSpec) -> None:
    folder = fetch_tiny(cache, "sd-1.5", tiny_spec, {})
    fetch_tiny(cache, ".half-made.1.tmp", tiny_spec, {})
    assert known.fetched() == {"sd-1.5": folder}
    assert known.fetched_folder("sd-1.5") == known.fetched_folder("runwayml/stable-diffusion-v1-5") == folder
    for name in ("../teachers/sd-1.5", ".half-made.1.tmp", "", "."):
        assert known.fetched_folder(name) is None


# --- list and doctor ----------------------------------------------------------------------------------------


def test_the_list_tells_what_is_here(
    cache: Path, tiny_spec: DiffusionSpec, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("dreamteacher.teachers.registry.EMBEDDED", {"tiny": tiny_teacher})
    told = {"levels": {"4": 77}, "modes": ["encode"], "gmacs": [2.5, 1.25], "licence": "CC0"}
    fetch_tiny(cache, "taesd", tiny_spec, told)
    print_list(ListConfig())
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(lines) == [
        "name",
        "tiny",
        "taesd",
        *(n for n in KNOWN if n != "taesd"),
        "FOLDER",
        "FILE.py:FUNCTION",
    ]
    assert re.search(
        r"embedded +diffusion +encode, sample +4: 8, 8: 8, 16: 8, 32: 8 +64 x 64 +\S+ / \S+ +CC0-1.0",
        lines["tiny"],
    )
    assert re.search(r"fetched +diffusion +encode +4: 77 +64 x 64 +2\.5 / 1\.2 +CC0$", lines["taesd"])
    entry = lines["adm-imagenet-256"]
    assert re.search(r"not fetched diffusion +encode, sample +4: 512, 8: 512, 16: 1024, 32: 1024 ", entry)
    assert "256 x 256   1119.8 / 486.5  MIT (code); the model card says research only" in entry
    print_list(ListConfig(filter="NVIDIA"))
    assert len(capsys.readouterr().out.splitlines()) == 10


def test_doctor_tells_extras_and_the_cache(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor(DoctorConfig())
    out = capsys.readouterr().out
    assert re.search(r"^  huggingface_hub +\d", out, re.M)
    assert re.search(
        r"^  transformers +(\d|not installed \(only for get-teacher, of Stable Diffusion\))", out, re.M
    )
    assert f"cache          {cache} (empty)" in out
    (cache / "downloads").mkdir()
    (cache / "downloads" / "file.pt").write_bytes(bytes(1_500_000))
    doctor(DoctorConfig())
    assert f"{cache} (1.5 MB)" in capsys.readouterr().out


# --- the document -------------------------------------------------------------------------------------------


def test_the_table_of_the_document() -> None:
    """DREAMTEACHER_WRITE_DOCS=1 writes it anew."""
    text = PAGE.read_text()
    marks = "<!-- published -->\n", "\n<!-- end of published -->"
    before, _, rest = text.partition(marks[0])
    table, _, after = rest.partition(marks[1])
    assert after, "docs/teachers.md lacks the marks of the table"
    if os.environ.get("DREAMTEACHER_WRITE_DOCS"):
        PAGE.write_text(before + marks[0] + teacher_table() + marks[1] + after)
        return
    assert table == teacher_table(), "DREAMTEACHER_WRITE_DOCS=1 rewrites docs/teachers.md"


def commands() -> list[str]:
    """Every line of the document's blocks that begins with `dreamteacher`; lines that go on are joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("dreamteacher ")]


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_document_is_understood(command: str) -> None:
    verb, *arguments = shlex.split(command, comments=True)[1:]
    entry = cli.VERBS[verb]
    config = cli.parse(cli.named(entry.config), verb, arguments)
    if isinstance(config, GetTeacherConfig):
        from dreamteacher.teachers.published.request import choose, settings_of

        _, chosen = choose(config, EMBEDDED)
        from_json(SETTINGS[chosen.kind], settings_of(config, chosen))


def test_every_teacher_of_the_paper_has_its_command() -> None:
    fetched = {shlex.split(c)[2] for c in commands() if c.startswith("dreamteacher get-teacher")}
    assert {name for name, entry in KNOWN.items() if entry.paper} <= fetched
    used = {m[1] for c in commands() if (m := re.search(r"pretrain .*--teacher (\S+)", c))}
    assert {"adm-imagenet-256-uncond", "sd-1.4", "bigbigan-128", "icgan-256", "stylegan2-ffhq-256"} <= used
