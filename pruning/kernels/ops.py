"""Sparse layers as PyTorch operators: schema, checks, fake implementation, gradients.

Usable in eager mode, under `torch.compile` and in `torch.export`. All are for float32 on the CPU. Convolutions give
their output channels last where the input is so and no residual is added. An input in any other layout is copied;
weights never are. Where the compiled library is missing, the same operators run on
`reference.py`. Gradients cannot be differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from . import reference
from .checks import check_epilogue, check_fake_quantize, check_grad, check_values, conv2d_size, linear_size
from .formats import positions_of, unpack
from .gradients import layout_of, register_gradients
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


class _Conv2d(NamedTuple):
    """One call of ``sparse_conv2d``."""

    x: Tensor
    values: Tensor
    columns: Tensor
    counts: Tensor
    bias: Tensor | None
    residual: Tensor | None
    out_channels: int
    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    block: int
    activation: str

    def fake(self) -> Tensor:
        """Check the arguments and give an output without values."""
        op, window = "sparse_conv2d", (self.kernel_size, self.stride, self.padding, self.dilation)
        out_size = conv2d_size(op, self.x, self.out_channels, *window)
        check_epilogue(op, self.bias, self.residual, self.out_channels, out_size, self.activation)
        return _empty(self.x, out_size, self._layout())

    def _layout(self) -> torch.memory_format:
        return layout_of(self.x) if self.residual is None else torch.contiguous_format

    def real(self) -> Tensor:
        """Run the operator."""
        out, layout = self.fake(), self._layout()
        weight_shape = (self.out_channels, self.x.shape[1], *self.kernel_size)
        pattern = pattern_of("sparse_conv2d", self.columns, self.counts, weight_shape, self.block)
        check_values("sparse_conv2d", self.values, pattern.n_values)
        native = library()
        if native is None:
            weight = unpack(self.values, self.columns, self.counts, pattern.shape, self.block)
            window = (list(self.stride), list(self.padding), list(self.dilation))
            return reference.sparse_conv2d(
                self.x, weight, self.bias, self.residual, *window, self.activation
            ).contiguous(memory_format=layout)
        sizes = (*self.kernel_size, *self.stride, *self.padding, *self.dilation)
        shape = Shape(*self.x.shape, *out.shape[1:], *sizes, layout == torch.channels_last)
        x, values, bias = self.x.contiguous(memory_format=layout), self.values.contiguous(), _contiguous(self.bias)
        return _run_conv2d(native, shape, pattern, x, values, bias, _contiguous(self.residual), self.activation)


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
    size = (shape.batch, shape.out_channels, shape.out_height, shape.out_width)
    out = _empty(x, size, torch.channels_last if shape.channels_last else torch.contiguous_format)
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
        return grad_x.contiguous(memory_format=layout_of(grad))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
    spread, rest = _spread(grad, input_size[2:], reach, stride, padding)
    transposed = pattern.transposed()
    back_shape = (input_size[1], grad.shape[1], *kernel_size)
    back = pattern_of(op, transposed.columns, transposed.counts, back_shape, 1)
    is_last = layout_of(grad) == torch.channels_last
    shape = Shape(*spread.shape, *input_size[1:], *kernel_size, 1, 1, *rest, *dilation, is_last)
    return _run_conv2d(native, shape, back, spread, values[transposed.order], None, None, "none")


def _spread(
    grad: Tensor, input_size: Sequence[int], reach: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """``grad`` as the input of the transposed layer, and the padding that is left to do.

    A stride becomes zeros between the values; padding wider than the kernel reaches cuts the border off.
    """
    layout = layout_of(grad)
    sizes = [n + 2 * p - r for n, p, r in zip(input_size, padding, reach, strict=True)]
    if tuple(stride) != (1, 1):
        spread = _empty(grad, (*grad.shape[:2], *sizes), layout).zero_()
        spread[:, :, :: stride[0], :: stride[1]] = grad
        grad = spread
    rest = [r - p for r, p in zip(reach, padding, strict=True)]
    top, left = (max(0, -left_over) for left_over in rest)
    grad = grad[:, :, top : sizes[0] - top, left : sizes[1] - left]
    return grad.contiguous(memory_format=layout), [max(0, left_over) for left_over in rest]


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
        layout = layout_of(x)
        sizes = (*kernel_size, *stride, *padding, *dilation)
        shape = Shape(*x.shape, *grad.shape[1:], *sizes, layout == torch.channels_last)
        x, grad = x.contiguous(memory_format=layout), grad.contiguous(memory_format=layout)
        weight_struct = pattern.native(values, pattern.gradient_offsets(native, shape))
        native.values_grad(shape, weight_struct, x, grad, out)
    return out


class _Linear(NamedTuple):
    """One call of ``sparse_linear``."""

    x: Tensor
    values: Tensor
    columns: Tensor
    counts: Tensor
    bias: Tensor | None
    residual: Tensor | None
    out_features: int
    block: int
    activation: str

    def fake(self) -> Tensor:
        """Check the arguments and give an output without values."""
        out_size = linear_size("sparse_linear", self.x, self.out_features)
        check_epilogue("sparse_linear", self.bias, self.residual, self.out_features, out_size, self.activation)
        return self.x.new_empty(out_size)

    def real(self) -> Tensor:
        """Run the operator."""
        out, in_features = self.fake(), self.x.shape[-1]
        weight_shape = (self.out_features, in_features, 1, 1)
        pattern = pattern_of("sparse_linear", self.columns, self.counts, weight_shape, self.block)
        check_values("sparse_linear", self.values, pattern.n_values)
        native = library()
        if native is None:
            weight = unpack(self.values, self.columns, self.counts, weight_shape[:2], self.block)
            return reference.sparse_linear(self.x, weight, self.bias, self.residual, self.activation).contiguous()
        rows, values, bias = self.x.reshape(-1, in_features), self.values.contiguous(), _contiguous(self.bias)
        added = None if self.residual is None else self.residual.reshape(-1, self.out_features)
        if len(rows) <= max(2, self.block):
            added = _contiguous(added)  # the structure holds addresses alone
            epilogue = Epilogue(pointer(bias), pointer(added), ACTIVATIONS.index(self.activation))
            sums = out.reshape(-1, self.out_features)
            native.linear_rows(pattern.native(values, self.columns), epilogue, rows.contiguous(), sums)
            return out
        # Many rows are the pixels of a 1x1 convolution.
        shape = Shape(1, in_features, 1, len(rows), self.out_features, 1, len(rows), 1, 1, 1, 1, 0, 0, 1, 1, 0)
        turned = None if added is None else added.t().contiguous()
        image = _run_conv2d(native, shape, pattern, rows.t().contiguous(), values, bias, turned, self.activation)
        return image.reshape(self.out_features, -1).t().contiguous().reshape(out.shape)


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


def _conv2d_input_grad_fake(
    grad: Tensor, values: Tensor, columns: Tensor, counts: Tensor, input_size: Sequence[int], *_: Any
) -> Tensor:
    return _empty(grad, input_size, layout_of(grad))


def _conv2d_values_grad_fake(grad: Tensor, x: Tensor, values: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _mask_fake_quantize_fake(
    weight: Tensor, mask: Tensor, scale: Tensor, lowest: int, highest: int
) -> tuple[Tensor, Tensor]:
    check_fake_quantize(weight, mask, scale, lowest, highest)
    return weight.new_empty(weight.shape), mask.new_empty(mask.shape)


def _empty(like: Tensor, size: Sequence[int], layout: torch.memory_format) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "sparse_conv2d": (lambda *call: _Conv2d(*call).real(), lambda *call: _Conv2d(*call).fake()),
    "sparse_conv2d_input_grad": (_conv2d_input_grad, _conv2d_input_grad_fake),
    "sparse_conv2d_values_grad": (_conv2d_values_grad, _conv2d_values_grad_fake),
    "sparse_linear": (lambda *call: _Linear(*call).real(), lambda *call: _Linear(*call).fake()),
    "mask_fake_quantize": (_mask_fake_quantize, _mask_fake_quantize_fake),
}
for _name, (_real, _fake) in _IMPLEMENTATIONS.items():
    torch.library.impl(f"secateur::{_name}", "CPU", _real)
    torch.library.register_fake(f"secateur::{_name}", _fake)
register_gradients()
