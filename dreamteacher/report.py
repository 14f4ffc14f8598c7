"""One self-contained HTML page about a run: what came out, how training went, what the maps look like."""

from __future__ import annotations

import html
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import make_grid

from dreamteacher import __version__, checkpoint, metrics
from dreamteacher.distributed import pick_device
from dreamteacher.downstream import HEADLINE, SEGMENTATION, Separation, row_title, separated
from dreamteacher.errors import UserError
from dreamteacher.export import load_snippet
from dreamteacher.features import FeatureSpec
from dreamteacher.figures import STYLE, Dots, Series, data_uri, dot_plot, line_chart, pca_basis, pca_colours
from dreamteacher.images import BadImageError, find_images, read_image
from dreamteacher.losses import whiten
from dreamteacher.regressor import FeatureRegressor
from dreamteacher.rundir import RunDir, read_rows
from dreamteacher.students import create_student, read_weights
from dreamteacher.teachers import WEIGHTS, load_teacher, read_card, sha256, teacher_folder
from dreamteacher.teachers.base import Teacher
from dreamteacher.teachers.diffusion import DiffusionTeacher

TASKS = {
    "segment-frozen": "segmentation, frozen backbone", "segment-linear": "segmentation, linear per pixel",
    "segment-finetune": "segmentation, fine-tuned", "linear": "linear probe", "finetune": "fine-tuning",
    "knn": "nearest neighbours",
}  # fmt: skip
METRICS = {"miou": "mIoU", "auroc": "AUROC", "balanced_accuracy": "balanced accuracy"}
BASELINES = ("random init", "labels only", "ImageNet")
_GIVE = "Give the --out folder of pretrain, train-teacher or evaluate."
_CURVES_LEAD = "Against optimizer steps; a pointer on a line shows its values."
_SAMPLES, _SAMPLING_STEPS, _PATIENCE = 16, 25, 120.0

esc = html.escape


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write report.html into a run folder: one page without any outside resource."""

    run: Path
    """Folder of a pretraining, of a teacher's training, or one with a results.jsonl."""
    images: int = 8
    """Images whose feature maps are drawn; 0: none."""


def report(config: ReportConfig) -> Path:
    """The verb: writes the page and says where it is."""
    path = write_report(config.run, images=config.images)
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

    def last(self, key: str) -> Any:
        """The last logged value of a metric, or None."""
        return next((row[key] for row in reversed(self.metrics) if key in row), None)


