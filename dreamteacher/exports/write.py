"""Export: a finished run as a folder that plain timm loads, with a model card beside the weights.

Other libraries' formats are in `export_formats`; what they share (reading the run, the card, the one rename that
makes the folder whole) is here."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dreamteacher import __version__
from dreamteacher.exports.config import Format
from dreamteacher.exports.formats import Layout, check_format, layout
from dreamteacher.exports.hub import LICENCE_FILE, OTHER, check_hub, front_matter, licence_text
from dreamteacher.exports.onnx import check_onnx, write_onnx
from dreamteacher.metrics import spread
from dreamteacher.models.plain_vit import fitting, grid_of, rebuilt_with, size_settings
from dreamteacher.models.student import (
    Student,
    create_student,
    level_indices,
    load_weights,
    normalisation,
    read_weights,
    weight_file,
)
from dreamteacher.runtime.config import parse_json
from dreamteacher.runtime.errors import UserError, shorten
from dreamteacher.runtime.run_folder import read_rows

FILES = ("model.safetensors", "config.json", "README.md")
# What a folder may hold to be taken for an earlier export.
KNOWN_FILES = (*FILES, "model.onnx", LICENCE_FILE)
UNKNOWN = "not recorded"

# What the card shows of the run's settings, in this order, when the run has them.
_SETTINGS = (
    "size", "t", "noise", "init", "epochs", "steps", "batch_size", "optimizer", "lr", "weight_decay", "axes",
    "at_weight", "width", "flip", "seed",
)  # fmt: skip


def export(
    run: Path,
    out: Path | None = None,
    *,
    overwrite: bool = False,
    format: Format = "timm",
    licence: str = OTHER,
    datasets: Sequence[str] = (),
) -> Path:
    """Writes the weights (model.safetensors, or model.onnx) and README.md, all or nothing.

    The formats timm and hub have timm's names and config.json beside them (timm's hub style).

    Args:
        run: folder of a finished run: backbone.safetensors, and config.json, metrics.jsonl, results.jsonl
            as far as they exist; the card says what was not recorded.
        out: folder to make; None is "export" inside the run folder.
        overwrite: replace an earlier export. A folder with anything else in it is never replaced.
        format: one of `export_formats.FORMATS`.
        licence: identifier of the model hub; only for the format hub.
        datasets: identifiers of the model hub; only for the format hub.

    Returns:
        The folder. Of timm's format: `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it; `load_snippet` shows
        the way by name.

    Raises:
        UserError: when the run has no backbone, its weights do not fit, the format has no such network, or
            `out` cannot be written.
    """
    _check_settings(format, licence, datasets)
    out = run / "export" if out is None else out
    _check_out(out, overwrite)
    if not run.is_dir():
        raise UserError(f"No run folder at '{run}'.", "Give the --out folder of a `dreamteacher pretrain`.")
    source = weight_file(str(run))
    if source.name != "backbone.safetensors":
        raise UserError(f"'{run}' is an export already, not a run folder.", "Copy it as it is.")
    weights = read_weights(source)
    facts = _read_config(run)
    name = weights.metadata.get("student") or facts.get("config", {}).get("student")
    if not name:
        raise UserError(
            f"Neither '{source}' nor its config.json says which student it is.",
            "Give a run folder that `dreamteacher pretrain` wrote.",
        )
    student = create_student(name)
    load_weights(student.model, weights, name=name, source=str(source))
    made = None if format in ("timm", "hub") else layout(format, student)
    front, load = _front(made, format, licence, datasets), _load(student, made, format)
    metrics, results = (read_rows(run / f"{rows}.jsonl") for rows in ("metrics", "results"))
    contents = {"README.md": model_card(student, facts, metrics, results, front=front, load=load)}
    if made is None:
        contents["config.json"] = json.dumps(_timm_config(student, facts), indent=2) + "\n"
    if format == "hub" and licence == OTHER:
        contents[LICENCE_FILE] = _licence_text(facts)
    _write_folder(out, student, contents, student.model.state_dict() if made is None else made.tensors)
    return out


def load_snippet(folder: Path | str, name: str, file: str = "model.safetensors") -> str:
    """Python that loads the weights with timm alone, complete and ready to copy.

    Args:
        folder: folder of the weights, as the reader would type it.
        name: timm name of the student.
        file: "backbone.safetensors" for a run folder.
    """
    settings = "".join(f", {key}={value}" for key, value in size_settings(name).items())
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, **size_settings(name))
    indices, grid = level_indices(name, model), grid_of(model)
    mean, std = normalisation(model)
    strides = f"strides {', '.join(map(str, indices))}"
    norm, (side, _) = "", fitting((224, 224), grid)
    vectors = "maps[-1].mean(dim=(2, 3))"
    if grid is not None:
        strides, norm = f"one map, a position for {grid.patch} x {grid.patch} pixels", ", norm=True"
        if model.global_pool:
            vectors = "model.forward_head(model.forward_features((images - mean) / std), pre_logits=True)"
    return f"""import timm
import torch
from safetensors.torch import load_file

folder = {json.dumps(str(folder), ensure_ascii=False)}  # where {file} lies
model = timm.create_model("{name}", num_classes=0{settings})
model.load_state_dict(load_file(folder + "/{file}"), strict=True)
model.eval()

