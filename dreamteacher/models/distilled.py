"""The trained network as a whole: backbone, regressor's neck and label head, read from a run."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor, nn

from dreamteacher.models.regressor import LabelHead, Neck, resize
from dreamteacher.models.student import Student, create_student, recorded_student
from dreamteacher.runtime import checkpoint, tensor_file
from dreamteacher.runtime.errors import UserError, first_line

HEAD, REGRESSOR = "head.safetensors", "regressor.safetensors"


class Distilled(nn.Module):
    """A backbone with the neck and label head that it was pretrained with, frozen or fine-tuned as one likes.

    Args:
        student, neck, head: taken in, not copied.
        classes: names in id order.
    """

    def __init__(self, student: Student, neck: Neck, head: LabelHead, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.student, self.neck, self.head, self.classes = student, neck, head, classes

    @property
    def pooled(self) -> bool:
        """One label an image instead of one for every pixel."""
        return self.head.pooled

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1], N x 3 x H x W -> float32 logits N x classes x H x W, or N x classes if pooled."""
        logits = self.head(self.neck(self.student(images))).float()
        return logits if self.pooled else resize(logits, (images.shape[-2], images.shape[-1]))


def neck_weights(run: Path) -> dict[str, Tensor]:
    """The neck of a run's regressor: what mixed pretraining transfers beside the backbone.

    Raises:
        UserError: when the folder has none.
    """
    found = _tensors(run / REGRESSOR)
    neck = {k.removeprefix("neck."): v for k, v in found.items() if k.startswith("neck.")}
    if "laterals.0.0.weight" not in neck:
        raise UserError(
            f"'{run / REGRESSOR}' holds no neck.", "Give a run folder that `dreamteacher pretrain` made."
        )
    return neck


def has_head(run: Path) -> bool:
    """Whether a folder is that of a finished run of mode label or mixed."""
    return (run / HEAD).is_file()


def is_pooled(run: Path) -> bool:
    """Whether the label head of a run gives one label an image; only the file's metadata is read.

    Raises:
        UserError: the file cannot be read, or does not say its classes.
    """
    return _classes(run / HEAD)[1]


def load_distilled(run: Path) -> Distilled:
    """The distilled model of a finished run of mode label or mixed, on the CPU, in evaluation mode.

    Raises:
        UserError: when the run has no label head, or its files do not fit.
    """
    if not has_head(run):
        raise UserError(
            f"'{run}' has no {HEAD}: it is no finished run of `pretrain --distill label` or `mixed`.",
            "Give the --out folder of such a run.",
        )
    student = create_student(recorded_student(str(run)), init=str(run))
    neck, head = neck_weights(run), _tensors(run / HEAD)
    width = int(neck["laterals.0.0.weight"].shape[0])
    classes, pooled = _classes(run / HEAD)
    made = Neck(student.specs, width)
    model = Distilled(student, made, LabelHead(len(made.specs), width, len(classes), pooled=pooled), classes)
    checkpoint.load_exactly(model.neck, neck, run / REGRESSOR)
    checkpoint.load_exactly(model.head, head, run / HEAD)
    return model.eval()


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return tensor_file.read(path)
    except tensor_file.UNREADABLE as error:
        raise UserError(
            f"'{path}' cannot be read: {first_line(error)}.",
            "Give a finished run folder of `dreamteacher pretrain`.",
        ) from None


def _classes(path: Path) -> tuple[tuple[str, ...], bool]:
    """Names and whether they are of whole images, from the file's metadata."""
    try:
        facts = tensor_file.read_metadata(path)
        return tuple(str(name) for name in json.loads(facts["classes"])), facts.get("pooled") == "yes"
    except (KeyError, ValueError, TypeError, *tensor_file.UNREADABLE):
        raise UserError(f"'{path}' does not say its classes.", "Give a run of this version.") from None
