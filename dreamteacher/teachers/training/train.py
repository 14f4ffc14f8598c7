"""`train-teacher`: a teacher on the user's own images; one loop for every objective."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

from dreamteacher import __version__
from dreamteacher.data import batches, image_set
from dreamteacher.data.images import to_float
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.config import describe, to_json
from dreamteacher.runtime.distributed.device import pick_device, resolve_precision
from dreamteacher.runtime.distributed.group import Told, agree, all_reduce_mean, join, together
from dreamteacher.runtime.distributed.share import check_batch
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.prefetch import Copies, prefetch
from dreamteacher.runtime.run_folder import Progress, RunDir, Signals
from dreamteacher.teachers.registry import save_teacher
from dreamteacher.teachers.training import diffusion, stylegan2
from dreamteacher.teachers.training.config import TrainTeacherConfig
from dreamteacher.teachers.training.diffusion import DiffusionPreset, DiffusionTrainee
from dreamteacher.teachers.training.stylegan2 import StyleGan2Preset, StyleGan2Trainee
from dreamteacher.teachers.training.trainee import Plan, Preset, Trainee

PRESETS: dict[str, Preset] = {**diffusion.PRESETS, **stylegan2.PRESETS}
LOG_EVERY = 50  # steps between lines of the log, and between two times that the host reads a loss


@together
def train_teacher(config: TrainTeacherConfig) -> Path | None:
    """Trains a teacher and returns its folder (None for a dry run); the same call resumes.

    With torchrun all processes call it, each works on its share of every batch, and the first one writes.

    Raises:
        UserError: before anything is written, for what can be known then; SystemExit(128 + n) on a signal.
    """
    preset = PRESETS[config.preset]
    _check_family(config, preset)
    share = join(config.device)
    size = config.size or preset.size
    plan = Plan(
        seed=config.seed, steps=config.steps or preset.steps, batch_size=config.batch_size or preset.batch_size,
        lr=config.lr or preset.lr, device=pick_device(config.device), precision=config.precision,
        share=share,
    )  # fmt: skip
    fours = 4 if isinstance(preset, StyleGan2Preset) else 1  # its discriminator compares images in fours
    check_batch("A step", plan.batch_size, share, together=fours)
    unit = preset.unit
    if size[0] % unit or size[1] % unit:
        raise UserError(
            f"--size {size[0]} {size[1]} does not fit the preset '{config.preset}'.",
            f"Both must be multiples of {unit}.",
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
        "processes": share.ranks, "precision": str(resolve_precision(plan.device, config.precision)).removeprefix("torch."),
        "disk": f"{parameters * 32 / 1e6:.0f} MB", "out": config.out,
    }), flush=True)  # fmt: skip
    if config.dry_run:
        return None
    try:
        with contextlib.closing(RunDir(config.out, share)) as run:
            trainee = make()
            _Loop(config, plan, trainee, images, run, resolved).run_all()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"Steps of {plan.batch_size} images run out of memory: {str(error).splitlines()[0][:80]}",
            "Use a smaller --batch-size or --size, or another --preset.",
        ) from error
    if not share.first:
        return config.out
    card = {
        "name": name, "licence": config.licence, "trained_on": config.images.name, "images": len(images),
        "steps": plan.steps, "batch_size": plan.batch_size, "seed": config.seed, "parameters": parameters,
        "version": __version__, **trainee.facts(),
    }  # fmt: skip
    save_teacher(config.out, trainee.weights(), spec, card)
    data_flags = "--dataset synthesized" if isinstance(preset, StyleGan2Preset) else "--images ..."
    print(f"Teacher in '{config.out}'. Use it: dreamteacher pretrain --teacher {config.out} {data_flags}")
    return config.out


def _check_family(config: TrainTeacherConfig, preset: Preset) -> None:
    """Raises UserError for a setting that the preset's family does not have, or that is out of range."""
    if isinstance(preset, StyleGan2Preset):
        foreign = {"--schedule": config.schedule != "linear"}
        kind, other = "a StyleGAN2", "diffusion"
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
    config: TrainTeacherConfig, preset: Preset, plan: Plan, size: tuple[int, int], image_channels: int
) -> tuple[Any, int, Callable[[], Trainee]]:
    """The network's spec, how many parameters are trained, and what makes them ready to be."""
    match preset:
        case DiffusionPreset():
            unet = diffusion.network_spec(preset, size, image_channels, config.schedule)
            return unet, diffusion.parameter_count(unet), lambda: DiffusionTrainee(preset, unet, plan)
        case StyleGan2Preset():
            gan = stylegan2.network_spec(preset, size, image_channels)
            gamma = preset.gamma if config.gamma is None else config.gamma
            return (
                gan,
                stylegan2.parameter_count(gan),
                lambda: StyleGan2Trainee(preset, gan, plan, gamma=gamma, ada=config.ada),
            )
    raise AssertionError(f"a preset of no family: {preset}")


def _all_grey(images: image_set.ImageSet) -> bool:
    index = torch.linspace(0, len(images) - 1, min(len(images), 256)).long()
    rgb = images.get(index).int()
    return bool((rgb[:, 0] - rgb[:, 1]).abs().max() <= 2 and (rgb[:, 1] - rgb[:, 2]).abs().max() <= 2)


