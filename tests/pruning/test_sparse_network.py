from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import MobileNetV2, ResNet
from torchvision.models.resnet import BasicBlock

from experiments.resnet import CifarResNet
from pruning import sparse_network
from pruning.kernels.lowering import LoweringError
from pruning.kernels.plan import FORMATS
from pruning.sparse_network import SWEEPS, SparseNetworkError, measure_in_turn, sparsify

from .kernels.layers import assert_as_exact_as_torch, compiled


class Gated(nn.Module):
    """Squeeze-and-excitation with SiLU, a standalone batch norm, grouped channels, and operators only PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 5, padding=2)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.squeeze, self.excite = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)
        self.mix = nn.Conv2d(40, 18, 1)
        self.tokens = nn.Linear(18, 13)
        self.head = nn.Linear(13, 5)

    def forward(self, x: Tensor, offset: Tensor) -> dict[str, Tensor]:
        stem = F.silu(self.norm(F.silu(self.stem(x))))
        y = F.silu(self.grouped(stem))
        y = y * torch.sigmoid(self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        y = F.max_pool2d(torch.cat([y, stem], 1), 2, ceil_mode=True)
        y = F.hardswish(self.mix(y)) + offset[:, :, None, None]
        tokens = F.gelu(self.tokens(y.flatten(2).transpose(1, 2))).softmax(-1)
        return {"scores": self.head(tokens.mean(1)), "map": y}


def resnet() -> nn.Module:
    return ResNet(BasicBlock, [2, 1, 1, 1], num_classes=7)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet": (resnet, (3, 45, 38)),
    "ResNet, option A": (partial(CifarResNet, 2), (3, 19, 22)),
    "MobileNetV2": (partial(MobileNetV2, num_classes=6, width_mult=0.25), (3, 33, 40)),
    "gated": (Gated, (3, 13, 17)),
}


def network(constructor: Callable[[], nn.Module], density: float = 0.3) -> nn.Module:
    """A network in evaluation mode with zeros, in blocks of 8 where they fit, and batch norms that do something."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = constructor().eval()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight.data
            block = 8 if len(weight) % 8 == 0 else 1
            kept = torch.rand(len(weight) // block, 1, *weight.shape[1:], generator=generator) < density
            weight *= kept.expand(-1, block, *weight.shape[1:]).reshape(weight.shape)
    return model


def inputs_of(name: str, batch: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, *NETWORKS[name][1], generator=generator)
    return (x, torch.randn(batch, 18, generator=generator)) if name == "gated" else (x,)


def choose(form: str) -> Callable[[Mapping[str, Callable[[], object]]], dict[str, float]]:
    """A measuring function for which one form is always fastest, if it is a candidate."""
    return lambda candidates: {name: 1.0 if name == form else 2.0 for name in candidates}


def fastest_sparse(candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    return {name: 2.0 if name == "dense" else 1.0 for name in candidates}


def leaves(output: Tensor | dict[str, Tensor]) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output.values())


@pytest.fixture
def threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_sparse_network_is_as_exact_as_the_model_on_one_thread_and_on_two(
    name: str, batch: int, threads: object
) -> None:
    model, inputs = network(NETWORKS[name][0]), inputs_of(name, batch)

    sparse = sparsify(model, inputs, measure=fastest_sparse)

    assert {layer.form for layer in sparse.report.layers} - {"dense"}
    with torch.no_grad():
        expected = leaves(model(*inputs))
        exact = leaves(copy.deepcopy(model).double()(*(x.double() for x in inputs)))
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        for found, torch_found, one in zip(leaves(sparse(*inputs)), expected, exact, strict=True):
            assert_as_exact_as_torch(found, torch_found, one)


@compiled
@pytest.mark.parametrize("form", FORMATS)
def test_every_form_computes_what_the_model_computes(form: str) -> None:
    model, inputs = network(NETWORKS["ResNet, option A"][0]), inputs_of("ResNet, option A", 2)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]

    sparse = sparsify(model, inputs, choices=dict.fromkeys(names, form))

    assert {layer.form for layer in sparse.report.layers} == {form}
    with torch.no_grad():
        torch.testing.assert_close(sparse(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


@compiled
@pytest.mark.parametrize("name", ["ResNet", "ResNet, option A", "MobileNetV2"])
def test_a_network_of_known_operators_is_one_native_call(name: str) -> None:
    report = sparsify(network(NETWORKS[name][0]), inputs_of(name, 1), measure=choose("dense")).report

    assert (report.native_calls, report.foreign) == (1, ())


@compiled
def test_what_pytorch_runs_is_named() -> None:
    report = sparsify(network(Gated), inputs_of("gated", 1), measure=choose("dense")).report

    assert ("grouped", "aten.conv2d") in report.foreign
    assert "aten.softmax.int" in {kind for _, kind in report.foreign}
    assert report.native_calls > 1


@compiled
def test_a_layer_without_any_weight_gives_its_bias() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    model[0].weight.data.zero_()
    x = torch.randn(1, 3, 9, 7, generator=torch.Generator().manual_seed(0))

    sparse = sparsify(model, x, measure=fastest_sparse)

    assert sparse.report.layers[0].form != "dense"
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), model(x))


