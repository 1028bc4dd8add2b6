"""Labels of channels: integers that stand for a channel wherever its values flow, and the classes they merge into.

A label tensor has the shape of the activation it shadows. It is kept as a stride-zero expansion along every dimension
where the label does not change, so that shadowing a feature map costs as much as its channels. The label `CONSTANT`
stands for values no channel owns (network inputs, constants of full width): what meets it cannot be removed.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CONSTANT = 0

IntArray = NDArray[np.int64]


def compact(labels: Tensor) -> Tensor:
    """Same number of dimensions, with size 1 along each dimension where ``labels`` is an expansion."""
    for dim, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if size > 1 and stride == 0:
            labels = labels.narrow(dim, 0, 1)
    return labels


def tighten(labels: Tensor) -> Tensor:
    """The same labels, as an expansion along each dimension where they turn out to be equal."""
    labels = compact_view = compact(labels).expand(labels.shape)
    for dim in varying_dims(labels):
        first = compact_view.narrow(dim, 0, 1)
        if bool((compact(compact_view) == compact(first)).all()):
            compact_view = first.expand(labels.shape)
    return compact_view


def varying_dims(labels: Tensor) -> list[int]:
    """Dimensions along which the label changes."""
    return [dim for dim, size in enumerate(compact(labels).shape) if size > 1]


class LabelClasses:
    """Union-find over labels, vectorised over arrays, with a reason for every class that has to stay."""

    def __init__(self) -> None:
        self._parent: IntArray = np.zeros(1, dtype=np.int64)
        self._why: IntArray = np.zeros(1, dtype=np.int64)
        self._reasons = [""]
        self._size = 1

    @property
    def size(self) -> int:
        """Number of labels given out, `CONSTANT` included."""
        return self._size

    def fresh(self, n: int) -> Tensor:
        """``n`` labels never used before, int64 of shape ``(n,)``."""
        while self._size + n > len(self._parent):
            more = np.zeros(max(n, len(self._parent)), dtype=np.int64)
            self._parent = np.concatenate([self._parent, more])
            self._why = np.concatenate([self._why, more])
        labels = np.arange(self._size, self._size + n, dtype=np.int64)
        self._parent[labels] = labels
        self._size += n
        return torch.from_numpy(labels)

    def find(self, labels: IntArray) -> IntArray:
        """The representative of each label's class; `CONSTANT` is its own."""
        roots = np.where(labels > 0, self._parent[labels], labels)
        while True:
            above = np.where(roots > 0, self._parent[roots], roots)
            if (above == roots).all():
                break
            roots = above
        known = labels > 0
        self._parent[labels[known]] = roots[known]
        return roots

    def union(self, first: Tensor, second: Tensor, reason: str = "meets a constant of the same width") -> None:
        """Merge the classes of each pair of labels; a pair with `CONSTANT` freezes the other one for ``reason``.

        Args:
            first: labels of any shape.
            second: labels that broadcast with ``first``.
            reason: why a channel that meets a constant has to stay.
        """
        a, b = (t.numpy() for t in torch.broadcast_tensors(first, second))
        a, b = self.find(a.reshape(-1)), self.find(b.reshape(-1))
        a, b = np.minimum(a, b), np.maximum(a, b)
        self._freeze(b[(a == CONSTANT) & (b > 0)], reason)
        meet = (a > 0) & (a != b)
        a, b = a[meet], b[meet]
        while len(a):
            # The least of all that one class meets; the last alone would leave the others for as many more rounds.
            np.minimum.at(self._parent, b, a)
            a, b = self.find(a), self.find(b)
            a, b = np.minimum(a, b), np.maximum(a, b)
            meet = a != b
            a, b = a[meet], b[meet]

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Keep the classes of ``labels`` dense, for ``reason``; the first reason given stands."""
        roots = self.find(compact(labels).reshape(-1).numpy())
        self._freeze(roots[roots > 0], reason)

    def _freeze(self, roots: IntArray, reason: str) -> None:
        new = roots[self._why[roots] == 0]
        if len(new):
            self._reasons.append(reason)
            self._why[new] = len(self._reasons) - 1

    def merge_along(self, labels: Tensor, dim: int) -> None:
        """Merge labels that differ only in their position along ``dim``."""
        labels = compact(labels)
        self.union(labels, labels.narrow(dim, 0, 1))

    def along(self, labels: Tensor, dim: int) -> Tensor:
        """One label a position along ``dim``, of shape ``(labels.shape[dim],)``; other dimensions are merged."""
        rows = compact(labels).movedim(dim, 0).flatten(1) if labels.dim() > 1 else compact(labels)[:, None]
        if rows.shape[1] == 1:
            one = rows[:, 0]
        elif not rows.numel():
            one = torch.tensor(CONSTANT)  # an empty tensor holds no labels of its positions
        else:
            one = rows.max(dim=1).values
            self.union(rows, one[:, None])
        return one.expand(labels.shape[dim])

    def frozen_reasons(self) -> dict[int, str]:
        """Reason by class representative."""
        frozen = np.flatnonzero(self._why[: self._size])
        reasons: dict[int, str] = {}
        for root, why in zip(self.find(frozen).tolist(), self._why[frozen].tolist(), strict=True):
            reasons.setdefault(root, self._reasons[why])
        return reasons

    def make_rectangular(self, grid: Tensor) -> None:
        """Merge labels until what is left of ``grid`` after any removal is again a box.

        A view that splits a channel dimension into several (heads, shuffle groups) stays valid only if the same
        positions go in every row. The dimension that leaves most units free is the one that may shrink.

        Args:
            grid: labels with two or more dimensions along which they vary.
        """
        grid = compact(grid)
        roots = torch.from_numpy(self.find(grid.reshape(-1).numpy()).reshape(tuple(grid.shape)))
        dims = [dim for dim, size in enumerate(grid.shape) if size > 1]
        rows = {dim: roots.movedim(dim, 0).reshape(roots.shape[dim], -1) for dim in dims}
        if any(bool((r == r[:, :1]).all()) for r in rows.values()):
            return
        free = {dim: _count_components(r) for dim, r in rows.items()}
        dim = max(dims, key=lambda d: free[d])
        self.along(grid, dim)


def _count_components(rows: Tensor) -> int:
    """Number of classes left once the labels of each row are merged."""
    merged = LabelClasses()
    values, inverse = torch.unique(rows, return_inverse=True)
    labels = merged.fresh(len(values))[inverse]
    merged.union(labels, labels[:, :1])
    return len(np.unique(merged.find(labels[:, 0].numpy())))
