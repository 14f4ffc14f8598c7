"""The verbs of the command line as functions, and what each of them returns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from dreamteacher.distill.config import (
    MakeFeaturesConfig,
    MakeLabelsConfig,
    PretrainConfig,
    TrainInterpreterConfig,
)
from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.exports.config import ExportConfig
from dreamteacher.face.arguments import called_from_python, keywords, make_config
from dreamteacher.reports.config import InspectConfig, ReportConfig
from dreamteacher.teachers.published.config import GetTeacherConfig
from dreamteacher.teachers.training.config import TrainTeacherConfig

if TYPE_CHECKING:
    from dreamteacher.models.interpreter import Interpreter
    from dreamteacher.models.student import Student
    from dreamteacher.reports.inspect import Row
    from dreamteacher.teachers.base import Teacher

Place: TypeAlias = str | os.PathLike[str]


# --- what the verbs return -----------------------------------------------------------------------------------


class Table(str):
    """Text that a notebook shows as it is."""

    def __repr__(self) -> str:
        return str(self)


class Folder:
    """What a verb has made lies in a folder; it can be given wherever a path is taken."""

    def __init__(self, path: Place) -> None:
        self.path = Path(path)

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __repr__(self) -> str:
        said = self._said()
        return f"{type(self).__name__}('{self.path}'{f': {said}' if said else ''})"

    def _said(self) -> str:
        """What is worth saying of it in a line."""
        return "" if self.path.exists() else "not made yet"

    def _read(self, name: str) -> dict[str, Any]:
        from dreamteacher.runtime.config import parse_json

        try:
            found = parse_json((self.path / name).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


class Run(Folder):
    """A pretraining: its folder, what it measured, its backbone, and what comes next.

    Example:
        >>> run = Run("runs/none")
        >>> run
        Run('runs/none': not made yet)
    """

    def _said(self) -> str:
        rows, settings = self.metrics, self.settings
        if not settings:
            return super()._said()
        state = "finished" if (self.path / "backbone.safetensors").exists() else "unfinished"
        done = f", step {rows[-1]['step']}" if rows else ""
        return f"{settings.get('student')} taught by {settings.get('teacher')}{done}, {state}"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that it was started with."""
        config = self._read("config.json").get("config")
        return config if isinstance(config, dict) else {}

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """What was logged, a row a time."""
        from dreamteacher.runtime.run_folder import read_rows

        return read_rows(self.path / "metrics.jsonl")

    def last(self, name: str) -> Any:
        """The last logged value of a metric; None where there is none."""
        return next((row[name] for row in reversed(self.metrics) if name in row), None)

    @property
    def report(self) -> Path:
        """The page about it."""
        return self.path / "report.html"

    def backbone(self) -> Student:
        """The pretrained network."""
        from dreamteacher.models.student import create_student, recorded_student

        with called_from_python():
            return create_student(recorded_student(str(self.path)), init=str(self.path))

    def evaluate(self, *, verbose: bool = True, **settings: Any) -> Evaluation:
        """Its backbone, scored: the keywords of `evaluate`."""
        return evaluate(init=str(self.path), verbose=verbose, **settings)

    def export(self, out: Place | None = None, *, verbose: bool = True, **settings: Any) -> Export:
        """Its backbone for other libraries: the keywords of `export`."""
        return export(run=self.path, out=out, verbose=verbose, **settings)

    def make_labels(self, *, verbose: bool = True, **settings: Any) -> Labels:
        """Labels by its label head: the keywords of `make_labels`."""
        return make_labels(run=self.path, verbose=verbose, **settings)


class TeacherFolder(Folder):
    """A teacher on disk."""

    def _said(self) -> str:
        card = self._read("teacher.json")
        return f"{card['family']}, licence {card.get('licence')}" if "family" in card else super()._said()

    @property
    def report(self) -> Path:
        """The page about its training."""
        return self.path / "report.html"

    def load(self, **settings: Any) -> Teacher:
        """The frozen network: the keywords of `load_teacher`."""
        from dreamteacher.face.parts import load_teacher

        return load_teacher(self.path, **settings)

    def pretrain(self, *, verbose: bool = True, **settings: Any) -> Run:
        """A student taught by it: the keywords of `pretrain`."""
        return pretrain(teacher=self.path, verbose=verbose, **settings)


class InterpreterFolder(Folder):
    """An interpreter on disk."""

    def load(self) -> Interpreter:
        """The frozen network, which reads its teacher's maps."""
        from dreamteacher.models.interpreter import load_interpreter

        with called_from_python():
            return load_interpreter(self.path)[0]

    def make_labels(self, *, verbose: bool = True, **settings: Any) -> Labels:
        """Labels for images or samples: the keywords of `make_labels`."""
        return make_labels(interpreter=self.path, verbose=verbose, **settings)


class Features(Folder):
    """A teacher's maps on disk."""

    def pretrain(self, *, verbose: bool = True, **settings: Any) -> Run:
        """A pretraining that reads them: the keywords of `pretrain`, the same images and teacher among them."""
        return pretrain(features=self.path, verbose=verbose, **settings)


