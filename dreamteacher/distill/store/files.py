"""The files of a store of features: their names, the manifest that vouches for them, the basis, the images' list.

`features.json` says what the features are and holds a checksum of every other file; `shard-*.safetensors` hold the items
(`feature_items.py`), one for each draw of each image; `basis.safetensors` what they were projected by; `images.jsonl`
the images' names and sizes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from dreamteacher.data.image_set import ImageSet
from dreamteacher.data.images import ImageFile, below
from dreamteacher.distill.store.items import StorePlan, layout
from dreamteacher.runtime.config import from_json, parse_json, to_json
from dreamteacher.runtime.errors import UserError, first_line
from dreamteacher.runtime.lock import take_lock

FORMAT, VERSION = "dreamteacher-features", 1
MANIFEST, BASIS, IMAGES, CLAIMS = "features.json", "basis.safetensors", "images.jsonl", ".claims"
ANEW = "Make them anew with `dreamteacher make-features`, in another folder."
ALTERED = "its content has changed since it was written (sha256 differs)"


def shard_name(shard: int) -> str:
    """The file of a shard."""
    return f"shard-{shard:06d}.safetensors"


@contextlib.contextmanager
def claim(folder: Path, name: str) -> Iterator[bool]:
    """Within this context the caller alone holds `name` of a store; False when another one does.

    The file is made atomically and locked; the lock ends with the process that holds it, however that ends, so
    there are no stale claims to judge.
    """
    place = folder / CLAIMS
    while True:
        place.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # whoever finished the store has just removed the folder
            lock = take_lock(place / name)
            break
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


# --- the manifest -------------------------------------------------------------------------------------------


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def manifest_text(plan: StorePlan, basis: str | None, shards: Sequence[tuple[str, int]]) -> str:
    """features.json: the plan, the basis' checksum, and checksum and bytes of every shard."""
    facts = {"format": FORMAT, "version": VERSION, "plan": to_json(plan), "basis": basis}
    facts["shards"] = [list(s) for s in shards]
    return json.dumps(facts | {"sha256": _digest(facts)}, indent=1) + "\n"


def read_manifest(folder: Path) -> tuple[StorePlan, str | None, list[tuple[str, int]]]:
    """What `manifest_text` wrote.

    Raises:
        UserError: when the folder holds no finished store, or the manifest was altered or is of another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        made = len(list(folder.glob("shard-*.safetensors"))) if folder.is_dir() else 0
        raise UserError(
            f"'{folder}' holds no finished features ({MANIFEST} is missing, {made} shards are there).",
            "Run the same `dreamteacher make-features` again: it goes on where it stopped."
            if made
            else "Give the --out folder of `dreamteacher make-features`.",
        )
    try:
        facts = parse_json(path.read_text("utf-8"))
        told = facts.pop("sha256")
        if facts["format"] != FORMAT or facts["version"] != VERSION:
            raise UserError(
                f"'{path}' is version {facts['version']} of {facts['format']}; this is {VERSION} of {FORMAT}.",
                "Read it with the version of dreamteacher that wrote it, or make the features anew.",
            )
        if told != _digest(facts):
            raise ValueError("its content has changed since it was written")
        plan, shards = (
            from_json(StorePlan, facts["plan"]),
            [(str(d), int(size)) for d, size in facts["shards"]],
        )
        _check_possible(plan, facts["basis"], shards)
        return plan, facts["basis"], shards
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"'{path}' cannot be read: {first_line(error)}.", f"Restore it. {ANEW}") from None


def _check_possible(plan: StorePlan, basis: str | None, shards: Sequence[tuple[str, int]]) -> None:
    """Raises ValueError for a plan that no store can have: its numbers are used before a shard is opened."""
    counts = [plan.images, plan.draws, plan.group, plan.shard_images, *plan.size]
    counts += [n for v in plan.levels for n in (v.channels, v.stride, v.height, v.width, v.kept)]
    names = {v.name for v in plan.levels}
    if not names or len(names) != len(plan.levels) or min(counts) < 1 or plan.shard_images % plan.group:
        raise ValueError("its plan holds impossible numbers")
    if not -(2**63) <= plan.seed < 2**63 or (basis is None) == plan.projected:
        raise ValueError("its plan does not fit its basis or seed")
    if len(shards) != plan.shards:
        raise ValueError(f"it lists {len(shards)} shards of {plan.shards}")
    for i, (_, size) in enumerate(shards):
        first, last = plan.shard_range(i)
        if (last - first) * plan.draws * layout(plan)[1] > size:
            raise ValueError(f"{shard_name(i)} is too small for its plan")


# --- the basis and the images' list -------------------------------------------------------------------------


def lost_basis(path: Path, reason: str) -> UserError:
    """What is to be done without the basis: finished shards hold coefficients of this one and no other."""
    return UserError(
        f"'{path}' cannot be used: {reason}. Finished shards were projected by it.", f"Restore it. {ANEW}"
    )


def read_basis(path: Path, plan: StorePlan, digest: str) -> list[Tensor]:
    """The basis of each level (float32 kept x C), read whole and compared with its checksum.

    Raises:
        UserError: it cannot be read, has another checksum, or is of other levels.
    """
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(ALTERED)
        found = load(content)
        wanted = {v.name: (torch.float32, (v.kept, v.channels)) for v in plan.levels}
        if {name: (v.dtype, tuple(v.shape)) for name, v in found.items()} != wanted:
            raise ValueError("it is of other levels")
    except (OSError, SafetensorError, ValueError, LookupError, RuntimeError) as error:
        raise lost_basis(path, getattr(error, "strerror", None) or str(error)) from None
    return [found[v.name] for v in plan.levels]


def image_lines(images: ImageSet) -> str:
    """images.jsonl: a line [path below the folder, bytes of the file] for each image of a set."""
    return "".join(json.dumps([below(images.folder, p), _length(p)]) + "\n" for p in images.paths)


def _length(image: ImageFile) -> int:
    """Bytes of an image, which may lie inside a larger file."""
    if isinstance(image, Path):
        return image.stat().st_size
    with image.open() as file:
        return file.seek(0, os.SEEK_END)
