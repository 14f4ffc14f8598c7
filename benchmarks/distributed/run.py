"""What do several processes lose to each other in a pretraining step?

The processes of one start do the following in turn, again and again, each bound to a core of its own (one thread), on
the same images and networks; in all of them a process has --batch-size images a step:
  alone    - the first process works, the others sleep
  apart    - all work at once, each on a run of its own, and exchange nothing: what the cores share anyway (memory)
  together - all work on one run: gradients averaged, BatchNorm over the images of all
  local    - together, but with --batch-norm local: gradients alone are exchanged
  exchange - what `together` exchanges in a step, one after the other, and no work between
The claim is the median over rounds of apart / together, target 0.95: the speed per process that is left by exchanging
and waiting. What is exchanged depends on the student alone, so the share of it falls with the images of a process and
with what the teacher costs. Beside it apart / (apart + exchange): what would be left if the processes never waited for
each other, as they do at each BatchNorm for the one whose core was the slower one since the last.
A teacher is a name or folder, or a network of `benchmarks/teachers` with random weights.

    torchrun --nproc-per-node 2 benchmarks/distributed/run.py --out benchmarks/distributed/distributed.csv
    torchrun --nproc-per-node 2 benchmarks/distributed/run.py --teacher ADM-256 --student resnet50 --width 256 \
        --batch-size 4 --rounds 4 --steps 1 --warm 1 --append --out benchmarks/distributed/distributed.csv
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import runpy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dreamteacher import __version__
from dreamteacher.data import batches as data_batches
from dreamteacher.distill import dataset
from dreamteacher.distill.config import PretrainConfig
from dreamteacher.models.regressor import FeatureRegressor
from dreamteacher.models.student import create_student
from dreamteacher.runtime.distributed.device import pick_device, resolve_precision
from dreamteacher.runtime.distributed.group import all_gather_text, broadcast, join
from dreamteacher.runtime.distributed.world import ALONE, World
from dreamteacher.teachers.base import Teacher
from dreamteacher.teachers.registry import load_teacher

Stepper = runpy.run_path(str(Path(__file__).parent.parent / "stepper.py"))["Stepper"]
BUSY = os.getloadavg()[0]  # of other processes: these have just begun
BENCHMARKS = Path(__file__).parent.parent
# Real files of random pixels, decoded as a user's are.
noise_images = runpy.run_path(str(BENCHMARKS / "step" / "run.py"))["noise_images"]
NETWORKS = runpy.run_path(str(BENCHMARKS / "teachers" / "run.py"))["NETWORKS"]
STEPS = ("alone", "apart", "together", "local")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--append", action="store_true", help="add a row to --out")
    parser.add_argument("--teacher", default="chest-xray-64")
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=32, help="images of each process")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2, help="steps of each kind in a round")
    parser.add_argument("--warm", type=int, default=2, help="rounds before, not counted")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()

    world = join(args.device)
    bound = bind(world)
    device = pick_device(args.device)
    teacher = NETWORKS[args.teacher][1](256) if args.teacher in NETWORKS else load_teacher(args.teacher)
    teacher.keep_only("encode")
    teacher.to(device)
    steps = {kind: stepper(kind, args, world, teacher) for kind in STEPS}
    acts = {kind: act for kind, (act, _) in steps.items()}
    acts["exchange"] = exchanger(*steps["together"], device)
    times: dict[str, list[list[float]]] = {kind: [] for kind in acts}
    for round_ in range(args.rounds + args.warm):
        for kind, act in acts.items():
            if world.ranks > 1:
                torch.distributed.barrier()  # all begin at once
            begin = time.perf_counter()
            if kind == "alone":
                broadcast(lambda act=act: work(act, args.steps, device))  # type: ignore[misc]
            else:
                work(act, args.steps, device)
            seconds = (time.perf_counter() - begin) / args.steps
            if round_ >= args.warm:
                times[kind].append([float(t) for t in all_gather_text(str(seconds))])
    if world.first:
        report(args, world, device, bound, times)


def work(act: Callable[[], None], steps: int, device: torch.device) -> str:
    """A few steps, to their end."""
    for _ in range(steps):
        act()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return ""


def bind(world: World) -> str:
    """Gives this process a core of its own, where there are enough; says what was done."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < world.ranks:
        return f"{len(cores)} cores, not bound"
    os.sched_setaffinity(0, {cores[world.rank]})
    return f"{world.ranks} of {len(cores)} cores, one each"


