"""Several processes as one: how they meet, agree, wait for the first one, and stop together.

They are started by torchrun (or anything else that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT).
Beside torch's process group there is its key-value store: what is said there arrives however long it takes.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dreamteacher.distributed import Share, launched
from dreamteacher.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")
POLL_S = 0.05  # between two looks at what another process may have said


class LostError(UserError):
    """Another process has stopped or does not answer. Told once, by whichever finds it first."""

    def __init__(self) -> None:
        super().__init__(
            f"Another of the {launched().ranks} processes has stopped (or did not answer for {timeout().total_seconds():g} s): "
            "this one stops too.",
            "Its own message says why, where it had time for one; a kill leaves none (out of memory?).\n"
            "The same command goes on from the last checkpoint, with as many processes or others.",
        )


def timeout() -> timedelta:
    """How long a process waits for another one inside a step."""
    return timedelta(seconds=float(os.environ.get("DREAMTEACHER_TIMEOUT", "600")))


@functools.cache
def _store() -> dist.Store:
    """The key-value store that all processes of this start share."""
    share = launched()
    ours = share.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), share.ranks, ours,
        timeout=timeout(), wait_for_workers=False,
    )  # fmt: skip
    return dist.PrefixStore(f"dreamteacher/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def join(device: str) -> Share:
    """Meets the other processes, where there are any: gloo for the CPU, beside NCCL for GPUs. May be called again.

    Args:
        device: as in a config; each process has a GPU of its own.

    Raises:
        UserError: when the others cannot be found.
    """
    share = launched()
    if share.ranks == 1 or dist.is_initialized():
        return share
    gpu = device != "cpu" and torch.cuda.is_available()
    if gpu and device not in ("auto", "cuda"):
        raise UserError(
            f"--device {device} is one GPU, and there are {share.ranks} processes.",
            "Leave out --device: each process takes its own GPU.",
        )
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo", store=dist.PrefixStore("group", _store()), rank=share.rank,
            world_size=share.ranks, timeout=timeout(),
        )  # fmt: skip
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{share.ranks} processes could not meet: {str(error).splitlines()[0][:100]}.",
            "Start them with torchrun, and check that its machines reach each other (--rdzv-endpoint).",
        ) from error
    atexit.register(_leave)
    return share


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def together(function: Callable[P, R]) -> Callable[P, R]:
    """For a function that all processes run at once: what torch raises when one of them is gone becomes a LostError."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if launched().ranks == 1:
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            with contextlib.suppress(KeyError, RuntimeError):
                _store().set("over", "")  # whoever waits for this process reads it
            if not isinstance(error, RuntimeError) or not (
                isinstance(error, dist.DistError) or any(w in str(error) for w in _LOST)
            ):
                raise
            raise LostError from error

    return run


_LOST = ("gloo", "NCCL", "Connection closed by peer", "Timed out waiting")


def speaks() -> bool:
    """Whether this process tells of the error that ends them all: the first one to ask does."""
    share = launched()
    if share.ranks == 1:
        return True
    if not dist.is_initialized() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return share.first  # there is no store yet
    try:
        return _store().add("told", 1) == 1
    except (KeyError, RuntimeError):  # nobody keeps the store any more: rather twice than never
        return True


def from_first(make: Callable[[], str]) -> str:
    """What `make` returns in the first process; the others wait for it, however long that takes.

    Raises:
        LostError: in the others, when the first one has stopped.
    """
    if launched().ranks == 1:
        return make()
    name = _numbered("first")
    if launched().first:
        text = make()
        _store().set(name, text)
        return text
    return _read(name)


def gathered(text: str) -> list[str]:
    """One text of each process, by rank."""
    share = launched()
    if share.ranks == 1:
        return [text]
    name = _numbered("each")
    _store().set(f"{name}/{share.rank}", text)
    return [_read(f"{name}/{rank}") for rank in range(share.ranks)]


_count = {"first": 0, "each": 0}


def _numbered(kind: str) -> str:
    """A new name at every call, the same in all processes."""
    _count[kind] += 1
    return f"{kind}/{_count[kind]}"


def _read(name: str) -> str:
    while not _store().check([name]):
        if _store().check(["over"]):
            raise LostError
        time.sleep(POLL_S)
    return _store().get(name).decode()


def agree(text: str, what: str) -> None:
    """All processes have come here with the same text.

    Raises:
        UserError: they have not.
    """
    share = launched()
    if share.ranks == 1:
        return
    mine = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
    all_ = [torch.empty_like(mine) for _ in range(share.ranks)]
    dist.all_gather(all_, mine)
    different = [str(rank) for rank, other in enumerate(all_) if not torch.equal(other, all_[0])]
    if different:
        raise UserError(
            f"Processes {', '.join(different)} of {share.ranks} have another {what} than process 0.",
            "Start all with the same command, on the same images and teacher.",
        )


def averaged(x: Tensor) -> Tensor:
    """The mean of a tensor over the processes, in place; itself where there is one."""
    share = launched()
    if share.ranks > 1:
        dist.all_reduce(x)
        x /= share.ranks
    return x


def earliest(x: Tensor) -> Tensor:
    """The least of each element over the processes, in place; itself where there is one."""
    if launched().ranks > 1:
        dist.all_reduce(x, dist.ReduceOp.MIN)
    return x


def collected(rows: Tensor) -> Tensor:
    """The rows of all processes, as they lie in the whole batch."""
    share = launched()
    if share.ranks == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(share.ranks)]
    dist.all_gather(parts, rows.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean over the processes of all gradients, in one exchange; for steps that DDP cannot follow."""
    share = launched()
    gradients = [p.grad for p in parameters if p.grad is not None]
    if share.ranks == 1 or not gradients:
        return
    flat = averaged(torch.cat([g.reshape(-1) for g in gradients]))
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view(gradient.shape))


class Told:
    """The number of a signal that any process got, known to all of them after the same step.

    What is said at one step is heard at the next: so nobody waits for it.
    """

    def __init__(self) -> None:
        self._pending: tuple[dist.Work, Tensor] | None = None

    def __call__(self, number: int) -> int:
        """Says `number` (0: no signal) and returns the largest that was said at the call before."""
        if launched().ranks == 1:
            return number
        heard = self.close()
        said = torch.tensor([number])
        work = dist.all_reduce(said, dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._pending = work, said
        return heard

    def close(self) -> int:
        """Hears what was said last."""
        if self._pending is None:
            return 0
        work, said = self._pending
        self._pending = None
        work.wait()
        return int(said)
