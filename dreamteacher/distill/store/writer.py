"""The writer of a store of features.

Several processes may fill one folder. A shard is claimed by a lock on a file that the kernel gives up with its
holder, so a killed writer's shard is free at once; it is written whole, under its own name only once it is on disk, and
its checksum and length, in a file beside it, after it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dreamteacher.data import image_set
from dreamteacher.data.seeds import step_generator
from dreamteacher.distill.store.files import (
    BASIS,
    CLAIMS,
    IMAGES,
    MANIFEST,
    claim,
    image_lines,
    lost_basis,
    manifest_text,
    read_basis,
    shard_name,
)
from dreamteacher.distill.store.items import (
    StorePlan,
    encode_group,
    flips_of,
    layout,
    noise_seed,
    pack,
    principal_basis,
    random_basis,
)
from dreamteacher.distill.store.reader import read_exactly
from dreamteacher.losses import whiten
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.config import changed_keys
from dreamteacher.runtime.errors import UserError, shorten
from dreamteacher.runtime.progress import Progress
from dreamteacher.runtime.run_folder import RunDir
from dreamteacher.runtime.signals import Signals
from dreamteacher.runtime.threads import helpers
from dreamteacher.teachers.base import Teacher

_POLL = 0.5  # seconds between looks at what other writers have claimed
_SUM = re.compile(r"([0-9a-f]{64})  \S+\n# ([0-9]{1,18}) bytes\n")  # what sha256sum reads, and the length


def check_plan(out: Path, resolved: dict[str, Any]) -> None:
    """Raises UserError when the folder was begun with other settings, images or teacher."""
    old = RunDir(out).config()
    if old is None or old.get("verb") != "make-features":
        return
    before, now = old.get("plan"), json.loads(json.dumps(resolved["plan"]))
    changes = changed_keys(before if isinstance(before, dict) else {}, now)
    if changes:
        raise UserError(
            f"'{out}' was begun with other settings, images or teacher: {shorten(changes)}.",
            "Give the old ones to complete it, or another --out.",
        )


def fit_groups(plan: StorePlan) -> list[int]:
    """Batches whose positions a PCA is fitted on: at most 160 images, drawn by the seed; none without a PCA."""
    if plan.keep != "pca":
        return []
    groups = math.ceil(plan.images / plan.group)
    order = torch.randperm(groups, generator=step_generator(plan.seed, 0, "features/fit"))
    return order[: max(1, min(groups, round(160 / plan.group)))].tolist()


class Writer:
    """Fills one store: config, images' list, basis, shards, and the manifest when all of them are there.

    Args:
        signals: looked at between batches and between looks at what others write: SystemExit (128 + n).
    """

    def __init__(
        self, out: Path, plan: StorePlan, teacher: Teacher, images: image_set.ImageSet, device: torch.device, signals: Signals
    ) -> None:  # fmt: skip
        self.out, self.plan, self.teacher, self.images, self.device = out, plan, teacher, images, device
        self.signals = signals
        self.bases: list[Tensor | None] = [None] * len(plan.levels)
        self._done: dict[int, tuple[str, int]] = {}

    def done(self, shard: int) -> bool:
        """Whether a shard is there, whole. What is known to be is not looked at again: the disk may be far away."""
        if shard not in self._done:
            found = self._vouched(shard_name(shard))
            if found:
                self._done[shard] = found
        return shard in self._done

    def has_basis(self) -> bool:
        """Whether the basis is there, whole, or none is needed.

        Raises:
            UserError: it is lost, and shards that are known to be done need it: another one would not be theirs.
        """
        if not self.plan.projected or self._vouched(BASIS):
            return True
        if self._done:
            raise lost_basis(self.out / BASIS, f"it, or {BASIS}.sha256, is missing or has been cut")
        return False

    def complete(self) -> bool:
        """Whether every file but the manifest is there; raises as `has_basis`."""
        return (
            all(map(self.done, range(self.plan.shards))) and self.has_basis() and (self.out / IMAGES).exists()
        )

    def _vouched(self, name: str) -> tuple[str, int] | None:
        """Checksum and bytes of a file, as written down after it; none where that or the whole file is missing."""
        try:
            told = _SUM.fullmatch(self._sum_path(name).read_text("utf-8"))
            size = (self.out / name).stat().st_size
        except (OSError, ValueError):
            return None
        return (told[1], size) if told and int(told[2]) == size else None

    def _sum_path(self, name: str) -> Path:
        return self.out / f"{name}.sha256"

    def _put(self, name: str, tensors: dict[str, Tensor]) -> tuple[str, int]:
        """Writes a file atomically, then its checksum and length; returns these."""
        checkpoint.sweep(self.out, name, f"{name}.sha256")
        self._sum_path(name).unlink(missing_ok=True)
        content = save(tensors)
        checkpoint.atomic_write(self.out / name, lambda temporary: temporary.write_bytes(content))
        digest = hashlib.sha256(content).hexdigest()
        checkpoint.write_text(self._sum_path(name), f"{digest}  {name}\n# {len(content)} bytes\n")
        return digest, len(content)

    def begin(self, resolved: dict[str, Any]) -> None:
        """Makes the folder; what is written first is what every other writer must agree with."""
        self.out.mkdir(parents=True, exist_ok=True)
        self._wait_for("begin", lambda: self._write_plan(resolved), lambda: False)

    def _write_plan(self, resolved: dict[str, Any]) -> None:
        check_plan(self.out, resolved)
        checkpoint.sweep(self.out, "config.json", IMAGES)
        if RunDir(self.out).config() is None:
            checkpoint.write_text(self.out / "config.json", json.dumps(resolved, indent=2) + "\n")
        if not self.complete():
            (self.out / MANIFEST).unlink(missing_ok=True)  # of a store that a file was taken out of
        if not (self.out / IMAGES).exists():
            checkpoint.write_text(self.out / IMAGES, image_lines(self.images))

    def _heed(self) -> None:
        if self.signals.number:
            print("Stopped: finished shards are kept. The same command resumes.", flush=True)
            raise SystemExit(128 + self.signals.number)

    def _wait_for(self, name: str, act: Callable[[], None], there: Callable[[], bool]) -> None:
        """Calls `act` under a claim, or waits until what another writer makes under it is there."""
        while not there():
            with claim(self.out, name) as mine:
                if mine:
                    if not there():
                        act()
                    return
            self._heed()
            time.sleep(_POLL)

    # --- the basis ---------------------------------------------------------------------------------------

    def fit(self, positions: int) -> None:
        """Fits or draws the basis of each level, or takes the one that is there."""
        if not self.plan.projected:
            return
        self._wait_for(BASIS, lambda: self._write_basis(positions), self.has_basis)
        found = self._vouched(BASIS)
        if found is None:
            raise lost_basis(self.out / BASIS, "it has just been removed")
        self.bases = [b.to(self.device) for b in read_basis(self.out / BASIS, self.plan, found[0])]

    def _write_basis(self, positions: int) -> None:
        plan = self.plan
        if plan.keep == "random":
            bases = [random_basis(v.kept, v.channels, plan.seed + i) for i, v in enumerate(plan.levels)]
        else:
            moments = self._moments(positions)
            bases = [principal_basis(m, v.kept) for v, m in zip(plan.levels, moments, strict=True)]
        self._put(BASIS, {v.name: b for v, b in zip(plan.levels, bases, strict=True)})

    def _moments(self, positions: int) -> list[Tensor]:
        """Second moments (float64 C x C) of whitened maps at positions drawn from batches of the first draw."""
        plan, groups = self.plan, fit_groups(self.plan)
        sums = [torch.zeros(v.channels, v.channels, dtype=torch.float64) for v in plan.levels]
        each = math.ceil(positions / max(1, len(groups) * plan.group))
        for group in groups:
            self._heed()
            first = group * plan.group
            pixels = read_exactly(self.images, range(first, min(first + plan.group, plan.images)))
            for level, total, m in zip(plan.levels, sums, self._encode(group, 0, pixels), strict=True):
                w = whiten(m, plan.whiten).flatten(2)
                area = level.height * level.width
                generator = step_generator(plan.seed, group, f"features/{level.name}")
                at = torch.randperm(area, generator=generator)[: min(area, each)].to(w.device)
                x = w[:, :, at].movedim(1, 2).flatten(0, 1).double().cpu()
                total += x.T @ x
        return sums

    # --- shards ------------------------------------------------------------------------------------------

    def _encode(self, group: int, draw: int, pixels: Tensor) -> list[Tensor]:
        first = group * self.plan.group
        flips = flips_of(self.plan, first, first + len(pixels))[:, draw]
        seed = noise_seed(self.plan, group, draw)
        return encode_group(self.plan, self.teacher, pixels, flips, seed, self.device)

    def fill(self) -> None:
        """Writes every shard that no one has written; returns when the store is whole, whoever made it so."""
        plan = self.plan
        left = [i for i in range(plan.shards) if not self.done(i)]
        progress = Progress(plan.shards, len(self._done), plan.shard_images, "features")
        while not (self.out / MANIFEST).exists():
            before = len(left)
            for i in left:
                if self.done(i):
                    continue
                with claim(self.out, shard_name(i)) as mine:
                    if mine and not self.done(i):
                        self._write_shard(i)
                        progress.update(len(self._done), f"shard {i}")
            left = [i for i in left if not self.done(i)]
            if not left:
                self._wait_for("manifest", self._write_manifest, (self.out / MANIFEST).exists)
            elif len(left) == before:
                self._heed()
                time.sleep(_POLL)  # the others hold what is left: it is ours if they die
        progress.close()
        shutil.rmtree(self.out / CLAIMS, ignore_errors=True)

    def _write_shard(self, shard: int) -> None:
        plan = self.plan
        first, last = plan.shard_range(shard)
        items = torch.empty(last - first, plan.draws, layout(plan)[1], dtype=torch.uint8)
        seeds = torch.empty(last - first, plan.draws, dtype=torch.int64)
        starts = range(first, last, plan.group)

        def read(start: int) -> Tensor:
            return read_exactly(self.images, range(start, min(start + plan.group, last)))

        with helpers(1) as ahead:
            pixels = ahead.submit(read, first)
            for start in starts:
                now = pixels.result()
                if start + plan.group < last:
                    pixels = ahead.submit(read, start + plan.group)
                for k in range(plan.draws):
                    self._heed()
                    rows = pack(plan, self.bases, self._encode(start // plan.group, k, now))
                    within = slice(start - first, start - first + len(now))
                    items[within, k] = rows.cpu()
                    seeds[within, k] = noise_seed(plan, start // plan.group, k)
        flips = flips_of(plan, first, last).to(torch.uint8)
        self._done[shard] = self._put(shard_name(shard), {"items": items, "flip": flips, "noise_seed": seeds})

    def _write_manifest(self) -> None:
        checkpoint.sweep(self.out)  # every shard is there: nobody writes anything but this
        basis = self._vouched(BASIS) if self.plan.projected else None
        shards = [self._done[i] for i in range(self.plan.shards)]
        checkpoint.write_text(
            self.out / MANIFEST, manifest_text(self.plan, basis[0] if basis else None, shards)
        )