def write_report(
    run: Path, *, rows: list[dict[str, Any]] | None = None, title: str | None = None, images: int = 8
) -> Path:
    """Writes run/report.html, atomically; what is missing on disk becomes a note on the page.

    Args:
        run: folder of `pretrain` or `train-teacher`, finished or not, or one that has only results.jsonl.
        rows: evaluation rows to show instead of those in results.jsonl.
        title: of the page; None: student and teacher, or the folder's name.
        images: how many images' feature maps to draw; 0 for none.

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
        ("Feature maps", _MAPS_LEAD, lambda: _feature_maps(it, images)),
        ("Samples of the teacher", "", lambda: _samples(it)),
        ("Load the weights", "", lambda: _usage(it)),
        ("Settings", "", lambda: _settings(it)),
    ]
    body = _header(it, title) + "".join(_section(*section) for section in sections)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{esc(title or _title(it))}</title>\n<style>{STYLE}</style></head>\n<body><main>\n{body}\n"
        f"<footer>Written by dreamteacher {__version__}. This page needs no network.</footer>\n"
        "</main></body></html>\n"
    )
    path = run / "report.html"
    checkpoint.write_text(path, page)
    return path


def _read(path: Path, rows: list[dict[str, Any]] | None) -> Run:
    facts = _dict(RunDir(path).config())
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
    return Run(path, facts, _dict(facts.get("config")), lists["metrics"], lists["timing"], results, skipped)


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
    return str(it.config.get("name") or it.path.resolve().name)


def _teacher_name(it: Run) -> str:
    return str(_dict(it.facts.get("teacher")).get("name") or it.config.get("teacher") or "unknown teacher")


def _header(it: Run, title: str | None) -> str:
    heading = esc(title or _title(it)).replace("← ", '<span class="from">← ', 1)
    heading += "</span>" * heading.count("<span")
    kind = "A diffusion teacher" if it.is_teacher else "An image backbone, taught without labels"
    text = (
        f'<h1>{heading}</h1><p class="lead">{kind if it.config else "Evaluations"} · {esc(str(it.path))}</p>'
    )
    try:
        verdict = esc(_verdict(it) if it.results else _training_verdict(it))
        facts = {name: str(value) for name, value in _facts(it).items() if value}
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # a file that something else wrote
        text += f'<p class="note">config.json or a log holds odd values: {esc(str(error))}.</p>'
        return f"<header>{text}</header>\n"
    for sign in "±=":  # these stay with their number
        verdict = verdict.replace(f" {sign} ", f"&nbsp;{sign}&nbsp;")
    text += f'<p class="verdict">{verdict}</p>' if verdict else ""
    cells = "".join(
        f"<div{' class=wide' if len(value) > 24 else ''}><dt>{esc(name)}</dt><dd>{esc(value)}</dd></div>"
        for name, value in facts.items()
    )
    return f'<header>{text}{f"""<dl class="facts">{cells}</dl>""" if cells else ""}</header>\n'


def _facts(it: Run) -> dict[str, Any]:
    """What the reader asks first, without dates; empty values are left out by the caller."""
    teacher, images, config = _dict(it.facts.get("teacher")), _dict(it.facts.get("data")), it.config
    if it.is_teacher:
        try:
            teacher = read_card(it.path)
        except UserError:
            teacher = {"licence": config.get("licence")}
        network = _dict(teacher.get("network"))
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
        ends = ", ".join(f"{max(0.0, it.last(f'r2/{level}')):.0%} at {_stride(level)}" for level in levels)
        what = "the student explains this much of its teacher's features:"
    return f"After {it.last('step'):,} steps {what} {ends}." if ends else ""


# --- results -----------------------------------------------------------------------------------------------

Key = tuple[str, Any, str]  # task, labels, metric


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


def _compare(it: Run) -> Comparison:
    several = len({row["student"] for row in it.results}) > 1
    name = "{method}, {student}" if several else "{method}"
    rows = [{**row, "method": name.format(**row)} for row in it.results]
    latest = {((r["task"], r["labels"], r["metric"]), r["method"], r["seed"]): r["value"] for r in rows}
    groups: dict[Key, dict[str, list[float]]] = {}
    for key, method, seed in sorted(latest, key=lambda k: _rank(k[0])):
        groups.setdefault(key, {}).setdefault(method, []).append(float(latest[key, method, seed]))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    own = [m for m in methods if m.lower().startswith("dreamteacher") or m == it.path.resolve().name]
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
    unit = "masks" if task in SEGMENTATION else "labels per class"
    amount = "all labels" if labels is None else f"{labels} {unit}"
    return TASKS.get(task, str(task)), amount, METRICS.get(metric, str(metric)).replace("iou/", "IoU of ")


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def _apart(c: Comparison, key: Key) -> Separation | None:
    return c.apart.get(row_title(dict(zip(("task", "labels", "metric"), key, strict=True))))


def _deviations(found: Separation) -> str:
    known = found.deviations is not None and math.isfinite(found.deviations)
    return f"{found.deviations:+.1f} deviations" if known else ""


def _verdict(it: Run) -> str:
    """One sentence: the first result in a fixed order, and in how many results our method leads."""
    c = _compare(it)
    both = [k for k in c.groups if k[2] == HEADLINE.get(k[0]) and _apart(c, k)]
    if not both or c.ours is None or c.baseline is None:
        return ""
    task, amount, metric = _words(both[0])
    group, found = c.groups[both[0]], _apart(c, both[0])
    apart = _deviations(found) if found else ""
    text = (
        f"With {amount}, {task}: {c.ours} reaches {_spread(group[c.ours])} {metric} against "
        f"{_spread(group[c.baseline])} for {c.baseline}" + (f" ({apart})" if apart else "")
    )
    means = [{m: statistics.mean(v) for m, v in c.groups[k].items()} for k in both]
    first = sum(m[c.ours] == max(m.values()) for m in means)
    return text + (f"; it is the best of all in {first} of {len(both)} results." if len(both) > 1 else ".")


def _results(it: Run) -> str:
    if not it.results:
        note = (
            f"No evaluations yet. <code>dreamteacher evaluate --init {esc(str(it.path))} --out "
            f"{esc(str(it.path))}</code> adds them; <code>--init random</code> adds what to compare with."
        )
        return "" if it.is_teacher else f'<p class="note">{note}</p>'
    c = _compare(it)
    headline = [k for k in c.groups if k[2] == HEADLINE.get(k[0], k[2])]
    others = [k for k in c.groups if k not in headline]
    plots = ""
    for key in headline[:12]:
        dots = [Dots(m, c.groups[key][m], m == c.ours) for m in c.methods if m in c.groups[key]]
        plots += dot_plot(", ".join(_words(key)), dots)
    text = _result_table(c, headline)
    text += f'<p class="caption">{_RESULTS_CAPTION}</p><div class="grid2">{plots}</div>'
    if others:
        text += (
            f"<details><summary>Other metrics ({len(others)})</summary>{_result_table(c, others)}</details>"
        )
    return text


def _result_table(c: Comparison, keys: Sequence[Key]) -> str:
    head = "".join(f"<th{' class=ours' if m == c.ours else ''}>{esc(m)}</th>" for m in c.methods)
    gap = f"<th>difference to<br>{esc(c.baseline)}</th>" if c.baseline else ""
    lines = ""
    for key in keys:
        task, amount, metric = _words(key)
        means = {m: f"{statistics.mean(v):.3f}" for m, v in c.groups[key].items()}
        lines += f"<tr><td>{esc(task)}<br><small>{esc(amount)}, {esc(metric)}</small></td>"
        for method in c.methods:
            text = _spread(c.groups[key][method]) if method in means else "–"
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


_RESULTS_CAPTION = (
    "Mean ± sample standard deviation over seeds, higher is better; the best mean of a row is bold. The last "
    "column is in units of the larger of the two deviations. In the plots a ring is one seed, a dot the mean."
)


# --- curves ------------------------------------------------------------------------------------------------


# Metric -> title, caption, and how `line_chart` draws it.
_CHARTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mse": ("Whitened MSE", "Regressor against the teacher's whitened maps; 1 is what zero maps get.", {}),
    "at": ("Attention transfer", "Distance between the normalised energy maps.", {"log": True}),
    "r2": ("Explained variance, R²", "On a training batch: 0 is channel means, 1 perfect.", {"floor": -1.0}),
    "cosine": ("Cosine similarity", "Of the channel vectors of regressor and teacher.", {}),
    "rankme": ("Effective rank, RankMe", "Directions in use in the backbone's pooled features.", {}),
    "knn": ("kNN accuracy", "An image's class from its neighbours, leave one out: labels watch only.", {}),
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
    lines = [Series(_stride(level), _points(rows, f"{key}/{level}")) for level in levels]
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


def _stride(level: str) -> str:
    return f"stride {level[1:]}"


# --- pictures ----------------------------------------------------------------------------------------------

_MAPS_LEAD = (
    "The first three principal components of a level's features as red, green and blue. Teacher and "
    "regressor share one basis and one range, fitted on the teacher's whitened maps: equal colours mean "
    "equal features. Where the regressor is paler it predicts less: it has not learned that, or it comes "
    "from the noise that the teacher was given. The backbone, which is what is kept, has a basis of its own."
)


@torch.no_grad()
def _feature_maps(it: Run, count: int) -> str:
    if it.is_teacher or count < 1 or not it.config:
        return ""
    device = pick_device("auto")
    images = _pick_images(it, count)
    teacher = _teacher(it).to(device)
    student = create_student(str(it.config["student"])).to(device).eval()
    regressor = (
        FeatureRegressor(student.specs, teacher.specs, width=int(it.config["width"])).to(device).eval()
    )
    weights, source = _trained(it.path)
    checkpoint.load_exactly(student.model, _under("student.model.", weights), source)
    checkpoint.load_exactly(regressor, _under("regressor.", weights), source)
    x = (images.float() / 255).to(device)
    targets = [m.float() for m in teacher.encode(x, generator=torch.Generator(device).manual_seed(0))]
    backbone = student(x)
    outputs = regressor(backbone, [(m.shape[-2], m.shape[-1]) for m in targets])
    cells = _strip("image", images, "image", kind="photo")
    for i, spec in enumerate(teacher.specs):
        target = whiten(targets[i], it.config.get("whiten", "chw"))
        cells += _level(spec, target, outputs[i], backbone[regressor.sources[i]])
    return f'<div class="card scroll"><div class="maps" style="--n:{len(images)}">{cells}</div></div>'


def _level(spec: FeatureSpec, target: Tensor, output: Tensor, features: Tensor) -> str:
    """Three rows of maps: the whitened teacher and the regressor in one basis, the backbone in its own."""
    name, basis = _stride(spec.name), pca_basis(target)
    facts = (
        f"{target.shape[-2]} × {target.shape[-1]} positions, {spec.channels} channels of the teacher, "
        f"{features.shape[1]} of the backbone · on these images R² {metrics.r2(output, target):.2f}, cosine "
        f"{metrics.cosine(output, target):.2f}"
    )
    return (
        f"<strong>{name}<small>{facts}</small></strong>"
        + _strip("teacher", pca_colours(target, basis), f"teacher, {name}")
        + _strip("regressor", pca_colours(output, basis), f"regressor, {name}")
        + _strip("backbone", pca_colours(features, pca_basis(features)), f"backbone, {name}")
    )


def _strip(label: str, images: Tensor, what: str, *, kind: str = "map") -> str:
    """A row of images uint8 N x 3 x H x W; maps keep their resolution, the browser enlarges them."""
    cells = (
        f'<img class="{kind}" src="{data_uri(image, 256)}" alt="{what} {i + 1}">'
        for i, image in enumerate(images)
    )
    return f"<span>{label}</span>{''.join(cells)}\n"


def _pick_images(it: Run, count: int) -> Tensor:
    """`count` readable images at even distances in the run's folder, uint8 N x 3 x H x W."""
    if not it.config.get("images"):
        raise UserError("This run has no image folder.", "Its teacher synthesized the images.")
    height, width = _dict(it.facts.get("data")).get("size") or it.config["size"]
    paths = find_images(Path(it.config["images"]))
    found: list[Tensor] = []
    for i in range(min(count, len(paths))):
        first = i * len(paths) // min(count, len(paths))
        for path in paths[first : first + 8]:  # a damaged one gives way to its neighbour
            try:
                found.append(read_image(path, (height, width)))
                break
            except BadImageError:
                continue
    if not found:
        raise UserError(f"No image in '{it.config['images']}' can be read.", "")
    return torch.stack(found)


