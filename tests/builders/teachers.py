"""Folders of tiny teachers with random weights: one of every family, further kinds of some, and one's own file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamteacher.teachers.registry import FAMILIES, family_of, save_teacher
from dreamteacher.teachers.vae import CLASSES, VaeSpec
from tests.builders import biggan

Made = tuple[dict[str, Tensor], Any]
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


def taesd() -> Made:
    """A TAESD with narrow layers."""
    widths, depth = [8] * 4, [1, 2, 1, 1]
    config = {
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "num_encoder_blocks": [1, 1, 1, 1],
        "num_decoder_blocks": depth,
    }
    return autoencoder(VaeSpec(kind="tiny", config=config, size=(64, 64)))


def vq() -> Made:
    """A VQ autoencoder at stride 8."""
    config = {
        "block_out_channels": [4, 8, 12, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "norm_num_groups": 4,
        "num_vq_embeddings": 16,
        "mid_block_add_attention": False,
    }
    return autoencoder(VaeSpec(kind="vq", config=config, size=(64, 64)))


def autoencoder(spec: VaeSpec) -> Made:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = CLASSES[spec.kind](**spec.config)
        if spec.kind == "vq":
            vae.quantize.embedding.weight.data.normal_()
        return vae.state_dict(), spec


def saved(make: Callable[[], Made], name: str) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        weights, spec = make()
        save_teacher(folder, weights, spec, {"name": f"tiny-{name}", "licence": "CC0-1.0"}, half=False)

    return save


# What fills a folder, by kind.
TINY: dict[str, Callable[[Path], None]] = {
    **{name: saved(family_of(name).tiny, name) for name in FAMILIES},
    "bigbigan": biggan.tiny_bigbigan,
    "icgan": biggan.tiny,
    "vae-tiny": saved(taesd, "taesd"),
    "vae-vq": saved(vq, "vq"),
}


def build(kind: str, folder: Path) -> str:
    """A tiny teacher of this kind in `folder`; what --teacher then takes."""
    folder.mkdir()
    if kind == "module":
        (folder / "own.py").write_text(OWN)
        return f"{folder / 'own.py'}:teacher"
    TINY[kind](folder)
    return str(folder)
