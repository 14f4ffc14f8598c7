"""The data of the classification tasks: folders of classes, or LAYOUT:ROOT with a validation part of its own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from dreamteacher.data.image_set import ImageSet, load_images
from dreamteacher.data.images import below
from dreamteacher.data.layouts.table import Part, has_parts, image_files
from dreamteacher.downstream.features import ClassificationData, labelled_data
from dreamteacher.downstream.task import Budgets, Group
from dreamteacher.runtime.errors import UserError, shorten

if TYPE_CHECKING:
    from dreamteacher.downstream.config import EvaluateConfig

_NEEDS = "The classification tasks need labelled images.", "Give both --train and --test."


def class_counts(folder: Path, part: Part = "train") -> Counter[str]:
    """Images per class of a folder with one subfolder per class, or of LAYOUT:ROOT; only paths are read.

    Raises:
        UserError: there are fewer than two subfolders, or images beside them; a layout has no classes.
    """
    files = image_files(folder, part)
    if files.labels is not None:
        return Counter(files.classes[label] for label in files.labels)
    parts = [below(files.folder, path).split("/") for path in files.paths]
    counts = Counter(names[0] for names in parts if len(names) > 1)
    if not files.by_folder or len(counts) < 2 or any(len(names) == 1 for names in parts):
        raise UserError(
            f"'{folder}' is not sorted into classes.",
            "Put every image into one of at least two subfolders, one per class.",
        )
    return counts


def _places(config: EvaluateConfig) -> tuple[Path, Path]:
    """What is learned from, and what is scored on: of a layout in `train` alone its validation part."""
    train, test = config.train, config.test
    if test is None and train is not None and has_parts(train):
        test = train
    if train is None or test is None:
        raise UserError(*_NEEDS)
    return train, test


def _check(config: EvaluateConfig, budgets: Budgets) -> None:
    train, test = _places(config)
    counts, others = class_counts(train), class_counts(test, "val")
    if set(counts) != set(others):
        only = shorten(sorted(set(counts) ^ set(others)))
        raise UserError(
            f"Classes of '{train}' and '{test}' differ: {only} in one of them only.",
            "Give both the same subfolders.",
        )
    per_class = max((count or 1 for count in budgets), default=1)
    name, count = min(counts.items(), key=lambda item: item[1])
    if count < per_class:
        raise UserError(
            f"{per_class} labels per class asked for; class '{name}' of '{train}' has {count} images.",
            "Ask for fewer labels, or add images to that class.",
        )


def _load(config: EvaluateConfig, _budgets: Budgets) -> ClassificationData:
    def load(source: Path, part: Part) -> ImageSet:
        return load_images(
            source, config.size, strict=config.strict, cache_gb=config.cache_gb, workers=config.workers,
            part=part,
        )  # fmt: skip

    train, test = _places(config)
    return labelled_data(load(train, "train"), load(test, "val"))


CLASSIFICATION = Group(
    name="classification", needs=_NEEDS, headline="accuracy", places=("train", "test"),
    given=lambda config: config.train is not None or config.test is not None,
    check=_check,
    load=_load,
)  # fmt: skip
