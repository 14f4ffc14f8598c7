"""Downloads against a server of our own on this machine, and files of a hub."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import shutil
import socket
import sys
import types
from collections import namedtuple
from collections.abc import Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dreamteacher.runtime.download import http
from dreamteacher.runtime.download.http import cache_folder, download, hub_folder
from dreamteacher.runtime.errors import UserError
from tests.builders.disks import fill_disk
from tests.builders.servers import serving

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
    with serving(server):
        yield server


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
