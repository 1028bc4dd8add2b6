"""policy -> zeros inside the layers: which weights stay, by pattern and density."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .layer_policy import LayerPolicy, PolicyError


def sparsity_mask(weight: Tensor, layer: LayerPolicy, *, groups: int = 1) -> Tensor:
    """Which weights of a layer stay.

    With ``k = max(1, floor(density * n))``, so that a budget on what is left is never missed:

    - unstructured: the ``k`` weights of largest magnitude of all ``n``;
    - blocks of B: the weights that B consecutive output channels hold at the same input channel and kernel position
      live or die together, and the ``k`` of ``n = weights / B`` such blocks with the largest sum of squares stay. Of
      all choices of ``k`` blocks that one changes the weight least, in squared error (``docs/sparsity.md`` has its
      accuracy beside that of sums of magnitudes);
    - N:M: of M consecutive input channels, at each output channel and kernel position, the N of largest magnitude.

    Of equals, those of the lower index stay, so the mask depends on the weight alone.

    Args:
        weight: ``(out, in, *kernel)`` of a convolution, ``(out, in)`` of a linear layer.
        layer: pattern and density.
        groups: of the convolution. Blocks and M channels lie within one group: another one reads other inputs.

    Returns:
        Boolean tensor of the weight's shape, on its device; all true if the layer stays dense.

    Raises:
        PolicyError: if B or M does not divide the channels that a group has.
    """
    if misfit := _misfit(weight, layer, groups):
        msg = f"the weight {misfit}"
        raise PolicyError(msg)
    weight = weight.detach()
    if not layer.is_sparse:
        return torch.ones_like(weight, dtype=torch.bool)
    if layer.n_of_m is not None:
        n, m = layer.n_of_m
        magnitude = weight.abs().unflatten(1, (-1, m))
        order = magnitude.sort(dim=2, descending=True, stable=True).indices
        kept = torch.zeros_like(magnitude, dtype=torch.bool)
        return kept.scatter_(2, order.narrow(2, 0, n), True).flatten(1, 2)
    count = kept_weights(weight.shape, layer)
    if layer.block == 1:
        return largest(weight.abs(), count)
    return torch.repeat_interleave(largest(block_energy(weight, layer.block), count // layer.block), layer.block, dim=0)


def kept_weights(shape: torch.Size, layer: LayerPolicy) -> int:
    """How many weights of a layer `sparsity_mask` keeps.

    Args:
        shape: of the weight.
        layer: pattern and density that fit it.
    """
    if layer.n_of_m is not None:
        n, m = layer.n_of_m
        return shape.numel() // m * n
    # A density that was a count over a size must give that count back.
    return layer.block * max(1, math.floor(layer.density * (shape.numel() // layer.block) + 1e-9))


def largest(scores: Tensor, count: int) -> Tensor:
    """True at the ``count`` largest scores; of equal ones, at those of the lower index."""
    order = scores.flatten().sort(descending=True, stable=True).indices
    kept = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[order[:count]] = True
    return kept.view(scores.shape)


def block_energy(weight: Tensor, block: int) -> Tensor:
    """Sum of squares of each block, ``(out / block, in, *kernel)``, in double precision: tiny weights have squares."""
    return torch.sum(weight.detach().double().square().unflatten(0, (-1, block)), dim=1)


def layer_masks(model: nn.Module, layers: Mapping[str, LayerPolicy]) -> dict[str, Tensor]:
    """Which weights of each layer stay.

    Args:
        model: the network as it is, channels already removed; untouched.
        layers: what to do, by qualified layer name; dense ones are left out of the result.

    Returns:
        Masks of `sparsity_mask` by layer name.

    Raises:
        PolicyError: naming every layer that is missing, is neither a convolution nor linear, does not fit its
            pattern, or shares its weight with a layer that has another pattern.
    """
    misfits: list[str] = []
    masks: dict[str, Tensor] = {}
    owner: dict[int, str] = {}
    for name, layer in layers.items():
        if not layer.is_sparse:
            continue
        try:
            weight, groups = sparse_weight(model, name)
        except PolicyError as error:
            misfits.append(str(error))
            continue
        first = owner.setdefault(id(weight), name)
        if (layer.sparsity, layer.density) != (layers[first].sparsity, layers[first].density):
            misfits.append(f"layers '{first}' and '{name}' share a weight and differ in sparsity or density")
        elif misfit := _misfit(weight, layer, groups):
            misfits.append(f"layer '{name}' {misfit}")
        else:
            masks[name] = sparsity_mask(weight, layer, groups=groups)
    if misfits:
        msg = "the policy does not fit the network: " + "; ".join(misfits)
        raise PolicyError(msg)
    return masks


def sparse_weight(model: nn.Module, name: str) -> tuple[nn.Parameter, int]:
    """The weight of the layer ``name`` and its convolution groups (1 for a linear layer).

    Raises:
        PolicyError: if there is no such layer, or weights inside it cannot be zeroed by pattern.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        msg = f"the network has no layer '{name}'"
        raise PolicyError(msg) from error
    is_convolution = isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)
    if not is_convolution and not isinstance(module, nn.Linear):
        msg = f"layer '{name}' is {type(module).__name__}; only convolutions and linear layers can be sparse"
        raise PolicyError(msg)
    weight = module._parameters.get("weight")
    if weight is None:
        msg = f"layer '{name}' computes its weight (a parametrization); make it a plain parameter first"
        raise PolicyError(msg)
    return weight, module.groups if isinstance(module, _ConvNd) else 1


def can_be_sparse(model: nn.Module, name: str) -> bool:
    """Whether the layer called ``name`` may hold zeros; see `sparse_weight` for what cannot."""
    try:
        sparse_weight(model, name)
    except PolicyError:
        return False
    return True


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the weights that do not stay to zero, in place.

    Args:
        model: the network.
        masks: true where weights stay, by layer name.
    """
    with torch.no_grad():
        for name, mask in masks.items():
            sparse_weight(model, name)[0].masked_fill_(~mask, 0)


def zero_weights(model: nn.Module, layers: Mapping[str, LayerPolicy]) -> None:
    """Zero the weights that ``layers`` drops, in place; errors are those of `layer_masks`, before anything changes."""
    apply_masks(model, layer_masks(model, layers))


def _misfit(weight: Tensor, layer: LayerPolicy, groups: int) -> str:
    """Why the pattern does not fit, to follow the layer's name; empty if it does."""
    if not layer.is_sparse:
        return ""
    of_group = f" in each of its {groups} groups" if groups > 1 else ""
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    if rows % layer.block:
        return (
            f"has {rows} output channels{of_group}, which blocks of {layer.block} do not divide; "
            f"keep a multiple of {layer.block}, take a smaller block, or 'unstructured'"
        )
    if layer.n_of_m and columns % layer.n_of_m[1]:
        m = layer.n_of_m[1]
        return (
            f"has {columns} input channels{of_group}, which {m} of '{layer.sparsity}' does not divide; "
            f"keep a multiple of {m}, or take 'unstructured'"
        )
    return ""
