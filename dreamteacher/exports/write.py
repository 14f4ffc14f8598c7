"""Export: a finished run as a folder that another library loads, with a model card beside the weights.

The formats are in `formats`, one file each; reading the run and the one rename that makes the folder whole are here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from dreamteacher import __version__
from dreamteacher.exports.card import front_block, load_section, model_card
from dreamteacher.exports.config import OTHER, ExportConfig
from dreamteacher.exports.format import Exported, Format, check_knows, find_format
from dreamteacher.exports.formats import FORMATS
from dreamteacher.models.student import Student, create_student, load_weights, read_weights, weight_file
from dreamteacher.runtime.config import parse_json
from dreamteacher.runtime.errors import UserError, first_line, shorten
from dreamteacher.runtime.run_folder import read_rows

CARD = "README.md"


def export(config: ExportConfig) -> Path:
    """The verb: writes the export and says where it is."""
    out = write_export(config)
    print(f"Export: {out}")
    return out


def write_export(config: ExportConfig) -> Path:
    """Writes weights, README.md and what the format wants beside them, all or nothing.

    The run folder needs backbone.safetensors; of config.json, metrics.jsonl and results.jsonl, the card says what
    was not recorded.

    Returns:
        The folder. Of timm's format: `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it;
        `timm.load_snippet` shows the way by name.

    Raises:
        UserError: when the run has no backbone, its weights do not fit, the format has no such network, or
            `out` cannot be written.
    """
    format, run = find_format(config.format), config.run
    _check_settings(config)
    format.check(config)
    out = run / "export" if config.out is None else config.out
    _check_out(out, config.overwrite)
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
    check_knows(format, student)
    made = format.make(student, facts, config)
    metrics, results = (read_rows(run / f"{rows}.jsonl") for rows in ("metrics", "results"))
    front, load = front_block(format, made), load_section(made)
    card = model_card(student, facts, metrics, results, front=front, load=load)
    _write_folder(out, student, format, made, {CARD: card, **made.files})
    return out


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


def _check_settings(config: ExportConfig) -> None:
    """What is wrong with settings of another format."""
    if config.format != "hub" and (config.licence != OTHER or config.datasets):
        raise UserError(
            f"A licence and datasets are for the model hub, and the format is {config.format}.",
            "Add --format hub, or leave them out.",
        )


def _known_files() -> set[str]:
    """What a folder may hold to be taken for an earlier export."""
    formats = [find_format(name) for name in FORMATS]
    return {CARD}.union(*({format.weights, *format.files} for format in formats))


def _check_out(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"'{out}' is a file, not a folder.", "Choose another --out.")
    known = _known_files()
    foreign = sorted(p.name for p in out.iterdir() if p.name not in known)
    if foreign:
        raise UserError(f"'{out}' holds other files ({shorten(foreign)}).", "Choose another --out.")
    if any(out.iterdir()) and not overwrite:
        raise UserError(f"'{out}' holds an export already.", "Add --overwrite, or choose another --out.")


def _write_folder(
    out: Path, student: Student, format: Format, made: Exported, contents: Mapping[str, str]
) -> None:
    """Everything into a temporary folder beside `out`, then one rename: `out` is whole or as it was."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    replaced = out.with_name(f".{out.name}.{os.getpid()}.old")
    # Channels-last weights are made row-major: safetensors stores nothing else.
    state = {k: v.detach().contiguous() for k, v in made.tensors.items()}
    metadata = {"format": "pt", "student": student.name, "producer": f"dreamteacher {__version__}"}
    try:
        temporary.mkdir(parents=True)
        if format.write is None:
            save_file(state, temporary / format.weights, metadata)
        else:
            format.write(student, temporary / format.weights)
        for file, text in contents.items():
            (temporary / file).write_text(text, encoding="utf-8")
        if out.exists():
            out.rename(replaced)
        temporary.rename(out)
    except (OSError, SafetensorError) as error:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        problem = f"The export could not be written to '{out}': {first_line(error)}."
        raise UserError(problem, "Free space, mend the permissions, or choose another --out.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
