"""results.jsonl of a run -> results.csv and environment.json of a benchmark.

python benchmarks/collect.py runs/demo/results.jsonl benchmarks/demo --command "make demo"
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
from pathlib import Path

import diffusers
import timm
import torch

from dreamteacher import __version__
from dreamteacher.runtime.distributed.device import pick_device, resolve_precision
from dreamteacher.runtime.run_folder import read_rows

COLUMNS = ("method", "student", "task", "metric", "value", "labels", "seed", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--command", required=True, help="what produced the results")
    parser.add_argument("--note", default="", help="budget, teacher, anything a reader must know")
    args = parser.parse_args()
    collect(args.results, args.folder, command=args.command, note=args.note)


def collect(results: Path, folder: Path, *, command: str, note: str) -> None:
    """Writes both files into `folder`."""
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(read_rows(results))
    write_environment(folder / "environment.json", command, note)


def write_environment(path: Path, command: str, note: str) -> None:
    """What a reader must know to run a benchmark again."""
    device = pick_device()
    facts = {
        "command": command,
        "note": note,
        "status": "smaller-scale (ours; no counterpart in the paper)",
        "dreamteacher": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "precision": str(resolve_precision(device, "auto")).removeprefix("torch."),
    }
    path.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
