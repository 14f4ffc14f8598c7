"""Damaged and hostile checkpoints, manifests and archives, and what this package must make of each of them.

A `Kind` makes its sound files once in a folder, and then, for a case, damages one and reads it: the reader returns
whether what it got is right. A UserError is a right answer too; anything else is a defect.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreamteacher.data import shards
from dreamteacher.data.images import BadImageError, read_image
from dreamteacher.distill import config as distill_config
from dreamteacher.distill.store import files, make, reader
from dreamteacher.models import student
from dreamteacher.models.interpreter import InterpreterSpec, load_interpreter, save_interpreter
from dreamteacher.reports.report import write_report
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.config import from_json
from dreamteacher.runtime.download.archive import extract
from dreamteacher.runtime.run_folder import RunDir
from dreamteacher.teachers.diffusion.teacher import DiffusionSpec, build_unet
from dreamteacher.teachers.registry import load_teacher, save_teacher
from dreamteacher.teachers.stylegan2.convert import read_pickle

GOLDEN = Path(__file__).parent.parent.parent / "tests" / "golden"
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 2**31, 2**63, 10**30, 0.5, -1e308, float("nan"), float("inf"), "", "x", "../../x",
    "/etc/passwd", "x" * 10_000, "\0", "\ud800", [], {}, [[]], [1, 2, 3], [-1], {"x": {}}, "int8", "F64", "BOOL",
)  # fmt: skip
LEVELS = 3
UNET = {
    "sample_size": [16, 16], "in_channels": 1, "out_channels": 1, "block_out_channels": [8] * LEVELS,
    "layers_per_block": 1, "down_block_types": ["DownBlock2D"] * LEVELS, "up_block_types": ["UpBlock2D"] * LEVELS,
    "attention_head_dim": 8, "norm_num_groups": 4, "attn_norm_num_groups": 4,
}  # fmt: skip


class Sandbox:
    """A folder for the files (`inside`), and beside it what no reader may touch: `outside`, and a canary."""

    def __init__(self, root: Path) -> None:
        self.inside, self.outside, self.canary = root / "inside", root / "outside", root / "canary"
        self.inside.mkdir()
        self.outside.mkdir()
        (self.outside / "sentinel").write_text("as it was")
        self.root = root

    def touched(self) -> bool:
        """Whether code of a file ran, or a file was written where none belongs."""
        names = sorted(str(p.relative_to(self.root)) for p in self.root.iterdir())
        kept = [p.name for p in self.outside.iterdir()] == ["sentinel"]
        return (
            names != ["inside", "outside"]
            or not kept
            or (self.outside / "sentinel").read_text() != "as it was"
        )


# --- damage -------------------------------------------------------------------------------------------------


def damaged(rng: random.Random, raw: bytes) -> bytes:
    """Bytes are cut off, flipped, missing, doubled, or become noise."""
    changed, place = bytearray(raw), rng.randrange(len(raw))
    match rng.randrange(6):
        case 0:
            return raw[:place]
        case 1 | 2:
            for _ in range(rng.choice((1, 1, 3, 30))):
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        case 3:
            changed[place : place + rng.choice((1, 8, 512))] = rng.randbytes(rng.choice((0, 1, 8)))
        case 4:
            changed[place:place] = changed[place : place + rng.choice((1, 8, 512))]
        case 5:
            for _ in range(4):
                changed[rng.randrange(min(300, len(changed)))] = rng.randrange(256)
    return bytes(changed)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON value something can be changed."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, v in items for place in places(v, (*path, key))]


def changed(rng: random.Random, value: Any) -> Any:
    """A JSON value with one to three settings that are odd, missing, doubled or new."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        where = places(value)
        if not where:
            return value
        *path, key = rng.choice(where)
        holder = value
        for step in path:
            holder = holder[step]
        old = holder[key]
        match rng.randrange(6):
            case 0:
                del holder[key]
            case 1:
                holder[key] = [copy.deepcopy(old)] * rng.choice((0, 1, 2, 50))
            case 2 if isinstance(holder, dict):
                holder[rng.choice(("x", "__class__", f"{key} ", "../x"))] = copy.deepcopy(old)
            case 3 if isinstance(old, int) and not isinstance(old, bool):
                holder[key] = rng.choice((old + 1, old - 1, -old, old * 1000, old * 10**12))
            case _:
                holder[key] = copy.deepcopy(rng.choice(ODD))
    return value


