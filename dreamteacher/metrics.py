"""Numbers that say how well something went: distillation, representations, classification, segmentation.

Pure functions of tensors. Every scalar comes back as a Python float, ready for a JSON line. Each is computed
in float64 whatever comes in. Parity with scikit-learn and with plain loops: `tests/test_metrics.py`, `tests/test_panoptic_quality.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements that are converted to float64 at once in `r2` and `cosine`: bounds their memory.
_ELEMENTS = 2**23
# How many test rows meet the whole training set at once in `knn_predict`: bounds its memory.
_KNN_ROWS = 1024


def r2(pred: Tensor, target: Tensor, average: Callable[[Tensor], Tensor] = torch.clone) -> float:
    """Coefficient of determination over all elements, relative to the target's per-channel mean.

    1 - sum (target - pred)^2 / sum (target - mean_c)^2, where mean_c is the mean of channel c over the batch
    and all positions: 1 is perfect, 0 is as good as the constant vector of channel means, below 0 is worse.
    A target that is constant in each channel gives 1 for an exact prediction and 0 otherwise.

    Args:
        pred: N x C or N x C x H x W.
        target: of the same shape.
        average: mean over processes that have as many rows each.
    """
    _same_shape(pred, target)
    axes = [axis for axis in range(target.ndim) if axis != 1]
    residual = float(average(_sum((t - p).square().sum() for p, t in _doubles(pred, target))))
    sums = _sum(t.sum(axes, keepdim=True) for (t,) in _doubles(target))
    mean = average(sums / (target.numel() // target.shape[1]))
    total = float(average(_sum((t - mean).square().sum() for (t,) in _doubles(target))))
    if total == 0.0:
        return float(residual == 0.0)
    return 1.0 - residual / total


def cosine(pred: Tensor, target: Tensor, average: Callable[[Tensor], Tensor] = torch.clone) -> float:
    """Mean over images and positions of the cosine between the two channel vectors; in [-1, 1].

    The vectors are not centred, and a zero vector on either side counts as cosine 0.

    Args:
        pred: N x C or N x C x H x W.
        target: of the same shape.
        average: mean over processes that have as many rows each.
    """
    _same_shape(pred, target)
    parts = _doubles(pred, target)
    total = _sum(F.cosine_similarity(p, t, dim=1, eps=1e-30).sum() for p, t in parts)
    return float(average(total / (target.numel() // target.shape[1])))


def _doubles(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape in float64, as many rows at a time as _ELEMENTS holds."""
    rows = max(1, _ELEMENTS * len(tensors[0]) // max(1, tensors[0].numel()))
    for parts in zip(*(t.detach().split(rows) for t in tensors), strict=True):
        yield tuple(part.double() for part in parts)


def _sum(parts: Iterator[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)


def rankme(features: Tensor) -> float:
    """Effective rank: exp of the entropy of the singular values normalised by their sum; 1 to min(N, C).

    The features are not centred, as in the paper. We leave out the paper's 1e-7 beside each share and take
    0 log 0 = 0, which is its limit. All-zero features give 1, the value of a collapsed representation.

    Args:
        features: N x C.

    Source: Garrido et al., RankMe, arXiv 2210.02885, sec. 3.
    """
    values = torch.linalg.svdvals(features.detach().double())
    shares = values / values.sum().clamp_min(1e-300)
    return float(torch.special.entr(shares).sum().exp())


def knn_predict(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor | None = None,
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Class scores by the weighted vote of the k nearest training features by cosine similarity.

    A neighbour of similarity s votes with weight exp(s / temperature); a row of votes is normalised to sum
    to 1, so `scores.argmax(1)` is the prediction and the row itself serves `auroc`.

    Args:
        train_x: N x C features; any scale, they are normalised to unit length here.
        train_y: N class ids (int64) in [0, classes).
        test_x: M x C features, or None for leave-one-out: each training row is classified by the others.
        classes: number of classes.
        k: neighbours; cut to what there is.
        temperature: > 0; smaller lets the nearest neighbours outweigh the others more.

    Returns:
        M x classes (N x classes for leave-one-out) float32.

    Source: Wu et al., Non-Parametric Instance Discrimination, arXiv 1805.01978, sec. 3.4; k = 20 and
    temperature 0.07 as in the evaluation of DINO, arXiv 2104.14294.
    """
    leave_one_out = test_x is None
    train = F.normalize(train_x.detach().float(), dim=1)
    test = train if test_x is None else F.normalize(test_x.detach().float(), dim=1)
    available = len(train) - int(leave_one_out)
    if available < 1:
        raise ValueError(f"no neighbours among {len(train)} training features")
    votes = F.one_hot(train_y, classes).float()
    scores = []
    for first in range(0, len(test), _KNN_ROWS):
        similarity = test[first : first + _KNN_ROWS] @ train.T
        if leave_one_out:
            rows = torch.arange(len(similarity), device=similarity.device)
            similarity[rows, rows + first] = -torch.inf
        nearest, index = similarity.topk(min(k, available), dim=1)
        weight = torch.softmax(nearest / temperature, dim=1)
        scores.append((weight.unsqueeze(2) * votes[index]).sum(1))
    return torch.cat(scores) if scores else votes.new_zeros(0, classes)


def accuracy(pred: Tensor, target: Tensor) -> float:
    """Share of class ids that agree. pred, target: int64 of one shape."""
    _same_shape(pred, target)
    return float((pred == target).double().mean())


def topk_accuracy(scores: Tensor, target: Tensor, k: int) -> float:
    """Share of rows whose own class is among the k highest scores; k = 1 is `accuracy` of the arg-max.

    A tie at the border counts against the row, so that constant scores are never right for k below the number
    of classes.

    Args:
        scores: N x classes, larger is likelier.
        target: N class ids (int64).
        k: 1 to the number of classes.

    Raises:
        ValueError: k is out of range.
    """
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"the top {k} of {scores.shape[1]} classes")
    own = scores.gather(1, target[:, None])
    # The class itself is one of those that score at least as high.
    return float(((scores >= own).sum(1) <= k).double().mean())


def balanced_accuracy(pred: Tensor, target: Tensor) -> float:
    """Mean over the classes that occur in `target` of the share of their members predicted right.

    Args:
        pred: N class ids (int64).
        target: N class ids (int64).
    """
    _same_shape(pred, target)
    members = torch.bincount(target)
    hits = torch.bincount(target[pred == target], minlength=len(members))
    present = members > 0
    return float((hits[present].double() / members[present].double()).mean())


def auroc(scores: Tensor, target: Tensor) -> float:
    """Area under the ROC curve; for more than two classes the mean over classes of one-versus-rest.

    It is the probability that a random member scores above a random non-member; ties count one half.

    Args:
        scores: N scores of class 1, or N x classes. Two columns are ranked by their difference, which is
            right for logits and for probabilities; with more columns give probabilities.
        target: N class ids (int64).

    Raises:
        ValueError: a class has no member, or every row is a member.
    """
    if scores.ndim == 2 and scores.shape[1] == 2:
        scores = scores[:, 1].double() - scores[:, 0].double()
    if scores.ndim == 1:
        return _binary_auroc(scores, target == 1)
    return sum(_binary_auroc(scores[:, c], target == c) for c in range(scores.shape[1])) / scores.shape[1]


def _binary_auroc(scores: Tensor, member: Tensor) -> float:
    """The Mann-Whitney U statistic over average ranks. scores: N; member: N bool."""
    members, others = int(member.sum()), int((~member).sum())
    if not members or not others:
        raise ValueError(f"AUROC needs members and non-members of a class; got {members} and {others}")
    _, inverse, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    # Tied scores share the mean of the ranks that they occupy (ranks count from 1).
    rank = counts.cumsum(0).double() - (counts.double() - 1) / 2
    above = float(rank[inverse[member]].sum()) - members * (members + 1) / 2
    return above / (members * others)


def confusion(pred: Tensor, target: Tensor, classes: int, ignore_index: int | None = None) -> Tensor:
    """How often each class was taken for which: classes x classes (int64), rows target, columns prediction.

    Sum the matrices of all batches, then take the IoU once: a mean of per-batch IoUs is another number.

    Args:
        pred: class ids of any shape.
        target: class ids of that shape.
        classes: number of classes.
        ignore_index: target id whose elements are left out.

    Raises:
        ValueError: an id outside [0, classes).
    """
    _same_shape(pred, target)
    pred, target = pred.flatten(), target.flatten()
    if ignore_index is not None:
        keep = target != ignore_index
        pred, target = pred[keep], target[keep]
    for name, ids in (("predicted", pred), ("target", target)):
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= classes):
            raise ValueError(f"{name} ids lie in [{int(ids.min())}, {int(ids.max())}], not in [0, {classes})")
    index = target.long() * classes + pred.long()
    return torch.bincount(index, minlength=classes * classes).reshape(classes, classes)


def iou_per_class(matrix: Tensor) -> Tensor:
    """Intersection over union of each class (float64); NaN for a class in neither target nor prediction.

    Args:
        matrix: classes x classes from `confusion`.
    """
    matrix = matrix.double()
    hits = matrix.diagonal()
    return hits / (matrix.sum(0) + matrix.sum(1) - hits)


def mean_iou(matrix: Tensor) -> float:
    """Mean of `iou_per_class` over the classes that occur in the target or in the prediction."""
    return float(iou_per_class(matrix).nanmean())


def _same_shape(pred: Tensor, target: Tensor) -> None:
    if pred.shape != target.shape:
        raise ValueError(f"prediction {tuple(pred.shape)} and target {tuple(target.shape)} differ in shape")


# --- panoptic quality: how well every pixel got both a class and an object ------------------------------------
# Counts are summed over all images first, then divided: a mean of per-image qualities is another number.
# Source: Kirillov et al., Panoptic Segmentation, arXiv 1801.00868; void and crowds as in COCO's evaluation.

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


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample deviation, over seeds for example; the deviation of a single value is 0.

    Example:
        >>> mean_and_deviation([0.5, 0.75, 1.0])
        (0.75, 0.25)
    """
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def spread(values: Sequence[float], digits: int = 3) -> str:
    """The mean ± the sample deviation; of a single value there is none.

    Example:
        >>> spread([0.5, 0.75, 1.0]), spread([0.5], digits=1)
        ('0.750 ± 0.250', '0.5')
    """
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(values) > 1 else "")