@compiled
def test_the_zeros_tell_which_forms_are_timed() -> None:
    model = nn.Sequential(nn.Conv2d(4, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)).eval()
    model[0].weight.data[:, ::2] = 0  # blocks of 16
    model[1].weight.data[::2, :8] = 0  # every second of half the columns, so that no block stores fewer than all
    model[2].weight.data[:8, ::4] = 0  # an eighth of the weights
    timed: list[list[str]] = []

    def measure(candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        timed.append(list(candidates))
        return dict.fromkeys(candidates, 1.0)

    report = sparsify(model, torch.zeros(1, 4, 5, 5), measure=measure).report

    assert timed == [["dense", "block 16"], ["dense", "unstructured"]] * SWEEPS
    assert [layer.form for layer in report.layers] == ["dense"] * 3
    assert report.layers[0].reason == "the fastest other form, block 16, runs at 1.00 times the dense speed"
    assert report.layers[2].reason == "88% of the weights are not zero, and no sparse form stores fewer than 75%"


@compiled
def test_a_3x3_convolution_of_stride_1_may_run_by_winograd() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, 2), nn.Conv2d(8, 8, 3, groups=8)).eval()
    x = torch.randn(2, 4, 19, 18, generator=torch.Generator().manual_seed(0))

    sparse = sparsify(model, x, measure=choose("winograd"))

    assert {layer.layer: layer.form for layer in sparse.report.layers} == {"0": "winograd", "1": "dense"}
    assert sparse.report.layers[0].reason == "2.00 times the dense speed"
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), model(x), rtol=1e-5, atol=1e-5)


@compiled
def test_one_disturbed_sweep_does_not_change_the_choice() -> None:
    model = nn.Sequential(nn.Conv2d(4, 16, 1)).eval()
    model[0].weight.data[:, ::2] = 0
    sweeps = iter([{"dense": 1.0, "block 16": 5.0}, {"dense": 3.0, "block 16": 0.5}, {"dense": 0.4, "block 16": 0.5}])

    report = sparsify(model, torch.zeros(1, 4, 5, 5), measure=lambda _: next(sweeps)).report

    assert report.layers[0].seconds == {"dense": 0.4, "block 16": 0.5}
    assert report.layers[0].form == "dense"


@compiled
def test_recorded_choices_are_taken_without_timing() -> None:
    model, inputs = network(NETWORKS["ResNet, option A"][0]), inputs_of("ResNet, option A", 1)
    first = sparsify(model, inputs, measure=fastest_sparse)

    def refuse(_: object) -> dict[str, float]:
        raise AssertionError

    again = sparsify(model, inputs, measure=refuse, choices=first.report.choices)

    assert again.report.choices == first.report.choices
    assert torch.equal(again(*inputs), first(*inputs))


@compiled
def test_layers_called_twice_have_names_of_their_own() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.relu(self.conv(x)))

    model, x = Twice().eval(), torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(0))

    sparse = sparsify(model, x)

    assert list(sparse.report.choices) == ["conv", "conv (2)"]
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), model(x))


@compiled
@pytest.mark.parametrize("form", ["dense", "unstructured"])
def test_linear_layers_take_tensors_of_any_dimensions(form: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).eval()
    for size in ((2, 6), (2, 3, 6), (2, 3, 4, 6)):
        x = torch.randn(size, generator=torch.Generator().manual_seed(0))

        sparse = sparsify(model, x, choices={"0": form, "2": form})

        with torch.no_grad():
            torch.testing.assert_close(sparse(x), model(x))


