import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from graph_encoder import modes
from graph_encoder.modes import lay_channels_last, mixed_precision

OWN = "_ConvolutionBackward"
"""Name of the step back through a convolution whose gradients are from single precision."""


@pytest.fixture(autouse=True)
def with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with kernels in bfloat16, whatever this one is."""
    monkeypatch.setattr(modes, "has_bfloat16", lambda _: True)


@contextmanager
def plain() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


def trained() -> Any:
    return mixed_precision("cpu", True)


def depthwise(**options: Any) -> tuple[nn.Conv2d, Tensor]:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, **{"kernel_size": 3, "stride": 2, "groups": 8} | options)
    return layer, torch.randn(2, 8, 9, 9, requires_grad=True)


def exact_gradients(layer: nn.Conv2d, x: Tensor, asked: list[Tensor], y: Tensor) -> tuple[Tensor, ...]:
    """Those of the layer in double precision, of what it and its input are in bfloat16."""
    rounded = {name: value.bfloat16().double() for name, value in layer.named_parameters()}
    found = functional_call(copy.deepcopy(layer).double(), rounded, (x.bfloat16().double(),))
    seed = torch.linspace(-1, 1, y.numel()).reshape(y.shape).bfloat16().double()
    return torch.autograd.grad(found, asked, seed)


@pytest.mark.parametrize(
    ("options", "is_taken"),
    [
        ({}, True),
        ({"stride": (1, 2)}, True),
        ({"stride": 1, "dilation": 2}, True),
        ({"stride": 1, "kernel_size": 5, "padding": "same", "dilation": 2, "bias": False}, True),
        ({"stride": 1, "kernel_size": (5, 1), "padding": "valid"}, True),
        ({"stride": 1}, False),
        pytest.param(
            {"stride": 1, "kernel_size": 4, "padding": "same"},
            False,
            marks=pytest.mark.filterwarnings("ignore:Using padding='same'"),
        ),
        ({"groups": 4}, False),
        ({"groups": 1, "kernel_size": 5}, False),
        ({"stride": np.int64(2)}, False),
    ],
)
def test_depthwise_layers_whose_gradients_bfloat16_slows_down_get_them_from_floats(
    options: dict[str, Any], is_taken: bool
) -> None:
    layer, x = depthwise(**options)
    asked = [x, *layer.parameters()]

    def run(context: Any) -> list[Tensor]:
        with context:
            y = layer(x)
        assert (y.grad_fn.name() == OWN) == (is_taken and context is not cast_only)
        seed = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
        return [y, *torch.autograd.grad(y, asked, seed.to(y.dtype))]

    cast_only = plain()
    own, cast = run(trained()), run(cast_only)
    assert torch.equal(own[0], cast[0])
    assert all(one.dtype == other.dtype for one, other in zip(own, cast, strict=True))
    if is_taken:
        # Sums in single precision, rounded in the end.
        exact = exact_gradients(layer, x, asked, own[0])
        assert all(torch.allclose(one, other, rtol=0.01) for one, other in zip(own[1:], exact, strict=True))
    else:
        assert all(map(torch.equal, own, cast))


def test_without_autocast_or_gradients_nothing_changes() -> None:
    layer, x = depthwise()
    with mixed_precision("cpu", False):
        y = layer(x)
    with torch.no_grad(), trained():
        scored = layer(x)
    assert torch.equal(y, layer(x))
    assert y.grad_fn.name() != OWN
    with plain():
        assert torch.equal(scored, layer(x))


def test_what_is_frozen_gets_no_gradient() -> None:
    layer, x = depthwise()
    layer.weight.requires_grad_(False)
    with trained():
        y = layer(x)
    y.float().sum().backward()
    assert y.grad_fn.name() == OWN
    assert layer.weight.grad is None
    assert layer.bias is not None
    assert layer.bias.grad is not None
    assert torch.equal(layer.bias.grad, torch.full((8,), 2.0 * 16))


def test_what_is_run_again_in_the_backward_pass_is_computed_alike() -> None:
    layer, x = depthwise()
    gradients: list[Tensor] = []
    for run in (layer, partial(checkpoint, layer, use_reentrant=False)):
        with trained():
            loss = run(x).float().square().sum()
        gradients += torch.autograd.grad(loss, layer.weight)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"stride": 2, "padding": "same"}),
        (torch.float32, {"padding": "sane"}),
        (torch.float32, {"stride": (2, 2, 2)}),
        (torch.float64, {"stride": 2}),
    ],
)
def test_what_else_a_convolution_is_called_with_is_left_to_it(dtype: torch.dtype, options: dict[str, Any]) -> None:
    x, weight = torch.randn(2, 8, 9, 9, dtype=dtype), torch.randn(8, 1, 3, 3, dtype=dtype)
    found = []
    for context in (plain(), trained()):
        try:
            with context:
                found.append(torch.conv2d(x, weight, groups=8, **options).dtype)
        except (RuntimeError, TypeError, ValueError) as error:
            found.append(str(error))
    assert found[0] == found[1]


def test_tensors_of_four_dimensions_alone_are_laid_out_with_the_channels_last() -> None:
    model = nn.ModuleDict({"flat": nn.Conv2d(3, 8, 3), "deep": nn.Conv3d(3, 8, 3), "linear": nn.Linear(4, 4)})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    lay_channels_last(model)

    assert model["flat"].weight.is_contiguous(memory_format=torch.channels_last)
    assert model["deep"].weight.is_contiguous()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
