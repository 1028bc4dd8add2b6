"""`secateur latency`: the table of this device, and how well it predicts whole networks."""

from __future__ import annotations

import functools
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from envs.action import nearest
from envs.space import SearchSpace
from graph_encoder.capture import capture
from graph_encoder.network import NetworkGraph
from latency.decision import EIGHT_BITS, LayerDecision, layer_decisions, layer_policies
from latency.predict import LatencyModel, calibrated
from latency.runtimes import Artifact
from latency.sliced import sliced_onnx
from latency.table import (
    Calibration,
    Device,
    LatencyTable,
    TableError,
    build_table,
    needed_kinds,
    network_key,
    network_ratios,
    start_table,
)
from pruning.export import export_marked, export_onnx
from pruning.files import write_atomic
from pruning.layer_policy import FULL_BITS
from pruning.policy import CompressionPolicy
from pruning.qdq import MarkedNetwork
from pruning.quantize import quantize_layers
from pruning.surgery import apply_policy

from .machine import current_commit
from .models import build_model, image_sizes
from .pages import Table
from .progress import Say
from .rank_correlation import spearman
from .timing_device import Remote, device_for

_BATCH = 8
"""Whole networks timed in turn; each keeps its session in memory meanwhile."""
_CALIBRATION_SEED = 1
"""Told apart from the seed of a check, so that no network is predicted from itself."""
_MIXING_SEED = 2
_MIXES = 2
"""Networks with integers for each network of floats of a calibration, with the same channels."""


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

    @cached_property
    def bits(self) -> tuple[LayerDecision, ...]:
        """The layers that a search can give 8 bits."""
        return layer_decisions(self.graph, ["bits"])

    def mixed(self, plan: Mapping[str, int], n: int, seed: int) -> list[dict[str, int]]:
        """A plan with bits for its layers, ``n`` times: all 8, runs of layers of one kind, and each layer by itself."""
        generator = np.random.default_rng([_MIXING_SEED, seed])
        mixes = []
        for index in range(n):
            # How often integers and floats follow each other, from never to as by chance.
            changes = (0.0, generator.uniform(0.05, 0.3), 0.5)[index % 3]
            is_changed = generator.random(len(self.bits)) < changes
            is_integer = (np.cumsum(is_changed) + (generator.integers(2) if changes else 0)) % 2 == 0
            levels = np.where(is_integer, EIGHT_BITS, FULL_BITS).tolist()
            mixes.append({**plan, **{one.name: level for one, level in zip(self.bits, levels, strict=True)}})
        return mixes

    def cost(self, table: LatencyTable, *, integers: bool) -> LatencyModel:
        """What the table predicts of plans, with bits or without."""
        return LatencyModel(self.graph, table, self.space.names, self.bits if integers else ())

    def policy(self, plan: Mapping[str, int]) -> CompressionPolicy:
        """The policy that keeps the first units of each group, and gives layers their bits."""
        channels = self.space.policy(np.array([plan[name] for name in self.space.names], dtype=np.int64))
        return replace(channels, layers=layer_policies(self.bits, plan, self.space.sparsity))

    @cached_property
    def dense_onnx(self) -> onnx.ModelProto:
        """The dense network, exported."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "dense.onnx"
            export_onnx(self.model, self.example, path)
            return onnx.load(path)

    @cached_property
    def dense_marked(self) -> MarkedNetwork | None:
        """The dense network, exported so that layers of it can be made integers; None where it cannot be traced."""
        return export_marked(self.model, self.example)


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
        n_networks: whole networks of floats, beside the dense one, that the sum over layers is calibrated with; with 8
            bits each has `_MIXES` with integers beside it.
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
    known = table.calibrations.get(network_key(subject.graph), Calibration())
    # What was calibrated with integers before stays so.
    cost = subject.cost(table, integers=EIGHT_BITS in bits or known.n_mixed > 0)
    n_mixed = _MIXES * (n_networks + 1) if cost.has_integers else 0
    if known.n_networks < n_networks + 1 or known.n_mixed < n_mixed:
        dense = dict(zip(subject.space.names, subject.space.sizes.tolist(), strict=True))
        plans = [dense, *subject.plans(n_networks, seed=0)]
        if n_mixed:
            mixes = ([plan, *_rotated(subject, plan, seed)] for seed, plan in enumerate(plans))
            plans = [mixed for each in mixes for mixed in each]
        ratios = _timed(device, subject, plans, say)
        counts = [[plan.get(name, FULL_BITS) for name in cost.groups] for plan in plans]
        table = calibrated(table, cost, counts, ratios)
        table.save(out)
    found = table.calibrations[cost.key]
    return {
        "table": str(out),
        "device": str(table.fingerprint),
        "kinds": len(needed),
        "layers": sum(len(inputs) * len(outputs) for inputs, outputs in needed.values()),
        "networks": found.n_networks,
        "mixed_networks": found.n_mixed,
        "scale": round(found.scale, 4),
        "integer_scale": round(found.integer_scale, 4),
        "conversion_us": round(found.conversion * table.reference_ns / 1e3, 4),
        "element_ns": round(found.element * table.reference_ns, 4),
        "offset_ms": round(found.offset * table.reference_ns / 1e6, 4),
        "error_of_fit": round(found.error, 4),
        "dense_ms": round(LatencyModel(subject.graph, table).dense / 1e6, 4),
    }


def _rotated(subject: Subject, plan: Mapping[str, int], seed: int) -> list[dict[str, int]]:
    """Two of the three ways to mix bits, other ones for each plan."""
    mixes = subject.mixed(plan, 3, seed)
    return [mixes[(seed + index) % 3] for index in range(_MIXES)]


@dataclass(frozen=True)
class CheckedTable:
    """Predicted and measured times of random plans of one network.

    Attributes:
        model: name of the network.
        shape: of one image.
        table: what predicted.
        seed: of the plans.
        integers: whether layers have random bits.
        predicted_ms: shape ``(plans,)``.
        measured_ms: times over the reference layer's in the same rounds, in milliseconds of the table's reference
            layer; shape ``(plans,)``.
    """

    model: str
    shape: tuple[int, ...]
    table: LatencyTable
    seed: int
    integers: bool
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
            "integers": self.integers,
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
    integers: bool = False,
    remote: Remote | None = None,
    say: Say = lambda text: None,
) -> CheckedTable:
    """Time whole networks of random plans, and compare with what the table predicts.

    With ``integers``, layers have 8 bits too, by turns all of them, in runs, and each by itself.

    Raises:
        TableError: if the table cannot be read, is of another device, or lacks layers of the network.
    """
    table = LatencyTable.load(path)
    device = device_for(table.fingerprint.runtime, table.fingerprint.threads, remote)
    table.check_device(device.fingerprint)
    subject = Subject.build(model, shape, n_classes, rounding)
    predicts = subject.cost(table, integers=integers)
    found = predicts.calibration
    if not found.n_networks or (integers and not found.n_mixed):
        option = " with --integers" if integers else ""
        msg = (
            f"the table '{path}' is not calibrated for '{model}' with these inputs; build it for this network first"
            f"{option}"
        )
        raise TableError(msg)
    plans = subject.plans(n_policies, seed + 1)
    if integers:
        plans = [subject.mixed(plan, 3, n_policies * seed + at)[at % 3] for at, plan in enumerate(plans)]
    predicted = [predicts([plan[name] for name in predicts.groups]) for plan in plans]
    measured = _timed(device, subject, plans, say) * table.reference_ns
    image = tuple(subject.example.shape[1:])
    return CheckedTable(model, image, table, seed, integers, np.array(predicted) / 1e6, measured / 1e6)


_PAGE = """# Latency tables against whole networks

