"""labels -> groups: classes of labels that the same tensors hold equally often are the units of one channel group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .labels import IntArray
from .network import ChannelGroup, HeldNumber, LinearDim, Member, NetworkGraph, Term
from .trace import Axis, Held, Record


def assemble(record: Record, model: nn.Module) -> NetworkGraph:
    """Turn the labels of one run of ``model`` into groups, members and cost terms."""
    for grid in record.grids:
        record.classes.make_rectangular(grid)
    _bind_loose_parameters(record)
    axes = [_RootedAxis(axis, record.classes.find(axis.labels.reshape(-1).numpy())) for axis in record.axes.values()]
    places = _Places(record, _units_by_signature(record, axes))
    groups = _build_groups(record, axes, places)
    return NetworkGraph(
        operators=tuple(record.operators),
        edges=tuple(dict.fromkeys(record.edges)),
        groups=tuple(groups),
        mac_terms=tuple(Term(m.operator, m.factor, tuple(map(places.linear_dim, m.dims))) for m in record.multiplies),
        param_terms=tuple(_param_term(record, places, name, p) for name, p in model.named_parameters()),
        skipped={name: group.reason for group in groups if group.reason for name in group.producers},
        rewrites=tuple(held for number in record.held if (held := places.held(number)) is not None),
    )


@dataclass(frozen=True)
class _RootedAxis:
    axis: Axis
    roots: IntArray


def _bind_loose_parameters(record: Record) -> None:
    """Give each parameter that met activations element by element the one dimension that its channels run along."""
    for name, labels in record.loose.items():
        roots = torch.from_numpy(record.classes.find(labels.reshape(-1).numpy())).reshape(labels.shape)
        if roots.numel() == 1:
            continue
        dims = [dim for dim in range(roots.dim()) if roots.shape[dim] > 1 and _depends_only_on(roots, dim)]
        if not dims:
            record.classes.freeze(roots, f"meets the parameter '{name}' in more than one dimension")
            continue
        index: list[Any] = [0] * roots.dim()
        index[dims[0]] = slice(None)
        record.axes.setdefault((name, dims[0]), Axis(name, dims[0], "elementwise", roots[tuple(index)]))


def _depends_only_on(roots: Tensor, dim: int) -> bool:
    rows = roots.movedim(dim, 0).reshape(roots.shape[dim], -1)
    return bool((rows == rows[:, :1]).all())


def _units_by_signature(record: Record, axes: Sequence[_RootedAxis]) -> list[IntArray]:
    """Classes that touch the same tensors equally often, in the order in which they are first produced.

    A signature is a sum of pseudo-random 64-bit numbers, one for each pair of tensor dimension and count, so that all
    classes are compared at once.
    """
    n = record.classes.size
    signature = np.zeros(n, dtype=np.uint64)
    first = np.full(n, len(axes), dtype=np.int64)
    counted = [d for multiply in record.multiplies for d in multiply.dims if isinstance(d, Tensor)]
    others = [record.classes.find(labels.reshape(-1).numpy()) for labels in counted]
    for index, labels in enumerate([axis.roots for axis in axes] + others):
        roots, counts = np.unique(labels[labels > 0], return_counts=True)
        signature[roots] += _mix(np.uint64(index + 1) * np.uint64(1 << 32) + counts.astype(np.uint64))
        if index < len(axes) and axes[index].axis.role == "out":
            first[roots] = np.minimum(first[roots], index)
    frozen = np.array([*record.classes.frozen_reasons()], dtype=np.int64)
    signature[frozen] ^= np.uint64(1)
    produced = np.flatnonzero(first < len(axes))
    _, inverse = np.unique(signature[produced], return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    units = np.split(produced[order], np.flatnonzero(np.diff(inverse[order])) + 1) if len(produced) else []
    return sorted(units, key=lambda roots: (int(first[roots[0]]), int(roots[0])))


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit changes half of the output bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class _Places:
    """Group and unit of every class, and the sizes that follow from them."""

    def __init__(self, record: Record, units: list[IntArray]) -> None:
        self.units = units
        self._classes = record.classes
        # One entry more than labels, so that the labels of constants, 0 and -1, find the place of no group.
        self._group = np.full(record.classes.size + 1, -1, dtype=np.int64)
        self._unit = np.full(record.classes.size + 1, -1, dtype=np.int64)
        for index, roots in enumerate(units):
            self._group[roots] = index
            self._unit[roots] = np.arange(len(roots))

    def of_roots(self, roots: IntArray) -> tuple[IntArray, IntArray]:
        """Group and unit by position, -1 where there is none."""
        return self._group[roots], self._unit[roots]

    def of_labels(self, labels: Tensor) -> tuple[IntArray, IntArray]:
        """Group and unit by position of flattened labels."""
        return self.of_roots(self._classes.find(labels.reshape(-1).numpy()))

    def linear_dim(self, labels: Tensor | int) -> LinearDim:
        """How many of ``labels`` are left, as a function of what is removed."""
        if isinstance(labels, int):
            return LinearDim(labels)
        groups, counts = np.unique(self.of_labels(labels)[0], return_counts=True)
        pairs = zip(groups.tolist(), counts.tolist(), strict=True)
        # All units of a group occur equally often wherever one does: that is what made them a group.
        return LinearDim(labels.numel(), tuple((g, count // len(self.units[g])) for g, count in pairs if g >= 0))

    def held(self, held: Held) -> HeldNumber | None:
        """The number as a count of units, or None if the dimension it stands for never shrinks."""
        rows = held.labels.flatten(1) if held.labels.dim() > 1 else held.labels[:, None]
        roots = self._classes.find(rows.reshape(-1).numpy()).reshape(rows.shape)
        # A dimension whose positions hold several classes does not shrink: another one does.
        if (roots != roots[:, :1]).any():
            return None
        group, unit = self.of_roots(roots[:, 0])
        if held.argument[0] != "split" and (group < 0).all():
            return None
        return HeldNumber(held.node, held.argument, torch.from_numpy(group), torch.from_numpy(unit))


def _build_groups(record: Record, axes: Sequence[_RootedAxis], places: _Places) -> list[ChannelGroup]:
    members: dict[int, list[Member]] = defaultdict(list)
    producers: dict[int, list[str]] = defaultdict(list)
    consumers: dict[int, list[str]] = defaultdict(list)
    for rooted in axes:
        axis = rooted.axis
        group_at, unit_at = places.of_roots(rooted.roots)
        users = record.readers.get((axis.tensor, axis.dim), [])
        for index in np.unique(group_at[group_at >= 0]).tolist():
            positions = np.flatnonzero(group_at == index)
            order = np.argsort(unit_at[positions], kind="stable")
            indices = positions[order].reshape(len(places.units[index]), -1)
            members[index].append(Member(axis.tensor, axis.dim, axis.role, torch.from_numpy(indices)))
            if axis.role != "elementwise":
                (producers if axis.role == "out" else consumers)[index].extend(users)
    reasons = record.classes.frozen_reasons()
    used: dict[str, int] = {}
    groups = []
    for index, roots in enumerate(places.units):
        reason = reasons.get(int(roots[0]), "")
        # One unit alone cannot be removed: the layer would have no output left.
        if not reason and len(roots) == 1:
            reason = "its channels can only be removed all together"
        name = producers[index][0].partition("#")[0]
        count = used[name] = used.get(name, 0) + 1
        groups.append(
            ChannelGroup(
                name if count == 1 else f"{name}#{count}", len(roots), tuple(members[index]),
                tuple(dict.fromkeys(producers[index])), tuple(dict.fromkeys(consumers[index])), reason,
            )
        )  # fmt: skip
    return groups


def _param_term(record: Record, places: _Places, name: str, parameter: Tensor) -> Term:
    dims = []
    for dim, size in enumerate(parameter.shape):
        axis = record.axes.get((name, dim))
        dims.append(LinearDim(int(size)) if axis is None else places.linear_dim(axis.labels))
    return Term(name, 1, tuple(dims))
