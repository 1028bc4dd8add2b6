"""What may be decided for one network under its budgets: decisions, costs, and plans as counts."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from graph_encoder.network import ChannelGroup, NetworkGraph
from latency.budget import Budget, BudgetError, in_words, least_in_words
from latency.cost import CostKind, CostModel, predict_cost
from latency.decision import LayerDecision, layer_policies, weighted_layers
from latency.predict import LatencyModel
from latency.runtimes import LatencyError
from latency.table import LatencyTable
from pruning.layer_policy import LayerPolicy
from pruning.policy import CompressionPolicy

WIDE = 128
"""From this many units on, a group is rounded to multiples of `WIDE_ROUNDING` by default."""
WIDE_ROUNDING = 8

KEEP_LESS = "lower search.min_keep_ratio or search.rounding"
SPARE_LESS = "spare fewer groups (search.protect_first, search.protected)"
_DECIDE_GROUPS = "let channels be decided (search.decide, search.protect_first, search.protected)"
"""What lowers the least cost of a network, in words."""

Counts = NDArray[np.int64]
Ratios = NDArray[np.float64]

_CHANGED_BY: dict[CostKind, str] = {
    "macs": "channels or density",
    "params": "channels or density",
    "bytes": "channels, density or bits of weights",
    "bops": "channels, density or bits",
    "latency": "channels or bits",
}


@dataclass(frozen=True)
class Bound:
    """A budget in numbers.

    Attributes:
        cost: what is counted, over the decisions of a space.
        limit: the most of it that a plan may cost.
    """

    cost: CostModel | LatencyModel
    limit: int


class Meters:
    """Whether a plan that changes one decision at a time keeps every budget."""

    def __init__(self, bounds: Sequence[Bound], counts: Counts) -> None:
        """Start from a plan; use `SearchSpace.meters`."""
        self._meters = [(bound.cost.meter(counts), bound.limit) for bound in bounds]

    def fit_with_more(self, decision: int, units: int) -> bool:
        """Whether all budgets are kept if ``decision`` leaves ``units`` more."""
        return all(meter.with_more(decision, units) <= limit for meter, limit in self._meters)

    def keep_more(self, decision: int, units: int) -> None:
        """Let ``decision`` leave ``units`` more than it does."""
        for meter, _ in self._meters:
            meter.keep_more(decision, units)


@dataclass(frozen=True)
class SearchSpace:
    """Every plan that may be chosen for one network under its budgets; build it with `SearchSpace.build`.

    A plan is a vector of counts, one for each decision: the units that a channel group keeps, or the level of a
    choice inside a layer (percents of its weights, bits). A keep ratio is a count over that of the untouched network.
    Actions and start plans move along a scale of places, see `places`.

    Attributes:
        graph: the captured network.
        groups: the first decisions, in network order: prunable groups that are not protected.
        layers: the decisions after them: choices inside layers.
        importance: scores of shape ``(size,)`` by group name, higher is kept longer.
        cost: cost of a plan, over ``groups`` and ``layers``: that of the first budget, which rewards and figures show.
        bounds: every budget, in the order asked for; a plan keeps them all. Empty without a budget.
        ladders: counts that each decision may take, ascending; the last is the untouched network's, but for choices
            inside layers that leave no layer untouched.
        prior: offsets of the start plan's places, shape ``(n,)``: the plan of an action of zeros.
        span: how far an action of 1 moves a place.
        sparsity: pattern of the zeros where a density is below one.
        reduce_range: whether 8 bits of weights beside 8 of activations take half of their levels.
        is_rounded: whether a group may keep multiples of more than one unit alone.
    """

    graph: NetworkGraph
    groups: tuple[ChannelGroup, ...]
    layers: tuple[LayerDecision, ...]
    importance: Mapping[str, NDArray[np.floating]]
    cost: CostModel | LatencyModel
    bounds: tuple[Bound, ...]
    ladders: tuple[Counts, ...]
    prior: Ratios
    span: float = 0.5
    sparsity: str = "unstructured"
    reduce_range: bool = False
    is_rounded: bool = False

    @classmethod
    def build(
        cls,
        graph: NetworkGraph,
        importance: Mapping[str, ArrayLike | Tensor],
        budget: Budget | Sequence[Budget] | None,
        *,
        kind: CostKind = "macs",
        prior: ArrayLike | None = None,
        channels: bool = True,
        layers: Sequence[LayerDecision] = (),
        sparsity: str = "unstructured",
        reduce_range: bool = False,
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
            importance: finite scores of shape ``(size,)`` for each prunable group, higher is kept longer.
            budget: most that a plan may cost, or several such, each of another kind; None to let the reward weigh cost
                against accuracy.
            kind: what is counted where there is no budget to say it.
            prior: offsets of the start plan's places, shape ``(n,)``; uniform if not given.
            channels: decide the channel groups; else they stay dense.
            layers: choices inside layers to decide beside them.
            sparsity: pattern of the zeros where a density is below one. A block has to divide the channels that a
                sparse layer writes, the M of N:M those that it reads: groups keep counts that leave it so.
            reduce_range: whether 8 bits of weights beside 8 of activations take half of their levels.
            rounding: units a group keeps are a multiple of this, for all groups or by name; by default 8 where a
                group has 128 units or more, else 1.
            min_keep_ratio: least share of a group that stays; at least one unit always does.
            protect_first: leave the groups dense that the first weighted operator writes.
            protected: names of further groups to leave dense.
            span: how far an action of 1 moves a place, above 0.
            table: times of the network's layers, for a budget of latency.

        Raises:
            BudgetError: if a budget cannot be met, with the lowest reachable cost, or is above the dense cost; or if
                it is one of latency and there is no table.
            LatencyError: if the table lacks a layer, or latency alone is bounded and a decision takes no time.
            ValueError: if no group is left to decide, an argument is out of range, or importance is not finite.
        """
        check_options(graph, protected, min_keep_ratio, span)
        _check_layers(graph, layers)
        groups = _decisions(graph, protect_first, protected, may_be_none=bool(layers)) if channels else ()
        if not groups and not layers:
            msg = "there is nothing to decide: neither channels nor a choice inside a layer; pass one of them"
            raise ValueError(msg)
        aligned = _aligned(graph, layers, sparsity)
        steps = [_step(group, rounding) for group in groups]
        ladders = [
            _ladder(group, step, min_keep_ratio, aligned.get(graph.group_index[group.name], ()))
            for group, step in zip(groups, steps, strict=True)
        ]
        ladders += [np.array(decision.levels, dtype=np.int64) for decision in layers]
        names = [group.name for group in groups]
        budgets = (budget,) if isinstance(budget, Budget) else tuple(budget or ())

        def model(kind: CostKind) -> CostModel | LatencyModel:
            if kind == "latency":
                return LatencyModel(graph, _needed(table), names, layers)
            return CostModel(graph, kind, names, layers, sparsity)

        costs = [model(one.kind) for one in budgets]
        space = cls(
            graph=graph,
            groups=groups,
            layers=tuple(layers),
            importance={group.name: _as_scores(importance[group.name], group.name) for group in groups},
            cost=costs[0] if costs else model(kind),
            bounds=tuple(Bound(cost, one.limit(cost.dense)) for cost, one in zip(costs, budgets, strict=True)),
            ladders=tuple(ladders),
            prior=np.zeros(len(ladders)),
            span=span,
            sparsity=sparsity,
            reduce_range=reduce_range,
            is_rounded=any(step > 1 for step in steps),
        )
        _check_reachable(space)
        _check_seen(space)
        return space if prior is None else space.with_prior(prior)

    def with_prior(self, prior: ArrayLike) -> SearchSpace:
        """The same space with another start plan; ``prior`` has shape ``(n,)`` and finite values."""
        return replace(self, prior=self.checked(prior, "prior"))

    def with_limit(self, kind: CostKind, limit: int) -> SearchSpace:
        """The same space with another limit of one kind; the other budgets stay."""
        bounds = tuple(replace(bound, limit=limit) if bound.cost.kind == kind else bound for bound in self.bounds)
        return replace(self, bounds=bounds)

    def without_idle_floats(self) -> SearchSpace:
        """The same space without single precision, but for layers that have it when `quantized`.

        And in `fastest`, if the quantized network does not keep the budgets: narrow layers may be faster in it.
        """
        most, ladders = self.quantized, list(self.ladders)
        if not self.fits(most):
            most = np.maximum(most, self.fastest)
        for index in self.rungs_of_bits:
            ladders[index] = ladders[index][ladders[index] <= most[index]]
        return replace(self, ladders=tuple(ladders))

    @property
    def limit(self) -> int | None:
        """Most that a plan may cost of the first budget, None without any."""
        return self.bounds[0].limit if self.bounds else None

    @property
    def timed(self) -> Bound | None:
        """The budget of latency, None if there is none."""
        return next((bound for bound in self.bounds if isinstance(bound.cost, LatencyModel)), None)

    @property
    def n(self) -> int:
        """Number of decisions."""
        return len(self.ladders)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the decisions."""
        return self.cost.names

    @property
    def sizes(self) -> Counts:
        """Counts of the untouched network, shape ``(n,)``."""
        return self.cost.sizes

    @cached_property
    def minimum(self) -> Counts:
        """Least count of each decision, shape ``(n,)``."""
        return np.array([ladder[0] for ladder in self.ladders], dtype=np.int64)

    @cached_property
    def maximum(self) -> Counts:
        """Largest count of each decision, shape ``(n,)``."""
        return np.array([ladder[-1] for ladder in self.ladders], dtype=np.int64)

    @cached_property
    def has_choice(self) -> NDArray[np.bool_]:
        """Whether each decision may take more than one count, shape ``(n,)``."""
        return np.array([len(ladder) > 1 for ladder in self.ladders])

    @cached_property
    def has_one_plan(self) -> bool:
        """Whether everything on offer keeps the budgets: then every action stands for the largest counts."""
        return bool(self.bounds) and self.fits(self.maximum)

    @cached_property
    def quantized(self) -> Counts:
        """The largest counts without single precision, but where that is faster by a table, shape ``(n,)``."""
        counts = self.maximum.copy()
        for index in self.rungs_of_bits:
            below = self.ladders[index][self.ladders[index] < self.sizes[index]]
            counts[index] = below[-1] if len(below) else counts[index]
        # Whether other budgets are kept is no matter here.
        return counts if self.timed is None else replace(self, bounds=(self.timed,)).widened(counts)

    @cached_property
    def min_keep_ratio(self) -> Ratios:
        """Least keep ratio of each decision, shape ``(n,)``."""
        return self.minimum / self.sizes

    def places(self, counts: Counts) -> Ratios:
        """Where the counts of a plan stand on the scale that actions move along, shape ``(n,)``.

        Units and densities stand at their keep ratio. Bits stand at their rung, the lowest of k at 1/k and the highest
        at 1: what a bit costs and loses goes by its power of two, so that as keep ratios 2 to 8 bits of 32 would crowd
        into a fifth of the scale.
        """
        places = counts / self.sizes
        for index, rungs in self.rungs_of_bits.items():
            places[index] = np.interp(counts[index], self.ladders[index], rungs)
        return np.asarray(places, dtype=np.float64)

    def kept_at(self, places: Ratios) -> Ratios:
        """Keep ratios at places, both ``(..., n)``: not rounded, and none beyond the ends of its ladder."""
        kept = np.clip(places, self.min_keep_ratio, self.maximum / self.sizes)
        for index, rungs in self.rungs_of_bits.items():
            kept[..., index] = np.interp(places[..., index], rungs, self.ladders[index]) / self.sizes[index]
        return np.asarray(kept, dtype=np.float64)

    @cached_property
    def ends(self) -> tuple[Ratios, Ratios]:
        """The lowest and the highest place of each decision, ``(n,)`` both."""
        return self.places(self.minimum), self.places(self.maximum)

    @cached_property
    def middle(self) -> Ratios:
        """The place that an action of 0 stands for where no budget is to be met, ``(n,)``."""
        low, high = self.ends
        return (high + low) / 2

    @cached_property
    def reach(self) -> Ratios:
        """How far an action of 1 moves from `middle` where no budget is to be met, ``(n,)``.

        To the ends; for bits half a rung beyond, so that every rung has an equal share of the actions.
        """
        low, high = self.ends
        reach = (high - low) / 2
        for index, rungs in self.rungs_of_bits.items():
            reach[index] += rungs[0] / 2
        return reach

    @cached_property
    def rungs_of_bits(self) -> Mapping[int, Ratios]:
        """Places of the rungs of every decision on bits, by its index."""
        return {
            index: np.arange(1, len(self.ladders[index]) + 1) / len(self.ladders[index])
            for index, decision in enumerate(self.layers, start=len(self.groups))
            if decision.choice != "density"
        }

    @cached_property
    def ranking(self) -> Mapping[str, NDArray[np.int64]]:
        """Units of each group, most important first; equal scores in their own order."""
        return {name: np.argsort(-scores, kind="stable") for name, scores in self.importance.items()}

    @cached_property
    def lowest_cost(self) -> int:
        """The lowest `cost` that a plan is known to have, see `lowest_of`."""
        return self.lowest_of(self.cost)

    def lowest_of(self, cost: CostModel | LatencyModel) -> int:
        """The lowest cost that a plan is known to have: with every decision at its least; by a table, of `fastest`."""
        return cost(self.fastest if isinstance(cost, LatencyModel) else self.minimum)

    @cached_property
    def fastest(self) -> Counts:
        """A plan that takes the least time known, shape ``(n,)``: the least counts, but where a table says otherwise.

        By a table, decisions are changed one at a time within the budgets of other kinds, from the least counts (with
        every layer in integers, if bits are decided), from these with every layer's bits and weights at their most, and
        from the largest counts. Some changes pay only together: a layer in integers among floats is converted to
        and from, and so is one in floats among integers.
        """
        latency = self.latency
        if latency is None:
            return self.minimum.copy()
        layers_whole = np.append(self.minimum[: len(self.groups)], self.maximum[len(self.groups) :])
        starts = [self.minimum]
        starts += [each for each in (layers_whole, self.maximum) if self._fits_beside(latency, each)]
        return min((self._faster(latency, start, self.minimum) for start in starts), key=latency)

    def widened(self, counts: Counts) -> Counts:
        """A plan that leaves at least ``counts``, and more where the table says that more is faster; shape ``(n,)``.

        Kernels want whole vectors of channels: a layer of 24 may take longer than one of 32, and is then no choice.
        Other budgets are kept if ``counts`` keep them. Without a table, ``counts`` themselves.
        """
        return counts if self.latency is None else self._faster(self.latency, counts, counts)

    @property
    def latency(self) -> LatencyModel | None:
        """What tells latencies, if there is a budget of latency or the reward weighs it."""
        costs = [bound.cost for bound in self.bounds] or [self.cost]
        return next((cost for cost in costs if isinstance(cost, LatencyModel)), None)

    def _fits_beside(self, latency: LatencyModel, counts: Counts) -> bool:
        return all(bound.cost(counts) <= bound.limit for bound in self.bounds if bound.cost is not latency)

    def _faster(self, latency: LatencyModel, start: Counts, least: Counts) -> Counts:
        """A plan that no change of a single decision makes faster, from ``start``, within the other budgets.

        No decision falls below ``least``.
        """
        counts = start.copy()
        others = [bound for bound in self.bounds if bound.cost is not latency]
        meter, within = latency.meter(counts), Meters(others, counts)
        is_changed = True
        while is_changed:
            is_changed = False
            for index, rungs in enumerate(self.ladders):
                more = (rungs[rungs >= least[index]] - counts[index]).tolist()
                costs = {m: meter.with_more(index, m) for m in more if m and within.fit_with_more(index, m)}
                best = min(costs, key=costs.__getitem__, default=0)
                if costs.get(best, meter.cost) < meter.cost:
                    meter.keep_more(index, best)
                    within.keep_more(index, best)
                    counts[index] += best
                    is_changed = True
        return counts

    def fits(self, counts: Counts) -> bool:
        """Whether a plan keeps every budget."""
        return all(bound.cost(counts) <= bound.limit for bound in self.bounds)

    def meters(self, counts: Counts) -> Meters:
        """Every budget, for a plan that starts from ``counts`` and changes one decision at a time."""
        return Meters(self.bounds, counts)

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
            layers=layer_policies(self.layers, levels, self.sparsity, reduce_range=self.reduce_range),
        )

    def cost_of(self, policy: CompressionPolicy, cost: CostModel | LatencyModel | None = None) -> int:
        """Cost of a plan, whoever proposed it: as by `cost`, but for bytes, which are exact here and bounded there.

        Args:
            policy: the plan.
            cost: of the budget that is meant; the first if not given.
        """
        cost = cost or self.cost
        if isinstance(cost, CostModel):
            return predict_cost(self.graph, policy, cost.kind)
        ratios = self.keep_ratios(policy)
        return cost(np.rint([ratios[name] for name in self.names] * self.sizes).astype(np.int64))

    def keep_ratios(self, policy: CompressionPolicy) -> dict[str, float]:
        """What ``policy`` leaves of each decision, in (0, 1], by name and in the order of the decisions."""
        ratios = {group.name: len(policy.kept.get(group.name, range(group.size))) / group.size for group in self.groups}
        for decision in self.layers:
            layer = policy.layers.get(decision.layer, LayerPolicy())
            bits = layer.act_bits if decision.choice == "act_bits" else layer.weight_bits
            ratios[decision.name] = layer.density if decision.choice == "density" else bits / decision.size
        return ratios

    def checked(self, values: ArrayLike, what: str) -> Ratios:
        """One finite number for each decision, shape ``(n,)``.

        Args:
            values: what should be that.
            what: its name, for messages.

        Raises:
            ValueError: if the shape is another, or a value is NaN or infinite.
        """
        array = np.asarray(values, dtype=np.float64)
        if array.shape != (self.n,):
            msg = f"{what} has shape {array.shape}, but this network has {self.n} decisions; pass shape ({self.n},)"
            raise ValueError(msg)
        if not np.isfinite(array).all():
            bad = int(np.flatnonzero(~np.isfinite(array))[0])
            msg = f"{what} holds {array[bad]} for decision '{self.names[bad]}'; every value must be finite"
            raise ValueError(msg)
        return array


def _check_seen(space: SearchSpace) -> None:
    """Refuse decisions that no cost depends on: nothing would ever be saved there."""
    costs = [bound.cost for bound in space.bounds] or [space.cost]
    for index, decision in enumerate(space.layers, start=len(space.groups)):
        counts = space.sizes.copy()
        counts[index] = space.minimum[index]
        if any(
            decision.choice == "bits" if isinstance(cost, LatencyModel) else cost(counts) != cost(space.sizes)
            for cost in costs
        ):
            continue
        if isinstance(costs[0], LatencyModel) and len(costs) == 1:
            msg = (
                f"zeros in layer '{decision.layer}' do not change what this runtime computes, so a latency budget "
                "cannot buy them; leave density out of search.decide, or take a budget of macs, params or bytes, "
                "alone or beside it"
            )
            raise LatencyError(msg)
        msg = (
            f"{decision.name} changes nothing that {' or '.join(cost.kind for cost in costs)} count; leave "
            f"{decision.choice} out of what is decided, or take a budget of bytes (bits of weights) or bops (of "
            "weights and activations)"
        )
        raise ValueError(msg)


def _check_reachable(space: SearchSpace) -> None:
    # Counted costs first: a plan is fastest only within these.
    for bound in sorted(space.bounds, key=lambda bound: isinstance(bound.cost, LatencyModel)):
        _check_bound(space, bound)


def _check_bound(space: SearchSpace, bound: Bound) -> None:
    kind, dense, lowest = bound.cost.kind, bound.cost.dense, space.lowest_of(bound.cost)
    if lowest <= bound.limit:
        return
    asked = f"a budget of {in_words(bound.limit, kind)} ({bound.limit / dense:.1%} of the dense"
    has_bits = any(decision.choice != "density" for decision in space.layers)
    is_changed = has_bits if kind == "latency" else bound.cost(space.minimum) != bound.cost(space.sizes)
    # Channels change every cost, though rounding and least shares may leave each group its whole width alone.
    if not space.groups and not is_changed:
        names = ", ".join(dict.fromkeys(each.choice for each in space.layers))
        msg = (
            f"{asked} {in_words(dense, kind)}) cannot be met: nothing that is decided ({names}) changes it; decide "
            f"{_CHANGED_BY[kind]}, or leave {kind} out of the budget"
        )
        raise BudgetError(msg)
    others = [in_words(other.limit, other.cost.kind) for other in space.bounds if other is not bound]
    within = f" within {' and '.join(others)}" if others and isinstance(bound.cost, LatencyModel) else ""
    bits = "" if has_bits or kind not in ("latency", "bytes", "bops") else ", or decide bits too"
    least = least_in_words(lowest, dense, kind) if kind == "latency" else in_words(lowest, kind)
    msg = (
        f"{asked} {in_words(dense, kind)}) cannot be met: with every decision at its least{within} the network "
        f"still costs {in_words(lowest, kind)} ({lowest / dense:.1%}). Pass at least {least}"
        f"{''.join(f', or {way}' for way in _ways_to_save(space, bound.cost))}{bits}"
    )
    raise BudgetError(msg)


def _ways_to_save(space: SearchSpace, cost: CostModel | LatencyModel) -> list[str]:
    """What lowers the least cost, the way that may save most first; none that saves nothing.

    A table knows no layers but those that it was made with, so of latency both are named as they stand.
    """
    if not space.groups:
        return [_DECIDE_GROUPS]
    if isinstance(cost, LatencyModel):
        return [KEEP_LESS, SPARE_LESS]
    whole = CostModel(space.graph, cost.kind, None, space.layers, space.sparsity)
    least = dict(zip(space.names, space.minimum.tolist(), strict=True))
    decided = {group.name for group in space.groups}
    sizes = dict(zip(whole.names, whole.sizes.tolist(), strict=True))
    kept_less = [1 if name in decided else least.get(name, size) for name, size in sizes.items()]
    spared_less = [least.get(name, 1) for name in sizes]
    costs = {KEEP_LESS: whole(np.array(kept_less)), SPARE_LESS: whole(np.array(spared_less))}
    return [way for way in sorted(costs, key=costs.__getitem__) if costs[way] < space.lowest_of(cost)]


def _needed(table: LatencyTable | None) -> LatencyTable:
    if table is None:
        msg = (
            "a budget of latency is projected with a table of this device, and there is none; make one with `secateur "
            "latency build` and name it with --latency-table (latency.table), or hand it to `secateur.compress`"
        )
        raise BudgetError(msg)
    return table


def _as_scores(importance: ArrayLike | Tensor, group: str) -> NDArray[np.float64]:
    if isinstance(importance, Tensor):
        importance = importance.detach().cpu().numpy()
    scores = np.asarray(importance, dtype=np.float64)
    if not np.isfinite(scores).all():
        bad = int(np.flatnonzero(~np.isfinite(scores))[0])
        msg = (
            f"importance of the group '{group}' is {scores[bad]} for unit {bad}; every score must be finite: to keep a "
            "unit longest, give it one above the others of its group"
        )
        raise ValueError(msg)
    return scores


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


def _step(group: ChannelGroup, rounding: int | Mapping[str, int] | None) -> int:
    """What the units that a group keeps are a multiple of, where it does not keep all."""
    default = WIDE_ROUNDING if group.size >= WIDE else 1
    step = rounding.get(group.name, default) if isinstance(rounding, Mapping) else rounding
    step = default if step is None else step
    if step < 1:
        msg = f"rounding of group '{group.name}' is {step}; it must be at least 1 unit"
        raise ValueError(msg)
    return min(step, group.size)


def _ladder(group: ChannelGroup, step: int, min_keep_ratio: float, aligned: Sequence[tuple[int, int]]) -> Counts:
    """Unit counts that a group may keep: multiples of ``step`` from its least that suit patterns, and all."""
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


def check_options(graph: NetworkGraph, protected: Collection[str], min_keep_ratio: float, span: float) -> None:
    """Raise ValueError for what `SearchSpace.build` cannot use of these."""
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
