"""Teachers by name or folder: what they are, where their weights lie, how they are built."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dreamteacher.runtime.config import from_json, parse_json, to_json
from dreamteacher.runtime.errors import UserError, did_you_mean
from dreamteacher.spec import Noise

if TYPE_CHECKING:
    import torch

    from dreamteacher.teachers.base import Teacher
    from dreamteacher.teachers.family import Family

WEIGHTS = "teacher.safetensors"
SPEC = "teacher.json"


class Entry(NamedTuple):
    """Where a family is: it is imported when it is first asked for, and torch with it.

    Args:
        module: ends in `FAMILY = Family(...)`.
        kinds: of published checkpoints, those that the family's `convert` reads.
    """

    module: str
    kinds: tuple[str, ...] = ()


FAMILIES: dict[str, Entry] = {
    "diffusion": Entry("dreamteacher.teachers.diffusion.family", ("adm", "ddpm")),
    "stable-diffusion": Entry("dreamteacher.teachers.stable_diffusion.family", ("stable-diffusion",)),
    "stylegan2": Entry("dreamteacher.teachers.stylegan2.family", ("stylegan2", "icgan-stylegan2")),
    "biggan": Entry("dreamteacher.teachers.biggan.family", ("biggan",)),
    "vae": Entry("dreamteacher.teachers.vae", ("vae",)),
}
EMBEDDED = {p.name: p for p in sorted((Path(__file__).parent.parent / "weights").glob("*")) if p.is_dir()}


def family_of(name: str) -> Family:
    """The family of this name (KeyError: there is none); its module is imported."""
    family: Family = importlib.import_module(FAMILIES[name].module).FAMILY
    return family


def families_by_kind() -> dict[str, str]:
    """The kinds of published checkpoints that can be converted -> their families; nothing is imported."""
    return {kind: name for name, entry in FAMILIES.items() for kind in entry.kinds}


def teacher_folder(name: str) -> Path:
    """The folder of an embedded or fetched teacher's name, or of a path that `train-teacher` or `get-teacher` wrote.

    Raises:
        UserError: for an unknown name, a published one that is not here yet, or a folder that holds no teacher.
    """
    from dreamteacher.teachers.published.known import KNOWN, fetched, fetched_folder, missing_message

    if name in EMBEDDED:
        return EMBEDDED[name]
    folder = Path(name)
    if (folder / SPEC).is_file() and (folder / WEIGHTS).is_file():
        return folder
    if found := fetched_folder(name):
        return found
    if missing := missing_message(name):
        raise missing
    if name.endswith(".py"):
        raise UserError(f"'{name}' names no function.", f"Name one that returns a Teacher: {name}:FUNCTION.")
    if folder.is_dir():
        raise UserError(
            f"'{name}' holds no teacher ({SPEC} and {WEIGHTS} are not both there).",
            "Give the --out folder of a finished `dreamteacher train-teacher`.",
        )
    raise UserError(
        f"There is no teacher '{name}'.{did_you_mean(name, {*EMBEDDED, *fetched(), *KNOWN})}",
        f"Use one of: {', '.join({**EMBEDDED, **fetched()})}; a name of `dreamteacher list teachers`; "
        "or a folder that `dreamteacher train-teacher` made.",
    )


def read_card(folder: Path) -> dict[str, Any]:
    """teacher.json: family, name, licence, sha256 of the weights, the network's spec, how it was trained."""
    try:
        card = parse_json((folder / SPEC).read_text())
        texts = {key: str(card[key]) for key in ("name", "licence", "sha256") if key in card}
        return {**card, **texts, "family": str(card["family"]), "network": card["network"]}
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
    blocks: tuple[int, ...] = (),
    psi: float = 1.0,
    device: torch.device | str = "cpu",
) -> Teacher:
    """A frozen teacher from an embedded or fetched name, a folder, or a Python file of one's own.

    Args:
        timesteps: t of a diffusion teacher's features; empty for the one its card recommends.
        noise: how a diffusion teacher noises images.
        blocks: decoder blocks of a diffusion U-Net whose outputs are the maps; empty: the paper's levels.
        psi: truncation of a GAN's samples (1: none, as the paper's feature datasets).

    Raises:
        UserError: for unknown names, damaged or altered weights, or settings the teacher does not have.
    """
    if is_python(name):
        from dreamteacher.teachers.module import teacher_from_file

        if blocks:
            raise UserError(
                f"'{name}' decides its maps itself: --blocks means nothing to it.", "Leave out --blocks."
            )

        return teacher_from_file(name).to(device)
    folder = teacher_folder(name)
    card = read_card(folder)
    family = _family(folder, card)
    if blocks and "blocks" not in family.settings:
        raise UserError(
            f"--blocks names decoder blocks of a diffusion U-Net; '{name}' is of the family '{card['family']}'.",
            "Leave out --blocks.",
        )
    spec = read_spec(folder, card)
    weights = _weights(folder, card)
    named = {"name": card.get("name", folder.name), "licence": card.get("licence", "not recorded")}
    asked = {"timesteps": timesteps, "noise": noise, "blocks": blocks, "psi": psi}
    settings = {key: value for key, value in asked.items() if key in family.settings}
    return family.load(weights, spec, folder / WEIGHTS, **named, **settings).to(device)


