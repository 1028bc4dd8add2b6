from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from pruning.kernels import reference
from pruning.kernels.formats import BLOCKS, SparseWeight, pack
from pruning.kernels.functional import mask_fake_quantize, sparse_conv2d, sparse_linear
from pruning.kernels.native import library
from pruning.kernels.reference import ACTIVATIONS

from .layers import GEOMETRIES, Geometry, assert_as_exact_as_torch, available_sets, compiled, sparse


def compare_conv2d(geometry: Geometry, block: int, density: float, activation: str, seed: int = 0) -> None:
    """Run one layer, with bias and residual, and compare it with float64."""
    generator = torch.Generator().manual_seed(seed)
    out_channels = geometry.out_channels + (3 if block == 1 else 0)
    shape = (out_channels, geometry.x[1], *geometry.kernel)
    weight, mask = sparse(shape, block, density, generator)
    x, bias = torch.randn(geometry.x, generator=generator), torch.randn(out_channels, generator=generator)
    window = (list(geometry.stride), list(geometry.padding), list(geometry.dilation))
    size = reference.sparse_conv2d(x, weight, None, None, *window, "none").shape
    residual = torch.randn(size, generator=generator)
    tensors = (x, weight, bias, residual)

    found = sparse_conv2d(
        x,
        pack(weight, block, mask),
        bias,
        residual,
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        activation=activation,
    )

    exact = reference.sparse_conv2d(*(tensor.double() for tensor in tensors), *window, activation)
    assert_as_exact_as_torch(found, reference.sparse_conv2d(*tensors, *window, activation), exact)


@compiled
@pytest.mark.parametrize("instruction_set", available_sets())
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("block", BLOCKS)
def test_a_sparse_convolution_is_as_exact_as_a_dense_one(instruction_set: str, geometry: Geometry, block: int) -> None:
    native = library()
    assert native is not None
    with native.using(instruction_set):
        for density in (0.0, 0.2, 1.0):
            compare_conv2d(geometry, block, density, "none")


@compiled
@pytest.mark.parametrize("instruction_set", available_sets())
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["same", "1x1", "1x1, whole vectors"])
def test_activations_are_as_exact_as_torch(instruction_set: str, activation: str, name: str) -> None:
    native = library()
    assert native is not None
    with native.using(instruction_set):
        for block in (1, 16):
            compare_conv2d(GEOMETRIES[name], block, 0.3, activation)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", ["same", "several strips", "1x1, whole vectors"])
def test_two_threads_give_the_same_bits_as_one(block: int, name: str) -> None:
    geometry = GEOMETRIES[name]
    generator = torch.Generator().manual_seed(0)
    weight, _ = sparse((geometry.out_channels, geometry.x[1], *geometry.kernel), block, 0.3, generator)
    x, packed = torch.randn(geometry.x, generator=generator), pack(weight, block)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(sparse_conv2d(x, packed, padding=geometry.padding, activation="relu"))
    finally:
        torch.set_num_threads(before)

    assert torch.equal(*found)


