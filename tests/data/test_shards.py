"""Images in tar shards and Hugging Face tables: the same pixels, batches and runs as from a folder."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file

from dreamteacher.data.batches import batches
from dreamteacher.data.image_set import ImageSet, load_images
from dreamteacher.data.images import BadImageError, Packed, read_header, read_image
from dreamteacher.data.layouts.table import image_files
from dreamteacher.data.shards import tar_images
from dreamteacher.distill.config import PretrainConfig
from dreamteacher.distill.pretrain import pretrain
from dreamteacher.downstream.classification.data import class_counts
from dreamteacher.reports.maps import _pick_images
from tests.builders.pictures import cut, fill, noise, refused

COUNT = 11


def put(tar: tarfile.TarFile, name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content) if kind == tarfile.REGTYPE else 0, kind
    tar.addfile(info, io.BytesIO(content))


def shard(path: Path, files: list[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in files:
            put(tar, name, content)
    return path


def encoded(seed: int, suffix: str) -> bytes:
    file = io.BytesIO()
    noise(seed).save(file, format="JPEG" if suffix == ".jpg" else "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """COUNT images, PNG and JPEG in turn."""
    place = tmp_path / "folder"
    place.mkdir()
    for i in range(COUNT):
        suffix = (".png", ".jpg")[i % 2]
        (place / f"{i:04}{suffix}").write_bytes(encoded(i, suffix))
    return place


@pytest.fixture
def shards(folder: Path) -> Path:
    """The same in shards of four, with other parts of the samples between; classes are 3, 10 and 200."""
    place = folder.parent / "shards"
    paths = sorted(folder.iterdir())
    for start in range(0, COUNT, 4):
        files = []
        for path in paths[start : start + 4]:
            files += [(f"./{path.stem}.json", b"{}"), (f"./{path.name}", path.read_bytes())]
            files += [
                (f"./{path.stem}.cls", b"%d" % (3, 10, 200)[int(path.stem) % 3]),
                (f"./{path.stem}.seg.png", b"?"),
            ]
        shard(place / f"train-{start // 4:06}.tar", files)
    return place


def at(name: str, root: Path) -> Path:
    return Path(f"{name}:{root}")


def same(a: ImageSet, b: ImageSet) -> None:
    everything = torch.arange(len(a))
    assert torch.equal(a.get(everything), b.get(everything))


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_shards_are_as_a_folder(folder: Path, shards: Path, cache_gb: float) -> None:
    found = load_images(at("shards", shards), (16, 20), cache_gb=cache_gb)
    same(found, load_images(folder, (16, 20)))
    assert found.classes == ("3", "10", "200")
    assert found.labels is not None
    assert found.labels.tolist() == [i % 3 for i in range(COUNT)]
    assert dict(class_counts(at("shards", shards))) == {"3": 4, "10": 4, "200": 3}
    assert len(load_images(at("shards", shards / "train-000001.tar"), (8, 8))) == 4
    assert not [p for p in shards.iterdir() if p.suffix != ".tar"]  # nothing is unpacked or left behind


def test_samples_are_those_that_another_reader_finds(tmp_path: Path) -> None:
    place = tmp_path / "shards"
    for number in range(2):
        names = [f"{folder}/{number}{i}" for folder in ("a", "b") for i in range(3)]
        parts = [
            (".png", encoded(number, ".png")),
            (".cls", b"%d" % (number + 4)),
            (".mask.png", encoded(9, ".png")),
        ]
        shard(place / f"{number}.tar", [(name + part, content) for name in names for part, content in parts])
    stream = datasets.load_dataset(
        "webdataset", data_files=[str(p) for p in sorted(place.iterdir())], split="train", streaming=True,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    theirs = [(row["__key__"], row["cls"]) for row in stream.select_columns(["__key__", "cls"])]
    files = image_files(at("shards", place))
    assert files.labels is not None
    ours = [
        (path.name.removesuffix(".png"), int(files.classes[label]))
        for path, label in zip(files.paths, files.labels, strict=True)
    ]  # fmt: skip
    assert len(ours) == 12
    assert ours == theirs


@pytest.mark.parametrize("workers", [0, 1])
def test_steps_depend_on_seed_and_number_alone(folder: Path, shards: Path, workers: int) -> None:
    def steps(images: ImageSet, first: int) -> list[torch.Tensor]:
        made = batches(
            images, batch_size=4, seed=5, first_step=first, last_step=7, flip=True, workers=workers
        )
        return [batch.images for batch in made]

    whole = steps(load_images(folder, (16, 16)), 0)
    for first in (0, 4):  # an interrupted run reads the headers again
        part = steps(load_images(at("shards", shards), (16, 16), cache_gb=0), first)
        assert all(torch.equal(a, b) for a, b in zip(part, whole[first:], strict=True))


def test_the_window_is_a_file(shards: Path) -> None:
    member = image_files(at("shards", shards)).paths[1]
    content = encoded(1, ".jpg")
    with member.open("rb") as file:
        assert file.seekable()
        assert (file.read(), file.read(), file.tell()) == (content, b"", len(content))
        assert (file.seek(-5, io.SEEK_END), file.read(100)) == (len(content) - 5, content[-5:])
        assert (file.seek(3), file.seek(4, io.SEEK_CUR), file.read(2)) == (3, 7, content[7:9])
        assert (file.seek(10**6), file.read(5)) == (10**6, b"")
    assert isinstance(member, Packed)
    assert str(member) == f"{shards}/train-000000.tar/0001.jpg"
    assert read_header(member).size == (24, 24)


def test_a_damaged_member_is_skipped_and_named(folder: Path, shards: Path) -> None:
    files = [(p.name, p.read_bytes()) for p in sorted(folder.iterdir())[:4]]
    files[1] = (files[1][0], b"")
    files[2] = (files[2][0], files[2][1][:-200])
    place = shard(shards.parent / "bad" / "a.tar", files).parent
    found = load_images(at("shards", place), (8, 8))
    assert [(str(b.path), b.reason) for b in found.bad] == [
        (f"{place}/a.tar/0001.jpg", "empty file"), (f"{place}/a.tar/0002.png", "truncated"),
    ]  # fmt: skip
    refused(
        lambda: load_images(at("shards", place), (8, 8), strict=True), "2 of 4", "a.tar/0001.jpg (empty file)"
    )
    assert torch.equal(found.get(torch.tensor([1])), load_images(folder, (8, 8)).get(torch.tensor([3])))


def test_a_shard_that_shrank(shards: Path) -> None:
    """Cut after its members were noted: what is read is never another member's bytes."""
    files = image_files(at("shards", shards)).paths
    cut(shards / "train-000000.tar", 0.5)
    with pytest.raises(BadImageError, match=r"truncated|empty file|header is damaged"):
        read_image(files[3], (8, 8))


