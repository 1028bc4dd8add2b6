"""model -> graph: run the network once with labels, then read operators, data flow and channel groups off the run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from .labels import IntArray
from .network import ChannelGroup, HeldNumber, LinearDim, Member, NetworkGraph, Operator, Term, TraceError
from .resize import holds_smaller_widths
from .symbolic import SymbolicRun, symbolic_trace
from .trace import Axis, Held, LabelPass, Record, batch_of_two


def capture(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> NetworkGraph:
    """Capture ``model`` as a graph of operators and channel groups.

    The module runs once on meta tensors: nothing is computed, and the module is left as it was. A group is offered
    for pruning only if the forward pass holds at smaller widths, which is tried out, on shapes, before it is said.

    Args:
        model: the network; any `nn.Module`.
        example_inputs: the positional inputs of ``forward``, batch first. Only shapes and dtypes are read; a batch of
            one is taken as two, because a dimension of size one hides what is broadcast.

    Returns:
        The graph; `NetworkGraph.groups` holds every channel group, offered or not, each with its reason.

    Raises:
        TraceError: if the forward pass cannot run without values, naming the module and what stopped it.
    """
    inputs = _as_tuple(example_inputs)
    was_training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        return _capture(model, inputs)
    finally:
        for name, module in model.named_modules():
            module.training = was_training[name]


def _as_tuple(example_inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    for position, value in enumerate(inputs):
        if not isinstance(value, Tensor):
            msg = (
                f"example input {position} is a {type(value).__name__}; pass a tensor, or a tuple of the tensors that "
                f"forward takes, batch first"
            )
            raise TraceError(msg)
    if not inputs:
        msg = "no example input was given; pass a tensor, or a tuple of the tensors that forward takes, batch first"
        raise TraceError(msg)
    return inputs


def _capture(model: nn.Module, inputs: tuple[Tensor, ...]) -> NetworkGraph:
    metas = [batch_of_two(x) for x in inputs]
    record = _run(model, model, metas)
    graph = assemble(record, model)
    outputs = record.output_shapes
    if holds_smaller_widths(model, graph, metas, outputs) is None:
        return graph
    traced = symbolic_trace(model)
    if traced is not None:
        rewritten = _with_rewrites(traced, metas, model)
        if rewritten is not None:
            return rewritten
    return _freeze_what_does_not_hold(model, graph, metas, outputs)


def _run(model: nn.Module, forward: Callable[..., Any], metas: Sequence[Tensor]) -> Record:
    run = LabelPass(model)
    run.run(forward, metas)
    return run.record


def _with_rewrites(traced: fx.GraphModule, metas: list[Tensor], model: nn.Module) -> NetworkGraph | None:
    """The graph of the symbolic trace, whose held numbers can be rewritten; None if it does not hold either."""
    run = LabelPass(traced)
    nodes = SymbolicRun(traced, run)
    try:
        run.run(nodes.run, metas)
    except TraceError:
        return None
    run.record.held = nodes.held_numbers()
    graph = assemble(run.record, model)
    return _freeze_what_does_not_hold(model, graph, metas, run.record.output_shapes)


def _freeze_what_does_not_hold(
    model: nn.Module, graph: NetworkGraph, metas: list[Tensor], outputs: list[tuple[int, ...]]
) -> NetworkGraph:
    """Keep dense, by name, the groups without which the rest of the network holds at smaller widths."""
    while (failure := holds_smaller_widths(model, graph, metas, outputs)) is not None:
        culprits = _culprits(model, graph, metas, outputs, failure.module)
        reason = f"forward of '{failure.module or 'the network'}' holds a channel count: {failure.message}"
        groups = [replace(g, reason=reason) if i in culprits else g for i, g in enumerate(graph.groups)]
        graph = replace(graph, groups=tuple(groups))
    return graph


def _culprits(
    model: nn.Module, graph: NetworkGraph, metas: list[Tensor], outputs: list[tuple[int, ...]], module: str
) -> set[int]:
    """Groups to blame for a failure inside ``module``: those bound there that fail alone, else the first that do."""
    offered = [index for index, group in enumerate(graph.groups) if group.is_prunable]
    while module:
        near = [i for i in offered if any(m.tensor.startswith(f"{module}.") for m in graph.groups[i].members)]
        guilty = {i for i in near if holds_smaller_widths(model, graph, metas, outputs, frozenset({i})) is not None}
        if guilty:
            return guilty
        module = module.rpartition(".")[0]
    while len(offered) > 1:
        half = offered[: len(offered) // 2]
        fails = holds_smaller_widths(model, graph, metas, outputs, frozenset(half)) is not None
        offered = half if fails else offered[len(offered) // 2 :]
    return set(offered)


# -------------------------------------------------------------------- from the record to the graph


def assemble(record: Record, model: nn.Module) -> NetworkGraph:
    """Turn the labels of one run into groups, members and cost terms."""
    _bind_loose_parameters(record)
    for grid in record.grids:
        record.classes.make_rectangular(grid)
    units = _units_by_signature(record)
    reasons = record.classes.frozen_reasons()
    names = _GroupNames(record)
    groups: list[ChannelGroup] = []
    place: dict[int, tuple[int, int]] = {}
    for roots in units:
        reason = next((reasons[root] for root in roots if root in reasons), "")
        # One unit alone cannot be removed: the layer would have no output left.
        if not reason and len(roots) == 1:
            reason = "its channels can only be removed all together"
        group = names.group(roots, reason)
        for unit, root in enumerate(roots):
            place[root] = (len(groups), unit)
        groups.append(group)
    skipped = {name: group.reason for group in groups if group.reason for name in group.producers}
    counts = _Counts(record, place)
    return NetworkGraph(
        operators=tuple(record.operators),
        edges=tuple(dict.fromkeys(record.edges)),
        groups=tuple(groups),
        mac_terms=tuple(counts.mac_term(i) for i in range(len(record.multiplies))),
        param_terms=tuple(counts.param_term(name, p) for name, p in model.named_parameters()),
        skipped=skipped,
        rewrites=tuple(held for number in record.held if (held := counts.held(number)) is not None),
    )


def _bind_loose_parameters(record: Record) -> None:
    """Give each parameter that met activations element by element the one dimension that its channels run along."""
    for name, labels in record.loose.items():
        roots = torch.from_numpy(record.classes.find(labels.reshape(-1).numpy())).reshape(labels.shape)
        dims = [dim for dim in range(roots.dim()) if roots.shape[dim] > 1 and _depends_only_on(roots, dim)]
        if roots.numel() == 1:
            continue
        if not dims:
            record.classes.freeze(roots, f"meets the parameter '{name}' in more than one dimension")
            continue
        index: list[Any] = [0] * roots.dim()
        index[dims[0]] = slice(None)
        record.axes.setdefault((name, dims[0]), Axis(name, dims[0], "elementwise", roots[tuple(index)]))


def _depends_only_on(roots: Tensor, dim: int) -> bool:
    rows = roots.movedim(dim, 0).reshape(roots.shape[dim], -1)
    return bool((rows == rows[:, :1]).all())


def _labels_counted(record: Record) -> list[Tensor]:
    return [d for multiply in record.multiplies for d in multiply.dims if isinstance(d, Tensor)]


def _units_by_signature(record: Record) -> list[list[int]]:
    """Classes that touch the same tensors equally often, in the order in which they are first produced."""
    touches: dict[int, list[tuple[int, int]]] = defaultdict(list)
    first: dict[int, int] = {}
    axes = list(record.axes.values())
    for index, labels in enumerate([axis.labels for axis in axes] + _labels_counted(record)):
        roots, counts = np.unique(record.classes.find(labels.reshape(-1).numpy()), return_counts=True)
        for root, count in zip(roots.tolist(), counts.tolist(), strict=True):
            touches[root].append((index, count))
            if index < len(axes) and axes[index].role == "out":
                first.setdefault(root, index)
    frozen = record.classes.frozen_reasons()
    grouped: dict[tuple[bool, tuple[tuple[int, int], ...]], list[int]] = defaultdict(list)
    for root, signature in touches.items():
        if root > 0 and root in first:
            grouped[root in frozen, tuple(signature)].append(root)
    return sorted((sorted(roots) for roots in grouped.values()), key=lambda roots: (first[roots[0]], roots[0]))


class _GroupNames:
    """Builds the groups of one record, each with a name of its own."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._axis_roots: list[tuple[Axis, IntArray]] = [
            (axis, record.classes.find(axis.labels.reshape(-1).numpy())) for axis in record.axes.values()
        ]
        self._by_root: dict[int, list[int]] = defaultdict(list)
        for index, (_, roots) in enumerate(self._axis_roots):
            for root in np.unique(roots).tolist():
                self._by_root[root].append(index)
        self._used: dict[str, int] = {}

    def group(self, roots: list[int], reason: str) -> ChannelGroup:
        members: list[Member] = []
        producers: list[str] = []
        consumers: list[str] = []
        unit_of = {root: unit for unit, root in enumerate(roots)}
        for index in self._by_root[roots[0]]:
            axis, axis_roots = self._axis_roots[index]
            positions = np.flatnonzero(np.isin(axis_roots, roots))
            units = np.array([unit_of[root] for root in axis_roots[positions].tolist()])
            order = np.argsort(units, kind="stable")
            members.append(
                Member(axis.tensor, axis.dim, axis.role, torch.from_numpy(positions[order].reshape(len(roots), -1)))
            )
            users = self._record.readers.get((axis.tensor, axis.dim), [])
            (producers if axis.role == "out" else consumers).extend(users if axis.role != "elementwise" else [])
        name = next(m.tensor for m in members if m.role == "out").rpartition(".")[0] or members[0].tensor
        name = producers[0].partition("#")[0] if producers else name
        count = self._used[name] = self._used.get(name, 0) + 1
        return ChannelGroup(
            name if count == 1 else f"{name}#{count}", len(roots), tuple(members),
            tuple(dict.fromkeys(producers)), tuple(dict.fromkeys(consumers)), reason,
        )  # fmt: skip


