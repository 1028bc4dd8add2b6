"""`secateur latency`: the table of this device, and how well it predicts whole networks."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from envs.action import SearchSpace, nearest
from graph_encoder.capture import capture
from graph_encoder.network import NetworkGraph
from latency.predict import LatencyModel, calibrated
from latency.remote import RemoteDevice, RemoteError
from latency.runtimes import ONNXRUNTIME, Artifact, find_runtime
from latency.sliced import sliced_onnx
from latency.table import (
    Device,
    LatencyTable,
    LocalDevice,
    TableError,
    build_table,
    needed_kinds,
    network_key,
    network_ratios,
    start_table,
)
from pruning.export import export_onnx
from pruning.files import write_atomic
from pruning.layer_policy import FULL_BITS
from pruning.policy import CompressionPolicy
from pruning.surgery import apply_policy

from .machine import current_commit
from .models import build_model, image_sizes

Say = Callable[[str], None]

_BATCH = 8
"""Whole networks timed in turn; each keeps its session in memory meanwhile."""
_CALIBRATION_SEED = 1
"""Told apart from the seed of a check, so that no network is predicted from itself."""


@dataclass(frozen=True)
class Remote:
    """Another machine: its name for SSH, and Python there."""

    host: str
    python: str


@dataclass(frozen=True)
class Subject:
    """A network whose plans are timed: its weights are random, for time does not depend on them."""

    name: str
    model: nn.Module
    example: Tensor
    graph: NetworkGraph
    space: SearchSpace

    @classmethod
    def build(cls, name: str, shape: str | None, n_classes: int, rounding: int | None) -> Subject:
        """Build and capture the network called ``name``; every prunable group may lose units.

        Raises:
            ModelError: if there is no such network, or the shape is not three numbers.
            TraceError: if the network cannot be captured.
        """
        channels, height, width = image_sizes(name, shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _with_random_statistics(build_model(name, n_classes, channels).eval())
        example = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))
        graph = capture(model, example)
        importance = {group.name: np.arange(group.size, 0, -1) for group in graph.prunable}
        return cls(name, model, example, graph, SearchSpace.build(
            graph, importance, None, rounding=rounding, protect_first=False
        ))  # fmt: skip

    @property
    def steps(self) -> dict[str, int]:
        """Units that each group keeps a multiple of, unless it keeps everything."""
        ladders = zip(self.space.names, self.space.ladders, strict=True)
        return {
            name: int(np.gcd.reduce(ladder[:-1])) if len(ladder) > 1 else int(ladder[-1]) for name, ladder in ladders
        }

    def plans(self, n: int, seed: int) -> list[dict[str, int]]:
        """Random plans: a keep ratio for the network, and each group's within 0.3 of it."""
        generator = np.random.default_rng([_CALIBRATION_SEED, seed])
        plans = []
        for _ in range(n):
            middle = generator.uniform(0.1, 0.9)
            counts = nearest(middle + generator.uniform(-0.3, 0.3, self.space.n), self.space)
            plans.append(dict(zip(self.space.names, counts.tolist(), strict=True)))
        return plans

    def policy(self, plan: Mapping[str, int]) -> CompressionPolicy:
        """The policy that keeps the first units of each group."""
        return self.space.policy(np.array([plan[name] for name in self.space.names], dtype=np.int64))

    @cached_property
    def dense_onnx(self) -> onnx.ModelProto:
        """The dense network, exported."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "dense.onnx"
            export_onnx(self.model, self.example, path)
            return onnx.load(path)


def build_named(
    model: str,
    out: Path,
    *,
    shape: str | None = None,
    n_classes: int = 10,
    runtime: str = "onnxruntime",
    threads: int = 1,
    remote: Remote | None = None,
    rounding: int | None = None,
    bits: Sequence[int] = (FULL_BITS,),
    n_networks: int = 8,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Measure what the table ``out`` lacks for a network, and calibrate it with whole networks.

    A table that is there is extended, so that one file serves several networks, and a build that was stopped goes on.

    Args:
        model: as for `secateur search`.
        out: file of the table.
        shape: of one image, ``"3,32,32"``; goes by the network if not given.
        n_classes: outputs of the network.
        runtime: name of the runtime.
        threads: its threads.
        remote: the machine to measure on; this one if not given.
        rounding: units that groups keep a multiple of, as in a search.
        bits: each layer is timed with each of these; 8 only on runtimes that take ONNX.
        n_networks: whole networks that the sum over layers is calibrated with.
        say: told of progress.

    Returns:
        What was done, as plain values.

    Raises:
        TableError: if ``out`` is the table of another device, or not a table.
        LatencyError: if the runtime cannot be used here.
    """
    device = device_for(runtime, threads, remote)
    if out.exists():
        table = LatencyTable.load(out)
        table.check_device(device.fingerprint)
    else:
        table = start_table(device)
        table.save(out)
    subject = Subject.build(model, shape, n_classes, rounding)
    needed = needed_kinds(subject.graph, subject.steps, bits)
    say(f"{model}: {len(needed)} kinds of layer")
    table = build_table(
        table,
        device,
        needed,
        save=lambda grown: grown.save(out),
        progress=lambda done, total: say(f"{model}: {done:,} of {total:,} layers measured"),
    )
    key = network_key(subject.graph)
    if key not in table.calibrations or table.calibrations[key].n_networks < n_networks + 1:
        dense = dict(zip(subject.space.names, subject.space.sizes.tolist(), strict=True))
        plans = [dense, *subject.plans(n_networks, seed=0)]
        ratios = _timed(device, subject, plans, say)
        table = calibrated(table, subject.graph, plans, ratios)
        table.save(out)
    found = table.calibrations[key]
    return {
        "table": str(out),
        "device": str(table.fingerprint),
        "kinds": len(needed),
        "layers": sum(len(inputs) * len(outputs) for inputs, outputs in needed.values()),
        "networks": found.n_networks,
        "scale": round(found.scale, 4),
        "offset_ms": round(found.offset * table.reference_ns / 1e6, 4),
        "error_of_fit": round(found.error, 4),
        "dense_ms": round(LatencyModel(subject.graph, table).dense / 1e6, 4),
    }


