"""Shards at addresses: the same images as from this machine, brought once, over connections that break."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from dreamteacher.data.batches import batches
from dreamteacher.data.image_set import load_images
from dreamteacher.data.shards import tar_images
from dreamteacher.reports.maps import _pick_images
from dreamteacher.runtime.download import http
from dreamteacher.runtime.download.objects import address_of, bring_shards, expand
from tests.builders.pictures import refused
from tests.builders.servers import serving
from tests.data.test_shards import encoded, shard

SHARDS, PER_SHARD = 5, 3
Disk = namedtuple("Disk", "total used free")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train-00.tar to train-04.tar with three images of two classes each."""
    folder = tmp_path_factory.mktemp("files")
    for i in range(SHARDS):
        content = []
        for j in range(PER_SHARD):
            n = i * PER_SHARD + j
            content += [(f"{n:03}.png", encoded(n, ".png")), (f"{n:03}.cls", str(n % 2).encode())]
        shard(folder / f"train-{i:02}.tar", content)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DREAMTEACHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(http, "PAUSE", 0)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache" / "shards"


class Server(ThreadingHTTPServer):
    contents: dict[str, bytes]
    asked: list[tuple[str, str | None]]
    sizes: list[str]  # paths whose size was asked for
    cuts: dict[str, list[int]]  # bytes after which the next connections to a path break off

    def handle_error(self, *_: Any) -> None:
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self.server.sizes.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.contents.get(self.path, b""))))
        self.end_headers()

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append((self.path, wanted))
        if self.path not in self.server.contents:
            self.send_error(404)
            return
        body = self.server.contents[self.path]
        first = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        cuts = self.server.cuts.get(self.path)
        self.wfile.write(body[first : first + (cuts.pop(0) if cuts else len(body))])


@pytest.fixture
def server(files: Path) -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.contents = {f"/{p.name}": p.read_bytes() for p in files.glob("*.tar")}
    server.asked, server.sizes, server.cuts = [], [], {}
    with serving(server):
        yield server


def at(server: Server, pattern: str = "train-{00..04}.tar") -> Path:
    return Path(f"shards:http://127.0.0.1:{server.server_address[1]}/{pattern}")


def everything(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


# --- addresses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        "s3://b/x-{000..012}.tar",
        "a{7..11}b",
        "{a,b,}-{08..10}",
        "plain",
        "{1..3}{x,y}{2,1}",
        "x{0001..3}",
        "{5..5}",
    ],
)
def test_braces_are_expanded_as_a_shell_does(pattern: str) -> None:
    told = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True, check=True)
    assert expand(pattern) == told.stdout.split()


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("s3://b/{0..9.tar", "brace"), ("s3://b/0..9}.tar", "brace"), ("{9..0}", "backwards"), ("{a}", "no range"),
        ("{{0..1},2}", "brace"), ("{0..999999}{0..9}", "10000000 addresses"), ("{0..99999999}", "too far"), ("{}", "brace"),
    ],
)  # fmt: skip
def test_wrong_braces(pattern: str, words: str) -> None:
    refused(lambda: expand(pattern), words)


def test_addresses_survive_being_paths() -> None:
    for address in ("https://host/a/x-{0..1}.tar", "s3://bucket/x.tar", "hf://datasets/owner/name/x.tar"):
        assert address_of(Path(address)) == address
    for place in ("/data", "data", "file:///etc/x.tar", "simplecache::s3://b/x.tar", "github://o:r@/x.tar"):
        assert address_of(Path(place)) is None


# --- over HTTP ----------------------------------------------------------------------------------------------


def test_shards_of_a_server_are_those_of_the_disk(server: Server, files: Path, cache: Path) -> None:
    """Pixels, labels and batches; brought once, and then read without the server."""
    here = load_images(Path(f"shards:{files}"), (16, 16))
    there = load_images(at(server), (16, 16), cache_gb=0.0)
    assert sorted(server.asked) == [(f"/train-{i:02}.tar", None) for i in range(SHARDS)]
    assert len(everything(cache)) == SHARDS
    server.shutdown()
    again = load_images(at(server), (16, 16))
    assert len(server.asked) == SHARDS
    for found in (there, again):
        assert torch.equal(found.labels, here.labels)  # type: ignore[arg-type]
        assert torch.equal(found.get(torch.arange(15)), here.get(torch.arange(15)))
    settings: dict[str, Any] = {"batch_size": 4, "seed": 3, "first_step": 2, "last_step": 6, "flip": True}
    for a, b in zip(batches(here, **settings), batches(there, **settings, workers=1), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.index, b.index)
    facts = {"config": {"images": str(at(server)), "size": [8, 8]}}
    refused(lambda: _pick_images(facts, 3), "downloads nothing")


