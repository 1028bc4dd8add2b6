"""A device whose times are a formula, so that what a table predicts is known from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import onnx
from torch import nn

from graph_encoder.network import NetworkGraph
from latency.device import Fingerprint
from latency.runtimes import Artifact, Fed
from latency.table import Calibration, LatencyTable, network_key
from latency.worker import Processor

EMPTY_NS = 5_000
COLD_NS = 2_000
"""What an empty network takes beyond that after one that does something, unless calls settle."""
SLIDE_RULE = Processor("slide rule", "wood")


def formula_ns(inputs: int, outputs: int, positions: int) -> float:
    """A staircase of 16 channels; a third more where the input channels are not a multiple of 4."""
    stairs = -(-inputs // 16) * -(-outputs // 16)
    return positions * (20 + 90 * stairs) * (1 if inputs % 4 == 0 else 4 / 3)


class FormulaDevice:
    """Times single layers by `formula_ns`; a light load that changes from call to call scales them all alike."""

    takes = "module"

    def __init__(self, threads: int = 1, stop_after: int | None = None) -> None:
        self.fingerprint = Fingerprint(SLIDE_RULE, "formula", "1.0", threads)
        self.calls = 0
        self.layers = 0
        self.stop_after = stop_after

    def times_ns(self, networks: Sequence[Fed], n_runs: int, n_warmup: int, *, settled: bool = True) -> np.ndarray:
        self.calls += 1
        if self.stop_after is not None and self.calls > self.stop_after:
            raise KeyboardInterrupt
        self.layers += 0 if settled else len(networks) - 8
        load = 1 + ((self.calls - 1) % 3) / 64  # exact in binary
        times = [self._one(network) for network, _ in networks]
        if not settled:
            is_cold = [before > EMPTY_NS >= time for before, time in pairwise(times)]
            times = [time + COLD_NS * cold for time, cold in zip(times, [False, *is_cold], strict=True)]
        return np.array([[time * load] * n_runs for time in times])

    def _one(self, network: Artifact) -> float:
        assert isinstance(network, nn.Module)
        layer = network[0] if isinstance(network, nn.Sequential) else network
        if isinstance(layer, nn.Conv2d):
            return EMPTY_NS + formula_ns(layer.in_channels // layer.groups, layer.out_channels, 64)
        if isinstance(layer, nn.Linear):
            return EMPTY_NS + formula_ns(layer.in_features, layer.out_features, 1)
        return EMPTY_NS


class IntegerFormulaDevice(FormulaDevice):
    """Takes ONNX; layers of bytes take a third of the time of floats."""

    takes = "onnx"

    def _one(self, network: Artifact) -> float:
        assert isinstance(network, bytes)
        graph = onnx.load_from_string(network).graph
        weights = [tensor for tensor in graph.initializer if tensor.name == "w"]
        if not weights:
            return EMPTY_NS
        outputs, inputs = weights[0].dims[:2]
        is_integer = any(node.op_type == "QuantizeLinear" for node in graph.node)
        positions = 64 if len(weights[0].dims) == 4 else 1
        return EMPTY_NS + formula_ns(inputs, outputs, positions) / (3 if is_integer else 1)


def as_calibrated(table: LatencyTable, graph: NetworkGraph) -> LatencyTable:
    """The table as if whole networks had been timed and taken what the sum over their layers says."""
    calibration = Calibration(offset=table.empty, n_networks=9, error=0.0, n_mixed=18)
    return replace(table, calibrations={network_key(graph): calibration})
