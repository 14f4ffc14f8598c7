"""The training of what a downstream task needs, in the one loop, and where a long one is kept."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreamteacher.runtime import checkpoint, memory
from dreamteacher.runtime.loop import Loop
from dreamteacher.runtime.optim import Ema
from dreamteacher.runtime.run_folder import RunDir
from dreamteacher.runtime.settings import LoggerName, Precision

LOG_EVERY = 50  # steps between lines of the log of a training that is kept


class Saved:
    """Where one training keeps its last checkpoint: the same training goes on from there, bitwise.

    The caller begins its stream of batches at `step`; `run_steps` does the rest. Random numbers that layers
    draw from torch's global generators (see `dreamteacher.runtime.distributed.device.seeded`) go on where
    they stopped.

    The folder, which it makes and locks, belongs to this training alone; `facts`, all that decides it, are
    kept there for the reader. A UserError where another process trains it, its checkpoint cannot be read, or
    it cannot be written.
    """

    def __init__(
        self, folder: Path, facts: Mapping[str, Any], minutes: float = 10.0, log_to: Sequence[LoggerName] = ()
    ) -> None:
        self.minutes, self.log_to = minutes, log_to
        self.log_at = folder.parent / "logs" / folder.name  # the folder itself goes once the rows are written
        self.run = RunDir(folder)
        try:
            self.path = self.run.open({"verb": "evaluate", "config": dict(facts)})
        except BaseException:
            self.run.close()
            raise
        self.step = checkpoint.step_of(self.path) if self.path else 0

    def __enter__(self) -> Saved:
        return self

    def __exit__(self, *_: object) -> None:
        self.run.close()


@dataclass(frozen=True, kw_only=True)
class LongRun:
    """How a long training runs: what does not belong to its settings."""

    seed: int = 0  # of the draw and of all that is random in the training
    precision: Precision = "auto"
    workers: int = 0  # processes that decode and augment; they change no number
    saved: Saved | None = None  # None: the training is not kept

    @property
    def first(self) -> int:
        """The step that it begins with."""
        return self.saved.step if self.saved else 0


UNKEPT = LongRun()


def run_steps(
    modules: Sequence[nn.Module],
    optimizer: torch.optim.Optimizer,
    losses_at: Callable[[int], Iterable[Tensor]],
    rate_at: Callable[[int], float],
    *,
    steps: int,
    saved: Saved | None = None,
    clip: float = 0.0,
    ema: Ema | None = None,
    title: str = "",
) -> None:
    """Updates number `saved.step` (0 without one) to `steps` - 1.

    Args:
        modules: all that the optimizer updates, each once.
        optimizer: its groups may have a "factor" on their learning rate.
        losses_at: step -> losses with a graph, whose gradients are added; each is asked for after the one
            before it was differentiated, so that parts of a batch need the memory of one.
        rate_at: step -> learning rate.
        steps: number of updates.
        saved: where the training is kept; a UserError is then raised for a loss that is not finite, and a
            SystemExit (128 + n) after SIGINT or SIGTERM, where signals are handled.
        clip: largest norm of all gradients; 0: no clipping.
        ema: the moving average of the only module.
        title: of a progress bar in a terminal; none without one.
    """
    named = {f"module{i}": module for i, module in enumerate(modules)}
    device = next(p for module in modules for p in module.parameters()).device

    def state() -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, meta = checkpoint.pack(named, optimizer, ema)
        tensors["random/cpu"] = torch.get_rng_state()
        if device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(device)
        return tensors, meta

    def restore(tensors: Mapping[str, Tensor], meta: Mapping[str, Any], path: Path) -> None:
        checkpoint.unpack(named, optimizer, ema, tensors, meta, path)
        torch.set_rng_state(tensors["random/cpu"])
        if "random/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random/cuda"], device)

    buffers = [b for module in modules for b in module.buffers()]
    loop = Loop(
        saved.run if saved else None, title=title, steps=steps, batch=0, state=state, restore=restore,
        resume=saved.path if saved else None, undo=memory.Undo(buffers, device) if saved else None,
        save_minutes=saved.minutes if saved else 0.0, log_to=saved.log_to if saved else (),
        log_at=saved.log_at if saved else None,
        advice=lambda name: "Use a lower learning rate for this task, or --precision float32.",
        shown=bool(title) and sys.stderr.isatty(),
    )  # fmt: skip
    with loop:
        for step in loop:
            rate = rate_at(step)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("factor", 1.0)
            optimizer.zero_grad(set_to_none=True)
            for loss in losses_at(step):
                loss.backward()
                if saved is not None:
                    loop.meter.watch(step, {"loss": loss})
                    loop.meter.add(step, {"loss": loss})
            if clip:
                nn.utils.clip_grad_norm_([p for module in modules for p in module.parameters()], clip)
            with loop.update():
                optimizer.step()
                if ema is not None:
                    ema.update(modules[0])
            if saved is not None and loop.due(LOG_EVERY):
                loop.log(lambda means, rate=rate: {**means, "lr": rate})  # type: ignore[misc]
