"""Threads beside the one that computes: one thread each for torch, and nothing changed for others."""

from __future__ import annotations

import threading

import torch

from dreamteacher.prefetch import ahead
from dreamteacher.threads import helpers, in_threads


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
        work = ahead(iter(range(2)), lambda _: torch.get_num_threads(), threaded=True)
        assert [count for count, _ in work] == [1, 1]
        assert threads_of_a_new_thread() == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(usual)


def test_results_keep_their_order():
    assert in_threads(lambda x: x * x, range(600), 4) == [x * x for x in range(600)]
    assert in_threads(str, [], 4) == []
