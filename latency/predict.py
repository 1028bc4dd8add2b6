"""The latency of a network as a function of a plan: units of channel groups and bits of layers, read from a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from graph_encoder.network import LinearDim, NetworkGraph
from pruning.layer_policy import FULL_BITS

from .decision import EIGHT_BITS, LayerDecision, layer_of
from .layers import Layer, LayerKind, layers_of
from .runtimes import LatencyError
from .table import Calibration, KindTimes, LatencyTable, TableError, network_key

Counts = NDArray[np.int64]
_PRIOR = 0.02
"""Weight of a scale of 1 and an offset of 0 in a calibration: it matters while there are few networks."""


class LatencyModel:
    """Predicted latency of a plan, with the face of `latency.cost.CostModel`, in whole nanoseconds.

    It is the sum of the table's times of the layers, calibrated with whole networks. The same table and counts give
    the same number always. Where the runtime has faster kernels for counts that divide evenly, a plan that keeps more
    can cost less; `of_ratios` never falls, and is at or above the cost of every plan that keeps no more.

    Attributes:
        kind: ``"latency"``.
        groups: names of the decisions that a vector of counts stands for: channel groups, then layer decisions. Zeros
            change nothing: the runtimes compute them as any other weight.
        sizes: int64 of shape ``(decisions,)``: units of each group, level of each untouched layer.
        dense: nanoseconds of the untouched network.
        calibration: how the sum over layers becomes the network's time.
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
            calibration: the table's own for this network if not given; without one, the plain sum and an empty call.

        Raises:
            TableError: if the table lacks a layer kind.
            LatencyError: if a decision is on bits that no runtime computes with.
        """
        _check_decisions(layers)
        names = tuple(group.name for group in graph.prunable) if groups is None else tuple(groups)
        self.groups = (*names, *(decision.name for decision in layers))
        sizes = [graph.group(name).size for name in names] + [decision.size for decision in layers]
        self.sizes = np.array(sizes, dtype=np.int64)
        found = table.calibrations.get(network_key(graph)) if calibration is None else calibration
        self.calibration = found or Calibration(offset=table.empty)
        self._unit = self.calibration.scale * table.reference_ns
        self._offset = int(self.calibration.offset * table.reference_ns)
        timed = layers_of(graph)
        self.owners = tuple(layer.name for layer in timed)
        self._read_dims([(layer.inputs, layer.outputs) for layer in timed], graph, names, layers)
        self._read_kinds(graph, timed, table, layers)
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
        column = {graph.group_index[name]: index for index, name in enumerate(names)}
        bits = [place for place, decision in enumerate(layers) if decision.choice == "bits"]
        self._full = np.array([dim.full for dim in row_of] + [layers[place].size for place in bits], dtype=np.int64)
        self._per_unit = np.zeros((len(self._full), len(self.groups)))
        for dim, row in row_of.items():
            for group, channels in dim.per_unit:
                if group in column:
                    self._per_unit[row, column[group]] += channels
        for row, place in enumerate(bits, start=len(row_of)):
            self._per_unit[row, len(names) + place] = 1
        self._bits_row = {layers[place].layer: row for row, place in enumerate(bits, start=len(row_of))}

    def _read_kinds(
        self, graph: NetworkGraph, timed: Sequence[Layer], table: LatencyTable, layers: Sequence[LayerDecision]
    ) -> None:
        """Times of every layer at each of its bits."""
        layer_of_owner = {operator.name: layer_of(operator.weight) for operator in graph.operators}
        levels = {decision.layer: decision.levels for decision in layers if decision.choice == "bits"}
        self._times: list[KindTimes] = []
        self._known: list[dict[tuple[int, int], int]] = []
        self._gates: list[int] = []
        self._kinds_of: list[dict[int, int]] = []
        position: dict[LayerKind, int] = {}
        for layer in timed:
            name = layer_of_owner[layer.name]
            self._gates.append(self._bits_row.get(name, -1))
            self._kinds_of.append({})
            for bits in levels.get(name, (FULL_BITS,)):
                kind = replace(layer.kind, bits=bits)
                if kind not in position:
                    position[kind] = len(self._times)
                    self._times.append(table.times(kind))
                    self._known.append({})
                self._kinds_of[-1][bits] = position[kind]

    def dimensions(self, kept: Counts) -> Counts:
        """Every distinct number of channels and the bits of each decision, shape ``(dims,)``, of a plan."""
        return self._full - (self._per_unit @ (self.sizes - kept)).astype(np.int64)

    def __call__(self, kept: ArrayLike) -> int:
        """Nanoseconds of a call, batch of one, when decision ``i`` leaves ``kept[i]``; at least 1.

        Raises:
            TableError: if the table does not hold a count of that kind.
        """
        return self._total(sum(self._layer_times(self.dimensions(np.asarray(kept, dtype=np.int64)).tolist())))

    def by_owner(self, kept: ArrayLike) -> Mapping[str, int]:
        """Calibrated nanoseconds of every operator, by name; they leave out the calibration's offset."""
        dimensions = self.dimensions(np.asarray(kept, dtype=np.int64)).tolist()
        return dict(zip(self.owners, self._layer_times(dimensions), strict=True))

    def of_ratios(self, ratios: NDArray[np.float64]) -> NDArray[np.float64]:
        """For keep ratios of shape ``(batch, decisions)``, the most that a plan costs that keeps no more: ``(batch,)``.

        Bits between two levels are those of the lower one.
        """
        removed = ((1 - ratios) * self.sizes) @ self._per_unit.T
        dimensions = self._full - removed
        total = np.zeros(len(ratios))
        for (inputs, outputs), gate, kinds in zip(self._rows, self._gates, self._kinds_of, strict=True):
            levels = np.array(sorted(kinds))
            bound = np.stack(
                [self._times[kinds[b]].bound(dimensions[:, inputs], dimensions[:, outputs]) for b in levels]
            )
            # A float error below a level must not take it for the one before.
            bits = np.full(len(ratios), levels[-1]) if gate < 0 else dimensions[:, gate] + 1e-6
            at = np.maximum(np.searchsorted(levels, bits, side="right") - 1, 0)
            # A lower level that the table found slower must not make the bound fall.
            total += np.maximum.accumulate(bound, axis=0)[at, np.arange(len(ratios))]
        return np.maximum(self._offset + self._unit * total, 1.0)

    def meter(self, kept: Counts) -> LatencyMeter:
        """A running cost that starts from ``kept`` and takes one decision's change at a time."""
        return LatencyMeter(self, self.dimensions(np.asarray(kept, dtype=np.int64)).tolist())

    def layer_ns(self, layer: int, dimensions: Sequence[int]) -> int:
        """Calibrated nanoseconds of the layer at one position, given what `dimensions` returns."""
        inputs, outputs = self._rows[layer]
        at, gate = (dimensions[inputs], dimensions[outputs]), self._gates[layer]
        kind = self._kinds_of[layer][FULL_BITS if gate < 0 else dimensions[gate]]
        known = self._known[kind].get(at)
        if known is None:
            # Rounded down, so that the bound of `of_ratios` holds to the last nanosecond.
            known = self._known[kind][at] = int(self._unit * self._times[kind](*at))
        return known

    def touched(self, decision: int) -> tuple[Mapping[int, int], tuple[int, ...]]:
        """What a step adds to each dimension, and positions of the layers, that change with one decision."""
        column = self._per_unit[:, decision]
        channels = {int(row): int(column[row]) for row in np.flatnonzero(column)}
        pairs = zip(self._rows, self._gates, strict=True)
        layers = (index for index, (pair, gate) in enumerate(pairs) if channels.keys() & {*pair, gate})
        return channels, tuple(layers)

    def _layer_times(self, dimensions: Sequence[int]) -> list[int]:
        return [self.layer_ns(layer, dimensions) for layer in range(len(self.owners))]

    def _total(self, layers_ns: int) -> int:
        return max(1, self._offset + layers_ns)


