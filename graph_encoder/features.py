"""What the agent sees of a network: names, order and normalisation of node, edge and global features.

Every feature is scaled so that networks of different depth and width are comparable: counts by their logarithm,
shares relative to an even split over the layers, weights relative to what a fresh initialisation would give. A
feature that does not apply to a node is 0. All values are clipped to ``[-BOUND, BOUND]``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .network import KINDS, ChannelGroup, NetworkGraph, Operator

BOUND = 10.0
_LARGEST_FLOOR = 0.5
"""Of a loss: that of a single image would be 1, whose logarithm is none to divide by."""

SENSITIVITY_KEEP_RATIOS = (0.3, 0.6)
"""Keep ratios at which the sensitivity of a group alone is shown."""

_SHAPE = (
    "log_in_channels",  # log2 of the channels read, over 8 (256 channels are 1)
    "log_out_channels",  # log2 of the channels written, or of the units of a group, over 8
    "log_kernel_area",  # log2 of the positions of the kernel, over 4
    "log_stride",  # log2 of the strides' product, over 2 (a stride of 2 in height and width is 1)
    "log_groups",  # log2 of the convolution groups, over 8
    "log_out_positions",  # log2 of the positions of the output, over 8
    "depth",  # place in execution order, 0 to 1
)
_COST = (
    "log_macs",  # log10 of multiply-adds, over 6; for a group, of all operators it takes part in
    "log_params",  # log10 of parameters, over 4; likewise
    "relative_macs",  # log2 of the share of the network's MACs, times the number of weighted operators, over 4; of its
    # time in place of MACs where a table of latency tells times
    "relative_params",  # likewise for parameters
)
_WEIGHTS = (
    "weight_mean_abs",  # mean |w| times sqrt(fan-in): independent of width for a layer that keeps variance
    "weight_std",  # standard deviation of w times sqrt(fan-in)
    "channel_norm_variation",  # standard deviation over mean of the output channels' L1 norms
    "channel_norm_skew",  # their skewness, over 3
    "scale_mean_abs",  # mean |gamma| of the batch norm that follows
    "scale_variation",  # standard deviation over mean of |gamma|
    "has_scale",  # 1 if a batch norm follows
)
_GROUP = (
    "importance_p10",  # quantiles of the units' importance, each over their mean magnitude in the group, less 1
    "importance_p25",
    "importance_p50",
    "importance_p75",
    "importance_p90",
    "n_producers",  # log2(1 + layers that write the group), over 4
    "n_consumers",  # log2(1 + layers that read it), over 4
    "min_keep_ratio",  # least share of the units that may stay
)
_PROGRESS = (
    "keep_ratio",  # of a group: share of units that the plan keeps as it stands
    "cost_kept",  # of an operator: share of its cost that the plan keeps as it stands
    "is_decided",  # of a group: 1 once its keep ratio is final in this episode
    "is_current",  # of a group: 1 if the next action decides it
)
_MEASURED = tuple(
    name for ratio in SENSITIVITY_KEEP_RATIOS for name in (f"sensitivity_{ratio:.0%}", f"has_sensitivity_{ratio:.0%}")
)
"""``1 - log(accuracy lost) / log(floor)``: 0 at the noise of the measurement, 1 when all accuracy is lost."""

NODE_FEATURES = _SHAPE + _COST + _WEIGHTS + _GROUP + _PROGRESS + _MEASURED
"""Features of a node, in the order of the columns."""

EDGE_TYPES = ("forward", "backward", "produces", "produced_by", "consumed_by", "consumes", "decided_by", "decides")
"""Data flow between operators and its reverse; operator to the group it writes and back; group to the operator that
reads it and back; operator to a choice inside it and back."""

GLOBAL_FEATURES = (
    "has_budget",  # 1 if the cost is bounded
    "budget_is_params",  # 1 if the cost counts parameters; all of these are 0 for multiply-adds
    "budget_is_bytes",  # 1 if it counts bytes
    "budget_is_bops",  # 1 if it counts bit operations
    "budget_is_latency",  # 1 if it is time, read from a table
    "budget_share",  # most allowed cost over the dense cost, 1 without a budget
    "cost_share",  # cost of the plan as it stands over the dense cost
    "remaining",  # share of what may be spent that is not yet spent by final decisions
    "dense_accuracy",  # accuracy of the dense network, 0 to 1
    "last_accuracy",  # accuracy of the plan as last scored in this episode, 0 before
    "progress",  # share of the episode's steps that are done
    "log_macs",  # log10 of the dense network's multiply-adds, over 8
    "log_params",  # log10 of its parameters, over 6
    "log_operators",  # log2 of its operators, over 8
)
"""Features of the whole network and of the episode, in order."""

_COLUMN = {name: column for column, name in enumerate(NODE_FEATURES)}
KIND_INDEX = {kind: index for index, kind in enumerate(KINDS)}
EDGE_TYPE_INDEX = {name: index for index, name in enumerate(EDGE_TYPES)}


@dataclass(frozen=True)
class LayerNode:
    """The decision node of a choice inside a layer.

    Attributes:
        layer: qualified name of the layer.
        kind: one of the last of `KINDS`.
        least: least keep ratio, of weights or of bits.
    """

    layer: str
    kind: str
    least: float


def column(name: str) -> int:
    """Column of the node feature called ``name``; `KeyError` if there is none."""
    return _COLUMN[name]


def static_node_features(
    graph: NetworkGraph,
    model: nn.Module,
    decisions: Sequence[ChannelGroup],
    importance: Mapping[str, NDArray[np.floating]],
    min_keep_ratio: Sequence[float],
    layers: Sequence[LayerNode] = (),
    times: Mapping[str, float] | None = None,
) -> NDArray[np.float32]:
    """Features that do not change during an episode, shape ``(operators + decisions, len(NODE_FEATURES))``.

    Rows are the operators in their order, then the channel groups that are decided, then the choices inside layers,
    which have the features of their layer's operator; the columns that change or are measured are 0.

    Args:
        graph: captured network.
        model: the network it was captured from; read only.
        decisions: groups that the agent decides.
        importance: scores of shape ``(size,)`` by group name, higher is more important.
        min_keep_ratio: least keep ratio of each of these groups.
        layers: choices inside layers.
        times: what each operator takes of the network's time, by name and in any unit, where time is what counts;
            operators that are not named take none.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    position = {operator.name: index for index, operator in enumerate(graph.operators)}
    rows = [_operator_row(graph, operator, index, tensors, times) for index, operator in enumerate(graph.operators)]
    for group, least in zip(decisions, min_keep_ratio, strict=True):
        rows.append(_group_row(graph, group, position, importance[group.name], least, times))
    for node in layers:
        rows.append({**rows[_operators_of(graph, node.layer)[0]], "min_keep_ratio": node.least})
    table = np.zeros((len(rows), len(NODE_FEATURES)), dtype=np.float32)
    for index, row in enumerate(rows):
        for name, value in row.items():
            table[index, _COLUMN[name]] = value
    return np.clip(table, -BOUND, BOUND)


