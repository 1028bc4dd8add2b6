"""Importance of units: which ones of a group go first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from graph_encoder.batches import Batch, inputs_of
from graph_encoder.modes import evaluation_mode
from graph_encoder.network import ChannelGroup, Member, NetworkGraph

Criterion = Literal["l1", "l2", "fpgm", "taylor", "bn_scale"]


def rank_units(
    model: nn.Module,
    graph: NetworkGraph,
    criterion: Criterion = "l1",
    *,
    batches: Iterable[tuple[Batch, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Score the units of every group that may be pruned.

    Args:
        model: the captured network, not changed.
        graph: its graph.
        criterion: ``"l1"`` and ``"l2"``, norms of the producing filters (Li et al. 2017, section 3.1);
            ``"fpgm"``, distance to the layer's other filters (He et al. 2019, section 3.2); ``"taylor"``, squared
            first-order change of the cross-entropy (Molchanov et al. 2019, equation 8); ``"bn_scale"``, magnitude of
            the batch-norm scale (Liu et al. 2017, section 3).
        batches: pairs of inputs and targets on the model's device; ``"taylor"`` only.

    Returns:
        Float scores of shape ``(size,)`` by group name, higher is kept. Scores of one layer are divided by their
        layer's mean before they are averaged over a group's layers, so that scores of different groups compare.

    Raises:
        ValueError: if the criterion is unknown, or its data are missing.
    """
    if criterion not in get_args(Criterion):
        msg = f"'{criterion}' is no importance criterion; choose one of {', '.join(get_args(Criterion))}"
        raise ValueError(msg)
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    if criterion != "taylor":
        return {group.name: _group_scores(group, tensors, criterion) for group in graph.prunable}
    if batches is None:
        msg = "the criterion 'taylor' needs batches of inputs and targets; pass some training batches, or use 'l1'"
        raise ValueError(msg)
    # Squared batch by batch: over all batches the gradients of a trained network cancel.
    scores: dict[str, Tensor] = {}
    for products in _gradient_products(model, batches):
        for group in graph.prunable:
            score = _group_scores(group, tensors | products, criterion)
            scores[group.name] = scores.get(group.name, torch.zeros_like(score)) + score
    if not scores and graph.prunable:
        msg = "the criterion 'taylor' was given no batch; pass some training batches, or use 'l1'"
        raise ValueError(msg)
    return {name: score / score.mean().clamp_min(1e-12) for name, score in scores.items()}


def _group_scores(group: ChannelGroup, tensors: dict[str, Tensor], criterion: Criterion) -> Tensor:
    scores = [
        _per_unit(_channel_scores(tensors[member.tensor], member, criterion), member)
        for member in _scored_members(group, tensors, criterion)
    ]
    return torch.stack([score / score.mean().clamp_min(1e-12) for score in scores]).mean(dim=0)


def _scored_members(group: ChannelGroup, tensors: dict[str, Tensor], criterion: Criterion) -> list[Member]:
    filters = [m for m in group.members if m.role == "out" and tensors[m.tensor].dim() > 1]
    if criterion == "bn_scale":
        scales = [m for m in group.members if m.role == "elementwise" and _is_scale(m, tensors)]
        return scales or filters
    return filters


def _is_scale(member: Member, tensors: dict[str, Tensor]) -> bool:
    stem, _, leaf = member.tensor.rpartition(".")
    return leaf == "weight" and f"{stem}.running_var" in tensors


def _channel_scores(tensor: Tensor, member: Member, criterion: Criterion) -> Tensor:
    rows = tensor.detach().movedim(member.dim, 0).flatten(1) if tensor.dim() > 1 else tensor.detach()[:, None]
    rows = rows.float()
    if criterion == "l2":
        return rows.square().sum(dim=1).sqrt()
    if criterion == "fpgm":
        distances: Tensor = torch.cdist(rows, rows)
        return distances.sum(dim=1)
    if criterion == "taylor":
        return rows.sum(dim=1).square()
    return rows.abs().sum(dim=1)


def _per_unit(scores: Tensor, member: Member) -> Tensor:
    return scores.cpu()[member.indices].sum(dim=1)


def _gradient_products(model: nn.Module, batches: Iterable[tuple[Batch, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Weight times gradient of the cross-entropy by every name of each parameter, frozen ones too, batch by batch."""
    names = {id(p): name for name, p in model.named_parameters()}
    own = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    for inputs, targets in batches:
        with evaluation_mode(model), torch.enable_grad():
            outputs = torch.func.functional_call(model, own, inputs_of(inputs))
            loss = nn.functional.cross_entropy(outputs, targets)
            gradients = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
        pairs = zip(own.items(), gradients, strict=True)
        products = {name: torch.zeros_like(p) if g is None else p.detach() * g for (name, p), g in pairs}
        yield {name: products[names[id(p)]] for name, p in model.named_parameters(remove_duplicate=False)}
