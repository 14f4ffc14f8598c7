"""THE loop: a student learns, without labels, to reproduce the maps of a frozen generative teacher."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreamteacher.distill.config import PretrainConfig
from dreamteacher.distill.dataset import Part, PartStream
from dreamteacher.distill.network import build_network, spread, write_weights
from dreamteacher.distill.plan import PretrainPlan, make_plan
from dreamteacher.distill.step import Distillation, loss_weights, probe
from dreamteacher.losses import total_loss
from dreamteacher.runtime import checkpoint, memory, optim
from dreamteacher.runtime.compile import compiled, wants_compile
from dreamteacher.runtime.distributed.ddp import gradients_stay
from dreamteacher.runtime.distributed.device import resolve_precision
from dreamteacher.runtime.distributed.group import all_gather_text, together
from dreamteacher.runtime.loop import Loop
from dreamteacher.runtime.meter import Means
from dreamteacher.runtime.run_folder import RunDir


@together
def pretrain(config: PretrainConfig) -> Path | None:
    """Runs or resumes one pretraining; returns its folder (None for a dry run).

    With torchrun all processes call it, each works on its rows of every batch, and the first one writes.

    Raises:
        UserError: for everything that can be known before the first step, before a folder is made.
        SystemExit: 128 + n after SIGINT or SIGTERM, once the state is saved, where signals are handled.
        KeyboardInterrupt: elsewhere, once the state is saved.
    """
    plan = make_plan(config)  # everything that can be wrong is found here
    print(plan.text(), flush=True)
    if config.dry_run:
        print(plan.estimate())
        return None

    with contextlib.closing(RunDir(config.out, plan.world)) as run:
        # --- build ---------------------------------------------------------------------------------------
        resume = run.open(plan.resolved)
        _list_skipped(run.path, plan)
        interpreter = plan.interpreter(run.path)  # the one named, or one that is trained now
        device, world = plan.device, plan.world
        network = build_network(config, plan.student, plan.regressor, interpreter, world)
        groups = optim.parameter_groups([network], config.weight_decay)
        optimizer = optim.build_optimizer(config.optimizer, groups, config.lr, config.betas)
        average = optim.Ema(network, config.ema) if config.ema else None
        called = spread(network, device, world)  # over the processes, where there are several
        distillation = Distillation(config, network, plan.levels, spread=called, interpreter=interpreter)
        _make_fast(plan, distillation)
        weights = loss_weights(config)  # of each term: eq. 3, 5 and 6
        warmup = round(plan.steps * config.warmup_epochs / config.epochs)

        def state() -> tuple[dict[str, Tensor], dict[str, Any]]:
            return checkpoint.pack({"network": network}, optimizer, average)

        def restore(tensors: Mapping[str, Tensor], meta: Mapping[str, Any], path: Path) -> None:
            checkpoint.unpack({"network": network}, optimizer, average, tensors, meta, path)

        def line(part: Part, lr: float, means: Means) -> dict[str, float]:
            found = distillation.row(part, means, lr=lr)
            return found | (probe(network, plan.images, config) if loop.due(config.probe_every) else {})

        loop = Loop(
            run, title="pretrain", steps=plan.steps, batch=config.batch_size, state=state, restore=restore,
            resume=resume, undo=memory.Undo(list(network.buffers())), save_every=config.save_every,
            save_minutes=config.save_minutes, keep=config.keep_checkpoints, advice=distillation.advice,
            log_to=config.log_to, guard_each=device.type == "cpu" and world.ranks == 1,
        )  # fmt: skip

        # --- the loop ------------------------------------------------------------------------------------
        with loop:
            batches = PartStream(plan.batches(), config.accumulate, loop.progress.wait)
            for step in loop:
                network.train()
                optimizer.zero_grad(set_to_none=True)
                lr = optim.lr_at(step, total=plan.steps, warmup=warmup, peak=config.lr)
                with memory.needed(f"Step {step + 1} runs out of memory", plan.smaller()):
                    for part in batches.of(step):  # the batch, or one part of it after the other
                        with gradients_stay(distillation.spread, not part.last):
                            losses = distillation.losses(part)
                            total = total_loss(losses, weights)
                            (total / config.accumulate).backward()
                        loop.meter.watch(step, distillation.watched(part) | {"loss": total})
                        loop.meter.add(step, losses | {"loss": total}, config.accumulate)
                    norm = nn.utils.clip_grad_norm_(network.parameters(), config.clip or float("inf"))
                    loop.meter.watch(step, {"gradient": norm})
                    loop.meter.add(step, {"grad_norm": norm})
                    with loop.update():
                        optim.set_lr(optimizer, lr)
                        optimizer.step()
                        if average is not None:
                            average.update(network)
                if loop.due(config.log_every):
                    loop.log(functools.partial(line, part, lr))

        # --- what the user takes away --------------------------------------------------------------------
        _list_skipped(run.path, plan)  # again: a stream finds more of them on the way
        write_weights(run.path, network, average, plan.teacher.name, plan.classes, world)
    return config.out


def _make_fast(plan: PretrainPlan, distillation: Distillation) -> None:
    """Lower precision of the teacher and torch.compile, where they are asked for."""
    c, device, world = plan.config, plan.device, plan.world
    if (dtype := resolve_precision(device, c.precision)) != torch.float32:
        plan.teacher.cast_weights(dtype)
    one_graph = world.ranks == 1 or c.batch_norm == "local"  # a global one breaks the graph
    if wants_compile(c.compile, device, plan.steps, whole=one_graph):
        plan.teacher.wrap_compile_targets(functools.partial(compiled, strict=c.compile == "on"))
        distillation.compile()


def _list_skipped(folder: Path, plan: PretrainPlan) -> None:
    found = "" if plan.images is None else "".join(f"{b.path}: {b.reason}\n" for b in plan.images.bad)
    lines = dict.fromkeys(line for part in all_gather_text(found) for line in part.splitlines(keepends=True))
    if lines and plan.world.first:
        path = folder / "skipped.txt"
        checkpoint.write_text(path, "".join(lines))
        print(f"{len(lines)} images could not be read and were left out: {path}", flush=True)
