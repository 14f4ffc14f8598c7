"""THE loop: a student learns, without labels, to reproduce the maps of a frozen generative teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dreamteacher import __version__, checkpoint, data, feature_dataset, metrics, optim
from dreamteacher.config import describe, to_json
from dreamteacher.distributed import Precision, autocast, pick_device, resolve_precision
from dreamteacher.errors import UserError
from dreamteacher.estimate import disk_bytes, dry_run, millions
from dreamteacher.feature_dataset import DatasetKind, FeatureBatch
from dreamteacher.losses import AtReduction, WhitenAxes, feature_loss, whiten
from dreamteacher.regressor import FeatureRegressor
from dreamteacher.rundir import Progress, RunDir, Signals
from dreamteacher.students import Student, create_student
from dreamteacher.teachers import fingerprint, load_teacher
from dreamteacher.teachers.base import Noise, Teacher


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretrain a backbone on a folder of images, taught by a generative model. Defaults are the paper's."""

    images: Path | None = None
    """Folder of images, searched recursively; subfolders are class names, used to watch (kNN), not to learn.
    May be left out when the dataset is synthesized."""
    out: Path
    """Run folder; the same command resumes a run that was stopped."""
    teacher: str = "chest-xray-64"
    """A name of `list teachers`, a folder made by `train-teacher` or `get-teacher`, or FILE.py:FUNCTION."""
    student: str = "resnet50"
    """timm name of the backbone: any convolutional family with a pyramid."""
    init: str = "random"
    """random, imagenet (timm's weights) or a file or run folder to start from."""
    dataset: DatasetKind = "encoded"
    """encoded: maps of real images; synthesized: the teacher's own images and maps; mixture: some of each."""
    share: float = 0.5
    """Of a mixture: the share of each batch that the teacher makes."""
    samples: int = 50_000
    """Images that make an epoch of a synthesized dataset."""
    size: tuple[int, int] | None = None
    """Height and width in pixels; none: the teacher's."""
    t: tuple[int, ...] = ()
    """Timesteps of a diffusion teacher; none: the one its card recommends."""
    noise: Noise = "stochastic"
    """stochastic (fresh at every step), fixed (one for all), inversion (DDIM, deterministic) or none."""
    psi: float = 1.0
    """Truncation of a GAN teacher's samples; 1: none."""
    whiten: WhitenAxes = "chw"
    """LayerNorm axes of eq. 1: chw (per image) or c (per position)."""
    at_weight: float = 10.0
    """Weight of the attention-transfer loss (eq. 3)."""
    at_reduction: AtReduction = "distance"
    """distance: norm per image (eq. 2); public: mean of squares, as public code has it."""
    width: int = 256
    """Channels of the feature regressor."""
    optimizer: optim.OptimizerName = "adamw"
    """adamw, or lamb (the paper's for ImageNet)."""
    lr: float = 4e-3
    """Peak learning rate at the given batch size."""
    weight_decay: float = 0.05
    """For kernels and matrices; biases and norms do not decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of the optimizer's moments."""
    batch_size: int = 256
    """Images per optimizer step."""
    accumulate: int = 1
    """Parts that a batch is split into to save memory; BatchNorm sees one part at a time."""
    epochs: float = 100.0
    """Passes over the images (synthesized: over as many samples)."""
    warmup_epochs: float = 20.0
    """Epochs of linear warm-up before the cosine."""
    clip: float = 0.0
    """Largest gradient norm; 0: no clipping."""
    ema: float = 0.0
    """Decay of an average of the weights that is then exported; 0: none."""
    flip: bool = True
    """Horizontal flips (the teacher sees what the student sees)."""
    seed: int = 0
    """Seeds weights, order, flips and noise."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    precision: Precision = "auto"
    """Autocast dtype; auto: bfloat16 where the hardware has it."""
    log_every: int = 20
    """Steps between lines in metrics.jsonl."""
    probe_every: int = 500
    """Steps between RankMe and kNN; 0: only at the end."""
    save_every: int = 200
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    workers: int = 2
    """Processes or threads that decode images."""
    cache_gb: float = 2.0
    """Images are kept decoded in memory up to this size, else streamed."""
    strict: bool = False
    """Stop before the first step when any image is damaged."""
    dry_run: bool = False
    """Only print parameters, steps, memory, time and disk."""
    tensorboard: bool = False
    """Also write TensorBoard files (extra: dreamteacher[tensorboard])."""


def pretrain(config: PretrainConfig) -> Path | None:
    """Runs or resumes one pretraining; returns its folder (None for a dry run).

    Raises:
        UserError: for everything that can be known before the first step, before a folder is made.
        SystemExit: 128 + n after SIGINT or SIGTERM, once the state is saved.
    """
    # --- what is asked for, checked ----------------------------------------------------------------------
    device = pick_device(config.device)
    _check_numbers(config)
    teacher = load_teacher(config.teacher, timesteps=config.t, noise=config.noise, psi=config.psi)
    size = config.size or teacher.size
    feature_dataset.check_mode(teacher, config.dataset, size)
    student = create_student(config.student, init=config.init, seed=config.seed)
    images = _images(config, size)
    bad = images.bad if images else ()
    epoch = config.samples if config.dataset == "synthesized" or images is None else len(images)
    if config.batch_size > epoch:
        raise UserError(
            f"A batch of {config.batch_size} is more than the {epoch} readable images.",
            f"Use --batch-size {max(2, epoch // 4)}, or add images.",
        )
    regressor = FeatureRegressor(student.specs, teacher.specs, width=config.width, seed=config.seed)
    disk = disk_bytes(student, regressor, ema=bool(config.ema), keep=config.keep)
    resolved = {"verb": "pretrain", "version": __version__, "config": to_json(config)} | _facts(
        config, teacher, images, size
    )
    RunDir.check(config.out, resolved, needed_bytes=0 if config.dry_run else disk)

    # --- what is trained ---------------------------------------------------------------------------------
    if config.dataset != "mixture":
        teacher.keep_only("encode" if config.dataset == "encoded" else "sample")
    teacher.to(device)
    training = Training(config, student.to(device), regressor.to(device), steps_of(config, epoch))
    print(describe(f"pretrain {config.student} <- {teacher.name}", {
        "teacher": f"{teacher.family}, licence: {teacher.licence}", "images": epoch,
        "skipped": len(bad), "size": size, "dataset": config.dataset, "t": teacher.timesteps,
        "levels": [f"{s.name}:{s.channels}" for s in teacher.specs], "batch": config.batch_size,
        "steps": training.steps, "epochs": config.epochs, "lr": config.lr, "optimizer": config.optimizer,
        "parameters": f"{millions(student)} + regressor {millions(regressor)} + teacher {millions(teacher)}",
        "device": device, "precision": str(resolve_precision(device, config.precision)).removeprefix("torch."),
        "out": config.out,
    }), flush=True)  # fmt: skip
    for path, reason in bad[:3]:
        print(f"  skipped {path}: {reason}")
    if config.dry_run:
        part = config.batch_size // config.accumulate
        print(dry_run(
            teacher, student, regressor, size=size, batch=config.batch_size, part=part, steps=training.steps,
            disk=disk, precision=config.precision,
        ))  # fmt: skip
        return None

    # --- begin or resume ---------------------------------------------------------------------------------
    writer = _tensorboard(config.out) if config.tensorboard else None
    with contextlib.closing(RunDir(config.out)) as run, Signals() as signals:
        resume = run.open(resolved)
        first = training.restore(resume, run) if resume else 0
        _list_skipped(run.path, images)
        progress = Progress(training.steps, first, config.batch_size, "pretrain")
        stream = _stream(config, teacher, images, first * config.accumulate, training.steps, device)

        # --- the loop ------------------------------------------------------------------------------------
        for step in range(first + 1, training.steps + 1):
            batch = training.step(step - 1, stream, progress)
            last = step == training.steps
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
            if step % config.save_every == 0 or last or signals.number:
                training.save(step, run.path)
            if signals.number and not last:
                progress.close()
                print(f"Stopped at step {step}: saved in '{run.path}'. The same command resumes.", flush=True)
                raise SystemExit(128 + signals.number)

        # --- what the user takes away --------------------------------------------------------------------
        progress.close()
        if writer:
            writer.close()
        _list_skipped(run.path, images)  # again: a stream finds more of them on the way
        training.write_weights(run.path, teacher)
    return config.out


def steps_of(config: PretrainConfig, images: int) -> int:
    """Optimizer steps of the whole run: whole batches of every epoch, as `data.batches` gives them."""
    return max(1, round(config.epochs * (images // config.batch_size)))


class Training:
    """The student, its regressor, optimizer and average: one optimizer step, one log line, one checkpoint."""

    def __init__(
        self, config: PretrainConfig, student: Student, regressor: FeatureRegressor, steps: int
    ) -> None:
        self.config, self.student, self.regressor, self.steps = config, student, regressor, steps
        self.device = next(student.parameters()).device
        self.trained = nn.ModuleDict({"student": student, "regressor": regressor})
        regressor.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        groups = optim.parameter_groups([self.trained], config.weight_decay)
        self.optimizer = optim.build_optimizer(config.optimizer, groups, config.lr, config.betas)
        self.ema = optim.Ema(self.trained, config.ema) if config.ema else None
        self.warmup = round(steps * config.warmup_epochs / config.epochs)
        self.levels = [spec.name for spec in regressor.teacher_specs]
        # Sums since the last log line, on the device: total, gradient norm, count, MSE and AT of each level.
        self.sums = torch.zeros(3 + 2 * len(self.levels), device=self.device)

    def step(
        self, index: int, stream: Iterator[FeatureBatch], progress: Progress
    ) -> tuple[FeatureBatch, list[Tensor]]:
        """One optimizer step (number `index`, from 0); returns the last part's batch and the student's maps."""
        c = self.config
        self.trained.train()
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(c.accumulate):
            batch = next(stream)
            progress.wait(batch.waited)
            with autocast(self.device, c.precision):
                maps = self.regressor(self.student(batch.images), [tuple(m.shape[-2:]) for m in batch.maps])
            loss = feature_loss(
                maps, batch.maps, axes=c.whiten, at_weight=c.at_weight, at_reduction=c.at_reduction
            )
            (loss.total / c.accumulate).backward()
            parts = torch.cat([loss.total.view(1), loss.mse, loss.at]).detach() / c.accumulate
            self.sums[0] += parts[0]
            self.sums[3:] += parts[1:]
        norm = nn.utils.clip_grad_norm_(self.trained.parameters(), c.clip or float("inf"))
        self.sums[1] += norm
        self.sums[2] += 1
        self.lr = optim.lr_at(index, total=self.steps, warmup=self.warmup, peak=c.lr)
        optim.set_lr(self.optimizer, self.lr)
        self.optimizer.step()
        if self.ema:
            self.ema.update(self.trained)
        return batch, maps

    def log(self, step: int, last: tuple[FeatureBatch, list[Tensor]]) -> dict[str, Any]:
        """One line of metrics: means since the last line; R2 and cosine of the last part against its targets.

        Raises:
            UserError: when the loss is not finite; the last checkpoint is from before.
        """
        total, norm, count, *parts = self.sums.tolist()
        if not all(map(_finite, (total, norm))):
            raise UserError(
                f"The loss or its gradient is not finite between steps {step - int(count)} and {step}.",
                f"Lower --lr (now {self.config.lr:g}), set --clip 1, or use --precision float32. "
                "The last checkpoint is from before.",
            )
        self.sums.zero_()
        row = {"step": step, "images_seen": step * self.config.batch_size, "loss": total / count}
        row |= {"grad_norm": norm / count, "lr": self.lr}
        n = len(self.levels)
        for i, name in enumerate(self.levels):
            row[f"mse/{name}"], row[f"at/{name}"] = parts[i] / count, parts[n + i] / count
            row[f"loss/{name}"] = row[f"mse/{name}"] + self.config.at_weight * row[f"at/{name}"]
            target = whiten(last[0].maps[i], self.config.whiten)
            row[f"r2/{name}"] = metrics.r2(last[1][i], target)
            row[f"cosine/{name}"] = metrics.cosine(last[1][i], target)
        return row

    @torch.no_grad()
    def probe(self, images: data.ImageSet, most: int = 1024) -> dict[str, float]:
        """RankMe of the backbone's pooled features on up to `most` images; kNN (leave one out) with labels."""
        self.student.eval()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:most]
        features = []
        for part in order.split(128):
            with autocast(self.device, self.config.precision):
                features.append(
                    self.student.pooled(images.get(part).to(self.device).float() / 255).float().cpu()
                )
        x = torch.cat(features)
        row = {"rankme": metrics.rankme(x)}
        if images.labels is not None:
            labels = images.labels[order]
            scores = metrics.knn_predict(x, labels, classes=len(images.classes))
            row["knn"] = metrics.accuracy(scores.argmax(1), labels)
        return row

    def state(self) -> dict[str, Tensor]:
        """The trained tensors that are exported: the average where there is one."""
        return self.ema.tensors if self.ema else self.trained.state_dict()

    def save(self, step: int, folder: Path) -> None:
        """Writes everything that the rest of the run depends on, atomically."""
        if not bool(torch.isfinite(self.sums).all()):
            return  # never replace a good checkpoint: `log` stops the run at its next line
        tensors, scalars = checkpoint.pack_optimizer(self.optimizer)
        tensors |= {f"trained/{k}": v for k, v in self.trained.state_dict().items()}
        tensors["sums"] = self.sums
        if self.ema:
            tensors |= {f"ema/{k}": v for k, v in self.ema.tensors.items()}
        meta = {"kind": "pretrain", "step": step, "optimizer": scalars}
        meta["ema_updates"] = self.ema.updates if self.ema else 0
        checkpoint.save(checkpoint.checkpoint_path(folder, step), tensors, meta)
        checkpoint.prune(folder, self.config.keep)

    def restore(self, path: Path, run: RunDir) -> int:
        """Continues from a checkpoint, bitwise; returns its step."""
        tensors, meta = checkpoint.load(path)
        if meta.get("kind") != "pretrain":
            raise UserError(f"'{path}' is a checkpoint of '{meta.get('kind')}'.", "Choose another --out.")
        checkpoint.load_exactly(self.trained, _under("trained/", tensors), path)
        self.sums.copy_(tensors["sums"])
        if self.ema:
            for key, value in _under("ema/", tensors).items():
                self.ema.tensors[key].copy_(value)  # in place: the memory layout stays
            self.ema.updates = meta["ema_updates"]
        checkpoint.unpack_optimizer(self.optimizer, tensors, meta["optimizer"])
        for name in ("metrics.jsonl", "timing.jsonl"):
            run.rewind(name, meta["step"])
        print(f"Resuming from step {meta['step']} of {self.steps}.", flush=True)
        return int(meta["step"])

    def write_weights(self, folder: Path, teacher: Teacher) -> None:
        """backbone.safetensors (native timm names) and regressor.safetensors."""
        state = self.state()
        about = {"format": "dreamteacher-backbone", "student": self.student.name, "teacher": teacher.name}
        for name, prefix in (("backbone", "student.model."), ("regressor", "regressor.")):
            tensors = {k: v.detach().cpu().contiguous() for k, v in _under(prefix, state).items()}
            checkpoint.atomic_write(
                folder / f"{name}.safetensors", lambda path, tensors=tensors: save_file(tensors, path, about)
            )


