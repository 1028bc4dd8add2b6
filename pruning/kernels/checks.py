"""What the operators accept, and the sizes they give; the same for real and for fake tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import ACTIVATIONS


def conv2d_size(
    op: str,
    x: Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    """Size of a convolution's output."""
    _check_float(op, "x", x)
    if x.dim() != 4:
        msg = f"secateur::{op}: expected x of shape (batch, in, height, width), got {tuple(x.shape)}"
        raise ValueError(msg)
    if min(*kernel_size, *stride, *dilation) < 1 or min(padding) < 0:
        msg = (
            f"secateur::{op}: expected kernel_size, stride and dilation of at least 1 and padding of at least 0, "
            f"got {list(kernel_size)}, {list(stride)}, {list(dilation)} and {list(padding)}"
        )
        raise ValueError(msg)
    batch, _, height, width = x.shape
    height = (height + 2 * padding[0] - dilation[0] * (kernel_size[0] - 1) - 1) // stride[0] + 1
    width = (width + 2 * padding[1] - dilation[1] * (kernel_size[1] - 1) - 1) // stride[1] + 1
    if height < 1 or width < 1:
        msg = (
            f"secateur::{op}: expected an input no smaller than the kernel, got height and width "
            f"{tuple(x.shape[2:])} for kernel_size {list(kernel_size)}, padding {list(padding)} and "
            f"dilation {list(dilation)}"
        )
        raise ValueError(msg)
    return batch, out_channels, height, width


def linear_size(op: str, x: Tensor, out_features: int) -> tuple[int, ...]:
    """Size of a linear layer's output."""
    _check_float(op, "x", x)
    if x.dim() < 1:
        msg = f"secateur::{op}: expected x of shape (..., in), got a scalar"
        raise ValueError(msg)
    return *x.shape[:-1], out_features


def check_epilogue(
    op: str,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    out_size: Sequence[int],
    activation: str,
) -> None:
    """Raise `ValueError` if what is added, or the activation, does not fit the output."""
    if activation not in ACTIVATIONS:
        msg = f"secateur::{op}: expected an activation among {', '.join(ACTIVATIONS)}, got '{activation}'"
        raise ValueError(msg)
    for name, tensor, size in (("bias", bias, (out_channels,)), ("residual", residual, tuple(out_size))):
        if tensor is None:
            continue
        _check_float(op, name, tensor)
        if tuple(tensor.shape) != size:
            msg = f"secateur::{op}: expected {name} of shape {size}, got {tuple(tensor.shape)}"
            raise ValueError(msg)


def check_values(op: str, values: Tensor, n_values: int) -> None:
    """Raise `ValueError` if the values are not the pattern's."""
    _check_float(op, "values", values)
    if tuple(values.shape) != (n_values,):
        msg = f"secateur::{op}: expected values of shape ({n_values},) for this pattern, got {tuple(values.shape)}"
        raise ValueError(msg)


def check_grad(op: str, grad: Tensor, size: Sequence[int]) -> None:
    """Raise `ValueError` if a gradient is not shaped like the output it belongs to."""
    _check_float(op, "grad", grad)
    if tuple(grad.shape) != tuple(size):
        msg = f"secateur::{op}: expected grad of shape {tuple(size)}, got {tuple(grad.shape)}"
        raise ValueError(msg)


def check_fake_quantize(weight: Tensor, mask: Tensor, scale: Tensor, lowest: int, highest: int) -> None:
    """Raise `ValueError` if weight, mask, scale and range do not go together."""
    op = "mask_fake_quantize"
    _check_float(op, "weight", weight)
    _check_float(op, "scale", scale)
    if weight.dim() < 1 or scale.shape != weight.shape[:1]:
        msg = (
            f"secateur::{op}: expected weight of shape (rows, ...) and scale of shape (rows,), "
            f"got {tuple(weight.shape)} and {tuple(scale.shape)}"
        )
        raise ValueError(msg)
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        msg = (
            f"secateur::{op}: expected mask to be torch.bool of shape {tuple(weight.shape)}, "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
        raise ValueError(msg)
    if not -(2**20) <= lowest < highest <= 2**20:
        msg = f"secateur::{op}: expected -2**20 <= lowest < highest <= 2**20, got {lowest} and {highest}"
        raise ValueError(msg)


def _check_float(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.float32:
        msg = f"secateur::{op}: expected {name} to be torch.float32, got {tensor.dtype}"
        raise ValueError(msg)
