"""policy -> compressed model: channels are removed physically, from a copy, and weights inside its layers zeroed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graph_encoder.copies import copied
from graph_encoder.network import NetworkGraph
from graph_encoder.resize import removed_positions, resize_attributes, slice_tensor
from graph_encoder.symbolic import rewrite

from .policy import CompressionPolicy
from .sparsity import zero_weights


def apply_policy(model: nn.Module, graph: NetworkGraph, policy: CompressionPolicy) -> nn.Module:
    """A copy of ``model`` without the units that ``policy`` drops, and with zeros inside the layers it makes sparse.

    The copy is the user's own module with smaller tensors. Where ``forward`` itself holds a channel count that has to
    change (a pad of channels, a view), it is the module's symbolic trace with that number rewritten.

    Args:
        model: the captured network; neither it nor its tensors are touched or shared.
        graph: its graph.
        policy: the units that stay, and the sparsity of layers at the sizes that are left. Its bits need calibration
            data and are for `pruning.quantize.quantize_layers`, which takes what is returned here.

    Returns:
        The smaller network, in the training mode of ``model``; state-dict names are unchanged.

    Raises:
        PolicyError: if the policy does not fit the graph, or a pattern does not fit its layer.
    """
    masks = policy.masks(graph)
    removed = removed_positions(graph, masks)
    # Tensors are shared while the modules are copied, so that no dense weight is copied only to be sliced.
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    smaller = copied(model, shared=[tensor for _, tensor in tensors])
    if graph.is_rewritten(masks.keys()):
        smaller = rewrite(smaller, graph, masks)
    _replace_tensors(smaller, removed)
    zero_weights(smaller, policy.layers)
    return smaller


def _replace_tensors(model: nn.Module, removed: Mapping[str, Mapping[int, Tensor]]) -> None:
    """Give every layer tensors of its own, sliced where units went; tied tensors stay tied."""
    fresh: dict[int, Tensor] = {}
    for prefix, layer in model.named_modules():
        old = {}
        stores: list[dict[str, Any]] = [layer._parameters, layer._buffers]
        for store in stores:
            for name, tensor in store.items():
                if tensor is None:
                    continue
                full_name = f"{prefix}.{name}" if prefix else name
                if id(tensor) not in fresh:
                    with torch.no_grad():
                        data = slice_tensor(tensor.detach(), removed.get(full_name, {}))
                        data = data.clone() if data.data_ptr() == tensor.data_ptr() else data
                    if isinstance(tensor, nn.Parameter):
                        data = nn.Parameter(data, requires_grad=tensor.requires_grad)
                    fresh[id(tensor)] = data
                old[name] = tensor.shape
                store[name] = fresh[id(tensor)]
        for attribute, value in resize_attributes(layer, old).items():
            setattr(layer, attribute, value)


def mask_policy(model: nn.Module, graph: NetworkGraph, policy: CompressionPolicy) -> nn.Module:
    """A copy of ``model`` at full width in which the dropped units are zeros wherever a tensor holds them.

    Zeroing what produces a unit is not enough: a sigmoid of zero is a half. Every slice that reads it is zeroed too,
    so that the copy computes what the smaller network computes. For proofs, not for use: sparsity inside the layers,
    which is chosen among the weights that are left, is not looked at.

    Args:
        model: the captured network; untouched.
        graph: its graph.
        policy: the units that stay.
    """
    masked = copied(model)
    removed = removed_positions(graph, policy.masks(graph))
    with torch.no_grad():
        for name, tensor in [*masked.named_parameters(), *masked.named_buffers()]:
            # A variance of zero would divide by epsilon alone; the zeroed scale already silences the channel.
            if name.rpartition(".")[2] == "running_var":
                continue
            for dim, positions in removed.get(name, {}).items():
                tensor.index_fill_(dim, positions.to(tensor.device), 0)
    return masked
