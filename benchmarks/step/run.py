"""Does the pretraining step cost more than its parts?

Three things are timed in turn, again and again, in one process, on the same images and networks:
  step     - what `pretrain` runs: batch, noise, teacher, student, regressor, losses, backward, optimizer
  teacher  - the teacher's forward alone, to its last level
  student  - student and regressor alone: forward, losses against fixed maps, backward, optimizer
The claim is the median over rounds of step / (teacher + student).

    python benchmarks/step/run.py --out benchmarks/step/step.csv
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import platform
import runpy
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torchvision.transforms.v2.functional import to_pil_image

from dreamteacher import __version__
from dreamteacher.data import batches, image_set
from dreamteacher.distill import dataset
from dreamteacher.distill.config import PretrainConfig
from dreamteacher.models.regressor import FeatureRegressor
from dreamteacher.models.student import create_student
from dreamteacher.runtime.distributed.device import autocast, pick_device, resolve_precision
from dreamteacher.teachers.registry import load_teacher

Stepper = runpy.run_path(str(Path(__file__).parent.parent / "stepper.py"))["Stepper"]
BUSY = os.getloadavg()[0]  # of other processes: this one has just begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--teacher", default="chest-xray-64")
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=3, help="steps of each kind in a round")
    args = parser.parse_args()

    device = pick_device()
    config = PretrainConfig(
        images=Path("-"), out=Path("-"), teacher=args.teacher, student=args.student,
        batch_size=args.batch_size, width=args.width, ema=0.0,
    )  # fmt: skip
    teacher = load_teacher(args.teacher, device=device)
    student = create_student(args.student).to(device)
    regressor = FeatureRegressor(student.specs, teacher.specs, width=args.width).to(device)
    training = Stepper(config, student, regressor, steps=10**6)
    images = noise_images(teacher.size, 4 * args.batch_size)
    stream = dataset.encoded(
        teacher,
        batches.batches(images, batch_size=args.batch_size, seed=0, first_step=0, last_step=10**6, flip=True),
        seed=0, device=device, precision="auto",
    )  # fmt: skip
    batch = next(stream)
    fixed = itertools.repeat(batch)
    generator = torch.Generator(device).manual_seed(0)

    def teacher_alone() -> None:
        with autocast(device, "auto"):
            teacher.encode(batch.images, generator=generator)

    kinds = {
        "step": lambda i: training.step(i, stream),
        "teacher": lambda i: teacher_alone(),
        "student": lambda i: training.step(i, fixed),
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for round_ in range(args.rounds + 2):
        for kind, act in kinds.items():
            begin = time.perf_counter()
            for i in range(args.steps):
                act(i)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_ >= 2:  # the first two warm up
                times[kind].append((time.perf_counter() - begin) / args.steps)
    ratios = [s / (t + u) for s, t, u in zip(times["step"], times["teacher"], times["student"], strict=True)]
    row = {
        "student": args.student, "teacher": args.teacher, "batch": args.batch_size, "width": args.width,
        "step_ms": f"{1e3 * statistics.median(times['step']):.1f}",
        "teacher_ms": f"{1e3 * statistics.median(times['teacher']):.1f}",
        "student_ms": f"{1e3 * statistics.median(times['student']):.1f}",
        "ratio_median": f"{statistics.median(ratios):.4f}",
        "ratio_quartiles": " ".join(f"{q:.4f}" for q in statistics.quantiles(ratios, n=4)[::2]),
        "rounds": args.rounds, "device": f"{device} x {torch.get_num_threads()} threads",
        "precision": str(resolve_precision(device, "auto")).removeprefix("torch."),
        "torch": torch.__version__, "version": __version__, "machine": platform.machine(),
        "load": f"{BUSY:.2f}",
        "command": "python benchmarks/step/run.py " + " ".join(a for a in sys.argv[1:]),
    }  # fmt: skip
    for key, value in row.items():
        print(f"{key:16} {value}")
    if args.out:
        with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerow(row)


def noise_images(size: tuple[int, int], count: int) -> image_set.ImageSet:
    """Real files of random pixels, decoded as a user's are."""
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            pixels = torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)
            to_pil_image(pixels).save(Path(folder) / f"{i}.png")
        return image_set.load_images(Path(folder), size)


if __name__ == "__main__":
    main()
