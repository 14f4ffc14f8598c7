"""What a task of `evaluate` is: a `Task` at the end of a file, and its line in `dreamteacher.downstream.tasks`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from dreamteacher.downstream.features import ClassificationData, extract_features
from dreamteacher.downstream.loop import LongRun, Saved
from dreamteacher.downstream.tasks import Metric, place_of
from dreamteacher.models.student import Student
from dreamteacher.runtime.errors import UserError

if TYPE_CHECKING:  # an added task is imported by the module of the config: see `added_settings` there
    from dreamteacher.downstream.config import EvaluateConfig

# How many labels, masks or images a training is drawn from; None: all there are.
Budgets: TypeAlias = Sequence[int | None]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Data that several tasks share: they are checked and read once for all of them."""

    name: str
    needs: tuple[str, str]  # what is said where the data are missing: the problem, and what to give
    headline: str  # the metric that stands for its tasks in tables
    places: tuple[str, ...]  # the settings of `EvaluateConfig` that say where the data are
    settings: tuple[str, ...] = ()  # those that decide how they are read
    given: Callable[[EvaluateConfig], bool]  # whether the places were named
    # With the budgets of the tasks that draw: a UserError for what paths and headers show; reads no image.
    check: Callable[[EvaluateConfig, Budgets], None]
    # With these budgets: the data; a UserError where they are too few.
    load: Callable[[EvaluateConfig, Budgets], Any]


def always(_config: EvaluateConfig) -> bool:
    """For `Task.default`."""
    return True


@dataclass(frozen=True, kw_only=True)
class Task:
    """One way to measure a backbone."""

    name: str  # on the command line, in rows and tables
    what: str  # in words, for reports
    group: Group  # the data that it needs
    headline: str = ""  # the metric that stands for it in tables; "": the group's
    unit: str = ""  # what a budget counts: labels per class, masks, images; "" where nothing is drawn
    whole: str = "all labels"  # what a row says that has no budget
    # Class of its settings, a frozen dataclass whose fields have defaults: --NAME.setting; None: it has none.
    config: type | None = None
    settings: tuple[str, ...] = ()  # fields of `EvaluateConfig` that decide its numbers, beside its own
    # The numbers of labels, masks or images that it runs with; (): once, with all.
    budgets: Callable[[EvaluateConfig], tuple[int, ...]] = lambda _config: ()
    # Whether it runs where no task is named and its data are given.
    default: Callable[[EvaluateConfig], bool] = lambda _config: False
    long: bool = False  # it trains for long: a checkpoint of it is kept
    seeded: bool = True  # seeds change its numbers for one and the same backbone
    # Files beside the backbone's weights that decide its numbers.
    files: Callable[[EvaluateConfig], Sequence[Path]] = lambda _config: ()
    # A UserError for settings that do not fit, or for a backbone that does not fit them; they read no image.
    check: Callable[[EvaluateConfig], object] = lambda _config: None
    fits: Callable[[Student, EvaluateConfig], object] = lambda _student, _config: None
    # (bench, budget, seed) -> (metric, value) pairs; it leaves the backbone as it is.
    run: Callable[[Bench, int | None, int], Iterator[Metric]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "headline", self.headline or self.group.headline)

    @property
    def field(self) -> str:
        """The field of `EvaluateConfig` with its own settings."""
        return self.name.replace("-", "_")

    def all_budgets(self, config: EvaluateConfig) -> Budgets:
        """Labels per class, masks or images that it runs with; None: all there are."""
        return self.budgets(config) or (None,)

    def amount(self, budget: int | None) -> str:
        """A budget in words."""
        return self.whole if budget is None else f"{budget} {self.unit}"


@dataclass
class Bench:
    """One backbone (of a `run` folder or not) with the data of each group, and its features."""

    student: Student
    config: EvaluateConfig
    loaded: Mapping[str, Any]
    run: Path | None = None
    task: Task | None = None  # the present one
    saved: Saved | None = None  # where its training is kept
    _extracted: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    @property
    def data(self) -> Any:
        """The data of the present task's group, or a UserError."""
        assert self.task is not None
        group = self.task.group
        if self.loaded.get(group.name) is None:
            raise UserError(*group.needs)
        return self.loaded[group.name]

    @property
    def settings(self) -> Any:
        """The present task's own settings."""
        assert self.task is not None
        return getattr(self.config, self.task.field)

    def passes(self) -> dict[str, Any]:
        """How the test images go through a network: arguments of every task that has them in memory."""
        return {"precision": self.config.precision, "batch_size": self.config.batch_size}

    def long_run(self, seed: int) -> LongRun:
        """How a long training runs, and where it is kept."""
        config = self.config
        return LongRun(seed=seed, precision=config.precision, workers=config.workers, saved=self.saved)

    def run_folder(self) -> Path:
        """The run that the backbone is from, or a UserError."""
        if self.run is None:
            raise UserError("--neck and the task distilled need a run.", "Give its folder as --init.")
        return self.run

    def features(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training features and labels, test features and labels, of images with classes."""
        data: ClassificationData = self.data
        if self._extracted is None:
            train, test = (
                extract_features(self.student, x, **self.passes()) for x in (data.train, data.test)
            )
            self._extracted = train, test
        return self._extracted[0], data.train_labels, self._extracted[1], data.test_labels


def find_task(name: str) -> Task:
    """The task of this name, from its module; a UserError where there is none.

    Example:
        >>> find_task("knn").headline
        'accuracy'
    """
    module, _, attribute = place_of(name).partition(":")
    task: Task = getattr(importlib.import_module(module), attribute)
    return task
