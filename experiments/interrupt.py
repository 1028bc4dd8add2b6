"""Stopping cleanly: signals set a flag, and the work looks at it where its state is safe on disk."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(RuntimeError):
    """The run was asked to stop; everything up to the last evaluation or epoch is saved."""


class StopFlag:
    """Set by SIGINT or SIGTERM, raised as `Interrupted` by the next `check`."""

    def __init__(self) -> None:
        self.signal_name = ""

    def check(self) -> None:
        """Raise `Interrupted` if a signal came in."""
        if self.signal_name:
            raise Interrupted(self.signal_name)

    def set(self, signal_number: int, _frame: FrameType | None = None) -> None:
        """Remember the signal; the second of a kind ends the process as it would without this flag."""
        self.signal_name = signal.Signals(signal_number).name
        signal.signal(signal_number, signal.SIG_DFL if signal_number == signal.SIGTERM else signal.default_int_handler)


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """A `StopFlag` tied to SIGINT and SIGTERM; the handlers before it are put back at the end."""
    flag = StopFlag()
    before = {number: signal.signal(number, flag.set) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