def _teacher(it: Run) -> Teacher:
    """The run's teacher, as it was: same timesteps, same noise, and the same weights."""
    facts, name = _dict(it.facts.get("teacher")), str(it.config["teacher"])
    wanted = facts.get("sha256")
    if wanted and sha256(teacher_folder(name) / WEIGHTS) != wanted:
        raise UserError(f"The teacher in '{name}' is no longer the one of this run (sha256 differs).", "")
    timesteps = tuple(facts.get("t") or it.config.get("t") or ())
    return load_teacher(name, timesteps=timesteps, noise=it.config.get("noise", "stochastic"))


def _trained(run: Path) -> tuple[dict[str, Tensor], Path]:
    """student.model.* and regressor.* tensors: the exported ones, else the newest checkpoint's."""
    files = {"student.model.": run / "backbone.safetensors", "regressor.": run / "regressor.safetensors"}
    if all(path.is_file() for path in files.values()):
        tensors = {p + k: v for p, path in files.items() for k, v in read_weights(path).tensors.items()}
        return tensors, files["student.model."]
    newest = checkpoint.latest(run)
    if newest is None:
        raise UserError("The run has no weights yet.", "They come with its first checkpoint.")
    tensors, _ = checkpoint.load(newest)
    return _under("ema/", tensors) or _under("trained/", tensors), newest


