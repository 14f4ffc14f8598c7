"""Class ids in numpy's .npy files, read without numpy: whole numbers, height x width, nothing else."""

from __future__ import annotations

import math
import os
import re
import struct
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from dreamteacher.data.images import BadImageError, Header, Size

_MAGIC = b"\x93NUMPY"
_LONGEST_HEADER = 10_000
_MOST_PIXELS = 178_000_000
# What numpy writes, for any plain array; lists of fields (structured arrays) do not match.
_HEADER = re.compile(
    r"\s*\{\s*'descr':\s*'([<>|=]?)([A-Za-z])(\d{0,4})[^']{0,40}',\s*'fortran_order':\s*(True|False),"
    r"\s*'shape':\s*\(([\dL, ]{0,200})\),?\s*\}\s*"
)
_KINDS = {
    "f": "floating-point numbers",
    "c": "complex numbers",
    "O": "Python objects",
    "U": "text",
    "S": "text",
}
_TYPES = {
    "b1": torch.uint8, "u1": torch.uint8, "i1": torch.int8, "u2": torch.uint16, "i2": torch.int16,
    "u4": torch.uint32, "i4": torch.int32, "u8": torch.int64, "i8": torch.int64,
}  # fmt: skip


class _Array(NamedTuple):
    size: Size
    code: str  # kind and bytes: u1
    big_endian: bool
    by_columns: bool
    start: int  # of the numbers, in bytes


def read_npy_header(path: Path) -> Header:
    """(height, width) of a file of class ids, in the place of a mask's header.

    Raises:
        BadImageError: it is no .npy file, cut off, or holds anything but whole numbers in two dimensions.
    """
    with _open(path) as file:
        return Header(_header(path, file).size, "L", "NPY")


def read_npy(path: Path) -> Tensor:
    """Class ids as int64 H x W. No pickle is ever read.

    Raises:
        BadImageError: as `read_npy_header`; and ids that need more than 32 bits.
    """
    with _open(path) as file:
        array = _header(path, file)
        file.seek(array.start)
        content = bytearray(file.read())
    width = int(array.code[1])
    if len(content) != math.prod(array.size) * width:
        raise BadImageError(path, "truncated")
    raw = torch.frombuffer(content, dtype=torch.uint8).view(-1, width)
    if array.big_endian:
        raw = raw.flip(1)
    ids = raw.contiguous().view(_TYPES[array.code]).long().flatten()
    least = 0 if array.code == "u8" else -(2**31)  # unsigned ones beyond 63 bits look negative
    if ids.min() < least or ids.max() >= 2**31:
        raise BadImageError(path, "class ids that need more than 32 bits")
    return ids.view(array.size[::-1]).t().contiguous() if array.by_columns else ids.view(array.size)


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise BadImageError(path, "missing file or broken link") from None
    except OSError as error:
        raise BadImageError(path, error.strerror or "it cannot be opened") from None


def _header(path: Path, file: IO[bytes]) -> _Array:
    """Parses the header: magic, version, its length, and a dictionary in Python's notation."""
    total = os.fstat(file.fileno()).st_size
    if total == 0:
        raise BadImageError(path, "empty file")
    start = file.read(12)
    if not start.startswith(_MAGIC) or len(start) < 12:
        raise BadImageError(path, "not a .npy file, or its header is damaged")
    major = start[6]
    if major not in (1, 2, 3):
        raise BadImageError(path, f"version {major} of .npy, which is not known")
    skip, form = (10, "<H") if major == 1 else (12, "<I")
    (length,) = struct.unpack(form, start[8:skip])
    if length > _LONGEST_HEADER:
        raise BadImageError(path, "not an array of plain numbers: its header is too long")
    file.seek(skip)
    found = _HEADER.fullmatch(file.read(length).decode("latin-1"))
    if found is None:
        raise BadImageError(path, "not an array of plain numbers, or its header is damaged")
    order, kind, width, columns, shape = found.groups()
    if kind + width not in _TYPES:
        raise BadImageError(path, f"{_KINDS.get(kind, 'other things')} instead of whole numbers")
    extent = [int(n.rstrip("L")) for n in re.findall(r"\d{1,10}L?", shape)]
    if len(extent) != 2:
        shown = " x ".join(map(str, extent[:5]))
        raise BadImageError(path, f"{len(extent)} dimensions ({shown}) instead of height x width")
    size = extent[0], extent[1]
    if min(size) < 1 or math.prod(size) > _MOST_PIXELS:
        raise BadImageError(path, f"empty or too large: {size[1]} x {size[0]} pixels")
    rest = total - skip - length - math.prod(size) * int(width)
    if rest:
        raise BadImageError(path, "truncated" if rest < 0 else f"{rest} bytes too many")
    return _Array(size, kind + width, order == ">", columns == "True", skip + length)