class Stacked(nn.Module):
    """A plan behind an operator that only PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(64, 64), nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.linear(x)[:, None])


@compiled
def test_autocast_does_not_reach_a_sparse_network() -> None:
    model, x = network(Stacked), torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    sparse = sparsify(model, x, measure=choose("dense"))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sparse(x)

    with torch.no_grad():
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


@compiled
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_reach_a_sparse_network(dtype: torch.dtype) -> None:
    model, x = network(Stacked), torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
    before = sparsify(model, x, measure=choose("dense"))
    torch.set_default_dtype(dtype)
    try:
        found = [before(x), sparsify(model, x, measure=choose("dense"))(x)]
    finally:
        torch.set_default_dtype(torch.float32)

    for one in found:
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)


@compiled
def test_the_default_device_does_not_reach_a_sparse_network() -> None:
    model, x = network(Stacked), torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    sparse = sparsify(model, x, measure=choose("dense"))

    with torch.device("meta"):
        found = sparse(x)

    with torch.no_grad():
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


def test_constants_that_are_returned_are_the_callers_own() -> None:
    class Numbered(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, torch.arange(3.0)

    sparse = sparsify(Numbered().eval(), torch.zeros(1, 3))

    sparse(torch.zeros(1, 3))[1].add_(5)

    assert sparse(torch.zeros(1, 3))[1].tolist() == [0.0, 1.0, 2.0]


def test_preparing_leaves_the_model_as_it_was() -> None:
    model, inputs = network(NETWORKS["ResNet, option A"][0]), inputs_of("ResNet, option A", 1)
    before = copy.deepcopy(model.state_dict())

    sparse = sparsify(model, inputs, measure=choose("dense"))
    expected = sparse(*inputs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    model.conv1.weight.data.zero_()
    assert torch.equal(sparse(*inputs), expected)


@pytest.mark.parametrize("name", ["ResNet, option A", "gated"])
def test_without_the_library_pytorch_computes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_network, "library", lambda: None)
    model, inputs = network(NETWORKS[name][0]), inputs_of(name, 2)

    sparse = sparsify(model, inputs)

    assert (sparse.report.native_calls, sparse.report.instruction_set) == (0, None)
    with torch.no_grad():
        for found, expected in zip(leaves(sparse(*inputs)), leaves(model(*inputs)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_candidates_are_called_as_often_as_asked_for() -> None:
    calls = {"a": 0, "b": 0}

    def call(name: str) -> Callable[[], object]:
        return lambda: calls.__setitem__(name, calls[name] + 1)

    seconds = measure_in_turn({name: call(name) for name in calls}, rounds=4)

    assert calls == {"a": 7, "b": 7}  # three of them before the clock runs
    assert all(0 < value < 1 for value in seconds.values())


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()


def strided() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU()).eval()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: sparsify(small().train(), torch.zeros(1, 3, 8, 8)),
            "Sequential is in training mode; call model.eval() before preparing it for inference",
        ),
        (
            lambda: sparsify(small().double(), torch.zeros(1, 3, 8, 8)),
            "'0.weight' is torch.float64 on 'cpu'; sparse networks run in torch.float32 on 'cpu', so convert the "
            "network and its inputs first",
        ),
        (
            lambda: sparsify(small(), torch.zeros(1, 3, 8, 8), choices={"1": "dense"}),
            "choices names the layer '1'; layers that have a choice are '0': leave out the others",
        ),
        (
            lambda: sparsify(small(), torch.zeros(1, 3, 8, 8), choices={"0": "block 5"}),
            "choices asks for the form 'block 5' of '0'; allowed there are dense, unstructured, block 4, block 8, "
            "block 16, winograd (winograd for 3x3 convolutions of stride 1 only). Leave the layer out to have its "
            "forms timed",
        ),
        (
            lambda: sparsify(strided(), torch.zeros(1, 3, 8, 8), choices={"0": "winograd"}),
            "choices asks for the form 'winograd' of '0'; allowed there are dense, unstructured, block 4, block 8, "
            "block 16 (winograd for 3x3 convolutions of stride 1 only). Leave the layer out to have its forms timed",
        ),
        (
            lambda: sparsify(small(), torch.zeros(1, 3, 8, 8))(torch.zeros(2, 3, 8, 8)),
            "input 0 is torch.float32 of shape (2, 3, 8, 8) on 'cpu'; the sparse network was prepared for "
            "torch.float32 of shape (1, 3, 8, 8) on 'cpu', so prepare another one for such inputs",
        ),
        (
            lambda: sparsify(small(), torch.zeros(1, 3, 8, 8))(),
            "the sparse network was prepared for 1 input(s), got 0",
        ),
        (
            lambda: sparsify(small(), torch.zeros(1, 3, 8, 8)).train(),
            "a sparse network is for inference only; train the model that it was prepared from, and prepare again",
        ),
    ],
)
def test_what_cannot_be_prepared_or_run_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(SparseNetworkError, match=f"^{re.escape(message)}$"):
        call()


def test_a_network_that_cannot_be_exported_is_named() -> None:
    class Undecided(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(LoweringError, match=r"^Undecided cannot be exported, so it cannot run as one plan: "):
        sparsify(Undecided().eval(), torch.zeros(1, 3))


def test_copying_says_how_to_save() -> None:
    sparse = sparsify(small(), torch.zeros(1, 3, 8, 8))
    message = (
        "a sparse network cannot be copied or pickled, since it holds addresses; save the model it was prepared from, "
        "and call sparsify(model, example_inputs, choices=network.report.choices)"
    )
    for copying in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            copying(sparse)
