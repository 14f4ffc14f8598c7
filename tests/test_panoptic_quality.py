"""Panoptic quality against a plain loop over segments, and cases worked out by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dreamteacher.metrics import Segments, panoptic_counts, panoptic_quality

CLASSES = 3


def segments(ids: list[list[int]], classes: dict[int, int], crowds: set[int] = frozenset()) -> Segments:
    return Segments(ids=torch.tensor(ids), classes=classes, crowds=frozenset(crowds))


def by_loop(pred: Segments, target: Segments) -> list[list[Fraction]]:
    """The definition, pixel sets and exact fractions: every pair of segments is looked at."""

    def pixels(ids: Tensor) -> dict[int, set[tuple[int, int]]]:
        found: dict[int, set[tuple[int, int]]] = {}
        for y, row in enumerate(ids.tolist()):
            for x, name in enumerate(row):
                found.setdefault(name, set()).add((y, x))
        return found

    guesses, truths = pixels(pred.ids), pixels(target.ids)
    void = truths.pop(0, set())
    guesses.pop(0, None)
    counts = [[Fraction(0)] * 4 for _ in range(CLASSES)]
    free_truths = dict(truths)
    for name, mine in guesses.items():
        category = pred.classes[name]
        match = None
        for other, theirs in truths.items():
            if other in target.crowds or target.classes[other] != category:
                continue
            iou = Fraction(len(mine & theirs), len((mine - void) | theirs))
            if iou > Fraction(1, 2):
                assert match is None  # there can be but one
                match = other, iou
        if match is not None:
            counts[category][0] += match[1]
            counts[category][1] += 1
            del free_truths[match[0]]
            continue
        crowds = [truths[c] for c in target.crowds if c in truths and target.classes[c] == category]
        unscored = len(mine & void.union(*crowds))
        if Fraction(unscored, len(mine)) <= Fraction(1, 2):
            counts[category][2] += 1
    for other in free_truths:
        if other not in target.crowds:
            counts[target.classes[other]][3] += 1
    return counts


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Segments, Segments]:
    """A truth of a few boxes, and a prediction that is it with some pixels and classes changed."""
    ids = torch.zeros(5, 6, dtype=torch.int64)
    for name in draw(st.permutations([0, 3, 5, 70_000, 0, 8])):
        y, x = draw(st.integers(0, 4)), draw(st.integers(0, 5))
        ids[y : y + draw(st.integers(1, 5)), x : x + draw(st.integers(1, 6))] = name
    guess = ids.clone()
    for _ in range(draw(st.integers(0, 3))):
        y, x = draw(st.integers(0, 4)), draw(st.integers(0, 5))
        guess[y : y + 2, x : x + draw(st.integers(1, 3))] = draw(st.sampled_from([0, 3, 5, 9]))
    category = st.integers(0, CLASSES - 1)
    classes = {name: draw(category) for name in (3, 5, 8, 70_000)}
    other = {name: draw(category) if draw(st.booleans()) else classes.get(name, 0) for name in (*classes, 9)}
    crowds = draw(st.sets(st.sampled_from([3, 5, 8]), max_size=2))
    return Segments(ids=guess, classes=other), Segments(ids=ids, classes=classes, crowds=frozenset(crowds))


@given(cuts())
def test_counts_equal_a_loop_over_segments(pair: tuple[Segments, Segments]) -> None:
    found = panoptic_counts(*pair, CLASSES)
    expected = by_loop(*pair)
    torch.testing.assert_close(found, torch.tensor([[float(v) for v in row] for row in expected]).double())


def test_a_case_by_hand() -> None:
    target = segments([[1, 1, 1, 1], [1, 1, 2, 2], [3, 3, 3, 0]], {1: 0, 2: 1, 3: 1})
    pred = segments([[7, 7, 7, 7], [7, 8, 8, 8], [9, 9, 5, 5]], {7: 0, 8: 1, 9: 1, 5: 2})
    counts = panoptic_counts(pred, target, CLASSES)
    # 7 and 1 share 5 of 6 pixels; 8 and 2 share 2 of 3; 9 and 3 share 2 of 3. 5 lies half in void: that is
    # not more than half, so it is a false positive.
    assert counts.tolist() == [
        [pytest.approx(5 / 6), 1, 0, 0],
        [pytest.approx(4 / 3), 2, 0, 0],
        [0, 0, 1, 0],
    ]
    found = panoptic_quality(counts, [False, True, True])
    assert found == {
        "pq": pytest.approx((5 / 6 + 2 / 3 + 0) / 3),
        "sq": pytest.approx((5 / 6 + 2 / 3 + 0) / 3),
        "rq": pytest.approx(2 / 3),
        "pq_things": pytest.approx(1 / 3),
        "sq_things": pytest.approx(1 / 3),
        "rq_things": pytest.approx(1 / 2),
        "pq_stuff": pytest.approx(5 / 6),
        "sq_stuff": pytest.approx(5 / 6),
        "rq_stuff": 1.0,
    }


def test_exactly_one_half_is_no_match() -> None:
    target = segments([[1, 1, 1, 1]], {1: 0})
    half = segments([[1, 1, 2, 2]], {1: 0, 2: 1})
    assert panoptic_counts(half, target, 2).tolist() == [[0, 0, 1, 1], [0, 0, 1, 0]]
    more = segments([[1, 1, 1, 2]], {1: 0, 2: 1})
    assert panoptic_counts(more, target, 2).tolist() == [[0.75, 1, 0, 0], [0, 0, 1, 0]]


def test_void_is_left_out_of_the_union_and_forgives() -> None:
    target = segments([[1, 1, 0, 0, 0, 0]], {1: 0})
    wide = segments([[1, 1, 1, 1, 1, 1]], {1: 0})
    assert panoptic_counts(wide, target, 1).tolist() == [[1, 1, 0, 0]]
    inside = segments([[0, 0, 0, 2, 2, 2]], {2: 0})
    assert panoptic_counts(inside, target, 1).tolist() == [[0, 0, 0, 1]]


def test_crowds_are_neither_found_nor_missed() -> None:
    target = segments([[1, 1, 1, 1, 2, 2]], {1: 0, 2: 1}, crowds={1})
    two = segments([[1, 1, 2, 2, 3, 3]], {1: 0, 2: 0, 3: 1})
    assert panoptic_counts(two, target, 2).tolist() == [[0, 0, 0, 0], [1, 1, 0, 0]]
    other_class = segments([[1, 1, 1, 1, 3, 3]], {1: 1, 3: 1})
    assert panoptic_counts(other_class, target, 2).tolist() == [[0, 0, 0, 0], [1, 1, 1, 0]]


def test_counts_of_images_add_up_before_dividing() -> None:
    good = segments([[1, 1, 1, 1]], {1: 0})
    bad = segments([[1, 2, 3, 4]], {1: 0, 2: 0, 3: 0, 4: 0})
    counts = panoptic_counts(good, good, 1) + panoptic_counts(bad, good, 1)
    assert panoptic_quality(counts, [True]) == {
        key: pytest.approx(value)
        for kind in ("", "_things")
        for key, value in ((f"pq{kind}", 1 / 3.5), (f"sq{kind}", 1.0), (f"rq{kind}", 1 / 3.5))
    }


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ValueError, match=r"\[2\]"):
        segments([[1, 2]], {1: 0})
    one = segments([[1]], {1: 3})
    with pytest.raises(ValueError, match="not in"):
        panoptic_counts(one, one, 3)
    with pytest.raises(ValueError, match="differ"):
        panoptic_counts(one, segments([[1, 1]], {1: 0}), 9)
    assert panoptic_quality(torch.zeros(2, 4), [True, False]) == {}
