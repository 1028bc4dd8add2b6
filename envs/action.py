"""From an action to a plan: keep ratios, densities and bits, rounding and the budget, all of it here only."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from graph_encoder.network import ChannelGroup, NetworkGraph
from latency.budget import Budget, BudgetError, in_words
from latency.cost import CostKind, CostModel, predict_cost
from latency.decision import LayerDecision, layer_policies, weighted_layers
from latency.predict import LatencyModel
from latency.table import LatencyTable
from pruning.layer_policy import LayerPolicy
from pruning.policy import CompressionPolicy

WIDE = 128
"""From this many units on, a group is rounded to multiples of `WIDE_ROUNDING` by default."""
WIDE_ROUNDING = 8

Counts = NDArray[np.int64]
Ratios = NDArray[np.float64]


@dataclass(frozen=True)
class SearchSpace:
    """Every plan that may be chosen for one network under one budget; build it with `SearchSpace.build`.

    A plan is a vector of counts, one for each decision: the units that a channel group keeps, or the level of a
    choice inside a layer (percents of its weights, bits). A keep ratio is a count over that of the untouched network.

    Attributes:
        graph: the captured network.
        groups: the first decisions, in network order: prunable groups that are not protected.
        layers: the decisions after them: choices inside layers.
        importance: scores of shape ``(size,)`` by group name, higher is kept longer.
        cost: cost of a plan, over ``groups`` and ``layers``.
        budget: what was asked for, or None.
        limit: most that a plan may cost, or None without a budget.
        ladders: counts that each decision may take, ascending; the last is the untouched network's.
        prior: keep-ratio offsets of the start plan, shape ``(n,)``: the plan of an action of zeros.
        span: how far an action of 1 moves a keep ratio.
        sparsity: pattern of the zeros where a density is below one.
    """

    graph: NetworkGraph
    groups: tuple[ChannelGroup, ...]
    layers: tuple[LayerDecision, ...]
    importance: Mapping[str, NDArray[np.floating]]
    cost: CostModel | LatencyModel
    budget: Budget | None
    limit: int | None
    ladders: tuple[Counts, ...]
    prior: Ratios
    span: float = 0.5
    sparsity: str = "unstructured"

    @classmethod
    def build(
        cls,
        graph: NetworkGraph,
        importance: Mapping[str, ArrayLike | Tensor],
        budget: Budget | None,
        *,
        kind: CostKind = "macs",
        prior: ArrayLike | None = None,
        channels: bool = True,
        layers: Sequence[LayerDecision] = (),
        sparsity: str = "unstructured",
        rounding: int | Mapping[str, int] | None = None,
        min_keep_ratio: float = 0.1,
        protect_first: bool = True,
        protected: Collection[str] = (),
        span: float = 0.5,
        table: LatencyTable | None = None,
    ) -> SearchSpace:
        """Choose the decisions and check that the budget can be met.

        The outputs of the last layer are the network's own and are never among the groups.

        Args:
            graph: captured network.
            importance: scores of shape ``(size,)`` for each prunable group, higher is kept longer.
            budget: most that a plan may cost; None to let the reward weigh cost against accuracy.
            kind: what is counted where there is no budget to say it.
            prior: keep-ratio offsets of the start plan, shape ``(n,)``; uniform if not given.
            channels: decide the channel groups; else they stay dense.
            layers: choices inside layers to decide beside them.
            sparsity: pattern of the zeros where a density is below one. A block has to divide the channels that a
                sparse layer writes, the M of N:M those that it reads: groups keep counts that leave it so.
            rounding: units a group keeps are a multiple of this, for all groups or by name; by default 8 where a
                group has 128 units or more, else 1.
            min_keep_ratio: least share of a group that stays; at least one unit always does.
            protect_first: leave the groups dense that the first weighted operator writes.
            protected: names of further groups to leave dense.
            span: how far an action of 1 moves a keep ratio, above 0.
            table: times of the network's layers, for a budget of latency.

        Raises:
            BudgetError: if the budget cannot be met, with the lowest reachable cost, or is above the dense cost; or if
                it is one of latency and there is no table.
            LatencyError: if the table lacks a layer, or a decision changes nothing that takes time.
            ValueError: if no group is left to decide, or an argument is out of range.
        """
        _check_options(graph, protected, min_keep_ratio, span)
        _check_layers(graph, layers)
        groups = _decisions(graph, protect_first, protected, may_be_none=bool(layers)) if channels else ()
        if not groups and not layers:
            msg = "there is nothing to decide: neither channels nor a choice inside a layer; pass one of them"
            raise ValueError(msg)
        aligned = _aligned(graph, layers, sparsity)
        ladders = [
            _ladder(group, rounding, min_keep_ratio, aligned.get(graph.group_index[group.name], ())) for group in groups
        ]
        ladders += [np.array(decision.levels, dtype=np.int64) for decision in layers]
        names = [group.name for group in groups]
        counted = budget.kind if budget else kind
        cost = (
            LatencyModel(graph, _needed(table), names, layers)
            if counted == "latency"
            else CostModel(graph, counted, names, layers, sparsity)
        )
        space = cls(
            graph=graph,
            groups=groups,
            layers=tuple(layers),
            importance={group.name: _as_scores(importance[group.name]) for group in groups},
            cost=cost,
            budget=budget,
            limit=budget.limit(cost.dense) if budget else None,
            ladders=tuple(ladders),
            prior=np.zeros(len(ladders)),
            span=span,
            sparsity=sparsity,
        )
        space._check_reachable()
        space._check_seen()
        return space if prior is None else space.with_prior(prior)

    def with_prior(self, prior: ArrayLike) -> SearchSpace:
        """The same space with another start plan; ``prior`` has shape ``(n,)`` and finite values."""
        return replace(self, prior=self._checked(prior, "prior"))

    @property
    def n(self) -> int:
        """Number of decisions."""
        return len(self.ladders)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the decisions."""
        return self.cost.groups

    @property
    def sizes(self) -> Counts:
        """Counts of the untouched network, shape ``(n,)``."""
        return self.cost.sizes

    @cached_property
    def minimum(self) -> Counts:
        """Least count of each decision, shape ``(n,)``."""
        return np.array([ladder[0] for ladder in self.ladders], dtype=np.int64)

    @cached_property
    def min_keep_ratio(self) -> Ratios:
        """Least keep ratio of each decision, shape ``(n,)``."""
        return self.minimum / self.sizes

    @cached_property
    def ranking(self) -> Mapping[str, NDArray[np.int64]]:
        """Units of each group, most important first; equal scores in their own order."""
        return {name: np.argsort(-scores, kind="stable") for name, scores in self.importance.items()}

    @cached_property
    def lowest_cost(self) -> int:
        """The lowest cost that a plan is known to have: for a counted cost, with every decision at its least."""
        return self.cost(self.fastest)

    @cached_property
    def fastest(self) -> Counts:
        """A plan of `lowest_cost`, shape ``(n,)``: by a table, from the least counts one decision at a time."""
        counts = self.minimum.copy()
        if not isinstance(self.cost, LatencyModel):
            return counts
        best, is_changed = self.cost(counts), True
        while is_changed:
            is_changed = False
            for index, ladder in enumerate(self.ladders):
                meter = self.cost.meter(counts)
                costs = [meter.with_more(index, int(count - counts[index])) for count in ladder]
                if min(costs) < best:
                    best, is_changed = min(costs), True
                    counts[index] = ladder[int(np.argmin(costs))]
        return counts

    @cached_property
    def start(self) -> Counts:
        """The start plan: what an action of zeros stands for."""
        return counts_of(np.zeros(self.n), self)

    def next_rung(self, index: int, count: int) -> int:
        """The next larger count of decision ``index``; ``count`` itself at the top."""
        ladder = self.ladders[index]
        return int(ladder[min(int(np.searchsorted(ladder, count, side="right")), len(ladder) - 1)])

    def policy(self, counts: Counts) -> CompressionPolicy:
        """The plan that keeps the ``counts[i]`` most important units of group ``i`` and treats the layers so."""
        levels = dict(zip(self.names, counts.tolist(), strict=True))
        cut = {group.name: levels[group.name] for group in self.groups if levels[group.name] < group.size}
        return CompressionPolicy(
            kept={name: tuple(np.sort(self.ranking[name][:count]).tolist()) for name, count in cut.items()},
            sizes={name: self.graph.group(name).size for name in cut},
            layers=layer_policies(self.layers, levels, self.sparsity),
        )

    def cost_of(self, policy: CompressionPolicy) -> int:
        """Cost of a plan, whoever proposed it: as `cost`, but for bytes, which are exact here and bounded there."""
        if isinstance(self.cost, CostModel):
            return predict_cost(self.graph, policy, self.cost.kind)
        ratios = self.keep_ratios(policy)
        return self.cost(np.rint([ratios[name] for name in self.names] * self.sizes).astype(np.int64))

    def keep_ratios(self, policy: CompressionPolicy) -> dict[str, float]:
        """What ``policy`` leaves of each decision, in (0, 1], by name and in the order of the decisions."""
        ratios = {group.name: len(policy.kept.get(group.name, range(group.size))) / group.size for group in self.groups}
        for decision in self.layers:
            layer = policy.layers.get(decision.layer, LayerPolicy())
            bits = layer.act_bits if decision.choice == "act_bits" else layer.weight_bits
            ratios[decision.name] = layer.density if decision.choice == "density" else bits / decision.size
        return ratios

    def _checked(self, values: ArrayLike, what: str) -> Ratios:
        array = np.asarray(values, dtype=np.float64)
        if array.shape != (self.n,):
            msg = f"{what} has shape {array.shape}, but this network has {self.n} decisions; pass shape ({self.n},)"
            raise ValueError(msg)
        if not np.isfinite(array).all():
            bad = int(np.flatnonzero(~np.isfinite(array))[0])
            msg = f"{what} holds {array[bad]} for decision '{self.names[bad]}'; every value must be finite"
            raise ValueError(msg)
        return array

    def _check_seen(self) -> None:
        """Refuse decisions that the cost does not depend on: nothing would ever be saved there."""
        for index, decision in enumerate(self.layers, start=len(self.groups)):
            counts = self.sizes.copy()
            counts[index] = self.minimum[index]
            if isinstance(self.cost, CostModel) and self.cost(counts) == self.cost(self.sizes):
                msg = (
                    f"{decision.name} changes nothing that {self.cost.kind} count; leave {decision.choice} out of what "
                    "is decided, or take a budget of bytes (bits of weights) or bops (of weights and activations)"
                )
                raise ValueError(msg)

    def _check_reachable(self) -> None:
        if self.limit is None or self.lowest_cost <= self.limit:
            return
        kind, dense, lowest = self.cost.kind, self.cost.dense, self.lowest_cost
        msg = (
            f"a budget of {in_words(self.limit, kind)} ({self.limit / dense:.1%} of the dense {in_words(dense, kind)}) "
            f"cannot be met: with every decision at its least the network still costs {in_words(lowest, kind)} "
            f"({lowest / dense:.1%}). Pass at least {in_words(lowest, kind)}, or lower min_keep_ratio, the rounding or "
            "the protection"
        )
        raise BudgetError(msg)