class _Loop:
    """Steps of a trainee with batches, log, sample sheets, checkpoints and signals around them."""

    def __init__(
        self, config: TrainTeacherConfig, plan: Plan, trainee: Trainee, images: image_set.ImageSet, run: RunDir,
        resolved: dict[str, Any],
    ) -> None:  # fmt: skip
        self.config, self.plan, self.trainee, self.images, self.run = config, plan, trainee, images, run
        self.resolved = resolved
        self.first = 0
        self.unread: list[tuple[int, dict[str, Tensor]]] = []  # still on the device
        self.losses: dict[str, list[float]] = {}  # read, since the last line of the log

    def run_all(self) -> None:
        """Trains from the last checkpoint to the last step."""
        resume = self.run.open(self.resolved)
        if resume is not None:
            self._restore(resume)
        config, steps, batch = self.config, self.plan.steps, self.plan.batch_size
        stream = batches.batches(
            self.images, batch_size=batch, seed=config.seed, first_step=self.first, last_step=steps,
            flip=config.flip, workers=config.workers, share=self.plan.share, raw=True,
        )  # fmt: skip
        copies = Copies(self.plan.device)
        sent = prefetch(stream, lambda b: copies.send([b.images]), threaded=self.plan.device.type == "cuda")
        progress = Progress(steps, self.first, batch, "train-teacher")
        said, told = "", Told()
        each = self.plan.device.type == "cpu" and self.plan.share.ranks == 1  # there reading costs nothing
        with Signals() as signals:
            step = self.first
            while step < steps:
                batch_sent, waited = next(sent)
                progress.wait(waited)
                images = to_float(copies.receive(batch_sent)[0], torch.channels_last)
                self.unread.append((step, self.trainee.step(step, images)))
                step += 1
                stop = told(signals.number)
                log = step % LOG_EVERY == 0 or step == steps
                look = step % config.sample_every == 0 or step == steps
                save = step % config.save_every == 0 or step == steps or bool(stop)
                if log or look or save or each:
                    said = self._read()
                progress.update(step, said)
                if log:
                    means = {k: sum(v) / len(v) for k, v in self.losses.items()}
                    self.run.append("metrics.jsonl", {"step": step, "images_seen": step * batch, **means})
                    self.run.append("timing.jsonl", {"step": step, **progress.rates()})
                    self.losses.clear()
                if look:
                    self._look(step)
                if save:
                    self._save(step)
                if stop and step < steps:
                    progress.close()
                    told.close()
                    print(f"Stopped at step {step}: saved. The same command resumes.", flush=True)
                    raise SystemExit(128 + stop)
        told.close()
        progress.close()

    def _read(self) -> str:
        """Brings what was measured to the host; returns the newest losses in words.

        Raises:
            UserError: when one is not finite. A checkpoint is never written past such a step.
        """
        names = [(step, name) for step, seen in self.unread for name in seen]
        if not names:
            return ""
        values = all_reduce_mean(
            torch.stack([v.float() for _, seen in self.unread for v in seen.values()])
        ).tolist()
        self.unread.clear()
        newest: dict[str, float] = {}
        for (step, name), value in zip(names, values, strict=True):
            if not math.isfinite(value):
                raise UserError(
                    f"The {name} is {value} at step {step + 1}.",
                    f"Lower --lr (now {self.plan.lr:g}), with another --out, or use --precision float32. "
                    + checkpoint.before(self.run.path),
                )
            self.losses.setdefault(name, []).append(value)
            newest[name] = value
        return ", ".join(f"{k} {v:.4f}" for k, v in newest.items() if k.startswith("loss"))

    def _look(self, step: int) -> None:
        """A validation line, and the sheet of samples."""
        generator = torch.Generator().manual_seed(0)
        pick = torch.randperm(len(self.images), generator=generator)[:64]
        real = to_float(self.images.get(pick)).to(self.plan.device)
        row, sheet = self.trainee.validate(real, generator)
        self.run.append("metrics.jsonl", {"step": step, "images_seen": step * self.plan.batch_size, **row})
        if not self.plan.share.first:
            return
        picture = to_pil_image(make_grid(sheet.cpu(), nrow=8, padding=2, pad_value=1.0))
        checkpoint.atomic_write(self.run.path / "samples.png", lambda p: picture.save(p, format="PNG"))

    def _save(self, step: int) -> None:
        if not self.plan.share.first:
            return
        tensors, scalars = self.trainee.state()
        meta = {"kind": "train-teacher", "step": step, **scalars, "losses": self.losses}
        checkpoint.save(checkpoint.checkpoint_path(self.run.path, step), tensors, meta)
        checkpoint.prune(self.run.path, keep=2)

    def _restore(self, path: Path) -> None:
        tensors, meta = checkpoint.load(path)
        self.trainee.load_state(tensors, meta, path)
        losses = meta["losses"]  # a list in checkpoints of version 0.1: the loss alone
        self.first, self.losses = meta["step"], losses if isinstance(losses, dict) else {"loss": losses}
        for name in ("metrics.jsonl", "timing.jsonl"):
            self.run.rewind(name, self.first)
        print(f"Resuming from step {self.first} ({json.dumps(path.name)}).", flush=True)
