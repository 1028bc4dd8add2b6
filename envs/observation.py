"""What the agent is shown: the network as a graph, the plan as it stands, the budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from torch import nn

from graph_encoder.features import (
    BOUND,
    EDGE_TYPES,
    GLOBAL_FEATURES,
    NODE_FEATURES,
    SENSITIVITY_KEEP_RATIOS,
    LayerNode,
    column,
    edges,
    kinds,
    sensitivity_features,
    static_node_features,
)
from graph_encoder.network import KINDS, NetworkGraph

from .evaluator import Sensitivity
from .space import Bound, Counts, SearchSpace

Observation = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Sizes:
    """Room in an observation, at least what the network needs; the rest is padding with a mask of 0.

    Attributes:
        nodes: operators and decisions.
        edges: typed edges, both directions counted.
        decisions: decisions that the whole-network action holds.
    """

    nodes: int
    edges: int
    decisions: int


@dataclass(frozen=True)
class Progress:
    """Where an episode stands.

    Attributes:
        counts: count of each decision as the plan stands, shape ``(n,)``.
        decided: whether each count is final, shape ``(n,)``.
        decisions: indices of the decisions that the next action takes.
        dense_accuracy: in ``[0, 1]``.
        last_accuracy: of the plan as last scored in this episode, 0 before.
        progress: share of the episode's steps that are done.
    """

    counts: Counts
    decided: NDArray[np.bool_]
    decisions: NDArray[np.int64]
    dense_accuracy: float
    last_accuracy: float
    progress: float


class Observer:
    """Turns the state of an episode into the arrays that the agent reads.

    What does not change is computed once, here; `observe` fills in the rest.
    """

    def __init__(
        self,
        space: SearchSpace,
        model: nn.Module,
        *,
        sensitivity: Sensitivity | None = None,
        noise_floor: float = 0.01,
        sizes: Sizes | None = None,
        one_decision: bool = False,
    ) -> None:
        """Compute what stays the same.

        Args:
            space: the decisions.
            model: the dense network; its weights are read once.
            sensitivity: measured sensitivity of the same decisions, if there is any. Of `SENSITIVITY_KEEP_RATIOS` those
                that were measured are shown; the columns of the others, and their presence flags, stay 0.
            noise_floor: smallest loss of accuracy that counts, in ``(0, 1)``.
            sizes: room to leave, so that networks of different size share one observation space; what this network
                needs if not given.
            one_decision: whether an observation holds one decision (layer by layer) or all of them.

        Raises:
            ValueError: if ``sizes`` is too small, or ``sensitivity`` is of other decisions.
        """
        self.space = space
        self.n_operators = len(space.graph.operators)
        graph, groups, least = space.graph, space.groups, space.min_keep_ratio.tolist()
        layers = [
            LayerNode(decision.layer, decision.choice, ratio)
            for decision, ratio in zip(space.layers, least[len(groups) :], strict=True)
        ]
        times = None if space.latency is None else space.latency.by_owner(space.sizes)
        self._static = static_node_features(graph, model, groups, space.importance, least[: len(groups)], layers, times)
        self._kinds = kinds(graph, groups, layers)
        self._edges, self._edge_types = edges(graph, groups, layers)
        needed = Sizes(len(self._kinds), len(self._edge_types), space.n)
        self.sizes = sizes or needed
        _check_room(self.sizes, needed)
        self._decision_room = 1 if one_decision else self.sizes.decisions
        self._measured = _measured_columns(space, sensitivity, noise_floor, self.n_operators)
        self._owner_row = _rows_of_owners(space.graph)
        self._dense_by_operator = self._cost_by_operator(space.sizes)

    @cached_property
    def observation_space(self) -> spaces.Dict:
        """The space of the observations: float32 boxes with finite bounds, the same for every network of this room."""
        nodes, n_edges, decisions = self.sizes.nodes, max(self.sizes.edges, 1), self._decision_room
        last_node = max(nodes - 1, 1)
        return spaces.Dict(
            {
                "nodes": _box(-BOUND, BOUND, nodes, len(NODE_FEATURES)),
                "kinds": _box(0, len(KINDS) - 1, nodes),
                "edges": _box(0, last_node, 2, n_edges),
                "edge_types": _box(0, len(EDGE_TYPES) - 1, n_edges),
                "node_mask": _box(0, 1, nodes),
                "edge_mask": _box(0, 1, n_edges),
                "decisions": _box(0, last_node, decisions),
                "decision_mask": _box(0, 1, decisions),
                "globals": _box(-BOUND, BOUND, len(GLOBAL_FEATURES)),
            }
        )

    def observe(self, progress: Progress, *, show_measured: bool = True) -> Observation:
        """The arrays of `observation_space`, all newly made.

        Args:
            progress: state of the episode.
            show_measured: whether measured features are shown; agents that must work without are trained with them
                dropped at random.
        """
        boxes = self.observation_space.spaces
        obs: Observation = {key: np.zeros(box.shape or (), dtype=np.float32) for key, box in boxes.items()}
        n_nodes, n_edges = len(self._kinds), len(self._edge_types)
        obs["nodes"][:n_nodes] = self._nodes(progress, show_measured)
        obs["kinds"][:n_nodes] = self._kinds
        obs["node_mask"][:n_nodes] = 1
        obs["edges"][:, :n_edges] = self._edges
        obs["edge_types"][:n_edges] = self._edge_types
        obs["edge_mask"][:n_edges] = 1
        obs["decisions"][: len(progress.decisions)] = self.n_operators + progress.decisions
        obs["decision_mask"][: len(progress.decisions)] = self.space.has_choice[progress.decisions]
        obs["globals"][:] = np.clip(self._globals(progress), -BOUND, BOUND)
        return obs

    def _nodes(self, progress: Progress, show_measured: bool) -> NDArray[np.float32]:
        nodes = self._static.copy()
        decisions = nodes[self.n_operators :]
        decisions[:, column("keep_ratio")] = progress.counts / self.space.sizes
        decisions[:, column("is_decided")] = progress.decided
        decisions[progress.decisions, column("is_current")] = 1
        kept = self._cost_by_operator(progress.counts) / np.maximum(self._dense_by_operator, 1)
        # In tables of latency a layer that takes next to nothing may take more with fewer channels.
        nodes[: self.n_operators, column("cost_kept")] = np.minimum(kept, BOUND)
        if show_measured:
            nodes += self._measured
        return nodes

    def _cost_by_operator(self, counts: Counts) -> NDArray[np.float64]:
        """Cost of every operator; parameter tensors are named by their operator's weight, bias and norm."""
        totals = np.zeros(self.n_operators)
        for owner, value in self.space.cost.by_owner(counts).items():
            row = self._owner_row.get(owner)
            if row is not None:
                totals[row] += value
        return totals

    def _globals(self, progress: Progress) -> list[float]:
        """What is counted has a flag for each budget; shares are those of the first, and the least is what remains."""
        space, graph = self.space, self.space.graph
        bounds = space.bounds or (Bound(space.cost, space.cost.dense),)
        kinds = {bound.cost.kind for bound in bounds}
        spent = np.where(progress.decided, progress.counts, space.minimum)
        remaining = [(b.limit - b.cost(spent)) / max(b.limit - space.lowest_of(b.cost), 1) for b in bounds]
        dense = space.cost.dense
        values = {
            "has_budget": float(bool(space.bounds)),
            "budget_is_params": float("params" in kinds),
            "budget_is_bytes": float("bytes" in kinds),
            "budget_is_bops": float("bops" in kinds),
            "budget_is_latency": float("latency" in kinds),
            "budget_share": bounds[0].limit / dense,
            "cost_share": space.cost(progress.counts) / dense,
            "remaining": min(remaining),
            "dense_accuracy": progress.dense_accuracy,
            "last_accuracy": progress.last_accuracy,
            "progress": progress.progress,
            "log_macs": math.log10(1 + graph.macs) / 8,
            "log_params": math.log10(1 + graph.params) / 6,
            "log_operators": math.log2(max(len(graph.operators), 1)) / 8,
        }
        return [values[name] for name in GLOBAL_FEATURES]


