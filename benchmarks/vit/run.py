"""A plain ViT as the student of the demo, evaluated as the demo's ResNet-18 is.

The network is registered with timm here: 64 tokens of 8 x 8 pixels at 64 px, 6 blocks of 192 channels, 2.7 M
parameters, and about the multiplications of a ResNet-18 at this size. Images, teacher, steps, labels and seeds are the
demo's; so are the settings of the evaluation. The features are the mean of the patch tokens; "class token" rows read
the same weights by their class token.

    python benchmarks/vit/run.py --out runs/vit --lr 1e-3 --seeds 0 1
    python benchmarks/collect.py runs/vit/results.jsonl benchmarks/vit --command "..."
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from timm.models import VisionTransformer, register_model

from dreamteacher.cli.config import DemoConfig
from dreamteacher.cli.demo import demo_recipe, xray_folders
from dreamteacher.data import image_set
from dreamteacher.data.masks.reader import read_masks
from dreamteacher.data.split import halved
from dreamteacher.distill.pretrain import pretrain
from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.downstream.evaluate import evaluate_student
from dreamteacher.downstream.features import labelled_data
from dreamteacher.downstream.tables import summary_table
from dreamteacher.downstream.tasks import Row
from dreamteacher.models.student import Student, create_student, load_weights, read_weights, weight_file
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.run_folder import read_rows

MEAN, TOKEN = "vit_demo_patch8_64", "vit_demo_patch8_token_64"


@register_model
def vit_demo_patch8_64(
    pretrained: bool = False, global_pool: str = "avg", **settings: Any
) -> VisionTransformer:
    """The ViT of this benchmark, pooled over its patches."""
    del pretrained  # there are no weights
    return VisionTransformer(
        img_size=64, patch_size=8, embed_dim=192, depth=6, num_heads=3, fc_norm=False, dynamic_img_size=True,
        global_pool=global_pool, num_classes=settings.get("num_classes", 0),
    )  # fmt: skip


@register_model
def vit_demo_patch8_token_64(pretrained: bool = False, **settings: Any) -> VisionTransformer:
    """The same network, pooled by its class token."""
    return vit_demo_patch8_64(pretrained, "token", **settings)


def by_token(run: Path) -> Student:
    """The backbone of a run, read by its class token."""
    model, file = timm.create_model(TOKEN, num_classes=0), weight_file(str(run))
    load_weights(model, read_weights(file)._replace(metadata={}), name=TOKEN, source=str(file))
    return Student(TOKEN, model)


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Pretrains once per seed (or resumes) and evaluates."""
    train, test, lungs, masks = xray_folders(args.images)
    demo = DemoConfig(out=args.out, student=MEAN, seeds=tuple(args.seeds), images=args.images)
    runs = {}
    for seed in demo.seeds:
        recipe = demo_recipe(demo, train, seed)
        start = time.process_time()
        runs[seed] = pretrain(replace(recipe, lr=args.lr, clip=args.clip))
        print(f"seed {seed}: {time.process_time() - start:.0f} CPU-s", flush=True)
        last = read_rows(recipe.out / "metrics.jsonl")[-1]
        print({k: round(v, 3) for k, v in last.items() if k.startswith(("loss", "r2", "rankme"))}, flush=True)
    if args.only_pretrain:
        return
    real = image_set.load_images(train, (64, 64))
    labelled = labelled_data(real, image_set.load_images(test, (64, 64)))
    segments = halved(read_masks(lungs, masks, (64, 64), binary=True).load())
    everything = EvaluateConfig(
        student=MEAN, train=train, test=test, images=lungs, masks=masks, binary_masks=True, size=(64, 64),
        labels=tuple(args.labels), mask_counts=tuple(args.masks), seeds=demo.seeds,
        tasks=("knn", "linear", "finetune", "segment-frozen", "segment-finetune"),
    )  # fmt: skip
    frozen = replace(everything, tasks=("knn", "linear"))
    methods = {
        "random init": (everything, lambda seed: create_student(MEAN, seed=seed)),
        "DreamTeacher": (everything, lambda seed: create_student(MEAN, init=str(runs[seed]))),
        "random init, class token": (frozen, lambda seed: create_student(TOKEN, seed=seed)),
        "DreamTeacher, class token": (frozen, lambda seed: by_token(runs[seed])),
    }
    for method, (config, make) in methods.items():
        print(f"evaluate {method}", flush=True)
        data = {"classification": labelled, "segmentation": segments}
        yield from evaluate_student(make, config, method=method, data=data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/vit"))
    parser.add_argument("--images", type=Path, help="as of the demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--lr", type=float, default=1e-3, help="peak; the demo's ResNet-18 takes 4e-3")
    parser.add_argument("--clip", type=float, default=1.0, help="largest gradient norm; the demo: 0, none")
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--masks", type=int, nargs="+", default=[10])
    parser.add_argument("--only-pretrain", action="store_true")
    args = parser.parse_args()
    found = list(rows(args))
    if found:
        text = "".join(json.dumps(row) + "\n" for row in found)
        checkpoint.write_text(args.out / "results.jsonl", text)
        print(summary_table(found))


if __name__ == "__main__":
    main()
