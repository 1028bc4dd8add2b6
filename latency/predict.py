"""The latency of a network as a function of how many units its channel groups keep, read from a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from graph_encoder.network import LinearDim, NetworkGraph

from .layers import layers_of
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
        groups: names of the groups that a vector of counts stands for, in its order.
        sizes: int64 of shape ``(groups,)``, units of each group in the dense network.
        dense: nanoseconds with every unit kept.
        calibration: how the sum over layers becomes the network's time.
        layers: names of the layers that the table times, in network order.
    """

    kind: Literal["latency"] = "latency"

    def __init__(
        self,
        graph: NetworkGraph,
        table: LatencyTable,
        groups: Sequence[str] | None = None,
        bits: Mapping[str, int] | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        """Look up what the network's layers need.

        Args:
            graph: captured network.
            table: times of its layer kinds.
            groups: names of the groups that may lose units; the prunable ones if not given.
            bits: bits of weights and activations by layer name; 32 where a layer is not named.
            calibration: the table's own for this network if not given; without one, the plain sum and an empty call.

        Raises:
            TableError: if the table lacks a layer kind.
            LatencyError: if ``bits`` names no layer.
        """
        names = tuple(group.name for group in graph.prunable) if groups is None else tuple(groups)
        self.groups = names
        self.sizes = np.array([graph.group(name).size for name in names], dtype=np.int64)
        found = table.calibrations.get(network_key(graph)) if calibration is None else calibration
        self.calibration = found or Calibration(offset=table.empty)
        self._unit = self.calibration.scale * table.reference_ns
        self._offset = int(self.calibration.offset * table.reference_ns)
        layers = layers_of(graph, bits)
        self.layers = tuple(layer.name for layer in layers)
        self._read_dims([(layer.inputs, layer.outputs) for layer in layers], graph, names)
        kinds = {layer.kind: None for layer in layers}
        self._times: list[KindTimes] = [table.times(kind) for kind in kinds]
        position = {kind: index for index, kind in enumerate(kinds)}
        self._kind_of = [position[layer.kind] for layer in layers]
        self._rows_of_kind = [
            tuple(np.array([pair for pair, kind in zip(self._rows, self._kind_of, strict=True) if kind == index]).T)
            for index in range(len(kinds))
        ]
        self._known: list[dict[tuple[int, int], int]] = [{} for _ in kinds]
        self.dense = self(self.sizes)

    def _read_dims(
        self, dims: Sequence[tuple[LinearDim, LinearDim]], graph: NetworkGraph, names: Sequence[str]
    ) -> None:
        row_of: dict[LinearDim, int] = {}
        self._rows = [tuple(row_of.setdefault(dim, len(row_of)) for dim in pair) for pair in dims]
        column = {graph.group_index[name]: index for index, name in enumerate(names)}
        self._full = np.array([dim.full for dim in row_of], dtype=np.int64)
        self._per_unit = np.zeros((len(row_of), len(names)))
        for dim, row in row_of.items():
            for group, channels in dim.per_unit:
                if group in column:
                    self._per_unit[row, column[group]] += channels

    def dimensions(self, kept: Counts) -> Counts:
        """Every distinct number of channels, shape ``(dims,)``, when ``kept`` units of each group stay."""
        return self._full - (self._per_unit @ (self.sizes - kept)).astype(np.int64)

    def __call__(self, kept: ArrayLike) -> int:
        """Nanoseconds of a call, batch of one, when group ``i`` keeps ``kept[i]`` units; at least 1.

        Raises:
            TableError: if the table does not hold a count of that kind.
        """
        return self._total(sum(self._layer_times(self.dimensions(np.asarray(kept, dtype=np.int64)).tolist())))

    def by_layer(self, kept: ArrayLike) -> Mapping[str, int]:
        """Calibrated nanoseconds of every layer, by name; they leave out the calibration's offset."""
        dimensions = self.dimensions(np.asarray(kept, dtype=np.int64)).tolist()
        return dict(zip(self.layers, self._layer_times(dimensions), strict=True))

    def of_ratios(self, ratios: NDArray[np.float64]) -> NDArray[np.float64]:
        """For keep ratios of shape ``(batch, groups)``, the most that a plan costs that keeps no more: ``(batch,)``."""
        removed = ((1 - ratios) * self.sizes) @ self._per_unit.T
        dimensions = self._full - removed
        total = np.zeros(len(ratios))
        for times, (inputs, outputs) in zip(self._times, self._rows_of_kind, strict=True):
            total += times.bound(dimensions[:, inputs], dimensions[:, outputs]).sum(axis=1)
        return np.maximum(self._offset + self._unit * total, 1.0)

    def meter(self, kept: Counts) -> LatencyMeter:
        """A running cost that starts from ``kept`` and takes one group's change at a time."""
        return LatencyMeter(self, self.dimensions(np.asarray(kept, dtype=np.int64)).tolist())

    def layer_ns(self, layer: int, dimensions: Sequence[int]) -> int:
        """Calibrated nanoseconds of the layer at one position, given every distinct number of channels."""
        inputs, outputs = self._rows[layer]
        at = (dimensions[inputs], dimensions[outputs])
        kind = self._kind_of[layer]
        known = self._known[kind].get(at)
        if known is None:
            # Rounded down, so that the bound of `of_ratios` holds to the last nanosecond.
            known = self._known[kind][at] = int(self._unit * self._times[kind](*at))
        return known

    def touched(self, group: int) -> tuple[Mapping[int, int], tuple[int, ...]]:
        """Channels a unit by dimension, and positions of the layers, that change with one group."""
        channels = {int(row): int(self._per_unit[row, group]) for row in np.flatnonzero(self._per_unit[:, group])}
        layers = (index for index, pair in enumerate(self._rows) if channels.keys() & set(pair))
        return channels, tuple(layers)

    def _layer_times(self, dimensions: Sequence[int]) -> list[int]:
        return [self.layer_ns(layer, dimensions) for layer in range(len(self.layers))]

    def _total(self, layers_ns: int) -> int:
        return max(1, self._offset + layers_ns)


class LatencyMeter:
    """Latency of a plan that changes one group at a time; only the layers that change are looked up.

    Attributes:
        cost: nanoseconds of the plan as it stands.
    """

    def __init__(self, model: LatencyModel, dimensions: list[int]) -> None:
        """Start from the channels of a plan; use `LatencyModel.meter`."""
        self._model = model
        self._dimensions = dimensions
        self._touched = [model.touched(group) for group in range(len(model.groups))]
        self._layers = model._layer_times(dimensions)
        self._sum = sum(self._layers)
        self.cost = model._total(self._sum)

    def increase(self, group: int, units: int) -> int:
        """How much the cost grows when group ``group`` keeps ``units`` more; below 0 where a faster kernel fits."""
        return self._model._total(self._sum + self._growth(group, units)) - self.cost

    def keep_more(self, group: int, units: int) -> None:
        """Let group ``group`` keep ``units`` more than it does."""
        self._dimensions = self._with(group, units)
        for layer in self._touched[group][1]:
            now = self._model.layer_ns(layer, self._dimensions)
            self._sum += now - self._layers[layer]
            self._layers[layer] = now
        self.cost = self._model._total(self._sum)

    def _growth(self, group: int, units: int) -> int:
        dimensions = self._with(group, units)
        return sum(self._model.layer_ns(layer, dimensions) - self._layers[layer] for layer in self._touched[group][1])

    def _with(self, group: int, units: int) -> list[int]:
        dimensions = self._dimensions.copy()
        for row, channels in self._touched[group][0].items():
            dimensions[row] += channels * units
        return dimensions


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
