"""`get-teacher`: published weights (or a checkpoint of one's own) become a teacher's folder, once and whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from dreamteacher import __version__
from dreamteacher.runtime.distributed.device import pick_device
from dreamteacher.runtime.download import http
from dreamteacher.runtime.download.archive import extract, is_archive
from dreamteacher.runtime.errors import UserError, shorten
from dreamteacher.teachers.cost import measure
from dreamteacher.teachers.published.config import GetTeacherConfig
from dreamteacher.teachers.published.known import (
    KNOWN,
    Known,
    canonical,
    download_place,
    file_list,
    missing_message,
)
from dreamteacher.teachers.published.request import check_bank, choose, needs_bank, settings_of
from dreamteacher.teachers.registry import (
    EMBEDDED,
    families_by_kind,
    family_of,
    read_card,
    save_teacher,
    sha256,
)

if TYPE_CHECKING:
    from torch import nn

    from dreamteacher.data.image_set import ImageSet
    from dreamteacher.teachers.family import Cost, Family


class _Bank(NamedTuple):
    """What an instance-conditional GAN is told of, opened before anything is downloaded."""

    images: ImageSet
    embedder: nn.Module


def get_teacher(config: GetTeacherConfig) -> Path | None:
    """Fetches, converts and saves one teacher; returns its folder (None for a dry run).

    The folder appears when it is whole: after an error there is none, and downloads that can go on are kept.

    Raises:
        UserError: for unknown names, settings that do not fit, files that are missing, damaged, foreign or cannot
            be downloaded, or a folder that is taken.
    """
    name, known = choose(config, EMBEDDED)
    settings = settings_of(config, known)
    out = config.out or http.cache_folder() / "teachers" / name
    if _is_here(out, known, settings, config):
        print(f"'{out}' is here already.\n{_next(name, out, config)}")
        return out
    check_bank(config, known, name)
    if config.dry_run:
        print(_plan(name, known, settings, out, config))
        return None
    bank = _open_bank(config)
    family = family_of(families_by_kind()[known.kind])
    source = _fetch(name, known, config)
    http.check_space(out, _bytes(source) // (2 if config.half else 1))
    with _unpacked(source, known, name) as path:
        weights, spec = family.convert[known.kind](path, _resolved(settings, path, known, name))
    weights = {**weights, **_instances(bank, family, spec, name, config)}
    facts = {"from": _origin(known, config), "files": _digests(source, known)}
    card = {
        "name": name, "licence": known.licence, "kind": known.kind, "what": known.what, "source": facts,
        "settings": settings, "version": __version__,
    }  # fmt: skip
    found = _save(out, weights, spec, card, config)
    print(_summary(name, known, family.name, out, found))
    print(_next(name, out, config))
    return out


# --- files --------------------------------------------------------------------------------------------------


def _is_here(out: Path, known: Known, settings: Mapping[str, Any], config: GetTeacherConfig) -> bool:
    """Whether the folder holds this very teacher.

    Raises:
        UserError: when it holds something else.
    """
    if (out / "teacher.json").is_file():
        card = read_card(out)
        asked = config.file is None and config.url is None and config.bank_images is None
        if asked and (card.get("kind"), card.get("settings")) == (known.kind, settings):
            return True
        raise UserError(
            f"'{out}' holds a teacher already ({card.get('what', card['family'])}).",
            "Delete that folder to make it anew, or name another --out.",
        )
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"'{out}' is there and is no teacher's folder.", "Choose another --out.")
    above = next(p for p in out.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(
            f"'{out}' cannot be made: nothing can be written into '{above}'.", "Choose another --out."
        )
    return False


def _fetch(name: str, known: Known, config: GetTeacherConfig) -> Path:
    """The published file, archive or folder on this machine."""
    if config.file is not None:
        if not config.file.exists():
            published = f" It is published as: {file_list(known)}." if known.files else ""
            raise UserError(f"'{config.file}' does not exist.{published}", "Give its path.")
        if known.sha256 and config.file.is_file() and sha256(config.file) != known.sha256.lower():
            raise UserError(
                f"'{config.file}' is not the file that was meant: its sha256 is {sha256(config.file)}.",
                "It is damaged or another file: get it again.",
            )
        return config.file
    place = download_place(name)
    if known.hub:
        return http.hub_folder(known.hub, known.files, place, size=int(known.gigabytes * 1e9))
    if known.url:
        return http.download(known.url, place / known.files[0], sha256=known.sha256)
    if (place / known.files[0]).is_file():
        return place / known.files[0]
    raise missing_message(name) or UserError(f"Nobody can download '{name}'.", "Give it by --file.")


@contextmanager
def _unpacked(source: Path, known: Known, name: str) -> Iterator[Path]:
    """The weights in an archive, for as long as they are read; any other source as it is."""
    if not (source.is_file() and is_archive(source)):
        yield source
        return
    if not known.inside:
        raise UserError(
            f"'{source}' is an archive, and which of its files is meant is not known.",
            "Unpack it and give the file of weights by --file.",
        )
    folder = download_place(name) / f"unpacked-{os.getpid()}"
    try:
        found = extract(source, folder, [known.inside])
        if len(found) > 1:
            raise UserError(
                f"'{source}' holds {len(found)} files {known.inside}: {shorten(p.name for p in found)}.",
                "Unpack it and give the right one by --file.",
            )
        yield found[0]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _resolved(settings: Mapping[str, Any], path: Path, known: Known, name: str) -> dict[str, Any]:
    """Settings for the conversion: parts of Stable Diffusion that come from elsewhere become paths."""
    ready = dict(settings)
    if known.other_unet and "unet" not in ready:
        repository, file = known.other_unet
        folder = (
            path if (path / file).is_file() else http.hub_folder(repository, (file,), download_place(name))
        )
        ready["unet"] = str(folder / file)
    if vae := ready.get("vae"):
        entry = canonical(str(vae))
        if entry in KNOWN and KNOWN[entry].kind == "vae":
            files, hub, place = KNOWN[entry].files, KNOWN[entry].hub, download_place(entry)
        else:
            files, hub, place = KNOWN["kl-f8"].files, str(vae), download_place(str(vae).replace("/", "--"))
        if not Path(str(vae)).exists():
            ready["vae"] = str(http.hub_folder(hub, files, place))
    return ready


def _bytes(source: Path) -> int:
    files = [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def _digests(source: Path, known: Known) -> dict[str, str]:
    """sha256 of every file that was read, by its published name."""
    if source.is_file():
        return {source.name: sha256(source)}
    either = [
        [name for name in http.alternatives(entry) if (source / name).is_file()] for entry in known.files
    ]
    return {names[0]: sha256(source / names[0]) for names in either if names}


def _origin(known: Known, config: GetTeacherConfig) -> str:
    return "a local file" if config.file is not None else known.hub or known.url or known.page


# --- instances ----------------------------------------------------------------------------------------------


def _open_bank(config: GetTeacherConfig) -> _Bank | None:
    if config.bank_images is None or config.embedder is None:
        return None
    from dreamteacher.teachers.biggan.instance_bank import bank_images, load_embedder

    return _Bank(bank_images(config.bank_images), load_embedder(config.embedder))


def _instances(
    bank: _Bank | None, family: Family, spec: Any, name: str, config: GetTeacherConfig
) -> dict[str, Tensor]:
    """The instances (and their classes) that a network is told of; nothing for one that is told of none."""
    from dreamteacher.teachers.biggan.instance_bank import bank_labels, build_bank

    features, classes = family.instances(spec) if family.instances else (0, 0)
    if bank is None and features:
        raise needs_bank(name)
    if bank is None:
        return {}
    if not features:
        raise UserError(f"'{name}' is not told of instances.", "Leave --bank-images and --embedder out.")
    found = {}
    if classes:
        found["bank_labels"] = bank_labels(bank.images, classes, limit=config.bank_size)
    found["bank"] = build_bank(bank.images, bank.embedder, limit=config.bank_size, device=pick_device())
    if found["bank"].shape[1] != features:
        raise UserError(
            f"'{name}' takes instances {features} wide; those of '{config.embedder}' are "
            f"{found['bank'].shape[1]}.",
            "Give the network that it was trained with by --embedder.",
        )
    return found


def _save(
    out: Path, weights: Mapping[str, Tensor], spec: Any, card: Mapping[str, Any], config: GetTeacherConfig
) -> Cost:
    """Writes the folder beside its place, then moves it there; what it has and costs, which its card says too."""
    found = measure(spec.family, spec)
    facts = {"levels": found.levels, "modes": found.modes, "gmacs": [found.full, found.needed]}
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        save_teacher(temporary, weights, spec, {**card, **facts}, half=config.half)
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"'{out}' cannot be made: {error.strerror}.", "Choose another --out.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return found


# --- what is printed ----------------------------------------------------------------------------------------


def _plan(name: str, known: Known, settings: Mapping[str, Any], out: Path, config: GetTeacherConfig) -> str:
    files = [http.alternatives(entry)[0] for entry in known.files] + (
        [known.other_unet[1]] if known.other_unet else []
    )
    lines = [
        f"{name}: {known.what}",
        f"  licence   {known.licence}",
        f"  from      {config.file or _origin(known, config)}",
    ]
    if config.file is None:
        lines += [f"  download  about {known.gigabytes:g} GB", *(f"    {file}" for file in files)]
        lines += [f"  offline   put them into {download_place(name)}"]
    return "\n".join([*lines, f"  settings  {json.dumps(settings)}", f"  to        {out}"])


def _summary(name: str, known: Known, family: str, out: Path, found: Cost) -> str:
    levels = ", ".join(f"{stride}: {channels}" for stride, channels in found.levels.items())
    whole = f" ({found.full:.1f} without the early exit)" if found.full > found.needed else ""
    return "\n".join(
        [
            f"{name}: {known.what}, licence: {known.licence}",
            f"  family {family}, {' and '.join(found.modes)}; levels (stride: channels) {levels}",
            f"  {found.needed:.1f} GMACs an image{whole}",
            f"  {out} ({http.amount(_bytes(out))})",
        ]
    )


def _next(name: str, out: Path, config: GetTeacherConfig) -> str:
    """The command that pretrains with it."""
    modes = read_card(out).get("modes", ["encode"])
    what = "--images FOLDER" if "encode" in modes else "--dataset synthesized"
    return f"Next: dreamteacher pretrain {what} --teacher {config.out or name} --out runs/{name}"
