"""What tells one search from another, so that evaluations of one network are never taken for those of another."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from graph_encoder.batches import Batch, inputs_of
from graph_encoder.network import NetworkGraph

_DIGITS = 16
"""Hexadecimal digits of a digest: short enough for a message, long enough that no two searches share one."""


def search_identity(
    model: nn.Module,
    graph: NetworkGraph,
    calibration: Sequence[Batch],
    importance: Mapping[str, Tensor] | str,
    **arguments: object,
) -> dict[str, str]:
    """What the results of a search's evaluations depend on, by name, in words or as digests.

    Args:
        model: the dense network.
        graph: its capture.
        calibration: batches for batch-norm statistics.
        importance: scores by group name, of which the order counts and not their last bits; or a criterion's name.
        arguments: whatever else, told as text.
    """
    operators = [
        [each.name, each.kind, each.in_channels, each.out_channels, each.macs, each.params] for each in graph.operators
    ]
    groups = [[group.name, group.size, group.is_prunable] for group in graph.groups]
    return {
        "network": _short(hashlib.sha256(json.dumps([operators, graph.edges, groups]).encode())),
        "weights": tensors_digest([*model.named_parameters(), *model.named_buffers()]),
        "calibration": batches_digest(calibration),
        "importance": importance if isinstance(importance, str) else _ranking_digest(importance),
        **{name: str(value) for name, value in arguments.items()},
    }


def batches_digest(batches: Iterable[Batch]) -> str:
    """Digest of the inputs in some batches, in order."""
    return tensors_digest((str(index), tensor) for index, batch in enumerate(batches) for tensor in inputs_of(batch))


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of names, types, shapes and values, the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return _short(digest)


def _ranking_digest(importance: Mapping[str, Tensor]) -> str:
    return tensors_digest((name, torch.argsort(scores, stable=True)) for name, scores in sorted(importance.items()))


def _short(digest: hashlib._Hash) -> str:
    return digest.hexdigest()[:_DIGITS]


def without_places(written: str) -> str:
    """What Python prints of objects, without their places in memory, which differ from process to process."""
    return re.sub(" at 0x[0-9a-fA-F]+", "", written)
