"""What may be chosen inside one layer, as a ladder of levels that a cost can be counted for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from graph_encoder.network import NetworkGraph
from pruning.layer_policy import BITS, FULL_BITS, LayerPolicy

LayerChoice = Literal["density", "weight_bits", "act_bits", "bits"]
"""Share of the weights that stay; bits of weights; bits of what the layer reads; bits of both, always equal."""

FULL_DENSITY = 100
"""Densities are whole percents."""


@dataclass(frozen=True)
class LayerDecision:
    """One number to choose for one layer.

    Attributes:
        layer: qualified name.
        choice: what the number is.
        levels: what it may be, ascending: percents of the weights for a density, bits otherwise; the last is that of
            the untouched layer, `FULL_DENSITY` or `FULL_BITS`.
    """

    layer: str
    choice: LayerChoice
    levels: tuple[int, ...]

    def __post_init__(self) -> None:
        full = FULL_DENSITY if self.choice == "density" else FULL_BITS
        allowed = range(1, full + 1) if self.choice == "density" else BITS
        if list(self.levels) != sorted(set(self.levels)) or not self.levels or self.levels[-1] != full:
            msg = f"levels of {self.name} are {list(self.levels)}; they must ascend and end with {full}"
            raise ValueError(msg)
        if wrong := [level for level in self.levels if level not in allowed]:
            msg = f"levels of {self.name} hold {wrong[0]}; allowed are {', '.join(map(str, allowed))}"
            raise ValueError(msg)

    @property
    def name(self) -> str:
        """Name of the decision: the layer's, a colon and the choice."""
        return f"{self.layer}:{self.choice}"

    @property
    def size(self) -> int:
        """Level of the untouched layer."""
        return self.levels[-1]


def layer_of(weight: str) -> str:
    """Qualified name of the layer that holds the parameter ``weight``."""
    return weight.rpartition(".")[0]


def layers_of(graph: NetworkGraph) -> tuple[str, ...]:
    """Layers of ``graph`` that hold a weight, in the order in which they first run."""
    return tuple(dict.fromkeys(layer_of(operator.weight) for operator in graph.operators if operator.weight))


def layer_policies(
    decisions: Sequence[LayerDecision], levels: Mapping[str, int], sparsity: str
) -> dict[str, LayerPolicy]:
    """What levels mean for each layer; layers that they leave untouched are left out.

    Args:
        decisions: the choices.
        levels: by name of the decision; those left out are at the top.
        sparsity: pattern of the zeros where a density is below one.
    """
    chosen: dict[str, dict[str, int]] = {}
    for decision in decisions:
        level = levels.get(decision.name, decision.size)
        if level < decision.size:
            names = ("weight_bits", "act_bits") if decision.choice == "bits" else (decision.choice,)
            chosen.setdefault(decision.layer, {}).update(dict.fromkeys(names, level))
    policies = {}
    for layer, values in chosen.items():
        density = values.pop("density", FULL_DENSITY)
        # An N:M pattern knows its own density, which need not be whole percents.
        share = 1.0 if density == FULL_DENSITY or LayerPolicy(sparsity).n_of_m else density / FULL_DENSITY
        pattern = "dense" if density == FULL_DENSITY else sparsity
        policies[layer] = LayerPolicy(
            pattern, share, values.get("weight_bits", FULL_BITS), values.get("act_bits", FULL_BITS)
        )
    return policies
