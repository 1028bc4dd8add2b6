"""Counted cost: multiply-adds, parameters, bytes and bit operations of a network, before and after compression."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from graph_encoder.capture import trace_operators
from graph_encoder.network import LinearDim, NetworkGraph, Term
from pruning.layer_policy import FULL_BITS, LayerPolicy
from pruning.policy import CompressionPolicy
from pruning.stored_size import SCALE_BYTES, ZERO_POINT_BYTES, parameter_bytes

from .decision import FULL_DENSITY, LayerChoice, LayerDecision

CountedKind = Literal["macs", "params", "bytes", "bops"]
"""Multiply-adds with a non-zero weight, for a batch of one; parameters that are not zero; bytes that the parameters can
be packed into, with all that is needed to read them (`pruning.stored_size`); bit operations, which are multiply-adds
times the bits of the weight and of the value read (van Baalen et al. 2020, Bayesian Bits, section 4)."""
CostKind = CountedKind | Literal["latency"]
"""What a budget may be on; latency is in nanoseconds, see `latency.predict.LatencyModel`."""

FLOPS_PER_MAC = 2
BITS_PER_BYTE = 8


def count_macs(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...]) -> int:
    """Multiply-adds of one forward pass for a batch of one, counted on the operators that really run.

    Args:
        model: network as built; neither its mode nor its weights are touched.
        example_inputs: what ``model`` takes, any batch size.
    """
    return sum(operator.macs for operator in trace_operators(model, example_inputs))


def count_params(model: nn.Module) -> int:
    """Elements of all parameters; a shared parameter counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_nonzero(
    model: nn.Module, graph: NetworkGraph, policy: CompressionPolicy, example_inputs: Tensor | tuple[Tensor, ...]
) -> tuple[int, int]:
    """Multiply-adds with a weight that is not zero, and parameters that are not, of the network that a policy leaves.

    They are counted on the network. What zeros save is no size of a tensor: where layers have a policy of their own,
    it follows from that, by formulas.

    Args:
        model: as built.
        graph: of the dense network.
        policy: that it was built by.
        example_inputs: what ``model`` takes, any batch size.
    """
    if policy.layers:
        return predict_cost(graph, policy), predict_cost(graph, policy, "params")
    return count_macs(model, example_inputs), count_params(model)


