"""Weights of 3x3 convolutions for Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray 2016, section 4.1)."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 8
"""Output channels whose values lie side by side."""
_G = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64)


def transform(weight: Tensor) -> Tensor:
    """``G g G^T`` of every kernel, in the order in which the kernel multiplies it.

    Args:
        weight: float32 of shape ``(out, in, 3, 3)``.

    Returns:
        Contiguous float32 of shape ``(16, groups, in, 8)``: positions in a tile, then groups of 8 output channels, the
        last of them filled up with zeros.
    """
    filters = _G @ weight.detach().double() @ _G.T
    missing = -len(filters) % BLOCK
    padded = torch.cat([filters, filters.new_zeros(missing, *filters.shape[1:])])
    grouped = padded.reshape(-1, BLOCK, padded.shape[1], 16)
    return grouped.permute(3, 0, 2, 1).float().contiguous()
