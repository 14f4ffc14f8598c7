"""Archives of others (tar, tar.gz and the like, zip): only wanted regular files come out, and nowhere else."""

from __future__ import annotations

import errno
import fnmatch
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


def extract(archive: Path, folder: Path, wanted: Sequence[str]) -> list[Path]:
    """Writes the wanted members of an archive below a folder, which appears only once all of them are whole.

    Links, devices and directories are never written. One name that leads out of the folder, wanted or not, is
    enough to refuse the archive: who packed it so meant harm.

    Args:
        folder: must not exist yet.
        wanted: patterns of file names ("*G_ema*.pth"), matched with the last part of a member's name.

    Returns: the files, sorted.

    Raises:
        UserError: for a damaged, encrypted or hostile archive, or one without a wanted file.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        written = _write_all(archive, temporary, wanted)
        os.replace(temporary, folder)
        return sorted(folder / path.relative_to(temporary) for path in written)
    except (
        tarfile.TarError, zipfile.BadZipFile, zlib.error, LZMAError, EOFError, ValueError, RuntimeError, OSError,
    ) as error:  # fmt: skip
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # of the disk; EINVAL: the archive names a place before its start
        raise UserError(
            f"'{archive}' cannot be taken apart: {first_line(error) if str(error) else 'damaged'}.",
            "It is truncated, encrypted or no archive: download it again, or give the file inside by --file.",
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_all(archive: Path, folder: Path, wanted: Sequence[str]) -> list[Path]:
    written, seen = [], []
    for member in _members(archive):
        place = PurePosixPath(member.name)
        if place.is_absolute() or ".." in place.parts or re.search(r"\\|\0|^[A-Za-z]:", member.name):
            raise UserError(
                f"'{archive}' has a member {ascii(member.name)[:80]}, which leads out of its folder.",
                "Nothing of it was kept. Get the archive from its publisher.",
            )
        seen.append(place.name)
        if not member.regular or not any(fnmatch.fnmatchcase(place.name, pattern) for pattern in wanted):
            continue
        target = folder / place
        if target.exists():
            raise ValueError(f"'{member.name}' occurs twice")
        check_space(target, member.size)
        target.parent.mkdir(parents=True, exist_ok=True)
        source = member.open()
        assert source is not None  # of a regular file
        with source, open(target, "xb") as file:
            shutil.copyfileobj(source, file)
        written.append(target)
    if not written:
        raise UserError(
            f"'{archive}' holds no file {' or '.join(wanted)}; it has {shorten(seen) or 'nothing'}.",
            "It is not the archive that was expected; give the weights inside by --file.",
        )
    return written


def _members(archive: Path) -> Iterator[_Member]:
    with open(archive, "rb") as file:
        zipped = (
            file.read(4) == b"PK\x03\x04"
        )  # the beginning counts: a tar may end in a zip, as PyTorch's are
    if zipped:
        with zipfile.ZipFile(archive) as content:
            for info in content.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the packer recorded none
                regular = not info.is_dir() and kind in (0, stat.S_IFREG)
                yield _Member(info.filename, info.file_size, regular, partial(content.open, info))
    else:
        with tarfile.open(archive) as tar:
            for entry in tar:
                if entry.size < 0:  # it would lead back for ever
                    raise tarfile.ReadError(f"a member declares {entry.size} bytes")
                yield _Member(entry.name, entry.size, entry.isreg(), partial(tar.extractfile, entry))