class Labels(Folder):
    """Images with labels on disk."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row an image: its name, the confidence, and its classes."""
        from dreamteacher.runtime.run_folder import read_rows

        return read_rows(self.path / "labels.jsonl")

    @property
    def page(self) -> Path:
        """The first images with their labels, to look at."""
        return self.path / "index.html"


class Export(Folder):
    """A backbone in the form of a library, with its card."""

    @property
    def card(self) -> Table:
        """The model card: where it comes from, and the code that loads it."""
        return Table((self.path / "README.md").read_text("utf-8"))


class Evaluation:
    """The rows of an evaluation: method, task, metric, labels, seed and value each."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = list(rows)

    def table(self, *, every_metric: bool = False) -> Table:
        """One line per task, mean ± deviation over the seeds."""
        from dreamteacher.downstream.tables import summary_table

        return Table(summary_table(self.rows, every_metric=every_metric) if self.rows else "no results")

    def values(self, task: str, metric: str | None = None) -> list[float]:
        """A task's values over seeds and labels; of one metric where it is named."""
        return [r["value"] for r in self.rows if r["task"] == task and metric in (None, r["metric"])]

    def __add__(self, other: Evaluation) -> Evaluation:
        """Both in one table: two methods beside each other."""
        return Evaluation([*self.rows, *other.rows])

    def __repr__(self) -> str:
        tasks = ", ".join(dict.fromkeys(row["task"] for row in self.rows))
        return f"Evaluation({len(self.rows)} rows{f': {tasks}' if tasks else ''})"


@dataclass(frozen=True)
class Inspection:
    """A teacher's timesteps and levels, the best first, and the page that shows them."""

    rows: tuple[Row, ...]
    page: Path

    def __repr__(self) -> str:
        best = self.rows[0] if self.rows else None
        at = "" if best is None or best.t is None else f" at t {best.t}"
        return f"Inspection('{self.page}'{f': best {best.level}{at}' if best else ''})"


# --- verbs ---------------------------------------------------------------------------------------------------


@keywords(PretrainConfig)
def pretrain(config: PretrainConfig | None = None, /, *, verbose: bool = True, **settings: Any) -> Run:
    """Pretrains a backbone on a folder of images, taught by a generative model; the same call resumes.

    Args:
        config: settings to begin with; keywords win.
        verbose: whether anything is printed.
        settings: those of `PretrainConfig`: images="photos", out="runs/x", teacher="runs/teacher", size=64, t=50 ...

    Raises:
        UserError: for all that can be wrong, before a folder is made. Ctrl-C is a KeyboardInterrupt, after saving.

    Example:
        >>> from dreamteacher import UserError
        >>> try:
        ...     pretrain(images="photos", out="runs/x", studnet="resnet18")
        ... except UserError as error:
        ...     print(error)
        pretrain has no argument 'studnet'. Did you mean 'student'?
        `help(dreamteacher.PretrainConfig)` lists its arguments.
    """
    with called_from_python(verbose):
        wanted = make_config("pretrain", PretrainConfig, config, settings)
        from dreamteacher.distill import pretrain as module
        from dreamteacher.reports.report import report_after

        made = module.pretrain(wanted)
        if made is not None:
            report_after(made)
    return Run(wanted.out)


@keywords(TrainTeacherConfig)
def train_teacher(
    config: TrainTeacherConfig | None = None, /, *, verbose: bool = True, **settings: Any
) -> TeacherFolder:
    """Trains a diffusion model or a StyleGAN2 on a folder of images; the same call resumes.

    Args:
        config: settings to begin with; keywords win.
        verbose: whether anything is printed.
        settings: those of `TrainTeacherConfig`: images="photos", out="runs/teacher", steps=1000 ...
    """
    with called_from_python(verbose):
        wanted = make_config("train_teacher", TrainTeacherConfig, config, settings)
        from dreamteacher.reports.report import report_after
        from dreamteacher.teachers.training import train as module

        made = module.train_teacher(wanted)
        if made is not None:
            report_after(made)
    return TeacherFolder(wanted.out)


@keywords(TrainInterpreterConfig)
def train_interpreter(
    config: TrainInterpreterConfig | None = None, /, *, verbose: bool = True, **settings: Any
) -> InterpreterFolder:
    """Trains an interpreter, which labels what a teacher sees or draws, on a few labelled images.

    Args:
        config: settings to begin with; keywords win.
        verbose: whether anything is printed.
        settings: those of `TrainInterpreterConfig`: images="labelled", masks="masks", out="runs/interpreter" ...
    """
    with called_from_python(verbose):
        wanted = make_config("train_interpreter", TrainInterpreterConfig, config, settings)
        from dreamteacher.distill import train_interpreter as module

        module.train_interpreter(wanted)
    return InterpreterFolder(wanted.out)


