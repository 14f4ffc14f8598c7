"""Threads beside the one that computes: one thread each for torch, and nothing changed for others."""

from __future__ import annotations

import os
import signal
import threading
import time

import torch

from dreamteacher.runtime import threads
from dreamteacher.runtime.prefetch import prefetch
from dreamteacher.runtime.threads import helpers, in_threads


def threads_of_a_new_thread() -> int:
    found: list[int] = []
    new = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    new.start()
    new.join()
    return found[0]


def test_helpers_compute_alone_and_change_nothing_for_others():
    """So that no OpenMP team stands beside the caller's: also of many helpers that start at once."""
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with helpers(8) as pool:
            meeting = threading.Barrier(8)

            def look(_: int) -> int:
                meeting.wait(30)
                return torch.get_num_threads()

            assert list(pool.map(look, range(8))) == [1] * 8
            assert threads_of_a_new_thread() == torch.get_num_threads() == 3
        nested = in_threads(lambda _: in_threads(lambda _: torch.get_num_threads(), range(2), 2), range(2), 2)
        assert nested == [[1, 1], [1, 1]]
        work = prefetch(iter(range(2)), lambda _: torch.get_num_threads(), threaded=True)
        assert [count for count, _ in work] == [1, 1]
        assert threads_of_a_new_thread() == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(usual)


def test_results_keep_their_order():
    assert in_threads(lambda x: x * x, range(600), 4) == [x * x for x in range(600)]
    assert in_threads(str, [], 4) == []


def test_a_fork_while_a_helper_starts_has_helpers_of_its_own(monkeypatch):
    """As the workers of a DataLoader are made."""
    begun, original = threading.Event(), torch.set_num_threads

    def slow(count: int) -> None:
        begun.set()
        time.sleep(0.2)
        original(count)

    monkeypatch.setattr(threads.torch, "set_num_threads", slow)
    with helpers(1) as pool:
        pool.submit(int)
        assert begun.wait(30)
        child = os.fork()
        if not child:
            signal.alarm(20)
            os._exit(int(in_threads(abs, [-3], 1) != [3]))
        assert os.waitpid(child, 0)[1] == 0
