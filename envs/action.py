"""From an action to a plan: keep ratios, densities and bits, rounding and the budgets, all of it here only."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import ArrayLike

from latency.cost import CostModel
from pruning.policy import CompressionPolicy

from .space import Counts, Ratios, SearchSpace

_HALVINGS = 8
"""Of the range of shifts: to 1/256 of it. `fill` spends what that leaves."""


def decode(action: ArrayLike, space: SearchSpace) -> CompressionPolicy:
    """The plan that an action of shape ``(n,)`` in ``[-1, 1]`` stands for; see `counts_of`."""
    return space.policy(counts_of(action, space))


def start_plan(space: SearchSpace) -> Counts:
    """The plan that an action of zeros stands for, shape ``(n,)``."""
    return counts_of(np.zeros(space.n), space)


def counts_of(action: ArrayLike, space: SearchSpace, base: Ratios | None = None) -> Counts:
    """Count of each decision, shape ``(n,)``.

    With budgets, decisions stand at the places ``base + span * action + shift`` (see `SearchSpace.places`), no farther
    than their ladders go, where one ``shift`` for all is found so that each budget is met (`project`). Without any, an
    action of -1 keeps the least, 1 keeps everything, and ``base`` is added.

    Args:
        action: shape ``(n,)``; clipped to ``[-1, 1]``.
        space: what may be chosen.
        base: offsets of places, shape ``(n,)``, that the action moves; the space's prior if not given.

    Raises:
        ValueError: if the action has another shape or holds NaN or infinity.
    """
    scores = np.clip(space.checked(action, "action"), -1, 1)
    base = space.prior if base is None else base
    if space.bounds:
        return project(base + space.span * scores, space)
    return nearest(base + space.middle + scores * space.reach, space)


def project(base: Ratios, space: SearchSpace) -> Counts:
    """The plan closest in shape to the places ``base + shift`` that spends the budgets to the last rounding step.

    Where costs are counted, ``shift`` is the largest at which the unrounded plan meets every budget. A table knows no
    unrounded plans, and its costs need not fall with the shift: there it is one found by halving, at which the rounded
    plan does after `SearchSpace.widened`. `fill` spends what is left, and what one budget leaves of another goes to the
    decisions that the first does not count.

    Returns:
        Units of each group, shape ``(n,)``: at or under every budget, and no larger count of any one decision fits.
    """
    assert space.bounds
    if space.has_one_plan:
        return space.maximum.copy()
    if space.timed is None:
        wanted = _at(_largest_shift(base, space), base, space)
        return fill(rounded_down(wanted, space), wanted, space)
    return fill(*_timed_plan(base, space), space)


def _at(shift: float, base: Ratios, space: SearchSpace) -> Ratios:
    """What each decision keeps without rounding."""
    return np.asarray(space.kept_at(base + shift) * space.sizes)


def rounded_down(wanted: Ratios, space: SearchSpace) -> Counts:
    """The largest counts of the ladders that are at most ``wanted``, else the least ones; shape ``(n,)``."""
    # A float error below its lowest rung must not take a decision to the last one, at -1.
    pairs = zip(space.ladders, wanted, strict=True)
    floored = [ladder[max(int(np.searchsorted(ladder, w, side="right")) - 1, 0)] for ladder, w in pairs]
    return np.array(floored, dtype=np.int64)


def nearest(places: Ratios, space: SearchSpace) -> Counts:
    """The allowed counts nearest to the places, shape ``(n,)``; the budget is not looked at."""
    wanted = space.kept_at(places) * space.sizes
    pairs = zip(space.ladders, wanted, strict=True)
    return np.array([ladder[np.argmin(np.abs(ladder - w))] for ladder, w in pairs], dtype=np.int64)


def fill(counts: Counts, wanted: Ratios, space: SearchSpace) -> Counts:
    """Add rounding steps, the group farthest below ``wanted`` (in steps) first, until none fits.

    By a table a wider layer may be the faster one, as where its channels fill whole vectors: a group whose next step
    does not fit takes the next count above that does.

    Args:
        counts: plan at or under every budget, shape ``(n,)``.
        wanted: units that each group would keep without rounding, shape ``(n,)``.
        space: what may be chosen, with a budget.
    """
    assert space.bounds
    filled, meters = counts.tolist(), space.meters(counts)
    may_fall = space.timed is not None
    queue: list[tuple[float, int, int]] = []

    def offer(index: int) -> None:
        now, above = filled[index], space.next_rung(index, filled[index])
        if above > now:
            heapq.heappush(queue, ((now - float(wanted[index])) / (above - now), index, above))

    is_changed = True
    while is_changed:
        is_changed = False
        for index in range(space.n):
            offer(index)
        while queue:
            _, index, above = heapq.heappop(queue)
            # A counted cost never falls when a group grows: a step that does not fit now never will, nor a larger one.
            higher = space.ladders[index][space.ladders[index] >= above].tolist() if may_fall else [above]
            fitting = (count for count in higher if meters.fit_with_more(index, count - filled[index]))
            if (count := next(fitting, None)) is not None:
                meters.keep_more(index, count - filled[index])
                filled[index] = count
                offer(index)
                # A table may say that it falls: then what was dropped is offered again.
                is_changed = may_fall
    return np.array(filled, dtype=np.int64)


def _shifts(base: Ratios, space: SearchSpace) -> tuple[float, float]:
    """The shifts at which every decision has reached its lowest place, and its highest."""
    lowest, highest = space.ends
    return float(np.min(lowest - base)), float(np.max(highest - base))


def _largest_shift(base: Ratios, space: SearchSpace) -> float:
    """Largest shift at which the unrounded plan meets every counted budget, by bisection into 64 parts at a time."""
    low, high = _shifts(base, space)
    costs = [(bound.cost, bound.limit) for bound in space.bounds if isinstance(bound.cost, CostModel)]
    for _ in range(5):
        shifts = np.linspace(low, high, 65)
        ratios = space.kept_at(base + shifts[:, None])
        fits = np.flatnonzero(np.all([cost.of_ratios(ratios) <= limit for cost, limit in costs], axis=0))
        # The lowest shift keeps the least of every group, which was checked to fit; float error may deny it.
        best = int(fits[-1]) if len(fits) else 0
        low, high = float(shifts[best]), float(shifts[min(best + 1, 64)])
    return low


def _timed_plan(base: Ratios, space: SearchSpace) -> tuple[Counts, Ratios]:
    """A widened plan that meets every budget, at a large shift, and what its decisions would keep unrounded.

    The fastest plan known, if none is found: single changes need not lead to it.
    """
    low, high = _shifts(base, space)
    counts, wanted = space.fastest, _at(low, base, space)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        unrounded = _at(middle, base, space)
        plan = space.widened(rounded_down(unrounded, space))
        if space.fits(plan):
            low, counts, wanted = middle, plan, unrounded
        else:
            high = middle
    return counts, wanted
