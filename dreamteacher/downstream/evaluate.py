"""The one evaluation: any backbone (random, ImageNet, a file, a run) on the same tasks, draws and seeds."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from dreamteacher.distributed import Precision, pick_device
from dreamteacher.downstream import (
    CLASSIFICATION,
    DISTILLED,
    HEADLINE,
    SEGMENTATION,
    ClassificationData,
    Metric,
    Row,
    check_classes,
    device_of,
    extract_features,
    row_title,
    separated,
    summary_table,
)
from dreamteacher.downstream.distilled import distilled, has_head, load_distilled, neck_weights
from dreamteacher.downstream.finetune import FinetuneConfig, finetune
from dreamteacher.downstream.knn import knn
from dreamteacher.downstream.linear import linear
from dreamteacher.downstream.segmentation import (
    SegmentationData,
    SegmentConfig,
    draw_masks,
    segment,
    segment_linear,
)
from dreamteacher.downstream.sources import check_masks, load_classes, load_masks, test_source
from dreamteacher.errors import UserError, did_you_mean
from dreamteacher.students import Student, create_student, is_ours, recorded_student, weight_file

__all__ = [
    "ClassificationData",
    "EvaluateConfig",
    "SegmentationData",
    "evaluate",
    "evaluate_student",
    "separated",
    "summary_table",
]

Task = Literal[
    "knn", "linear", "finetune", "segment-frozen", "segment-finetune", "segment-linear", "distilled",
    "distilled-classes",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluate any backbone: kNN, linear probe, fine-tuning, segmentation, with a few labels."""

    student: str | None = None
    """timm name of the backbone; none: the one that a run or export in `init` was made with."""
    init: str = "random"
    """random, imagenet (timm's weights), or the path of weights, an export folder or a run folder."""
    tasks: tuple[Task, ...] = ()
    """Which tasks; none: all that the given folders allow."""
    train: Path | None = None
    """Folder with one subfolder of images per class, or imagenet:ROOT: for knn, linear, finetune."""
    test: Path | None = None
    """Folder with the same classes, for their scores; none: the validation part of the layout in `train`."""
    images: Path | None = None
    """Images that have masks: for the segmentation tasks; or LAYOUT:ROOT (ade20k ...), masks included."""
    masks: Path | None = None
    """One mask per image, under the image's name; pixel values are class ids. None with a layout."""
    test_images: Path | None = None
    """Images for the segmentation scores; none: a layout's own, or half of `images`."""
    test_masks: Path | None = None
    """Their masks."""
    binary_masks: bool = False
    """Masks are black and white: class 0 and class 1."""
    labels: tuple[int, ...] = (10, 50)
    """Labelled images per class for linear and finetune; each number is a result of its own."""
    mask_counts: tuple[int, ...] = (10,)
    """Labelled images for the segmentation tasks; each number is a result of its own."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of draws, heads and batches; a random backbone is a new one for each."""
    size: tuple[int, int] = (224, 224)
    """Height and width in pixels, multiples of 32."""
    neck: bool = False
    """Start the segmentation head's neck from the run's (what mixed pretraining transfers beside the backbone)."""
    knn_k: int = 20
    """Neighbours of knn."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Training of finetune."""
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    """Training of segment-frozen and segment-finetune."""
    batch_size: int = 128
    """Images at once where nothing is trained: changes speed and memory only."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    precision: Precision = "auto"
    """Autocast dtype; auto: bfloat16 where the hardware has it."""
    strict: bool = False
    """Stop at a damaged image instead of leaving it out."""
    cache_gb: float = 2.0
    """Decoded images are kept in memory up to this size."""
    workers: int = 2
    """Processes that decode images."""
    method: str | None = None
    """What the rows are called in tables; none: random init, ImageNet, DreamTeacher or the path's name."""
    out: Path | None = None
    """Folder whose results.jsonl the rows are added to."""


