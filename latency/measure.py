"""Measured cost: milliseconds a forward pass, several networks and runtimes interleaved in one run."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

PYTORCH = "pytorch eager, channels last"
ONNXRUNTIME = "onnxruntime"


@dataclass(frozen=True)
class LatencyEntry:
    """Times of one network on one runtime.

    Attributes:
        model: name of the network.
        runtime: `PYTORCH` or `ONNXRUNTIME`.
        median_ms: median time of a call.
        lower_quartile_ms: a quarter of the calls were faster.
        upper_quartile_ms: a quarter of the calls were slower.
        n_runs: timed calls.
    """

    model: str
    runtime: str
    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    n_runs: int


@dataclass(frozen=True)
class LatencyReport:
    """Times of all networks of one interleaved run, and where they were taken.

    Attributes:
        entries: one for each network and runtime.
        batch_size: images a call.
        threads: threads of each runtime.
        cpu: name of the processor.
        torch_version: version of PyTorch.
        onnxruntime_version: version of ONNX Runtime.
    """

    entries: tuple[LatencyEntry, ...]
    batch_size: int
    threads: int
    cpu: str
    torch_version: str
    onnxruntime_version: str

    def entry(self, model: str, runtime: str = PYTORCH) -> LatencyEntry:
        """The times of one network on one runtime; `KeyError` if it was not measured."""
        for entry in self.entries:
            if (entry.model, entry.runtime) == (model, runtime):
                return entry
        msg = f"'{model}' was not measured on '{runtime}'; measured: {[(e.model, e.runtime) for e in self.entries]}"
        raise KeyError(msg)

    def speedup(self, model: str, baseline: str, runtime: str = PYTORCH) -> float:
        """How many times faster ``model`` is than ``baseline`` on the same runtime, by medians."""
        return self.entry(baseline, runtime).median_ms / self.entry(model, runtime).median_ms

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return asdict(self)


def measure_latency(
    models: Mapping[str, nn.Module],
    x: Tensor,
    *,
    onnx: Mapping[str, bytes | Path] | None = None,
    n_runs: int = 50,
    n_warmup: int = 10,
    threads: int | None = None,
) -> LatencyReport:
    """Time every network on the CPU, one call of each in turn, ``n_runs`` rounds.

    Taking turns makes the networks share whatever else the machine does, so that their ratios can be trusted where
    the times themselves drift. The report holds medians and quartiles, not means: one context switch moves a mean
    by more than a pruned layer does. Modes, memory formats and the thread count are left as they were.

    Args:
        models: networks to time with PyTorch, by name; run in eval mode and channels-last.
        x: input of shape ``(batch, ...)`` on the CPU.
        onnx: ONNX files (path or content) to time with ONNX Runtime, by name; each takes ``x`` as its only input.
        n_runs: timed calls of each, at least 5.
        n_warmup: calls made first and thrown away.
        threads: threads of each runtime; PyTorch's present number if not given.

    Raises:
        ValueError: if ``n_runs < 5``, ``x`` is not on the CPU, or there is nothing to time.
    """
    if n_runs < 5:
        msg = f"n_runs is {n_runs}; quartiles need at least 5 timed calls"
        raise ValueError(msg)
    if x.device.type != "cpu":
        msg = f"x lies on '{x.device}'; latency is measured on the CPU, so pass x.cpu()"
        raise ValueError(msg)
    if not models and not onnx:
        msg = "there is nothing to time: both models and onnx are empty"
        raise ValueError(msg)
    threads = threads or torch.get_num_threads()
    with _torch_threads(threads), torch.inference_mode():
        calls = {(name, PYTORCH): _eager_call(model, x) for name, model in models.items()}
        calls |= {(name, ONNXRUNTIME): _onnx_call(source, x, threads) for name, source in (onnx or {}).items()}
        times = _interleave(list(calls.values()), n_runs, n_warmup)
    entries = tuple(_summarise(*key, calls_ms) for key, calls_ms in zip(calls, times, strict=True))
    return LatencyReport(entries, len(x), threads, cpu_name(), torch.__version__, onnxruntime.__version__)


def cpu_name() -> str:
    """Name of the processor as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _eager_call(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """A call of a channels-last copy of ``model``, so that the caller's network keeps its mode and layout."""
    timed = copy.deepcopy(model).eval()
    if x.dim() == 4:
        timed = timed.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    return lambda: timed(x)


def _onnx_call(source: bytes | Path, x: Tensor, threads: int) -> Callable[[], object]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Its idle threads would spin on the cores that the next runtime in the round is timed on.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    content = source if isinstance(source, bytes) else str(source)
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.contiguous().numpy()}
    return lambda: session.run(None, feed)


def _interleave(calls: list[Callable[[], object]], n_runs: int, n_warmup: int) -> np.ndarray:
    """Milliseconds of shape ``(calls, n_runs)``; each round starts one call later, so that none is always first."""
    for call in calls:
        for _ in range(n_warmup):
            call()
    times = np.empty((len(calls), n_runs))
    for run in range(n_runs):
        for turn in range(len(calls)):
            index = (run + turn) % len(calls)
            start = time.perf_counter_ns()
            calls[index]()
            times[index, run] = (time.perf_counter_ns() - start) / 1e6
    return times


def _summarise(model: str, runtime: str, times_ms: np.ndarray) -> LatencyEntry:
    lower, median, upper = (float(q) for q in np.percentile(times_ms, [25, 50, 75]))
    return LatencyEntry(model, runtime, median, lower, upper, len(times_ms))
