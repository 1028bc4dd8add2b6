import copy
import math
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graph_encoder.capture import capture
from latency.cost import count_macs
from latency.decision import LayerChoice, layer_decisions
from pruning.calibration import CalibrationError
from pruning.finetune import finetune
from pruning.layer_policy import LayerPolicy, PolicyError
from pruning.policy import CompressionPolicy
from pruning.quantize import (
    ActQuantizer,
    LinearWeightQuantizer,
    SharedWeightQuantizer,
    insert_quantizers,
    quantizable_layers,
    quantize_layers,
    quantized_layers,
    without_quantizers,
)
from pruning.surgery import apply_policy

INT8 = LayerPolicy(weight_bits=8, act_bits=8)
FOUR = LayerPolicy(weight_bits=4, act_bits=4)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Residual(nn.Module):
    """A stem, a residual block with batch norms, a pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x).relu())
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


LAYERS = ("stem", "conv1", "conv2", "linear")
IMAGES = noise(6, 3, 8, 8)


@pytest.mark.parametrize("layer", [INT8, FOUR, LayerPolicy(weight_bits=16, act_bits=16)])
def test_without_quantizers_the_network_is_the_one_before(layer: LayerPolicy) -> None:
    torch.manual_seed(0)
    dense = Residual().eval()
    quantized = quantize_layers(dense, dict.fromkeys(LAYERS, layer), [IMAGES]).eval()

    plain = without_quantizers(quantized)

    assert {type(plain.get_submodule(name)) for name in LAYERS} == {nn.Conv2d, nn.Linear}
    assert set(plain.state_dict()) == set(dense.state_dict())
    assert torch.equal(plain(IMAGES), dense(IMAGES))
    assert len(quantized_layers(quantized)) == len(LAYERS)


def test_without_quantizers_shared_values_are_what_they_were_trained_to() -> None:
    quantized = quantize_layers(Residual(), {"conv1": LayerPolicy(weight_bits=3, quantizer="kmeans")}, [IMAGES])
    layer = quantized_layers(quantized)["conv1"]
    assert isinstance(layer.weight_quantizer, SharedWeightQuantizer)
    with torch.no_grad():
        layer.weight_quantizer.values.mul_(1.5)

    plain = without_quantizers(quantized)

    assert torch.equal(plain.get_parameter("conv1.weight"), layer.quantized_weight())


def test_hooks_of_the_network_are_called_at_8_bits_too(residual: nn.Module) -> None:
    plain = quantize_layers(residual, {"conv1": INT8}, [IMAGES]).eval()
    residual.register_forward_hook(lambda *arguments: 2 * arguments[2])

    hooked = quantize_layers(residual, {"conv1": INT8}, [IMAGES]).eval()

    torch.testing.assert_close(hooked(IMAGES), 2 * plain(IMAGES), rtol=0.02, atol=0.02)


@pytest.fixture
def residual() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


def equal_states(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_quantized_weight_has_the_levels_of_its_bits_and_keeps_its_zeros(bits: int) -> None:
    weight = noise(3, 500)
    weight[:, :100] = 0
    quantizer = LinearWeightQuantizer(bits, weight)
    quantizer.calibrate(weight, "minmax")
    found = quantizer(weight).detach()

    top = max(2 ** (bits - 1) - 1, 1)
    for row in found:
        levels = (row.unique() / (row.abs().max() / top)).round()
        assert len(row.unique()) <= 2 * top + 1
        assert levels.abs().max() == top
    assert (found[:, :100] == 0).all()
    assert torch.equal(quantizer(-weight), -found)


def test_one_bit_keeps_signs_and_the_mean_magnitude() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.0], [-4.0, 4.0, 4.0]])
    quantizer = LinearWeightQuantizer(1, weight)
    quantizer.calibrate(weight, "mse")

    assert quantizer(weight).tolist() == [[1.5, -1.5, 0.0], [-4.0, 4.0, 4.0]]


def test_gradients_of_values_and_step_are_those_of_learned_step_sizes() -> None:
    quantizer = ActQuantizer(2, "x").train()
    x = torch.tensor([[-1.0, 0.4, 1.2, 5.0]], requires_grad=True)
    upstream = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])

    found = quantizer(x)
    found.backward(upstream)

    assert found.tolist() == [[0, 0, 1, 3]]
    assert x.grad is not None and x.grad.tolist() == [[0, 10, 100, 0]]
    # Esser et al. 2020, equation 3: round(v) - v inside, the end of the range outside; scaled by 1 / sqrt(4 * 3).
    expected = (1 * 0 + 10 * (0 - 0.4) + 100 * (1 - 1.2) + 1000 * 3) / math.sqrt(12)
    assert float(quantizer.step.grad) == pytest.approx(expected)  # type: ignore[arg-type]


def test_gradient_of_a_channels_step_is_its_own() -> None:
    weight = torch.tensor([[0.3, -5.0], [1.4, 0.0]], requires_grad=True)
    quantizer = LinearWeightQuantizer(3, weight.detach())

    quantizer(weight).sum().backward()

    scale = 1 / math.sqrt(2 * 3)
    assert quantizer.step.grad is not None
    assert quantizer.step.grad.flatten().tolist() == pytest.approx([(-0.3 - 3) * scale, -0.4 * scale])
    assert weight.grad is not None and weight.grad.tolist() == [[1, 0], [1, 1]]


def test_gradient_of_a_shared_value_is_the_sum_over_its_weights() -> None:
    weight = torch.tensor([[1.0, 1.1, 0.0, -3.0]])
    quantizer = SharedWeightQuantizer(1, weight)
    quantizer.calibrate(weight, "mse")

    found = quantizer(weight)
    found.backward(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))

    torch.testing.assert_close(found.detach(), torch.tensor([[1.05, 1.05, 0.0, -3.0]]))
    assert quantizer.values.grad is not None and quantizer.values.grad.tolist() == [1000, 11]


def test_eight_bits_change_little_and_two_bits_much(residual: nn.Module) -> None:
    def error(bits: int) -> float:
        layers = dict.fromkeys(LAYERS, LayerPolicy(weight_bits=bits, act_bits=bits))
        change = quantize_layers(residual, layers, [IMAGES])(IMAGES) - residual(IMAGES)
        return float(change.detach().norm() / residual(IMAGES).detach().norm())

    errors = [error(bits) for bits in (8, 4, 2)]
    assert errors[0] < 0.03 < errors[1] < errors[2]


def test_layer_computes_with_what_its_quantizers_give() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU())
    x = noise(2, 3, 9)
    quantized = quantize_layers(model, {"0": LayerPolicy(weight_bits=3, act_bits=5)}, [x])
    layer = quantized_layers(quantized)["0"]

    assert len(layer.quantized_weight()[0].unique()) <= 7
    assert len(layer.act_quantizer(x).unique()) <= 32
    expected = F.conv1d(layer.act_quantizer(x), layer.quantized_weight(), layer.bias).relu()
    assert torch.equal(quantized(x), expected)


def test_half_precision_rounds_weights_and_activations() -> None:
    model = nn.Sequential(nn.Linear(5, 3))
    x = noise(2, 5)
    quantized = insert_quantizers(model, {"0": LayerPolicy(weight_bits=16, act_bits=16)})

    expected = F.linear(x.half().float(), model[0].weight.half().float(), model[0].bias)
    assert torch.equal(quantized(x), expected)


def test_model_is_untouched_and_nothing_is_shared(residual: nn.Module) -> None:
    before = copy.deepcopy(residual)
    quantized = quantize_layers(residual, dict.fromkeys(LAYERS, FOUR), [IMAGES])
    with torch.no_grad():
        for tensor in [*quantized.parameters(), *quantized.buffers()]:
            tensor.zero_()

    assert equal_states(residual, before)
    assert type(residual.stem) is nn.Conv2d


def test_copy_is_the_users_class_with_its_hooks_and_the_names_of_its_parameters(residual: nn.Module) -> None:
    seen: list[str] = []
    residual.conv1.register_forward_hook(lambda *_: seen.append("conv1"))

    quantized = quantize_layers(residual, dict.fromkeys(LAYERS, FOUR), [IMAGES])
    seen.clear()
    copy.deepcopy(quantized)(IMAGES)

    assert type(quantized) is Residual
    assert seen == ["conv1"]
    added = quantized.state_dict().keys() - residual.state_dict().keys()
    assert residual.state_dict().keys() < quantized.state_dict().keys()
    quantizers = {f"{name}.{kind}" for name in LAYERS for kind in ("weight_quantizer.step", "act_quantizer.step")}
    assert added == quantizers | {f"{name}.act_quantizer.zero_point" for name in LAYERS}


def test_tied_weights_stay_tied_and_shared_modules_stay_shared() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
            self.two.weight = self.one.weight
            self.again = self.one

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.again(self.two(self.one(x)).relu())
            return out

    quantized = quantize_layers(Tied(), dict.fromkeys(("one", "two", "again"), FOUR), [noise(4, 6)])

    assert quantized.two.weight is quantized.one.weight
    assert quantized.again is quantized.one


def test_state_of_a_calibrated_network_makes_an_uncalibrated_one_equal(residual: nn.Module) -> None:
    layers = {"stem": INT8, "conv1": INT8, "conv2": INT8}
    calibrated = quantize_layers(residual, layers, [IMAGES])
    fresh = insert_quantizers(Residual().eval(), layers)
    fresh.load_state_dict(calibrated.state_dict())

    assert torch.equal(fresh(IMAGES), calibrated(IMAGES))


def test_integer_network_quantizes_tensors_where_integer_kernels_meet_and_not_its_outputs(residual: nn.Module) -> None:
    quantized = insert_quantizers(residual, dict.fromkeys(LAYERS, INT8))

    # The input; after each ReLU, past the batch norm; the second branch; the sum, past its ReLU; what `linear` reads.
    # The pooled values lie on the grid of what is pooled, and the logits stay as they are.
    assert list(quantized.act_quantizers) == ["x", "relu", "relu_1", "bn2", "relu_2", "mean"]


def test_sum_with_a_branch_in_full_precision_stays_in_full_precision(residual: nn.Module) -> None:
    quantized = insert_quantizers(residual, dict.fromkeys(("stem", "conv1"), INT8))

    assert list(quantized.act_quantizers) == ["x", "relu", "relu_1"]


def test_network_that_cannot_be_traced_quantizes_what_its_layers_read() -> None:
    class Branching(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    quantized = quantize_layers(Branching().eval(), dict.fromkeys(LAYERS, INT8), [IMAGES])

    assert type(quantized) is Branching
    assert list(quantized_layers(quantized)) == list(LAYERS)
    read = quantized.conv1.act_quantizer(IMAGES)
    assert len(read.unique()) <= 256
    # What the layer reads is never below 0; all else lies on a grid as fine as its range allows.
    torch.testing.assert_close(read.clamp(max=1), IMAGES.clamp(0, 1), rtol=0, atol=0.02)


class AsksForTheClass(nn.Module):
    """Its trace takes the other branch: what stands for a tensor there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor):
            x = x * 3
        return self.second(self.first(x).relu())


def with_forward_of_its_own() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self: nn.Sequential, x: Tensor) -> Tensor:
        return self[2](self[1](self[0](3 * x)))

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("make", [AsksForTheClass, with_forward_of_its_own])
def test_a_trace_that_computes_something_else_is_not_taken(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(64, 6)
    layers = {name: INT8 for name, module in model.named_modules() if isinstance(module, nn.Linear)}

    quantized = quantize_layers(model, layers, [x]).eval()

    with torch.no_grad():
        assert (quantized(x) - model(x)).abs().max() < 0.05 * model(x).abs().max()


class Casting(nn.Module):
    """Methods of tensors name steps of its trace that modules have methods for, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.to(torch.float32))
        return self.third(self.second(x.relu().to(torch.float32)).relu())


def test_steps_called_as_methods_of_modules_are_quantized() -> None:
    torch.manual_seed(0)
    model, x = Casting().eval(), torch.randn(64, 6)

    quantized = quantize_layers(model, dict.fromkeys(("first", "second", "third"), INT8), [x]).eval()

    assert "act_quantizers.to_" in dict(quantized.named_modules())
    with torch.no_grad():
        assert (quantized(x) - model(x)).abs().max() < 0.05 * model(x).abs().max()


def test_a_layer_with_a_name_of_graph_modules_is_quantized() -> None:
    class Coded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.code = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.code(self.stem(x).relu())
            return out

    model = Coded().eval()
    quantized = quantize_layers(model, dict.fromkeys(("stem", "code"), INT8), [IMAGES])

    torch.testing.assert_close(quantized(IMAGES), model(IMAGES), rtol=0, atol=0.05)


def test_bits_do_not_change_the_number_of_multiply_adds(residual: nn.Module) -> None:
    quantized = quantize_layers(residual, dict.fromkeys(LAYERS, FOUR), [IMAGES])

    assert count_macs(quantized, IMAGES[:1]) == count_macs(residual, IMAGES[:1])


def test_channels_go_first_and_bits_follow(residual: nn.Module) -> None:
    policy = CompressionPolicy({"conv1": (1, 2, 5)}, {"conv1": 8}, dict.fromkeys(LAYERS, INT8))
    small = apply_policy(residual, capture(residual, IMAGES[:1]), policy)
    quantized = quantize_layers(small, policy.layers, [IMAGES])

    assert quantized.conv1.weight.shape == (3, 8, 3, 3)
    torch.testing.assert_close(quantized(IMAGES), small(IMAGES), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("layer", [INT8, FOUR, LayerPolicy(weight_bits=3, act_bits=8, quantizer="kmeans")])
def test_autocast_changes_neither_outputs_nor_gradients_of_quantized_layers(
    residual: nn.Module, layer: LayerPolicy
) -> None:
    quantized = quantize_layers(residual, dict.fromkeys(LAYERS, layer), [IMAGES])
    found = []
    for autocast in (False, True):
        quantized.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, autocast):
            out = quantized(IMAGES)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in quantized.parameters() if p.grad is not None)])

    assert all(tensor.dtype == torch.float32 for tensor in found[1])
    for plain, cast in zip(*found, strict=True):
        assert torch.equal(plain, cast)


class Points:
    """Two classes of points on either side of a curve."""

    def __init__(self) -> None:
        self.points = noise(512, 6)
        self.labels = (self.points[:, 0] * self.points[:, 1] > 0).long()

    def __len__(self) -> int:
        return 8

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(512, generator=torch.Generator().manual_seed(epoch))
        for indices in order.chunk(8):
            yield self.points[indices], self.labels[indices]


@pytest.mark.parametrize("layer", [LayerPolicy(weight_bits=2, act_bits=2), LayerPolicy(weight_bits=1, act_bits=4)])
def test_training_recovers_accuracy_that_few_bits_cost(layer: LayerPolicy) -> None:
    torch.manual_seed(0)
    data = Points()
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    finetune(model, data, epochs=40, learning_rate=0.1)

    def accuracy(network: nn.Module) -> float:
        with torch.no_grad():
            return float((network(data.points).argmax(1) == data.labels).float().mean())

    quantized = quantize_layers(model, {"2": layer, "4": layer}, [data.points])
    before, weight = accuracy(quantized), quantized[2].weight.detach().clone()
    step = quantized[2].weight_quantizer.step.detach().clone()
    finetune(quantized, data, epochs=40, learning_rate=0.05)

    assert before < 0.93 < accuracy(quantized)
    assert not torch.equal(quantized[2].weight, weight)
    assert not torch.equal(quantized[2].weight_quantizer.step, step)


def test_shared_values_are_trained_and_zeros_stay() -> None:
    torch.manual_seed(0)
    data = Points()
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2))
    with torch.no_grad():
        model[0].weight[:, 3:] = 0
    quantized = quantize_layers(model, {"0": LayerPolicy(weight_bits=3, quantizer="kmeans")}, [])
    before = quantized[0].weight_quantizer.values.detach().clone()
    report = finetune(quantized, data, epochs=20, learning_rate=0.1)

    assert report.losses[-1] < report.losses[0]
    assert not torch.equal(quantized[0].weight_quantizer.values, before)
    assert (quantized[0].quantized_weight()[:, 3:] == 0).all()
    assert len(quantized[0].quantized_weight().unique()) <= 9


def test_layer_that_is_not_there_is_named(residual: nn.Module) -> None:
    with pytest.raises(PolicyError) as caught:
        quantize_layers(residual, {"nose": INT8}, [IMAGES])
    assert str(caught.value) == (
        "the policy gives bits to 'nose', and the network has no such layer; name one of its layers"
    )


def test_layer_that_cannot_be_quantized_is_named(residual: nn.Module) -> None:
    with pytest.raises(PolicyError) as caught:
        quantize_layers(residual, {"bn1": INT8}, [IMAGES])
    assert str(caught.value) == (
        "layer 'bn1' is a BatchNorm2d, which cannot be quantized; only nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d can, "
        "so leave it out"
    )


def test_layer_that_is_quantized_already_is_named(residual: nn.Module) -> None:
    quantized = quantize_layers(residual, {"stem": FOUR}, [IMAGES])
    with pytest.raises(PolicyError) as caught:
        quantize_layers(quantized, {"stem": FOUR}, [IMAGES])
    assert str(caught.value) == (
        "layer 'stem' is quantized already, which cannot be quantized; only nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d "
        "can, so leave it out"
    )


def test_one_module_under_two_names_cannot_have_two_numbers_of_bits() -> None:
    shared = nn.Linear(4, 4)
    with pytest.raises(PolicyError) as caught:
        insert_quantizers(nn.Sequential(shared, shared), {"0": INT8, "1": FOUR})
    assert str(caught.value) == (
        "layers '0' and '1' are one module, and the policy gives them different bits; give equal"
    )


def test_no_calibration_data_is_refused(residual: nn.Module) -> None:
    with pytest.raises(CalibrationError) as caught:
        quantize_layers(residual, {"stem": FOUR}, [])
    assert str(caught.value) == (
        "no calibration data: ranges of activations were to be chosen on no batches; hand in at least one batch of "
        "training images"
    )


def test_images_that_are_not_finite_are_named_by_the_layer_that_reads_them(residual: nn.Module) -> None:
    images = IMAGES.clone()
    images[0, 0, 0, 0] = math.nan
    with pytest.raises(CalibrationError) as caught:
        quantize_layers(residual, {"stem": FOUR}, [IMAGES, images])
    assert str(caught.value) == (
        "calibration met 1 values that are NaN or infinite in what 'stem' reads (batch 2); check the calibration "
        "images and the weights"
    )


def test_weights_that_are_not_finite_are_named_by_their_layer(residual: nn.Module) -> None:
    with torch.no_grad():
        residual.conv1.weight[0, 0] = math.inf
    with pytest.raises(CalibrationError) as caught:
        quantize_layers(residual, {"conv1": FOUR}, [IMAGES])
    assert str(caught.value) == "layer 'conv1': 9 weights are NaN or infinite; load or train them again"


def test_layer_that_never_runs_is_named(residual: nn.Module) -> None:
    residual.spare = nn.Linear(3, 3)
    with pytest.raises(CalibrationError) as caught:
        quantize_layers(residual, {"spare": FOUR}, [IMAGES])
    assert str(caught.value) == (
        "calibration saw nothing of what 'spare' reads: it did not run as a module of its own on the calibration "
        "batches; leave the layer out of the policy"
    )


class Optional(nn.Module):
    """What it does without an argument is not what it does with one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, sharp: bool = False) -> Tensor:
        h = self.first(x).relu()
        if mask is not None:
            h = h * mask
        y: Tensor = self.last(h).mean((2, 3))
        return (4 * y).softmax(1) if sharp else y


