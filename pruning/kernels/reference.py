"""What the kernels compute, written with PyTorch's dense operators: slow, for any dtype, and the truth in the tests."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS = ("none", "relu", "relu6", "silu", "gelu", "hardswish", "sigmoid", "hardsigmoid")
"""Names by their number in ``csrc/layer.h``. ``gelu`` is the exact one, by the error function."""


def activate(x: Tensor, activation: str) -> Tensor:
    """``x`` after the activation of that name."""
    if activation == "none":
        return x
    function = torch.sigmoid if activation == "sigmoid" else getattr(functional, activation)
    result: Tensor = function(x)
    return result


def activation_grad(grad: Tensor, before: Tensor, activation: str) -> Tensor:
    """Gradient before the activation, from the gradient after it and the values ``before`` it."""
    if activation == "none":
        return grad
    if activation == "relu":
        return grad * (before > 0)
    if activation == "relu6":
        return grad * ((before > 0) & (before < 6))
    if activation == "silu":
        sigmoid = torch.sigmoid(before)
        return grad * sigmoid * (1 + before * (1 - sigmoid))
    if activation == "gelu":
        density = torch.exp(-0.5 * before * before) * 0.3989422804014327
        return grad * (0.5 * (1 + torch.erf(before * 0.7071067811865476)) + before * density)
    if activation == "sigmoid":
        sigmoid = torch.sigmoid(before)
        return grad * sigmoid * (1 - sigmoid)
    if activation == "hardsigmoid":
        return grad * ((before > -3) & (before < 3)) / 6
    return grad * torch.where(before <= -3, 0.0, torch.where(before < 3, before / 3 + 0.5, 1.0))


def sparse_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
) -> Tensor:
    """``activation(conv2d(x, weight) + bias + residual)`` with a dense ``weight`` that holds zeros."""
    out = functional.conv2d(x, weight, bias, stride, padding, dilation)
    return activate(out if residual is None else out + residual, activation)


def sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    """``activation(linear(x, weight) + bias + residual)`` with a dense ``weight`` that holds zeros."""
    out = functional.linear(x, weight, bias)
    return activate(out if residual is None else out + residual, activation)


def mask_fake_quantize(weight: Tensor, mask: Tensor, scale: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    """Masked and fake-quantized weight, and where its gradient passes.

    ``out = mask * clamp(round(weight / scale), lowest, highest) * scale``, with one scale for each row.

    Args:
        weight: of shape ``(rows, ...)``.
        mask: boolean, of the same shape; False where the weight is zero.
        scale: of shape ``(rows,)``, positive.
        lowest: least integer level.
        highest: greatest integer level.
    """
    per_row = scale.reshape(-1, *[1] * (weight.dim() - 1))
    level = torch.round(weight * (1.0 / per_row))
    is_inside = mask & (level >= lowest) & (level <= highest)
    return torch.where(mask, level.clamp(lowest, highest) * per_row, 0.0), is_inside
