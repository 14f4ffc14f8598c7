"""What `report` and `inspect` are asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dreamteacher.runtime.settings import OnDevice
from dreamteacher.spec import Noise


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write report.html into a run folder: one page without any outside resource."""

    run: Path
    """Folder of a pretraining, of a teacher's training, or one with a results.jsonl."""
    image_count: int = 8
    """Images whose feature maps are drawn; 0: none."""
    own_code: bool = False
    """Run the Python file that the run names as its teacher, to draw its maps: for runs of your own alone."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig(OnDevice):
    """Draw a teacher's maps and rank its timesteps and levels."""

    teacher: str = "chest-xray-64"
    """A name of `list teachers`, a teacher's folder, or FILE.py:FUNCTION."""
    images: Path | None = None
    """Folder of images; none: the teacher's own samples. Subfolders are classes and are probed."""
    masks: Path | None = None
    """Masks of the images (a folder, a COCO-style JSON file, or .npy files); probed instead of classes."""
    binary_masks: bool = False
    """Masks are black and white."""
    out: Path
    """Folder for index.html and ranking.csv."""
    t: tuple[int, ...] = (10, 50, 100, 150, 250, 400)
    """Timesteps to compare, for a diffusion teacher."""
    noise: Noise = "stochastic"
    """How a diffusion teacher noises images."""
    psi: float = 1.0
    """Truncation of a GAN teacher's samples; 1: none."""
    size: tuple[int, int] | None = None
    """Height and width in pixels; none: the teacher's."""
    count: int = 384
    """Images that are scored (at most)."""
    labels: int = 10
    """Labelled images per class that a probe of classes learns from; masks: labelled images in all."""
    show: int = 6
    """Images that are drawn."""
    batch_size: int = 16
    """Images a pass."""
    seed: int = 0
    """Seeds the choice of images, noise and labels."""
