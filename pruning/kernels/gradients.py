"""Gradients of the sparse operators, themselves sparse: with respect to inputs, values, bias and residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reference import activation_grad


def layout_of(x: Tensor) -> torch.memory_format:
    """Whether a convolution reads ``x`` channels last; where both layouts are the same one, channels first."""
    is_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


_OF_OUTPUT = ("relu", "relu6")
"""Activations whose derivative can be read off their output."""


def _save_conv2d(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, columns, counts, bias, residual, _, kernel_size, stride, padding, dilation, block, activation = inputs
    ctx.save_for_backward(x, values, columns, counts, bias, residual, output if activation in _OF_OUTPUT else None)
    ctx.window = (kernel_size, stride, padding, dilation, block)
    ctx.activation = activation


@once_differentiable
def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, columns, counts, bias, residual, output = ctx.saved_tensors
    pattern = (values, columns, counts)
    if ctx.activation != "none":
        if output is None:
            # Keeping the sums of every layer would cost as much memory as the activations do; they are computed again.
            output = torch.ops.secateur.sparse_conv2d(x, *pattern, bias, residual, grad.shape[1], *ctx.window, "none")
        grad = activation_grad(grad, output, ctx.activation)
    grad = grad.contiguous(memory_format=layout_of(x))
    needs = ctx.needs_input_grad
    grad_x = grad_values = None
    if needs[0]:
        grad_x = torch.ops.secateur.sparse_conv2d_input_grad(grad, *pattern, x.shape, *ctx.window)
    if needs[1]:
        grad_values = torch.ops.secateur.sparse_conv2d_values_grad(grad, x, *pattern, *ctx.window)
    grad_bias = grad.sum((0, 2, 3)) if needs[4] else None
    return grad_x, grad_values, None, None, grad_bias, grad if needs[5] else None, *[None] * 7


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, columns, counts, bias, residual, _, block, activation = inputs
    ctx.save_for_backward(x, values, columns, counts, bias, residual, output if activation in _OF_OUTPUT else None)
    ctx.block, ctx.activation = block, activation


@once_differentiable
def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, columns, counts, bias, residual, output = ctx.saved_tensors
    pattern = (values, columns, counts)
    if ctx.activation != "none":
        if output is None:
            output = torch.ops.secateur.sparse_linear(x, *pattern, bias, residual, grad.shape[-1], ctx.block, "none")
        grad = activation_grad(grad, output, ctx.activation)
    needs = ctx.needs_input_grad
    if not grad.numel():  # an image of no pixels is none
        zeros = [None if tensor is None else torch.zeros_like(tensor) for tensor in (x, values, bias)]
        return zeros[0], zeros[1], None, None, zeros[2], grad if needs[5] else None, None, None, None
    # The rows of a linear layer are the pixels of one image of a 1x1 convolution.
    window = ([1, 1], [1, 1], [0, 0], [1, 1], ctx.block)
    image_grad = grad.reshape(-1, grad.shape[-1]).t().contiguous()[None, :, None]
    grad_x = grad_values = None
    if needs[0]:
        size = [1, x.shape[-1], 1, image_grad.shape[-1]]
        image = torch.ops.secateur.sparse_conv2d_input_grad(image_grad, *pattern, size, *window)
        grad_x = image[0, :, 0].t().reshape(x.shape)
    if needs[1]:
        image = x.reshape(-1, x.shape[-1]).t().contiguous()[None, :, None]
        grad_values = torch.ops.secateur.sparse_conv2d_values_grad(image_grad, image, *pattern, *window)
    grad_bias = image_grad.sum((0, 2, 3)) if needs[4] else None
    return grad_x, grad_values, None, None, grad_bias, grad if needs[5] else None, None, None, None


def _save_fake_quantize(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _fake_quantize_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (is_inside,) = ctx.saved_tensors
    return None if grad is None else grad * is_inside, None, None, None, None


def register_gradients() -> None:
    """Tell PyTorch how to differentiate the operators of `ops.py`, which calls this once they are defined."""
    torch.library.register_autograd("secateur::sparse_conv2d", _conv2d_backward, setup_context=_save_conv2d)
    torch.library.register_autograd("secateur::sparse_linear", _linear_backward, setup_context=_save_linear)
    torch.library.register_autograd(
        "secateur::mask_fake_quantize", _fake_quantize_backward, setup_context=_save_fake_quantize
    )
