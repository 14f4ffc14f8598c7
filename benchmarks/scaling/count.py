"""GMACs that docs/scaling.md plans with and benchmarks/teachers has not: the forward of students with their regressors,
and the two generators of the paper's BDD100K runs.

Networks on the meta device, operations counted: no weight is used and nothing is timed. A regressor of width 256 predicts
what a store with the defaults keeps: 63 channels a level.

    python benchmarks/scaling/count.py --out benchmarks/scaling/gmacs.csv
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dreamteacher import __version__
from dreamteacher.models.regressor import FeatureRegressor
from dreamteacher.models.student import create_student
from dreamteacher.spec import FeatureSpec
from dreamteacher.teachers.cost import measure
from dreamteacher.teachers.stylegan2.teacher import StyleGan2Spec
from dreamteacher.teachers.training.diffusion import PRESETS, network_spec

STUDENTS = [
    ("resnet50", (256, 256)),
    ("resnet101", (256, 256)),
    ("convnext_base", (256, 256)),
    ("resnet50", (128, 256)),
    ("resnet50", (512, 1024)),
]
KEPT = tuple(FeatureSpec(f"s{stride}", 63, stride) for stride in (4, 8, 16, 32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for name, size in STUDENTS:
        rows.append(row(name, "student", size, student_gmacs(name, size)))
    bdd = network_spec(PRESETS["adm-bdd100k"], (128, 256), 3, "linear")
    rows.append(row("ADM, BDD100K", "teacher", bdd.size, measure("diffusion", bdd).needed))
    gan = StyleGan2Spec(size=(512, 1024), channels=(512, 512, 512, 512, 512, 256, 128, 64))
    rows.append(row("StyleGAN2, BDD100K", "teacher", gan.size, measure("stylegan2", gan).needed))
    for found in rows:
        print(found)
    if args.out:
        with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def row(name: str, role: str, size: tuple[int, int], gmacs: float) -> dict[str, Any]:
    return {
        "network": name, "role": role, "size": f"{size[0]} {size[1]}", "gmacs": f"{gmacs:.1f}",
        "version": __version__, "torch": torch.__version__,
        "command": "python benchmarks/scaling/count.py " + " ".join(sys.argv[1:]),
    }  # fmt: skip


def student_gmacs(name: str, size: tuple[int, int], *, backward: bool = False) -> float:
    """GMACs of one image through a student and its regressor: forward, or forward and backward.

    The backward pass is counted for a test alone, which shows that a step is three times the forward: torch's counter
    takes grouped convolutions (ConvNeXt's) for whole ones there.
    """
    student = create_student(name).to("meta")
    regressor = FeatureRegressor(student.specs, KEPT).to("meta")
    images = torch.empty(2, 3, *size, device="meta")
    sizes = [(size[0] // s.stride, size[1] // s.stride) for s in KEPT]
    with FlopCounterMode(display=False) as counter:
        maps = regressor(student(images), sizes)
        if backward:
            torch.stack([m.square().mean() for m in maps]).sum().backward()
    return counter.get_total_flops() / 4e9


if __name__ == "__main__":
    main()
