"""Hostile pickles, written operation by operation: each is refused, and none of it is run."""

from __future__ import annotations

import pickletools
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamteacher.teachers.stylegan2.convert import convert, read_pickle
from tests.builders.pictures import refused
from tests.teachers.stylegan2.test_convert import BENIGN, equal


class Raw(bytes):
    """Operations that go into a pickle as they are."""


class Call:
    """A call of a name, as a pickle would make it."""

    def __init__(self, name: str, *args: Any) -> None:
        self.name, self.args = name, args


def pack(value: Any) -> bytes:
    """The operations that build a value."""
    match value:
        case Raw():
            return bytes(value)
        case None | True | False:
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case int():
            if not -(2**31) <= value < 2**31:
                return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)
            return b"J" + struct.pack("<i", value)
        case str():
            text = value.encode()
            return b"X" + struct.pack("<I", len(text)) + text
        case bytes():
            return b"B" + struct.pack("<I", len(value)) + value
        case tuple():
            return b"(" + b"".join(map(pack, value)) + b"t"
        case list():
            return b"](" + b"".join(map(pack, value)) + b"e"
        case dict():
            return b"}(" + b"".join(pack(k) + pack(v) for k, v in value.items()) + b"u"
        case Call():
            return b"c" + value.name.replace(" ", "\n").encode() + b"\n" + pack(value.args) + b"R"
    raise AssertionError(value)


def whole(value: Any) -> bytes:
    return b"\x80\x03" + pack(value) + b"."


TABLE = Call("collections OrderedDict")
PERSISTENT = "torch_utils.persistence _reconstruct_persistent_obj"
STORAGE = "torch.storage _load_from_bytes"
TENSOR = "torch._utils _rebuild_tensor_v2"
PARAMETER = "torch._utils _rebuild_parameter"
SCALAR = "numpy.core.multiarray scalar"
# The bytes of a 4 x 4 filter, and where its count of 16 values stands.
BLOB = next(
    argument
    for op, argument, _ in pickletools.genops(BENIGN.read_bytes())
    if op.name == "BINBYTES" and len(argument) == 315
)
COUNT = b"K\x10Nt"


def part(*, buffers: Any = None, modules: Any = None, **attributes: Any) -> Call:
    """A network or a part of one."""
    state = {"_parameters": {}, "_buffers": buffers or {}, "_modules": modules or {}, "_init_kwargs": {}}
    return described(state=state | attributes)


def described(**facts: Any) -> Call:
    known = {"type": "class", "version": 6, "module_src": "", "class_name": "Part", "state": {}}
    return Call(PERSISTENT, known | facts)


def tensor(blob: bytes | Raw = BLOB, offset: Any = 0, size: Any = (4, 4), stride: Any = (4, 1)) -> Call:
    return Call(TENSOR, Call(STORAGE, blob), offset, size, stride, False, TABLE)


def number(dtype: tuple[Any, ...], state: Any, content: Any) -> Call:
    built = Raw(pack(Call("numpy dtype", *dtype)) + pack(state) + b"b")
    return Call(SCALAR, built, content)


PLAIN_STATE = (3, "<", None, None, None, -1, -1, 0)


def network(**entries: Any) -> bytes:
    return whole({"G_ema": part(**entries)})


def test_pickles_of_our_own_are_read(tmp_path):
    """So that those below are refused for what is wrong with them, not for how they are written."""
    path = tmp_path / "own.pkl"
    half = number(("f8", False, True), PLAIN_STATE, struct.pack("<d", 0.5))
    inner = part(
        buffers={"kept": tensor(), "passing": tensor(), "none": None},
        _non_persistent_buffers_set=Call("builtins set", ["passing"]),
        conv_clamp=None,
    )
    outer = part(modules={"inner": inner}, _init_kwargs={"gain": half, "sizes": [1, (2, 3)]})
    path.write_bytes(whole({"G_ema": outer, "D": None, "others": [inner, tensor()]}))
    read = read_pickle(path)
    assert list(read.networks) == ["G_ema"]
    found = read.networks["G_ema"]
    row = torch.tensor([1.0, 3.0, 3.0, 1.0])
    assert equal(found.state, {"inner.kept": torch.outer(row, row) / 64})
    assert found.init_kwargs == {"gain": 0.5, "sizes": [1, (2, 3)]}
    assert found.conv_clamps == {None}
    assert read.training_set_kwargs is None


