"""Checkpoints: bitwise, atomic, never read when damaged, and bitwise resumption of both optimizers."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.optim import build_optimizer, lr_at, parameter_groups, set_lr
from dreamteacher.runtime.settings import OptimizerName

META = {"kind": "test", "step": 3, "nested": {"list": [1, 2.5, None, "ü"]}}
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip


def random_bytes(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def bits(tensor: Tensor) -> bytes:
    """A tensor's bytes in row-major order: NaNs and signed zeros compare too."""
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and bits(a[k]) == bits(b[k]) for k in a
    )


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint-00000003.safetensors"
    tensors = {
        "net/weight": torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),
        "net/count": torch.tensor(7),
        "half": torch.ones(5, dtype=torch.float16),
    }
    checkpoint.save(path, tensors, META)
    return path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bitwise(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = random_bytes(24 * dtype.itemsize) % 2 if dtype is torch.bool else random_bytes(24 * dtype.itemsize)
    tensors = {"x": raw.view(dtype).view(2, 3, 4), "scalar": raw.view(dtype)[3], "empty": raw.view(dtype)[:0]}
    checkpoint.save(tmp_path / "c.safetensors", tensors, META)
    again, meta = checkpoint.load(tmp_path / "c.safetensors")
    assert same(again, tensors)
    assert meta == META


def test_every_layout_comes_back_bitwise(tmp_path: Path) -> None:
    base = torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(0))
    tensors = {
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "transposed": base.transpose(1, 3),
        "strided": base[:, ::2, 1:],
        "expanded": base[:1].expand(3, -1, -1, -1),
        "shared": base,
        "shared too": base.view(-1)[3:9],
        "needs grad": nn.Parameter(base[0]),
    }
    checkpoint.save(tmp_path / "c.safetensors", tensors, {})
    again, _ = checkpoint.load(tmp_path / "c.safetensors")
    assert same(again, {k: v.detach() for k, v in tensors.items()})
    assert tensors["channels_last"].is_contiguous(memory_format=torch.channels_last)  # ours is untouched


