"""Time of every layer of a network on one device, as a function of its channels: measured sparsely, interpolated.

A runtime's time is no smooth function of channels: vector units make it a staircase, and counts that do not divide
evenly may take another kernel altogether (on ONNX Runtime 63 channels can cost a third more than 64). So counts are
told apart by the largest of `DIVISORS` that divides them; each class has knots of its own, on both sides of the
stairs while these are steep, and times are interpolated between knots of one class only.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from graph_encoder.errors import first_line
from graph_encoder.network import LinearDim, NetworkGraph
from pruning.files import write_atomic
from pruning.layer_policy import FULL_BITS

from .device import Device, Fingerprint, Floats, TableError, anchors, quietest_look
from .layers import LayerKind, layer_artifact, layer_input, layers_of
from .pace import Pace
from .runtimes import Artifact, LatencyError
from .worker import Processor

FORMAT_VERSION = 6
"""Those before 6 are refused: they hold times of calls that had not settled (`latency.worker.interleave`)."""
DIVISORS = (16, 8, 4, 1)
"""Counts are of the class of the first of these that divides them: whole vectors of 64, 32 and 16 bytes, or none."""
STAIR = 16
"""Width of a stair, in channels."""
_STEEP = 4
"""Stairs that get knots on both sides; farther up a stair is less than a fifth of the time."""
_CHUNK = 24
"""Layers timed in turn; a table is saved after so many."""
_ANCHORS = 4
"""Copies of the reference layer and of the empty network that are called one after another before layers are; the last
one is read, as those before it have woken what they share."""


def class_of(count: int) -> int:
    """The class of a channel count: the first of `DIVISORS` that divides it."""
    return next(divisor for divisor in DIVISORS if count % divisor == 0)


def knots_of(reachable: Iterable[int]) -> tuple[int, ...]:
    """Counts to measure, of those that can be reached: for each class both ends of each of the first stairs, then one
    count a stair, at distances that grow, and always the least and the most.
    """  # noqa: D205 - one sentence
    by_class: dict[int, list[int]] = {}
    for count in sorted(set(reachable)):
        by_class.setdefault(class_of(count), []).append(count)
    knots: set[int] = set()
    for counts in by_class.values():
        knots |= {counts[0], counts[-1]}
        by_stair: dict[int, list[int]] = {}
        for count in counts:
            by_stair.setdefault(-(-count // STAIR), []).append(count)
        for stair, members in by_stair.items():
            if stair <= _STEEP:
                knots |= {members[0], members[-1]}
            elif _is_sparse_stair(stair):
                knots.add(members[-1])
    return tuple(sorted(knots))


def _is_sparse_stair(stair: int) -> bool:
    """6, 8, 12, 16, 24, 32 and so on: two in each doubling."""
    while stair % 2 == 0:
        stair //= 2
    return stair in (1, 3)


def reachable_counts(dim: LinearDim, steps: Mapping[int, int], sizes: Mapping[int, int]) -> tuple[int, ...]:
    """Channel counts that a dimension can have.

    Args:
        dim: the dimension.
        steps: units by group index that a group keeps a multiple of; groups that are not named stay whole.
        sizes: units of each group by its index.
    """
    moving = [(k, steps[g], sizes[g]) for g, k in dim.per_unit if g in steps]
    if not moving:
        return (dim.full,)
    totals = {dim.full - sum(k * size for k, _, size in moving)}
    for k, step, size in moving:
        # A whole group need not be a multiple of its step.
        kept = {*range(min(step, size), size + 1, step), size}
        totals = {total + k * units for total in totals for units in kept}
    return tuple(sorted(totals))


@dataclass(frozen=True)
class KindTimes:
    """Times of all layers of one kind, in units of the reference layer's time.

    Attributes:
        kind: the kind.
        inputs: knots of the channels read (by one group), ascending.
        outputs: knots of the channels written, ascending.
        ratios: time at each pair of knots, shape ``(inputs, outputs)``; NaN where not measured yet.
    """

    kind: LayerKind
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    ratios: Floats

    @classmethod
    def empty(cls, kind: LayerKind, inputs: Sequence[int], outputs: Sequence[int]) -> KindTimes:
        """Nothing measured yet."""
        return cls(kind, tuple(inputs), tuple(outputs), np.full((len(inputs), len(outputs)), np.nan))

    def widened(self, inputs: Iterable[int], outputs: Iterable[int]) -> KindTimes:
        """The same times with further knots, not measured yet."""
        wide = KindTimes.empty(self.kind, sorted({*self.inputs, *inputs}), sorted({*self.outputs, *outputs}))
        rows, columns = (np.searchsorted(*pair) for pair in ((wide.inputs, self.inputs), (wide.outputs, self.outputs)))
        wide.ratios[np.ix_(rows, columns)] = self.ratios
        return wide

    def missing(self) -> list[tuple[int, int]]:
        """Positions in `ratios` that are not measured."""
        return [(int(row), int(column)) for row, column in np.argwhere(np.isnan(self.ratios))]

    def __call__(self, inputs: int, outputs: int) -> float:
        """Time of a layer with so many channels.

        Raises:
            TableError: if a count is of a class that the table does not hold, or lies outside its knots.
        """
        self._check_held(inputs, self.inputs, "reads")
        self._check_held(outputs, self.outputs, "writes")
        rows, columns, times = self._surface(class_of(inputs), class_of(outputs))
        row, along_rows = _place(rows, inputs)
        column, along_columns = _place(columns, outputs)
        low, high = times[row], times[min(row + 1, len(rows) - 1)]
        right = min(column + 1, len(columns) - 1)
        first = low[column] + (low[right] - low[column]) * along_columns
        second = high[column] + (high[right] - high[column]) * along_columns
        return float(first + (second - first) * along_rows)

    def _check_held(self, count: int, knots: tuple[int, ...], verb: str) -> None:
        members = [knot for knot in knots if class_of(knot) == class_of(count)]
        if not members or not members[0] <= count <= members[-1]:
            held = ", ".join(f"{k}" for k in knots)
            msg = (
                f"the table does not hold a layer ({self.kind}) that {verb} {count} channels; it was measured at "
                f"{held}. Round channel counts as it was built, or build it with a finer rounding; if it was built for "
                "another network, 'secateur latency build' into the same file adds this one"
            )
            raise TableError(msg)

    def _surface(self, class_in: int, class_out: int) -> tuple[list[int], list[int], list[list[float]]]:
        """Knots and times of one pair of classes; plain lists, which are faster to look up one value in."""
        key = (class_in, class_out)
        if key not in self._surfaces:
            rows = [i for i, count in enumerate(self.inputs) if class_of(count) == class_in]
            columns = [i for i, count in enumerate(self.outputs) if class_of(count) == class_out]
            times = _without_descents(self.ratios[np.ix_(rows, columns)])
            self._surfaces[key] = (
                [self.inputs[i] for i in rows],
                [self.outputs[i] for i in columns],
                times.tolist(),
            )
        return self._surfaces[key]

    @cached_property
    def _surfaces(self) -> dict[tuple[int, int], tuple[list[int], list[int], list[list[float]]]]:
        return {}


def _without_descents(times: Floats) -> Floats:
    """The middle between the running maximum and the running minimum from the other end, along both axes.

    Within a class more channels never cost less; what says so is noise, and both ends of it get a half.
    """
    for axis in (0, 1):
        up = np.maximum.accumulate(times, axis=axis)
        down = np.flip(np.minimum.accumulate(np.flip(times, axis=axis), axis=axis), axis=axis)
        times = (up + down) / 2
    return times


def _place(knots: list[int], count: int) -> tuple[int, float]:
    """Index of the knot at or below ``count``, and the fraction of the way to the next."""
    index = bisect_left(knots, count)
    if knots[index] == count:
        return index, 0.0
    return index - 1, (count - knots[index - 1]) / (knots[index] - knots[index - 1])


@dataclass(frozen=True)
class Calibration:
    """From the sums over a network's layers to the network.

    The time is ``offset + scale * floats + integer_scale * integers + conversion * conversions + element * elements``:
    the sums of the times of layers that run in floats and in integers, the tensors that are converted between both,
    and the elements of these. Layers are timed alone: the sums know no join, no activation that is not fused, and no
    layout that a chain of layers keeps; they pay each layer's own way in and out. Whole networks tell the difference.

    Attributes:
        scale: of layers in floats, above 0.
        offset: in units of the reference layer's time, as are the costs below; may be negative.
        n_networks: whole networks of floats that it was fitted to.
        error: median absolute error of the fit, as a share.
        integer_scale: of layers in integers; as ``scale`` where no network with integers was timed.
        conversion: cost of converting a tensor, at least 0.
        element: cost of each of its elements, at least 0.
        n_mixed: whole networks with integers that it was fitted to.
    """

    scale: float = 1.0
    offset: float = 0.0
    n_networks: int = 0
    error: float = math.nan
    integer_scale: float = math.nan
    conversion: float = 0.0
    element: float = 0.0
    n_mixed: int = 0

    def __post_init__(self) -> None:
        if math.isnan(self.integer_scale):
            object.__setattr__(self, "integer_scale", self.scale)

    def scale_of(self, *, in_integers: bool) -> float:
        """Scale of layers in integers, or of those in floats."""
        return self.integer_scale if in_integers else self.scale


@dataclass(frozen=True)
class LatencyTable:
    """What was measured on one device.

    Attributes:
        fingerprint: the device.
        reference_ns: time of the reference layer, the unit of all others.
        empty: time of a network that does nothing, in that unit.
        kinds: times by layer kind.
        calibrations: by `network_key`.
    """

    fingerprint: Fingerprint
    reference_ns: float
    empty: float
    kinds: Mapping[LayerKind, KindTimes] = field(default_factory=dict)
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)

    def times(self, kind: LayerKind) -> KindTimes:
        """Times of one kind.

        Raises:
            TableError: if the table does not hold it, or its measurement was not finished.
        """
        found = self.kinds.get(kind)
        if found is None or found.missing():
            state = "does not hold" if found is None else "is not finished for"
            option = "" if kind.bits == FULL_BITS else " --integers"
            msg = (
                f"the table {state} the layer kind '{kind}'; 'secateur latency build{option}' into the same file, for "
                "this model with its shape and number of classes, adds what is missing"
            )
            raise TableError(msg)
        return found

    def save(self, path: Path | str) -> None:
        """Write the table as JSON, in one step; `FileWriteError` if that cannot be done."""
        write_atomic(Path(path), self.to_json().encode())

    @property
    def digest(self) -> str:
        """Hash of all that it holds."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The table as JSON text that `load` reads from a file."""
        content = {
            "format_version": FORMAT_VERSION,
            "fingerprint": asdict(self.fingerprint),
            "reference_ns": self.reference_ns,
            "empty": self.empty,
            "kinds": [
                asdict(times.kind)
                | {
                    "inputs": times.inputs,
                    "outputs": times.outputs,
                    "ratios": [[None if np.isnan(r) else round(float(r), 6) for r in row] for row in times.ratios],
                }
                for _, times in sorted(self.kinds.items())
            ],
            "calibrations": {key: asdict(found) for key, found in sorted(self.calibrations.items())},
        }
        return json.dumps(content) + "\n"

    @classmethod
    def load(cls, path: Path | str) -> LatencyTable:
        """Read what `save` wrote.

        Raises:
            TableError: if there is no such file, it is damaged, or of another version.
        """
        try:
            content = json.loads(Path(path).read_text())
            if not isinstance(content, dict) or "format_version" not in content:
                msg = f"'{path}' is no latency table; 'secateur latency build --model ... --out TABLE' makes one"
                raise TableError(msg)
            if (version := content["format_version"]) != FORMAT_VERSION:
                msg = (
                    f"the latency table '{path}' has format version {version}, and this release reads "
                    f"{FORMAT_VERSION}: build it again, in a new file, and start anew the runs that were begun with it"
                )
                raise TableError(msg)
            kinds = [_read_kind(dict(entry)) for entry in content["kinds"]]
            reference = _positive(content["reference_ns"], "reference_ns")
            return cls(
                _read_fingerprint(dict(content["fingerprint"])),
                reference,
                _positive(content["empty"], "empty"),
                {times.kind: times for times in kinds},
                {key: _read_calibration(value) for key, value in content["calibrations"].items()},
            )
        except OSError as error:
            msg = f"cannot read the latency table '{path}': {error.strerror}"
            raise TableError(msg) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            msg = f"cannot read the latency table '{path}': {type(error).__name__}: {error}; build it again"
            raise TableError(msg) from error


