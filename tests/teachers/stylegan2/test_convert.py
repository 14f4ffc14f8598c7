"""Published StyleGAN2 files: the same weights bitwise, and nothing that a file says is ever run."""

from __future__ import annotations

import ast
import collections
import functools
import hashlib
import io
import json
import os
import pickle
import pickletools
import random
import resource
import struct
import subprocess
import sys
import time
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dreamteacher.runtime.errors import UserError
from dreamteacher.teachers.stylegan2 import convert as stylegan2_convert
from dreamteacher.teachers.stylegan2 import inert_pickle
from dreamteacher.teachers.stylegan2.convert import convert, read_pickle
from dreamteacher.teachers.stylegan2.teacher import Generator
from tests.builders.pictures import refused
from tests.places import GOLDEN, ROOT

BENIGN = GOLDEN / "stylegan2_format.pkl"
PREFIXES = {"G_ema": "sd.", "G": "sd_G.", "D": "sd_D.", "augment_pipe": "sd_augment_pipe."}


@functools.cache
def expected() -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(GOLDEN / "stylegan2_format_expected.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def state_of(name: str) -> dict[str, Tensor]:
    tensors, prefix = expected()[0], PREFIXES[name]
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bitwise: names, types, shapes, values."""
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype
        and a[key].shape == b[key].shape
        and torch.equal(bits(a[key]), bits(b[key]))
        for key in a
    )


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


# --- golden -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stylegan2_format", "stylegan2_format_protocol4"])
def test_the_official_format_is_read_bitwise(name):
    facts = expected()[1]
    snapshot = read_pickle(GOLDEN / f"{name}.pkl")
    assert list(snapshot.networks) == ["G", "D", "G_ema", "augment_pipe"]
    for key, class_name in json.loads(facts["class_names"]).items():
        assert snapshot.networks[key].class_name == class_name
        assert equal(snapshot.networks[key].state, state_of(key)), key
    for key in ("G_ema", "D"):
        assert snapshot.networks[key].init_kwargs == json.loads(facts[f"init_kwargs_{key}"])
    assert snapshot.training_set_kwargs == json.loads(facts["training_set_kwargs"])


def test_the_converted_generator_makes_the_published_image():
    tensors, facts = expected()
    state, spec = convert(BENIGN, {})
    assert spec.conv_clamp == json.loads(facts["init_kwargs_G_ema"])["synthesis_kwargs"]["conv_clamp"]
    with torch.random.fork_rng(devices=[]):
        generator = Generator(spec)
    generator.load_state_dict(state)
    with torch.no_grad():
        ws = generator.mapping(tensors["in.z"], tensors["in.c"], psi=1.0)
        image, _ = generator.synthesis(ws, noise="const")
    assert (image - tensors["out.image"]).abs().max() <= 1e-4


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_plain_state_dicts_give_the_same(tmp_path, suffix):
    state, spec = convert(BENIGN, {})
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    again, like = convert(path, {"conv_clamp": 256})
    assert equal(again, state)
    assert like == spec
    assert convert(path, {})[1].conv_clamp is None


def test_state_dicts_may_lie_under_the_name_of_the_network(tmp_path):
    torch.save({"G": state_of("G"), "G_ema": state_of("G_ema")}, tmp_path / "both.pt")
    for name in ("G", "G_ema"):
        assert equal(convert(tmp_path / "both.pt", {"network": name})[0], state_of(name))
        assert equal(convert(BENIGN, {"network": name})[0], state_of(name))


@pytest.mark.parametrize("name", ["icgan_stylegan2_instance", "icgan_stylegan2_class_instance"])
def test_the_instance_conditioned_variant_is_read(tmp_path, name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        state = {k.removeprefix("sd."): file.get_tensor(k) for k in file.keys() if k.startswith("sd.")}  # noqa: SIM118
    torch.save(state, tmp_path / "weights.pth")
    again, spec = convert(tmp_path / "weights.pth", {})
    assert equal(again, state)
    assert spec.h_dim > 0
    assert (spec.c_dim > 0) == ("class" in name)


# --- hostile files ------------------------------------------------------------------------------------------

HOSTILE = {  # what each must be refused for; None: is read, and the payload is text
    "os_system": "'os.system'",
    "storage_blob": "exec'",
    "builtins_exec": "'builtins.exec'",
    "builtins_eval": "'builtins.eval'",
    "module_src": None,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_run_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path, word = GOLDEN / f"hostile_{name}.pkl", HOSTILE[name]
    if word is not None:
        message = refused(lambda: read_pickle(path), word, "Do not trust")
        assert refused(lambda: convert(path, {})) == message
    else:
        for key, network in read_pickle(path).networks.items():
            assert equal(network.state, state_of(key))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", HOSTILE)
def test_control_the_payloads_are_live(name):
    """What a loader without an allow-list would call, found without calling it."""
    operations = list(pickletools.genops((GOLDEN / f"hostile_{name}.pkl").read_bytes()))
    blobs = [
        argument for op, argument, _ in operations if op.name.endswith("BINBYTES") and len(argument) > 100
    ]
    texts = [argument for op, argument, _ in operations if "UNICODE" in op.name]
    asked = {argument for op, argument, _ in operations if op.name == "GLOBAL"}
    if name == "storage_blob":
        asked = {argument for op, argument in of_blob(blobs[0]) if op == "GLOBAL"}
        assert asked & {"builtins exec", "__builtin__ exec"}
        assert b"PWNED" in blobs[0]
    elif name == "module_src":
        source = texts[texts.index("module_src") + 1]
        assert any(isinstance(node, ast.Call) for node in ast.walk(ast.parse(source)))
        assert "PWNED" in source
    else:
        assert name.replace("_", " ") in asked
        assert any("PWNED" in text for text in texts)


def of_blob(blob: bytes) -> Iterator[tuple[str, Any]]:
    """The operations of the five small pickles that a storage begins with."""
    stream = io.BytesIO(blob)
    for _ in range(5):
        yield from ((op.name, argument) for op, argument, _ in pickletools.genops(stream))


# --- settings and other kinds of files ----------------------------------------------------------------------


def test_a_changed_file_is_found_by_its_sha256(tmp_path):
    content = BENIGN.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert equal(convert(BENIGN, {"sha256": digest})[0], state_of("G_ema"))
    assert equal(read_pickle(BENIGN, sha256=digest.upper()).networks["D"].state, state_of("D"))
    changed = bytearray(content)
    changed[5000] ^= 1  # a weight: without the sha256 nothing can tell
    path = tmp_path / "changed.pkl"
    path.write_bytes(changed)
    refused(lambda: convert(path, {"sha256": digest}), digest[:16], "download it again")
    refused(lambda: read_pickle(path, sha256=digest), "not the file that was published")


def test_a_clamp_must_agree_with_the_file(tmp_path):
    content = BENIGN.read_bytes()
    clamp = b"M" + struct.pack("<H", 256)
    place = content.rindex(clamp, 0, content.index(b"augment_pipe"))  # of the arguments of G_ema
    path = tmp_path / "changed.pkl"
    path.write_bytes(content[:place] + b"M" + struct.pack("<H", 255) + content[place + 3 :])
    refused(lambda: convert(path, {}), "not of one architecture")
    refused(lambda: convert(BENIGN, {"conv_clamp": 128}), "256", "128")
    assert convert(BENIGN, {"conv_clamp": 256})[1].conv_clamp == 256


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"clamp": 1}, ["no setting 'clamp'"]),
        ({"conv_clamp": "much"}, ["conv_clamp"]),
        ({"conv_clamp": -1}, ["out of range"]),
        ({"network": "D"}, ["no generator 'D'", "G_ema or G"]),
    ],
)
def test_wrong_settings_are_named(settings, words):
    refused(lambda: convert(BENIGN, settings), *words)


def test_missing_and_foreign_paths_are_named(tmp_path):
    refused(lambda: convert(tmp_path / "absent.pkl", {}), "absent.pkl", "No such file")
    (tmp_path / "folder.pkl").mkdir()
    refused(lambda: convert(tmp_path / "folder.pkl", {}), "folder.pkl", "directory")
    refused(lambda: convert(tmp_path / "weights.onnx", {}), ".pkl, .safetensors, .pt, .pth")


class Payload:
    """Pickles as a call that leaves a mark."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch PWNED",)


