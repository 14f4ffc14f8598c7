"""How processes meet, who tells what ends them, and what waits for whom: in one process that takes itself for one of two."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dreamteacher.cli import main as cli
from dreamteacher.distill import plan as distill_plan
from dreamteacher.distill.config import PretrainConfig
from dreamteacher.runtime.distributed import group
from dreamteacher.runtime.distributed.world import World
from dreamteacher.runtime.errors import UserError


@pytest.fixture(autouse=True)
def _second_of_two(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rank 1 of 2, in a start of its own; nobody listens where the first one should be."""
    environment = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": "1", "DREAMTEACHER_TIMEOUT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(group, "_Met", type("_Met", (), dict(vars(group._Met))))
    group.speaks.cache_clear()
    yield
    group.speaks.cache_clear()


def meet(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    store = dist.HashStore()
    monkeypatch.setattr(group._Met, "store", store)
    return store


# --- who tells ---------------------------------------------------------------------------------------------


def fail(error: BaseException) -> None:
    @group.together
    def run() -> None:
        raise error

    run()


NCCL = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, invalid usage, NCCL version 2.27
ncclInvalidUsage: This usually reflects invalid usage of NCCL library.
Last error:
Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 35000
"""


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (NCCL, "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 35000"),
        ("NCCL error in: a.cpp:1, unhandled system error\nncclSystemError: ...", "NCCL error in: a.cpp:1, unhandled"),
        ("[gloo/pair.cc:561] Connection closed by peer [127.0.0.1]:30902", "Connection closed by peer [127.0.0.1]"),
        ("gloo " + "x" * 500, "gloo xxx"),
    ],
)  # fmt: skip
def test_a_loss_says_what_torch_says(said: str, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = meet(monkeypatch)
    with pytest.raises(group.LostError) as found:
        fail(RuntimeError(said))
    lines = str(found.value).splitlines()
    assert len(lines) == 3
    assert cause in lines[0]
    assert len(lines[0]) < 280
    assert group.speaks()
    assert group.speaks()  # it is asked once
    assert store.add("told", 0) == 1


def test_who_comes_second_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    meet(monkeypatch).add("told", 1)
    with pytest.raises(group.LostError):
        fail(RuntimeError("Connection closed by peer"))
    assert not group.speaks()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_before_they_meet_the_first_tells_and_nobody_connects(
    rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("it connects")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(dist, "TCPStore", never)
    with pytest.raises(UserError, match="typo"):
        fail(UserError("typo", "mend it"))
    assert group.speaks() is (rank == "0")


# --- how they meet -----------------------------------------------------------------------------------------


def test_who_cannot_meet_tries_once_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, connect = [], dist.TCPStore
    monkeypatch.setattr(dist, "TCPStore", lambda *a, **k: tried.append(a) or connect(*a, **k))
    with pytest.raises(UserError, match=r"2 processes could not meet: .*127\.0\.0\.1"):
        group.together(group.join)("cpu")
    assert group.speaks()  # of two this one alone may know
    assert len(tried) == 1


def test_without_an_address_the_first_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(UserError, match="2 processes could not meet: 'MASTER_ADDR'"):
        group.together(group.join)("cpu")
    assert not group.speaks()


def test_writers_of_features_meet(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 processes could not meet"):
        cli.run("make-features", ["--images", str(image_folder), "--out", str(tmp_path / "out")])


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there is a second GPU")
def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(group, "_meet", lambda world: dist.HashStore())
    with pytest.raises(UserError, match="Device 'cuda:1' cannot be used"):
        group.join("auto")


def test_a_restart_meets_whom_the_agents_store_has_forgotten_to_forget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The agents' store still names the port of the last start, where nobody answers by now."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("DREAMTEACHER_TIMEOUT", "30")
    agents = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_PORT", str(agents.port))
    stores: list[dist.Store] = []
    second = threading.Thread(target=lambda: stores.append(group._meet(World(1, 2))), daemon=True)
    with socket.create_server(("127.0.0.1", 0)) as shut:
        agents.set("dreamteacher", f"{shut.getsockname()[1]}/old")
    second.start()
    second.join(0.5)
    assert second.is_alive()
    first = group._meet(World(0, 2))
    second.join(20)
    first.set("said", "yes")
    assert stores[0].get("said") == b"yes"
    again = group._meet(World(0, 2))
    assert not again.check(["said"])


# --- what all of them do -----------------------------------------------------------------------------------


def test_all_wait_for_the_interpreter_that_one_of_them_already_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a shared disk a file that the first one has just written may show earlier in one process than in another."""
    asked: list[Any] = []
    monkeypatch.setattr(distill_plan, "broadcast", asked.append)
    monkeypatch.setattr(distill_plan, "load_interpreter", lambda folder: [torch.nn.Identity()])
    monkeypatch.setenv("WORLD_SIZE", "1")
    (tmp_path / "interpreter").mkdir()
    runs: list[str] = []
    job: Any = SimpleNamespace(run=lambda: runs.append("run"))
    config = PretrainConfig(out=tmp_path, device="cpu")
    plan: Any = SimpleNamespace(job=job, config=config, device=torch.device("cpu"))
    for there in (False, True):
        if there:
            (tmp_path / "interpreter" / "interpreter.json").write_text(json.dumps({}))
        distill_plan.PretrainPlan.interpreter(plan, tmp_path)
        assert asked.pop()() == ""
        assert runs == ["run"]
