"""How the classification tasks train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.settings import OptimizerName

Optimizer = Literal["adamw", "sgd"]
Loss = Literal["bce", "ce"]
Source = Literal["file", "decoded"]


@dataclass(frozen=True, kw_only=True)
class BackboneRate:
    """Of a backbone that learns beside a new head."""

    backbone_lr_factor: float = 1.0
    """The backbone's learning rate as a share of `lr`."""


@dataclass(frozen=True, kw_only=True)
class FineTuning(BackboneRate):
    """A short training of a backbone and a head with few labels."""

    steps: int
    """Updates, the same for every number of labels."""
    batch_size: int
    """Images per update."""
    lr: float
    """Peak learning rate of the head (AdamW, cosine)."""
    weight_decay: float = 0.05
    """Of matrices and kernels."""

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch_size, self.lr)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(FineTuning):
    """How the classifier is trained."""

    steps: int = 40
    """Updates, the same for every number of labels."""
    batch_size: int = 16
    """Images per update; cut to the number of labelled images."""
    lr: float = 1e-3
    """Peak learning rate of the linear head (AdamW, cosine)."""
    flip: bool = True
    """Mirror each image left to right with probability one half."""
    crop: float = 0.125
    """Random shifts up to this share of the image's sides, the border filled by reflection; 0 = none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.crop < 0.5:
            raise UserError(f"crop is {self.crop}.", "Give a share from 0 to below 0.5.")


@dataclass(frozen=True, kw_only=True)
class FinetuneFullConfig:
    """A published recipe, and what is to differ from it."""

    preset: Literal["a2", "convnext", "convnext-short"] = "a2"
    """a2 (ResNet-50), convnext (300 epochs) or convnext-short (30, after a supervised pretraining)."""
    optimizer: OptimizerName | None = None
    """adamw or lamb; none: the preset's."""
    epochs: float | None = None
    """Passes over the training images; none: the preset's."""
    batch_size: int | None = None
    """Images per update, cut to the training images; none: the preset's."""
    lr: float | None = None
    """Peak learning rate; none: the preset's, scaled linearly with the batch size."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up; none: the preset's."""
    weight_decay: float | None = None
    """Of matrices and kernels; none: the preset's."""
    layer_decay: float | None = None
    """Factor on the learning rate per layer down from the classifier, 1 for all alike; none: the preset's."""
    drop_path: float | None = None
    """Largest rate of stochastic depth; none: the preset's."""
    loss: Loss | None = None
    """bce or ce; none: the preset's."""
    smoothing: float | None = None
    """Label smoothing; none: the preset's."""
    mixup: float | None = None
    """Alpha of mixup, 0 to switch it off; none: the preset's."""
    cutmix: float | None = None
    """Alpha of CutMix, 0 to switch it off; none: the preset's."""
    repeats: int | None = None
    """Augmentations of one image in a row; none: the preset's."""
    rand_augment: str | None = None
    """timm's policy, or off; none: the preset's."""
    erase: float | None = None
    """Probability of random erasing; none: the preset's."""
    clip: float | None = None
    """Largest gradient norm, 0 for no clipping; none: the preset's."""
    ema: float | None = None
    """Decay of the averaged weights that are scored, 0 for none; none: the preset's."""
    accumulate: int = 1
    """Parts that a batch is split into to save memory; BatchNorm and mixup see one part at a time."""
    crop_from: Source = "file"
    """Random crops are cut from the whole file, or from the image decoded at --size."""


@dataclass(frozen=True, kw_only=True)
class LinearSgdConfig:
    """How the linear layer is trained; defaults are those of the paper's appendix where it gives any."""

    epochs: float = 90.0
    """Passes over the training images."""
    batch_size: int = 4096
    """Features per update; cut to the number of training images."""
    lr: float = 0.02
    """Peak learning rate (cosine to 0), not scaled with the batch."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up."""
    momentum: float = 0.9
    """Of LARS; the paper does not say."""
    weight_decay: float = 0.0
    """L2 on the weights, not on the biases; the paper does not say."""
    trust: float = 0.001
    """LARS's trust coefficient; it acts on weights that decay, or with `always-adapt`."""
    always_adapt: bool = False
    """Scale the step by the trust ratio without weight decay too: other libraries' LARS, far slower here."""
    standardise: bool = False
    """Bring each feature to mean 0 and deviation 1 over the training images (takes no label)."""
    views: int = 0
    """Augmented passes (random resized crop, flip) that the epochs take in turn; 0: the plain images."""
    crop_from: Source = "file"
    """Random crops are cut from the whole file, or from the image decoded at --size."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr", "trust"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}.", "Give a number above 0.")
        for name in ("warmup_epochs", "weight_decay", "views"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}.", "Give 0 or more.")
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum is {self.momentum}.", "Give a share from 0 to below 1.")


def check_training(steps: int, batch_size: int, lr: float) -> None:
    """Raises UserError for settings that nothing can be trained with."""
    if steps < 1:
        raise UserError(f"steps is {steps}.", "Give at least 1.")
    if batch_size < 2:
        raise UserError(f"batch_size is {batch_size}.", "Give at least 2, for BatchNorm.")
    if lr <= 0:
        raise UserError(f"lr is {lr}.", "Give a number above 0.")