@dataclass(frozen=True)
class CheckedTable:
    """Predicted and measured times of random plans of one network.

    Attributes:
        model: name of the network.
        shape: of one image.
        table: what predicted.
        seed: of the plans.
        predicted_ms: shape ``(plans,)``.
        measured_ms: times over the reference layer's in the same rounds, in milliseconds of the table's reference
            layer; shape ``(plans,)``.
    """

    model: str
    shape: tuple[int, ...]
    table: LatencyTable
    seed: int
    predicted_ms: NDArray[np.float64]
    measured_ms: NDArray[np.float64]

    @property
    def errors(self) -> NDArray[np.float64]:
        """Predicted over measured, less 1."""
        found: NDArray[np.float64] = self.predicted_ms / self.measured_ms - 1
        return found

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values."""
        absolute = np.abs(self.errors)
        return {
            "model": self.model,
            "device": str(self.table.fingerprint),
            "policies": len(self.errors),
            "seed": self.seed,
            "fastest_ms": round(float(self.measured_ms.min()), 3),
            "slowest_ms": round(float(self.measured_ms.max()), 3),
            "median_absolute_error": round(float(np.median(absolute)), 4),
            "upper_quartile_of_error": round(float(np.percentile(absolute, 75)), 4),
            "largest_error": round(float(absolute.max()), 4),
            "spearman": round(spearman(self.predicted_ms, self.measured_ms), 4),
        }


def check_named(
    path: Path,
    model: str,
    *,
    shape: str | None = None,
    n_classes: int = 10,
    rounding: int | None = None,
    n_policies: int = 50,
    seed: int = 0,
    remote: Remote | None = None,
    say: Say = lambda text: None,
) -> CheckedTable:
    """Time whole networks of random plans, and compare with what the table predicts.

    Raises:
        TableError: if the table cannot be read, is of another device, or lacks layers of the network.
    """
    table = LatencyTable.load(path)
    device = device_for(table.fingerprint.runtime, table.fingerprint.threads, remote)
    table.check_device(device.fingerprint)
    subject = Subject.build(model, shape, n_classes, rounding)
    predicts = LatencyModel(subject.graph, table, subject.space.names)
    if not predicts.calibration.n_networks:
        msg = f"the table '{path}' is not calibrated for '{model}' with these inputs; build it for this network first"
        raise TableError(msg)
    plans = subject.plans(n_policies, seed + 1)
    predicted = [predicts(np.array([plan[name] for name in subject.space.names])) for plan in plans]
    measured = _timed(device, subject, plans, say) * table.reference_ns
    return CheckedTable(model, tuple(subject.example.shape[1:]), table, seed, np.array(predicted) / 1e6, measured / 1e6)


_PAGE = """# Latency tables against whole networks