def _images(config: PretrainConfig, size: tuple[int, int]) -> data.ImageSet | None:
    if config.images is not None:
        return data.load_images(
            config.images, size, strict=config.strict, cache_gb=config.cache_gb, workers=config.workers
        )
    if config.dataset != "synthesized":
        raise UserError(
            "An encoded dataset needs images." if config.dataset == "encoded" else "A mixture needs images.",
            "Give --images FOLDER, or --dataset synthesized.",
        )
    return None


def _list_skipped(folder: Path, images: data.ImageSet | None) -> None:
    if images is not None and images.bad:
        path = folder / "skipped.txt"
        checkpoint.write_text(path, "".join(f"{b.path}: {b.reason}\n" for b in images.bad))
        print(f"{len(images.bad)} images could not be read and were left out: {path}", flush=True)


def _stream(
    config: PretrainConfig,
    teacher: Teacher,
    images: data.ImageSet | None,
    first: int,
    steps: int,
    device: torch.device,
) -> Iterator[FeatureBatch]:
    part, last = config.batch_size // config.accumulate, steps * config.accumulate
    if config.dataset == "synthesized":
        return feature_dataset.synthesized(
            teacher, batch_size=part, first_step=first, last_step=last, seed=config.seed, device=device,
            precision=config.precision,
        )  # fmt: skip
    assert images is not None  # checked at the start
    made = feature_dataset.synthesized_part(part, config.share) if config.dataset == "mixture" else 0
    batches = data.batches(
        images, batch_size=part - made, seed=config.seed, first_step=first, last_step=last, flip=config.flip,
        workers=config.workers,
    )  # fmt: skip
    if config.dataset == "mixture":
        return feature_dataset.mixture(
            teacher, batches, made=made, seed=config.seed, device=device, precision=config.precision
        )
    return feature_dataset.encoded(
        teacher, batches, seed=config.seed, device=device, precision=config.precision
    )


def _check_numbers(config: PretrainConfig) -> None:
    if config.accumulate < 1 or config.batch_size % config.accumulate:
        raise UserError(
            f"--accumulate {config.accumulate} does not divide --batch-size {config.batch_size}.",
            "Choose a divisor.",
        )
    if config.batch_size // config.accumulate < 2:
        raise UserError("BatchNorm needs at least 2 images in a part of a batch.", "Lower --accumulate.")
    if config.dataset == "mixture":
        feature_dataset.synthesized_part(config.batch_size // config.accumulate, config.share)
    for name in ("lr", "epochs", "log_every", "save_every", "keep"):
        if getattr(config, name) <= 0:
            raise UserError(
                f"--{name.replace('_', '-')} must be above 0, not {getattr(config, name)}.",
                "Give a larger one.",
            )


def _facts(
    config: PretrainConfig, teacher: Teacher, images: data.ImageSet | None, size: tuple[int, int]
) -> dict[str, Any]:
    """What the config only implies, for the model card and the report."""
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
    }  # fmt: skip


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the extra.", "pip install 'dreamteacher[tensorboard]'") from None
    return SummaryWriter(folder / "tensorboard")
