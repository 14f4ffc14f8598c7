"""`list` and `doctor`: what can be named on the command line, and what this machine has."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from dreamteacher import __version__
from dreamteacher.cli.config import DoctorConfig, ListConfig
from dreamteacher.runtime.distributed.device import pick_device, resolve_precision
from dreamteacher.runtime.errors import UserError

CORE = ("torch", "torchvision", "timm", "diffusers", "safetensors", "pillow", "tyro", "tqdm")
EXTRAS = {
    "tensorboard": "--log-to tensorboard",
    "wandb": "--log-to wandb",
    "mlflow": "--log-to mlflow",
    "huggingface_hub": "get-teacher, of teachers on the model hub",
    "transformers": "get-teacher, of Stable Diffusion",
    "faster_coco_eval": "evaluate, of detection",
    "onnxruntime": "export --format onnx",
    "datasets": "images from the hub's data sets",
    "scipy": "ImageNet's development kit",
    "s3fs": "shards at s3://",
    "gcsfs": "shards at gs://",
    "lightly": "benchmarks/baselines",
}


def print_list(config: ListConfig) -> None:
    """Prints one line per name."""
    match config.what:
        case "teachers":
            lines = _teachers()
        case "students":
            from dreamteacher.models.student import student_names

            lines = student_names()
        case "presets":
            from dreamteacher.downstream.presets import PRESETS as EVALUATE
            from dreamteacher.teachers.training.train import PRESETS

            lines = [
                f"train-teacher {name:18} {p.size[0]} x {p.size[1]}, {p.line()}, {p.steps} steps of {p.batch_size}"
                for name, p in PRESETS.items()
            ]
            lines += [f"evaluate      {name:24} {preset.what}" for name, preset in EVALUATE.items()]
        case "tasks":
            from dreamteacher.downstream.tasks import TASKS

            lines = list(TASKS)
    found = [line for line in lines if config.filter in line]
    if not found:
        raise UserError(
            f"None of {len(lines)} {config.what} contains '{config.filter}'.", "Use a shorter --filter."
        )
    print("\n".join(found))


class _Row(NamedTuple):
    """A line of `list teachers`; `gmacs`: of one image at its own size, whole and up to the last level."""

    name: str
    status: str
    family: str
    modes: Sequence[str]
    levels: Mapping[int, int]
    size: tuple[int, int]
    gmacs: tuple[float, float]
    licence: str

    def text(self) -> str:
        """One line, aligned under the head."""
        height, width = self.size
        return _columns(
            self.name, self.status, self.family, ", ".join(self.modes), _levels(self.levels),
            f"{height} x {width}", " / ".join(f"{g:.1f}" for g in self.gmacs), self.licence,
        )  # fmt: skip


def _columns(*cells: str) -> str:
    widths = (24, 11, 16, 14, 36, 11, 15)
    return " ".join(
        [*(f"{cell:{w}}" for cell, w in zip(cells[:-1], widths, strict=False)), cells[-1]]
    ).rstrip()


def _levels(levels: Mapping[int, int]) -> str:
    return ", ".join(f"{stride}: {channels}" for stride, channels in levels.items())


def _teachers() -> list[str]:
    """Embedded, fetched and published teachers; no weights are read."""
    from dreamteacher.teachers.published.known import KNOWN, fetched
    from dreamteacher.teachers.registry import EMBEDDED, families_by_kind

    here, families = fetched(), families_by_kind()
    rows = [_from_card(name, folder, "embedded") for name, folder in EMBEDDED.items()]
    rows += [_from_card(name, folder, "fetched") for name, folder in here.items()]
    rows += [
        _Row(
            name, "not fetched", families[known.kind], known.modes, known.shape.levels, known.shape.size,
            (known.shape.gmacs_full, known.shape.gmacs_levels), known.licence,
        )
        for name, known in KNOWN.items()
        if name not in here
    ]  # fmt: skip
    head = (
        "name",
        "status",
        "family",
        "modes",
        "levels (stride: channels)",
        "size",
        "GMACs / needed",
        "licence",
    )
    return [
        _columns(*head),
        *(row.text() for row in rows),
        _columns("FOLDER", "yours", "any", "", "what `train-teacher` or `get-teacher` made", ""),
        _columns("FILE.py:FUNCTION", "yours", "module", "", "a network of your own", ""),
    ]


def _from_card(name: str, folder: Path, status: str) -> _Row:
    """What a teacher's card says; what an older one does not say is found from its spec."""
    from dreamteacher.teachers.registry import read_card, read_spec

    card = read_card(folder)
    size = card["network"].get("size", (0, 0))
    licence = card.get("licence", "not recorded")
    if "levels" in card and "gmacs" in card:
        levels = {int(stride): channels for stride, channels in card["levels"].items()}
        return _Row(name, status, card["family"], card["modes"], levels, size, tuple(card["gmacs"]), licence)
    from dreamteacher.teachers.cost import measure

    cost = measure(card["family"], read_spec(folder, card))
    return _Row(
        name, status, card["family"], cost.modes, cost.levels, size, (cost.full, cost.needed), licence
    )


def teacher_table() -> str:
    """The published teachers as a Markdown table, for docs/teachers.md."""
    from dreamteacher.teachers.published.known import KNOWN

    lines = [
        "| name | what | modes | stride: channels | t | GMACs whole / needed | download | licence | in the paper |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, known in KNOWN.items():
        shape = known.shape
        cells = (
            f"`{name}`", known.what, ", ".join(known.modes), _levels(shape.levels), known.timestep or "",
            f"{shape.gmacs_full:,.1f} / {shape.gmacs_levels:,.1f}", f"{known.gigabytes:g} GB", known.licence,
            known.paper,
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def doctor(config: DoctorConfig) -> None:
    """Prints versions, devices, disk, and what is missing with the way to get it."""
    device = pick_device()
    print(f"dreamteacher {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in CORE:
        print(f"  {package:15} {_version(package) or 'MISSING: pip install ' + package}")
    for package, use in EXTRAS.items():
        print(f"  {package:15} {_version(package) or f'not installed (only for {use})'}")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    dtype = str(resolve_precision(device, "auto")).removeprefix("torch.")
    print(f"  device         {device} ({name}), {torch.get_num_threads()} threads, precision auto = {dtype}")
    print(f"  free disk here {shutil.disk_usage('.').free / 1e9:.1f} GB")
    print(f"  cache          {_cache()}")


def _cache() -> str:
    """The folder of downloads and fetched teachers, and what it takes."""
    from dreamteacher.runtime.download.http import amount, cache_folder

    folder = cache_folder()
    files = [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()] if folder.is_dir() else []
    return f"{folder} ({amount(sum(p.stat().st_size for p in files)) if files else 'empty'})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
