"""Hostile pickles, written operation by operation: each is refused by name, at once, and in little memory."""

from __future__ import annotations

import pickletools
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamteacher.teachers.stylegan2 import convert as stylegan2_convert
from dreamteacher.teachers.stylegan2 import inert_pickle
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
    "a key of tuples doubled sixty times": (whole(Raw(b"}" + doubled(b")", b"\x86", 60) + b"Ns")), "no text"),
    "a key nested deep": (whole(Raw(b"}" + DEEP_TUPLES + b"Ns")), "no text"),
    "tuples nested deep": (whole(Raw(DEEP_TUPLES)), "none of the networks"),
    "settings nested deep": (network(_init_kwargs={"a": Raw(DEEP_TUPLES)}), "without an end"),
    "settings doubled sixty times": (network(_init_kwargs={"a": doubled(b")", b"\x86", 60)}), "without an end"),
    "settings doubled often": (network(_init_kwargs={"a": doubled(b")", b"\x86", 15)}), "without an end"),
    "an endless list": (network(_init_kwargs={"a": ENDLESS_LIST}), "without an end"),
    "parts doubled": (whole({"G_ema": shared_parts(60)}), "occurs twice"),
    "an endless part": (whole({"G_ema": ENDLESS_PART}), "occurs twice"),
    "parts nested deep": (whole({"G_ema": nested_parts(1000)}), "nested without an end"),
    "a long name": (network(buffers={"a" * 1_000_000: tensor()}), "none of them"),
    "marks without end": (whole(Raw(b"(" * DEEP)), "open values"),
    "bytes of 2^40": (whole(Raw(b"\x8e" + struct.pack("<Q", 1 << 40))), "BINBYTES8"),
    "a bytearray of 2^40": (whole(Raw(b"\x96" + struct.pack("<Q", 1 << 40))), "BYTEARRAY8"),
    "bytes of 2^32": (whole(Raw(b"B\xff\xff\xff\xff")), "ends too early"),
    "a text of 2^32": (whole(Raw(b"X\xff\xff\xff\xff")), "ends too early"),
    "a number of 2^31 bytes": (whole(Raw(b"\x8b\xff\xff\xff\x7f")), "LONG4"),
    "a memory cell of 2^32": (whole(Raw(b"Nr\xff\xff\xff\xff")), "none of the networks"),
    "a frame of 2^63": (whole(Raw(b"\x95" + struct.pack("<Q", 1 << 63) + b"N")), "none of the networks"),
    "a storage of 2^30": (
        network(buffers={"a": tensor(BLOB.replace(COUNT, b"J\x00\x00\x00\x40Nt"))}), "claim more"
    ),
    "a storage that doubles tuples": (
        network(buffers={"a": tensor(BLOB.replace(COUNT, b"}" + doubled(b")", b"\x86", 60) + b"Ns" + COUNT))}),
        "the operation EMPTY_TUPLE",
    ),
    "a storage read often": (
        network(buffers={"a": tensor(Raw(pack(BLOB) + b"q\x00"))}, **{
            f"a{i}": Call(STORAGE, Raw(b"h\x00")) for i in range(50)
        }),
        "more bytes than the file has",
    ),
    "a tensor shown often": (
        network(buffers={f"a{i}": Raw(b"h\x07") if i else Raw(pack(tensor()) + b"q\x07") for i in range(200)}),
        "larger than itself",
    ),
    "a tensor of 2^60": (network(buffers={"a": tensor(size=(1 << 30, 1 << 30), stride=(0, 0))}), "larger than its"),
    "a tensor of one value": (network(buffers={"a": tensor(size=(4, 4), stride=(0, 0))}), "overlap"),
}  # fmt: skip


def refuse(folder: Path, content: bytes, *words: str) -> None:
    """Both ways of reading refuse these bytes in short lines, and the message holds the words."""
    path = folder / "x.pkl"
    path.write_bytes(content)
    message = refused(lambda: read_pickle(path), *words)
    assert refused(lambda: convert(path, {})) == message
    assert all(len(line) < 300 for line in message.splitlines())


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_take_no_longer_and_no_more_memory_than_their_size(tmp_path, name):
    content, word = BOMBS[name]
    if len(content) < 10_000:  # the others are long themselves, and tracing them takes long
        tracemalloc.start()
    started = time.process_time()
    try:
        refuse(tmp_path, content, word)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 5


