"""What a store of features is planned to hold, and how maps become the bytes of an item and maps again.

An item is one row of bytes, so that it is read at once; `layout` says where in the row each part lies.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dreamteacher.data.batches import flip_images
from dreamteacher.data.images import to_float
from dreamteacher.data.seeds import step_generator
from dreamteacher.distill.config import Keep, Storage, What
from dreamteacher.losses import energy, whiten
from dreamteacher.runtime.distributed.device import autocast
from dreamteacher.runtime.errors import UserError
from dreamteacher.spec import FeatureSpec, Noise, WhitenAxes
from dreamteacher.teachers.base import Teacher

_DTYPES = {"int8": torch.int8, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Level:
    """One stored level.

    Args:
        name, channels, stride: the teacher's.
        height, width: of its maps.
        kept: channels that are stored; what the regressor predicts.
        storage: of the stored values.
    """

    name: str
    channels: int
    stride: int
    height: int
    width: int
    kept: int
    storage: Storage


@dataclass(frozen=True, kw_only=True)
class StorePlan:
    """Everything that decides the content of a store but the images themselves and the basis.

    Args:
        what: maps, or latents alone (noise is added later).
        teacher, family, licence, sha256: of the teacher; `sha256` as `teachers.fingerprint`.
        t, blocks, noise: of a diffusion teacher, as it was asked for; latents depend on none of them.
        device: what drew the noise (`noise_device`): another kind draws other numbers from the same seed. Without
            noise the kind of device alone.
        precision: of the teacher's pass, float32 or bfloat16.
        deterministic: the teacher draws no random numbers.
        size: (height, width) of the images in pixels.
        images, images_sha256: how many, and the checksum of images.jsonl.
        seed, flip, draws: draw k of an image has its own noise, and is mirrored or not, as its shard says.
        group: consecutive images that the teacher encoded at once, from one generator.
        shard_images: images in a shard, a multiple of `group`; the last one may hold fewer.
        keep: pca or random (projected after whitening), whitened (all channels), all (raw maps).
        whiten: axes of the whitening before storing; of no effect with `all`.
        levels: fine to coarse.
    """

    what: What
    teacher: str
    family: str
    licence: str
    sha256: str
    t: tuple[int, ...]
    blocks: tuple[int, ...]
    noise: Noise
    device: str
    precision: Literal["float32", "bfloat16"]
    deterministic: bool
    size: tuple[int, int]
    images: int
    images_sha256: str
    seed: int
    flip: bool
    draws: int
    group: int
    shard_images: int
    keep: Keep
    whiten: WhitenAxes
    levels: tuple[Level, ...]

    @property
    def raw(self) -> bool:
        """Whether items hold what the teacher gave, neither whitened nor projected."""
        return self.what == "latents" or self.keep == "all"

    @property
    def projected(self) -> bool:
        """Whether there is a basis for each level."""
        return self.keep in ("pca", "random")

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return math.ceil(self.images / self.shard_images)

    @property
    def specs(self) -> tuple[FeatureSpec, ...]:
        """The levels that a regressor has to predict."""
        return tuple(FeatureSpec(v.name, v.kept, v.stride) for v in self.levels)

    @property
    def factors(self) -> tuple[float, ...]:
        """Of each level: what the mean square over kept channels is multiplied by (`losses.projected_loss`).

        K / C for an orthonormal basis of the best subspace. A random basis is drawn without regard to the maps:
        over all of them the mean square is that of the whole map, so there it is 1.
        """
        return tuple(1.0 if self.keep == "random" else v.kept / v.channels for v in self.levels)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First image of a shard, and the one after its last."""
        return shard * self.shard_images, min(self.images, (shard + 1) * self.shard_images)


# --- bases --------------------------------------------------------------------------------------------------


def principal_basis(moment: Tensor, kept: int) -> Tensor:
    """Orthonormal rows (float32, kept x C) that keep the most of vectors with this second moment (float64 C x C).

    Not centred: the coefficients of a map then have its energy, without a mean to add. Signs are fixed: the
    largest entry of each row is positive.
    """
    _, vectors = torch.linalg.eigh(moment)
    basis = vectors.flip(1)[:, :kept].T.contiguous()
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    return (basis * largest.sign()).float()


