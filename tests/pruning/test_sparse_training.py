import copy
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pruning.density import Gradual, OneShot
from pruning.finetune import CheckpointError, finetune
from pruning.layer_policy import LayerPolicy, PolicyError
from pruning.sparse_training import corrected_dropout, dropout_sources, hold_zeros, l1_penalty, prune_along
from pruning.sparsity import zero_weights
from tests.pruning.kernels.layers import compiled
from tests.pruning.test_finetune import Blobs, KilledError, network, states_are_equal

LAYERS = {"0": LayerPolicy("block4", 0.25), "4": LayerPolicy("2:4")}
SCHEDULE = Gradual(start=2, end=14, every=3)


def sparse_network() -> nn.Sequential:
    model = network()
    zero_weights(model, LAYERS)
    return model


def zeros_of(model: nn.Sequential) -> dict[str, Tensor]:
    return {name: model.get_submodule(name).weight.detach() == 0 for name in LAYERS}


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
    ],
)
def test_zeros_stay_exactly_zero_under_any_optimizer_and_the_rest_is_trained(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> None:
    model = sparse_network()
    before, zeros = {n: p.detach().clone() for n, p in model.named_parameters()}, zeros_of(model)
    data = Blobs()
    # Steps before the zeros are held: what the optimizer remembers of them may not bring the weights back.
    optimizer = make(list(model.parameters()))
    F.cross_entropy(model(data.points), data.labels).backward()
    optimizer.step()
    with torch.no_grad():
        for name, weight in before.items():
            model.get_parameter(name).copy_(weight)

    with hold_zeros(model, LAYERS):
        for points, labels in data(0):
            optimizer.zero_grad()
            F.cross_entropy(model(points), labels).backward()
            optimizer.step()

    assert all(torch.equal(zeros[name], found) for name, found in zeros_of(model).items())
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_kept_weights_train_as_they_would_with_the_mask_in_the_forward_pass() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    layers = {"0": LayerPolicy("unstructured", 0.3)}
    zero_weights(model, layers)
    weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
    mask = (weights[0] != 0).float()
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    data = Blobs(n_batches=1)
    for epoch in range(4):
        for points, labels in data(epoch):
            hidden = F.linear(points, weights[0] * mask, weights[1]).relu()
            optimizer.param_groups[0]["lr"] = 0.05 * (1 + torch.cos(torch.tensor(torch.pi * epoch / 4)).item())
            optimizer.zero_grad()
            F.cross_entropy(F.linear(hidden, weights[2], weights[3]), labels).backward()
            optimizer.step()

    with hold_zeros(model, layers):
        finetune(model, data, epochs=4, learning_rate=0.1, warmup_steps=0)

    torch.testing.assert_close(model[0].weight, (weights[0] * mask).detach())
    torch.testing.assert_close(model[2].weight, weights[2].detach())


SKIPPED = {"0": LayerPolicy("unstructured", 0.3), "2": LayerPolicy("block8", 0.25)}


def convolutions() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 16, (3, 1), stride=2, dilation=(2, 1), bias=False),
            nn.ReLU(),
            nn.Conv2d(16, 4, 1),
        )
    zero_weights(model, SKIPPED)
    return model


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    x.grad = None
    model(x).pow(2).sum().backward()
    return {name: p.grad for name, p in [*model.named_parameters(), ("x", x)]}


@compiled
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_skipped_zeros_give_the_gradients_of_dense_layers_whose_zeros_are_held(layout: torch.memory_format) -> None:
    model = convolutions()
    x = torch.randn(5, 3, 9, 8, generator=torch.Generator().manual_seed(1))
    x = x.contiguous(memory_format=layout).requires_grad_()
    with hold_zeros(model, SKIPPED):
        expected = gradients(model, x)

    with hold_zeros(model, SKIPPED, skip=True):
        found = gradients(model, x)

    assert all(bool((found[f"{name}.weight"] != 0).any()) for name in SKIPPED)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@compiled
