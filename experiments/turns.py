"""Finished networks beside the dense one on the clock, on every runtime that says something of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from graph_encoder.copies import copied
from latency.measure import Variant
from latency.runtimes import ONNXRUNTIME, PYTORCH, SPARSE, Artifact, LatencyError, Runtime, find_runtime, prepare_sparse
from pruning.policy import CompressionPolicy
from pruning.sparse_network import SparseNetwork

from .clock import TableDevice
from .outcome import DENSE, Latency, LayerForm
from .progress import RunDisplay


@dataclass(frozen=True)
class FinishedNetwork:
    """One finished network.

    Attributes:
        module: in evaluation mode; untouched.
        policy: what it was made by, empty for the dense one.
        onnx: its ONNX file, None if there is none.
    """

    module: nn.Module
    policy: CompressionPolicy
    onnx: Path | None


@dataclass(frozen=True)
class Times:
    """What the clock said of one network.

    Attributes:
        latencies: one a runtime, beside the dense network's in the same rounds.
        layer_forms: in what form `sparsify` runs each layer, empty where it was not timed so.
    """

    latencies: tuple[Latency, ...] = ()
    layer_forms: tuple[LayerForm, ...] = ()


def time_in_turn(
    networks: Mapping[str, FinishedNetwork], x: Tensor, n_runs: int, device: TableDevice, display: RunDisplay
) -> dict[str, Times]:
    """Time all networks on the CPU, those of one runtime in turn, as the device does that they were searched for.

    Args:
        networks: by name, the dense one as `DENSE`.
        x: their input.
        n_runs: timed calls of each.
        device: that plans were searched for.
        display: told how long it took, and what could not be timed.
    """
    # PyTorch only simulates integers, and takes longer for it: that time says nothing.
    modules = {
        name: copied(network.module).cpu()
        for name, network in networks.items()
        if not any(layer.is_quantized for layer in network.policy.layers.values())
    }
    onnx = {name: network.onnx for name, network in networks.items() if network.onnx}
    is_sparse = any(networks[name].policy.sparse_layers for name in modules)
    is_sparse |= device.runtime is not None and device.runtime.name == SPARSE
    with device.in_force():
        prepared = prepared_networks(modules, x, display) if is_sparse else {}
        started = time.perf_counter()
        variants = variants_of(modules, onnx, prepared, device.runtime)
        report = device.measure(variants, x, n_runs)
    display.say(f"timed {len(networks)} networks in turn, {time.perf_counter() - started:.1f} s")
    if device.clock and device.clock.warning:
        display.say(device.clock.warning)
    dense = {entry.runtime: entry for entry in report.entries if entry.model == DENSE}
    return {
        name: Times(
            tuple(Latency.of(entry, dense.get(entry.runtime)) for entry in report.entries if entry.model == name),
            _layer_forms(prepared[name]) if name in prepared else (),
        )
        for name in networks
    }


def prepared_networks(networks: Mapping[str, nn.Module], x: Tensor, display: RunDisplay) -> dict[str, SparseNetwork]:
    """Networks as `sparsify` runs them, sparse or dense chosen layer by layer by the clock.

    What cannot be prepared is named on the display and left out.

    Args:
        networks: in evaluation mode, on the CPU, by name.
        x: their input.
        display: told what was left out.
    """
    prepared = {}
    try:
        find_runtime(SPARSE)
    except LatencyError as error:
        display.say(f"warning: zeros are not timed: {error}")
        return {}
    for name, network in networks.items():
        try:
            prepared[name] = prepare_sparse(network.eval(), (x,))
        except LatencyError as error:
            display.say(f"warning: {name} is not timed with its zeros: {error}")
    return prepared


def variants_of(
    networks: Mapping[str, nn.Module],
    onnx: Mapping[str, Path],
    prepared: Mapping[str, SparseNetwork],
    searched_for: Runtime | None = None,
) -> list[Variant]:
    """All that is timed in one run: by name, modules, ONNX files, and what `prepared_networks` made.

    The runtime that plans were searched for is timed too, if it is none of these three.
    """
    artifacts: dict[str, Mapping[str, Artifact]] = {PYTORCH: networks, ONNXRUNTIME: onnx, SPARSE: prepared}
    if searched_for is not None:
        artifacts.setdefault(searched_for.name, onnx if searched_for.takes == "onnx" else networks)
    return [Variant(name, runtime, artifact) for runtime, own in artifacts.items() for name, artifact in own.items()]


def _layer_forms(network: SparseNetwork) -> tuple[LayerForm, ...]:
    """What was chosen for each layer, as results.json holds it."""
    return tuple(
        LayerForm(layer=layer.layer, form=layer.form, density=layer.density, stored=layer.stored, reason=layer.reason)
        for layer in network.report.layers
    )
