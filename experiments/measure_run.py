"""`secateur latency measure`: the networks that runs saved, timed beside the dense one in a process of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from latency.device import Fingerprint, LocalDevice, TableError, measured_quietly, pace_of
from latency.measure import LatencyReport
from latency.remote import RemoteDevice
from latency.runtimes import Artifact, LatencyError
from latency.worker import Processor
from pruning.export import Manifest, load_compressed, read_manifest
from pruning.policy import CompressionPolicy

from .data import ImageData
from .exported_files import ONNX_NAME
from .models import build_model
from .outcome import ANOTHER_DEVICE, DENSE, percent
from .progress import Say, count
from .run import RunError, RunFolder
from .timing_device import Remote, device_for

OF_FIRST = "of the first run's (95 %)"
HEADINGS = ["run", "method", "validation", "threads", "ms (quartiles)", "disturbed", "of dense (95 %)", OF_FIRST, ""]
"""Of `SavedLatency.cells`."""


@dataclass(frozen=True)
class SavedLatency:
    """One saved network on one runtime.

    Attributes:
        run: name of the folder of its run; its path where runs of one name are timed together.
        method: that found its plan, or ``dense``.
        runtime: name and version.
        threads: of the runtime.
        processor: what computed.
        cpus: numbers of the processors that it could use; empty where the system does not say.
        median_ms: median time of a call with one image.
        lower_quartile_ms: a quarter of the calls were faster.
        upper_quartile_ms: a quarter of the calls were slower.
        disturbed: share of the calls that had to wait for a processor.
        rounds: calls; in each round every network was timed once.
        ratio: median over the rounds of its time over that of the first run's dense network.
        low: lower end of the interval that holds the true median ratio at 95 %.
        high: its upper end.
        verdict: faster, slower, equal or undecided; see `latency.measure.Comparison`.
        repeats_needed: rounds that would decide; more than ``rounds`` where it is undecided.
        another_device: why this is another device than the latency table's that the run searched with; empty if it is
            the same, or there was no table.
        accuracy: of the run's validation images, after fine-tuning where that was done.
        of_first: median over the rounds of its time over that of the first run's network of the same method, between
            the ends of its interval; None for networks of the first run, and where that has none.
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
    accuracy: float | None = None
    of_first: tuple[float, float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The reading as plain values."""
        return asdict(self)

    def cells(self) -> list[str]:
        """The reading as a row of text, a cell for each of `HEADINGS`."""
        times = f"{self.median_ms:.3g} ({self.lower_quartile_ms:.3g} to {self.upper_quartile_ms:.3g})"
        own = [self.run, self.method, percent(self.accuracy), str(self.threads), times, f"{self.disturbed:.0%}"]
        where = f", {ANOTHER_DEVICE}" if self.another_device else ""
        if self.method == DENSE:
            return [*own, "", "", f"{self.runtime}{where}"]
        needed = f", about {self.repeats_needed} rounds would tell" if self.verdict == "undecided" else ""
        first = _share(*self.of_first) if self.of_first else ""
        return [*own, _share(self.low, self.ratio, self.high), first, f"{self.verdict}{needed}{where}"]


def table_of(readings: Sequence[SavedLatency]) -> list[list[str]]:
    """The readings as rows of text below their headings; of one run, without its comparison with the first."""
    rows = [HEADINGS, *(reading.cells() for reading in readings)]
    if any(reading.of_first for reading in readings):
        return rows
    dropped = HEADINGS.index(OF_FIRST)
    return [[*row[:dropped], *row[dropped + 1 :]] for row in rows]


def _share(low: float, ratio: float, high: float) -> str:
    return f"{ratio:.1%} ({low:.1%} to {high:.1%})"


@dataclass(frozen=True)
class _Saved:
    """A network that a run saved.

    Attributes:
        run: what the run is called.
        folder: the run.
        method: that found the network's plan, or ``dense``.
    """

    run: str
    folder: RunFolder
    method: str

    @property
    def key(self) -> str:
        return f"{self.run}/{self.method}"

    @property
    def path(self) -> Path:
        return self.folder.method(self.method).model

    @property
    def accuracy(self) -> float | None:
        row = self.folder.outcome().row(self.method)
        tuned = row.accuracy("validation", tuned=True)
        return row.accuracy("validation", tuned=False) if tuned is None else tuned

    @property
    def manifest(self) -> Manifest:
        return read_manifest(self.path)

    @property
    def is_quantized(self) -> bool:
        policy = CompressionPolicy.load(self.path / "policy.json")
        return any(layer.is_quantized for layer in policy.layers.values())


def _builder(folder: RunFolder) -> Callable[[], nn.Module]:
    """What builds the dense network of a run; its images are read for that, once."""
    config = folder.config
    sample = ImageData(config.data).sample
    return partial(build_model, config.model.name, len(sample.classes), sample.images.shape[1])


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

    Networks are best compared within one call: between processes more changes than the intervals say, above all with
    several threads (`docs/latency.md`).

    Runtimes of ONNX files read those that the runs wrote; runtimes of PyTorch modules (``sparse`` among them) get the
    networks as `pruning.export.load_compressed` builds them. What a run saved in no such form is left out, and named.

    Args:
        roots: folders of the runs, one or more.
        runtime: name of a runtime.
        threads: numbers of threads to time with, one after the other.
        cpus: numbers of the processors to stay on; all if empty.
        rounds: timed calls of each network.
        remote: the machine to measure on; this one if not given.
        say: told of progress, of what is left out, and of runs that compress another network than the first.

    Returns:
        One reading for each network and number of threads.

    Raises:
        RunError: if a run is not finished, takes other inputs than the first, or saved no network but the dense one in
            the form that the runtime takes; or if the first saved no dense network in it.
        LatencyError: if the runtime cannot be used.
    """
    runs = _named(roots)
    devices = [device_for(runtime, n, remote, cpus) for n in threads]
    artifacts = _gathered(runs, runtime, devices[0].takes, say)
    _check_comparable(list(artifacts), say)
    searched_for = {name: run.outcome().device for name, run in runs.items()}
    example = tuple(x[:1] for x in next(iter(artifacts)).manifest.examples())
    readings: list[SavedLatency] = []
    for device, n in zip(devices, threads, strict=True):
        another = {name: _another_device(own, device.fingerprint) for name, own in searched_for.items()}
        for reason in dict.fromkeys(filter(None, another.values())):
            those = ", ".join(str(runs[name].root) for name, its in another.items() if its == reason)
            say(f"warning: {ANOTHER_DEVICE} ({those}): {reason}")
        where = ", ".join(str(run.root) for run in runs.values())
        say(f"{where}: {len(artifacts)} networks with {count(n, 'thread')}, {rounds} rounds")
        named = {network.key: artifact for network, artifact in artifacts.items()}
        report = _measured(device, named, example, rounds, say)
        networks = list(artifacts)
        readings += [_reading(each, networks, report, device, rounds, another[each.run]) for each in networks]
    return readings


def _measured(
    device: LocalDevice | RemoteDevice,
    networks: Mapping[str, Artifact],
    example: tuple[Tensor, ...],
    rounds: int,
    say: Say,
) -> LatencyReport:
    """Times of a quiet machine where the runtime runs the layer that tells of it, else as they come."""
    try:
        pace = pace_of(device)
    except LatencyError as error:
        say(f"what a busy machine disturbs is not read again: {error}")
        return device.measure(networks, example, n_runs=rounds)
    report = measured_quietly(device, pace, networks, example, rounds)
    if pace.warning:
        say(pace.warning)
    return report


def _named(roots: Sequence[Path]) -> dict[str, RunFolder]:
    """The runs, each once, by the names of their folders, or by their paths where these are not unique."""
    runs = {root.resolve(): RunFolder.open(root) for root in roots}
    is_unique = len({path.name for path in runs}) == len(runs)
    return {path.name if is_unique else str(path): run for path, run in runs.items()}


def _gathered(runs: Mapping[str, RunFolder], runtime: str, takes: str, say: Say) -> dict[_Saved, Artifact]:
    """The first run's dense network and every method's of all runs, as a runtime takes them."""
    artifacts: dict[_Saved, Artifact] = {}
    for name, folder in runs.items():
        is_first = not artifacts
        methods = [row.method for row in folder.outcome().rows if is_first or row.method != DENSE]
        own, left_out = _artifacts([_Saved(name, folder, method) for method in methods], takes)
        timed = {network.method for network in own}
        if timed <= {DENSE} or (is_first and DENSE not in timed):
            reasons = "; ".join(left_out) or "it compared no method"
            msg = f"run {folder.root} holds too little to time with '{runtime}': {reasons}"
            raise RunError(msg)
        for reason in left_out:
            say(f"left out of {folder.root}: {reason}")
        artifacts |= own
    return artifacts


def _artifacts(networks: Sequence[_Saved], takes: str) -> tuple[dict[_Saved, Artifact], list[str]]:
    """The saved networks of one run as a runtime takes them, and why others are not among them."""
    artifacts: dict[_Saved, Artifact] = {}
    left_out: list[str] = []
    build: Callable[[], nn.Module] | None = None
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
            build = build or _builder(network.folder)
            artifacts[network] = load_compressed(network.path, build)
    return artifacts, left_out


def _check_comparable(networks: Sequence[_Saved], say: Say) -> None:
    """Refuse runs of other inputs than the first one's, and name those of another dense network."""
    first = networks[0]
    expected, dense = _input_of(first), first.manifest.constructor
    for network in {network.run: network for network in networks}.values():
        if (found := _input_of(network)) != expected:
            msg = (
                f"run {network.folder.root} takes inputs of {found}, and run {first.folder.root} of {expected}; "
                "networks are compared on the same input, so time them apart"
            )
            raise RunError(msg)
        if (name := network.manifest.constructor) != dense:
            say(
                f"warning: run {network.folder.root} compresses '{name}', and run {first.folder.root} '{dense}'; all "
                f"shares are of the dense network of '{first.run}'"
            )


def _input_of(network: _Saved) -> str:
    """Shape and type of each input of one image."""
    return " and ".join(f"{dtype} {'x'.join(map(str, shape[1:]))}" for shape, dtype in network.manifest.inputs)


def _another_device(own: Fingerprint | None, here: Fingerprint) -> str:
    """Why times read here are not those of the device that a run was for; empty if they are, or it was for none."""
    try:
        if own:
            own.check(here)
    except TableError as error:
        return str(error)
    return ""


def _reading(
    network: _Saved,
    networks: Sequence[_Saved],
    report: LatencyReport,
    device: LocalDevice | RemoteDevice,
    rounds: int,
    another_device: str,
) -> SavedLatency:
    """One network's times, against those of the dense network and of the first run's, which come first."""
    where, first = device.fingerprint, networks[0].run
    entry = report.entry(network.key, where.runtime)
    (dense,) = (each for each in networks if each.method == DENSE)
    against = report.compare(network.key, dense.key, where.runtime)
    rivals = [each for each in networks if each.run == first and each.method == network.method]
    of_first = None
    if network.run != first and rivals:
        beside = report.compare(network.key, rivals[0].key, where.runtime)
        of_first = beside.low, beside.ratio, beside.high
    return SavedLatency(
        run=network.run,
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
        another_device=another_device,
        accuracy=network.accuracy,
        of_first=of_first,
    )
