"""A run folder: resolved config, logs, a lock."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.config import changed_keys, parse_json
from dreamteacher.runtime.distributed.group import broadcast
from dreamteacher.runtime.distributed.world import ALONE, World
from dreamteacher.runtime.errors import UserError, shorten

# Settings that may differ between a run and its resumption: they change no number, but for `accumulate` (BatchNorm
# sees its parts alone), without which a run that has run out of memory could not go on.
FREE_TO_CHANGE = (
    "out", "workers", "dry_run", "strict", "device", "save_every", "save_minutes", "keep_checkpoints", "log_to", "cache_gb",
    "teacher_batch", "accumulate",
)  # fmt: skip
# What a process that was killed leaves behind, workers that decode images, ends by itself within 5 s.
PATIENCE_S = 10.0


def take_lock(file: int, place: Path) -> bool:
    """Locks an open file for this process; False when another one holds it.

    Raises:
        UserError: when the disk of `place` cannot lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
            raise
        raise UserError(
            f"The disk of '{place}' cannot lock files.", "Choose an --out on another disk."
        ) from None
    return True


class RunDir:
    """One folder that holds everything of a run. Open it only after every check has passed.

    Args:
        world: of a run of several processes; the first one locks and writes, the others only read.
    """

    def __init__(self, path: Path, world: World = ALONE) -> None:
        self.path, self.world = path, world
        self._lock: Any = None
        self._owner = os.getpid()

    @staticmethod
    def check(path: Path, resolved: Mapping[str, Any], needed_bytes: int = 0) -> None:
        """Raises UserError if the folder cannot be made or holds another run; touches nothing.

        Args:
            resolved: {"verb", "config", ...} as it will be written to config.json.
            needed_bytes: free space that the run wants on that disk.
        """
        try:
            place = path
            while not place.exists() and place != place.parent:
                place = place.parent
            if not place.is_dir():
                raise UserError(f"'{place}' is a file, not a folder.", "Choose another --out.")
            if not os.access(place, os.W_OK | os.X_OK):
                raise UserError(
                    f"'{place}' cannot be written.", "Choose another --out, or mend its permissions."
                )
            free = shutil.disk_usage(place).free
            # Hidden files (the lock, a temporary) may be left of a start that was killed or out of space.
            empty = place != path or all(p.name.startswith(".") for p in path.iterdir())
        except OSError as error:
            raise UserError(
                f"'{path}' cannot be used: {error.strerror or error}.", "Choose another --out."
            ) from None
        if free < needed_bytes:
            raise UserError(
                f"'{path}' needs {needed_bytes / 1e6:.0f} MB and its disk has {free / 1e6:.0f} MB free.",
                "Free space, or choose an --out on another disk.",
            )
        if empty:
            return
        old = RunDir(path).config()
        if old is None or "verb" not in old:
            raise UserError(
                f"'{path}' is not empty and is no run folder.", "Choose another --out, or empty that folder."
            )
        if old["verb"] != resolved.get("verb"):
            raise UserError(
                f"'{path}' holds a run of '{old['verb']}', not of '{resolved.get('verb')}'.",
                "Choose another --out.",
            )
        if checkpoint.latest(path) is None and not (path / "backbone.safetensors").exists():
            return  # it never reached its first checkpoint: nothing is lost by starting anew
        before, now = old.get("config"), json.loads(json.dumps(resolved.get("config", {})))
        changes = changed_keys(before if isinstance(before, dict) else {}, now)
        changes = [c for c in changes if c.split(":")[0] not in FREE_TO_CHANGE]
        if changes:
            raise UserError(
                f"'{path}' was started with other settings: {shorten(changes)}.",
                "Give the old settings to resume it, or another --out to start anew.",
            )

    def open(self, resolved: Mapping[str, Any]) -> Path | None:
        """Makes and locks the folder, writes a new run's config.json; returns the checkpoint to resume."""
        if self.world.ranks > 1:
            found = broadcast(lambda: str(self._open(resolved) or ""))
            return Path(found) if found else None
        return self._open(resolved)

    def _open(self, resolved: Mapping[str, Any]) -> Path | None:
        self.path.mkdir(parents=True, exist_ok=True)
        lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held until `close` or the end of the process
        patience = PATIENCE_S if "TORCHELASTIC_RUN_ID" in os.environ else 0.0  # it may be a restart
        end = time.monotonic() + patience
        try:
            while not take_lock(lock.fileno(), self.path):
                if time.monotonic() >= end:
                    raise UserError(
                        f"Another process is writing to '{self.path}'.",
                        "Wait for it, or choose another --out.",
                    )
                time.sleep(0.1)
        except BaseException:
            lock.close()
            raise
        self._lock = lock
        checkpoint.sweep(self.path)
        resume = checkpoint.latest(self.path, whole=True)
        if resume is None:  # a run that goes on keeps the config that it was started with
            checkpoint.write_text(self.path / "config.json", json.dumps(resolved, indent=2) + "\n")
            for name in ("metrics.jsonl", "timing.jsonl", "loggers.json"):
                (self.path / name).unlink(missing_ok=True)
        return resume

    def close(self) -> None:
        """Releases the lock (the end of the process does the same).

        The file `.lock` stays: were it deleted, a process that already opened it and one that makes it anew
        would both hold "the" lock.
        """
        if self._lock is not None:
            if self._owner == os.getpid():  # at once: workers that were forked hold the same open file
                fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._lock.close()
            self._lock = None

    def __del__(self) -> None:
        self.close()  # of a run that ended in an exception

    def config(self) -> dict[str, Any] | None:
        """The resolved config of a run that exists, or None."""
        try:
            config = parse_json((self.path / "config.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return config if isinstance(config, dict) else None

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Adds one line to a .jsonl file of the run; a last line that a kill cut off is ended first."""
        if not self.world.first:
            return
        with open(self.path / name, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write((json.dumps(row) + "\n").encode())

    def rewind(self, name: str, step: int) -> None:
        """Drops what a killed run had logged after the checkpoint of `step`."""
        if not self.world.first:
            return
        path = self.path / name
        rows = read_rows(path)
        kept = [row for row in rows if isinstance(row.get("step"), int) and row["step"] <= step]
        checkpoint.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; a last line cut off by a kill is passed over, a missing file is empty."""
    rows = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else []:
        try:
            rows.append(parse_json(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict)]
