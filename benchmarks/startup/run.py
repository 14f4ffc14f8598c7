"""How long does a command take to start, and how much memory?

Each command is a process of its own; all of them run in turn, round by round, and every figure stands beside that of
`python -c "import torch"` in the same round:
  import torch      what nobody can avoid who trains
  import package    `import dreamteacher`
  help              `dreamteacher --help`
  help of a verb    `dreamteacher pretrain --help`: its settings are known, torch is not imported
  help of each verb `dreamteacher VERB --help`, and `a mistyped flag` of evaluate (only when named by --only)
  first step        `dreamteacher pretrain` on the embedded default, until the first line of metrics.jsonl is there
  pretrain          the same command to its end, its report included (`--steps` steps of 32 images)

    python benchmarks/startup/run.py --out benchmarks/startup/startup.csv
    python benchmarks/startup/run.py --only "help of each verb" --out benchmarks/startup/help.csv
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from dreamteacher import __version__
from dreamteacher.cli.demo import xray_folders
from dreamteacher.cli.main import VERBS
from dreamteacher.data.images import find_images

BUSY = os.getloadavg()[0]  # of other processes: this one has just begun
WHAT = ("import torch", "import package", "help", "help of a verb", "pretrain")
EACH = "help of each verb"
MISTYPED = "a mistyped flag"
OURS = [sys.executable, "-m", "dreamteacher"]


class Taken(NamedTuple):
    """Seconds of a process (to its end, and to a file's first line), its CPU seconds, and its peak memory in MB."""

    seconds: float
    first: float
    cpu: float
    peak_mb: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--images", type=Path, help="folder to pretrain on; none: the demo's X-rays")
    parser.add_argument("--teacher", default="chest-xray-64")
    parser.add_argument("--student", default="resnet18")
    parser.add_argument(
        "--only", nargs="+", choices=(*WHAT, EACH), default=WHAT, help="these, beside 'import torch'"
    )
    args = parser.parse_args()

    trains = WHAT[-1] in args.only  # else no image is needed
    images = args.images or (xray_folders(None)[0] if trains else Path())
    count = len(find_images(images)) if trains else 0
    commands = {
        k: v
        for k, v in all_commands(args, images, count).items()
        if k in (WHAT[0], *args.only) or (EACH in args.only and k.startswith(("help of ", MISTYPED)))
    }
    taken: dict[str, list[Taken]] = {what: [] for what in commands}
    for round_ in range(args.rounds + 1 if args.rounds > 1 else 1):
        for what, command in commands.items():
            with tempfile.TemporaryDirectory() as place:
                run = Path(place, "run")
                out = ["--out", str(run)] if what == "pretrain" else []
                found = timed([*command, *out], run / "metrics.jsonl")
            if round_ or args.rounds == 1:  # the first one brings the files into the system's cache
                taken[what].append(found)
            print(f"{what:15} {found.seconds:7.2f} s, {found.peak_mb:.0f} MB", flush=True)
    write(args, taken, count)


def all_commands(args: argparse.Namespace, images: Path, count: int) -> dict[str, list[str]]:
    epochs = args.steps / max(1, count // args.batch_size)
    return {
        "import torch": [sys.executable, "-c", "import torch"],
        "import package": [sys.executable, "-c", "import dreamteacher"],
        "help": [*OURS, "--help"],
        "help of a verb": [*OURS, "pretrain", "--help"],
        **{f"help of {verb}": [*OURS, verb, "--help"] for verb in VERBS},
        MISTYPED: [*OURS, "evaluate", "--labls", "10"],
        "pretrain": [
            *OURS, "pretrain", "--images", str(images), "--teacher", args.teacher, "--student", args.student,
            "--batch-size", str(args.batch_size), "--epochs", str(epochs), "--warmup-epochs", "0",
            "--log-every", "1", "--probe-every", "0", "--width", "128",
        ],
    }  # fmt: skip


def timed(command: list[str], file: Path) -> Taken:
    """Runs a command; notes when `file` has its first line."""
    with tempfile.TemporaryFile("w+") as said:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        first = peak = 0.0
        while True:
            peak = max(peak, peak_mb(process.pid))
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            now = time.perf_counter() - begin
            if not first and file.is_file() and file.stat().st_size:
                first = now
            if pid:
                break
            time.sleep(0.002)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode and "Did you mean" not in read_back(said):
            sys.exit(f"{' '.join(command)}\n{read_back(said)}")
    return Taken(now, first or now, used.ru_utime + used.ru_stime, peak)


def read_back(said: IO[str]) -> str:
    said.seek(0)
    return said.read()


def peak_mb(pid: int) -> float:
    """A running process' peak so far; 0 where /proc does not tell. (What `wait4` tells of a child begins at the memory
    of its parent, which has torch in it.)"""
    try:
        told = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(told[1]) * 1024 / 1e6 if told else 0.0


def write(args: argparse.Namespace, taken: dict[str, list[Taken]], images: int) -> None:
    base = taken["import torch"]
    seen = {what: [t.seconds for t in of] for what, of in taken.items() if what != "pretrain"}
    seen |= (
        {}
        if "pretrain" not in taken
        else {
            "first step": [t.first for t in taken["pretrain"]],
            "pretrain": [t.seconds for t in taken["pretrain"]],
        }
    )
    rows: list[dict[str, Any]] = []
    for what, seconds in seen.items():
        of = taken["pretrain" if what == "first step" else what]
        ratios = [s / t.seconds for s, t in zip(seconds, base, strict=True)]
        rows.append({
            "what": what, "seconds": f"{statistics.median(seconds):.3f}",
            "cpu_s": "" if what == "first step" else f"{statistics.median(t.cpu for t in of):.3f}",
            "ratio_median": f"{statistics.median(ratios):.3f}",
            "ratio_range": f"{min(ratios):.3f} {max(ratios):.3f}",
            "peak_mb": "" if what == "first step" else f"{statistics.median(t.peak_mb for t in of):.0f}",
            "rounds": args.rounds, "images": images, "steps": args.steps, "batch": args.batch_size,
            "student": args.student, "teacher": args.teacher, "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
            "version": __version__, "machine": platform.machine(),
        "load": f"{BUSY:.2f}",
            "command": "python benchmarks/startup/run.py " + " ".join(sys.argv[1:]),
        })  # fmt: skip
        print(f"{what:15} {rows[-1]['seconds']} s, {rows[-1]['ratio_median']} x import torch")
    if args.out:
        with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
