"""Pickles read as data: a small machine for the few operations that saved networks use. Nothing it builds can act.

Python's own unpickler, even one that refuses every name, hangs on 300 bytes (a dict key of tuples that double sixty
times) and crashes on one megabyte (a key nested a million deep). So this machine is our own: dict keys are strings,
a call is one of the functions given by the caller, and work and memory are bounded by the size of the file.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamteacher.runtime.errors import UserError

Build = Callable[[tuple[Any, ...]], Any]
DISTRUST = "Do not trust this file. Get the original again and compare its sha256, or give its weights as .safetensors."
# Networks of 16 px have 16,000; the number grows with the blocks, of which 1024 px have thrice as many.
MAX_OPERATIONS = 1_000_000
MAX_TEXT = 1 << 24  # bytes of one text: the longest is the source of a module

# Operations, named as in `pickletools`, by what follows them in the file. Those of no list are refused.
_ALONE = {
    "MARK", "STOP", "NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET", "TUPLE",
    "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "MEMOIZE", "STACK_GLOBAL",
    "REDUCE", "NEWOBJ", "BUILD",
}  # fmt: skip
_NUMBERS = {
    "PROTO": "<B", "BININT": "<i", "BININT1": "<B", "BININT2": "<H", "BINFLOAT": ">d", "FRAME": "<Q",
    "BINGET": "<B", "LONG_BINGET": "<I", "BINPUT": "<B", "LONG_BINPUT": "<I",
}  # fmt: skip
_COUNTED = {
    "SHORT_BINBYTES": "<B", "BINBYTES": "<I", "SHORT_BINUNICODE": "<B", "BINUNICODE": "<I", "LONG1": "<B",
}  # fmt: skip
_NAMES = {op.code.encode("latin-1"): op.name for op in pickletools.opcodes}
_LAYOUTS = {
    **dict.fromkeys([*_ALONE, "GLOBAL", "BINPERSID"]),  # BINPERSID stands in storages alone
    **{name: struct.Struct(layout) for name, layout in (_NUMBERS | _COUNTED).items()},
}
_OPERATIONS = {code: (name, _LAYOUTS[name]) for code, name in _NAMES.items() if name in _LAYOUTS}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_FRESH: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}
# The version tells nothing that the operations do not; frames are for reading ahead.
_IDLE = {"PROTO", "FRAME"}
_PUTS, _GETS = {"BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"BINGET", "LONG_BINGET"}
_VALUES = {*_COUNTED, "BININT", "BININT1", "BININT2", "BINFLOAT"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True, eq=False)
class Name:
    """What stands for a name that a pickle may ask for: the function of ours that takes its arguments."""

    name: str
    build: Build


@dataclass(eq=False)
class DType:
    """A numpy scalar type, by its `struct` format; only little-endian or single-byte ones, once BUILD has said so."""

    format: str
    settled: bool = False


@dataclass(frozen=True, eq=False)
class Storage:
    """The values of a tensor, one-dimensional."""

    flat: Tensor


def read_inert(data: bytes, allowed: Mapping[str, Build], where: Path) -> Any:
    """The value of a pickle: None, numbers, texts, bytes, lists, tuples, sets, dicts, and what `allowed` builds.

    Args:
        data: the whole file.
        allowed: "module name" -> a function that takes the call's arguments and builds an inert value, or raises
            ValueError for arguments that it does not know.
        where: the file's name for messages.

    Raises:
        UserError: for any other name or operation, and for damaged files. Nothing is run.
    """
    machine = _Machine(data, allowed, where)
    try:
        return machine.run()
    except (ValueError, IndexError) as error:
        why = "an operation lacks its values" if isinstance(error, IndexError) else _line(error)
        raise UserError(
            f"'{where}' is refused: at byte {machine.stream.tell()} of {len(data)}, {why}.", DISTRUST
        ) from None


def _line(error: Exception) -> str:
    """An error in few words on one line."""
    text = str(error) or type(error).__name__
    return (text.splitlines() or [text])[0][:120].rstrip(". ")


def read_operation(stream: io.BytesIO) -> tuple[str, Any]:
    """The next operation's name and argument; never more memory than the bytes that are there.

    Raises:
        ValueError: at the end, or for an operation that saved networks do not use.
    """
    code = stream.read(1)
    if code not in _OPERATIONS:
        name = _NAMES.get(code, ascii(code)[1:])
        raise ValueError(
            f"it uses the operation {name}, which no network needs" if code else "it ends too early"
        )
    name, layout = _OPERATIONS[code]
    if layout is None:
        return name, _two_lines(stream) if name == "GLOBAL" else None
    found = stream.read(layout.size)
    if len(found) != layout.size:
        raise ValueError("it ends too early")
    number = layout.unpack(found)[0]
    return name, _counted(stream, name, number) if name in _COUNTED else number


def _counted(stream: io.BytesIO, name: str, count: int) -> bytes | str | int:
    found = stream.read(count)
    if len(found) != count:
        raise ValueError("it ends too early")
    if name == "LONG1":
        return int.from_bytes(found, "little", signed=True)
    if name.endswith("BYTES"):
        return found
    if count > MAX_TEXT:
        raise ValueError(f"a text of {count} bytes")
    return found.decode("utf-8")


def _two_lines(stream: io.BytesIO) -> str:
    lines = [stream.readline(1000), stream.readline(1000)]
    if not all(line.endswith(b"\n") for line in lines):
        raise ValueError("a name without an end")
    return " ".join(line[:-1].decode("utf-8") for line in lines)


class _Machine:
    """The state of one reading: the stack, the stacks below open marks, and the memo."""

    def __init__(self, data: bytes, allowed: Mapping[str, Build], where: Path) -> None:
        self.stream, self.allowed, self.where = io.BytesIO(data), allowed, where
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Every operation up to STOP; the one value that is left."""
        for _ in range(MAX_OPERATIONS):
            name, argument = read_operation(self.stream)
            if name == "STOP":
                break
            self.step(name, argument)
        else:
            raise ValueError(f"it has more than {MAX_OPERATIONS} operations")
        if len(self.stack) != 1 or self.below:
            raise ValueError("it ends with open values")
        if self.stream.read(1):
            raise ValueError("more follows after its end")
        return self.stack[0]

    def step(self, name: str, argument: Any) -> None:
        """One operation that takes or leaves single values; those on containers are in `combine`."""
        stack = self.stack
        if name in _PUTS:
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in _GETS:
            if argument not in self.memo:
                raise ValueError(f"it recalls value {argument}, which it has not kept")
            stack.append(self.memo[argument])
        elif name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _FRESH:
            stack.append(_FRESH[name]())
        elif name in _TUPLES:
            items = [stack.pop() for _ in range(_TUPLES[name])]
            stack.append(tuple(reversed(items)))
        elif name == "REDUCE" or name == "NEWOBJ":
            arguments, callee = stack.pop(), stack.pop()
            stack.append(called(callee, arguments))
        elif name == "MARK":
            self.below.append(stack)
            self.stack = []
        elif name == "GLOBAL":
            stack.append(self.named(argument))
        elif name not in _IDLE:
            self.combine(name)

    def combine(self, name: str) -> None:
        """One operation that puts values into a container, or puts a name together."""
        match name:
            case "TUPLE":
                items = self.since_mark()
                self.stack.append(tuple(items))
            case "APPEND" | "APPENDS":
                items = self.since_mark() if name == "APPENDS" else [self.stack.pop()]
                self.top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self.since_mark() if name == "SETITEMS" else [self.stack.pop(-2), self.stack.pop()]
                table, keys = self.top(dict), _texts(items[::2])
                size = len(table) + len(keys)
                table.update(zip(keys, items[1::2], strict=True))
                if len(table) != size:
                    raise ValueError("a key occurs twice")
            case "ADDITEMS":
                items = self.since_mark()
                self.top(set).update(_texts(items))
            case "STACK_GLOBAL":
                attribute, module = _texts([self.stack.pop(), self.stack.pop()])
                self.stack.append(self.named(f"{module} {attribute}"))
            case "BUILD":
                state = self.stack.pop()
                settle(self.top(DType), state)
            case _:
                raise ValueError(f"it uses the operation {name}, which no network needs")

    def since_mark(self) -> list[Any]:
        """The values above the last mark, which is closed."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def top(self, kind: type) -> Any:
        """The value on the stack, which must be of this very type."""
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"a {type(self.stack[-1]).__name__} where a {kind.__name__} belongs")
        return self.stack[-1]

    def named(self, name: str) -> Name:
        """What stands for "module name".

        Raises:
            UserError: when it is not among those allowed.
        """
        shown = ascii(name.replace(" ", ".", 1))[1:-1][:80]
        if name in self.allowed:
            return Name(shown, self.allowed[name])
        if name.startswith(("dnnlib.tflib", "tfutil ", "tensorflow")):
            raise UserError(
                f"'{self.where}' is a TensorFlow network (it asks for '{shown}'); only PyTorch ones are read.",
                "Convert it with the official PyTorch repository (stylegan2-ada-pytorch) first, then give the result.",
            )
        raise UserError(f"'{self.where}' asks for '{shown}': refused, and nothing of it was run.", DISTRUST)


def called(callee: Any, arguments: Any) -> Any:
    """What one of our functions builds of a call's arguments. Raises ValueError when it is none of ours."""
    if type(callee) is not Name or type(arguments) is not tuple:
        raise ValueError("it calls something that is no name")
    try:
        return callee.build(arguments)
    except ValueError as error:
        raise ValueError(f"{callee.name}: {_line(error)}") from None


