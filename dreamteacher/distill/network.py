"""The networks of a pretraining as one, and what a failed step has to put back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dreamteacher.data.seeds import step_generator
from dreamteacher.models.interpreter import Interpreter
from dreamteacher.models.regressor import FeatureRegressor, LabelHead
from dreamteacher.models.student import Student


def label_head(seed: int, width: int, regressor: FeatureRegressor, interpreter: Interpreter) -> LabelHead:
    """The student's head for the interpreter's classes, on the regressor's fused maps."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(step_generator(seed, 0, "head").initial_seed())
        return LabelHead(len(regressor.neck.specs), width, interpreter.classes, pooled=interpreter.pooled)


class Trained(nn.Module):
    """Student, regressor and label head as one network, so that it can be spread over processes."""

    def __init__(
        self, student: Student, regressor: FeatureRegressor, head: LabelHead | None, *, project: bool
    ) -> None:
        super().__init__()
        self.student, self.regressor, self.project = student, regressor, project
        self.head = head

    def forward(
        self, images: Tensor, sizes: Sequence[tuple[int, int]] | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Images -> the regressor's maps (of these sizes; none without `project`) and the head's logits."""
        fused = self.regressor.fused(self.student(images))
        maps = self.regressor.project(fused, sizes) if self.project else []
        return maps, None if self.head is None else self.head(fused).float()

    def pooled(self, images: Tensor) -> Tensor:
        """The student's features of whole images, N x C."""
        return self.student.pooled(images)


def look(network: nn.Module) -> Tensor:
    """A scalar that depends on all that is trained, from one small image."""
    maps, logits = network(torch.zeros(1, 3, 64, 128, device=next(network.parameters()).device))
    return sum((m.sum() for m in maps), torch.zeros(())) + (0 if logits is None else logits.sum())


class Undo:
    """What a forward pass changes in place, noted before a step and put back when the step fails."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.pairs = [
            (kept, [torch.empty_like(t) for t in kept])
            for dtype in sorted({t.dtype for t in tensors}, key=str)
            if (kept := [t for t in tensors if t.dtype == dtype])
        ]

    @torch.no_grad()
    def note(self) -> None:
        for tensors, kept in self.pairs:
            torch._foreach_copy_(kept, tensors)

    @torch.no_grad()
    def undo(self) -> None:
        for tensors, kept in self.pairs:
            torch._foreach_copy_(tensors, kept)
