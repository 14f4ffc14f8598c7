"""Features on disk: do they keep up with the student, and how large are they?

    python benchmarks/features/run.py speed --out benchmarks/features/speed.csv
    python benchmarks/features/run.py speed --teacher adm --student resnet50 --batch-size 8 --images 32 --rounds 8 \\
        --steps 1 --append --out benchmarks/features/speed.csv
    python benchmarks/features/run.py bytes --out benchmarks/features/bytes.csv

speed     in turn, on the same networks: steps that read a store, and steps on one batch that stays in memory. The claim
          is the median over rounds of (student-only time / time with the store), target 0.95. Beside it the time of
          a batch when nothing else runs, and items a second after the disk's cache was dropped. One untimed step goes
          before each window and one behind it, with which its reader ends: none reads on while another kind is timed.
bytes     a store of the shapes of ADM-256's four levels at 256 px (the maps are noise), as it lies on the disk: target
          at most 0.35 MB an image and draw with the defaults.

What a format costs in accuracy: accuracy.py.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import platform
import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from dreamteacher import __version__
from dreamteacher.data import image_set
from dreamteacher.distill import dataset
from dreamteacher.distill.config import MakeFeaturesConfig, PretrainConfig
from dreamteacher.distill.dataset import FeatureBatch
from dreamteacher.distill.store.items import layout
from dreamteacher.distill.store.make import make_features
from dreamteacher.distill.store.reader import FeatureStore
from dreamteacher.models.regressor import FeatureRegressor
from dreamteacher.models.student import create_student
from dreamteacher.runtime.distributed.device import pick_device, resolve_precision
from dreamteacher.spec import FeatureSpec
from dreamteacher.teachers.base import Teacher
from dreamteacher.teachers.registry import load_teacher

Stepper = runpy.run_path(str(Path(__file__).parent.parent / "stepper.py"))["Stepper"]
BUSY = os.getloadavg()[0]  # of other processes: this one has just begun
ADM = f"{__file__}:adm_shapes"
FORMATS: dict[str, dict[str, Any]] = {
    "raw, float16": {"keep": "all"},
    "whitened, int8": {"keep": "whitened"},
    "PCA 63 + energy, float16": {"store": ("float16",)},
    "PCA 63 + energy, int8": {},
    "random 63 + energy, int8": {"keep": "random"},
    "PCA 31 + energy, int8": {"channels": 32},
}


class NoiseMaps(Teacher):
    """Maps of ADM-256's shapes, of noise with a spectrum that falls over channels: no network runs."""

    name, family, licence, size, multiple = "adm-shapes", "noise", "-", (256, 256), 32
    modes = frozenset({"encode"})
    specs = tuple(FeatureSpec(f"s{s}", c, s) for c, s in ((512, 4), (512, 8), (1024, 16), (1024, 32)))

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("anchor", torch.zeros(1))
        self.freeze()

    def encode(self, images: Tensor, *, generator: torch.Generator) -> list[Tensor]:
        height, width = images.shape[-2:]
        maps = []
        for spec in self.specs:
            shape = spec.shape(len(images), (height, width))
            noise = torch.randn(shape, generator=generator, device=images.device)
            falling = torch.arange(1, spec.channels + 1, device=images.device).float().rsqrt()
            maps.append(noise * falling[:, None, None])
        return maps


def adm_shapes() -> Teacher:
    """For --teacher FILE.py:FUNCTION."""
    return NoiseMaps()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    speed = parts.add_parser("speed")
    speed.add_argument("--out", type=Path)
    speed.add_argument("--teacher", default="chest-xray-64", help="'adm' for noise of ADM-256's shapes")
    speed.add_argument("--student", default="resnet18")
    speed.add_argument("--batch-size", type=int, default=32)
    speed.add_argument("--width", type=int, default=256)
    speed.add_argument("--images", type=int, default=512)
    speed.add_argument("--rounds", type=int, default=20)
    speed.add_argument("--steps", type=int, default=4, help="steps of each kind in a round")
    speed.add_argument("--append", action="store_true", help="keep the rows that the CSV has")
    speed.add_argument("--folder", type=Path, help="where the store lies; none: a temporary folder")
    size = parts.add_parser("bytes")
    size.add_argument("--out", type=Path)
    size.add_argument("--images", type=int, default=16)
    args = parser.parse_args()
    {"speed": measure_speed, "bytes": measure_bytes}[args.part](args)


