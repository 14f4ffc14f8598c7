"""Features kept on disk: the manifest that vouches for every file of a store, and their reader.

A store is a folder. `features.json` says what the features are and holds a checksum of every other file;
`shard-*.safetensors` hold the items (`feature_items.py`), one for each draw of each image; `basis.safetensors` what
they were projected by; `images.jsonl` the images' names and sizes. `make_features.py` writes stores.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dreamteacher.config import from_json, parse_json, to_json
from dreamteacher.data import ImageSet, step_generator
from dreamteacher.errors import UserError, shorten
from dreamteacher.feature_items import Plan, encode_group, layout, part, project, unpack
from dreamteacher.images import ImageFile, below, in_threads
from dreamteacher.rundir import take_lock
from dreamteacher.teachers import sha256
from dreamteacher.teachers.base import Teacher

FORMAT, VERSION = "dreamteacher-features", 1
MANIFEST, BASIS, IMAGES, CLAIMS = "features.json", "basis.safetensors", "images.jsonl", ".claims"
ANEW = "Make them anew with `dreamteacher make-features`, in another folder."
_READERS = 4  # threads that copy items: a disk, above all a distant one, serves several at once
# What a recomputation may differ by, as a part of a map's norm: other batch sizes and kernels round differently.
SLACK = {"float32": 2e-3, "bfloat16": 5e-2}


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
        try:
            handle = os.open(place / name, os.O_CREAT | os.O_RDWR, 0o666)
            break
        except FileNotFoundError:  # whoever finished the store has just removed the folder of claims
            continue
    try:
        yield take_lock(handle, folder)
    finally:
        os.close(handle)


# --- the manifest -------------------------------------------------------------------------------------------


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def manifest_text(plan: Plan, basis: str | None, shards: Sequence[tuple[str, int]]) -> str:
    """features.json: the plan, the basis' checksum, and checksum and bytes of every shard."""
    facts = {"format": FORMAT, "version": VERSION, "plan": to_json(plan), "basis": basis}
    facts["shards"] = [list(s) for s in shards]
    return json.dumps(facts | {"sha256": _digest(facts)}, indent=1) + "\n"


def read_manifest(folder: Path) -> tuple[Plan, str | None, list[tuple[str, int]]]:
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
        plan, shards = from_json(Plan, facts["plan"]), [(str(d), int(size)) for d, size in facts["shards"]]
        _check_possible(plan, facts["basis"], shards)
        return plan, facts["basis"], shards
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"'{path}' cannot be read: {text}.", f"Restore it. {ANEW}") from None


def _check_possible(plan: Plan, basis: str | None, shards: Sequence[tuple[str, int]]) -> None:
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


def image_lines(images: ImageSet) -> str:
    """images.jsonl: a line [path below the folder, bytes of the file] for each image of a set."""
    return "".join(json.dumps([below(images.folder, p), _length(p)]) + "\n" for p in images.paths)


def _length(image: ImageFile) -> int:
    """Bytes of an image, which may lie inside a larger file."""
    if isinstance(image, Path):
        return image.stat().st_size
    with image.open() as file:
        return file.seek(0, os.SEEK_END)


# --- the reader ---------------------------------------------------------------------------------------------


