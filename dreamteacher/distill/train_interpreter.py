"""`train-interpreter`: a few labelled images and a frozen teacher -> a head that reads labels off its maps.

Masks give a label for every place, classes (subfolders) one for every image. The teacher's maps are made on the
way, batch by batch with fresh noise, and thrown away: memory does not grow with the number of images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamteacher import __version__, metrics
from dreamteacher.data import batches
from dreamteacher.data.images import to_float
from dreamteacher.data.labelled import draw, read_labelled
from dreamteacher.data.labelled_set import LabelledSet
from dreamteacher.data.seeds import device_generator, step_generator
from dreamteacher.distill.config import TrainInterpreterConfig
from dreamteacher.distill.estimate import millions
from dreamteacher.losses import interpreter_loss
from dreamteacher.models.interpreter import InterpreterSpec, save_interpreter
from dreamteacher.models.regressor import resize
from dreamteacher.runtime import checkpoint, optim
from dreamteacher.runtime.config import describe, to_json
from dreamteacher.runtime.distributed.device import autocast, pick_device, resolve_precision, seeded
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.loggers import check_loggers
from dreamteacher.runtime.loop import Loop, check_saving
from dreamteacher.runtime.run_folder import RunDir
from dreamteacher.teachers.base import Teacher
from dreamteacher.teachers.registry import fingerprint, load_teacher


def train_interpreter(
    config: TrainInterpreterConfig,
    *,
    teacher: Teacher | None = None,
    labelled: LabelledSet | None = None,
) -> Path | None:
    """Trains or resumes one interpreter; returns its folder (None for a dry run).

    Args:
        teacher: one that is loaded already, with the config's settings; None: the config's is loaded.
        labelled: images and labels in memory instead of the config's folders, which are then not read.

    Raises:
        UserError: for everything that can be known before the first step, before a folder is made.
        SystemExit: 128 + n after SIGINT or SIGTERM, once the state is saved.
    """
    job = prepare(config, teacher=teacher, labelled=labelled)
    return None if config.dry_run else job.run()


def prepare(
    config: TrainInterpreterConfig,
    *,
    teacher: Teacher | None = None,
    labelled: LabelledSet | None = None,
) -> InterpreterJob:
    """All the checks of `train_interpreter`: reads the labels, writes nothing."""
    device = pick_device(config.device)
    _check_numbers(config)
    check_loggers(config.log_to)
    if teacher is None:
        teacher = load_teacher(
            config.teacher, timesteps=config.t, noise=config.noise, blocks=config.blocks, psi=config.psi
        )
    size = config.size or teacher.size
    teacher.check_size(*size)
    seeded = "encode" not in teacher.modes  # it has maps of its own samples only, which it draws again
    everything = labelled if labelled is not None else _read(config, size, seeded=seeded)
    chosen, rest = draw(everything, config.labels, config.seed)
    val: LabelledSet | None = rest if len(rest) else None
    if config.val_images is not None:
        val = _read(config, size, seeded=seeded, validation=True)
        if len(val.classes) > len(chosen.classes):
            raise UserError(
                f"The validation labels have {len(val.classes)} classes, the labels {len(chosen.classes)}.",
                "Give --class-count, or labels that show every class.",
            )
    return InterpreterJob(config, teacher.to(device), chosen, val, size)


def _read(
    config: TrainInterpreterConfig, size: tuple[int, int], *, seeded: bool, validation: bool = False
) -> LabelledSet:
    images, masks = (config.val_images, config.val_masks) if validation else (config.images, config.masks)
    assert images is not None
    return read_labelled(
        images, masks, size, binary=config.binary_masks, ignore_index=config.ignore_index,
        classes=config.class_count, absent_ok=validation or config.class_count is not None, seeded=seeded,
    )  # fmt: skip


class InterpreterJob:
    """One training, checked and ready: steps, looks at the validation score, checkpoints."""

    def __init__(
        self,
        config: TrainInterpreterConfig,
        teacher: Teacher,
        labelled: LabelledSet,
        val: LabelledSet | None,
        size: tuple[int, int],
    ) -> None:
        self.config, self.teacher, self.labelled, self.val = config, teacher, labelled, val
        self.device = pick_device(config.device)
        self.batch = min(config.batch_size, len(labelled))
        self.steps = config.epochs * max(1, len(labelled) // self.batch)
        own = config.teacher
        self.spec = InterpreterSpec(
            teacher=own, sha256=fingerprint(own), t=teacher.timesteps, blocks=config.blocks, noise=config.noise,
            psi=config.psi, levels=tuple(s.channels for s in teacher.specs),
            strides=tuple(s.stride for s in teacher.specs), classes=labelled.classes,
            pooled=labelled.pooled, width=config.width, dropout=config.dropout, size=size,
            ignore_index=config.ignore_index, labelled=len(labelled),
        )  # fmt: skip
        self.interpreter = self.spec.build(config.seed).to(self.device)
        groups = optim.parameter_groups([self.interpreter], config.weight_decay)
        self.optimizer = optim.build_optimizer("adamw", groups, config.lr, config.betas)
        self.ema = optim.Ema(self.interpreter, config.ema) if config.ema else None
        self.weights = self._class_weights() if config.class_weights == "balanced" else None
        self.resolved = {
            "verb": "train-interpreter", "version": __version__, "config": to_json(config),
            "interpreter": to_json(self.spec),
        }  # fmt: skip
        parameters = sum(p.numel() for p in self.interpreter.parameters())
        self.disk = parameters * 4 * (2 * 4 + 1) + 1_000_000
        RunDir.check(config.out, self.resolved, needed_bytes=0 if config.dry_run else self.disk)
        kind = "one label an image" if labelled.pooled else "masks"
        print(describe(f"train-interpreter <- {teacher.name}", {
            "teacher": f"{teacher.family}, licence: {teacher.licence}", "labelled": f"{len(labelled)} ({kind})",
            "classes": len(labelled.classes), "validation": len(val) if val else 0, "size": size,
            "t": teacher.timesteps, "levels": [f"{s.name}:{s.channels}" for s in teacher.specs],
            "steps": self.steps, "batch": self.batch, "lr": config.lr, "parameters": millions(self.interpreter),
            "device": self.device,
            "precision": str(resolve_precision(self.device, config.precision)).removeprefix("torch."),
            "disk": f"{self.disk / 1e6:.0f} MB", "out": config.out,
        }), flush=True)  # fmt: skip

    def run(self) -> Path:
        """Trains from the last checkpoint to the end, and writes the interpreter."""
        config, a_look = self.config, self.config.look_every * max(1, len(self.labelled) // self.batch)
        modules, scores = {"interpreter": self.interpreter}, {}
        with contextlib.closing(RunDir(config.out)) as run:

            def restore(tensors: Mapping[str, Tensor], meta: Mapping[str, Any], path: Path) -> None:
                checkpoint.unpack(modules, self.optimizer, self.ema, tensors, meta, path)

            loop = Loop(
                run, title="train-interpreter", steps=self.steps, batch=self.batch, resume=run.open(self.resolved),
                state=lambda: checkpoint.pack(modules, self.optimizer, self.ema), restore=restore,
                save_every=config.save_every, save_minutes=config.save_minutes, log_to=config.log_to,
                guard_each=self.device.type == "cpu",
                advice=lambda name: f"Lower --lr (now {config.lr:g}), or use --precision float32.",
            )  # fmt: skip
            with loop:
                for step in loop:
                    loss = self.loss(step)
                    self.optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    loop.meter.watch(step, {"interpreter's loss": loss})
                    loop.meter.add(step, {"loss": loss})
                    with loop.update():
                        optim.set_lr(self.optimizer, self.rate_at(step))
                        self.optimizer.step()
                        if self.ema:
                            self.ema.update(self.interpreter)
                    scores = self.look() if loop.due(a_look) else {}
                    loop.log(lambda means, scores=scores: means | scores)  # type: ignore[misc]
            weights = self.ema.tensors if self.ema else self.interpreter.state_dict()
            save_interpreter(run.path, self.spec, weights)
        rows = [f"{k} {v:.3f}" for k, v in scores.items() if "/" not in k]
        print(f"Interpreter in '{config.out}'. {', '.join(rows)}".rstrip(), flush=True)
        return config.out

    def rate_at(self, step: int) -> float:
        """The learning rate of step `step`, from 0."""
        warmup = round(self.steps * self.config.warmup_epochs / self.config.epochs)
        return optim.lr_at(step, total=self.steps, warmup=warmup, peak=self.config.lr)

    def maps(
        self, images: LabelledSet, index: Tensor, flips: Tensor, generator: torch.Generator
    ) -> list[Tensor]:
        """The teacher's maps of these labelled images (mirrored where `flips` says so), streamed."""
        part = self.config.teacher_batch or len(index)
        found = []
        for some, mirrored in zip(index.split(part), flips.split(part), strict=True):
            with autocast(self.device, self.config.precision):
                if images.seeds is not None:
                    found.append(sample_maps(self.teacher, images.seeds[some], self.device)[1])
                    continue
                x = batches.flip_images(images.images[some], mirrored).to(self.device)
                x = to_float(x, torch.channels_last)
                found.append(self.teacher.encode(x, generator=generator))
        return found[0] if len(found) == 1 else [torch.cat(level) for level in zip(*found, strict=True)]

    def loss(self, index: int) -> Tensor:
        """The loss (eq. 4) of step `index` (from 0) on a batch of labelled images."""
        c, seed = self.config, self.config.seed
        chosen = batches.batch_indices(len(self.labelled), batch_size=self.batch, seed=seed, step=index)
        flips = torch.rand(len(chosen), generator=step_generator(seed, index, "flip")) < 0.5
        if not c.flip or self.labelled.seeds is not None:  # a sample's maps cannot be mirrored
            flips = torch.zeros_like(flips)
        generator = device_generator(seed, index, "teacher", self.device)
        with torch.no_grad():
            maps = self.maps(self.labelled, chosen, flips, generator)
        target = self.labelled.targets[chosen].long()
        if not self.labelled.pooled:
            target = torch.where(flips.view(-1, 1, 1), target.flip(-1), target)
        self.interpreter.train()
        with seeded(step_generator(seed, index, "dropout").initial_seed(), self.device):
            with autocast(self.device, c.precision):
                logits = self.interpreter(maps).float()
            return interpreter_loss(
                _as_large(logits, target), target.to(self.device), dice_weight=c.dice_weight,
                ignore_index=c.ignore_index, class_weights=self.weights,
            )  # fmt: skip

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """Scores on the validation images, where there are any: val_miou and val_iou/CLASS, or val_accuracy."""
        if self.val is None:
            return {}
        trained = {k: v.clone() for k, v in self.interpreter.state_dict().items()}
        if self.ema:
            self.interpreter.load_state_dict(self.ema.tensors)
        row = self.score(self.val)
        self.interpreter.load_state_dict(trained)
        return {f"val_{k}": v for k, v in row.items()}

    def score(self, labelled: LabelledSet) -> dict[str, float]:
        """mIoU and IoU of each class, or accuracy, of the present weights; one noise draw an image."""
        self.interpreter.eval()
        classes, hits = len(self.spec.classes), 0
        matrix = torch.zeros(classes, classes, dtype=torch.int64)
        for predicted, target in self._predictions(labelled):
            if labelled.pooled:
                hits += int((predicted == target).sum())
            else:
                matrix += metrics.confusion(predicted, target, classes, self.config.ignore_index)
        if labelled.pooled:
            return {"accuracy": hits / len(labelled)}
        named = zip(self.spec.classes, metrics.iou_per_class(matrix).tolist(), strict=True)
        return {"miou": metrics.mean_iou(matrix), **{f"iou/{k}": v for k, v in named if v == v}}

    def _predictions(self, labelled: LabelledSet) -> Iterator[tuple[Tensor, Tensor]]:
        for part, index in enumerate(torch.arange(len(labelled)).split(max(self.batch, 8))):
            generator = device_generator(self.config.seed, part, "look", self.device)
            maps = self.maps(labelled, index, torch.zeros(len(index), dtype=torch.bool), generator)
            with autocast(self.device, self.config.precision):
                logits = self.interpreter(maps).float()
            target = labelled.targets[index].long()
            yield _as_large(logits, target).argmax(1).cpu(), target

    def _class_weights(self) -> Tensor:
        """Inverse share of each class among the labels, mean 1 over the labels; a class without any: 0."""
        y = self.labelled.targets.long().flatten()
        counts = torch.bincount(
            y[y != self.config.ignore_index], minlength=len(self.labelled.classes)
        ).double()
        present = counts > 0
        weights = torch.where(present, counts.sum() / (counts.clamp_min(1) * present.sum()), 0.0)
        return weights.float().to(self.device)


