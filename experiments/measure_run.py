"""`secateur latency measure`: the networks that a run saved, timed beside the dense one in a process of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latency.measure import compare
from latency.runtimes import LatencyError
from latency.table import Device
from pruning.export import read_manifest

from .latency_command import Remote, Say, device_for
from .outcome import DENSE
from .progress import count
from .run import RunError, RunFolder

WARMUP = 10
HEADINGS = ["method", "threads", "ms (quartiles)", "of dense (95 %)", ""]
"""Of `SavedLatency.cells`."""


@dataclass(frozen=True)
class SavedLatency:
    """One saved network on one runtime.

    Attributes:
        method: that found its plan, or ``dense``.
        runtime: name and version.
        threads: of the runtime.
        median_ms: median time of a call with one image.
        lower_quartile_ms: a quarter of the calls were faster.
        upper_quartile_ms: a quarter of the calls were slower.
        rounds: calls; in each round every network of the run was called once.
        ratio: median over the rounds of its time over the dense network's.
        low: lower end of the interval that holds the true median ratio at 95 %.
        high: its upper end.
        verdict: faster, slower, equal or undecided; see `latency.measure.Comparison`.
    """

    method: str
    runtime: str
    threads: int
    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    rounds: int
    ratio: float
    low: float
    high: float
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """The reading as plain values."""
        return asdict(self)

    def cells(self) -> list[str]:
        """The reading as a row of text, a cell for each of `HEADINGS`."""
        times = f"{self.median_ms:.3g} ({self.lower_quartile_ms:.3g} to {self.upper_quartile_ms:.3g})"
        if self.method == DENSE:
            return [self.method, str(self.threads), times, "", self.runtime]
        share = f"{self.ratio:.1%} ({self.low:.1%} to {self.high:.1%})"
        return [self.method, str(self.threads), times, share, self.verdict]


def measure_run(
    root: Path,
    *,
    runtime: str = "onnxruntime",
    threads: Sequence[int] = (1,),
    rounds: int = 100,
    remote: Remote | None = None,
    say: Say = lambda text: None,
) -> list[SavedLatency]:
    """Time the ONNX files of a finished run, the dense network's among them, taking turns.

    Args:
        root: folder of the run.
        runtime: name of a runtime that takes ONNX files.
        threads: numbers of threads to time with, one after the other.
        rounds: timed calls of each network.
        remote: the machine to measure on; this one if not given.
        say: told of progress.

    Returns:
        One reading for each network and number of threads.

    Raises:
        RunError: if the run is not finished, or saved no ONNX file.
        LatencyError: if the runtime cannot be used, or takes no ONNX file.
    """
    folder = RunFolder.open(root)
    methods = [row.method for row in folder.outcome().rows]
    files = {name: folder.method(name).model / "model.onnx" for name in methods}
    if missing := [name for name, path in files.items() if not path.exists()]:
        msg = (
            f"run {root} holds no ONNX file of {', '.join(missing)}: it was run with measure.onnx off, or the export "
            "failed, which its output says"
        )
        raise RunError(msg)
    readings: list[SavedLatency] = []
    for n in threads:
        device = device_for(runtime, n, remote)
        if device.takes != "onnx":
            msg = f"runtime '{runtime}' takes no ONNX files, which is what a run saves; pass onnxruntime or openvino"
            raise LatencyError(msg)
        say(f"{root}: {len(files)} networks with {count(n, 'thread')}, {rounds} rounds")
        readings += _timed(device, folder, files, rounds)
    return readings


def _timed(device: Device, folder: RunFolder, files: dict[str, Path], rounds: int) -> list[SavedLatency]:
    example = tuple(x[:1] for x in read_manifest(folder.method(DENSE).model).examples())
    times = dict(zip(files, device.times_ns([(path, example) for path in files.values()], rounds, WARMUP), strict=True))
    fingerprint = device.fingerprint
    readings = []
    for name, own in times.items():
        lower, median, upper = (float(q) / 1e6 for q in np.percentile(own, [25, 50, 75]))
        against = compare(own, times[DENSE])
        readings.append(
            SavedLatency(
                method=name,
                runtime=f"{fingerprint.runtime} {fingerprint.version}",
                threads=fingerprint.threads,
                median_ms=median,
                lower_quartile_ms=lower,
                upper_quartile_ms=upper,
                rounds=rounds,
                ratio=against.ratio,
                low=against.low,
                high=against.high,
                verdict=against.verdict,
            )
        )
    return readings
