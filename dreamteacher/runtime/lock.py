"""Locks between processes: a file that one holds at a time, on every system."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from dreamteacher.runtime.errors import UserError


def take_lock(path: Path, patience: float = 0.0) -> BaseFileLock | None:
    """Makes and locks a file of no content; None when another holder keeps it for `patience` seconds (< 0: ever).

    It is held until its `release`, or the end of the process. The file stays: were it deleted, one process that has
    opened it already and one that makes it anew would both hold "the" lock.

    Raises:
        UserError: when the disk cannot lock.
    """
    lock = FileLock(path, timeout=patience, thread_local=False)
    try:
        lock.acquire(poll_interval=0.1)
    except Timeout:
        return None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
            raise
        raise UserError(
            f"The disk of '{path.parent}' cannot lock files.", "Choose a place on another disk."
        ) from None
    return lock


@contextmanager
def locked(path: Path, busy: UserError | None = None) -> Iterator[None]:
    """Within: this process alone holds the lock file `path`, in a folder that exists.

    with locked(folder / ".lock", UserError("Another process writes here.", "Wait for it.")):
        ...

    Args:
        busy: raised at once when another process holds it; None: waits for it.
    """
    lock = take_lock(path, -1 if busy is None else 0)
    if lock is None:
        assert busy is not None
        raise busy
    try:
        yield
    finally:
        lock.release()
