"""THE loop: a student learns, without labels, to reproduce the maps of a frozen generative teacher."""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

import torch

from dreamteacher import __version__
from dreamteacher.data import batches as data_batches
from dreamteacher.data import image_set
from dreamteacher.distill import dataset, kinds
from dreamteacher.distill.config import PretrainConfig, TrainInterpreterConfig, steps_of
from dreamteacher.distill.estimate import disk_bytes, dry_run, millions
from dreamteacher.distill.step import Training
from dreamteacher.distill.store.reader import FeatureStore
from dreamteacher.distill.train_interpreter import InterpreterJob, prepare
from dreamteacher.models.interpreter import (
    Interpreter,
    InterpreterSpec,
    load_interpreter,
    read_interpreter_spec,
)
from dreamteacher.models.regressor import FeatureRegressor
from dreamteacher.models.student import create_student
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.compile import compiled, wants_compile
from dreamteacher.runtime.config import describe, to_json
from dreamteacher.runtime.distributed.device import pick_device, resolve_precision
from dreamteacher.runtime.distributed.group import Told, agree, all_gather_text, broadcast, join, together
from dreamteacher.runtime.distributed.sharding import shard
from dreamteacher.runtime.distributed.world import World, check_batch, launched
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.run_folder import Progress, RunDir, Signals
from dreamteacher.teachers.base import Teacher
from dreamteacher.teachers.in_parts import InParts
from dreamteacher.teachers.registry import fingerprint, load_teacher

__all__ = ["PretrainConfig", "Training", "pretrain", "steps_of"]


