"""What does a format of stored features cost in accuracy?

The demo's X-rays, teacher and student. Every row has the same images, steps, batches, initial weights and label draws
(by seed); only where the student's targets come from differs:
  online                the teacher runs at every step, fresh noise, fresh flips
  online, no flips      so that one stored draw without flips has its like
  all the others        read from a store of that format; `draws` are noises (and orientations) kept of each image

    python benchmarks/features/accuracy.py --work runs/features --out benchmarks/features/accuracy.csv

Finished rows are kept in the working folder, with their settings and the machine, and not computed again: the formats may
be named one at a time. Rows of other settings, or that do not say which, are refused.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import shlex
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dreamteacher import __version__
from dreamteacher.cli.config import DemoConfig
from dreamteacher.cli.demo import demo_recipe, xray_folders
from dreamteacher.data import image_set
from dreamteacher.data.images import find_images
from dreamteacher.distill.config import MakeFeaturesConfig
from dreamteacher.distill.pretrain import pretrain
from dreamteacher.distill.store.files import read_manifest
from dreamteacher.distill.store.items import layout
from dreamteacher.distill.store.make import make_features
from dreamteacher.downstream.evaluate import EvaluateConfig, evaluate_student
from dreamteacher.downstream.features import labelled_data
from dreamteacher.models.student import create_student
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.config import changed_keys
from dreamteacher.runtime.distributed.device import pick_device, resolve_precision
from dreamteacher.runtime.errors import UserError, shorten
from dreamteacher.runtime.run_folder import read_rows
from dreamteacher.teachers.registry import fingerprint

# Name -> settings of `make-features`; none: the teacher runs online.
FORMATS: dict[str, dict[str, Any] | None] = {
    "online": None,
    "raw, float16": {"keep": "all"},
    "whitened, int8": {"keep": "whitened"},
    "PCA 63 + energy, float16": {"store": ("float16",)},
    "PCA 63 + energy, int8": {},
    "PCA 31 + energy, int8": {"channels": 32},
    "random 63 + energy, int8": {"keep": "random"},
    "PCA 63 + energy, int8, 1 draw": {"draws": 1},
    "PCA 63 + energy, int8, 4 draws": {"draws": 4},
    "online, no flips": None,
    "PCA 63 + energy, int8, 1 draw, no flips": {"draws": 1, "flip": False},
}
COLUMNS = (
    "method",
    "draws",
    "bytes",
    "task",
    "metric",
    "labels",
    "seed",
    "value",
    "images",
    "epochs",
    "steps",
    "student",
    "teacher",
    "batch",
    "device",
    "precision",
    "torch",
    "version",
    "machine",
    "command",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="CSV of all rows in the working folder")
    parser.add_argument("--work", type=Path, default=Path("runs/features"))
    parser.add_argument("--images", type=Path, help="as of the demo")
    parser.add_argument("--teacher", default="chest-xray-64")
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--every", type=int, default=4, help="pretraining sees every so many-th image")
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 50])
    args = parser.parse_args()

    same = settings(args)
    done = {kind: finished(args.work / f"{short(kind)}.jsonl", same) for kind in FORMATS}
    train, test, _, _ = xray_folders(args.images)
    classification = labelled_data(
        image_set.load_images(train, (64, 64)), image_set.load_images(test, (64, 64))
    )
    images = thinned(train, args.work / "images", args.every)
    evaluation = EvaluateConfig(
        student=args.student, train=train, test=test, size=(64, 64), labels=tuple(args.labels),
        seeds=tuple(args.seeds), tasks=("knn", "linear"),
    )  # fmt: skip
    for kind in args.formats:
        if done[kind]:
            continue
        begin = time.perf_counter()
        runs, facts = students(args, kind, images)
        rows = list(evaluate_student(
            lambda seed, runs=runs: create_student(args.student, init=str(runs[seed])), evaluation,
            method=kind, data={"classification": classification},
        ))  # fmt: skip
        print(f"{kind}: {time.perf_counter() - begin:.0f} s", flush=True)
        told = facts | stamp(args) | {"settings": same}
        text = "".join(json.dumps(row | told) + "\n" for row in rows)
        checkpoint.write_text(args.work / f"{short(kind)}.jsonl", text)
    if args.out:
        write(args.out, args.work)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What all rows of one table have in common."""
    named = ("teacher", "student", "every", "epochs", "batch_size", "seeds", "labels")
    found = {name: getattr(args, name) for name in named}
    return found | {"images": str(args.images), "teacher_sha256": fingerprint(args.teacher)}


