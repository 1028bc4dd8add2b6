"""What zeros save on paper: the weights and multiply-adds that are left, counted on a network as built."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from graph_encoder.network import NetworkGraph


@dataclass(frozen=True)
class LayerCount:
    """Weights and work of one weighted operator.

    Attributes:
        weights: elements of its weight.
        nonzeros: those that are not zero.
        macs: multiply-adds for a batch of one with all weights.
        nonzero_macs: those with a weight that is not zero.
    """

    weights: int
    nonzeros: int
    macs: int
    nonzero_macs: int

    @property
    def density(self) -> float:
        """Share of the weights that are not zero."""
        return self.nonzeros / self.weights


def count_nonzeros(model: nn.Module, graph: NetworkGraph) -> dict[str, LayerCount]:
    """Count what is left of every weighted operator, by operator name.

    Every element of a convolution's or linear layer's weight takes part in the same number of multiply-adds, so the
    count is exact there.

    Args:
        model: the network as built, of any kind of sparsity.
        graph: captured from this network, not from the wider one it was made of.

    Raises:
        ValueError: if the graph is of another network.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for term in graph.param_terms:
        found = parameters[term.owner].numel() if term.owner in parameters else 0
        if found != term.value({}):
            msg = (
                f"the graph has {term.value({})} elements for '{term.owner}' and the network {found}; "
                f"capture the compressed network itself"
            )
            raise ValueError(msg)
    counts = {}
    for operator in graph.operators:
        if operator.weight:
            weight = parameters[operator.weight]
            left, size = int(weight.count_nonzero()), weight.numel()
            counts[operator.name] = LayerCount(size, left, operator.macs, operator.macs * left // size)
    return counts


def nonzero_macs(model: nn.Module, graph: NetworkGraph) -> int:
    """Multiply-adds for a batch of one, without those whose weight is zero.

    Args:
        model: the network as built.
        graph: captured from it; errors as in `count_nonzeros`.
    """
    unweighted = sum(operator.macs for operator in graph.operators if not operator.weight)
    return unweighted + sum(count.nonzero_macs for count in count_nonzeros(model, graph).values())
