"""`secateur latency measure`: the networks that runs saved, timed beside the dense one in a process of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from .exported_files import ONNX_NAME
from .models import build_model
from .outcome import ANOTHER_DEVICE, DENSE
from .progress import Say, count
from .run import RunError, RunFolder
from .timing_device import Remote, device_for

WARMUP = 10
HEADINGS = ["run", "method", "threads", "ms (quartiles)", "disturbed", "of dense (95 %)", ""]
"""Of `SavedLatency.cells`."""


@dataclass(frozen=True)
class SavedLatency:
    """One saved network on one runtime.

    Attributes:
        run: name of the folder of its run; the whole path where runs of one name are timed together.
        method: that found its plan, or ``dense``.
        runtime: name and version.
        threads: of the runtime.
        processor: what computed.
        cpus: numbers of the processors that it could use; empty where the system does not say.
        median_ms: median time of a call with one image.
        lower_quartile_ms: a quarter of the calls were faster.
        upper_quartile_ms: a quarter of the calls were slower.
        disturbed: share of the calls that had to wait for a processor.
        rounds: calls; in each round every network was called once.
        ratio: median over the rounds of its time over the dense network's.
        low: lower end of the interval that holds the true median ratio at 95 %.
        high: its upper end.
        verdict: faster, slower, equal or undecided; see `latency.measure.Comparison`.
        repeats_needed: rounds that would decide; more than ``rounds`` where it is undecided.
        another_device: why this is another device than the latency table's that the run searched with; empty if it is
            the same, or there was no table.
    """

    run: str
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
        own = [self.run, self.method, str(self.threads), times, f"{self.disturbed:.0%}"]
        where = f", {ANOTHER_DEVICE}" if self.another_device else ""
        if self.method == DENSE:
            return [*own, "", f"{self.runtime}{where}"]
        share = f"{self.ratio:.1%} ({self.low:.1%} to {self.high:.1%})"
        needed = f", about {self.repeats_needed} rounds would tell" if self.verdict == "undecided" else ""
        return [*own, share, f"{self.verdict}{needed}{where}"]


@dataclass(frozen=True)
class _Saved:
    """A network that a run saved."""

    folder: RunFolder
    method: str

    @property
    def key(self) -> str:
        return DENSE if self.method == DENSE else f"{self.folder.root}/{self.method}"

    @property
    def path(self) -> Path:
        return self.folder.method(self.method).model

    @property
    def input_shapes(self) -> list[tuple[int, ...]]:
        return [tuple(x.shape[1:]) for x in read_manifest(self.path).examples()]

    @property
    def is_quantized(self) -> bool:
        policy = CompressionPolicy.load(self.path / "policy.json")
        return any(layer.is_quantized for layer in policy.layers.values())

    def module(self) -> nn.Module:
        config = self.folder.config
        sample = ImageData(config.data).sample
        name, n_classes, n_channels = config.model.name, len(sample.classes), sample.images.shape[1]
        return load_compressed(self.path, lambda: build_model(name, n_classes, n_channels))


def measure_runs(
    roots: Sequence[Path],
    *,
    runtime: str = "onnxruntime",
    threads: Sequence[int] = (1,),
    cpus: Sequence[int] = (),
    rounds: int = 100,
    remote: Remote | None = None,
    say: Say = lambda text: None,
) -> list[SavedLatency]:
    """Time the networks that finished runs saved, taking turns, beside the dense one of the first run.

    Networks are best compared within one call: with several threads the same network may take a third longer in one
    process than in another, whatever the intervals of both say.

    Runtimes of ONNX files read those that the runs wrote; runtimes of PyTorch modules (``sparse`` among them) get the
    networks as `pruning.export.load_compressed` builds them. What a run saved in no such form is left out, and named.

    Args:
        roots: folders of the runs, one or more.
        runtime: name of a runtime.
        threads: numbers of threads to time with, one after the other.
        cpus: numbers of the processors to stay on; all if empty.
        rounds: timed calls of each network.
        remote: the machine to measure on; this one if not given.
        say: told of progress.

    Returns:
        One reading for each network and number of threads.

    Raises:
        RunError: if a run is not finished, takes other inputs than the first, or saved no network but the dense one in
            the form that the runtime takes; or if the first saved no dense network in it.
        LatencyError: if the runtime cannot be used.
    """
    folders = [RunFolder.open(root) for root in dict.fromkeys(roots)]
    devices = [device_for(runtime, n, remote, cpus) for n in threads]
    artifacts: dict[_Saved, Artifact] = {}
    for folder in folders:
        is_first = folder is folders[0]
        methods = [row.method for row in folder.outcome().rows if is_first or row.method != DENSE]
        own, left_out = _artifacts([_Saved(folder, method) for method in methods], devices[0].takes)
        timed = {network.method for network in own}
        if timed <= {DENSE} or (is_first and DENSE not in timed):
            msg = f"run {folder.root} holds too little to time with '{runtime}': {'; '.join(left_out)}"
            raise RunError(msg)
        for reason in left_out:
            say(f"left out: {reason}")
        artifacts |= own
    _check_inputs(list(artifacts))
    is_ambiguous = len({folder.root.resolve().name for folder in folders}) < len(folders)
    readings: list[SavedLatency] = []
    for device, n in zip(devices, threads, strict=True):
        another = {folder: _another_device(folder, device) for folder in folders}
        for reason in dict.fromkeys(filter(None, another.values())):
            say(f"warning: {ANOTHER_DEVICE}: {reason}")
        where = ", ".join(str(folder.root) for folder in folders)
        say(f"{where}: {len(artifacts)} networks with {count(n, 'thread')}, {rounds} rounds")
        for network, reading in _timed(device, artifacts, rounds):
            name = str(network.folder.root) if is_ambiguous else reading.run
            readings.append(replace(reading, run=name, another_device=another[network.folder]))
    return readings


def _check_inputs(networks: Sequence[_Saved]) -> None:
    expected = networks[0].input_shapes
    for network in networks:
        if network.input_shapes != expected:
            msg = (
                f"run {network.folder.root} takes inputs of shapes {network.input_shapes}, and run "
                f"{networks[0].folder.root} of {expected}; networks are compared on the same input, so time them apart"
            )
            raise RunError(msg)


def _another_device(folder: RunFolder, device: Device) -> str:
    """Why a device is not that of the run's table; empty if it is, or there is no table."""
    try:
        if folder.table_file.exists():
            LatencyTable.load(folder.table_file).check_device(device.fingerprint)
    except TableError as error:
        return str(error)
    return ""