def stepper(
    kind: str, args: argparse.Namespace, world: World, teacher: Teacher
) -> tuple[Callable[[], None], int]:
    """One pretraining step after the other, of this kind; and how many numbers it trains."""
    who = world if kind in ("together", "local") else ALONE
    config = PretrainConfig(
        images=Path("-"), out=Path("-"), teacher=args.teacher, student=args.student, width=args.width,
        batch_size=args.batch_size * who.ranks, batch_norm="local" if kind == "local" or args.device == "cpu" else "global",
    )  # fmt: skip
    device = next(teacher.parameters()).device
    student = create_student(args.student).to(device)
    regressor = FeatureRegressor(student.specs, teacher.specs, width=args.width).to(device)
    training = Stepper(config, student, regressor, steps=10**6, world=who)
    images = noise_images(teacher.size, 2 * config.batch_size)
    batches = data_batches.batches(
        images, batch_size=config.batch_size, seed=0, first_step=0, last_step=10**6, flip=True, world=who
    )
    stream = dataset.encoded(teacher, batches, seed=0, device=device, precision="auto", world=who)
    index = iter(range(10**6))

    def act() -> None:
        training.step(next(index), stream)

    return act, sum(p.numel() for p in training.network.parameters() if p.requires_grad)


def exchanger(together: Callable[[], None], trained: int, device: torch.device) -> Callable[[], None]:
    """What a step of `together` exchanges: the sums of each BatchNorm, and behind them the gradients."""
    sizes: list[int] = []
    original = torch.distributed.all_reduce

    def noted(tensor: torch.Tensor, *more: Any, **options: Any) -> Any:
        sizes.append(tensor.numel())
        return original(tensor, *more, **options)

    torch.distributed.all_reduce = noted
    together()
    torch.distributed.all_reduce = original
    sums = [torch.zeros(size, dtype=torch.float64, device=device) for size in sizes]
    gradients = torch.zeros(trained, device=device)

    def act() -> None:
        for tensor in [*sums, gradients]:
            if torch.distributed.is_initialized():
                original(tensor)

    return act


def report(
    args: argparse.Namespace,
    world: World,
    device: torch.device,
    bound: str,
    times: dict[str, list[list[float]]],
) -> None:
    """One row: medians over rounds of the mean over processes, and the ratios within a round."""
    mean = {k: [r[0] if k == "alone" else statistics.mean(r) for r in v] for k, v in times.items()}
    ratios = {
        "apart_over_together": list(zip(mean["apart"], mean["together"], strict=True)),
        "apart_over_local": list(zip(mean["apart"], mean["local"], strict=True)),
        "alone_over_together": list(zip(mean["alone"], mean["together"], strict=True)),
        "apart_over_exchanged": [(a, a + e) for a, e in zip(mean["apart"], mean["exchange"], strict=True)],
    }
    row: dict[str, object] = {
        "student": args.student, "teacher": args.teacher, "processes": world.ranks,
        "images_per_process": args.batch_size, "width": args.width,
    }  # fmt: skip
    row |= {f"{k}_ms": f"{1e3 * statistics.median(v):.1f}" for k, v in mean.items()}
    for name, pairs in ratios.items():
        found = [a / b for a, b in pairs]
        row[name] = f"{statistics.median(found):.4f}"
        row[f"{name}_quartiles"] = " ".join(f"{q:.4f}" for q in statistics.quantiles(found, n=4)[::2])
    row |= {
        "rounds": args.rounds, "steps": args.steps, "device": str(device.type), "cores": bound,
        "precision": str(resolve_precision(device, "auto")).removeprefix("torch."), "torch": torch.__version__,
        "version": __version__, "machine": platform.machine(), "load": f"{BUSY:.2f}",
        "command": f"torchrun --nproc-per-node {world.ranks} benchmarks/distributed/run.py "
        + " ".join(sys.argv[1:]),
    }  # fmt: skip
    for key, value in row.items():
        print(f"{key:30} {value}")
    if args.out:
        with open(args.out, "a" if args.append else "w", newline="") as file:
            writer = csv.DictWriter(file, row)
            if not args.append:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
