"""`train-teacher`: a teacher on the user's own images; one loop for every objective."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

from dreamteacher import __version__
from dreamteacher.data import batches, image_set
from dreamteacher.data.images import to_float
from dreamteacher.runtime import checkpoint, memory
from dreamteacher.runtime.config import describe, to_json
from dreamteacher.runtime.distributed.device import pick_device, resolve_precision
from dreamteacher.runtime.distributed.group import agree, join, together
from dreamteacher.runtime.distributed.world import check_batch
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.loggers import check_loggers
from dreamteacher.runtime.loop import Loop, check_saving
from dreamteacher.runtime.meter import Meter
from dreamteacher.runtime.prefetch import Copies, prefetch
from dreamteacher.runtime.run_folder import RunDir
from dreamteacher.teachers.registry import save_teacher
from dreamteacher.teachers.training import diffusion, stylegan2
from dreamteacher.teachers.training.config import TrainTeacherConfig
from dreamteacher.teachers.training.diffusion import DiffusionObjective, DiffusionPreset
from dreamteacher.teachers.training.objective import Objective, Preset, TrainingPlan
from dreamteacher.teachers.training.stylegan2 import StyleGan2Objective, StyleGan2Preset

PRESETS: dict[str, Preset] = {**diffusion.PRESETS, **stylegan2.PRESETS}
LOG_EVERY = 50  # steps between lines of the log


@together
def train_teacher(config: TrainTeacherConfig) -> Path | None:
    """Trains a teacher and returns its folder (None for a dry run); the same call resumes.

    With torchrun all processes call it, each works on its share of every batch, and the first one writes.

    Raises:
        UserError: before anything is written, for what can be known then; SystemExit(128 + n) on a signal.
    """
    preset = PRESETS[config.preset]
    _check_family(config, preset)
    check_saving(config.save_every, config.save_minutes)
    check_loggers(config.log_to)
    world = join(config.device)
    size = config.size or preset.size
    plan = TrainingPlan(
        seed=config.seed, steps=config.steps or preset.steps, batch_size=config.batch_size or preset.batch_size,
        lr=config.lr or preset.lr, device=pick_device(config.device), precision=config.precision,
        world=world,
    )  # fmt: skip
    fours = 4 if isinstance(preset, StyleGan2Preset) else 1  # its discriminator compares images in fours
    check_batch("A step", plan.batch_size, world, together=fours)
    if size[0] % preset.unit or size[1] % preset.unit:
        raise UserError(
            f"--size {size[0]} {size[1]} does not fit the preset '{config.preset}'.",
            f"Both must be multiples of {preset.unit}.",
        )
    images = image_set.load_images(
        config.images, size, strict=config.strict, cache_gb=config.cache_gb, workers=config.workers
    )
    if plan.batch_size > len(images):
        raise UserError(
            f"A batch of {plan.batch_size} is more than the {len(images)} readable images.",
            f"Use --batch-size {len(images)}.",
        )
    grey = config.channels == "grey" or (config.channels == "auto" and _all_grey(images))
    spec, parameters, make = _family(config, preset, plan, size, 1 if grey else 3)
    resolved = {"verb": "train-teacher", "version": __version__, "config": to_json(config)}
    RunDir.check(config.out, resolved, needed_bytes=0 if config.dry_run else parameters * 32)
    agree(json.dumps([resolved, len(images)]), "setting or images")
    name = config.name or config.out.name
    print(describe(f"train-teacher '{name}'", {
        "images": len(images), "skipped": len(images.bad), "size": size, "channels": "grey" if grey else "rgb",
        "parameters": f"{parameters / 1e6:.1f} M", "steps": plan.steps, "batch": plan.batch_size, "lr": plan.lr,
        "epochs": f"{plan.steps * plan.batch_size / len(images):.0f}", "device": plan.device,
        "processes": world.ranks, "precision": str(resolve_precision(plan.device, config.precision)).removeprefix("torch."),
        "disk": f"{parameters * 32 / 1e6:.0f} MB", "out": config.out,
    }), flush=True)  # fmt: skip
    if config.dry_run:
        return None
    problem = f"Steps of {plan.batch_size} images run out of memory"
    enough = memory.needed(problem, "Use a smaller --batch-size or --size, or another --preset.")
    with enough, contextlib.closing(RunDir(config.out, world)) as run:
        objective = make()
        _train(config, plan, objective, images, run, resolved)
    if not world.first:
        return config.out
    card = {
        "name": name, "licence": config.licence, "trained_on": config.images.name, "images": len(images),
        "steps": plan.steps, "batch_size": plan.batch_size, "seed": config.seed, "parameters": parameters,
        "version": __version__, **objective.facts(),
    }  # fmt: skip
    save_teacher(config.out, objective.weights(), spec, card)
    data_flags = "--dataset synthesized" if isinstance(preset, StyleGan2Preset) else "--images ..."
    print(f"Teacher in '{config.out}'. Use it: dreamteacher pretrain --teacher {config.out} {data_flags}")
    return config.out


def _check_family(config: TrainTeacherConfig, preset: Preset) -> None:
    """Raises UserError for a setting that the preset's family does not have, or that is out of range."""
    if isinstance(preset, StyleGan2Preset):
        foreign, kind, other = {"--schedule": config.schedule != "linear"}, "a StyleGAN2", "diffusion"
    else:
        foreign = {"--gamma": config.gamma is not None, "--ada": config.ada is not None}
        kind, other = "a diffusion model", "StyleGAN2"
    for flag in (flag for flag, given in foreign.items() if given):
        raise UserError(
            f"{flag} is a setting of {other} teachers; the preset '{config.preset}' trains {kind}.",
            f"Leave out {flag}, or name a preset that has it (`dreamteacher list presets`).",
        )
    if config.gamma is not None and not (config.gamma >= 0 and math.isfinite(config.gamma)):
        raise UserError(f"--gamma {config.gamma:g} is no weight of a penalty.", "Give 0 or more.")
    if config.ada is not None and not 0 < config.ada < 1:
        raise UserError(
            f"--ada {config.ada:g} cannot be aimed at.", "Give a mean sign between 0 and 1, as 0.6."
        )