def _read_fingerprint(entry: dict[str, Any]) -> Fingerprint:
    return Fingerprint(Processor.of_json(entry.pop("processor")), cpus=tuple(entry.pop("cpus")), **entry)


def _read_kind(entry: dict[str, Any]) -> KindTimes:
    inputs, outputs = tuple(entry.pop("inputs")), tuple(entry.pop("outputs"))
    ratios = np.array([[np.nan if r is None else r for r in row] for row in entry.pop("ratios")], dtype=float)
    if ratios.shape != (len(inputs), len(outputs)):
        msg = f"times of shape {ratios.shape} for {len(inputs)} x {len(outputs)} channel counts"
        raise ValueError(msg)
    for ratio in ratios[~np.isnan(ratios)]:
        _positive(ratio, "a layer's time")
    for counts in (inputs, outputs):
        if list(counts) != sorted({int(count) for count in counts if count > 0}):
            msg = f"channel counts {list(counts)} in place of rising whole numbers"
            raise ValueError(msg)
    entry |= {name: tuple(entry[name]) for name in ("kernel", "stride", "out_size", "dilation")}
    return KindTimes(LayerKind(**entry), inputs, outputs, ratios)


def _read_calibration(entry: dict[str, Any]) -> Calibration:
    found = Calibration(**entry)
    for name, value in asdict(found).items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            msg = f"a calibration with {name} {value!r}"
            raise ValueError(msg)
    return found


