"""Several processes as one: how they meet, agree, wait for the first one, and stop together.

They are started by torchrun (or anything else that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT).
"""

from __future__ import annotations

import atexit
import functools
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dreamteacher.runtime.distributed.device import pick_device
from dreamteacher.runtime.distributed.world import World, launched
from dreamteacher.runtime.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")
DOOR_S = 5.0  # for an answer of the first process


class LostError(UserError):
    """Another process has stopped, does not answer or cannot be reached. Told once, by whichever finds it first.

    Args:
        cause: what torch says of it, one line.
    """

    def __init__(self, cause: str) -> None:
        super().__init__(
            f"Another of the {launched().ranks} processes has stopped or cannot be reached: {cause}",
            "Its own message says more, where it had time for one; a kill leaves none (out of memory?).\n"
            "The same command goes on from the last checkpoint, with as many processes or others.",
        )


def timeout() -> timedelta:
    """How long a process waits for another one inside a step."""
    return timedelta(seconds=float(os.environ.get("DREAMTEACHER_TIMEOUT", "600")))


class _Met:
    """What this process has of the others: the key-value store of this start, and a group that waits patiently."""

    tried = False  # to reach them
    store: dist.Store | None = None
    patient: Any = None
    door: dist.Store | None = None


def _meet(world: World) -> dist.Store:
    """The key-value store that the processes of this start share, and no other start.

    That of torchrun's agents outlives a restart with all that was said before it, and how often an agent has restarted
    is its own count. So the first process opens a store of its own as well, at which no earlier one answers any more;
    its port and a name, told in the agents' store, are what this start goes by.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    _Met.tried = True
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    connect = functools.partial(dist.TCPStore, host, wait_for_workers=False)
    store = connect(port, is_master=world.first and not agents, timeout=timeout())
    if not agents:
        return store
    if world.first:
        _Met.door = connect(0, is_master=True)
        name = f"{_Met.door.port}/{uuid.uuid4().hex}"
        store.set("dreamteacher", name)
        return dist.PrefixStore(name, store)
    end = time.monotonic() + timeout().total_seconds()
    while True:
        name = store.get("dreamteacher").decode()
        door = int(name.partition("/")[0])
        try:
            socket.create_connection(
                (host, door), DOOR_S
            ).close()  # where it is shut, torch would say so at length
            connect(door, timeout=timedelta(seconds=DOOR_S))
            return dist.PrefixStore(name, store)
        except (OSError, RuntimeError) as error:
            if time.monotonic() > end:
                raise RuntimeError(f"the first one does not answer at {host}:{door}") from error
        time.sleep(0.1)


def join(device: str) -> World:
    """Meets the other processes, where there are any: gloo for the CPU, beside NCCL for GPUs. May be called again.

    Args:
        device: as in a config; each process has a GPU of its own.

    Raises:
        UserError: when the others cannot be found, or this process has no GPU of its own.
    """
    world = launched()
    if world.ranks == 1 or dist.is_initialized():
        return world
    gpu = device != "cpu" and torch.cuda.is_available()
    if gpu and device not in ("auto", "cuda"):
        raise UserError(
            f"--device {device} is one GPU, and there are {world.ranks} processes.",
            "Leave out --device: each process takes its own GPU.",
        )
    try:
        _Met.store = _meet(world)
        if gpu:
            torch.cuda.set_device(pick_device("cuda"))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo", store=dist.PrefixStore("group", _Met.store), rank=world.rank,
            world_size=world.ranks, timeout=timeout(),
        )  # fmt: skip
        _Met.patient = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{world.ranks} processes could not meet: {_cause(error)}",
            "Start them with torchrun, and check that its machines reach each other (--rdzv-endpoint).",
        ) from error
    atexit.register(_leave)
    return world


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def together(function: Callable[P, R]) -> Callable[P, R]:
    """For a function that all processes run at once: what torch raises when one of them is gone becomes a LostError."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or any(words in str(error) for words in _LOST)
            if launched().ranks > 1 and lost:
                raise LostError(_cause(error)) from error
            raise

    return run


