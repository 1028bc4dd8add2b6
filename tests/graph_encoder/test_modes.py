import copy
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from graph_encoder.modes import FloatGradients


def bfloat16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def exact_gradients(layer: nn.Conv2d, x: Tensor, asked: list[Tensor], y: Tensor) -> tuple[Tensor, ...]:
    """Those of the layer in double precision, of what it and its input are in bfloat16."""
    rounded = {name: value.bfloat16().double() for name, value in layer.named_parameters()}
    found = functional_call(copy.deepcopy(layer).double(), rounded, (x.bfloat16().double(),))
    seed = torch.linspace(-1, 1, y.numel()).reshape(y.shape).bfloat16().double()
    return torch.autograd.grad(found, asked, seed)


@pytest.mark.parametrize(
    ("options", "is_taken"),
    [
        ({"kernel_size": 3, "stride": 2, "groups": 8}, True),
        ({"kernel_size": 3, "stride": (1, 2), "groups": 8}, True),
        ({"kernel_size": 5, "padding": "same", "dilation": 2, "groups": 8, "bias": False}, True),
        ({"kernel_size": (5, 1), "padding": "valid", "groups": 8}, True),
        ({"kernel_size": 3, "groups": 8}, False),
        pytest.param(
            {"kernel_size": 4, "padding": "same", "groups": 8},
            False,
            marks=pytest.mark.filterwarnings("ignore:Using padding='same'"),
        ),
        ({"kernel_size": 3, "stride": 2, "groups": 4}, False),
        ({"kernel_size": 5, "stride": 2}, False),
    ],
)
def test_depthwise_layers_whose_gradients_bfloat16_slows_down_get_them_from_floats(
    options: dict[str, Any], is_taken: bool
) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(8, 8, **options), torch.randn(2, 8, 9, 9, requires_grad=True)
    asked = [x, *layer.parameters()]

    def run(*contexts: AbstractContextManager[object]) -> list[Tensor]:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            y = layer(x)
        seed = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
        return [y, *torch.autograd.grad(y, asked, seed.to(y.dtype))]

    own, cast = run(bfloat16(), FloatGradients()), run(bfloat16())
    assert torch.equal(own[0], cast[0])
    assert all(one.dtype == other.dtype for one, other in zip(own, cast, strict=True))
    exact = exact_gradients(layer, x, asked, own[0])
    if is_taken:
        # Sums in single precision, rounded in the end.
        assert all(torch.allclose(one, other, rtol=0.01) for one, other in zip(own[1:], exact, strict=True))
    else:
        assert all(map(torch.equal, own, cast))


def test_without_autocast_or_gradients_nothing_changes() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(8, 8, 3, stride=2, groups=8), torch.randn(2, 8, 9, 9)
    with FloatGradients():
        y = layer(x)
        with bfloat16(), torch.no_grad():
            scored = layer(x)
    assert torch.equal(y, layer(x))
    assert "FloatGradients" not in y.grad_fn.name()
    assert scored.dtype == torch.bfloat16


def test_what_is_frozen_gets_no_gradient() -> None:
    layer, x = nn.Conv2d(8, 8, 3, stride=2, groups=8), torch.randn(2, 8, 9, 9)
    layer.weight.requires_grad_(False)
    with bfloat16(), FloatGradients():
        y = layer(x)
    y.float().sum().backward()
    assert layer.weight.grad is None
    assert layer.bias is not None
    assert layer.bias.grad is not None
    assert torch.equal(layer.bias.grad, torch.full((8,), 2.0 * 16))


def test_what_is_run_again_in_the_backward_pass_is_computed_alike() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(8, 8, 3, stride=2, groups=8), torch.randn(2, 8, 9, 9)
    gradients: list[Tensor] = []
    with FloatGradients():
        for run in (layer, partial(checkpoint, layer, use_reentrant=False)):
            with bfloat16():
                loss = run(x).float().square().sum()
            gradients += torch.autograd.grad(loss, layer.weight)
    assert torch.equal(*gradients)
