"""Services that show a run's metrics beside its own metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

Each is an extra of its name, imported only where a run asks for it by `--log-to`.
"""

from __future__ import annotations

import importlib.util
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.config import parse_json
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.settings import LoggerName

NAMES = (
    "loggers.json"  # in a run folder: what the run is called elsewhere, so that a resumed one goes on there
)
PROJECT = "dreamteacher"


class Logger(Protocol):
    """Where lines of metrics go beside the run folder."""

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Adds one line of numbers."""

    def close(self) -> None:
        """Sends what is left."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], known_as: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / "tensorboard")

    def log(self, step: int, row: Mapping[str, float]) -> None:
        for key, value in row.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of the project "dreamteacher"; WANDB_MODE, WANDB_PROJECT and the like are wandb's own."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], known_as: str) -> None:
        import os

        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=folder.name, id=known_as, resume="allow",
            dir=folder, config=dict(settings),
        )  # fmt: skip

    def log(self, step: int, row: Mapping[str, float]) -> None:
        self.run.log(dict(row), step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """A run of the experiment "dreamteacher", at MLFLOW_TRACKING_URI."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], known_as: str) -> None:
        import os

        from mlflow.entities import Metric, Param, RunTag
        from mlflow.tracking import MlflowClient

        self.metric, self.client = Metric, MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        place = experiment.experiment_id if experiment else self.client.create_experiment(name)
        same = self.client.search_runs([place], f"tags.dreamteacher = '{known_as}'")
        if same:
            self.run_id = same[0].info.run_id
            return
        self.run_id = self.client.create_run(place, run_name=folder.name).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in settings.items()]
        self.client.log_batch(self.run_id, params=params, tags=[RunTag("dreamteacher", known_as)])

    def log(self, step: int, row: Mapping[str, float]) -> None:
        import time

        now = int(time.time() * 1000)
        self.client.log_batch(self.run_id, metrics=[self.metric(k, v, now, step) for k, v in row.items()])

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


# Name of --log-to -> its class and the module that it needs.
LOGGERS: dict[LoggerName, tuple[type, str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "wandb": (WeightsAndBiases, "wandb"),
    "mlflow": (MLflow, "mlflow"),
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
