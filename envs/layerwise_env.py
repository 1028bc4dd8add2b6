"""`secateur/LayerwiseCompression-v0`: one group a step, in network order."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .action import fill
from .episode import CompressionEnv
from .observation import Observation
from .space import Counts


class LayerwiseEnv(CompressionEnv):
    """Choose how many units each channel group keeps, one group after the other (He et al. 2018, AMC).

    **Action**: ``Box(-1, 1, (1,), float32)``, a score for the present group: its keep ratio (for bits, the share of
    their ladder, `SearchSpace.places`) is that of the start plan plus ``span`` times the score (without a budget: -1
    keeps the least, 1 everything, plus the prior), rounded to the nearest allowed count inside the wall. Scores outside
    the box are clipped. An episode of zeros is the start plan.

    **The wall** has two sides. From above: the later groups at their least (by a table of latency, at their fastest)
    must still fit all budgets. From below: the later groups at their most must not leave room for another step of this
    one. Units left over after the last group are handed out as in `envs.action.fill`, so that the plan meets what the
    whole-network environment meets: at or under every budget, and no further rounding step fits.

    **Observation**: as `NetworkEnv`, with one entry in ``decisions``: the node of the present group (after the last
    step, of the last group). ``keep_ratio`` is that of the start plan for groups not yet decided.

    **Reward**: 0, and at the last step ``reward(accuracy, cost, limit)``.

    **Start**: no group decided. **End**: terminated after the last group; never truncated.

    **info**: ``group`` and ``keep_ratio`` of the group decided; at the last step also what `NetworkEnv` tells.

    **Versions**: v0, first.
    """

    one_decision: ClassVar[bool] = True

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Decide the present group; after the last one, score the plan."""
        index = self._step
        if index >= self.space.n:
            msg = f"the episode is over: all {self.space.n} groups are decided; call reset()"
            raise RuntimeError(msg)
        self._counts[index] = self._decide(index, _own(action))
        self._step += 1
        info: dict[str, Any] = {
            "group": self.space.names[index],
            "keep_ratio": float(self._counts[index] / self.space.sizes[index]),
        }
        reward = 0.0
        if self._step == self.space.n:
            reward, scored = self._finish()
            info |= scored
        return self._observe(), reward, self._step == self.space.n, False, info

    def wall(self, index: int) -> tuple[int, int]:
        """Fewest and most units that group ``index`` may keep, given the groups before it."""
        space = self.space
        least, most = int(space.minimum[index]), int(space.maximum[index])
        if not space.bounds:
            return least, most
        later = np.arange(space.n) > index
        most = self._largest_that_fits(index, np.where(later, space.minimum, self._counts))
        return self._largest_that_fits(index, np.where(later, space.maximum, self._counts)), most

    def _decide(self, index: int, score: float) -> int:
        space = self.space
        places = space.places(self._start) if space.bounds else space.prior + space.middle
        places[index] += score * (space.span if space.bounds else space.reach[index])
        wanted = space.kept_at(places)[index] * space.sizes[index]
        rungs = space.ladders[index]
        low, high = self.wall(index)
        if space.timed is None:
            inside = rungs[(rungs >= low) & (rungs <= high)]
        else:
            fitting = self._that_fit(index)
            inside = fitting[fitting >= low] if (fitting >= low).any() else fitting
        return int(inside[np.argmin(np.abs(inside - wanted))])

    def _that_fit(self, index: int) -> Counts:
        """Counts beside which the later decisions fit, at their fastest or as in the start plan; never none.

        By a table more may take less, and what is fastest beside some counts is not beside others. The rest that let
        the last count in holds one for this decision, too.
        """
        rungs, is_later = self.space.ladders[index], np.arange(self.space.n) > index
        fit = np.zeros(len(rungs), dtype=bool)
        for rest in (self.space.fastest, self._start):
            counts = np.where(is_later, rest, self._counts)
            counts[index] = rungs[0]
            meters = self.space.meters(counts)
            fit |= [meters.fit_with_more(index, int(rung - rungs[0])) for rung in rungs]
        return rungs[fit]

    def _largest_that_fits(self, index: int, others: Counts) -> int:
        """Most units that group ``index`` may keep beside ``others``; its least if none fits."""
        space, least = self.space, int(self.space.minimum[index])
        counts = others.copy()
        counts[index] = least
        meters = space.meters(counts)
        rungs = space.ladders[index]
        fitting, above = 0, len(rungs)
        while above - fitting > 1:
            middle = (fitting + above) // 2
            if meters.fit_with_more(index, int(rungs[middle]) - least):
                fitting = middle
            else:
                above = middle
        return int(rungs[fitting])

    def _finish(self) -> tuple[float, dict[str, Any]]:
        """Hand out what is left, and score the plan."""
        if self.space.bounds:
            self._counts = fill(self._counts, self._counts.astype(np.float64), self.space)
        return self._score()

    def _stage(self) -> tuple[NDArray[np.bool_], NDArray[np.int64], float]:
        n = self.space.n
        return np.arange(n) < self._step, np.array([min(self._step, n - 1)]), self._step / n


def _own(action: NDArray[np.float32]) -> float:
    array = np.asarray(action, dtype=np.float64)
    if array.shape != (1,) or not np.isfinite(array).all():
        msg = f"action is {array.tolist()}; it must be one finite number in [-1, 1]"
        raise ValueError(msg)
    return float(np.clip(array[0], -1, 1))