Each section was written by the command in it. Random policies: a keep ratio is drawn for the network, and each
group's within 0.3 of it; counts are rounded as a search rounds them. Measured is the median over rounds of a network's
time over the reference layer's in the same round, times the reference layer's time in the table; the error is
predicted over measured, less 1. `docs/latency.md` says how the table predicts.
"""


def write_page(path: Path, checks: Sequence[CheckedTable], command: str) -> None:
    """Add the comparisons to a page of Markdown as a section of their own; the page is made if it is missing."""
    lines = [
        f"## {', '.join(check.model for check in checks)}",
        "",
        f"    {command}",
        "",
        "| network | image | policies | seed | measured, ms | median error | upper quartile | largest | Spearman |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(_row, checks),
        "",
        f"{checks[0].table.fingerprint}; Python {platform.python_version()}, torch {torch.__version__}, commit "
        f"{current_commit()}.",
    ]
    before = path.read_text() if path.exists() else _PAGE
    write_atomic(path, "\n".join([before, *lines, ""]).encode())


def _row(check: CheckedTable) -> str:
    found = check.to_dict()
    image = "x".join(map(str, check.shape))
    return (
        f"| {check.model} | {image} | {found['policies']} | {check.seed} "
        f"| {found['fastest_ms']} to {found['slowest_ms']} | {found['median_absolute_error']:.1%} "
        f"| {found['upper_quartile_of_error']:.1%} | {found['largest_error']:.1%} | {found['spearman']:.3f} |"
    )


def spearman(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Rank correlation; equal values share their middle rank."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    ordered = np.sort(values)
    ranks: NDArray[np.float64] = (
        np.searchsorted(ordered, values, side="left") + np.searchsorted(ordered, values, side="right")
    ) / 2
    return ranks


def device_for(runtime: str, threads: int, remote: Remote | None) -> Device:
    """This machine, or another one; there is only ONNX Runtime on that.

    Raises:
        LatencyError: if the runtime cannot be used.
    """
    if remote is None:
        return LocalDevice(find_runtime(runtime), threads)
    if runtime != ONNXRUNTIME:
        msg = f"another machine is timed with {ONNXRUNTIME} only, not with '{runtime}'; leave out one of them"
        raise RemoteError(msg)
    return RemoteDevice(remote.host, remote.python, threads)


def _timed(device: Device, subject: Subject, plans: Sequence[Mapping[str, int]], say: Say) -> NDArray[np.float64]:
    """Times of whole networks in units of the reference layer's."""
    ratios: list[float] = []
    for start in range(0, len(plans), _BATCH):
        part = plans[start : start + _BATCH]
        with tempfile.TemporaryDirectory() as folder:
            networks = list(_artifacts(device, subject, part, Path(folder)))
            ratios += network_ratios(device, networks, (subject.example,)).tolist()
        say(f"{subject.name}: {len(ratios)} of {len(plans)} whole networks timed")
    return np.array(ratios)


def _artifacts(
    device: Device, subject: Subject, plans: Sequence[Mapping[str, int]], folder: Path
) -> Iterator[Artifact]:
    for index, plan in enumerate(plans):
        if device.takes == "module":
            yield apply_policy(subject.model, subject.graph, subject.policy(plan))
            continue
        sliced = sliced_onnx(subject.dense_onnx, subject.graph, subject.policy(plan))
        if sliced is not None:
            yield sliced
            continue
        path = folder / f"{index}.onnx"
        export_onnx(apply_policy(subject.model, subject.graph, subject.policy(plan)), subject.example, path)
        yield path


def _with_random_statistics(model: nn.Module) -> nn.Module:
    """A fresh batch norm shifts nothing, and the exporter would leave out the bias that a trained one has."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
    return model
