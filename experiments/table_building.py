"""`secateur latency build`: a latency table of a device, calibrated with whole networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latency.device import Device, pace_of
from latency.layers import untimed_convolutions
from latency.pace import Pace
from latency.predict import LatencyModel, calibrated
from latency.runtimes import LatencyError
from latency.table import Calibration, LatencyTable, build_table, needed_kinds, network_key, start_table
from pruning.layer_policy import FULL_BITS, INTEGER_BITS

from .progress import Say, count
from .run import locked
from .timed_network import TimedNetwork
from .timing_device import Remote, device_for
from .whole_networks import plan_ratios

_MIXES = 2
"""Networks with integers for each network of floats of a calibration, with the same channels."""
_LOOKS = 6
"""Readings of the reference layer that a table begins with."""
_POOR_FIT = 0.06
"""Median error of a calibration from which its networks are timed once more. On quiet machines 0.02 to 0.053 were read
(ResNet-18, ResNet-56, MobileNet-V2); on one that was busy meanwhile 0.067, and the fastest plan of ResNet-56 came out
18 % slower than it is."""


def build_named(
    model: str,
    out: Path,
    *,
    shape: str | None = None,
    n_classes: int = 10,
    runtime: str = "onnxruntime",
    threads: int = 1,
    cpus: Sequence[int] = (),
    remote: Remote | None = None,
    rounding: int | None = None,
    bits: Sequence[int] = (FULL_BITS,),
    n_networks: int = 8,
    recalibrate: bool = False,
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
        cpus: numbers of the processors that it stays on; all if empty.
        remote: the machine to measure on; this one if not given.
        rounding: units that groups keep a multiple of, as in a search.
        bits: each layer is timed with each of these; 8 only on runtimes that take ONNX.
        n_networks: whole networks of floats, beside the dense one, that the sum over layers is calibrated with; with 8
            bits each has `_MIXES` with integers beside it.
        recalibrate: time whole networks also where the table is calibrated, and keep the better fit.
        say: told of progress.

    Returns:
        What was done, as plain values.

    Raises:
        TableError: if ``out`` is the table of another device, or not a table.
        LatencyError: if the runtime cannot be used here, or not with these bits.
        RunBusyError: if another process builds the table.
    """
    device = device_for(runtime, threads, remote, cpus)
    if INTEGER_BITS in bits and device.takes == "module":
        msg = f"runtime '{runtime}' computes in floats alone; build without --integers, or for one that reads ONNX"
        raise LatencyError(msg)
    # A network that cannot be built leaves nothing behind.
    network = TimedNetwork.build(model, shape, n_classes, rounding)
    if device.takes == "onnx":
        network.check_exports(integers=INTEGER_BITS in bits)
    # Each save writes the whole table: two builds at once would lose what the other measured.
    with locked(out.with_name(f".{out.name}.lock"), f"on the table {out}"):
        if out.exists():
            table = LatencyTable.load(out)
            table.fingerprint.check(device.fingerprint)
        else:
            table = start_table(device, n_looks=_LOOKS)
            table.save(out)
        needed = needed_kinds(network.graph, network.steps, bits)
        pace = pace_of(device, table.reference_ns)
        size = "x".join(map(str, network.example.shape[1:]))
        say(f"{model}, {size} (--shape), {n_classes} outputs (--classes): {len(needed)} kinds of layer")
        if untimed := untimed_convolutions(network.graph):
            say(
                f"warning: {model}: {count(len(untimed), 'convolution')} ({', '.join(untimed[:3])}"
                f"{', ...' if len(untimed) > 3 else ''}) cannot be timed alone, being transposed with a stride or over "
                "several maps of an image: by the table, fewer channels there save nothing"
            )
        table = build_table(
            table,
            device,
            needed,
            pace=pace,
            save=lambda grown: grown.save(out),
            progress=_in_tenths(lambda done, total: say(f"{model}: {done:,} of {total:,} layers measured")),
        )
        known = table.calibrations.get(network_key(network.graph), Calibration())
        # What was calibrated with integers before stays so.
        cost = network.cost(table, integers=INTEGER_BITS in bits or known.n_mixed > 0)
        n_networks = max(n_networks, known.n_networks - 1)
        n_mixed = _MIXES * (n_networks + 1) if cost.has_integers else 0
        is_known = known.n_networks == n_networks + 1 and known.n_mixed >= n_mixed
        if recalibrate or not is_known:
            dense = dict(zip(network.space.names, network.space.sizes.tolist(), strict=True))
            plans = [dense, *network.plans(n_networks, seed=0)]
            if n_mixed:
                mixes = ([plan, *_rotated(network, plan, seed)] for seed, plan in enumerate(plans))
                plans = [mixed for each in mixes for mixed in each]
            first = table if is_known else None
            table = _calibrated(
                table, cost, device, network, plans, pace, say, first, save=lambda found: found.save(out)
            )
        if pace.warning:
            say(pace.warning)
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
            "dense_ms": round(LatencyModel(network.graph, table).dense / 1e6, 4),
        }


def _calibrated(
    table: LatencyTable,
    cost: LatencyModel,
    device: Device,
    network: TimedNetwork,
    plans: Sequence[Mapping[str, int]],
    pace: Pace,
    say: Say,
    known: LatencyTable | None,
    save: Callable[[LatencyTable], None],
) -> LatencyTable:
    """The table calibrated with the networks of ``plans``, which are timed twice where they fit badly at first.

    Of all fits, that of ``known`` among them, the best is kept; what a first timing gave is saved before a second one.
    """
    counts = [[plan.get(name, FULL_BITS) for name in cost.names] for plan in plans]

    def error(one: LatencyTable) -> float:
        return one.calibrations[cost.key].error

    def timed_beside(other: LatencyTable | None) -> LatencyTable:
        found = calibrated(table, cost, counts, plan_ratios(device, network, plans, pace, say))
        best = found if other is None or error(found) < error(other) else other
        save(best)
        return best

    best = timed_beside(known)
    if error(best) > _POOR_FIT:
        say(
            f"{network.name}: half of the whole networks are more than {error(best):.1%} from what their layers add up "
            "to; they are timed again, in case other programs kept the machine busy"
        )
        best = timed_beside(best)
    if error(best) > _POOR_FIT:
        say(
            f"warning: {network.name}: half of the whole networks are more than {error(best):.1%} from what the table "
            "says of them, and plans will be too. On a quiet machine --recalibrate may help; networks of a few tenths "
            "of a millisecond may come no closer"
        )
    return best


def _in_tenths(tell: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """Progress that is told at the start and each further tenth."""
    told = -1

    def progress(done: int, total: int) -> None:
        nonlocal told
        tenth = 10 * done // max(total, 1)
        if tenth > told:
            told = tenth
            tell(done, total)

    return progress


def _rotated(network: TimedNetwork, plan: Mapping[str, int], seed: int) -> list[dict[str, int]]:
    """Two of the three ways to mix bits, other ones for each plan."""
    mixes = network.mixed(plan, 3, seed)
    return [mixes[(seed + index) % 3] for index in range(_MIXES)]