def text_of(rng: random.Random, value: Any) -> bytes:
    """A changed JSON value, sometimes damaged or nested without end, as bytes."""
    if rng.random() < 0.03:
        return rng.choice(
            (b"[" * 200_000, b'{"a":' * 100_000, b"9" * 10_000, b"\xff\xfe", b"null", b"7", b'""', b"[]")
        )
    text = json.dumps(changed(rng, value)).encode("utf-8", "surrogatepass")
    return damaged(rng, text) if rng.random() < 0.2 else text


def lying(rng: random.Random, raw: bytes) -> bytes:
    """A safetensors file whose header says something else: lengths, offsets, dtypes, shapes, or is garbage."""
    length = struct.unpack("<Q", raw[:8])[0]
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    match rng.randrange(8):
        case 0:
            lie = rng.choice((0, 1, length - 1, length + 1, len(raw), 2**31, 2**63, 2**64 - 1))
            return struct.pack("<Q", lie) + raw[8:]
        case 1:
            text = text_of(rng, header)
        case 2:
            text = rng.randbytes(length)
        case 3:  # a huge header of nothing
            text = json.dumps(header).encode() + b" " * rng.choice((10_000, 5_000_000))
        case 4:
            name = rng.choice([k for k in header if k != "__metadata__"])
            begin, end = header[name]["data_offsets"]
            header[name]["data_offsets"] = rng.choice(
                ([0, end], [end, begin], [begin, 2**40], [-1, end], [begin + 1, end + 1], [begin, len(body)])
            )
            text = json.dumps(header).encode()
        case 5:
            name = rng.choice([k for k in header if k != "__metadata__"])
            header[name]["dtype"] = rng.choice(
                ("F64", "F16", "BF16", "I8", "BOOL", "U64", "F8_E4M3", "F4", "C64", "X")
            )
            text = json.dumps(header).encode()
        case 6:
            name = rng.choice([k for k in header if k != "__metadata__"])
            shape = header[name]["shape"]
            header[name]["shape"] = rng.choice(
                (shape[::-1], [], [0], [2**62, 4], [*shape, 1], [-1, *shape], [1] * 500)
            )
            text = json.dumps(header).encode()
        case _:
            return damaged(rng, raw)
    return struct.pack("<Q", len(text)) + text + body


class Act:
    """Unpickling this would do something."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def hostile(rng: random.Random, canary: Path) -> Any:
    """An object whose unpickling would make the canary, called by one of many names."""
    shell, python = f"touch {canary}", f"open({str(canary)!r}, 'w')"
    acts = [
        Act(os.system, shell), Act(eval, python), Act(exec, python), Act(Path.touch, canary),
        Act(subprocess.check_output, shell.split()), Act(shutil.copy, __file__, str(canary)),
        Act(io.open, str(canary), "w"), Act(os.mkdir, str(canary)), Act(pickle.loads, pickle.dumps(Act(os.system, shell))),
        Act(torch.load, str(canary)),
        Act(torch.storage._load_from_bytes, pickle.dumps(Act(os.system, shell))), Act(bytearray, 10**13),
    ]  # fmt: skip
    act = rng.choice(acts)
    good = {"a": torch.zeros(3)}
    return rng.choice((act, {"a": act}, {"state_dict": good, "x": act}, [act], good | {"b": act}))


# --- kinds ----------------------------------------------------------------------------------------------------


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    def bits(t: Tensor) -> bytes:
        return t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()

    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and bits(a[k]) == bits(b[k]) for k in a
    )


Reader = Callable[[random.Random], bool]


def of_checkpoints(box: Sandbox) -> Reader:
    """Our checkpoints: what is read is what was written, every bit, or nothing is."""
    tensors = {"net/weight": torch.randn(4, 3), "net/steps": torch.tensor(7), "half": torch.ones(5).half()}
    path, meta = (
        box.inside / "checkpoint-00000003.safetensors",
        {"kind": "test", "step": 3, "nested": {"x": [1.5]}},
    )
    checkpoint.save(path, tensors, meta)
    sound = path.read_bytes()

    def read(rng: random.Random) -> bool:
        path.write_bytes(lying(rng, sound))
        found, facts = checkpoint.load(path)
        return equal(found, tensors) and facts == meta

    return read


def of_weights(box: Sandbox) -> Reader:
    """Others' safetensors files have no checksum: plain tensors, or an error."""
    path = box.inside / "weights.safetensors"
    save_file({"a.weight": torch.randn(4, 3), "a.bias": torch.zeros(3)}, path, {"student": "resnet18"})
    sound = path.read_bytes()

    def read(rng: random.Random) -> bool:
        path.write_bytes(lying(rng, sound))
        found = student.read_weights(path) if rng.random() < 0.5 else checkpoint.read_state_dict(path)
        tensors = found if isinstance(found, dict) else found.tensors
        return all(type(k) is str and type(v) is Tensor for k, v in tensors.items())

    return read


