"""Where and in which precision things are computed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dreamteacher.runtime.distributed.world import launched
from dreamteacher.runtime.errors import UserError, first_line
from dreamteacher.runtime.settings import Precision


def pick_device(name: str = "auto") -> torch.device:
    """The device to run on: the one named, or the GPU where there is one; with torchrun each process's own GPU.

    Raises:
        UserError: for a device that this machine or this torch does not have.
    """
    if launched().ranks > 1 and (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"Device '{name}' cannot be used: {first_line(error, 60)}...",
            "Use auto, cpu, cuda or cuda:1; `dreamteacher doctor` lists what is here.",
        ) from None
    return device


def resolve_precision(device: torch.device, precision: Precision) -> torch.dtype:
    """The dtype of matrix products: bfloat16 where the hardware computes it natively, else float32.

    Convolutions in float32 are left as torch has them: on a GPU in TF32, unless a program switches that off with
    `torch.backends.cudnn.allow_tf32 = False`.
    """
    if precision == "float32":
        return torch.float32
    if precision == "bfloat16":
        return torch.bfloat16
    if device.type == "cuda":
        native = torch.cuda.get_device_properties(device).major >= 8  # older ones emulate it, slowly
        return torch.bfloat16 if native else torch.float32
    used = torch.backends.cpu.get_cpu_capability()  # below what the processor has by ATEN_CPU_CAPABILITY
    if device.type == "cpu" and used == "AVX512" and _cpu_flag("avx512_bf16"):
        return torch.bfloat16
    return torch.float32


def _cpu_flag(flag: str) -> bool:
    try:
        with open("/proc/cpuinfo") as info:
            return any(line.startswith("flags") and flag in line.split() for line in info)
    except OSError:  # not Linux: stay with float32
        return False


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Autocast for `device`; normalisations stay in float32 and parameters always are."""
    dtype = resolve_precision(device, precision)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype != torch.float32)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within: torch's global generators start from `seed`; afterwards they are as they were before.

    For layers that draw from nothing else: their initialisation, dropout, stochastic depth.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
