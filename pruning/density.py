"""How dense a layer is: at a step of training, and by Han's threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from torch import nn

from .layer_policy import LayerPolicy, PolicyError
from .sparsity import sparse_weight


class DensitySchedule(Protocol):
    """Density of a layer on its way from all weights to those that stay in the end.

    A value: checkpoints know it by its ``repr``.
    """

    def density(self, final: float, step: int) -> float:
        """Share of the weights that stay once ``step`` optimizer steps are done, from 1 down to ``final``."""
        ...


@dataclass(frozen=True)
class OneShot:
    """Everything goes at once.

    Attributes:
        at: after so many steps.
    """

    at: int = 0

    def density(self, final: float, step: int) -> float:
        """``final`` from step ``at`` on."""
        return final if step >= self.at else 1.0


@dataclass(frozen=True)
class Gradual:
    """Fast while there is much to spare, then ever slower.

    Source: Zhu & Gupta, "To prune, or not to prune", 2017, equation 1, which holds for densities as for sparsities.

    Attributes:
        start: steps before the first weights go.
        end: steps at which the final density is reached.
        every: steps from one cut to the next, for the network to recover.
        initial: density before.
    """

    start: int
    end: int
    every: int = 100
    initial: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end or self.every < 1 or not 0 < self.initial <= 1:
            msg = (
                f"a gradual schedule from step {self.start} to {self.end}, every {self.every} steps, from density "
                f"{self.initial:g}: it needs 0 <= start < end, every >= 1 and a density above 0 and at most 1"
            )
            raise ValueError(msg)

    def density(self, final: float, step: int) -> float:
        """``final + (initial - final) * (1 - progress) ** 3``, in stairs of ``every`` steps."""
        since = max(0, step - self.start) // self.every * self.every
        left = 0.0 if step >= self.end else (1 - since / (self.end - self.start)) ** 3
        return max(self.initial, final) * left + final * (1 - left)


@dataclass(frozen=True)
class PruneRetrain:
    """Rounds of pruning and retraining, each of which keeps the same share of what is left.

    Source: Han et al., "Learning both weights and connections for efficient neural networks", 2015, section 3.4.

    Attributes:
        rounds: cuts, the first one at step 0.
        steps: of retraining after each cut.
    """

    rounds: int
    steps: int

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.steps < 1:
            msg = f"{self.rounds} rounds of {self.steps} steps of retraining; both must be at least 1"
            raise ValueError(msg)

    def density(self, final: float, step: int) -> float:
        """``final ** (round / rounds)``, with the rounds counted from 1."""
        return float(final ** (min(step // self.steps + 1, self.rounds) / self.rounds))


def at_density(layer: LayerPolicy, density: float) -> LayerPolicy:
    """The layer on its way: the same pattern at another density; N:M keeps so many of M, rounded up."""
    if layer.n_of_m is None:
        return layer if layer.sparsity == "dense" else replace(layer, density=density)
    m = layer.n_of_m[1]
    n = min(m, math.ceil(round(m * density, 6)))  # n / m * m is not always n in floating point
    return replace(layer, sparsity=f"{n}:{m}", density=n / m)


def threshold_layers(model: nn.Module, quality: Mapping[str, float]) -> dict[str, LayerPolicy]:
    """Han's rule: weights below ``quality * standard deviation of the layer's weights`` go.

    The standard deviation is that of all weights of the layer, zeros of earlier rounds too: with them, the threshold of
    a layer that has few weights left is low beside these, and later rounds spare it.

    Args:
        model: the network; untouched.
        quality: quality parameter by qualified layer name, at least 0. The paper gives sensitive layers less.

    Returns:
        Unstructured policies: applied to this model, they drop exactly the weights below the threshold.

    Raises:
        PolicyError: if a layer is missing or cannot be sparse, or no weight would be left.

    Source: Han et al. 2015, section 4 ("a quality parameter multiplied by the standard deviation").
    """
    layers = {}
    for name, parameter in quality.items():
        weights = sparse_weight(model, name)[0].detach()
        magnitude = weights.abs()
        deviation = float(weights.std(correction=0))
        count = int(((magnitude >= parameter * deviation) & (weights != 0)).sum())
        if count == 0 or parameter < 0:
            largest = float(magnitude.max()) / deviation if deviation else 0.0
            msg = (
                f"a quality parameter of {parameter:g} leaves {count} of the {weights.numel()} weights of layer "
                f"'{name}'; pass at least 0 and at most {largest:.3g}, its largest weight in standard deviations"
            )
            raise PolicyError(msg)
        layers[name] = LayerPolicy("unstructured", count / weights.numel())
    return layers
