"""Files from elsewhere: downloads that go on where they stopped, and files of a model hub.

Nothing here runs without having been asked for; what cannot be had is told with the place where to put it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from tqdm import tqdm

from dreamteacher.runtime.config import parse_json
from dreamteacher.runtime.errors import UserError, first_line, shorten
from dreamteacher.runtime.lock import locked

TIMEOUT = 30.0  # seconds without an answer
TRIES, PAUSE = 4, 2.0  # connections in a row that bring nothing, and the seconds between two
_PLAIN = {"User-Agent": "dreamteacher", "Accept-Encoding": "identity"}
_PIECE = 1 << 20
_SPARE = 64_000_000  # bytes that must stay free beside what is written
FULL = (errno.ENOSPC, errno.EDQUOT)
HUB_HOST = "huggingface.co"


def cache_folder() -> Path:
    """Where downloads and fetched teachers lie: $DREAMTEACHER_CACHE, else ~/.cache/dreamteacher."""
    given = os.environ.get("DREAMTEACHER_CACHE", "")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "dreamteacher"


def check_space(place: Path, needed: int) -> None:
    """Raises UserError when the disk of `place` (which need not exist yet) has fewer bytes free than needed."""
    there = next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < needed + _SPARE:
        raise UserError(
            f"'{place}' needs {amount(needed)} more, and its disk has {amount(free)} free.",
            "Free space, or name another place by the environment variable DREAMTEACHER_CACHE.",
        )


def amount(count: int) -> str:
    """A number of bytes for the screen.

    Example:
        >>> amount(2_210_000_000), amount(4_900_000)
        ('2.2 GB', '4.9 MB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 5e7 else f"{count / 1e6:.1f} MB"


# --- one file over HTTP -------------------------------------------------------------------------------------


def download(url: str, target: Path, *, sha256: str | None = None, size: int | None = None) -> Path:
    """Brings a file to `target`; one that is there already is only checked, one that was begun goes on.

    The bytes come into `target` + ".part", which is renamed when it is whole. A server that sends no parts, or
    whose file has changed in the meantime, starts it over.

    Args:
        sha256: hex digest that the whole file must have; None: not known.
        size: its bytes where they are known; else what the server says.

    Raises:
        UserError: no connection, an address that has no such file, a full disk, a file that is not whole or not
            the one that was meant. Only a part that can go on is left behind.
    """
    if target.is_file():
        _check_whole(target, sha256, size, "Delete it, then run the same command.")
        return target
    if not url.startswith(("https://", "http://")):
        raise UserError(f"'{url}' is no address of a file.", "It must begin with https:// or http://.")
    part = part_of(target)
    with alone(part) as file:
        _fill(file, url, target, size)
        try:
            _check_whole(part, sha256, size, f"What came was deleted. Is it the right address? {url}")
        except UserError:
            file.truncate(0)
            raise
        os.fsync(file.fileno())
        os.replace(part, target)
    return target


def opened(path: Path, mode: str) -> IO[Any]:
    """A file of the cache, opened to write; its folder is made.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, mode)
    except OSError as error:
        raise UserError(
            f"'{path}' cannot be written: {error.strerror}.",
            "Name another place by the environment variable DREAMTEACHER_CACHE.",
        ) from None


@contextlib.contextmanager
def alone(part: Path) -> Iterator[IO[bytes]]:
    """The part's file, opened to append and locked: two processes must not write into one."""
    busy = UserError(
        f"Another process is bringing '{part}' right now.", "Wait for it, then run the same command."
    )
    with opened(part, "ab") as file, locked(part, busy):
        try:
            yield file
        finally:
            file.flush()
            if not part.is_file() or not part.stat().st_size:  # renamed, or nothing came
                part.unlink(missing_ok=True)
                notes_of(part).unlink(missing_ok=True)


def size_of(url: str, target: Path) -> int:
    """The bytes of the file at an address, which is not brought; 0 where the server does not tell.

    Raises:
        UserError: no connection, naming the place of the file.
    """
    request = urllib.request.Request(url, headers=_PLAIN, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            length = answer.headers.get("Content-Length", "")
            return int(length) if length.isdigit() else 0
    except (urllib.error.HTTPError, HTTPException):
        return 0
    except OSError as error:
        raise _unreachable(
            url, target, str(getattr(error, "reason", error)) or type(error).__name__
        ) from None


def part_of(target: Path) -> Path:
    """Where the bytes of a file lie until it is whole."""
    return target.with_name(target.name + ".part")


def notes_of(part: Path) -> Path:
    """Where it is written which file a part is of."""
    return part.with_name(part.name + ".json")


def _fill(file: IO[bytes], url: str, target: Path, size: int | None) -> None:
    """Appends to the part until it is whole. A connection that breaks is opened anew, if it brought something."""
    barren = TRIES  # nothing has come yet: the first failure is the last
    # Bytes that the part ever had: a server without parts may send its first ones for ever.
    most: int | None = None
    while True:
        before = bytes_in(file)
        try:
            request = urllib.request.Request(url, headers=_headers(file, url))
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                total = _begin(file, answer, url, target, size)
                most = bytes_in(file) if most is None else most
                _copy(file, answer, total, target.name)
            if total is None or bytes_in(file) >= total:
                return
            reason = f"the connection ended after {amount(bytes_in(file))} of {amount(total)}"
        except urllib.error.HTTPError as error:
            if error.code == 416 and before:  # nothing follows what is here: it is whole, or of another file
                if error.headers.get("Content-Range", "").endswith(f"*/{before}"):
                    return
                file.truncate(0)
                continue
            reason = f"the server answers {error.code} {error.reason}"
        except (OSError, HTTPException) as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        have = bytes_in(file)
        barren = 0 if most is not None and have > most else barren + 1
        if barren > TRIES:
            raise _unreachable(url, target, reason)
        most = max(have, most or 0)
        time.sleep(PAUSE if barren else 0)


def bytes_in(file: IO[bytes]) -> int:
    """What was written to a file that is open, in bytes."""
    file.flush()
    return os.fstat(file.fileno()).st_size


def _headers(file: IO[bytes], url: str) -> dict[str, str]:
    """Asks for what follows the part, provided that the server's file is still the one that the part is of."""
    headers = dict(_PLAIN)
    try:
        notes = parse_json(notes_of(Path(file.name)).read_text("utf-8"))
        known = notes["url"] == url and notes["validator"]
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        file.truncate(0)
    if count := bytes_in(file):
        headers |= {"Range": f"bytes={count}-", "If-Range": known}
    return headers


def _begin(file: IO[bytes], answer: HTTPResponse, url: str, target: Path, size: int | None) -> int | None:
    """Reads the head of an answer and makes the part fit it; the bytes of the whole file, if the server says.

    Raises:
        UserError: for a web page, a file of another size than expected, or too little space.
    """
    kind, final = answer.headers.get("Content-Type", ""), answer.geturl()
    if kind.startswith("text/html"):
        raise _unreachable(url, target, "a web page came, not a file")
    if url.startswith("https:") and not final.startswith("https:"):
        raise _unreachable(url, target, "it leads on to an address without encryption")
    begins = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
    if answer.status == 206 and begins and int(begins[1]) == bytes_in(file):
        total: int | None = int(begins[2])
    elif answer.status == 206:
        raise _unreachable(url, target, "the server sends another part than it was asked for")
    else:
        file.truncate(0)  # it sends no parts, or has another file now
        length = answer.headers.get("Content-Length")
        total = int(length) if length is not None and length.isdigit() else None
    if size is not None and total not in (None, size):
        raise _unreachable(url, target, f"the file there has {total} bytes, not {size}")
    check_space(target.parent, (total or size or 0) - bytes_in(file))
    tag = answer.headers.get("ETag", "")  # a weak one (W/) does not promise the same bytes
    validator = tag if tag.startswith('"') else answer.headers.get("Last-Modified", "")
    notes = {"url": url, "validator": validator, "bytes": total}
    notes_of(Path(file.name)).write_text(json.dumps(notes) + "\n", "utf-8")
    return total


def _copy(file: IO[bytes], answer: HTTPResponse, total: int | None, name: str) -> None:
    with tqdm(
        total=total, initial=bytes_in(file), desc=name, unit="B", unit_scale=True,
        disable=not sys.stderr.isatty(),
    ) as bar:  # fmt: skip
        while piece := answer.read(_PIECE):
            file.write(piece)
            bar.update(len(piece))


def _check_whole(path: Path, sha256: str | None, size: int | None, way_out: str) -> None:
    found = path.stat().st_size
    if size is not None and found != size:
        raise UserError(f"'{path}' has {found} bytes; the file that was meant has {size}.", way_out)
    if sha256 is not None:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256.lower():
            raise UserError(
                f"'{path}' is not the file that was meant: its sha256 is {digest}, not {sha256.lower()}.",
                way_out,
            )


def _unreachable(url: str, target: Path, reason: str) -> UserError:
    return UserError(
        f"'{url}' cannot be downloaded: {reason}.",
        f"Get the file {target.name} in another way, put it here, and run the same command:\n{target}",
    )


# --- files of a model hub -----------------------------------------------------------------------------------


def hub_folder(
    repository: str, files: Sequence[str], place: Path, *, size: int = 0, local_files_only: bool = False
) -> Path:
    """A folder that holds files of a hub repository: `place` if they lie there, else the hub's own cache.

    Args:
        repository: "owner/name".
        files: paths in it; "a|b": a, or b where the repository has no a; "a?": a where it has it.
        place: where a user without a network puts them, under the same paths.
        size: bytes of all of them, roughly: for the check of the disk.
        local_files_only: no network is used.

    Raises:
        UserError: naming the repository, its files and `place`; or the extra to install.
    """
    needed = [alternatives(entry) for entry in files if not entry.endswith("?")]
    if all(any((place / name).is_file() for name in names) for names in needed):
        return place
    try:
        from huggingface_hub import constants
        from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError:
        raise UserError(
            f"Files of {HUB_HOST}/{repository} need the package huggingface_hub, which is not installed.",
            f"pip install 'dreamteacher[hub]', or put {shorten((names[0] for names in needed), 9)} into\n{place}",
        ) from None
    folder = _from_hub(repository, files, local_files_only=True)  # all there already?
    reason = "no network may be used" if local_files_only or constants.HF_HUB_OFFLINE else ""
    if folder is None and not reason and not _resolves(constants.ENDPOINT):
        reason = "there is no connection to it"
    if folder is None and not reason:
        check_space(Path(constants.HF_HUB_CACHE), size)
        try:
            folder = _from_hub(repository, files, local_files_only=False)
        except GatedRepoError:
            reason = "its licence must be accepted there first, with your account (`hf auth login`)"
        except RepositoryNotFoundError:
            reason = "there is none of this name, or it is private"
        except LocalEntryNotFoundError:
            reason = "the connection to it fails"
        except OSError as error:
            if error.errno in FULL:
                raise
            reason = first_line(error)
    if folder is None:
        raise UserError(
            f"Repository '{repository}' of {HUB_HOST} cannot be read: {reason}.",
            f"Put its files {shorten((names[0] for names in needed), 12)} here, under these names, and run the same command:\n{place}",
        )
    return folder


def _resolves(address: str) -> bool:
    """Whether a host can be reached at all: its name has an address, or a proxy stands in between."""
    try:
        return bool(urllib.request.getproxies() or socket.getaddrinfo(urlsplit(address).hostname, 443))
    except OSError:
        return False


def alternatives(entry: str) -> list[str]:
    """The paths that an entry of a list of files stands for, best first.

    Example:
        >>> alternatives("net.safetensors|net.bin"), alternatives("extra.json?")
        (['net.safetensors', 'net.bin'], ['extra.json'])
    """
    return entry.removesuffix("?").split("|")


def _from_hub(repository: str, files: Sequence[str], *, local_files_only: bool) -> Path | None:
    """The snapshot folder with all the files, of one commit; None where a local one is not complete.

    Raises:
        UserError: for a file that the repository does not have.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    folder: Path | None = None
    for entry in files:
        found = False
        for name in alternatives(entry):
            commit = None if folder is None else folder.name
            try:
                path = hf_hub_download(repository, name, revision=commit, local_files_only=local_files_only)
            except LocalEntryNotFoundError:
                if not local_files_only:
                    raise
                continue
            except EntryNotFoundError:
                continue
            folder, found = Path(path).parents[name.count("/")], True
            break
        if found or entry.endswith("?"):
            continue
        if local_files_only:
            return None
        raise UserError(
            f"Repository '{repository}' of {HUB_HOST} has no file {' or '.join(alternatives(entry))}.",
            "It has changed since this was written: name its present files by --file FOLDER.",
        )
    return folder
