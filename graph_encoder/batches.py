"""Batches as a network takes them: one tensor, or a tuple of several where ``forward`` has several inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

Batch = Tensor | tuple[Tensor, ...]
"""What ``forward`` takes, batch first: a tensor, or a tuple of tensors where it has several inputs."""


def inputs_of(batch: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The positional inputs of ``forward`` that a batch stands for."""
    return (batch,) if isinstance(batch, Tensor) else tuple(batch)


def tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors of all that ``forward`` returned, a tuple or a dictionary for one, in their order."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def count_images(batches: Iterable[Batch]) -> int:
    """Images (or whatever else a row of a batch holds) in all batches.

    Inputs of no dimension are numbers that hold for all images of their batch; a batch of such alone counts as one.
    """
    return sum(next((len(x) for x in inputs_of(batch) if x.dim()), 1) for batch in batches)


def first_images(batches: Iterable[Batch], n: int) -> list[Batch]:
    """The first ``n`` images, fewer if there are no more, in the batches that they are in; numbers stay as they are."""
    taken: list[Batch] = []
    for batch in batches:
        if n <= 0:
            break
        cut = tuple(x[:n] if x.dim() else x for x in inputs_of(batch))
        taken.append(cut[0] if isinstance(batch, Tensor) else cut)
        n -= count_images([batch])
    return taken
