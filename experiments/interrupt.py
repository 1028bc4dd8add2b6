"""Stopping cleanly: signals set a flag, and the work looks at it where its state is safe on disk."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AGAIN = {signal.SIGINT: "press Ctrl-C again", signal.SIGTERM: "send it again"}

Announce = Callable[[str], object]


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
def stop_on_signals(announce: Announce = lambda _: None) -> Iterator[StopFlag]:
    """A `StopFlag` tied to SIGINT and SIGTERM; the handlers before it are put back at the end.

    Args:
        announce: told at once that a signal came in and what will happen, from another thread.
    """
    flag = StopFlag()
    with _announced(announce):
        before = {number: signal.signal(number, flag.set) for number in SIGNALS}
        try:
            yield flag
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _announced(announce: Announce) -> Iterator[None]:
    # Python runs a handler only between two steps of the main thread, and there writing is not safe: the signal may
    # have come in the middle of another write. The wakeup descriptor is written to at once, and a thread waits for it.
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    listener = threading.Thread(target=_listen, args=(reader, announce), daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()
        listener.join()
        reader.close()


def _listen(reader: socket.socket, announce: Announce) -> None:
    """Announce the first of `SIGNALS`; the end of the descriptor ends the thread."""
    while received := reader.recv(1):
        if received[0] in SIGNALS:
            number = signal.Signals(received[0])
            announce(
                f"{number.name} received: stopping after the running step (an evaluation, an epoch); "
                f"{_AGAIN[number]} to stop at once"
            )
            return
