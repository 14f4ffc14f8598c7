"""The label-efficient comparison: methods that see the same few masks, at several numbers of them.

    python benchmarks/label_efficient/run.py --data lungs --counts 5 20 --seeds 0 1 2 --out runs/lungs
    python benchmarks/label_efficient/run.py --data camvid --data-root CAMVID --teacher runs/camvid-teacher \\
        --imagenet resnet18.safetensors --methods scratch imagenet ddpm-seg --counts 20 --out runs/camvid

Each (method, count, seed) runs in a process of its own, so that its peak memory is its own, and adds one row to
OUT/results.csv; rows that are there are not computed again. The draw of masks depends on count and seed alone.
Segmenters are fine-tuned with the same steps, whatever they start from. Deviations of ddpm-seg and dataset-ddpm
from what was published are the flags --pixel-* and --samples; their published values are in `ddpm_seg.PixelConfig`
and `dataset_ddpm.SamplesConfig`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dataset_ddpm import SamplesConfig, dataset_ddpm
from ddpm_seg import PixelConfig, PixelSegmenter, ddpm_seg
from protocol import SETS, Benchmark, load_benchmark, score
from torch import Tensor, nn

from dreamteacher.data.draws import draw_images
from dreamteacher.data.labelled_set import LabelledSet
from dreamteacher.data.seeds import device_generator
from dreamteacher.distill.config import TrainInterpreterConfig
from dreamteacher.distill.pretrain import PretrainConfig, pretrain
from dreamteacher.distill.train_interpreter import train_interpreter
from dreamteacher.downstream.features import device_of, frozen, to_input
from dreamteacher.downstream.segmentation.config import SegmentConfig
from dreamteacher.downstream.segmentation.few_masks import train_segmenter
from dreamteacher.models.distilled import load_distilled, neck_weights
from dreamteacher.models.interpreter import load_interpreter
from dreamteacher.models.regressor import resize
from dreamteacher.models.student import Student, create_student
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.distributed.device import autocast, pick_device
from dreamteacher.runtime.errors import UserError
from dreamteacher.teachers.registry import load_teacher

# miou_published: see `protocol.Scores`. seconds, cpu_seconds (of all cores) and gpu_mb are of the method, its data
# loaded before; peak_mb is the process's resident memory, and data_mb what that was when the method began.
COLUMNS = (
    "data", "method", "count", "seed", "miou", "miou_published", "iou", "seconds", "cpu_seconds", "peak_mb", "data_mb", "gpu_mb",
)  # fmt: skip
Predictions = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a method is given: labelled images, the set they are from, and the settings of the comparison.

    Args:
        images: uint8 N x 3 x H x W; masks: int64 N x H x W, drawn from the set's pool.
        seed: of everything that is random in the method.
        settings: the command line.
    """

    benchmark: Benchmark
    images: Tensor
    masks: Tensor
    seed: int
    settings: argparse.Namespace

    @property
    def device(self) -> torch.device:
        """Where the method runs."""
        return pick_device(self.settings.device)


def scratch(task: Task) -> Predictions:
    """The backbone untrained, then fine-tuned with the masks."""
    return finetuned(create_student(task.settings.student, seed=task.seed), task, task.images, task.masks)


def imagenet(task: Task) -> Predictions:
    """The backbone trained on ImageNet with labels, then fine-tuned with the masks."""
    student = create_student(task.settings.student, init=str(task.settings.imagenet), seed=task.seed)
    return finetuned(student, task, task.images, task.masks)


def pixel_classifiers(task: Task) -> PixelSegmenter:
    """DDPM-seg trained with the masks; not published: larger batches and few passes where the flags say so."""
    args = task.settings
    config = PixelConfig(
        members=args.pixel_members, batch_size=args.pixel_batch, epochs=args.pixel_epochs,
        budget_gb=args.pixel_budget_gb,
    )  # fmt: skip
    bench = task.benchmark
    teacher = load_teacher(args.teacher, device=task.device)
    return ddpm_seg(
        teacher,
        task.images,
        task.masks,
        config,
        classes=bench.classes,
        ignore_index=bench.ignore,
        seed=task.seed,
    )


def pixels_in_teacher(task: Task) -> Predictions:
    """DDPM-seg: no student, the teacher itself runs on every test image."""
    segmenter = pixel_classifiers(task)
    test = task.benchmark.test
    for (ids, _), target in zip(segmenter(test.images), test.targets, strict=True):
        yield ids.cpu(), target


