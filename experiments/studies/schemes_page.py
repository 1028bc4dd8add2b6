"""The page of `experiments.studies.schemes`: every network, accuracy at equal latency, and the figure."""

from __future__ import annotations

import io
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from latency.runtimes import ONNXRUNTIME, SPARSE
from pruning.files import write_atomic

from ..figures import STYLE, WIDTH
from ..outcome import percent
from ..pages import Table
from .schemes_cells import Cell

SHADES = {
    "dense": "#334155",
    "channels": "#2f80c2",
    "unstructured": "#e0a100",
    "block8": "#7a4fbf",
    "block16": "#1f8a5b",
    "channels + block8": "#b91c1c",
}
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15)
"""Latencies at which schemes are compared, of the dense network's on ONNX Runtime."""

HEAD = """# Channels, zeros or blocks at equal latency

Written by `make schemes` from the finished cells; do not edit. Trained networks for CIFAR-10 are made smaller in
several ways, all get the same fine-tuning, and then accuracy is set against measured time: at batch 1, all networks and
both runtimes in turn in one process."""

METHOD = """- **Channels.** The same keep ratio in every group that may lose channels, the residual streams and the
  first layer's among them, rounding 1, largest L1 norms stay; batch norms re-estimated; then fine-tuned.
- **Unstructured** and **blocks** of 8 or 16 output channels. The same density in all convolutions but the first, on a
  cubic schedule (Zhu & Gupta 2017) over the first 60 % of the steps; the largest magnitudes (squares of blocks) stay.
- **Channels + block8.** Both, with groups kept at multiples of 8. Nothing is searched: each scheme is at its plainest.
- **Fine-tuning.** The same epochs, batches, order, augmentation and learning rates for all, the dense network too: the
  project's defaults, in bfloat16, the last epoch taken.
- **Time.** Every network is timed on ONNX Runtime and through `secateur.sparsify`, which takes dense kernels where
  zeros do not pay; the faster of the two counts. Speed is the median time of the dense network on ONNX Runtime over a
  network's; in brackets the quartiles over rounds. Networks of the first seed are timed.
- **Accuracy** is that of the odd-numbered files of the test folder, read once when a cell was finished. Nothing was
  chosen on them, nor on the even-numbered ones (validation): strengths and recipe were fixed before.
- **Equal latency.** Between two strengths of a scheme accuracy is interpolated linearly over latency; each curve begins
  at the dense network, on the faster runtime, and a dash is where a curve does not reach. In brackets the difference
  from channels in points with a 95 % interval over the test images (verdicts of both schemes on the same image,
  interpolated alike; normal). The interval does not hold the spread between fine-tunings."""


@dataclass(frozen=True)
class Point:
    """One network of a curve, its seeds together.

    Attributes:
        cell: of the first seed.
        facts: of each seed, as its file holds them.
        time: of the first seed's network: ``forms`` and ``runtimes``, as `time_networks` returns.
        reference_ms: of the dense network on ONNX Runtime.
    """

    cell: Cell
    facts: Sequence[Mapping[str, Any]]
    time: Mapping[str, Any]
    reference_ms: float

    @property
    def runtime(self) -> str:
        """The faster one."""
        runtimes: Mapping[str, Mapping[str, float]] = self.time["runtimes"]
        return min(runtimes, key=lambda name: runtimes[name]["median_ms"])

    @property
    def latency(self) -> float:
        """On the faster runtime, as a share of the reference."""
        return float(self.time["runtimes"][self.runtime]["median_ms"]) / self.reference_ms

    @property
    def judged(self) -> NDArray[np.float64]:
        """Share of the seeds that were right, for each test image."""
        digits = [np.array([float(digit) for digit in facts["test_judged"]]) for facts in self.facts]
        found: NDArray[np.float64] = np.mean(digits, axis=0)
        return found

    def mean(self, key: str) -> float:
        """Mean of a fact over the seeds."""
        return statistics.mean(float(facts[key]) for facts in self.facts)