images = torch.rand(1, 3, {side}, {side})  # yours: RGB in [0, 1]
mean = torch.tensor({list(mean)}).view(3, 1, 1)
std = torch.tensor({list(std)}).view(3, 1, 1)
with torch.no_grad():
    maps = model.forward_intermediates(
        (images - mean) / std, indices={list(indices.values())}, intermediates_only=True{norm}
    )  # {strides}
    vectors = {vectors}
print([tuple(m.shape) for m in maps], tuple(vectors.shape))
"""


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


def _front(made: Layout | None, format: Format, licence: str, datasets: Sequence[str]) -> str:
    """The YAML block of a format; the hub's is as complete as the hub wants it."""
    if format == "hub":
        return front_matter(licence, datasets)
    library = "timm" if made is None else made.library
    lines = [] if library is None else [f"library_name: {library}"]
    lines.append(f"tags: [{format}, image-feature-extraction, dreamteacher]")
    return "\n".join(["---", *lines, "---", ""])


def _load(student: Student, made: Layout | None, format: Format) -> str:
    """The card's section on loading: what to install, the code, what to know."""
    if made is None:
        install, snippet = "timm safetensors", load_snippet(".", student.name)
        notes = """With timm 1.0.16 or newer, `timm.create_model("local-dir:.", pretrained=True, num_classes=10)` makes the
same with a new classifier, to fine-tune. Layers after the last map, where there are any, were not trained."""
        if format == "hub":
            notes += """
Once this folder lies on the model hub, `timm.create_model("hf-hub:OWNER/NAME", pretrained=True)` loads it from
there."""
    else:
        install, snippet, notes = made.install, made.snippet, made.notes
    return f"""Run it in the folder of this file, with `pip install {install}`:

```python
{snippet.rstrip()}
```

{notes}"""


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


def _read_config(run: Path) -> dict[str, Any]:
    path = run / "config.json"
    if not path.exists():
        return {}
    try:
        facts = parse_json(path.read_text())
    except ValueError as error:
        raise UserError(
            f"'{path}' is not JSON ({error}).", "Restore it, or delete it: the card will say so."
        ) from error
    return facts if isinstance(facts, dict) else {}


def _timm_config(student: Student, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What timm's hub loader reads; the images' size is that of the pretraining where it is known."""
    model: Any = student.model
    cfg = dict(model.pretrained_cfg)
    mean, std = normalisation(model)
    size = (facts.get("data") or {}).get("size") or (facts.get("config") or {}).get("size")
    height, width = (size, size) if isinstance(size, int) else size or cfg["input_size"][1:]
    height, width = fitting((height, width), student.grid)
    settings = rebuilt_with(student.name, model)
    return {
        "architecture": cfg["architecture"],
        "num_classes": 0,
        "num_features": model.num_features,
        **({"model_args": settings} if settings else {}),
        "pretrained_cfg": {
            "input_size": [3, height, width],
            "fixed_input_size": False,
            "interpolation": cfg["interpolation"],
            "crop_pct": 1.0,
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": cfg["first_conv"],
            "classifier": cfg["classifier"],
            "custom_load": False,
        },
    }


def _licence_text(facts: Mapping[str, Any]) -> str:
    config, teacher = facts.get("config") or {}, facts.get("teacher") or {}
    made = config.get("dataset") == "synthesized"
    images = config.get("images") or ("the teacher's own" if made else None)
    name = teacher.get("name") or config.get("teacher")
    return licence_text(_text(name), _text(teacher.get("licence")), _text(images))


def _check_settings(format: str, licence: str, datasets: Sequence[str]) -> None:
    """What is wrong before anything is read."""
    check_format(format)
    check_hub(licence, datasets)
    if format != "hub" and (licence != OTHER or datasets):
        raise UserError(
            f"A licence and datasets are for the model hub, and the format is {format}.",
            "Add --format hub, or leave them out.",
        )
    if format == "onnx":
        check_onnx()


def _check_out(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"'{out}' is a file, not a folder.", "Choose another --out.")
    foreign = sorted(p.name for p in out.iterdir() if p.name not in KNOWN_FILES)
    if foreign:
        raise UserError(f"'{out}' holds other files ({shorten(foreign)}).", "Choose another --out.")
    if any(out.iterdir()) and not overwrite:
        raise UserError(f"'{out}' holds an export already.", "Add --overwrite, or choose another --out.")


def _write_folder(
    out: Path, student: Student, contents: Mapping[str, str], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Everything into a temporary folder beside `out`, then one rename: `out` is whole or as it was.

    Without tensors, the weights are written as an ONNX graph.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    replaced = out.with_name(f".{out.name}.{os.getpid()}.old")
    # Channels-last weights are made row-major: safetensors stores nothing else.
    state = {k: v.detach().contiguous() for k, v in tensors.items()}
    metadata = {"format": "pt", "student": student.name, "producer": f"dreamteacher {__version__}"}
    try:
        temporary.mkdir(parents=True)
        if state:
            save_file(state, temporary / "model.safetensors", metadata)
        else:
            write_onnx(student, temporary / "model.onnx")
        for file, text in contents.items():
            (temporary / file).write_text(text, encoding="utf-8")
        if out.exists():
            out.rename(replaced)
        temporary.rename(out)
    except (OSError, SafetensorError) as error:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        problem = f"The export could not be written to '{out}': {str(error).splitlines()[0]}."
        raise UserError(problem, "Free space, mend the permissions, or choose another --out.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
