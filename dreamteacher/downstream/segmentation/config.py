"""How the segmentation tasks train."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from dreamteacher.downstream.classification.config import (
    BackboneRate,
    FineTuning,
    Optimizer,
    check_numbers,
    check_training,
)
from dreamteacher.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(FineTuning):
    """How the segmentation head is trained."""

    steps: int = 60
    """Updates, the same for every number of masks."""
    batch_size: int = 4
    """Images per update (at least 2); cut to the number of masks."""
    lr: float = 2e-3
    """Peak learning rate of the head (AdamW, cosine)."""
    backbone_lr_factor: float = 0.5
    """The backbone's learning rate as a share of `lr` when it is fine-tuned."""
    width: int = 64
    """Channels inside the head."""
    dropout: float = 0.1
    """Probability of dropping a channel before the last layer, [0, 1)."""
    flip: bool = True
    """Mirror a batch left to right with probability one half; switch off where classes have a side."""


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """How images are scaled, and what part of them is seen in training."""

    short_side: int = 512
    """Images are scaled to this height or width, whichever is smaller, in pixels; 0: as they are."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Least and most of the random factor on that, for training."""
    size: tuple[int, int] = (512, 512)
    """Height and width of training crops, multiples of 32."""
    most_of_one_class: float = 0.75
    """Another crop is drawn (10 times at most) when one class fills more than this share; 1: never."""
    flip: bool = True
    """Mirror each crop left to right with probability one half."""

    def __post_init__(self) -> None:
        if any(side < 32 or side % 32 for side in self.size):
            raise UserError(f"The crop size is {self.size[0]} x {self.size[1]}.", "Give multiples of 32.")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise UserError(f"scale is {self.scale[0]} to {self.scale[1]}.", "Give least and most, above 0.")
        if self.short_side < 0 or not 0 < self.most_of_one_class <= 1:
            raise UserError(
                "short_side is below 0, or most_of_one_class outside 0 to 1.", "Give numbers in these ranges."
            )


@dataclass(frozen=True, kw_only=True)
class DenseTraining:
    """What is trained on streamed crops, with a polynomial decay."""

    mask_counts: tuple[int, ...] = ()
    """Labelled images to train on; each number is a result of its own; none: all."""
    steps: int = 160_000
    """Updates of the weights."""
    batch_size: int = 16
    """Crops per update (at least 2)."""
    lr: float = 0.01
    """Peak learning rate of the head."""
    power: float = 0.9
    """Of the polynomial decay to zero."""
    weight_decay: float = 5e-4
    """Of matrices and kernels."""
    crops: CropConfig = field(default_factory=CropConfig)
    """Scaling, and crops to train on."""


@dataclass(frozen=True, kw_only=True)
class ReadoutConfig(DenseTraining):
    """The read-out: frozen backbone, fully convolutional head, SGD with momentum 0.9, polynomial decay."""

    steps: int = 20_000
    """Updates of the weights."""
    stride: int = 32
    """The backbone's map that is read: 32, 16, 8 or 4 pixels per position."""
    dropout: float = 0.1
    """Probability of dropping a value before the last layer, [0, 1)."""
    crops: CropConfig = field(
        default_factory=lambda: CropConfig(short_side=256, size=(224, 224), most_of_one_class=1.0)
    )
    """Scaling, and crops to train on."""

    def __post_init__(self) -> None:
        self.training()
        if self.stride not in (4, 8, 16, 32):
            raise UserError(f"stride is {self.stride}.", "Give 32, 16, 8 or 4.")

    def training(self) -> SemanticConfig:
        """These settings as those of `dreamteacher.downstream.segmentation.semantic`, the rest switched off."""
        shared = {f.name: getattr(self, f.name) for f in fields(DenseTraining)}
        return SemanticConfig(**shared, dropout=self.dropout, auxiliary=0.0)


@dataclass(frozen=True, kw_only=True)
class SemanticConfig(BackboneRate, DenseTraining):
    """Full-size semantic segmentation. The defaults are ADE20K's; `PRESETS` has others."""

    optimizer: Optimizer = "sgd"
    """sgd (momentum 0.9) or adamw (betas 0.9, 0.999), usually with lr 1e-4 and weight_decay 0.05."""
    warmup: float = 0.0
    """Share of the steps in which the learning rate rises linearly, [0, 1)."""
    width: int = 512
    """Channels inside the head."""
    norm: bool = False
    """Normalise the backbone's maps (LayerNorm) before the head: for ConvNeXt."""
    dropout: float = 0.1
    """Probability of dropping a channel before the last layers, [0, 1)."""
    auxiliary: float = 0.4
    """Weight of the loss of a second, fully convolutional head on the second coarsest map (a plain ViT's only one);
    0: none."""
    test: Literal["whole", "slide"] = "whole"
    """Predict images as a whole, or averaged over windows of the crop's size; always at a single scale."""
    overlap: float = 1 / 3
    """Share of a window that the next one sees too, [0, 1)."""

    def __post_init__(self) -> None:
        check_training(self)
        check_numbers(
            self, above=("width",), least=("power", "auxiliary"), shares=("warmup", "overlap", "dropout")
        )
        if any(count < 2 for count in self.mask_counts) or len(set(self.mask_counts)) < len(self.mask_counts):
            raise UserError(f"mask_counts is {self.mask_counts}.", "Give different numbers, each at least 2.")


_STREETS = CropConfig(short_side=0, size=(512, 1024))
# Steps, optimizer and schedule are the paper's; crops and batch sizes are usual ones. None was run by us.
PRESETS = {
    # Expected of a ResNet-50: supervised 40.9, DreamTeacher 42.5 mIoU.
    "ade20k": SemanticConfig(),
    # After pretraining on BDD100K: supervised 78.7, DreamTeacher 77.5.
    "cityscapes": SemanticConfig(steps=80_000, batch_size=8, crops=_STREETS),
    # 1/4, 1/8 and 1/30 of the labels: supervised 71.3, 65.4, 54.4; DreamTeacher 63.9, 60.0, 50.0.
    "cityscapes-fractions": SemanticConfig(
        mask_counts=(744, 372, 100), steps=20_000, batch_size=8, crops=_STREETS
    ),
    # Pretrained on BDD100K: DreamTeacher 60.3; ImageNet-supervised 61.1.
    "bdd100k": SemanticConfig(steps=80_000, crops=_STREETS),
}
