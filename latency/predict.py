"""The latency of a network as a function of a plan: units of channel groups and bits of layers, read from a table."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import lsq_linear

from graph_encoder.network import LinearDim, NetworkGraph
from pruning.layer_policy import FULL_BITS, INTEGER_BITS

from .decision import LayerDecision
from .device import TableError
from .integers import IntegerFlow, State
from .layers import Layer, LayerKind, layers_of
from .runtimes import LatencyError
from .table import Calibration, KindTimes, LatencyTable, network_key

Floats = NDArray[np.float64]
_PRIOR = 0.02
"""Weight of scales of 1 and an offset of 0 in a calibration: it matters while there are few networks."""
_MANY = 1e4
"""Elements that are fitted as one, so that all numbers of a fit are of about one size."""


class Sums(NamedTuple):
    """What a plan's time is made of.

    Attributes:
        floats: times of the layers that run in floats, in units of the reference layer's time.
        integers: times of those that run in integers.
        conversions: tensors that are converted between integers and floats, or transposed among integers.
        elements: of these.
    """

    floats: float
    integers: float
    conversions: int
    elements: int


class Step(NamedTuple):
    """What one decision changes.

    Attributes:
        channels: what a unit more adds to each dimension, by its row.
        operators: places of those that read or write such channels.
        is_bits: whether it decides how operators are computed.
    """

    channels: Mapping[int, int]
    operators: tuple[int, ...]
    is_bits: bool


class LatencyModel:
    """Predicted latency of a plan, called as `latency.cost.CostModel` is, in whole nanoseconds.

    It is the sum of the table's times of the layers and of what conversions between integers and floats cost,
    calibrated with whole networks (`latency.table.Calibration`). The same table and counts give the same number always.
    Where the runtime has faster kernels for counts that divide evenly, a plan that keeps more can cost less, and so can
    a plan with more layers in floats, where fewer tensors are converted.

    Attributes:
        kind: ``"latency"``.
        names: of the decisions that a vector of counts stands for: channel groups, then layer decisions. Zeros
            change nothing: the runtimes compute them as any other weight.
        sizes: int64 of shape ``(decisions,)``: units of each group, level of each untouched layer.
        dense: nanoseconds of the untouched network.
        key: of the network, for which a calibration holds.
        calibration: how the sums over layers and conversions become the network's time.
        owners: names of the operators that the table times, in network order.
    """

    kind: Literal["latency"] = "latency"

    def __init__(
        self,
        graph: NetworkGraph,
        table: LatencyTable,
        groups: Sequence[str] | None = None,
        layers: Sequence[LayerDecision] = (),
        calibration: Calibration | None = None,
    ) -> None:
        """Look up what the network's layers need.

        Args:
            graph: captured network.
            table: times of its layer kinds.
            groups: names of the groups that may lose units; the prunable ones if not given.
            layers: decisions inside layers; bits are those of weights and activations together, among the table's.
                Where some layer may have 8 bits the table has to hold all of them with 8: between two tensors in
                integers a runtime computes a layer in integers too.
            calibration: the table's own for this network if not given; without one, the plain sum and an empty call.

        Raises:
            TableError: if the table lacks a layer kind.
            LatencyError: if a decision is on bits that no runtime computes with.
        """
        _check_decisions(layers)
        names = tuple(group.name for group in graph.prunable) if groups is None else tuple(groups)
        self.names = (*names, *(decision.name for decision in layers))
        sizes = [graph.group(name).size for name in names] + [decision.size for decision in layers]
        self.sizes = np.array(sizes, dtype=np.int64)
        self.key = network_key(graph)
        self.calibration = calibration or table.calibrations.get(self.key) or Calibration(offset=table.empty)
        self._unit = table.reference_ns
        self._offset = int(self.calibration.offset * table.reference_ns)
        timed = layers_of(graph)
        self.owners = tuple(layer.name for layer in timed)
        self._flow = IntegerFlow(graph)
        self._read_dims([(layer.inputs, layer.outputs) for layer in timed], graph, names, layers)
        self._read_operators(graph)
        self._read_kinds(timed, table)
        self.dense = self(self.sizes)

    def _read_dims(
        self,
        dims: Sequence[tuple[LinearDim, LinearDim]],
        graph: NetworkGraph,
        names: Sequence[str],
        layers: Sequence[LayerDecision],
    ) -> None:
        """A row for each distinct number of channels, then one for each layer whose bits are decided."""
        row_of: dict[LinearDim, int] = {}
        self._rows = [tuple(row_of.setdefault(dim, len(row_of)) for dim in pair) for pair in dims]
        self._written = [row_of.setdefault(dim, len(row_of)) for dim in self._flow.channels]
        column = {graph.group_index[name]: index for index, name in enumerate(names)}
        bits = [place for place, decision in enumerate(layers) if decision.choice == "bits"]
        self._full = np.array([dim.full for dim in row_of] + [layers[place].size for place in bits], dtype=np.int64)
        self._per_unit = np.zeros((len(self._full), len(self.names)))
        for dim, row in row_of.items():
            for group, channels in dim.per_unit:
                if group in column:
                    self._per_unit[row, column[group]] += channels
        for row, place in enumerate(bits, start=len(row_of)):
            self._per_unit[row, len(names) + place] = 1
        self._bits_row = {layers[place].layer: row for row, place in enumerate(bits, start=len(row_of))}

    def _read_operators(self, graph: NetworkGraph) -> None:
        """For each operator the row of its bits and its place among the timed layers, -1 where it has none."""
        place = {name: index for index, name in enumerate(self.owners)}
        self._layer_at = [place.get(operator.name, -1) for operator in graph.operators]
        self._gates = [
            self._bits_row.get(operator.layer, -1) if operator.weight else -1 for operator in graph.operators
        ]

    def _read_kinds(self, timed: Sequence[Layer], table: LatencyTable) -> None:
        """Times of every layer in floats, and in integers if some layer may be."""
        self._times: list[KindTimes] = []
        self._known: list[dict[tuple[int, int], float]] = []
        self._kinds_of: list[tuple[int, ...]] = []
        position: dict[LayerKind, int] = {}
        for layer in timed:
            kinds = [replace(layer.kind, bits=bits) for bits in (FULL_BITS, INTEGER_BITS)[: 1 + self.has_integers]]
            for kind in kinds:
                if kind not in position:
                    position[kind] = len(self._times)
                    self._times.append(table.times(kind))
                    self._known.append({})
            self._kinds_of.append(tuple(position[kind] for kind in kinds))

    @property
    def has_integers(self) -> bool:
        """Whether some layer may have 8 bits."""
        return bool(self._bits_row)

    @cached_property
    def without_conversions(self) -> LatencyModel:
        """The same model where conversions cost nothing."""
        free = copy.copy(self)
        free.calibration = replace(self.calibration, conversion=0.0, element=0.0)
        return free

    def dimensions(self, kept: ArrayLike) -> list[int]:
        """Every distinct number of channels and the bits of each decision, ``dims`` of them, of a plan."""
        removed = self.sizes - np.asarray(kept, dtype=np.int64)
        dimensions: list[int] = (self._full - (self._per_unit @ removed).astype(np.int64)).tolist()
        return dimensions

    def __call__(self, kept: ArrayLike) -> int:
        """Nanoseconds of a call, batch of one, when decision ``i`` leaves ``kept[i]``; at least 1.

        Raises:
            TableError: if the table does not hold a count of that kind.
        """
        return self.meter(kept).cost

    def by_owner(self, kept: ArrayLike) -> Mapping[str, int]:
        """Calibrated nanoseconds of every layer, by name; they leave out the offset, and what conversions cost."""
        dimensions = self.dimensions(kept)
        states = self.states(dimensions)
        layers = {at: state for at, state in zip(self._layer_at, states, strict=True) if at >= 0}
        return {
            owner: self._layer_ns(at, dimensions, in_integers=layers[at].in_integers)
            for at, owner in enumerate(self.owners)
        }

    def sums(self, kept: ArrayLike) -> Sums:
        """What is calibrated: the plan's layers in floats and in integers, and its conversions."""
        dimensions = self.dimensions(kept)
        layers, conversions, elements = [0.0, 0.0], 0, 0
        for operator, state in enumerate(self.states(dimensions)):
            if (at := self._layer_at[operator]) >= 0:
                layers[state.in_integers] += self._layer_time(at, dimensions, in_integers=state.in_integers)
            conversions += state.passes
            elements += state.passes * self._elements(operator, dimensions)
        return Sums(layers[0], layers[1], conversions, elements)

    def meter(self, kept: ArrayLike) -> LatencyMeter:
        """A running cost that starts from ``kept`` and takes one decision's change at a time."""
        return LatencyMeter(self, self.dimensions(kept))

    def states(self, dimensions: Sequence[int]) -> list[State]:
        """How each operator is computed, given what `dimensions` returns."""
        return self._flow.states([gate >= 0 and dimensions[gate] == INTEGER_BITS for gate in self._gates])

    def operator_ns(self, operator: int, dimensions: Sequence[int], state: State) -> int:
        """Calibrated nanoseconds of an operator by its place in the graph, with the conversions of what it writes."""
        at, total = self._layer_at[operator], 0
        if at >= 0:
            total = self._layer_ns(at, dimensions, in_integers=state.in_integers)
        if state.passes:
            each = self.calibration.conversion + self.calibration.element * self._elements(operator, dimensions)
            total += int(self._unit * state.passes * each)
        return total

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """What a step of each decision changes."""
        found = []
        for column in self._per_unit.T:
            channels = {int(row): int(column[row]) for row in np.flatnonzero(column)}
            operators = (
                index
                for index, (at, written) in enumerate(zip(self._layer_at, self._written, strict=True))
                if channels.keys() & {written, *(self._rows[at] if at >= 0 else ())}
            )
            found.append(Step(channels, tuple(operators), bool(channels.keys() & set(self._bits_row.values()))))
        return tuple(found)

    def _layer_time(self, at: int, dimensions: Sequence[int], *, in_integers: bool) -> float:
        inputs, outputs = self._rows[at]
        kind, counts = self._kinds_of[at][in_integers], (dimensions[inputs], dimensions[outputs])
        known = self._known[kind].get(counts)
        if known is None:
            known = self._known[kind][counts] = self._times[kind](*counts)
        return known

    def _layer_ns(self, at: int, dimensions: Sequence[int], *, in_integers: bool) -> int:
        scale = self.calibration.scale_of(in_integers=in_integers)
        return int(self._unit * scale * self._layer_time(at, dimensions, in_integers=in_integers))

    def _elements(self, operator: int, dimensions: Sequence[int]) -> int:
        return self._flow.positions[operator] * dimensions[self._written[operator]]

    def total(self, operators_ns: int) -> int:
        """Nanoseconds of a network whose operators take so many, at least 1."""
        return max(1, self._offset + operators_ns)


