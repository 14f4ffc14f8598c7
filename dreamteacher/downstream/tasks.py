"""The table of tasks: one line each, in the order in which they are listed, run and reported.

A line is `"name": "module:OBJECT"`; the object is a `dreamteacher.downstream.task.Task`. A module is imported
when its task is looked at, so that this table costs nothing.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from dreamteacher.runtime.errors import UserError, did_you_mean

Metric: TypeAlias = tuple[str, float]
Row: TypeAlias = dict[str, Any]

# Tasks whose settings stand in `EvaluateConfig`.
BUILT_IN: dict[str, str] = {
    "segment-frozen": "dreamteacher.downstream.segmentation.few_masks:FROZEN",
    "segment-linear": "dreamteacher.downstream.segmentation.few_masks:LINEAR",
    "segment-finetune": "dreamteacher.downstream.segmentation.few_masks:FINETUNE",
    "linear": "dreamteacher.downstream.classification.probes:LINEAR",
    "finetune": "dreamteacher.downstream.classification.finetune:TASK",
    "knn": "dreamteacher.downstream.classification.probes:KNN",
    "detect": "dreamteacher.downstream.detection.train:TASK",
    "detect-cascade": "dreamteacher.downstream.detection.train:CASCADE",
    "distilled": "dreamteacher.downstream.distilled:TASK",
    "distilled-classes": "dreamteacher.downstream.distilled:CLASSES",
    "linear-sgd": "dreamteacher.downstream.classification.probes:LINEAR_SGD",
    "finetune-full": "dreamteacher.downstream.classification.finetune_full:TASK",
    "semantic": "dreamteacher.downstream.segmentation.semantic:TASK",
    "readout": "dreamteacher.downstream.segmentation.semantic:READOUT",
    "panoptic": "dreamteacher.downstream.panoptic:TASK",
}

# Tasks that were added. What `Task.config` holds becomes settings of `evaluate`: --NAME.setting.
ADDED: dict[str, str] = {}

TASKS: dict[str, str] = BUILT_IN | ADDED


def place_of(name: str) -> str:
    """Where the task of this name is; a UserError where there is none."""
    if name not in TASKS:
        raise UserError(
            f"There is no task '{name}'.{did_you_mean(name, TASKS)}", f"Tasks: {', '.join(TASKS)}."
        )
    return TASKS[name]
