"""Folders of every kind, good and bad, in which the commands run."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dreamteacher.cli.main import main
from dreamteacher.reports import report
from dreamteacher.runtime import checkpoint
from dreamteacher.teachers import registry
from tests.cli.errors.commands import interpret, pretrain
from tests.places import GOLDEN
from tests.teachers.stylegan2.test_teacher import tiny as tiny_gan

SECRET = "dreamteacher-errors-code-ran"


def noise(seed: int, high: int = 256) -> Image.Image:
    """64 x 64 grey pixels from 0 to below `high`."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, high, (64 * 64,), generator=generator, dtype=torch.uint8)
    return Image.frombytes("L", (64, 64), bytes(pixels.tolist()))


def damaged(kind: str, good: bytes) -> bytes:
    """A file with one kind of damage."""
    match kind:
        case "corrupt":  # a flipped byte in the compressed pixels
            at = good.index(b"IDAT") + 4
            return good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :]
        case "truncated":
            return good[: len(good) // 2]
        case "zero":
            return b""
        case "text":
            return b"this is no picture\n"
    assert kind == "huge"  # a header that announces 3.6 gigapixels
    import struct
    import zlib

    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    end = b"".join(struct.pack(">I", 0) + t + struct.pack(">I", zlib.crc32(t)) for t in (b"IDAT", b"IEND"))
    return good[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + end


OWN = """
from dreamteacher.teachers.registry import load_teacher


def teacher():
    return load_teacher("teacher")


def number():
    return 7


def fails():
    return 1 / 0
"""


class Code:
    """Unpickling this runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {SECRET}",)


def make_world(root: Path, tiny_teacher: Path, image_folder: Path) -> None:
    """Folders of every kind, good and bad. The commands run here and must leave it as it is."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.chdir(root)
        patch.setattr(report, "write_report", lambda run, **_: run)  # it is not what is tested here
        _images(image_folder)
        _teachers(tiny_teacher)
        Path("notes.txt").write_text("notes")
        Path("thesis").mkdir()
        Path("thesis/thesis.txt").write_text("years of work")
        assert main(pretrain(out="run", save_every="1")) == 0
        assert main(interpret(out="interpreter")) == 0
        _runs()
        _weights()


def _images(source: Path) -> None:
    shutil.copytree(source, "photos")
    shutil.copytree(source, "animals")
    Path("animals/bright").rename("animals/cats")
    Path("empty").mkdir()
    Path("empty/readme.txt").write_text("nothing here")
    good = Path("photos/dark/0.png").read_bytes()
    Path("damaged").mkdir()
    for kind in ("corrupt", "truncated", "zero", "text", "huge"):
        shutil.copytree(source, kind)
        name = f"bad.{'jpg' if kind == 'text' else 'png'}"
        Path(kind, "dark", name).write_bytes(damaged(kind, good))
        if kind in ("truncated", "zero", "text"):
            Path("damaged", f"{kind}.png").write_bytes(damaged(kind, good))
    folders = ("masked", "masks", "masks-alone", "masks-oblong", "masks-rgb", "masks-empty")
    for folder in folders:
        Path(folder).mkdir()
    for i in range(8):
        noise(i).save(f"masked/{i}.png")
        mask = noise(100 + i, 2)
        for folder in folders[1:]:
            mask.save(f"{folder}/{i}.png")
        mask.convert("RGB").save(f"masks-rgb/{i}.png")
        Image.new("L", (64, 64)).save(f"masks-empty/{i}.png")
    _label_files()
    mask.save("masks-alone/lonely.png")
    mask.resize((32, 64)).save("masks-oblong/3.png")


def _label_files() -> None:
    """Masks that look right at first sight."""
    import numpy as np

    for kind in ("palettes", "unknown", "npy", "npy-objects"):
        Path(f"masks-{kind}").mkdir()
    for i in range(8):
        ids = noise(100 + i, 2)
        coloured = ids.copy()
        coloured.putpalette([0, 0, 0, 255 - i, i, 0])
        coloured.save(f"masks-palettes/{i}.png")
        (ids.point(lambda v: v * 7) if i == 3 else ids).save(f"masks-unknown/{i}.png")
        array = np.asarray(ids).astype(np.int64)
        np.save(f"masks-npy/{i}.npy", array * 9 if i == 2 else array)
        np.save(f"masks-npy-objects/{i}.npy", np.array([None, {}], dtype=object))
    Path("labels").mkdir()
    Path("labels/broken.json").write_text("{ not json")
    image = {"id": 1, "file_name": "0.png", "width": 64, "height": 64}
    box = {
        "id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "bbox": [4, 4, 20, 20], "area": 400,
        "segmentation": [[4, 4, 24, 4, 24, 24, 4, 24]],
    }  # fmt: skip
    good = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "thing"}]}
    missing = good | {"images": [image | {"file_name": "gone.png"}]}
    Path("labels/missing.json").write_text(json.dumps(missing))
    category = good | {"annotations": [box | {"category_id": 5}]}
    Path("labels/category.json").write_text(json.dumps(category))
    images = [image | {"id": 1 + i, "file_name": f"{i}.png"} for i in range(8)]
    boxes = [box | {"id": 1 + i, "image_id": 1 + i} for i in range(8)]
    for name, thing in (("instances", "thing"), ("instances-other", "animal")):
        categories = [{"id": 1, "name": thing}]
        content = {"images": images, "annotations": boxes, "categories": categories}
        Path(f"labels/{name}.json").write_text(json.dumps(content))
    Path("segments").mkdir()
    segments = []
    for i in range(8):
        Image.new("RGB", (64, 64), (1, 0, 0)).save(f"segments/{i}.png")
        info = {"id": 1, "category_id": 1}
        segments.append({"image_id": 1 + i, "file_name": f"{i}.png", "segments_info": [info]})
    stuff = [{"id": 1, "name": "sky", "isthing": 0}, {"id": 2, "name": "ground", "isthing": 0}]
    content = {
        "images": images,
        "annotations": segments,
        "categories": stuff,
    }
    Path("labels/segments.json").write_text(json.dumps(content))
    _shards()