def test_zeros_are_skipped_only_where_the_kernels_take_the_layer_and_gain() -> None:
    def operator_of(layer: nn.Module, x: Tensor) -> str:
        return str(layer(x).grad_fn.name())

    model, x = convolutions(), torch.randn(1, 3, 9, 9)
    denser, grouped = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 9, 3, groups=3)
    model.denser, model.grouped = denser, grouped
    zero_weights(model, {"denser": LayerPolicy("unstructured", 0.5), "grouped": LayerPolicy("unstructured", 0.2)})

    with hold_zeros(model, [*SKIPPED, "denser", "grouped"], skip=True):
        assert "Skipping" in operator_of(model[0], x)
        assert "Convolution" in operator_of(denser, x)
        assert "Convolution" in operator_of(grouped, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert "Convolution" in operator_of(model[0], x)

    assert "Convolution" in operator_of(model[0], x)
    assert "_conv_forward" not in vars(model[0])


@compiled
def test_gradients_of_skipped_zeros_are_not_differentiated_again() -> None:
    model, x = convolutions(), torch.randn(1, 3, 9, 9, requires_grad=True)
    with hold_zeros(model, SKIPPED, skip=True):
        (gradient,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)

        with pytest.raises(RuntimeError, match=r"once_differentiable"):
            gradient.sum().backward()


@compiled
def test_skipped_zeros_take_the_inputs_that_the_layer_takes() -> None:
    model = convolutions()
    with hold_zeros(model, SKIPPED, skip=True), pytest.raises(RuntimeError, match=r"to have 3 channels, but got 7"):
        model[0](torch.zeros(1, 7, 9, 9))


@compiled
def test_a_pattern_loaded_from_a_checkpoint_is_the_one_that_is_skipped() -> None:
    model, x = convolutions(), torch.randn(2, 3, 9, 9)
    other = copy.deepcopy(model)
    other[0].weight.data.copy_(other[0].weight.flip(1))
    with hold_zeros(other, SKIPPED):
        state = copy.deepcopy(other.state_dict())
    with hold_zeros(model, SKIPPED, skip=True):
        model(x)
        model.load_state_dict(state)

        found = model.eval()(x)

    torch.testing.assert_close(found, other.eval()(x))


def test_the_network_is_left_as_it_was_found_and_trains_freely_again() -> None:
    model = sparse_network()
    names, zeros = list(model.state_dict()), zeros_of(model)
    with pytest.raises(KilledError), prune_along(model, LAYERS, SCHEDULE), l1_penalty(model, LAYERS, 1e-3):
        assert len(list(model.state_dict())) == len(names) + 3
        raise KilledError

    assert list(model.state_dict()) == names
    finetune(model, Blobs(), epochs=1, learning_rate=0.1)
    assert not any(torch.equal(zeros[name], found) for name, found in zeros_of(model).items())


def test_pattern_tightens_as_the_schedule_says_and_never_opens_again() -> None:
    model = network()
    seen: list[dict[str, Tensor]] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    data = Blobs()
    with prune_along(model, LAYERS, SCHEDULE):
        for epoch in range(4):
            for points, labels in data(epoch):
                seen.append(zeros_of(model))
                optimizer.zero_grad()
                F.cross_entropy(model(points), labels).backward()
                optimizer.step()

    for step, zeros in enumerate(seen):
        # 18 blocks of 4 weights; 2 rows of 12 inputs, of which 4, 3 or 2 in 4 are left.
        blocks = 18 - int(18 * SCHEDULE.density(0.25, step) + 1e-9)
        assert int(zeros["0"].sum()) == 4 * blocks
        n = next(n for n in (2, 3, 4) if n / 4 >= SCHEDULE.density(0.5, step) - 1e-6)
        assert int(zeros["4"].sum()) == 2 * 3 * (4 - n)
    for earlier, later in itertools.pairwise(seen):
        assert all(bool((earlier[name] <= later[name]).all()) for name in LAYERS)
    assert int(seen[-1]["0"].sum()) == 4 * 14 and int(seen[-1]["4"].sum()) == 12


def test_momentum_of_a_weight_goes_with_the_weight() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    data = Blobs()
    with prune_along(model, {"0": LayerPolicy("unstructured", 0.5)}, OneShot(at=3)):
        for points, labels in data(0):
            optimizer.zero_grad()
            F.cross_entropy(model(points), labels).backward()
            optimizer.step()

    momentum = optimizer.state[model[0].weight]["momentum_buffer"]
    dropped = model[0].weight == 0
    assert int(dropped.sum()) == 36
    assert not momentum[dropped].any() and bool(momentum[~dropped].any())


@pytest.mark.parametrize("after", [1, 2, 4])
def test_resumed_gradual_pruning_is_bit_equal_to_an_uninterrupted_one(tmp_path: Path, after: int) -> None:
    whole, fresh = network(), network(seed=1)
    with prune_along(whole, LAYERS, SCHEDULE):
        finetune(whole, Blobs(), epochs=5, learning_rate=0.1)

    def kill(epoch: int, loss: float, accuracy: float) -> None:
        if epoch == after:
            raise KilledError

    killed, path = network(), tmp_path / "state.pt"
    with pytest.raises(KilledError), prune_along(killed, LAYERS, SCHEDULE):
        finetune(killed, Blobs(), epochs=5, learning_rate=0.1, checkpoint=path, on_epoch=kill)
    with prune_along(fresh, LAYERS, SCHEDULE):
        report = finetune(fresh, Blobs(), epochs=5, learning_rate=0.1, checkpoint=path)

    assert report.resumed_epoch == after
    assert states_are_equal(fresh, whole)


def test_held_zeros_of_a_resumed_run_are_those_of_its_checkpoint(tmp_path: Path) -> None:
    whole, fresh = sparse_network(), network(seed=1)
    with hold_zeros(whole, LAYERS):
        finetune(whole, Blobs(), epochs=2, learning_rate=0.1, checkpoint=tmp_path / "state.pt")

    with hold_zeros(fresh, LAYERS):
        finetune(fresh, Blobs(), epochs=2, learning_rate=0.1, checkpoint=tmp_path / "state.pt")

    assert states_are_equal(fresh, whole)


def test_a_checkpoint_of_another_schedule_is_refused(tmp_path: Path) -> None:
    def kill(epoch: int, loss: float, accuracy: float) -> None:
        raise KilledError

    model, path = network(), tmp_path / "state.pt"
    with pytest.raises(KilledError), prune_along(model, LAYERS, SCHEDULE):
        finetune(model, Blobs(), epochs=2, learning_rate=0.1, checkpoint=path, on_epoch=kill)

    other = {**LAYERS, "0": LayerPolicy("block4", 0.5)}
    model = network()
    with pytest.raises(CheckpointError) as caught, prune_along(model, other, SCHEDULE):
        finetune(model, Blobs(), epochs=2, learning_rate=0.1, checkpoint=path)

    assert str(caught.value) == (
        "the checkpoint is of a training with other sparse layers or another schedule; use the same ones, or delete it"
    )


def test_an_optimizer_of_another_network_neither_counts_nor_is_touched() -> None:
    model, other = network(), network()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
    data = Blobs()
    with prune_along(model, LAYERS, OneShot(at=1)):
        for points, labels in data(0):
            optimizer.zero_grad()
            F.cross_entropy(other(points), labels).backward()
            optimizer.step()
        assert not any(zeros.any() for zeros in zeros_of(model).values())
    assert not any(zeros.any() for zeros in zeros_of(other).values())


def test_a_pattern_that_does_not_fit_is_refused_before_any_training() -> None:
    with (
        pytest.raises(PolicyError, match=r"^the policy does not fit the network: layer '0' has 12 output channels, .*"),
        prune_along(network(), {"0": LayerPolicy("block8", 0.5)}, SCHEDULE),
    ):
        pass


def test_frozen_layers_are_held_too() -> None:
    model = sparse_network()
    model[0].weight.requires_grad_(False)
    zeros = zeros_of(model)
    with hold_zeros(model, LAYERS):
        finetune(model, Blobs(), epochs=1, learning_rate=0.1)
    assert all(torch.equal(zeros[name], found) for name, found in zeros_of(model).items())


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    for points, labels in Blobs()(0):
        model.zero_grad()
        F.cross_entropy(model(points), labels).backward()
        for optimizer in optimizers:
            optimizer.step()


def test_zeros_are_held_under_several_optimizers_that_remember_steps_from_before() -> None:
    model = network()
    optimizers = [torch.optim.SGD(model[int(name)].parameters(), lr=0.05, momentum=0.9) for name in LAYERS]
    train(model, optimizers)
    zero_weights(model, LAYERS)
    zeros = zeros_of(model)

    with hold_zeros(model, LAYERS):
        train(model, optimizers)

    assert all(torch.equal(zeros[name], found) for name, found in zeros_of(model).items())


def test_a_cut_reaches_the_momentum_of_every_optimizer() -> None:
    model = network()
    optimizers = [torch.optim.SGD(model[int(name)].parameters(), lr=0.05, momentum=0.9) for name in LAYERS]

    with prune_along(model, LAYERS, OneShot(at=2)):
        train(model, optimizers)

    # 14 of 18 blocks of 4 weights, and 2 of 4 weights of 2 rows of 12.
    assert [int(zeros.sum()) for zeros in zeros_of(model).values()] == [56, 12]


def test_layers_that_are_trained_only_later_are_held_too() -> None:
    model = sparse_network()
    model[0].weight.requires_grad_(False)
    zeros, before = zeros_of(model), model[0].weight.clone()

    with hold_zeros(model, LAYERS):
        assert not model[0].weight.requires_grad
        model[0].weight.requires_grad_()
        finetune(model, Blobs(), epochs=1, learning_rate=0.1)

    assert not torch.equal(model[0].weight, before)
    assert all(torch.equal(zeros[name], found) for name, found in zeros_of(model).items())


@pytest.mark.parametrize(
    "hold", [lambda model: hold_zeros(model, ["4"]), lambda model: prune_along(model, LAYERS, SCHEDULE)]
)
def test_zeros_are_held_once_at_a_time(hold: Callable[[nn.Module], AbstractContextManager[None]]) -> None:
    model = sparse_network()
    names, zeros = list(model.state_dict()), zeros_of(model)
    message = "zeros of Sequential are held already; hold those of all layers at once"

    with hold_zeros(model, ["0"]), pytest.raises(PolicyError, match=f"^{message}$"), hold(model):
        pass

    assert list(model.state_dict()) == names
    assert all(torch.equal(zeros[name], found) for name, found in zeros_of(model).items())


def test_l1_adds_the_gradient_of_its_penalty() -> None:
    model = sparse_network().eval()
    data = Blobs()
    loss = F.cross_entropy(model(data.points), data.labels) + 0.3 * model[0].weight.abs().sum()
    expected = torch.autograd.grad(loss, list(model.parameters()))

    with l1_penalty(model, ["0"], 0.3):
        F.cross_entropy(model(data.points), data.labels).backward()

    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


class Branches(nn.Module):
    """A dropout behind two layers and an activation, one behind a pooled layer, one that reads no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Dropout(0.1)
        self.left = nn.Linear(6, 8)
        self.right = nn.Linear(6, 8)
        self.both = nn.Dropout(0.4)
        self.hidden = nn.Linear(8, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Dropout1d(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.both(self.left(x).relu_() + self.right(x))
        return self.last(self.norm(self.hidden(x)).relu())


def test_each_dropout_knows_the_layers_it_reads() -> None:
    model = Branches()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert dropout_sources(model, torch.zeros(3, 6)) == {"both": ("left", "right"), "last": ("hidden",)}
    assert model.training


def test_dropout_shrinks_with_the_square_root_of_the_connections_left_and_comes_back() -> None:
    model = Branches()
    zero_weights(model, {"left": LayerPolicy("unstructured", 0.5), "hidden": LayerPolicy("unstructured", 0.25)})
    with corrected_dropout(model, torch.zeros(3, 6)):
        # Half of one of two equal layers is a quarter of their connections.
        assert model.both.p == pytest.approx(0.4 * 0.75**0.5)
        assert model.last.p == pytest.approx(0.5 * 0.5)
        assert model.first.p == 0.1
    assert (model.first.p, model.both.p, model.last.p) == (0.1, 0.4, 0.5)


def test_training_holds_a_byte_a_weight_and_nothing_more() -> None:
    model = sparse_network()
    before = {name: tensor.untyped_storage().nbytes() for name, tensor in model.state_dict().items()}
    with hold_zeros(model, LAYERS):
        added = {n: t for n, t in model.state_dict().items() if n not in before}
        n_weights = sum(model.get_submodule(name).weight.numel() for name in LAYERS)
        assert sum(tensor.untyped_storage().nbytes() for tensor in added.values()) == n_weights + 16


@pytest.mark.parametrize("names", [("0", "2"), ("2", "0")])
def test_layers_are_pruned_beside_a_frozen_one_in_any_order(names: tuple[str, str]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    model[0].requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)

    with prune_along(model, dict.fromkeys(names, LayerPolicy("unstructured", 0.25)), Gradual(0, 5, 1)):
        for seed in range(8):
            optimizer.zero_grad()
            model(torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
            optimizer.step()

    assert [float((model[i].weight != 0).float().mean()) for i in (0, 2)] == [0.25, 0.25]
