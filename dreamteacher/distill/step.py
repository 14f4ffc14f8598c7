"""What a pretraining trains, and one step of it: the student, its regressor, the label head, the optimizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dreamteacher import metrics
from dreamteacher.data import image_set
from dreamteacher.data.images import to_float
from dreamteacher.distill.config import PretrainConfig
from dreamteacher.distill.dataset import FeatureBatch, batch_loss
from dreamteacher.distill.network import Trained, Undo, label_head, look
from dreamteacher.losses import label_distillation
from dreamteacher.models.interpreter import Interpreter
from dreamteacher.models.regressor import FeatureRegressor, resize
from dreamteacher.models.student import Student
from dreamteacher.runtime import checkpoint, memory, optim
from dreamteacher.runtime.compile import compiled
from dreamteacher.runtime.distributed.batch_norm import make_global
from dreamteacher.runtime.distributed.device import autocast
from dreamteacher.runtime.distributed.group import all_reduce_mean, broadcast, earliest
from dreamteacher.runtime.distributed.sharding import (
    gradients_stay,
    part_of,
    parts_of,
    replicate,
    shard,
    whole,
    whole_on_first,
)
from dreamteacher.runtime.distributed.share import ALONE, Share
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.run_folder import Progress, RunDir
from dreamteacher.teachers.base import Teacher

_NEVER = 2**62  # a step that is never reached


class Training:
    """The student, its regressor, optimizer and average: one optimizer step, one log line, one checkpoint.

    With an interpreter also the student's label head; the interpreter itself is frozen, as the teacher is, and
    no part of what is trained or saved.
    """

    def __init__(
        self,
        config: PretrainConfig,
        student: Student,
        regressor: FeatureRegressor,
        steps: int,
        interpreter: Interpreter | None = None,
        classes: Sequence[str] = (),
        share: Share = ALONE,
        device: torch.device | None = None,
    ) -> None:
        self.config, self.student, self.regressor = config, student, regressor
        self.steps, self.share = steps, share
        begun_on = next(student.parameters()).device
        self.device = device or begun_on
        self.interpreter, self.head, self.classes = interpreter, None, list(classes)
        if interpreter is not None:
            self.head = label_head(config.seed, config.width, regressor, interpreter).to(begun_on)
        if config.mode == "label":
            regressor.projections.requires_grad_(False)  # nothing is asked of them
        self.trained = Trained(student, regressor, self.head, project=config.mode != "label")
        if share.ranks > 1 and config.batch_norm == "global":
            make_global(self.trained, self.device)
        self.trained.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        sharded = share.ranks > 1 and config.sharding in ("student", "both")
        if sharded:
            shard(self.trained, self.device, lambda: look(self.trained), whole=True, also=("pooled",))
        groups = optim.parameter_groups([self.trained], config.weight_decay)
        self.optimizer = optim.build_optimizer(config.optimizer, groups, config.lr, config.betas)
        self.ema = optim.Ema(self.trained, config.ema) if config.ema else None
        self.network: nn.Module = self.trained
        if share.ranks > 1 and not sharded:
            self.network = replicate(self.trained, self.device, look)
        self.warmup = round(steps * config.warmup_epochs / config.epochs)
        self.forward: Callable[..., Any] = self.network
        self.batch_loss = batch_loss
        rows = share.of(config.batch_size // config.accumulate)
        self.parts = memory.Parts(rows, config.accumulate, share, config.batch_norm, config.out)
        self.levels = [spec.name for spec in regressor.teacher_specs]
        # Sums since the last log line, on the device: total, gradient norm, count, label loss, its entropy,
        # MSE and AT of each level.
        self.sums = torch.zeros(5 + 2 * len(self.levels), device=self.device)
        # The first step at which each of these was not finite, on the device: the teacher's maps, loss, gradient.
        self.watched = [*(f"teacher's map {name}" for name in self.levels), "loss", "gradient"]
        self.first_bad = torch.full((len(self.watched),), _NEVER, device=self.device)
        self.undo = Undo([*self.trained.buffers(), self.sums])

    def compile(self) -> None:
        """Has what follows compiled, as `compiled` says: the networks, and their losses."""
        strict = self.config.compile == "on"
        self.forward = compiled(self.network, strict=strict)
        self.batch_loss = compiled(batch_loss, strict=strict)

    def step(
        self, index: int, stream: Iterator[FeatureBatch], progress: Progress
    ) -> tuple[FeatureBatch, list[Tensor]] | None:
        """One optimizer step (number `index`, from 0); returns the last part's batch and the student's maps.

        None when memory ran out: nothing has changed but `parts`; repeat it with a stream that begins at this step.

        Raises:
            UserError: when memory runs out and parts cannot be smaller, it is the optimizer that has none, or there are
                several processes, which begin again together.
        """
        self.undo.note()
        try:
            batch, maps, seen = self._gradients(stream, progress)
        except RuntimeError as error:
            if not memory.ran_out(error):
                raise
            reason = memory.reason(error)
        else:
            with memory.needed(
                f"Step {index + 1} has no memory for the optimizer",
                "Use a smaller --student or --width, or several GPUs with --sharding student.",
            ):
                self._update(index, seen)
            return batch, maps
        self.undo.undo()
        self.optimizer.zero_grad(set_to_none=True)
        self.parts.add(index + 1, reason)
        return None

    def _gradients(
        self, stream: Iterator[FeatureBatch], progress: Progress
    ) -> tuple[FeatureBatch, list[Tensor], Tensor]:
        """Adds up the gradients of a batch, part by part; the last part, its maps, and numbers that are finite if
        the teacher's maps and the loss are."""
        c = self.config
        self.trained.train()
        self.optimizer.zero_grad(set_to_none=True)
        seen, last = [], None
        for k in range(c.accumulate):
            last = None  # one part's maps must not live through the next one's making
            part = next(stream)
            progress.wait(part.waited)
            for i, batch in enumerate(part.split(self.parts.count)):
                last = None
                share = c.accumulate * len(part.images) / len(batch.images)
                with gradients_stay(self.network, (k + 1, i + 1) != (c.accumulate, self.parts.count)):
                    loss, parts, maps = self._loss(batch)
                    (loss / share).backward()
                seen.append(
                    torch.stack([*(m.detach().sum(dtype=torch.float32) for m in batch.maps), loss.detach()])
                )
                self.sums[0] += loss.detach() / share
                self.sums[3:] += parts / share
                last = batch, maps
                del batch, maps, loss
            del part
        assert last is not None
        return *last, torch.stack(seen).sum(0)

    def _update(self, index: int, seen: Tensor) -> None:
        c = self.config
        norm = whole(nn.utils.clip_grad_norm_(self.trained.parameters(), c.clip or float("inf")))
        good = torch.cat([seen, norm[None]]).isfinite()
        self.first_bad = self.first_bad.where(good, self.first_bad.clamp(max=index + 1))
        self.sums[1] += norm
        self.sums[2] += 1
        self.lr = optim.lr_at(index, total=self.steps, warmup=self.warmup, peak=c.lr)
        optim.set_lr(self.optimizer, self.lr)
        self.optimizer.step()
        if self.ema:
            self.ema.update(self.trained)

    def _loss(self, batch: FeatureBatch) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The loss of a batch, its parts (label loss, entropy of the soft labels, MSE and AT of each level), and
        the student's maps (none in label mode).

        Source: eq. 3 (feature), eq. 5 (label), eq. 6 (mixed): L_mix = L_feat + 1.0 L_ld.
        """
        c = self.config
        parts = torch.zeros_like(self.sums[3:])
        total = parts.new_zeros(())
        with autocast(self.device, c.precision):
            sizes = [(m.shape[-2], m.shape[-1]) for m in batch.maps]
            maps, logits = self.forward(batch.images, sizes)
            if self.interpreter is not None:
                with torch.no_grad():
                    soft = self.interpreter(batch.maps).float()
        if maps:
            same = batch._replace(waited=0.0, step=0)  # or every step would be compiled anew
            found = self.batch_loss(
                maps, same, axes=c.whiten, at_weight=c.at_weight, at_reduction=c.at_reduction
            )
            total = found.total
            parts[2:] = torch.cat([found.mse, found.at]).detach()
        if logits is not None:
            if soft.ndim == 4:
                logits = resize(logits, (soft.shape[-2], soft.shape[-1]))
            distilled = label_distillation(logits, soft, tau=c.tau)
            parts[0], parts[1] = distilled.detach(), label_distillation(soft, soft, tau=c.tau)
            total = total + (c.label_weight if c.mode == "mixed" else 1.0) * distilled
        return total, parts, maps

    def log(self, step: int, last: tuple[FeatureBatch, list[Tensor]]) -> dict[str, Any]:
        """One line of metrics: means since the last line; R2 and cosine of the last part against its targets.

        Raises:
            UserError: when a map of the teacher, the loss or its gradient was not finite: which, and at which
                step; no checkpoint is of after it.
        """
        total, norm, count, label, entropy, *parts = all_reduce_mean(self.sums).tolist()
        bad = earliest(self.first_bad).tolist()
        if min(bad) < _NEVER:
            cause = self.watched[bad.index(min(bad))]
            theirs = "Look at the images of that step, and use --precision float32 or another --t. "
            ours = f"Lower --lr (now {self.config.lr:g}), set --clip 1, or use --precision float32. "
            raise UserError(
                f"The {cause} is not finite at step {min(bad)}.",
                (theirs if "teacher" in cause else ours) + checkpoint.before(self.config.out),
            )
        self.sums.zero_()
        row = {"step": step, "images_seen": step * self.config.batch_size, "loss": total / count}
        row |= {"grad_norm": norm / count, "lr": self.lr}
        if self.parts.count > 1:
            row["accumulate"] = self.config.accumulate * self.parts.count
        if self.head is not None:  # the loss cannot fall below the entropy of the soft labels
            row |= {"label": label / count, "label_kl": (label - entropy) / count}
        n = len(self.levels)
        for i, name in enumerate(self.levels if self.config.mode != "label" else ()):
            row[f"mse/{name}"], row[f"at/{name}"] = parts[i] / count, parts[n + i] / count
            row[f"loss/{name}"] = row[f"mse/{name}"] + self.config.at_weight * row[f"at/{name}"]
            target = last[0].target(i, self.config.whiten)
            row[f"r2/{name}"] = metrics.r2(last[1][i], target, all_reduce_mean)
            row[f"cosine/{name}"] = metrics.cosine(last[1][i], target, all_reduce_mean)
        return row

    @torch.no_grad()
    def probe(self, images: image_set.ImageSet, most: int = 1024) -> dict[str, float]:
        """RankMe of the backbone's pooled features on up to `most` images; kNN (leave one out) with labels."""
        self.student.eval()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:most]
        features = []
        for part in order.split(128):
            with autocast(self.device, self.config.precision):
                features.append(self.trained.pooled(to_float(images.get(part).to(self.device))).float().cpu())
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

    def save(self, step: int, folder: Path) -> bool:
        """Writes everything that the rest of the run depends on, atomically; False where a sum is not finite."""
        if not bool(torch.isfinite(all_reduce_mean(self.sums)).all()):
            return False  # never replace a good checkpoint: `log` says what is wrong
        tensors, scalars = checkpoint.pack_optimizer(self.optimizer)
        tensors |= {f"trained/{k}": v for k, v in self.trained.state_dict().items()}
        tensors["sums"] = self.sums
        if self.ema:
            tensors |= {f"ema/{k}": v for k, v in self.ema.tensors.items()}
        tensors = whole_on_first(tensors)
        if not self.share.first:
            return True
        meta = {"kind": "pretrain", "step": step, "optimizer": scalars}
        meta["ema_updates"] = self.ema.updates if self.ema else 0
        meta["split"] = self.parts.count
        checkpoint.save(checkpoint.checkpoint_path(folder, step), tensors, meta)
        checkpoint.prune(folder, self.config.keep)
        return True

    def restore(self, path: Path | None, run: RunDir) -> int:
        """Continues from a checkpoint (None: there is none yet), bitwise on a CPU, and in the parts that fitted last;
        returns its step."""
        self.parts.follow(int(broadcast(lambda: str(memory.told_parts(run.path)))))
        if path is None:
            return 0
        tensors, meta = checkpoint.load(path)
        if meta.get("kind") != "pretrain":
            raise UserError(f"'{path}' is a checkpoint of '{meta.get('kind')}'.", "Choose another --out.")
        mine = parts_of(_under("trained/", tensors), self.trained.state_dict())
        checkpoint.load_exactly(self.trained, mine, path)
        if tensors["sums"].shape != self.sums.shape:
            raise UserError(f"'{path}' was written by another version.", "Start anew: choose another --out.")
        self.sums.copy_(tensors["sums"])
        if self.ema:
            for key, value in _under("ema/", tensors).items():
                mine = self.ema.tensors[key]
                mine.copy_(part_of(value, mine))  # in place: the memory layout stays
            self.ema.updates = meta["ema_updates"]
        self.parts.at_least(meta.get("split", 1))
        checkpoint.unpack_optimizer(self.optimizer, tensors, meta["optimizer"])
        for name in ("metrics.jsonl", "timing.jsonl"):
            run.rewind(name, meta["step"])
        print(f"Resuming from step {meta['step']} of {self.steps}.", flush=True)
        return int(meta["step"])

    def write_weights(self, folder: Path, teacher: Teacher) -> None:
        """backbone.safetensors (native timm names), regressor.safetensors (its neck), and head.safetensors."""
        state = whole_on_first(self.state())
        if not self.share.first:
            return
        about = {"format": "dreamteacher-backbone", "student": self.student.name, "teacher": teacher.name}
        files = {"backbone": "student.model.", "regressor": "regressor."}
        if self.head is not None:
            files["head"] = "head."
            about |= {"classes": json.dumps(self.classes), "pooled": "yes" if self.head.pooled else "no"}
        for name, prefix in files.items():
            tensors = {k: v.contiguous() for k, v in _under(prefix, state).items()}
            checkpoint.atomic_write(
                folder / f"{name}.safetensors", lambda path, tensors=tensors: save_file(tensors, path, about)
            )


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