def _shards() -> None:
    """Folders of tar files, each with one thing wrong."""
    for kind in ("packed", "cut", "hostile", "links", "empty"):
        Path(f"shards-{kind}").mkdir()
        with tarfile.open(f"shards-{kind}/0.tar.gz" if kind == "packed" else f"shards-{kind}/0.tar",
                          "w:gz" if kind == "packed" else "w") as tar:  # fmt: skip
            if kind == "empty":
                tar.add("labels/broken.json", "0.txt")
            elif kind == "links":
                link = tarfile.TarInfo("0.png")
                link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(link)
            else:
                tar.add("photos/dark/0.png", "../../0.png" if kind == "hostile" else "0.png")
    whole = Path("shards-cut/0.tar").read_bytes()
    Path("shards-cut/0.tar").write_bytes(whole[:2000])


def _teachers(tiny: Path) -> None:
    for name in ("teacher", "teacher-damaged", "teacher-card", "teacher-other"):
        shutil.copytree(tiny, name)
    damaged_weights = bytearray(Path("teacher/teacher.safetensors").read_bytes())
    damaged_weights[-100] ^= 1
    Path("teacher-damaged/teacher.safetensors").write_bytes(damaged_weights)
    text = Path("teacher/teacher.json").read_text()
    Path("teacher-card/teacher.json").write_text(text[: len(text) // 2])
    card = registry.read_card(Path("teacher"))
    weights = {k: v + 1 for k, v in load_file("teacher/teacher.safetensors").items()}
    spec = registry.read_spec(Path("teacher"), card)
    Path("teacher-two").mkdir()
    registry.save_teacher(Path("teacher-two"), weights, spec, {"name": "two", "licence": "CC0-1.0"})
    Path("gan").mkdir()
    tiny_gan(Path("gan"))
    shutil.copyfile(GOLDEN / "hostile_os_system.pkl", "hostile.pkl")
    Path("own.py").write_text(OWN)
    Path("teacher-other/teacher.json").write_text(
        text.replace('"layers_per_block": 1', '"layers_per_block": 2')
    )


def _runs() -> None:
    for name in ("foreign", "other", "verb", "garbage", "altered"):
        shutil.copytree("run", f"run-{name}")
    newest = "checkpoint-00000002.safetensors"
    tensors, meta = checkpoint.load(Path("run", newest))
    save_file({"a": torch.zeros(3)}, Path("run-foreign", newest))
    fewer = {k: v for k, v in tensors.items() if "layer4" not in k}
    checkpoint.save(Path("run-other", newest), fewer, meta)
    checkpoint.save(Path("run-verb", newest), tensors, meta | {"kind": "train-teacher"})
    for path in Path("run-garbage").glob("checkpoint-*"):
        path.write_bytes(b"garbage")
    Path("run-altered/checkpoint-00000001.safetensors").unlink()
    altered = bytearray(Path("run", newest).read_bytes())
    altered[-100] ^= 1
    Path("run-altered", newest).write_bytes(altered)
    shutil.copytree("run", "unfinished")
    Path("unfinished/backbone.safetensors").unlink()


def _weights() -> None:
    Path("weights").mkdir()
    whole = Path("run/backbone.safetensors").read_bytes()
    Path("weights/cut.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file({"a": torch.zeros(3)}, "weights/foreign.safetensors")
    from dreamteacher.models.student import create_student

    state = create_student("test_efficientnet").model.state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, "weights/other.safetensors")
    torch.save({"state_dict": {"a": torch.zeros(3)}, "optimizer": Code()}, "weights/code.pth")


def contents(root: Path) -> dict[str, str]:
    """Every file and folder with a digest of its bytes."""
    return {str(p.relative_to(root)): _digest(p) if p.is_file() else "folder" for p in root.rglob("*")}


def _digest(path: Path) -> str:
    stat = path.stat()
    return _digest_once(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))


@functools.cache  # a file that nothing has touched is not read again
def _digest_once(path: Path, _state: tuple[int, ...]) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
