"""Threads beside the one that computes: they must not slow it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from tqdm import tqdm

T = TypeVar("T")
R = TypeVar("R")
_starting = threading.Lock()
if hasattr(
    os, "register_at_fork"
):  # a child of a fork has its state and not the thread that would release it
    os.register_at_fork(
        before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_starting.release
    )


def helpers(count: int) -> ThreadPoolExecutor:
    """A pool of threads in each of which torch's operations run on that thread alone.

    By default each thread that computes gets a team of OpenMP threads of its own. Once there are more of them than
    cores, even idle ones, libgomp lets none wait awake, and has to wake the caller's team for each operation: a student's
    steps took 1.2 times as long on 2 cores (dev/LOG.md).

    Example:
        >>> with helpers(2) as pool:
        ...     pool.submit(torch.get_num_threads).result()
        1
    """
    return ThreadPoolExecutor(max(1, count), initializer=_alone)


def _alone() -> None:
    """One thread for torch's operations in this thread; in others, and in those to come, as many as before."""
    with _starting:
        usual = torch.get_num_threads()
        torch.set_num_threads(1)  # which later threads would begin with, too
        other = threading.Thread(target=torch.set_num_threads, args=(usual,))
        other.start()
        other.join()


def in_threads(function: Callable[[T], R], items: Sequence[T], workers: int, what: str = "") -> list[R]:
    """[function(x) for x in items] in `helpers`; a long list with a name (`what`) shows a bar on a terminal."""
    quiet = not what or len(items) <= 2000 or not sys.stderr.isatty()
    results: list[R] = []
    with helpers(workers) as pool, tqdm(total=len(items), desc=what, disable=quiet) as bar:
        for start in range(0, len(items), 256):  # in parts: a million futures would take a gigabyte
            results += pool.map(function, items[start : start + 256])
            bar.update(len(results) - bar.n)
    return results