def doubled(first: bytes, twice: bytes, times: int) -> Raw:
    """A value of two copies of a value of two copies ..., each made of memory cells."""
    steps = (b"q" + bytes([i]) + b"h" + bytes([i]) + twice for i in range(times))
    return Raw(first + b"".join(steps))


def shared_parts(times: int) -> Raw:
    """A part whose two parts are one part, whose two parts are one part ..."""
    value = pack(part())
    for i in range(times):
        cell = bytes([i])
        value = pack(part(modules={"a": Raw(value + b"q" + cell), "b": Raw(b"h" + cell)}))
    return Raw(value)


def nested_parts(depth: int) -> Raw:
    before, after = pack(part(modules={"a": Raw(b"@")})).split(b"@")
    return Raw(before * depth + pack(part()) + after * depth)


DEEP = 30_000
DEEP_TUPLES = b")" + b"\x85" * DEEP
ENDLESS_LIST = Raw(b"]q\x00(h\x00h\x00e")
# A table of parts that is put into a part and then into itself, as the parts of the part in it.
ENDLESS_PART = part(modules=Raw(b"}q\x01" + pack("a") + pack(part(modules=Raw(b"h\x01"))) + b"s"))

BOMBS = {
    "settings doubled sixty times": (network(_init_kwargs={"a": doubled(b")", b"\x86", 60)}), "without an end"),
    "settings doubled often": (network(_init_kwargs={"a": doubled(b")", b"\x86", 15)}), "without an end"),
    "an endless list": (network(_init_kwargs={"a": ENDLESS_LIST}), "without an end"),
    "parts doubled": (whole({"G_ema": shared_parts(60)}), "occurs twice"),
    "an endless part": (whole({"G_ema": ENDLESS_PART}), "occurs twice"),
    "parts nested deep": (whole({"G_ema": nested_parts(1000)}), "nested without an end"),
    "a long name": (network(buffers={"a" * 1_000_000: tensor()}), "none of them"),
    "marks without end": (whole(Raw(b"(" * DEEP)), "lacks its values"),
    "bytes of 2^32": (whole(Raw(b"B\xff\xff\xff\xff")), "ends too early"),
    "a text of 2^32": (whole(Raw(b"X\xff\xff\xff\xff")), "ends too early"),
    "a number of 2^31 bytes": (whole(Raw(b"\x8b\xff\xff\xff\x7f")), "ends too early"),
    "a frame of 2^63": (whole(Raw(b"\x95" + struct.pack("<Q", 1 << 63) + b"N")), "frame size"),
    "a storage of 2^30": (
        network(buffers={"a": tensor(BLOB.replace(COUNT, b"J\x00\x00\x00\x40Nt"))}), "cannot be read"
    ),
    "a tensor shown often": (
        network(buffers={f"a{i}": Raw(b"h\x07") if i else Raw(pack(tensor()) + b"q\x07") for i in range(200)}),
        "larger than itself",
    ),
    "a tensor of 2^60": (network(buffers={"a": tensor(size=(1 << 30, 1 << 30), stride=(0, 0))}), "larger than its"),
}  # fmt: skip


def refuse(folder: Path, content: bytes, *words: str) -> None:
    """Both ways of reading refuse these bytes in short lines, and the message holds the words."""
    path = folder / "x.pkl"
    path.write_bytes(content)
    message = refused(lambda: read_pickle(path), *words)
    assert refused(lambda: convert(path, {})) == message
    assert all(len(line) < 300 for line in message.splitlines())


@pytest.mark.parametrize("name", BOMBS)
def test_files_that_lead_on_without_an_end_are_refused(tmp_path, name):
    refuse(tmp_path, *BOMBS[name])


