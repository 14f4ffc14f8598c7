"""Metrics against scikit-learn, plain float64 loops, and properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dreamteacher import metrics

seeds = st.integers(0, 2**31)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(seed: int, classes: int, *shape: int) -> torch.Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


# ---- distillation


def test_r2_against_a_loop_and_sklearn() -> None:
    pred, target = normal(0, 3, 4, 2, 5), normal(1, 3, 4, 2, 5) + torch.arange(4.0).reshape(1, 4, 1, 1)
    residual = total = 0.0
    for c in range(4):
        p, t = pred[:, c].flatten().tolist(), target[:, c].flatten().tolist()
        mean = sum(t) / len(t)
        residual += sum((a - b) ** 2 for a, b in zip(p, t, strict=True))
        total += sum((b - mean) ** 2 for b in t)
    assert metrics.r2(pred, target) == pytest.approx(1 - residual / total, abs=1e-12)
    rows, wanted = pred.movedim(1, 3).reshape(-1, 4), target.movedim(1, 3).reshape(-1, 4)
    r2_ = sk.r2_score(wanted.double(), rows.double(), multioutput="variance_weighted")
    assert metrics.r2(pred, target) == pytest.approx(r2_, abs=1e-12)


@given(seeds, st.floats(0.1, 10))
@settings(max_examples=25, deadline=None)
def test_r2_properties(seed: int, scale: float) -> None:
    target = normal(seed, 6, 3, 2, 2) * scale
    means = target.double().mean((0, 2, 3), keepdim=True).expand_as(target)
    assert metrics.r2(target, target) == 1.0
    assert metrics.r2(means, target) == pytest.approx(0.0, abs=1e-12)
    assert metrics.r2(-target, target) < 0
    # The same shift of both sides changes nothing: it is relative to the channel means.
    pred = target + normal(seed + 1, 6, 3, 2, 2)
    shift = torch.tensor([5.0, -3.0, 1.0]).reshape(1, 3, 1, 1)
    assert metrics.r2(pred + shift, target + shift) == pytest.approx(metrics.r2(pred, target), abs=1e-4)


def test_r2_of_a_constant_target() -> None:
    target = torch.ones(2, 3, 4, 4)
    assert metrics.r2(target, target) == 1.0
    assert metrics.r2(target + 1, target) == 0.0


def test_cosine_against_a_loop() -> None:
    pred, target = normal(0, 2, 5, 3, 4), normal(1, 2, 5, 3, 4)
    values = []
    for n in range(2):
        for y in range(3):
            for x in range(4):
                a, b = pred[n, :, y, x].double().tolist(), target[n, :, y, x].double().tolist()
                dot = sum(i * j for i, j in zip(a, b, strict=True))
                values.append(dot / math.sqrt(sum(i * i for i in a) * sum(j * j for j in b)))
    assert metrics.cosine(pred, target) == pytest.approx(sum(values) / len(values), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_in_pieces_give_the_same_numbers_without_whole_maps_in_float64(dtype, monkeypatch) -> None:
    pred, target = (torch.randn(7, 6, 5, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    pred, target = (pred + target).to(dtype), 2 * target + 1
    numbers = metrics.r2, metrics.cosine
    expected = [number(pred, target) for number in numbers]
    assert expected[0] == 1 - float(
        (target.double() - pred.double()).square().sum()
        / (target.double() - target.double().mean((0, 2, 3), keepdim=True)).square().sum()
    )
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
                largest = max(largest, made.numel())
            return made

    for elements, most in ((2 * 120, 240), (10, 120)):  # two images; less than one
        monkeypatch.setattr(metrics, "_ELEMENTS", elements)
        largest = 0
        with Watch():
            found = [number(pred, target) for number in numbers]
        assert found == pytest.approx(expected, rel=1e-12)
        assert largest == most


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_cosine_ignores_positive_scales(seed: int) -> None:
    pred, target = normal(seed, 2, 5, 3, 3), normal(seed + 1, 2, 5, 3, 3)
    per_position = normal(seed + 2, 2, 1, 3, 3).exp()
    assert metrics.cosine(pred.double() * per_position, target) == pytest.approx(metrics.cosine(pred, target))
    assert metrics.cosine(pred, 3 * pred) == pytest.approx(1)
    assert metrics.cosine(pred, -pred) == pytest.approx(-1)
    assert metrics.cosine(torch.zeros_like(pred), target) == 0.0


# ---- representations


def test_rankme_against_numpy() -> None:
    features = normal(3, 40, 12) * torch.arange(1.0, 13)
    values = np.linalg.svd(features.double().numpy(), compute_uv=False)
    shares = values / values.sum()
    assert metrics.rankme(features) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-12)


@given(seeds, st.integers(1, 8))
@settings(max_examples=20, deadline=None)
def test_rankme_properties(seed: int, rank: int) -> None:
    low = normal(seed, 30, rank).double() @ normal(seed + 1, rank, 16).double()
    assert 1 - 1e-9 <= metrics.rankme(low) <= rank + 1e-6
    assert metrics.rankme(low * 7) == pytest.approx(metrics.rankme(low))
    assert metrics.rankme(torch.eye(16)[:, :rank]) == pytest.approx(rank)


def test_rankme_of_collapsed_features_is_one() -> None:
    assert metrics.rankme(torch.ones(10, 4)) == pytest.approx(1)
    assert metrics.rankme(torch.zeros(10, 4)) == pytest.approx(1)


# ---- nearest neighbours


def loop_knn(train_x, train_y, test_x, classes, k, temperature, exclude_self):
    rows = []
    for i, x in enumerate(test_x.double()):
        pairs = []
        for j, y in enumerate(train_x.double()):
            if not (exclude_self and i == j):
                pairs.append((float(x @ y / (x.norm() * y.norm())), int(train_y[j])))
        votes = [0.0] * classes
        for similarity, label in sorted(pairs, reverse=True)[:k]:
            votes[label] += math.exp(similarity / temperature)
        rows.append([vote / sum(votes) for vote in votes])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_against_a_loop(k: int) -> None:
    train_x, train_y, test_x = normal(0, 25, 6), ids(1, 3, 25), normal(2, 9, 6) * 10
    scores = metrics.knn_predict(train_x, train_y, test_x, classes=3, k=k, temperature=0.2)
    assert torch.allclose(scores.double(), loop_knn(train_x, train_y, test_x, 3, k, 0.2, False), atol=1e-5)
    loo = metrics.knn_predict(train_x, train_y, classes=3, k=k, temperature=0.2)
    assert torch.allclose(loo.double(), loop_knn(train_x, train_y, train_x, 3, k, 0.2, True), atol=1e-5)


def test_knn_against_sklearn() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    train_x, train_y, test_x = normal(0, 200, 8), ids(1, 4, 200), normal(2, 100, 8)
    oracle = KNeighborsClassifier(n_neighbors=7, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.1))
    oracle.fit(train_x.numpy(), train_y.numpy())
    scores = metrics.knn_predict(train_x, train_y, test_x, classes=4, k=7, temperature=0.1)
    assert np.allclose(scores, oracle.predict_proba(test_x.numpy()), atol=1e-4)


def test_leave_one_out_excludes_self() -> None:
    # Labels without any relation to the features: only a row that sees itself can be right above chance.
    x, y = normal(0, 400, 16), ids(1, 2, 400)
    seen = metrics.knn_predict(x, y, x, classes=2, k=1).argmax(1)
    left_out = metrics.knn_predict(x, y, classes=2, k=1).argmax(1)
    assert metrics.accuracy(seen, y) == 1.0
    assert 0.4 < metrics.accuracy(left_out, y) < 0.6
    # A pair of twins with different labels: each gets the other's.
    twins = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.1]])
    scores = metrics.knn_predict(twins, torch.tensor([0, 1, 1]), classes=2, k=1)
    assert scores[:2].argmax(1).tolist() == [1, 0]


def test_knn_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(0, 50, 4), ids(1, 3, 50)
    whole = metrics.knn_predict(x, y, classes=3, k=4)
    monkeypatch.setattr(metrics, "_KNN_ROWS", 7)
    assert torch.allclose(metrics.knn_predict(x, y, classes=3, k=4), whole, atol=1e-6)


def test_knn_takes_what_there_is() -> None:
    x, y = normal(0, 3, 4), torch.tensor([0, 1, 1])
    scores = metrics.knn_predict(x, y, classes=2, k=20)
    assert torch.allclose(scores.sum(1), torch.ones(3))
    with pytest.raises(ValueError, match="no neighbours"):
        metrics.knn_predict(x[:1], y[:1], classes=2)


# ---- classification


@given(seeds, st.integers(2, 5))
@settings(max_examples=25, deadline=None)
def test_accuracies_against_sklearn(seed: int, classes: int) -> None:
    pred, target = ids(seed, classes, 60), ids(seed + 1, classes, 60)
    target[:classes] = torch.arange(classes)  # every class occurs: scikit-learn warns otherwise
    assert metrics.accuracy(pred, target) == pytest.approx(sk.accuracy_score(target, pred))
    assert metrics.balanced_accuracy(pred, target) == pytest.approx(sk.balanced_accuracy_score(target, pred))


def test_balanced_accuracy_leaves_absent_classes_out() -> None:
    assert metrics.balanced_accuracy(torch.tensor([0, 3, 2]), torch.tensor([0, 0, 2])) == 0.75


@given(seeds, st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_binary_auroc_with_ties_against_sklearn(seed: int, levels: int) -> None:
    # Few distinct scores make many ties.
    scores, target = ids(seed, levels, 50).float(), ids(seed + 1, 2, 50)
    target[:2] = torch.tensor([0, 1])
    assert metrics.auroc(scores, target) == pytest.approx(sk.roc_auc_score(target, scores), abs=1e-12)
    two = torch.stack([-scores, scores], 1)
    assert metrics.auroc(two, target) == pytest.approx(sk.roc_auc_score(target, scores), abs=1e-12)
    assert metrics.auroc(-scores, target) == pytest.approx(1 - metrics.auroc(scores, target))


@given(seeds, st.integers(3, 5))
@settings(max_examples=20, deadline=None)
def test_macro_auroc_against_sklearn(seed: int, classes: int) -> None:
    scores, target = normal(seed, 60, classes).double().softmax(1), ids(seed + 1, classes, 60)
    target[:classes] = torch.arange(classes)
    wanted = sk.roc_auc_score(target, scores, multi_class="ovr", average="macro")
    assert metrics.auroc(scores, target) == pytest.approx(wanted, abs=1e-12)


def test_auroc_needs_both_sides() -> None:
    with pytest.raises(ValueError, match="0 and 3"):
        metrics.auroc(torch.rand(3), torch.zeros(3, dtype=torch.int64))


# ---- segmentation


@given(seeds, st.integers(2, 5))
@settings(max_examples=25, deadline=None)
def test_confusion_and_iou_against_sklearn(seed: int, classes: int) -> None:
    pred, target = ids(seed, classes, 2, 7, 5), ids(seed + 1, classes, 2, 7, 5)
    target[0, :2] = 255
    keep = target != 255
    matrix = metrics.confusion(pred, target, classes, ignore_index=255)
    wanted = sk.confusion_matrix(target[keep], pred[keep], labels=list(range(classes)))
    assert np.array_equal(matrix.numpy(), wanted)
    iou = sk.jaccard_score(
        target[keep], pred[keep], labels=list(range(classes)), average=None, zero_division=0
    )
    assert np.allclose(metrics.iou_per_class(matrix).nan_to_num(0), iou)


@given(seeds)
@settings(max_examples=10, deadline=None)
def test_confusions_of_parts_add_up(seed: int) -> None:
    pred, target = ids(seed, 3, 4, 6, 6), ids(seed + 1, 3, 4, 6, 6)
    parts = sum(metrics.confusion(pred[i], target[i], 3) for i in range(4))
    assert torch.equal(parts, metrics.confusion(pred, target, 3))
    assert metrics.mean_iou(metrics.confusion(target, target, 3)) == 1.0


def test_mean_iou_leaves_absent_classes_out() -> None:
    matrix = metrics.confusion(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), classes=4)
    assert metrics.iou_per_class(matrix)[:2].tolist() == [0.5, 0.5]
    assert metrics.iou_per_class(matrix)[2:].isnan().all()
    assert metrics.mean_iou(matrix) == 0.5


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="target ids"):
        metrics.confusion(torch.tensor([0]), torch.tensor([3]), classes=2)
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.accuracy(torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.r2(torch.zeros(3, 2), torch.zeros(3, 1))