def _texts(values: list[Any]) -> list[str]:
    """The values, all of which must be texts: hashing anything else could take forever."""
    if any(type(value) is not str for value in values):
        raise ValueError("a name or key that is no text")
    return values


# --- numpy scalars ------------------------------------------------------------------------------------------

_FORMATS = {
    "f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u8": "Q", "u4": "I", "u2": "H",
    "u1": "B", "b1": "?",
}  # fmt: skip


def numpy_dtype(args: tuple[Any, ...]) -> DType:
    """`numpy.dtype(code, align, copy)` for plain numbers. Raises ValueError for any other."""
    if len(args) != 3 or type(args[0]) is not str or args[0] not in _FORMATS:
        raise ValueError("no plain number type")
    return DType(_FORMATS[args[0]])


def settle(dtype: DType, state: Any) -> None:
    """The state of a plain number type: version 3, byte order, no fields. Raises ValueError for any other."""
    if type(state) is not tuple or len(state) != 8 or type(state[0]) is not int or type(state[1]) is not str:
        raise ValueError("a number type's state is not the one known")
    if state[0] != 3 or state[1] not in ("<", "|") or any(part is not None for part in state[2:5]):
        raise ValueError("a number type that is not little-endian, or has fields")
    dtype.settled = True


def numpy_scalar(args: tuple[Any, ...]) -> float | int | bool:
    """`numpy.core.multiarray.scalar(dtype, bytes)` as a Python number. Raises ValueError for any other."""
    if len(args) != 2 or type(args[0]) is not DType or type(args[1]) is not bytes or not args[0].settled:
        raise ValueError("no number")
    layout = "<" + args[0].format
    if len(args[1]) != struct.calcsize(layout):
        raise ValueError("a number of another length")
    return struct.unpack(layout, args[1])[0]