@pytest.mark.parametrize("stage", ["write", "sync", "rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    written: Path, monkeypatch: pytest.MonkeyPatch, stage: str, number: int
) -> None:
    old = written.read_bytes()

    def fail(*args: Any, **_: Any) -> None:
        if stage == "write":
            Path(args[1]).write_bytes(b"half of it")
        raise OSError(number, os.strerror(number))

    target = {"write": (checkpoint, "save_file"), "sync": (os, "fsync"), "rename": (os, "replace")}[stage]
    monkeypatch.setattr(*target, fail)
    with pytest.raises(UserError) as error:
        checkpoint.save(written, {"x": torch.zeros(3)}, {})
    monkeypatch.undo()
    assert written.read_bytes() == old
    assert os.listdir(written.parent) == [written.name]
    text = str(error.value)
    assert written.name in text
    assert len(text.splitlines()) <= 3
    assert ("the disk is full" in text) == (number != errno.EIO)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    path = small_disk / "checkpoint-00000003.safetensors"
    checkpoint.save(path, {"x": torch.zeros(1000)}, {})
    old = path.read_bytes()
    with pytest.raises(UserError, match="the disk is full"):
        checkpoint.save(path, {"x": torch.ones(2_000_000)}, {})
    assert path.read_bytes() == old
    assert os.listdir(small_disk) == [path.name]


def test_an_interrupt_leaves_the_old_file_and_nothing_else(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = written.read_bytes()

    def interrupt(_tensors: Any, path: Path, _facts: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(written, {"x": torch.zeros(3)}, {})
    assert written.read_bytes() == old
    assert os.listdir(written.parent) == [written.name]


def test_a_place_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "c.safetensors", tmp_path / "absent" / "c.safetensors"):
        with pytest.raises(UserError, match=r"Could not write '.*c\.safetensors'"):
            checkpoint.save(path, {"x": torch.zeros(3)}, {})
    assert os.listdir(tmp_path) == ["file"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a small disk could not be mounted: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(small_disk: Path) -> None:
    path = small_disk / "checkpoint-00000001.safetensors"
    checkpoint.save(path, {"x": torch.zeros(1000)}, {"step": 1})
    old = path.read_bytes()
    for write in (
        lambda: checkpoint.save(path, {"x": torch.zeros(200_000)}, {"step": 2}),
        lambda: checkpoint.write_text(path, "x" * 1_000_000),
    ):
        with pytest.raises(UserError, match="the disk is full"):
            write()
        assert path.read_bytes() == old
        assert os.listdir(small_disk) == [path.name]
    assert checkpoint.latest(small_disk) == path
    checkpoint.save(path, {"x": torch.ones(1000)}, {"step": 2})  # and it goes on once there is space
    assert checkpoint.load(path)[1] == {"step": 2}


def test_text_is_utf8_and_keeps_the_bytes_of_odd_file_names(tmp_path: Path) -> None:
    checkpoint.write_text(tmp_path / "t", "ü\udcff\n")
    assert (tmp_path / "t").read_bytes() == b"\xc3\xbc\xff\n"


def test_truncated_files_are_refused(written: Path) -> None:
    raw = written.read_bytes()
    rng = random.Random(0)
    for length in [0, 1, 7, 8, len(raw) - 1, *(rng.randrange(len(raw)) for _ in range(50))]:
        written.write_bytes(raw[:length])
        with pytest.raises(UserError) as error:
            checkpoint.load(written)
        assert written.name in str(error.value)
        assert len(str(error.value).splitlines()) <= 3


def test_altered_bytes_are_never_read_as_something_else(written: Path) -> None:
    raw = written.read_bytes()
    tensors, _ = checkpoint.load(written)
    rng = random.Random(1)
    refused = 0
    for position in range(len(raw)):
        altered = bytearray(raw)
        altered[position] ^= rng.randrange(1, 256)
        written.write_bytes(altered)
        try:
            again, meta = checkpoint.load(written)
        except UserError:
            refused += 1
        else:
            assert same(again, tensors), position
            assert meta == META, position
    assert refused > 0.9 * len(raw)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(3)}, tmp_path / "a.safetensors", {"format": "pt"})
    save_file({"x": torch.zeros(3)}, tmp_path / "b.safetensors")
    for name in "ab":
        with pytest.raises(UserError, match="not one that dreamteacher wrote"):
            checkpoint.load(tmp_path / f"{name}.safetensors")
    torch.save({"x": torch.zeros(3)}, tmp_path / "c.safetensors")
    (tmp_path / "d.safetensors").mkdir()
    for name in "cde":
        with pytest.raises(UserError, match="cannot be read"):
            checkpoint.load(tmp_path / f"{name}.safetensors")


def test_latest_passes_over_a_damaged_newest(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "absent") is None
    paths = [checkpoint.checkpoint_path(tmp_path, step) for step in (9, 100, 2000)]
    for path in paths:
        checkpoint.save(path, {"x": torch.zeros(9)}, {})
    (tmp_path / ".checkpoint-99999999.safetensors.1.tmp").write_bytes(b"half")
    assert checkpoint.latest(tmp_path) == paths[2]
    paths[2].write_bytes(paths[2].read_bytes()[:-1])
    assert checkpoint.latest(tmp_path) == paths[1]
    paths[1].write_bytes(b"")
    assert checkpoint.latest(tmp_path) == paths[0]
    paths[0].write_text("not at all")
    with pytest.raises(UserError, match="None of the checkpoints"):
        checkpoint.latest(tmp_path)


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (900, 1000, 20, 3):
        checkpoint.save(checkpoint.checkpoint_path(tmp_path, step), {}, {"step": step})
    (tmp_path / "backbone.safetensors").touch()
    checkpoint.prune(tmp_path, 2)
    kept = sorted(p.name for p in tmp_path.iterdir())
    assert kept == [
        "backbone.safetensors",
        "checkpoint-00000900.safetensors",
        "checkpoint-00001000.safetensors",
    ]
    checkpoint.prune(tmp_path, 5)
    assert len(list(tmp_path.iterdir())) == 3


def network(layout: torch.memory_format) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 24, 3), nn.Conv2d(24, 2, 1)
        )
    net.register_parameter("unused", nn.Parameter(torch.ones(2, 2)))  # never has a gradient, nor a state
    return net.to(memory_format=layout)  # type: ignore[call-overload]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x.contiguous(memory_format=torch.channels_last)).square().mean().backward()
        set_lr(optimizer, lr_at(step, total=12, warmup=2, peak=1e-2))
        optimizer.step()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_k_and_k_steps_equal_2k_bitwise(
    tmp_path: Path, name: OptimizerName, layout: torch.memory_format
) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        net = network(layout)
        return net, build_optimizer(name, parameter_groups([net], 0.05), 1e-2, (0.9, 0.95))

    whole, whole_optimizer = start()
    train(whole, whole_optimizer, 0, 12)

    half, half_optimizer = start()
    train(half, half_optimizer, 0, 6)
    tensors, scalars = checkpoint.pack_optimizer(half_optimizer)
    tensors |= {f"net/{k}": v for k, v in half.state_dict().items()}
    checkpoint.save(tmp_path / "c.safetensors", tensors, {"optimizer": scalars})

    net, optimizer = start()
    loaded, meta = checkpoint.load(tmp_path / "c.safetensors")
    checkpoint.load_exactly(net, {k[4:]: v for k, v in loaded.items() if k.startswith("net/")}, "c")
    checkpoint.unpack_optimizer(optimizer, loaded, meta["optimizer"])
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.05, 0.0]
    assert json.dumps(checkpoint.pack_optimizer(optimizer)[1]) == json.dumps(scalars)
    for p in net.parameters():
        for moment in optimizer.state[p].values():
            assert moment.shape != p.shape or moment.stride() == p.stride()
    train(net, optimizer, 6, 12)

    assert same(net.state_dict(), whole.state_dict())
    assert same(checkpoint.pack_optimizer(optimizer)[0], checkpoint.pack_optimizer(whole_optimizer)[0])
    assert not same(net.state_dict(), half.state_dict())


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_a_restored_optimizer_owns_its_state(name: OptimizerName) -> None:
    nets = [network(torch.contiguous_format) for _ in range(2)]
    first, second = (build_optimizer(name, parameter_groups([n], 0.05), 1e-2, (0.9, 0.95)) for n in nets)
    train(nets[0], first, 0, 3)
    tensors, scalars = checkpoint.pack_optimizer(first)
    before = {k: v.clone() for k, v in tensors.items()}
    checkpoint.unpack_optimizer(second, tensors, scalars)
    train(nets[1], second, 3, 6)
    assert same(checkpoint.pack_optimizer(first)[0], before)


def test_load_exactly_says_what_does_not_fit() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    good = {k: torch.full_like(v, 2.0) for k, v in net.state_dict().items()}
    before = {k: v.clone() for k, v in net.state_dict().items()}
    bad = {k: v for k, v in good.items() if k != "1.bias"}
    bad |= {
        "0.weight": torch.zeros(5, 3),
        "extra.a": torch.zeros(1),
        "extra.b": torch.zeros(1),
        "extra.c": torch.zeros(1),
    }
    with pytest.raises(UserError) as error:
        checkpoint.load_exactly(net, bad, "file.safetensors")
    text = str(error.value)
    for words in (
        "'file.safetensors'", "1 missing (1.bias)", "3 unexpected (extra.a, extra.b (+1 more))",
        "1 of another shape (0.weight (5, 3) != (4, 3))",
    ):  # fmt: skip
        assert words in text
    assert len(text.splitlines()) <= 3
    assert same(net.state_dict(), before)
    checkpoint.load_exactly(net, good, "file.safetensors")
    assert same(net.state_dict(), good)
