"""The reader of features kept on disk (`feature_store_files.py`); `make_features.py` writes them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dreamteacher.data.image_set import ImageSet
from dreamteacher.data.images import BadImageError, ImageFile, read_image
from dreamteacher.data.seeds import step_generator
from dreamteacher.distill.store.files import (
    ALTERED,
    ANEW,
    BASIS,
    IMAGES,
    image_lines,
    read_basis,
    read_manifest,
    shard_name,
)
from dreamteacher.distill.store.items import (
    amplitude,
    encode_group,
    layout,
    noise_device,
    part,
    project,
    unpack,
)
from dreamteacher.runtime.config import parse_json
from dreamteacher.runtime.distributed.world import launched
from dreamteacher.runtime.errors import UserError, shorten
from dreamteacher.runtime.threads import helpers, in_threads
from dreamteacher.teachers.base import Teacher
from dreamteacher.teachers.registry import sha256

_READERS = 4  # threads that read items: a disk, above all a distant one, serves several at once
# What a recomputation may differ by, as a part of a map's norm: other batch sizes and kernels round differently.
SLACK = {"float32": 2e-3, "bfloat16": 5e-2}


def read_exactly(images: ImageSet, at: Sequence[int]) -> Tensor:
    """uint8 N x 3 x H x W of these images, or an error, where `images.get` puts another one in the place of a damaged one.

    Raises:
        UserError: naming the image.
    """
    if images.cache is not None:
        return images.get(torch.tensor(at))

    def one(i: int) -> Tensor:
        try:
            return read_image(images.paths[i], images.size)
        except BadImageError as error:
            raise UserError(
                f"'{error.path}' cannot be read ({error.reason}), and features of another image will not do.",
                "Run the same command again when its disk is sound, or restore the file. Without it features are\n"
                "made in another folder (make-features --strict finds all damaged files at its start).",
            ) from None

    return torch.stack(in_threads(one, at, 2))


def _shuffled(count: int) -> list[int]:
    """0 to count - 1 in an order of this start alone: parts of a large store are checked, each time others.

    No result depends on it.
    """
    generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(7)))
    return torch.randperm(count, generator=generator).tolist()


class Shard(NamedTuple):
    """What a shard says of its items, and where in its file they begin; flip (bool) and noise_seed: images x draws."""

    flip: Tensor
    noise_seed: Tensor
    start: int


def _close(files: dict[int, int]) -> None:
    for handle in files.values():
        os.close(handle)


class FeatureStore:
    """A finished store; every byte of it is accounted for by its manifest.

    Items are read, not mapped: a shard that is cut or a disk that fails meanwhile is an error, where a memory map would
    end the process. Threads may share a store, for reads have no position. Shards stay open, up to half of the files
    that the process may have open; the others are opened for each read (`ulimit -n` says how many).

    Args:
        folder: where it lies.
        hash_gb: shards of at most this many 10^9 bytes, drawn anew at every start, are read and compared with their
            checksums here; of all the others existence and length are checked. Each of several processes takes
            these from a part of its own.

    Raises:
        UserError: when it is unfinished, or a file of it is missing, truncated or altered: naming the file.
    """

    def __init__(self, folder: Path, *, hash_gb: float = 20.0) -> None:
        self.folder = folder
        self.plan, basis, self._shards = read_manifest(folder)
        self._known: dict[int, Shard] = {}
        self._files: dict[int, int] = {}
        self._readers, self._of = helpers(_READERS), os.getpid()
        weakref.finalize(self, _close, self._files)
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most_open = math.inf if most == resource.RLIM_INFINITY else most // 2
        self._check(folder / IMAGES, self.plan.images_sha256)
        self.bases: list[Tensor | None] = [None] * len(self.plan.levels)
        if basis is not None:
            self.bases = list(read_basis(folder / BASIS, self.plan, basis))
        self._check_shards(hash_gb)

    def _check(self, path: Path, digest: str, size: int | None = None) -> None:
        try:
            length = path.stat().st_size
            if size is not None and length != size:
                raise self._damaged(path, f"it has {length} bytes of {size}")
            if digest and sha256(path) != digest:
                raise self._damaged(path, ALTERED)
        except OSError as error:
            raise self._damaged(path, error.strerror or str(error)) from None

    def _damaged(self, path: Path, reason: str) -> UserError:
        return UserError(
            f"'{path}' cannot be used: {reason}.",
            "If its disk is sound, delete it and run the same `dreamteacher make-features` again: only what is missing\n"
            "is made.",
        )

    def _check_shards(self, hash_gb: float) -> None:
        for i, (_, size) in enumerate(self._shards):
            self._check(self.folder / shard_name(i), "", size)
        own = range(len(self._shards))[launched().rows]
        chosen, budget = [], hash_gb * 1e9
        for i in [own[j] for j in _shuffled(len(own))]:
            budget -= self._shards[i][1]
            if budget >= 0:
                chosen.append(i)
        in_threads(lambda i: self._check(self.folder / shard_name(i), self._shards[i][0]), chosen, 4)

    @contextlib.contextmanager
    def _file(self, i: int) -> Iterator[int]:
        """The open file of a shard."""
        if i in self._files:
            yield self._files[i]
            return
        handle = os.open(self.folder / shard_name(i), os.O_RDONLY)
        if len(self._files) < self._most_open and self._files.setdefault(i, handle) == handle:
            yield handle
            return
        try:  # there are too many, or another thread was faster
            yield handle
        finally:
            os.close(handle)

    def _read(self, i: int, into: memoryview, at: int) -> None:
        """Fills `into` with a shard's bytes from `at` on."""
        path, done = self.folder / shard_name(i), 0
        try:
            with self._file(i) as handle:
                while done < len(into):
                    count = os.preadv(handle, [into[done:]], at + done)
                    if not count:
                        raise self._damaged(path, "it has been cut")
                    done += count
        except OSError as error:
            raise self._damaged(path, error.strerror or str(error)) from None

    def shard(self, i: int) -> Shard:
        """What a shard says of its items.

        Raises:
            UserError: it cannot be read, or holds something else than planned.
        """
        if i not in self._known:
            try:
                self._known[i] = self._read_shard(i)
            except (ValueError, LookupError, TypeError, ArithmeticError):
                path = self.folder / shard_name(i)
                raise self._damaged(path, "its header is not that of these features") from None
        return self._known[i]

    def _read_shard(self, i: int) -> Shard:
        first, last = self.plan.shard_range(i)
        count = [last - first, self.plan.draws]
        length = bytearray(8)
        self._read(i, memoryview(length), 0)
        body = 8 + int.from_bytes(length, "little")
        if body > self._shards[i][1]:
            raise ValueError("longer than the file")
        header = bytearray(body - 8)
        self._read(i, memoryview(header), 8)
        told = parse_json(bytes(header))

        def begin(name: str, kind: str, shape: list[int], each: int) -> int:
            at = int(told[name]["data_offsets"][0])
            end = at + math.prod(shape) * each
            wanted = {"dtype": kind, "shape": shape, "data_offsets": [at, end]}
            if told[name] != wanted or at < 0 or body + end > self._shards[i][1]:
                raise ValueError("other tensors, or none")
            return body + at

        flip, seed = torch.empty(count, dtype=torch.uint8), torch.empty(count, dtype=torch.int64)
        start = begin("items", "U8", [*count, layout(self.plan)[1]], 1)
        self._read(i, flip.numpy().data.cast("B"), begin("flip", "U8", count, 1))
        self._read(i, seed.numpy().data.cast("B"), begin("noise_seed", "I64", count, 8))
        return Shard(flip.bool(), seed, start)

    def rows(self, places: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Items (uint8 N x bytes) of images by their places in the store and their draws (both int64 N).

        Returns: the items; which of them are of the mirrored image (bool N).

        Raises:
            UserError: a shard cannot be read any more, naming it.
        """
        size = layout(self.plan)[1]
        rows = torch.empty(len(places), size, dtype=torch.uint8)
        flips = torch.empty(len(places), dtype=torch.bool)
        wanted = zip(places.tolist(), draws.tolist(), strict=True)
        found = [(*divmod(place, self.plan.shard_images), k) for place, k in wanted]
        into = rows.numpy().data.cast("B")

        def read(first: int) -> None:  # an item is one run of bytes
            for j in range(first, len(found), _READERS):
                i, within, k = found[j]
                shard = self.shard(i)
                at = shard.start + (within * self.plan.draws + k) * size
                self._read(i, into[j * size : (j + 1) * size], at)
                flips[j] = shard.flip[within, k]

        if self._of != os.getpid():  # a fork has no threads but the one that made it
            self._readers, self._of = helpers(_READERS), os.getpid()
        list(self._readers.map(read, range(min(_READERS, len(found)))))
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
        (int8: half the channel's scale, 1 / 510 of an amplitude; float16: 2^-11 of the value), plus SLACK times
        |live|; the residual, a difference of squares, 2 SLACK of the whitened map's mean square. Features of another t,
        noise, draw or orientation are off by half of |live| and more. Which items are compared differs from call to
        call.

        Returns: the largest |stored - live| / |live| of coefficients and amplitudes; none when nothing could be
            compared, because the noise was drawn on another kind of device.

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
        if not plan.deterministic and plan.device != noise_device(device):
            return None
        places = self.places(images)
        mine = torch.full((plan.images,), -1).scatter(0, places, torch.arange(len(places)))
        worst, compared = 0.0, 0
        for turn, group in enumerate(_shuffled(math.ceil(plan.images / plan.group))):
            first = group * plan.group
            which = mine[first : first + plan.group]
            here = which >= 0
            if not bool(here.any()):
                continue
            pixels = torch.zeros(len(which), 3, *plan.size, dtype=torch.uint8)
            pixels[here] = read_exactly(images, which[here].tolist())
            at = torch.arange(first, first + len(which))
            draws = torch.full_like(at, turn % plan.draws)
            rows, flips = self.rows(at, draws)
            i = group * plan.group // plan.shard_images
            seed = int(self.shard(i).noise_seed[first - i * plan.shard_images, turn % plan.draws])
            live = encode_group(plan, teacher, pixels, flips, seed, device)
            names = [images.paths[j] for j in which[here].tolist()]
            worst = max(worst, self._compare(rows[here], [m[here.to(device)].cpu() for m in live], names))
            compared += len(names)
            if compared >= samples and turn >= 1:
                break
        return worst

    def _compare(self, rows: Tensor, live: Sequence[Tensor], names: Sequence[ImageFile]) -> float:
        kept, worst = unpack(self.plan, rows), 0.0
        fields, _ = layout(self.plan)
        for i, (level, places, m) in enumerate(zip(self.plan.levels, fields, live, strict=True)):
            half = {"int8": 0.0, "float16": 2.0**-11, "float32": 0.0}[level.storage]
            if self.plan.raw:
                worst = max(worst, self._compare_one(kept.maps[i], m, half * _norm(m), level.name, names))
                continue
            truth, residual = project(self.plan, self.bases[i], m)
            bright = amplitude(m)
            bounds = [half * _norm(truth), half * _norm(bright)]
            if "scale" in places:
                area = level.height * level.width
                scale = part(rows, places["scale"])
                bounds = [
                    (scale.square().sum(1) * area).sqrt() / 2,
                    torch.full_like(bounds[1], area**0.5 / 510),
                ]
            for what, stored, now, bound in (
                (level.name, kept.maps[i], truth, bounds[0]),
                (f"{level.name} (energy)", kept.energies[i].sqrt(), bright, bounds[1]),
            ):
                worst = max(worst, self._compare_one(stored, now, bound, what, names))
            assert kept.residuals is not None
            whole = residual + truth.square().sum((1, 2, 3)) / m[0].numel()
            bound = 2 * SLACK[self.plan.precision] * whole
            self._compare_one(kept.residuals[:, i], residual, bound, f"{level.name} (residual)", names)
        return worst

    def _compare_one(
        self, stored: Tensor, live: Tensor, rounding: Tensor, what: str, names: Sequence[ImageFile]
    ) -> float:
        size = _norm(live)
        error, bound = _norm(stored - live), rounding + SLACK[self.plan.precision] * size
        for name, e, b, s in zip(names, error.tolist(), bound.tolist(), size.tolist(), strict=True):
            if not e <= b:
                raise UserError(
                    f"Stored features of '{name}' at {what} differ by {e / max(s, 1e-30):.1%} from what "
                    f"the teacher gives now; {b / max(s, 1e-30):.1%} can be rounding.",
                    f"The image, the teacher's code or a library has changed since. {ANEW}",
                )
        return float((error / size.clamp_min(1e-30)).max())


def _norm(values: Tensor) -> Tensor:
    """The root of the sum of squares of each item's values, (N,)."""
    return values.reshape(len(values), -1).norm(dim=1)
