"""What `evaluate` can know before it reads an image."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.downstream.task import Budgets, Group, Task, find_task
from dreamteacher.downstream.tasks import TASKS
from dreamteacher.runtime.distributed.device import pick_device
from dreamteacher.runtime.errors import UserError


def default_tasks(config: EvaluateConfig, groups: Iterable[str] | None = None) -> tuple[Task, ...]:
    """The tasks that run where none is named.

    Args:
        config: says where the data are.
        groups: those whose data are there; none: those whose places are in the config.
    """
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

    Raises:
        UserError: for missing or differing folders, settings of a task that do not fit, or more labels than there are.
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
