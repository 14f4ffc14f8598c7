"""Scores of maps for `inspect`: without labels, and by a linear probe of pixels. Pure functions of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamteacher import metrics
from dreamteacher.downstream.classification.probes import standardisation

_RIDGE = 0.01  # of the number of rows; features are standardised


def recognition(a: Tensor, b: Tensor) -> float:
    """How well rows of `a` find their partners among the rows of `b`: mean reciprocal rank, in (0, 1].

    Columns are standardised, similarity is the cosine. 1: every row's partner is its nearest neighbour; about
    ln(N) / N: chance. It needs no labels, and noise that drowns the image shows at once.

    Args:
        a, b: N x C.

    Source: ours (instance retrieval, as contrastive methods have it); how it agrees with probes: dev/LOG.md.

    Example:
        >>> x = torch.eye(4)
        >>> recognition(x, x), round(recognition(x, x.roll(1, 0)), 2) < 1
        (1.0, True)
    """
    similarity = F.normalize(standardised(a), dim=1) @ F.normalize(standardised(b), dim=1).T
    rank = (similarity >= similarity.diagonal().unsqueeze(1)).sum(1)
    return float((1 / rank.double()).mean())


def halves(maps: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pooled left and (mirrored) right half, and top and bottom half, of maps N x C x H x W; each N x C.

    Where a side has one position only, there is no half to pool and the pair is left out.
    """
    height, width = maps.shape[-2:]
    pairs = []
    if width > 1:
        pairs.append((maps[..., : width // 2].mean((2, 3)), maps[..., -(width // 2) :].mean((2, 3))))
    if height > 1:
        pairs.append((maps[..., : height // 2, :].mean((2, 3)), maps[..., -(height // 2) :, :].mean((2, 3))))
    return pairs


def pixels_at(maps: Tensor, positions: Tensor) -> Tensor:
    """Maps N x C x h x w read bilinearly at places of the image: N x P x C.

    Args:
        positions: N x P x 2, (row, column) as shares of height and width in [0, 1).
    """
    grid = (positions.flip(2) * 2 - 1).unsqueeze(1)
    read = F.grid_sample(maps, grid.to(maps.dtype), padding_mode="border", align_corners=False)
    return read[:, :, 0].transpose(1, 2)


def pixel_probe(x: Tensor, y: Tensor, *, labels: int, classes: int, ignore_index: int = 255) -> float:
    """mIoU of a ridge regression to one-hot classes, fitted on the first `labels` images, on the others.

    Args:
        x: N x P x C features of P pixels of N images; y: N x P class ids.
    """
    train, test = y[:labels] != ignore_index, y[labels:] != ignore_index
    mean, deviation = standardisation(x[:labels][train])
    a, b = ((part.double() - mean) / deviation for part in (x[:labels][train], x[labels:][test]))
    a, b = F.pad(a, (0, 1), value=1.0), F.pad(b, (0, 1), value=1.0)
    target = F.one_hot(y[:labels][train], classes).double()
    penalty = _RIDGE * len(a) * torch.eye(a.shape[1], dtype=a.dtype)
    weight = torch.linalg.solve(a.T @ a + penalty, a.T @ target)
    predicted = (b @ weight).argmax(1)
    return metrics.mean_iou(metrics.confusion(predicted, y[labels:][test], classes))


def standardised(x: Tensor) -> Tensor:
    """Columns with mean 0 and deviation 1, float64."""
    mean, deviation = standardisation(x)
    return (x.double() - mean) / deviation