def sensitivity_features(lost: NDArray[np.float64], floor: NDArray[np.float64] | float) -> NDArray[np.float32]:
    """Accuracies lost, in ``[0, 1]``, to the scale that the agent sees: logarithmic, 0 at or below their ``floor``.

    The logarithm is what a plan responds to: groups differ in sensitivity by orders of magnitude.
    """
    floor = np.minimum(floor, _LARGEST_FLOOR)
    # The floor's logarithm is Python's: numpy's may differ in the last digit from one processor to another.
    logs: NDArray[np.float64] = np.vectorize(math.log)(floor)
    shown: NDArray[np.float32] = (1 - np.log(np.clip(lost, floor, 1)) / logs).astype(np.float32)
    return shown


def edges(
    graph: NetworkGraph, decisions: Sequence[ChannelGroup], layers: Sequence[LayerNode] = ()
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Typed edges over operators and decision nodes: node indices ``(2, E)`` and edge types ``(E,)``."""
    position = {operator.name: index for index, operator in enumerate(graph.operators)}
    triples: list[tuple[int, int, str]] = []
    for source, target in graph.edges:
        triples += [(source, target, "forward"), (target, source, "backward")]
    for node, group in enumerate(decisions, start=len(graph.operators)):
        for name in group.producers:
            triples += [(position[name], node, "produces"), (node, position[name], "produced_by")]
        for name in group.consumers:
            triples += [(node, position[name], "consumed_by"), (position[name], node, "consumes")]
    for node, choice in enumerate(layers, start=len(graph.operators) + len(decisions)):
        for operator in _operators_of(graph, choice.layer):
            triples += [(operator, node, "decided_by"), (node, operator, "decides")]
    index = np.array([(source, target) for source, target, _ in triples], dtype=np.int64).reshape(-1, 2).T
    return index, np.array([EDGE_TYPE_INDEX[kind] for _, _, kind in triples], dtype=np.int64)


def kinds(
    graph: NetworkGraph, decisions: Sequence[ChannelGroup], layers: Sequence[LayerNode] = ()
) -> NDArray[np.int64]:
    """Kind of every node as an index into `KINDS`, operators first."""
    names = [operator.kind for operator in graph.operators] + ["group"] * len(decisions) + [n.kind for n in layers]
    return np.array([KIND_INDEX[name] for name in names], dtype=np.int64)


def _operators_of(graph: NetworkGraph, layer: str) -> list[int]:
    """Positions of the operators that ``layer`` runs: several where it is called several times."""
    return [i for i, operator in enumerate(graph.operators) if operator.layer == layer]


def _operator_row(
    graph: NetworkGraph,
    operator: Operator,
    index: int,
    tensors: Mapping[str, Tensor],
    times: Mapping[str, float] | None,
) -> dict[str, float]:
    row = {
        "log_in_channels": math.log2(max(operator.in_channels, 1)) / 8,
        "log_out_channels": math.log2(max(operator.out_channels, 1)) / 8,
        "log_kernel_area": math.log2(math.prod(operator.kernel)) / 4,
        "log_stride": math.log2(math.prod(operator.stride)) / 2,
        "log_groups": math.log2(max(operator.groups, 1)) / 8,
        "log_out_positions": math.log2(max(math.prod(operator.out_size), 1)) / 8,
        "depth": index / max(len(graph.operators) - 1, 1),
        **_cost_features(graph, [operator], times),
    }
    if operator.weight:
        weight = tensors[operator.weight]
        # Of a transposed convolution and of an embedding the channels written are the second dimension, and so they
        # are of a layer that multiplies by its weight as it is.
        is_turned = operator.layer_type.startswith("ConvTranspose") and operator.groups == 1
        is_turned |= operator.kind == "embedding"
        is_turned |= operator.kind == "linear" and weight.shape[0] != operator.out_channels
        row |= _weight_features(weight.transpose(0, 1) if is_turned else weight)
    if operator.norm and f"{operator.norm}.weight" in tensors:
        row |= _scale_features(tensors[f"{operator.norm}.weight"])
    return row


def _group_row(
    graph: NetworkGraph,
    group: ChannelGroup,
    position: Mapping[str, int],
    importance: NDArray[np.floating],
    least: float,
    times: Mapping[str, float] | None,
) -> dict[str, float]:
    members = [graph.operators[position[name]] for name in dict.fromkeys(group.producers + group.consumers)]
    first = position[group.producers[0]] if group.producers else 0
    normalised = importance / max(float(np.mean(np.abs(importance))), 1e-12) - 1
    quantiles = {f"importance_p{q}": float(np.percentile(normalised, q)) for q in (10, 25, 50, 75, 90)}
    return {
        "log_out_channels": math.log2(group.size) / 8,
        "depth": first / max(len(graph.operators) - 1, 1),
        **_cost_features(graph, members, times),
        **quantiles,
        "n_producers": math.log2(1 + len(group.producers)) / 4,
        "n_consumers": math.log2(1 + len(group.consumers)) / 4,
        "min_keep_ratio": least,
    }


def _cost_features(
    graph: NetworkGraph, operators: Sequence[Operator], times: Mapping[str, float] | None
) -> dict[str, float]:
    weighted = sum(1 for operator in graph.operators if operator.weight)
    # A layer that runs several times has its parameters once.
    macs, params = sum(o.macs for o in operators), sum({o.weight or o.name: o.params for o in operators}.values())
    row = {"log_macs": math.log10(1 + macs) / 6, "log_params": math.log10(1 + params) / 4}
    work: tuple[float, float] = macs, graph.macs
    if times is not None:
        work = sum(times.get(o.name, 0.0) for o in operators), sum(times.values())
    # The share of one layer shrinks with depth; against an even split it does not.
    for name, (part, whole) in {"relative_macs": work, "relative_params": (params, graph.params)}.items():
        if part and whole:
            row[name] = math.log2(part / whole * weighted) / 4
    return row


def _weight_features(weight: Tensor) -> dict[str, float]:
    w = weight.detach().float().flatten(1) if weight.dim() > 1 else weight.detach().float().unsqueeze(1)
    scale = math.sqrt(w.shape[1])
    norms = w.abs().sum(1)
    return {
        "weight_mean_abs": float(w.abs().mean()) * scale,
        "weight_std": float(w.std(correction=0)) * scale,
        "channel_norm_variation": _variation(norms),
        "channel_norm_skew": _skewness(norms) / 3,
    }


def _scale_features(gamma: Tensor) -> dict[str, float]:
    g = gamma.detach().float().abs()
    return {"scale_mean_abs": float(g.mean()), "scale_variation": _variation(g), "has_scale": 1.0}


def _variation(values: Tensor) -> float:
    return float(values.std(correction=0) / values.mean().clamp_min(1e-12))


def _skewness(values: Tensor) -> float:
    centred = values - values.mean()
    deviation = torch.sqrt((centred**2).mean())
    if deviation <= 1e-6 * values.abs().mean():
        return 0.0
    return float((centred**3).mean() / deviation**3)
