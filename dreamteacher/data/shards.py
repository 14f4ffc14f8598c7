"""Images in tar shards (WebDataset's) and in Hugging Face datasets, read by their place, as files are."""

from __future__ import annotations

import io
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from dreamteacher.data.images import IMAGE_SUFFIXES, ImageFile, Packed
from dreamteacher.data.sources import ImageFiles
from dreamteacher.runtime.download.objects import address_of, bring_shards, expand
from dreamteacher.runtime.errors import UserError, shorten

# --- tar shards ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TarImage(Packed):
    """An image in an uncompressed tar file.

    Args:
        archive: the tar file.
        name: the member's.
        start: where its bytes begin in the archive.
        size: in bytes.
    """

    archive: Path
    name: str
    start: int
    size: int

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Opens the archive and shows the member's part of it."""
        return io.BufferedReader(_Window(self.archive.open("rb", buffering=0), self.start, self.size))

    def relative_to(self, folder: Path) -> PurePosixPath:
        """train-0000.tar/0001.jpg"""
        return PurePosixPath(self.archive.relative_to(folder).as_posix(), self.name)

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"


class _Window(io.RawIOBase):
    """A part of a file as if it were a file."""

    def __init__(self, file: io.FileIO | IO[bytes], start: int, size: int) -> None:
        self.file, self.start, self.size, self.place = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        self.place = max(0, base + offset)
        return self.place

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.start + self.place)
        content = self.file.read(max(0, min(len(buffer), self.size - self.place)))
        buffer[: len(content)] = content
        self.place += len(content)
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()


def tar_images(source: Path) -> ImageFiles:
    """The images of tar shards, in the order of the shards' names and of the members in each.

    One pass over the headers notes where each image begins, so that any of them can be read at any time:
    steps depend on nothing but seed and number, as with folders. Nothing is unpacked.

    Args:
        source: a folder with shards (*.tar, not searched recursively); or one shard, or several by braces as in
            shard-{000..099}.tar, of this machine or at an address (https://, s3://, gs://, hf://), from where
            they are brought first, each once (see `fetch_objects.bring_shards`).

    As in WebDataset (format: webdataset.github.io, "WebDataset format"), a member's name up to its first dot
    is the sample and the rest is its part: parts .jpg, .png ... are images, .cls holds the class as a number,
    and others (.json, .txt, .seg.png) are passed over. Labels are known if every image has a .cls.

    Raises:
        UserError: no shards, compressed or damaged ones, names that lead out of the archive, links, two images in
            one sample, no images at all.
    """
    shards, names = _shards(source)
    paths: list[ImageFile] = []
    classes: list[str | None] = []
    for shard, name in zip(shards, names, strict=True):
        try:
            images, known = _members(shard)
        except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError) as error:
            if name != str(shard):
                shard.unlink(missing_ok=True)  # so that it is brought again once it is mended
            raise UserError(
                f"'{name}' is no whole tar file: {' '.join(str(error).split()) or type(error).__name__}.",
                "Copy it again; a compressed one must be uncompressed first.",
            ) from None
        paths += images.values()
        classes += [known.get(key) for key in images]
    folder = Path(os.path.commonpath([shard.parent for shard in shards]))
    if not paths:
        raise UserError(
            f"No images in the {len(shards)} tar files of '{address_of(source) or source}'.",
            f"Members must be named SAMPLE.SUFFIX, with a suffix of {' '.join(IMAGE_SUFFIXES)}",
        )
    numbers = sorted({c for c in classes if c is not None}, key=int)
    if None in classes or len(numbers) < 2:
        return ImageFiles(folder=folder, paths=paths)
    ids = {name: i for i, name in enumerate(numbers)}
    labels = [ids[c] for c in classes if c is not None]
    return ImageFiles(folder=folder, paths=paths, labels=labels, classes=tuple(numbers))


def _shards(source: Path) -> tuple[list[Path], list[str]]:
    """The shards on this machine, and what they are called in messages."""
    address = address_of(source)
    if address is not None:
        names = expand(address)
    elif "{" in str(source) and not source.exists():
        names = expand(str(source))
        missing = [name for name in names if not Path(name).is_file()]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(names)} shards are missing: {shorten(missing)}.",
                "Check the range, or copy them.",
            )
    else:
        if not source.exists():
            raise UserError(f"'{source}' does not exist.", "Give a folder with .tar files, or one of them.")
        names = [str(source)] if source.is_file() else sorted(map(str, source.glob("*.tar")))
    if not names:
        packed = sorted(p.name for p in source.iterdir() if ".tar." in p.name or p.suffix == ".tgz")
        raise UserError(
            f"No .tar files in '{source}'" + (f": {shorten(packed)} are compressed." if packed else "."),
            "Give shards as uncompressed tar: images are compressed already, and are read by their place.",
        )
    return (list(map(Path, names)) if address is None else bring_shards(names)), names


