"""Signals that save instead of losing; only for programs that ask for it, as the command line does."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

_WANTED: ContextVar[bool] = ContextVar("signals are handled", default=False)


@contextmanager
def signals_handled() -> Iterator[None]:
    """Within: `Signals` installs its handlers. Without it, as from Python, Ctrl-C stays a KeyboardInterrupt."""
    token = _WANTED.set(True)
    try:
        yield
    finally:
        _WANTED.reset(token)


class Signals:
    """Within this context SIGINT and SIGTERM only set `.number`: the loop saves and exits with 128 + n.

    Where nobody asked for it by `signals_handled`, nothing is installed, and `.number` stays 0.
    """

    def __init__(self) -> None:
        self.number = 0
        self._old: dict[int, Any] = {}
        self._held: list[int] | None = None  # interrupts that came while they were held back

    @property
    def installed(self) -> bool:
        """Whether handlers are in place, or were until now."""
        return bool(self._old)

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM) if _WANTED.get() else ():
            self._old[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # torchrun passes on what the process got as well
            signal.signal(number, self._old[number])  # a second one acts at once

    def hold(self) -> None:
        """From here to `release` Ctrl-C waits, where it would raise KeyboardInterrupt."""
        plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if plain and threading.current_thread() is threading.main_thread():
            held: list[int] = []
            self._held = held
            signal.signal(signal.SIGINT, lambda number, _: held.append(number))

    def release(self, raises: bool = True) -> None:
        """Ctrl-C acts at once again.

        Raises:
            KeyboardInterrupt: when it came meanwhile.
        """
        held, self._held = self._held, None
        if held is not None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if held and raises:
            raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        self.release(raises=False)
        for number, handler in self._old.items():
            signal.signal(number, handler)
