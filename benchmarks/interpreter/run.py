"""Memory of training an interpreter on DDPM-seg's 8,448-channel stack: does it grow with the number of images?

    python benchmarks/interpreter/run.py                       # ADM-256 with random weights, 10 and 50 images

The predecessors keep the stack of every pixel: 8,448 channels x 65,536 pixels x 4 bytes = 2.2 GB an image. Here
maps are made batch by batch, at their own resolution. Each number of images runs in a process of its own; one
epoch, one image a step. Peak memory is the whole process's: Python, torch, the teacher's weights, everything.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from dreamteacher import __version__
from dreamteacher.data.labelled_set import LabelledSet
from dreamteacher.distill.config import TrainInterpreterConfig
from dreamteacher.distill.train_interpreter import train_interpreter
from dreamteacher.teachers.diffusion.teacher import DiffusionTeacher, build_unet
from dreamteacher.teachers.training.diffusion import DiffusionPreset, network_spec
from dreamteacher.teachers.training.train import PRESETS

CLASSES, BLOCKS, STEPS = 28, (5, 6, 7, 8, 12), (50, 150, 250)


def peak_gb() -> float:
    """The largest resident memory of this process so far, in 10^9 bytes (its own, not its parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def one(args: argparse.Namespace, count: int) -> dict[str, object]:
    """Trains on `count` random images; returns the row."""
    preset = PRESETS[args.preset]
    assert isinstance(preset, DiffusionPreset)
    size = (args.size, args.size)
    spec = network_spec(replace(preset, size=size), size, 3, "linear")
    torch.manual_seed(0)
    teacher = DiffusionTeacher(
        build_unet(spec), spec, name=args.preset, licence="none", timesteps=STEPS, blocks=tuple(args.blocks)
    )
    teacher.keep_only("encode")
    channels = sum(s.channels for s in teacher.specs)
    weights_gb = sum(p.numel() for p in teacher.parameters()) * 4 / 1e9
    generator = torch.Generator().manual_seed(0)
    labelled = LabelledSet(
        images=torch.randint(256, (count, 3, *size), generator=generator, dtype=torch.uint8),
        targets=torch.randint(CLASSES, (count, *size), generator=generator, dtype=torch.uint8),
        classes=tuple(f"class {i}" for i in range(CLASSES)),
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train_interpreter(
            TrainInterpreterConfig(
                images=Path("in memory"), out=Path(folder) / "run", teacher="chest-xray-64", epochs=1,
                warmup_epochs=0, batch_size=1, size=size, blocks=tuple(args.blocks), t=STEPS, look_every=0,
                width=args.width, device=args.device,
            ),
            teacher=teacher, labelled=labelled,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    return {
        "network": f"{args.preset} (random weights)", "size": f"{args.size} {args.size}", "channels": channels,
        "images": count, "steps": count, "peak_gb": round(peak_gb(), 2), "weights_gb": round(weights_gb, 2),
        "whole_stack_gb": round(count * channels * args.size**2 * 4 / 1e9, 1),
        "seconds": round(seconds, 1), "device": f"cpu x {torch.get_num_threads()} threads" if args.device == "cpu" else args.device,
        "torch": torch.__version__, "dreamteacher": __version__, "python": platform.python_version(),
        "cores": os.cpu_count(), "command": " ".join(["python", "benchmarks/interpreter/run.py", *sys.argv[1:]]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="adm-256")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--blocks", type=int, nargs="+", default=list(BLOCKS))
    parser.add_argument("--images", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "memory.csv")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        row = one(args, args.only)
        print("row " + json.dumps(row))
        return
    rows = []
    for count in args.images:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--only", str(count)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        row = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("row "))[4:])
        row["command"] = " ".join(["python", "benchmarks/interpreter/run.py", *sys.argv[1:]])
        rows.append(row)
        print(row, flush=True)
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
