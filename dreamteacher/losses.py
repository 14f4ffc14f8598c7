"""The feature losses (eq. 1-3): pure functions of lists of maps, one list entry per level.

Maps are N x C x H x W, fine to coarse. Everything is computed in float32, also when the maps come in half
precision from autocast, and in float64 when they come in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dreamteacher.spec import AtReduction, WhitenAxes

_DIMS: dict[str, tuple[int, ...]] = {"c": (1,), "chw": (1, 2, 3)}


class FeatureLoss(NamedTuple):
    """Eq. 3 and its parts: `total` is a scalar, `mse` and `at` hold one value per level (L,), unweighted."""

    total: Tensor
    mse: Tensor
    at: Tensor


def whiten(x: Tensor, axes: WhitenAxes = "chw", eps: float = 1e-5) -> Tensor:
    """LayerNorm without learned parameters: mean 0 and variance 1 along `axes`.

    Args:
        x: maps, N x C x H x W.
        axes: "c" normalises over channels at each position; "chw" over the whole map of an image. With "c"
            the target has the same energy everywhere, which contradicts the attention-transfer term; with
            "chw" the two terms agree. The paper does not say which it uses.
        eps: added to the (population) variance.

    Raises:
        ValueError: for other axes, or when x is not 4-D.

    Source: W of eq. 1.
    """
    if axes not in _DIMS:
        raise ValueError(f"axes is 'c' or 'chw', not {axes!r}")
    if x.ndim != 4:
        raise ValueError(f"expected maps N x C x H x W, got shape {tuple(x.shape)}")
    x = _exact(x)
    variance, mean = torch.var_mean(x, dim=_DIMS[axes], correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + eps)


def mse(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Mean squared difference per level, over images, channels and positions: (L,).

    Raises:
        ValueError: when the lists or the shapes of two maps differ (nothing is broadcast).
    """
    pairs = _pairs(student_maps, teacher_maps)
    return torch.stack([(s - t).square().mean() for s, t in pairs])


def whitened_mse(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    axes: WhitenAxes = "chw",
    eps: float = 1e-5,
) -> Tensor:
    """Mean squared difference between the student's maps and the whitened maps of the teacher: (L,).

    Only the teacher is whitened. About 1 at the start of training, when the student's maps are near zero.

    Source: eq. 1, with the norm as an elementwise mean (the paper does not state the reduction).
    """
    return mse(student_maps, [whiten(t, axes, eps) for t in teacher_maps])


def energy(f: Tensor, p: float = 2) -> Tensor:
    """Sum over channels of |f|^p at each position: N x C x H x W -> N x H x W.

    Source: Q of eq. 2, before it is made a vector.
    """
    f = _exact(f)
    powers = f.square() if p == 2 else f.abs().pow(p)
    return powers.sum(dim=1)


def attention_transfer(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    p: float = 2,
    *,
    reduction: AtReduction = "distance",
) -> Tensor:
    """Distance between the energy maps of student and teacher, each of unit length: (L,).

    Zero when the two look at the same places, whatever the scale of either; at most sqrt(2) for p = 2.
    The teacher's maps come raw, not whitened.

    Args:
        p: exponent of the energy and order of the outer norm; the energy vectors are always L2-normalised.
        reduction: "distance" is the norm per image, averaged over the batch. "public" is the mean over images
            and positions of the squared difference, as in public attention-transfer code: so small that a
            weight of 10 leaves it without effect, and kept for comparison.

    Source: eq. 2; the normalisation is that of arXiv 1612.03928.
    """
    pairs = _pairs(student_maps, teacher_maps)
    return energy_transfer(
        [energy(s, p) for s, _ in pairs], [energy(t, p) for _, t in pairs], p, reduction=reduction
    )


def energy_transfer(
    student_energies: Sequence[Tensor],
    teacher_energies: Sequence[Tensor],
    p: float = 2,
    *,
    reduction: AtReduction = "distance",
) -> Tensor:
    """`attention_transfer` from the energy maps themselves (N x H x W, of any scale): (L,).

    Raises:
        ValueError: for another reduction, or maps that do not match.
    """
    if reduction not in ("distance", "public"):
        raise ValueError(f"reduction is 'distance' or 'public', not {reduction!r}")
    levels = []
    for s, t in zip(student_energies, teacher_energies, strict=True):
        if s.shape != t.shape or s.ndim != 3:
            raise ValueError(f"student energies {tuple(s.shape)}, teacher energies {tuple(t.shape)}")
        difference = _unit(s) - _unit(t)
        if reduction == "public":
            levels.append(difference.square().mean())
        else:
            levels.append(torch.linalg.vector_norm(difference, ord=p, dim=1).mean())
    return torch.stack(levels)


