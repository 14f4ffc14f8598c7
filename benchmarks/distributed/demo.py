"""Does the demo in two processes give what it gives in one? Scores of both side by side, and their losses by step.

    dreamteacher demo --out runs/demo
    torchrun --nproc-per-node 2 -m dreamteacher demo --out runs/demo-two
    python benchmarks/distributed/demo.py runs/demo runs/demo-two --out benchmarks/distributed/demo.csv

A row is a score of the pretrained student, by number of processes, task, labels and seed; or, as the task `loss`, how far the
loss of a line of the log is from that of one process, as a part of it (`labels` is its step).
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from dreamteacher.runtime.run_folder import read_rows

COLUMNS = ("method", "task", "metric", "value", "labels", "seed", "command")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("one", type=Path, help="the demo's folder, of one process")
    parser.add_argument("two", type=Path, help="the demo's folder, of two")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [*scores(args.one, "one process"), *scores(args.two, "two processes"), *losses(args.one, args.two)]
    for row in rows:
        if row["task"] == "loss" or row["metric"] in ("accuracy", "miou"):
            print(*(row[name] for name in COLUMNS[:-1]))
    if args.out:
        with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(row | {"command": f"torchrun --nproc-per-node 2 -m dreamteacher demo --out {args.two}"}
                             for row in rows)  # fmt: skip


def scores(demo: Path, method: str) -> list[dict[str, Any]]:
    """The pretrained student's."""
    found = [row for row in read_rows(demo / "results.jsonl") if row["method"] == "DreamTeacher"]
    return [{name: row[name] for name in COLUMNS[1:-1]} | {"method": method} for row in found]


def losses(one: Path, two: Path) -> list[dict[str, Any]]:
    """|two - one| / one of each pretraining and line of the log."""
    rows = []
    for run in sorted(one.glob("pretrain-*")):
        pairs = zip(
            *(read_rows(demo / run.name / "metrics.jsonl") for demo in (one, two)), strict=True
        )  # the same steps
        for a, b in pairs:
            assert a["step"] == b["step"]
            apart = abs(b["loss"] / a["loss"] - 1)
            rows.append({"method": "two processes", "task": "loss", "metric": "relative difference",
                         "value": f"{apart:.3g}", "labels": a["step"], "seed": run.name.split("-")[1]})  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
