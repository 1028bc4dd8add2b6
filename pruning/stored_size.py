"""Bytes that the parameters take under a policy."""

from __future__ import annotations

import math
from collections.abc import Mapping

from graph_encoder.network import NetworkGraph, Term

from .layer_policy import FULL_BITS, LayerPolicy
from .policy import CompressionPolicy

SCALE_BYTES = 4
ZERO_POINT_BYTES = 1


def parameter_bytes(graph: NetworkGraph, policy: CompressionPolicy) -> dict[str, int]:
    """Bytes in which each parameter can be stored, with everything that is needed to read it.

    A quantized weight comes with a scale (float32) for each output channel, or with its shared values; the activations
    that its layer reads with a scale and a zero point. A sparse weight is stored by its values and their places if that
    is less: a bit a weight (unstructured), a bit a block, or the place of each value among its M (N:M). Everything else
    is float32. Statistics of batch norms, which fold away, are not counted.

    A packed format reaches this size. The files that the project writes are larger: they hold zeros as any other
    weight, and bits below 8 as floats.

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
        n_kept = max(1, math.floor(n_weights * layer.density + 1e-9))
        bits = min(bits, n_kept * layer.weight_bits + _place_bits(n_weights, layer))
    total = math.ceil(bits / 8)
    if layer.weight_bits <= 8:
        shared = layer.quantizer == "kmeans"
        total += SCALE_BYTES * (2**layer.weight_bits if shared else n_out)
    if layer.act_bits <= 8:
        total += SCALE_BYTES + ZERO_POINT_BYTES
    return total


def _place_bits(n_weights: int, layer: LayerPolicy) -> int:
    if layer.n_of_m is not None:
        # The index of each kept weight among its M, or a bit for each of the M, whichever is less.
        n, m = layer.n_of_m
        return n_weights // m * min(m, n * math.ceil(math.log2(m)))
    return math.ceil(n_weights / layer.block)


def _removed(graph: NetworkGraph, policy: CompressionPolicy) -> dict[int, int]:
    return {graph.group_index[name]: policy.sizes[name] - len(kept) for name, kept in policy.kept.items()}
