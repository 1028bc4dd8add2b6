"""The sections of docs/results.md on channels and bits under a budget of latency."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..outcome import DENSE, MethodOutcome, amount, percent
from ..pages import Table
from ..progress import count
from .matrix import CURVE_EPOCHS, CURVE_SHARES, JOINT, JOINT_EVALUATIONS, SAME_MACS
from .results_cells import Cells, in_points

_JOINT = f"""Channels, the residual streams but the first among them, and bits (8 or 32) of every layer, chosen together
under a budget of latency in ONNX Runtime, by {JOINT_EVALUATIONS} evaluations a search, seed 0, rounding 8; shares are
of the dense network in single precision. Searches spend the table's milliseconds; *latency* is that of the saved files,
timed beside the dense one in a fresh process, 200 rounds in turn: the median ratio with its 95 % interval. All
networks, the dense one too, were then fine-tuned for the same number of epochs on the same batches, without bits, which
were calibrated after that."""
_REPAIRED = "Plans were repaired by least-squares reconstruction (AMC) before they were scored, and before fine-tuning."
_CURVES = f"""One search of {JOINT_EVALUATIONS} evaluations (seed 0) for each budget, then fine-tuning for
{count(CURVE_EPOCHS, "epoch")} without bits, which are calibrated after that. Channels alone stay in single
precision. Bits alone are one plan under any budget that it keeps, 8 bits in every layer but the last, which is faster
in single precision by the table: elsewhere that buys nothing that the search images could tell
(`docs/algorithms/README.md`), and where channels and bits have room for that plan, it is theirs too. Each was timed in
a process of its own: with two threads, such shares differ by more than their intervals from one process to the next
(`docs/latency.md`)."""
_SAME = f"""Inner channels of ResNet-56 in single precision, rounding 1, {JOINT_EVALUATIONS} evaluations, seed 0:
searched under half of the multiply-adds alone, and under a latency as well that leaves room for as many of them. Where
both are done, they were timed in the same rounds."""


def joint_sections(cells: Cells) -> list[tuple[str, str, list[str]]]:
    """Title, text and tables of each section; no tables where no cell is finished."""
    joint: list[str] = []
    for cell in JOINT:
        if table := _joint_table(cells, cell.name):
            words = cell.asked if isinstance(cell.asked, str) else f"{cell.asked} times its floor as it was read then"
            left = ", residual streams left dense" if cell.protected else ""
            joint += [f"### {cell.model} at {words}{left}, {count(cell.epochs, 'epoch')} of fine-tuning", *table]
    return [
        ("Channels and bits under a latency budget", _JOINT, joint),
        ("Channels, bits, and both: ResNet-18", _CURVES, _curves(cells)),
        ("The same multiply-adds, found for latency", _SAME, _same_macs(cells)),
    ]


def _joint_table(cells: Cells, name: str) -> list[str]:
    if name not in cells.outcomes:
        return []
    rows = cells.outcomes[name].rows
    budget = f"Budget: {cells.outcomes[name].budget}.{_floor(cells, name)}"
    control = next((row.tuned_test_accuracy for row in rows if row.method == DENSE), None)
    heads = ["network", "before", "fine-tuned", "points of dense", "multiply-adds", *_latency_heads()]
    lines = [
        [
            row.method,
            percent(row.test_accuracy),
            percent(row.tuned_test_accuracy),
            _points(row.tuned_test_accuracy, control),
            amount(row.macs),
            *_latencies(cells.timed.get(name, []), name, row.method),
        ]
        for row in rows
    ]
    repaired = [_REPAIRED] if cells.outcomes[name].is_reconstructed else []
    return [*repaired, budget, Table(heads, lines).markdown()]


def _floor(cells: Cells, name: str) -> str:
    """The fastest network that the search could have chosen, where it was measured."""
    found = cells.floors.get(name)
    if not found:
        return ""
    (floor,) = found["floors"]
    table = f"{floor['predicted_ms']:.4g} ms, {floor['predicted_share']:.1%} of the dense network, by the table"
    if not floor["measured_share"]:
        return f" The fastest network that could be chosen: {table}; not measured."
    low, share, high = floor["measured_share"]
    return f" The fastest network that could be chosen: {table}; {share:.1%} [{low:.1%}, {high:.1%}] when measured."


def _curves(cells: Cells) -> list[str]:
    names: dict[tuple[str, ...], str] = {
        (what, f"{share} %"): f"resnet18_cifar-curve-{what}-{share}"
        for what, shares in CURVE_SHARES.items()
        for share in shares
    }
    tables = _table_of_found(cells, ("decided", "budget"), names, cells.timed)
    return [*tables, *_processors(cells, names), *_dominance(cells, names)]


def _processors(cells: Cells, names: Mapping[tuple[str, ...], str]) -> list[str]:
    """Which networks were searched for on which processor, where there are several."""
    points: dict[str, list[str]] = {}
    for words, name in names.items():
        if name in cells.outcomes:
            points.setdefault(cells.outcomes[name].machine.processor, []).append(" ".join(words))
    if len(points) < 2:
        return []
    each = "; ".join(f"{processor} ({', '.join(own)})" for processor, own in points.items())
    return [f"Searched for on {len(points)} processors: {each}."]


def _dominance(cells: Cells, names: Mapping[tuple[str, ...], str]) -> list[str]:
    """How many networks of one kind of decision a network of both is no slower and no less accurate than.

    No slower as far as the intervals tell: the networks may be the same one.
    """
    points: dict[str, list[tuple[float, float, float]]] = {}
    for (what, _), name in names.items():
        if name in cells.outcomes:
            row = _only(cells.outcomes[name].rows)
            reading = reading_of(cells.timed.get(name, []), row.method, threads=1, run=name)
            if reading and row.tuned_test_accuracy is not None:
                points.setdefault(what, []).append((reading["low"], reading["high"], row.tuned_test_accuracy))
    both = points.pop("both", [])
    if not both or not points:
        return []
    found = [
        f"{sum(any(low <= slow and a >= accuracy for low, _, a in both) for _, slow, accuracy in own)} of {len(own)} "
        f"of {what}"
        for what, own in points.items()
    ]
    return [
        "A network with both decided is no slower on one thread, as far as the intervals tell, and no less accurate "
        f"than {' and '.join(found)} alone."
    ]


def _same_macs(cells: Cells) -> list[str]:
    names: dict[tuple[str, ...], str] = {(budget,): f"resnet56-{name}" for name, budget in SAME_MACS.items()}
    by_macs, by_latency = names.values()
    # Timed with the second of them in one process; as long as that is missing, the first has readings of its own.
    together = cells.timed.get(by_latency, cells.timed.get(by_macs, []))
    tables = _table_of_found(cells, ("budget",), names, dict.fromkeys(names.values(), together))
    if not (by_macs in cells.outcomes and by_latency in cells.outcomes):
        return tables
    rows = [_only(cells.outcomes[name].rows) for name in (by_macs, by_latency)]
    macs = rows[0].macs / rows[1].macs
    for threads in (1, 2):
        if reading := reading_of(together, rows[0].method, threads, run=by_macs):
            low, ratio, high = reading["of_first"]
            tables.append(
                f"With {macs:.1%} of its multiply-adds, the plan found for multiply-adds alone takes {ratio:.1%} "
                f"[{low:.1%}, {high:.1%}] of the time of the one found for latency, on {count(threads, 'thread')}."
            )
    return tables


def _table_of_found(
    cells: Cells,
    heads: tuple[str, ...],
    names: Mapping[tuple[str, ...], str],
    timed: Mapping[str, list[dict[str, Any]]],
) -> list[str]:
    """What the only method of each finished cell found, after the words that tell the cells apart.

    Args:
        cells: the finished cells.
        heads: of the words.
        names: cells by their words.
        timed: readings that hold those of a cell, by its name.
    """
    lines = []
    for words, name in names.items():
        if name in cells.outcomes:
            row = _only(cells.outcomes[name].rows)
            own = [percent(row.test_accuracy), percent(row.tuned_test_accuracy), amount(row.macs)]
            lines.append([*words, *own, *_latencies(timed.get(name, []), name, row.method)])
    table = Table([*heads, "before", "fine-tuned", "multiply-adds", *_latency_heads()], lines)
    return [table.markdown()] if lines else []


def _only(rows: tuple[MethodOutcome, ...]) -> MethodOutcome:
    (row,) = (row for row in rows if row.method != DENSE)
    return row


def _latency_heads() -> list[str]:
    return ["latency, 1 thread", "latency, 2 threads"]


def _latencies(readings: list[dict[str, Any]], run: str, method: str) -> list[str]:
    return [_latency(reading_of(readings, method, threads, run=run)) for threads in (1, 2)]


def reading_of(readings: list[dict[str, Any]], method: str, threads: int, *, run: str) -> dict[str, Any] | None:
    """The time of one method's network of one run on so many threads, if it was taken."""
    return next((r for r in readings if (r["run"], r["method"], r["threads"]) == (run, method, threads)), None)


def _latency(reading: dict[str, Any] | None) -> str:
    if reading is None:
        return "-"
    times = f"{reading['median_ms']:.3g} ms"
    share = f"{reading['ratio']:.1%} [{reading['low']:.1%}, {reading['high']:.1%}]"
    return times if reading["method"] == DENSE else f"{share}, {times}"


def _points(own: float | None, control: float | None) -> str:
    return "-" if own is None or control is None or own == control else in_points(own - control)
