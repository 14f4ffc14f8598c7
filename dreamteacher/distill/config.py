"""What `pretrain`, `train-interpreter`, `make-features` and `make-labels` are asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dreamteacher.runtime.settings import (
    BatchNorm,
    Compile,
    OnDevice,
    OptimizerName,
    Precision,
    ReadsImages,
    Resumable,
)
from dreamteacher.spec import AtReduction, Noise, WhitenAxes

Distill = Literal["feature", "label", "mixed"]
What = Literal["maps", "latents"]
Keep = Literal["pca", "random", "whitened", "all"]
Storage = Literal["int8", "float16", "float32"]
DatasetKind = Literal["encoded", "synthesized", "both"]


@dataclass(frozen=True, kw_only=True)
class Decayed:
    """Of the optimizer of every training here."""

    weight_decay: float = 0.05
    """For kernels and matrices; biases and norms do not decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of the optimizer's moments."""


@dataclass(frozen=True, kw_only=True)
class ReadsTeacher:
    """Whose maps are read, and at what size."""

    teacher: str = "chest-xray-64"
    """A name of `list teachers`, a folder made by `train-teacher` or `get-teacher`, or FILE.py:FUNCTION."""
    size: tuple[int, int] | None = None
    """Height and width in pixels; none: the teacher's."""


@dataclass(frozen=True, kw_only=True)
class Taught(ReadsTeacher):
    """How a teacher's maps are made while something learns from them, and what the masks of labelled images are."""

    noise: Noise = "stochastic"
    """stochastic (fresh at every step), fixed (one for all), inversion (DDIM, deterministic) or none."""
    psi: float = 1.0
    """Truncation of a GAN teacher's samples; 1: none."""
    binary_masks: bool = False
    """Masks are black and white: class 0 and class 1."""


