"""`python -m dreamteacher` in a process of its own, with a line for every update that any of torch's optimizers makes.

A line: the learning rates, and checksums of all gradients and of all weights, whatever their order or memory layout.
This knows nothing of the package's inside, so it records old and new code alike. The process is a fork of one that has
imported torch and computed nothing, which saves most of a short command's time.
"""

from __future__ import annotations

import hashlib
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


def run(
    words: list[str], *, package: Path, folder: Path, log: Path, updates: Path, stop: str
) -> tuple[int, float]:
    """Runs one command; returns its exit code (-n after a signal that it did not catch) and its CPU-seconds.

    Args:
        words: verb and settings.
        package: the checkout whose code runs.
        folder: where it runs.
        log: file for its output.
        updates: file that a line is added to for each update.
        stop: "12 SIGTERM": the process gets that signal within its 12th update; empty: none.
    """
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            code = _child(words, package, folder, log, updates, stop)
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def _child(words: list[str], package: Path, folder: Path, log: Path, updates: Path, stop: str) -> int:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    sys.path[0] = os.environ["PYTHONPATH"] = str(package)
    sys.argv = ["dreamteacher", *words]
    record(updates, stop)
    try:
        runpy.run_module("dreamteacher", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def record(updates: Path, stop: str) -> None:
    """From now on every optimizer's updates are written down."""
    at, name = stop.split() if stop else ("0", "SIGTERM")
    made = 0

    def after(optimizer: torch.optim.Optimizer, _arguments: Any, _keywords: Any) -> None:
        nonlocal made
        made += 1
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in weights if p.grad is not None]
        rates = sorted({float(group["lr"]) for group in optimizer.param_groups})
        with open(updates, "a") as file:
            file.write(f"{','.join(map(repr, rates))} {checksum(gradients)} {checksum(weights)}\n")
        if made == int(at):
            os.kill(os.getpid(), getattr(signal, name))

    register_optimizer_step_post_hook(after)


def checksum(tensors: list[Tensor]) -> str:
    """Of the values of all tensors, their order left out."""
    parts = []
    for tensor in tensors:
        values = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        parts.append(hashlib.sha256(str(tuple(tensor.shape)).encode() + values.tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()[:8]
