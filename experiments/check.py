"""What `secateur check` tells of a network before any search: graph, groups, what is skipped, reachable cost, proof."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from envs.space import SearchSpace, check_options
from graph_encoder.capture import capture
from graph_encoder.network import ChannelGroup, NetworkGraph
from latency.budget import Budget, BudgetError, in_words
from latency.cost import CostKind, CostModel
from latency.predict import LatencyModel
from pruning.proof import Proof, leave_refuted_dense, prove

from .config import ConfigError, RunConfig, SearchSettings
from .floor import LatencyFloors, find_floors
from .models import ONE_TENSOR, build_model, input_sizes, load_weights
from .outcome import amount, budget_words
from .search import space_of_graph

COST_KINDS: tuple[CostKind, ...] = ("macs", "params")
N_IMAGES = 8
"""Random images that the networks of the latency floor are calibrated on: time does not depend on values."""


@dataclass(frozen=True)
class CheckReport:
    """What was found of one network.

    Attributes:
        graph: its capture.
        proof: one result for all groups at once, then one a group that is offered.
        lowest: lowest reachable cost by kind, with what is protected, None if nothing can be removed.
        decided: names of the groups that a search decides.
        floors: the least latency, where a table was given.
        met: the budgets that were asked for and can be met, in words; None if there are none.
        refusal: why a budget that was asked for is refused, None if all can be met or there is none.
        outputs: what the network returns, where that is no tensor that a search could score; else None.
    """

    graph: NetworkGraph
    proof: tuple[Proof, ...]
    lowest: dict[CostKind, int | None]
    decided: frozenset[str]
    floors: LatencyFloors | None = None
    met: str | None = None
    refusal: str | None = None
    outputs: str | None = None

    @property
    def passed(self) -> bool:
        """Whether removing equals masking for every group offered, and the budget can be met."""
        return all(result.holds for result in self.proof) and self.refusal is None

    def lines(self) -> list[str]:
        """The report as a person reads it."""
        graph = self.graph
        kinds = Counter(operator.kind for operator in graph.operators)
        decided = [group for group in graph.prunable if group.name in self.decided]
        spared = [group for group in graph.prunable if group.name not in self.decided]
        dense = [group for group in graph.groups if not group.is_prunable]
        failed = [result for result in self.proof if not result.holds]
        return [
            f"operators       {len(graph.operators)}: {', '.join(f'{n} {kind}' for kind, n in kinds.most_common())}",
            f"multiply-adds   {amount(graph.macs)}",
            f"parameters      {amount(graph.params)}",
            *(self._range(kind) for kind in COST_KINDS),
            *(self.floors.lines() if self.floors else ()),
            *_offered("groups decided", decided, "by a search"),
            *_offered("groups spared", spared, "of the first layer (search.protect_first) or in search.protected"),
            f"groups dense    {len(dense)}",
            *(f"  {group.name}: {group.size} units: {group.reason}" for group in dense),
            f"layers skipped  {len(graph.skipped)}",
            *(f"  {name}: {reason}" for name, reason in graph.skipped.items()),
            *([f"outputs         {self.outputs}"] if self.outputs else ()),
            f"proof           removing equals masking in {len(self.proof) - len(failed)} of {len(self.proof)} trials",
            *(f"  FAILED: {result.subject}: {_failure(result)}" for result in failed),
            *([f"budget met      {self.met}"] if self.met else ()),
            *([f"budget refused  {self.refusal}"] if self.refusal else ()),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        graph = self.graph
        return {
            "macs": graph.macs,
            "params": graph.params,
            "lowest": self.lowest,
            "latency": self.floors and self.floors.to_dict(),
            "met": self.met,
            "refusal": self.refusal,
            "groups": [
                {
                    "name": g.name,
                    "size": g.size,
                    "decided": g.name in self.decided,
                    "reason": g.reason,
                    "producers": g.producers,
                    "consumers": g.consumers,
                }
                for g in graph.groups
            ],
            "skipped": dict(graph.skipped),
            "outputs": self.outputs,
            "proof": [
                {
                    "subject": r.subject,
                    "removed": r.removed,
                    "holds": r.holds,
                    # JSON knows no infinity: then the message says what happened.
                    "error": r.error if math.isfinite(r.error) else None,
                    "message": r.message,
                }
                for r in self.proof
            ],
            "passed": self.passed,
        }

    def _range(self, kind: CostKind) -> str:
        lowest, dense = self.lowest[kind], getattr(self.graph, kind)
        label = f"{kind} from".ljust(16)
        if lowest is None:
            return f"{label}only the dense network's {amount(dense)}"
        return f"{label}{amount(lowest)} ({lowest / dense:.1%}) to {amount(dense)} (100%)"


def check_named(
    name: str,
    shape: str | None,
    n_classes: int,
    weights: Path | None,
    seed: int,
    config: RunConfig | None = None,
    budgets: Sequence[Budget] = (),
) -> CheckReport:
    """Check a network as `secateur check` names it.

    Args:
        name: of the model, as for `build_model`.
        shape: of an input, as for `input_sizes`.
        n_classes: outputs.
        weights: trained weights; none draws them by ``seed``.
        seed: of weights, inputs and the units removed in the proof.
        config: what a search may do; its defaults if not given.
        budgets: asked for; what of them cannot be met is in the report. Those of latency need ``config.latency.table``,
            with which the floor is found and timed, with or without a budget.

    Raises:
        ConfigError: if nothing can be decided.
        ModelError: if there is no such network, the weights do not fit it, or the shape is not understood.
        TraceError: if the network cannot be captured.
        TableError: if the table does not hold the layers of the network.
    """
    config = config or RunConfig()
    sizes = input_sizes(name, shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(name, n_classes, sizes[0]).eval()
    if weights:
        load_weights(model, weights)
    generator = torch.Generator().manual_seed(seed)
    example = torch.randn(2, *sizes, generator=generator)
    report = check_network(model, example, config.search, seed=seed)
    report = replace(report, outputs=_outputs_that_are_no_tensor(model, example))
    try:
        if config.latency.table is None:
            if not budgets:
                return report
            asked = config.model_copy(update={"budget": tuple(budgets)})
            return replace(report, met=_least_words(space_of_graph(asked, report.graph)))
        images = torch.randn(N_IMAGES, *sizes, generator=generator)
        floors = find_floors(model, report.graph, config, budgets, images)
    except BudgetError as error:
        return replace(report, refusal=str(error))
    met = f"{budget_words(budgets)}; the floor is above" if budgets and floors.refusal is None else None
    return replace(report, floors=floors, met=met, refusal=floors.refusal)


def _outputs_that_are_no_tensor(model: nn.Module, example: Tensor) -> str | None:
    with torch.no_grad():
        outputs = model(example)
    return None if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}; {ONE_TENSOR}"


def _least_words(space: SearchSpace) -> str:
    """Each budget of a space with the least that can be reached, in words."""
    return "; ".join(
        f"{_share(bound.limit, bound.cost)}, of which {_share(space.lowest_of(bound.cost), bound.cost)} is the least"
        for bound in space.bounds
    )


def _share(cost: int, of: CostModel | LatencyModel) -> str:
    return f"{in_words(cost, of.kind)} ({cost / of.dense:.1%})"


def check_network(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    settings: SearchSettings | None = None,
    *,
    seed: int = 0,
) -> CheckReport:
    """Capture a network, find what may be removed, and prove that removing it does what masking does.

    Args:
        model: the network.
        example_inputs: what its ``forward`` takes.
        settings: which groups are decided, and how far; the defaults if not given.
        seed: of the units that are removed.

    Raises:
        TraceError: if the network cannot be captured.
        ConfigError: if the settings protect a group that is not there.
    """
    settings = settings or SearchSettings()
    graph = leave_refuted_dense(model, capture(model, example_inputs), example_inputs)
    proof = prove(model, graph, example_inputs, generator=torch.Generator().manual_seed(seed))
    spaces = {kind: _space(graph, settings, kind) for kind in COST_KINDS}
    decided = frozenset(name for space in spaces.values() if space for name in space.names)
    lowest = {kind: space.lowest_cost if space else None for kind, space in spaces.items()}
    return CheckReport(graph, tuple(proof), lowest, decided)


def _space(graph: NetworkGraph, settings: SearchSettings, kind: CostKind) -> SearchSpace | None:
    """What a search decides about channels, None if that is nothing."""
    try:
        check_options(graph, settings.protected, settings.min_keep_ratio, settings.span)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    importance = {group.name: np.zeros(group.size) for group in graph.prunable}
    try:
        return SearchSpace.build(
            graph,
            importance,
            None,
            kind=kind,
            rounding=settings.rounding,
            min_keep_ratio=settings.min_keep_ratio,
            protect_first=settings.protect_first,
            protected=settings.protected,
        )
    except ValueError:
        return None


def _offered(label: str, groups: Sequence[ChannelGroup], whom: str) -> list[str]:
    """Groups that may be pruned, a line each below a heading."""
    heading = f"{label.ljust(16)}{len(groups)} {whom}, with {sum(group.size for group in groups):,} units"
    return [heading, *(f"  {g.name}: {g.size} units, {_ties(g)}" for g in groups)]


def _ties(group: ChannelGroup) -> str:
    """The layers that a group ties; channels that attention sums over are read by none."""
    readers = f", read by {_names(group.consumers)}" if group.consumers else ""
    return f"written by {_names(group.producers)}{readers}"


def _failure(result: Proof) -> str:
    return result.message or f"outputs differ by {result.error:.2e} of their scale"


def _names(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
