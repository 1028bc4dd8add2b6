"""The figures of a report, as inline SVG without any outside asset."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .config import ONE_SHOT
from .outcome import DENSE, MethodOutcome, RunOutcome

COLOURS = {
    DENSE: "#334155",
    "uniform": "#94a3b8",
    "magnitude": "#b08968",
    "sensitivity": "#64748b",
    "greedy": "#d16b86",
    "knapsack": "#8f4b5f",
    "random": "#e0a100",
    "cem": "#2f80c2",
    "ddpg": "#7a4fbf",
    "ppo": "#1f8a5b",
}
"""One colour a method, told apart with any kind of colour vision by lightness too."""

STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": "#334155",
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "grid.linewidth": 0.8,
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "text.parse_math": False,
}
_LEVEL = 8
"""Most names that stand side by side."""
_NAME = 36
"""Characters of a name that are shown."""
WIDTH = 10.0


@dataclass(frozen=True)
class Plan:
    """One evaluated plan, as the figures show it.

    Attributes:
        method: who proposed it.
        index: its number among that method's evaluations, from 1.
        accuracy: on the search images, in [0, 1].
        cost: in the budget's kind.
    """

    method: str
    index: float
    accuracy: float
    cost: int


def accuracy_figure(plans: Sequence[Plan]) -> str:
    """Accuracy of every evaluation and the best so far, one line a method; one-shot methods as level lines."""
    with rc_context(STYLE):
        figure, axes = _canvas(4.4)
        last = max((plan.index for plan in plans), default=1)
        for method, own in _by_method(plans).items():
            colour = COLOURS.get(method, "#000000")
            accuracy = np.array([plan.accuracy for plan in own])
            index = np.array([plan.index for plan in own])
            if method in ONE_SHOT:
                axes.axhline(accuracy.max(), color=colour, linestyle="--", linewidth=1.4, label=method)
                continue
            axes.scatter(index, accuracy, s=14, color=colour, alpha=0.45, linewidths=0)
            best = np.maximum.accumulate(accuracy)
            axes.step([*index, last], [*best, best[-1]], where="post", color=colour, linewidth=2.0, label=method)
        axes.set_xlabel("evaluation")
        axes.set_ylabel("accuracy on the search images")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(*_accuracy_limits([plan.accuracy for plan in plans]))
        _tick_percents(axes)
        axes.set_xlim(0, last * 1.01)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return _svg(figure, "accuracy")


def shortened(name: str, length: int) -> str:
    """``name`` without its middle where it is longer than ``length``: both ends of a layer's name tell it apart."""
    if len(name) <= length:
        return name
    kept = length - 1
    return f"{name[: kept // 2]}…{name[-(kept - kept // 2) :]}"


