"""A feature dataset on disk: the teacher sees every image once, however many students learn from it."""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dreamteacher import __version__
from dreamteacher.data import image_set
from dreamteacher.distill.config import MakeFeaturesConfig, Storage
from dreamteacher.distill.kinds import check_mode
from dreamteacher.distill.store.files import CLAIMS, MANIFEST, image_lines
from dreamteacher.distill.store.items import Level, StorePlan, encode_group, layout, noise_device, pack
from dreamteacher.distill.store.reader import FeatureStore, read_exactly
from dreamteacher.distill.store.writer import Writer, check_plan, fit_groups
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.config import describe, to_json
from dreamteacher.runtime.distributed.device import pick_device, resolve_precision
from dreamteacher.runtime.distributed.group import join
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.run_folder import RunDir
from dreamteacher.runtime.signals import Signals
from dreamteacher.teachers.base import Teacher
from dreamteacher.teachers.registry import fingerprint, load_teacher


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
    images = image_set.load_images(
        config.images, size, strict=config.strict, cache_gb=config.cache_gb, workers=config.workers
    )
    teacher.to(device)
    plan, seconds = _measure(config, teacher, images, device)
    signals = Signals()
    writer = Writer(config.out, plan, teacher, images, device, signals)
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
    check_plan(config.out, resolved)
    each = layout(plan)[1] + 9
    fitted = 0 if writer.has_basis() else len(fit_groups(plan))
    hours = seconds * (left * plan.draws / plan.group + fitted) / 3600
    print(describe(f"make-features {config.images} <- {plan.teacher}", {
        "teacher": f"{plan.family}, licence: {plan.licence}", "images": len(images), "skipped": len(images.bad),
        "size": size, "t": plan.t, "what": plan.what, "keep": plan.keep,
        "levels": [f"{v.name}:{v.channels}->{v.kept} {v.storage}" for v in plan.levels], "draws": plan.draws,
        "flip": plan.flip, "bytes an image and draw": each,
        "disk": f"{estimate_bytes(plan, plan.images) / 1e6:.1f} MB, to be written {needed / 1e6:.1f} MB",
        "time": f"about {hours:.2f} h ({plan.group / plan.draws / max(seconds, 1e-9):.1f} images/s)",
        "shards": f"{plan.shards}, {len(pending)} to be written", "device": device, "precision": plan.precision,
        "out": config.out,
    }), flush=True)  # fmt: skip
    if config.dry_run:
        print("dry run: nothing was written")
        return None
    if writer.complete() and (config.out / MANIFEST).exists():
        FeatureStore(config.out, hash_gb=math.inf)
        checkpoint.sweep(config.out)  # of a writer that was killed after its last file
        shutil.rmtree(config.out / CLAIMS, ignore_errors=True)
        print(f"'{config.out}' is complete, and every checksum holds.", flush=True)
        return config.out
    with signals:
        writer.begin(resolved)
        writer.fit(config.fit)
        writer.fill()
    FeatureStore(config.out, hash_gb=0)
    print(f"Features: {config.out}. Use them: dreamteacher pretrain --features {config.out} ...", flush=True)
    return config.out


def estimate_bytes(plan: StorePlan, images: int) -> int:
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
    config: MakeFeaturesConfig, teacher: Teacher, images: image_set.ImageSet, device: torch.device
) -> tuple[StorePlan, float]:
    """The plan, and the seconds of one batch, encoded and packed; the first batch is really encoded here."""
    draft = StorePlan(
        what=config.what, teacher=teacher.name, family=teacher.family, licence=teacher.licence,
        sha256=fingerprint(config.teacher), t=teacher.timesteps, blocks=config.blocks, noise=config.noise, device=device.type,
        precision="float32" if resolve_precision(device, config.precision) == torch.float32 else "bfloat16", deterministic=False, size=images.size,
        images=len(images), images_sha256=hashlib.sha256(image_lines(images).encode()).hexdigest(), seed=config.seed, flip=config.flip,
        draws=1, group=config.batch_size, shard_images=config.batch_size,
        keep="all" if config.what == "latents" else config.keep,
        whiten=config.whiten, levels=(),
    )  # fmt: skip
    pixels = read_exactly(images, range(min(len(images), config.batch_size)))
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
    plan = replace(
        draft, deterministic=same, device=device.type if same else noise_device(device), draws=draws,
        levels=_levels(config, teacher, images, first),
    )  # fmt: skip
    groups = round(config.shard_mb * 1e6 / (layout(plan)[1] * draws * plan.group))
    plan = replace(plan, shard_images=plan.group * max(1, groups))
    bases = [torch.zeros(v.kept, v.channels, device=device) if plan.projected else None for v in plan.levels]
    begin = time.perf_counter()
    pack(plan, bases, encode_group(plan, teacher, pixels, plain, 1, device)).cpu()
    return plan, time.perf_counter() - begin


def _levels(
    config: MakeFeaturesConfig, teacher: Teacher, images: image_set.ImageSet, maps: list[Tensor]
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