def of_torch_files(box: Sandbox) -> Reader:
    """torch's own files, zipped and not, damaged or with pickles that would act."""
    path, good = box.inside / "weights.pth", {"a.weight": torch.randn(4, 3), "a.steps": torch.tensor(3)}

    def raw(content: Any, zipped: bool) -> bytes:
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        return file.getvalue()

    sound = [raw(good, True), raw(good, False), raw({"state_dict": good, "epoch": 3}, True)]

    def read(rng: random.Random) -> bool:
        chance = rng.random()
        if chance < 0.4:
            act = hostile(rng, box.canary)
            try:
                content = (
                    raw(act, rng.random() < 0.5)
                    if rng.random() < 0.8
                    else pickle.dumps(act, rng.randrange(5))
                )
            except (pickle.PicklingError, AttributeError):  # old protocols know no methods
                content = pickle.dumps(act, 4)
            content = damaged(rng, content) if rng.random() < 0.1 else content
        else:
            content = damaged(rng, rng.choice(sound))
        path.write_bytes(content)
        return all(type(v) is Tensor for v in checkpoint.read_state_dict(path).values())

    return read


def of_pickles(box: Sandbox) -> Reader:
    """Official StyleGAN2 pickles, which are read without Python's unpickler."""
    path = box.inside / "network.pkl"
    sound = [p.read_bytes() for p in sorted(GOLDEN.glob("stylegan2_format*.pkl"))]
    acting = [p.read_bytes() for p in sorted(GOLDEN.glob("hostile_*.pkl"))]

    def read(rng: random.Random) -> bool:
        chance = rng.random()
        if chance < 0.1:
            path.write_bytes(pickle.dumps(hostile(rng, box.canary), 4))
        elif chance < 0.2:
            path.write_bytes(damaged(rng, rng.choice(acting)))
        else:  # most of a file is weights: half of the damage goes where its operations are
            raw = rng.choice(sound)
            start = rng.choice((0, raw.index(b"_parameters"), len(raw) - 3000))
            part = raw[start : start + 3000]
            path.write_bytes(
                raw[:start] + damaged(rng, part) + raw[start + 3000 :]
                if rng.random() < 0.5
                else damaged(rng, raw)
            )
        read_pickle(path)
        return True

    return read


def of_teachers(box: Sandbox) -> Reader:
    """teacher.json, with the weights that it describes."""
    folder = box.inside / "teacher"
    folder.mkdir()
    card = {"name": "tiny", "licence": "CC0-1.0"}
    spec = DiffusionSpec(unet=UNET, patch=1, image_channels=1, size=(16, 16), timestep=100)
    torch.manual_seed(0)
    save_teacher(folder, build_unet(spec).state_dict(), spec, card)
    sound, weights = (
        json.loads((folder / "teacher.json").read_text()),
        load_file(folder / "teacher.safetensors"),
    )

    def read(rng: random.Random) -> bool:
        (folder / "teacher.json").write_bytes(text_of(rng, sound))
        teacher = load_teacher(str(folder))
        own = {k.removeprefix("unet."): v for k, v in teacher.state_dict().items() if k.startswith("unet.")}
        return equal(own, {k: v.float() for k, v in weights.items()})

    return read