def _members(shard: Path) -> tuple[dict[str, TarImage], dict[str, str]]:
    """Images and class numbers by sample."""
    images: dict[str, TarImage] = {}
    classes: dict[str, str] = {}
    with tarfile.open(shard, "r:") as tar:
        for info in tar:
            tar.members = []  # type: ignore[attr-defined]  # none is needed again
            if info.size < 0:  # it would lead back for ever
                raise tarfile.ReadError(f"a member declares {info.size} bytes")
            name = PurePosixPath(info.name)
            if name.is_absolute() or ".." in name.parts:
                raise UserError(f"'{shard}' holds '{info.name}', which leads out of it.", "Do not use it.")
            if info.isdir():
                continue
            if not info.isreg() or info.issparse():
                kind = "packed with --sparse" if info.issparse() else "a link or a device"
                raise UserError(
                    f"'{shard}' holds '{info.name}', which is {kind}.", "Pack the files themselves."
                )
            stem, _, part = name.name.partition(".")
            key = f"{name.parent}/{stem}"
            if f".{part.lower()}" in IMAGE_SUFFIXES and stem:
                if key in images:
                    raise UserError(
                        f"'{shard}' holds '{images[key].name}' and '{info.name}': two images of one sample.",
                        "Keep one of them, or give the other two suffixes (x.seg.png).",
                    )
                images[key] = TarImage(shard, str(name), info.offset_data, info.size)
            elif part == "cls":
                text = tar.fileobj and _small(shard, info.offset_data, info.size)
                if not text or not text.isdecimal():
                    raise UserError(
                        f"'{info.name}' in '{shard}' holds no class number.", "A .cls is a number from 0."
                    )
                classes[key] = str(int(text))
        end = tar.offset
    if (
        _small(shard, end, 512, whole=True) != "\0" * 512
    ):  # tarfile stops at a cut or damaged header in silence
        raise tarfile.ReadError("it is cut off or damaged after its last whole member")
    return images, classes


def _small(shard: Path, start: int, size: int, *, whole: bool = False) -> str:
    with shard.open("rb") as file:
        file.seek(start)
        text = file.read(min(size, 512)).decode("latin-1")
    return text if whole else text.strip()


# --- Hugging Face datasets ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TableImage(Packed):
    """An image in a row of a Hugging Face dataset.

    Args:
        table: the dataset, with nothing but the column of images, not decoded.
        column: its name.
        row: the row's number.
        source: what the user called the dataset.
        places: folders that a row may name files in, where it has no bytes.
    """

    table: Any
    column: str
    row: int
    source: str
    places: tuple[Path, ...]

    def open(self, mode: str = "rb") -> IO[bytes]:
        """The row's bytes, or the file that it names."""
        value = self.table[self.row][self.column]
        if value is None:
            return io.BytesIO()
        if value.get("bytes") is None:
            path = Path(value["path"]).resolve()
            if not any(path.is_relative_to(place) for place in self.places):
                raise ValueError(f"its row names '{path}', which lies elsewhere")
            return path.open("rb")
        return io.BytesIO(value["bytes"])

    def relative_to(self, folder: Path) -> PurePosixPath:
        """row 17"""
        return PurePosixPath(f"row {self.row}")

    def __str__(self) -> str:
        return f"{self.source}, row {self.row}"


def table_images(source: str) -> ImageFiles:
    """The images of a Hugging Face dataset, by row.

    Args:
        source: a folder that `save_to_disk` made, a folder of parquet files or images, or the name of a
            dataset of the hub, which the library `datasets` takes from its cache or downloads. Its split
            "train", or its only one, is used. Scripts are not run (datasets 4 and later have none).

    Raises:
        UserError: `datasets` is missing; it cannot read the source; no split or column can be chosen.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            "Hugging Face datasets need the library 'datasets'.", "pip install 'dreamteacher[datasets]'"
        ) from None
    path = Path(source).expanduser()
    try:
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            table = datasets.load_from_disk(str(path))
        else:
            table = datasets.load_dataset(str(path) if path.exists() else source)
    except Exception as error:  # the library raises its own, pyarrow's, fsspec's, the hub's ...
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"The dataset '{source}' cannot be loaded: {reason}",
            "Give a folder of save_to_disk, one of parquet files, or a name of the hub.",
        ) from None
    if isinstance(table, dict):
        if "train" not in table and len(table) != 1:
            raise UserError(
                f"'{source}' has the splits {shorten(table)}, and none is 'train'.",
                "Save the wanted one alone.",
            )
        table = table["train"] if "train" in table else next(iter(table.values()))
    columns = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    if len(columns) > 1 and "image" in columns:
        columns = ["image"]
    if len(columns) != 1 or not len(table):
        raise UserError(
            f"'{source}' has {len(table)} rows and the image columns {shorten(columns) or '(none)'}.",
            "One column of images is needed, or one of several named 'image'.",
        )
    named = [name for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    labels, classes = None, ()
    if len(named) == 1:
        labels, classes = list(table[named[0]]), tuple(table.features[named[0]].names)
        if None in labels or min(labels) < 0 or len(classes) < 2:  # -1: the hub's word for unknown
            labels, classes = None, ()
    images = table.select_columns(columns).cast_column(columns[0], datasets.Image(decode=False))
    cache = Path(datasets.config.HF_CACHE_HOME).expanduser().resolve()
    places = (path.resolve(),) if path.exists() else (cache,)
    rows = [TableImage(images, columns[0], i, source, places) for i in range(len(images))]
    return ImageFiles(folder=path, paths=rows, labels=labels, classes=classes)
