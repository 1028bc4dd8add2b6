"""Times of several networks on ONNX Runtime and on our own plan, every call in turn with all others."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from latency.measure import cpu_name, summarise, torch_threads
from latency.runtimes import ONNXRUNTIME, SPARSE, find_runtime, prepare_sparse
from latency.worker import Stopwatch, interleave
from pruning.export import export_onnx


def time_networks(networks: Mapping[str, nn.Module], x: Tensor, *, threads: int, rounds: int) -> dict[str, Any]:
    """Time every network on both runtimes.

    All calls take turns, both runtimes in the same rounds, so that every ratio is one of the same minutes. A ratio is
    the median time of the reference over a network's; its quartiles are those of the ratios within the rounds.

    Args:
        networks: in evaluation mode, by name; the first one, on ONNX Runtime, is the reference.
        x: their input.
        threads: of both runtimes.
        rounds: timed calls of each.

    Returns:
        Times and ratios by network and runtime, how many layers run in which form, and where it was measured.

    Raises:
        LatencyError: if the kernels are not compiled, or a network cannot be prepared.
    """
    onnx, sparse, stopwatch = find_runtime(ONNXRUNTIME), find_runtime(SPARSE), Stopwatch()
    calls: list[tuple[str, str, Callable[[], object]]] = []
    forms = {}
    with torch_threads(threads), tempfile.TemporaryDirectory() as folder:
        for name, network in networks.items():
            path = Path(folder) / f"{name}.onnx"
            export_onnx(network, x, path)
            prepared = prepare_sparse(network, (x,))
            found = [layer.form for layer in prepared.report.layers]
            forms[name] = {form: found.count(form) for form in dict.fromkeys(found)}
            calls.append((name, ONNXRUNTIME, onnx.load(path, (x,), threads)))
            calls.append((name, SPARSE, sparse.load(prepared, (x,), threads)))
        elapsed, waited = interleave([stopwatch.timer(call) for *_, call in calls], rounds, n_warmup=1)
    entries = [
        summarise(name, runtime, own, waits, threads)
        for (name, runtime, _), own, waits in zip(calls, elapsed, waited, strict=True)
    ]
    reference = entries[0]
    report: dict[str, Any] = {name: {"forms": forms[name], "runtimes": {}} for name in networks}
    for entry in entries:
        ratios: NDArray[np.float64] = np.array(reference.times_ms) / np.array(entry.times_ms)
        lower, upper = np.percentile(ratios, [25, 75])
        report[entry.model]["runtimes"][entry.runtime] = {
            "median_ms": entry.median_ms,
            "lower_quartile_ms": entry.lower_quartile_ms,
            "upper_quartile_ms": entry.upper_quartile_ms,
            "speed": reference.median_ms / entry.median_ms,
            "lower_quartile_speed": float(lower),
            "upper_quartile_speed": float(upper),
        }
    versions = (
        f"torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}, {sparse.version().partition(', ')[2]}"
    )
    return {"networks": report, "rounds": rounds, "threads": threads, "machine": f"{cpu_name()}; {versions}"}
