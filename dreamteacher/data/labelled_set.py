"""Labelled images in memory: what the interpreter and the tasks with few labels learn from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """Images with labels, decoded in memory.

    Args:
        images: uint8 N x 3 x H x W.
        targets: int64 class ids, N x H x W (masks, perhaps with an id that is to be ignored) or N (one an image).
        classes: their names in id order.
        seeds: int64 N of samples whose maps the teacher draws again, as it cannot encode; else None.
        paths: of the images; () where they are not from files.
        unpaired: images that had no label and were left out.
    """

    images: Tensor
    targets: Tensor
    classes: tuple[str, ...]
    seeds: Tensor | None = None
    paths: tuple[Path, ...] = ()
    unpaired: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def pooled(self) -> bool:
        """One label an image."""
        return self.targets.ndim == 1

    def take(self, index: Tensor) -> LabelledSet:
        """Some of them (int64 K), in this order."""
        return replace(
            self,
            images=self.images[index],
            targets=self.targets[index],
            seeds=None if self.seeds is None else self.seeds[index],
            paths=tuple(self.paths[i] for i in index.tolist()) if self.paths else (),
        )
