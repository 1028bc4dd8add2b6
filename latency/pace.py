"""Times that are read while nothing else keeps the processor busy, as far as the pace of one layer tells.

Other programs slow kernels unequally, those of other virtual machines on the same core or cache too, which no counter
of this machine shows: where a convolution in floats took a quarter longer, ResNet-56 in integers took three quarters
longer. A ratio of two networks does not hold then, however many rounds it is the median of.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

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
        busy: readings that were taken though the layer was slow in all tries.
        readings: all of them.
    """

    least_ns: float = math.inf
    busy: int = 0
    readings: int = 0

    def quietest(self, read: Callable[[], tuple[_T, float]]) -> _T:
        """The first of `MOST_TRIES` readings in whose rounds the reference layer was fast, else the least disturbed.

        A layer that stays slow is taken to have become so: what follows is not waited for.

        Args:
            read: reads something, and the median time of the reference layer meanwhile, in nanoseconds.
        """
        self.readings += 1
        tries: list[tuple[_T, float]] = []
        for attempt in range(MOST_TRIES):
            if attempt:
                time.sleep(PAUSE_S)
            tries.append(read())
            best, slowness = min(tries, key=lambda one: one[1])
            self.least_ns = min(self.least_ns, slowness)
            if slowness <= BUSY * self.least_ns:
                return best
        self.busy += 1
        self.least_ns = slowness
        return best

    @property
    def warning(self) -> str:
        """What to tell of readings that were disturbed; empty if none was."""
        if not self.busy:
            return ""
        return (
            f"warning: something else kept the processor busy in {self.busy} of {self.readings} readings, however "
            "often they were repeated; times are less exact for it"
        )
