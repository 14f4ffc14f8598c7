"""How far a run is: a bar in a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from dreamteacher.runtime.distributed.world import launched


class Progress:
    """A bar with images/s, the fraction of time spent waiting for data, and the time left.

    In a terminal it is a tqdm bar; elsewhere one line about every `every` seconds; nothing unless `shown`.
    """

    def __init__(
        self, total: int, first: int, batch: int, title: str, every: float = 30.0, *, shown: bool = True
    ) -> None:
        self.batch, self.every = batch, every
        self.first, self.step, self.total, self.title = first, first, total, title
        self.start = self.last = time.perf_counter()
        self.waited = 0.0
        terminal = sys.stderr.isatty() and launched().first
        self.bar = tqdm(
            total=total, initial=first, desc=title, unit="step", disable=not (terminal and shown), leave=shown
        )
        self.lines = shown and not terminal

    def wait(self, seconds: float) -> None:
        """Counts seconds in which the loop waited for data."""
        self.waited += seconds

    def rates(self) -> dict[str, float]:
        """Images per second, fraction of data waits and seconds, since the start of this process's part."""
        seconds = max(1e-9, time.perf_counter() - self.start)
        return {
            "images_per_s": round((self.step - self.first) * self.batch / seconds, 2),
            "data_wait": round(self.waited / seconds, 4),
            "seconds": round(seconds, 2),
        }

    def advance(self, step: int) -> None:
        """Moves to `step`, the number of steps that are done; says nothing."""
        self.bar.update(step - self.step)
        self.step = step

    def update(self, step: int, said: str = "") -> None:
        """Moves to `step`, and says so where it is time, with the newest losses in words (`said`)."""
        self.advance(step)
        now = time.perf_counter()
        late = self.lines and (now - self.last > self.every or step == self.total)
        if self.bar.disable and not late:
            return
        rates = self.rates()
        speed = (
            f"{rates['images_per_s']:.0f} images/s, data wait {rates['data_wait']:.0%}" if self.batch else ""
        )
        text = ", ".join(filter(None, (speed, said)))
        self.bar.set_postfix_str(text, refresh=False)
        if late:
            left = (self.total - step) * rates["seconds"] / max(1, step - self.first)
            print(f"{self.title}: step {step}/{self.total}, {text}, {left:.0f} s left", flush=True)
            self.last = now

    def close(self) -> None:
        """Ends the bar's line."""
        self.bar.close()
