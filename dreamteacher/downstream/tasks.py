"""The tasks, and what each one measures."""

from __future__ import annotations

from typing import Any, TypeAlias

Metric: TypeAlias = tuple[str, float]


Row: TypeAlias = dict[str, Any]


CLASSIFICATION = ("knn", "linear", "finetune")


# The published protocols at full size: with all labels, for hours; they run only when they are named.
PUBLISHED = ("linear-sgd", "finetune-full")


SEGMENTATION = ("segment-frozen", "segment-finetune", "segment-linear")


STREAMED = ("semantic", "readout")


DETECTION = ("detect", "detect-cascade")


PANOPTIC = ("panoptic",)


# The model that label distillation leaves, scored as it is; only a run with a label head has one.
DISTILLED = {"distilled": "miou", "distilled-classes": "accuracy"}


# The metric that stands for a task in tables.
HEADLINE = {
    **dict.fromkeys((*CLASSIFICATION, *PUBLISHED), "accuracy"),
    **dict.fromkeys((*SEGMENTATION, *STREAMED), "miou"),
    **dict.fromkeys(DETECTION, "mask_ap"),
    **dict.fromkeys(PANOPTIC, "pq"),
    **DISTILLED,
}
