"""Counted cost: exact multiply-adds and parameters of a network, before and after units are removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from graph_encoder.capture import trace_operators
from graph_encoder.network import LinearDim, NetworkGraph, Term

CostKind = Literal["macs", "params"]

FLOPS_PER_MAC = 2


def count_macs(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...]) -> int:
    """Multiply-adds of one forward pass for a batch of one, counted on the operators that really run.

    Args:
        model: network as built; neither its mode nor its weights are touched.
        example_inputs: what ``model`` takes, any batch size.
    """
    return sum(operator.macs for operator in trace_operators(model, example_inputs))


def flops_of(macs: int) -> int:
    """Floating-point operations of so many multiply-adds."""
    return FLOPS_PER_MAC * macs


def count_params(model: nn.Module) -> int:
    """Elements of all parameters; a shared parameter counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def size_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers at their present types; shared ones count once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class CostModel:
    """Cost of a network as an exact function of how many units each of its channel groups keeps.

    The cost is ``sum over terms of factor * prod over dims of (full - sum over groups of k * removed units)``, with
    the terms of the captured graph. It never falls when a group keeps more.

    Attributes:
        kind: ``"macs"`` (batch of one) or ``"params"``.
        groups: names of the groups that a vector of counts stands for, in its order.
        sizes: int64 of shape ``(groups,)``, units of each group in the dense network.
        dense: cost with every unit kept.
    """

    def __init__(self, graph: NetworkGraph, kind: CostKind = "macs", groups: Sequence[str] | None = None) -> None:
        """Read the terms of ``graph``.

        Args:
            graph: captured network.
            kind: what is counted.
            groups: names of the groups that may lose units; the prunable ones if not given.
        """
        names = tuple(group.name for group in graph.prunable) if groups is None else tuple(groups)
        self.kind = kind
        self.groups = names
        self.sizes = np.array([graph.group(name).size for name in names], dtype=np.int64)
        self._column = {graph.group_index[name]: column for column, name in enumerate(names)}
        self._read(graph.mac_terms if kind == "macs" else graph.param_terms)
        self.dense = self(self.sizes)

    def _read(self, terms: Sequence[Term]) -> None:
        """Lay the terms out as arrays: a row for each distinct dimension, a list of rows for each term."""
        row_of: dict[LinearDim, int] = {}
        rows = [[row_of.setdefault(dim, len(row_of)) for dim in term.dims] for term in terms]
        one = row_of.setdefault(LinearDim(1), len(row_of))
        width = max((len(row) for row in rows), default=1)
        self.owners = tuple(term.owner for term in terms)
        self._factors = np.array([term.factor for term in terms], dtype=np.int64)
        self._rows = np.array([row + [one] * (width - len(row)) for row in rows], dtype=np.int64).reshape(-1, width)
        self._full = np.array([dim.full for dim in row_of], dtype=np.int64)
        # Floats, for the fast matrix product: sizes lie far below 2**53, where floats stop being exact.
        self._per_unit = np.zeros((len(row_of), len(self.groups)))
        for dim, row in row_of.items():
            for group, channels in dim.per_unit:
                if group in self._column:
                    self._per_unit[row, self._column[group]] += channels
        self._touched = [self._terms_of(column) for column in range(len(self.groups))]

    def _terms_of(self, column: int) -> list[tuple[int, list[tuple[int, int]]]]:
        """Terms that change with one group, each as its factor and its (dimension row, channels a unit) pairs."""
        per_unit = self._per_unit[:, column].astype(np.int64)
        touched = np.flatnonzero((per_unit[self._rows] != 0).any(axis=1))
        return [
            (int(self._factors[term]), [(int(row), int(per_unit[row])) for row in self._rows[term]]) for term in touched
        ]

    def dimensions(self, kept: NDArray[np.int64]) -> NDArray[np.int64]:
        """Size of every distinct dimension, shape ``(dims,)``, when ``kept`` units of each group stay."""
        removed = self._per_unit @ (self.sizes - kept)
        return self._full - removed.astype(np.int64)

    def __call__(self, kept: NDArray[np.integer]) -> int:
        """Exact cost when group ``i`` keeps ``kept[i]`` units."""
        return int(self.per_term(np.asarray(kept, dtype=np.int64)).sum())

    def per_term(self, kept: NDArray[np.int64]) -> NDArray[np.int64]:
        """Exact cost of every term, shape ``(terms,)``, in the order of `owners`."""
        product: NDArray[np.int64] = self._factors * self.dimensions(kept)[self._rows].prod(axis=1)
        return product

    def of_ratios(self, ratios: NDArray[np.float64]) -> NDArray[np.float64]:
        """The same formula for fractions of units: ``(batch, groups)`` keep ratios to ``(batch,)`` costs."""
        removed = ((1 - ratios) * self.sizes) @ self._per_unit.T
        result: NDArray[np.float64] = (self._full - removed)[:, self._rows].prod(axis=2) @ self._factors.astype(float)
        return result

    def by_owner(self, kept: NDArray[np.int64]) -> Mapping[str, int]:
        """Exact cost of every operator (or parameter tensor), by name."""
        totals = dict.fromkeys(self.owners, 0)
        for owner, value in zip(self.owners, self.per_term(kept), strict=True):
            totals[owner] += int(value)
        return totals

    def meter(self, kept: NDArray[np.int64]) -> CostMeter:
        """A running cost that starts from ``kept`` and takes one group's change at a time."""
        return CostMeter(self.dimensions(kept).tolist(), self(kept), self._touched)


class CostMeter:
    """Cost of a plan that changes one group at a time, in plain integers: only the terms that change are computed.

    Attributes:
        cost: cost of the plan as it stands.
    """

    def __init__(
        self, dimensions: list[int], cost: int, touched: Sequence[list[tuple[int, list[tuple[int, int]]]]]
    ) -> None:
        """Start from the dimensions and the cost of a plan; use `CostModel.meter`."""
        self.cost = cost
        self._dimensions = dimensions
        self._touched = touched

    def increase(self, group: int, units: int) -> int:
        """How much the cost grows when group ``group`` keeps ``units`` more."""
        growth = 0
        for factor, dims in self._touched[group]:
            before = after = factor
            for row, channels in dims:
                size = self._dimensions[row]
                before *= size
                after *= size + channels * units
            growth += after - before
        return growth

    def keep_more(self, group: int, units: int) -> None:
        """Let group ``group`` keep ``units`` more than it does."""
        self.cost += self.increase(group, units)
        changed = {row: channels for _, dims in self._touched[group] for row, channels in dims}
        for row, channels in changed.items():
            self._dimensions[row] += channels * units


def predict_cost(graph: NetworkGraph, kept: Mapping[str, int], kind: CostKind = "macs") -> int:
    """Exact cost of ``graph`` when each group named in ``kept`` keeps so many units and all others stay dense.

    Raises:
        KeyError: if a group is not one of the graph's.
    """
    index = graph.group_index
    removed = {index[name]: graph.group(name).size - count for name, count in kept.items()}
    return sum(term.value(removed) for term in (graph.mac_terms if kind == "macs" else graph.param_terms))
