"""What pretraining methods are worth on data that is not ours: CIFAR-10, nuclei (DSB 2018), driving scenes (CamVid).

    python benchmarks/transfer/run.py --data cifar10 --folder data/cifar10 --teacher runs/cifar-teacher --out runs/transfer

Every method pretrains the same backbone on the same unlabelled training images and sees as many of them (images, not
views); random and imagenet pretrain on none here. Layouts of --folder: cifar10 {train,test}/CLASS (see
benchmarks/cifar10/prepare.py); camvid {images,labels}/{train,test}; dsb2018 {images,instances}, of which a half, drawn
by seed 0, is set aside for the scores; tiles of the other half (OUT/dsb2018/tiles, made by --tiles-only too) are what
every method pretrains on, and a teacher should be trained on.

Rows (results.csv and results.jsonl, environment.json beside them): method, student, task, metric, value, labels, seed,
seconds, images_seen, status. A method that cannot run here leaves one row that says why; what was done before is done
once.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import tyro
from PIL import Image

from dreamteacher.data.image_set import load_images
from dreamteacher.data.images import find_images
from dreamteacher.data.seeds import step_generator
from dreamteacher.distill.pretrain import PretrainConfig, pretrain
from dreamteacher.downstream.classification.config import FinetuneConfig
from dreamteacher.downstream.detection.config import DetectConfig
from dreamteacher.downstream.evaluate import EvaluateConfig, evaluate
from dreamteacher.downstream.segmentation.config import SegmentConfig
from dreamteacher.downstream.tables import summary_table
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.run_folder import read_rows

COLUMNS = (
    "method", "student", "task", "metric", "value", "labels", "seed", "seconds", "images_seen", "status",
)  # fmt: skip
STATUS = "smaller-scale (ours; no counterpart in the paper)"
NAMES = {
    "random": "random init", "imagenet": "ImageNet", "simclr": "SimCLR", "mocov2": "MoCo v2", "byol": "BYOL",
    "densecl": "DenseCL", "ddep": "DDeP", "dreamteacher": "DreamTeacher",
}  # fmt: skip
Method = Literal["random", "imagenet", "simclr", "mocov2", "byol", "densecl", "ddep", "dreamteacher"]


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """Compare pretraining methods on one set of images."""

    data: Literal["cifar10", "dsb2018", "camvid"]
    """Which data."""
    folder: Path
    """Where it lies."""
    out: Path
    """Folder of runs and rows; the same command goes on where it stopped."""
    methods: tuple[Method, ...] = ("random", "imagenet", "simclr", "byol", "dreamteacher")
    """Which methods."""
    teacher: str | None = None
    """Of dreamteacher: a name or folder, as `dreamteacher pretrain` takes it."""
    run: str | None = None
    """Instead of a teacher: a finished run folder, used for every seed ({seed} in it is replaced)."""
    imagenet: str = "imagenet"
    """timm's weights, or the path of a weight file."""
    student: str = "resnet18"
    """timm name of the backbone."""
    size: tuple[int, int] = (64, 64)
    """Height and width in pixels, multiples of 32."""
    images_seen: int = 500_000
    """Images that each pretraining sees, cut to whole batches."""
    batch_size: int = 256
    """Images in a step of the pretraining, of all methods."""
    lr: float = 2e-3
    """Of dreamteacher; the other methods have their own."""
    width: int = 256
    """Of dreamteacher's regressor and ddep's decoder."""
    seeds: tuple[int, ...] = (0, 1)
    """At least 2; each is a pretraining and an evaluation of its own."""
    labels: tuple[int, ...] = (10, 50)
    """Labels per class (cifar10)."""
    masks: tuple[int, ...] = (20,)
    """Labelled images (camvid, dsb2018)."""
    scored: int = 0
    """Images of dsb2018 that are scored, of those set aside; 0: all."""
    tiles_only: bool = False
    """Only make the tiles of dsb2018."""
    finetune: FinetuneConfig = field(default_factory=lambda: FinetuneConfig(steps=200))
    """As of `dreamteacher evaluate`."""
    ignore_index: int = 11
    """Id in CamVid's masks that is neither learned nor scored."""
    segment: SegmentConfig = field(default_factory=lambda: SegmentConfig(steps=300))
    """As of `dreamteacher evaluate`; 11 is CamVid's void."""
    detect: DetectConfig = field(
        default_factory=lambda: DetectConfig(
            short_side=(256, 256), test_side=256, longest_side=512, anchor=4.0, proposals=512, rois=128,
            detections=200, width=64, steps=300,
        )
    )  # fmt: skip
    """As of `dreamteacher evaluate`: small anchors and many proposals, for nuclei; `masks` says with how many images."""
    note: str = ""
    """For environment.json: budget, teacher, anything a reader must know."""
    device: str = "auto"
    """auto, cpu, cuda ..."""
    workers: int = 2
    """Processes that decode or augment."""


