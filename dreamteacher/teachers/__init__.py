"""Teachers by name or folder: what they are, where their weights lie, how they are built."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dreamteacher import checkpoint
from dreamteacher.config import from_json, to_json
from dreamteacher.errors import UserError, did_you_mean
from dreamteacher.teachers.base import Teacher
from dreamteacher.teachers.diffusion import DiffusionSpec, DiffusionTeacher, Noise, build_unet

WEIGHTS = "teacher.safetensors"
SPEC = "teacher.json"
EMBEDDED = {p.name: p for p in sorted((Path(__file__).parent.parent / "weights").glob("*")) if p.is_dir()}


def teacher_folder(name: str) -> Path:
    """The folder of an embedded teacher's name, or of a path that `train-teacher` wrote.

    Raises:
        UserError: for an unknown name, or a folder that holds no teacher.
    """
    if name in EMBEDDED:
        return EMBEDDED[name]
    folder = Path(name)
    if (folder / SPEC).is_file() and (folder / WEIGHTS).is_file():
        return folder
    if folder.is_dir():
        raise UserError(
            f"'{name}' holds no teacher ({SPEC} and {WEIGHTS} are not both there).",
            "Give the --out folder of a finished `dreamteacher train-teacher`.",
        )
    raise UserError(
        f"There is no teacher '{name}'.{did_you_mean(name, EMBEDDED)}",
        f"Use one of: {', '.join(EMBEDDED)}; or a folder that `dreamteacher train-teacher` made.",
    )


def read_card(folder: Path) -> dict[str, Any]:
    """teacher.json: family, name, licence, sha256 of the weights, the network's spec, how it was trained."""
    try:
        card = json.loads((folder / SPEC).read_text())
        return {**card, "family": card["family"], "network": card["network"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"'{folder / SPEC}' cannot be read: {type(error).__name__} {error}.",
            "Restore it, or train the teacher again.",
        ) from None


def load_teacher(
    name: str,
    *,
    timesteps: tuple[int, ...] = (),
    noise: Noise = "stochastic",
    device: torch.device | str = "cpu",
) -> Teacher:
    """A frozen teacher from an embedded name or a folder.

    Args:
        timesteps: t of a diffusion teacher's features; empty for the one its card recommends.
        noise: how a diffusion teacher noises images.

    Raises:
        UserError: for unknown names, damaged or altered weights, or settings the teacher does not have.
    """
    folder = teacher_folder(name)
    card = read_card(folder)
    match card["family"]:
        case "diffusion":
            spec = from_json(DiffusionSpec, card["network"])
            with torch.random.fork_rng(devices=[]):  # fresh weights are drawn before ours replace them
                unet = build_unet(spec)
            checkpoint.load_exactly(unet, _weights(folder, card), folder / WEIGHTS)
            teacher = DiffusionTeacher(
                unet,
                spec,
                name=card.get("name", folder.name),
                licence=card.get("licence", "not recorded"),
                timesteps=timesteps,
                noise=noise,
            )
            return teacher.to(device)
        case family:
            raise UserError(
                f"'{folder}' holds a teacher of the family '{family}', which this version does not know.",
                "Known: diffusion. Update dreamteacher, or name another teacher.",
            )


def _weights(folder: Path, card: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS
    if card.get("sha256") and sha256(path) != card["sha256"]:
        raise UserError(
            f"'{path}' is not the file that its {SPEC} describes (sha256 differs).",
            "It is damaged or was replaced: copy the whole folder again.",
        )
    try:
        return {k: v.float() for k, v in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{path}' cannot be read: {error}.", "Copy the whole folder again.") from None


def sha256(path: Path) -> str:
    """The hex digest of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_teacher(
    folder: Path, weights: Mapping[str, torch.Tensor], spec: DiffusionSpec, card: Mapping[str, Any]
) -> None:
    """Writes teacher.safetensors (float16, as rounding is far below the noise of training) and teacher.json.

    Args:
        card: "name", "licence" and whatever tells how it was trained.
    """
    half = {k: v.detach().cpu().half().contiguous() for k, v in weights.items()}
    checkpoint.atomic_write(folder / WEIGHTS, lambda temporary: save_file(half, temporary))
    full = {"family": "diffusion", **card, "sha256": sha256(folder / WEIGHTS), "network": to_json(spec)}
    checkpoint.write_text(folder / SPEC, json.dumps(full, indent=2) + "\n")
