"""Class ids in numpy's .npy files: whole numbers, height x width, nothing else. No pickle is ever read."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dreamteacher.data.images import BadImageError, Header

_MOST_PIXELS = 178_000_000
_KINDS = {
    "f": "floating-point numbers", "c": "complex numbers", "O": "Python objects", "U": "text", "S": "text",
}  # fmt: skip
_REASONS = {"Python objects": "Python objects instead of whole numbers", "mmap length": "truncated"}


def read_npy_header(path: Path) -> Header:
    """(height, width) of a file of class ids, in the place of a mask's header.

    Raises:
        BadImageError: it is no .npy file, cut off, or holds anything but whole numbers in two dimensions.
    """
    height, width = _open(path).shape
    return Header((height, width), "L", "NPY")


def read_npy(path: Path) -> Tensor:
    """Class ids as int64 H x W.

    Raises:
        BadImageError: as `read_npy_header`; and ids that need more than 32 bits.
    """
    found = _open(path)
    if found.min() < -(2**31) or found.max() >= 2**31:
        raise BadImageError(path, "class ids that need more than 32 bits")
    return torch.from_numpy(found.astype(np.int64, order="C"))


def _open(path: Path) -> np.ndarray:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise BadImageError(path, "missing file or broken link") from None
    except EOFError:
        raise BadImageError(path, "empty file") from None
    except OSError as error:
        raise BadImageError(path, error.strerror or "it cannot be opened") from None
    except Exception as error:  # numpy evaluates the header: damage raises whatever Python has
        for said, reason in _REASONS.items():
            if said in str(error):
                raise BadImageError(path, reason) from None
        raise BadImageError(path, "not a .npy file, or its header is damaged") from None
    if not isinstance(found, np.memmap):
        raise BadImageError(path, "an archive of arrays (.npz) instead of one")
    if found.dtype.kind not in "biu":
        raise BadImageError(path, f"{_KINDS.get(found.dtype.kind, 'other things')} instead of whole numbers")
    if found.ndim != 2:
        shown = " x ".join(map(str, found.shape[:5]))
        raise BadImageError(path, f"{found.ndim} dimensions ({shown}) instead of height x width")
    if min(found.shape) < 1 or math.prod(found.shape) > _MOST_PIXELS:
        raise BadImageError(path, f"empty or too large: {found.shape[1]} x {found.shape[0]} pixels")
    if (rest := path.stat().st_size - found.offset - found.nbytes) > 0:
        raise BadImageError(path, f"{rest} bytes too many")
    return found
