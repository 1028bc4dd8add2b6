"""The page of `experiments.han`: tables beside the paper's, and its figures as PNG."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter
from torch import Tensor

from latency.measure import cpu_name
from pruning.files import write_atomic

from .figures import STYLE, WIDTH
from .han_study import CURVE_DENSITIES, DENSITIES, TOLERANCE, Digits, Outcome, Study

SHADES = ("#2f80c2", "#e0a100", "#1f8a5b", "#7a4fbf", "#b91c1c", "#334155")
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

INTRODUCTION = """# Learning both weights and connections, reproduced

Han, Pool, Tran & Dally (2015), "Learning both weights and connections for efficient neural networks", sections 3 and
4.1, with the schemes of [docs/sparsity.md](../sparsity.md). Written by `python -m experiments.han{options}`; the code
is `experiments/han.py`.
"""
NETWORKS = {
    "dense": "dense",
    "longer": "dense, trained as long as the pruned ones",
    "one-shot": "pruned at once, retrained as long",
    "iterative": "pruned in rounds",
}


def render(
    studies: Sequence[Study],
    outcomes: Mapping[str, Sequence[Outcome]],
    curves: Mapping[str, Sequence[float]],
    digits: Digits,
    seeds: Sequence[int],
    deviations: str,
    page: Path,
) -> None:
    """Write the page of all studies that have an outcome; its figures are beside it, in a folder of its name.

    Args:
        studies: the networks.
        outcomes: by name of the study, one for each seed that is done.
        curves: what `Trial.regularisations` found, empty before it has.
        digits: what it was found on.
        seeds: those asked for.
        deviations: Markdown list of what differs from the paper, with places for the data and the tolerance.
        page: file to write.
    """
    done = [study for study in studies if outcomes.get(study.name)]
    seed_text = ", ".join(str(seed) for seed in seeds)
    parts = [INTRODUCTION.format(options=digits.options)]
    parts.append(
        f"Seeds {seed_text}; one image of the test is {1 / len(digits.test()):.2%}. Trained on {cpu_name()}, "
        f"PyTorch {torch.__version__.partition('+')[0]}.\n"
    )
    parts.append(_recipes(done))
    parts.append(_errors(done, outcomes))
    parts += [_layers(study, outcomes[study.name]) for study in done]
    parts.append(
        "## Sensitivity\n\nEach layer alone, pruned by magnitude and not retrained; accuracy on the validation images, "
        "mean and range over the seeds. The quality parameters come from these curves.\n\n"
        f"![sensitivity]({page.stem}/sensitivity.png)\n"
    )
    if curves:
        parts.append(
            "## L1 and L2, with and without retraining\n\nThe paper's figure 5, for LeNet-300-100 with the first seed; "
            "validation accuracy. One retraining is as long as one round; the rounds are those of the table above.\n\n"
            f"![regularisation]({page.stem}/regularisation.png)\n"
        )
    parts.append(
        "## Weights before and after\n\nThe largest layer with the first seed: the dense network, and the weights that "
        "are left after the last round.\n\n"
        f"![weights]({page.stem}/weights.png)\n"
    )
    parts.append(
        "## What the first layer still reads\n\nThe first layer of LeNet-300-100 with the first seed. Left, its matrix "
        "of 300 units by 784 pixels: the 28 bands are the rows of the image, empty at the edges where no digit has "
        "ink. Right, how many units read each pixel.\n\n"
        f"![first layer]({page.stem}/first-layer.png)\n"
    )
    departures = deviations.format(data=digits.description, tolerance=TOLERANCE)
    parts.append(f"## What differs from the paper\n\n{departures}")
    write_atomic(page, "\n".join(parts).encode())


def _recipes(studies: Sequence[Study]) -> str:
    lines = [
        "| network | epochs dense | rounds | epochs a round | peak rate | L2 | images a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for study in studies:
        numbers = (study.epochs, study.rounds, study.retrain_epochs, study.learning_rate, study.weight_decay)
        lines.append(f"| {study.name} | {' | '.join(f'{number:g}' for number in numbers)} | {study.batch_size} |")
    return "\n".join(lines) + "\n"


def _errors(studies: Sequence[Study], outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    n_seeds = ", ".join(f"{study.name} {len(outcomes[study.name])}" for study in studies)
    lines = [
        "## Errors\n",
        f"Images classified wrongly, mean ± standard deviation over the seeds ({n_seeds}).\n",
        "| network | | weights kept | test error | against dense, same seed | validation error | paper's test error |",
        "|---|---|---|---|---|---|---|",
    ]
    for study in studies:
        own = outcomes[study.name]
        kept = sum(sum(outcome.kept.values()) / sum(outcome.weights.values()) for outcome in own) / len(own)
        papers = {"dense": study.paper_errors[0], "iterative": study.paper_errors[1]}
        for name, label in NETWORKS.items():
            share = f"{kept:.1%} ({1 / kept:.1f}x fewer)" if name in ("one-shot", "iterative") else "100 %"
            test, validation = (
                _spread([1 - getattr(one, split)[name] for one in own]) for split in ("test", "validation")
            )
            change = _spread([one.test["dense"] - one.test[name] for one in own]) if name != "dense" else ""
            paper = f"{papers[name]:.2%}" if name in papers else ""
            cells = (study.name, label, share, test, change, validation, paper)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _layers(study: Study, outcomes: Sequence[Outcome]) -> str:
    lines = [
        f"## {study.name}, layer by layer\n",
        "| layer | weights | kept, paper | kept here, mean (range over seeds) | quality parameter, mean |",
        "|---|---|---|---|---|",
    ]
    for name, paper in zip(study.layers, study.paper, strict=True):
        shares = [outcome.kept[name] / outcome.weights[name] for outcome in outcomes]
        quality = statistics.mean(outcome.quality[name] * outcome.rounds[-1][1] for outcome in outcomes)
        here = f"{statistics.mean(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})"
        lines.append(f"| {name} | {outcomes[0].weights[name]:,} | {paper:.0%} | {here} | {quality:.2f} |")
    lines += [
        "",
        "Rounds, mean over the seeds, on the validation images:\n",
        "| round | weights kept | accuracy after the cut | after retraining |",
        "|---|---|---|---|",
    ]
    for number, rows in enumerate(zip(*(outcome.rounds for outcome in outcomes), strict=True), 1):
        density, _, cut, retrained = (statistics.mean(column) for column in zip(*rows, strict=True))
        lines.append(f"| {number} | {density:.1%} | {cut:.2%} | {retrained:.2%} |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.2f} ± {100 * deviation:.2f} %"


def sensitivity_figure(studies: Sequence[Study], outcomes: Mapping[str, Sequence[Outcome]]) -> bytes:
    """Accuracy against the share of one layer that stays, a panel a network."""
    done = [study for study in studies if outcomes.get(study.name)]
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
        for axes, study in zip(figure.subplots(1, len(done), squeeze=False)[0], done, strict=True):
            for name, colour in zip(study.layers, SHADES, strict=False):
                values = np.array([outcome.sensitivity[name] for outcome in outcomes[study.name]])
                axes.plot(DENSITIES, values.mean(axis=0), color=colour, label=name, linewidth=1.8)
                axes.fill_between(DENSITIES, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, lw=0)
            _density_axis(axes)
            axes.set_title(study.name, fontsize=10, loc="left")
            axes.legend()
        return _png(figure)


def regularisation_figure(curves: Mapping[str, Sequence[float]], rounds: Sequence[Sequence[float]]) -> bytes:
    """Accuracy against density for each way to train, and after each round of pruning and retraining."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH * 0.7, 4.2), layout="constrained")
        axes = figure.subplots()
        for (label, values), colour in zip(curves.items(), SHADES[1:], strict=False):
            style = "--" if "no retraining" in label else "-"
            axes.plot(CURVE_DENSITIES, values, style, color=colour, marker="o", markersize=4, label=label)
        density, accuracy = [row[0] for row in rounds], [row[3] for row in rounds]
        axes.plot(density, accuracy, color=SHADES[0], marker="s", markersize=5, linewidth=2, label="L2, in rounds")
        _density_axis(axes)
        axes.set_ylim(max(0.0, min(curves["L2, retrained with L2"]) - 0.15), 1)
        axes.legend(loc="lower right")
        return _png(figure)


