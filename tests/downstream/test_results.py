"""Rows of results: read, summed up, replaced."""

from __future__ import annotations

import pytest

from dreamteacher.downstream import evaluate


def row(
    method: str, value: float, seed: int, task: str = "linear", labels: int | None = 10
) -> dict[str, object]:
    metric = "miou" if task.startswith("segment") else "accuracy"
    return {"method": method, "task": task, "metric": metric, "value": value, "labels": labels, "seed": seed}


def test_summary_and_separation() -> None:
    rows = [row("random init", v, s) for s, v in enumerate((0.5, 0.6, 0.7))]
    rows += [row("ours", v, s) for s, v in enumerate((0.8, 0.9, 0.85))]
    rows += [row("ours", 0.75, 0, "knn", None), row("ours", 0.5, 0, "segment-frozen")]
    rows += [row("random init", 0.4, 0, "segment-frozen"), {**row("ours", 0.1, 0), "metric": "auroc"}]
    assert evaluate.summary_table(rows).splitlines() == [
        "| task                                  | random init   | ours          |",
        "| ------------------------------------- | ------------- | ------------- |",
        "| linear, 10 labels per class, accuracy | 0.600 ± 0.100 | 0.850 ± 0.050 |",
        "| knn, all labels, accuracy             | -             | 0.750         |",
        "| segment-frozen, 10 masks, miou        | 0.400         | 0.500         |",
    ]
    found = evaluate.separated(rows, "ours", "random init")
    assert [f.title for f in found] == [
        "linear, 10 labels per class, accuracy",
        "segment-frozen, 10 masks, miou",
    ]
    assert found[0].difference == pytest.approx(0.25)
    assert found[0].deviations == pytest.approx(2.5)
    assert found[1].deviations is None
    assert evaluate.separated(rows, "random init", "ours")[0].deviations == pytest.approx(-2.5)


def test_a_row_evaluated_again_replaces_the_older_one() -> None:
    rows = [row("ours", 0.1, 0), row("ours", 0.3, 1), row("ours", 0.5, 0)]
    assert "0.400 ± 0.141" in evaluate.summary_table(rows)