def _family(folder: Path, card: Mapping[str, Any]) -> Family:
    if card["family"] not in FAMILIES:
        raise UserError(
            f"'{folder}' holds a teacher of the family '{card['family']}', which this version does not know.",
            f"Known: {', '.join(FAMILIES)}. Update dreamteacher, or name another teacher.",
        )
    return family_of(card["family"])


def read_spec(folder: Path, card: Mapping[str, Any]) -> Any:
    """The network's spec from a card; UserError for an unknown family, or settings that do not fit it."""
    return from_json(_family(folder, card).spec, card["network"])


def _weights(folder: Path, card: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    from dreamteacher.runtime.checkpoint import read_state_dict

    path = folder / WEIGHTS
    if card.get("sha256") and sha256(path) != card["sha256"]:
        raise UserError(
            f"'{path}' is not the file that its {SPEC} describes (sha256 differs).",
            "It is damaged or was replaced: copy the whole folder again.",
        )
    return {k: v.float() if v.is_floating_point() else v for k, v in read_state_dict(path).items()}


def sha256(path: Path) -> str:
    """The hex digest of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_teacher(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    spec: Any,
    card: Mapping[str, Any],
    *,
    half: bool = True,
) -> None:
    """Writes teacher.safetensors and teacher.json.

    Args:
        spec: of one of the families of the table, which its class names (`family`).
        card: "name", "licence" and whatever tells how it was trained, or where it is from.
        half: store floating-point weights as float16 (rounding is far below the noise of training);
            otherwise as they come, so that converted weights stay exactly what was published.
    """
    from safetensors.torch import save_file

    from dreamteacher.runtime import checkpoint

    kept = {
        k: (v.half() if half and v.is_floating_point() else v).detach().cpu().contiguous().clone()
        for k, v in weights.items()
    }
    checkpoint.atomic_write(folder / WEIGHTS, lambda temporary: save_file(kept, temporary))
    full = {"family": spec.family, **card, "sha256": sha256(folder / WEIGHTS), "network": to_json(spec)}
    checkpoint.write_text(folder / SPEC, json.dumps(full, indent=2) + "\n")


def is_python(name: str) -> bool:
    """Whether a teacher's name means a function of a Python file of one's own: FILE.py:FUNCTION."""
    return name.rpartition(":")[0].endswith(".py")


def fingerprint(name: str) -> str:
    """sha256 of what decides a teacher's maps: its weights, or the Python file that builds it.

    Of weights it is the card's, which loading them has compared: gigabytes are not read again.
    """
    if is_python(name):
        from dreamteacher.teachers.module import own_file

        return sha256(own_file(name))
    folder = teacher_folder(name)
    return str(read_card(folder).get("sha256") or sha256(folder / WEIGHTS))
