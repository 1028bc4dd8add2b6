from __future__ import annotations

from collections import Counter

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