def random_basis(kept: int, channels: int, seed: int) -> Tensor:
    """Orthonormal rows (float32, kept x channels) of a random subspace, the same for the same seed."""
    generator = step_generator(seed, 0, "features/basis")
    q, r = torch.linalg.qr(torch.randn(channels, kept, dtype=torch.float64, generator=generator))
    return (q * r.diagonal().sign()).T.float().contiguous()


# --- items --------------------------------------------------------------------------------------------------


class Field(NamedTuple):
    """Where in an item's bytes a part lies, and what it is."""

    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@functools.cache
def layout(plan: StorePlan) -> tuple[tuple[dict[str, Field], ...], int]:
    """The parts of each level in an item, and the item's bytes.

    values (kept x height x width); for int8 the scale of each channel (float32); unless raw, amplitude (height x
    width, the root of the raw map's energy over its largest) and residual (float32, `losses.projected_loss`).
    """
    found, at = [], 0
    for level in plan.levels:
        area, parts = (level.height, level.width), {}
        wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if level.storage == "int8":
            wanted["scale"] = torch.float32, (level.kept,)
        if not plan.raw:
            wanted["residual"] = torch.float32, ()
            wanted["amplitude"] = torch.uint8 if level.storage == "int8" else _DTYPES[level.storage], area
        wanted["values"] = _DTYPES[level.storage], (level.kept, *area)
        for name, (dtype, shape) in wanted.items():
            stop = at + math.prod(shape) * dtype.itemsize
            parts[name] = Field(at, stop, dtype, shape)
            at = -(-stop // 4) * 4
        found.append(parts)
    return tuple(found), -(-at // 8) * 8


def project(plan: StorePlan, basis: Tensor | None, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients N x K x H x W of whitened maps (float32 or float64) and their residuals (N,).

    Without a basis the coefficients are the whitened maps themselves.
    """
    w = whiten(maps, plan.whiten)
    if basis is None:
        return w, w.new_zeros(len(w))
    c = torch.einsum("kc,nchw->nkhw", basis.to(w), w)
    if plan.keep == "random":
        return c, w.new_zeros(len(w))
    lost = w.square().sum((1, 2, 3)) - c.square().sum((1, 2, 3))
    return c, lost.clamp_min(0) / w[0].numel()


def amplitude(maps: Tensor) -> Tensor:
    """The root of the energy of maps N x C x H x W over its largest of each image, N x H x W."""
    q = energy(maps)
    return (q / q.amax((1, 2), keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)).sqrt()


def _compress(plan: StorePlan, level: Level, basis: Tensor | None, maps: Tensor) -> dict[str, Tensor]:
    if plan.raw:
        values = maps.to(_DTYPES[level.storage])
        if not bool(torch.isfinite(values).all()):
            raise UserError(
                f"Maps of '{plan.teacher}' at {level.name} are beyond {level.storage}.",
                "Use --keep whitened, whose values are of order 1.",
            )
        return {"values": values}
    values, residual = project(plan, basis, maps)
    if not bool(torch.isfinite(values).all()):
        raise UserError(
            f"Maps of '{plan.teacher}' at {level.name} are not finite.", "Use --precision float32."
        )
    found = {"values": values, "residual": residual}
    found["amplitude"] = amplitude(maps)
    if level.storage == "int8":
        tiny = torch.finfo(values.dtype).tiny
        found["scale"] = values.abs().amax((2, 3)) / 127
        found["values"] = (values / found["scale"].clamp_min(tiny)[..., None, None]).round()
        found["amplitude"] = (found["amplitude"] * 255).round()
    return found


def pack(plan: StorePlan, bases: Sequence[Tensor | None], maps: Sequence[Tensor]) -> Tensor:
    """Items of N images, uint8 N x bytes, on the device of their maps (or latents), which are float32.

    Raises:
        UserError: for maps that are not finite, or do not fit the stored precision.
        ValueError: for maps of other shapes than planned.
    """
    fields, size = layout(plan)
    rows = torch.zeros(len(maps[0]), size, dtype=torch.uint8, device=maps[0].device)
    for level, places, basis, m in zip(plan.levels, fields, bases, maps, strict=True):
        if m.shape[1:] != (level.channels, level.height, level.width):
            raise ValueError(f"maps {tuple(m.shape)} at level {level}")
        for name, value in _compress(plan, level, basis, m).items():
            place = places[name]
            plain = value.to(place.dtype).contiguous().view(len(m), -1)
            rows[:, place.start : place.stop] = plain.view(torch.uint8)
    return rows


class Kept(NamedTuple):
    """What items hold, decoded to float32 on their device.

    Args:
        maps: one per level, N x K x H x W: raw maps or latents, or coefficients of whitened ones.
        energies: of the raw maps, N x H x W, the largest of each image 1; empty where `maps` are raw.
        residuals: N x L; none where `maps` are raw.
        factors: see `Plan.factors`.
    """

    maps: list[Tensor]
    energies: list[Tensor]
    residuals: Tensor | None
    factors: tuple[float, ...]


def part(rows: Tensor, place: Field) -> Tensor:
    """The values of one part of items, N x shape."""
    return rows[:, place.start : place.stop].view(place.dtype).unflatten(1, place.shape or (1,))


def unpack(plan: StorePlan, rows: Tensor) -> Kept:
    """The inverse of `pack`, up to what its storage rounds off; rows are uint8 N x bytes."""
    fields, _ = layout(plan)
    maps, energies, residuals = [], [], []
    for places in fields:
        values = part(rows, places["values"]).float()
        if "scale" in places:
            values *= part(rows, places["scale"])[..., None, None]
        maps.append(values)
        if not plan.raw:
            amplitude = part(rows, places["amplitude"])
            energies.append((amplitude.float() / (255 if amplitude.dtype == torch.uint8 else 1)).square())
            residuals.append(part(rows, places["residual"]).float())
    return Kept(maps, energies, torch.cat(residuals, 1) if residuals else None, plan.factors)


# --- draws --------------------------------------------------------------------------------------------------


def flips_of(plan: StorePlan, first: int, last: int) -> Tensor:
    """Which draws of images first to last - 1 are mirrored, bool (images, draws): a coin, then turn by turn."""
    if not plan.flip:
        return torch.zeros(last - first, plan.draws, dtype=torch.bool)
    coin = torch.rand(plan.images, generator=step_generator(plan.seed, 0, "features/flip")) < 0.5
    return (coin[first:last, None].long() + torch.arange(plan.draws)) % 2 == 1


def noise_seed(plan: StorePlan, group: int, draw: int) -> int:
    """The seed of the generator that a group of images is encoded with."""
    return step_generator(plan.seed, group, f"features/{draw}").initial_seed()


def noise_device(device: torch.device) -> str:
    """What the numbers that torch draws from a seed depend on besides it: "cpu"; of a GPU "cuda/1056", say.

    A draw of more than 256 x 1056 numbers is shared out over the 1056 blocks of 256 threads that this GPU holds at
    once (an H100: 132 multiprocessors of 2048 threads), and each thread has a sequence of its own: GPUs of another
    size give other numbers.

    Source: `calc_execution_policy` in ATen/native/cuda/DistributionTemplates.h of PyTorch.
    """
    if device.type != "cuda":
        return device.type
    facts = torch.cuda.get_device_properties(device)
    return f"cuda/{facts.multi_processor_count * (facts.max_threads_per_multi_processor // 256)}"


def encode_group(
    plan: StorePlan, teacher: Teacher, pixels: Tensor, flips: Tensor, seed: int, device: torch.device
) -> list[Tensor]:
    """The teacher's maps (or latents), float32, of uint8 images N x 3 x H x W, some of them mirrored first."""
    images = to_float(flip_images(pixels, flips), torch.channels_last)
    images = images.to(device)
    with torch.no_grad(), autocast(device, plan.precision):
        if plan.what == "latents":
            maps = [teacher.latents(images)]
        else:
            maps = teacher.encode(images, generator=torch.Generator(device).manual_seed(seed))
    return [m.float() for m in maps]