def script(*parts: str) -> ModuleType:
    """A script of benchmarks/ as a module."""
    name = "benchmark_" + "_".join(parts).removesuffix(".py")
    if name not in sys.modules:
        path = Path(__file__).parent.parent.joinpath(*parts)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


# --- the data: (unlabelled images, settings of the evaluation) -----------------------------------------------


def cifar10(config: TransferConfig) -> tuple[Path, dict[str, Any]]:
    train, test = config.folder / "train", config.folder / "test"
    return train, {
        "train": train, "test": test, "tasks": ("knn", "linear", "finetune"), "labels": config.labels,
    }  # fmt: skip


def camvid(config: TransferConfig) -> tuple[Path, dict[str, Any]]:
    images, labels = config.folder / "images", config.folder / "labels"
    return images / "train", {
        "images": images / "train", "masks": labels / "train", "test_images": images / "test",
        "test_masks": labels / "test", "tasks": ("segment-frozen", "segment-finetune"),
        "mask_counts": config.masks,
    }  # fmt: skip


def dsb2018(config: TransferConfig) -> tuple[Path, dict[str, Any]]:
    parts = halves(config.folder, config.out / "dsb2018", scored=config.scored)
    return tiles(parts / "train" / "images", parts / "tiles", config.size), {
        "images": parts / "train" / "images", "instances": parts / "train" / "instances",
        "test_images": parts / "test" / "images", "test_instances": parts / "test" / "instances",
        "tasks": ("detect",), "detect": replace(config.detect, image_counts=config.masks),
    }  # fmt: skip


DATA: dict[str, Callable[[TransferConfig], tuple[Path, dict[str, Any]]]] = {
    "cifar10": cifar10, "camvid": camvid, "dsb2018": dsb2018,
}  # fmt: skip


def halves(folder: Path, out: Path, *, scored: int = 0) -> Path:
    """{train,test}/{images,instances} of links into `folder`, a half each (of test: the first `scored`), always the
    same."""
    images = find_images(folder / "images")
    order = torch.randperm(len(images), generator=step_generator(0, 0, "dsb2018")).tolist()
    half = len(images) // 2
    for place, i in enumerate(order[: half + scored] if scored else order):
        part = out / ("train" if place < half else "test")
        for kind in ("images", "instances"):
            target = folder / kind / images[i].name
            link = part / kind / images[i].name
            if not target.is_file():
                raise UserError(f"'{target}' is missing.", "Give the folder that holds images and instances.")
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                os.symlink(target.resolve(), link)
    return out


def tiles(images: Path, out: Path, size: tuple[int, int]) -> Path:
    """Images cut into tiles of `size` at their own resolution, edges left over; written whole or not at all."""
    if out.is_dir():
        return out
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    height, width = size
    for path in find_images(images):
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        for y in range(0, image.height - height + 1, height):
            for x in range(0, image.width - width + 1, width):
                name = f"{path.stem}_{y:04d}_{x:04d}.png"
                image.crop((x, y, x + width, y + height)).save(temporary / name, compress_level=1)
    temporary.rename(out)
    return out


# --- the methods: (method, seed) -> weights and how many images they saw here --------------------------------


def pretrained(config: TransferConfig, method: str, seed: int, images: Path) -> tuple[str, int]:
    """What `init` is for a method, and the images that it saw."""
    if method in ("random", "imagenet"):
        return (config.imagenet if method == "imagenet" else "random"), 0
    out = config.out / f"{method}-{seed}"
    if method == "dreamteacher":
        return dreamteacher(config, seed, images, out)
    module = script("baselines", "run.py")
    seen = config.images_seen // config.batch_size * config.batch_size
    module.pretrain_baseline(
        module.BaselineConfig(
            images=images, out=out, method=method, student=config.student, images_seen=seen,
            batch_size=config.batch_size, size=config.size, width=config.width, seed=seed,
            device=config.device, workers=config.workers,
        )
    )  # fmt: skip
    return str(out), seen


