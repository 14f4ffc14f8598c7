"""A teacher trained on one GPU, a student pretrained from it, and what the student is worth: one command, 10 minutes.

A diffusion model (preset gpu-64) learns the images, unlabelled, for a few minutes: where steps are slow, it gets fewer,
and that is said. A ResNet-18 is pretrained from its maps; kNN and linear probes compare it with the same network
untrained. CIFAR-10 (32 px, enlarged to 64) comes from `benchmarks/cifar10/prepare.py`; any two folders of one folder per
class will do. Nothing is compiled: that takes longer than it gives back in so short a run.

    python benchmarks/gpu/train.py --train cifar10/train --test cifar10/test --out runs/gpu --csv benchmarks/gpu
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
import time
from pathlib import Path

import torch

from dreamteacher.data import image_set
from dreamteacher.distill.pretrain import PretrainConfig, pretrain
from dreamteacher.downstream.evaluate import EvaluateConfig, evaluate_student
from dreamteacher.downstream.features import labelled_data
from dreamteacher.downstream.tables import summary_table
from dreamteacher.models.student import create_student
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.distributed.device import pick_device
from dreamteacher.runtime.run_folder import RunDir
from dreamteacher.teachers.training.config import TrainTeacherConfig
from dreamteacher.teachers.training.diffusion import PRESETS, DiffusionObjective, network_spec
from dreamteacher.teachers.training.objective import TrainingPlan
from dreamteacher.teachers.training.train import train_teacher

COLLECT = Path(__file__).parent.parent / "collect.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--csv", type=Path, help="folder for results.csv and environment.json")
    parser.add_argument(
        "--tiny", action="store_true", help="two steps of small networks: the same code on any machine"
    )
    parser.add_argument("--preset", default="gpu-64")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--teacher-steps", type=int, default=1500, help="at most")
    parser.add_argument("--teacher-minutes", type=float, default=3.5, help="its steps are cut down to that")
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--width", type=int, default=256, help="channels of the regressor")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the evaluation")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.tiny:
        args.preset, args.teacher_steps, args.student, args.width, args.batch_size = (
            "cpu-64",
            2,
            "test_resnet",
            8,
            8,
        )
        args.epochs, args.labels, args.seeds, args.device = 1.0, [2], [0, 1], "cpu"
    begin = time.monotonic()
    size, workers = (args.size, args.size), os.cpu_count() or 1
    steps = teacher_steps(args)
    teacher = train_teacher(TrainTeacherConfig(
        images=args.train, out=args.out / "teacher", preset=args.preset, size=size, steps=steps,
        batch_size=args.batch_size, device=args.device, sample_every=steps, workers=workers,
    ))  # fmt: skip
    trained = time.monotonic()
    run = pretrain(PretrainConfig(
        images=args.train, out=args.out / "pretrain", teacher=str(teacher), student=args.student, width=args.width,
        batch_size=args.batch_size, epochs=args.epochs, warmup_epochs=args.epochs / 10, size=size,
        device=args.device, probe_every=0, compile="off", workers=workers,
    ))  # fmt: skip
    pretrained = time.monotonic()
    evaluation = EvaluateConfig(
        student=args.student, train=args.train, test=args.test, size=size, labels=tuple(args.labels),
        seeds=tuple(args.seeds), tasks=("knn", "linear"), device=args.device, workers=workers,
    )  # fmt: skip
    parts = [image_set.load_images(folder, size, workers=workers) for folder in (args.train, args.test)]
    images = labelled_data(*parts)
    rows = []
    for method, init in (("random init", "random"), ("DreamTeacher", str(run))):
        rows += evaluate_student(
            lambda seed, init=init: create_student(args.student, init=init, seed=seed), evaluation, method=method,
            data={"classification": images},
        )  # fmt: skip
    results = args.out / "results.jsonl"
    checkpoint.write_text(results, "".join(json.dumps(row) + "\n" for row in rows))
    print(summary_table(rows))
    note = (
        f"{args.train.parent.name}: teacher {args.preset}, {steps} steps of {args.batch_size} in "
        f"{trained - begin:.0f} s; student {args.epochs:g} epochs in {pretrained - trained:.0f} s; evaluation in "
        f"{time.monotonic() - pretrained:.0f} s"
    )
    print(note)
    if args.csv:
        command = "python benchmarks/gpu/train.py " + " ".join(sys.argv[1:])
        runpy.run_path(str(COLLECT))["collect"](results, args.csv, command=command, note=note)


def teacher_steps(args: argparse.Namespace) -> int:
    """As many of the steps asked for as fit in the teacher's minutes; a training that was begun keeps its number.

    Its learning rate falls to the end of its steps, so they are counted before the first one: ten are timed, of a network
    that is thrown away.
    """
    begun = RunDir(args.out / "teacher").config()
    if begun is not None:
        return begun["config"]["steps"]
    preset, device, size = PRESETS[args.preset], pick_device(args.device), (args.size, args.size)
    plan = TrainingPlan(
        seed=0, steps=args.teacher_steps, batch_size=args.batch_size, lr=preset.lr, device=device, precision="auto"
    )  # fmt: skip
    objective = DiffusionObjective(preset, network_spec(preset, size, 3, "linear"), plan)
    images = torch.rand(args.batch_size, 3, *size, device=device)
    float(objective.step(0, images)["loss"])  # read: a GPU has done what was asked of it
    begin = time.perf_counter()
    for step in range(1, 11):
        loss = objective.step(step, images)["loss"]
    float(loss)
    each = (time.perf_counter() - begin) / 10
    steps = max(1, min(args.teacher_steps, int(60 * args.teacher_minutes / each)))
    if steps < args.teacher_steps:
        print(
            f"A step takes {1e3 * each:.0f} ms: {steps} of the {args.teacher_steps} steps fit in "
            f"{args.teacher_minutes:g} minutes.",
            flush=True,
        )
    return steps


if __name__ == "__main__":
    main()
