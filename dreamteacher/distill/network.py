"""The networks of a pretraining as one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from dreamteacher.data.seeds import step_generator
from dreamteacher.distill.config import PretrainConfig
from dreamteacher.models.interpreter import Interpreter
from dreamteacher.models.regressor import FeatureRegressor, LabelHead
from dreamteacher.models.student import Student
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.distributed.ddp import replicate
from dreamteacher.runtime.distributed.world import World
from dreamteacher.runtime.optim import Ema


def label_head(seed: int, width: int, regressor: FeatureRegressor, interpreter: Interpreter) -> LabelHead:
    """The student's head for the interpreter's classes, on the regressor's fused maps."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(step_generator(seed, 0, "head").initial_seed())
        return LabelHead(len(regressor.neck.specs), width, interpreter.classes, pooled=interpreter.pooled)


class DistillationNetwork(nn.Module):
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


def build_network(
    config: PretrainConfig, student: Student, regressor: FeatureRegressor, interpreter: Interpreter | None,
    world: World,
) -> DistillationNetwork:  # fmt: skip
    """The network, ready for its optimizer: in its memory layout, its BatchNorm over all processes where that is asked for."""
    head = None
    if interpreter is not None:
        head = label_head(config.seed, config.width, regressor, interpreter)
        head.to(next(student.parameters()).device)
    if config.distill == "label":
        regressor.projections.requires_grad_(False)  # nothing is asked of them
    network = DistillationNetwork(student, regressor, head, project=config.distill != "label")
    if world.ranks > 1 and config.batch_norm == "global":
        convert_sync_batchnorm(network)  # in place, as the network itself is no norm
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def spread(network: DistillationNetwork, device: torch.device, world: World) -> nn.Module:
    """The network as it is called: replicated over the processes, or itself. After its optimizer is made."""
    return network if world.ranks == 1 else replicate(network, device, look)


def write_weights(
    folder: Path, network: DistillationNetwork, average: Ema | None, teacher: str, classes: Sequence[str], world: World
) -> None:  # fmt: skip
    """backbone.safetensors (native timm names), regressor.safetensors (its neck), and head.safetensors.

    Args:
        average: of the network, whose weights are then written.
        teacher, classes: for the files' metadata: its name, and what the head tells apart.
    """
    if not world.first:
        return
    state = average.tensors if average else network.state_dict()
    about = {"format": "dreamteacher-backbone", "student": network.student.name, "teacher": teacher}
    files = {"backbone": "student.model.", "regressor": "regressor."}
    if network.head is not None:
        files["head"] = "head."
        about |= {"classes": json.dumps(list(classes)), "pooled": "yes" if network.head.pooled else "no"}
    for name, prefix in files.items():
        tensors = {k: v.contiguous() for k, v in checkpoint.under(prefix, state).items()}
        checkpoint.atomic_write(
            folder / f"{name}.safetensors", lambda path, tensors=tensors: save_file(tensors, path, about)
        )
