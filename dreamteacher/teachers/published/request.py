"""What `get-teacher` is asked for: its settings, and the entry of the table that they mean."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from dreamteacher.runtime.errors import UserError, did_you_mean
from dreamteacher.teachers.published.config import GetTeacherConfig
from dreamteacher.teachers.published.known import ALIASES, KNOWN, NAME, SWAV, Known, Shape, canonical
from dreamteacher.teachers.registry import families_by_kind, family_of

HUB_ID = r"[A-Za-z0-9][\w.-]*/[\w.-]+"
# Whose files a repository of each kind has, where nothing nearer is named by --like.
_LIKE: dict[str, str] = {"ddpm": "ddpm-cat-256", "stable-diffusion": "sd-1.5", "vae": "kl-f8"}


def choose(config: GetTeacherConfig, embedded: Collection[str]) -> tuple[str, Known]:
    """The name, and the entry of the table with what the command line says instead; nothing is touched.

    Args:
        embedded: names of the teachers that come with the package.

    Raises:
        UserError: for names that mean nothing, and settings that contradict each other.
    """
    name = canonical(config.name)
    if not name:
        raise UserError(
            "'get-teacher' needs the name of a teacher.",
            "`dreamteacher list teachers` names the published ones; for a checkpoint of your own, a new name.",
        )
    if name in embedded:
        raise UserError(f"'{name}' comes with the package.", f"Use it as it is: --teacher {name}")
    if name in KNOWN:
        if config.like or config.kind:
            raise UserError(
                f"--like and --kind are for a checkpoint of your own, and '{name}' is a published one.",
                "Give your own another name.",
            )
        known = KNOWN[name]
    else:
        known = _own(config, name)
    if config.url:
        known = _elsewhere(known, config.url)
    several = known.hub or (config.file is not None and config.file.is_dir())
    if config.sha256 and several:
        raise UserError("--sha256 is of one file, and here are several.", "Leave it out.")
    return name, replace(known, licence=config.licence or known.licence, sha256=config.sha256 or known.sha256)


def _own(config: GetTeacherConfig, name: str) -> Known:
    """An entry for a checkpoint of the user's own."""
    if not (config.file or config.url):
        raise UserError(
            f"There is no published teacher '{name}'.{did_you_mean(name, [*KNOWN, *ALIASES])}",
            "`dreamteacher list teachers` names them; a checkpoint of your own needs --file or --url.",
        )
    if config.out is None and not re.fullmatch(NAME, name):
        raise UserError(
            f"'{name}' cannot be a teacher's name.", "Use letters, digits, points and hyphens; or give --out."
        )
    if config.like is not None:
        like = canonical(config.like)
        if like not in KNOWN:
            raise UserError(
                f"There is no published teacher '{config.like}'.{did_you_mean(like, KNOWN)}",
                "`dreamteacher list teachers` names them; or say its --kind.",
            )
        base = KNOWN[like]
    elif config.kind is not None:
        files = KNOWN[_LIKE[config.kind]].files if config.kind in _LIKE else ()
        base = Known(
            kind=config.kind, what="", licence="", shape=Shape((0, 0), {}, 0, 0), gigabytes=0, files=files,
            bank=config.kind == "icgan-stylegan2",
        )  # fmt: skip
    else:
        raise UserError(
            f"What kind of network '{config.file or config.url}' holds is not known.",
            f"Name the published teacher that it is like by --like, or its --kind: {', '.join(families_by_kind())}.",
        )
    if config.kind not in (None, base.kind):
        raise UserError(
            f"'{config.like}' is of the kind {base.kind}, not {config.kind}.", "Leave --kind out."
        )
    return replace(
        base, what="a checkpoint of your own", licence="not recorded", url="", hub="", page="", sha256=None
    )


