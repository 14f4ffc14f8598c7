"""One self-contained HTML page about a run: what came out, how training went, what the maps look like."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape as esc
from pathlib import Path
from typing import Any

from dreamteacher.exports.timm import load_snippet
from dreamteacher.reports.charts import Series, line_chart
from dreamteacher.reports.config import ReportConfig
from dreamteacher.reports.maps import MAPS_LEAD, as_dict, feature_maps, stride_name, teacher_samples
from dreamteacher.reports.results import results_section, verdict
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.errors import UserError, first_line
from dreamteacher.runtime.page import page
from dreamteacher.runtime.run_folder import RunDir, read_rows
from dreamteacher.teachers.registry import read_card

_GIVE = "Give the --out folder of pretrain, train-teacher or evaluate."
_CURVES_LEAD = "Against optimizer steps; a pointer on a line shows its values."


def report(config: ReportConfig) -> Path:
    """The verb: writes the page and says where it is."""
    path = write_report(config.run, image_count=config.image_count, own_code=config.own_code)
    print(f"Report: {path}")
    return path


def report_after(run: Path) -> Path | None:
    """The page that a training ends with; what stands in its way is only said, for the run itself is whole.

    Of several processes the first one writes it.
    """
    if os.environ.get("RANK", "0") != "0":
        return None
    try:
        path = write_report(run, own_code=True)  # what it names was named just now
    except UserError as error:
        print(f"No report: {first_line(error, 300)}.")
        return None
    print(f"Report: {path}")
    return path


@dataclass(frozen=True)
class Run:
    """What a run folder holds, as far as it can be read; `results` has complete, finite rows only."""

    path: Path
    facts: dict[str, Any]
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    timing: list[dict[str, Any]]
    results: list[dict[str, Any]]
    skipped: list[str]

    @property
    def is_teacher(self) -> bool:
        return self.facts.get("verb") == "train-teacher"

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def is_gan(self) -> bool:
        return self.is_teacher and str(self.config.get("preset")).startswith("stylegan2")

    def last(self, key: str) -> Any:
        """The last logged value of a metric, or None."""
        return next((row[key] for row in reversed(self.metrics) if key in row), None)


def write_report(
    run: Path,
    *,
    rows: list[dict[str, Any]] | None = None,
    title: str | None = None,
    image_count: int = 8,
    own_code: bool = False,
) -> Path:
    """Writes run/report.html, atomically; what is missing on disk becomes a note on the page.

    Args:
        run: folder of `pretrain` or `train-teacher`, finished or not, or one that has only results.jsonl.
        rows: evaluation rows to show instead of those in results.jsonl.
        title: of the page; None: student and teacher, or the folder's name.
        image_count: how many images' feature maps to draw; 0 for none.
        own_code: whether a teacher that is a Python file may be run; a run folder from elsewhere could name any.

    Raises:
        UserError: when the folder is missing, holds nothing to report on, or cannot be written.
    """
    if not run.is_dir():
        raise UserError(f"No folder at '{run}'.", _GIVE)
    it = _read(run, rows)
    if not (it.facts or it.metrics or it.results):
        raise UserError(
            f"'{run}' holds no run: neither config.json nor metrics.jsonl nor results.jsonl can be read.",
            _GIVE,
        )
    sections = [
        ("Results", "", lambda: _results(it)),
        ("Training curves", _CURVES_LEAD, lambda: _curves(it)),
        ("Feature maps", MAPS_LEAD, lambda: _feature_maps(it, image_count, own_code)),
        ("Samples of the teacher", "", lambda: teacher_samples(it.path, it.facts, own_code)),
        ("Load the weights", "", lambda: _usage(it)),
        ("Settings", "", lambda: _settings(it)),
    ]
    body = _header(it, title) + "".join(_section(*section) for section in sections)
    path = run / "report.html"
    checkpoint.write_text(path, page(title or _title(it), body))
    return path


def _read(path: Path, rows: list[dict[str, Any]] | None) -> Run:
    facts = as_dict(RunDir(path).config())
    lists = {}
    for name in ("metrics", "timing", "results"):
        try:
            lists[name] = [row for row in read_rows(path / f"{name}.jsonl") if isinstance(row, dict)]
        except (OSError, ValueError):
            lists[name] = []
    try:
        skipped = (path / "skipped.txt").read_text().splitlines()
    except (OSError, ValueError):
        skipped = []
    results = [
        {"labels": None, "seed": 0, "student": "", **row}
        for row in (lists["results"] if rows is None else rows)
        if {"method", "task", "metric"} <= row.keys() and _is_number(row.get("value"))
    ]
    return Run(path, facts, as_dict(facts.get("config")), lists["metrics"], lists["timing"], results, skipped)


def _section(heading: str, lead: str, make: Callable[[], str]) -> str:
    """A section, or "" when there is nothing to say; what is missing or broken becomes a note."""
    try:
        content = make()
    except Exception as error:  # a page about hours of work must not fail for one picture
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        content = f'<p class="note">Not shown. {esc(" ".join(reason.split()))}</p>'
    if not content:
        return ""
    lead = f'<p class="lead">{lead}</p>' if lead else ""
    return f"<section><h2>{heading}</h2>{lead}{content}</section>\n"


# --- header ------------------------------------------------------------------------------------------------


def _title(it: Run) -> str:
    if it.config.get("student"):
        return f"{it.config['student']} ← {_teacher_name(it)}"
    return str(it.config.get("name") or it.name)


def _teacher_name(it: Run) -> str:
    return str(as_dict(it.facts.get("teacher")).get("name") or it.config.get("teacher") or "unknown teacher")


def _header(it: Run, title: str | None) -> str:
    heading = esc(title or _title(it)).replace("← ", '<span class="from">← ', 1)
    heading += "</span>" * heading.count("<span")
    kind = "An image backbone, taught without labels"
    if it.is_teacher:
        kind = "A StyleGAN2 teacher" if it.is_gan else "A diffusion teacher"
    text = (
        f'<h1>{heading}</h1><p class="lead">{kind if it.config else "Evaluations"} · {esc(str(it.path))}</p>'
    )
    try:
        told = esc(verdict(it.results, it.name) if it.results else _training_verdict(it))
        facts = {name: str(value) for name, value in _facts(it).items() if value}
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # a file that something else wrote
        text += f'<p class="note">config.json or a log holds odd values: {esc(str(error))}.</p>'
        return f"<header>{text}</header>\n"
    for sign in "±=":  # these stay with their number
        told = told.replace(f" {sign} ", f"&nbsp;{sign}&nbsp;")
    text += f'<p class="verdict">{told}</p>' if told else ""
    cells = "".join(
        f"<div{' class=wide' if len(value) > 24 else ''}><dt>{esc(name)}</dt><dd>{esc(value)}</dd></div>"
        for name, value in facts.items()
    )
    return f'<header>{text}{f"""<dl class="facts">{cells}</dl>""" if cells else ""}</header>\n'


def _facts(it: Run) -> dict[str, Any]:
    """What the reader asks first, without dates; empty values are left out by the caller."""
    teacher, images, config = as_dict(it.facts.get("teacher")), as_dict(it.facts.get("data")), it.config
    if it.is_teacher:
        try:
            teacher = read_card(it.path)
        except UserError:
            teacher = {"licence": config.get("licence")}
        network = as_dict(teacher.get("network"))
        images = {"images": teacher.get("images"), "size": network.get("size") or config.get("size")}
    steps, seen = it.last("step"), it.last("images_seen")
    size, parameters = images.get("size") or (), teacher.get("parameters")
    skipped = max(len(it.skipped), images.get("skipped") or 0)
    done = "backbone" if not it.is_teacher else "teacher"
    unfinished = " (unfinished)" if it.metrics and not (it.path / f"{done}.safetensors").exists() else ""
    rates = [row["images_per_s"] for row in it.timing if _is_number(row.get("images_per_s"))]
    return {
        "images": f"{images['images']:,}" if _is_number(images.get("images")) else "",
        "steps": f"{steps:,}{unfinished}" if _is_number(steps) else "",
        "images seen": f"{seen:,}" if _is_number(seen) else "",
        "batch": config.get("batch_size"),
        "image size": " × ".join(str(s) for s in size) + " px" if size else "",
        "timestep t": ", ".join(str(t) for t in teacher.get("t") or ()),
        "feature dataset": config.get("dataset"),
        "parameters": f"{parameters / 1e6:.1f} M" if parameters else "",
        "skipped images": f"{skipped:,}" if config and not it.is_teacher else "",
        "training time": _duration(it.timing),
        "speed": f"{rates[-1]:,.0f} images/s" if rates else "",
        "licence" if it.is_teacher else "teacher's licence": teacher.get("licence"),
    }  # fmt: skip


def _duration(timing: Sequence[Mapping[str, Any]]) -> str:
    """Seconds of training; the clock starts anew at every resumption."""
    seconds = [row["seconds"] for row in timing if _is_number(row.get("seconds"))]
    if not seconds:
        return ""
    total = round(sum(a for a, b in zip(seconds, [*seconds[1:], -1.0], strict=True) if b < a))
    if total < 120:
        return f"{total} s"
    return f"{round(total / 60)} min" if total < 5400 else f"{total / 3600:.1f} h"


def _training_verdict(it: Run) -> str:
    """One sentence from the training alone, "" when too little is logged."""
    if it.is_teacher:
        times = sorted(int(k[6:]) for k in _keys(it.metrics) if k.startswith("loss/t"))
        ends = ", ".join(f"{it.last(f'loss/t{t}'):.3f} at t = {t}" for t in times)
        what = "the loss on fixed images and noise is"
    else:
        levels = _levels(it.metrics, "r2")
        ends = ", ".join(
            f"{max(0.0, it.last(f'r2/{level}')):.0%} at {stride_name(level)}" for level in levels
        )
        what = "the student explains this much of its teacher's features:"
    return f"After {it.last('step'):,} steps {what} {ends}." if ends else ""


# --- results and pictures ----------------------------------------------------------------------------------


def _results(it: Run) -> str:
    if not it.results:
        note = (
            f"No evaluations yet. <code>dreamteacher evaluate --init {esc(str(it.path))} --out "
            f"{esc(str(it.path))}</code> adds them; <code>--init random</code> adds what to compare with."
        )
        return "" if it.is_teacher else f'<p class="note">{note}</p>'
    return results_section(it.results, it.name)


def _feature_maps(it: Run, count: int, own_code: bool) -> str:
    if it.is_teacher or count < 1 or not it.config:
        return ""
    return feature_maps(it.path, it.facts, count, own_code)


# --- curves ------------------------------------------------------------------------------------------------


# Metric -> title, caption, and how `line_chart` draws it.
_CHARTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mse": ("Whitened MSE", "Regressor against the teacher's whitened maps; 1 is what zero maps get.", {}),
    "at": ("Attention transfer", "Distance between the normalised energy maps.", {"log": True}),
    "r2": ("Explained variance, R²", "On a training batch: 0 is channel means, 1 perfect.", {"floor": -1.0}),
    "cosine": ("Cosine similarity", "Of the channel vectors of regressor and teacher.", {}),
    "rankme": ("Effective rank, RankMe", "Directions in use in the backbone's pooled features.", {}),
    "knn": ("kNN accuracy", "An image's class from its neighbours, leave one out: labels watch only.", {}),
    "real_sign": ("Sign of real logits", "Mean; near 1 the discriminator knows the images by heart.", {}),
    "r1": ("R1 penalty", "Squared gradient of the discriminator at real images.", {"log": True}),
    "ada_p": ("Augmentation", "Probability of each disturbance of what the discriminator sees.", {}),
    "lr": ("Learning rate", "Linear warm-up, then a cosine.", {}),
}  # fmt: skip


def _curves(it: Run) -> str:
    if not it.metrics and not it.timing:
        return '<p class="note">No metrics.jsonl yet.</p>' if it.facts else ""
    weight = it.config.get("at_weight")
    weight = f"{weight:g}" if _is_number(weight) else "λ"
    what = f"Whitened MSE plus {weight} × attention transfer, mean over the levels."
    if it.is_teacher:
        what = "Error of the predicted noise at random timesteps, mean since the line before."
    charts = [line_chart("Loss", _lines(it.metrics, "loss"), what, log=True)]
    fixed = [
        Series(f"t = {k[6:]}", _points(it.metrics, k)) for k in _keys(it.metrics) if k.startswith("loss/t")
    ]
    what = "Averaged weights on fixed images and noise: comparable from step to step."
    charts.append(line_chart("Loss at fixed timesteps", fixed, what, log=True))
    duel = [
        Series(who, points)
        for key, who in (("loss/g", "generator"), ("loss/d", "discriminator"))
        if (points := _points(it.metrics, key))
    ]
    charts.append(
        line_chart("Losses", duel, "Each against the other: their balance counts, not their height.")
    )
    for key, (title, caption, how) in _CHARTS.items():
        charts.append(line_chart(title, _lines(it.metrics, key), caption, **how))
    charts.append(
        line_chart("Speed", _lines(it.timing, "images_per_s"), "Images a second, averaged since the start.")
    )
    return f'<div class="grid2">{"".join(charts)}</div>'


def _lines(rows: Sequence[Mapping[str, Any]], key: str) -> list[Series]:
    """One line for `key`, or one per level where it is logged as key/s4, key/s8 ..."""
    whole = _points(rows, key)
    levels = [] if whole else _levels(rows, key)
    lines = [Series(stride_name(level), _points(rows, f"{key}/{level}")) for level in levels]
    return lines or [Series(key, whole)]


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [
        (float(r["step"]), float(r[key]))
        for r in rows
        if _is_number(r.get("step")) and _is_number(r.get(key))
    ]


def _keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _levels(rows: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    return [k.split("/", 1)[1] for k in _keys(rows) if k.startswith(f"{key}/s")]


# --- how to use it, how it was made ------------------------------------------------------------------------


def _usage(it: Run) -> str:
    if it.is_teacher:
        data = "--dataset synthesized --samples 50000" if it.is_gan else "--images FOLDER"
        command = f"dreamteacher pretrain --teacher {it.path} {data} --out runs/student"
        return f"<p>Teach a backbone with it:</p><pre>{esc(command)}</pre>"
    if not it.config.get("student"):
        return ""
    if not (it.path / "backbone.safetensors").is_file():
        return '<p class="note">The run has not finished: the command that started it resumes it.</p>'
    snippet = load_snippet(it.path, str(it.config["student"]), "backbone.safetensors")
    return f"<p>The backbone loads in plain timm, without dreamteacher:</p><pre>{esc(snippet)}</pre>"


def _settings(it: Run) -> str:
    text = ""
    if it.facts:
        lines = "".join(f"<tr><th>{esc(k)}</th><td>{esc(v)}</td></tr>" for k, v in _flat("", it.facts))
        table = f'<table class="settings"><tbody>{lines}</tbody></table>'
        text = f"<details><summary>Every setting (config.json)</summary>{table}</details>"
    if it.skipped:
        more = f" (first 20 of {len(it.skipped)})" if len(it.skipped) > 20 else ""
        files = "".join(f"<li>{esc(line)}</li>" for line in it.skipped[:20])
        text += f'<details><summary>Skipped images{more}</summary><ul class="files">{files}</ul></details>'
    return text


def _flat(prefix: str, value: Any) -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text) pairs."""
    if isinstance(value, dict) and value:
        return [pair for k, v in value.items() for pair in _flat(f"{prefix}.{k}" if prefix else str(k), v)]
    if isinstance(value, list):
        return [(prefix, ", ".join(str(v) for v in value) or "–")]
    return [(prefix, "–" if value is None or value == {} else str(value))]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