def test_the_number_of_operations_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(inert_pickle, "MAX_OPERATIONS", 1000)
    refuse(tmp_path, whole(Raw(b"]" * 1001)), "more than 1000 operations")


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
    "a name that is a number": (Raw(pack("os") + pack(1) + b"\x93"), "no text"),
    "tensorflow": (Call("dnnlib.tflib.network Network"), "TensorFlow network"),
    # operations
    "EXT1": (Raw(b"\x82\x01"), "EXT1"),
    "EXT2": (Raw(b"\x83\x01\x00"), "EXT2"),
    "EXT4": (Raw(b"\x84\x01\x00\x00\x00"), "EXT4"),
    "a persistent id": (Raw(b"N" + b"Q"), "BINPERSID"),
    "a persistent text": (Raw(b"Pos.system\n"), "PERSID"),
    "INST": (Raw(b"(ios\nsystem\n"), "INST"),
    "OBJ": (Raw(b"(cbuiltins\nset\no"), "OBJ"),
    "NEWOBJ_EX": (Raw(b"cbuiltins\nset\n)}\x92"), "NEWOBJ_EX"),
    "a buffer": (Raw(b"\x97"), "NEXT_BUFFER"),
    "recall nothing": (Raw(b"h\x63"), "recalls value 99"),
    # calls of what is no name, attributes for what has none
    "call a text": (Raw(pack("os.system") + pack(("x",)) + b"R"), "no name"),
    "call a part": (Raw(pack(part()) + b")R"), "no name"),
    "call what a call gave": (Raw(pack(Call("numpy dtype", "f8", False, True)) + b")R"), "no name"),
    "call without a tuple": (Raw(b"cbuiltins\nset\n" + pack([]) + b"R"), "no name"),
    "attributes of a table": (Raw(pack(TABLE) + pack(SMUGGLED) + b"b"), "a dict where a DType belongs"),
    "attributes of a part": (Raw(pack(part()) + pack(SMUGGLED) + b"b"), "a _Module where a DType belongs"),
    "slots of a part": (Raw(pack(part()) + pack((None, SMUGGLED)) + b"b"), "a _Module where a DType belongs"),
    "attributes of a tensor": (Raw(pack(tensor()) + pack(SMUGGLED) + b"b"), "a Tensor where a DType belongs"),
    "attributes of a name": (Raw(b"cbuiltins\nset\n" + pack(SMUGGLED) + b"b"), "a Name where a DType belongs"),
    "attributes of a dtype": (Raw(pack(Call("numpy dtype", "f8", False, True)) + pack(SMUGGLED) + b"b"), "number type"),
    "items of a part": (Raw(pack(part()) + pack("a") + b"Ns"), "a _Module where a dict belongs"),
    "items of a list": (Raw(b"]" + pack(0) + b"Ns"), "a list where a dict belongs"),
    "entries of a table": (Raw(b"}Na"), "a dict where a list belongs"),
    "members of a list": (Raw(b"](" + pack("a") + b"\x90"), "a list where a set belongs"),
    "a key twice": (Raw(b"}(" + pack("a") + b"N" + pack("a") + b"Nu"), "occurs twice"),
    "a number as key": (Raw(b"}" + pack(1) + b"Ns"), "no text"),
    # numpy
    "objects": (number(("O8", False, True), PLAIN_STATE, b"12345678"), "no plain number type"),
    "raw memory": (number(("V8", False, True), PLAIN_STATE, b"12345678"), "no plain number type"),
    "big-endian": (number(("f8", False, True), (3, ">", *PLAIN_STATE[2:]), b"12345678"), "little-endian"),
    "fields": (number(("f8", False, True), (3, "<", None, ("a",), {}, -1, -1, 0), b"12345678"), "fields"),
    "another state": (number(("f8", False, True), (3, "<"), b"12345678"), "not the one known"),
    "a number too short": (number(("f8", False, True), PLAIN_STATE, b"1234"), "another length"),
    "a number of no type": (Call(SCALAR, "f8", b"12345678"), "no number"),
    "a type without a state": (Call(SCALAR, Call("numpy dtype", "f8", False, True), b"12345678"), "no number"),
    # tensors
    "beyond the bytes": (tensor(offset=1), "larger than its bytes"),
    "far beyond the bytes": (tensor(stride=(1 << 30, 1)), "larger than its bytes"),
    "a wide step to one value": (tensor(size=(1,), stride=(1 << 70,)), "odd size"),
    "none of very many": (tensor(size=(0, 1 << 70), stride=(1, 1)), "odd size"),
    "nothing far away": (tensor(offset=1 << 70, size=(0,), stride=(1,)), "odd size"),
    "none of many times many": (tensor(size=(1 << 61, 1 << 61, 0), stride=(1, 1, 1)), "odd size"),
    "backwards": (tensor(stride=(-4, 1)), "odd size"),
    "before the bytes": (tensor(offset=-1), "odd size"),
    "a truth as size": (tensor(size=(True, 4)), "odd size"),
    "nine axes": (tensor(size=(1,) * 9, stride=(1,) * 9), "without a size"),
    "overlapping": (tensor(stride=(1, 1)), "overlap"),
    "a text as storage": (Call(TENSOR, "x", 0, (), (), False, TABLE), "no plain tensor"),
    "hooks": (Call(PARAMETER, tensor(), False, {"hook": Call("builtins set", [])}), "no plain parameter"),
    "a parameter of nothing": (Call(PARAMETER, None, False, TABLE), "no plain parameter"),
    # storages
    "a zip archive": (tensor(b"PK\x03\x04" + BLOB), "torch.storage._load_from_bytes"),
    "a call in a storage": (tensor(BLOB.replace(b"ctorch\nFloat", b"cos\nsystem\nctorch\nFloat")), "'os.system'"),
    "a call at its end": (tensor(BLOB[: BLOB.rindex(b"a.")] + b"R."), "the operation REDUCE"),
    "no storage": (tensor(b"N" * 500), "no storage"),
    "a storage cut short": (tensor(BLOB[:-1]), "cannot be read"),
    "a storage and more": (tensor(BLOB + b"x"), "too many"),
    "a storage with another count": (tensor(BLOB.replace(COUNT, b"K\x08Nt")), "a tensor's bytes"),
    "an empty storage": (tensor(b""), "ends too early"),
    # objects
    "a function instead of a class": (described(type="func"), "official files"),
    "a source that is no text": (described(module_src=Call("builtins set", [])), "official files"),
    "a class that is no text": (described(class_name=None), "official files"),
    "attributes that are no table": (described(state=[]), "official files"),
    "more facts": (described(call="os.system"), "not described"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_values_are_refused_wherever_they_stand(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    value, word = ODD[name]
    for entries in ({"buffers": {"a": value}}, {"_init_kwargs": {"a": value}}, {"nobody reads it": value}):
        refuse(tmp_path, network(**entries), word)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pkl"]


WRONG = [
    (),
    (None,),
    (1,),
    ("a",),
    ([1],),
    ({},),
    ((),),
    ({"a": "b"},),
    ("a", "b"),
    (None,) * 3,
    (None,) * 6,
    (part(),),
]


@pytest.mark.parametrize("name", stylegan2_convert._ALLOWED)
def test_allowed_names_take_only_the_arguments_of_the_official_files(tmp_path, name):
    for arguments in WRONG:
        if (name, arguments) in [("collections OrderedDict", ()), ("dnnlib.util EasyDict", ())]:
            continue
        refuse(tmp_path, network(a=Call(name, *arguments)), name.replace(" ", "."))


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
        (whole({"G_ema": part()}) + b"x", "more follows"),
        (whole(Raw(b"\x87")), "lacks its values"),
        (whole(Raw(b"Nt")), "lacks its values"),
        (b"", "ends too early"),
        (b"<html>not found</html>", "the operation"),
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
