"""How the classification tasks train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.settings import OptimizerName

Optimizer = Literal["adamw", "sgd"]
Loss = Literal["bce", "ce"]


@dataclass(frozen=True, kw_only=True)
class BackboneRate:
    """Of a backbone that learns beside a new head."""

    backbone_lr_factor: float = 1.0
    """The backbone's learning rate as a share of `lr`."""


@dataclass(frozen=True, kw_only=True)
class FineTuning(BackboneRate):
    """A short training of a backbone and a head with few labels."""

    steps: int
    batch_size: int
    lr: float
    weight_decay: float = 0.05
    """Of matrices and kernels."""

    def __post_init__(self) -> None:
        check_training(self)


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
    standardise: bool = False
    """Bring each feature to mean 0 and deviation 1 over the training images (takes no label)."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            above=("epochs", "batch_size", "lr"),
            least=("warmup_epochs", "weight_decay"),
            shares=("momentum",),
        )


def check_numbers(
    config: object,
    *,
    above: Sequence[str] = (),
    least: Sequence[str] = (),
    shares: Sequence[str] = (),
    prefix: str = "",
) -> None:
    """Raises UserError for the first of these settings that is not above 0, 0 or more, or in [0, 1)."""
    checks: tuple[tuple[Sequence[str], Callable[[float], bool], str], ...] = (
        (above, lambda v: v > 0, "a number above 0"),
        (shares, lambda v: 0 <= v < 1, "a share from 0 to below 1"),
        (least, lambda v: v >= 0, "0 or more"),
    )
    for names, fits, wanted in checks:
        for name in names:
            if not fits(value := getattr(config, name)):
                raise UserError(f"{prefix}{name} is {value}.", f"Give {wanted}.")


def check_training(config: Any) -> None:
    """Raises UserError for steps, batch_size and lr that nothing can be trained with."""
    check_numbers(config, above=("steps", "lr"))
    if config.batch_size < 2:
        raise UserError(f"batch_size is {config.batch_size}.", "Give at least 2, for BatchNorm.")
