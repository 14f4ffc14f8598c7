"""Data in two parts: what is learned from, and what nothing but the score sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

from torch import Tensor

from dreamteacher.data.draws import halves


class Countable(Protocol):
    """A set of images of which some can be taken."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def take(self, index: Tensor) -> Self:
        """Some of them (int64 K), in this order."""
        ...


T = TypeVar("T")
S = TypeVar("S", bound=Countable)


@dataclass(frozen=True, kw_only=True)
class Split(Generic[T]):
    """Two parts that share their classes.

    Args:
        pool: to train on, or where the training images are drawn from.
        test: seen by nothing but the final score.
    """

    pool: T
    test: T


def halved(everything: S, seed: int = 0) -> Split[S]:
    """One half to draw training images from and one to test on (the larger, of an odd number)."""
    pool, test = (everything.take(index) for index in halves(len(everything), seed))
    return Split(pool=pool, test=test)