def write_page(page: Path, root: Path, cells: Sequence[Cell], planned: int) -> None:
    """Write the page and its figure from what is finished.

    Args:
        page: file to write; the figure goes into a folder of its name beside it.
        root: folder of the cells.
        cells: those that are finished.
        planned: how many there are to be.
    """
    curves = {
        (model, threads): points
        for model in dict.fromkeys(cell.model for cell in cells)
        for threads, points in _timed(root, model, cells).items()
    }
    parts = [HEAD, f"{len(cells)} of {planned} networks are done.", METHOD]
    if curves:
        write_atomic(page.parent / page.stem / "latency.png", figure_of(curves))
        parts.append(f"![accuracy against latency]({page.stem}/latency.png)")
    for (model, threads), points in curves.items():
        count = f"{threads} thread" if threads == 1 else f"{threads} threads"
        parts += [f"## {model}, {count}", _table(points), f"### At equal latency: {model}, {count}"]
        parts += [equal_latency_table(points), winners(points)]
    parts += ["## How it was made", *_records(root, cells)]
    write_atomic(page, ("\n\n".join(parts) + "\n").encode())


def _timed(root: Path, model: str, cells: Sequence[Cell]) -> dict[int, list[Point]]:
    """Points of one model by number of threads, the dense network first; only what was timed."""
    own = [cell for cell in cells if cell.model == model]
    found: dict[int, list[Point]] = {}
    for path in sorted((root / model).glob("latency-*.json")):
        report = json.loads(path.read_text())
        times = report["networks"]
        reference = next(iter(times.values()))["runtimes"][ONNXRUNTIME]["median_ms"]
        found[report["threads"]] = [
            Point(
                cell,
                [_facts(root, other) for other in own if replace(other, seed=0) == cell],
                times[cell.folder.name],
                reference,
            )
            for cell in own
            if cell.seed == 0 and cell.folder.name in times
        ]
    return found


def _facts(root: Path, cell: Cell) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((root / cell.folder / "cell.json").read_text())
    return facts


def _table(points: Sequence[Point]) -> str:
    heads = ["scheme", "stays", "multiply-adds", "parameters", "test accuracy", "validation", "ONNX Runtime, ms"]
    rows = []
    for point in points:
        onnx, plan = (point.time["runtimes"][name]["median_ms"] for name in (ONNXRUNTIME, SPARSE))
        best = point.time["runtimes"][point.runtime]
        forms = ", ".join(f"{count} {form}" for form, count in point.time["forms"].items())
        rows.append(
            [
                point.cell.scheme,
                point.cell.strength,
                f"{point.mean('macs'):.1%}",
                f"{point.mean('params'):.1%}",
                percent(point.mean("test_accuracy")),
                percent(point.mean("validation_accuracy")),
                f"{onnx:.3f}",
                f"{plan:.3f}",
                f"{best['speed']:.2f} ({best['lower_quartile_speed']:.2f} to {best['upper_quartile_speed']:.2f})",
                forms,
            ]
        )
    return Table([*heads, "sparsify, ms", "speed (quartiles)", "layers"], rows, words=("stays", "layers")).markdown()


def curve_of(points: Sequence[Point], scheme: str) -> list[Point]:
    """The dense network and the strengths of a scheme, the fastest first."""
    own = [point for point in points if point.cell.scheme in ("dense", scheme)]
    return sorted(own, key=lambda point: point.latency)


def judged_at(curve: Sequence[Point], latency: float) -> NDArray[np.float64] | None:
    """Verdicts on the test images at a latency, interpolated between neighbours; None outside the curve."""
    for fast, slow in itertools.pairwise(curve):
        if fast.latency <= latency <= slow.latency and fast.latency < slow.latency:
            share = (latency - fast.latency) / (slow.latency - fast.latency)
            between: NDArray[np.float64] = (1 - share) * fast.judged + share * slow.judged
            return between
    return None


def schemes_of(points: Sequence[Point]) -> list[str]:
    """Names of the curves."""
    return [name for name in dict.fromkeys(point.cell.scheme for point in points) if name != "dense"]


