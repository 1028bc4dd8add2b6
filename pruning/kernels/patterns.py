"""What the kernels derive from a pattern of non-zeros: computed once for each pattern and input size, then kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .formats import BLOCKS, PATTERNS, ROWS, pack_pattern, positions_of
from .native import Library, Shape, Weight, pointer


@dataclass(frozen=True)
class Transposed:
    """The same non-zeros as a layer from the outputs back to the inputs, its kernel flipped.

    Attributes:
        columns: as in `SparseWeight`, unstructured.
        counts: as in `SparseWeight`.
        order: for each value of the transposed layer, its index among the values of the layer.
    """

    columns: Tensor
    counts: Tensor
    order: Tensor


@dataclass
class Pattern:
    """A checked pattern of non-zeros.

    Attributes:
        columns: as in `SparseWeight`.
        counts: as in `SparseWeight`.
        shape: of the dense weight.
        block: as in `SparseWeight`.
        n_values: how many values go with it.
    """

    columns: Tensor
    counts: Tensor
    shape: tuple[int, ...]
    block: int
    n_values: int
    _column_start: Tensor
    _value_start: Tensor
    _offsets: dict[tuple[object, ...], Tensor] = field(default_factory=dict)
    _transposed: Transposed | None = None

    def native(self, values: Tensor, offsets: Tensor) -> Weight:
        """The structure that the library reads; it points into this pattern and both tensors."""
        return Weight(
            self.block,
            self.counts.shape[1],
            self.counts.shape[0],
            pointer(self._column_start),
            pointer(self._value_start),
            pointer(self.counts if self.block == 1 else None),
            pointer(offsets),
            pointer(values),
        )

    def offsets(self, library: Library, shape: Shape) -> Tensor:
        """Where the columns lie in an input of ``shape``."""
        return self._offsets_by(library.offsets, library, shape, 0)

    def gradient_offsets(self, library: Library, shape: Shape) -> Tensor:
        """Where `Library.values_grad` finds them."""
        return self._offsets_by(library.gradient_offsets, library, shape, shape.batch)

    def _offsets_by(
        self, compute: Callable[[Shape, Tensor], Tensor], library: Library, shape: Shape, batch: int
    ) -> Tensor:
        sizes = (shape.height, shape.width, shape.stride_h, shape.stride_w, shape.padding_h, shape.padding_w)
        key = (library.instruction_set, batch, *sizes, shape.dilation_h, shape.dilation_w, shape.channels_last)
        if key not in self._offsets:
            self._offsets[key] = compute(shape, self.columns)
        return self._offsets[key]

    def transposed(self) -> Transposed:
        """The pattern that the gradient of the input runs through."""
        if self._transposed is None:
            index = torch.full(self.shape, -1)
            positions = positions_of(self.columns, self.counts, self.block, index[0].numel())
            index.view(-1)[positions] = torch.arange(self.n_values)
            index = index.flip(2, 3).transpose(0, 1).contiguous()
            columns, counts, positions = pack_pattern(index >= 0, 1)
            self._transposed = Transposed(columns, counts, index.view(-1)[positions])
        return self._transposed


_patterns = WeakTensorKeyDictionary()


def pattern_of(op: str, columns: Tensor, counts: Tensor, shape: tuple[int, ...], block: int) -> Pattern:
    """The pattern of these tensors, checked when they are first seen or have changed since.

    Args:
        op: name of the operator, for messages.
        columns: as in `SparseWeight`.
        counts: as in `SparseWeight`.
        shape: of the dense weight, ``(out, in, kernel_h, kernel_w)``.
        block: as in `SparseWeight`.

    Raises:
        ValueError: if they are no pattern of a weight of that shape; following them would read foreign memory.
    """
    key = (_version(columns), _version(counts), id(counts), shape, block)
    found = _patterns.get(columns)
    if found is not None and found[0] == key:
        return cast(Pattern, found[1])
    # Another tensor over the same numbers: an entry goes with its key, which it must not hold itself.
    pattern = _checked(op, columns.detach(), counts, shape, block)
    _patterns[columns] = (key, pattern)
    return pattern


def _version(tensor: Tensor) -> int:
    # Tensors made in inference mode count no versions; nor can they change outside of it.
    return -1 if tensor.is_inference() else tensor._version


def _checked(op: str, columns: Tensor, counts: Tensor, shape: tuple[int, ...], block: int) -> Pattern:
    if block not in BLOCKS:
        msg = f"secateur::{op}: expected a block of {', '.join(map(str, BLOCKS))}, got {block}"
        raise ValueError(msg)
    if shape[0] % block:
        msg = f"secateur::{op}: expected output channels divisible by the block of {block}, got {shape[0]}"
        raise ValueError(msg)
    for name, tensor, dims in (("columns", columns, 1), ("counts", counts, 3 if block == 1 else 2)):
        if tensor.dtype != torch.int32 or tensor.dim() != dims or not tensor.is_contiguous():
            msg = (
                f"secateur::{op}: expected {name} to be contiguous torch.int32 of {dims} dimension(s), "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
            raise ValueError(msg)
    groups = -(-shape[0] // (ROWS if block == 1 else block))
    trailing = (groups, PATTERNS) if block == 1 else (groups,)
    if tuple(counts.shape[1:]) != trailing:
        expected = ", ".join(map(str, ("chunks", *trailing)))
        msg = f"secateur::{op}: expected counts of shape ({expected}), got {tuple(counts.shape)}"
        raise ValueError(msg)
    if int(counts.min()) < 0 or int(counts.sum()) != len(columns) or (block == 1 and bool(counts[..., 0].any())):
        msg = f"secateur::{op}: expected counts that add up to the {len(columns)} columns, got {int(counts.sum())}"
        raise ValueError(msg)
    n_columns = torch.Size(shape[1:]).numel()
    if len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < n_columns:
        msg = (
            f"secateur::{op}: expected columns from 0 to {n_columns - 1}, "
            f"got {int(columns.min())} to {int(columns.max())}"
        )
        raise ValueError(msg)
    positions = positions_of(columns, counts, block, n_columns)
    if len(positions) and int(positions.max()) >= shape[0] * n_columns:
        msg = f"secateur::{op}: the pattern has values for channels beyond the {shape[0]} of the layer"
        raise ValueError(msg)
    column_counts = (counts.sum(-1) if block == 1 else counts).reshape(-1).long()
    if block == 1:
        weights = torch.tensor([pattern.bit_count() for pattern in range(PATTERNS)])
        value_counts = (counts.long() * weights).sum(-1).reshape(-1)
    else:
        value_counts = column_counts * block
    return Pattern(columns, counts, shape, block, len(positions), _starts(column_counts), _starts(value_counts))


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
