"""Progress of a run: what runs, what it costs, when it ends; bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

WARNING = "warning: "
"""How a line begins that warns."""
_FIRST_TOLD, _TOLD_EVERY = 60.0, 600.0
"""Seconds until the time left is told where there are no bars, and between one such line and the next."""
Say = Callable[[str], None]
"""Takes a line of text about how far something is."""


class Workload:
    """How much of a run is left, from the mean seconds that each kind of work took so far."""

    def __init__(self, planned: dict[str, float]) -> None:
        """Plan so many units of each kind of work (``{"evaluation": 900, "epoch": 12}``)."""
        self._left = dict(planned)
        self._seconds = dict.fromkeys(planned, 0.0)
        self._done = dict.fromkeys(planned, 0.0)

    def record(self, kind: str, units: float, seconds: float) -> None:
        """Count ``units`` of work as done in ``seconds``; units that took no time do not lower the mean."""
        self._left[kind] = max(0.0, self._left.get(kind, 0.0) - units)
        if seconds > 0:
            self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds
            self._done[kind] = self._done.get(kind, 0.0) + units

    def seconds_each(self, kind: str) -> float | None:
        """Mean seconds of a unit, None before the first."""
        return self._seconds[kind] / self._done[kind] if self._done.get(kind) else None

    def seconds_left(self) -> float | None:
        """Seconds that the rest will take; None before anything was timed.

        A kind of work that was not timed yet is taken to cost what the dearest other kind does.
        """
        each = {kind: seconds for kind in self._left if (seconds := self.seconds_each(kind)) is not None}
        if not each:
            return None
        return sum(left * each.get(kind, max(each.values())) for kind, left in self._left.items())


class Stage:
    """One step of a run on the display."""

    def __init__(self, display: RunDisplay, title: str, total: float, kind: str) -> None:
        self._display = display
        self._title = title
        self._total = total
        self._kind = kind
        self._started = self._last = time.perf_counter()
        self._done = 0.0
        self._note = ""
        self._task = display.add_bar(title, total)

    def advance(self, units: float = 1.0, seconds: float | None = None, note: str = "") -> None:
        """Move on.

        Args:
            units: how far.
            seconds: what these units cost, which a replay does not show; the time since the last call if not given.
            note: shown beside the bar: the best result so far, the loss.
        """
        now = time.perf_counter()
        self._display.workload.record(self._kind, units, now - self._last if seconds is None else seconds)
        self._last, self._done, self._note = now, self._done + units, note or self._note
        each = self._display.workload.seconds_each(self._kind)
        cost = f"{each:.2f} s an {self._kind}" if each is not None else ""
        self._display.move_bar(self._task, self._done, self._total, f"{cost}  {self._note}")
        if self._task is None:
            self._display.tell_left(f"{self._title}: {self._done:.4g} of {count(self._total, self._kind)}")

    def finish(self) -> None:
        """Take the bar away and leave one line that tells what was done."""
        seconds = time.perf_counter() - self._started
        note = f", {self._note}" if self._note else ""
        self._display.remove_bar(self._task)
        self._display.say(f"{self._title}: {count(self._done, self._kind)} in {duration(seconds)}{note}")


class RunLog:
    """A file to which lines are appended, each with its time.

    Attributes:
        file: made with the first line.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def write(self, text: str) -> None:
        """Append a line."""
        with self.file.open("a") as file:
            file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n")

    def warnings(self) -> tuple[str, ...]:
        """The warnings among the lines, each once."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        said = (line.partition(" ")[2] for line in lines)
        return tuple(dict.fromkeys(text.removeprefix(WARNING) for text in said if text.startswith(WARNING)))


class _ToLog(logging.Handler):
    """Writes warnings of modules as the terminal shows them."""

    def __init__(self, log: RunLog) -> None:
        super().__init__(logging.WARNING)
        self._to = log

    def emit(self, record: logging.LogRecord) -> None:
        """Write one."""
        self._to.write(f"{WARNING}{record.getMessage()}")


class RunDisplay:
    """Where a run tells its progress: bars on a terminal, a line a stage elsewhere, nothing when quiet."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        """Write to ``console`` (standard error if none), or nowhere if ``quiet``."""
        self.console = console or Console(stderr=True, highlight=False, quiet=quiet)
        self.workload = Workload({})
        self._bars: Progress | None = None
        self._overall: TaskID | None = None
        self._started = time.perf_counter()
        self._tells_next = self._started + _FIRST_TOLD
        self._log: RunLog | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal and not self.console.quiet:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[count]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
                transient=True,
            )
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()
        self._bars = None

    def plan(self, planned: dict[str, float]) -> None:
        """Say what the run will do in all, so that its end can be told."""
        self.workload = Workload(planned)
        if self._bars:
            self._overall = self._bars.add_task("whole run", total=None, count="", note="")

    def say(self, text: str, *, is_kept: bool = True) -> None:
        """One line of its own; in the log too, unless it is not to be kept."""
        self.console.print(text, markup=False, soft_wrap=True)
        if self._log and is_kept:
            self._log.write(text)

    @contextmanager
    def kept_in(self, log: RunLog) -> Iterator[None]:
        """Write what is said meanwhile to a log too, also where the display is quiet, and warnings of modules."""
        outer, self._log = self._log, log
        handler = _ToLog(log) if outer is None else None
        if handler:
            logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            self._log = outer
            if handler:
                logging.getLogger().removeHandler(handler)

    @contextmanager
    def stage(self, title: str, total: float, kind: str) -> Iterator[Stage]:
        """A step of ``total`` units of one kind of work (``"evaluation"``, ``"epoch"``)."""
        stage = Stage(self, title, total, kind)
        try:
            yield stage
        finally:
            stage.finish()

    def add_bar(self, title: str, total: float) -> TaskID | None:
        """A bar at the bottom of the terminal; None on a plain console."""
        if self._bars:
            return self._bars.add_task(title, total=total, count=f"0/{total:g}", note="")
        return None

    def move_bar(self, task: TaskID | None, done: float, total: float, note: str) -> None:
        """Show the progress of one bar and of the whole run."""
        if self._bars is None or task is None:
            return
        self._bars.update(task, completed=done, count=f"{done:g}/{total:g}", note=note)
        left = self.workload.seconds_left()
        if self._overall is not None and left is not None:
            spent = time.perf_counter() - self._started
            self._bars.update(self._overall, completed=spent, total=spent + left, note=f"{duration(left)} left")

    def tell_left(self, done: str) -> None:
        """Where there are no bars, a line now and then of what is done, and how long what was planned will take yet."""
        left, now = self.workload.seconds_left(), time.perf_counter()
        if left and now > self._tells_next:
            self._tells_next = now + _TOLD_EVERY
            self.say(f"{done}; about {duration(left)} left of the run", is_kept=False)

    def remove_bar(self, task: TaskID | None) -> None:
        """Take a finished stage's bar away."""
        if self._bars and task is not None:
            self._bars.remove_task(task)


def duration(seconds: float) -> str:
    """Seconds as a person reads them: ``8.3 s``, ``4 min 10 s``, ``2 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def count(number: float, noun: str) -> str:
    """A number of things: ``1 epoch``, ``2.5 evaluations``."""
    return f"{number:g} {noun}" if number == 1 else f"{number:g} {noun}s"
