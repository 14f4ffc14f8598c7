"""How fast pretraining runs on one GPU, and which share of its matrix rate that is.

For each configuration: whole optimizer steps (images from memory, teacher, student, regressor, losses, backward,
optimizer) of a teacher of published width with random weights, which speed does not depend on, and a ResNet-50 at
256 px. In the same process the rate of a large bfloat16 matrix product is measured; `share` is the step's own rate,
GMACs x 2 x images/s, over it. GMACs are counted, forward and backward, on a step of two images. A process each, so that
memory and compiled code are its own; the time that compiling takes is a column and not part of the speed.

A command takes at most 10 minutes, and all rows take several: repeat it until it says that none is left. Rows that
are in the file are kept, failed ones are tried again; delete the file to begin anew.

    python benchmarks/gpu/speed.py --out benchmarks/gpu/speed.csv
    python benchmarks/gpu/speed.py --tiny --out /tmp/speed.csv         # the same code on any machine
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dreamteacher import __version__
from dreamteacher.data import batches, image_set
from dreamteacher.distill import dataset
from dreamteacher.distill.config import PretrainConfig
from dreamteacher.models.regressor import FeatureRegressor
from dreamteacher.models.student import create_student
from dreamteacher.runtime import compile as runtime_compile
from dreamteacher.runtime.distributed.device import pick_device, resolve_precision
from dreamteacher.runtime.errors import UserError, first_line
from dreamteacher.teachers.in_parts import InParts

Stepper = runpy.run_path(str(Path(__file__).parent.parent / "stepper.py"))["Stepper"]
ROOT = Path(__file__).parent
NETWORKS = runpy.run_path(str(ROOT.parent / "teachers" / "run.py"))["NETWORKS"]
CONFIGURATIONS = runpy.run_path(str(ROOT / "configurations.py"))["CONFIGURATIONS"]
TINY = [("VAE, TAESD", 2, "on"), ("StyleGAN2-256", 2, "off")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--tiny", action="store_true", help="small networks and images, in this process, on the CPU"
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="what is not measured by then is left")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--student", default="resnet50")
    parser.add_argument("--width", type=int, default=256, help="channels of the regressor")
    parser.add_argument("--matmul", type=int, default=8192, help="side of the matrices")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a round")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--one", nargs=3, metavar=("TEACHER", "BATCH", "COMPILE"), help="measure it here, print JSON"
    )
    args = parser.parse_args()
    if args.tiny:
        args.size, args.student, args.width, args.matmul, args.rounds, args.steps = (
            32,
            "test_resnet",
            8,
            256,
            2,
            1,
        )
        args.device, runtime_compile.BACKEND = "cpu", "aot_eager"
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args.one[2], args)))
        return
    end, wanted = time.monotonic() + 60 * args.minutes, TINY if args.tiny else CONFIGURATIONS
    rows = read(args.out) if args.out else {}
    failed = [one for one in wanted if one in rows and rows[one]["status"].startswith("failed")]
    todo = [one for one in wanted if one not in rows] + failed
    for one in todo:
        left = end - time.monotonic()
        if left <= 0:
            break
        row = measure(*one, args) if args.tiny else in_a_process(one, args, left)
        if row is None and one is not todo[0]:
            break  # it gets all of the next command's time
        rows[one] = row or named(one, f"failed: no end in {args.minutes:g} minutes")
        print(rows[one], flush=True)
        if args.out:
            write(args.out, [rows[each] for each in wanted if each in rows])
    missing = sum(one not in rows for one in wanted)
    print(f"{missing} rows are left." + (" Run the same command again." if missing else ""))


Wanted = tuple[str, int, str]  # teacher, images a step, torch.compile


def read(path: Path) -> dict[Wanted, dict[str, Any]]:
    """The rows that earlier commands have written."""
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return {(row["teacher"], int(row["batch"]), row["compile"]): row for row in csv.DictReader(file)}


def named(one: Wanted, status: str) -> dict[str, Any]:
    """A row without numbers."""
    return {"teacher": one[0], "batch": one[1], "compile": one[2], "status": status}


def in_a_process(one: Wanted, args: argparse.Namespace, left: float) -> dict[str, Any] | None:
    """The row of `one`; when its process fails, why: the others are still measured. None: not in `left` seconds."""
    command = [sys.executable, __file__, "--one", *map(str, one)]
    for name in ("size", "student", "width", "matmul", "rounds", "steps", "precision", "device"):
        command += [f"--{name}", str(getattr(args, name))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        last = (done.stderr.splitlines() or ["no message"])[-1][:120]
        return named(one, f"failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = max((list(row) for row in rows), key=len)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(act: Callable[[], Any], rounds: int, device: torch.device) -> float:
    """The median time of `act`."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        act()
        wait(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def matmul_rate(side: int, device: torch.device) -> float:
    """10^12 floating-point operations a second of a bfloat16 matrix product."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds(lambda: a @ b, 5, device)
    return 2 * side**3 / seconds(lambda: [a @ b for _ in range(10)], 5, device) * 10 / 1e12


def random_images(count: int, size: int) -> image_set.ImageSet:
    pixels = torch.randint(
        256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    names: list[Any] = [Path(f"{i}.png") for i in range(count)]
    return image_set.ImageSet(
        folder=Path(), paths=names, size=(size, size), labels=None, classes=(), cache=pixels, bad=()
    )


def measure(name: str, batch: int, compile: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    mode, make = NETWORKS[name]
    device = pick_device(args.device)
    teacher = make(args.size)
    teacher.keep_only(mode)
    config = PretrainConfig(
        images=Path("-"), out=Path("-"), teacher=name, student=args.student, batch_size=batch, width=args.width,
        precision=args.precision, compile=compile,
    )  # fmt: skip
    dtype = resolve_precision(device, args.precision)
    if dtype != torch.float32:
        teacher.cast_weights(dtype)
    student = create_student(args.student)
    regressor = FeatureRegressor(student.specs, teacher.specs, width=args.width)
    for module in (teacher, student, regressor):
        module.to(device)
    training = Stepper(config, student, regressor, steps=10**6)
    common = {"seed": 0, "device": device, "precision": args.precision}

    def stream_of(size: int) -> dataset.Stream:
        steps = {"batch_size": size, "first_step": 0, "last_step": 10**6}
        if mode == "sample":
            return dataset.synthesized(InParts(teacher), **steps, **common)
        images = random_images(4 * size, args.size)
        return dataset.encoded(
            InParts(teacher), batches.batches(images, seed=0, flip=True, raw=True, **steps), **common
        )

    row = {
        "teacher": name, "mode": mode, "size": args.size, "student": args.student, "batch": batch, "compile": compile,
        "status": "measured",
    }  # fmt: skip

    def step(stream: dataset.Stream) -> None:
        training.step(0, stream)

    try:
        few = stream_of(2)
        with FlopCounterMode(display=False) as counter:
            step(few)
        few.close()
        gmacs = counter.get_total_flops() / 2e9 / 2
        wait(device)
        stream, begin = stream_of(batch), time.perf_counter()
        if compile == "on":
            teacher.wrap_compile_targets(partial(runtime_compile.compiled, strict=True))
            training.distillation.compile()
        step(stream)
        wait(device)
        first = time.perf_counter() - begin
        for _ in range(2):
            step(stream)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        taken = seconds(lambda: [step(stream) for _ in range(args.steps)], args.rounds, device) / args.steps
        peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else float("nan")
    except torch.OutOfMemoryError:
        return row | {"status": "out of memory"}
    except UserError as error:  # what needs too much memory, or cannot be compiled
        line = first_line(error)
        return row | {"status": "out of memory" if "memory" in line else f"failed: {line}"}
    best = matmul_rate(args.matmul, device)
    rate = gmacs * 2e9 * batch / taken / 1e12
    return row | {
        "images_per_s": f"{batch / taken:.1f}", "step_ms": f"{1e3 * taken:.2f}", "first_s": f"{first:.1f}",
        "peak_gb": f"{peak:.2f}", "gmacs": f"{gmacs:.2f}", "tflops": f"{rate:.3g}", "matmul_tflops": f"{best:.3g}",
        "share": f"{rate / best:.3f}", "matmul": args.matmul, "rounds": args.rounds, "steps": args.steps,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": str(dtype).removeprefix("torch."), "torch": torch.__version__, "version": __version__,
        "machine": platform.machine(), "command": "python benchmarks/gpu/speed.py " + " ".join(sys.argv[1:]),
    }  # fmt: skip


if __name__ == "__main__":
    main()
