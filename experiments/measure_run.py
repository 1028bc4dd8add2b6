"""`secateur latency measure`: the networks that a run saved, timed beside the dense one in a process of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from latency.remote import RemoteDevice
from latency.runtimes import Artifact
from latency.table import Device, LatencyTable, LocalDevice, TableError
from latency.worker import Processor
from pruning.export import load_compressed, read_manifest
from pruning.policy import CompressionPolicy

from .data import ImageData
from .models import build_model
from .outcome import ANOTHER_DEVICE, DENSE
from .progress import Say, count
from .run import RunError, RunFolder
from .timing_device import Remote, device_for

WARMUP = 10
HEADINGS = ["method", "threads", "ms (quartiles)", "disturbed", "of dense (95 %)", ""]
"""Of `SavedLatency.cells`."""


@dataclass(frozen=True)
class SavedLatency:
    """One saved network on one runtime.

    Attributes:
        method: that found its plan, or ``dense``.
        runtime: name and version.
        threads: of the runtime.
        processor: what computed.
        cpus: numbers of the processors that it could use; empty where the system does not say.
        median_ms: median time of a call with one image.
        lower_quartile_ms: a quarter of the calls were faster.
        upper_quartile_ms: a quarter of the calls were slower.
        disturbed: share of the calls that had to wait for a processor.
        rounds: calls; in each round every network of the run was called once.
        ratio: median over the rounds of its time over the dense network's.
        low: lower end of the interval that holds the true median ratio at 95 %.
        high: its upper end.
        verdict: faster, slower, equal or undecided; see `latency.measure.Comparison`.
        repeats_needed: rounds that would decide; more than ``rounds`` where it is undecided.
        another_device: why this is another device than the latency table's that the run searched with; empty if it is
            the same, or there was no table.
    """

    method: str
    runtime: str
    threads: int
    processor: Processor
    cpus: tuple[int, ...]
    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    disturbed: float
    rounds: int
    ratio: float
    low: float
    high: float
    verdict: str
    repeats_needed: int
    another_device: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The reading as plain values."""
        return asdict(self)

    def cells(self) -> list[str]:
        """The reading as a row of text, a cell for each of `HEADINGS`."""
        times = f"{self.median_ms:.3g} ({self.lower_quartile_ms:.3g} to {self.upper_quartile_ms:.3g})"
        own = [self.method, str(self.threads), times, f"{self.disturbed:.0%}"]
        where = f", {ANOTHER_DEVICE}" if self.another_device else ""
        if self.method == DENSE:
            return [*own, "", f"{self.runtime}{where}"]
        share = f"{self.ratio:.1%} ({self.low:.1%} to {self.high:.1%})"
        needed = f", about {self.repeats_needed} rounds would tell" if self.verdict == "undecided" else ""
        return [*own, share, f"{self.verdict}{needed}{where}"]


def measure_run(
    root: Path,
    *,
    runtime: str = "onnxruntime",
    threads: Sequence[int] = (1,),
    cpus: Sequence[int] = (),
    rounds: int = 100,
    remote: Remote | None = None,
    say: Say = lambda text: None,
) -> list[SavedLatency]:
    """Time the networks that a finished run saved, the dense one among them, taking turns.

    Runtimes of ONNX files read those that the run wrote; runtimes of PyTorch modules (``sparse`` among them) get the
    networks as `pruning.export.load_compressed` builds them. What the run saved in no such form is left out, and named.

    Args:
        root: folder of the run.
        runtime: name of a runtime.
        threads: numbers of threads to time with, one after the other.
        cpus: numbers of the processors to stay on; all if empty.
        rounds: timed calls of each network.
        remote: the machine to measure on; this one if not given.
        say: told of progress.

    Returns:
        One reading for each network and number of threads.

    Raises:
        RunError: if the run is not finished, or saved no dense network or no other in the form that the runtime takes.
        LatencyError: if the runtime cannot be used.
    """
    folder = RunFolder.open(root)
    methods = [row.method for row in folder.outcome().rows]
    devices = [device_for(runtime, n, remote, cpus) for n in threads]
    artifacts, left_out = _artifacts(folder, methods, devices[0].takes)
    if DENSE not in artifacts or len(artifacts) == 1:
        msg = f"run {root} holds too little to time with '{runtime}': {'; '.join(left_out)}"
        raise RunError(msg)
    for reason in left_out:
        say(f"left out: {reason}")
    readings: list[SavedLatency] = []
    table = LatencyTable.load(folder.table_file) if folder.table_file.exists() else None
    for device, n in zip(devices, threads, strict=True):
        another = _another_device(table, device)
        if another:
            say(f"warning: {ANOTHER_DEVICE}: {another}")
        say(f"{root}: {len(artifacts)} networks with {count(n, 'thread')}, {rounds} rounds")
        readings += [replace(reading, another_device=another) for reading in _timed(device, folder, artifacts, rounds)]
    return readings


def _another_device(table: LatencyTable | None, device: Device) -> str:
    """Why a device is not that of a table; empty if it is, or there is no table."""
    try:
        if table is not None:
            table.check_device(device.fingerprint)
    except TableError as error:
        return str(error)
    return ""


def _artifacts(folder: RunFolder, methods: Sequence[str], takes: str) -> tuple[dict[str, Artifact], list[str]]:
    """The saved networks as a runtime takes them, by method, and why others are not among them."""
    artifacts: dict[str, Artifact] = {}
    left_out: list[str] = []
    for method in methods:
        saved = folder.method(method).model
        if takes == "onnx":
            path = saved / "model.onnx"
            reason = "it was run with measure.onnx off, or the export failed, which its output says"
            if path.exists():
                artifacts[method] = path
            else:
                left_out.append(f"no ONNX file of {method} ({reason})")
        elif any(layer.is_quantized for layer in CompressionPolicy.load(saved / "policy.json").layers.values()):
            left_out.append(f"{method} has integers, which this runtime of float networks would only simulate")
        else:
            artifacts[method] = _network(folder, saved)
    return artifacts, left_out


def _network(folder: RunFolder, saved: Path) -> nn.Module:
    sample = ImageData(folder.config.data).sample
    name, n_classes, n_channels = folder.config.model.name, len(sample.classes), sample.images.shape[1]
    return load_compressed(saved, lambda: build_model(name, n_classes, n_channels))


def _timed(
    device: LocalDevice | RemoteDevice, folder: RunFolder, artifacts: Mapping[str, Artifact], rounds: int
) -> list[SavedLatency]:
    example = tuple(x[:1] for x in read_manifest(folder.method(DENSE).model).examples())
    report = device.measure(artifacts, example, n_runs=rounds, n_warmup=WARMUP)
    where = device.fingerprint
    readings = []
    for entry in report.entries:
        against = report.compare(entry.model, DENSE, where.runtime)
        readings.append(
            SavedLatency(
                method=entry.model,
                runtime=f"{where.runtime} {where.version}",
                threads=where.threads,
                processor=where.processor,
                cpus=report.cpus,
                median_ms=entry.median_ms,
                lower_quartile_ms=entry.lower_quartile_ms,
                upper_quartile_ms=entry.upper_quartile_ms,
                disturbed=entry.disturbed,
                rounds=rounds,
                ratio=against.ratio,
                low=against.low,
                high=against.high,
                verdict=against.verdict,
                repeats_needed=against.repeats_needed,
            )
        )
    return readings