def test_state_dicts_that_are_none_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pt"
    torch.save({"G_ema": Payload()}, path)
    refused(lambda: convert(path, {}), f"{os.name}.system", "Do not trust")
    torch.save([1, 2], path)
    refused(lambda: convert(path, {}), "no state dict")
    torch.save({"G_ema": {"a": 1}}, path)
    refused(lambda: convert(path, {}), "no state dict")
    torch.save({"a": torch.zeros(2)}, path)
    refused(lambda: convert(path, {}), str(path), "no StyleGAN2 generator")
    torch.save(state_of("D"), path)
    refused(lambda: convert(path, {}), str(path), "no StyleGAN2 generator")
    state = state_of("G_ema")
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-100])
    refused(lambda: convert(path, {}), "no state dict")
    path = tmp_path / "weights.safetensors"
    save_file(state | {"synthesis.b4.const": state["synthesis.b4.const"] / 0}, path)
    refused(lambda: convert(path, {}), "no finite numbers", "synthesis.b4.const")
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-100])
    refused(lambda: convert(path, {}), "no state dict that can be read safely")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights.pt", "weights.safetensors"]


# --- mutations ----------------------------------------------------------------------------------------------

MUTATIONS = 1000
SILENT = {"builtins.id"}  # which our reader asks for, and which calls nothing


