"""Whole networks of random plans, timed against the reference layer."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latency.device import Device
from latency.pace import Pace
from latency.runtimes import Artifact
from latency.sliced import sliced_onnx
from latency.table import network_ratios
from pruning.export import export_marked, export_onnx
from pruning.policy import CompressionPolicy
from pruning.qdq import MarkedNetwork
from pruning.quantize import quantize_layers
from pruning.surgery import apply_policy

from .progress import Say
from .timed_network import TimedNetwork

_BATCH = 8
"""Whole networks timed in turn; each keeps its session in memory meanwhile."""


def plan_ratios(
    device: Device, network: TimedNetwork, plans: Sequence[Mapping[str, int]], pace: Pace, say: Say
) -> NDArray[np.float64]:
    """Times of the networks of plans over the reference layer's in the same rounds; shape ``(plans,)``."""
    ratios: list[float] = []
    for start in range(0, len(plans), _BATCH):
        part = plans[start : start + _BATCH]
        with tempfile.TemporaryDirectory() as folder:
            artifacts = list(_artifacts(device, network, part, Path(folder)))
            ratios += network_ratios(device, artifacts, (network.example,), pace).tolist()
        say(f"{network.name}: {len(ratios)} of {len(plans)} whole networks timed")
    return np.array(ratios)


def _artifacts(
    device: Device, network: TimedNetwork, plans: Sequence[Mapping[str, int]], folder: Path
) -> Iterator[Artifact]:
    if any(one.name in plan for one in network.bits for plan in plans):
        yield from _with_integers(network, plans, folder)
        return
    for index, plan in enumerate(plans):
        if device.takes == "module":
            yield apply_policy(network.model, network.graph, network.policy(plan))
            continue
        sliced = sliced_onnx(network.dense_onnx, network.graph, network.policy(plan))
        if sliced is not None:
            yield sliced
            continue
        path = folder / f"{index}.onnx"
        export_onnx(apply_policy(network.model, network.graph, network.policy(plan)), network.example, path)
        yield path


def _with_integers(network: TimedNetwork, plans: Sequence[Mapping[str, int]], folder: Path) -> Iterator[Artifact]:
    """ONNX files of plans with bits; what is exported for one plan serves all that have its channels."""
    exported: tuple[CompressionPolicy, MarkedNetwork] | None = None
    for index, plan in enumerate(plans):
        policy = network.policy(plan)
        channels, layers = replace(policy, layers={}), policy.layers.keys()
        if network.dense_marked is None:
            small = apply_policy(network.model, network.graph, channels)
            path = folder / f"{index}.onnx"
            if layers:
                small = quantize_layers(small, policy.layers, [network.example], method="minmax")
            export_onnx(small, network.example, path, images=network.example)
            yield path
            continue
        finish = functools.partial(network.dense_marked.with_integers, layers=layers)
        sliced = sliced_onnx(network.dense_marked.proto, network.graph, channels, finish)
        if sliced is not None:
            yield sliced
            continue
        if exported is None or exported[0] != channels:
            marked = export_marked(apply_policy(network.model, network.graph, channels), network.example)
            assert marked is not None
            exported = channels, marked
        yield exported[1].with_integers(exported[1].proto, layers).SerializeToString()
