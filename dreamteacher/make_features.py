"""A feature dataset on disk: the teacher sees every image once, however many students learn from it.

Several processes may fill one folder. A shard is claimed by a lock on a file that the kernel gives up with its
holder, so a killed writer's shard is free at once; it is written whole, under its own name only once it is on disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from dreamteacher import __version__, checkpoint, data
from dreamteacher.config import changed_keys, describe, to_json
from dreamteacher.distributed import Precision, pick_device, resolve_precision
from dreamteacher.distributed_group import join
from dreamteacher.errors import UserError, shorten
from dreamteacher.feature_dataset import check_mode
from dreamteacher.feature_items import (
    Keep,
    Level,
    Plan,
    Storage,
    What,
    encode_group,
    flips_of,
    layout,
    noise_seed,
    pack,
    principal_basis,
    random_basis,
)
from dreamteacher.feature_store import (
    BASIS,
    CLAIMS,
    IMAGES,
    MANIFEST,
    FeatureStore,
    claim,
    image_lines,
    manifest_text,
    shard_name,
)
from dreamteacher.losses import WhitenAxes, whiten
from dreamteacher.rundir import Progress, RunDir, Signals
from dreamteacher.teachers import fingerprint, load_teacher, sha256
from dreamteacher.teachers.base import Noise, Teacher

_POLL = 0.5  # seconds between looks at what other writers have claimed


@dataclass(frozen=True, kw_only=True)
class MakeFeaturesConfig:
    """Keep a teacher's maps of a folder of images on disk, for `pretrain --features`."""

    images: Path
    """Folder of images, searched recursively."""
    out: Path
    """Folder of the features; the same command resumes, and may run several times at once."""
    teacher: str = "chest-xray-64"
    """A name of `list teachers`, a folder made by `train-teacher` or `get-teacher`, or FILE.py:FUNCTION."""
    what: What = "maps"
    """maps; or latents: only what Stable Diffusion's autoencoder gives, its U-Net runs while pretraining."""
    size: tuple[int, int] | None = None
    """Height and width in pixels; none: the teacher's."""
    t: tuple[int, ...] = ()
    """Timesteps of a diffusion teacher; none: the one its card recommends."""
    blocks: tuple[int, ...] = ()
    """Decoder blocks of a diffusion U-Net whose maps are kept; none: the paper's four levels."""
    noise: Noise = "stochastic"
    """stochastic (fresh for every draw), fixed (one for all), inversion (DDIM, deterministic) or none."""
    keep: Keep = "pca"
    """pca: the best subspace of the whitened maps; random: any subspace; whitened: all channels; all: raw maps."""
    channels: int = 64
    """Stored channels of a level with pca and random: one is the energy of the raw map, the others coefficients."""
    store: tuple[Storage, ...] = ()
    """int8 (a scale for each channel), float16 or float32; one for all levels, or one each, fine to coarse. None:
    int8; float16 for --keep all; float32 for latents."""
    whiten: WhitenAxes = "chw"
    """LayerNorm axes of eq. 1: chw (per image) or c (per position); pretraining must use the same."""
    draws: int | None = None
    """Times that each image is encoded, each with noise of its own; none: 2 where images are flipped (one of them
    mirrored), else 1."""
    flip: bool = True
    """Mirror half of the draws. Stored maps cannot be mirrored later."""
    seed: int = 0
    """Seeds noise, flips and the basis."""
    batch_size: int = 8
    """Images that the teacher encodes at once; the noise of a batch comes from one recorded seed."""
    fit: int = 10_000
    """Positions of each level that the PCA is fitted on."""
    shard_mb: float = 256.0
    """Size of a shard in 10^6 bytes, about; a writer holds one in memory."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    precision: Precision = "auto"
    """Autocast dtype of the teacher; auto: bfloat16 where the hardware has it."""
    workers: int = 2
    """Threads that decode images."""
    cache_gb: float = 2.0
    """Images are kept decoded in memory up to this size, else read when their turn comes."""
    strict: bool = False
    """Stop before the first batch when any image is damaged."""
    dry_run: bool = False
    """Only print size and time, measured on one batch."""


def make_features(config: MakeFeaturesConfig) -> Path | None:
    """Writes or completes one store; returns its folder (None for a dry run).

    Raises:
        UserError: for everything that can be known before a byte is written; later for a full disk, which
            leaves what is finished.
        SystemExit: 128 + n after SIGINT or SIGTERM; finished shards stay.
    """
    join(config.device)  # only to tell an error once: each writer takes the shards that nobody holds
    device = pick_device(config.device)
    _check_numbers(config)
    teacher = load_teacher(config.teacher, timesteps=config.t, blocks=config.blocks, noise=config.noise)
    size = config.size or teacher.size
    check_mode(teacher, "encoded", size)
    teacher.keep_only("encode")
    images = data.load_images(
        config.images, size, strict=config.strict, cache_gb=config.cache_gb, workers=config.workers
    )
    teacher.to(device)
    plan, seconds = _measure(config, teacher, images, device)
    writer = _Writer(config.out, plan, teacher, images, device)
    pending = [i for i in range(plan.shards) if not writer.done(i)]
    left = sum(last - first for first, last in map(plan.shard_range, pending))
    resolved = {
        "verb": "make-features",
        "version": __version__,
        "config": to_json(config),
        "plan": to_json(plan),
    }
    needed = estimate_bytes(plan, left)
    RunDir.check(config.out, resolved, needed_bytes=0 if config.dry_run else needed)
    _check_plan(config.out, resolved)
    each = layout(plan)[1] + 9
    fitted = 0 if (config.out / BASIS).exists() else len(_fit_groups(config, plan))
    hours = seconds * (left * plan.draws / plan.group + fitted) / 3600
    print(describe(f"make-features {config.images} <- {plan.teacher}", {
        "teacher": f"{plan.family}, licence: {plan.licence}", "images": len(images), "skipped": len(images.bad),
        "size": size, "t": plan.t, "what": plan.what, "keep": plan.keep,
        "levels": [f"{v.name}:{v.channels}->{v.kept} {v.storage}" for v in plan.levels], "draws": plan.draws,
        "flip": plan.flip, "bytes an image and draw": each,
        "disk": f"{estimate_bytes(plan, plan.images) / 1e6:.1f} MB, to be written {needed / 1e6:.1f} MB",
        "time": f"about {hours:.2f} h ({plan.group / max(seconds, 1e-9):.1f} images/s)",
        "shards": f"{plan.shards}, {len(pending)} to be written", "device": device, "precision": plan.precision,
        "out": config.out,
    }), flush=True)  # fmt: skip
    if config.dry_run:
        print("dry run: nothing was written")
        return None
    if not pending and (config.out / MANIFEST).exists():
        FeatureStore(config.out, hash_gb=math.inf)
        checkpoint.sweep(config.out)  # of a writer that was killed after its last file
        shutil.rmtree(config.out / CLAIMS, ignore_errors=True)
        print(f"'{config.out}' is complete, and every checksum holds.", flush=True)
        return config.out
    with Signals() as signals:
        writer.begin(resolved)
        writer.fit(_fit_groups(config, plan), config.fit)
        writer.fill(signals)
    FeatureStore(config.out, hash_gb=0)
    print(f"Features: {config.out}. Use them: dreamteacher pretrain --features {config.out} ...", flush=True)
    return config.out


def estimate_bytes(plan: Plan, images: int) -> int:
    """Bytes that a store of so many images takes, its small files among them."""
    basis = sum(4 * v.kept * v.channels for v in plan.levels) if plan.projected else 0
    shards = math.ceil(images / plan.shard_images)
    small = 65_536 + 200 * shards + 64 * plan.images
    return images * plan.draws * (layout(plan)[1] + 9) + 256 * shards + basis + small


def _check_numbers(config: MakeFeaturesConfig) -> None:
    for name in ("batch_size", "shard_mb", "fit", "draws"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}.", "Give a larger one.")
    if config.channels < 2:
        raise UserError(
            f"--channels {config.channels} leaves no coefficient: one channel is the energy.",
            "Give at least 2; the paper's levels are well kept by 64.",
        )
    raw = config.keep == "all" or config.what == "latents"
    if raw and "int8" in config.store:
        raise UserError(
            "Raw maps and latents are not stored as int8.", "Use --store float16, or --keep whitened."
        )


def _measure(
    config: MakeFeaturesConfig, teacher: Teacher, images: data.ImageSet, device: torch.device
) -> tuple[Plan, float]:
    """The plan, and the seconds of one batch, encoded and packed; the first batch is really encoded here."""
    draft = Plan(
        what=config.what, teacher=teacher.name, family=teacher.family, licence=teacher.licence,
        sha256=fingerprint(config.teacher), t=teacher.timesteps, blocks=config.blocks, noise=config.noise, device=device.type,
        precision="float32" if resolve_precision(device, config.precision) == torch.float32 else "bfloat16", deterministic=False, size=images.size,
        images=len(images), images_sha256=hashlib.sha256(image_lines(images).encode()).hexdigest(), seed=config.seed, flip=config.flip,
        draws=1, group=config.batch_size, shard_images=config.batch_size,
        keep="all" if config.what == "latents" else config.keep,
        whiten=config.whiten, levels=(),
    )  # fmt: skip
    pixels = images.get(torch.arange(min(len(images), config.batch_size)))
    plain = torch.zeros(len(pixels), dtype=torch.bool)
    first = encode_group(draft, teacher, pixels, plain, 0, device)
    again = encode_group(draft, teacher, pixels, plain, 1, device)
    same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    most = 1 + config.flip
    draws = most if config.draws is None else config.draws
    if same and draws > most:
        raise UserError(
            f"'{teacher.name}' draws no noise here, so {draws} draws of an image would be copies.",
            f"Use --draws {most}" + (", or --noise stochastic." if config.noise != "stochastic" else "."),
        )
    plan = replace(draft, deterministic=same, draws=draws, levels=_levels(config, teacher, images, first))
    groups = round(config.shard_mb * 1e6 / (layout(plan)[1] * draws * plan.group))
    plan = replace(plan, shard_images=plan.group * max(1, groups))
    bases = [torch.zeros(v.kept, v.channels, device=device) if plan.projected else None for v in plan.levels]
    begin = time.perf_counter()
    pack(plan, bases, encode_group(plan, teacher, pixels, plain, 1, device)).cpu()
    return plan, time.perf_counter() - begin


def _levels(
    config: MakeFeaturesConfig, teacher: Teacher, images: data.ImageSet, maps: list[Tensor]
) -> tuple[Level, ...]:
    latents = config.what == "latents"
    usual: Storage = "float32" if latents else "float16" if config.keep == "all" else "int8"
    store = config.store or (usual,)
    if len(store) not in (1, len(maps)):
        raise UserError(
            f"--store names {len(store)} kinds for {len(maps)} levels.", f"Give 1, or {len(maps)}."
        )
    names = ["latents"] if latents else [s.name for s in teacher.specs]
    found = []
    for i, (name, m) in enumerate(zip(names, maps, strict=True)):
        channels, height, width = m.shape[1:]
        projected = not latents and config.keep in ("pca", "random")
        kept = min(channels, config.channels - 1) if projected else channels
        stride = images.size[0] // height if latents else teacher.specs[i].stride
        found.append(
            Level(
                name=name, channels=channels, stride=stride, height=height, width=width, kept=kept,
                storage=store[i % len(store)],
            )
        )  # fmt: skip
    return tuple(found)


def _check_plan(out: Path, resolved: dict[str, Any]) -> None:
    """Raises UserError when the folder was begun with other settings, images or teacher."""
    old = RunDir(out).config()
    if old is None or old.get("verb") != "make-features":
        return
    changes = changed_keys(old.get("plan", {}), json.loads(json.dumps(resolved["plan"])))
    if changes:
        raise UserError(
            f"'{out}' was begun with other settings, images or teacher: {shorten(changes)}.",
            "Give the old ones to complete it, or another --out.",
        )


def _fit_groups(config: MakeFeaturesConfig, plan: Plan) -> list[int]:
    """Batches whose positions a PCA is fitted on: at most 160 images, drawn by the seed; none without a PCA."""
    if plan.keep != "pca":
        return []
    groups = math.ceil(plan.images / plan.group)
    order = torch.randperm(groups, generator=data.step_generator(plan.seed, 0, "features/fit"))
    return order[: max(1, min(groups, round(160 / plan.group)))].tolist()


class _Writer:
    """Fills one store: config, images' list, basis, shards, and the manifest when all of them are there."""

    def __init__(
        self, out: Path, plan: Plan, teacher: Teacher, images: data.ImageSet, device: torch.device
    ) -> None:
        self.out, self.plan, self.teacher, self.images, self.device = out, plan, teacher, images, device
        self.bases: list[Tensor | None] = [None] * len(plan.levels)

    def done(self, shard: int) -> bool:
        """Whether a shard is there, whole: its checksum is written after it."""
        path = self.out / shard_name(shard)
        return path.exists() and self._sum_file(shard).exists()

    def _sum_file(self, shard: int) -> Path:
        return self.out / f"{shard_name(shard)}.sha256"

    def begin(self, resolved: dict[str, Any]) -> None:
        """Makes the folder; what is written first is what every other writer must agree with."""
        self.out.mkdir(parents=True, exist_ok=True)
        self._wait_for("begin", lambda: self._write_plan(resolved), lambda: False)

    def _write_plan(self, resolved: dict[str, Any]) -> None:
        _check_plan(self.out, resolved)
        checkpoint.sweep(self.out, "config.json", IMAGES)
        if RunDir(self.out).config() is None:
            checkpoint.write_text(self.out / "config.json", json.dumps(resolved, indent=2) + "\n")
        if not (self.out / IMAGES).exists():
            checkpoint.write_text(self.out / IMAGES, image_lines(self.images))
        if not all(self.done(i) for i in range(self.plan.shards)):
            (self.out / MANIFEST).unlink(missing_ok=True)  # of a store that a shard was taken out of

    def _wait_for(self, name: str, act: Callable[[], None], there: Callable[[], bool]) -> None:
        """Calls `act` under a claim, or waits until what another writer makes under it is there."""
        while not there():
            with claim(self.out, name) as mine:
                if mine:
                    if not there():
                        act()
                    return
            time.sleep(_POLL)

    # --- the basis ---------------------------------------------------------------------------------------

    def fit(self, groups: list[int], positions: int) -> None:
        """Fits or draws the basis of each level, or takes the one that is there."""
        if not self.plan.projected:
            return
        path = self.out / BASIS
        self._wait_for(BASIS, lambda: self._write_basis(groups, positions), path.exists)
        found = load_file(path)
        self.bases = [found[v.name].to(self.device) for v in self.plan.levels]

    def _write_basis(self, groups: list[int], positions: int) -> None:
        plan = self.plan
        checkpoint.sweep(self.out, BASIS)
        if plan.keep == "random":
            bases = {
                v.name: random_basis(v.kept, v.channels, plan.seed + i) for i, v in enumerate(plan.levels)
            }
        else:
            moments = self._moments(groups, positions)
            bases = {v.name: principal_basis(m, v.kept) for v, m in zip(plan.levels, moments, strict=True)}
        _put(self.out / BASIS, save(bases))

    def _moments(self, groups: list[int], positions: int) -> list[Tensor]:
        """Second moments (float64 C x C) of whitened maps at positions drawn from batches of the first draw."""
        plan = self.plan
        sums = [torch.zeros(v.channels, v.channels, dtype=torch.float64) for v in plan.levels]
        each = math.ceil(positions / max(1, len(groups) * plan.group))
        for group in groups:
            first = group * plan.group
            pixels = self.images.get(torch.arange(first, min(first + plan.group, plan.images)))
            for level, total, m in zip(plan.levels, sums, self._encode(group, 0, pixels), strict=True):
                w = whiten(m, plan.whiten).flatten(2)
                area = level.height * level.width
                generator = data.step_generator(plan.seed, group, f"features/{level.name}")
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

    def fill(self, signals: Signals) -> None:
        """Writes every shard that no one has written; returns when the store is whole, whoever made it so."""
        plan, written = self.plan, 0
        progress = Progress(
            plan.shards, sum(map(self.done, range(plan.shards))), plan.shard_images, "features"
        )
        while not (self.out / MANIFEST).exists():
            before = written
            for i in range(plan.shards):
                if self.done(i):
                    continue
                with claim(self.out, shard_name(i)) as mine:
                    if mine and not self.done(i):
                        checkpoint.sweep(self.out, shard_name(i), f"{shard_name(i)}.sha256")
                        self._write_shard(i, signals)
                        written += 1
                        progress.update(sum(map(self.done, range(plan.shards))), f"shard {i}")
            if all(map(self.done, range(plan.shards))):
                self._wait_for("manifest", self._write_manifest, (self.out / MANIFEST).exists)
            elif written == before:
                if signals.number:
                    raise SystemExit(128 + signals.number)
                time.sleep(_POLL)  # the others hold what is left: it is ours if they die
        progress.close()
        shutil.rmtree(self.out / CLAIMS, ignore_errors=True)

    def _write_shard(self, shard: int, signals: Signals) -> None:
        plan = self.plan
        first, last = plan.shard_range(shard)
        items = torch.empty(last - first, plan.draws, layout(plan)[1], dtype=torch.uint8)
        seeds = torch.empty(last - first, plan.draws, dtype=torch.int64)
        starts = range(first, last, plan.group)

        def read(start: int) -> Tensor:
            return self.images.get(torch.arange(start, min(start + plan.group, last)))

        with ThreadPoolExecutor(1) as ahead:
            pixels = ahead.submit(read, first)
            for start in starts:
                now = pixels.result()
                if start + plan.group < last:
                    pixels = ahead.submit(read, start + plan.group)
                for k in range(plan.draws):
                    if signals.number:
                        print("Stopped: finished shards are kept. The same command resumes.", flush=True)
                        raise SystemExit(128 + signals.number)
                    rows = pack(plan, self.bases, self._encode(start // plan.group, k, now))
                    within = slice(start - first, start - first + len(now))
                    items[within, k] = rows.cpu()
                    seeds[within, k] = noise_seed(plan, start // plan.group, k)
        tensors = {"items": items, "flip": flips_of(plan, first, last).to(torch.uint8), "noise_seed": seeds}
        path = self.out / shard_name(shard)
        self._sum_file(shard).unlink(missing_ok=True)
        content = save(tensors)
        _put(path, content)
        digest = hashlib.sha256(content).hexdigest()
        checkpoint.write_text(self._sum_file(shard), f"{digest}  {path.name}\n")

    def _write_manifest(self) -> None:
        checkpoint.sweep(self.out)  # every shard is there: nobody writes anything but this
        shards = []
        for i in range(self.plan.shards):
            digest = self._sum_file(i).read_text("utf-8").split()[0]
            shards.append((digest, (self.out / shard_name(i)).stat().st_size))
        basis = sha256(self.out / BASIS) if self.plan.projected else None
        checkpoint.write_text(self.out / MANIFEST, manifest_text(self.plan, basis, shards))


def _put(path: Path, content: bytes) -> None:
    """Writes a file atomically."""
    checkpoint.atomic_write(path, lambda temporary: temporary.write_bytes(content))
