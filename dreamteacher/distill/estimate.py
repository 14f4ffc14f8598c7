"""What a pretraining will take, measured on one small step: memory, time and disk (`--dry-run`)."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dreamteacher.losses import feature_loss
from dreamteacher.models.regressor import FeatureRegressor
from dreamteacher.models.student import Student
from dreamteacher.runtime.config import describe
from dreamteacher.runtime.distributed.device import autocast
from dreamteacher.runtime.settings import Precision
from dreamteacher.spec import FeatureSpec
from dreamteacher.teachers.base import Teacher


def millions(module: nn.Module) -> str:
    """The number of a module's parameters in words."""
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"


def disk_bytes(student: nn.Module, regressor: nn.Module, *, ema: bool, keep: int) -> int:
    """What a run writes: weights, two moments and an average per checkpoint (one more while it is being
    replaced), the exported weights, and the report."""
    floats = sum(p.numel() for m in (student, regressor) for p in m.parameters())
    return 4 * floats * ((4 if ema else 3) * (keep + 1) + 1) + 5_000_000


def dry_run(
    teacher: Teacher, student: Student, regressor: FeatureRegressor, *, size: tuple[int, int], batch: int,
    part: int, steps: int, disk: int, precision: Precision, stored: Sequence[FeatureSpec] = (),
) -> str:  # fmt: skip
    """The text of a dry run, from one real step on at most 8 random images; nothing is written.

    Memory is weights, gradients and two moments of what is trained, the teacher's weights, and what autograd
    keeps for the backward pass of `part` images, counted tensor by tensor. Levels that are `stored` are
    read, and the teacher does not run.
    """
    n = min(8, part)
    device = next(student.parameters()).device
    images = torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(2):  # the second one is warm, and counts
        kept: dict[int, int] = {}

        def count(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        begin = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            with autocast(device, precision):
                if stored:
                    targets = [torch.ones(s.shape(n, size), device=device) for s in stored]
                elif "encode" in teacher.modes:
                    targets = teacher.encode(images, generator=generator)
                else:
                    images, targets = teacher.sample(n, generator=generator)
                maps = regressor(student(images), [(m.shape[-2], m.shape[-1]) for m in targets])
            loss = feature_loss(maps, targets).total
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = (time.perf_counter() - begin) / n
    trained = [p for m in (student, regressor) for p in m.parameters()]
    weights = {p.untyped_storage().data_ptr() for p in trained}
    activations = sum(size for pointer, size in kept.items() if pointer not in weights) / n
    memory = sum(p.numel() for p in trained) * 16
    memory += 0 if stored else sum(p.numel() * p.element_size() for p in teacher.parameters())
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)
    return describe("dry run: nothing was written; one small step was measured", {
        "parameters": f"student {millions(student)}, regressor {millions(regressor)}, teacher {millions(teacher)}",
        "steps": steps, "images seen": steps * batch,
        "memory of a step": f"{(memory + activations * part) / 1e9:.2f} GB ({activations / 1e6:.1f} MB an image)",
        "process now": f"{now / 1e9:.2f} GB",
        "time": f"about {seconds * steps * batch / 3600:.2f} h at {1 / seconds:.0f} images/s",
        "disk": f"{disk / 1e6:.0f} MB",
    })  # fmt: skip