@pytest.mark.parametrize("batch", [(), (1,), (2,), (5,), (16,), (33,), (2, 7)])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_a_sparse_linear_layer_is_as_exact_as_a_dense_one(batch: tuple[int, ...], block: int, density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    out_features = 32 + (2 if block == 1 else 0)
    weight, mask = sparse((out_features, 45), block, density, generator)
    x, bias = torch.randn(*batch, 45, generator=generator), torch.randn(out_features, generator=generator)
    residual = torch.randn(*batch, out_features, generator=generator)
    tensors = (x, weight, bias, residual)

    for activation in ACTIVATIONS:
        found = sparse_linear(x, pack(weight, block, mask), bias, residual, activation=activation)

        exact = reference.sparse_linear(*(tensor.double() for tensor in tensors), activation)
        assert_as_exact_as_torch(found, reference.sparse_linear(*tensors, activation), exact)


@pytest.mark.parametrize("instruction_set", [None, *available_sets()])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_channels_last_gives_the_values_of_channels_first_in_its_own_layout(
    instruction_set: str | None, geometry: Geometry, block: int, activation: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = pack(sparse((24, geometry.x[1], *geometry.kernel), block, 0.3, generator)[0], block)
    x = torch.randn(geometry.x, generator=generator, requires_grad=True)
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    window = {"stride": geometry.stride, "padding": geometry.padding, "dilation": geometry.dilation}
    bias, values = torch.randn(24, generator=generator), weight.values.requires_grad_()
    native = library()
    used = native.using(instruction_set) if native and instruction_set else nullcontext()

    with used:
        expected = sparse_conv2d(x, weight, bias, **window, activation=activation)
        found = sparse_conv2d(last, weight, bias, **window, activation=activation)
        upstream = torch.randn(expected.shape, generator=generator)
        wanted = torch.autograd.grad(expected, (x, values), upstream)
        gradients = torch.autograd.grad(found, (last, values), upstream)

    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert gradients[0].is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_an_input_in_another_layout_gives_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = pack(sparse((16, 8, 3, 3), 4, 0.3, generator)[0], 4)
    x = torch.randn(2, 8, 9, 9, generator=generator)
    expected = sparse_conv2d(x, weight)

    assert torch.equal(sparse_conv2d(x.contiguous(memory_format=torch.channels_last), weight), expected)
    assert torch.equal(sparse_conv2d(x.transpose(2, 3).contiguous().transpose(2, 3), weight), expected)


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_a_linear_layer_reads_inputs_and_residuals_of_any_strides(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(256, 200, generator=generator)
    x = torch.randn(200, rows, generator=generator).t()
    residual = torch.randn(256, rows, generator=generator).t()

    found = sparse_linear(x, pack(dense, 16), None, residual)

    torch.testing.assert_close(found, x @ dense.t() + residual, rtol=1e-4, atol=1e-4)


def test_an_empty_batch_gives_an_empty_output() -> None:
    weight = pack(torch.ones(4, 3, 3, 3), 4)

    assert sparse_conv2d(torch.zeros(0, 3, 8, 8), weight).shape == (0, 4, 6, 6)
    assert sparse_linear(torch.zeros(0, 3), pack(torch.ones(4, 3), 4)).shape == (0, 4)


@compiled  # the dense fallback multiplies the zeros too
def test_not_a_number_passes_through_relu_as_in_torch() -> None:
    weight = pack(torch.eye(4), 1)
    x = torch.tensor([[float("nan"), -1.0, 2.0, float("inf")]])

    found = sparse_linear(x[:, [0, 1, 2, 2]], weight, activation="relu")

    assert found[0, 0].isnan()
    assert found[0, 1:].tolist() == [0.0, 2.0, 2.0]


@pytest.mark.parametrize("size", [(3, 5), (7, 19, 3, 3), (1, 64)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mask_and_fake_quantize_in_one_pass_equals_the_three_steps(size: tuple[int, ...], bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, generator=generator, requires_grad=True)
    mask = torch.rand(size, generator=generator) < 0.5
    scale = torch.rand(size[0], generator=generator) * 0.2 + 0.05
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    found = mask_fake_quantize(weight, mask, scale, lowest, highest)
    upstream = torch.randn(size, generator=generator)
    found.backward(upstream)

    zeros = torch.zeros(size[0], dtype=torch.int32)
    leaf = weight.detach().clone().requires_grad_()
    expected = mask * torch.fake_quantize_per_channel_affine(leaf, scale, zeros, 0, lowest, highest)
    expected.backward(upstream)
    assert torch.equal(found, expected)
    torch.testing.assert_close(weight.grad, leaf.grad, rtol=0, atol=0)


def conv2d(**changes: Any) -> Callable[[], Tensor]:
    """A call of a small convolution with some arguments changed."""
    arguments: dict[str, Any] = {"x": torch.ones(1, 3, 5, 5), "weight": pack(torch.ones(4, 3, 3, 3), 4)}
    return lambda: sparse_conv2d(**(arguments | changes))


def corrupt(**changes: Any) -> SparseWeight:
    """A weight whose tensors do not go together."""
    good = pack(torch.ones(4, 3, 3, 3), 4)
    fields: dict[str, Any] = {"values": good.values, "columns": good.columns, "counts": good.counts}
    return SparseWeight(**(fields | {"shape": good.shape, "block": good.block} | changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            conv2d(groups=3),
            "secateur::sparse_conv2d: expected groups of 1, got 3; keep grouped convolutions dense",
        ),
        (
            conv2d(x=torch.ones(1, 3, 5, 5).double()),
            "secateur::sparse_conv2d: expected x to be torch.float32, got torch.float64",
        ),
        (
            conv2d(x=torch.ones(3, 5, 5)),
            "secateur::sparse_conv2d: expected x of shape (batch, in, height, width), got (3, 5, 5)",
        ),
        (
            conv2d(x=torch.ones(1, 3, 2, 5)),
            "secateur::sparse_conv2d: expected an input no smaller than the kernel, got height and width (2, 5) for "
            "kernel_size [3, 3], padding [0, 0] and dilation [1, 1]",
        ),
        (
            conv2d(stride=(0, 1)),
            "secateur::sparse_conv2d: expected kernel_size, stride and dilation of at least 1 and padding of at least "
            "0, got [3, 3], [0, 1], [1, 1] and [0, 0]",
        ),
        (
            conv2d(activation="tanh"),
            "secateur::sparse_conv2d: expected an activation among none, relu, relu6, silu, gelu, hardswish, "
            "sigmoid, hardsigmoid, got 'tanh'",
        ),
        (conv2d(bias=torch.ones(3)), "secateur::sparse_conv2d: expected bias of shape (4,), got (3,)"),
        (
            conv2d(residual=torch.ones(1, 4, 5, 5)),
            "secateur::sparse_conv2d: expected residual of shape (1, 4, 3, 3), got (1, 4, 5, 5)",
        ),
        (
            conv2d(x=torch.ones(1, 9, 5, 5)),
            "secateur::sparse_conv2d: expected x of shape (batch, 3, height, width) for a weight of shape "
            "(4, 3, 3, 3), got (1, 9, 5, 5)",
        ),
        (
            lambda: sparse_linear(torch.ones(2, 9), pack(torch.ones(4, 3), 4)),
            "secateur::sparse_linear: expected x of shape (..., in) for a weight of shape (out, in, 1, 1), "
            "got (2, 9) for (4, 3, 1, 1)",
        ),
        (
            lambda: sparse_linear(torch.ones(2, 3), pack(torch.ones(4, 3, 1, 2), 4)),
            "secateur::sparse_linear: expected x of shape (..., in) for a weight of shape (out, in, 1, 1), "
            "got (2, 3) for (4, 3, 1, 2)",
        ),
        (
            conv2d(x=torch.ones(1, 2, 5, 5), weight=corrupt(shape=(4, 2, 3, 3))),
            "secateur::sparse_conv2d: expected columns from 0 to 17, got 0 to 26",
        ),
        (
            conv2d(weight=corrupt(values=torch.ones(5))),
            "secateur::sparse_conv2d: expected values of shape (108,) for this pattern, got (5,)",
        ),
        (
            conv2d(weight=corrupt(counts=torch.ones(1, 1, dtype=torch.int32))),
            "secateur::sparse_conv2d: expected counts that add up to the 27 columns, got 1",
        ),
        (
            conv2d(weight=corrupt(counts=torch.ones(1, 2, dtype=torch.int32))),
            "secateur::sparse_conv2d: expected counts of shape (chunks, 1), got (1, 2)",
        ),
        (
            conv2d(weight=corrupt(columns=torch.ones(27))),
            "secateur::sparse_conv2d: expected columns to be contiguous torch.int32 of 1 dimension(s), "
            "got torch.float32 of shape (27,)",
        ),
        (conv2d(weight=corrupt(block=5)), "secateur::sparse_conv2d: expected a block of 1, 4, 8, 16, got 5"),
        (
            lambda: mask_fake_quantize(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2), -1, 1),
            "secateur::mask_fake_quantize: expected mask to be torch.bool of shape (2, 3), "
            "got torch.float32 of shape (2, 3)",
        ),
        (
            lambda: mask_fake_quantize(torch.ones(2, 3), torch.ones(2, 3) > 0, torch.ones(3), -1, 1),
            "secateur::mask_fake_quantize: expected weight of shape (rows, ...) and scale of shape (rows,), "
            "got (2, 3) and (3,)",
        ),
        (
            lambda: mask_fake_quantize(torch.ones(2, 3), torch.ones(2, 3) > 0, torch.ones(2), 1, 1),
            "secateur::mask_fake_quantize: expected -2**20 <= lowest < highest <= 2**20, got 1 and 1",
        ),
    ],
)
def test_what_an_operator_cannot_take_is_named(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()
