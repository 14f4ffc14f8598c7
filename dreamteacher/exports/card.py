"""The model card beside the weights: teacher, data, settings, numbers, licences, and how to load them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dreamteacher.exports.format import Exported, Format
from dreamteacher.metrics import spread
from dreamteacher.models.student import Student
from dreamteacher.runtime.errors import shorten

UNKNOWN = "not recorded"

# What the card shows of the run's settings, in this order, when the run has them.
_SETTINGS = (
    "size", "t", "noise", "init", "epochs", "steps", "batch_size", "optimizer", "lr", "weight_decay", "axes",
    "at_weight", "width", "flip", "seed",
)  # fmt: skip


def front_block(format: Format, made: Exported) -> str:
    """The YAML block on top of the card."""
    if made.front is not None:
        return made.front
    lines = [] if made.library is None else [f"library_name: {made.library}"]
    lines.append(f"tags: [{format.name}, image-feature-extraction, dreamteacher]")
    return "\n".join(["---", *lines, "---", ""])


def load_section(made: Exported) -> str:
    """The card's section on loading: what to install, the code, what to know."""
    return f"""Run it in the folder of this file, with `pip install {made.install}`:

```python
{made.snippet.rstrip()}
```

{made.notes}"""


def model_card(
    student: Student,
    facts: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    *,
    front: str,
    load: str,
) -> str:
    """The text of README.md: teacher, data, settings, numbers, licences, and how to load the weights.

    Args:
        facts: the run's config.json; what it lacks is shown as "not recorded".
        metrics: rows of metrics.jsonl; the last value of each key is shown.
        results: rows of results.jsonl; seeds of one evaluation are averaged.
        front: the YAML block on top, for the model hub.
        load: how to load the weights, Markdown.
    """
    config, teacher, data = (facts.get(key) or {} for key in ("config", "teacher", "data"))
    classes, made = data.get("classes"), config.get("dataset") == "synthesized"
    levels = ", ".join(f"{s.channels} at {s.stride}" for s in student.specs)
    rows = {
        "student": f"{student.name} (channels at stride: {levels})",
        "teacher": teacher.get("name") or config.get("teacher"),
        "teacher's family": teacher.get("family"),
        "teacher's licence": teacher.get("licence"),
        "teacher's sha256": teacher.get("sha256"),
        "feature dataset": config.get("dataset"),
        "images": config.get("images") or ("the teacher's own" if made else None),
        "number of images": config.get("samples") if made else data.get("images"),
        "damaged images passed over": data.get("skipped"),
        "classes of the images (not used to train)": shorten(classes, 12)
        if classes
        else "none"
        if classes == []
        else None,
        "dreamteacher": facts.get("version"),
        **{key: config[key] for key in _SETTINGS if key in config},
        "size": data.get("size") or config.get("size"),
    }
    return f"""{front}# {student.name}, pretrained with DreamTeacher

An image backbone that was pretrained without labels: it learned to reproduce the features of a frozen
generative model (DreamTeacher, [arXiv 2307.07487](https://arxiv.org/abs/2307.07487); an independent
implementation, not the authors' code). It gives feature maps; it has no classifier.

## How it was made

{_table(("", ""), [(key, _text(value)) for key, value in rows.items()])}

## Numbers

{_numbers(metrics)}

{_results(results)}

## Load it without dreamteacher

{load}

## Licences

The weights you trained are yours; the teacher's licence ({_text(teacher.get("licence"))}) may bind you,
and so may the terms of the images. The software, dreamteacher, is Apache-2.0.
"""


def _numbers(metrics: Sequence[Mapping[str, Any]]) -> str:
    last: dict[str, Any] = {}
    for row in metrics:
        last.update(row)
    if not last:
        return f"Pretraining metrics: {UNKNOWN}."
    whole = [(key, _text(value)) for key, value in last.items() if "/" not in key]
    levels = list(dict.fromkeys(key.split("/", 1)[1] for key in last if "/" in key))
    names = list(dict.fromkeys(key.split("/", 1)[0] for key in last if "/" in key))
    text = "Last values of the pretraining:\n\n" + _table(("", ""), whole)
    if levels:
        cells = [(level, *(_text(last.get(f"{n}/{level}")) for n in names)) for level in levels]
        text += "\n\n" + _table(("level", *names), cells)
    return text


def _results(results: Sequence[Mapping[str, Any]]) -> str:
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in results:
        key = tuple(
            _text(row.get(k), missing="all") for k in ("method", "student", "task", "metric", "labels")
        )
        groups.setdefault(key, []).append(float(row["value"]))
    if not groups:
        return f"Evaluations: {UNKNOWN}."
    rows = []
    for key, values in groups.items():
        rows.append((*key, spread(values, digits=4), str(len(values))))
    head = ("method", "student", "task", "metric", "labels", "value", "seeds")
    return "Evaluations (mean ± standard deviation over seeds):\n\n" + _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _text(value: Any, missing: str = UNKNOWN) -> str:
    if value is None or value == "":
        return missing
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return " x ".join(_text(v) for v in value) or "none"
    return " ".join(str(value).split())


def terms_of(facts: Mapping[str, Any]) -> tuple[str, str, str]:
    """The teacher's name, its licence, and the images, as far as a run recorded them."""
    config, teacher = facts.get("config") or {}, facts.get("teacher") or {}
    made = config.get("dataset") == "synthesized"
    images = config.get("images") or ("the teacher's own" if made else None)
    name = teacher.get("name") or config.get("teacher")
    return _text(name), _text(teacher.get("licence")), _text(images)
