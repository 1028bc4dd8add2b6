"""Sparse layers as PyTorch operators: schema, checks, fake implementation, gradients.

Usable in eager mode, under `torch.compile` and in `torch.export`. All are for float32 on the CPU. An input that is not
contiguous is copied; weights never are. Where the compiled library is missing, the same operators run on
`reference.py`. Gradients of gradients are not defined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from . import reference
from .checks import check_epilogue, check_fake_quantize, check_grad, check_values, conv2d_size, linear_size
from .formats import positions_of, unpack
from .gradients import register_gradients
from .native import Epilogue, Library, Shape, library, pointer
from .patterns import Pattern, pattern_of
from .reference import ACTIVATIONS

_PATTERN = "Tensor values, Tensor columns, Tensor counts"
_WINDOW = "int[2] stride, int[2] padding, int[2] dilation"

torch.library.define(
    "secateur::sparse_conv2d",
    f"(Tensor x, {_PATTERN}, Tensor? bias, Tensor? residual, int out_channels, int[2] kernel_size, {_WINDOW}, "
    "int block, str activation) -> Tensor",
)
torch.library.define(
    "secateur::sparse_conv2d_input_grad",
    f"(Tensor grad, {_PATTERN}, int[] input_size, int[2] kernel_size, {_WINDOW}, int block) -> Tensor",
)
torch.library.define(
    "secateur::sparse_conv2d_values_grad",
    f"(Tensor grad, Tensor x, {_PATTERN}, int[2] kernel_size, {_WINDOW}, int block) -> Tensor",
)
torch.library.define(
    "secateur::sparse_linear",
    f"(Tensor x, {_PATTERN}, Tensor? bias, Tensor? residual, int out_features, int block, str activation) -> Tensor",
)
torch.library.define(
    "secateur::mask_fake_quantize",
    "(Tensor weight, Tensor mask, Tensor scale, int lowest, int highest) -> (Tensor, Tensor)",
)


def _conv2d(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    counts: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    block: int,
    activation: str,
) -> Tensor:
    op = "sparse_conv2d"
    out_size = conv2d_size(op, x, out_channels, kernel_size, stride, padding, dilation)
    check_epilogue(op, bias, residual, out_channels, out_size, activation)
    pattern = pattern_of(op, columns, counts, (out_channels, x.shape[1], *kernel_size), block)
    check_values(op, values, pattern.n_values)
    native = library()
    if native is None:
        weight = unpack(values, columns, counts, pattern.shape, block)
        window = (list(stride), list(padding), list(dilation))
        return reference.sparse_conv2d(x, weight, bias, residual, *window, activation).contiguous()
    shape = Shape(*x.shape, *out_size[1:], *kernel_size, *stride, *padding, *dilation)
    x, values, bias = x.contiguous(), values.contiguous(), _contiguous(bias)
    return _run_conv2d(native, shape, pattern, x, values, bias, _contiguous(residual), activation)


def _run_conv2d(
    native: Library,
    shape: Shape,
    pattern: Pattern,
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    out = x.new_empty(shape.batch, shape.out_channels, shape.out_height, shape.out_width)
    if out.numel():
        weight = pattern.native(values, pattern.offsets(native, shape))
        epilogue = Epilogue(pointer(bias), pointer(residual), ACTIVATIONS.index(activation))
        native.conv2d(shape, weight, epilogue, x, out)
    return out


def _conv2d_input_grad(
    grad: Tensor,
    values: Tensor,
    columns: Tensor,
    counts: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    block: int,
) -> Tensor:
    op = "sparse_conv2d_input_grad"
    # Only sizes are read, so the values stand in for an input that need not exist.
    out_size = conv2d_size(op, values.new_empty(input_size), grad.shape[1], kernel_size, stride, padding, dilation)
    check_grad(op, grad, out_size)
    pattern = pattern_of(op, columns, counts, (grad.shape[1], input_size[1], *kernel_size), block)
    check_values(op, values, pattern.n_values)
    native = library()
    if native is None:
        weight = unpack(values, columns, counts, pattern.shape, block)
        window = (list(stride), list(padding), list(dilation))
        grad_x: Tensor = conv2d_input(list(input_size), weight, grad, *window)
        return grad_x.contiguous()
    reach = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
    spread, rest = _spread(grad, input_size[2:], reach, stride, padding)
    transposed = pattern.transposed()
    back_shape = (input_size[1], grad.shape[1], *kernel_size)
    back = pattern_of(op, transposed.columns, transposed.counts, back_shape, 1)
    shape = Shape(*spread.shape, *input_size[1:], *kernel_size, 1, 1, *rest, *dilation)
    return _run_conv2d(native, shape, back, spread, values[transposed.order], None, None, "none")


def _spread(
    grad: Tensor, input_size: Sequence[int], reach: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """``grad`` as the input of the transposed layer, and the padding that is left to do.

    A stride becomes zeros between the values; padding wider than the kernel reaches cuts the border off.
    """
    sizes = [n + 2 * p - r for n, p, r in zip(input_size, padding, reach, strict=True)]
    if tuple(stride) != (1, 1):
        spread = grad.new_zeros(*grad.shape[:2], *sizes)
        spread[:, :, :: stride[0], :: stride[1]] = grad
        grad = spread
    rest = [r - p for r, p in zip(reach, padding, strict=True)]
    top, left = (max(0, -left_over) for left_over in rest)
    grad = grad[:, :, top : sizes[0] - top, left : sizes[1] - left]
    return grad.contiguous(), [max(0, left_over) for left_over in rest]


def _conv2d_values_grad(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    counts: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    block: int,
) -> Tensor:
    op = "sparse_conv2d_values_grad"
    check_grad(op, grad, conv2d_size(op, x, grad.shape[1], kernel_size, stride, padding, dilation))
    pattern = pattern_of(op, columns, counts, (grad.shape[1], x.shape[1], *kernel_size), block)
    check_values(op, values, pattern.n_values)
    native = library()
    if native is None:
        window = (list(stride), list(padding), list(dilation))
        dense: Tensor = conv2d_weight(x, list(pattern.shape), grad, *window)
        return dense.reshape(-1)[positions_of(columns, counts, block, dense[0].numel())]
    out = torch.zeros_like(values, memory_format=torch.contiguous_format)
    if out.numel() and grad.numel():
        shape = Shape(*x.shape, *grad.shape[1:], *kernel_size, *stride, *padding, *dilation)
        weight_struct = pattern.native(values, pattern.offsets(native, shape))
        native.values_grad(shape, weight_struct, x.contiguous(), grad.contiguous(), out)
    return out


def _linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    counts: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    block: int,
    activation: str,
) -> Tensor:
    op = "sparse_linear"
    out_size = linear_size(op, x, out_features)
    check_epilogue(op, bias, residual, out_features, out_size, activation)
    pattern = pattern_of(op, columns, counts, (out_features, x.shape[-1], 1, 1), block)
    check_values(op, values, pattern.n_values)
    native = library()
    if native is None:
        weight = unpack(values, columns, counts, (out_features, x.shape[-1]), block)
        return reference.sparse_linear(x, weight, bias, residual, activation).contiguous()
    rows, values, bias = x.reshape(-1, x.shape[-1]), values.contiguous(), _contiguous(bias)
    added = None if residual is None else residual.reshape(-1, out_features)
    if len(rows) <= max(2, block):
        out = x.new_empty(len(rows), out_features)
        epilogue = Epilogue(pointer(bias), pointer(_contiguous(added)), ACTIVATIONS.index(activation))
        native.linear_rows(pattern.native(values, columns), epilogue, rows.contiguous(), out)
        return out.reshape(out_size)
    # Many rows are the pixels of a 1x1 convolution.
    shape = Shape(1, x.shape[-1], 1, len(rows), out_features, 1, len(rows), 1, 1, 1, 1, 0, 0, 1, 1)
    turned = None if added is None else added.t().contiguous()
    out = _run_conv2d(native, shape, pattern, rows.t().contiguous(), values, bias, turned, activation)
    return out.reshape(out_features, -1).t().contiguous().reshape(out_size)


def _mask_fake_quantize(
    weight: Tensor, mask: Tensor, scale: Tensor, lowest: int, highest: int
) -> tuple[Tensor, Tensor]:
    check_fake_quantize(weight, mask, scale, lowest, highest)
    native = library()
    if native is None or not weight.numel():
        out, is_inside = reference.mask_fake_quantize(weight, mask, scale, lowest, highest)
        return out.contiguous(), is_inside.contiguous()
    weight, mask, scale = weight.contiguous(), mask.contiguous(), scale.contiguous()
    out, is_inside = torch.empty_like(weight), torch.empty_like(mask)
    native.mask_fake_quantize(weight, mask, scale, lowest, highest, out, is_inside)
    return out, is_inside


def _conv2d_fake(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    counts: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    block: int,
    activation: str,
) -> Tensor:
    op = "sparse_conv2d"
    out_size = conv2d_size(op, x, out_channels, kernel_size, stride, padding, dilation)
    check_epilogue(op, bias, residual, out_channels, out_size, activation)
    return x.new_empty(out_size)


def _conv2d_input_grad_fake(
    grad: Tensor, values: Tensor, columns: Tensor, counts: Tensor, input_size: Sequence[int], *_: Any
) -> Tensor:
    return grad.new_empty(input_size)


def _conv2d_values_grad_fake(grad: Tensor, x: Tensor, values: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _linear_fake(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    counts: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    block: int,
    activation: str,
) -> Tensor:
    out_size = linear_size("sparse_linear", x, out_features)
    check_epilogue("sparse_linear", bias, residual, out_features, out_size, activation)
    return x.new_empty(out_size)


def _mask_fake_quantize_fake(
    weight: Tensor, mask: Tensor, scale: Tensor, lowest: int, highest: int
) -> tuple[Tensor, Tensor]:
    check_fake_quantize(weight, mask, scale, lowest, highest)
    return weight.new_empty(weight.shape), mask.new_empty(mask.shape)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "sparse_conv2d": (_conv2d, _conv2d_fake),
    "sparse_conv2d_input_grad": (_conv2d_input_grad, _conv2d_input_grad_fake),
    "sparse_conv2d_values_grad": (_conv2d_values_grad, _conv2d_values_grad_fake),
    "sparse_linear": (_linear, _linear_fake),
    "mask_fake_quantize": (_mask_fake_quantize, _mask_fake_quantize_fake),
}
for _name, (_real, _fake) in _IMPLEMENTATIONS.items():
    torch.library.impl(f"secateur::{_name}", "CPU", _real)
    torch.library.register_fake(f"secateur::{_name}", _fake)
register_gradients()
