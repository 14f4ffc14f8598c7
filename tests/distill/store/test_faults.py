"""Stores under disks that fail, files that are cut, writers that are stopped: named, mended or refused, never wrong."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dreamteacher.distill.config import MakeFeaturesConfig
from dreamteacher.distill.store import make as store_make
from dreamteacher.distill.store import reader, writer
from dreamteacher.distill.store.files import BASIS, IMAGES, MANIFEST, claim, shard_name
from dreamteacher.distill.store.items import layout, noise_device
from dreamteacher.distill.store.reader import FeatureStore
from dreamteacher.runtime.signals import signals_handled
from dreamteacher.teachers.registry import fingerprint, load_teacher
from tests.builders.pictures import refused
from tests.distill.store.test_store import CPU, alter, asked_in, files, images_of, made, remove, truncate


@pytest.fixture
def asked(tmp_path: Path) -> MakeFeaturesConfig:
    return asked_in(tmp_path)


def make(config: MakeFeaturesConfig) -> Path | None:
    return store_make.make_features(config)


def refused_for(asked: MakeFeaturesConfig, *words: str) -> str:
    return refused(lambda: make(asked), *words)


def verified(store: FeatureStore, asked: MakeFeaturesConfig, **other: Any) -> float | None:
    """Every image compared with the teacher."""
    images = images_of(asked)
    return store.verify(
        load_teacher(asked.teacher), fingerprint(asked.teacher), images, CPU, samples=13, **other
    )


def unfinished(asked: MakeFeaturesConfig) -> dict[str, bytes]:
    """A store without its manifest and second shard; what the whole one was."""
    made(asked)
    whole = files(asked.out)
    for name in (MANIFEST, shard_name(1)):
        (asked.out / name).unlink()
    return whole


# --- images that cannot be read -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "turn", [2, 3]
)  # the header comes first; then the basis is fitted, then a shard filled
def test_an_image_that_cannot_be_read_for_a_moment_gives_way_to_no_other(asked, turn, monkeypatch):
    streamed = replace(asked, cache_gb=0.0)
    made(replace(streamed, out=asked.out.with_name("whole")))
    original, opened = Path.open, []

    def failing(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == "09.bmp":
            opened.append(path)
            if len(opened) == turn:
                raise OSError(errno.EIO, "Input/output error")
        return original(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", failing)
    refused_for(streamed, "09.bmp", "Input/output error", "Run the same command again")
    assert len(opened) == turn
    made(streamed)
    assert files(asked.out) == files(asked.out.with_name("whole"))


def test_an_image_with_a_good_header_alone_is_named_by_the_writer_and_by_the_comparison(asked):
    store = made(asked)
    (asked.images / "05.bmp").write_bytes((asked.images / "05.bmp").read_bytes()[:200] + bytes(2))
    streamed = replace(asked, cache_gb=0.0, out=asked.out.with_name("new"))
    refused_for(streamed, "05.bmp", "--strict")
    assert len(list(streamed.out.glob("shard-*"))) == 0
    images = replace(images_of(replace(asked, images=asked.images)), cache=None)
    assert "05.bmp" not in {p.name for p in images.paths}  # read at once, it is left out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "read_image", raising(reader.BadImageError(images.paths[3], "gone")))
        refused(
            lambda: store.verify(load_teacher(asked.teacher), fingerprint(asked.teacher), images, CPU),
            "03.bmp", "gone",
        )  # fmt: skip


def raising(error: Exception) -> Any:
    def act(*_: Any) -> Any:
        raise error

    return act


# --- shards that are cut, disks that fail -------------------------------------------------------------------


def everything(store: FeatureStore) -> torch.Tensor:
    at = torch.arange(store.plan.images)
    return torch.stack([store.rows(at, torch.full_like(at, k))[0] for k in range(store.plan.draws)])


def test_a_shard_that_is_cut_under_an_open_store_is_named(asked, monkeypatch):
    store = made(asked)
    everything(store)
    os.truncate(asked.out / shard_name(1), 400)
    refused(lambda: everything(store), shard_name(1), "has been cut", "make-features")
    first = torch.arange(4)
    store.rows(first, torch.zeros_like(first))  # the others serve on
    monkeypatch.setattr(reader.os, "preadv", raising(OSError(errno.EIO, "Input/output error")))
    refused(lambda: store.rows(first, torch.zeros_like(first)), shard_name(0), "Input/output error")


def test_short_reads_are_continued(asked, monkeypatch):
    store = made(asked)
    whole, read = everything(store), os.preadv
    monkeypatch.setattr(reader.os, "preadv", lambda file, into, at: read(file, [into[0][:7]], at))
    assert torch.equal(everything(FeatureStore(asked.out)), whole)


def open_shards() -> int:
    links = [p for p in Path("/proc/self/fd").iterdir() if p.exists()]
    return sum("shard-" in os.readlink(p) for p in links)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="where the open files are counted")
def test_threads_share_a_store_and_no_more_files_stay_open_than_may(asked, monkeypatch):
    whole = everything(made(asked))
    gc.collect()
    before = open_shards()
    monkeypatch.setattr(reader.resource, "getrlimit", lambda _: (4, 4))
    stores = [FeatureStore(asked.out)]
    assert stores[0].plan.shards == 4
    with ThreadPoolExecutor(6) as pool:
        for found in pool.map(everything, stores * 12):
            assert torch.equal(found, whole)
    assert 1 <= open_shards() - before <= 2
    stores.clear()
    gc.collect()
    assert open_shards() == before


def test_a_fork_reads_with_threads_of_its_own(asked):
    store = made(asked)
    whole = everything(store)  # the readers of this process have begun
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(int(not torch.equal(everything(store), whole)))
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"flip"', b'"flap"'), (b'"I64"', b'"F64"'), (b'"items"', b'"itemz"'), (b"[4,2,", b"[2,4,"),
        (b'"data_offsets":[0', b'"data_offsets":[8'), (b'{"', b'["'), (b'"U8"', b"8e99"),
    ],
)  # fmt: skip
def test_a_shard_beyond_those_that_are_hashed_is_refused_for_its_header(asked, old, new):
    made(asked)
    path = asked.out / shard_name(1)
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    store = FeatureStore(asked.out, hash_gb=0)
    refused(lambda: everything(store), path.name, "its header is not that of these features")
    path.write_bytes(b"\xff" * 8 + content[8:])  # a header of 2^64 bytes
    refused(lambda: everything(FeatureStore(asked.out, hash_gb=0)), path.name, "its header")


# --- what is checked of a large store -----------------------------------------------------------------------


def test_other_shards_are_hashed_at_every_start_and_other_images_compared(asked, monkeypatch):
    store = made(asked)
    alter(asked.out / shard_name(1))

    def found() -> bool:
        try:
            FeatureStore(asked.out, hash_gb=1.5e-9 * (asked.out / shard_name(0)).stat().st_size)
        except reader.UserError:
            return True
        return False

    assert {found() for _ in range(60)} == {True, False}  # 1 of 4 is hashed: alike with probability 3e-8
    compared = []
    original = store._compare
    monkeypatch.setattr(
        store, "_compare", lambda rows, live, names: compared.append(names) or original(rows, live, names)
    )
    for _ in range(20):
        store.verify(
            load_teacher(asked.teacher), fingerprint(asked.teacher), images_of(asked), CPU, samples=1
        )
    assert len({path for names in compared for path in names}) > 8


def test_each_of_several_processes_hashes_its_own_shards(asked, monkeypatch):
    made(asked)
    hashed: list[str] = []
    original = reader.sha256
    monkeypatch.setattr(reader, "sha256", lambda path: hashed.append(path.name) or original(path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        FeatureStore(asked.out)
    assert Counter(name for name in hashed if name != IMAGES) == Counter(shard_name(i) for i in range(4))


@pytest.mark.parametrize(("field", "words"), [("amplitude", "(energy)"), ("residual", "(residual)")])
def test_energies_and_residuals_are_compared_too(asked, field, words):
    store = made(asked)
    fields, size = layout(store.plan)
    place = fields[1][field]
    path = asked.out / shard_name(1)
    content = bytearray(path.read_bytes())
    for k in range(2):  # both draws of image 4
        start = store.shard(1).start + k * size + place.start
        item = torch.frombuffer(content, dtype=torch.uint8)[start : start + place.stop - place.start]
        values = item.view(place.dtype)
        values.copy_(values.flip(0) if field == "amplitude" else values + 0.1)
    assert verified(store, asked) is not None
    path.write_bytes(content)
    refused(lambda: verified(FeatureStore(asked.out, hash_gb=0), asked), "s8 " + words, "differ by")


def test_noise_of_another_model_of_gpu_is_another_noise(asked, monkeypatch):
    def on(multiprocessors: int, threads: int) -> str:
        facts = SimpleNamespace(
            multi_processor_count=multiprocessors, max_threads_per_multi_processor=threads
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
        return noise_device(torch.device("cuda", 0))

    assert (on(132, 2048), on(108, 2048), on(128, 1536)) == ("cuda/1056", "cuda/864", "cuda/768")
    assert noise_device(CPU) == "cpu"
    store = made(asked)
    assert store.plan.device == "cpu"
    monkeypatch.setattr(reader, "noise_device", lambda _: "cuda/864")
    store.plan = replace(store.plan, device="cuda/1056")
    assert verified(store, asked) is None
    store.plan = replace(store.plan, device="cuda/864")
    assert verified(store, asked) is not None


# --- files of a store that are lost or damaged --------------------------------------------------------------


@pytest.mark.parametrize("keep", ["pca", "random"])
@pytest.mark.parametrize("more", [(), (MANIFEST,), (MANIFEST, shard_name(2))])
def test_a_lost_basis_is_not_made_again_under_finished_shards(asked, keep, more):
    config = replace(asked, keep=keep)
    made(config)
    for name in (BASIS, *more):
        (asked.out / name).unlink()
    before = files(asked.out)
    refused_for(config, BASIS, "Finished shards were projected by it", "Restore it")
    assert files(asked.out) == before


def test_a_basis_without_shards_is_made_again_and_a_lost_list_is_written_again(asked):
    made(asked)
    whole = files(asked.out)
    (asked.out / IMAGES).unlink()
    made(asked)
    assert files(asked.out) == whole
    for name in (MANIFEST, *map(shard_name, range(4))):
        (asked.out / name).unlink()
    truncate(asked.out / BASIS)
    made(asked)
    assert files(asked.out) == whole


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, empty, remove])
@pytest.mark.parametrize("suffix", ["", ".sha256"])
def test_a_damaged_shard_of_an_unfinished_store_is_made_again(asked, damage, suffix):
    whole = unfinished(asked)
    damage(asked.out / f"{shard_name(2)}{suffix}")
    made(asked)
    assert files(asked.out) == whole


@pytest.mark.parametrize("damage", [truncate, alter, empty])
def test_a_damaged_basis_of_an_unfinished_store_is_named(asked, damage):
    unfinished(asked)
    damage(asked.out / BASIS)
    refused_for(asked, BASIS, "Restore it")


@pytest.mark.parametrize("plan", [7, None, [], {"levels": 7}, "x"])
def test_a_damaged_config_of_an_unfinished_store_is_refused(asked, plan):
    unfinished(asked)
    path = asked.out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"plan": plan}))
    refused_for(asked, "begun with other settings, images or teacher")


# --- stopped writers ----------------------------------------------------------------------------------------


def test_signals_are_heard_while_the_basis_is_fitted(asked, monkeypatch, capsys):
    original, fitted = writer.whiten, []

    def signalled(*args: Any) -> torch.Tensor:
        fitted.append(1)
        if len(fitted) == 3:  # the first level of the second batch
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(writer, "whiten", signalled)
    with signals_handled(), pytest.raises(SystemExit) as stop:
        make(asked)
    assert stop.value.code == 128 + signal.SIGTERM
    assert len(fitted) == 4
    assert not (asked.out / BASIS).exists()
    assert "The same command resumes" in capsys.readouterr().out
    made(asked)


@pytest.mark.parametrize("name", ["begin", BASIS, shard_name(1)])
def test_signals_are_heard_while_another_writer_is_waited_for(asked, name, monkeypatch):
    waits = []

    def sleep(_: float) -> None:
        waits.append(1)
        assert len(waits) < 5, "the signal was not heard"
        os.kill(os.getpid(), signal.SIGTERM)

    asked.out.mkdir()
    monkeypatch.setattr(writer.time, "sleep", sleep)
    with signals_handled(), claim(asked.out, name), pytest.raises(SystemExit) as stop:
        make(asked)
    assert stop.value.code == 128 + signal.SIGTERM
    assert len(list(asked.out.glob("shard-*.safetensors"))) == (3 if name == shard_name(1) else 0)
    monkeypatch.undo()
    made(asked)


def test_files_on_a_shared_disk_are_looked_at_a_few_times_each(asked, monkeypatch):
    original, looked = writer.Writer._vouched, Counter()

    def counting(self: Any, name: str) -> Any:
        looked[name] += 1
        return original(self, name)

    monkeypatch.setattr(writer.Writer, "_vouched", counting)
    store = made(replace(asked, batch_size=1, shard_mb=1e-6))
    assert store.plan.shards == 13
    assert max(looked[shard_name(i)] for i in range(1, 13)) <= 5
    looked.clear()
    made(replace(asked, batch_size=1, shard_mb=1e-6))
    assert max(looked.values()) <= 2


def test_the_time_of_a_store_is_told_in_images(asked, monkeypatch, capsys):
    original = store_make._measure
    monkeypatch.setattr(store_make, "_measure", lambda *a: (original(*a)[0], 900.0))
    make(replace(asked, dry_run=True, keep="whitened"))  # 13 images, 2 draws of each, in batches of 2
    assert "time about 3.25 h (0.0 images/s)" in capsys.readouterr().out
    monkeypatch.setattr(store_make, "_measure", lambda *a: (original(*a)[0], 0.5))
    make(replace(asked, dry_run=True))
    assert "(2.0 images/s)" in capsys.readouterr().out