def weights_figure(layers: Mapping[str, tuple[Tensor, Tensor]]) -> bytes:
    """Histograms of a layer's weights before pruning and of the non-zero ones after, a row a network."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.6 * len(layers)), layout="constrained")
        for row, (title, pair) in zip(figure.subplots(len(layers), 2, squeeze=False), layers.items(), strict=True):
            # Blocks of common limits: the gap in the middle is what pruning took.
            limit = float(max(weight.abs().max() for weight in pair))
            for axes, weight, when, colour in zip(row, pair, ("before", "after"), SHADES[:3:2], strict=True):
                axes.hist(weight[weight != 0].numpy(), bins=121, range=(-limit, limit), color=colour)
                axes.set_title(f"{title}, {when}: {int(weight.count_nonzero()):,} weights", fontsize=10, loc="left")
                axes.set_xlabel("weight")
                axes.set_ylabel("count")
        return _png(figure)


def first_layer_figure(weight: Tensor) -> bytes:
    """Where a layer of shape ``(units, 784)`` has weights, and how many units read each of the 28x28 pixels."""
    is_kept = (weight != 0).numpy()
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        matrix, pixels = figure.subplots(1, 2, width_ratios=(2.6, 1))
        matrix.imshow(is_kept, cmap="Blues", aspect="auto", interpolation="antialiased")
        matrix.set_xlabel("pixel")
        matrix.set_ylabel("unit")
        shown = pixels.imshow(is_kept.sum(axis=0).reshape(28, 28), cmap="viridis")
        figure.colorbar(shown, ax=pixels, label="units that read it")
        return _png(figure)


def _density_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("weights kept")
    axes.set_ylabel("validation accuracy")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
