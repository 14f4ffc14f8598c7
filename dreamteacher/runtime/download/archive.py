"""Archives of others (tar, tar.gz and the like, zip), taken apart by hand: only wanted regular files, nowhere else."""

from __future__ import annotations

import errno
import fnmatch
import gzip
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from dreamteacher.runtime.download.http import check_space
from dreamteacher.runtime.errors import UserError, first_line, shorten

MOST_MEMBERS = 20_000
_MOST_NOTES = 1 << 16  # bytes of long names and notes before a member, and of those that hold for all
_PIECE = 1 << 20


class _TarInfo(tarfile.TarInfo):
    """A header, of which nothing is read whole that has no bound: an entry of 10 GB of zeros packs into 10 MB."""

    def _proc_member(self, tar: Tar) -> tarfile.TarInfo:
        self._checked()
        if self.type == tarfile.XGLTYPE:
            tar.for_all += tarfile.BLOCKSIZE + self.size
        elif self.type in (
            tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE,
        ):  # fmt: skip
            tar.for_next += tarfile.BLOCKSIZE + self.size
        else:
            tar.for_next = 0
            tar.members.clear()  # type: ignore[attr-defined]  # each keeps its notes, and none is needed again
        if tar.for_all + tar.for_next > _MOST_NOTES:
            raise tarfile.TarError(f"more than {_MOST_NOTES} bytes of names and notes")
        return super()._proc_member(tar)._checked()  # type: ignore[misc]

    def _checked(self) -> _TarInfo:
        if self.size < 0:  # also by a note: it would be read to its end, or lead back for ever
            raise tarfile.TarError(f"a member declares {self.size} bytes")
        return self

    def _sparse(self, *_: object) -> None:
        """Lists of gaps have no bound either."""
        raise tarfile.TarError("a file is packed with --sparse, which is not read")

    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _sparse


class Tar(tarfile.TarFile):
    """A tar file, opened to be read from its first member to its last: neither needs much memory.

    Raises tarfile.TarError where names and notes are too many, a size is below 0, or a file is sparse.
    """

    tarinfo = _TarInfo
    for_next = for_all = 0  # bytes of names and notes so far


class _Member(NamedTuple):
    """A member of an archive, and how to read it; `regular`: neither a link nor a device nor anything else."""

    name: str
    size: int
    regular: bool
    open: Callable[[], IO[bytes] | None]


def is_archive(path: Path) -> bool:
    """Whether a file's name says that it is an archive. PyTorch's own ".pth.tar" files are none."""
    name = path.name.lower()
    return name.endswith((".zip", ".tgz", ".tar.gz", ".tar.xz", ".tar.bz2")) or (
        name.endswith(".tar") and not name.endswith((".pth.tar", ".pt.tar"))
    )


def extract(archive: Path, folder: Path, wanted: Sequence[str], *, most: int) -> list[Path]:
    """Writes the wanted members of an archive below a folder, which appears only once all of them are whole.

    Links, devices and directories are never written. One name that leads out of the folder, wanted or not, is
    enough to refuse the archive: who packed it so meant harm.

    Args:
        folder: must not exist yet.
        wanted: patterns of file names ("*G_ema*.pth"), matched with the last part of a member's name.
        most: bytes that all members together may declare, and may really have.

    Returns: the files, sorted.

    Raises:
        UserError: for a damaged, encrypted or hostile archive, one that is too large, or without a wanted file.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        written = _write_all(archive, temporary, wanted, most)
        os.replace(temporary, folder)
        return sorted(folder / path.relative_to(temporary) for path in written)
    except (
        tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, LZMAError, EOFError, ValueError,
        RuntimeError, OverflowError, MemoryError, OSError,
    ) as error:  # fmt: skip
        if isinstance(error, OSError) and error.errno not in (
            None,
            errno.EINVAL,
        ):  # EINVAL: a place before the start
            raise
        raise UserError(
            f"'{archive}' cannot be taken apart: {first_line(error) if str(error) else 'damaged'}.",
            "It is truncated, encrypted or no archive: download it again, or give the file inside by --file.",
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_all(archive: Path, folder: Path, wanted: Sequence[str], most: int) -> list[Path]:
    written, seen = [], []
    for member in _members(archive, most):
        place = _safe(member.name, archive)
        seen.append(place.name)
        if not member.regular or not any(fnmatch.fnmatchcase(place.name, pattern) for pattern in wanted):
            continue
        source = member.open()
        if source is None:
            raise ValueError(f"'{member.name}' has no content")
        target = folder.joinpath(*place.parts)
        if target.exists():
            raise ValueError(f"'{member.name}' occurs twice")
        target.parent.mkdir(parents=True, exist_ok=True)
        check_space(target, member.size)
        with source, open(target, "xb") as file:
            _copy(source, file, member, archive)
        written.append(target)
    if not written:
        raise UserError(
            f"'{archive}' holds no file {' or '.join(wanted)}; it has {shorten(seen) or 'nothing'}.",
            "It is not the archive that was expected; give the weights inside by --file.",
        )
    return written


def _members(archive: Path, most: int) -> Iterator[_Member]:
    """Every member in turn; what they declare is added up before anything of the next one is read."""
    total = 0
    with open(
        archive, "rb"
    ) as file:  # a tar may end in a zip (PyTorch's files are zips): the beginning counts
        zipped = file.read(4) == b"PK\x03\x04"
    for count, member in enumerate(_zip(archive) if zipped else _tar(archive)):
        if member.size < 0:
            raise ValueError(f"'{member.name}' declares {member.size} bytes")
        total += member.size
        if total > most or count >= MOST_MEMBERS:
            raise UserError(
                f"'{archive}' declares more than {most / 1e9:.1f} GB or {MOST_MEMBERS} files.",
                "Nothing of it was kept. If you trust it, unpack it yourself and give the weights by --file.",
            )
        yield member


def _zip(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as content:
        for info in content.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the packer recorded none
            regular = not info.is_dir() and kind in (0, stat.S_IFREG)
            yield _Member(info.filename, info.file_size, regular, partial(content.open, info))


def _tar(archive: Path) -> Iterator[_Member]:
    with Tar.open(archive, "r:*") as content:
        for info in content:
            yield _Member(info.name, info.size, info.isreg(), partial(content.extractfile, info))


def _safe(name: str, archive: Path) -> PurePosixPath:
    """A member's path inside the folder; "." (the packed folder itself) has no name and is never a file."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or re.search(r"\\|\0|^[A-Za-z]:", name):
        raise UserError(
            f"'{archive}' has a member {ascii(name)[:80]}, which leads out of its folder.",
            "Nothing of it was kept. Get the archive from its publisher.",
        )
    return path


def _copy(source: IO[bytes], file: IO[bytes], member: _Member, archive: Path) -> None:
    """Copies a member; more bytes than it declared are a bomb, fewer a truncated archive."""
    left = member.size
    while piece := source.read(min(_PIECE, left + 1)):
        left -= len(piece)
        if left < 0:
            raise ValueError(f"'{member.name}' is larger than it declares")
        file.write(piece)
    if left:
        raise ValueError(f"'{member.name}' ends early")