def _family(
    config: TrainTeacherConfig, preset: Preset, plan: TrainingPlan, size: tuple[int, int], image_channels: int
) -> tuple[Any, int, Callable[[], Objective]]:
    """The network's spec, how many parameters are trained, and what makes them ready to be."""
    if isinstance(preset, DiffusionPreset):
        unet = diffusion.network_spec(preset, size, image_channels, config.schedule)
        return unet, diffusion.parameter_count(unet), lambda: DiffusionObjective(preset, unet, plan)
    assert isinstance(preset, StyleGan2Preset)
    gan = stylegan2.network_spec(preset, size, image_channels)
    gamma = preset.gamma if config.gamma is None else config.gamma
    make = functools.partial(StyleGan2Objective, preset, gan, plan, gamma=gamma, ada=config.ada)
    return gan, stylegan2.parameter_count(gan), make


def _all_grey(images: image_set.ImageSet) -> bool:
    index = torch.linspace(0, len(images) - 1, min(len(images), 256)).long()
    rgb = images.get(index).int()
    return bool((rgb[:, 0] - rgb[:, 1]).abs().max() <= 2 and (rgb[:, 1] - rgb[:, 2]).abs().max() <= 2)


def _train(
    config: TrainTeacherConfig, plan: TrainingPlan, objective: Objective, images: image_set.ImageSet, run: RunDir,
    resolved: dict[str, Any],
) -> None:  # fmt: skip
    """From the last checkpoint to the last step."""
    device, batch = plan.device, plan.batch_size
    loop = Loop(
        run, title="train-teacher", steps=plan.steps, batch=batch, resume=run.open(resolved), state=objective.state,
        restore=objective.load_state, meter=Meter(torch.float64, plan.world), save_every=config.save_every,
        save_minutes=config.save_minutes, keep=2, log_to=config.log_to,
        guard_each=device.type == "cpu" and plan.world.ranks == 1,
        advice=lambda name: f"Lower --lr (now {plan.lr:g}), with another --out, or use --precision float32.",
    )  # fmt: skip
    objective.update = loop.update
    with loop:
        stream = batches.batches(
            images, batch_size=batch, seed=config.seed, first_step=loop.first, last_step=plan.steps,
            flip=config.flip, workers=config.workers, world=plan.world, raw=True,
        )  # fmt: skip
        copies = Copies(device)
        sent = prefetch(stream, lambda b: copies.send([b.images]), threaded=device.type == "cuda")
        for step in loop:
            pixels, waited = next(sent)
            loop.progress.wait(waited)
            losses = objective.step(step, to_float(copies.receive(pixels)[0], torch.channels_last))
            loop.meter.watch(step, losses)
            loop.meter.add(step, losses)
            if loop.due(LOG_EVERY):
                loop.log(lambda means: means, shown=("loss", "loss/g", "loss/d"))
            if loop.due(config.sample_every):
                loop.add_line(_look(objective, images, plan, run.path))


def _look(
    objective: Objective, images: image_set.ImageSet, plan: TrainingPlan, folder: Path
) -> dict[str, float]:
    """A validation line; it also writes the sheet of samples."""
    generator = torch.Generator().manual_seed(0)
    pick = torch.randperm(len(images), generator=generator)[:64]
    real = to_float(images.get(pick)).to(plan.device)
    row, sheet = objective.validate(real, generator)
    if plan.world.first:
        picture = to_pil_image(make_grid(sheet.cpu(), nrow=8, padding=2, pad_value=1.0))
        checkpoint.atomic_write(folder / "samples.png", lambda p: picture.save(p, format="PNG"))
    return row
