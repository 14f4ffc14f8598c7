"""When a device's memory runs out: how torch says it, and what the next start of a run is told."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch

from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.config import parse_json
from dreamteacher.runtime.distributed.world import World
from dreamteacher.runtime.errors import UserError, first_line

PARTS = "parts.json"  # in a run folder
# cuBLAS, cuDNN and Triton say it in errors that are no torch.OutOfMemoryError.
_SAID = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def ran_out(error: RuntimeError) -> bool:
    """Whether an error says that memory has run out: torch's own kind, or what a library under it raises.

    Example:
        >>> ran_out(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
        True
        >>> ran_out(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"))
        False
    """
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _SAID)


def reason(error: RuntimeError) -> str:
    """What such an error says, in a few words."""
    return first_line(error, 80)


@contextlib.contextmanager
def needed(problem: str, way_out: str) -> Iterator[None]:
    """Within: memory that runs out is a UserError of these words."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        raise UserError(f"{problem}: {reason(error)}.", way_out) from None


class Undo:
    """What a step changes in place before its update, noted before it and put back when it fails.

    Args:
        tensors: buffers, as the running moments of BatchNorm.
        random: a device whose global random numbers layers draw from, beside the CPU's; None: they draw from none.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], random: torch.device | None = None) -> None:
        self.pairs = [
            (kept, [torch.empty_like(t) for t in kept])
            for dtype in sorted({t.dtype for t in tensors}, key=str)
            if (kept := [t for t in tensors if t.dtype == dtype])
        ]
        self.random = random
        self.states: tuple[torch.Tensor, torch.Tensor | None] | None = None

    @torch.no_grad()
    def note(self) -> None:
        """Remembers them."""
        for tensors, kept in self.pairs:
            torch._foreach_copy_(kept, tensors)
        if self.random is not None:
            gpu = torch.cuda.get_rng_state(self.random) if self.random.type == "cuda" else None
            self.states = torch.get_rng_state(), gpu

    @torch.no_grad()
    def undo(self) -> None:
        """Puts them back."""
        for tensors, kept in self.pairs:
            torch._foreach_copy_(tensors, kept)
        if self.states is not None:
            torch.set_rng_state(self.states[0])
            if self.states[1] is not None:
                torch.cuda.set_rng_state(self.states[1], self.random or "cuda")


class Parts:
    """Into how many parts (`count`) a process splits its images of a batch: more once memory has run out.

    Args:
        images: of one process, in one of the `accumulate` parts of a batch.
        folder: of the run.
    """

    def __init__(
        self, images: int, accumulate: int, world: World, batch_norm: Literal["global", "local"], folder: Path
    ) -> None:
        self.images, self.accumulate, self.world, self.folder = images, accumulate, world, folder
        self.count = 1
        alone = world.ranks == 1 or batch_norm == "local"
        self.most = max(1, images // 2 if alone else images)  # BatchNorm needs two images in each

    def add(self, step: int, why: str) -> None:
        """Doubles their number, after memory ran out at a step (from 1).

        Raises:
            UserError: when they cannot be smaller; of several processes always, once the next start is told, as the
                others are in the middle of the step.
        """
        problem = f"Step {step} runs out of memory in parts of {self.images // self.count} images: {why}."
        if self.count >= self.most:
            raise UserError(problem, "Use --precision bfloat16, or a smaller --size, --student or --width.")
        self.count = min(2 * self.count, self.most)
        if self.world.ranks > 1:
            text = json.dumps({"images": self.images // self.count})
            checkpoint.write_text(self.folder / PARTS, text + "\n")
            way = "The same command goes on from the last checkpoint, in smaller parts"
            raise UserError(problem, f"{way} (torchrun --max-restarts 3 does it by itself).")
        print(
            f"Out of memory at step {step}: repeated, and from now on, as --accumulate {self.accumulate * self.count}. "
            f"BatchNorm sees parts of {self.images // self.count} images; nothing else changes.",
            flush=True,
        )

    def follow(self, images: int) -> None:
        """Makes them no larger than `told_parts` says."""
        if images:
            self.at_least(math.ceil(self.images / images))

    def at_least(self, count: int) -> None:
        """Makes them as many as a run had before it stopped, where there are as many images now."""
        self.count = max(self.count, min(count, self.most))


def told_parts(folder: Path) -> int:
    """The images of a part for which a process of this run, stopped since, had memory; 0: none ran out."""
    try:
        images = parse_json((folder / PARTS).read_text("utf-8"))["images"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return images if isinstance(images, int) and images > 0 else 0
