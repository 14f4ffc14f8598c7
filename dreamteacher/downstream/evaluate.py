"""The one evaluation: any backbone (random, ImageNet, a file, a run) on the same tasks, draws and seeds."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.downstream.presets import check_preset
from dreamteacher.downstream.results import Results
from dreamteacher.downstream.tables import row_title, separated, summary_table
from dreamteacher.downstream.task import Bench, Budgets, Group, Task, find_task
from dreamteacher.downstream.tasks import TASKS, Row
from dreamteacher.models.distilled import neck_weights
from dreamteacher.models.student import Student, create_student, is_ours, recorded_student, weight_file
from dreamteacher.runtime.distributed.device import pick_device
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.loggers import check_loggers

__all__ = ["EvaluateConfig", "check_config", "evaluate", "evaluate_student", "separated", "summary_table"]


def default_tasks(config: EvaluateConfig, groups: Iterable[str] | None = None) -> tuple[Task, ...]:
    """The tasks that run where none is named: of `groups`, or else of those with data in the config."""
    tasks = [find_task(name) for name in TASKS]
    given = [task.group.given(config) if groups is None else task.group.name in groups for task in tasks]
    return tuple(t for t, there in zip(tasks, given, strict=True) if there and t.default(config))


def group_budgets(tasks: Iterable[Task], config: EvaluateConfig) -> Mapping[Group, Budgets]:
    """The groups of these tasks, in order, with the budgets of those of its tasks that draw labelled images."""
    found: dict[Group, list[int | None]] = {}
    for task in tasks:
        budgets = found.setdefault(task.group, [])
        budgets += task.all_budgets(config) if task.unit else ()
    return found


def check_config(config: EvaluateConfig) -> tuple[str, ...]:
    """The names of the tasks that will run; reads no image.

    A UserError for missing or differing folders, settings of a task that do not fit, or more labels than
    there are.
    """
    pick_device(config.device)
    tasks = tuple(find_task(name) for name in config.tasks) or default_tasks(config)
    if not tasks:
        raise UserError(
            "There is nothing to evaluate on.",
            "Give --train and --test (one folder per class), or --images and --masks (or --instances).",
        )
    for task in tasks:
        task.check(config)
    for place in (config.out, *config.out.parents) if config.out is not None else ():
        if place.exists():
            if not place.is_dir() or not os.access(place, os.W_OK):
                raise UserError(f"'{place}' is no folder that can be written.", "Choose another --out.")
            break
    for group, budgets in group_budgets(tasks, config).items():
        group.check(config, budgets)
    return tuple(task.name for task in tasks)


def evaluate_student(
    make_student: Callable[[int], Student],
    config: EvaluateConfig,
    *,
    method: str,
    data: Mapping[str, Any],
    run_of: Callable[[int], Path] | None = None,
    results: Results | None = None,
) -> Iterator[Row]:
    """The rows of one method, in memory: `config` gives tasks, seeds and settings, its folders are not read.

    Args:
        make_student: the backbone for a seed. When it returns the same object as for the seed before, frozen
            features are reused, and what depends on no draw (knn) is reported once.
        config: see `EvaluateConfig`; without tasks, all that the data allow.
        method: the name of these rows.
        data: name of a group of tasks (`Task.group`), "classification" for example, -> its data.
        run_of: the run folder of a seed's backbone, for the config's `neck` and the task distilled.
        results: where rows are kept, and those that are there are not computed again; None: nowhere.

    Yields:
        {"method", "student", "task", "metric", "value", "labels", "seed", "seconds"}: `labels` is per class
        (None: all) or a number of masks or images, `seconds` that of the whole task. With `results` also
        "key".
    """
    device = pick_device(config.device)
    tasks = tuple(find_task(name) for name in config.tasks) or default_tasks(config, data)
    bench: Bench | None = None
    for seed in config.seeds:
        student = make_student(seed)
        seen = bench is not None and student is bench.student
        if bench is None or not seen:
            bench = Bench(student.to(device), config, data, run_of(seed) if run_of else None)
        for task in tasks:
            if seen and not task.seeded:
                continue
            for budget in task.all_budgets(config):
                facts = results.facts(bench.student, task, budget, seed) if results else {}
                rows = results.found(facts) if results else []
                if rows:
                    yield from rows
                    continue
                start = time.perf_counter()
                bench.task = task
                kept = results.training(task, facts) if results else contextlib.nullcontext()
                with kept as bench.saved:
                    metrics = list(task.run(bench, budget, seed))
                seconds = round(time.perf_counter() - start, 3)
                for metric, value in metrics:
                    row = {"method": method, "student": student.name, "task": task.name, "metric": metric}
                    rows.append({**row, "value": value, "labels": budget, "seed": seed, "seconds": seconds})
                yield from results.add(rows, facts) if results else rows


def evaluate(config: EvaluateConfig, *, log: Callable[[str], None] = print) -> list[Row]:
    """The rows of one backbone on folders of images, also added to out/results.jsonl; `log` receives lines.

    Every check of config, folders and weights comes before any work, as a UserError.
    """
    check_loggers(config.log_to)
    check_preset(config)
    config = dataclasses.replace(config, tasks=check_config(config))
    tasks = [find_task(name) for name in config.tasks]
    # Made before the images are read, so that a wrong name or file fails at once.
    name = config.student or recorded_student(config.init)
    first = create_student(name, init=config.init, seed=config.seeds[0])

    def make_student(seed: int) -> Student:
        return create_student(name, seed=seed) if config.init == "random" else first

    for task in tasks:
        task.fits(first, config)
    run = Path(config.init).expanduser()
    if config.neck:
        neck_weights(run)
    data = {
        group.name: group.load(config, budgets) for group, budgets in group_budgets(tasks, config).items()
    }
    if config.dry_run:
        log(
            f"dry run: nothing was trained or written; {name} ({config.init}) on {', '.join(config.tasks)}, all is there"
        )
        return []
    method, results = config.method or method_name(config.init), None
    if config.out is not None:
        results = Results(config.out, config, method)
        if any(task.long for task in tasks):
            results.check(first)
        config.out.mkdir(parents=True, exist_ok=True)
    rows = []
    run_of = (lambda _seed: run) if run.is_dir() else None
    for row in evaluate_student(
        make_student, config, method=method, data=data, run_of=run_of, results=results
    ):
        rows.append(row)
        if row["metric"] == find_task(row["task"]).headline:
            there = results is not None and row["key"] in results.reused
            spent = "already there" if there else f"{row['seconds']:.1f} s"
            log(f"{row_title(row)}, seed {row['seed']}: {row['value']:.3f} ({spent})")
    log(summary_table(rows))
    return rows


def method_name(init: str) -> str:
    """What rows are called when the caller gives no name: what `init` is, or the name of its path."""
    if init in ("random", "imagenet"):
        return {"random": "random init", "imagenet": "ImageNet"}[init]
    ours = is_ours(weight_file(init))
    return "DreamTeacher" if ours else Path(init).name
