"""Blocks out of unstructured winners: choose blocks by the winners they hold, and bring similar channels together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from graph_encoder.batches import inputs_of
from graph_encoder.copies import copied
from graph_encoder.modes import evaluation_mode
from graph_encoder.network import ChannelGroup, NetworkGraph

from .batch_norm import reestimate_batch_norm
from .layer_policy import LayerPolicy
from .sparsity import block_energy, kept_weights, largest, layer_masks, sparse_weight, sparsity_mask

TOLERANCE = 1e-4
"""Largest difference of outputs that a new order of channels may make, as a share of the largest output."""
_PASSES = 20


def refill_masks(model: nn.Module, layers: Mapping[str, LayerPolicy]) -> dict[str, Tensor]:
    """Masks of blocks chosen by the unstructured winners in them, all weights of a chosen block refilled.

    The winners are the weights that unstructured pruning keeps at the layer's density. A block's score is their sum of
    squares; the blocks with the largest scores stay, whole, as many as `sparsity_mask` keeps. Zero the rest with
    `apply_masks`: what is refilled has its trained value, not zero.

    Args:
        model: the network; untouched.
        layers: by layer name. Layers without blocks have the masks of `layer_masks`.

    Raises:
        PolicyError: as `layer_masks`.
    """
    masks = layer_masks(model, layers)
    for name in masks:
        layer = layers[name]
        if layer.block > 1:
            weight = sparse_weight(model, name)[0].detach()
            winners = weight * sparsity_mask(weight, LayerPolicy("unstructured", layer.density))
            blocks = largest(block_energy(winners, layer.block), kept_weights(weight.shape, layer) // layer.block)
            masks[name] = torch.repeat_interleave(blocks, layer.block, dim=0)
    return masks


@dataclass(frozen=True)
class Regrouped:
    """A network whose output channels stand in another order.

    Attributes:
        model: computes what the network did; a copy.
        orders: by group name, the unit that now stands at each place.
        refused: reason by group name, where channels were to be moved and were not.
    """

    model: nn.Module
    orders: Mapping[str, Tensor]
    refused: Mapping[str, str]


def regroup(
    model: nn.Module,
    graph: NetworkGraph,
    layers: Mapping[str, LayerPolicy],
    example_inputs: Tensor | Sequence[Tensor],
) -> Regrouped:
    """Reorder output channels so that blocks of them lose less when they share their zeros.

    The units of a channel group are moved alike in every tensor that holds them, so that the network computes what it
    did, which is checked on the inputs, group by group. Then `sparsity_mask` finds blocks with more energy. Pairs of
    units of two blocks change places while that raises the squared weights that the best blocks of all layers of the
    group hold, each layer's as a share of its total.

    The idea of reordering for structured sparsity is that of Pool & Yu (2021, "Channel permutations for N:M
    sparsity") and Ji et al. (2018, "TETRIS"); here it is carried through residual sums and concatenations.

    Args:
        model: the network, channels already removed; untouched.
        graph: its graph.
        layers: patterns and densities; those with blocks are looked at.
        example_inputs: real inputs, batch first, on the model's device.

    Returns:
        The reordered copy. Save it with a policy of the same layers: a loaded network needs no orders.

    Raises:
        PolicyError: as `layer_masks`.
    """
    layer_masks(model, layers)
    inputs = inputs_of(example_inputs)
    moved = copied(model)
    orders: dict[str, Tensor] = {}
    refused: dict[str, str] = {}
    for group in graph.prunable:
        rows = dict(_rows_of(group, moved, layers))
        if not rows:
            continue
        block = max(layers[name].block for name in rows)
        order = _better_order([_Rows(energy, layers[name].density) for name, energy in rows.items()], block)
        if bool((order == torch.arange(group.size)).all()):
            continue
        if (error := _change(moved, group, order, inputs)) > TOLERANCE:
            refused[group.name] = f"the outputs would change by {error:.1e} of the largest"
            continue
        permute_units(moved, group, order)
        orders[group.name] = order
    return Regrouped(moved, orders, refused)


def permute_units(model: nn.Module, group: ChannelGroup, order: Tensor) -> None:
    """Move the units of a channel group, in place and in every tensor that holds them.

    Args:
        model: the network that the group was captured from.
        group: units that the same tensors hold in the same way.
        order: int64 of shape ``(size,)``: the unit that comes to each place.
    """
    done = set()
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    with torch.no_grad():
        for member in group.members:
            tensor = tensors[member.tensor]
            if (id(tensor), member.dim) in done:
                continue
            done.add((id(tensor), member.dim))
            index = torch.arange(tensor.shape[member.dim])
            index[member.indices.reshape(-1)] = member.indices[order].reshape(-1)
            tensor.copy_(tensor.index_select(member.dim, index.to(tensor.device)))


def _rows_of(group: ChannelGroup, model: nn.Module, layers: Mapping[str, LayerPolicy]) -> Iterator[tuple[str, Tensor]]:
    """Squared weights, ``(size, columns)``, of each layer with blocks whose outputs are the group's units, in order."""
    for member in group.members:
        name, _, leaf = member.tensor.rpartition(".")
        layer = layers.get(name)
        if layer is None or not layer.is_sparse or layer.block == 1 or (member.role, member.dim) != ("out", 0):
            continue
        weight, groups = sparse_weight(model, name)
        in_order = torch.equal(member.indices, torch.arange(weight.shape[0])[:, None])
        if leaf == "weight" and groups == 1 and in_order:
            yield name, weight.detach().double().square().flatten(1).cpu()


@dataclass(frozen=True)
class _Rows:
    energy: Tensor
    density: float


def _better_order(layers: Sequence[_Rows], block: int) -> Tensor:
    """Swap rows between blocks while the best blocks hold more; the order is never worse than the one there is."""
    energy = torch.cat([rows.energy / rows.energy.sum().clamp_min(1e-300) for rows in layers], dim=1)
    widths = [rows.energy.shape[1] for rows in layers]
    counts = [max(1, round(rows.density * rows.energy.numel() / block)) for rows in layers]

    def held(order: Tensor) -> tuple[float, Tensor]:
        """Energy that the best blocks hold, and by column the least energy of a block that stays."""
        sums = energy[order].unflatten(0, (-1, block)).sum(dim=1)
        best = [
            part.flatten().topk(count).values for part, count in zip(sums.split(widths, dim=1), counts, strict=True)
        ]
        thresholds = torch.cat([top[-1].expand(width) for top, width in zip(best, widths, strict=True)])
        return sum(float(top.sum()) for top in best), thresholds

    order = torch.arange(len(energy))
    most, thresholds = held(order)
    for _ in range(_PASSES):
        candidate = _swapped(energy, order, block, thresholds)
        found, thresholds = held(candidate)
        if found <= most * (1 + 1e-9):
            break
        order, most = candidate, found
    # Within a block and among blocks the order does not matter: ascending, so that equal results are equal orders.
    blocks = order.unflatten(0, (-1, block)).sort(dim=1).values
    return torch.flatten(blocks[blocks[:, 0].argsort()])


def _swapped(energy: Tensor, order: Tensor, block: int, thresholds: Tensor) -> Tensor:
    """One pass over all pairs of blocks, with the best swap of each made if it gains.

    For fixed thresholds the energy of the blocks above them is a sum over blocks, so that a swap concerns two.
    """
    blocks = order.unflatten(0, (-1, block)).clone()
    sums = energy[blocks].sum(dim=1)
    for a in range(len(blocks)):
        for b in range(a + 1, len(blocks)):
            moved = energy[blocks[b]][None] - energy[blocks[a]][:, None]
            gain = _above(sums[a] + moved, thresholds) + _above(sums[b] - moved, thresholds)
            gain -= _above(sums[a], thresholds) + _above(sums[b], thresholds)
            i, j = divmod(int(gain.argmax()), block)
            if gain[i, j] > 1e-12:
                blocks[a, i], blocks[b, j] = blocks[b, j].clone(), blocks[a, i].clone()
                sums[a] += moved[i, j]
                sums[b] -= moved[i, j]
    return torch.flatten(blocks)


def _above(sums: Tensor, thresholds: Tensor) -> Tensor:
    return torch.sum(torch.clamp(sums - thresholds, min=0), dim=-1)


def _change(model: nn.Module, group: ChannelGroup, order: Tensor, inputs: tuple[Tensor, ...]) -> float:
    """Largest change of the outputs, relative to the largest output, if the units were moved."""
    trial = copied(model)
    # With statistics that do not fit the inputs, signals die out on the way, and nothing makes a difference.
    reestimate_batch_norm(trial, [inputs])
    with evaluation_mode(trial), torch.inference_mode():
        before = _tensors_of(trial(*inputs))
        permute_units(trial, group, order)
        after = _tensors_of(trial(*inputs))
    largest_output = max(float(x.abs().max()) for x in before)
    return max(float((x - y).abs().max()) for x, y in zip(before, after, strict=True)) / max(largest_output, 1e-30)


def _tensors_of(outputs: object) -> list[Tensor]:
    """The tensors among a network's outputs."""
    return [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor)]
