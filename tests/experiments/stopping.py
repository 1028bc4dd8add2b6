"""Ending a run at a chosen step, as a signal would."""

import signal
from collections.abc import Callable

from experiments.interrupt import StopFlag


class StopWhen(StopFlag):
    """Behaves as if a signal came in once ``condition`` holds."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        super().__init__()
        self.condition = condition

    def check(self) -> None:
        if self.condition():
            self.signal_name = signal.Signals(signal.SIGTERM).name
        super().check()


class StopAfter(StopWhen):
    """Behaves as if a signal came in after so many looks."""

    def __init__(self, looks: int) -> None:
        super().__init__(self._is_over)
        self.left = looks

    def _is_over(self) -> bool:
        self.left -= 1
        return self.left < 0
