from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from pruning.kernels import ops, patterns, reference
from pruning.kernels.formats import SparseWeight, pack, unpack
from pruning.kernels.functional import mask_fake_quantize, sparse_conv2d, sparse_linear
from pruning.kernels.reference import ACTIVATIONS

from .layers import Geometry, sparse

GRADIENT_GEOMETRIES = {
    "same": Geometry((2, 6, 7, 9)),
    "several runs of images": Geometry((19, 6, 7, 9)),
    "strided": Geometry((2, 6, 8, 9), stride=(2, 3)),
    "dilated": Geometry((1, 4, 9, 8), (2, 3), dilation=(2, 1)),
    "wide padding": Geometry((1, 3, 4, 5), (1, 2), padding=(2, 3)),
    "1x1": Geometry((2, 6, 5, 5), (1, 1), padding=(0, 0)),
    "1x1, strided": Geometry((2, 6, 6, 5), (1, 1), stride=(2, 2), padding=(0, 0)),
}


@pytest.mark.parametrize("geometry", GRADIENT_GEOMETRIES.values(), ids=GRADIENT_GEOMETRIES.keys())
@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_a_convolution_are_those_of_the_dense_one(geometry: Geometry, block: int, activation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    packed = pack(sparse((16, geometry.x[1], *geometry.kernel), block, 0.4, generator)[0], block)
    bias = torch.randn(16, generator=generator, requires_grad=True)
    x = torch.randn(geometry.x, generator=generator, requires_grad=True)
    window = {"stride": geometry.stride, "padding": geometry.padding, "dilation": geometry.dilation}
    size = sparse_conv2d(x, packed, **window).shape
    residual = torch.randn(size, generator=generator, requires_grad=True)
    values = packed.values.requires_grad_()
    leaves = (x, values, bias, residual)
    upstream = torch.randn(size, generator=generator)

    found = torch.autograd.grad(
        sparse_conv2d(x, packed, bias, residual, **window, activation=activation), leaves, upstream
    )

    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    dense = unpack(doubles[1], packed.columns, packed.counts, packed.shape, block)
    lists = [list(side) for side in window.values()]
    out = reference.sparse_conv2d(doubles[0], dense, *doubles[2:], *lists, activation)
    for one, exact in zip(found, torch.autograd.grad(out, doubles, upstream.double()), strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("batch", [(1,), (3, 7)])
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("activation", ["none", "relu6", "gelu"])
def test_gradients_of_a_linear_layer_are_those_of_the_dense_one(
    batch: tuple[int, ...], block: int, activation: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    packed = pack(sparse((12, 10), block, 0.4, generator)[0], block)
    leaves = (
        torch.randn(*batch, 10, generator=generator, requires_grad=True),
        packed.values.requires_grad_(),
        torch.randn(12, generator=generator, requires_grad=True),
        torch.randn(*batch, 12, generator=generator, requires_grad=True),
    )
    upstream = torch.randn(*batch, 12, generator=generator)

    found = torch.autograd.grad(sparse_linear(leaves[0], packed, *leaves[2:], activation=activation), leaves, upstream)

    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    dense = unpack(doubles[1], packed.columns, packed.counts, (12, 10), block)
    out = reference.sparse_linear(doubles[0], dense, *doubles[2:], activation)
    for one, exact in zip(found, torch.autograd.grad(out, doubles, upstream.double()), strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("activation", ["none", "relu6", "gelu"])
def test_no_rows_give_gradients_of_zero(activation: str) -> None:
    packed = pack(sparse((12, 10), 4, 0.4, torch.Generator().manual_seed(0))[0], 4)
    x, bias, residual = (torch.ones(size, requires_grad=True) for size in ((0, 10), (12,), (0, 12)))
    leaves = (x, packed.values.requires_grad_(), bias, residual)

    out = sparse_linear(x, packed, bias, residual, activation=activation)
    found = torch.autograd.grad(out.sum(), leaves)

    for one, leaf in zip(found, leaves, strict=True):
        assert torch.equal(one, torch.zeros_like(leaf))


@pytest.mark.parametrize("kernel", [(3, 3), ()], ids=["convolution", "linear"])
def test_gradients_are_not_differentiated_again(kernel: tuple[int, ...]) -> None:
    packed = pack(torch.ones(4, 3, *kernel), 4)
    x = torch.ones(2, 3, *(5 for _ in kernel), requires_grad=True)
    out = sparse_conv2d(x, packed) if kernel else sparse_linear(x, packed)
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def conv2d_arguments(block: int, requires_grad: bool) -> tuple[object, ...]:
    generator = torch.Generator().manual_seed(0)
    packed = pack(sparse((8, 5, 3, 3), block, 0.4, generator)[0], block)
    x = torch.randn(2, 5, 6, 7, generator=generator, requires_grad=requires_grad)
    bias = torch.randn(8, generator=generator, requires_grad=requires_grad)
    residual = torch.randn(2, 8, 3, 4, generator=generator, requires_grad=requires_grad)
    pattern = (packed.values.requires_grad_(requires_grad), packed.columns, packed.counts)
    return x, *pattern, bias, residual, 8, [3, 3], [2, 2], [1, 1], [1, 1], block, "silu"


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # of opcheck itself
@pytest.mark.parametrize("block", [1, 8])
def test_operators_keep_the_rules_of_torch(block: int) -> None:
    arguments = conv2d_arguments(block, True)
    x, *pattern = (argument.detach() for argument in arguments[:4] if isinstance(argument, Tensor))
    grad, window = torch.ones(2, 8, 3, 4), arguments[7:12]
    linear = pack(torch.eye(8), 1)
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    linear_pattern = (linear.values.requires_grad_(), linear.columns, linear.counts)
    operators = torch.ops.secateur

    torch.library.opcheck(operators.sparse_conv2d, arguments)
    torch.library.opcheck(operators.sparse_conv2d_input_grad, (grad, *pattern, list(x.shape), *window))
    torch.library.opcheck(operators.sparse_conv2d_values_grad, (grad, x, *pattern, *window))
    torch.library.opcheck(operators.sparse_linear, (rows, *linear_pattern, None, None, 8, 1, "relu"))
    mask = rows.detach() > 0
    torch.library.opcheck(operators.mask_fake_quantize, (rows, mask, torch.ones(3), -4, 3))


class Net(nn.Module):
    """A sparse convolution, a sparse linear layer and a fake-quantized weight."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.convolution = self._register("convolution", pack(sparse((8, 3, 3, 3), 8, 0.4, generator)[0], 8))
        self.linear = self._register("linear", pack(sparse((6, 8), 1, 0.5, generator)[0], 1))
        self.weight = nn.Parameter(torch.randn(4, 6, generator=generator))

    def _register(self, name: str, weight: SparseWeight) -> tuple[tuple[int, int, int, int], int]:
        self.register_parameter(f"{name}_values", nn.Parameter(weight.values))
        self.register_buffer(f"{name}_columns", weight.columns)
        self.register_buffer(f"{name}_counts", weight.counts)
        return weight.shape, weight.block

    def _weight(self, name: str) -> SparseWeight:
        tensors = (getattr(self, f"{name}_{part}") for part in ("values", "columns", "counts"))
        return SparseWeight(*tensors, *getattr(self, name))

    def forward(self, x: Tensor) -> Tensor:
        x = sparse_conv2d(x, self._weight("convolution"), padding=(1, 1), activation="gelu").mean((2, 3))
        x = sparse_linear(x, self._weight("linear"), activation="relu")
        weight = mask_fake_quantize(self.weight, self.weight > -1, torch.full((4,), 0.1), -8, 7)
        return torch.nn.functional.linear(x, weight)


def test_an_exported_program_computes_what_the_module_computes() -> None:
    model, x = Net().eval(), torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))

    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))

    wider = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    assert torch.equal(program.module()(wider), model(wider))
    names = {str(node.target) for node in program.graph.nodes}
    assert {"secateur.sparse_conv2d.default", "secateur.sparse_linear.default"} <= names


def test_a_compiled_module_computes_and_learns_what_the_module_does() -> None:
    model, x = Net(), torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))

    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))

    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_changed_columns_are_checked_again() -> None:
    weight = pack(torch.ones(4, 3), 4)
    x = torch.ones(1, 3)
    sparse_linear(x, weight)

    weight.columns[0] = 3

    with pytest.raises(ValueError, match=r"^secateur::sparse_linear: expected columns from 0 to 2, got 1 to 3$"):
        sparse_linear(x, weight)


@pytest.mark.parametrize("block", [1, 4])
def test_without_the_library_the_same_operators_give_the_same_numbers(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    packed = pack(sparse((8, 5, 3, 3), block, 0.4, generator)[0], block)
    linear = pack(sparse((8, 5), block, 0.4, generator)[0], block)
    x = torch.randn(2, 5, 7, 6, generator=generator, requires_grad=True)
    mask, scale = x.detach() > 0, torch.ones(2)
    leaves = (x, packed.values.requires_grad_())

    def run() -> list[Tensor]:
        out = sparse_conv2d(x, packed, stride=(2, 1), padding=(1, 1), activation="silu")
        rows = sparse_linear(x[..., 0].transpose(1, 2), linear, activation="relu")
        quantized = mask_fake_quantize(x, mask, scale, -2, 1)
        return [out, rows, quantized, *torch.autograd.grad(out.square().sum(), leaves)]

    expected = run()
    monkeypatch.setattr(ops, "library", lambda: None)
    for one, other in zip(run(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_patterns_go_with_their_weights() -> None:
    gc.collect()
    before = len(patterns._patterns)
    for _ in range(3):
        weight = pack(torch.eye(4), 1)
        sparse_linear(torch.ones(1, 4), weight)
    assert len(patterns._patterns) > before

    del weight
    gc.collect()

    assert len(patterns._patterns) == before
