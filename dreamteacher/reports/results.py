"""The report's results: one sentence that compares two methods, a table of all, and a plot of every seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape as esc
from typing import Any, NamedTuple

from dreamteacher.downstream.tables import Separation, amount_of, headline, row_title, separated
from dreamteacher.downstream.task import find_task
from dreamteacher.downstream.tasks import TASKS
from dreamteacher.metrics import spread
from dreamteacher.reports.charts import Dots, dot_plot

METRICS = {
    "miou": "mIoU", "auroc": "AUROC", "balanced_accuracy": "balanced accuracy", "mask_ap": "mask AP",
    "top5_accuracy": "top-5 accuracy",
}  # fmt: skip
BASELINES = ("random init", "labels only", "ImageNet")
_CAPTION = (
    "Mean ± sample standard deviation over seeds, higher is better; the best mean of a row is bold. The last "
    "column is in units of the larger of the two deviations. In the plots a ring is one seed, a dot the mean."
)

Key = tuple[str, Any, str]  # task, labels, metric
Rows = Sequence[Mapping[str, Any]]


class Comparison(NamedTuple):
    """Evaluation rows by result and method.

    Args:
        groups: result -> method -> values over the seeds; a row evaluated again replaces the older one.
        methods: in the order of the columns; `ours` is first where it is known.
        baseline: what `ours` is compared with: random weights, else the first other method.
        apart: title of a result -> how far `ours` lies above `baseline`.
    """

    groups: dict[Key, dict[str, list[float]]]
    methods: list[str]
    ours: str | None
    baseline: str | None
    apart: dict[str, Separation]


def verdict(results: Rows, name: str) -> str:
    """One sentence: the first result in a fixed order, and in how many results our method leads.

    Args:
        results: as in `results_section`; name: too.

    Returns: plain text; "" where there is nothing to compare.
    """
    c = _compare(results, name)
    both = [k for k in c.groups if k[2] == headline(k[0]) and _apart(c, k)]
    if not both or c.ours is None or c.baseline is None:
        return ""
    task, amount, metric = _words(both[0])
    group, found = c.groups[both[0]], _apart(c, both[0])
    apart = _deviations(found) if found else ""
    text = (
        f"With {amount}, {task}: {c.ours} reaches {spread(group[c.ours])} {metric} against "
        f"{spread(group[c.baseline])} for {c.baseline}" + (f" ({apart})" if apart else "")
    )
    means = [{m: statistics.mean(v) for m, v in c.groups[k].items()} for k in both]
    first = sum(m[c.ours] == max(m.values()) for m in means)
    return text + (f"; it is the best of all in {first} of {len(both)} results." if len(both) > 1 else ".")


def results_section(results: Rows, name: str) -> str:
    """The table of every method's mean and spread, and a plot per result, as HTML.

    Args:
        results: evaluation rows, at least one; those of one method, result and seed: the last counts.
        name: the method of this name is taken for ours, as is one that begins with DreamTeacher.
    """
    c = _compare(results, name)
    main = [k for k in c.groups if k[2] == (headline(k[0]) or k[2])]
    others = [k for k in c.groups if k not in main]
    plots = ""
    for key in main[:12]:
        dots = [Dots(m, c.groups[key][m], m == c.ours) for m in c.methods if m in c.groups[key]]
        plots += dot_plot(", ".join(_words(key)), dots)
    text = _result_table(c, main)
    text += f'<p class="caption">{_CAPTION}</p><div class="grid2">{plots}</div>'
    if others:
        text += (
            f"<details><summary>Other metrics ({len(others)})</summary>{_result_table(c, others)}</details>"
        )
    return text


def _compare(results: Rows, name: str) -> Comparison:
    several = len({row["student"] for row in results}) > 1
    column = "{method}, {student}" if several else "{method}"
    rows = [{**row, "method": column.format(**row)} for row in results]
    latest = {((r["task"], r["labels"], r["metric"]), r["method"], r["seed"]): r["value"] for r in rows}
    groups: dict[Key, dict[str, list[float]]] = {}
    for key, method, seed in sorted(latest, key=lambda k: _rank(k[0])):
        groups.setdefault(key, {}).setdefault(method, []).append(float(latest[key, method, seed]))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    own = [m for m in methods if m.lower().startswith("dreamteacher") or m == name]
    unknown = [m for m in methods if not m.startswith(BASELINES)]
    ours = own[0] if own else unknown[0] if len(unknown) == 1 else None
    rest = sorted((m for m in methods if m != ours), key=lambda m: not m.startswith("random init"))
    if ours is None or not rest:
        return Comparison(groups, methods, ours, None, {})
    methods = [ours, *(m for m in methods if m != ours)]
    return Comparison(groups, methods, ours, rest[0], {s.title: s for s in separated(rows, ours, rest[0])})


def _rank(key: Key) -> tuple[int, bool, int]:
    """The order of results: by task as in TASKS, then few labels before many."""
    tasks = list(TASKS)
    labels = key[1] if isinstance(key[1], int) else 0
    return tasks.index(key[0]) if key[0] in tasks else len(tasks), key[1] is None, labels


def _words(key: Key) -> tuple[str, str, str]:
    """Task, amount of labels and metric, in words."""
    task, labels, metric = key
    what = find_task(task).what if task in TASKS else str(task)
    return what, amount_of(task, labels), METRICS.get(metric, str(metric)).replace("iou/", "IoU of ")


def _apart(c: Comparison, key: Key) -> Separation | None:
    return c.apart.get(row_title(dict(zip(("task", "labels", "metric"), key, strict=True))))


def _deviations(found: Separation) -> str:
    known = found.deviations is not None and math.isfinite(found.deviations)
    return f"{found.deviations:+.1f} deviations" if known else ""


def _result_table(c: Comparison, keys: Sequence[Key]) -> str:
    head = "".join(f"<th{' class=ours' if m == c.ours else ''}>{esc(m)}</th>" for m in c.methods)
    gap = f"<th>difference to<br>{esc(c.baseline)}</th>" if c.baseline else ""
    lines = ""
    for key in keys:
        task, amount, metric = _words(key)
        means = {m: f"{statistics.mean(v):.3f}" for m, v in c.groups[key].items()}
        lines += f"<tr><td>{esc(task)}<br><small>{esc(amount)}, {esc(metric)}</small></td>"
        for method in c.methods:
            text = spread(c.groups[key][method]) if method in means else "–"
            bold = method in means and float(means[method]) == max(map(float, means.values()))
            lines += f"<td>{f'<b>{text}</b>' if bold else text}</td>"
        counts = sorted({len(v) for v in c.groups[key].values()})
        lines += f"<td>{'–'.join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))}</td>"
        if c.baseline:
            found = _apart(c, key)
            small = f"<br><small>{_deviations(found)}</small>" if found and _deviations(found) else ""
            lines += f"<td>{found.difference:+.3f}{small}</td>" if found else "<td>–</td>"
        lines += "</tr>"
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{head}<th>seeds</th>{gap}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )
