"""Networks of 8 bits through PyTorch's integer kernels compute what fake quantization does."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pruning import integer_network
from pruning.integer_network import IntegerConv2d, ToIntegers, in_integers, kernels_are_exact
from pruning.layer_policy import LayerPolicy
from pruning.quantize import ActQuantizer, quantize_layers, quantized_layers

INT8 = LayerPolicy(weight_bits=8, act_bits=8, reduce_range=not kernels_are_exact(reduce_range=False))
"""With all levels where the processor can add their products."""
with_kernels = pytest.mark.skipif(
    not kernels_are_exact(INT8.reduce_range), reason="no exact integer kernels on this processor"
)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def norm_of(n: int, *, affine: bool = True) -> nn.BatchNorm2d:
    """Statistics and scales of a trained one: some scales are below 0, and one is 0."""
    norm = nn.BatchNorm2d(n, affine=affine).eval()
    norm.running_mean, norm.running_var = torch.randn(n), torch.rand(n) + 0.1
    if affine:
        norm.weight.data, norm.bias.data = torch.randn(n), torch.randn(n)
        norm.weight.data[0] = 0
    return norm


def sequence() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        norm_of(8),
        nn.Conv2d(8, 5, 1),
        nn.Flatten(),
        nn.Linear(80, 4),
    ).eval()


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * float(theirs.abs().max()))


def outputs(network: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y: Tensor = network(x)
    return y


def integer_layers(network: nn.Module) -> Iterator[str]:
    assert isinstance(network, fx.GraphModule)
    called = {str(node.target) for node in network.graph.nodes if node.op == "call_module"}
    return (name for name in called if isinstance(network.get_submodule(name), IntegerConv2d))


@with_kernels
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2, "bias": False},
        {"kernel_size": (1, 3), "padding": (0, 2), "dilation": (1, 2)},
        {"kernel_size": 5, "padding": 2, "groups": 2},
        {"kernel_size": 3, "padding": 1, "groups": 6},
        {"kernel_size": 1, "stride": 2},
    ],
)
def test_a_convolution_computes_what_it_simulates(geometry: dict[str, object], channels_last: bool) -> None:
    torch.manual_seed(0)
    x = noise(4, 6, 9, 9)  # of both signs, so that zero lies within the grid, and padding is not the integer zero
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    simulated = quantize_layers(nn.Sequential(nn.Conv2d(6, 12, **geometry)), {"0": INT8}, [x]).eval()  # type: ignore[arg-type]

    network = in_integers(simulated)

    assert len(list(integer_layers(network))) == 1
    close(outputs(network, x), outputs(simulated, x))


@with_kernels
@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_is_computed_by_the_layer_before(affine: bool) -> None:
    torch.manual_seed(0)
    x = noise(4, 3, 6, 6)
    for bias in (True, False):
        plain = nn.Sequential(nn.Conv2d(3, 7, 3, bias=bias), norm_of(7, affine=affine)).eval()
        simulated = quantize_layers(plain, {"0": INT8}, [x]).eval()

        network = in_integers(simulated)

        assert isinstance(network, fx.GraphModule)
        assert not any(str(node.target) == "1" for node in network.graph.nodes)
        close(outputs(network, x), outputs(simulated, x))


class Residual(nn.Module):
    """What a sum writes is read by a layer of integers and by the next sum."""

    def __init__(self, clip: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv1, self.conv2, self.last = (nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(4))
        self.norm0, self.norm1, self.norm2 = (norm_of(3) for _ in range(3))
        self.clip = clip

    def forward(self, x: Tensor) -> Tensor:
        x = self.clip(self.norm0(self.stem(x)))
        x = self.clip(self.norm2(self.conv2(self.clip(self.norm1(self.conv1(x))))) + x)
        last: Tensor = self.last(x)
        return last + x


@with_kernels
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("clip", [nn.ReLU(inplace=True), F.relu, torch.relu_, lambda x: x.relu(), nn.ReLU6(), F.relu6])
def test_integers_flow_from_kernel_to_kernel(clip: Callable[[Tensor], Tensor], channels_last: bool) -> None:
    x = noise(8, 3, 8, 8)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    names = ("stem", "conv1", "conv2", "last")
    simulated = quantize_layers(Residual(clip).eval(), dict.fromkeys(names, INT8), [x]).eval()

    network = in_integers(simulated)

    assert isinstance(network, fx.GraphModule)
    kinds = [type(network.get_submodule(str(n.target))) for n in network.graph.nodes if n.op == "call_module"]
    # Integers are made of the images and of the sum alone, and norms and quantizers are gone.
    assert kinds.count(IntegerConv2d) == 4 and kinds.count(ToIntegers) == 2
    assert not {nn.BatchNorm2d, ActQuantizer} & set(kinds)
    close(outputs(network, x), outputs(simulated, x))


@with_kernels
def test_integers_that_are_written_may_stand_for_values_below_zero() -> None:
    torch.manual_seed(0)
    x = noise(8, 3, 8, 8)
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1))
    simulated = quantize_layers(plain.eval(), dict.fromkeys(("0", "1", "3"), INT8), [x]).eval()

    assert any(m.zero_point for m in simulated.modules() if isinstance(m, ActQuantizer))
    close(outputs(in_integers(simulated), x), outputs(simulated, x))


@with_kernels
def test_a_network_in_integers_is_as_near_as_rounding_allows() -> None:
    network, images = sequence(), noise(64, 3, 8, 8)
    layers = dict.fromkeys(("0", "3", "5", "7"), INT8)
    simulated = quantize_layers(network, layers, [images]).eval()

    found = in_integers(simulated)

    assert len(list(integer_layers(found))) == 3  # through the pooling, too
    ours, theirs = outputs(found, images), outputs(simulated, images)
    of_bits = (outputs(network, images) - theirs).square().mean().sqrt()
    assert (ours - theirs).square().mean().sqrt() < 0.1 * of_bits
    assert (ours.argmax(1) == theirs.argmax(1)).float().mean() > 0.95


@with_kernels
def test_the_network_keeps_its_layers_and_later_calls_see_later_weights() -> None:
    images = noise(8, 3, 8, 8)
    simulated = quantize_layers(sequence(), dict.fromkeys(("0", "3", "5"), INT8), [images]).eval()
    before = outputs(in_integers(simulated), images)

    with torch.no_grad():
        quantized_layers(simulated)["5"].weight.mul_(-1)

    assert not list(integer_layers(simulated))
    assert not torch.allclose(outputs(in_integers(simulated), images), before)
    torch.testing.assert_close(
        outputs(in_integers(simulated), images), outputs(simulated, images), rtol=0.02, atol=0.02
    )


class Shared(nn.Module):
    """What is in place here is seen by a layer that reads the same tensor."""

    def __init__(self, change: Callable[[Tensor], Tensor], *, is_statement: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.side = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.change, self.is_statement = change, is_statement

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        changed = self.change(x)
        side: Tensor = self.side(x)
        return side if self.is_statement else side + self.second(changed)


@pytest.mark.parametrize("is_statement", [True, False])
@pytest.mark.parametrize(
    "change", [nn.ReLU(inplace=True), partial(F.relu, inplace=True), torch.relu_, lambda x: x.relu_()]
)
def test_what_is_changed_in_place_is_not_read_as_it_was(change: Callable[[Tensor], Tensor], is_statement: bool) -> None:
    x = noise(4, 3, 6, 6)
    network = Shared(change, is_statement=is_statement)
    layers = ("first", "side") if is_statement else ("first", "second", "side")
    simulated = quantize_layers(network, dict.fromkeys(layers, INT8), [x]).eval()

    close(outputs(in_integers(simulated), x), outputs(simulated, x))


@with_kernels
def test_what_the_kernel_does_not_compute_stays_simulated() -> None:
    x = noise(4, 3, 6, 6)

    def network() -> nn.Module:
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Conv2d(3, 7, 3), norm_of(7), nn.ReLU(), nn.Conv2d(7, 2, 1)).eval()
        return quantize_layers(plain, {"0": INT8, "3": INT8}, [x]).eval()

    for hooked in ("", "0", "1", "act_quantizers._2"):
        with_hook = network()
        with_hook.get_submodule(hooked).register_forward_hook(lambda *arguments: 2 * arguments[2])
        torch.testing.assert_close(outputs(in_integers(with_hook), x), outputs(with_hook, x), rtol=0.02, atol=0.02)
    double = network().double()
    assert in_integers(double) is double
    training = network().train()
    torch.testing.assert_close(outputs(in_integers(training), x), outputs(training, x), rtol=0.02, atol=0.02)


@with_kernels
def test_memory_stays_in_its_order_so_that_views_hold() -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x)
            return y.view(len(y), -1)

    x = noise(4, 3, 6, 6)
    simulated = quantize_layers(Viewed(), {"conv": INT8}, [x]).eval()

    close(outputs(in_integers(simulated), x), outputs(simulated, x))


@with_kernels
def test_integers_are_the_same_under_autocast() -> None:
    x = noise(4, 3, 6, 6)
    simulated = quantize_layers(nn.Sequential(nn.Conv2d(3, 4, 3)), {"0": INT8}, [x.bfloat16().float()]).eval()

    with torch.autocast("cpu", torch.bfloat16):
        close(outputs(in_integers(simulated), x.bfloat16()), outputs(simulated, x.bfloat16()))


@with_kernels
def test_a_sum_in_place_and_its_relu_are_no_hindrance() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = (nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2))
            self.norm1, self.norm2, self.relu = norm_of(3), norm_of(3), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
            y += x
            relu: Tensor = self.relu(y)
            return relu

    torch.manual_seed(0)
    x = noise(4, 3, 6, 6)
    simulated = quantize_layers(Block(), dict.fromkeys(("conv1", "conv2"), INT8), [x]).eval()

    assert len(list(integer_layers(in_integers(simulated)))) == 2


@with_kernels
def test_a_dropout_in_place_of_what_nothing_else_reads_is_no_hindrance() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(inplace=True), nn.Linear(48, 2))
    x = noise(4, 3, 6, 6)
    simulated = quantize_layers(network.eval(), {"0": INT8, "4": INT8}, [x]).eval()

    assert len(list(integer_layers(in_integers(simulated)))) == 1


def test_kernels_are_tried_out_whatever_the_default_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise RuntimeError

    monkeypatch.setattr(IntegerConv2d, "forward", fail)
    torch.set_default_dtype(torch.float64)
    try:
        assert not kernels_are_exact.__wrapped__(reduce_range=True)
    finally:
        torch.set_default_dtype(torch.float32)


def test_trying_the_kernels_out_draws_nothing() -> None:
    before = torch.get_rng_state()

    kernels_are_exact.__wrapped__(reduce_range=True)

    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_without_such_layers_is_handed_back() -> None:
    images, four = noise(8, 3, 8, 8), LayerPolicy(weight_bits=4, act_bits=4)
    dense = sequence()

    assert in_integers(dense) is dense
    for layers in ({"0": four}, {"7": INT8}):
        simulated = quantize_layers(dense, layers, [images])
        assert in_integers(simulated) is simulated


@with_kernels
def test_layers_whose_sums_would_saturate_stay_simulated_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    reduced = LayerPolicy(weight_bits=8, act_bits=8, reduce_range=True)
    simulated = quantize_layers(
        sequence(), {"0": replace(reduced, reduce_range=False), "3": reduced}, [noise(8, 3, 8, 8)]
    ).eval()
    monkeypatch.setattr(integer_network, "kernels_are_exact", lambda reduce_range: reduce_range)

    converted = in_integers(simulated)

    assert len(list(integer_layers(converted))) == 1
    images = noise(4, 3, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(converted(images), simulated(images), rtol=1e-3, atol=1e-3)


def test_without_exact_kernels_a_network_stays_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = quantize_layers(sequence(), {"0": INT8}, [noise(8, 3, 8, 8)])
    monkeypatch.setattr(integer_network, "kernels_are_exact", lambda _: False)

    assert in_integers(simulated) is simulated


@pytest.mark.parametrize("fault", [RuntimeError("not built for this processor"), TypeError("other arguments"), None])
def test_kernels_that_fail_or_saturate_are_found_out(monkeypatch: pytest.MonkeyPatch, fault: Exception | None) -> None:
    def compute(_layer: IntegerConv2d, x: Tensor) -> Tensor:
        if fault:
            raise fault
        return torch.full((len(x), 64, 4, 4), 100.0)

    monkeypatch.setattr(IntegerConv2d, "__init__", lambda layer, *_: nn.Module.__init__(layer))
    monkeypatch.setattr(IntegerConv2d, "forward", compute)

    assert not kernels_are_exact.__wrapped__(reduce_range=True)