class LatencyMeter:
    """Latency of a plan that changes one decision at a time; only what changes is looked up.

    Attributes:
        cost: nanoseconds of the plan as it stands.
    """

    def __init__(self, model: LatencyModel, dimensions: list[int]) -> None:
        """Start from the channels of a plan; use `LatencyModel.meter`."""
        self._model = model
        self._dimensions = dimensions
        self._states = model.states(dimensions)
        self._parts = [model.operator_ns(index, dimensions, state) for index, state in enumerate(self._states)]
        self._sum = sum(self._parts)
        self.cost = model.total(self._sum)

    def with_more(self, decision: int, units: int) -> int:
        """What the plan would cost if ``decision`` left ``units`` more; less than now where a faster kernel fits."""
        _, _, parts = self._after(decision, units)
        return self._model.total(self._sum + sum(part - self._parts[index] for index, part in parts.items()))

    def keep_more(self, decision: int, units: int) -> None:
        """Let ``decision`` leave ``units`` more than it does."""
        self._dimensions, self._states, parts = self._after(decision, units)
        for index, part in parts.items():
            self._sum += part - self._parts[index]
            self._parts[index] = part
        self.cost = self._model.total(self._sum)

    def _after(self, decision: int, units: int) -> tuple[list[int], list[State], dict[int, int]]:
        """Dimensions and states after a step, and nanoseconds of the operators that it changes."""
        step = self._model.steps[decision]
        dimensions, states = self._dimensions.copy(), self._states
        for row, channels in step.channels.items():
            dimensions[row] += channels * units
        changed: Iterable[int] = step.operators
        if step.is_bits:
            # The bits of one layer may decide over joins far behind it.
            states = self._model.states(dimensions)
            changed = (index for index, state in enumerate(states) if state != self._states[index])
        parts = {index: self._model.operator_ns(index, dimensions, states[index]) for index in changed}
        return dimensions, states, parts


