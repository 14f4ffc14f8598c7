"""The one loop that trains what a downstream task needs, and the checkpoint that a long training resumes from."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.optim import Ema
from dreamteacher.runtime.run_folder import RunDir, Signals


class Saved:
    """Where one training keeps its last checkpoint: the same training goes on from there, bitwise.

    The caller begins its stream of batches at `step`; `run_steps` does the rest. Random numbers that layers
    draw from torch's global generators (see `dreamteacher.runtime.distributed.device.seeded`) go on where they stopped.

    Args:
        folder: made and locked; it belongs to this training alone.
        facts: all that decides the training, as JSON values; kept in its config.json for the reader.
        every: seconds between two checkpoints.

    Raises:
        UserError: another process trains it, its checkpoint cannot be read, or it cannot be written.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], every: float = 600.0) -> None:
        self.every = every
        self.run = RunDir(folder)
        try:
            self.path = self.run.open({"verb": "evaluate", "config": dict(facts)})
            self.tensors, self.meta = checkpoint.load(self.path) if self.path else ({}, {"step": 0})
        except UserError:
            self.run.close()
            raise
        self.step: int = self.meta["step"]
        self.last = time.monotonic()

    def restore(self, modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer, ema: Ema | None) -> int:
        """Puts everything back; returns the first step that is left."""
        if self.path is None:
            return 0
        for i, module in enumerate(modules):
            checkpoint.load_exactly(module, _under(f"module{i}/", self.tensors), self.path)
        checkpoint.unpack_optimizer(optimizer, self.tensors, self.meta["optimizer"])
        if ema is not None:
            for key, value in _under("ema/", self.tensors).items():
                ema.tensors[key].copy_(value)  # in place: the memory layout stays
            ema.updates = self.meta["ema_updates"]
        torch.set_rng_state(self.tensors["random/cpu"])
        if "random/cuda" in self.tensors:
            torch.cuda.set_rng_state(self.tensors["random/cuda"], _device(modules))
        self.tensors = {}  # their memory is given back
        return self.step

    def due(self) -> bool:
        """Whether the last checkpoint is old enough for another."""
        return time.monotonic() - self.last >= self.every

    def save(
        self, step: int, modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer, ema: Ema | None
    ) -> None:
        """Writes the state after `step` updates, whole or not at all, and then drops the one before it."""
        tensors, meta = checkpoint.pack_optimizer(optimizer)
        for i, module in enumerate(modules):
            tensors |= {f"module{i}/{k}": v for k, v in module.state_dict().items()}
        if ema is not None:
            tensors |= {f"ema/{k}": v for k, v in ema.tensors.items()}
        tensors["random/cpu"] = torch.get_rng_state()
        if _device(modules).type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(_device(modules))
        facts = {"step": step, "optimizer": meta, "ema_updates": ema.updates if ema else 0}
        checkpoint.save(checkpoint.checkpoint_path(self.run.path, step), tensors, facts)
        checkpoint.prune(self.run.path, 1)
        self.last = time.monotonic()


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _device(modules: Sequence[nn.Module]) -> torch.device:
    return next(p for module in modules for p in module.parameters()).device


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
    seen: Callable[[int, float], None] | None = None,
) -> None:
    """Updates number `saved.step` (0 without one) to `steps` - 1.

    Args:
        modules: all that the optimizer updates, each once.
        optimizer: its groups may have a "factor" on their learning rate.
        losses_at: step -> losses with a graph, whose gradients are added; each is asked for after the one
            before it was differentiated, so that parts of a batch need the memory of one.
        rate_at: step -> learning rate.
        steps: number of updates.
        saved: where the training is kept; None: it is not.
        clip: largest norm of all gradients; 0: no clipping.
        ema: the moving average of the only module.
        title: of a progress bar in a terminal; none without one.
        seen: receives step and loss.

    Raises:
        SystemExit: 128 + n after SIGINT or SIGTERM, where the training is kept.
    """
    first = saved.restore(modules, optimizer, ema) if saved else 0
    bar = tqdm(range(first, steps), title, initial=first, total=steps, disable=None if title else True)
    with Signals() if saved else contextlib.nullcontext() as signals:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step) * group.get("factor", 1.0)
            optimizer.zero_grad(set_to_none=True)
            total = 0.0
            for loss in losses_at(step):
                loss.backward()
                total += float(loss.detach()) if seen is not None else 0.0
            if clip:
                nn.utils.clip_grad_norm_([p for module in modules for p in module.parameters()], clip)
            optimizer.step()
            if ema is not None:
                ema.update(modules[0])
            if seen is not None:
                seen(step, total)
            if saved is None:
                continue
            stop, last = signals.number if signals else 0, step + 1 == steps
            if last or stop or saved.due():
                saved.save(step + 1, modules, optimizer, ema)
            if stop and not last:
                bar.close()
                print(f"Stopped at step {step + 1} of {steps}: saved in '{saved.run.path}'.", flush=True)
                print("The same command resumes.", flush=True)
                raise SystemExit(128 + stop)
