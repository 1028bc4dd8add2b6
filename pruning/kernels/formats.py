"""The two forms in which the kernels read non-zero weights, and the way there and back.

Both hold ``values`` in the order in which a kernel multiplies them, the ``columns`` they belong to (``(in_channel *
kernel_h + kernel_row) * kernel_w + kernel_column``) and ``counts`` of columns:

- *block*: ``block`` consecutive output channels share their zeros. ``counts`` has shape ``(chunks, groups)`` with one
  group for each block of channels, and each column has ``block`` values.
- *unstructured* (``block`` is 1): a group is four consecutive output channels, and ``counts`` has shape ``(chunks,
  groups, 16)``: columns by *pattern*, the bit mask of the channels that are non-zero there, one value for each bit. The
  columns of one pattern run through straight code in which each activation loaded serves all the pattern's channels.

Input channels come in chunks, so that the activations of one chunk stay in the first-level cache while every group
reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCKS = (1, 4, 8, 16)
"""Output channels that share their zeros; 1 is unstructured."""
ROWS = 4
PATTERNS = 1 << ROWS

# Input channels of a chunk, unstructured. A kernel larger than 1x1 reads the rows around a tile of pixels too, and more
# than this would not fit the first-level cache; a 1x1 kernel has too few columns for small chunks to pay.
_CHUNK_CHANNELS, _CHUNK_CHANNELS_1X1 = 32, 256
# Columns of a chunk, blocks: enough for keeping sums in memory to cost little, few enough for small rounding errors.
_CHUNK_COLUMNS = 128
# A loop over fewer columns costs more, in one mispredicted branch, than the loads it saves.
_LEAST_COLUMNS = 4
_BITS = torch.tensor([[pattern >> row & 1 for row in range(ROWS)] for pattern in range(PATTERNS)], dtype=torch.bool)
_WEIGHTS = _BITS.sum(1)


class FormatError(ValueError):
    """A weight that does not fit the sparse format asked for."""


@dataclass(frozen=True)
class SparseWeight:
    """The non-zero weights of one layer.

    Attributes:
        values: float32 of shape ``(values,)``.
        columns: int32 of shape ``(columns,)``.
        counts: int32 of shape ``(chunks, groups)``, or ``(chunks, groups, 16)`` if ``block`` is 1.
        shape: of the dense weight, ``(out, in, kernel_h, kernel_w)``; the kernel of a linear layer is 1x1.
        block: output channels that share their zeros, 4, 8 or 16; 1 if unstructured.
    """

    values: Tensor
    columns: Tensor
    counts: Tensor
    shape: tuple[int, int, int, int]
    block: int

    @property
    def density(self) -> float:
        """Share of the weights that are stored, in [0, 1]."""
        return self.values.numel() / torch.Size(self.shape).numel()

    def to_dense(self) -> Tensor:
        """The dense weight, of shape ``shape``."""
        return unpack(self.values, self.columns, self.counts, self.shape, self.block)


def pack(weight: Tensor, block: int, mask: Tensor | None = None) -> SparseWeight:
    """Pack a dense weight that holds zeros.

    Args:
        weight: float32 of shape ``(out, in, kernel_h, kernel_w)`` or ``(out, in)``, on the CPU.
        block: consecutive output channels that share their zeros, 4, 8 or 16; 1 for none.
        mask: boolean, shaped like ``weight``: what is stored, even where it happens to be zero. Everything that is not
            zero if not given.

    Raises:
        FormatError: if the weight has another dtype, layout or device, the block does not divide its output channels,
            or its zeros do not fit the block or the mask.
    """
    kept = _check(weight, block, mask)
    shape = tuple(kept.shape)
    columns, counts, positions = pack_pattern(kept, block)
    values = weight.detach().reshape(-1)[positions]
    return SparseWeight(values, columns, counts, (shape[0], shape[1], shape[2], shape[3]), block)


def pack_pattern(kept: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """``columns``, ``counts`` and, for each value, its position in the flat dense weight.

    Args:
        kept: boolean of shape ``(out, in, kernel_h, kernel_w)``, shared by the channels of each block.
        block: as in `pack`.
    """
    out_channels, in_channels = kept.shape[:2]
    flat = kept.reshape(out_channels, -1)
    taps = flat.shape[1] // in_channels
    if block == 1:
        chunk_channels = _CHUNK_CHANNELS if taps > 1 else _CHUNK_CHANNELS_1X1
    else:
        chunk_channels = max(1, int(_CHUNK_COLUMNS / (taps * max(float(flat.float().mean()), 1e-6))))
    chunks = -(-in_channels // chunk_channels)
    chunk_of_column = torch.arange(flat.shape[1]) // taps // chunk_channels
    if block == 1:
        columns, counts = _pack_unstructured(flat, chunk_of_column, chunks)
    else:
        columns, counts = _pack_blocks(flat[::block], chunk_of_column, chunks)
    return columns, counts, positions_of(columns, counts, block, flat.shape[1])


def positions_of(columns: Tensor, counts: Tensor, block: int, n_columns: int) -> Tensor:
    """Position of each value in the flat dense weight, whose rows are ``n_columns`` long."""
    groups = torch.arange(counts.shape[1]).repeat(counts.shape[0])
    if block == 1:
        by_entry = counts.reshape(-1, PATTERNS).long()
        pattern_of_column = torch.arange(PATTERNS).repeat(len(by_entry)).repeat_interleave(by_entry.reshape(-1))
        group_of_column = groups.repeat_interleave(by_entry.sum(1))
        column_of_value, row = _BITS[pattern_of_column].nonzero(as_tuple=True)
        rows = group_of_column[column_of_value] * ROWS + row
        return rows * n_columns + columns.long()[column_of_value]
    first_row = groups.repeat_interleave(counts.reshape(-1).long()) * block
    return ((first_row[:, None] + torch.arange(block)) * n_columns + columns.long()[:, None]).reshape(-1)


def unpack(values: Tensor, columns: Tensor, counts: Tensor, shape: tuple[int, ...], block: int) -> Tensor:
    """The dense weight of ``shape``; differentiable in ``values``."""
    dense = values.new_zeros(torch.Size(shape).numel())
    positions = positions_of(columns, counts, block, dense.numel() // shape[0])
    return dense.index_put((positions,), values).reshape(shape)


def _pack_blocks(kept: Tensor, chunk_of_column: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    group, column = kept.nonzero(as_tuple=True)
    entry = chunk_of_column[column] * len(kept) + group
    counts = torch.bincount(entry, minlength=chunks * len(kept))
    columns = column[torch.argsort(entry, stable=True)]
    return columns.to(torch.int32), counts.to(torch.int32).reshape(chunks, len(kept))


def _pack_unstructured(kept: Tensor, chunk_of_column: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    groups = -(-kept.shape[0] // ROWS)
    padded = torch.zeros(groups * ROWS, kept.shape[1], dtype=torch.bool)
    padded[: kept.shape[0]] = kept
    bits = 1 << torch.arange(ROWS)
    by_group = (padded.reshape(groups, ROWS, -1) * bits[:, None]).sum(1)
    group, column = by_group.nonzero(as_tuple=True)
    pattern = by_group[group, column]
    entry = chunk_of_column[column] * groups + group
    # What is rare is split: four rows into two pairs, three into a pair and one, a pair into its rows.
    for size in (4, 3, 2):
        counts = torch.bincount(entry * PATTERNS + pattern, minlength=chunks * groups * PATTERNS)
        is_rare = (_WEIGHTS[pattern] == size) & (counts[entry * PATTERNS + pattern] < _LEAST_COLUMNS)
        first = pattern & -pattern
        if size > 2:
            first = first | ((pattern - first) & -(pattern - first))
        rest = (pattern - first)[is_rare]
        pattern = torch.cat([torch.where(is_rare, first, pattern), rest])
        entry, column = torch.cat([entry, entry[is_rare]]), torch.cat([column, column[is_rare]])
    order = torch.argsort((entry * PATTERNS + pattern) * kept.shape[1] + column)
    counts = torch.bincount(entry * PATTERNS + pattern, minlength=chunks * groups * PATTERNS)
    return column[order].to(torch.int32), counts.to(torch.int32).reshape(chunks, groups, PATTERNS)


def _check(weight: Tensor, block: int, mask: Tensor | None) -> Tensor:
    """What is stored, as a boolean tensor of four dimensions."""
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or weight.layout != torch.strided:
        msg = (
            f"the weight is {weight.dtype} and {weight.layout} on '{weight.device}'; "
            f"sparse kernels take torch.float32, torch.strided, on the CPU"
        )
        raise FormatError(msg)
    if weight.dim() not in (2, 4):
        msg = (
            f"the weight has shape {tuple(weight.shape)}; expected (out, in, kernel_h, kernel_w) of a convolution or "
            f"(out, in) of a linear layer"
        )
        raise FormatError(msg)
    if weight.numel() == 0:
        msg = f"the weight has shape {tuple(weight.shape)} and no elements; every dimension must be at least 1"
        raise FormatError(msg)
    if block not in BLOCKS:
        msg = f"block is {block}; allowed are {', '.join(map(str, BLOCKS))} (1 is unstructured)"
        raise FormatError(msg)
    if weight.shape[0] % block:
        msg = (
            f"a block of {block} does not divide the {weight.shape[0]} output channels of the weight; "
            f"take a smaller block, or 1 for unstructured"
        )
        raise FormatError(msg)
    kept = weight.detach() != 0
    if mask is not None:
        if mask.shape != weight.shape or mask.dtype != torch.bool:
            msg = (
                f"the mask is {mask.dtype} of shape {tuple(mask.shape)}; "
                f"expected torch.bool of shape {tuple(weight.shape)}"
            )
            raise FormatError(msg)
        n_outside = int((kept & ~mask).sum())
        if n_outside:
            msg = f"{n_outside} weights outside the mask are not zero; multiply the weight by the mask first"
            raise FormatError(msg)
        kept = mask
    shared = kept.reshape(-1, block, weight[0].numel())
    n_split = int((shared.any(1) != shared.all(1)).sum())
    if n_split:
        msg = (
            f"{n_split} of {shared.shape[0] * shared.shape[2]} blocks of {block} output channels hold both zeros and "
            f"non-zeros; prune whole blocks, or pass the mask of what is stored"
        )
        raise FormatError(msg)
    return kept.reshape(*kept.shape, 1, 1) if kept.dim() == 2 else kept
