from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18, shufflenet_v2_x0_5

from experiments.resnet import CifarResNet
from pruning.kernels.lowering import Lowered, lower
from pruning.kernels.operators import Convolution, Foreign, Weighted


def kinds(lowered: Lowered) -> Counter[str]:
    return Counter(type(one).__name__ for one in lowered.operators)


def evaluate(lowered: Lowered, *inputs: Tensor) -> list[Tensor]:
    values = dict(zip(lowered.inputs, inputs, strict=True)) | lowered.constants
    for one in lowered.operators:
        values[one.output] = one.compute(*(values[name] for name in one.inputs))
    return [values[name] for name in lowered.outputs]


def noise(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def test_a_residual_network_is_its_layers_and_two_pools() -> None:
    lowered = lower(resnet18().eval(), [noise(1, 3, 64, 64)])

    assert kinds(lowered) == {"Convolution": 20, "Pool": 2, "Reshape": 1, "Linear": 1}
    convolutions = [one for one in lowered.operators if isinstance(one, Convolution)]
    assert sum(len(one.inputs) == 2 for one in convolutions) == 8  # one a block
    assert sum(one.activation == "relu" for one in convolutions) == 17  # all but those of the three shortcuts


def test_a_shortcut_without_parameters_is_two_slices_and_a_pad() -> None:
    assert kinds(lower(CifarResNet(1).eval(), [noise(1, 3, 16, 16)])) == {
        "Convolution": 7,
        "Slice": 4,
        "Pad": 2,
        "Pool": 1,
        "Linear": 1,
    }


def test_a_batch_norm_is_folded_into_the_convolution_before_it() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).eval()
    model[1].running_mean.fill_(2.0)
    model[1].running_var.fill_(3.0)
    model[1].eps = 1.0  # so that the standard deviation is 2
    nn.init.constant_(model[1].weight, 6.0)
    nn.init.constant_(model[1].bias, 1.0)

    (one,) = lower(model, [noise(1, 2, 5, 5)]).operators

    assert isinstance(one, Weighted)
    torch.testing.assert_close(one.weight, 3 * model[0].weight.detach())
    torch.testing.assert_close(one.bias, 3 * (model[0].bias.detach() - 2) + 1)


def test_a_value_that_two_read_is_not_swallowed() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return F.relu(y), y + x

    model, x = Shared().eval(), noise(1, 3, 4, 4)
    lowered = lower(model, [x])

    assert kinds(lowered) == {"Convolution": 1, "Add": 2}
    with torch.no_grad():
        for found, expected in zip(evaluate(lowered, x), model(x), strict=True):
            torch.testing.assert_close(found, expected)


def test_what_is_not_understood_is_foreign_and_computes_the_same() -> None:
    model, x = shufflenet_v2_x0_5().eval(), noise(1, 3, 64, 64)
    lowered = lower(model, [x])

    assert any(isinstance(one, Foreign) for one in lowered.operators)
    with torch.no_grad():
        torch.testing.assert_close(evaluate(lowered, x)[0], model(x), rtol=1e-4, atol=1e-5)


class Composed(nn.Module):
    """Layers, and a function of them and the inputs."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self.layers, *inputs)


def conditioned_norm(layers: nn.ModuleDict, x: Tensor, condition: Tensor) -> Tensor:
    gamma = layers["gate"](condition)[0]
    return F.batch_norm(layers["layer"](x), torch.zeros(5), torch.ones(5), gamma, gamma + 1, False)


@pytest.mark.parametrize(
    ("function", "layer"),
    [
        (lambda layers, x, c: F.linear(x, layers["layer"].weight, layers["gate"](c)[0]), nn.Linear(6, 5)),
        (lambda layers, x, c: F.conv2d(x, layers["layer"].weight, layers["gate"](c)[0]), nn.Conv2d(3, 5, 3)),
        (conditioned_norm, nn.Conv2d(3, 5, 3)),
    ],
    ids=["linear", "convolution", "batch norm"],
)
def test_parameters_that_the_inputs_decide_are_not_left_out(function: Callable[..., Tensor], layer: nn.Module) -> None:
    model = Composed(function, layer=layer, gate=nn.Linear(4, 5)).eval()
    inputs = [noise(2, 3, 7, 6), noise(2, 4)]

    (found,) = evaluate(lower(model, inputs), *inputs)

    with torch.no_grad():
        torch.testing.assert_close(found, model(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "norm", "size"),
    [
        (nn.Linear(4, 6), nn.BatchNorm1d(6), (5, 4)),
        (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
        (nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), (2, 4, 5, 4, 3)),
    ],
    ids=["rows", "sequences", "volumes"],
)
def test_a_batch_norm_of_anything_but_maps_computes_the_same(
    layer: nn.Module, norm: nn.Module, size: tuple[int, ...]
) -> None:
    model, x = nn.Sequential(layer, norm, nn.ReLU()).eval(), noise(*size)

    (found,) = evaluate(lower(model, [x]), x)

    with torch.no_grad():
        torch.testing.assert_close(found, model(x))


def test_random_values_are_drawn_at_every_call() -> None:
    x = noise(1, 3, 4, 4)
    lowered = lower(Composed(lambda _, x: x + torch.rand(1, 3, 4, 4)).eval(), [x])
    found = []
    with torch.random.fork_rng():
        for seed in (0, 1):
            torch.manual_seed(seed)
            found += evaluate(lowered, x)
            torch.manual_seed(seed)
            torch.testing.assert_close(found[-1], x + torch.rand(1, 3, 4, 4))

    assert not torch.equal(*found)


def test_views_take_inputs_of_other_strides_than_the_example() -> None:
    model, x = Composed(lambda _, x: x.reshape(6, 4, 4, -1) * 2).eval(), noise(2, 3, 8, 8)
    lowered = lower(model, [x])

    (found,) = evaluate(lowered, x.contiguous(memory_format=torch.channels_last))

    assert torch.equal(found, model(x))


def test_autocast_around_the_call_is_not_part_of_the_network() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU()).eval(), noise(2, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = lower(model, [x])

    (found,) = evaluate(lowered, x)

    with torch.no_grad():
        torch.testing.assert_close(found, model(x))


def test_constants_are_computed_once_and_may_be_outputs() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((3,), 2.0))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            doubled = self.scale * 2 + 1
            return x * doubled, doubled

    x = noise(1, 3)
    lowered = lower(Constant().eval(), [x])

    assert [one.name for one in lowered.operators if isinstance(one, Foreign)] == ["mul_1"]
    found = evaluate(lowered, x)
    torch.testing.assert_close(found[0], 5 * x)
    assert found[1].tolist() == [5.0, 5.0, 5.0]