def _measured_columns(
    space: SearchSpace, sensitivity: Sensitivity | None, noise_floor: float, n_operators: int
) -> NDArray[np.float32]:
    """The measured features of all nodes, 0 where there are none; each comes with a presence flag of 1."""
    table = np.zeros((n_operators + space.n, len(NODE_FEATURES)), dtype=np.float32)
    if sensitivity is None:
        return table
    if sensitivity.names != space.names:
        msg = f"sensitivity was measured for {list(sensitivity.names)}, but the decisions are {list(space.names)}"
        raise ValueError(msg)
    for ratio in SENSITIVITY_KEEP_RATIOS:
        if ratio in sensitivity.keep_ratios:
            table[n_operators:, column(f"sensitivity_{ratio:.0%}")] = sensitivity_features(
                sensitivity.at(ratio), sensitivity.floors(noise_floor)
            )
            table[n_operators:, column(f"has_sensitivity_{ratio:.0%}")] = 1
    return table


def _check_room(room: Sizes, needed: Sizes) -> None:
    for what, has, needs in (
        ("nodes", room.nodes, needed.nodes),
        ("edges", room.edges, needed.edges),
        ("decisions", room.decisions, needed.decisions),
    ):
        if has < needs:
            msg = f"the observation has room for {has} {what}, but this network needs {needs}; pass at least {needs}"
            raise ValueError(msg)


def _box(low: float, high: float, *shape: int) -> spaces.Box:
    return spaces.Box(low, high, shape, dtype=np.float32)


def _rows_of_owners(graph: NetworkGraph) -> dict[str, int]:
    """The operator that pays for what is named: itself, its weight and bias, and those of the norm after it."""
    rows: dict[str, int] = {}
    for row, operator in enumerate(graph.operators):
        rows.setdefault(operator.name, row)
        if not operator.weight:
            continue
        holder, _, own = operator.weight.rpartition(".")
        names = [holder, operator.weight, f"{holder}.{own.replace('weight', 'bias')}".lstrip(".")]
        names += [operator.norm, f"{operator.norm}.weight", f"{operator.norm}.bias"] if operator.norm else []
        for name in names:
            rows.setdefault(name, row)
    return rows