def linked(path: Path, kind: bytes) -> None:
    with tarfile.open(path, "w") as tar:
        put(tar, "0.png", encoded(0, ".png"))
        put(tar, "1.png", b"", kind)


def named(path: Path, kind: bytes, size: int, count: int) -> None:
    """The first header says that a name or a note of so many bytes follows; so many are there."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(count) + path.read_bytes())


def cut_at(path: Path, after: str) -> None:
    """Cuts where a member ends: tarfile alone takes that for the end of the archive."""
    with tarfile.open(path) as tar:
        info = tar.getmember(after)
    end = info.offset_data + -(-info.size // 512) * 512
    path.write_bytes(path.read_bytes()[:end])


def spoil(path: Path) -> None:
    """A damaged header in the middle, at which tarfile stops in silence."""
    with tarfile.open(path) as tar:
        place = tar.getmember("./0002.png").offset
    content = bytearray(path.read_bytes())
    content[place + 148 : place + 156] = b"00000000"  # the header's checksum
    path.write_bytes(content)


WRONG: list[tuple[str, Callable[[Path], object], tuple[str, ...]]] = [
    ("cut in a member", lambda p: cut(p, 0.5), ("no whole tar file",)),
    ("cut between members", lambda p: cut_at(p, "./0001.jpg"), ("no whole tar file", "cut off or damaged")),
    ("a damaged header", spoil, ("no whole tar file", "cut off or damaged")),
    ("no tar", lambda p: p.write_text("<html>404</html>"), ("no whole tar file",)),
    ("empty", lambda p: p.write_bytes(b""), ("no whole tar file",)),
    ("compressed", lambda p: shard(p, [("0.png", encoded(0, ".png"))], "w:gz"), ("no whole tar file", "uncompressed")),
    ("outside", lambda p: shard(p, [("../0.png", encoded(0, ".png"))]), ("'../0.png', which leads out of it",)),
    ("absolute", lambda p: shard(p, [("/etc/x.png", encoded(0, ".png"))]), ("'/etc/x.png', which leads out of it",)),
    ("a link", lambda p: linked(p, tarfile.SYMTYPE), ("'1.png', which is a link",)),
    ("a hard link", lambda p: linked(p, tarfile.LNKTYPE), ("'1.png', which is a link",)),
    ("a pipe", lambda p: linked(p, tarfile.FIFOTYPE), ("'1.png', which is a link or a device",)),
    ("a sparse file", lambda p: linked(p, tarfile.GNUTYPE_SPARSE), ("packed with --sparse",)),
    ("two images", lambda p: shard(p, [("0.png", b"x"), ("0.jpg", b"x")]), ("'0.png' and '0.jpg': two images of one",)),
    ("a class by name", lambda p: shard(p, [("0.png", b"x"), ("0.cls", b"cat")]), ("'0.cls'", "no class number")),
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case[0])
def test_wrong_shards(case: tuple[str, Callable[[Path], object], tuple[str, ...]], shards: Path) -> None:
    _, make, words = case
    make(shards / "train-000000.tar")
    refused(lambda: load_images(at("shards", shards), (8, 8)), "train-000000.tar", *words)


def test_no_shards(tmp_path: Path) -> None:
    refused(lambda: tar_images(tmp_path / "no"), "does not exist")
    fill(tmp_path / "folder", 2)
    refused(lambda: tar_images(tmp_path / "folder"), "No .tar files")
    shard(tmp_path / "packed" / "a.tar.gz", [("0.png", b"x")], "w:gz")
    refused(lambda: tar_images(tmp_path / "packed"), "a.tar.gz are compressed", "uncompressed tar")
    shard(tmp_path / "text" / "a.tar", [("0.txt", b"x"), ("0.seg.png", b"x")])
    refused(lambda: tar_images(tmp_path / "text"), "No images in the 1 tar files")


def test_labels_are_all_or_none(tmp_path: Path) -> None:
    png = encoded(0, ".png")
    some = [("0.png", png), ("0.cls", b"1"), ("1.png", png)]
    assert image_files(at("shards", shard(tmp_path / "a.tar", some))).labels is None
    assert (
        image_files(at("shards", shard(tmp_path / "b.tar", [*some, ("1.cls", b" 01\n")]))).labels is None
    )  # one class
    found = image_files(at("shards", shard(tmp_path / "c.tar", [*some, ("1.cls", b" 02\n")])))
    assert (found.labels, found.classes) == ([0, 1], ("1", "2"))


# --- Hugging Face datasets ----------------------------------------------------------------------------------


def table(folder: Path, **columns: object) -> datasets.Dataset:
    rows = [{"bytes": p.read_bytes(), "path": None} for p in sorted(folder.iterdir())]
    features = {"image": datasets.Image()}
    if "label" in columns:
        features["label"] = datasets.ClassLabel(names=["a", "b", "c"])
    made: datasets.Dataset = datasets.Dataset.from_dict(
        {"image": rows, **columns}, features=datasets.Features(features)
    )
    return made


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


@pytest.mark.parametrize("kind", ["disk", "splits", "parquet"])
def test_tables_are_as_a_folder(folder: Path, kind: str) -> None:
    made = table(folder, label=[i % 3 for i in range(COUNT)])
    place = folder.parent / "table"
    match kind:
        case "disk":
            made.save_to_disk(str(place))
        case "splits":
            datasets.DatasetDict({"test": made.select([0]), "train": made}).save_to_disk(str(place))
        case "parquet":
            (place / "data").mkdir(parents=True)
            made.to_parquet(str(place / "data" / "train-00000-of-00001.parquet"))
    found = load_images(at("hf", place), (16, 20), cache_gb=0)
    same(found, load_images(folder, (16, 20)))
    assert found.classes == ("a", "b", "c")
    assert found.labels is not None
    assert found.labels.tolist() == [i % 3 for i in range(COUNT)]
    batch = next(iter(batches(found, batch_size=4, seed=1, first_step=2, last_step=3, flip=False, workers=1)))
    again = next(
        iter(
            batches(
                load_images(folder, (16, 20)), batch_size=4, seed=1, first_step=2, last_step=3, flip=False
            )
        )
    )
    assert torch.equal(batch.images, again.images)


def test_damaged_rows_and_unknown_labels(folder: Path) -> None:
    made = table(folder, label=[-1] + [0] * (COUNT - 1))
    rows = made.cast_column("image", datasets.Image(decode=False)).to_dict()
    (folder.parent / "secret.png").write_bytes(encoded(0, ".png"))
    rows["image"][1] = {"bytes": b"text", "path": None}
    rows["image"][2] = {"bytes": None, "path": str(folder.parent / "secret.png")}
    rows["image"][3] = None
    place = folder.parent / "table"
    datasets.Dataset.from_dict(rows, features=made.features).save_to_disk(str(place))
    # save_to_disk embeds files: the path comes back by hand.
    found = load_images(at("hf", place), (8, 8))
    assert [(str(b.path), b.reason) for b in found.bad if "row 2" not in str(b.path)] == [
        (f"{place}, row 1", "not an image, or its header is damaged"), (f"{place}, row 3", "empty file"),
    ]  # fmt: skip
    assert found.labels is None


def test_rows_name_no_files_elsewhere(folder: Path) -> None:
    place = folder.parent / "table"
    (place / "data").mkdir(parents=True)
    shutil.copy(folder / "0000.png", place / "inside.png")
    shutil.copy(folder / "0000.png", folder.parent / "secret.png")
    names = [place / "inside.png", folder.parent / "secret.png", place / ".." / "secret.png"]
    rows = [{"bytes": None, "path": str(name)} for name in names]
    features = datasets.Features(
        {"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}}
    )
    made = datasets.Dataset.from_dict({"image": rows}, features=features)
    made = made.cast(datasets.Features({"image": datasets.Image(decode=False)}))
    import pyarrow.parquet

    pyarrow.parquet.write_table(made.data.table, place / "data" / "train.parquet")
    found = load_images(at("hf", place), (8, 8))
    assert len(found) == 1
    assert [b.reason.split(" '")[0] for b in found.bad] == ["damaged: its row names"] * 2


def test_wrong_tables(folder: Path, tmp_path: Path) -> None:
    refused(lambda: load_images(at("hf", tmp_path / "no" / "such" / "folder"), (8, 8)), "cannot be loaded")
    made = table(folder)
    two = datasets.DatasetDict({"a": made.select([0]), "b": made.select([1])})
    two.save_to_disk(str(tmp_path / "two"))
    refused(lambda: image_files(at("hf", tmp_path / "two")), "the splits a, b, and none is 'train'")
    made.rename_column("image", "x").add_column("y", [0] * COUNT).remove_columns("x").save_to_disk(
        str(tmp_path / "none")
    )
    refused(lambda: image_files(at("hf", tmp_path / "none")), "the image columns (none)")


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    refused(lambda: image_files(at("hf", tmp_path)), "need the library 'datasets'", "dreamteacher[datasets]")


# --- runs ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_on_shards_is_one_on_the_folder(image_folder: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    """The same weights and metrics, bit for bit, decoded in memory or on the way. A page shows its images."""
    paths = sorted(image_folder.rglob("*.png"))
    for name, kept in (("a-0.tar", paths[:5]), ("a-1.tar", paths[5:])):
        files = [(f"{p.parent.name}-{p.stem}.png", p.read_bytes()) for p in kept]
        files += [(f"{p.parent.name}-{p.stem}.cls", str(int(p.parent.name == "dark")).encode()) for p in kept]
        shard(tmp_path / "shards" / name, files)
    base = {
        "teacher": str(tiny_teacher), "student": "test_resnet", "width": 8, "batch_size": 8, "epochs": 3,
        "warmup_epochs": 0, "device": "cpu", "precision": "float32", "save_every": 2, "probe_every": 3,
    }  # fmt: skip
    shards = at("shards", tmp_path / "shards")
    runs = tmp_path / "runs"
    for name, images, cache_gb in (("folder", image_folder, 1.0), ("shards", shards, 0.0)):
        pretrain(PretrainConfig(images=images, out=runs / name, cache_gb=cache_gb, **base))  # type: ignore[arg-type]
    weights = {name: load_file(runs / name / "backbone.safetensors") for name in ("folder", "shards")}
    assert all(torch.equal(value, weights["shards"][key]) for key, value in weights["folder"].items())
    assert (runs / "folder" / "metrics.jsonl").read_text() == (runs / "shards" / "metrics.jsonl").read_text()
    facts = {"config": {"images": str(shards), "size": [64, 64]}}
    assert torch.equal(
        _pick_images(facts, 3), load_images(image_folder, (64, 64)).get(torch.tensor([0, 5, 10]))
    )
    refused(
        lambda: _pick_images({"config": {"images": "hf:owner/name", "size": [8, 8]}}, 3), "downloads nothing"
    )