@together
def pretrain(config: PretrainConfig) -> Path | None:
    """Runs or resumes one pretraining; returns its folder (None for a dry run).

    With torchrun all processes call it, each works on its share of every batch, and the first one writes.

    Raises:
        UserError: for everything that can be known before the first step, before a folder is made.
        SystemExit: 128 + n after SIGINT or SIGTERM, once the state is saved.
    """
    # --- what is asked for, checked ----------------------------------------------------------------------
    world = join(config.device)
    device = pick_device(config.device)
    _check_numbers(config, world)
    read = _interpreter_spec(config)  # of one that is trained already
    store = FeatureStore(config.features) if config.features else None
    asked = _asked(config, read, store)
    teacher = load_teacher(config.teacher, **asked, psi=config.psi)
    if read:
        read.check_reads(teacher.specs, fingerprint(config.teacher))
    size = config.size or (store.plan.size if store else teacher.size)
    kinds.check_mode(teacher, config.dataset, size)
    student = create_student(config.student, init=config.init, seed=config.seed)
    images = _images(config, size)
    bad = images.bad if images else ()
    epoch = config.samples if config.dataset == "synthesized" or images is None else len(images)
    if config.batch_size > epoch:
        raise UserError(
            f"A batch of {config.batch_size} is more than the {epoch} readable images.",
            f"Use --batch-size {max(2, epoch // 4)}, or add images.",
        )
    kept = store.plan.specs if store and store.plan.what == "maps" else ()
    regressor = FeatureRegressor(student.specs, kept or teacher.specs, width=config.width, seed=config.seed)
    job = _interpreter_job(config, teacher, size)  # of one that is trained first
    disk = disk_bytes(student, regressor, ema=bool(config.ema), keep=config.keep_checkpoints)
    resolved = (
        {"verb": "pretrain", "version": __version__, "config": to_json(config)}
        | _facts(config, teacher, images, size, read or (job.spec if job else None))
        | ({"features": to_json(store.plan)} if store else {})
    )
    RunDir.check(config.out, resolved, needed_bytes=0 if config.dry_run else disk)
    agree(json.dumps(resolved), "setting, image or teacher")

    # --- what is trained ---------------------------------------------------------------------------------
    steps = steps_of(config, epoch)
    if config.dataset == "encoded" or (config.dataset == "synthesized" and job is None):
        teacher.keep_only("encode" if config.dataset == "encoded" else "sample")
    cut = world.ranks > 1 and config.sharding in ("student", "both") and not config.dry_run
    for module in (teacher,) if cut else (teacher, student, regressor):  # `shard` moves what it cuts
        module.to(device)
    if store and images:
        checked = store.verify(teacher, fingerprint(config.teacher), images, device)
        if kept and job is None:
            teacher.to("meta")  # nothing runs it any more: its memory is given back
    print(describe(f"pretrain {config.student} <- {teacher.name}", {
        "teacher": f"{teacher.family}, licence: {teacher.licence}", "images": epoch,
        "skipped": len(bad), "size": size, "dataset": _source(config, store), "t": teacher.timesteps,
        "levels": [f"{s.name}:{s.channels}" for s in regressor.teacher_specs], "batch": config.batch_size,
        "steps": steps, "epochs": config.epochs, "lr": config.lr, "optimizer": config.optimizer,
        "parameters": f"{millions(student)} + regressor {millions(regressor)} + teacher {millions(teacher)}",
        "device": device, "processes": world.ranks, "precision": str(resolve_precision(device, config.precision)).removeprefix("torch."),
        "mode": config.distill, "labelled": job.spec.labelled if job else read.labelled if read else "-",
        "out": config.out,
    }), flush=True)  # fmt: skip
    if store and images:
        print("  stored features: " + (
            "not compared with the teacher, as their noise was drawn on another kind of device"
            if checked is None else f"compared with the teacher, at most {checked:.2%} off"
        ), flush=True)  # fmt: skip
    for path, reason in bad[:3]:
        print(f"  skipped {path}: {reason}")
    if config.dry_run:
        part = world.of(config.batch_size // config.accumulate)
        print(dry_run(
            teacher, student, regressor, size=size, batch=config.batch_size, part=part, steps=steps,
            disk=disk, precision=config.precision, stored=kept,
        ))  # fmt: skip
        return None

    # --- begin or resume ---------------------------------------------------------------------------------
    writer = _tensorboard(config.out) if config.tensorboard and world.first else None
    with contextlib.closing(RunDir(config.out, world)) as run, Signals() as signals:
        resume = run.open(resolved)
        interpreter = _interpreter(config, job, run.path)
        classes = resolved.get("labels", {}).get("classes", ())
        training = Training(config, student, regressor, steps, interpreter, classes, world, device)
        if (dtype := resolve_precision(device, config.precision)) != torch.float32:
            teacher.cast_weights(dtype)
        whole = world.ranks == 1 or config.batch_norm == "local"  # a global one breaks the graph
        if config.sharding == "none" and wants_compile(config.compile, device, steps, whole=whole):
            teacher.wrap_compile_targets(functools.partial(compiled, strict=config.compile == "on"))
            training.compile()
        first = training.restore(resume, run)
        _list_skipped(run.path, images)
        cut = world.ranks > 1 and config.sharding in ("teacher", "both") and not kept
        begin = functools.partial(
            _stream, config, InParts(teacher, config.teacher_batch, sharded=cut), images, store, steps=steps,
            device=device, world=world,
        )  # fmt: skip
        if cut:
            with contextlib.closing(begin(0)) as look:
                shard(teacher, device, lambda: next(look), whole=False)
        progress = Progress(training.steps, first, config.batch_size, "pretrain")
        stream = begin(first * config.accumulate)
        told = Told()

        # --- the loop ------------------------------------------------------------------------------------
        for step in range(first + 1, training.steps + 1):
            while (batch := training.step(step - 1, stream, progress)) is None:  # memory ran out
                stream.close()
                stream = begin((step - 1) * config.accumulate)
            last, stop = step == training.steps, told(signals.number)
            if step % config.log_every == 0 or last:
                row = training.log(step, batch)
                progress.update(step, f"loss {row['loss']:.4f}")
                if last or (config.probe_every and step % config.probe_every == 0):
                    row |= training.probe(images) if images else {}
                run.append("metrics.jsonl", row)
                run.append("timing.jsonl", {"step": step, **progress.rates()})
                if writer:
                    for key, value in row.items():
                        writer.add_scalar(key, value, step)
            if (step % config.save_every == 0 or last or stop) and not training.save(step, run.path):
                training.log(step, batch)  # says what is not finite
            if stop and not last:
                told.close()
                progress.close()
                print(f"Stopped at step {step}: saved in '{run.path}'. The same command resumes.", flush=True)
                raise SystemExit(128 + stop)
            del batch  # or its maps would live on beside the next ones

        # --- what the user takes away --------------------------------------------------------------------
        progress.close()
        told.close()
        if writer:
            writer.close()
        _list_skipped(run.path, images)  # again: a stream finds more of them on the way
        training.write_weights(run.path, teacher)
    return config.out


def _images(config: PretrainConfig, size: tuple[int, int]) -> image_set.ImageSet | None:
    if config.images is not None:
        return image_set.load_images(
            config.images, size, strict=config.strict, cache_gb=config.cache_gb, workers=config.workers
        )
    if config.dataset != "synthesized":
        raise UserError(
            "An encoded dataset needs images."
            if config.dataset == "encoded"
            else "A dataset of both kinds needs images.",
            "Give --images FOLDER, or --dataset synthesized.",
        )
    return None


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


def _source(config: PretrainConfig, store: FeatureStore | None) -> str:
    return config.dataset if store is None else f"stored {store.plan.what} ({store.plan.keep})"


def _interpreter_spec(config: PretrainConfig) -> InterpreterSpec | None:
    """What the interpreter that is named reads; checks that mode and labels go together.

    Raises:
        UserError: for labels without a mode that uses them, or the reverse.
    """
    if config.distill == "feature":
        for flag, given in (("--interpreter", config.interpreter), ("--labelled", config.labelled)):
            if given is not None:
                raise UserError(
                    f"{flag} is given, and --distill feature uses no labels.",
                    "Add --distill mixed (or label).",
                )
        return None
    if (config.interpreter is None) == (config.labelled is None):
        raise UserError(
            f"--distill {config.distill} learns from an interpreter's labels: name one, or labelled images to train it on.",
            "Give either --interpreter FOLDER, or --labelled IMAGES with --masks MASKS.",
        )
    return read_interpreter_spec(config.interpreter) if config.interpreter else None


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
        device=config.device, precision=config.precision, dry_run=config.dry_run,
    )  # fmt: skip
    return prepare(asked, teacher=teacher)