def of_features(box: Sandbox) -> Reader:
    """features.json of stored features; in half of the cases its own checksum is made to fit again."""
    folder, images = box.inside / "features", box.inside / "pictures"
    images.mkdir()
    for i in range(5):
        Image.frombytes("L", (16, 16), random.Random(i).randbytes(256)).save(images / f"{i}.png")
    teacher = box.inside / "encoder"
    teacher.mkdir()
    spec = DiffusionSpec(unet=UNET, patch=1, image_channels=1, size=(32, 32), timestep=100)
    save_teacher(teacher, build_unet(spec).state_dict(), spec, {"name": "tiny", "licence": "CC0-1.0"})
    make.make_features(distill_config.MakeFeaturesConfig(
        images=images, out=folder, teacher=str(teacher), batch_size=2, shard_mb=0.01, keep="random", channels=4,
        device="cpu", precision="float32", size=(32, 32),
    ))  # fmt: skip
    sound = json.loads((folder / files.MANIFEST).read_text())
    sound.pop("sha256")

    def read(rng: random.Random) -> bool:
        if rng.random() < 0.5:
            facts = changed(rng, sound)
            signed = facts | {"sha256": files._digest(facts)} if isinstance(facts, dict) else facts
            content = json.dumps(signed).encode("utf-8", "surrogatepass")
        else:
            content = text_of(rng, sound | {"sha256": files._digest(sound)})
        (folder / files.MANIFEST).write_bytes(content)
        store = reader.FeatureStore(folder)
        every = torch.arange(store.plan.images)
        rows, _ = store.rows(every, store.draws_of(every, 0, 0))
        return len(rows) == 5 and len(store.plan.specs) > 0

    return read


def of_stores(box: Sandbox) -> Reader:
    """Any other file of stored features, by their reader, and by the writer that completes what lacks its manifest."""
    of_features(box)
    folder = box.inside / "features"
    sound = {p.name: p.read_bytes() for p in folder.iterdir()}
    asked = from_json(distill_config.MakeFeaturesConfig, json.loads(sound["config.json"])["config"])
    every = torch.arange(5)
    rows, _ = reader.FeatureStore(folder).rows(every, every * 0)
    names = sorted(set(sound) - {files.MANIFEST})

    def read(rng: random.Random) -> bool:
        name = rng.choice(names)
        raw = sound[name]
        match Path(name).suffix:
            case ".safetensors":
                content = lying(rng, raw)
            case ".json":
                content = text_of(rng, json.loads(raw))
            case _:
                content = damaged(rng, raw)
        shutil.rmtree(folder)
        folder.mkdir()
        for other, whole in (sound | {name: content}).items():
            (folder / other).write_bytes(whole)
        hashed = rng.random() < 0.5
        if hashed:
            (folder / files.MANIFEST).unlink()
            make.make_features(asked)
        found, _ = reader.FeatureStore(folder, hash_gb=hashed).rows(every, every * 0)
        return torch.equal(found, rows) if hashed else found.shape == rows.shape

    return read


def of_runs(box: Sandbox) -> Reader:
    """config.json, metrics.jsonl and results.jsonl of a run, by those who resume and report it."""
    folder = box.inside / "run"
    folder.mkdir()
    config = {
        "images": "photos",
        "teacher": "none",
        "student": "resnet18",
        "lr": 0.1,
        "size": [64, 64],
        "t": [100],
    }
    facts = {
        "verb": "pretrain",
        "version": "0.1.0",
        "config": config,
        "data": {"images": 3, "size": [64, 64]},
    }
    facts["teacher"] = {"name": "x", "levels": {"s4": 8}, "t": [100]}
    metrics = {
        "step": 20,
        "images_seen": 160,
        "loss": 1.5,
        "mse/s4": 0.5,
        "at/s4": 0.1,
        "r2/s4": 0.3,
        "lr": 0.1,
    }
    result = {
        "task": "knn",
        "metric": "accuracy",
        "value": 0.5,
        "labels": None,
        "seed": 0,
        "method": "random",
    }
    checkpoint.save(checkpoint.checkpoint_path(folder, 20), {"x": torch.zeros(2)}, {"step": 20})

    def read(rng: random.Random) -> bool:
        (folder / "config.json").write_bytes(text_of(rng, facts))
        lines = [text_of(rng, row).replace(b"\n", b" ") for row in (metrics, metrics, metrics | {"step": 40})]
        (folder / "metrics.jsonl").write_bytes(b"\n".join(lines))
        (folder / "results.jsonl").write_bytes(text_of(rng, result))
        RunDir(folder).rewind("metrics.jsonl", 20)
        write_report(folder, image_count=0)
        RunDir.check(folder, facts)
        return True

    return read