@dataclass(frozen=True, kw_only=True)
class InterpreterTraining(Decayed):
    """How an interpreter is trained. Defaults are the paper's, but for the batch, which it does not state."""

    epochs: int = 100
    """Passes over the labelled images."""
    warmup_epochs: int = 20
    """Epochs of linear warm-up before the cosine."""
    batch_size: int = 4
    """Labelled images per step (at most as many as there are)."""
    lr: float = 4e-3
    """Peak learning rate (AdamW)."""
    width: int = 256
    """Channels inside the interpreter, a multiple of 8."""
    dropout: float = 0.1
    """Probability of dropping a channel before the last layer."""
    dice_weight: float = 3.0
    """Weight of the Dice loss beside the cross-entropy (eq. 4)."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: in the cross-entropy a class counts by the inverse of its share of the labels."""
    ema: float = 0.0
    """Decay of an average of the weights that is then used; 0: none."""
    flip: bool = True
    """Horizontal flips; switch off where classes have a side."""
    look_every: int = 10
    """Epochs between looks at the validation score; 0: only at the end."""
    teacher_batch: int = 0
    """Images that the teacher sees at once, to save memory; 0: a whole batch."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Taught, Decayed, Resumable, ReadsImages):
    """Pretrain a backbone on a folder of images, taught by a generative model. Defaults are the paper's."""

    images: Path | None = None
    """Folder of images, searched recursively; subfolders are class names, used to watch (kNN), not to learn.
    Or LAYOUT:ROOT of a public data set (imagenet:/data/imagenet), shards:FOLDER of tar files, hf:DATASET.
    May be left out when the dataset is synthesized."""
    out: Path
    """Run folder; the same command resumes a run that was stopped."""
    student: str = "resnet50"
    """timm name of the backbone: any family with a pyramid of maps, or a plain ViT (vit_*, deit_*, eva*)."""
    distill: Distill = "feature"
    """feature: the teacher's maps alone, no labels; label: an interpreter's soft labels alone; mixed: both (eq. 6)."""
    interpreter: Path | None = None
    """For label and mixed: a folder that `train-interpreter` made."""
    labelled: Path | None = None
    """Instead of --interpreter: labelled images, on which one is trained first, in OUT/interpreter."""
    masks: Path | None = None
    """Their masks (see `train-interpreter --help`); none: subfolders are classes, one label an image."""
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
    """encoded: maps of real images; synthesized: the teacher's own images and maps; both: some of each."""
    features: Path | None = None
    """A folder that `make-features` made of these images: read, instead of running the teacher at every step."""
    synthesized_fraction: float = 0.5
    """Of a dataset that is both: the fraction of each batch that the teacher makes."""
    samples: int = 50_000
    """Images that make an epoch of a synthesized dataset."""
    t: tuple[int, ...] = ()
    """Timesteps of a diffusion teacher; none: the interpreter's, else the one its card recommends."""
    blocks: tuple[int, ...] = ()
    """Decoder blocks of a diffusion U-Net to learn from; none: the interpreter's, else the paper's four levels."""
    whiten: WhitenAxes = "chw"
    """LayerNorm axes of eq. 1: chw (per image) or c (per position)."""
    at_weight: float = 10.0
    """Weight of the attention-transfer loss (eq. 3)."""
    at_reduction: AtReduction = "distance"
    """distance: norm per image (eq. 2); public: mean of squares, as public code has it."""
    width: int = 256
    """Channels of the feature regressor."""
    optimizer: OptimizerName = "adamw"
    """adamw, or lamb (the paper's for ImageNet)."""
    lr: float = 4e-3
    """Peak learning rate at the given batch size."""
    batch_size: int = 256
    """Images per optimizer step."""
    accumulate: int = 1
    """Parts that a batch is split into to save memory; BatchNorm sees one part at a time."""
    teacher_batch: int = 0
    """Images that the teacher sees at once; 0: a whole part, on a GPU at most 32. Halved when memory runs out."""
    batch_norm: BatchNorm = "global"
    """Of several processes (torchrun): global: over the images of all, as in one process (GPUs); local: each over its own."""
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
    compile: Compile = "auto"
    """torch.compile of teacher, student and losses; auto: on a GPU with Triton, for 1000 steps and more,
    in several processes with --batch-norm local. Moves last bits."""
    log_every: int = 20
    """Steps between lines in metrics.jsonl."""
    probe_every: int = 500
    """Steps between RankMe and kNN; 0: only at the end."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""
    dry_run: bool = False
    """Only print parameters, steps, memory, time and disk."""


@dataclass(frozen=True, kw_only=True)
class TrainInterpreterConfig(Taught, InterpreterTraining, Resumable):
    """Train an interpreter on a teacher's maps of a few labelled images."""

    images: Path
    """Labelled images; without masks: one subfolder per class. Also a folder of samples from `make-labels`."""
    masks: Path | None = None
    """Their masks: a folder of images of class ids, a COCO-style JSON file, or a folder of .npy files (DDPM-seg's)."""
    class_count: int | None = None
    """Number of classes; ids beyond it are refused. None: the largest id that occurs."""
    ignore_index: int = 255
    """Mask id that is neither learned nor scored."""
    labels: int | None = None
    """Labelled images to learn from (without masks: per class), drawn by the seed; none: all of them."""
    val_images: Path | None = None
    """Images to validate on; none: those that --labels leaves over, if any."""
    val_masks: Path | None = None
    """Their masks."""
    out: Path
    """Folder for the interpreter; the same command resumes."""
    t: tuple[int, ...] = ()
    """Timesteps of a diffusion teacher, read side by side; none: the one its card recommends."""
    blocks: tuple[int, ...] = ()
    """Decoder blocks of a diffusion U-Net to read (DDPM-seg: 5 6 7 8 12); none: the paper's four levels."""
    seed: int = 0
    """Seeds weights, draws, order, flips and noise."""
    dry_run: bool = False
    """Only check and print what would be done."""