def equal_latency_table(points: Sequence[Point]) -> str:
    """Accuracy of each scheme at the same latencies, with its difference from channels."""
    schemes = schemes_of(points)
    rows = []
    for share in SHARES:
        judged = {name: judged_at(curve_of(points, name), share) for name in schemes}
        if sum(found is not None for found in judged.values()) < 2:
            continue
        cells = [_accuracy(judged[name], None if name == "channels" else judged.get("channels")) for name in schemes]
        rows.append([f"{share:.0%}", f"{1 / share:.2f}", *cells])
    return Table(["latency", "speed", *schemes], rows).markdown()


def winners(points: Sequence[Point]) -> str:
    """Which scheme is the most accurate at which latency, and where the images can tell it from the next."""
    sentences = []
    for share in SHARES:
        judged = {name: judged_at(curve_of(points, name), share) for name in schemes_of(points)}
        known = {name: found for name, found in judged.items() if found is not None}
        if len(known) < 2:
            continue
        first, second = sorted(known, key=lambda name: -known[name].mean())[:2]
        mean, half = difference(known[first], known[second])
        verb = "wins over" if mean > half else "cannot be told from"
        sentences.append(f"- {share:.0%}: {first} {verb} {second} ({_points(mean, half)})")
    return "The most accurate at each latency, against the next:\n\n" + "\n".join(sentences) if sentences else ""


def difference(one: NDArray[np.float64], other: NDArray[np.float64]) -> tuple[float, float]:
    """Mean difference of verdicts on the same images, and half its 95 % interval."""
    change = one - other
    return float(change.mean()), 1.96 * float(change.std(ddof=1)) / math.sqrt(len(change))


def _accuracy(judged: NDArray[np.float64] | None, channels: NDArray[np.float64] | None) -> str:
    if judged is None:
        return "-"
    text = percent(float(judged.mean()))
    return text if channels is None else f"{text} [{_points(*difference(judged, channels))}]"


def _points(mean: float, half: float) -> str:
    return f"{100 * mean:+.2f} ± {100 * half:.2f}"


def figure_of(curves: Mapping[tuple[str, int], Sequence[Point]]) -> bytes:
    """Test accuracy against latency, a panel for each model and number of threads, as PNG."""
    models, threads = (list(dict.fromkeys(key[place] for key in curves)) for place in (0, 1))
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.9 * len(models)), layout="constrained")
        panels = figure.subplots(len(models), len(threads), squeeze=False, sharey="row")
        for (model, count), points in curves.items():
            axes = panels[models.index(model)][threads.index(count)]
            for name in schemes_of(points):
                curve = curve_of(points, name)
                latencies, accuracies = [p.latency for p in curve], [p.mean("test_accuracy") for p in curve]
                axes.plot(latencies, accuracies, "o-", color=SHADES[name], markersize=4, label=name)
            axes.axvline(1, color=SHADES["dense"], linestyle=":", linewidth=1, label="dense, ONNX Runtime")
            axes.set_title(f"{model}, {count} thread{'s' if count > 1 else ''}", fontsize=10, loc="left")
            axes.set_xlabel("latency, of the dense network's on ONNX Runtime")
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        for row in panels:
            row[0].set_ylabel("test accuracy")
        panels[0][0].legend(fontsize=8, loc="lower right")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
        return buffer.getvalue()


def _records(root: Path, cells: Sequence[Cell]) -> list[str]:
    rows = []
    for cell in cells:
        facts = _facts(root, cell)
        recipe, machine = facts["recipe"], facts["machine"]
        rows.append(
            [
                f"{cell.model}, {cell.scheme}, {cell.strength}",
                str(cell.seed),
                str(recipe["epochs"]),
                f"{recipe['learning_rate']:g}",
                str(recipe["batch_size"]),
                str(recipe["images"] or "all"),
                machine["date"],
                machine["commit"],
            ]
        )
    heads = ["network", "seed", "epochs", "peak rate", "images a step", "images", "date", "commit"]
    table = Table(heads, rows, words=("date", "commit")).markdown()
    reports = [json.loads(path.read_text()) for path in sorted(root.glob("*/latency-*.json"))]
    machines = "; ".join(dict.fromkeys(report["machine"] for report in reports))
    rounds = ", ".join(str(count) for count in dict.fromkeys(report["rounds"] for report in reports))
    return [table, *([f"Times: {machines}; {rounds} rounds."] if reports else [])]
