"""The one evaluation: any backbone (random, ImageNet, a file, a run) on the same tasks, draws and seeds."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dreamteacher.downstream.check import (
    UNDRAWN,
    budgets,
    check_config,
    mask_places,
    with_classes,
    with_masks,
)
from dreamteacher.downstream.classification.finetune import finetune
from dreamteacher.downstream.classification.finetune_full import (
    TimmClassifier,
    batch_size_of,
    finetune_full,
    recipe_of,
)
from dreamteacher.downstream.classification.knn import knn
from dreamteacher.downstream.classification.linear import linear
from dreamteacher.downstream.classification.linear_sgd import linear_sgd
from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.downstream.detection.data import DetectionData, load_detection
from dreamteacher.downstream.detection.train import detect
from dreamteacher.downstream.features import ClassificationData, device_of, extract_features
from dreamteacher.downstream.loop import Saved
from dreamteacher.downstream.panoptic.train import PanopticData, load_panoptic, panoptic
from dreamteacher.downstream.presets import check_preset
from dreamteacher.downstream.results import LONG, Results
from dreamteacher.downstream.segmentation.crops import SemanticData, load_files
from dreamteacher.downstream.segmentation.distilled import distilled
from dreamteacher.downstream.segmentation.few_masks import (
    SegmentationData,
    draw_masks,
    segment,
    segment_linear,
)
from dreamteacher.downstream.segmentation.readout import level_of, readout
from dreamteacher.downstream.segmentation.semantic import semantic
from dreamteacher.downstream.sources import load_classes, load_masks
from dreamteacher.downstream.tables import row_title, separated, summary_table
from dreamteacher.downstream.tasks import (
    CLASSIFICATION,
    DETECTION,
    DISTILLED,
    HEADLINE,
    PANOPTIC,
    SEGMENTATION,
    STREAMED,
    Metric,
    Row,
)
from dreamteacher.models.distilled import load_distilled, neck_weights
from dreamteacher.models.student import Student, create_student, is_ours, recorded_student, weight_file
from dreamteacher.runtime.distributed.device import pick_device
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.loggers import check_loggers

__all__ = [
    "ClassificationData",
    "EvaluateConfig",
    "SegmentationData",
    "check_config",
    "evaluate",
    "evaluate_student",
    "separated",
    "summary_table",
]


@dataclass
class Bench:
    """One backbone with the data; its frozen features are extracted when first asked for."""

    student: Student
    config: EvaluateConfig
    classification: ClassificationData | None
    segmentation: SegmentationData | None
    run: Path | None = None
    detection: DetectionData | None = None
    streamed: SemanticData | None = None
    segments: PanopticData | None = None
    extracted: tuple[Tensor, Tensor] | None = None
    saved: Saved | None = None  # where the training of the present task is kept

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

    def instances(self) -> DetectionData:
        """The images with instances, or a UserError."""
        if self.detection is None:
            raise UserError("detect and detect-cascade need instances.", "Give --images and --instances.")
        return self.detection

    def files(self) -> SemanticData:
        """The streamed images with masks, or a UserError."""
        if self.streamed is None:
            raise UserError("semantic and readout need masks in folders.", "Give --images and --masks.")
        return self.streamed

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
    settings: dict[str, Any] = {"precision": config.precision, "batch_size": config.batch_size}
    return finetune(student, data, config.finetune, labels=labels, seed=seed, **settings)


def _settings(bench: Bench, seed: int) -> dict[str, Any]:
    config = bench.config
    plain = {name: getattr(config, name) for name in ("size", "batch_size", "precision", "workers")}
    return {"seed": seed, "saved": bench.saved, **plain}


def _linear_sgd(bench: Bench, _budget: int, seed: int) -> Iterator[Metric]:
    train_x, _, test_x, _ = bench.features()
    data, config = bench.labelled(), bench.config.linear_sgd
    return linear_sgd(bench.student, data, config, train_x=train_x, test_x=test_x, **_settings(bench, seed))


def _finetune_full(bench: Bench, _budget: int, seed: int) -> Iterator[Metric]:
    data, config = bench.labelled(), bench.config.finetune_full
    return finetune_full(bench.student, data, config, **_settings(bench, seed))


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


def _detect(bench: Bench, images: int, seed: int, *, cascade: bool) -> Iterator[Metric]:
    config, precision = bench.config.detect, bench.config.precision
    settings: dict[str, Any] = {"images": images or None, "seed": seed, "saved": bench.saved}
    settings["precision"] = precision
    return detect(bench.student, bench.instances(), config, cascade=cascade, **settings)


def _semantic(bench: Bench, masks: int, seed: int) -> Iterator[Metric]:
    return semantic(bench.student, bench.files(), bench.config.semantic, **_streamed(bench, masks, seed))


def _readout(bench: Bench, masks: int, seed: int) -> Iterator[Metric]:
    return readout(bench.student, bench.files(), bench.config.readout, **_streamed(bench, masks, seed))


def _streamed(bench: Bench, masks: int, seed: int) -> dict[str, Any]:
    config = bench.config
    plain = {"masks": masks or None, "seed": seed, "saved": bench.saved}
    return {**plain, "precision": config.precision, "workers": config.workers}


def _panoptic(bench: Bench, images: int, seed: int) -> Iterator[Metric]:
    if bench.segments is None:
        raise UserError("panoptic needs segments.", "Give --images, --masks and --segments.")
    config, precision = bench.config.panoptic, bench.config.precision
    settings: dict[str, Any] = {"images": images or None, "seed": seed, "saved": bench.saved}
    settings["precision"] = precision
    return panoptic(bench.student, bench.segments, config, **settings)


# Name -> (bench, labels per class, masks or images, seed) -> (metric, value) pairs.
TASKS: dict[str, Callable[[Bench, int, int], Iterator[Metric]]] = {
    "knn": _knn,
    "linear": _linear,
    "finetune": _finetune,
    "segment-frozen": functools.partial(_segment, freeze=True),
    "segment-finetune": functools.partial(_segment, freeze=False),
    "segment-linear": _segment_linear,
    "semantic": _semantic,
    "readout": _readout,
    "detect": functools.partial(_detect, cascade=False),
    "detect-cascade": functools.partial(_detect, cascade=True),
    "panoptic": _panoptic,
    **dict.fromkeys(DISTILLED, _distilled),
    "linear-sgd": _linear_sgd,
    "finetune-full": _finetune_full,
}


def evaluate_student(
    make_student: Callable[[int], Student],
    config: EvaluateConfig,
    *,
    method: str,
    classification: ClassificationData | None = None,
    segmentation: SegmentationData | None = None,
    run_of: Callable[[int], Path] | None = None,
    detection: DetectionData | None = None,
    streamed: SemanticData | None = None,
    segments: PanopticData | None = None,
    results: Results | None = None,
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
        detection: for detect, detect-cascade.
        streamed: for semantic, readout.
        segments: for panoptic.
        results: where rows are kept, and those that are there are not computed again; None: nowhere.

    Yields:
        {"method", "student", "task", "metric", "value", "labels", "seed", "seconds"}: `labels` is per class
        (None: all of them, as for knn) or a number of masks or images, `seconds` that of the whole task (after a
        stop: of its last part). With `results` also "key", of all that decides the row.
    """
    device = pick_device(config.device)
    tasks: Sequence[str] = config.tasks or [
        *(CLASSIFICATION if classification is not None else ()),
        *(SEGMENTATION if segmentation is not None else ()),
        *(DETECTION if detection is not None else ()),
    ]
    bench: Bench | None = None
    for seed in config.seeds:
        student = make_student(seed)
        seen = bench is not None and student is bench.student
        if bench is None or not seen:
            run = run_of(seed) if run_of else None
            given = classification, segmentation, run, detection, streamed, segments
            bench = Bench(student.to(device), config, *given)
        for task in tasks:
            if seen and task in UNDRAWN:
                continue
            for budget in budgets(task, config):
                facts = results.facts(bench.student, task, budget, seed) if results else {}
                rows = results.found(facts) if results else []
                if rows:
                    yield from rows
                    continue
                start = time.perf_counter()
                kept = results.training(facts) if results else contextlib.nullcontext()
                with kept as bench.saved:
                    metrics = list(TASKS[task](bench, budget or 0, seed))
                seconds = round(time.perf_counter() - start, 3)
                for metric, value in metrics:
                    row = {"method": method, "student": student.name, "task": task, "metric": metric}
                    rows.append({**row, "value": value, "labels": budget, "seed": seed, "seconds": seconds})
                yield from results.add(rows, facts) if results else rows


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
    check_loggers(config.log_to)
    check_preset(config)
    # Made before the images are read, so that a wrong name or file fails at once.
    name = config.student or recorded_student(config.init)
    first = create_student(name, init=config.init, seed=config.seeds[0])

    def make_student(seed: int) -> Student:
        return create_student(name, seed=seed) if config.init == "random" else first

    if "readout" in tasks:
        level_of(first, config.readout)
    if "finetune-full" in tasks:
        TimmClassifier(first, 2, recipe_of(config.finetune_full).drop_path)
    run = _run_folder(config, tasks)
    segmentation = _load_segmentation(config) if with_masks(tasks) else None
    classification = None
    if with_classes(tasks):
        classification = load_classes(
            config.train, config.test, config.size, strict=config.strict, cache_gb=config.cache_gb,
            workers=config.workers,
        )  # fmt: skip
        if "finetune-full" in tasks:
            recipe, parts = recipe_of(config.finetune_full), config.finetune_full.accumulate
            batch_size_of(len(classification.train), recipe, parts)
    streamed = _load_streamed(config, tasks) if set(tasks) & set(STREAMED) else None
    segments = _load_panoptic(config) if set(tasks) & set(PANOPTIC) else None
    detection = _load_detection(config) if set(tasks) & set(DETECTION) else None
    if config.dry_run:
        log(
            f"dry run: nothing was trained or written; {name} ({config.init}) on {', '.join(tasks)}, all is there"
        )
        return []
    method, results = config.method or method_name(config.init), None
    if config.out is not None:
        results = Results(config.out, config, method)
        if set(LONG) & set(tasks):
            results.check(first)
        config.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in evaluate_student(
        make_student,
        config,
        method=method,
        classification=classification,
        segmentation=segmentation,
        run_of=(lambda _seed: run) if run else None,
        detection=detection,
        streamed=streamed,
        segments=segments,
        results=results,
    ):
        rows.append(row)
        if row["metric"] == HEADLINE[row["task"]]:
            there = results is not None and row["key"] in results.reused
            spent = "already there" if there else f"{row['seconds']:.1f} s"
            log(f"{row_title(row)}, seed {row['seed']}: {row['value']:.3f} ({spent})")
    log(summary_table(rows))
    return rows


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