def feature_loss(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    *,
    axes: WhitenAxes = "chw",
    at_weight: float = 10.0,
    at_reduction: AtReduction = "distance",
    weights: Sequence[float] | None = None,
) -> FeatureLoss:
    """Whitened MSE plus weighted attention transfer, averaged over levels.

    Args:
        student_maps: the regressor's maps, L times N x C x H x W, fine to coarse.
        teacher_maps: the teacher's raw maps, same shapes.
        at_weight: lambda of eq. 3.
        weights: one factor per level inside the mean over levels; None is 1 for each.

    Raises:
        ValueError: when the lists, shapes or number of weights do not match.

    Source: eq. 3, L_feat = L_MSE + 10 L_AT. The level weights are ours.

    Example:
        >>> maps = [torch.ones(2, 3, 4, 4), torch.ones(2, 5, 2, 2)]
        >>> loss = feature_loss([torch.zeros_like(m) for m in maps], maps)
        >>> tuple(loss.mse.shape), loss.at.tolist()
        ((2,), [1.0, 1.0])
    """
    teacher_maps = [_exact(t) for t in teacher_maps]  # once for both terms
    mse_levels = whitened_mse(student_maps, teacher_maps, axes)
    at_levels = attention_transfer(student_maps, teacher_maps, reduction=at_reduction)
    levels = mse_levels + at_weight * at_levels
    if weights is not None:
        if len(weights) != len(levels):
            raise ValueError(f"{len(weights)} level weights for {len(levels)} levels")
        levels = levels * levels.new_tensor(list(weights))
    return FeatureLoss(levels.mean(), mse_levels, at_levels)