# --- torch tensors ------------------------------------------------------------------------------------------

_STORAGES = {
    f"torch {kind}Storage"
    for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
}
_IN_STORAGE = {
    "PROTO", "LONG1", "STOP", "BININT", "BININT1", "BININT2", "BINUNICODE", "NONE", "NEWTRUE", "NEWFALSE", "GLOBAL",
    "BINPUT", "MARK", "TUPLE", "BINPERSID", "EMPTY_DICT", "EMPTY_LIST", "SETITEM", "SETITEMS", "APPEND",
}  # fmt: skip
_MAGIC = 0x1950A86A20F9469CFC6C  # how every storage outside of a zip archive begins
_PICKLES, _MOST = 5, 100  # magic, version, system, the storage's facts, its keys: about 45 operations in all


def flat_storage(blob: bytes) -> Tensor:
    """The one-dimensional tensor of a storage that `torch.save` wrote into bytes (not as a zip archive).

    Its own five small pickles may hold only the operations that a storage needs, and no number larger than the
    blob: what then goes to `torch.load(weights_only=True)` can neither hang nor ask for memory.

    Raises:
        ValueError: for anything else.
    """
    stream, stops = io.BytesIO(blob), 0
    for _ in range(_MOST):
        name, argument = read_operation(stream)
        if name not in _IN_STORAGE:
            raise ValueError(f"a tensor's bytes use the operation {name}")
        if name == "GLOBAL" and argument not in _STORAGES:
            raise ValueError(f"a tensor's bytes ask for '{ascii(argument.replace(' ', '.', 1))[1:-1][:80]}'")
        if name == "PROTO" and argument != 2:  # the one that torch.save uses
            raise ValueError(f"a tensor's bytes are of protocol {argument}")
        large = type(argument) is int and not 0 <= argument <= max(len(blob), 1001)  # 1001: the version
        if large and argument != _MAGIC:
            raise ValueError("a tensor's bytes claim more than they hold")
        stops += name == "STOP"
        if stops == _PICKLES:
            break
    else:
        raise ValueError("a tensor's bytes are no storage")
    stream.seek(0)
    try:
        storage = torch.load(stream, map_location="cpu", weights_only=True)
        flat = torch.empty(0, dtype=storage.dtype).set_(storage)
    except Exception as error:  # whatever torch raises for damaged bytes: it has no one error for them
        raise ValueError(f"a tensor's bytes cannot be read: {_line(error)}") from None
    if stream.tell() != len(blob):
        raise ValueError("a tensor's bytes are too many")
    return flat


