"""Panoptic quality: how well every pixel got both a class and an object.

Counts are summed over all images first, then divided: a mean of per-image qualities is another number.
Parity with a plain loop over segments: `tests/test_panoptic_quality.py`.
Source: Kirillov et al., Panoptic Segmentation, arXiv 1801.00868; void and crowds as in COCO's evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

VOID = 0


@dataclass(frozen=True, kw_only=True)
class Segments:
    """One image cut into segments that do not overlap.

    Args:
        ids: int64 H x W, the number of each pixel's segment, or 0 where there is none (void).
        classes: segment number -> class id, of every number in `ids` but 0.
        crowds: numbers of segments that are many objects: neither found nor missed. Only of a ground truth.

    Raises:
        ValueError: a number in `ids` has no class, or a class is given for 0.
    """

    ids: Tensor
    classes: dict[int, int]
    crowds: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        unknown = set(self.ids.unique().tolist()) - set(self.classes) - {VOID}
        if unknown or VOID in self.classes:
            raise ValueError(f"segments without a class: {sorted(unknown)}; and 0 is no segment")


def panoptic_counts(pred: Segments, target: Segments, classes: int) -> Tensor:
    """Sum of IoU, true positives, false positives, false negatives: classes x 4 (float64). Add up over images.

    A predicted and a true segment of one class match when their IoU is above one half; the union leaves out
    what is void in the truth, and there can be no second match. What is not matched is a false negative, or
    a false positive, but for crowds, and for predictions that lie mostly in void or in crowds of their class.

    Args:
        pred: the prediction; pixels may be left void.
        target: the truth, of the same shape.
        classes: number of classes.

    Raises:
        ValueError: the shapes differ, or a class id is outside [0, classes).

    Example:
        >>> one = Segments(ids=torch.tensor([[1, 1, 2]]), classes={1: 0, 2: 1})
        >>> panoptic_counts(one, one, 2).tolist()
        [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
    """
    if pred.ids.shape != target.ids.shape:
        raise ValueError(f"prediction {tuple(pred.ids.shape)} and truth {tuple(target.ids.shape)} differ")
    found = {*pred.classes.values(), *target.classes.values()}
    if found and not 0 <= min(found) <= max(found) < classes:
        raise ValueError(f"class ids lie in [{min(found)}, {max(found)}], not in [0, {classes})")
    guesses, guess = pred.ids.flatten().unique(return_inverse=True)
    truths, truth = target.ids.flatten().unique(return_inverse=True)
    both = torch.bincount(guess * len(truths) + truth, minlength=len(guesses) * len(truths))
    overlap = both.reshape(len(guesses), len(truths))
    names, real = guesses.tolist(), truths.tolist()
    areas, real_areas = overlap.sum(1).tolist(), overlap.sum(0).tolist()
    void = overlap[:, real.index(VOID)].tolist() if VOID in real else [0] * len(names)

    counts = torch.zeros(classes, 4, dtype=torch.float64)
    matched: set[int] = set()
    crowded: dict[int, int] = {}
    for i, j in overlap.nonzero().tolist():
        name, other, shared = names[i], real[j], int(overlap[i, j])
        if VOID in (name, other) or pred.classes[name] != target.classes[other]:
            continue
        if other in target.crowds:
            crowded[name] = crowded.get(name, 0) + shared
        elif 2 * shared > (union := areas[i] + real_areas[j] - shared - void[i]):
            counts[target.classes[other]] += torch.tensor([shared / union, 1, 0, 0], dtype=torch.float64)
            matched |= {name, -other}
    for name, area, empty in zip(names, areas, void, strict=True):
        if name != VOID and name not in matched and 2 * (empty + crowded.get(name, 0)) <= area:
            counts[pred.classes[name], 2] += 1
    for other in real:
        if other != VOID and -other not in matched and other not in target.crowds:
            counts[target.classes[other], 3] += 1
    return counts


def panoptic_quality(counts: Tensor, things: Sequence[bool]) -> dict[str, float]:
    """PQ, SQ and RQ over the classes that occur: of all, of things, and of stuff.

    PQ of a class is the sum of IoU / (TP + FP / 2 + FN / 2) = SQ x RQ, where SQ is the mean IoU of its matches
    (0 without one) and RQ is the F1 score. Each is averaged over classes, so that only per class is PQ = SQ x RQ.

    Args:
        counts: classes x 4 from `panoptic_counts`, summed over images.
        things: whether a class has countable objects.

    Returns:
        "pq", "sq", "rq", then the same with "_things" and "_stuff", each where a class of that kind occurs.
    """
    iou, hits, extra, missed = counts.double().unbind(1)
    present = hits + extra + missed > 0
    rq = hits / (hits + extra / 2 + missed / 2)
    sq = torch.where(hits > 0, iou / hits, 0.0)
    thing = torch.tensor(things, dtype=torch.bool, device=counts.device)
    everything = torch.ones_like(thing)
    result: dict[str, float] = {}
    for ending, kind in (("", everything), ("_things", thing), ("_stuff", ~thing)):
        chosen = present & kind
        if chosen.any():
            parts = {"pq": sq * rq, "sq": sq, "rq": rq}
            result |= {f"{name}{ending}": float(value[chosen].mean()) for name, value in parts.items()}
    return result