def _interpreter(config: PretrainConfig, job: InterpreterJob | None, folder: Path) -> Interpreter | None:
    """The frozen interpreter that labels the images: the one named, or the one trained now (or before a stop)."""
    device = pick_device(config.device)
    if job is None:
        return load_interpreter(config.interpreter)[0].to(device) if config.interpreter else None

    def make() -> str:
        if not (folder / "interpreter" / "interpreter.json").is_file():
            job.run()  # a signal saves it and ends the process
        return ""

    broadcast(make)
    return load_interpreter(folder / "interpreter")[0].to(device)


def _list_skipped(folder: Path, images: image_set.ImageSet | None) -> None:
    found = "" if images is None else "".join(f"{b.path}: {b.reason}\n" for b in images.bad)
    lines = dict.fromkeys(line for part in all_gather_text(found) for line in part.splitlines(keepends=True))
    if lines and launched().first:
        path = folder / "skipped.txt"
        checkpoint.write_text(path, "".join(lines))
        print(f"{len(lines)} images could not be read and were left out: {path}", flush=True)


def _stream(
    config: PretrainConfig,
    teacher: InParts,
    images: image_set.ImageSet | None,
    store: FeatureStore | None,
    first: int,
    *,
    steps: int,
    device: torch.device,
    world: World,
) -> dataset.Stream:
    part, last = config.batch_size // config.accumulate, steps * config.accumulate
    if config.dataset == "synthesized":
        return dataset.synthesized(
            teacher, batch_size=part, first_step=first, last_step=last, seed=config.seed, device=device,
            precision=config.precision, world=world,
        )  # fmt: skip
    assert images is not None  # checked at the start
    if store is not None:
        return dataset.stored(
            store, images, batch_size=part, first_step=first, last_step=last, seed=config.seed, device=device,
            workers=config.workers, teacher=teacher, precision=config.precision, world=world,
        )  # fmt: skip
    made = dataset.synthesized_part(part, config.synthesized_fraction) if config.dataset == "both" else 0
    batches = data_batches.batches(
        images, batch_size=part - made, seed=config.seed, first_step=first, last_step=last, flip=config.flip,
        workers=config.workers, world=world, raw=True,
    )  # fmt: skip
    if config.dataset == "both":
        return dataset.both(
            teacher, batches, made=made, seed=config.seed, device=device, precision=config.precision,
            world=world,
        )  # fmt: skip
    return dataset.encoded(
        teacher, batches, seed=config.seed, device=device, precision=config.precision, world=world
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
            f"--synthesized-fraction {config.share:g} of {part} images: the teacher's part", made, world
        )
    if config.optimizer == "lamb" and config.sharding in ("student", "both"):
        raise UserError(
            f"--optimizer lamb needs whole weights, and --sharding {config.sharding} cuts them.",
            "Use --optimizer adamw, or --sharding teacher or none.",
        )
    if config.compile == "on" and config.sharding != "none":
        raise UserError(
            f"--compile on and --sharding {config.sharding} do not work together.", "Leave out one of them."
        )
    if config.teacher_batch < 0:
        raise UserError("--teacher-batch is below 0.", "Give a number of images, or leave it out.")
    for name in ("lr", "epochs", "log_every", "save_every", "keep_checkpoints", "tau"):
        if getattr(config, name) <= 0:
            raise UserError(
                f"--{name.replace('_', '-')} must be above 0, not {getattr(config, name)}.",
                "Give a larger one.",
            )


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


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the extra.", "pip install 'dreamteacher[tensorboard]'") from None
    return SummaryWriter(folder / "tensorboard")