def _samples(it: Run) -> str:
    """The sample sheet that lies beside the teacher's weights; without one, new samples if they are cheap."""
    if not it.is_teacher and not it.config.get("teacher"):
        return ""
    folder = it.path if it.is_teacher else teacher_folder(str(it.config["teacher"]))
    if (folder / "samples.png").is_file():
        with Image.open(folder / "samples.png") as file:
            sheet = pil_to_tensor(file.convert("RGB"))
        what = "Images that the teacher made from noise: what it knows is what the student can learn from it."
    elif it.is_teacher:
        return '<p class="note">No samples.png yet: it comes with the first validation.</p>'
    else:
        sheet = make_grid(_generate(_teacher(it)).cpu(), nrow=8, padding=2, pad_value=1.0)
        sheet = (sheet.clamp(0, 1) * 255).round().to(torch.uint8)
        what = f"{_SAMPLES} images that the teacher made from noise, in few steps: its best are better."
    picture = f'<img src="{data_uri(sheet, 1100)}" alt="samples of the teacher">'
    return f'<figure class="card sheet">{picture}<figcaption>{what}</figcaption></figure>'


def _generate(teacher: Teacher) -> Tensor:
    """New images, float RGB in [0, 1]; a UserError where they would take more than `_PATIENCE` seconds."""
    device = pick_device("auto")
    generator = torch.Generator(device).manual_seed(0)
    teacher = teacher.to(device)
    if not isinstance(teacher, DiffusionTeacher):
        return teacher.sample(_SAMPLES, generator=generator)[0]
    teacher.sampling_steps = 1
    begin = time.perf_counter()
    teacher.generate(1, generator=generator)
    seconds = (time.perf_counter() - begin) * _SAMPLES * _SAMPLING_STEPS
    if seconds > _PATIENCE:
        raise UserError(f"New samples would take about {seconds / 60:.0f} minutes on this machine.", "")
    teacher.sampling_steps = _SAMPLING_STEPS
    return teacher.generate(_SAMPLES, generator=generator)


# --- how to use it, how it was made ------------------------------------------------------------------------


def _usage(it: Run) -> str:
    if it.is_teacher:
        command = f"dreamteacher pretrain --teacher {it.path} --images FOLDER --out runs/student"
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


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
