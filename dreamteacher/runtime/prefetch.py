"""Work that runs ahead of the step: batches made in a thread, pinned, and copied beside the device's own work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from dreamteacher.runtime.threads import helpers

T = TypeVar("T")
R = TypeVar("R")


class Sent(NamedTuple):
    """Tensors on their way to a device; `event` is recorded behind their copies (None: they are there)."""

    tensors: list[Tensor]
    event: torch.cuda.Event | None


class Copies:
    """Copies to a device that wait for nothing: from pinned memory, on a stream of their own.

    `send` may be called from another thread; `receive` belongs to the thread that uses the tensors, and makes its
    stream (not the host) wait for the copy. On a CPU both give back what they got.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, tensors: Sequence[Tensor]) -> Sent:
        if self.stream is None:
            return Sent([t.to(self.device) for t in tensors], None)
        with torch.cuda.stream(self.stream):
            # Pinned memory goes back to its pool only when the copy, an event behind it says, is done.
            there = [t.pin_memory().to(self.device, non_blocking=True) for t in tensors]
            return Sent(there, self.stream.record_event())

    def receive(self, sent: Sent) -> list[Tensor]:
        if sent.event is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(sent.event)
            for tensor in sent.tensors:  # or its memory could be given away while `now` still reads it
                tensor.record_stream(now)
        return sent.tensors


def prefetch(items: Iterator[T], work: Callable[[T], R], *, threaded: bool) -> Iterator[tuple[R, float]]:
    """`work` of every item, in order, and the seconds that were waited for it.

    Args:
        threaded: fetch and work on the next item in a thread while the last one is used; else only when asked.

    Raises:
        What `items` or `work` raises, when that item's turn comes.
    """

    def one() -> tuple[R] | None:
        for item in items:
            return (work(item),)
        return None

    with helpers(1) if threaded else contextlib.nullcontext() as pool:
        waiting = pool.submit(one) if pool else None
        while True:
            begin = perf_counter()
            done = waiting.result() if waiting else one()
            if done is None:
                return
            waiting = pool.submit(one) if pool else None
            yield done[0], perf_counter() - begin
            del done  # or its tensors would outlive their use