SMUGGLED = {"__class__": "x", "__reduce__": "x", "__setstate__": "x"}
ODD: dict[str, tuple[Any, str]] = {
    # names
    "os.system": (Call("os system", "touch PWNED"), "'os.system'"),
    "posix": (Call("posix system", "touch PWNED"), "'posix.system'"),
    "subprocess": (Call("subprocess Popen", ["touch", "PWNED"]), "'subprocess.Popen'"),
    "getattr": (Call("builtins getattr", Call("builtins dict"), "get"), "'builtins.getattr'"),
    "a class of Python": (Call("builtins dict"), "'builtins.dict'"),
    "import": (Call("builtins __import__", "os"), "'builtins.__import__'"),
    "torch.load": (Call("torch load", "x"), "'torch.load'"),
    "another of torch": (Call("torch.storage UntypedStorage", 4), "'torch.storage.UntypedStorage'"),
    "another set": (Call("builtins frozenset", []), "'builtins.frozenset'"),
    "a dotted name": (Raw(pack("builtins") + pack("set.__subclasses__") + b"\x93"), "'builtins.set.__subclasses__'"),
    "a dotted name on ours": (
        Raw(pack("torch_utils.persistence") + pack("_reconstruct_persistent_obj.__globals__") + b"\x93"),
        "'torch_utils.persistence._reconstruct_persistent_obj.__globals__'",
    ),
    "a name of two lines": (Raw(pack("os\nsystem") + pack("x" * 500) + b"\x93"), "os\\nsystem.xxx"),
    "a name that is a number": (Raw(pack("os") + pack(1) + b"\x93"), "STACK_GLOBAL requires str"),
    "tensorflow": (Call("dnnlib.tflib.network Network"), "TensorFlow network"),
    # operations
    "EXT1": (Raw(b"\x82\x01"), "uses an operation"),
    "EXT2": (Raw(b"\x83\x01\x00"), "uses an operation"),
    "EXT4": (Raw(b"\x84\x01\x00\x00\x00"), "uses an operation"),
    "a persistent id": (Raw(b"N" + b"Q"), "uses an operation"),
    "a persistent text": (Raw(b"Pos.system\n"), "uses an operation"),
    "INST": (Raw(b"(ios\nsystem\n"), "'os.system'"),
    "a buffer": (Raw(b"\x97"), "out-of-band"),
    "recall nothing": (Raw(b"h\x63"), "Memo value not found"),
    # calls of what is no name, attributes for what has none
    "call a text": (Raw(pack("os.system") + pack(("x",)) + b"R"), "not callable"),
    "call a part": (Raw(pack(part()) + b")R"), "not callable"),
    "call what a call gave": (Raw(pack(Call("numpy dtype", "f8", False, True)) + b")R"), "not callable"),
    "attributes of a table": (Raw(pack(TABLE) + pack(SMUGGLED) + b"b"), "__dict__"),
    "attributes of a part": (Raw(pack(part()) + pack(SMUGGLED) + b"b"), "has no state"),
    "slots of a part": (Raw(pack(part()) + pack((None, SMUGGLED)) + b"b"), "has no state"),
    "attributes of a tensor": (Raw(pack(tensor()) + pack(SMUGGLED) + b"b"), "refused"),
    "attributes of a name": (Raw(b"cbuiltins\nset\n" + pack(SMUGGLED) + b"b"), "mappingproxy"),
    "attributes of a dtype": (Raw(pack(Call("numpy dtype", "f8", False, True)) + pack(SMUGGLED) + b"b"), "refused"),
    "items of a part": (Raw(pack(part()) + pack("a") + b"Ns"), "item assignment"),
    "items of a list": (Raw(b"]" + pack(0) + b"Ns"), "is refused"),
    "entries of a table": (Raw(b"}Na"), "no attribute 'append'"),
    "members of a list": (Raw(b"](" + pack("a") + b"\x90"), "no attribute 'add'"),
    # numpy
    "objects": (number(("O8", False, True), PLAIN_STATE, b"12345678"), "no plain number type"),
    "raw memory": (number(("V8", False, True), PLAIN_STATE, b"12345678"), "no plain number type"),
    "big-endian": (number(("f8", False, True), (3, ">", *PLAIN_STATE[2:]), b"12345678"), "little-endian"),
    "a number too short": (number(("f8", False, True), PLAIN_STATE, b"1234"), "requires a buffer"),
    "a number of no type": (Call(SCALAR, "f8", b"12345678"), "no number"),
    # tensors
    "beyond the bytes": (tensor(offset=1), "larger than its bytes"),
    "far beyond the bytes": (tensor(stride=(1 << 30, 1)), "larger than its bytes"),
    "a wide step to one value": (tensor(size=(1,), stride=(1 << 70,)), "odd size"),
    "none of very many": (tensor(size=(0, 1 << 70), stride=(1, 1)), "odd size"),
    "nothing far away": (tensor(offset=1 << 70, size=(0,), stride=(1,)), "refused"),
    "none of many times many": (tensor(size=(1 << 61, 1 << 61, 0), stride=(1, 1, 1)), "odd size"),
    "backwards": (tensor(stride=(-4, 1)), "odd size"),
    "before the bytes": (tensor(offset=-1), "odd size"),
    "a truth as size": (tensor(size=(True, 4)), "odd size"),
    "a text as storage": (Call(TENSOR, "x", 0, (), (), False, TABLE), "odd size"),
    "a parameter of nothing": (Call(PARAMETER, None, False, TABLE), "no plain parameter"),
    # storages
    "a zip archive": (tensor(b"PK\x03\x04" + BLOB), "cannot be read"),
    "a call in a storage": (tensor(BLOB.replace(b"ctorch\nFloat", b"cos\nsystem\nctorch\nFloat")), "cannot be read"),
    "a call at its end": (tensor(BLOB[: BLOB.rindex(b"a.")] + b"R."), "cannot be read"),
    "no storage": (tensor(b"N" * 500), "cannot be read"),
    "a storage cut short": (tensor(BLOB[:-1]), "cannot be read"),
    "a storage with another count": (tensor(BLOB.replace(COUNT, b"K\x08Nt")), "a tensor's bytes"),
    "an empty storage": (tensor(b""), "cannot be read"),
    # objects
    "a function instead of a class": (described(type="func"), "official files"),
    "a source that is no text": (described(module_src=Call("builtins set", [])), "not described"),
    "a class that is no text": (described(class_name=None), "not described"),
    "attributes that are no table": (described(state=[]), "not described"),
    "more facts": (described(call="os.system"), "not described"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_values_are_refused_wherever_they_stand(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    value, word = ODD[name]
    for entries in ({"buffers": {"a": value}}, {"_init_kwargs": {"a": value}}, {"nobody reads it": value}):
        refuse(tmp_path, network(**entries), word)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pkl"]


PARTS = {
    "no parameters": ({"_parameters": None}, "without _parameters"),
    "no buffers": ({"_buffers": []}, "without _buffers"),
    "no parts": ({"_modules": None}, "without _modules"),
    "no settings": ({"_init_kwargs": None}, "without _init_kwargs"),
    "a part as parameter": ({"_parameters": {"a": part()}}, "in _parameters"),
    "a text as buffer": ({"_buffers": {"a": "text"}}, "in _buffers"),
    "a tensor as part": ({"_modules": {"a": tensor()}}, "in _modules"),
    "a dotted name": ({"_buffers": {"a.b": tensor()}}, "'a.b'"),
    "an empty name": ({"_buffers": {"": tensor()}}, "in _buffers"),
    "one name twice": ({"_buffers": {"a": tensor()}, "_parameters": {"a": tensor()}}, "two tensors"),
    "no set": ({"_non_persistent_buffers_set": []}, "passing buffers"),
    "a tensor as setting": ({"_init_kwargs": {"a": tensor()}}, "among the settings"),
    "a clamp of nothing": ({"conv_clamp": 0}, "conv_clamp"),
    "a clamp of text": ({"conv_clamp": "256"}, "conv_clamp"),
}


@pytest.mark.parametrize("name", PARTS)
def test_networks_that_are_none_are_refused(tmp_path, name):
    attributes, word = PARTS[name]
    refuse(tmp_path, network(**attributes), word)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (whole([]), "none of the networks"),
        (whole({"a": 1}), "none of the networks"),
        (whole({"G_ema": part(), "D": 1}), "D is no network"),
        (whole({"G_ema": part(), "training_set_kwargs": {"a": part()}}), "among the settings"),
        (whole({"G_ema": part(), "training_set_kwargs": [1]}), "training_set_kwargs"),
        (whole({"G_ema": part(), "G": part(buffers={"a": tensor()})}), "not of one architecture"),
        (whole(Raw(b"\x87")), "refused"),
        (whole(Raw(b"Nt")), "refused"),
        (b"", "refused"),
        (b"<html>not found</html>", "refused"),
        (BENIGN.read_bytes()[:100_000], "ends too early"),
    ],
)
def test_other_files_are_refused(tmp_path, content, word):
    refuse(tmp_path, content, word)


def test_a_clamp_must_not_contradict_itself(tmp_path):
    path = tmp_path / "x.pkl"
    for clamps, word in (({"conv_clamp": 256}, "256"), ({}, "not told")):
        path.write_bytes(network(_init_kwargs={"synthesis_kwargs": {"conv_clamp": 255}}, **clamps))
        refused(lambda: convert(path, {}), "contradicts itself", "255", word)


def test_the_generator_asked_for_must_be_there(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(whole({"G": part()}))
    refused(lambda: convert(path, {}), "no 'G_ema'", "it has G.")