def sample_maps(teacher: Teacher, seeds: Tensor, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """The teacher's samples of these seeds (int64 N), each drawn by itself, and their maps.

    One by one, so that a sample and its maps are the same whichever others are drawn beside it.
    """
    parts = [teacher.sample(1, generator=torch.Generator(device).manual_seed(int(seed))) for seed in seeds]
    images = torch.cat([image for image, _ in parts])
    return images, [torch.cat(level) for level in zip(*(maps for _, maps in parts), strict=True)]


def _as_large(logits: Tensor, target: Tensor) -> Tensor:
    """Logits at the size of the target; rows of logits as they are."""
    return logits if logits.ndim == 2 else resize(logits, (target.shape[-2], target.shape[-1]))


def _check_numbers(config: TrainInterpreterConfig) -> None:
    check_saving(config.save_every, config.save_minutes)
    for name in ("epochs", "batch_size", "lr", "width"):
        if getattr(config, name) <= 0:
            raise UserError(
                f"--{name.replace('_', '-')} must be above 0, not {getattr(config, name)}.",
                "Give a larger one.",
            )
    if config.width % 8:
        raise UserError(f"--width {config.width} is no multiple of 8.", "GroupNorm has groups of 8 channels.")
    if not 0 <= config.warmup_epochs <= config.epochs or not 0 <= config.dropout < 1:
        raise UserError(
            f"--warmup-epochs {config.warmup_epochs} of --epochs {config.epochs}, --dropout {config.dropout:g}.",
            "Warm-up is at most as long as the training; dropout lies in [0, 1).",
        )
    if (config.val_images is None) != (config.val_masks is None) and config.masks is not None:
        raise UserError("Only one of --val-images and --val-masks is given.", "Give both, or neither.")
