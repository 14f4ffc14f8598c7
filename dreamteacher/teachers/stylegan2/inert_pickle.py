"""Pickles read as data: Python's unpickler, which gets for every name one of a few stand-ins and no code of a file."""

from __future__ import annotations

import io
import pickle
import re
import struct
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dreamteacher.runtime.errors import UserError, first_line

DISTRUST = "Do not trust this file. Get the original again and compare its sha256, or give its weights as .safetensors."


_WHY = {
    EOFError: "it ends too early",
    KeyError: "it uses an operation, or recalls a value, that no network needs",
    IndexError: "an operation lacks its values",
}


class Inert:
    """What a pickle may get hold of, and not change: the operation BUILD would set its attributes."""

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it changes something that has no state")


class _Call(Inert):
    """The function that stands for a name."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self.build = build

    def __call__(self, *args: Any) -> Any:
        return self.build(*args)


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]  # in Python: its memory cells are a dict
    # Without persistent ids, extensions, and the texts of protocol 0, for which Python would import a codec.
    dispatch: ClassVar[dict[int, Any]] = {
        code: act
        for code, act in pickle._Unpickler.dispatch.items()
        if code not in b"PQVSTU\x82\x83\x84"  # type: ignore[attr-defined]
    }

    def __init__(self, data: bytes, allowed: Mapping[str, Callable[..., Any]], where: Path) -> None:
        super().__init__(io.BytesIO(data))
        self.allowed, self.where = allowed, where

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name; a class of Python's own is itself, since its objects are made without a call."""
        found = self.allowed.get(f"{module} {name}")
        if found is not None:
            return found if found in (dict, set) else _Call(found)
        shown = ascii(f"{module}.{name}")[1:-1][:80]
        if module.startswith(("dnnlib.tflib", "tfutil", "tensorflow")):
            raise UserError(
                f"'{self.where}' is a TensorFlow network (it asks for '{shown}'); only PyTorch ones are read.",
                "Convert it with the official PyTorch repository (stylegan2-ada-pytorch) first, then give the result.",
            )
        raise UserError(f"'{self.where}' asks for '{shown}': refused, and nothing of it was run.", DISTRUST)


def read_inert(data: bytes, allowed: Mapping[str, Callable[..., Any]], where: Path) -> Any:
    """The value of a pickle: None, numbers, texts, bytes, lists, tuples, sets, dicts, and what `allowed` builds.

    Args:
        data: the whole file.
        allowed: "module name" -> `dict`, `set`, or a function that takes the call's arguments and builds a value
            without a way to act (see `Inert`), or raises ValueError for arguments that it does not know.
        where: the file's name for messages.

    Raises:
        UserError: for any other name, and for damaged files. Nothing is run.
    """
    try:
        return _Unpickler(data, allowed, where).load()
    except UserError:
        raise
    except Exception as error:  # the unpickler has no one error for damaged bytes
        why = _WHY.get(type(error)) or first_line(error, 120)
        raise UserError(f"'{where}' is refused: {why}.", DISTRUST) from None


_FORMATS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b"}
_FORMATS |= {"u8": "Q", "u4": "I", "u2": "H", "u1": "B", "b1": "?"}


class NumpyDType:
    """`numpy.dtype(code, align, copy)` of a plain number; BUILD then tells its byte order."""

    def __init__(self, code: str, *_: Any) -> None:
        if code not in _FORMATS:
            raise ValueError("no plain number type")
        self.format = f"<{_FORMATS[code]}"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", "|"):
            raise ValueError("a number type that is not little-endian")


def numpy_scalar(dtype: NumpyDType, content: bytes) -> float | int | bool:
    """`numpy.core.multiarray.scalar(dtype, bytes)` as a Python number. Raises ValueError for any other."""
    if type(dtype) is not NumpyDType or type(content) is not bytes:
        raise ValueError("no number")
    return struct.unpack(dtype.format, content)[0]


def flat_storage(blob: bytes) -> Tensor:
    """`torch.storage._load_from_bytes(blob)` as a one-dimensional tensor. Raises ValueError for anything else."""
    try:
        with warnings.catch_warnings():  # torch warns of what it then refuses
            warnings.simplefilter("ignore")
            storage = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
        return torch.empty(0, dtype=storage.dtype).set_(storage)
    except Exception as error:  # whatever torch raises for damaged bytes: it has no one error for them
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"they ask for '{asked[1]}'" if asked else first_line(error, 120)
        raise ValueError(f"a tensor's bytes cannot be read: {why}") from None


def tensor(
    flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:  # the rest: whether it wants a gradient, and hooks
    """`torch._utils._rebuild_tensor_v2`. Raises ValueError when it reaches beyond its storage."""
    try:
        return flat.as_strided(size, stride, offset)
    except (RuntimeError, TypeError, AttributeError):
        raise ValueError("a tensor of an odd size, or larger than its bytes") from None


def parameter(data: Tensor, *_: Any) -> Tensor:
    """`torch._utils._rebuild_parameter`: the tensor itself. Raises ValueError for anything else."""
    if not isinstance(data, Tensor):
        raise ValueError("no plain parameter")
    return data
