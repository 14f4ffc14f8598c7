"""What a pretraining is going to do: everything that can be wrong with it is found here, and nothing is written."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dreamteacher import __version__
from dreamteacher.data import batches as data_batches
from dreamteacher.data import image_set
from dreamteacher.distill import dataset, kinds
from dreamteacher.distill.config import PretrainConfig, TrainInterpreterConfig, steps_of
from dreamteacher.distill.estimate import disk_bytes, dry_run, millions
from dreamteacher.distill.store.reader import FeatureStore
from dreamteacher.distill.train_interpreter import InterpreterJob, prepare
from dreamteacher.models.interpreter import (
    Interpreter,
    InterpreterSpec,
    load_interpreter,
    read_interpreter_spec,
)
from dreamteacher.models.regressor import FeatureRegressor
from dreamteacher.models.student import Student, check_student, create_student
from dreamteacher.runtime.config import describe, to_json
from dreamteacher.runtime.distributed.device import pick_device, resolve_precision
from dreamteacher.runtime.distributed.group import agree, broadcast, join
from dreamteacher.runtime.distributed.world import World, check_batch
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.loggers import check_loggers
from dreamteacher.runtime.loop import check_saving
from dreamteacher.runtime.run_folder import RunDir
from dreamteacher.spec import FeatureSpec
from dreamteacher.teachers.base import Teacher
from dreamteacher.teachers.in_parts import InParts
from dreamteacher.teachers.registry import fingerprint, load_teacher


@dataclass(frozen=True, kw_only=True)
class PretrainPlan:
    """A pretraining, checked and loaded.

    Args:
        teacher, student, regressor: on the device.
        images: None where the teacher makes them all; store: of features on disk; kept: the levels of stored maps.
        read: what the interpreter that is named reads; job: the training of one that comes first.
        steps: optimizer steps in all; disk: bytes that the run writes; notes: lines to print with the plan.
        resolved: config.json.
    """

    config: PretrainConfig
    world: World
    device: torch.device
    size: tuple[int, int]
    teacher: Teacher
    student: Student
    regressor: FeatureRegressor
    images: image_set.ImageSet | None
    store: FeatureStore | None
    kept: tuple[FeatureSpec, ...]
    read: InterpreterSpec | None
    job: InterpreterJob | None
    epoch: int
    steps: int
    disk: int
    notes: tuple[str, ...]
    resolved: dict[str, Any]

    @property
    def classes(self) -> tuple[str, ...]:
        """Of the interpreter's labels."""
        return tuple(self.resolved.get("labels", {}).get("classes", ()))

    @property
    def levels(self) -> list[str]:
        """Names of the teacher's maps."""
        return [spec.name for spec in self.regressor.teacher_specs]

    @property
    def part_rows(self) -> int:
        """Images of this process in each of the `accumulate` parts of a batch."""
        return self.world.of(self.config.batch_size // self.config.accumulate)

    def smaller(self) -> str:
        """What to do when a step runs out of memory: the next --accumulate whose parts are smaller."""
        c, least = self.config, 1 if self.world.ranks > 1 and self.config.batch_norm == "global" else 2
        larger = range(c.accumulate + 1, c.batch_size // (least * self.world.ranks) + 1)
        parts = (a for a in larger if c.batch_size % a == 0 and c.batch_size // a % self.world.ranks == 0)
        accumulate = next(parts, None)
        parts = (
            f"--accumulate {accumulate} (BatchNorm sees smaller parts; the run goes on), "
            if accumulate
            else ""
        )
        return f"Use {parts}--precision bfloat16, or a smaller --size, --student or --width."

    def text(self) -> str:
        """For the screen."""
        c, teacher = self.config, self.teacher
        labelled = self.job.spec.labelled if self.job else self.read.labelled if self.read else "-"
        source = (
            c.dataset if self.store is None else f"stored {self.store.plan.what} ({self.store.plan.keep})"
        )
        trained = f"{millions(self.student)} + regressor {millions(self.regressor)}"
        return "\n".join([describe(f"pretrain {c.student} <- {teacher.name}", {
            "teacher": f"{teacher.family}, licence: {teacher.licence}", "images": self.epoch,
            "skipped": len(self.images.bad) if self.images else 0, "size": self.size, "dataset": source,
            "t": teacher.timesteps, "levels": [f"{s.name}:{s.channels}" for s in self.regressor.teacher_specs],
            "batch": c.batch_size, "steps": self.steps, "epochs": c.epochs, "lr": c.lr, "optimizer": c.optimizer,
            "parameters": f"{trained} + teacher {millions(teacher)}", "device": self.device,
            "processes": self.world.ranks,
            "precision": str(resolve_precision(self.device, c.precision)).removeprefix("torch."),
            "distill": c.distill, "labelled": labelled, "out": c.out,
        }), *self.notes])  # fmt: skip

    def estimate(self) -> str:
        """The text of a dry run: memory, time and disk, from one small step."""
        return dry_run(
            self.teacher, self.student, self.regressor, size=self.size, batch=self.config.batch_size,
            part=self.part_rows, steps=self.steps, disk=self.disk, precision=self.config.precision, stored=self.kept,
        )  # fmt: skip

    def interpreter(self, folder: Path) -> Interpreter | None:
        """The frozen interpreter that labels the images: the one named, or the one trained now (or before a stop)."""
        job, named = self.job, self.config.interpreter
        if job is None:
            return load_interpreter(named)[0].to(self.device) if named else None

        def make() -> str:
            if not (folder / "interpreter" / "interpreter.json").is_file():
                job.run()  # a signal saves it and ends the process
            return ""

        broadcast(make)
        return load_interpreter(folder / "interpreter")[0].to(self.device)

    def batches(self) -> Callable[[int], dataset.Stream]:
        """Number of a part -> the stream of parts, with the teacher's maps, from there."""
        return functools.partial(self._stream, InParts(self.teacher, self.config.teacher_batch))

    def _stream(self, teacher: InParts, first: int) -> dataset.Stream:
        c, part, last = (
            self.config,
            self.config.batch_size // self.config.accumulate,
            self.steps * self.config.accumulate,
        )
        common: dict[str, Any] = {
            "seed": c.seed,
            "device": self.device,
            "precision": c.precision,
            "world": self.world,
        }
        steps: dict[str, Any] = {"first_step": first, "last_step": last}
        if c.dataset == "synthesized":
            return dataset.synthesized(teacher, batch_size=part, **steps, **common)
        assert self.images is not None  # checked in `make_plan`
        if self.store is not None:
            return dataset.stored(
                self.store,
                self.images,
                batch_size=part,
                workers=c.workers,
                teacher=teacher,
                **steps,
                **common,
            )
        made = dataset.synthesized_part(part, c.synthesized_fraction) if c.dataset == "both" else 0
        batches = data_batches.batches(
            self.images, batch_size=part - made, seed=c.seed, flip=c.flip, workers=c.workers, world=self.world,
            raw=True, **steps,
        )  # fmt: skip
        if c.dataset == "both":
            return dataset.both(teacher, batches, made=made, **common)
        return dataset.encoded(teacher, batches, **common)


def make_plan(config: PretrainConfig) -> PretrainPlan:
    """Checks all that can be known before the first step, and loads what takes part; writes nothing.

    Raises:
        UserError: for the first thing that is wrong; paths, names and numbers before anything large is read.
    """
    # --- numbers, names and paths ------------------------------------------------------------------------
    world = join(config.device)
    device = pick_device(config.device)
    _check_numbers(config, world)
    _check_batch_norm(config, world, device)
    _check_flags(config)
    check_loggers(config.log_to)
    if config.images is not None and not config.images.is_dir():
        image_set.image_files(config.images, "train")  # says what is wrong with a path or a layout
    check_student(config.student, config.init)
    fingerprint(config.teacher)  # names its files, and reads its card
    asked_for = {"verb": "pretrain", "version": __version__, "config": to_json(config)}
    RunDir.check(config.out, asked_for)
    read = read_interpreter_spec(config.interpreter) if config.interpreter else None
    store = FeatureStore(config.features) if config.features else None
    asked = _asked(config, read, store)

    # --- teacher, student, images ------------------------------------------------------------------------
    teacher = load_teacher(config.teacher, **asked, psi=config.psi)
    if read:
        read.check_reads(teacher.specs, fingerprint(config.teacher))
    size = config.size or (store.plan.size if store else teacher.size)
    kinds.check_mode(teacher, config.dataset, size)
    student = create_student(config.student, init=config.init, seed=config.seed)
    images = None
    if config.images is not None:
        images = image_set.load_images(
            config.images, size, strict=config.strict, cache_gb=config.cache_gb, workers=config.workers
        )
    epoch = config.samples if config.dataset == "synthesized" or images is None else len(images)
    if config.batch_size > epoch:
        raise UserError(
            f"A batch of {config.batch_size} is more than the {epoch} readable images.",
            f"Use --batch-size {max(2, epoch // 4)}, or add images.",
        )
    kept = store.plan.specs if store and store.plan.what == "maps" else ()
    regressor = FeatureRegressor(student.specs, kept or teacher.specs, width=config.width, seed=config.seed)
    job = _interpreter_job(config, teacher, size)
    disk = disk_bytes(student, regressor, ema=bool(config.ema), keep=config.keep_checkpoints)
    resolved = (
        asked_for
        | _facts(config, teacher, images, size, read or (job.spec if job else None))
        | ({"features": to_json(store.plan)} if store else {})
    )
    RunDir.check(config.out, resolved, needed_bytes=0 if config.dry_run else disk)
    agree(json.dumps(resolved), "setting, image or teacher")

    # --- on the device -----------------------------------------------------------------------------------
    if config.dataset == "encoded" or (config.dataset == "synthesized" and job is None):
        teacher.keep_only("encode" if config.dataset == "encoded" else "sample")
    for module in (teacher, student, regressor):
        module.to(device)
    notes = [f"  skipped {path}: {reason}" for path, reason in (images.bad if images else ())[:3]]
    if store and images:
        notes.insert(0, _compared(store.verify(teacher, fingerprint(config.teacher), images, device)))
        if kept and job is None:
            teacher.to("meta")  # nothing runs it any more: its memory is given back
    return PretrainPlan(
        config=config, world=world, device=device, size=size, teacher=teacher, student=student, regressor=regressor,
        images=images, store=store, kept=tuple(kept), read=read, job=job, epoch=epoch,
        steps=steps_of(config, epoch), disk=disk, notes=tuple(notes), resolved=resolved,
    )  # fmt: skip


def _compared(off: float | None) -> str:
    said = "not compared with the teacher, as their noise was drawn on another kind of device"
    return "  stored features: " + (
        said if off is None else f"compared with the teacher, at most {off:.2%} off"
    )


def _check_flags(config: PretrainConfig) -> None:
    """Raises UserError for flags that do not go together."""
    if config.images is None and config.dataset != "synthesized":
        kind = "An encoded dataset" if config.dataset == "encoded" else "A dataset of both kinds"
        raise UserError(f"{kind} needs images.", "Give --images FOLDER, or --dataset synthesized.")
    if config.distill == "feature":
        for flag, given in (("--interpreter", config.interpreter), ("--labelled", config.labelled)):
            if given is not None:
                raise UserError(
                    f"{flag} is given, and --distill feature uses no labels.",
                    "Add --distill mixed (or label).",
                )
    elif (config.interpreter is None) == (config.labelled is None):
        raise UserError(
            f"--distill {config.distill} learns from an interpreter's labels: name one, or labelled images to train it on.",
            "Give either --interpreter FOLDER, or --labelled IMAGES with --masks MASKS.",
        )


def _check_numbers(config: PretrainConfig, world: World) -> None:
    if config.accumulate < 1 or config.batch_size % config.accumulate:
        raise UserError(
            f"--accumulate {config.accumulate} does not divide --batch-size {config.batch_size}.",
            "Choose a divisor.",
        )
    part = config.batch_size // config.accumulate
    check_batch(f"--batch-size {config.batch_size} --accumulate {config.accumulate}: a part", part, world)
    if (world.of(part) if config.batch_norm == "local" else part) < 2:
        raise UserError(
            "BatchNorm needs at least 2 images in a part of a batch.",
            "Lower --accumulate" + (", or use --batch-norm global." if part >= 2 else "."),
        )
    if config.dataset == "both":
        made = dataset.synthesized_part(part, config.synthesized_fraction)
        check_batch(
            f"--synthesized-fraction {config.synthesized_fraction:g} of {part} images: the teacher's part",
            made,
            world,
        )
    if config.teacher_batch < 0:
        raise UserError("--teacher-batch is below 0.", "Give a number of images, or leave it out.")
    check_saving(config.save_every, config.save_minutes)
    for name in ("lr", "epochs", "log_every", "keep_checkpoints", "tau"):
        if getattr(config, name) <= 0:
            raise UserError(
                f"--{name.replace('_', '-')} must be above 0, not {getattr(config, name)}.",
                "Give a larger one.",
            )


def _check_batch_norm(config: PretrainConfig, world: World, device: torch.device) -> None:
    if world.ranks > 1 and config.batch_norm == "global" and device.type != "cuda":
        raise UserError(
            f"Several processes share the statistics of BatchNorm on GPUs only, and this is '{device}'.",
            "Use one process, or --batch-norm local: each then normalises over its own images.",
        )


def _asked(
    config: PretrainConfig, read: InterpreterSpec | None, store: FeatureStore | None
) -> dict[str, Any]:
    """Timesteps, blocks and noise of the teacher: what is asked for, else the interpreter's or the stored ones.

    Raises:
        UserError: when stored features are of others, or cannot serve what is asked for.
    """
    t = config.t or (read.t if read else ())
    blocks = config.blocks or (read.blocks if read else ())
    if store is None:
        return {"timesteps": t, "blocks": blocks, "noise": config.noise}
    plan, where = store.plan, f"The features in '{store.folder}'"
    if config.dataset != "encoded":
        raise UserError(f"{where} are of real images.", "Leave out --dataset, or --features.")
    if plan.flip and not config.flip:
        raise UserError(
            f"{where} are of mirrored images too.", "Leave out --no-flip, or make them with --no-flip."
        )
    if plan.what == "latents":
        return {"timesteps": t, "blocks": blocks, "noise": config.noise}
    noise = (
        plan.noise if config.noise == "stochastic" else config.noise
    )  # which is the default: not asked for
    for flag, wanted, has in (
        ("t", t, plan.t),
        ("blocks", blocks, plan.blocks),
        ("noise", noise, plan.noise),
    ):
        if wanted and wanted != has:
            raise UserError(
                f"{where} were made with --{flag} {_words(has)}, not {_words(wanted)}.",
                f"Leave out --{flag}, or make others with `dreamteacher make-features`.",
            )
    if not plan.raw and (config.distill != "feature" or config.whiten != plan.whiten):
        raise UserError(
            f"{where} are whitened (--whiten {plan.whiten}), so they cannot serve "
            + (
                f"--whiten {config.whiten}."
                if config.distill == "feature"
                else f"--distill {config.distill}."
            ),
            "Use features made with --keep all, which are raw.",
        )
    return {"timesteps": plan.t, "blocks": plan.blocks, "noise": plan.noise}


def _words(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _interpreter_job(
    config: PretrainConfig, teacher: Teacher, size: tuple[int, int]
) -> InterpreterJob | None:
    """The training of an interpreter that comes before the pretraining, checked; None where there is none."""
    if config.labelled is None:
        return None
    asked = TrainInterpreterConfig(
        **vars(config.label), images=config.labelled, masks=config.masks, binary_masks=config.binary_masks,
        ignore_index=config.ignore_index, out=config.out / "interpreter", teacher=config.teacher, t=config.t,
        blocks=config.blocks, noise=config.noise, psi=config.psi, size=size, seed=config.seed,
        device=config.device, precision=config.precision, dry_run=config.dry_run, log_to=config.log_to,
    )  # fmt: skip
    return prepare(asked, teacher=teacher)


def _facts(
    config: PretrainConfig,
    teacher: Teacher,
    images: image_set.ImageSet | None,
    size: tuple[int, int],
    read: InterpreterSpec | None,
) -> dict[str, Any]:
    """What the config only implies, for the model card and the report."""
    labels = {}
    if read is not None:
        labels["labels"] = {"images": read.labelled, "classes": list(read.classes), "pooled": read.pooled}
    return {
        "teacher": {
            "name": teacher.name, "family": teacher.family, "licence": teacher.licence,
            "sha256": fingerprint(config.teacher), "t": list(teacher.timesteps),
            "levels": {s.name: s.channels for s in teacher.specs},
        },
        "data": {
            "images": len(images) if images else 0, "skipped": len(images.bad) if images else 0,
            "classes": list(images.classes) if images else [], "size": list(size),
        },
        **labels,
    }  # fmt: skip
