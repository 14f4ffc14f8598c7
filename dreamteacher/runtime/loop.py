"""The one loop of everything that trains: order, progress, log, checkpoints, signals, the guard against NaN, resume.

with Loop(run, resume=run.open(settings), ...) as loop:
    for step in loop:
        losses = ...                      # named scalars
        sum(losses.values()).backward()
        loop.meter.add(step, losses)
        with loop.update():
            optimizer.step()
        if loop.due(log_every):
            loop.log(lambda means: means)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.distributed.group import Told
from dreamteacher.runtime.distributed.world import ALONE
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.loggers import Logger, open_loggers
from dreamteacher.runtime.meter import Means, Meter
from dreamteacher.runtime.progress import Progress
from dreamteacher.runtime.run_folder import RunDir
from dreamteacher.runtime.settings import LoggerName
from dreamteacher.runtime.signals import Signals

FORMAT = 2  # of checkpoints; those of version 0.1 have none


class Undoable(Protocol):
    """What a step changes before its update, and how to go back."""

    def note(self) -> None:
        """Remembers the state before a step."""

    def undo(self) -> None:
        """Goes back to it."""


class Loop:
    """Steps from the last checkpoint to the last one, with all that surrounds them.

    A step has two halves: what comes before `update` leaves the weights as they were, and can be undone; `update`
    changes them. So a KeyboardInterrupt saves the state before or after a step, never one in between: from the update
    on it waits for the end of the step.

    Args:
        run: open and locked, and whose processes take part; None: nothing is written, and this one is alone.
        title: what is trained, as the verb is called; checkpoints of another kind are refused.
        steps: in all; batch: images of each, 0 where nobody counts them.
        state: tensors and JSON values from which training goes on (all processes call it).
        restore: puts them back; the path is for messages.
        resume: the checkpoint to go on from.
        meter: what is measured; the loop adds nothing to it.
        undo: what a step changes before its update.
        save_every, save_minutes: steps and minutes between checkpoints; 0: never. The last step is always saved.
        keep: checkpoints kept.
        advice: what to do when a watched scalar of this name is not finite.
        log_to: services that the log also goes to; log_at: the folder of their files, if not the run's.
        guard_each: whether every step is looked at for what is not finite: where reading costs nothing.
        shown: whether progress is shown.
    """

    def __init__(
        self,
        run: RunDir | None,
        *,
        title: str,
        steps: int,
        batch: int,
        state: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]],
        restore: Callable[[Mapping[str, Tensor], Mapping[str, Any], Path], None],
        resume: Path | None = None,
        meter: Meter | None = None,
        undo: Undoable | None = None,
        save_every: int = 0,
        save_minutes: float = 0.0,
        keep: int = 1,
        advice: Callable[[str], str] = lambda name: "Lower the learning rate, or use --precision float32.",
        log_to: Sequence[LoggerName] = (),
        log_at: Path | None = None,
        guard_each: bool = False,
        shown: bool = True,
    ) -> None:
        self.run, self.title, self.steps, self.batch = run, title, steps, batch
        self.world = ALONE if run is None else run.world  # one alone of several trains alone
        self.meter = Meter(world=self.world) if meter is None else meter
        self.first = 0  # steps that are done when it begins
        self._state, self._restore, self._resume, self._undo = state, restore, resume, undo
        self._every, self._minutes, self._keep = save_every, save_minutes, keep
        self._advice, self._log_to, self._log_at = advice, log_to, log_at
        self._guard_each, self._shown = guard_each, shown
        self._signals, self._told = Signals(), Told(self.world)
        self._loggers: list[Logger] = []
        self._said = ""
        self._step = 0  # the one in progress
        self._whole: int | None = (
            None  # steps whose state is in memory, all of it and no more; None: within a step
        )
        self._begun = False

    # --- begin and end ---------------------------------------------------------------------------------------

    def __enter__(self) -> Loop:
        if self._resume is not None:
            self.first = self._read(self._resume)
        self._step, self._whole = self.first, self.first
        if self.run is not None and self.world.first:
            settings = (self.run.config() or {}).get("config", {}) if self._log_to else {}
            self._loggers = open_loggers(self._log_to, self._log_at or self.run.path, settings)
        self.progress = Progress(self.steps, self.first, self.batch, self.title, shown=self._shown)
        self._saved_at, self._saved = time.monotonic(), self.first
        if self.run is not None:
            self._signals.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None and issubclass(kind, KeyboardInterrupt):
                self._interrupted()
        finally:
            self._signals.__exit__()
            self.progress.close()
            if kind is None:
                self._told.close()
            for logger in self._loggers:
                logger.close()

    def _read(self, path: Path) -> int:
        """Restores a checkpoint; returns its step."""
        tensors, meta = checkpoint.load(path)
        if meta.get("kind") != self.title:
            raise UserError(f"'{path}' is a checkpoint of '{meta.get('kind')}'.", "Choose another --out.")
        if meta.get("format") != FORMAT:
            raise UserError(
                f"'{path}' was written by another version of dreamteacher.",
                "Start anew: choose another --out. Or resume it with the version that wrote it.",
            )
        self._restore(tensors, meta, path)
        self.meter.unpack(tensors, meta["meter"])
        assert self.run is not None
        for name in ("metrics.jsonl", "timing.jsonl"):
            self.run.rewind(name, meta["step"])
        if self._shown:
            print(f"Resuming from step {meta['step']} of {self.steps}.", flush=True)
        return int(meta["step"])

    # --- steps -----------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[int]:
        for step in range(self.first, self.steps):
            self._step = step
            self._note()
            yield step
            self._finish(step + 1)

    def _note(self) -> None:
        self._begun = False
        self.meter.note()
        if self._undo is not None:
            self._undo.note()
        self._begun = True

    def _undo_step(self) -> None:
        self.meter.undo()
        if self._undo is not None:
            self._undo.undo()

    @contextlib.contextmanager
    def update(self) -> Iterator[None]:
        """Around what changes weights: from here to its end a step cannot be undone, nor interrupted."""
        self._signals.hold()
        self._whole, self._begun = None, False
        yield

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps (0: only at the end) does so after this one."""
        done = self._step + 1
        return done == self.steps or bool(every and done % every == 0)

    def late(self) -> bool:
        """Whether the last checkpoint is old enough for another."""
        return bool(self._minutes) and time.monotonic() - self._saved_at >= 60 * self._minutes

    def _finish(self, done: int) -> None:
        """After a step: progress, the guard, checkpoint, signals."""
        self.progress.update(done, self._said)
        stop, late = self._told(self._signals.number, self.run is not None and self.late())
        last = done == self.steps
        save = self.run is not None and (last or stop or late or (self._every and done % self._every == 0))
        if save or self._guard_each:
            self._guard()
        self._whole = done
        self._signals.release()
        if save:
            self._save(done)
        if stop and not last:
            self.progress.close()
            self._told.close()
            self._say_stopped(done)
            raise SystemExit(128 + stop)

    # --- log -------------------------------------------------------------------------------------------------

    def log(self, row: Callable[[Means], Mapping[str, Any]], *, shown: Sequence[str] = ("loss",)) -> None:
        """Writes one line of metrics.jsonl and timing.jsonl, and begins the sums anew.

        Args:
            row: makes it, given the meter's means since the last line.
            shown: names that the progress shows, too.

        Raises:
            UserError: when a watched scalar was not finite: which, and at which step.
        """
        self._guard()
        done = self._step + 1
        self.progress.advance(done)
        line = self._line(row(self.meter.means()))
        if self.run is not None:
            self.run.append("metrics.jsonl", line)
            self.run.append("timing.jsonl", {"step": done, **self.progress.rates()})
        self._send(line)
        self._said = ", ".join(f"{name} {line[name]:.4f}" for name in shown if name in line)
        self.meter.zero()

    def add_line(self, row: Mapping[str, Any]) -> None:
        """Writes one more line of metrics.jsonl for this step; the sums stay."""
        line = self._line(row)
        if self.run is not None:
            self.run.append("metrics.jsonl", line)
        self._send(line)

    def _line(self, row: Mapping[str, Any]) -> dict[str, Any]:
        done = self._step + 1
        return {"step": done, **({"images_seen": done * self.batch} if self.batch else {}), **row}

    def _send(self, line: Mapping[str, Any]) -> None:
        numbers = {k: v for k, v in line.items() if k != "step"}
        for logger in self._loggers:
            logger.log(line["step"], numbers)

    # --- checkpoints -----------------------------------------------------------------------------------------

    def _guard(self) -> None:
        """Raises UserError when a watched scalar was not finite. No checkpoint is written past such a step."""
        found = self.meter.bad()
        if found is not None:
            name, step = found
            before = "" if self.run is None else f" {checkpoint.before(self.run.path)}"
            raise UserError(f"The {name} is not finite at step {step}.", self._advice(name) + before)

    def _save(self, done: int) -> None:
        assert self.run is not None
        sums, counts = self.meter.pack()
        tensors, meta = self._state()
        if self.world.first:
            facts = {"format": FORMAT, "kind": self.title, "step": done, "meter": counts, **meta}
            checkpoint.save(checkpoint.checkpoint_path(self.run.path, done), {**tensors, **sums}, facts)
            checkpoint.prune(self.run.path, self._keep)
        self._saved_at, self._saved = time.monotonic(), done

    def _interrupted(self) -> None:
        """Saves before a KeyboardInterrupt goes on, where the state is that of a whole number of steps."""
        if self.run is None or self._signals.installed or self.world.ranks > 1:
            return  # a second signal acts at once
        if self._whole is None:  # by somebody's own handler of signals
            print(f"Interrupted within an update. {checkpoint.before(self.run.path)}", flush=True)
            return
        if self._begun:
            self._undo_step()
        if self._whole > self._saved and self.meter.bad() is None:
            self._save(self._whole)
        self._say_stopped(self._whole)

    def _say_stopped(self, done: int) -> None:
        assert self.run is not None
        print(f"Stopped at step {done} of {self.steps}: saved in '{self.run.path}'.", flush=True)
        print("The same command resumes.", flush=True)


def check_saving(every: int, minutes: float) -> None:
    """Raises UserError for intervals between checkpoints that are below 0, or both 0."""
    if every < 0 or minutes < 0 or not (every or minutes):
        raise UserError(
            f"--save-every {every} and --save-minutes {minutes:g} would save nothing before the end.",
            "Give a number of steps or of minutes above 0.",
        )
