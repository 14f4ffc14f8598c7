"""The one way to make items ahead of the training, in processes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")


def load_ahead(data: Dataset[T], items: Iterable[Any], workers: int) -> DataLoader[T]:
    """data[item] for each of `items`, in order and as it is.

    Args:
        data: an item may not depend on those before it.
        items: what is asked for.
        workers: processes that make them, at most one per core; 0: this one. They change no number.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return DataLoader(
        data,
        batch_size=None,
        sampler=items,
        num_workers=min(workers, cores),
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else each loader would take a number from torch's own
    )


def _as_it_is(item: T) -> T:
    return item
