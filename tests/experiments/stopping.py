"""Ending a run at a chosen step, as a signal would."""

import signal

from experiments.interrupt import StopFlag


class StopAfter(StopFlag):
    """Behaves as if a signal came in after so many looks."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.left = looks

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            self.set(signal.SIGTERM)
        super().check()

    def set(self, signal_number: int, _frame: object = None) -> None:
        self.signal_name = signal.Signals(signal_number).name