@dataclass(frozen=True, kw_only=True)
class MakeFeaturesConfig(ReadsTeacher, OnDevice):
    """Keep a teacher's maps of a folder of images on disk, for `pretrain --features`."""

    images: Path
    """Folder of images, searched recursively."""
    out: Path
    """Folder of the features; the same command resumes, and may run several times at once."""
    what: What = "maps"
    """maps; or latents: only what Stable Diffusion's autoencoder gives, its U-Net runs while pretraining."""
    t: tuple[int, ...] = ()
    """Timesteps of a diffusion teacher; none: the one its card recommends."""
    blocks: tuple[int, ...] = ()
    """Decoder blocks of a diffusion U-Net whose maps are kept; none: the paper's four levels."""
    noise: Noise = "stochastic"
    """stochastic (fresh for every draw), fixed (one for all), inversion (DDIM, deterministic) or none."""
    keep: Keep = "pca"
    """pca: the best subspace of the whitened maps; random: any subspace; whitened: all channels; all: raw maps."""
    channels: int = 64
    """Stored channels of a level with pca and random: one is the energy of the raw map, the others coefficients."""
    store: tuple[Storage, ...] = ()
    """int8 (a scale for each channel), float16 or float32; one for all levels, or one each, fine to coarse. None:
    int8; float16 for --keep all; float32 for latents."""
    whiten: WhitenAxes = "chw"
    """LayerNorm axes of eq. 1: chw (per image) or c (per position); pretraining must use the same."""
    draws: int | None = None
    """Times that each image is encoded, each with noise of its own; none: 2 where images are flipped (one of them
    mirrored), else 1."""
    flip: bool = True
    """Mirror half of the draws. Stored maps cannot be mirrored later."""
    seed: int = 0
    """Seeds noise, flips and the basis."""
    batch_size: int = 8
    """Images that the teacher encodes at once; the noise of a batch comes from one recorded seed."""
    fit: int = 10_000
    """Positions of each level that the PCA is fitted on; they come from at most 160 images, drawn by the seed."""
    shard_mb: float = 256.0
    """Size of a shard in 10^6 bytes, about; a writer needs up to three times that in memory."""
    precision: Precision = "auto"
    """Autocast dtype of the teacher; auto: bfloat16 where the hardware has it."""
    workers: int = 2
    """Threads that decode images."""
    cache_gb: float = 2.0
    """Images are kept decoded in memory up to this size, else read when their turn comes."""
    strict: bool = False
    """Stop before the first batch when any image is damaged."""
    dry_run: bool = False
    """Only print size and time, measured on one batch."""


@dataclass(frozen=True, kw_only=True)
class MakeLabelsConfig(OnDevice):
    """Label a folder of images, or a teacher's own samples; or draw samples to annotate."""

    interpreter: Path | None = None
    """A folder of `train-interpreter`: it labels what its teacher sees or draws."""
    run: Path | None = None
    """Or a run of `pretrain --distill label` or `mixed`: its student labels images, without the teacher."""
    teacher: str | None = None
    """Or neither, and a teacher: its samples are drawn to be annotated."""
    images: Path | None = None
    """Folder of images to label."""
    samples: int | None = None
    """Instead of --images: how many samples of the teacher to draw (and label)."""
    out: Path
    """Folder for images, masks, labels.jsonl and index.html; the same command resumes."""
    soft: bool = False
    """Also keep the probabilities of all classes (uint8, at the model's own resolution)."""
    psi: float = 1.0
    """Truncation of a GAN teacher's samples that are drawn to be annotated; 1: none."""
    size: tuple[int, int] | None = None
    """Height and width in pixels; none: what the model was trained at."""
    batch_size: int = 16
    """Images a pass."""
    seed: int = 0
    """Seeds samples and noise."""


def steps_of(config: PretrainConfig, images: int) -> int:
    """Optimizer steps of the whole run: whole batches of every epoch, as `data.batches` gives them."""
    return max(1, round(config.epochs * (images // config.batch_size)))