@keywords(GetTeacherConfig)
def get_teacher(
    name: str | GetTeacherConfig | None = None, /, *, verbose: bool = True, **settings: Any
) -> TeacherFolder:
    """Fetches a published generator, or converts a checkpoint of your own.

    Args:
        name: of the published teacher (`list_teachers`), or a new one; or settings to begin with.
        verbose: whether anything is printed.
        settings: those of `GetTeacherConfig`: file="downloads/g.pkl", like="stylegan2-ffhq-256" ...
    """
    from dreamteacher.runtime.download.http import cache_folder

    config = name if isinstance(name, GetTeacherConfig) else None
    if isinstance(name, str):
        settings = {"name": name, **settings}
    with called_from_python(verbose):
        wanted = make_config("get_teacher", GetTeacherConfig, config, settings)
        from dreamteacher.teachers.published import get as module

        made = module.get_teacher(wanted)
    return TeacherFolder(made or wanted.out or cache_folder() / "teachers" / wanted.name)


@keywords(MakeFeaturesConfig)
def make_features(
    config: MakeFeaturesConfig | None = None, /, *, verbose: bool = True, **settings: Any
) -> Features:
    """Keeps a teacher's maps of a folder of images on disk, for many pretrainings.

    Args:
        config: settings to begin with; keywords win.
        verbose: whether anything is printed.
        settings: those of `MakeFeaturesConfig`: images="photos", out="features", teacher="runs/teacher" ...
    """
    with called_from_python(verbose):
        wanted = make_config("make_features", MakeFeaturesConfig, config, settings)
        from dreamteacher.distill.store import make as module

        module.make_features(wanted)
    return Features(wanted.out)


@keywords(MakeLabelsConfig)
def make_labels(
    config: MakeLabelsConfig | None = None, /, *, verbose: bool = True, **settings: Any
) -> Labels:
    """Labels a folder of images, or a teacher's own samples; or draws samples to annotate.

    Args:
        config: settings to begin with; keywords win.
        verbose: whether anything is printed.
        settings: those of `MakeLabelsConfig`: interpreter="runs/interpreter", images="photos", out="labels" ...
    """
    with called_from_python(verbose):
        wanted = make_config("make_labels", MakeLabelsConfig, config, settings)
        from dreamteacher.distill import make_labels as module

        module.make_labels(wanted)
    return Labels(wanted.out)


@keywords(EvaluateConfig)
def evaluate(config: EvaluateConfig | None = None, /, *, verbose: bool = True, **settings: Any) -> Evaluation:
    """Scores a backbone: nearest neighbours, probes, fine-tuning, segmentation, detection, with a few labels.

    Args:
        config: settings to begin with; keywords win.
        verbose: whether anything is printed.
        settings: those of `EvaluateConfig`: init="runs/x", train="train", test="test", tasks="knn", labels=10 ...;
            preset="coco-1x" begins with published settings.
    """
    with called_from_python(verbose):
        if config is None and settings.get("preset") is not None:
            from dreamteacher.downstream.presets import preset_config

            config = preset_config(str(settings["preset"]))
        wanted = make_config("evaluate", EvaluateConfig, config, settings)
        from dreamteacher.downstream import evaluate as module

        return Evaluation(module.evaluate(wanted))


@keywords(ExportConfig)
def export(config: ExportConfig | Place | None = None, /, *, verbose: bool = True, **settings: Any) -> Export:
    """Writes a run's backbone for timm or another library, with a model card.

    Args:
        config: the run's folder, or settings to begin with; keywords win.
        verbose: whether anything is printed.
        settings: those of `ExportConfig`: out="backbone", format="torchvision" ...
    """
    if config is not None and not isinstance(config, ExportConfig):
        config, settings = None, {"run": config, **settings}
    with called_from_python(verbose):
        wanted = make_config("export", ExportConfig, config, settings)
        from dreamteacher.exports import write as module

        return Export(module.export(wanted))


@keywords(ReportConfig)
def report(config: ReportConfig | Place | None = None, /, *, verbose: bool = True, **settings: Any) -> Path:
    """Writes one page about a run; returns its path.

    Args:
        config: the run's folder, or settings to begin with; keywords win.
        verbose: whether anything is printed.
        settings: those of `ReportConfig`: image_count=4, own_code=True ...
    """
    if config is not None and not isinstance(config, ReportConfig):
        config, settings = None, {"run": config, **settings}
    with called_from_python(verbose):
        wanted = make_config("report", ReportConfig, config, settings)
        from dreamteacher.reports import report as module

        return module.report(wanted)


@keywords(InspectConfig)
def inspect(config: InspectConfig | None = None, /, *, verbose: bool = True, **settings: Any) -> Inspection:
    """Draws a teacher's maps and ranks its timesteps and levels.

    Args:
        config: settings to begin with; keywords win.
        verbose: whether anything is printed.
        settings: those of `InspectConfig`: teacher="runs/teacher", images="photos", out="looks", t=[50, 100] ...
    """
    with called_from_python(verbose):
        wanted = make_config("inspect", InspectConfig, config, settings)
        from dreamteacher.reports import inspect as module

        rows = module.inspect_teacher(wanted)
    return Inspection(tuple(rows), wanted.out / "index.html")