Each section was written by the command in it. Random policies: a keep ratio is drawn for the network, and each
group's within 0.3 of it; counts are rounded as a search rounds them. Measured is the median over rounds of a network's
time over the reference layer's in the same round, times the reference layer's time in the table; the error is
predicted over measured, less 1. With `--integers` layers have 8 bits too, by turns all of them, in runs, and each by
itself. `docs/latency.md` says how the table predicts.
"""


def write_page(path: Path, checks: Sequence[CheckedTable], command: str) -> None:
    """Add the comparisons to a page of Markdown as a section of their own; the page is made if it is missing."""
    heads = ["network", "image", "policies", "seed", "measured, ms", "median error", "upper quartile"]
    lines = [
        f"## {', '.join(check.model for check in checks)}",
        "",
        f"    {command}",
        "",
        Table([*heads, "largest", "Spearman"], [_row(check) for check in checks], words=("image",)).markdown(),
        "",
        f"{checks[0].table.fingerprint}; Python {platform.python_version()}, torch {torch.__version__}, commit "
        f"{current_commit()}.",
    ]
    before = path.read_text() if path.exists() else _PAGE
    write_atomic(path, "\n".join([before, *lines, ""]).encode())


def _row(check: CheckedTable) -> list[str]:
    found = check.to_dict()
    return [
        check.model,
        "x".join(map(str, check.shape)),
        str(found["policies"]),
        str(check.seed),
        f"{found['fastest_ms']} to {found['slowest_ms']}",
        f"{found['median_absolute_error']:.1%}",
        f"{found['upper_quartile_of_error']:.1%}",
        f"{found['largest_error']:.1%}",
        f"{found['spearman']:.3f}",
    ]


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
    if any(one.name in plan for one in subject.bits for plan in plans):
        yield from _with_integers(subject, plans, folder)
        return
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


def _with_integers(subject: Subject, plans: Sequence[Mapping[str, int]], folder: Path) -> Iterator[Artifact]:
    """ONNX files of plans with bits; what is exported for one plan serves all that have its channels."""
    exported: tuple[CompressionPolicy, MarkedNetwork] | None = None
    for index, plan in enumerate(plans):
        policy = subject.policy(plan)
        channels, layers = replace(policy, layers={}), policy.layers.keys()
        if subject.dense_marked is None:
            small = apply_policy(subject.model, subject.graph, channels)
            path = folder / f"{index}.onnx"
            if layers:
                small = quantize_layers(small, policy.layers, [subject.example], method="minmax")
            export_onnx(small, subject.example, path, images=subject.example)
            yield path
            continue
        finish = functools.partial(subject.dense_marked.with_integers, layers=layers)
        sliced = sliced_onnx(subject.dense_marked.proto, subject.graph, channels, finish)
        if sliced is not None:
            yield sliced
            continue
        if exported is None or exported[0] != channels:
            marked = export_marked(apply_policy(subject.model, subject.graph, channels), subject.example)
            assert marked is not None
            exported = channels, marked
        yield exported[1].with_integers(exported[1].proto, layers).SerializeToString()


def _with_random_statistics(model: nn.Module) -> nn.Module:
    """A fresh batch norm shifts nothing, and the exporter would leave out the bias that a trained one has."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
    return model