class LatencyMeter:
    """Latency of a plan that changes one decision at a time; only the layers that change are looked up.

    Attributes:
        cost: nanoseconds of the plan as it stands.
    """

    def __init__(self, model: LatencyModel, dimensions: list[int]) -> None:
        """Start from the channels of a plan; use `LatencyModel.meter`."""
        self._model = model
        self._dimensions = dimensions
        self._touched = [model.touched(decision) for decision in range(len(model.groups))]
        self._layers = model._layer_times(dimensions)
        self._sum = sum(self._layers)
        self.cost = model._total(self._sum)

    def with_more(self, decision: int, units: int) -> int:
        """What the plan would cost if ``decision`` left ``units`` more; less than now where a faster kernel fits."""
        return self._model._total(self._sum + self._growth(decision, units))

    def keep_more(self, decision: int, units: int) -> None:
        """Let ``decision`` leave ``units`` more than it does."""
        self._dimensions = self._with(decision, units)
        for layer in self._touched[decision][1]:
            now = self._model.layer_ns(layer, self._dimensions)
            self._sum += now - self._layers[layer]
            self._layers[layer] = now
        self.cost = self._model._total(self._sum)

    def _growth(self, decision: int, units: int) -> int:
        dimensions = self._with(decision, units)
        return sum(
            self._model.layer_ns(layer, dimensions) - self._layers[layer] for layer in self._touched[decision][1]
        )

    def _with(self, decision: int, units: int) -> list[int]:
        dimensions = self._dimensions.copy()
        for row, channels in self._touched[decision][0].items():
            dimensions[row] += channels * units
        return dimensions


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
        if untimed := [bits for bits in decision.levels if bits not in (EIGHT_BITS, FULL_BITS)]:
            msg = (
                f"{decision.name} may be {untimed[0]} bits, which no table times: below 8 they are simulated, and take "
                "no less time; keep to 8 and 32, or take a budget of bytes or bops"
            )
            raise LatencyError(msg)


