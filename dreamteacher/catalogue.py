"""`list` and `doctor`: what can be named on the command line, and what this machine has."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from typing import Literal

import torch
from tyro.conf import Positional

from dreamteacher import __version__
from dreamteacher.distributed import pick_device, resolve_precision
from dreamteacher.errors import UserError

CORE = ("torch", "torchvision", "timm", "diffusers", "safetensors", "pillow", "tyro", "tqdm")
EXTRAS = {"tensorboard": "pretrain --tensorboard"}


@dataclass(frozen=True, kw_only=True)
class ListConfig:
    """Print what can be named: teachers, students, presets or tasks."""

    what: Positional[Literal["teachers", "students", "presets", "tasks"]] = "teachers"
    """What to list."""
    filter: str = ""
    """Only names that contain this."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Print versions, devices and what is missing."""


def print_list(config: ListConfig) -> None:
    """Prints one line per name."""
    match config.what:
        case "teachers":
            lines = _teachers()
        case "students":
            from dreamteacher.students import student_names

            lines = student_names()
        case "presets":
            from dreamteacher.teachers.train_diffusion import PRESETS

            lines = [
                f"{name:18} {p.size[0]} x {p.size[1]}, channels {p.channels}, patch {p.patch}, "
                f"{p.steps} steps of {p.batch_size}, t = {p.timestep}"
                for name, p in PRESETS.items()
            ]
        case "tasks":
            from dreamteacher.downstream.evaluate import TASKS

            lines = list(TASKS)
    found = [line for line in lines if config.filter in line]
    if not found:
        raise UserError(
            f"None of {len(lines)} {config.what} contains '{config.filter}'.", "Use a shorter --filter."
        )
    print("\n".join(found))


def _teachers() -> list[str]:
    from dreamteacher.teachers import EMBEDDED, load_teacher

    lines = [f"{'name':18} {'family':10} {'modes':16} levels (stride: channels)"]
    for name in EMBEDDED:
        teacher = load_teacher(name)
        levels = ", ".join(f"{s.stride}: {s.channels}" for s in teacher.specs)
        modes = ", ".join(sorted(teacher.modes))
        lines.append(f"{name:18} {teacher.family:10} {modes:16} {levels}; licence: {teacher.licence}")
    return [
        *lines,
        f"{'FOLDER':18} {'diffusion':10} {'encode, sample':16} any folder that `train-teacher` made",
    ]


def doctor(config: DoctorConfig) -> None:
    """Prints versions, devices, disk, and what is missing with the way to get it."""
    device = pick_device()
    print(f"dreamteacher {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in CORE:
        print(f"  {package:14} {_version(package) or 'MISSING: pip install ' + package}")
    for package, use in EXTRAS.items():
        print(f"  {package:14} {_version(package) or f'not installed (only for {use})'}")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    dtype = str(resolve_precision(device, "auto")).removeprefix("torch.")
    print(f"  device         {device} ({name}), {torch.get_num_threads()} threads, precision auto = {dtype}")
    print(f"  free disk here {shutil.disk_usage('.').free / 1e9:.1f} GB")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
