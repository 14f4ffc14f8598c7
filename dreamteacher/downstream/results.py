"""results.jsonl of `evaluate`: each row with a key of all that decides it, so that nothing is computed twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from dreamteacher import __version__
from dreamteacher.data.layouts.table import layout_of
from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.downstream.features import device_of
from dreamteacher.downstream.loop import Saved
from dreamteacher.downstream.task import Task
from dreamteacher.downstream.tasks import Row
from dreamteacher.models.student import Student
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.config import to_json
from dreamteacher.runtime.distributed.device import resolve_precision
from dreamteacher.runtime.run_folder import RunDir, read_rows

# Settings of tasks that decide no number: the budgets, each of which is a result of its own, and what changes speed only.
_NO_MATTER = ("mask_counts", "image_counts", "workers")


class Results:
    """The rows of a method in a folder (which exists), and the checkpoints of their trainings."""

    def __init__(self, out: Path, config: EvaluateConfig, method: str) -> None:
        self.out, self.config, self.method = out, config, method
        self.path = out / "results.jsonl"
        self.reused: set[str] = set()
        self._data: dict[Path, str] = {}
        self._weights: tuple[Student, str] | None = None

    def facts(self, student: Student, task: Task, budget: int | None, seed: int) -> dict[str, Any]:
        """All that decides the numbers of one task: code, weights, data, settings, seed, precision."""
        c, device = self.config, device_of(student)
        everything, group = to_json(c), task.group
        own = (*((task.field,) if task.config else ()), *task.settings)
        facts: dict[str, Any] = {
            "version": __version__, "task": task.name, "labels": budget, "seed": seed, "student": student.name,
            "weights": self._weights_of(student), "device": device.type,
            "precision": str(resolve_precision(device, c.precision)), "size": list(c.size),
            "settings": _decisive({name: everything[name] for name in own}),
            "data": {name: self._listed(name) for name in group.places},
            "reading": {name: everything[name] for name in group.settings},
        }  # fmt: skip
        if files := task.files(c):
            facts["files"] = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()]
        return facts

    def found(self, facts: dict[str, Any]) -> list[Row]:
        """The rows of these facts that are there already; none: they are to be computed."""
        key = key_of(facts)
        rows = [r for r in read_rows(self.path) if r.get("key") == key and r.get("method") == self.method]
        if rows:
            self.reused.add(key)
            shutil.rmtree(self._folder(facts), ignore_errors=True)  # of a kill just after they were written
        return rows

    def training(self, task: Task, facts: dict[str, Any]) -> contextlib.AbstractContextManager[Saved | None]:
        """Within: where the training of these facts is kept; None for a short one."""
        if not task.long:
            return contextlib.nullcontext()
        return Saved(self._folder(facts), facts, self.config.save_minutes, log_to=self.config.log_to)

    def add(self, rows: Sequence[Row], facts: dict[str, Any]) -> list[Row]:
        """Writes the rows of one task, all or none, and returns them with their key; its checkpoint goes.

        A UserError where the disk is full.
        """
        rows = [{**row, "key": key_of(facts)} for row in rows]
        with FileLock(self.out / ".results.lock"):  # several evaluations may share the folder
            text = self.path.read_text("utf-8", "surrogateescape") if self.path.exists() else ""
            text += "" if text.endswith("\n") or not text else "\n"
            checkpoint.write_text(self.path, text + "".join(json.dumps(row) + "\n" for row in rows))
        shutil.rmtree(self._folder(facts), ignore_errors=True)
        return rows

    def check(self, student: Student) -> None:
        """Raises UserError where the disk has no room for checkpoints of a network of this size."""
        weights = sum(p.numel() for p in student.parameters())
        RunDir.check(self.out / "training", {}, needed_bytes=32 * weights)  # two of weights and moments

    def _folder(self, facts: dict[str, Any]) -> Path:
        amount = "all" if facts["labels"] is None else facts["labels"]
        return self.out / f"training-{facts['task']}-{amount}-seed{facts['seed']}-{key_of(facts)}"

    def _weights_of(self, student: Student) -> str:
        if self._weights is None or self._weights[0] is not student:
            tensors = {k: v.detach().cpu().contiguous() for k, v in student.state_dict().items()}
            self._weights = student, checkpoint.digest(tensors, student.name)
        return self._weights[1]

    def _listed(self, name: str) -> str | None:
        """A digest of all files below a place of data, by name, size and time of change; none where none is given."""
        place: Path | None = getattr(self.config, name)
        if place is not None and place not in self._data:
            self._data[place] = _listing(place, self.out.resolve())
        return None if place is None else self._data[place]


def key_of(facts: dict[str, Any]) -> str:
    """16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _decisive(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: _decisive(v) if isinstance(v, dict) else v for k, v in settings.items() if k not in _NO_MATTER}


def _listing(place: Path, out: Path) -> str:
    found = layout_of(place)
    root = found[1] if found else place
    digest = hashlib.sha256(f"{found[0] if found else ''}|{'' if root.exists() else root}".encode())
    files = [root] if root.is_file() else []
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        folders[:] = sorted(name for name in folders if (here / name).resolve() != out)
        files += [here / name for name in sorted(names)]
    for file in filter(Path.exists, files):  # a broken link is no data
        facts = file.stat()
        name = os.fsencode(file.relative_to(root)) if file != root else os.fsencode(file.name)
        digest.update(name + f"|{facts.st_size}|{facts.st_mtime_ns}|".encode())
    return digest.hexdigest()[:16]
