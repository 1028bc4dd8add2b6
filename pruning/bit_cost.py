"""What a policy's bits cost, counted: bytes of the parameters, and bit operations."""

from __future__ import annotations

import math
from collections.abc import Mapping

from graph_encoder.network import NetworkGraph, Term

from .layer_policy import FULL_BITS, LayerPolicy
from .policy import CompressionPolicy

_SCALE_BYTES = 4
_ZERO_POINT_BYTES = 1
_AS_IT_IS = LayerPolicy()


def bit_operations(graph: NetworkGraph, policy: CompressionPolicy) -> dict[str, int]:
    """Bit operations of every operator that multiplies: its MACs times the bits of a weight and of an activation.

    What has no layer in the policy, such as the two products inside an attention, counts at full bits. Zeros inside a
    layer are counted as the weights they are.

    Args:
        graph: the captured dense network.
        policy: what stays, and the bits of each layer.

    Returns:
        By operator name, for a batch of one; their sum is the network's.

    Source: van Baalen et al., "Bayesian Bits" (2020), section 4.
    """
    removed = _removed(graph, policy)
    layer_of = {operator.name: operator.weight.rpartition(".")[0] for operator in graph.operators}
    totals: dict[str, int] = {}
    for term in graph.mac_terms:
        layer = policy.layers.get(layer_of[term.owner], _AS_IT_IS)
        bits = layer.weight_bits * layer.act_bits
        totals[term.owner] = totals.get(term.owner, 0) + term.value(removed) * bits
    return totals


def parameter_bytes(graph: NetworkGraph, policy: CompressionPolicy) -> dict[str, int]:
    """Bytes in which each parameter can be stored, with everything that is needed to read it.

    A quantized weight comes with a scale (float32) for each output channel, or with its shared values; the activations
    that its layer reads with a scale and a zero point. A sparse weight is stored by its values and their places if that
    is less: a bit a weight (unstructured), a bit a block, or the place of each value among its M (N:M). Everything else
    is float32. Statistics of batch norms, which fold away, are not counted.

    Args:
        graph: the captured dense network.
        policy: what stays, and sparsity and bits of each layer.

    Returns:
        By qualified parameter name; their sum is the network's size.
    """
    removed = _removed(graph, policy)
    sizes = {}
    for term in graph.param_terms:
        name, _, kind = term.owner.rpartition(".")
        layer = policy.layers.get(name) if kind == "weight" else None
        sizes[term.owner] = math.ceil(term.value(removed) * FULL_BITS / 8)
        if layer is not None and (layer.is_quantized or layer.is_sparse):
            sizes[term.owner] = _weight_bytes(term, removed, layer)
    return sizes


def _weight_bytes(term: Term, removed: Mapping[int, int], layer: LayerPolicy) -> int:
    n_weights, n_out = term.value(removed), term.dims[0].size(removed)
    bits = n_weights * layer.weight_bits
    if layer.is_sparse:
        n_kept = math.ceil(n_weights * layer.density)
        bits = min(bits, n_kept * layer.weight_bits + _place_bits(n_weights, n_kept, layer))
    total = math.ceil(bits / 8)
    if layer.weight_bits <= 8:
        shared = layer.quantizer == "kmeans"
        total += _SCALE_BYTES * (2**layer.weight_bits if shared else n_out)
    if layer.act_bits <= 8:
        total += _SCALE_BYTES + _ZERO_POINT_BYTES
    return total


def _place_bits(n_weights: int, n_kept: int, layer: LayerPolicy) -> int:
    if layer.n_of_m is not None:
        return n_kept * math.ceil(math.log2(layer.n_of_m[1]))
    return math.ceil(n_weights / layer.block)


def _removed(graph: NetworkGraph, policy: CompressionPolicy) -> dict[int, int]:
    return {graph.group_index[name]: policy.sizes[name] - len(kept) for name, kept in policy.kept.items()}