def of_interpreters(box: Sandbox) -> Reader:
    """interpreter.json, with the weights that it describes."""
    folder = box.inside / "interpreter"
    folder.mkdir()
    spec = InterpreterSpec(
        teacher="tiny", sha256="0" * 64, t=(100,), blocks=(), noise="stochastic", psi=1.0, levels=(8, 8),
        strides=(4, 8), classes=("a", "b"), pooled=False, width=16, dropout=0.1, size=(16, 16), ignore_index=255,
        labelled=4,
    )  # fmt: skip
    save_interpreter(folder, spec, spec.build().state_dict())
    sound = json.loads((folder / "interpreter.json").read_text())

    def read(rng: random.Random) -> bool:
        (folder / "interpreter.json").write_bytes(text_of(rng, sound))
        interpreter, found = load_interpreter(folder)
        return interpreter.classes == len(found.classes)

    return read


def of_shards(box: Sandbox) -> Reader:
    """Tar shards of images, by their index and by every member."""
    pictures = []
    for i in range(3):
        file = io.BytesIO()
        Image.frombytes("L", (8, 8), random.Random(i).randbytes(64)).save(file, format="PNG")
        pictures.append(file.getvalue())

    def sound(rng: random.Random) -> bytes:
        file = io.BytesIO()
        with tarfile.open(
            fileobj=file,
            mode="w",
            format=rng.choice((tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)),
        ) as tar:
            for i, content in enumerate(pictures):
                for name, part in ((f"{i}.png", content), (f"{i}.cls", b"%d" % i)):
                    info = tarfile.TarInfo(rng.choice((name, name, f"{'d' * 120}/{name}")))
                    info.size = len(part)
                    tar.addfile(info, io.BytesIO(part))
            if rng.random() < 0.2:
                tar.addfile(odd_member(rng, "x.png", box.outside))
        return file.getvalue()

    path = box.inside / "shard.tar"

    def read(rng: random.Random) -> bool:
        raw = sound(rng)
        path.write_bytes(retold(rng, raw) if rng.random() < 0.5 else damaged(rng, raw))
        chance = rng.random()
        if chance < 0.15:
            path.write_bytes(bomb(rng) + raw if chance < 0.05 else raw)
        images = shards.tar_images(path)
        if 0.05 <= chance < 0.15 and [i.open().read() for i in images.paths[:3]] != pictures:
            return False
        for image in images.paths:
            try:
                read_image(image, (8, 8))
            except BadImageError:
                continue
        return all(i.start >= 0 and 0 <= i.size <= 2**31 for i in images.paths)  # type: ignore[union-attr]

    return read


def retold(rng: random.Random, raw: bytes) -> bytes:
    """A tar one of whose headers tells another size, kind or name, with a checksum that fits."""
    at = rng.choice([i for i in range(0, len(raw) - 511, 512) if raw[i + 257 : i + 262] == b"ustar"])
    head = bytearray(raw[at : at + 512])
    match rng.randrange(4):
        case 0:
            head[124:136] = rng.choice(
                (b"77777777777\0", b"-0000000001\0", b"\x80" + rng.randbytes(11), b"\xff" * 12, b"x" * 12)
            )
        case 1:
            head[156] = rng.choice(b"0123456xgLKSDMNV\0Z")
        case 2:
            name = rng.choice(
                (b"../../x.png", b"/etc/x.png", b"\xff\xfe.png", b"", b".png", b"a/../../x.png", b"..\\x.png")
            )
            head[:100] = name.ljust(100, b"\0")
        case _:
            for _ in range(5):
                head[rng.randrange(512)] = rng.randrange(256)
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return raw[:at] + bytes(head) + raw[at + 512 :]