def mutated(content: bytes, generator: random.Random) -> bytes:
    """One change: bytes or a bit replaced, bytes left out, bytes put in, a piece copied over or between others."""
    changed, size = bytearray(content), len(content)
    i = generator.randrange(size)
    count = min(generator.choice([1, 1, 2, 4, 16, 300]), size - i)
    piece = content[(j := generator.randrange(size - count)) : j + count]
    match generator.choice(["replace", "bit", "delete", "insert", "copy over", "copy between"]):
        case "replace":
            changed[i : i + count] = generator.randbytes(count)
        case "bit":
            changed[i] ^= 1 << generator.randrange(8)
        case "delete":
            del changed[i : i + count]
        case "insert":
            changed[i:i] = generator.randbytes(count)
        case "copy over":
            changed[i : i + count] = piece
        case "copy between":
            changed[i:i] = piece
    return bytes(changed)


def outside_of_tensors(content: bytes) -> Tensor:
    """False for every byte that is a tensor's, in a storage after its five small pickles."""
    outside = torch.ones(len(content), dtype=torch.bool)
    for op, argument, position in pickletools.genops(content):
        if op.name.endswith("BINBYTES") and len(argument) > 100:
            end = position + (2 if op.name.startswith("SHORT") else 5) + len(argument)
            stream = io.BytesIO(argument)
            for _ in range(5):
                list(pickletools.genops(stream))
            outside[end - len(stream.read()) + 8 : end] = False  # the first eight are the count of values
    return outside


def differing(a: bytes, b: bytes) -> Tensor:
    """Which bytes differ."""
    first, second = (torch.frombuffer(bytearray(c), dtype=torch.uint8) for c in (a, b))
    return first != second