@dataclass
class _Counts:
    """Sizes as functions of what is removed."""

    record: Record
    place: dict[int, tuple[int, int]]

    def _groups_at(self, labels: Tensor) -> IntArray:
        roots, inverse = np.unique(self.record.classes.find(labels.reshape(-1).numpy()), return_inverse=True)
        places = [self.place.get(root, (-1, -1)) for root in roots.tolist()]
        return np.array(places, dtype=np.int64).reshape(-1, 2)[inverse]

    def linear_dim(self, labels: Tensor | int) -> LinearDim:
        if isinstance(labels, int):
            return LinearDim(labels)
        at = self._groups_at(labels)
        groups = np.unique(at[:, 0])
        per_unit = []
        for g in groups[groups >= 0].tolist():
            units = at[at[:, 0] == g, 1]
            per_unit.append((g, len(units) // len(np.unique(units))))
        return LinearDim(labels.numel(), tuple(per_unit))

    def mac_term(self, index: int) -> Term:
        multiply = self.record.multiplies[index]
        return Term(multiply.operator, multiply.factor, tuple(self.linear_dim(d) for d in multiply.dims))

    def param_term(self, name: str, parameter: Tensor) -> Term:
        dims = []
        for dim, size in enumerate(parameter.shape):
            axis = self.record.axes.get((name, dim))
            dims.append(LinearDim(int(size)) if axis is None else self.linear_dim(axis.labels))
        return Term(name, 1, tuple(dims))

    def held(self, held: Held) -> HeldNumber | None:
        rows = held.labels.flatten(1) if held.labels.dim() > 1 else held.labels[:, None]
        roots = self.record.classes.find(rows.reshape(-1).numpy()).reshape(rows.shape)
        # A dimension whose positions hold several classes does not shrink: another one does.
        if (roots != roots[:, :1]).any():
            return None
        at = self._groups_at(rows[:, 0])
        if held.argument[0] != "split" and (at[:, 0] < 0).all():
            return None
        return HeldNumber(held.node, held.argument, torch.from_numpy(at[:, 0]), torch.from_numpy(at[:, 1]))


def trace_operators(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> list[Operator]:
    """Operators of ``model`` as it stands, with their MACs for a batch of one, without labels or groups.

    Args:
        model: the network.
        example_inputs: as for `capture`.

    Raises:
        TraceError: if the forward pass cannot run without values.
    """
    run = LabelPass(model, with_labels=False)
    was_training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        run.run(model, [batch_of_two(x) for x in _as_tuple(example_inputs)])
    finally:
        for name, module in model.named_modules():
            module.training = was_training[name]
    return run.record.operators