@dataclass
class Bench:
    """One backbone with the data; its frozen features are extracted when first asked for."""

    student: Student
    config: EvaluateConfig
    classification: ClassificationData | None
    segmentation: SegmentationData | None
    run: Path | None = None
    extracted: tuple[Tensor, Tensor] | None = None

    def labelled(self) -> ClassificationData:
        """The labelled images, or a UserError."""
        if self.classification is None:
            raise UserError("knn, linear and finetune need labelled images.", "Give --train and --test.")
        return self.classification

    def masked(self) -> SegmentationData:
        """The images with masks, or a UserError."""
        if self.segmentation is None:
            raise UserError("The segmentation tasks need masks.", "Give --images and --masks.")
        return self.segmentation

    def run_folder(self) -> Path:
        """The run that the backbone is from, or a UserError."""
        if self.run is None:
            raise UserError("--neck and the task distilled need a run.", "Give its folder as --init.")
        return self.run

    def features(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training features and labels, test features and labels."""
        data, size, precision = self.labelled(), self.config.batch_size, self.config.precision
        if self.extracted is None:
            train = extract_features(self.student, data.train, batch_size=size, precision=precision)
            test = extract_features(self.student, data.test, batch_size=size, precision=precision)
            self.extracted = train, test
        return self.extracted[0], data.train_labels, self.extracted[1], data.test_labels


def _knn(bench: Bench, _budget: int, _seed: int) -> Iterator[Metric]:
    return knn(*bench.features(), classes=len(bench.labelled().classes), k=bench.config.knn_k)


def _linear(bench: Bench, labels: int, seed: int) -> Iterator[Metric]:
    classes = len(bench.labelled().classes)
    return linear(*bench.features(), classes=classes, labels=labels, seed=seed)


def _finetune(bench: Bench, labels: int, seed: int) -> Iterator[Metric]:
    student, data, config = bench.student, bench.labelled(), bench.config
    precision, size = config.precision, config.batch_size
    return finetune(
        student, data, config.finetune, labels=labels, seed=seed, precision=precision, batch_size=size
    )


def _segment(bench: Bench, masks: int, seed: int, *, freeze: bool) -> Iterator[Metric]:
    config = bench.config
    return segment(
        bench.student,
        bench.masked(),
        config.segment,
        masks=masks,
        freeze=freeze,
        seed=seed,
        precision=config.precision,
        batch_size=config.batch_size,
        neck=neck_weights(bench.run_folder()) if config.neck else None,
    )


def _distilled(bench: Bench, _budget: int, _seed: int) -> Iterator[Metric]:
    config = bench.config
    return distilled(
        load_distilled(bench.run_folder()).to(device_of(bench.student)),
        segmentation=bench.segmentation,
        classification=bench.classification,
        ignore_index=config.segment.ignore_index,
        precision=config.precision,
        batch_size=config.batch_size,
    )


def _segment_linear(bench: Bench, masks: int, seed: int) -> Iterator[Metric]:
    config = bench.config
    return segment_linear(
        bench.student,
        bench.masked(),
        masks=masks,
        seed=seed,
        ignore_index=config.segment.ignore_index,
        precision=config.precision,
        batch_size=config.batch_size,
    )


# Name -> (bench, labels per class or masks, seed) -> (metric, value) pairs.
TASKS: dict[str, Callable[[Bench, int, int], Iterator[Metric]]] = {
    "knn": _knn,
    "linear": _linear,
    "finetune": _finetune,
    "segment-frozen": functools.partial(_segment, freeze=True),
    "segment-finetune": functools.partial(_segment, freeze=False),
    "segment-linear": _segment_linear,
    **dict.fromkeys(DISTILLED, _distilled),
}


# Tasks that depend on no draw of labels.
UNDRAWN = ("knn", *DISTILLED)


def _with_masks(tasks: Sequence[str]) -> bool:
    return bool({*SEGMENTATION, "distilled"} & set(tasks))


def _with_classes(tasks: Sequence[str]) -> bool:
    return bool({*CLASSIFICATION, "distilled-classes"} & set(tasks))


def evaluate_student(
    make_student: Callable[[int], Student],
    config: EvaluateConfig,
    *,
    method: str,
    classification: ClassificationData | None = None,
    segmentation: SegmentationData | None = None,
    run_of: Callable[[int], Path] | None = None,
) -> Iterator[Row]:
    """The rows of one method, in memory: `config` gives tasks, seeds and settings, its folders are not read.

    Args:
        make_student: the backbone for a seed. When it returns the same object as for the seed before, frozen
            features are reused, and what depends on no draw (knn) is reported once.
        config: see `EvaluateConfig`; without tasks, all that the data allow.
        method: the name of these rows.
        classification: for knn, linear, finetune.
        segmentation: for segment-frozen, segment-finetune, segment-linear.
        run_of: the run folder of a seed's backbone, for the config's `neck` and the task distilled.

    Yields:
        {"method", "student", "task", "metric", "value", "labels", "seed", "seconds"}: `labels` is per class
        (None for knn, which uses all of them) or a number of masks, `seconds` that of the whole task.
    """
    device = pick_device(config.device)
    tasks: Sequence[str] = config.tasks or [
        *(CLASSIFICATION if classification is not None else ()),
        *(SEGMENTATION if segmentation is not None else ()),
    ]
    bench: Bench | None = None
    for seed in config.seeds:
        student = make_student(seed)
        seen = bench is not None and student is bench.student
        if bench is None or not seen:
            run = run_of(seed) if run_of else None
            bench = Bench(student.to(device), config, classification, segmentation, run)
        for task in tasks:
            if seen and task in UNDRAWN:
                continue
            for budget in _budgets(task, config):
                start = time.perf_counter()
                results = list(TASKS[task](bench, budget or 0, seed))
                seconds = round(time.perf_counter() - start, 3)
                for metric, value in results:
                    yield {
                        "method": method,
                        "student": student.name,
                        "task": task,
                        "metric": metric,
                        "value": value,
                        "labels": budget,
                        "seed": seed,
                        "seconds": seconds,
                    }


def _budgets(task: str, config: EvaluateConfig) -> tuple[int | None, ...]:
    """Labels per class or masks that a task runs with."""
    if task in UNDRAWN:
        return (None,)
    return config.mask_counts if task in SEGMENTATION else config.labels


def evaluate(config: EvaluateConfig, *, log: Callable[[str], None] = print) -> list[Row]:
    """Evaluates one backbone on folders of images; every check comes before any work.

    Args:
        config: see `EvaluateConfig`.
        log: receives lines for the screen.

    Returns:
        The rows, as `evaluate_student` yields them; they are also added to out/results.jsonl.

    Raises:
        UserError: for anything wrong with the config, the folders or the weights.
    """
    tasks = check_config(config)
    # Made before the images are read, so that a wrong name or file fails at once.
    name = config.student or recorded_student(config.init)
    first = create_student(name, init=config.init, seed=config.seeds[0])

    def make_student(seed: int) -> Student:
        return create_student(name, seed=seed) if config.init == "random" else first

    run = _run_folder(config, tasks)
    segmentation = _load_segmentation(config) if _with_masks(tasks) else None
    classification = None
    if _with_classes(tasks):
        classification = load_classes(
            config.train, config.test, config.size,
            strict=config.strict, cache_gb=config.cache_gb, workers=config.workers,
        )  # fmt: skip
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in evaluate_student(
        make_student,
        config,
        method=config.method or method_name(config.init),
        classification=classification,
        segmentation=segmentation,
        run_of=(lambda _seed: run) if run else None,
    ):
        rows.append(row)
        if config.out is not None:
            with open(config.out / "results.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        if row["metric"] == HEADLINE[row["task"]]:
            log(f"{row_title(row)}, seed {row['seed']}: {row['value']:.3f} ({row['seconds']:.1f} s)")
    log(summary_table(rows))
    return rows


def _distilled_task(config: EvaluateConfig) -> tuple[str, ...]:
    """The task that scores the label head of the run in `init`, where it has one and there is data for it."""
    run = Path(config.init).expanduser()
    if not has_head(run):
        return ()
    if load_distilled(run).pooled:
        return ("distilled-classes",) if config.train or config.test else ()
    return ("distilled",) if config.images or config.masks else ()


def _run_folder(config: EvaluateConfig, tasks: Sequence[str]) -> Path | None:
    """The run that `init` names, checked where its neck or its label head is asked for."""
    run = Path(config.init).expanduser()
    if set(DISTILLED) & set(tasks):
        load_distilled(run)
    if config.neck:
        neck_weights(run)
    return run if run.is_dir() else None


def method_name(init: str) -> str:
    """What rows are called when the caller gives no name: what `init` is, or the name of its path."""
    if init in ("random", "imagenet"):
        return {"random": "random init", "imagenet": "ImageNet"}[init]
    ours = is_ours(weight_file(init))
    return "DreamTeacher" if ours else Path(init).name


def check_config(config: EvaluateConfig) -> tuple[str, ...]:
    """The tasks that will run; reads no image.

    Raises:
        UserError: for an unknown task, missing or differing folders, or more labels than there are.
    """
    for task in config.tasks:
        if task not in TASKS:
            raise UserError(
                f"There is no task '{task}'.{did_you_mean(task, TASKS)}", f"Tasks: {', '.join(TASKS)}."
            )
    pick_device(config.device)
    _check_numbers(config)
    tasks: tuple[str, ...] = config.tasks or (
        *(CLASSIFICATION if config.train or config.test else ()),
        *(SEGMENTATION if config.images or config.masks else ()),
        *_distilled_task(config),
    )
    if not tasks:
        raise UserError(
            "There is nothing to evaluate on.",
            "Give --train and --test (one folder per class), or --images and --masks.",
        )
    if _with_classes(tasks):
        test = test_source(config.train, config.test)
        if config.train is None or test is None:
            raise UserError("knn, linear and finetune need labelled images.", "Give both --train and --test.")
        drawn = set(tasks) & {"linear", "finetune"}
        check_classes(config.train, test, max(config.labels) if drawn else 1)
    if _with_masks(tasks):
        check_masks(*_places(config))
    for place in (config.out, *config.out.parents) if config.out is not None else ():
        if place.exists():
            if not place.is_dir() or not os.access(place, os.W_OK):
                raise UserError(f"'{place}' is no folder that can be written.", "Choose another --out.")
            break
    return tasks


def _check_numbers(config: EvaluateConfig) -> None:
    wanted = {"labels": 1, "mask_counts": 2, "seeds": 0}
    for name, least in wanted.items():
        values = getattr(config, name)
        if not values or min(values) < least or len(set(values)) < len(values):
            raise UserError(
                f"{name} = {values or 'nothing'}: expected different numbers, each at least {least}.",
                f"Give for example {EvaluateConfig.__dataclass_fields__[name].default}.",
            )
    if any(side < 32 or side % 32 for side in config.size):
        raise UserError(
            f"size {config.size[0]}x{config.size[1]} does not fit strides up to 32.",
            "Give height and width as multiples of 32.",
        )
    if min(config.batch_size, config.knn_k) < 1:
        raise UserError("batch_size or knn_k is below 1.", "Give at least 1.")


def _load_segmentation(config: EvaluateConfig) -> SegmentationData:
    data = load_masks(
        *_places(config), config.size, ignore_index=config.segment.ignore_index, binary=config.binary_masks
    )
    draw_masks(len(data.pool.images), max(config.mask_counts), seed=0)  # fails where there are too few
    return data


def _places(config: EvaluateConfig) -> tuple[Path | None, Path | None, Path | None, Path | None]:
    return config.images, config.masks, config.test_images, config.test_masks