def _no_hooks(args: tuple[Any, ...]) -> bool:
    """Whether these are requires_grad and an empty table of backward hooks."""
    return type(args[0]) is bool and type(args[1]) is dict and not args[1]


class Tensors:
    """The functions that make tensors; together their bytes never exceed those of the file.

    Args:
        limit: bytes of the file.
    """

    def __init__(self, limit: int) -> None:
        self.left = limit

    def storage(self, args: tuple[Any, ...]) -> Storage:
        """`torch.storage._load_from_bytes(bytes)`. Raises ValueError for any other arguments."""
        if len(args) != 1 or type(args[0]) is not bytes:
            raise ValueError("no bytes of a tensor")
        self.left -= len(args[0])
        if self.left < 0:  # one blob read again and again
            raise ValueError("tensors of more bytes than the file has")
        return Storage(flat_storage(args[0]))

    @staticmethod
    def tensor(args: tuple[Any, ...]) -> Tensor:
        """`torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`.

        Raises ValueError when the tensor has other arguments, or reaches beyond its storage.
        """
        if len(args) != 6 or type(args[0]) is not Storage or not _no_hooks(args[4:]):
            raise ValueError("no plain tensor")
        storage, offset, size, stride = args[:4]
        if type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride) or len(size) > 8:
            raise ValueError("a tensor without a size")
        if any(type(n) is not int or not 0 <= n < 1 << 62 for n in (offset, *size, *stride)):
            raise ValueError("a tensor with an odd size")
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if math.prod(size) > storage.flat.numel() or (math.prod(size) and last >= storage.flat.numel()):
            raise ValueError("a tensor larger than its bytes")
        try:
            found = storage.flat.as_strided(size, stride, offset)
        except RuntimeError:  # of no values, by sizes whose product is beyond 64 bits
            raise ValueError("a tensor with an odd size") from None
        last_channels = len(size) == 4 and found.is_contiguous(memory_format=torch.channels_last)
        if not (found.is_contiguous() or last_channels):
            raise ValueError("a tensor whose values overlap or lie apart")
        return found

    @staticmethod
    def parameter(args: tuple[Any, ...]) -> Tensor:
        """`torch._utils._rebuild_parameter(tensor, requires_grad, hooks)`: the tensor. Raises ValueError."""
        if len(args) != 3 or not isinstance(args[0], Tensor) or not _no_hooks(args[1:]):
            raise ValueError("no plain parameter")
        return args[0]