def dreamteacher(config: TransferConfig, seed: int, images: Path, out: Path) -> tuple[str, int]:
    if config.run is not None:
        folder = config.run.replace("{seed}", str(seed))
        rows = read_rows(Path(folder) / "metrics.jsonl")
        return folder, max((row["images_seen"] for row in rows), default=0)
    if config.teacher is None:
        raise UserError(
            "dreamteacher needs a teacher.", "Give --teacher or --run, or leave it out of --methods."
        )
    per_epoch = len(load_images(images, config.size, cache_gb=0)) // config.batch_size
    if not per_epoch:
        raise UserError(f"'{images}' has no batch of {config.batch_size} images.", "Lower --batch-size.")
    steps = config.images_seen // config.batch_size
    pretrain(
        PretrainConfig(
            images=images, out=out, teacher=config.teacher, student=config.student, size=config.size,
            batch_size=config.batch_size, epochs=steps / per_epoch, warmup_epochs=0.1 * steps / per_epoch,
            lr=config.lr, width=config.width, seed=seed, device=config.device, workers=config.workers,
        )
    )  # fmt: skip
    seen = read_rows(out / "metrics.jsonl")[-1]["images_seen"]
    assert seen == steps * config.batch_size, "the methods saw different numbers of images"
    return str(out), seen


# --- the comparison ------------------------------------------------------------------------------------------


def compare(config: TransferConfig) -> list[dict[str, Any]]:
    """All rows; those that are there already are kept.

    Raises:
        UserError: for wrong settings, before anything is made.
    """
    if len(set(config.seeds)) < 2:
        raise UserError(f"seeds {config.seeds}: one seed shows no spread.", "Give at least two.")
    if config.images_seen < config.batch_size:
        raise UserError("images_seen is less than one batch.", "Raise --images-seen, or lower --batch-size.")
    if "dreamteacher" in config.methods and config.teacher is None and config.run is None:
        raise UserError(
            "dreamteacher needs a teacher.", "Give --teacher or --run, or leave it out of --methods."
        )
    images, settings = DATA[config.data](config)
    if config.tiles_only:
        return []
    find_images(images)
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "results.jsonl"
    rows = [row for row in read_rows(path) if row["status"] == STATUS]
    done = {(row["method"], row["seed"]) for row in rows}
    for seed in config.seeds:
        for method in config.methods:
            if (NAMES[method], seed) not in done:
                rows += evaluated(config, method, seed, images, settings)
                save(path, rows)
    save(path, rows)
    script("collect.py").write_environment(config.out / "environment.json", " ".join(sys.argv), config.note)
    print(summary_table([row for row in rows if row["status"] == STATUS]))
    return rows


def evaluated(
    config: TransferConfig, method: str, seed: int, images: Path, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """The rows of one method and seed, or one that says why there are none."""
    try:
        init, seen = pretrained(config, method, seed, images)
        evaluation = EvaluateConfig(
            student=config.student, init=init, method=NAMES[method], size=config.size, seeds=(seed,),
            finetune=config.finetune, segment=config.segment, ignore_index=config.ignore_index, device=config.device, workers=config.workers,
            **settings,
        )  # fmt: skip
        return [{**row, "images_seen": seen, "status": STATUS} for row in evaluate(evaluation)]
    except UserError as error:
        reason = " ".join(str(error).split())
        print(f"{NAMES[method]}, seed {seed}: {reason}")
        empty = dict.fromkeys(COLUMNS)
        return [
            {
                **empty,
                "method": NAMES[method],
                "student": config.student,
                "seed": seed,
                "status": f"not run: {reason}",
            }
        ]


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    """results.jsonl, and results.csv beside it."""
    checkpoint.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    checkpoint.write_text(path.with_suffix(".csv"), text.getvalue())


def main() -> None:
    try:
        compare(tyro.cli(TransferConfig, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
