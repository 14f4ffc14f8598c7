"""Which of the labelled images are learned from, and which are set aside: by a seed, the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dreamteacher.data.seeds import step_generator
from dreamteacher.runtime.errors import UserError


def draw_labels(labels: Tensor, per_class: int, *, classes: int | Sequence[str], seed: int) -> Tensor:
    """Sorted indices of a class-balanced draw: `per_class` members of each class, without replacement.

    Args:
        labels: N class ids (int64).
        per_class: members of each class, at least 1.
        classes: their number, or their names.
        seed: same seed, same draw; a larger draw of one seed contains the smaller one.

    Raises:
        UserError: a class has fewer members.

    Example:
        >>> draw_labels(torch.tensor([0, 1, 1, 0]), 2, classes=2, seed=0).tolist()
        [0, 1, 2, 3]
    """
    names = (
        [str(c) for c in range(classes)] if isinstance(classes, int) else [f"'{name}'" for name in classes]
    )
    generator = step_generator(seed, 0, "labels")
    drawn = []
    for c, name in enumerate(names):
        members = (labels == c).nonzero().flatten()
        if not 1 <= per_class <= len(members):
            raise UserError(
                f"{per_class} labels per class asked for; class {name} has {len(members)} images.",
                "Ask for fewer labels, or add images to that class.",
            )
        drawn.append(members[torch.randperm(len(members), generator=generator)[:per_class]])
    return torch.cat(drawn).sort().values


def draw_images(pool: int, count: int, seed: int, *, least: int = 2) -> Tensor:
    """Sorted indices of `count` of `pool` labelled images; same seed, same draw, larger ones contain smaller.

    Args:
        pool: how many there are.
        count: how many are drawn.
        seed: of the draw.
        least: fewer are refused: BatchNorm cannot train on one image.

    Raises:
        UserError: the pool is smaller, or fewer than `least` are asked for.
    """
    if not least <= count <= pool:
        raise UserError(
            f"{count} labelled images asked for; {least} to {pool} can be drawn.",
            "Ask for another number, or add labelled images.",
        )
    order = torch.randperm(pool, generator=step_generator(seed, 0, "masks"))
    return order[:count].sort().values


def check_draw(pool: int, counts: Sequence[int | None]) -> None:
    """Raises UserError where a pool is too small for the largest of these draws; None: all of it."""
    if counts:
        draw_images(pool, max(pool if count is None else count for count in counts), 0)


def halves(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sorted indices of two halves: one to train on and one to test on (the larger, of an odd number)."""
    order = torch.randperm(count, generator=step_generator(seed, 0, "split"))
    return order[: count // 2].sort().values, order[count // 2 :].sort().values
