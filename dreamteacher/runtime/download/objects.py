"""Tar shards at addresses: https:// by ourselves, object stores through fsspec, into a folder of this machine.

Nothing is asked of a server but what the user's own address names, and a shard that is here is not asked for
again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from dreamteacher.runtime.download import http
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.lock import locked
from dreamteacher.runtime.threads import in_threads

# http and https are ours; the others are fsspec's, each with a library of its own. memory is for tests.
SCHEMES = ("https", "http", "s3", "gs", "hf", "memory")
_PARALLEL = 4
_MOST = 1_000_000
_PIECE = 1 << 20
# What tells one version of an object from another, in the words of the several stores.
_VERSION = ("size", "ETag", "etag", "LastModified", "last_modified", "mtime", "created", "md5Hash", "blob_id")


def address_of(source: Path | str) -> str | None:
    """The address in what was given as a path (which has lost a slash); None for a path of this machine.

    Example:
        >>> address_of(Path("https://host/train-{000..099}.tar"))
        'https://host/train-{000..099}.tar'
        >>> address_of(Path("/data/shards")) is None
        True
    """
    match = re.match(r"([a-z0-9]+):/+(.*)", str(source), re.DOTALL)
    return f"{match[1]}://{match[2]}" if match and match[1] in SCHEMES else None


def expand(pattern: str) -> list[str]:
    """The addresses of a pattern with {000..099} and {a,b}, in order, as a shell expands them.

    Raises:
        UserError: a brace that is not closed, a range that runs backwards or is too long.

    Example:
        >>> expand("s3://b/{train,val}-{08..10}.tar")[:4]
        ['s3://b/train-08.tar', 's3://b/train-09.tar', 's3://b/train-10.tar', 's3://b/val-08.tar']
    """
    parts: list[list[str]] = []
    count = 1
    for text, inner in re.findall(r"([^{}]*)(?:\{([^{}]*)\})?", pattern):
        parts.append([text])
        if inner:
            parts.append(_choices(inner, pattern))
            count *= len(parts[-1])
    if count > _MOST:
        raise UserError(f"'{pattern}' stands for {count} addresses.", f"Give at most {_MOST}.")
    plain = re.sub(r"\{[^{}]+\}", "", pattern)
    if "{" in plain or "}" in plain:
        raise UserError(f"'{pattern}' has a brace without its other half, or one in another.", _FORM)
    return ["".join(chosen) for chosen in itertools.product(*parts)]


_FORM = "Give a range {000..099} or a list {a,b}."


def _choices(inner: str, pattern: str) -> list[str]:
    numbers = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", inner)
    if numbers is None:
        if "," not in inner:
            raise UserError(f"'{{{inner}}}' in '{pattern}' is no range and no list.", _FORM)
        return inner.split(",")
    first, last = int(numbers[1]), int(numbers[2])
    if not 0 <= last - first < _MOST:
        raise UserError(f"'{{{inner}}}' in '{pattern}' runs backwards, or too far.", _FORM)
    padded = any(len(n) > 1 and n.startswith("0") for n in numbers.groups())
    width = max(map(len, numbers.groups())) if padded else 0
    return [f"{number:0{width}}" for number in range(first, last + 1)]


def bring_shards(addresses: list[str]) -> list[Path]:
    """The shards on this machine, in the order of their addresses; what is missing is brought, a few at a time.

    They lie in the folder shards of the cache (see `dreamteacher.runtime.download.http.cache_folder`), under a name that the
    address decides. A connection that breaks goes on where it broke.

    Raises:
        UserError: no such shard, no connection, no library for the address; too little space for all of them, as
            far as the servers tell their sizes, before the first is brought.
    """
    folder = http.cache_folder() / "shards"
    for address in addresses:
        if not urlsplit(address).path.endswith(".tar"):
            raise UserError(
                f"'{address}' is no address of a .tar file.",
                "Give one shard, or several as shard-{000..099}.tar: a folder at an address cannot be listed.",
            )
    targets = {address: folder / _name(address) for address in addresses}
    wanted = [address for address, target in targets.items() if not target.is_file()]
    if len(wanted) > 1:  # a single one is checked when it is begun
        left = in_threads(lambda address: _left(address, targets[address]), wanted, _PARALLEL)
        http.check_space(folder, sum(left))
    in_threads(lambda address: _bring(address, targets[address]), wanted, _PARALLEL)
    return [targets[address] for address in addresses]


def _name(address: str) -> str:
    last = re.sub(r"[^A-Za-z0-9._-]", "_", urlsplit(address).path.rpartition("/")[2])
    return f"{hashlib.sha256(address.encode()).hexdigest()[:16]}-{last[-80:]}"


def _left(address: str, target: Path) -> int:
    """Bytes that are still to be brought; 0 where the server does not tell."""
    if address.startswith(("https://", "http://")):
        size = http.size_of(address, target)
    else:
        size = _found(address)[2]["size"]
    part = http.part_of(target)
    return max(0, size - (part.stat().st_size if part.is_file() else 0))


def _bring(address: str, target: Path) -> None:
    if address.startswith(("https://", "http://")):
        with _sole(target):
            if not target.is_file():
                http.download(address, target)
        return
    system, path, info = _found(address)
    size = info["size"]
    with _sole(target):
        if target.is_file():
            return
        with http.alone(http.part_of(target)) as file:
            known = {"url": address, **{name: str(info.get(name)) for name in _VERSION}}
            _begin(file, json.dumps(known))
            http.check_space(target.parent, size - http.bytes_in(file))
            _fill(file, system, path, size, address)
            os.fsync(file.fileno())
            os.replace(file.name, target)


@contextlib.contextmanager
def _sole(target: Path) -> Iterator[None]:
    """Within: no other process brings this file; the others wait, and then find it there."""
    path = target.with_name(target.name + ".lock")
    http.opened(path, "a").close()
    with locked(path):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # who waits for it sees that it is gone, and makes it anew
                path.unlink()


def _begin(file: IO[bytes], known: str) -> None:
    """Empties a part that was begun from another object."""
    notes = http.notes_of(Path(file.name))
    if not notes.is_file() or notes.read_text("utf-8") != known:
        file.truncate(0)
        notes.write_text(known, "utf-8")


def _fill(file: IO[bytes], system: Any, path: str, size: int, address: str) -> None:
    """Appends to the part until it is the whole object."""
    barren = 0
    while (have := http.bytes_in(file)) < size:
        try:
            with system.open(path, "rb") as source:
                source.seek(have)
                while piece := source.read(_PIECE):
                    file.write(piece)
            reason: Any = f"it ends after {http.bytes_in(file)} of {size} bytes"
        except Exception as error:
            if isinstance(error, OSError) and error.errno in http.FULL:
                raise
            reason = error
        barren = 0 if http.bytes_in(file) > have else barren + 1
        if barren > http.TRIES:
            raise _unreachable(address, reason)
        time.sleep(http.PAUSE if barren else 0)
    if http.bytes_in(file) > size:
        file.truncate(0)
        raise UserError(f"'{address}' has grown while it was brought.", "Run the same command again.")


def _found(address: str) -> tuple[Any, str, dict[str, Any]]:
    """The file system of an object, its place there, and what is known of it: its "size" in bytes, and more."""
    system, path = _store(address)
    try:
        info = dict(system.info(path))
        return system, path, info | {"size": int(info["size"])}
    except FileNotFoundError:
        raise UserError(
            f"There is no '{address}'.", "Check the address, and how many shards there are."
        ) from None
    except Exception as error:  # each library raises its own
        raise _unreachable(address, error) from None


def _store(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the object's place in it."""
    try:
        import fsspec

        return fsspec.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"'{address}' needs a library: {' '.join(str(error).split())[:120]}.",
            "pip install 'dreamteacher[remote]'",
        ) from None


def _unreachable(address: str, reason: object) -> UserError:
    words = " ".join(str(reason).split())[:160] or type(reason).__name__
    return UserError(
        f"'{address}' cannot be brought: {words}.", "Check the address, and your right to read it."
    )
