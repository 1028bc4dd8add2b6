"""From an action to a plan: keep ratios, rounding and the budget. All clamping and rounding is done here only."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from graph_encoder.network import ChannelGroup, NetworkGraph
from latency.budget import Budget, BudgetError
from latency.cost import CostKind, CostModel
from pruning.policy import CompressionPolicy

WIDE = 128
"""From this many units on, a group is rounded to multiples of `WIDE_ROUNDING` by default."""
WIDE_ROUNDING = 8

Counts = NDArray[np.int64]
Ratios = NDArray[np.float64]


@dataclass(frozen=True)
class SearchSpace:
    """Every plan that may be chosen for one network under one budget; build it with `SearchSpace.build`.

    Attributes:
        graph: the captured network.
        groups: the decisions, in network order: prunable groups that are not protected.
        importance: scores of shape ``(size,)`` by group name, higher is kept longer.
        cost: cost of a plan, over ``groups``.
        budget: what was asked for, or None.
        limit: most that a plan may cost, or None without a budget.
        minimum: fewest units of each group that may stay, shape ``(n,)``.
        step: rounding of each group; it keeps a multiple of this, or everything.
        prior: keep-ratio offsets of the start plan, shape ``(n,)``: the plan of an action of zeros.
        span: how far an action of 1 moves a keep ratio.
    """

    graph: NetworkGraph
    groups: tuple[ChannelGroup, ...]
    importance: Mapping[str, NDArray[np.floating]]
    cost: CostModel
    budget: Budget | None
    limit: int | None
    minimum: Counts
    step: Counts
    prior: Ratios
    span: float = 0.5

    @classmethod
    def build(
        cls,
        graph: NetworkGraph,
        importance: Mapping[str, ArrayLike | Tensor],
        budget: Budget | None,
        *,
        kind: CostKind = "macs",
        prior: ArrayLike | None = None,
        rounding: int | Mapping[str, int] | None = None,
        min_keep_ratio: float = 0.1,
        protect_first: bool = True,
        protected: Collection[str] = (),
        span: float = 0.5,
    ) -> SearchSpace:
        """Choose the decisions and check that the budget can be met.

        The outputs of the last layer are the network's own and are never among the groups.

        Args:
            graph: captured network.
            importance: scores of shape ``(size,)`` for each prunable group, higher is kept longer.
            budget: most that a plan may cost; None to let the reward weigh cost against accuracy.
            kind: what is counted where there is no budget to say it.
            prior: keep-ratio offsets of the start plan, shape ``(n,)``; uniform if not given.
            rounding: units a group keeps are a multiple of this, for all groups or by name; by default 8 where a
                group has 128 units or more, else 1.
            min_keep_ratio: least share of a group that stays; at least one unit always does.
            protect_first: leave the groups dense that the first weighted operator writes.
            protected: names of further groups to leave dense.
            span: how far an action of 1 moves a keep ratio, above 0.

        Raises:
            BudgetError: if the budget cannot be met, with the lowest reachable cost, or is above the dense cost.
            ValueError: if no group is left to decide, or an argument is out of range.
        """
        _check_options(graph, protected, min_keep_ratio, span)
        groups = _decisions(graph, protect_first, protected)
        sizes = np.array([group.size for group in groups], dtype=np.int64)
        step = np.array([_rounding_of(group, rounding) for group in groups], dtype=np.int64)
        least = np.maximum(1, np.ceil(min_keep_ratio * sizes - 1e-9)).astype(np.int64)
        cost = CostModel(graph, budget.kind if budget else kind, [group.name for group in groups])
        space = cls(
            graph=graph,
            groups=groups,
            importance={group.name: _as_scores(importance[group.name]) for group in groups},
            cost=cost,
            budget=budget,
            limit=budget.limit(cost.dense) if budget else None,
            minimum=np.minimum(-(-least // step) * step, sizes),
            step=step,
            prior=np.zeros(len(groups)),
            span=span,
        )
        space._check_reachable()
        return space if prior is None else space.with_prior(prior)

    def with_prior(self, prior: ArrayLike) -> SearchSpace:
        """The same space with another start plan; ``prior`` has shape ``(n,)`` and finite values."""
        return replace(self, prior=self._checked(prior, "prior"))

    @property
    def n(self) -> int:
        """Number of decisions."""
        return len(self.groups)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the decisions."""
        return self.cost.groups

    @property
    def sizes(self) -> Counts:
        """Units of each group in the dense network, shape ``(n,)``."""
        return self.cost.sizes

    @cached_property
    def min_keep_ratio(self) -> Ratios:
        """Least keep ratio of each group, shape ``(n,)``."""
        return self.minimum / self.sizes

    @cached_property
    def ranking(self) -> Mapping[str, NDArray[np.int64]]:
        """Units of each group, most important first; equal scores in their own order."""
        return {name: np.argsort(-scores, kind="stable") for name, scores in self.importance.items()}

    @cached_property
    def lowest_cost(self) -> int:
        """Cost with every group at its least."""
        return self.cost(self.minimum)

    @cached_property
    def start(self) -> Counts:
        """The start plan: what an action of zeros stands for."""
        return counts_of(np.zeros(self.n), self)

    def rungs(self, index: int) -> Counts:
        """Unit counts that group ``index`` may keep, ascending."""
        size, step, least = int(self.sizes[index]), int(self.step[index]), int(self.minimum[index])
        return np.union1d(np.arange(least, size + 1, step), [size])

    def next_rung(self, index: int, count: int) -> int:
        """The next larger count of group ``index``; ``count`` itself at the top."""
        step = int(self.step[index])
        return min((count // step + 1) * step, int(self.sizes[index]))

    def policy(self, counts: Counts) -> CompressionPolicy:
        """The plan that keeps the ``counts[i]`` most important units of group ``i``."""
        cut = {
            group.name: count for group, count in zip(self.groups, counts.tolist(), strict=True) if count < group.size
        }
        return CompressionPolicy(
            kept={name: tuple(np.sort(self.ranking[name][:count]).tolist()) for name, count in cut.items()},
            sizes={name: self.graph.group(name).size for name in cut},
        )

    def _checked(self, values: ArrayLike, what: str) -> Ratios:
        array = np.asarray(values, dtype=np.float64)
        if array.shape != (self.n,):
            msg = f"{what} has shape {array.shape}, but this network has {self.n} decisions; pass shape ({self.n},)"
            raise ValueError(msg)
        if not np.isfinite(array).all():
            bad = int(np.flatnonzero(~np.isfinite(array))[0])
            msg = f"{what} holds {array[bad]} for group '{self.names[bad]}'; every value must be finite"
            raise ValueError(msg)
        return array

    def _check_reachable(self) -> None:
        if self.limit is None or self.lowest_cost <= self.limit:
            return
        kind, dense = self.cost.kind, self.cost.dense
        msg = (
            f"a budget of {self.limit:,} {kind} ({self.limit / dense:.1%} of the dense {dense:,}) cannot be met: with "
            f"every group at its least the network still costs {self.lowest_cost:,} ({self.lowest_cost / dense:.1%}). "
            f"Pass at least {self.lowest_cost:,} {kind}, or lower min_keep_ratio, the rounding or the protection"
        )
        raise BudgetError(msg)


def decode(action: ArrayLike, space: SearchSpace) -> CompressionPolicy:
    """The plan that an action of shape ``(n,)`` in ``[-1, 1]`` stands for; see `counts_of`."""
    return space.policy(counts_of(action, space))


def counts_of(action: ArrayLike, space: SearchSpace, base: Ratios | None = None) -> Counts:
    """Units that each group keeps, shape ``(n,)``.

    With a budget, the keep ratios are ``clip(base + span * action + shift, least, 1)``, where one ``shift`` for all
    groups is found so that the budget is met (`project`). Without one, an action of -1 keeps the least, 1 keeps
    everything, and ``base`` is added.

    Args:
        action: shape ``(n,)``; clipped to ``[-1, 1]``.
        space: what may be chosen.
        base: keep-ratio offsets of shape ``(n,)`` that the action moves; the space's prior if not given.

    Raises:
        ValueError: if the action has another shape or holds NaN or infinity.
    """
    scores = np.clip(space._checked(action, "action"), -1, 1)
    base = space.prior if base is None else base
    if space.limit is not None:
        return project(base + space.span * scores, space)
    ratios = base + (1 + space.min_keep_ratio) / 2 + scores * (1 - space.min_keep_ratio) / 2
    return nearest(ratios, space)


def project(base: Ratios, space: SearchSpace) -> Counts:
    """The plan closest in shape to the ratios ``base + shift`` that spends the budget to the last rounding step.

    ``shift`` is the largest at which the unrounded plan meets the budget. Its ratios are rounded down, and then
    single rounding steps are added, largest remainder first, until none fits.

    Returns:
        Units of each group, shape ``(n,)``: at or under the budget, and no further single step fits.
    """
    assert space.limit is not None
    shift = _largest_shift(base, space.limit, space)
    wanted = np.clip(base + shift, space.min_keep_ratio, 1) * space.sizes
    floored = np.floor(wanted / space.step).astype(np.int64) * space.step
    floored = np.where(wanted >= space.sizes, space.sizes, np.maximum(floored, space.minimum))
    return fill(floored, wanted, space)


def nearest(ratios: Ratios, space: SearchSpace) -> Counts:
    """The allowed counts nearest to the keep ratios, shape ``(n,)``; the budget is not looked at."""
    wanted = np.clip(ratios, space.min_keep_ratio, 1) * space.sizes
    return np.array([_nearest_rung(space.rungs(i), float(w)) for i, w in enumerate(wanted)], dtype=np.int64)


def fill(counts: Counts, wanted: Ratios, space: SearchSpace) -> Counts:
    """Add single rounding steps, the group farthest below ``wanted`` (in steps) first, until none fits.

    Args:
        counts: plan at or under the budget, shape ``(n,)``.
        wanted: units that each group would keep without rounding, shape ``(n,)``.
        space: what may be chosen, with a budget.
    """
    assert space.limit is not None
    filled, meter = counts.tolist(), space.cost.meter(counts)
    queue: list[tuple[float, int, int]] = []

    def offer(index: int) -> None:
        now, above = filled[index], space.next_rung(index, filled[index])
        if above > now:
            heapq.heappush(queue, ((now - float(wanted[index])) / (above - now), index, above))

    for index in range(space.n):
        offer(index)
    while queue:
        _, index, above = heapq.heappop(queue)
        units = above - filled[index]
        # Cost never falls when another group grows, so a step that does not fit now never will: it is dropped.
        if meter.cost + meter.increase(index, units) <= space.limit:
            meter.keep_more(index, units)
            filled[index] = above
            offer(index)
    return np.array(filled, dtype=np.int64)


def _largest_shift(base: Ratios, limit: int, space: SearchSpace) -> float:
    """Largest shift at which the unrounded plan costs at most ``limit``, by bisection into 64 parts at a time."""
    low = float(np.min(space.min_keep_ratio - base))
    high = float(np.max(1 - base))
    for _ in range(5):
        shifts = np.linspace(low, high, 65)
        ratios = np.clip(base + shifts[:, None], space.min_keep_ratio, 1)
        fits = np.flatnonzero(space.cost.of_ratios(ratios) <= limit)
        # The lowest shift keeps the least of every group, which was checked to fit; float error may deny it.
        best = int(fits[-1]) if len(fits) else 0
        low, high = float(shifts[best]), float(shifts[min(best + 1, 64)])
    return low


def _as_scores(importance: ArrayLike | Tensor) -> NDArray[np.float64]:
    if isinstance(importance, Tensor):
        importance = importance.detach().cpu().numpy()
    return np.asarray(importance, dtype=np.float64)


def _nearest_rung(rungs: Counts, wanted: float) -> int:
    return int(rungs[np.argmin(np.abs(rungs - wanted))])


def _decisions(graph: NetworkGraph, protect_first: bool, protected: Collection[str]) -> tuple[ChannelGroup, ...]:
    first = next((operator.name for operator in graph.operators if operator.weight), "")
    left_dense = set(protected)
    if protect_first:
        left_dense |= {group.name for group in graph.groups if first in group.producers}
    groups = tuple(group for group in graph.prunable if group.name not in left_dense)
    if not groups:
        msg = (
            f"no channel group is left to decide: of {len(graph.groups)} groups {len(graph.prunable)} are prunable, "
            f"and these are protected: {sorted(left_dense)}; protect fewer, or see with `secateur check` why layers "
            "stay dense"
        )
        raise ValueError(msg)
    return groups


def _rounding_of(group: ChannelGroup, rounding: int | Mapping[str, int] | None) -> int:
    default = WIDE_ROUNDING if group.size >= WIDE else 1
    step = rounding.get(group.name, default) if isinstance(rounding, Mapping) else (rounding or default)
    if step < 1:
        msg = f"rounding of group '{group.name}' is {step}; it must be at least 1 unit"
        raise ValueError(msg)
    return min(step, group.size)


def _check_options(graph: NetworkGraph, protected: Collection[str], min_keep_ratio: float, span: float) -> None:
    unknown = sorted(set(protected) - set(graph.group_index))
    if unknown:
        msg = f"protected names no channel group of this network: {unknown}; groups are {sorted(graph.group_index)}"
        raise ValueError(msg)
    if not 0 <= min_keep_ratio <= 1:
        msg = f"min_keep_ratio is {min_keep_ratio}; it must lie in [0, 1]"
        raise ValueError(msg)
    if not (span > 0 and math.isfinite(span)):
        msg = f"span is {span}; it must be a finite number above 0"
        raise ValueError(msg)
