"""Instance segmentation of nuclei (Data Science Bowl 2018) with a few labelled images, for several backbones.

IMAGES and INSTANCES are two folders with the same names: pictures of any size, and 16-bit PNGs in which 0 is the
background and k the k-th nucleus. Some images are set aside for the score, the same for every backbone and seed;
from the others each seed draws those to train on.

    python benchmarks/dsb2018/run.py --images IMAGES --instances INSTANCES --init random runs/mine --out runs/dsb2018
    python benchmarks/collect.py runs/dsb2018/results.jsonl benchmarks/dsb2018 --command "..."
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path

import torch

from dreamteacher import checkpoint
from dreamteacher.data import step_generator
from dreamteacher.downstream import summary_table
from dreamteacher.downstream.detection_config import DetectConfig
from dreamteacher.downstream.detection_data import DetectionData, load_instances
from dreamteacher.downstream.evaluate import EvaluateConfig, evaluate_student, method_name
from dreamteacher.students import Student, create_student


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--instances", type=Path, required=True)
    parser.add_argument("--init", nargs="+", default=["random"], help="random, imagenet, weight files, runs")
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--cascade", action="store_true", help="Cascade Mask R-CNN instead of Mask R-CNN")
    parser.add_argument("--labels", type=int, nargs="+", default=[20], help="images to train on")
    parser.add_argument("--test", type=int, default=100, help="images set aside for the score")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--size", type=int, default=256, help="shorter side of an image, pixels")
    parser.add_argument("--width", type=int, default=64, help="channels of the FPN and the heads")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/dsb2018"))
    args = parser.parse_args()
    everything = load_instances(args.images, args.instances)
    order = torch.randperm(len(everything), generator=step_generator(0, 0, "dsb2018"))
    data = DetectionData(
        pool=everything.subset(order[args.test :]), test=everything.subset(order[: args.test])
    )
    size = args.size
    config = EvaluateConfig(
        tasks=("detect-cascade",) if args.cascade else ("detect",), seeds=tuple(args.seeds), device=args.device,
        detect=DetectConfig(  # small anchors and many proposals: nuclei are small and many
            images=tuple(args.labels), steps=args.steps, short_side=(size, size), test_side=size, width=args.width,
            longest_side=2 * size, anchor=4.0, proposals=512, rois=128, detections=200,
        ),
    )  # fmt: skip

    @cache
    def trained(init: str) -> Student:
        return create_student(args.student, init=init)

    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for init in args.init:

        def make_student(seed: int, init: str = init) -> Student:
            return create_student(args.student, seed=seed) if init == "random" else trained(init)

        for row in evaluate_student(make_student, config, method=method_name(init), detection=data):
            rows.append(row)
            checkpoint.write_text(args.out / "results.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    print(summary_table(rows, every_metric=True))


if __name__ == "__main__":
    main()
