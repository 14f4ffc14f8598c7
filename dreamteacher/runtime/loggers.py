"""Services that show a run's metrics beside its own metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

Each is an extra of its name, imported only where a run asks for it by `--log-to`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.config import parse_json
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.settings import LoggerName

NAMES = (
    "loggers.json"  # in a run folder: what the run is called elsewhere, so that a resumed one goes on there
)
PROJECT = "dreamteacher"


class Logger(NamedTuple):
    """Where lines of metrics go beside the run folder: `log` adds one of a step, `close` sends what is left."""

    log: Callable[[int, Mapping[str, float]], object]
    close: Callable[[], object]


def _tensorboard(folder: Path, settings: Mapping[str, Any], known_as: str) -> Logger:
    """Event files in RUN/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard")

    def log(step: int, row: Mapping[str, float]) -> None:
        for key, value in row.items():
            writer.add_scalar(key, value, step)

    return Logger(log, writer.close)


def _wandb(folder: Path, settings: Mapping[str, Any], known_as: str) -> Logger:
    """A run of the project "dreamteacher"; WANDB_MODE, WANDB_PROJECT and the like are wandb's own."""
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT), name=folder.name, id=known_as, resume="allow",
        dir=folder, config=dict(settings),
    )  # fmt: skip
    return Logger(lambda step, row: run.log(dict(row), step=step), run.finish)


def _mlflow(folder: Path, settings: Mapping[str, Any], known_as: str) -> Logger:
    """A run of the experiment "dreamteacher", at MLFLOW_TRACKING_URI."""
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    experiment = client.get_experiment_by_name(name)
    place = experiment.experiment_id if experiment else client.create_experiment(name)
    same = client.search_runs([place], f"tags.dreamteacher = '{known_as}'")
    run = (same[0] if same else client.create_run(place, run_name=folder.name)).info.run_id
    if not same:
        params = [Param(key, str(value)[:500]) for key, value in settings.items()]
        client.log_batch(run, params=params, tags=[RunTag("dreamteacher", known_as)])

    def log(step: int, row: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run, metrics=[Metric(key, value, now, step) for key, value in row.items()])

    return Logger(log, lambda: client.set_terminated(run))


# Name of --log-to -> what opens it, and the module that it needs.
LOGGERS: dict[LoggerName, tuple[Callable[[Path, Mapping[str, Any], str], Logger], str]] = {
    "tensorboard": (_tensorboard, "tensorboard"),
    "wandb": (_wandb, "wandb"),
    "mlflow": (_mlflow, "mlflow"),
}


def check_loggers(names: Sequence[LoggerName]) -> None:
    """Raises UserError where a service's package is not installed: before anything is begun."""
    for name in names:
        if importlib.util.find_spec(LOGGERS[name][1]) is None:
            raise UserError(
                f"--log-to {name} needs the package '{LOGGERS[name][1]}', which is not installed.",
                f"pip install 'dreamteacher[{name}]'",
            )


def open_loggers(names: Sequence[LoggerName], folder: Path, settings: Mapping[str, Any]) -> list[Logger]:
    """The services of a run, each going on with what it has of this run already.

    Args:
        folder: of the run.
        settings: what the run is asked to do, in plain values.
    """
    if not names:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAMES
    known = parse_json(path.read_text("utf-8")) if path.exists() else {}
    for name in names:
        known.setdefault(name, uuid.uuid4().hex[:16])
    checkpoint.write_text(path, json.dumps(known) + "\n")
    return [LOGGERS[name][0](folder, settings, known[name]) for name in names]
