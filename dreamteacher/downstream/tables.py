"""Rows of results as tables: means, deviations, separation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dreamteacher.downstream.tasks import (
    DETECTION,
    DISTILLED,
    HEADLINE,
    PANOPTIC,
    SEGMENTATION,
    STREAMED,
    Row,
)


def row_title(row: Mapping[str, Any]) -> str:
    """Task, labels and metric in words: what the rows of one line of a table share."""
    unit = "masks" if row["task"] in (*SEGMENTATION, *STREAMED) else "labels per class"
    unit = "images" if row["task"] in (*DETECTION, *PANOPTIC) else unit
    amount = "all labels" if row["labels"] is None else f"{row['labels']} {unit}"
    if row["task"] in DISTILLED:
        amount = "as pretrained"
    return f"{row['task']}, {amount}, {row['metric']}"


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, str], list[float]]:
    """(title, method) -> values over the seeds; a row evaluated again replaces the older one."""
    latest = {(row_title(row), row["method"], row["seed"]): row["value"] for row in rows}
    groups: dict[tuple[str, str], list[float]] = {}
    for (title, method, _), value in latest.items():
        groups.setdefault((title, method), []).append(value)
    return groups


def summary_table(rows: Sequence[Row], *, every_metric: bool = False) -> str:
    """A Markdown table, aligned to be read as text: one line per task, one column per method.

    A cell is the mean ± the sample deviation over the seeds; without ± there is one seed (or one backbone and
    nothing drawn).

    Args:
        rows: of one or several methods.
        every_metric: all metrics instead of the one that stands for each task.
    """
    rows = [row for row in rows if every_metric or row["metric"] == HEADLINE.get(row["task"])]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    groups = _grouped(rows)
    lines = [["task", *methods]]
    for title in dict.fromkeys(row_title(row) for row in rows):
        lines.append([title, *(_cell(groups.get((title, method), [])) for method in methods)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(methods) + 1)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


class Separation(NamedTuple):
    """How far method a lies above method b in one result.

    Args:
        title: task, labels and metric.
        difference: mean of a minus mean of b.
        deviations: the difference in units of the larger of the two sample deviations over the seeds; None
            when neither has two values, infinite when both deviations are 0.
    """

    title: str
    difference: float
    deviations: float | None


def separated(rows: Sequence[Row], a: str, b: str) -> list[Separation]:
    """By how many deviations the mean of method `a` exceeds that of `b`, for each result that both have.

    Args:
        rows: of both methods.
        a: a method's name.
        b: another's.
    """
    groups = _grouped(rows)
    found = []
    for title in dict.fromkeys(row_title(row) for row in rows):
        ours, theirs = groups.get((title, a)), groups.get((title, b))
        if not ours or not theirs:
            continue
        difference = statistics.mean(ours) - statistics.mean(theirs)
        spreads = [statistics.stdev(values) for values in (ours, theirs) if len(values) > 1]
        deviations = None
        if spreads and max(spreads) > 0:
            deviations = difference / max(spreads)
        elif spreads:
            deviations = math.copysign(math.inf, difference) if difference else 0.0
        found.append(Separation(title, difference, deviations))
    return found
