"""What may be chosen inside one layer, as a ladder of levels that a cost can be counted for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from graph_encoder.network import NetworkGraph, Operator
from pruning.layer_policy import BITS, FULL_BITS, INTEGER_BITS, LayerPolicy

LayerChoice = Literal["density", "weight_bits", "act_bits", "bits"]
"""Share of the weights that stay; bits of weights; bits of what the layer reads; bits of both, always equal."""

FULL_DENSITY = 100
"""Densities are whole percents."""
DENSITIES = (5, 10, 15, 20, 25, 30, 35, 40, 50, 60, 70, 80, FULL_DENSITY)
_DECIDABLE = ("Conv1d", "Conv2d", "Conv3d", "Linear")
"""Layers of torch.nn whose weights can be sparse and quantized."""


@dataclass(frozen=True)
class LayerDecision:
    """One number to choose for one layer.

    Attributes:
        layer: qualified name.
        choice: what the number is.
        levels: what it may be, ascending: percents of the weights for a density, bits otherwise. Where that of the
            untouched layer, `FULL_DENSITY` or `FULL_BITS`, is not among them, no plan leaves the layer as it is.
    """

    layer: str
    choice: LayerChoice
    levels: tuple[int, ...]

    def __post_init__(self) -> None:
        allowed = range(1, FULL_DENSITY + 1) if self.choice == "density" else BITS
        if list(self.levels) != sorted(set(self.levels)) or not self.levels:
            msg = f"levels of {self.name} are {list(self.levels)}; there must be some, and they must ascend"
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
        return FULL_DENSITY if self.choice == "density" else FULL_BITS


def weighted_layers(graph: NetworkGraph) -> tuple[str, ...]:
    """Layers of ``graph`` that hold a weight, in the order in which they first run."""
    return tuple(dict.fromkeys(operator.layer for operator in graph.operators if operator.weight))


def layer_decisions(
    graph: NetworkGraph,
    choices: Collection[LayerChoice],
    *,
    sparsity: str = "unstructured",
    densities: Sequence[int] = DENSITIES,
    bits: Sequence[int] = (8, FULL_BITS),
    protect_first: bool = True,
) -> tuple[LayerDecision, ...]:
    """The choices that the layers of a network offer, layer by layer in the network's order.

    Only layers of torch.nn whose weight is theirs alone offer any; bits only those that run themselves, and no function
    in their place. The last one stays dense, as does the first unless
    asked for, and one whose channels the pattern does not divide. Neither the first nor the last layer is offered
    fewer than 8 bits (Wang et al. 2019, HAQ, section 4): where all are fewer, they have 8.

    Args:
        graph: captured network.
        choices: which to offer.
        sparsity: pattern of the zeros, as in `pruning.layer_policy.LayerPolicy`.
        densities: percents of the weights that may stay, ascending; N:M has its own instead.
        bits: bit-widths, ascending; without `FULL_BITS` every layer is quantized.
        protect_first: leave the first layer dense.

    Raises:
        PolicyError: if there is no such pattern.
        ValueError: if the levels do not ascend, or one is not allowed.
    """
    pattern = LayerPolicy(sparsity)
    if pattern.n_of_m:
        n, m = pattern.n_of_m
        densities = sorted({-(-FULL_DENSITY * n // m), FULL_DENSITY})
    operators = {o.layer: o for o in reversed(graph.operators) if o.layer_type in _DECIDABLE}
    layers = [name for name in weighted_layers(graph) if name in operators]
    # Bits are put into layers: what a function is given has none of them.
    given = {o.layer for o in graph.operators if o.layer_type and not o.is_called}
    found = []
    for layer in layers:
        is_last, is_end = layer == layers[-1], layer in (layers[0], layers[-1])
        stays_dense = is_last or (protect_first and layer == layers[0]) or not _divides(pattern, operators[layer])
        at_end = [level for level in bits if level >= INTEGER_BITS] or [INTEGER_BITS]
        for choice in choices:
            if choice != "density" and layer not in given:
                found.append(LayerDecision(layer, choice, tuple(at_end if is_end else bits)))
            elif choice == "density" and not stays_dense:
                found.append(LayerDecision(layer, choice, tuple(densities)))
    return tuple(decision for decision in found if decision.levels != (decision.size,))


def _divides(pattern: LayerPolicy, operator: Operator) -> bool:
    """Whether blocks divide the channels that a layer writes, and the M of N:M those that it reads."""
    n_of_m = pattern.n_of_m or (1, 1)
    if operator.groups > 1:
        return operator.kind != "depthwise_conv" and pattern.block == n_of_m[1] == 1
    return operator.out_channels % pattern.block == 0 and operator.in_channels % n_of_m[1] == 0


def layer_policies(
    decisions: Sequence[LayerDecision], levels: Mapping[str, int], sparsity: str, *, reduce_range: bool = False
) -> dict[str, LayerPolicy]:
    """What levels mean for each layer; layers that they leave untouched are left out.

    Args:
        decisions: the choices.
        levels: by name of the decision; those left out are at the top.
        sparsity: pattern of the zeros where a density is below one.
        reduce_range: whether 8 bits of weights beside 8 of activations take half of their levels, see `LayerPolicy`.
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
        weight_bits, act_bits = (values.get(what, FULL_BITS) for what in ("weight_bits", "act_bits"))
        halved = reduce_range and weight_bits == act_bits == INTEGER_BITS
        policies[layer] = LayerPolicy(pattern, share, weight_bits, act_bits, reduce_range=halved)
    return policies
