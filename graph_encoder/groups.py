"""labels -> groups: classes of labels that the same tensors hold equally often are the units of one channel group."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .labels import IntArray, LabelClasses, varying_dims
from .network import ChannelGroup, HeldNumber, LinearDim, Member, NetworkGraph, Term
from .opaque import Opaque
from .trace import Axis, Held, Record


def assemble(record: Record, model: nn.Module, opaque: Opaque) -> NetworkGraph:
    """Turn the labels of one run of ``model`` into groups, members and cost terms; ``opaque`` modules are named."""
    for fold in record.folds:
        record.classes.make_rectangular(fold.labels)
    _bind_shared_parameters(record)
    _bind_loose_parameters(record)
    roots = _Roots(record.classes)
    places = _Places(roots, _units_by_signature(record, roots), record.classes.size)
    groups = _build_groups(record, places)
    return NetworkGraph(
        operators=tuple(record.operators),
        edges=tuple(dict.fromkeys(record.edges)),
        groups=tuple(groups),
        mac_terms=tuple(Term(m.operator, m.factor, tuple(map(places.linear_dim, m.dims))) for m in record.multiplies),
        param_terms=tuple(_param_term(record, places, name, p) for name, p in model.named_parameters()),
        skipped={
            **opaque.reasons,
            **record.skipped,
            **{n: group.reason for group in groups if group.reason for n in group.producers},
        },
        rewrites=tuple(held for number in record.held if (held := places.held(number)) is not None),
        opaque=tuple(opaque.causes),
    )


LabelKey = tuple[int, torch.Size, tuple[int, ...]]


class _Roots:
    """Class representatives of labels, found once for the many dimensions that hold the same labels."""

    def __init__(self, classes: LabelClasses) -> None:
        self._classes = classes
        self._known: dict[LabelKey, tuple[Tensor, IntArray]] = {}

    @staticmethod
    def key(labels: Tensor) -> LabelKey:
        """Equal for the same elements of the same memory, as long as that is alive."""
        return labels.data_ptr(), labels.shape, labels.stride()

    def of(self, labels: Tensor) -> IntArray:
        """The representatives, flattened."""
        key = self.key(labels)
        if key not in self._known:
            # With the labels, lest another array come to lie at the address of one that is gone.
            self._known[key] = labels, self._classes.find(labels.reshape(-1).numpy())
        return self._known[key][1]


def _bind_shared_parameters(record: Record) -> None:
    """Bind a parameter that all heads share to the channels of each, unless heads go whole and it stays."""
    for labels, shared in record.shared:
        roots = torch.from_numpy(record.classes.find(labels.reshape(-1).numpy())).reshape(labels.shape)
        if any(bool((roots != roots.narrow(dim, 0, 1)).any()) for dim in varying_dims(shared)):
            record.classes.union(labels, shared)


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
        met = roots[tuple(index)]
        axis = record.axes.setdefault((name, dims[0]), Axis(name, dims[0], "elementwise", met))
        if axis.labels is not met:
            # A weighted operator has it too: what both touch is one.
            record.classes.union(axis.labels.reshape(-1), met)


def _depends_only_on(roots: Tensor, dim: int) -> bool:
    rows = roots.movedim(dim, 0).reshape(roots.shape[dim], -1)
    return bool((rows == rows[:, :1]).all())


def _units_by_signature(record: Record, roots: _Roots) -> list[IntArray]:
    """Classes that touch the same tensors equally often, in the order in which they are first produced.

    A signature is a sum of pseudo-random 64-bit numbers, one for each pair of label array and count, so that all
    classes are compared at once. Dimensions that hold the same array hold each class equally often: it is summed once.
    """
    n, axes = record.classes.size, list(record.axes.values())
    first = np.full(n, len(axes), dtype=np.int64)
    arrays: dict[LabelKey, Tensor] = {}
    for index, axis in enumerate(axes):
        key = roots.key(axis.labels)
        if axis.role == "out" and key not in arrays:
            produced = roots.of(axis.labels)
            produced = produced[produced > 0]
            first[produced] = np.minimum(first[produced], index)
        arrays.setdefault(key, axis.labels)
    for multiply in record.multiplies:
        arrays.update((roots.key(labels), labels) for labels in multiply.dims if isinstance(labels, Tensor))
    signature = np.zeros(n, dtype=np.uint64)
    for index, labels in enumerate(arrays.values()):
        found = roots.of(labels)
        found = found[found > 0]
        # Labels of one array were mostly given out together, so counting from the lowest needs little room.
        lowest = int(found.min(initial=n))
        counts = np.bincount(found - lowest)
        touched = np.flatnonzero(counts)
        numbers = _mix(np.uint64(index + 1) * np.uint64(1 << 32) + counts[touched].astype(np.uint64))
        signature[touched + lowest] += numbers
    frozen = np.array([*record.classes.frozen_reasons()], dtype=np.int64)
    signature[frozen] ^= np.uint64(1)
    produced = np.flatnonzero(first < len(axes))
    _, inverse = np.unique(signature[produced], return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    units = np.split(produced[order], np.flatnonzero(np.diff(inverse[order])) + 1) if len(produced) else []
    return sorted(units, key=lambda unit: (int(first[unit[0]]), int(unit[0])))


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit changes half of the output bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class _Places:
    """Group and unit of every class, and the sizes that follow from them."""

    def __init__(self, roots: _Roots, units: list[IntArray], n_labels: int) -> None:
        self.units = units
        self._roots = roots
        # One entry more than labels, so that the labels of constants, 0 and -1, find the place of no group.
        self._group = np.full(n_labels + 1, -1, dtype=np.int64)
        self._unit = np.full(n_labels + 1, -1, dtype=np.int64)
        for index, classes in enumerate(units):
            self._group[classes] = index
            self._unit[classes] = np.arange(len(classes))
        self._by_group: dict[LabelKey, list[tuple[int, Tensor]]] = {}

    def by_group(self, labels: Tensor) -> list[tuple[int, Tensor]]:
        """Groups whose units occur among ``labels``, each with its positions: int64 of shape ``(units, k)``."""
        key = self._roots.key(labels)
        if key not in self._by_group:
            roots = self._roots.of(labels)
            group_at, unit_at = self._group[roots], self._unit[roots]
            # Sorted by group, then by unit; equal units keep their order.
            order = np.lexsort((unit_at, group_at))
            order = order[np.searchsorted(group_at[order], 0) :]
            cuts = np.flatnonzero(np.diff(group_at[order])) + 1
            self._by_group[key] = [
                (index, torch.from_numpy(positions.reshape(len(self.units[index]), -1)))
                for positions in (np.split(order, cuts) if len(order) else [])
                for index in [int(group_at[positions[0]])]
            ]
        return self._by_group[key]

    def linear_dim(self, labels: Tensor | int) -> LinearDim:
        """How many of ``labels`` are left, as a function of what is removed."""
        if isinstance(labels, int):
            return LinearDim(labels)
        return LinearDim(
            labels.numel(), tuple((index, positions.shape[1]) for index, positions in self.by_group(labels))
        )

    def held(self, held: Held) -> HeldNumber | None:
        """The number as a count of units, or None if it stays and nothing can make it another."""
        rows = held.labels.flatten(1) if held.labels.dim() > 1 else held.labels[:, None]
        roots = self._roots.of(held.labels).reshape(rows.shape)
        group, unit = self._group[roots[:, 0]], self._unit[roots[:, 0]]
        # A dimension whose positions hold several classes does not shrink: another one does.
        is_fixed = bool((roots != roots[:, :1]).any())
        if is_fixed:
            group = np.full_like(group, -1)
        # What is computed may follow a width that it should not: ``x.shape[-1] // n_heads`` where heads go.
        if not held.computed_by and (is_fixed or (held.argument[0] != "split" and (group < 0).all())):
            return None
        counted = torch.from_numpy(group), torch.from_numpy(unit)
        return HeldNumber(held.node, held.argument, *counted, computed_by=held.computed_by)


def _build_groups(record: Record, places: _Places) -> list[ChannelGroup]:
    members: dict[int, list[Member]] = defaultdict(list)
    producers: dict[int, list[str]] = defaultdict(list)
    consumers: dict[int, list[str]] = defaultdict(list)
    for axis in record.axes.values():
        users = record.readers.get((axis.tensor, axis.dim), [])
        for index, indices in places.by_group(axis.labels):
            members[index].append(Member(axis.tensor, axis.dim, axis.role, indices))
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