def _artifacts(networks: Sequence[_Saved], takes: str) -> tuple[dict[_Saved, Artifact], list[str]]:
    """The saved networks as a runtime takes them, and why others are not among them."""
    artifacts: dict[_Saved, Artifact] = {}
    left_out: list[str] = []
    for network in networks:
        if takes == "onnx":
            path = network.path / ONNX_NAME
            reason = "it was run with measure.onnx off, or the export failed, which its output says"
            if path.exists():
                artifacts[network] = path
            else:
                left_out.append(f"no ONNX file of {network.method} ({reason})")
        elif network.is_quantized:
            left_out.append(f"{network.method} has integers, which this runtime of float networks would only simulate")
        else:
            artifacts[network] = network.module()
    return artifacts, left_out


def _timed(
    device: LocalDevice | RemoteDevice, artifacts: Mapping[_Saved, Artifact], rounds: int
) -> Iterator[tuple[_Saved, SavedLatency]]:
    by_key = {network.key: network for network in artifacts}
    example = tuple(x[:1] for x in read_manifest(by_key[DENSE].path).examples())
    named = {network.key: artifact for network, artifact in artifacts.items()}
    report = device.measure(named, example, n_runs=rounds, n_warmup=WARMUP)
    where = device.fingerprint
    for entry in report.entries:
        network, against = by_key[entry.model], report.compare(entry.model, DENSE, where.runtime)
        yield (
            network,
            SavedLatency(
                run=network.folder.root.resolve().name,
                method=network.method,
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
            ),
        )