def keep_ratio_figure(rows: Sequence[MethodOutcome]) -> str:
    """Keep ratio of every group in the network's order, a strip a method."""
    shown = [row for row in rows if row.keep_ratios]
    names = list(shown[0].keep_ratios)
    with rc_context(STYLE):
        labels = [shortened(name, _NAME) for name in names]
        # Turned, a label takes as much height as it is long.
        room = 0.7 + 0.07 * max(map(len, labels)) if len(names) > _LEVEL else 0.6
        figure = Figure(figsize=(WIDTH, 0.95 * len(shown) + room), layout="constrained")
        strips = figure.subplots(len(shown), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, row in zip(strips, shown, strict=True):
            ratios = [row.keep_ratios.get(name, 1.0) for name in names]
            axes.bar(range(len(names)), ratios, width=0.82, color=COLOURS.get(row.method, "#000000"))
            axes.set_ylim(0, 1)
            axes.set_yticks([0, 0.5, 1], ["0", "", "1"])
            axes.set_ylabel(row.method, rotation=0, ha="right", va="center", labelpad=8)
            axes.grid(axis="x", visible=False)
        step = -(-len(names) // 45)
        ticks = range(0, len(names), step)
        turned = 90 if len(names) > _LEVEL else 0
        strips[-1].set_xticks(ticks, [labels[i] for i in ticks], rotation=turned, fontsize=8)
        strips[-1].set_xlim(-0.6, len(names) - 0.4)
        return _svg(figure, "keep-ratio")


def pareto_figure(plans: Sequence[Plan], outcome: RunOutcome) -> str:
    """Accuracy against cost of every plan evaluated, with the front, and the last stretch below the limit."""
    dense_cost = outcome.dense_cost or outcome.row(DENSE).macs
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
        near = near_limit(plans, outcome.cost_limit) if outcome.has_budget else []
        panels = figure.subplots(1, 2 if near else 1, squeeze=False)[0]
        for axes in panels:
            for method, own in _by_method(plans).items():
                cost = [plan.cost / dense_cost for plan in own]
                colour = COLOURS.get(method, "#475569")
                axes.scatter(cost, [p.accuracy for p in own], s=14, color=colour, alpha=0.5, linewidths=0, label=method)
            front = pareto_front([(plan.cost, plan.accuracy) for plan in plans])
            axes.plot(
                [cost / dense_cost for cost, _ in front],
                [accuracy for _, accuracy in front],
                color="#0f172a",
                linewidth=1.4,
                drawstyle="steps-post",
                label="Pareto front",
            )
            if outcome.has_budget:
                limit, is_asked = outcome.cost_limit / dense_cost, outcome.asked_limit is None
                limit_label = "limit" if is_asked else "limit by the table"
                axes.axvline(limit, color="#b91c1c", linestyle=":", linewidth=1.4, label=limit_label)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_xlabel(f"share of the dense network's {_long(outcome.budget_kind)}")
        panels[0].set_ylabel("accuracy on the search images")
        panels[0].set_title("all plans and probes", fontsize=10, loc="left")
        if near:
            _zoom_to_limit(panels[1], near, outcome.cost_limit, dense_cost)
        for axes in panels:
            _tick_percents(axes)
        legend = panels[0].legend(fontsize=8, loc="lower right", markerscale=1.6)
        for handle in legend.legend_handles:
            handle.set_alpha(1.0)
        return _svg(figure, "pareto")


def latency_figure(rows: Sequence[MethodOutcome]) -> str:
    """Measured time of one call, median and quartiles, a panel a runtime; a network that was not timed has no bar."""
    runtimes = [latency.runtime for latency in rows[0].latencies]
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.34 * len(rows) + 1.3), layout="constrained")
        panels = figure.subplots(1, len(runtimes), sharey=True, squeeze=False)[0]
        for axes, runtime in zip(panels, runtimes, strict=True):
            places, times = zip(
                *((y, t) for y, row in enumerate(rows) for t in row.latencies if t.runtime == runtime), strict=True
            )
            median = np.array([t.median_ms for t in times])
            spread = np.array(
                [
                    [t.median_ms - t.lower_quartile_ms for t in times],
                    [t.upper_quartile_ms - t.median_ms for t in times],
                ]
            )
            colours = [COLOURS.get(rows[y].method, "#000000") for y in places]
            axes.barh(places, median, xerr=spread, color=colours, ecolor="#0f172a", height=0.68)
            axes.set_yticks(range(len(rows)), [row.method for row in rows])
            axes.grid(axis="y", visible=False)
            axes.set_xlabel("ms a call (median, quartiles)")
            axes.set_title(runtime, fontsize=10, loc="left")
        panels[0].invert_yaxis()
        return _svg(figure, "latency")


def pareto_front(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The (cost, accuracy) pairs that no other pair beats in both, by rising cost."""
    front: list[tuple[int, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


def _canvas(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _by_method(plans: Sequence[Plan]) -> Mapping[str, list[Plan]]:
    grouped: dict[str, list[Plan]] = {}
    for plan in plans:
        grouped.setdefault(plan.method, []).append(plan)
    return grouped


def _accuracy_limits(accuracy: Sequence[float]) -> tuple[float, float]:
    """Limits that leave out the lowest twentieth of the dots, which would flatten everything else."""
    if not accuracy:
        return 0.0, 1.0
    low, high = float(np.quantile(accuracy, 0.05)), max(accuracy)
    room = max(0.02, 0.08 * (high - low))
    return max(0.0, low - room), min(1 + room / 4, high + room)  # dots at 100 % are not cut in half


def _tick_percents(axes: Axes) -> None:
    """Name accuracies by as many digits as tell them apart; the room above 100 % has no tick."""
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in axes.get_yticks() if max(low, 0.0) <= round(tick, 9) <= min(high, 1.0)])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def near_limit(plans: Sequence[Plan], limit: int) -> list[Plan]:
    """The plans that cost at most the limit and at least 97 % of it."""
    return [plan for plan in plans if 0.97 * limit <= plan.cost <= limit]


def _zoom_to_limit(axes: Axes, near: Sequence[Plan], limit: int, dense_cost: int) -> None:
    lowest = min(plan.cost for plan in near)
    room = 0.08 * max(limit - lowest, limit // 1000)
    axes.set_title("close to the limit", fontsize=10, loc="left")
    axes.set_xlim((lowest - room) / dense_cost, (limit + room) / dense_cost)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylim(*_accuracy_limits([plan.accuracy for plan in near]))


def _long(kind: str) -> str:
    return {
        "macs": "multiply-adds",
        "params": "parameters",
        "bytes": "bytes",
        "bops": "bit operations",
        "latency": "latency",
    }[kind]


def _svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element; ``name`` keeps its internal ids apart from the other figures'."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