def size_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers at their present types, in memory; shared ones count once.

    A budget of bytes counts something else, see `pruning.stored_size.parameter_bytes`: what zeros and bits save is no
    size of a tensor, and buffers of batch norms fold away.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class CostModel:
    """Cost of a network as an exact function of what each of its decisions leaves.

    The cost is ``sum over terms of factor * prod over dims of (full - sum over decisions of k * removed)``, with the
    terms of the captured graph and one more dimension for each density or bit-width that a term is multiplied by.
    It never falls when a decision leaves more.

    Attributes:
        kind: what is counted.
        names: of the decisions that a vector of counts stands for: channel groups, then layer decisions.
        sizes: int64 of shape ``(decisions,)``: units of each group, level of each untouched layer.
        dense: cost of the untouched network.
    """

    def __init__(
        self,
        graph: NetworkGraph,
        kind: CountedKind = "macs",
        groups: Sequence[str] | None = None,
        layers: Sequence[LayerDecision] = (),
        sparsity: str = "unstructured",
    ) -> None:
        """Read the terms of ``graph``.

        Args:
            graph: captured network.
            kind: what is counted.
            groups: names of the groups that may lose units; the prunable ones if not given.
            layers: decisions inside layers.
            sparsity: pattern of the zeros. A layer that may get zeros, or fewer bits, counts with the bytes that
                their places and scales take even where it gets none: some percent too much, with N:M at 8 bits a
                quarter.
        """
        names = tuple(group.name for group in graph.prunable) if groups is None else tuple(groups)
        self.kind = kind
        self.names = (*names, *(decision.name for decision in layers))
        sizes = [graph.group(name).size for name in names] + [decision.size for decision in layers]
        self.sizes = np.array(sizes, dtype=np.int64)
        self._column = {graph.group_index[name]: column for column, name in enumerate(names)}
        self._column |= {len(graph.groups) + place: len(names) + place for place in range(len(layers))}
        self._scale = _scale(kind)
        self._read([*_terms(graph, kind, layers), *(_overhead(graph, layers, sparsity) if kind == "bytes" else ())])
        self.dense = -(-sum(term.value({}) for term in _terms(graph, kind, ())) // self._scale)

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
        self._per_unit = np.zeros((len(row_of), len(self.names)))
        for dim, row in row_of.items():
            for group, channels in dim.per_unit:
                if group in self._column:
                    self._per_unit[row, self._column[group]] += channels
        self._touched = [self._terms_of(column) for column in range(len(self.names))]

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
        """Cost when decision ``i`` leaves ``kept[i]``, rounded up."""
        return -(-int(self._per_term(np.asarray(kept, dtype=np.int64)).sum()) // self._scale)

    def _per_term(self, kept: NDArray[np.int64]) -> NDArray[np.int64]:
        """Exact cost of every term, shape ``(terms,)``, in the order of `owners` and in parts of ``1 / scale``."""
        product: NDArray[np.int64] = self._factors * self.dimensions(kept)[self._rows].prod(axis=1)
        return product

    def of_ratios(self, ratios: NDArray[np.float64]) -> NDArray[np.float64]:
        """The same formula for fractions of units: ``(batch, decisions)`` keep ratios to ``(batch,)`` costs."""
        removed = ((1 - ratios) * self.sizes) @ self._per_unit.T
        result: NDArray[np.float64] = (self._full - removed)[:, self._rows].prod(axis=2) @ self._factors.astype(float)
        return result / self._scale

    def by_owner(self, kept: NDArray[np.int64]) -> Mapping[str, float]:
        """Cost of every operator (or parameter tensor), by name."""
        totals = dict.fromkeys(self.owners, 0.0)
        for owner, value in zip(self.owners, self._per_term(kept), strict=True):
            totals[owner] += int(value) / self._scale
        return totals

    def meter(self, kept: NDArray[np.int64]) -> CostMeter:
        """A running cost that starts from ``kept`` and takes one decision's change at a time."""
        return CostMeter(self.dimensions(kept).tolist(), int(self._per_term(kept).sum()), self._touched, self._scale)


class CostMeter:
    """Cost of a plan that changes one decision at a time, in integers: only the terms that change are computed."""

    def __init__(
        self, dimensions: list[int], parts: int, touched: Sequence[list[tuple[int, list[tuple[int, int]]]]], scale: int
    ) -> None:
        """Start from the dimensions and the cost of a plan, in parts of ``1 / scale``; use `CostModel.meter`."""
        self._dimensions = dimensions
        self._parts = parts
        self._touched = touched
        self._scale = scale

    @property
    def cost(self) -> int:
        """Cost of the plan as it stands, rounded up."""
        return -(-self._parts // self._scale)

    def with_more(self, decision: int, units: int) -> int:
        """What the plan would cost if ``decision`` left ``units`` more, rounded up."""
        return -(-(self._parts + self._growth(decision, units)) // self._scale)

    def keep_more(self, decision: int, units: int) -> None:
        """Let ``decision`` leave ``units`` more than it does."""
        self._parts += self._growth(decision, units)
        changed = {row: channels for _, dims in self._touched[decision] for row, channels in dims}
        for row, channels in changed.items():
            self._dimensions[row] += channels * units

    def _growth(self, decision: int, units: int) -> int:
        growth = 0
        for factor, dims in self._touched[decision]:
            before = after = factor
            for row, channels in dims:
                size = self._dimensions[row]
                before *= size
                after *= size + channels * units
            growth += after - before
        return growth


def predict_cost(graph: NetworkGraph, policy: CompressionPolicy, kind: CountedKind = "macs") -> int:
    """Cost of ``graph`` under ``policy``; densities are rounded up to whole percents.

    Raises:
        KeyError: if a group is not one of the graph's.
    """
    if kind == "bytes":
        return sum(parameter_bytes(graph, policy).values())
    index = graph.group_index
    removed = {index[name]: policy.sizes[name] - len(kept) for name, kept in policy.kept.items()}
    decisions: list[LayerDecision] = []
    for name, layer in policy.layers.items():
        chosen: dict[LayerChoice, int] = {
            "density": math.ceil(layer.density * FULL_DENSITY - 1e-9),
            "weight_bits": layer.weight_bits,
            "act_bits": layer.act_bits,
        }
        for choice, level in chosen.items():
            full = FULL_DENSITY if choice == "density" else FULL_BITS
            removed[len(graph.groups) + len(decisions)] = full - level
            decisions.append(LayerDecision(name, choice, tuple(dict.fromkeys((level, full)))))
    return -(-sum(term.value(removed) for term in _terms(graph, kind, decisions)) // _scale(kind))


def _scale(kind: CountedKind) -> int:
    return FULL_DENSITY * (BITS_PER_BYTE if kind == "bytes" else 1)


def _terms(graph: NetworkGraph, kind: CountedKind, layers: Sequence[LayerDecision]) -> Iterator[Term]:
    """Terms of the cost in parts of ``1 / _scale(kind)``; decision ``i`` of ``layers`` has index ``groups + i``."""
    choices: dict[str, dict[str, LinearDim]] = {}
    for place, decision in enumerate(layers):
        names = ("weight_bits", "act_bits") if decision.choice == "bits" else (decision.choice,)
        dim = LinearDim(decision.size, ((len(graph.groups) + place, 1),))
        choices.setdefault(decision.layer, {}).update(dict.fromkeys(names, dim))
    counts_params = kind in ("params", "bytes")
    weighted = [operator for operator in graph.operators if operator.weight]
    layer_by_owner = {o.weight if counts_params else o.name: o.layer for o in weighted}
    for term in graph.param_terms if counts_params else graph.mac_terms:
        own = choices.get(layer_by_owner.get(term.owner, ""), {})
        dims = [own.get("density", LinearDim(FULL_DENSITY))]
        if kind in ("bytes", "bops"):
            dims.append(own.get("weight_bits", LinearDim(FULL_BITS)))
        if kind == "bops":
            dims.append(own.get("act_bits", LinearDim(FULL_BITS)))
        yield Term(term.owner, term.factor, (*term.dims, *dims))


def _overhead(graph: NetworkGraph, layers: Sequence[LayerDecision], sparsity: str) -> Iterator[Term]:
    """Bytes beside the values, as terms like those of `_terms`: places of weights among zeros, scales of integers.

    And a byte for each decision, since every tensor is stored in whole ones.
    """
    pattern, bit = LayerPolicy(sparsity), FULL_DENSITY
    by_tensor = {term.owner: term for term in graph.param_terms}
    for place, decision in enumerate(layers):
        term = by_tensor[f"{decision.layer}.weight"]
        yield Term(term.owner, BITS_PER_BYTE * bit, ())
        if decision.choice == "density":
            share = LinearDim(FULL_DENSITY, ((len(graph.groups) + place, 1),))
            if pattern.n_of_m:
                bits = math.ceil(math.log2(pattern.n_of_m[1]))
                yield Term(term.owner, term.factor * bits, (*term.dims, share))
            else:
                yield Term(term.owner, term.factor * math.ceil(bit / pattern.block), term.dims)
        elif decision.choice == "act_bits":
            yield Term(term.owner, (SCALE_BYTES + ZERO_POINT_BYTES) * BITS_PER_BYTE * bit, ())
        else:
            yield Term(term.owner, SCALE_BYTES * BITS_PER_BYTE * bit, term.dims[:1])
            if decision.choice == "bits":
                yield Term(term.owner, (SCALE_BYTES + ZERO_POINT_BYTES) * BITS_PER_BYTE * bit, ())