def by_shapes(spec_of: Any) -> Any:
    """`spec_of`, which looks at nothing but shapes and filters, once for all states that are alike in them."""
    known: dict[Any, Any] = {}

    def of(state: dict[str, Tensor], *, conv_clamp: float | None) -> Any:
        filters = [
            value.flatten().tolist() for key, value in state.items() if key.endswith("resample_filter")
        ]
        key = (str([(key, tuple(value.shape)) for key, value in state.items()]), str(filters), conv_clamp)
        if key not in known:
            known[key] = spec_of(state, conv_clamp=conv_clamp)
        return known[key]

    return of


def read_mutations(folder: Path) -> dict[str, Any]:
    """Reads every mutation in this process, watched by an audit hook. Run in a process of its own."""
    content = BENIGN.read_bytes()
    outside, digest = outside_of_tensors(content), hashlib.sha256(content).hexdigest()
    # Functions of nothing but their arguments: what was read once is not read again. The type hints are those of
    # our settings, which Python compiles.
    inert_pickle.flat_storage = functools.cache(inert_pickle.flat_storage)
    typing.get_type_hints = functools.cache(typing.get_type_hints)
    stylegan2_convert.spec_of = by_shapes(stylegan2_convert.spec_of)
    path = folder / "mutated.pkl"
    path.write_bytes(content)
    right, spec = convert(path, {})
    read_pickle(path)
    events: list[str] = []
    watching = False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        reads = event == "open" and arguments[:2] == (str(path), "r")
        if watching and event not in SILENT and not reads:
            events.append(f"{event} {arguments}"[:200])

    sys.addaudithook(watch)
    watching = True  # a control: what the watch must see
    pickle.loads(b"\x80\x03cbuiltins\nset\n)R.")
    compile("1", "text", "eval")
    control, watching = [event.split()[0] for event in events], False
    events.clear()
    generator, counts, slowest = random.Random(0), collections.Counter(), 0.0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(MUTATIONS):
        changed = mutated(content, generator)
        path.write_bytes(changed)
        started, watching = time.process_time(), True
        try:
            state, found = convert(path, {})
            outcome = "same" if equal(state, right) else "values"
        except UserError as error:
            outcome = "error" if len(str(error).splitlines()) <= 3 else "a long error"
        except Exception as error:
            outcome = f"{type(error).__name__} {error}"
        slowest = max(slowest, time.process_time() - started)
        try:
            convert(path, {"sha256": digest})
            checked = "passed" if changed != content else "unchanged"
        except UserError as error:
            checked = "found" if "sha256" in str(error) else str(error)
        watching = False
        counts[f"sha256 {checked}"] += 1
        if outcome == "values":  # only what no structure can tell: finite numbers in the place of others
            alike = state.keys() == right.keys() and all(state[k].shape == right[k].shape for k in right)
            inside = len(changed) == len(content) and not (differing(changed, content) & outside).any()
            outcome = "values" if alike and inside else "structure"
        if outcome in ("same", "values") and found != spec:
            outcome = "spec"
        counts[outcome] += 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    return {"control": control, "counts": counts, "events": events, "slowest": slowest, "grown": grown}


def test_mutations_give_an_error_or_the_same_weights_and_run_nothing(tmp_path):
    """Without a sha256, finite values in the place of others cannot be told: the format has no checksum."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.teachers.stylegan2.test_convert", str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    counts = found["counts"]
    assert found["control"] == ["pickle.find_class", "compile"]
    assert found["events"] == []
    unchanged = counts.pop("sha256 unchanged", 0)
    assert counts.pop("sha256 found") + unchanged == MUTATIONS
    assert set(counts) == {"error", "same", "values"}, counts
    assert sum(counts.values()) == MUTATIONS
    assert min(counts.values()) > 50  # of each kind enough to mean something
    assert found["slowest"] < 5
    assert found["grown"] < 200_000  # kilobytes; the file has 300
    assert [path.name for path in tmp_path.iterdir()] == ["mutated.pkl"]


if __name__ == "__main__":
    print(json.dumps(read_mutations(Path(sys.argv[1]))))
