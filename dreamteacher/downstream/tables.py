"""Rows of results as tables: means, deviations, separation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dreamteacher.downstream.task import find_task
from dreamteacher.downstream.tasks import TASKS, Row
from dreamteacher.metrics import mean_and_deviation, spread


def row_title(row: Mapping[str, Any]) -> str:
    """Task, labels and metric in words: what the rows of one line of a table share."""
    return f"{row['task']}, {amount_of(row['task'], row['labels'])}, {row['metric']}"


def amount_of(task: str, budget: int | None) -> str:
    """How many labels, masks or images a row of a task was trained with, in words; the task may be another version's."""
    if task in TASKS:
        return find_task(task).amount(budget)
    return "all labels" if budget is None else f"{budget} labels"


def headline(task: str) -> str | None:
    """The metric that stands for a task in tables; none for one that is not known here."""
    return find_task(task).headline if task in TASKS else None


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, str], list[float]]:
    """(title, method) -> values over the seeds; a row evaluated again replaces the older one."""
    latest = {(row_title(row), row["method"], row["seed"]): row["value"] for row in rows}
    groups: dict[tuple[str, str], list[float]] = {}
    for (title, method, _), value in latest.items():
        groups.setdefault((title, method), []).append(value)
    return groups


def summary_table(rows: Sequence[Row], *, every_metric: bool = False) -> str:
    """A Markdown table, aligned to be read as text: one line per task, one column per method.

    A cell is the mean ± the sample deviation over the seeds; without ± there is one seed (or one backbone and nothing
    drawn). Of each task the metric is shown that stands for it, or with `every_metric` all.
    """
    rows = [row for row in rows if every_metric or row["metric"] == headline(row["task"])]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    groups = _grouped(rows)
    lines = [["task", *methods]]
    for title in dict.fromkeys(row_title(row) for row in rows):
        cells = (groups.get((title, method)) for method in methods)
        lines.append([title, *(spread(cell) if cell else "-" for cell in cells)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(methods) + 1)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


class Separation(NamedTuple):
    """How far method a lies above method b in one result: the difference of the means.

    `deviations` is it in units of the larger of the two sample deviations over the seeds; None when neither
    has two values, infinite when both deviations are 0.
    """

    title: str
    difference: float
    deviations: float | None


def separated(rows: Sequence[Row], a: str, b: str) -> list[Separation]:
    """By how many deviations the mean of method `a` exceeds that of `b`, for each result that both have."""
    groups = _grouped(rows)
    found = []
    for title in dict.fromkeys(row_title(row) for row in rows):
        ours, theirs = groups.get((title, a)), groups.get((title, b))
        if not ours or not theirs:
            continue
        (mean, deviation), (other, others) = mean_and_deviation(ours), mean_and_deviation(theirs)
        difference, larger = mean - other, max(deviation, others)
        deviations = None
        if larger > 0:
            deviations = difference / larger
        elif max(len(ours), len(theirs)) > 1:
            deviations = math.copysign(math.inf, difference) if difference else 0.0
        found.append(Separation(title, difference, deviations))
    return found