_LOST = ("gloo", "NCCL", "Connection closed by peer", "Timed out waiting")


def _cause(error: Exception) -> str:
    """What torch says is wrong, in one line: NCCL's own words where it has some, else the first line."""
    text = str(error)
    said = " ".join(text.partition("Last error:")[2].split()) or text.strip().partition("\n")[0]
    return said if len(said) <= 200 else said[:197] + "..."


@functools.cache
def speaks() -> bool:
    """Whether this process tells of the error that ends them all: the first one to ask does.

    So it is the one that knows the cause: the others hear of it when it ends.
    """
    if _Met.store is None:  # before they meet all find the same error, but where they cannot reach each other
        return launched().first or _Met.tried
    try:
        return _Met.store.add("told", 1) == 1
    except RuntimeError:  # nobody keeps the store: rather twice than never
        return True


def broadcast(make: Callable[[], R]) -> R:
    """What `make` returns in the first process; the others wait for it, however long that takes."""
    world = launched()
    made = [make() if world.first else None]
    if world.ranks > 1:
        dist.broadcast_object_list(made, 0, group=_Met.patient)
    return made[0]  # type: ignore[return-value]


def all_gather_text(text: str) -> list[str]:
    """One text of each process, by rank; they wait for each other, however long that takes."""
    world = launched()
    found = [text] * world.ranks
    if world.ranks > 1:
        dist.all_gather_object(found, text, group=_Met.patient)
    return found


def agree(text: str, what: str) -> None:
    """All processes have come here with the same text.

    Raises:
        UserError: they have not.
    """
    texts = all_gather_text(text)
    different = [str(rank) for rank, other in enumerate(texts) if other != texts[0]]
    if different:
        raise UserError(
            f"Processes {', '.join(different)} of {len(texts)} have another {what} than process 0.",
            "Start all with the same command, on the same images and teacher.",
        )


def all_reduce_mean(x: Tensor) -> Tensor:
    """The mean of a tensor over the processes, in place; itself where there is one."""
    world = launched()
    if world.ranks > 1:
        dist.all_reduce(x)
        x /= world.ranks
    return x


def earliest(x: Tensor) -> Tensor:
    """The least of each element over the processes, in place; itself where there is one."""
    if launched().ranks > 1:
        dist.all_reduce(x, dist.ReduceOp.MIN)
    return x


def all_gather(rows: Tensor) -> Tensor:
    """The rows of all processes, as they lie in the whole batch."""
    world = launched()
    if world.ranks == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world.ranks)]
    dist.all_gather(parts, rows.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean over the processes of all gradients, in one exchange; for steps that DDP cannot follow."""
    world = launched()
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world.ranks == 1 or not gradients:
        return
    flat = all_reduce_mean(torch.cat([g.reshape(-1) for g in gradients]))
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view(gradient.shape))


class Told:
    """What any process says after a step, known to all of them after the same one.

    That is the number of a signal that it got, and whether it wants the state saved. What is said at one step is
    heard at the next, so nobody waits for it; one process alone hears itself at once.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._pending: tuple[dist.Work, Tensor] | None = None

    def __call__(self, number: int, save: bool = False) -> tuple[int, bool]:
        """Says `number` (0: no signal) and `save`; returns the largest that were said at the call before."""
        if self.world.ranks == 1:
            return number, save
        heard = self.close()
        said = torch.tensor([number, int(save)])
        work = dist.all_reduce(said, dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._pending = work, said
        return heard

    def close(self) -> tuple[int, bool]:
        """Hears what was said last."""
        if self._pending is None:
            return 0, False
        work, said = self._pending
        self._pending = None
        work.wait()
        number, save = said.tolist()
        return number, bool(save)
