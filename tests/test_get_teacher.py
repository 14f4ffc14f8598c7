"""`get-teacher` from end to end, on golden networks; what is refused, and that nothing is left then."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dreamteacher import checkpoint, cli, fetch, teachers
from dreamteacher.errors import UserError
from dreamteacher.teachers import adm, biggan, get, load_teacher, read_card, stable_diffusion, vae
from dreamteacher.teachers.diffusion import DiffusionSpec, build_unet
from dreamteacher.teachers.get import GetTeacherConfig, get_teacher
from dreamteacher.teachers.known import KNOWN, fetched_folder

GOLDEN = Path(__file__).parent / "golden"
# Of the golden network, over those of the published one that it is like.
TINY_ADM = (
    "--settings", "image_size=64", "num_head_channels=16", "model_channels=32", "channel_mult=null",
    "num_res_blocks=1",
)  # fmt: skip


def run(*arguments: str | Path) -> Path | None:
    return get_teacher(cli.parse(GetTeacherConfig, "get-teacher", [str(a) for a in arguments]))


def refused(*arguments: str | Path) -> str:
    with pytest.raises(UserError) as error:
        run(*arguments)
    text = str(error.value)
    assert 2 <= len(text.splitlines()) <= 3, text
    return text


def left(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a current folder beside it; no network may be used."""
    monkeypatch.setenv("DREAMTEACHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "cache"


def golden(name: str) -> dict[str, Tensor]:
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        return {k.removeprefix("sd."): file.get_tensor(k) for k in file.keys() if k.startswith("sd.")}  # noqa: SIM118


@pytest.fixture
def adm_file(cache: Path) -> Path:
    path = Path("256x256.pt")
    torch.save(golden("adm_legacy"), path)
    return path


# --- from a file to a teacher -------------------------------------------------------------------------------


def test_a_checkpoint_of_ones_own(adm_file: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("mine", "--file", adm_file, "--like", "adm-lsun-cat", *TINY_ADM, "--licence", "CC0")
    assert out == cache / "teachers" / "mine" == fetched_folder("mine")
    assert left(cache) == ["teachers/mine/teacher.json", "teachers/mine/teacher.safetensors"]
    card = read_card(out)
    assert (card["family"], card["name"], card["licence"], card["kind"]) == ("diffusion", "mine", "CC0", "adm")
    digest = hashlib.sha256(adm_file.read_bytes()).hexdigest()
    assert card["source"] == {"from": "a local file", "files": {"256x256.pt": digest}}
    assert card["settings"] == KNOWN["adm-lsun-cat"].settings | {
        "image_size": 64, "num_head_channels": 16, "model_channels": 32, "num_res_blocks": 1,
    } and "channel_mult" in KNOWN["adm-lsun-cat"].settings or "channel_mult" not in card["settings"]  # fmt: skip
    assert card["levels"] == {"4": 32, "8": 32, "16": 32, "32": 32}
    assert card["modes"] == ["encode", "sample"]
    full, needed = card["gmacs"]
    assert 0 < needed < full / 2
    said = capsys.readouterr().out
    for words in ("mine: a checkpoint of your own, licence: CC0", "4: 32, 8: 32", "--images FOLDER --teacher mine"):
        assert words in said

    teacher = load_teacher(str(out))
    assert (teacher.name, teacher.licence, teacher.timesteps) == ("mine", "CC0", (50,))
    maps = teacher.encode(torch.rand(1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    assert [m.shape[1] for m in maps] == list(card["levels"].values())
    expected, _ = adm.convert(adm_file, card["settings"])
    for key, value in teachers._weights(out, card).items():
        assert torch.equal(value, expected[key].float()), key