def test_a_broken_connection_goes_on(server: Server, files: Path) -> None:
    server.cuts = {"/train-01.tar": [700, 1000]}
    found = bring_shards(
        [str(at(server, f"train-0{i}.tar")).replace("shards:http:/", "http://") for i in (0, 1)]
    )
    assert [p.read_bytes() for p in found] == [(files / f"train-0{i}.tar").read_bytes() for i in (0, 1)]
    assert [r for path, r in server.asked if path == "/train-01.tar"] == [None, "bytes=700-", "bytes=1700-"]


def test_a_missing_shard_is_named(server: Server, cache: Path) -> None:
    del server.contents["/train-03.tar"]
    refused(lambda: tar_images(Path(str(at(server))[7:])), "train-03.tar", "404")
    assert not any(name.endswith((".part", ".json")) or "train-03" in name for name in everything(cache))


def test_a_damaged_shard_is_named_and_brought_again(server: Server, cache: Path) -> None:
    whole = server.contents["/train-02.tar"]
    server.contents["/train-02.tar"] = whole[:1500]
    source = Path(str(at(server))[7:])
    said = refused(lambda: tar_images(source), "no whole tar file")
    assert f"http://127.0.0.1:{server.server_address[1]}/train-02.tar" in said
    assert len(everything(cache)) == SHARDS - 1
    server.contents["/train-02.tar"] = whole
    assert len(tar_images(source).paths) == SHARDS * PER_SHARD


def test_no_name_leads_out(server: Server, tmp_path: Path) -> None:
    hostile = shard(tmp_path / "hostile.tar", [("../../escaped.png", encoded(0, ".png"))]).read_bytes()
    server.contents["/x.tar"] = server.contents["/..%2f..%2fx.tar"] = hostile
    before = everything(tmp_path)
    for name in ("x.tar", "..%2f..%2fx.tar"):
        refused(lambda name=name: tar_images(Path(str(at(server, name))[7:])), "leads out of it")
    added = sorted(set(everything(tmp_path)) - set(before))
    assert [name[17:] for name in added] in (
        ["..%2f..%2fx.tar".replace("%", "_"), "x.tar"],
        ["x.tar"] * 2,
        ["x.tar", "..%2f..%2fx.tar".replace("%", "_")],
    )
    assert all(p.parent == tmp_path / "cache" / "shards" for p in tmp_path.rglob("*-*x.tar"))


# --- object stores ------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(files: Path) -> Iterator[MemoryFileSystem]:
    """The shards in fsspec's memory."""
    system = fsspec.filesystem("memory")
    for path in files.glob("*.tar"):
        system.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    yield system
    system.rm("/bucket", recursive=True)


def test_shards_of_a_store(bucket: MemoryFileSystem, files: Path, cache: Path) -> None:
    found = load_images(Path("shards:memory://bucket/train-{00..04}.tar"), (16, 16))
    here = load_images(Path(f"shards:{files}"), (16, 16))
    assert torch.equal(found.get(torch.arange(15)), here.get(torch.arange(15)))
    assert len(everything(cache)) == SHARDS
    refused(
        lambda: bring_shards(["memory://bucket/train-09.tar"]), "There is no 'memory://bucket/train-09.tar'"
    )
    refused(lambda: bring_shards(["memory://bucket/"]), "no address of a .tar file")
    assert len(everything(cache)) == SHARDS