def _check_decisions(layers: Sequence[LayerDecision]) -> None:
    for decision in layers:
        if decision.choice == "density":
            continue
        if decision.choice != "bits":
            msg = (
                f"{decision.name} decides weights and activations apart, and runtimes compute with both in integers or "
                "with neither; put bits in search.decide in its place"
            )
            raise LatencyError(msg)
        if untimed := [bits for bits in decision.levels if bits not in (INTEGER_BITS, FULL_BITS)]:
            msg = (
                f"{decision.name} may be {untimed[0]} bits, which no table times: below 8 they are simulated, and take "
                "no less time; keep to 8 and 32, or take a budget of bytes or bops"
            )
            raise LatencyError(msg)


def calibrated(table: LatencyTable, model: LatencyModel, plans: Sequence[ArrayLike], ratios: ArrayLike) -> LatencyTable:
    """The table with a calibration for one network, by least squares of the relative error.

    Without networks of integers there is no more to fit than the offset and the scale of floats; integers are then
    taken to scale as floats do, and conversions to cost nothing.

    Args:
        table: times of the network's layer kinds.
        model: of the network, with the decisions that the plans are of; its calibration is not looked at.
        plans: what each decision leaves, of each whole network that was timed.
        ratios: its time over the reference layer's, shape ``(plans,)``, from `latency.table.network_ratios`.

    Raises:
        TableError: if there are fewer than 3 networks of floats: two numbers are fitted to these.
    """
    measured = np.asarray(ratios, dtype=float)
    sums = [model.sums(plan) for plan in plans]
    is_mixed = np.array([one.integers + one.conversions > 0 for one in sums], dtype=bool)
    if (n_floats := int((~is_mixed).sum())) < 3:
        msg = f"a calibration fits two numbers to whole networks of floats, got {n_floats}; time at least 3"
        raise TableError(msg)
    terms = np.array(sums, dtype=float)
    if is_mixed.any():
        scale, offset, integer_scale, conversion, element = _fitted(terms, measured)
    else:
        scale, offset = _fitted(terms[:, :1], measured)
        integer_scale, conversion, element = scale, 0.0, 0.0
    # However the fit leans, no layer is free, and the least network of all keeps half of what its layers cost.
    scale, integer_scale = max(scale, 0.1), max(integer_scale, 0.1)
    layers = terms @ np.array([scale, integer_scale, conversion, element])
    offset = max(offset, -0.5 * float(layers.min()))
    error = float(np.median(np.abs((offset + layers) / measured - 1)))
    found = Calibration(scale, offset, n_floats, error, integer_scale, conversion, element, n_mixed=int(is_mixed.sum()))
    return replace(table, calibrations={**table.calibrations, model.key: found})


def _fitted(terms: Floats, measured: Floats) -> list[float]:
    """Least squares of the relative error: the scale of floats, the offset, and what each further term costs.

    Args:
        terms: of each network, shape ``(networks, 1)`` for floats alone, else ``(networks, 4)`` as in `Sums`.
        measured: time of each network, shape ``(networks,)``.
    """
    middle = float(np.median(measured))
    # The offset in units of a middling network, so that one prior fits it and the scales.
    units = np.array([1.0, middle, 1.0, 1.0, _MANY])[: terms.shape[1] + 1]
    rows = np.insert(terms, 1, 1.0, axis=1) * units / measured[:, None]
    prior = _PRIOR**0.5 * np.eye(len(units))[:3]
    expected = _PRIOR**0.5 * np.array([1.0, 0.0, 1.0])[: len(prior)]
    lowest = np.where(np.arange(len(units)) < 3, -np.inf, 0.0)
    found = lsq_linear(np.append(rows, prior, axis=0), np.append(np.ones(len(rows)), expected), (lowest, np.inf))
    solved: list[float] = (found.x * units).tolist()
    return solved
