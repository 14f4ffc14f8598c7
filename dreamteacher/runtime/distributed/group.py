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
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dreamteacher.runtime.distributed.device import pick_device
from dreamteacher.runtime.distributed.world import World, launched
from dreamteacher.runtime.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")
POLL_S = 0.05  # between two looks at what another process may have said
DOOR_S = 5.0  # for an answer at the first process's own port


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


def _agents_serve() -> bool:
    """Whether torchrun's agents keep the store, and not the first process."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


@functools.cache
def _server() -> dist.Store:
    """The key-value store at MASTER_ADDR and MASTER_PORT. That of torchrun's agents survives a restart."""
    world = launched()
    return dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world.ranks,
        world.first and not _agents_serve(), timeout=timeout(), wait_for_workers=False,
    )  # fmt: skip


def _name_of_start() -> str:
    """A name that the processes of this start share, and none of an earlier one knows.

    Each agent counts restarts by itself, and not those for which another one is the cause: so the first process makes
    a name, and says it to all who come to a port of its own. There an earlier one does not answer any more.
    """
    where = "dreamteacher/door"
    if launched().first:
        name = uuid.uuid4().hex
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        door = socket.create_server(("", 0), family=family, dualstack_ipv6=dual)
        threading.Thread(target=_answer, args=(door, name.encode()), daemon=True).start()
        _server().set(f"dreamteacher/{name}", "")
        _server().set(where, str(door.getsockname()[1]))
        return name
    end = time.monotonic() + timeout().total_seconds()
    while time.monotonic() < end:
        address = os.environ["MASTER_ADDR"], int(_server().get(where))
        with contextlib.suppress(OSError), socket.create_connection(address, DOOR_S) as caller:
            name = caller.recv(32, socket.MSG_WAITALL).decode("ascii", "replace")
            if len(name) == 32 and _server().check([f"dreamteacher/{name}"]):  # and no stranger's greeting
                return name
        time.sleep(POLL_S)
    raise RuntimeError(f"the first one does not answer at {address[0]}:{address[1]}")


def _answer(door: socket.socket, name: bytes) -> None:
    while True:
        caller, _ = door.accept()
        with contextlib.suppress(OSError), caller:
            caller.sendall(name)


_met: dist.Store | Exception | None = None


def _store() -> dist.Store:
    """The part of the store that all processes of this start share, and no other start.

    Raises:
        KeyError, ValueError: the environment does not say where it is.
        RuntimeError: nobody answers there; at once, when that was found before.
    """
    global _met
    if _met is None:
        try:
            name = _name_of_start() if _agents_serve() else "start"
            _met = dist.PrefixStore(f"dreamteacher/{name}", _server())
        except (KeyError, ValueError, RuntimeError) as error:
            _met = error
    if isinstance(_met, Exception):
        raise _met
    return _met


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
    if gpu:
        torch.cuda.set_device(pick_device("cuda"))
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo", store=dist.PrefixStore("group", _store()), rank=world.rank,
            world_size=world.ranks, timeout=timeout(),
        )  # fmt: skip
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
        if launched().ranks == 1:
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            if _met is not None:
                speaks()  # claimed before the others hear of it, for this process knows the cause
                with contextlib.suppress(KeyError, ValueError, RuntimeError):
                    _store().set("over", "")  # whoever waits for this process reads it
            if not isinstance(error, RuntimeError) or not (
                isinstance(error, dist.DistError) or any(w in str(error) for w in _LOST)
            ):
                raise
            raise LostError(_cause(error)) from error

    return run


_LOST = ("gloo", "NCCL", "Connection closed by peer", "Timed out waiting")


def _cause(error: Exception) -> str:
    """What torch says is wrong, in one line: NCCL's own words where it has some, else the first line."""
    text = str(error)
    said = " ".join(text.partition("Last error:")[2].split()) or text.strip().partition("\n")[0]
    return said if len(said) <= 200 else said[:197] + "..."


@functools.cache
def speaks() -> bool:
    """Whether this process tells of the error that ends them all: the first one to ask does."""
    world = launched()
    if world.ranks == 1:
        return True
    if _met is None and not _agents_serve():
        return world.first  # they have not met: an error that all of them find
    try:
        early = f"dreamteacher/early/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        store = dist.PrefixStore(early, _server()) if _met is None else _store()
        return store.add("told", 1) == 1
    except (KeyError, ValueError):  # what is missing here is missing in all of them
        return world.first
    except RuntimeError:  # nobody keeps the store: rather twice than never
        return True


def broadcast(make: Callable[[], str]) -> str:
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


def all_gather_text(text: str) -> list[str]:
    """One text of each process, by rank."""
    world = launched()
    if world.ranks == 1:
        return [text]
    name = _numbered("each")
    _store().set(f"{name}/{world.rank}", text)
    return [_read(f"{name}/{rank}") for rank in range(world.ranks)]


_count = {"first": 0, "each": 0}


def _numbered(kind: str) -> str:
    """A new name at every call, the same in all processes."""
    _count[kind] += 1
    return f"{kind}/{_count[kind]}"


def _read(name: str) -> str:
    while not _store().check([name]):
        if _store().check(["over"]):
            raise LostError("it says that it ends.")
        time.sleep(POLL_S)
    return _store().get(name).decode()


def agree(text: str, what: str) -> None:
    """All processes have come here with the same text.

    Raises:
        UserError: they have not.
    """
    world = launched()
    if world.ranks == 1:
        return
    mine = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
    all_ = [torch.empty_like(mine) for _ in range(world.ranks)]
    dist.all_gather(all_, mine)
    different = [str(rank) for rank, other in enumerate(all_) if not torch.equal(other, all_[0])]
    if different:
        raise UserError(
            f"Processes {', '.join(different)} of {world.ranks} have another {what} than process 0.",
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
    heard at the next: so nobody waits for it.

    Args:
        world: the processes that listen; one alone hears itself at once.
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