def _elsewhere(known: Known, url: str) -> Known:
    """The entry with another address: of a hub repository where it is a folder, of one file where it is a file."""
    folder = known.kind in _LIKE
    hub = re.fullmatch(HUB_ID, url) is not None
    if hub and folder:
        return replace(known, hub=url, url="", sha256=None)
    if hub or folder:
        wanted = "a hub repository (OWNER/NAME)" if folder else "the address of one file (https://...)"
        raise UserError(
            f"--url cannot be '{url}': a teacher of the kind {known.kind} needs {wanted}.",
            "Or download it yourself and give it by --file.",
        )
    name = PurePosixPath(urlsplit(url).path).name
    return replace(
        known, url=url, hub="", files=(name if re.fullmatch(NAME, name) else "download",), sha256=None
    )


def settings_of(config: GetTeacherConfig, known: Known) -> dict[str, Any]:
    """The published flags with those of the command line over them: plain JSON values.

    Raises:
        UserError: for what cannot be read, or is not for this kind.
    """
    settings = dict(known.settings)
    for given in config.settings:
        key, equals, text = given.partition("=")
        if not key or not equals:
            raise UserError(
                f"--settings takes KEY=VALUE, not '{given}'.", "For example: --settings num_heads=4"
            )
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        settings.pop(key, None)
        if value is not None:
            settings[key] = value
    for key, text in (("prompt", config.prompt), ("vae", config.vae)):
        if text and known.kind != "stable-diffusion":
            raise UserError(
                f"--{key} is for Stable Diffusion, not for the kind {known.kind}.", "Leave it out."
            )
        if text:
            settings[key] = text
    if config.vae:
        _check_vae(config.vae)
    if config.size is not None:
        settings |= _size(config.size, known.kind)
    return settings


def _check_vae(vae: str) -> None:
    entry = KNOWN.get(canonical(vae))
    if Path(vae).exists() or (entry.kind == "vae" if entry else re.fullmatch(HUB_ID, vae)):
        return
    names = [name for name, entry in KNOWN.items() if entry.kind == "vae"]
    raise UserError(
        f"'{vae}' is no autoencoder: neither here, nor a published one, nor OWNER/NAME.{did_you_mean(vae, names)}",
        f"Published: {', '.join(names)}.",
    )


def _size(size: tuple[int, int], kind: str) -> dict[str, Any]:
    if kind in ("stable-diffusion", "vae"):
        return {"size": list(size)}
    if kind in ("adm", "ddpm") and size[0] == size[1]:
        return {"image_size": size[0]}
    if kind in ("adm", "ddpm"):
        raise UserError(
            f"The size of a teacher of the kind {kind} is square, not {size[0]} x {size[1]}.",
            "Leave --size out here; the --size of `pretrain` may be another.",
        )
    raise UserError(
        f"The size of a teacher of the kind {kind} is read from its weights.", "Leave --size out."
    )


def check_bank(config: GetTeacherConfig, known: Known, name: str) -> None:
    """Raises UserError unless there are images and embedder for a teacher that needs a bank, and for no other."""
    given = [config.bank_images, config.embedder]
    if None in given and (known.bank or given != [None, None]):
        raise needs_bank(name)
    if given != [None, None] and family_of(families_by_kind()[known.kind]).instances is None:
        raise UserError(
            f"--bank-images and --embedder are for IC-GAN, not for the kind {known.kind}.", "Leave them out."
        )
    if config.bank_size < 1:
        raise UserError(f"--bank-size is {config.bank_size}.", "Use at least 1.")
    if config.bank_images is not None and not config.bank_images.is_dir():
        raise UserError(f"'{config.bank_images}' is no folder of images.", "Give one by --bank-images.")
    if config.embedder is not None and not config.embedder.is_file():
        raise UserError(
            f"There is no file '{config.embedder}'.", f"--embedder: a ResNet-50, best SwAV's: {SWAV}"
        )


def needs_bank(name: str) -> UserError:
    """What a teacher that is told of instances lacks."""
    return UserError(
        f"'{name}' makes images like given ones: it needs --bank-images FOLDER and --embedder FILE.",
        f"FOLDER: images of yours. FILE: a ResNet-50, best SwAV's, which it was trained with:\n{SWAV}",
    )
