"""How fast do images come, when nothing is done with them?

Five ways to read the same images, in turn, round by round, in one process; the ratio is to the first in the same round:
  PIL alone       open, decode to RGB, scale and crop by the same filter, its bytes: one thread, nothing else
  folder          `data.batches`, decoded and scaled on the way, in this process
  folder, 2 proc  the same with two worker processes
  tar shards      the same images in uncompressed tar files, in this process
  cached          decoded once and kept in memory, as sets of up to 2 GB are
Batches come out as pretraining takes them: float32, scaled to `--size`, half of them mirrored. `--batches` of them are
timed, over as many epochs as that takes, after two for each worker process: a run starts its processes once, and what
they had made before the clock started must not count.

    python benchmarks/loading/run.py --jpeg /data/camvid/images/train --out benchmarks/loading/loading.csv

Without --jpeg, images of smooth noise (480 x 360) stand for the photographs; the PNG set is always of that kind.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dreamteacher import __version__
from dreamteacher.data import batches as data_batches
from dreamteacher.data import image_set
from dreamteacher.data.images import find_images

BUSY = os.getloadavg()[0]  # of other processes: this one has just begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--jpeg", type=Path, help="folder of photographs; none: made of noise")
    parser.add_argument("--images", type=int, default=320, help="of each set")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=50, help="that are timed in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--png-size", type=int, default=64)
    parser.add_argument("--size", type=int, default=256, help="height and width of a batch of photographs")
    args = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory() as place:
        photographs = Path(place, "jpeg")
        if args.jpeg:
            photographs.mkdir()
            for path in find_images(args.jpeg)[: args.images]:
                (photographs / path.name).symlink_to(path.resolve())
        else:
            noise_images(photographs, args.images, (480, 360), ".jpg")
        small = Path(place, "png")
        noise_images(small, args.images, (args.png_size, args.png_size), ".png")
        for folder, size in ((photographs, args.size), (small, args.png_size)):
            rows += measure(args, folder, (size, size))
    if args.out:
        with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def noise_images(folder: Path, count: int, size: tuple[int, int], suffix: str) -> None:
    """Images (width, height) of smooth noise, which compress about as photographs do."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        coarse = torch.randint(256, (size[1] // 8 * (size[0] // 8) * 3,), generator=generator)
        picture = Image.frombytes("RGB", (size[0] // 8, size[1] // 8), bytes(coarse.tolist()))
        picture.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:05d}{suffix}")


def pack(folder: Path, place: Path) -> Path:
    """The images of a folder in one tar file."""
    place.mkdir()
    with tarfile.open(place / "0.tar", "w") as tar:
        for i, path in enumerate(find_images(folder)):
            tar.add(path.resolve(), f"{i:05d}{path.suffix.lower()}")
    return place


def measure(args: argparse.Namespace, folder: Path, size: tuple[int, int]) -> list[dict[str, Any]]:
    paths = find_images(folder)
    shards = pack(folder, folder.parent / f"{folder.name}-tar")
    batch = min(args.batch_size, len(paths) // 2)
    steps = len(paths) // batch
    with Image.open(paths[0]) as first:
        kind, width, height = first.format, first.width, first.height

    def alone() -> float:
        begin = time.perf_counter()
        for path in paths[: steps * batch]:
            with Image.open(path) as image:
                h, w = image.height, image.width
                part = min(h / size[0], w / size[1])  # of the image, in pixels, for each of `size`
                top, left = (h - part * size[0]) / 2, (w - part * size[1]) / 2
                image.convert("RGB").resize(
                    size[::-1],
                    Image.Resampling.BILINEAR,
                    box=(left, top, w - left, h - top),
                    reducing_gap=2.0,
                ).tobytes()
        return steps * batch / (time.perf_counter() - begin)

    def stream(images: image_set.ImageSet, workers: int) -> Callable[[], float]:
        prefetch = max(1, 2 * workers)  # torch's loader keeps two batches of each process
        starts = itertools.count(step=prefetch + args.batches)

        def act() -> float:
            first = next(starts)
            batches = data_batches.batches(
                images, batch_size=batch, seed=0, first_step=first, last_step=first + prefetch + args.batches,
                flip=True, workers=workers,
            )  # fmt: skip
            for _ in range(prefetch):
                next(batches)
            begin = time.perf_counter()
            for _ in batches:
                pass
            return args.batches * batch / (time.perf_counter() - begin)

        return act

    from_folder = image_set.load_images(folder, size, cache_gb=0)
    ways = {
        "PIL alone": alone,
        "folder": stream(from_folder, 0),
        "folder, 2 processes": stream(from_folder, 2),
        "tar shards": stream(image_set.load_images(Path(f"shards:{shards}"), size, cache_gb=0), 0),
        "cached": stream(image_set.load_images(folder, size), 0),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(args.rounds + 1):
        for way in list(ways) if round_ % 2 else list(reversed(ways)):
            found = ways[way]()
            if round_:  # the first one warms up
                rates[way].append(found)
    rows = []
    for way, each in rates.items():
        ratios = [r / a for r, a in zip(each, rates["PIL alone"], strict=True)]
        rows.append({
            "set": f"{kind} {height} x {width} -> {size[0]} x {size[1]}", "way": way,
            "images_per_s": f"{statistics.median(each):.1f}", "ratio_median": f"{statistics.median(ratios):.3f}",
            "ratio_range": f"{min(ratios):.3f} {max(ratios):.3f}", "images": steps * batch, "batch": batch,
            "rounds": args.rounds, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "pillow": Image.__version__, "torch": torch.__version__, "version": __version__,
            "machine": platform.machine(),
        "load": f"{BUSY:.2f}",
            "command": "python benchmarks/loading/run.py " + " ".join(sys.argv[1:]),
        })  # fmt: skip
        print(f"{rows[-1]['set']:32} {way:20} {rows[-1]['images_per_s']:>8} images/s, "
              f"{rows[-1]['ratio_median']} of PIL alone", flush=True)  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
