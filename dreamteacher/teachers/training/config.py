"""What `train-teacher` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dreamteacher.runtime.settings import Precision, ReadsImages, Resumable

PresetName = Literal[
    "cpu-64", "gpu-64", "adm-256", "adm-imagenet-256", "adm-bdd100k",
    "stylegan2-cpu-64", "stylegan2-256", "stylegan2-bdd100k",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainTeacherConfig(Resumable, ReadsImages):
    """Train a teacher, a diffusion model or a StyleGAN2, on a folder of images."""

    images: Path
    """Folder of images, searched recursively."""
    out: Path
    """Folder for the teacher; the same command resumes a run that was stopped."""
    preset: PresetName = "cpu-64"
    """Network and schedule: *cpu-64 take about an hour; adm-* and *-bdd100k are the paper's Table 16."""
    size: tuple[int, int] | None = None
    """Height and width in pixels; none: the preset's."""
    steps: int | None = None
    """Training steps; none: the preset's."""
    batch_size: int | None = None
    """Images a step; none: the preset's."""
    lr: float | None = None
    """Peak learning rate; none: the preset's."""
    channels: Literal["auto", "grey", "rgb"] = "auto"
    """What the network sees; auto: grey when every image is."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule of a diffusion teacher (the paper's: linear)."""
    gamma: float | None = None
    """Weight of a StyleGAN2's R1 penalty; none: the preset's."""
    ada: float | None = None
    """Augment what a StyleGAN2's discriminator sees, aiming at this mean sign of real logits (0.6); none: never."""
    flip: bool = True
    """Horizontal flips."""
    seed: int = 0
    """Seeds weights, order, noise and timesteps."""
    precision: Precision = "auto"
    """Autocast dtype; auto: bfloat16 where the hardware has it. A GPU's float32 convolutions are TF32, torch's way."""
    save_every: int = 500
    """Steps between checkpoints; 0: by minutes alone."""
    sample_every: int = 1000
    """Steps between sample sheets and validation lines."""
    name: str | None = None
    """Name in the card; none: the folder's."""
    licence: str = "yours (trained by you; the images' terms may bind you)"
    """Licence of the weights, for the card."""
    dry_run: bool = False
    """Only print what would be done."""