def samples_of_teacher(task: Task) -> Predictions:
    """DatasetDDPM: the untrained backbone fine-tuned on generated images that DDPM-seg's classifiers labelled."""
    args = task.settings
    segmenter = pixel_classifiers(task)
    segmenter.teacher.sampling_steps = args.sampling_steps
    made = dataset_ddpm(
        segmenter, SamplesConfig(samples=args.samples), size=task.benchmark.size, seed=task.seed
    )
    student = create_student(args.student, seed=task.seed)
    return finetuned(student, task, made.images, made.masks)


def dreamteacher(task: Task, mode: str, *, as_distilled: bool = False) -> Predictions:
    """The backbone pretrained with the teacher's maps and, but for `feature`, its interpreter's labels.

    Args:
        task: its masks train the interpreter and the fine-tuning.
        mode: feature, label or mixed. Feature transfers the backbone alone, the others the neck too, as the paper.
        as_distilled: the pretrained model labels the test images itself; nothing is fine-tuned.
    """
    run = pretrained(task, mode)
    if as_distilled:
        yield from predictions(load_distilled(run).to(task.device), task)
        return
    student = create_student(task.settings.student, init=str(run))
    neck = None if mode == "feature" else neck_weights(run)
    yield from finetuned(student, task, task.images, task.masks, neck)


def pretrained(task: Task, mode: str) -> Path:
    """The run of a mode; runs that rows share (feature: all counts) are made once, and their seconds counted."""
    args, bench = task.settings, task.benchmark
    name = f"feature-{task.seed}" if mode == "feature" else f"{mode}-{len(task.images)}-{task.seed}"
    out = args.out / "work" / name
    labels = None if mode == "feature" else interpreter(task)
    with shared(out):
        pretrain(
        PretrainConfig(
            images=bench.unlabelled, out=out, teacher=args.teacher, student=args.student, distill=mode,  # type: ignore[arg-type]
            interpreter=labels, size=bench.size, t=tuple(args.t),
            epochs=args.epochs, warmup_epochs=args.epochs / 10, batch_size=args.pretrain_batch, lr=4e-3,
            width=args.width, label_weight=args.label_weight, flip=not args.no_flip, seed=task.seed, device=args.device, log_every=20,
            probe_every=0, save_every=1000, keep_checkpoints=1,
        )
    )  # fmt: skip
    return out


def interpreter(task: Task) -> Path:
    """The interpreter of these masks, trained once for all rows that use it."""
    args, bench = task.settings, task.benchmark
    out = args.out / "work" / f"interpreter-{len(task.images)}-{task.seed}"
    names = tuple(f"class {i}" for i in range(bench.classes))
    with shared(out):
        train_interpreter(
        TrainInterpreterConfig(
            images=Path("in memory"), out=out, teacher=args.teacher, size=bench.size, t=tuple(args.t),
            ignore_index=bench.ignore, width=args.width, epochs=args.interpreter_epochs,
            warmup_epochs=args.interpreter_epochs // 5, batch_size=args.interpreter_batch, flip=not args.no_flip,
            seed=task.seed, device=args.device, look_every=0,
        ),
        labelled=LabelledSet(images=task.images, targets=task.masks, classes=names),
    )  # fmt: skip
    return out


# Seconds and peak memory of runs that an earlier row has paid for: they count in this one too.
_SHARED = {"seconds": 0.0, "cpu_seconds": 0.0, "peak_mb": 0.0}


@contextlib.contextmanager
def shared(out: Path) -> Iterator[None]:
    """Around a run that several rows use: what it took is kept beside it, and counted wherever it is used."""
    path, start, cpu = out / "cost.json", time.perf_counter(), time.process_time()
    before = json.loads(path.read_text()) if path.is_file() else None
    yield
    spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    if before is None:
        path.write_text(json.dumps({**spent, "peak_mb": peak_mb()}))
    else:
        for what, value in spent.items():
            _SHARED[what] += before[what] - value
        _SHARED["peak_mb"] = max(_SHARED["peak_mb"], before["peak_mb"])


def interpreter_in_teacher(task: Task) -> Predictions:
    """The interpreter alone: no student, the teacher itself runs on every test image."""
    network, spec = load_interpreter(interpreter(task))
    teacher = load_teacher(spec.teacher, timesteps=spec.t, device=task.device)
    test, network = task.benchmark.test, network.to(task.device)
    for part, index in enumerate(torch.arange(len(test.images)).split(16)):
        noise = device_generator(task.seed, part, "test", task.device)
        with torch.no_grad(), autocast(task.device, "auto"):
            maps = teacher.encode(to_input(test.images[index], task.device), generator=noise)
            logits = resize(network(maps).float(), task.benchmark.size)
        yield logits.argmax(1).cpu(), test.targets[index]