def noise_folder(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """A folder of PNG files of noise."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        pixels = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        to_pil_image(pixels).save(folder / f"{i:05d}.png", compress_level=0)
    return folder


def measure_speed(args: argparse.Namespace) -> None:
    device = pick_device()
    name = ADM if args.teacher == "adm" else args.teacher
    teacher = load_teacher(name)
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        folder = noise_folder(Path(place, "images"), args.images, teacher.size)
        asked = MakeFeaturesConfig(images=folder, out=Path(place, "store"), teacher=name)
        begin = time.perf_counter()
        make_features(asked)
        making = time.perf_counter() - begin
        cold = cold_items_per_s(asked.out, args.batch_size)
        store, images = FeatureStore(asked.out), image_set.load_images(folder, teacher.size)
        row = timed_steps(args, store, images, device)
    row |= {"cold_items_per_s": f"{cold:.0f}", "bytes_an_item": f"{row.pop('bytes')}",
            "made_images_per_s": f"{args.images / making:.1f}"}  # fmt: skip
    write(args.out, row | environment(device), append=args.append)


def cold_items_per_s(folder: Path, batch: int) -> float:
    """Every item read once, in a random order, after the system has dropped the shards from its cache."""
    for path in folder.glob("shard-*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    store = FeatureStore(folder, hash_gb=0)
    order = torch.randperm(store.plan.images, generator=torch.Generator().manual_seed(0))
    begin = time.perf_counter()
    for part in order.split(batch):
        for k in range(store.plan.draws):
            store.rows(part, torch.full_like(part, k))
    return store.plan.images * store.plan.draws / (time.perf_counter() - begin)


def settle(device: torch.device) -> None:
    """Waits for what the device still does."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed_steps(
    args: argparse.Namespace, store: FeatureStore, images: image_set.ImageSet, device: torch.device
) -> dict[str, Any]:
    """Steps from the store, steps without it and reads alone, round by round."""
    config = PretrainConfig(
        images=images.folder,
        out=Path("-"),
        student=args.student,
        batch_size=args.batch_size,
        width=args.width,
    )
    student = create_student(args.student).to(device)
    regressor = FeatureRegressor(student.specs, store.plan.specs, width=args.width).to(device)
    training = Stepper(config, student, regressor, steps=10**6)

    window = args.steps + 2  # the first and the last are not timed

    def stream(turn: int) -> Iterator[FeatureBatch]:
        return dataset.stored(
            store, images, batch_size=args.batch_size, first_step=turn * window, last_step=(turn + 1) * window,
            seed=0, device=device,
        )  # fmt: skip

    fixed = itertools.repeat(next(stream(0)))
    kinds = {
        "stored": lambda i, batches: training.step(i, batches),
        "student": lambda i, _: training.step(i, fixed),
        "read": lambda _, batches: next(batches),
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    turns = itertools.count()
    for round_ in range(args.rounds + 2):
        for kind in list(kinds) if round_ % 2 else list(reversed(kinds)):
            act, batches = kinds[kind], stream(next(turns))
            act(0, batches)
            settle(device)
            begin = time.perf_counter()
            for i in range(args.steps):
                act(i, batches)
            settle(device)
            if round_ >= 2:  # the first two warm up
                times[kind].append((time.perf_counter() - begin) / args.steps)
            act(0, batches)
            settle(device)
    ratios = [b / a for a, b in zip(times["stored"], times["student"], strict=True)]
    middle = {kind: f"{1000 * statistics.median(values):.2f}" for kind, values in times.items()}
    return {
        "teacher": store.plan.teacher, "student": args.student, "batch": args.batch_size, "width": args.width,
        "size": " ".join(map(str, store.plan.size)), "images": len(images), "rounds": args.rounds,
        "stored_ms": middle["stored"], "student_ms": middle["student"], "read_ms": middle["read"],
        "speed_median": f"{statistics.median(ratios):.4f}",
        "speed_quartiles": " ".join(f"{q:.4f}" for q in statistics.quantiles(ratios, n=4)[::2]),
        "bytes": layout(store.plan)[1],
    }  # fmt: skip


def measure_bytes(args: argparse.Namespace) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = noise_folder(Path(place, "images"), args.images, (256, 256))
        for i, (kind, asked) in enumerate(FORMATS.items()):
            out = Path(place, str(i))
            make_features(MakeFeaturesConfig(
                images=folder, out=out, teacher=ADM, batch_size=4, fit=512, device="cpu", **asked
            ))  # fmt: skip
            store = FeatureStore(out)
            shards = sum(p.stat().st_size for p in out.glob("shard-*.safetensors"))
            each = shards / (args.images * store.plan.draws)
            rows.append({"format": kind, "bytes_an_image": f"{each:.0f}", "mb_an_image": f"{each / 1e6:.4f}",
                         "imagenet_gb": f"{each * 1_281_167 / 1e9:.0f}"})  # fmt: skip
    write(args.out, *[row | environment(torch.device("cpu")) for row in rows])


def environment(device: torch.device) -> dict[str, Any]:
    return {
        "device": f"{device} x {torch.get_num_threads()} threads",
        "precision": str(resolve_precision(device, "auto")).removeprefix("torch."),
        "torch": torch.__version__, "version": __version__, "machine": platform.machine(),
        "load": f"{BUSY:.2f}",
        "command": "python benchmarks/features/run.py " + " ".join(sys.argv[1:]),
    }  # fmt: skip


def write(out: Path | None, *rows: dict[str, Any], append: bool = False) -> None:
    for row in rows:
        print("\n".join(f"{key:20} {value}" for key, value in row.items()), "\n")
    if out:
        more = append and out.exists()
        with open(out, "a" if more else "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            if not more:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