def _positive(value: Any, what: str) -> float:
    if not 0 < (number := float(value)) < math.inf:
        msg = f"{what} of {value}"
        raise ValueError(msg)
    return number


def network_key(graph: NetworkGraph) -> str:
    """A digest of a network's layers and their bounds, for which a calibration holds."""
    layers = [(layer.name, str(layer.kind), layer.inputs, layer.outputs) for layer in layers_of(graph)]
    return hashlib.sha256(repr(layers).encode()).hexdigest()[:16]


def needed_kinds(
    graph: NetworkGraph, steps: Mapping[str, int], bits: Sequence[int]
) -> dict[LayerKind, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The kinds of a network's layers, each with the knots of the channels it reads and writes.

    Args:
        graph: captured network.
        steps: by group name, units that the group keeps a multiple of; groups that are not named stay whole.
        bits: each layer is looked at with each of these.
    """
    step_of = {graph.group_index[name]: step for name, step in steps.items()}
    size_of = {index: group.size for index, group in enumerate(graph.groups)}
    counts: dict[LayerKind, tuple[set[int], set[int]]] = {}
    for layer in layers_of(graph):
        for width in bits:
            inputs, outputs = counts.setdefault(replace(layer.kind, bits=width), (set(), set()))
            inputs.update(reachable_counts(layer.inputs, step_of, size_of))
            outputs.update(filter(layer.kind.is_possible, reachable_counts(layer.outputs, step_of, size_of)))
    return {kind: (knots_of(inputs), knots_of(outputs)) for kind, (inputs, outputs) in counts.items()}


def start_table(device: Device, *, n_runs: int = 200, n_looks: int = 1) -> LatencyTable:
    """A table of ``device`` that holds the time of its reference layer and nothing else.

    Args:
        device: where to measure.
        n_runs: timed calls of each reading.
        n_looks: readings, `latency.pace.PAUSE_S` apart, of which the quietest is taken.
    """
    unit, empty = quietest_look(device, n_runs, n_looks)
    return LatencyTable(device.fingerprint, unit, empty)


def build_table(
    table: LatencyTable,
    device: Device,
    needed: Mapping[LayerKind, tuple[Sequence[int], Sequence[int]]],
    *,
    n_runs: int = 15,
    pace: Pace | None = None,
    save: Callable[[LatencyTable], None] = lambda table: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LatencyTable:
    """Measure what ``table`` does not hold yet.

    Each chunk of layers is timed in turn with the reference layer and with an empty network; a layer's time is what
    it takes beyond the empty network, over the reference's in the same round, so that chunks measured at different
    hours, under different load, fit together.

    Args:
        table: what was measured before, on the same device.
        device: where to measure.
        needed: knots by layer kind, from `needed_kinds`.
        n_runs: timed calls of each layer.
        pace: of the reference layer; chunks are timed again where it is slow.
        save: called with the table after each chunk, so that a build that is stopped can go on.
        progress: called with the layers measured and the layers needed.

    Raises:
        TableError: if the table is of another device.
    """
    table.fingerprint.check(device.fingerprint)
    pace = Pace(table.reference_ns) if pace is None else pace
    kinds = dict(table.kinds)
    for kind, (inputs, outputs) in needed.items():
        kinds[kind] = kinds.get(kind, KindTimes.empty(kind, inputs, outputs)).widened(inputs, outputs)
    points = [(kind, *at) for kind in needed for at in kinds[kind].missing()]
    total = sum(kinds[kind].ratios.size for kind in needed)
    progress(total - len(points), total)
    for start in range(0, len(points), _CHUNK):
        part = points[start : start + _CHUNK]
        shapes = [(kind, kinds[kind].inputs[row], kinds[kind].outputs[column]) for kind, row, column in part]
        for (kind, row, column), ratio in zip(part, _layer_ratios(device, shapes, n_runs, pace), strict=True):
            kinds[kind].ratios[row, column] = ratio
        table = replace(table, kinds=dict(kinds))
        save(table)
        progress(total - len(points) + start + len(part), total)
    return replace(table, kinds=kinds)


def network_ratios(device: Device, networks: Sequence[Artifact], inputs: tuple[Tensor, ...], pace: Pace) -> Floats:
    """Times of whole networks in units of the reference layer's, measured in the same rounds; shape ``(networks,)``."""
    timed = [*anchors(device), *((network, inputs) for network in networks)]

    def read() -> tuple[Floats, float]:
        reference, _, *times = device.times_ns(timed, n_runs=30, n_warmup=3)
        return np.median(np.array(times) / reference, axis=1), float(np.median(reference))

    return pace.quietest(read)


def _layer_ratios(device: Device, shapes: Sequence[tuple[LayerKind, int, int]], n_runs: int, pace: Pace) -> Floats:
    """Times of layers, whose calls do not settle: in a network all other layers run in between.

    What they are compared with is to be settled as far as it goes: see `_ANCHORS`.
    """
    networks = [(layer_artifact(*shape, device.takes), (layer_input(*shape),)) for shape in shapes]
    repeated = [anchor for anchor in anchors(device) for _ in range(_ANCHORS)]

    def read() -> tuple[Floats, float]:
        times = device.times_ns([*repeated, *networks], n_runs, n_warmup=2, settled=False)
        reference, empty = times[_ANCHORS - 1], times[2 * _ANCHORS - 1]
        ratios = np.median((times[2 * _ANCHORS :] - empty) / reference, axis=1)
        return ratios, float(np.median(reference))

    try:
        found = pace.quietest(read)
    except Exception:  # a runtime fails as it likes
        _name_what_fails(device, shapes)
        raise
    # The clock may read less than an empty call for the least of layers; no layer is free.
    return np.maximum(found, 1e-4)


def _name_what_fails(device: Device, shapes: Sequence[tuple[LayerKind, int, int]]) -> None:
    """Raise `LatencyError` with the first layer that the device cannot run, if it runs anything at all."""
    try:
        device.times_ns(anchors(device), 1, n_warmup=0, settled=False)
    except Exception:  # not for the sake of a layer
        return
    for kind, inputs, outputs in shapes:
        alone = layer_artifact(kind, inputs, outputs, device.takes), (layer_input(kind, inputs, outputs),)
        try:
            device.times_ns([alone], 1, n_warmup=0, settled=False)
        except Exception as error:
            msg = f"the device cannot run a layer: {kind}, {inputs} to {outputs} channels: {first_line(error)}"
            raise LatencyError(msg) from error