def total_loss(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted sum of named losses, a scalar.

    Args:
        losses: scalars. "mse/s4" is the term "mse" of the level "s4": terms of levels are averaged over the levels.
        weights: of terms; a term without one does not count.

    Source: eq. 3 and 6. Test: equal to `feature_loss` of the same maps, to the last bit.

    Example:
        >>> losses = {"mse/s4": torch.tensor(1.0), "mse/s8": torch.tensor(3.0), "label": torch.tensor(5.0)}
        >>> total_loss(losses, {"mse": 1.0, "label": 0.5}).item()
        4.5
    """
    levels: dict[str, Tensor] = {}
    rest: list[Tensor] = []
    for name, value in losses.items():
        term, _, level = name.partition("/")
        if term not in weights:
            continue
        weighted = weights[term] * value
        if not level:
            rest.append(weighted)
        else:
            levels[level] = levels[level] + weighted if level in levels else weighted
    parts = [torch.stack(list(levels.values())).mean()] if levels else []
    return functools.reduce(torch.add, [*parts, *rest])


def projected_loss(
    student_maps: Sequence[Tensor],
    targets: Sequence[Tensor],
    energies: Sequence[Tensor],
    residuals: Tensor,
    *,
    factors: Sequence[float],
    at_weight: float = 10.0,
    at_reduction: AtReduction = "distance",
) -> FeatureLoss:
    """`feature_loss` of a student whose maps live in a subspace of the teacher's channels, given by coefficients.

    Let w be a whitened map of C channels and B (K x C) have orthonormal rows. The target is c = B w; a student that
    gives k stands for the map s = B^T k. Then, at every position,

        |s - w|^2 / C = (K / C) |k - c|^2 / K + (|w|^2 - |c|^2) / C

    so eq. 1 is the mean square of k - c times K / C, plus a residual that no student of this subspace changes. As
    B^T keeps lengths, the energy of s in eq. 2 is that of k, with nothing to convert: as online, it is the energy of
    what approximates the whitened map, without what lies outside the subspace. The teacher's is of its raw maps, all
    channels, and comes as a map of its own.

    Args:
        student_maps: k, L times N x K x H x W, fine to coarse; targets: c, of the same shapes.
        energies: of the teacher's raw maps, L times N x H x W, of any scale per image.
        residuals: (|w|^2 - |c|^2) / C averaged over positions, N x L. It has no gradient.
        factors: K / C of each level.

    Raises:
        ValueError: when lists or shapes do not match.

    Source: eq. 1 to 3, restricted to a subspace (ours). Test: equal to `feature_loss` of s and the whole maps.
    """
    squares = mse(student_maps, targets)
    means = _exact(residuals).mean(0)
    scaled = torch.stack([s * f for s, f in zip(squares, factors, strict=True)])
    mse_levels = scaled + means.to(squares.dtype)
    at_levels = energy_transfer([energy(s) for s in student_maps], energies, reduction=at_reduction)
    levels = mse_levels + at_weight * at_levels
    return FeatureLoss(levels.mean(), mse_levels, at_levels)


def dice_loss(logits: Tensor, target: Tensor, *, ignore_index: int = 255) -> Tensor:
    """One minus the soft Dice coefficient, averaged over the classes that occur in the batch; a scalar.

    For class c, with p its probability and y its indicator: 1 - 2 sum(p y) / (sum p + sum y), the sums over all
    images and positions that are not ignored. Classes that the batch lacks have no term: there the coefficient
    is 0 whatever is predicted. A batch without any labelled position gives 0.

    Args:
        logits: N x K x H x W (or N x K); target: class ids N x H x W (or N), int64.
        ignore_index: id of positions that do not count.

    Source: Milletari et al. 2016 (arXiv 1606.04797) in its soft, per-class form; eq. 4 does not say which.
    """
    p = _exact(logits).softmax(1).movedim(1, -1).flatten(0, -2)
    y = target.flatten()
    counts = (y != ignore_index).to(p.dtype).unsqueeze(1)
    truth = torch.nn.functional.one_hot(y.where(counts.squeeze(1) > 0, 0), p.shape[1]).to(p.dtype) * counts
    p = p * counts
    sizes = truth.sum(0)
    terms = 1 - 2 * (p * truth).sum(0) / (p.sum(0) + sizes).clamp_min(torch.finfo(p.dtype).tiny)
    present = (sizes > 0).to(p.dtype)
    return (terms * present).sum() / present.sum().clamp_min(1)


def interpreter_loss(
    logits: Tensor,
    target: Tensor,
    *,
    dice_weight: float = 3.0,
    ignore_index: int = 255,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy plus weighted Dice loss of the interpreter, a scalar; 0 where nothing is labelled.

    Args:
        logits, target: as in `dice_loss`.
        class_weights: K factors of the classes in the cross-entropy; None: 1 for each.

    Source: eq. 4, CE + 3.0 Dice.
    """
    total = torch.nn.functional.cross_entropy(
        _exact(logits), target, weight=class_weights, ignore_index=ignore_index, reduction="sum"
    )
    valid = target != ignore_index
    if class_weights is None:
        size = valid.sum().to(total.dtype)
    else:
        size = (class_weights[target.where(valid, 0)] * valid).sum()
    entropy = total / size.clamp_min(torch.finfo(total.dtype).tiny)
    return entropy + dice_weight * dice_loss(logits, target, ignore_index=ignore_index)


def label_distillation(student_logits: Tensor, teacher_logits: Tensor, *, tau: float = 4.0) -> Tensor:
    """Soft cross-entropy of two distributions over classes at temperature tau, averaged over positions.

    No factor tau^2 is put before it: the paper states none, so gradients shrink by tau against plain
    cross-entropy (and by about tau^2 once the two agree).

    Args:
        student_logits, teacher_logits: N x K x H x W or N x K; the teacher's carry no gradient.

    Source: eq. 5, H(P_tau of the interpreter, P_tau of the student).
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"{tuple(student_logits.shape)} student logits, {tuple(teacher_logits.shape)} teacher logits"
        )
    target = (_exact(teacher_logits.detach()) / tau).softmax(1)
    return -(target * (_exact(student_logits) / tau).log_softmax(1)).sum(1).mean()


def _unit(q: Tensor) -> Tensor:
    """An energy map as a vector of length 1 per image, N x HW; a map of zeros stays zero."""
    return torch.nn.functional.normalize(_exact(q).flatten(1), dim=1)


def _exact(x: Tensor) -> Tensor:
    # Squares of half-precision activations overflow, and sums over positions lose their small terms.
    return x if x.dtype == torch.float64 else x.float()


def _pairs(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    if len(student_maps) != len(teacher_maps) or not student_maps:
        raise ValueError(f"{len(student_maps)} student levels for {len(teacher_maps)} teacher levels")
    for s, t in zip(student_maps, teacher_maps, strict=True):
        if s.shape != t.shape or s.ndim != 4:
            raise ValueError(f"student maps {tuple(s.shape)} do not match teacher maps {tuple(t.shape)}")
    return [(_exact(s), _exact(t)) for s, t in zip(student_maps, teacher_maps, strict=True)]