OURS = ("feature", "label", "mixed")
TEACHES = {"ddpm-seg", "dataset-ddpm", "interpreter", *OURS, "label-distilled", "mixed-distilled"}
METHODS: dict[str, Callable[[Task], Predictions]] = {
    "scratch": scratch,
    "imagenet": imagenet,
    "ddpm-seg": pixels_in_teacher,
    "dataset-ddpm": samples_of_teacher,
    "interpreter": interpreter_in_teacher,
    **{mode: functools.partial(dreamteacher, distill=mode) for mode in OURS},
    "label-distilled": functools.partial(dreamteacher, distill="label", as_distilled=True),
    "mixed-distilled": functools.partial(dreamteacher, distill="mixed", as_distilled=True),
}


def finetuned(
    student: Student,
    task: Task,
    images: Tensor,
    masks: Tensor,
    neck: Mapping[str, Tensor] | None = None,
) -> Predictions:
    """Predictions for the test set after fine-tuning backbone and UPerNet head on images and masks."""
    args, bench = task.settings, task.benchmark
    config = SegmentConfig(steps=args.steps, batch_size=args.batch_size, flip=not args.no_flip)
    model = train_segmenter(
        student.to(task.device), images, masks, config, classes=bench.classes, freeze=False, seed=task.seed,
        ignore_index=bench.ignore, neck=neck,
    )  # fmt: skip
    yield from predictions(model, task)


def predictions(model: nn.Module, task: Task) -> Predictions:
    """Class ids that a model gives the test images, and the true ones."""
    bench, device = task.benchmark, device_of(model)
    for index in torch.arange(len(bench.test.images)).split(32):
        with frozen(model), autocast(device, "auto"):
            yield model(to_input(bench.test.images[index], device)).argmax(1).cpu(), bench.test.targets[index]


