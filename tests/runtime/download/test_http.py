"""Downloads against a server of our own on this machine, files of a hub, and archives that mean harm."""

from __future__ import annotations

import errno
import fcntl
import gzip
import hashlib
import io
import json
import shutil
import socket
import sys
import tarfile
import threading
import tracemalloc
import types
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import fill_disk

from dreamteacher.runtime.download import archive as download_archive
from dreamteacher.runtime.download import http
from dreamteacher.runtime.download.archive import extract, is_archive
from dreamteacher.runtime.download.http import cache_folder, download, hub_folder
from dreamteacher.runtime.errors import UserError

CONTENT = bytes(range(256)) * 40
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `content` at any path; the fields say what is unusual about it."""

    content = CONTENT
    ranges = True
    unwilling = False  # says of every range that it lies behind the end
    tag = '"one"'
    kind = "application/octet-stream"
    status = 200
    declare = True
    cuts: list[int]  # bytes after which the next connections break off
    most: int | None = None  # bytes after which every connection breaks off
    asked: list[tuple[str, str | None]]  # path and Range of every request

    def handle_error(self, *_: Any) -> None:
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append((self.path, wanted))
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/file.bin")
            self.end_headers()
            return
        if len(server.asked) > 50:  # a client that would never end
            return
        if server.status != 200:
            self.send_error(server.status)
            return
        if wanted and server.unwilling:
            self.send_response(416)
            self.end_headers()
            return
        body, first = server.content, 0
        if wanted and server.ranges and self.headers.get("If-Range") == server.tag:
            first = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if first >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if server.tag:
            self.send_header("ETag", server.tag)
        self.send_header("Content-Type", server.kind)
        if server.declare:
            self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        count = server.cuts.pop(0) if server.cuts else server.most or len(body)
        self.wfile.write(body[first : first + count])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(http, "PAUSE", 0)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server(("127.0.0.1", 0), Handler)
    server.cuts, server.asked = [], []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def address(server: Server, path: str = "/file.bin") -> str:
    return f"http://127.0.0.1:{server.server_address[1]}{path}"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "downloads" / "file.bin"


def refusal(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert 2 <= len(text.splitlines()) <= 3, text
    return text


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# --- the cache ----------------------------------------------------------------------------------------------


def test_the_cache_lies_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DREAMTEACHER_CACHE", "~/large-disk")
    assert cache_folder() == tmp_path / "large-disk"
    monkeypatch.delenv("DREAMTEACHER_CACHE")
    assert cache_folder() == tmp_path / ".cache" / "dreamteacher"


# --- downloads ----------------------------------------------------------------------------------------------


def test_a_whole_file_comes_once(server: Server, target: Path) -> None:
    assert download(address(server), target, sha256=DIGEST.upper(), size=len(CONTENT)) == target
    assert target.read_bytes() == CONTENT
    assert names(target.parent) == ["file.bin"]
    download(address(server), target, sha256=DIGEST)
    assert len(server.asked) == 1


def test_a_file_whose_size_the_server_does_not_say(server: Server, target: Path) -> None:
    server.declare = False
    assert download(address(server), target).read_bytes() == CONTENT


def test_a_connection_that_breaks_is_taken_up(server: Server, target: Path) -> None:
    server.cuts = [1000, 500]
    download(address(server), target, sha256=DIGEST)
    assert [wanted for _, wanted in server.asked] == [None, "bytes=1000-", "bytes=1500-"]
    assert names(target.parent) == ["file.bin"]


@pytest.mark.parametrize(("how", "asked"), [("no parts", http.TRIES + 2), ("no range", 2 * http.TRIES + 3)])
def test_the_same_first_bytes_are_no_progress(how: str, asked: int, server: Server, target: Path) -> None:
    """A server that always begins anew, behind a proxy that always cuts at one place."""
    server.most, server.unwilling = 700, how == "no range"
    server.tag = "" if how == "no parts" else server.tag
    with pytest.raises(UserError, match=r"ended after 0\.0 MB of 0\.0 MB") as error:
        download(address(server), target)
    refusal(error)
    assert len(server.asked) == asked


def test_the_next_command_goes_on(server: Server, target: Path) -> None:
    server.cuts = [1000] + [0] * (http.TRIES + 1)
    with pytest.raises(UserError) as error:
        download(address(server), target)
    said = refusal(error)
    assert "the connection ended after 0.0 MB of 0.0 MB" in said
    assert names(target.parent) == ["file.bin.part", "file.bin.part.json"]
    server.asked.clear()
    assert download(address(server), target).read_bytes() == CONTENT
    assert server.asked == [("/file.bin", "bytes=1000-")]


@pytest.mark.parametrize("what", ["no parts", "another file", "another address", "no validator"])
def test_a_part_that_cannot_go_on_starts_over(server: Server, target: Path, what: str) -> None:
    server.cuts = [1000] + [0] * (http.TRIES + 1)
    server.tag = "" if what == "no validator" else server.tag
    with pytest.raises(UserError):
        download(address(server), target)
    server.ranges = what != "no parts"
    if what == "another file":
        server.content, server.tag = CONTENT[::-1], '"two"'
    path = "/file.bin?v=2" if what == "another address" else "/file.bin"
    assert download(address(server, path), target).read_bytes() == server.content


def test_a_part_that_was_whole(server: Server, target: Path) -> None:
    """The process ended between the last byte and the renaming."""
    server.cuts = [len(CONTENT) - 1] + [0] * (http.TRIES + 1)
    with pytest.raises(UserError):
        download(address(server), target)
    part = target.with_name("file.bin.part")
    part.write_bytes(CONTENT)
    assert download(address(server), target, sha256=DIGEST).read_bytes() == CONTENT
    target.unlink()
    part.write_bytes(CONTENT + b"more")
    notes = {"url": address(server), "validator": server.tag}
    part.with_name("file.bin.part.json").write_text(json.dumps(notes))
    assert download(address(server), target, sha256=DIGEST).read_bytes() == CONTENT


def test_a_redirection_is_followed(server: Server, target: Path) -> None:
    server.cuts = [1000]
    download(address(server, "/moved"), target, sha256=DIGEST)
    assert server.asked[-1] == ("/file.bin", "bytes=1000-")


def test_another_file_than_was_meant(server: Server, target: Path) -> None:
    with pytest.raises(UserError, match="is not the file that was meant") as error:
        download(address(server), target, sha256="0" * 64)
    assert address(server) in refusal(error)
    assert names(target.parent) == []
    with pytest.raises(UserError, match=f"has {len(CONTENT)} bytes, not 3"):
        download(address(server), target, size=3)
    assert names(target.parent) == []


def test_a_wrong_file_that_lies_there_is_told_and_kept(target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(b"mine")
    with pytest.raises(UserError, match="Delete it"):
        download("http://unused.invalid/file.bin", target, sha256=DIGEST)
    with pytest.raises(UserError, match="has 4 bytes; the file that was meant has 5"):
        download("http://unused.invalid/file.bin", target, size=5)
    assert target.read_bytes() == b"mine"


@pytest.mark.parametrize("status", [403, 404, 503])
def test_what_a_server_refuses(server: Server, target: Path, status: int) -> None:
    server.status = status
    with pytest.raises(UserError, match=f"the server answers {status}") as error:
        download(address(server), target)
    assert str(target) in refusal(error)
    assert names(target.parent) == []
    assert len(server.asked) == 1


def test_a_web_page_is_no_file(server: Server, target: Path) -> None:
    server.kind = "text/html; charset=utf-8"
    with pytest.raises(UserError, match="a web page came"):
        download(address(server), target)
    assert names(target.parent) == []


def test_without_a_network_the_file_and_its_place_are_named(target: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/models/file.bin"
    with pytest.raises(UserError) as error:
        download(url, target)
    said = refusal(error).splitlines()
    assert f"'{url}' cannot be downloaded: [Errno 111] Connection refused." in said[0]
    assert "Get the file file.bin in another way" in said[1]
    assert said[2] == str(target)
    assert names(target.parent) == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/file", "models/file.bin"])
def test_other_kinds_of_addresses(url: str, target: Path) -> None:
    with pytest.raises(UserError, match="must begin with https"):
        download(url, target)
    assert not target.parent.exists()


def test_the_disk_is_checked_first(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    with pytest.raises(UserError, match=r"1\.0 MB free"):
        download(address(server), target)
    assert names(target.parent) == []


def test_a_disk_that_becomes_full_is_no_broken_connection(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(http, "_copy", full)
    with pytest.raises(OSError, match="No space left"):
        download(address(server), target)


def test_a_disk_that_is_really_full_keeps_a_part_that_goes_on(
    server: Server, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_SPARE", 0)
    server.content = CONTENT * 300
    target, copy = small_disk / "file.bin", http._copy

    def filling(*args: Any) -> None:
        fill_disk(small_disk)
        (small_disk / "room").unlink()
        copy(*args)

    with monkeypatch.context() as patch:
        (small_disk / "room").write_bytes(bytes(500_000))
        patch.setattr(http, "_copy", filling)
        with pytest.raises(OSError, match="No space left"):
            download(address(server), target)
    part = target.with_name("file.bin.part").read_bytes()
    assert len(part) >= 400_000
    assert server.content.startswith(part)
    (small_disk / "filler").unlink()
    assert download(address(server), target).read_bytes() == server.content
    assert server.asked[-1] == ("/file.bin", f"bytes={len(part)}-")
    assert names(small_disk) == ["file.bin"]


def test_two_processes_do_not_write_into_one_file(server: Server, target: Path) -> None:
    target.parent.mkdir()
    with open(target.with_name("file.bin.part"), "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="Another process"):
            download(address(server), target)
    assert download(address(server), target).read_bytes() == CONTENT


def test_a_place_that_cannot_be_written(target: Path) -> None:
    target.parent.write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        download("http://unused.invalid/file.bin", target)


@pytest.mark.parametrize("final", ["http://host/file", "https://host/file"])
def test_encryption_is_not_given_up(final: str, target: Path) -> None:
    target.parent.mkdir()
    headers = Message()
    headers["Content-Length"] = "10"
    answer: Any = types.SimpleNamespace(headers=headers, status=200, geturl=lambda: final)
    with open(target.with_name("file.bin.part"), "ab") as file:
        if final.startswith("https"):
            assert http._begin(file, answer, "https://host/a", target, None) == 10
        else:
            with pytest.raises(UserError, match="without encryption"):
                http._begin(file, answer, "https://host/a", target, None)


def test_another_part_than_was_asked_for(target: Path) -> None:
    target.parent.mkdir()
    headers = Message()
    headers["Content-Range"] = "bytes 5-9/10"
    answer: Any = types.SimpleNamespace(headers=headers, status=206, geturl=lambda: "http://host/a")
    with (
        open(target.with_name("file.bin.part"), "ab") as file,
        pytest.raises(UserError, match="another part"),
    ):
        http._begin(file, answer, "http://host/a", target, None)


# --- the hub ------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = ("config.json", "unet/net.safetensors|unet/net.bin", "extra.txt?")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's own library, which may use no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(path)


def cached(hub: Path, *paths: str) -> Path:
    """What the library leaves in its cache after a download."""
    repository = hub / "models--owner--name"
    put(repository, "refs/main")
    (repository / "refs" / "main").write_text(COMMIT)
    put(repository / "snapshots" / COMMIT, *paths)
    return repository / "snapshots" / COMMIT


def test_what_the_user_put_there_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    put(tmp_path, "config.json", "unet/net.bin")
    assert hub_folder("owner/name", FILES, tmp_path) == tmp_path


@pytest.mark.parametrize("weights", ["unet/net.safetensors", "unet/net.bin"])
def test_what_the_hubs_own_cache_has_needs_no_network(hub: Path, tmp_path: Path, weights: str) -> None:
    snapshot = cached(hub, "config.json", weights)
    assert hub_folder("owner/name", FILES, tmp_path / "place") == snapshot


@pytest.mark.parametrize("how", ["offline", "local files only", "no connection", "not installed"])
def test_offline_the_repository_its_files_and_the_place_are_named(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    cached(hub, "config.json")
    place = tmp_path / "place"
    if how in ("local files only", "no connection"):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    if how == "no connection":
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: (_ for _ in ()).throw(OSError("no name")))
        monkeypatch.setattr("urllib.request.getproxies", dict)
    if how == "not installed":
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError) as error:
        hub_folder("owner/name", FILES, place, local_files_only=how == "local files only")
    said = refusal(error)
    assert "owner/name" in said
    assert "config.json, unet/net.safetensors" in said
    assert said.splitlines()[-1] == str(place)
    expected = {"no connection": "no connection", "not installed": "pip install 'dreamteacher[hub]'"}
    assert expected.get(how, "no network may be used") in said
    assert not place.exists()


@pytest.fixture
def online(hub: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The hub as its library shows it: `files` are there, `error` is raised; `asked` is (file, revision)."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    state: dict[str, Any] = {"files": {"config.json", "unet/net.bin"}, "error": None, "asked": []}

    def get(repository: str, name: str, *, revision: str | None, local_files_only: bool) -> str:
        assert repository == "owner/name"
        if local_files_only:
            raise LocalEntryNotFoundError("not here")
        state["asked"].append((name, revision))
        if state["error"]:
            raise state["error"]
        if name not in state["files"]:
            raise EntryNotFoundError("no such file")
        put(hub / "snapshots" / COMMIT, name)
        return str(hub / "snapshots" / COMMIT / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", get)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(http, "_resolves", lambda _: True)
    return state


def test_files_of_one_commit_are_taken(hub: Path, tmp_path: Path, online: dict[str, Any]) -> None:
    assert hub_folder("owner/name", FILES, tmp_path / "place") == hub / "snapshots" / COMMIT
    assert online["asked"] == [
        ("config.json", None), ("unet/net.safetensors", COMMIT), ("unet/net.bin", COMMIT), ("extra.txt", COMMIT),
    ]  # fmt: skip


def test_a_repository_that_has_changed(tmp_path: Path, online: dict[str, Any]) -> None:
    online["files"].clear()
    with pytest.raises(UserError, match=r"has no file config\.json"):
        hub_folder("owner/name", FILES, tmp_path / "place")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("GatedRepoError", "licence must be accepted"),
        ("RepositoryNotFoundError", "none of this name"),
        ("LocalEntryNotFoundError", "the connection to it fails"),
        ("OfflineModeIsEnabled", "said by the library"),
    ],
)
def test_what_the_hub_refuses(tmp_path: Path, online: dict[str, Any], error: str, says: str) -> None:
    from huggingface_hub import errors

    kind = getattr(errors, error)
    online["error"] = kind.__new__(kind, "said by the library.\nAnd more.")
    online["error"].args = ("said by the library.\nAnd more.",)
    with pytest.raises(UserError) as caught:
        hub_folder("owner/name", FILES, tmp_path / "place")
    assert says in refusal(caught)


def test_a_hub_download_needs_space_too(
    tmp_path: Path, online: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    with pytest.raises(UserError, match=r"needs 4\.3 GB more"):
        hub_folder("owner/name", FILES, tmp_path / "place", size=4_300_000_000)
    assert online["asked"] == []


# --- archives -----------------------------------------------------------------------------------------------

WANTED = ["*G_ema*.pth"]


def tarball(path: Path, members: dict[str, bytes], *others: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for info in others:
            archive.addfile(info)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def link(name: str, to: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.tar.gz", True), ("a.TGZ", True), ("a.zip", True), ("a.tar", True), ("swav.pth.tar", False),
        ("G.pth", False), ("ffhq.pkl", False),
    ],
)  # fmt: skip
def test_archives_by_name(name: str, expected: bool) -> None:
    assert is_archive(Path(name)) == expected


@pytest.mark.parametrize("kind", ["tar.gz", "tar", "zip"])
def test_only_wanted_files_are_written(kind: str, tmp_path: Path) -> None:
    members = {"run/G_ema_best.pth": CONTENT, "run/D.pth": b"d", "run/log.txt": b"log"}
    make = zipped if kind == "zip" else tarball
    archive = make(tmp_path / f"a.{kind}", members)
    found = extract(archive, tmp_path / "out", WANTED, most=10**6)
    assert found == [tmp_path / "out" / "run" / "G_ema_best.pth"]
    assert found[0].read_bytes() == CONTENT
    assert names(tmp_path) == [archive.name, "out/run/G_ema_best.pth"]


def test_a_tar_that_ends_in_a_zip_is_a_tar(tmp_path: Path) -> None:
    """PyTorch's files are zips: where one ends an uncompressed tar, both readers would take it."""
    inner = zipped(tmp_path / "G_ema.pth", {"data.pkl": b"weights"}).read_bytes()
    archive = tarball(tmp_path / "a.tar", {"G_ema.pth": inner})
    raw = archive.read_bytes()
    archive.write_bytes(raw[: 512 + -(-len(inner) // 512) * 512])
    assert extract(archive, tmp_path / "out", WANTED, most=10**6)[0].read_bytes() == inner


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
@pytest.mark.parametrize(
    "name", ["../G_ema.pth", "/G_ema.pth", "a/../../G_ema.pth", "C:/G_ema.pth", "..\\G_ema.pth"]
)
def test_a_name_that_leads_out_refuses_the_archive(kind: str, name: str, tmp_path: Path) -> None:
    make = zipped if kind == "zip" else tarball
    archive = make(tmp_path / f"a.{kind}", {"good/G_ema.pth": b"good", name: b"bad"})
    with pytest.raises(UserError, match="leads out of its folder") as error:
        extract(archive, tmp_path / "in" / "out", WANTED, most=10**6)
    refusal(error)
    assert names(tmp_path) == [archive.name]


@pytest.mark.parametrize(
    "other",
    [
        link("G_ema.pth", "/etc/passwd"),
        link("G_ema.pth", "../../secret", tarfile.LNKTYPE),
        link("G_ema.pth", "", tarfile.CHRTYPE),
        link("G_ema.pth", "", tarfile.FIFOTYPE),
        link("G_ema.pth", "", tarfile.DIRTYPE),
    ],
    ids=["symbolic link", "hard link", "device", "pipe", "folder"],
)
def test_nothing_but_regular_files_is_written(other: tarfile.TarInfo, tmp_path: Path) -> None:
    archive = tarball(tmp_path / "a.tar.gz", {"log.txt": b"log"}, other)
    with pytest.raises(UserError, match="holds no file"):
        extract(archive, tmp_path / "out", WANTED, most=10**6)
    assert names(tmp_path) == ["a.tar.gz"]


def test_a_link_as_folder_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    archive = tarball(tmp_path / "a.tar.gz", {"run/G_ema.pth": b"x"}, link("run", str(tmp_path / "victim")))
    extract(archive, tmp_path / "out", WANTED, most=10**6)
    assert names(tmp_path) == ["a.tar.gz", "out/run/G_ema.pth"]
    assert not (tmp_path / "out" / "run").is_symlink()


def test_a_symbolic_link_in_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("G_ema.pth")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match="holds no file"):
        extract(tmp_path / "a.zip", tmp_path / "out", WANTED, most=10**6)


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_bombs_are_refused_by_what_they_declare(kind: str, tmp_path: Path) -> None:
    make = zipped if kind == "zip" else tarball
    archive = make(tmp_path / f"a.{kind}", {"log.txt": bytes(3_000_000), "G_ema.pth": b"x"})
    assert archive.stat().st_size < 10_000
    with pytest.raises(UserError, match="declares more than"):
        extract(archive, tmp_path / "out", WANTED, most=2_000_000)
    assert names(tmp_path) == [archive.name]


def header_bombs(count: int) -> dict[str, bytes]:
    """Uncompressed tar files whose headers have `count` bytes of zeros or more, or an end that is none."""

    def head(kind: bytes, size: int, name: str = "x") -> bytes:
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, size
        return info.tobuf(tarfile.GNU_FORMAT)

    def note(*texts: bytes) -> bytes:
        record = b"".join(b"%d %s\n" % (len(text) + 4, text) for text in texts)
        return head(tarfile.XHDTYPE, len(record)) + record.ljust(512, b"\0")

    gaps = bytearray(head(tarfile.GNUTYPE_SPARSE, 0))
    gaps[482] = 1  # more gaps follow
    gaps[148:156] = b" " * 8
    gaps[148:156] = b"%06o\0 " % sum(gaps)
    keys = b"".join(b"%d %06d=\n" % (len("10 000000=") + 1, i) for i in range(count // 11))
    common = head(tarfile.XGLTYPE, 512) + keys[:512]
    member = head(tarfile.REGTYPE, 0)
    return {
        **{kind: head(kind.encode(), count) + bytes(count) for kind in "LKxgX"},
        "a chain": (head(tarfile.GNUTYPE_LONGNAME, 512) + bytes(512)) * (count // 1024),
        "notes for all": (common + member) * (count // 1536),
        "old gaps": bytes(gaps) + bytes([1] * 512) * (count // 512),
        "new gaps": note(b"GNU.sparse.major=1", b"GNU.sparse.minor=0")
        + member
        + b"%d\n" % count
        + b"0\n" * (count // 2),
        "a negative name": member + head(tarfile.GNUTYPE_LONGNAME, -1024) + bytes(count),
        "back for ever": member * 4 + head(tarfile.REGTYPE, -1024) + bytes(1024),
        "back by a note": member * 4 + note(b"size=-2048") + member + bytes(1024),
    }


COUNT = 2_000_000


@pytest.mark.parametrize("name", header_bombs(0))
def test_bombs_in_headers(name: str, tmp_path: Path) -> None:
    """tarfile reads them whole before it shows a member: 10 MB packed would take 10 GB."""
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(gzip.compress(header_bombs(COUNT)[name] + bytes(1024), 1))
    tracemalloc.start()
    try:
        with pytest.raises(
            UserError, match=r"cannot be taken apart: (more than 65536|a member decl|.*--sparse)"
        ):
            extract(archive, tmp_path / "out", WANTED, most=10**9)
        assert tracemalloc.get_traced_memory()[1] < COUNT / 4
    finally:
        tracemalloc.stop()
    assert names(tmp_path) == [archive.name]


def test_too_many_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_archive, "MOST_MEMBERS", 2)
    archive = tarball(tmp_path / "a.tar.gz", {f"{i}.txt": b"" for i in range(3)})
    with pytest.raises(UserError, match="or 2 files"):
        extract(archive, tmp_path / "out", WANTED, most=10**6)


@pytest.mark.parametrize(("size", "says"), [(3, "larger than it declares"), (9, "ends early")])
def test_a_member_that_lies_about_its_size(size: int, says: str, tmp_path: Path) -> None:
    member = download_archive._Member("G_ema.pth", size, True, io.BytesIO)
    with pytest.raises(ValueError, match=says), open(tmp_path / "file", "wb") as file:
        download_archive._copy(io.BytesIO(b"5 bytes"[:5]), file, member, tmp_path)


def damage(raw: bytes, how: str) -> bytes:
    if how == "encrypted":  # the flag in the local head and in the directory
        changed = bytearray(raw)
        changed[6] |= 1
        changed[raw.index(b"PK\x01\x02") + 8] |= 1
        return bytes(changed)
    return {"truncated": raw[: len(raw) // 2], "text": b"<html>not found</html>", "empty": b""}[how]


@pytest.mark.parametrize(
    ("kind", "how"),
    [(k, h) for k in ("tar.gz", "tar", "zip") for h in ("truncated", "text", "empty")]
    + [("zip", "encrypted")],
)
def test_damaged_archives(kind: str, how: str, tmp_path: Path) -> None:
    make = zipped if kind == "zip" else tarball
    archive = make(tmp_path / f"a.{kind}", {"G_ema.pth": CONTENT})
    archive.write_bytes(damage(archive.read_bytes(), how))
    with pytest.raises(UserError, match="cannot be taken apart") as error:
        extract(archive, tmp_path / "out", WANTED, most=10**6)
    refusal(error)
    assert names(tmp_path) == [archive.name]


def test_a_file_that_occurs_twice(tmp_path: Path) -> None:
    first, again = tarfile.TarInfo("G_ema.pth"), {"./G_ema.pth": b"x"}
    with pytest.raises(UserError, match="occurs twice"):
        extract(tarball(tmp_path / "a.tar", again, first), tmp_path / "out", WANTED, most=10**6)