def decode(action: ArrayLike, space: SearchSpace) -> CompressionPolicy:
    """The plan that an action of shape ``(n,)`` in ``[-1, 1]`` stands for; see `counts_of`."""
    return space.policy(counts_of(action, space))


def counts_of(action: ArrayLike, space: SearchSpace, base: Ratios | None = None) -> Counts:
    """Count of each decision, shape ``(n,)``.

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
    counts = rounded_down(wanted, space)
    if space.cost(counts) > space.limit:
        # A table may know plans that keep more and take less: the least of all counts need not be the fastest.
        counts = space.fastest
    return fill(counts, wanted, space)


def rounded_down(wanted: Ratios, space: SearchSpace) -> Counts:
    """The largest counts of the ladders that are at most ``wanted``, else the least ones; shape ``(n,)``."""
    # A float error below its lowest rung must not take a decision to the last one, at -1.
    pairs = zip(space.ladders, wanted, strict=True)
    floored = [ladder[max(int(np.searchsorted(ladder, w, side="right")) - 1, 0)] for ladder, w in pairs]
    return np.array(floored, dtype=np.int64)


def nearest(ratios: Ratios, space: SearchSpace) -> Counts:
    """The allowed counts nearest to the keep ratios, shape ``(n,)``; the budget is not looked at."""
    wanted = np.clip(ratios, space.min_keep_ratio, 1) * space.sizes
    pairs = zip(space.ladders, wanted, strict=True)
    return np.array([ladder[np.argmin(np.abs(ladder - w))] for ladder, w in pairs], dtype=np.int64)


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

    is_changed = True
    while is_changed:
        is_changed = False
        for index in range(space.n):
            offer(index)
        while queue:
            _, index, above = heapq.heappop(queue)
            units = above - filled[index]
            # A counted cost never falls when another group grows, so a step that does not fit now never will.
            if meter.with_more(index, units) <= space.limit:
                meter.keep_more(index, units)
                filled[index] = above
                offer(index)
                # A table may say that it falls: then what was dropped is offered again.
                is_changed = isinstance(space.cost, LatencyModel)
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


def _needed(table: LatencyTable | None) -> LatencyTable:
    if table is None:
        msg = (
            "a budget of latency is projected with a table of this device, and there is none; make one with `secateur "
            "latency build` and name it as latency.table"
        )
        raise BudgetError(msg)
    return table


def _as_scores(importance: ArrayLike | Tensor) -> NDArray[np.float64]:
    if isinstance(importance, Tensor):
        importance = importance.detach().cpu().numpy()
    return np.asarray(importance, dtype=np.float64)


def _decisions(
    graph: NetworkGraph, protect_first: bool, protected: Collection[str], *, may_be_none: bool
) -> tuple[ChannelGroup, ...]:
    first = next((operator.name for operator in graph.operators if operator.weight), "")
    left_dense = set(protected)
    if protect_first:
        left_dense |= {group.name for group in graph.groups if first in group.producers}
    groups = tuple(group for group in graph.prunable if group.name not in left_dense)
    if not groups and not may_be_none:
        msg = (
            f"no channel group is left to decide: of {len(graph.groups)} groups {len(graph.prunable)} are prunable, "
            f"and these are protected: {sorted(left_dense)}; protect fewer, or see with `secateur check` why layers "
            "stay dense"
        )
        raise ValueError(msg)
    return groups


def _aligned(graph: NetworkGraph, layers: Sequence[LayerDecision], sparsity: str) -> dict[int, list[tuple[int, int]]]:
    """What a pattern asks of each group, by its index: pairs of channels a unit, and what must divide the channels.

    A block has to divide the channels that a sparse layer writes, the M of N:M those that it reads. Each does so in the
    dense network (`latency.decision.layer_decisions`), so what is removed of every group has to be divided too.
    """
    pattern = LayerPolicy(sparsity)
    divisors = (pattern.block, pattern.n_of_m[1] if pattern.n_of_m else 1)
    in_pattern = {f"{decision.layer}.weight" for decision in layers if decision.choice == "density"}
    found: dict[int, list[tuple[int, int]]] = {}
    for term in graph.param_terms:
        if term.owner in in_pattern:
            for dim, divisor in zip(term.dims, divisors, strict=False):
                for group, channels in dim.per_unit if divisor > 1 else ():
                    found.setdefault(group, []).append((channels, divisor))
    return found


def _ladder(
    group: ChannelGroup,
    rounding: int | Mapping[str, int] | None,
    min_keep_ratio: float,
    aligned: Sequence[tuple[int, int]],
) -> Counts:
    """Unit counts that a group may keep: multiples of its rounding from its least that suit patterns, and all."""
    default = WIDE_ROUNDING if group.size >= WIDE else 1
    step = rounding.get(group.name, default) if isinstance(rounding, Mapping) else (rounding or default)
    if step < 1:
        msg = f"rounding of group '{group.name}' is {step}; it must be at least 1 unit"
        raise ValueError(msg)
    step = min(step, group.size)
    least = max(1, math.ceil(min_keep_ratio * group.size - 1e-9))
    counts = np.arange(-(-least // step) * step, group.size, step)
    for channels, divisor in aligned:
        counts = counts[channels * (group.size - counts) % divisor == 0]
    return np.union1d(counts, [group.size]).astype(np.int64)


def _check_layers(graph: NetworkGraph, layers: Sequence[LayerDecision]) -> None:
    known = weighted_layers(graph)
    for decision in layers:
        if decision.layer not in known:
            msg = f"'{decision.layer}' is no weighted layer of this network; layers are {list(known)}"
            raise ValueError(msg)
    names = [decision.name for decision in layers]
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        msg = f"'{repeated[0]}' is decided twice; name each choice of a layer once"
        raise ValueError(msg)


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
