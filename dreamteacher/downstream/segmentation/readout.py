"""Foreground/background read-out: how well a light head finds objects in the maps of a frozen backbone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from dreamteacher.downstream.loop import Saved
from dreamteacher.downstream.segmentation.crops import CropConfig, SemanticData, drawn_files
from dreamteacher.downstream.segmentation.semantic import FCNHead, SemanticConfig, score_files, train_dense
from dreamteacher.downstream.tasks import Metric
from dreamteacher.models.student import Student
from dreamteacher.runtime.distributed.device import Precision
from dreamteacher.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ReadoutConfig:
    """The read-out: frozen backbone, fully convolutional head, SGD with momentum 0.9, polynomial decay."""

    masks: tuple[int, ...] = ()
    """Labelled images to train on; each number is a result of its own; none: all."""
    steps: int = 20_000
    """Updates of the weights."""
    batch_size: int = 16
    """Crops per update (at least 2)."""
    lr: float = 0.01
    """Peak learning rate."""
    power: float = 0.9
    """Of the polynomial decay to zero."""
    weight_decay: float = 5e-4
    """Of matrices and kernels."""
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
        return SemanticConfig(
            masks=self.masks,
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            power=self.power,
            weight_decay=self.weight_decay,
            dropout=self.dropout,
            crops=self.crops,
            auxiliary=0.0,
        )


def level_of(student: Student, config: ReadoutConfig) -> int:
    """The number of the map that is read.

    Raises:
        UserError: the backbone has no map of that stride.
    """
    strides = [spec.stride for spec in student.specs]
    if config.stride not in strides:
        raise UserError(
            f"'{student.name}' has no map of stride {config.stride}.",
            f"Set --readout.stride to one of {', '.join(map(str, strides))}.",
        )
    return strides.index(config.stride)


def readout(
    student: Student,
    data: SemanticData,
    config: ReadoutConfig,
    *,
    masks: int | None = None,
    seed: int = 0,
    precision: Precision = "auto",
    workers: int = 0,
    saved: Saved | None = None,
) -> Iterator[Metric]:
    """mIoU, accuracy and IoU per class of a head on the frozen backbone's map of one stride.

    Args:
        student: left as it is.
        data: usually of two classes, background and foreground; more will do.
        config: see `ReadoutConfig`.
        masks: labelled images to train on, drawn by the seed; None: all.
        seed: of the draw and of the training.
        precision: of the matrix products.
        workers: processes that decode; changes no number.
        saved: where the training is kept; None: it is not.

    Raises:
        UserError: the backbone has no map of that stride.

    Source: section 8 of arXiv 2307.07487: frozen backbone, FCN, SGD 0.01, poly 0.9, 20k iterations. Neither the
    head's layers nor the map are stated: torchvision's FCN head on the coarsest map, not dilated.
    """
    level, files, training = level_of(student, config), data.train, config.training()
    model = train_dense(
        student,
        drawn_files(files, masks, seed),
        training,
        lambda: FCNHead(student.specs, files.classes, level, config.dropout),
        freeze=True,
        seed=seed,
        precision=precision,
        workers=workers,
        saved=saved,
    )
    yield from score_files(model, data.test, training, precision=precision, workers=workers)
