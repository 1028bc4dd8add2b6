"""Times that are read while nothing else keeps the processor busy, as far as the pace of one layer tells.

Other programs slow kernels unequally, those of other virtual machines on the same core or cache too, which no counter
of this machine shows: where a convolution in floats took a quarter longer, ResNet-56 in integers took three quarters
longer. A ratio of two networks does not hold then, however many rounds it is the median of.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from .runtimes import LatencyError

_T = TypeVar("_T")

BUSY = 1.05
"""Time of the reference layer, over its least, from which something else kept the processor busy. From one quiet
reading to the next it varied by 2 %; in two of six it took 1.11 and 1.24 times as long."""
MOST_TRIES = 4
"""Readings of the same, of which the quietest is taken where none is quiet."""
PAUSE_S = 1.0
"""Seconds between two of them: what keeps a processor busy mostly does so for a while."""


@dataclass
class Pace:
    """How fast the reference layer of a table runs where nothing else does.

    Attributes:
        least_ns: its least median time so far.
        waited_for_ns: what readings are repeated for; more than the least where that was not met again.
        busy: readings in which the layer was slow.
        readings: all of them.
    """

    least_ns: float = math.inf
    waited_for_ns: float = field(init=False)
    busy: int = 0
    readings: int = 0

    def __post_init__(self) -> None:
        self.waited_for_ns = self.least_ns

    def quietest(self, read: Callable[[], tuple[_T, float]]) -> _T:
        """The first of `MOST_TRIES` readings in whose rounds the reference layer was fast, else the least disturbed.

        A layer that stays slow is taken to have become so: what follows is not waited for. What fails in a later try
        does not undo the ones before.

        Args:
            read: reads something, and the median time of the reference layer meanwhile, in nanoseconds.
        """
        tries = [self._seen(read())]
        while (best := min(tries, key=lambda one: one[1]))[1] > BUSY * self.waited_for_ns and len(tries) < MOST_TRIES:
            time.sleep(PAUSE_S)
            try:
                tries.append(self._seen(read()))
            except LatencyError:
                break
        found, slowness = best
        self.readings += 1
        self.busy += slowness > BUSY * self.least_ns
        if slowness > BUSY * self.waited_for_ns and len(tries) == MOST_TRIES:
            self.waited_for_ns = slowness
        return found

    def _seen(self, reading: tuple[_T, float]) -> tuple[_T, float]:
        self.least_ns = min(self.least_ns, reading[1])
        self.waited_for_ns = min(self.waited_for_ns, reading[1])
        return reading

    @property
    def warning(self) -> str:
        """What to tell of readings that were disturbed; empty if none was."""
        if not self.busy:
            return ""
        return (
            f"warning: in {self.busy} of {self.readings} readings the processor was slower than at its best, however "
            "often they were repeated: something else kept it busy, or its clock is slower now; times are less exact"
        )