def test_arguments_that_may_be_left_out_are_left_out() -> None:
    network = Optional().eval()
    quantized = quantize_layers(network, {"first": INT8, "last": INT8}, [IMAGES])

    for arguments, options in [((), {}), ((torch.tensor(0.5),), {}), ((), {"sharp": True})]:
        torch.testing.assert_close(
            quantized(IMAGES, *arguments, **options), network(IMAGES, *arguments, **options), rtol=0, atol=0.01
        )


class Last(nn.Module):
    """An integer layer reads one of the tensors that another module returns."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.linear = inner, nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x, x, x)[0] if isinstance(self.inner, nn.MultiheadAttention) else self.inner(x)[0]
        logits: Tensor = self.linear(out[:, -1])
        return logits


@pytest.mark.parametrize(
    "make",
    [lambda: nn.LSTM(4, 6, batch_first=True), lambda: nn.GRU(4, 6), lambda: nn.MultiheadAttention(4, 2)],
    ids=["lstm", "gru", "attention"],
)
def test_a_layer_may_read_one_tensor_of_several(make: Callable[[], nn.Module]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = make()
        network = Last(inner, 4 if isinstance(inner, nn.MultiheadAttention) else 6).eval()
    x = noise(3, 7, 4)
    quantized = quantize_layers(network, {"linear": INT8}, [x]).eval()
    assert list(quantized_layers(quantized)) == ["linear"] and not torch.equal(quantized(x), network(x))
    torch.testing.assert_close(quantized(x), network(x), rtol=0, atol=0.02)


def test_channels_of_zeros_in_half_precision_stay_zeros() -> None:
    network = nn.Sequential(nn.Linear(4, 3)).half()
    network[0].weight.data[0] = 0
    x = noise(5, 4).half()
    out = quantize_layers(network, {"0": LayerPolicy(weight_bits=8)}, [x])(x)
    assert torch.equal(out[:, 0], network[0].bias[:1].expand(5))
    assert out.isfinite().all()


def test_gradients_pass_half_precision_however_small_they_are() -> None:
    x, network = noise(5, 3, 8, 8), Residual().eval()
    half = quantize_layers(network, dict.fromkeys(LAYERS, LayerPolicy(weight_bits=16, act_bits=16)), [x]).eval()
    (1e-9 * network(x).sum()).backward()

    (1e-9 * half(x).sum()).backward()

    for name, parameter in network.named_parameters():
        torch.testing.assert_close(half.get_parameter(name).grad, parameter.grad, rtol=0.05, atol=1e-10)


def test_no_images_are_no_trouble_while_training() -> None:
    quantized = quantize_layers(Residual(), dict.fromkeys(LAYERS, FOUR), [IMAGES]).eval()
    quantized.stem.train()

    quantized(IMAGES[:0]).sum().backward()

    assert not quantized.stem.weight.grad.any()


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_layers_that_compute_their_weights_are_refused() -> None:
    network = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    message = r"^layer '0' computes its weight \(a parametrization\); make it a plain parameter first$"

    with pytest.raises(PolicyError, match=message):
        quantize_layers(network, {"0": FOUR}, [noise(5, 4)])

    assert quantizable_layers(network) == ("1",)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.encoder, self.last = nn.TransformerEncoder(layer, 1), nn.Linear(16, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        out: Tensor = self.last(self.encoder(x, src_key_padding_mask=padding).mean(1))
        return out


@pytest.mark.parametrize(("bits", "least"), [(1, 0.02), (8, 0.0)])
def test_layers_inside_an_encoder_that_the_trace_calls_as_one_are_quantized(bits: int, least: float) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Encoder().eval(), noise(4, 5, 16)
    inner = [f"encoder.layers.0.linear{i}" for i in (1, 2)]
    layers = dict.fromkeys(inner, LayerPolicy(weight_bits=bits, act_bits=8))

    quantized = quantize_layers(model, layers, [x]).eval()

    assert all(isinstance(quantized.get_submodule(name).act_quantizer, ActQuantizer) for name in inner)
    difference = (model(x) - quantized(x)).detach()
    with torch.no_grad():
        # The fast path of evaluation would pass the quantizers by.
        torch.testing.assert_close(model(x) - quantized(x), difference, atol=1e-5, rtol=0)
    assert float(difference.abs().max()) > least


class TakesAWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.a(x).relu(), self.b.weight)


def test_a_layer_of_which_a_function_takes_the_weight_never_runs() -> None:
    layers = dict.fromkeys(("a", "b"), INT8)

    with pytest.raises(CalibrationError, match="'b'"):
        quantize_layers(TakesAWeight().eval(), layers, [noise(4, 4)])


@pytest.mark.parametrize("choice", ["bits", "weight_bits", "density"])
def test_a_layer_of_which_a_function_takes_the_weight_is_offered_zeros_and_no_bits(choice: LayerChoice) -> None:
    graph = capture(nn.Sequential(TakesAWeight(), nn.Linear(4, 4), nn.Linear(4, 4)).eval(), noise(2, 4))

    offered = {decision.layer for decision in layer_decisions(graph, [choice], protect_first=False)}

    # The last layer stays dense.
    assert offered == ({"0.a", "0.b", "1"} if choice == "density" else {"0.a", "1", "2"})


def test_a_module_of_two_names_may_be_given_bits_by_either() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.other = self.one

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x).relu()

    model = Named().eval()
    by_first, by_second = (quantize_layers(model, {name: INT8}, [noise(4, 4)]) for name in ("one", "other"))

    assert torch.equal(by_second(noise(4, 4)), by_first(noise(4, 4)))
    assert not torch.equal(by_second(noise(4, 4)), model(noise(4, 4)))


def test_batches_that_are_drawn_into_one_tensor_are_all_looked_at() -> None:
    model, parts = nn.Sequential(nn.Linear(4, 4)).eval(), [noise(3, 4, seed=i) * (i + 1) for i in range(3)]

    def refilled() -> Iterator[Tensor]:
        held = torch.empty(3, 4)
        for part in reversed(parts):
            yield held.copy_(part)

    one, other = (quantize_layers(model, {"0": INT8}, batches) for batches in (parts[::-1], refilled()))

    assert torch.equal(one(parts[2]), other(parts[2]))


def test_a_network_keeps_its_mode_and_so_do_frozen_batch_norms(residual: nn.Module) -> None:
    residual.train()
    residual.bn1.eval()

    quantized = quantize_layers(residual, dict.fromkeys(LAYERS, INT8), [IMAGES])

    assert quantized.training and quantized.bn2.training and not quantized.bn1.training


def test_an_encoder_that_masks_padding_is_quantized() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Encoder().eval(), noise(4, 5, 16)
    padding = torch.arange(5).expand(4, -1) > 3

    quantized = quantize_layers(model, {"encoder.layers.0.linear1": FOUR}, [(x, padding)])

    assert torch.isfinite(quantized(x, padding)).all()