class FeatureStore:
    """A finished store, memory-mapped; every byte of it is accounted for by its manifest.

    Args:
        folder: where it lies.
        hash_gb: shards of at most this many 10^9 bytes, drawn at random, are read and compared with their
            checksums here; of all the others existence and length are checked.

    Raises:
        UserError: when it is unfinished, or a file of it is missing, truncated or altered: naming the file.
    """

    def __init__(self, folder: Path, *, hash_gb: float = 20.0) -> None:
        self.folder = folder
        self.plan, basis, self._shards = read_manifest(folder)
        self._open: dict[int, dict[str, Tensor]] = {}
        self._check(folder / IMAGES, self.plan.images_sha256)
        self.bases: list[Tensor | None] = [None] * len(self.plan.levels)
        if basis is not None:
            self._check(folder / BASIS, basis)
            found = load_file(folder / BASIS)
            wanted = {v.name: (v.kept, v.channels) for v in self.plan.levels}
            if {k: v.shape for k, v in found.items()} != wanted:
                raise self._damaged(folder / BASIS, "it is of other levels")
            self.bases = [found[v.name] for v in self.plan.levels]
        self._check_shards(hash_gb)

    def _check(self, path: Path, digest: str, size: int | None = None) -> None:
        try:
            length = path.stat().st_size
            if size is not None and length != size:
                raise self._damaged(path, f"it has {length} bytes of {size}")
            if digest and sha256(path) != digest:
                raise self._damaged(path, "its content has changed since it was written (sha256 differs)")
        except OSError as error:
            raise self._damaged(path, error.strerror or str(error)) from None

    def _damaged(self, path: Path, reason: str) -> UserError:
        return UserError(
            f"'{path}' cannot be used: {reason}.",
            "Delete it and run the same `dreamteacher make-features` again: only what is missing is made.",
        )

    def _check_shards(self, hash_gb: float) -> None:
        for i, (_, size) in enumerate(self._shards):
            self._check(self.folder / shard_name(i), "", size)
        order = torch.randperm(len(self._shards), generator=torch.Generator().manual_seed(self.plan.seed))
        chosen, budget = [], hash_gb * 1e9
        for i in order.tolist():
            budget -= self._shards[i][1]
            if budget >= 0:
                chosen.append(i)
        in_threads(lambda i: self._check(self.folder / shard_name(i), self._shards[i][0]), chosen, 4)

    def shard(self, i: int) -> dict[str, Tensor]:
        """The memory-mapped tensors of a shard: items (images x draws x bytes), flip and noise_seed (images x draws)."""
        if i not in self._open:
            path = self.folder / shard_name(i)
            try:
                tensors = load_file(path)
            except (OSError, SafetensorError) as error:
                raise self._damaged(path, str(error)) from None
            first, last = self.plan.shard_range(i)
            count = last - first, self.plan.draws
            if tensors["items"].shape != (*count, layout(self.plan)[1]) or tensors["flip"].shape != count:
                raise self._damaged(path, "it holds items of another shape")
            self._open[i] = tensors
        return self._open[i]

    def rows(self, places: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Items (uint8 N x bytes) of images by their places in the store and their draws (both int64 N).

        Returns: the items, copied out of the maps; which of them are of the mirrored image (bool N).
        """
        rows = torch.empty(len(places), layout(self.plan)[1], dtype=torch.uint8)
        flips = torch.empty(len(places), dtype=torch.bool)
        wanted = zip(places.tolist(), draws.tolist(), strict=True)
        found = [(*divmod(place, self.plan.shard_images), k) for place, k in wanted]
        for i in {i for i, _, _ in found}:
            self.shard(i)  # opened here, by one thread

        def copy(first: int) -> None:  # an item is one run of bytes: faster than indexing all of them at once
            for j in range(first, len(found), _READERS):
                i, within, k = found[j]
                rows[j].copy_(self._open[i]["items"][within, k])
                flips[j] = bool(self._open[i]["flip"][within, k])

        in_threads(copy, range(min(_READERS, len(found))), _READERS)
        return rows, flips

    def draws_of(self, places: Tensor, epoch: int, seed: int) -> Tensor:
        """The draws that images are seen with in an epoch: each of them once in as many epochs as there are."""
        generator = step_generator(seed, 0, "features/first")
        start = torch.randint(self.plan.draws, (self.plan.images,), generator=generator)
        return (start[places] + epoch) % self.plan.draws

    def places(self, images: ImageSet) -> Tensor:
        """Where in the store each image of a set lies (int64); the set may be a part of what was stored.

        Raises:
            UserError: for images of another size, or that the store does not have, naming them.
        """
        if tuple(images.size) != self.plan.size:
            height, width = self.plan.size
            raise UserError(
                f"The features in '{self.folder}' are of images of {height} x {width} pixels, "
                f"not {images.size[0]} x {images.size[1]}.",
                f"Use --size {height} {width}, or leave --size out.",
            )
        lines = (self.folder / IMAGES).read_text("utf-8").splitlines()
        known = {line: i for i, line in enumerate(lines)}
        asked = image_lines(images).splitlines()
        lacking = [json.loads(line)[0] for line in asked if line not in known]
        if lacking:
            raise UserError(
                f"'{self.folder}' has no features of {len(lacking)} of {len(asked)} images in "
                f"'{images.folder}': {shorten(lacking)}.",
                f"Give the folder that they were made from, unchanged. {ANEW}",
            )
        return torch.tensor([known[line] for line in asked])

    def verify(
        self, teacher: Teacher, fingerprint: str, images: ImageSet, device: torch.device, *, samples: int = 8
    ) -> float | None:
        """Recomputes at least `samples` stored items from their images and compares; returns the largest error.

        Of each level of each item: |stored - live| may be at most half a step of the quantisation in every value
        (int8: half the channel's scale; float16: 2^-11 of the value), plus SLACK times |live|. Features of another
        t, noise, draw or orientation are off by half of |live| and more.

        Returns: the largest |stored - live| / |live|; none when nothing could be compared, because the noise
            was drawn on another kind of device.

        Raises:
            UserError: saying what differs.
        """
        plan = self.plan
        if fingerprint != plan.sha256:
            raise UserError(
                f"The features in '{self.folder}' are of the teacher '{plan.teacher}' ({plan.sha256[:12]}), "
                f"not of '{teacher.name}' ({fingerprint[:12]}).",
                f"Give that teacher (--teacher), or other --features. {ANEW}",
            )
        if not plan.deterministic and plan.device != device.type:
            return None
        places = self.places(images)
        mine = torch.full((plan.images,), -1).scatter(0, places, torch.arange(len(places)))
        groups = torch.randperm(math.ceil(plan.images / plan.group), generator=step_generator(plan.seed, 1))
        worst, compared = 0.0, 0
        for turn, group in enumerate(groups.tolist()):
            first = group * plan.group
            which = mine[first : first + plan.group]
            here = which >= 0
            if not bool(here.any()):
                continue
            pixels = torch.zeros(len(which), 3, *plan.size, dtype=torch.uint8)
            pixels[here] = images.get(which[here])
            at = torch.arange(first, first + len(which))
            draws = torch.full_like(at, turn % plan.draws)
            rows, flips = self.rows(at, draws)
            i = group * plan.group // plan.shard_images
            seed = int(self.shard(i)["noise_seed"][first - i * plan.shard_images, turn % plan.draws])
            live = encode_group(plan, teacher, pixels, flips, seed, device)
            names = [images.paths[j] for j in which[here].tolist()]
            worst = max(worst, self._compare(rows[here], [m[here.to(device)].cpu() for m in live], names))
            compared += len(names)
            if compared >= samples and turn >= 1:
                break
        return worst

    def _compare(self, rows: Tensor, live: Sequence[Tensor], names: Sequence[Path]) -> float:
        fields, _ = layout(self.plan)
        worst = 0.0
        for level, places, basis, stored, m in zip(
            self.plan.levels, fields, self.bases, unpack(self.plan, rows).maps, live, strict=True
        ):
            truth = m if self.plan.raw else project(self.plan, basis, m)[0]
            size = truth.flatten(1).norm(dim=1)
            bound = {"int8": 0.0, "float16": 2.0**-11, "float32": 0.0}[level.storage] * size
            if "scale" in places:
                bound = (part(rows, places["scale"]).square().sum(1) * level.height * level.width).sqrt() / 2
            bound = bound + SLACK[self.plan.precision] * size
            error = (stored - truth).flatten(1).norm(dim=1)
            for name, e, b, s in zip(names, error.tolist(), bound.tolist(), size.tolist(), strict=True):
                if not e <= b:
                    raise UserError(
                        f"Stored features of '{name}' at {level.name} differ by {e / max(s, 1e-30):.1%} from what "
                        f"the teacher gives now; {b / max(s, 1e-30):.1%} can be rounding.",
                        f"The image, the teacher's code or a library has changed since. {ANEW}",
                    )
                worst = max(worst, e / max(s, 1e-30))
        return worst
