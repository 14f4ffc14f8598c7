"""torch.compile of what a step runs, at fixed shapes, with a way back where it cannot be compiled."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.settings import Compile

BACKEND = "inductor"
# Below this many steps, compiling (minutes for a large teacher) costs more than it gives back.
WORTHWHILE_STEPS = 1000

P = ParamSpec("P")
R = TypeVar("R")


def wants_compile(choice: Compile, device: torch.device, steps: int, *, whole: bool = True) -> bool:
    """Whether to compile: auto is on a GPU, for a long run, where Triton and the C compiler that it needs are found.

    Args:
        whole: a step is one graph; auto is off where something breaks it at every layer.
    """
    if choice != "auto":
        return choice == "on"
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    has_tools = importlib.util.find_spec("triton") is not None and compiler is not None
    return device.type == "cuda" and whole and steps >= WORTHWHILE_STEPS and has_tools


def compiled(function: Callable[P, R], *, strict: bool) -> Callable[P, R]:
    """`function` compiled for the shapes it is called with; other shapes are compiled anew.

    Args:
        strict: what cannot be compiled is an error; else it is said once, and `function` runs as it is.

    Raises:
        UserError: from a call, with `strict`.
    """
    fast = torch.compile(function, dynamic=False, backend=BACKEND)
    failed = False

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal failed
        if failed:
            return function(*args, **kwargs)
        try:
            with _backward_at_once():  # so that one that cannot be compiled fails where there is a way back
                return fast(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split())[:120]
            if strict:
                raise UserError(f"torch.compile fails here: {reason}", "Use --compile off.") from error
        failed = True
        print(f"Not compiled: torch.compile fails here ({reason}). --compile off avoids trying.", flush=True)
        return function(*args, **kwargs)

    return run


def _backward_at_once() -> Any:
    """Within: a backward graph is compiled with its forward graph, where torch has the setting."""
    from torch._functorch import config

    if not hasattr(config, "force_non_lazy_backward_lowering"):
        return contextlib.nullcontext()
    return config.patch(force_non_lazy_backward_lowering=True)