def test_a_store_that_breaks_off(
    bucket: MemoryFileSystem, files: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on where it stopped, also in another process; another version of the object starts over."""
    whole, opened = (files / "train-00.tar").read_bytes(), MemoryFileSystem.open
    good = [2]  # pieces that still come
    places: list[int] = []

    class Breaking:
        def __init__(self, path: str) -> None:
            self.file = io.BytesIO(opened(bucket, path).getvalue())

        def __enter__(self) -> Breaking:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def seek(self, place: int) -> int:
            places.append(place)
            return self.file.seek(place)

        def read(self, _: int) -> bytes:
            if not good[0]:
                raise ConnectionResetError("reset by peer")
            good[0] -= 1
            return self.file.read(600)

    def breaking(_: MemoryFileSystem, path: str, mode: str = "rb") -> Any:
        return Breaking(path)

    address = "memory://bucket/train-00.tar"
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "open", breaking)
        refused(lambda: bring_shards([address]), "cannot be brought: reset by peer")
        assert places == [0] + [1200] * (http.TRIES + 1)
        assert len(everything(cache)) == 2  # a part, and what it is of
        good[0] = 10**6
        (found,) = bring_shards([address])
        assert places[-1] == 1200
    assert found.read_bytes() == whole
    assert everything(cache) == [found.name]

    found.unlink()
    good[0] = 1
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "open", breaking)
        refused(lambda: bring_shards([address]), "reset by peer")
    other = (files / "train-01.tar").read_bytes()
    bucket.pipe_file("/bucket/train-00.tar", other)
    assert bring_shards([address])[0].read_bytes() == other


def test_several_ask_for_one_shard(bucket: MemoryFileSystem, files: Path, cache: Path) -> None:
    """Each gets it, one brings it, and no lock stays."""
    asked: list[str] = []
    opened = MemoryFileSystem.open

    def counted(self: MemoryFileSystem, path: str, mode: str = "rb", **more: Any) -> Any:
        asked.append(path)
        return opened(self, path, mode, **more)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(8) as pool:
        patch.setattr(MemoryFileSystem, "open", counted)
        found = list(pool.map(lambda _: bring_shards(["memory://bucket/train-01.tar"])[0], range(8)))
    assert {p.read_bytes() for p in found} == {(files / "train-01.tar").read_bytes()}
    assert len(asked) == 1
    assert everything(cache) == [found[0].name]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    refused(lambda: bring_shards(["s3://bucket/x.tar"]), "s3://bucket/x.tar", "dreamteacher[remote]")


def test_little_space_is_seen_first(
    bucket: MemoryFileSystem, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_SPARE", 10**18)
    refused(lambda: bring_shards(["memory://bucket/train-00.tar"]), "Free space")
    assert not everything(cache)


@pytest.mark.parametrize("place", ["http", "memory"])
def test_the_disk_must_hold_all_shards(
    place: str,
    server: Server,
    bucket: MemoryFileSystem,
    files: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each alone would fit: it is refused before any is brought. What is here, or begun, is not counted."""
    sizes = [path.stat().st_size for path in sorted(files.glob("*.tar"))]
    root = (
        "memory://bucket/"
        if place == "memory"
        else str(at(server, ""))[7:].replace("http:/", "http://") + "/"
    )
    addresses = expand(f"{root}train-{{00..04}}.tar")
    free = [sum(sizes) - 1]
    monkeypatch.setattr(http, "_SPARE", 0)
    monkeypatch.setattr(http.shutil, "disk_usage", lambda _: Disk(10**9, 0, free[0]))
    refused(lambda: bring_shards([*addresses, addresses[0]]), f"'{cache}' needs 0.1 MB more", "Free space")
    assert not server.asked
    assert not everything(cache)
    assert sorted(server.sizes) == ([] if place == "memory" else [f"/train-{i:02}.tar" for i in range(5)])
    free[0] = sum(sizes)
    (first,) = bring_shards(addresses[:1])
    name = hashlib.sha256(addresses[1].encode()).hexdigest()[:16]
    first.with_name(f"{name}-train-01.tar.part").write_bytes(bytes(500))
    free[0] = sum(sizes[1:]) - 500
    assert len(bring_shards(addresses)) == SHARDS


def test_a_server_that_tells_no_sizes(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Handler, "do_HEAD")
    assert len(tar_images(Path(str(at(server))[7:])).paths) == SHARDS * PER_SHARD


def test_a_server_that_is_not_there() -> None:
    addresses = expand("http://127.0.0.1:9/{00..99}.tar")
    assert "/00.tar' cannot be downloaded" in refused(lambda: bring_shards(addresses), "Connection refused")


def test_braces_on_this_machine(files: Path) -> None:
    found = tar_images(files / "train-{01..03}.tar")
    assert [path.name for path in found.paths] == [f"{i:03}.png" for i in range(3, 12)]  # type: ignore[union-attr]
    assert str(found.paths[0].relative_to(found.folder)) == "train-01.tar/003.png"
    refused(lambda: tar_images(files / "train-{03..06}.tar"), "2 of 4 shards are missing", "train-05.tar")