def layer_sum(graph: NetworkGraph, table: LatencyTable, kept: Mapping[str, int]) -> float:
    """The plain sum of the table's times of a plan's layers, in units of the reference layer's time.

    Args:
        graph: captured network.
        table: times of its layer kinds.
        kept: units by group name; groups that are not named stay whole.
    """
    removed = {graph.group_index[name]: graph.group(name).size - count for name, count in kept.items()}
    layers = layers_of(graph)
    return sum(table.times(one.kind)(one.inputs.size(removed), one.outputs.size(removed)) for one in layers)


def calibrated(
    table: LatencyTable, graph: NetworkGraph, plans: Sequence[Mapping[str, int]], ratios: ArrayLike
) -> LatencyTable:
    """The table with a calibration for one network, by least squares of the relative error.

    Args:
        table: times of the network's layer kinds.
        graph: captured network.
        plans: units by group name of each whole network that was timed.
        ratios: its time over the reference layer's, shape ``(plans,)``, from `latency.table.network_ratios`.

    Raises:
        TableError: if there are fewer than 3 networks: two numbers are fitted.
    """
    measured = np.asarray(ratios, dtype=float)
    if len(measured) < 3:
        msg = f"a calibration fits two numbers to whole networks, got {len(measured)}; time at least 3"
        raise TableError(msg)
    sums = np.array([layer_sum(graph, table, plan) for plan in plans])
    middle = float(np.median(measured))
    # Columns for the scale and for the offset in units of a middling network, so that one prior fits both.
    rows = np.stack([sums / measured, middle / measured], axis=1)
    prior = _PRIOR * np.eye(2)
    scale, offset = np.linalg.solve(rows.T @ rows + prior, rows.T @ np.ones(len(rows)) + prior @ [1.0, 0.0])
    # However the fit leans, the least network of all keeps half of what its layers cost.
    offset = max(float(offset * middle), -0.5 * float(scale) * float(sums.min()))
    scale = max(float(scale), 0.1)
    error = float(np.median(np.abs((offset + scale * sums) / measured - 1)))
    found = Calibration(scale, offset, len(measured), error)
    return replace(table, calibrations={**table.calibrations, network_key(graph): found})