def bomb(rng: random.Random) -> bytes:
    """A header whose name, notes or gaps are some megabytes, or are said to be, before what it belongs to."""
    info = tarfile.TarInfo("x")
    info.type = rng.choice((b"L", b"K", b"x", b"g", b"X", b"S"))
    info.size = rng.choice((-1024, 70_000, 3_000_000, 2**33))
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    head[482] = 1  # of gaps (S): more follow
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    body = b"\1" * 3_000_064 if info.type == b"S" else bytes(3_000_064)
    return bytes(head) + rng.choice((body, body[:512]))


def odd_member(rng: random.Random, name: str, outside: Path) -> tarfile.TarInfo:
    """A link, a device, a pipe, or a file whose name leads out."""
    out = str(outside / "evil.pth")
    info = tarfile.TarInfo(
        rng.choice((name, f"../{name}", "../../outside/evil.pth", out, f"a/../../{name}", f"..\\{name}"))
    )
    info.type = rng.choice(
        (
            tarfile.SYMTYPE,
            tarfile.LNKTYPE,
            tarfile.CHRTYPE,
            tarfile.FIFOTYPE,
            tarfile.REGTYPE,
            tarfile.DIRTYPE,
        )
    )
    info.linkname = (
        rng.choice(("../../outside", str(outside), "../outside/sentinel", name))
        if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE)
        else ""
    )
    return info


def of_archives(box: Sandbox) -> Reader:
    """Archives of weights: only wanted regular files, only below the target; the right bytes, or an error."""
    target, content = box.inside / "target", b"weights" * 50

    def packed(rng: random.Random, path: Path) -> None:
        if path.suffix == ".zip":
            with zipfile.ZipFile(
                path, "w", rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED))
            ) as archive:
                archive.writestr("run/good.pth", content)
                if rng.random() < 0.6:
                    info = zipfile.ZipInfo(odd_member(rng, "evil.pth", box.outside).name)
                    info.external_attr = rng.choice((0, 0o120777, 0o020666, 0o100644)) << 16
                    archive.writestr(info, rng.choice((b"evil", str(box.outside).encode())))
                if rng.random() < 0.1:
                    archive.writestr("bomb.pth", bytes(3_000_000))
            return
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
            for _ in range(rng.choice((0, 1, 1, 2))):
                archive.addfile(odd_member(rng, rng.choice(("evil.pth", "run")), box.outside))
            info = tarfile.TarInfo("run/good.pth")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))

    def read(rng: random.Random) -> bool:
        path = box.inside / f"archive.{rng.choice(('zip', 'tar', 'tar.gz'))}"
        packed(rng, path)
        chance = rng.random()
        if chance < 0.3:
            path.write_bytes(damaged(rng, path.read_bytes()))
        elif chance < 0.5 and path.suffix == ".tar":
            path.write_bytes(retold(rng, path.read_bytes()))
        elif chance < 0.6 and path.suffix != ".zip":
            raw = bomb(rng)
            path.write_bytes((gzip.compress(raw, 1) if path.suffix == ".gz" else raw) + path.read_bytes())
        shutil.rmtree(target, ignore_errors=True)
        found = extract(path, target, ["*.pth"])
        inside = all(p.is_file() and not p.is_symlink() and p.resolve().is_relative_to(target) for p in found)
        right = chance < 0.6 or all(p.read_bytes() == content for p in found if p.name == "good.pth")
        return inside and right and not [p for p in box.inside.iterdir() if p.name.endswith(".tmp")]

    return read


KINDS: dict[str, Callable[[Sandbox], Reader]] = {
    "checkpoint": of_checkpoints, "weights, safetensors": of_weights, "weights, torch": of_torch_files,
    "StyleGAN2 pickle": of_pickles, "teacher.json": of_teachers, "features.json": of_features,
    "stored features": of_stores,
    "run folder": of_runs, "interpreter.json": of_interpreters, "tar shard": of_shards, "archive": of_archives,
}  # fmt: skip
