"""Sparse layers as functions of tensors, to call as those of `torch.nn.functional` are called."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops as _ops  # noqa: F401 - defines the operators
from .formats import SparseWeight


def sparse_conv2d(
    x: Tensor,
    weight: SparseWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
) -> Tensor:
    """``activation(conv2d(x, weight) + bias + residual)`` in one pass.

    Differentiable in ``x``, ``weight.values``, ``bias`` and ``residual``.

    Args:
        x: float32 of shape ``(batch, in, height, width)``.
        weight: what `pack` made of the dense weight.
        bias: of shape ``(out,)``.
        residual: shaped like the output, added before the activation.
        stride: of rows and columns.
        padding: zeros on either side, by rows and columns.
        dilation: of rows and columns.
        groups: only 1; grouped and depthwise convolutions have too few weights a channel to be worth it.
        activation: one of `ACTIVATIONS`.

    Returns:
        Float32 of shape ``(batch, out, out_height, out_width)``; channels last if ``x`` is so and there is no
        ``residual``, else contiguous.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if groups != 1:
        msg = f"secateur::sparse_conv2d: expected groups of 1, got {groups}; keep grouped convolutions dense"
        raise ValueError(msg)
    if x.dim() == 4 and x.shape[1] != weight.shape[1]:
        msg = (
            f"secateur::sparse_conv2d: expected x of shape (batch, {weight.shape[1]}, height, width) for a weight of "
            f"shape {weight.shape}, got {tuple(x.shape)}"
        )
        raise ValueError(msg)
    out: Tensor = torch.ops.secateur.sparse_conv2d(
        x,
        weight.values,
        weight.columns,
        weight.counts,
        bias,
        residual,
        weight.shape[0],
        weight.shape[2:],
        stride,
        padding,
        dilation,
        weight.block,
        activation,
    )
    return out


def sparse_linear(
    x: Tensor,
    weight: SparseWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "none",
) -> Tensor:
    """``activation(linear(x, weight) + bias + residual)`` in one pass.

    Differentiable in ``x``, ``weight.values``, ``bias`` and ``residual``.

    Args:
        x: float32 of shape ``(..., in)``.
        weight: what `pack` made of the dense weight of shape ``(out, in)``.
        bias: of shape ``(out,)``.
        residual: shaped like the output, added before the activation.
        activation: one of `ACTIVATIONS`.

    Returns:
        Float32 of shape ``(..., out)``, contiguous.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if x.dim() and weight.shape[1:] != (x.shape[-1], 1, 1):
        msg = (
            f"secateur::sparse_linear: expected x of shape (..., in) for a weight of shape (out, in, 1, 1), "
            f"got {tuple(x.shape)} for {weight.shape}"
        )
        raise ValueError(msg)
    pattern = (weight.values, weight.columns, weight.counts)
    out: Tensor = torch.ops.secateur.sparse_linear(
        x, *pattern, bias, residual, weight.shape[0], weight.block, activation
    )
    return out


def mask_fake_quantize(weight: Tensor, mask: Tensor, scale: Tensor, lowest: int, highest: int) -> Tensor:
    """``mask * clamp(round(weight / scale), lowest, highest) * scale`` in one pass over the weight.

    The gradient passes straight through rounding: it is that of the output where the mask is set and the level lies in
    the range, and zero elsewhere. ``scale`` gets none.

    Args:
        weight: float32 of shape ``(rows, ...)``.
        mask: boolean, shaped like ``weight``.
        scale: float32 of shape ``(rows,)``, positive.
        lowest: least level, at least ``-2**20``.
        highest: greatest level, above ``lowest``, at most ``2**20``.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    out: Tensor = torch.ops.secateur.mask_fake_quantize(weight, mask, scale, lowest, highest)[0]
    return out
