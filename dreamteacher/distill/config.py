"""What a pretraining is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dreamteacher.distill.kinds import DatasetKind
from dreamteacher.distill.train_interpreter import InterpreterTraining
from dreamteacher.losses import AtReduction, WhitenAxes
from dreamteacher.runtime import optim
from dreamteacher.runtime.compile import Compile
from dreamteacher.runtime.distributed.batch_norm import BatchNorm
from dreamteacher.runtime.distributed.device import Precision
from dreamteacher.runtime.distributed.sharding import (
    Sharding,
)
from dreamteacher.teachers.base import Noise

Mode = Literal["feature", "label", "mixed"]


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretrain a backbone on a folder of images, taught by a generative model. Defaults are the paper's."""

    images: Path | None = None
    """Folder of images, searched recursively; subfolders are class names, used to watch (kNN), not to learn.
    Or LAYOUT:ROOT of a public data set (imagenet:/data/imagenet), shards:FOLDER of tar files, hf:DATASET.
    May be left out when the dataset is synthesized."""
    out: Path
    """Run folder; the same command resumes a run that was stopped."""
    teacher: str = "chest-xray-64"
    """A name of `list teachers`, a folder made by `train-teacher` or `get-teacher`, or FILE.py:FUNCTION."""
    student: str = "resnet50"
    """timm name of the backbone: any family with a pyramid of maps, or a plain ViT (vit_*, deit_*, eva*)."""
    mode: Mode = "feature"
    """feature: the teacher's maps alone, no labels; label: an interpreter's soft labels alone; mixed: both (eq. 6)."""
    interpreter: Path | None = None
    """For label and mixed: a folder that `train-interpreter` made."""
    labelled: Path | None = None
    """Instead of --interpreter: labelled images, on which one is trained first, in OUT/interpreter."""
    masks: Path | None = None
    """Their masks (see `train-interpreter --help`); none: subfolders are classes, one label an image."""
    binary_masks: bool = False
    """Masks are black and white: class 0 and class 1."""
    ignore_index: int = 255
    """Mask id that is no class."""
    label: InterpreterTraining = field(default_factory=InterpreterTraining)
    """How that interpreter is trained."""
    label_weight: float = 1.0
    """Weight of label distillation beside the feature loss (eq. 6)."""
    tau: float = 4.0
    """Temperature of the soft labels (eq. 5)."""
    init: str = "random"
    """random, imagenet (timm's weights) or a file or run folder to start from."""
    dataset: DatasetKind = "encoded"
    """encoded: maps of real images; synthesized: the teacher's own images and maps; mixture: some of each."""
    features: Path | None = None
    """A folder that `make-features` made of these images: read, instead of running the teacher at every step."""
    share: float = 0.5
    """Of a mixture: the share of each batch that the teacher makes."""
    samples: int = 50_000
    """Images that make an epoch of a synthesized dataset."""
    size: tuple[int, int] | None = None
    """Height and width in pixels; none: the teacher's."""
    t: tuple[int, ...] = ()
    """Timesteps of a diffusion teacher; none: the interpreter's, else the one its card recommends."""
    blocks: tuple[int, ...] = ()
    """Decoder blocks of a diffusion U-Net to learn from; none: the interpreter's, else the paper's four levels."""
    noise: Noise = "stochastic"
    """stochastic (fresh at every step), fixed (one for all), inversion (DDIM, deterministic) or none."""
    psi: float = 1.0
    """Truncation of a GAN teacher's samples; 1: none."""
    whiten: WhitenAxes = "chw"
    """LayerNorm axes of eq. 1: chw (per image) or c (per position)."""
    at_weight: float = 10.0
    """Weight of the attention-transfer loss (eq. 3)."""
    at_reduction: AtReduction = "distance"
    """distance: norm per image (eq. 2); public: mean of squares, as public code has it."""
    width: int = 256
    """Channels of the feature regressor."""
    optimizer: optim.OptimizerName = "adamw"
    """adamw, or lamb (the paper's for ImageNet)."""
    lr: float = 4e-3
    """Peak learning rate at the given batch size."""
    weight_decay: float = 0.05
    """For kernels and matrices; biases and norms do not decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of the optimizer's moments."""
    batch_size: int = 256
    """Images per optimizer step."""
    accumulate: int = 1
    """Parts that a batch is split into to save memory; BatchNorm sees one part at a time. Doubled when memory runs out."""
    teacher_batch: int = 0
    """Images that the teacher sees at once; 0: a whole part, on a GPU at most 32. Halved when memory runs out."""
    batch_norm: BatchNorm = "global"
    """Of several processes (torchrun): global: over the images of all, as in one process; local: each over its own."""
    sharding: Sharding = "none"
    """Of several processes: whose weights each keeps a part of (FSDP), where they do not fit on one device."""
    epochs: float = 100.0
    """Passes over the images (synthesized: over as many samples)."""
    warmup_epochs: float = 20.0
    """Epochs of linear warm-up before the cosine."""
    clip: float = 0.0
    """Largest gradient norm; 0: no clipping."""
    ema: float = 0.0
    """Decay of an average of the weights that is then exported; 0: none."""
    flip: bool = True
    """Horizontal flips (the teacher sees what the student sees)."""
    seed: int = 0
    """Seeds weights, order, flips and noise."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    precision: Precision = "auto"
    """Autocast dtype; auto: bfloat16 where the hardware has it."""
    compile: Compile = "auto"
    """torch.compile of teacher, student and losses; auto: on a GPU with Triton, for 1000 steps and more,
    in several processes with --batch-norm local. Moves last bits."""
    log_every: int = 20
    """Steps between lines in metrics.jsonl."""
    probe_every: int = 500
    """Steps between RankMe and kNN; 0: only at the end."""
    save_every: int = 200
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    workers: int = 2
    """Processes or threads that decode images."""
    cache_gb: float = 2.0
    """Images are kept decoded in memory up to this size, else streamed."""
    strict: bool = False
    """Stop before the first step when any image is damaged."""
    dry_run: bool = False
    """Only print parameters, steps, memory, time and disk."""
    tensorboard: bool = False
    """Also write TensorBoard files (extra: dreamteacher[tensorboard])."""


def steps_of(config: PretrainConfig, images: int) -> int:
    """Optimizer steps of the whole run: whole batches of every epoch, as `data.batches` gives them."""
    return max(1, round(config.epochs * (images // config.batch_size)))
