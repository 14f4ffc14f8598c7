"""Instances and stuff become one panoptic prediction, in which no pixel has two segments."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamteacher.metrics import VOID, Segments


def merge(
    masks: Tensor,
    classes: Tensor,
    scores: Tensor,
    stuff: Tensor,
    *,
    score: float = 0.5,
    overlap: float = 0.5,
    stuff_area: int = 4096,
) -> Segments:
    """Instances by falling score, each on what is left free; then stuff on the rest.

    Args:
        masks: bool K x H x W, of instances.
        classes: int64 K, their class ids.
        scores: float K.
        stuff: int64 H x W, each pixel's class id of stuff, or -1 where there is none.
        score: instances below it are left out.
        overlap: an instance is left out when more than this share of it is taken already.
        stuff_area: a class of stuff is left out when fewer pixels of it are free.

    Returns:
        Segments numbered from 1, instances first; what nobody takes is void.

    Source: Kirillov et al., arXiv 1801.00868, sec. 6 (0.5, 0.5), and its public code (64 x 64 pixels of stuff).
    """
    ids = torch.full(stuff.shape, VOID, dtype=torch.int64)
    found: dict[int, int] = {}
    for i in scores.argsort(descending=True, stable=True).tolist():
        area = int(masks[i].sum())
        if float(scores[i]) < score or not area:
            continue
        free = masks[i] & (ids == VOID)
        left = int(free.sum())
        if not left or area - left > overlap * area:
            continue
        found[len(found) + 1] = int(classes[i])
        ids[free] = len(found)
    for c in stuff[stuff >= 0].unique().tolist():
        free = (stuff == c) & (ids == VOID)
        if int(free.sum()) >= max(1, stuff_area):
            found[len(found) + 1] = c
            ids[free] = len(found)
    return Segments(ids=ids, classes=found)