def finished(path: Path, same: dict[str, Any]) -> bool:
    """Whether the rows of a format are there.

    Raises:
        UserError: for rows of other settings, or that do not say of which.
    """
    rows = read_rows(path)
    for row in rows:
        told = row.get("settings")
        changes = changed_keys(told, same) if isinstance(told, dict) else ["they do not say which"]
        if changes:
            raise UserError(
                f"'{path}' holds rows of other settings: {shorten(changes)}.",
                "Give the old settings, or another --work.",
            )
    return bool(rows)


def thinned(folder: Path, place: Path, every: int) -> Path:
    """A folder of links to every so many-th image of each class, and to nothing else."""
    shutil.rmtree(place, ignore_errors=True)
    for of_class in sorted(p for p in folder.iterdir() if p.is_dir()):
        (place / of_class.name).mkdir(parents=True, exist_ok=True)
        for path in find_images(of_class)[::every]:
            (place / of_class.name / path.name).symlink_to(path.resolve())
    return place


def short(kind: str) -> str:
    return kind.replace(",", "").replace("+ ", "").replace(" ", "-")


def students(args: argparse.Namespace, kind: str, images: Path) -> tuple[dict[int, Path], dict[str, Any]]:
    """One pretraining for each seed, and what the rows say of all of them."""
    asked, store = FORMATS[kind], args.work / f"store-{short(kind)}"
    facts: dict[str, Any] = {"draws": "fresh", "bytes": 0}
    if asked is not None:
        make_features(
            MakeFeaturesConfig(images=images, out=store, teacher=args.teacher, size=(64, 64), **asked)
        )
        plan, _, _ = read_manifest(store)
        facts = {"draws": plan.draws, "bytes": layout(plan)[1]}
    demo = DemoConfig(out=args.work, teacher=args.teacher, student=args.student, epochs=args.epochs)
    runs = {}
    for seed in args.seeds:
        recipe = replace(
            demo_recipe(demo, images, seed), out=args.work / f"pretrain-{short(kind)}-{seed}",
            features=None if asked is None else store, batch_size=args.batch_size, flip="no flips" not in kind,
        )  # fmt: skip
        run = pretrain(recipe)
        assert run is not None
        runs[seed] = run
    last = read_rows(runs[args.seeds[0]] / "metrics.jsonl")[-1]
    count = len(find_images(images))
    return runs, facts | {"images": count, "epochs": args.epochs, "steps": last["step"]}


def stamp(args: argparse.Namespace) -> dict[str, Any]:
    """Where and how rows are computed, now."""
    device = pick_device()
    return {
        "student": args.student, "teacher": args.teacher, "batch": args.batch_size,
        "device": f"{device} x {torch.get_num_threads()} threads",
        "precision": str(resolve_precision(device, "auto")).removeprefix("torch."),
        "torch": torch.__version__, "version": __version__, "machine": platform.machine(),
        "command": "python benchmarks/features/accuracy.py " + shlex.join(sys.argv[1:]),
    }  # fmt: skip


def write(out: Path, work: Path) -> None:
    """The CSV of all rows in the working folder, as they were stamped."""
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for kind in FORMATS:
            writer.writerows(read_rows(work / f"{short(kind)}.jsonl"))


if __name__ == "__main__":
    main()
