"""When a device's memory runs out: how torch says it, and what a step has to put back when it is not finished."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from dreamteacher.runtime.errors import UserError, first_line

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
