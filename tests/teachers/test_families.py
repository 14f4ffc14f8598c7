"""Every family of teachers behind the one contract: the checks pass, a student learns from it, damage is named.

Tiny random networks of each family, made by the builders in the families' own tests.
"""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dreamteacher.cli import main as cli
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.run_folder import read_rows
from dreamteacher.spec import FeatureSpec
from dreamteacher.teachers.registry import SPECS, load_teacher, read_card
from dreamteacher.testing import check_teacher

# The builder of each kind: (module of the tests, function).
TINY = {
    "diffusion": ("tests.teachers.diffusion.test_adm", "tiny"),
    "stable-diffusion": ("tests.builders.stable_diffusion", "tiny"),
    "stylegan2": ("tests.teachers.stylegan2.test_teacher", "tiny"),
    "biggan": ("tests.builders.biggan", "tiny_biggan"),
    "bigbigan": ("tests.builders.biggan", "tiny_bigbigan"),
    "icgan": ("tests.builders.biggan", "tiny"),
    "vae-kl": ("tests.teachers.test_vae", "tiny"),
    "vae-tiny": ("tests.teachers.test_vae", "tiny_taesd"),
    "vae-vq": ("tests.teachers.test_vae", "tiny_vq"),
}
OWN = """
import torch
from torch import nn

from dreamteacher.teachers.module import ModuleTeacher


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.coarse = nn.ConvTranspose2d(8, 6, 4, stride=1)
        self.fine = nn.Sequential(nn.Upsample(scale_factor=4), nn.Conv2d(6, 5, 3, padding=1), nn.ReLU())
        self.image = nn.Sequential(nn.Upsample(scale_factor=4), nn.Conv2d(5, 3, 3, padding=1), nn.Sigmoid())

    def forward(self, z):
        return self.image(self.fine(self.coarse(z)))


def teacher():
    with torch.random.fork_rng(devices=[]):
        decoder = Decoder()
    return ModuleTeacher(
        decoder,
        name="own",
        size=(64, 64),
        levels={4: "fine", 16: "coarse"},
        sample=lambda n, generator: torch.randn(n, 8, 1, 1, generator=generator),
    )
"""


def build(kind: str, folder: Path) -> str:
    """A tiny teacher of this kind in `folder`; what --teacher then takes."""
    folder.mkdir()
    if kind == "module":
        (folder / "own.py").write_text(OWN)
        return f"{folder / 'own.py'}:teacher"
    module, function = TINY[kind]
    getattr(importlib.import_module(module), function)(folder)
    return str(folder)


def test_every_family_has_a_tiny_one(tmp_path):
    families = {read_card(Path(build(kind, tmp_path / kind)))["family"] for kind in TINY}
    assert families == set(SPECS)


@pytest.mark.parametrize("kind", [*TINY, "module"])
def test_contract_and_a_student(kind, image_folder, tmp_path, capsys):
    name = build(kind, tmp_path / "teacher")
    teacher = load_teacher(name)
    check_teacher(teacher)
    before = [p.clone() for p in teacher.parameters()]
    mode = "encode" if "encode" in teacher.modes else "sample"
    teacher.keep_only(mode)
    check_teacher(teacher)
    assert teacher.modes == {mode}
    height, width = teacher.size
    command = [
        "pretrain", "--teacher", name, "--student", "test_resnet", "--out", str(tmp_path / "run"), "--width",
        "8", "--batch-size", "8", "--warmup-epochs", "0", "--log-every", "1", "--device", "cpu",
        "--precision", "float32",
    ]  # fmt: skip
    if mode == "encode":
        command += ["--images", str(image_folder), "--epochs", "2"]
    else:
        command += ["--dataset", "synthesized", "--samples", "16", "--epochs", "2"]
    assert cli.main([*command, "--size", str(height), str(width)]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert teacher.licence in said
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    names = [spec.name for spec in teacher.specs]
    assert all(math.isfinite(row[f"r2/{level}"]) for row in rows for level in names)
    facts = json.loads((tmp_path / "run" / "config.json").read_text())["teacher"]
    assert facts["family"] == teacher.family
    assert facts["licence"] == teacher.licence
    assert list(facts["levels"]) == names
    with safe_open(tmp_path / "run" / "backbone.safetensors", "pt") as file:
        assert file.metadata()["teacher"] == teacher.name
    again = load_teacher(name)
    assert all(map(torch.equal, before, again.parameters()))
    assert isinstance(teacher.specs[0], FeatureSpec)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("fault", ["cut", "altered", "keys", "network", "setting"])
def test_damage_is_named_in_three_lines(kind, fault, tmp_path):
    folder = Path(build(kind, tmp_path / "teacher"))
    weights, card = folder / "teacher.safetensors", json.loads((folder / "teacher.json").read_text())
    if fault == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
        del card["sha256"]
    elif fault == "altered":
        content = bytearray(weights.read_bytes())
        content[-3] ^= 1
        weights.write_bytes(bytes(content))
    elif fault == "keys":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        save_file(dict(list(tensors.items())[1:]), weights)
        del card["sha256"]
    elif fault == "network":
        card["network"] = {"surely": "not"}
    else:
        card["family"] = "dreams"
    (folder / "teacher.json").write_text(json.dumps(card))
    with pytest.raises(UserError) as caught:
        load_teacher(str(folder))
    lines = str(caught.value).splitlines()
    assert len(lines) <= 3
    assert all(len(line) < 300 for line in lines)
