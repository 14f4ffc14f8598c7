"""A StyleGAN2 teacher on the demo's X-rays, evaluated as the demo does, beside the diffusion teacher.

The teacher comes from (an hour on one core)
    dreamteacher train-teacher --preset stylegan2-cpu-64 --images XRAYS/train --out runs/gan
and the students see its synthesized images and maps only: as many images, steps, seeds and labels as in the demo.

    python benchmarks/stylegan2/run.py --teacher runs/gan --out runs/stylegan2
    python benchmarks/collect.py runs/stylegan2/results.jsonl benchmarks/stylegan2 --command "..."
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from dreamteacher.cli.config import DemoConfig
from dreamteacher.cli.demo import demo_recipe, xray_folders
from dreamteacher.data import image_set
from dreamteacher.data.masks.reader import read_masks
from dreamteacher.data.split import halved
from dreamteacher.distill.pretrain import pretrain
from dreamteacher.downstream.evaluate import EvaluateConfig, evaluate_student
from dreamteacher.downstream.features import labelled_data
from dreamteacher.downstream.tables import summary_table
from dreamteacher.models.student import create_student
from dreamteacher.runtime import checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/stylegan2"))
    parser.add_argument("--images", type=Path, help="as of the demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, help="images an epoch; none: as many as there are X-rays")
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--masks", type=int, nargs="+", default=[10])
    args = parser.parse_args()
    train, test, lungs, masks = xray_folders(args.images)
    demo = DemoConfig(out=args.out, teacher=args.teacher, seeds=tuple(args.seeds), images=args.images)
    evaluation = EvaluateConfig(
        student=demo.student, train=train, test=test, images=lungs, masks=masks, binary_masks=True,
        size=(64, 64), labels=tuple(args.labels), mask_counts=tuple(args.masks), seeds=demo.seeds,
        tasks=("knn", "linear", "finetune", "segment-frozen", "segment-finetune"),
    )  # fmt: skip
    real = image_set.load_images(train, (64, 64))
    runs = {}
    for seed in demo.seeds:
        recipe = demo_recipe(demo, train, seed)
        runs[seed] = pretrain(
            replace(recipe, images=None, dataset="synthesized", samples=args.samples or len(real))
        )
    rows = list(
        evaluate_student(
            lambda seed: create_student(demo.student, init=str(runs[seed])), evaluation,
            method="DreamTeacher, StyleGAN2",
            data={
                "classification": labelled_data(real, image_set.load_images(test, (64, 64))),
                "segmentation": halved(read_masks(lungs, masks, (64, 64), binary=True).load()),
            },
        )
    )  # fmt: skip
    checkpoint.write_text(args.out / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    print(summary_table(rows))


if __name__ == "__main__":
    main()
