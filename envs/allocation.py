"""Plans that follow from measured sensitivities alone, as if what the decisions lose added up."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from latency.cost import CostMeter, CostModel
from latency.predict import LatencyMeter, LatencyModel

from .action import nearest
from .evaluator import Sensitivity
from .space import Bound, Counts, Ratios, SearchSpace

_INFEASIBLE = 2
"""Status of the solver where no choice meets all constraints."""


def losses(space: SearchSpace, sensitivity: Sensitivity, floor: float) -> list[NDArray[np.float64]]:
    """Accuracy that each decision is taken to lose at each rung of its ladder, alone.

    Of a channel group, straight lines through the measured points and through no loss when everything is kept, made to
    fall nowhere as more is taken. A measured loss below ``floor`` counts as that, so that noise sells nothing for free.
    Of a choice inside a layer, `Sensitivity.of_levels`.

    Args:
        space: the decisions.
        sensitivity: of the same decisions.
        floor: smallest loss that counts, see `envs.plans.noise_floor`.

    Returns:
        For each decision an array as long as its ladder, never rising.
    """
    probed = [nearest(np.full(space.n, ratio), space) for ratio in sensitivity.keep_ratios]
    found = []
    for index, ladder in enumerate(space.ladders[: len(space.groups)]):
        points = {int(ladder[-1]): 0.0}
        for column, counts in enumerate(probed):
            if counts[index] < ladder[-1]:
                points[int(counts[index])] = max(float(sensitivity.lost[index, column]), floor)
        counts_at = np.array(sorted(points))
        lost_at = np.maximum.accumulate(np.array([points[count] for count in counts_at])[::-1])[::-1]
        below = ladder[ladder < counts_at[0]]
        lost = np.interp(ladder, counts_at, lost_at)
        # Below the lowest probe the line through it and the origin of no loss goes on.
        slope = lost_at[0] / max(float(ladder[-1] - counts_at[0]), 1.0)
        lost[: len(below)] += slope * (counts_at[0] - below)
        found.append(lost)
    for decision, ladder in zip(space.layers, space.ladders[len(space.groups) :], strict=True):
        found.append(sensitivity.of_levels(decision.name, ladder, decision.size))
    return found


def greedy(space: SearchSpace, lost: list[NDArray[np.float64]]) -> Ratios:
    """Take the step that loses least for what it saves, again and again, until every budget is met.

    A step lowers one decision to any rung below: by a table the next one may take longer, and one farther down less
    time. It saves no more than is lacking. With several budgets that is the sum of the shares that it takes off what
    each budget that is not met yet still lacks.

    Args:
        space: the decisions, with a budget.
        lost: as `losses` gives them.

    Returns:
        Places of shape ``(n,)``, see `SearchSpace.places`.

    Raises:
        ValueError: if the space has no budget.
    """
    _check_bounds(space, "greedy allocation")
    return space.places(_greedy_counts(space, lost))


def _greedy_counts(space: SearchSpace, lost: list[NDArray[np.float64]]) -> Counts:
    rungs = [len(ladder) - 1 for ladder in space.ladders]
    meters = [(bound.cost.meter(space.maximum), bound.limit) for bound in space.bounds]
    prices = [_added_up(bound).meter(space.maximum) for bound in space.bounds]
    taken: list[Counts] = []
    while True:
        over = [
            (price, meter.cost - limit)
            for price, (meter, limit) in zip(prices, meters, strict=True)
            if meter.cost > limit
        ]
        steps = [
            ((lost[index][below] - lost[index][rung]) / saved, index, below)
            for index, (ladder, rung) in enumerate(zip(space.ladders, rungs, strict=True))
            for below in reversed(range(rung))
            if (saved := _saved(over, index, int(ladder[below] - ladder[rung]))) > 0
        ]
        # By a table the least counts need not be the fastest: then no step saves although the budget is not met.
        if not steps:
            break
        _, index, below = min(steps, key=lambda step: step[0])
        units = int(space.ladders[index][below] - space.ladders[index][rungs[index]])
        for each in (*prices, *(meter for meter, _ in meters)):
            each.keep_more(index, units)
        rungs[index] = below
        taken.append(np.array([ladder[rung] for ladder, rung in zip(space.ladders, rungs, strict=True)]))
    # The first of them that a table has room for once no larger count is faster; by counted costs, the last.
    first = bisect.bisect_left(taken, True, key=lambda counts: space.fits(space.widened(counts)))
    return taken[min(first, len(taken) - 1)] if taken else space.maximum


def _saved(over: Sequence[tuple[CostMeter | LatencyMeter, int]], index: int, units: int) -> float:
    """Shares of what budgets lack that a step of one decision takes off, added up; a step too far takes off all."""
    return sum(min((price.cost - price.with_more(index, units)) / lacking, 1.0) for price, lacking in over)


def knapsack(space: SearchSpace, lost: list[NDArray[np.float64]]) -> Ratios:
    """The least sum of losses that meets every budget, by an integer program over one choice of each decision.

    The program adds up what each decision saves alone, a constraint for each budget. Two that share a layer save less
    together, so that the sums asked for are raised until the plan meets the budgets by its true costs. That is exact
    where savings add up; where bits of one layer multiply, the greedy plan may lose less, and is then taken.

    Args:
        space: the decisions, with a budget.
        lost: as `losses` gives them.

    Returns:
        Places of shape ``(n,)``, see `SearchSpace.places`.

    Raises:
        ValueError: if the space has no budget.
    """
    _check_bounds(space, "the knapsack")
    # With nothing taken away; in bytes that is more than the dense network, which needs no places and scales.
    full = [bound.cost(space.maximum) for bound in space.bounds]
    saved = [_saved_alone(bound, space) for bound in space.bounds]
    low = np.array([f - bound.limit for f, bound in zip(full, space.bounds, strict=True)], dtype=np.float64)
    high = np.array([sum(choices.max() for choices in each) for each in saved], dtype=np.float64)
    tolerance = np.array([0.01 * bound.cost.dense for bound in space.bounds])
    counts = space.minimum
    # The truth lies between the savings added up and all of them: halve the intervals until they are no wider than 1 %.
    asked = low.copy()
    while True:
        tried = _choose(space.ladders, saved, lost, np.minimum(asked, high))
        is_over = np.zeros(len(space.bounds), dtype=bool)
        if tried is None:
            # No plan saves as much of all at once.
            high = np.minimum(asked, high)
        else:
            kept = space.widened(tried)
            is_over = np.array([bound.cost(kept) > bound.limit for bound in space.bounds])
            if is_over.any():
                low = np.where(is_over, asked, low)
            else:
                counts, high = tried, asked
        is_open = high - low > tolerance
        if not (is_open & is_over).any() and (is_over.any() or not is_open.any()):
            greedily = _greedy_counts(space, lost)
            fitting = [each for each in (counts, greedily) if space.fits(space.widened(each))] or [counts]
            return space.places(min(fitting, key=lambda each: _loss_of(space, lost, each)))
        # What is kept already is asked for again as it was, until all are kept.
        asked = np.where(is_over if is_over.any() else is_open, (low + high) / 2, asked)


def _loss_of(space: SearchSpace, lost: list[NDArray[np.float64]], counts: Counts) -> float:
    """What the choices of a plan lose, added up."""
    rungs = (int(np.searchsorted(ladder, count)) for ladder, count in zip(space.ladders, counts, strict=True))
    return math.fsum(of_choices[rung] for of_choices, rung in zip(lost, rungs, strict=True))


def _saved_alone(bound: Bound, space: SearchSpace) -> list[NDArray[np.int64]]:
    """What each choice of each decision alone saves of one budget."""
    meter = _added_up(bound).meter(space.maximum)
    full = meter.cost
    return [
        np.array([full - meter.with_more(index, int(count - ladder[-1])) for count in ladder])
        for index, ladder in enumerate(space.ladders)
    ]


def _added_up(bound: Bound) -> CostModel | LatencyModel:
    """The cost that decisions are compared by, one at a time: without what integers cost for being among floats.

    A layer that alone is in integers saves less than it is converted for, and all of them save a lot.
    """
    cost = bound.cost
    return cost.without_conversions if isinstance(cost, LatencyModel) else cost


def _choose(
    ladders: Sequence[Counts],
    saved: list[list[NDArray[np.int64]]],
    lost: list[NDArray[np.float64]],
    at_least: NDArray[np.float64],
) -> Counts | None:
    """One count of each ladder: the cheapest that save ``at_least`` of each budget in all; None if none do."""
    sizes = [len(ladder) for ladder in ladders]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    one_each = np.zeros((len(sizes), starts[-1]))
    for row, (start, size) in enumerate(zip(starts, sizes, strict=False)):
        one_each[row, start : start + size] = 1
    scale = np.maximum(at_least, 1.0)
    savings = np.stack([np.concatenate(each) for each in saved])
    solution = milp(
        np.concatenate(lost),
        integrality=np.ones(starts[-1]),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            # The last digit of the largest sum would be lost in the solver's tolerance.
            LinearConstraint(savings / scale[:, None], at_least / scale - 1e-9, np.inf),
        ],
        options={"mip_rel_gap": 1e-4},
    )
    if solution.x is None:
        assert solution.status == _INFEASIBLE, solution.message
        return None
    picks = [int(np.argmax(solution.x[start : start + size])) for start, size in zip(starts, sizes, strict=False)]
    return np.array([ladder[pick] for ladder, pick in zip(ladders, picks, strict=True)], dtype=np.int64)


def _check_bounds(space: SearchSpace, what: str) -> None:
    if not space.bounds:
        msg = f"{what} needs a budget to stop at; build the search space with one"
        raise ValueError(msg)