def peak_mb() -> float:
    """The largest resident memory of this process so far, in 2^20 bytes.

    Not getrusage's: that one begins with the peak of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def measure(settings: argparse.Namespace, method: str, count: int, seed: int) -> dict[str, Any]:
    """The row of one method at one number of masks and one seed."""
    bench = load(settings, seed)
    drawn = draw_images(len(bench.pool.images), count, seed)
    task = Task(
        benchmark=bench,
        images=bench.pool.images[drawn],
        masks=bench.pool.targets[drawn],
        seed=seed,
        settings=settings,
    )
    data_mb, start, cpu = peak_mb(), time.perf_counter(), time.process_time()
    found = score(METHODS[method](task), bench)
    gpu = torch.cuda.max_memory_allocated() / 2**20 if task.device.type == "cuda" else 0.0
    return {
        "data": bench.name, "method": method, "count": count, "seed": seed,
        "miou": round(found.miou, 5), "miou_published": round(found.miou_published, 5),
        "iou": " ".join(f"{c}:{value:.4f}" for c, value in found.iou.items()),
        "seconds": round(time.perf_counter() - start + _SHARED["seconds"], 1),
        "cpu_seconds": round(time.process_time() - cpu + _SHARED["cpu_seconds"], 1),
        "peak_mb": round(max(peak_mb(), _SHARED["peak_mb"])), "data_mb": round(data_mb),
        "gpu_mb": round(gpu),
    }  # fmt: skip


def load(settings: argparse.Namespace, seed: int) -> Benchmark:
    """The set; of the published ones, seed 0 takes the published split and others draw their own."""
    return load_benchmark(settings.data, root=settings.data_root, unlabelled=settings.unlabelled, split=seed)


def check(settings: argparse.Namespace) -> None:
    """Raises UserError for what would fail only after hours."""
    bench = load(settings, 0)
    for count in settings.counts:
        draw_images(len(bench.pool.images), count, 0)
    needs_teacher = TEACHES & set(settings.methods)
    if needs_teacher and settings.teacher is None:
        raise UserError(
            f"'{settings.data}' has no teacher of its own for {', '.join(sorted(needs_teacher))}.",
            "Name one with --teacher.",
        )
    if needs_teacher:
        load_teacher(settings.teacher).check_size(*bench.size)
    if "imagenet" in settings.methods:
        create_student(settings.student, init=str(settings.imagenet))
    PixelConfig(
        members=settings.pixel_members, batch_size=settings.pixel_batch, epochs=settings.pixel_epochs,
        budget_gb=settings.pixel_budget_gb,
    )  # fmt: skip
    SamplesConfig(samples=settings.samples)
    SegmentConfig(steps=settings.steps, batch_size=settings.batch_size)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, choices=SETS)
    parser.add_argument(
        "--data-root", type=Path, help="where the set lies (lungs: none is the installed package)"
    )
    parser.add_argument("--unlabelled", type=Path, help="images for pretraining, of the published sets")
    parser.add_argument("--counts", type=int, nargs="+", required=True, help="labelled images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--student", default="resnet18", help="timm name")
    parser.add_argument(
        "--imagenet", default="imagenet", help="weights of the method imagenet; 'imagenet': timm's"
    )
    parser.add_argument("--teacher", help="name or folder; none: chest-xray-64 for lungs")
    parser.add_argument("--steps", type=int, default=300, help="of the fine-tuning of every method")
    parser.add_argument("--batch-size", type=int, default=4, help="images per step of the fine-tuning")
    parser.add_argument("--no-flip", action="store_true", help="no mirroring: classes have a side")
    parser.add_argument("--pixel-members", type=int, default=10)
    parser.add_argument("--pixel-batch", type=int, default=512, help="published: 64")
    parser.add_argument(
        "--pixel-epochs", type=int, default=2, help="published: at most 100, stopped early after 4"
    )
    parser.add_argument("--pixel-budget-gb", type=float, default=2.0, help="published: no bound")
    parser.add_argument(
        "--samples", type=int, default=200, help="of dataset-ddpm; published: 10,000 and more"
    )
    parser.add_argument("--sampling-steps", type=int, default=25, help="DDIM steps of a sample")
    parser.add_argument(
        "--t", type=int, nargs="*", default=[], help="of our methods; none: the teacher's own"
    )
    parser.add_argument("--epochs", type=float, default=2.0, help="of the pretraining")
    parser.add_argument("--pretrain-batch", type=int, default=32)
    parser.add_argument("--label-weight", type=float, default=1.0, help="of label distillation in mixed")
    parser.add_argument("--width", type=int, default=128, help="of regressor and interpreter")
    parser.add_argument("--interpreter-epochs", type=int, default=100)
    parser.add_argument("--interpreter-batch", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs=3, metavar=("METHOD", "COUNT", "SEED"), help=argparse.SUPPRESS)
    settings = parser.parse_args(arguments)
    if settings.data == "lungs" and settings.teacher is None:
        settings.teacher = "chest-xray-64"
    return settings


def fixed(settings: argparse.Namespace) -> dict[str, Any]:
    """The settings that all rows of a folder share."""
    free = {"counts", "seeds", "methods", "out", "only", "device"}
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(settings).items() if k not in free}


def same_settings(settings: argparse.Namespace) -> None:
    """Writes OUT/settings.json, or raises UserError when rows were made with other settings."""
    path, now = settings.out / "settings.json", fixed(settings)
    if path.is_file():
        before = json.loads(path.read_text())
        changed = [k for k in now if now[k] != before.get(k)]
        if changed:
            raise UserError(
                f"'{settings.out}' was made with other settings: "
                + ", ".join(f"{k} {before.get(k)}, now {now[k]}" for k in changed) + ".",
                "Use the same, or another --out.",
            )  # fmt: skip
        return
    settings.out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(path, json.dumps(now, indent=2) + "\n")


def read_results(path: Path) -> list[dict[str, str]]:
    """The rows of results.csv; none when there is no file."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Runs what is not in OUT/results.csv yet, method by method."""
    settings = parse(sys.argv[1:])
    if settings.only:
        method, count, seed = settings.only
        row = measure(settings, method, int(count), int(seed))
        checkpoint.write_text(settings.out / "row.json", json.dumps(row))
        return
    check(settings)
    same_settings(settings)
    table = settings.out / "results.csv"
    for seed in settings.seeds:
        for count in settings.counts:
            for method in settings.methods:
                rows = read_results(table)
                if any((r["method"], r["count"], r["seed"]) == (method, str(count), str(seed)) for r in rows):
                    continue
                only = ["--only", method, str(count), str(seed)]
                done = subprocess.run([sys.executable, __file__, *sys.argv[1:], *only], env=dict(os.environ))
                if done.returncode:
                    sys.exit(done.returncode)
                rows.append(json.loads((settings.out / "row.json").read_text()))
                (settings.out / "row.json").unlink()
                _write(table, rows)
                print(
                    ", ".join(f"{k} {rows[-1][k]}" for k in COLUMNS if k not in ("data", "iou")), flush=True
                )


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)

    checkpoint.atomic_write(path, write)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