def _load_segmentation(config: EvaluateConfig) -> SegmentationData:
    ignore, binary = config.segment.ignore_index, config.binary_masks
    data = load_masks(*mask_places(config), config.size, ignore_index=ignore, binary=binary)
    draw_masks(len(data.pool.images), max(config.mask_counts), seed=0)  # fails where there are too few
    return data


def _load_detection(config: EvaluateConfig) -> DetectionData:
    assert config.images is not None
    data = load_detection(config.images, config.instances, config.test_images, config.test_instances)
    shown = len(data.pool.shown())
    draw_masks(shown, max(config.detect.images, default=shown), seed=0)  # fails where there are too few
    return data


def _load_streamed(config: EvaluateConfig, tasks: Sequence[str]) -> SemanticData:
    most = max(count or 0 for task in tasks if task in STREAMED for count in budgets(task, config))
    ignore, binary = config.segment.ignore_index, config.binary_masks
    places = mask_places(config)
    return load_files(*places, ignore_index=ignore, binary=binary, most=most, workers=config.workers)


def _load_panoptic(config: EvaluateConfig) -> PanopticData:
    assert config.images is not None
    train = config.images, config.masks, config.segments
    test = config.test_images, config.test_masks, config.test_segments
    data = load_panoptic(*train, *test, workers=config.workers)
    shown = len(data.pool.shown())
    most = max(config.panoptic.detect.images, default=shown)
    draw_masks(shown, most, seed=0)  # fails where there are too few
    return data
