import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from graph_encoder.batches import Batch
from graph_encoder.capture import capture
from pruning import reconstruction
from pruning.batch_norm import reestimate_batch_norm
from pruning.policy import CompressionPolicy
from pruning.reconstruction import MOST_BYTES, most_images, reconstruct
from pruning.surgery import apply_policy


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.Conv2d(6, 5, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(80, 4),
    ).eval()


def test_a_channel_that_others_can_express_is_replaced_exactly() -> None:
    model = net()
    with torch.no_grad():
        # The last channel of the first layer is a sum of two others, and no nonlinearity stands between.
        model[0].weight[5] = model[0].weight[0] + 2 * model[0].weight[1]
        model[0].bias[5] = model[0].bias[0] + 2 * model[0].bias[1]
    images = torch.randn(64, 3, 8, 8)
    graph = capture(model, images[:2])
    policy = CompressionPolicy({"0": (0, 1, 2, 3, 4)}, {"0": 6})
    small = apply_policy(model, graph, policy)
    # The border sees zeros in place of the bias; a bias of zero makes the replacement exact there too.
    before = (small(images) - model(images)).abs().max()

    reconstruct(model, small, graph, policy, [images], generator=torch.Generator().manual_seed(0), ridge=1e-9)

    after = (small(images) - model(images)).abs().max()
    assert after < 1e-3 < before


def test_error_on_unseen_images_falls_and_modes_stay() -> None:
    model = net()
    with torch.no_grad():
        for copied in (1, 3, 5):
            model[0].weight[copied] = model[0].weight[copied - 1] + 0.2 * model[0].weight[copied]
    images = torch.randn(128, 3, 8, 8)
    graph = capture(model, images[:2])
    policy = CompressionPolicy({"0": (0, 2, 4)}, {"0": 6})
    plain, fitted = apply_policy(model, graph, policy), apply_policy(model, graph, policy)
    dense = model[1].weight.clone()

    reconstruct(model, fitted, graph, policy, [images], generator=torch.Generator().manual_seed(0))

    unseen = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        error = {
            name: (m(unseen) - model(unseen)).square().mean() for name, m in (("plain", plain), ("fitted", fitted))
        }
    assert error["fitted"] < 0.2 * error["plain"]
    assert not fitted.training and torch.equal(model[1].weight, dense)


def relative_error(small: nn.Module, model: nn.Module, images: torch.Tensor) -> float:
    with torch.no_grad():
        target = model(images)
        return float((small(images) - target).square().mean() / target.square().mean())


def test_a_layer_without_bias_or_batch_norm_is_fitted_to_the_means_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Sigmoid(), nn.Linear(16, 5, bias=False)).eval()
    images = torch.randn(512, 12)
    graph = capture(model, images[:2])
    policy = CompressionPolicy({"0": tuple(range(6))}, {"0": 16})
    plain, fitted = apply_policy(model, graph, policy), apply_policy(model, graph, policy)

    reconstruct(model, fitted, graph, policy, [images], generator=torch.Generator().manual_seed(0))

    unseen = torch.randn(256, 12)
    assert relative_error(fitted, model, unseen) < 0.2 * relative_error(plain, model, unseen)


class Twice(nn.Module):
    """One layer on two sizes of image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.shared(y).mean((2, 3)) + self.shared(nn.functional.avg_pool2d(y, 2)).mean((2, 3))


def test_a_layer_that_runs_twice_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    model, images = Twice().eval(), torch.randn(8, 3, 8, 8)
    graph = capture(model, images[:2])
    policy = CompressionPolicy({"first": (0, 1, 2, 3)}, {"first": 8})
    plain, fitted = apply_policy(model, graph, policy), apply_policy(model, graph, policy)

    reconstruct(model, fitted, graph, policy, [images], generator=torch.Generator().manual_seed(0))

    assert torch.equal(fitted.get_parameter("shared.weight"), plain.get_parameter("shared.weight"))


class TwoBranches(nn.Module):
    """A sum of which one branch can take over what the other loses."""

    def __init__(self, norm: nn.Module, between: nn.Module) -> None:
        super().__init__()
        self.narrow, self.from_narrow = nn.Linear(6, 6, bias=False), nn.Linear(6, 5)
        self.wide, self.from_wide = nn.Linear(6, 14, bias=False), nn.Linear(14, 5)
        self.norm, self.between = norm, between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.from_narrow(self.narrow(x))
        out = self.between(self.norm(self.from_wide(self.wide(x))))
        out += shortcut
        return out


def trained_norm() -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -1.0, 2.0, 1.5, -0.7]))
        norm.bias.uniform_(-1, 1)
    return norm


def rebuilt(model: nn.Module) -> float:
    images = torch.randn(512, 6)
    for _ in range(300):  # statistics as if trained
        model.train()(images)
    graph = capture(model.eval(), images[:2])
    policy = CompressionPolicy({"narrow": (0, 1), "wide": tuple(range(12))}, {"narrow": 6, "wide": 14})
    small = apply_policy(model, graph, policy)
    reconstruct(model, small, graph, policy, [images], generator=torch.Generator().manual_seed(0), ridge=1e-9)
    reestimate_batch_norm(small, [images])
    return relative_error(small, model, torch.randn(256, 6))


@pytest.mark.parametrize("normed", [False, True])
def test_one_branch_of_a_sum_makes_up_for_what_the_other_lost(normed: bool) -> None:
    torch.manual_seed(0)
    with_sum = rebuilt(TwoBranches(trained_norm() if normed else nn.Identity(), nn.Identity()))
    # Four of six inputs are lost to the narrow branch; the twelve sums left to the wide one hold all six.
    assert with_sum < (0.05 if normed else 1e-6)


class SumAsStatement(TwoBranches):
    """The same sum, whose result is not assigned."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.from_narrow(self.narrow(x))
        out = self.between(self.norm(self.from_wide(self.wide(x))))
        out.add_(shortcut)
        return out


@pytest.mark.parametrize("normed", [False, True])
def test_a_sum_in_place_is_fitted_whether_it_is_assigned_or_not(normed: bool) -> None:
    def error(kind: type[TwoBranches]) -> float:
        torch.manual_seed(0)
        return rebuilt(kind(trained_norm() if normed else nn.Identity(), nn.Identity()))

    assert error(SumAsStatement) == error(TwoBranches)


class NormAfterActivation(nn.Module):
    """As in ConvMixer: the batch norm reads what an activation makes of the layer's output, and a sum follows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.inner, self.last = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.norm(functional.gelu(self.first(x)))
        return self.last(functional.relu(self.inner(x)))


def test_a_batch_norm_behind_an_activation_is_not_taken_for_the_layers_own() -> None:
    torch.manual_seed(0)
    model, images = NormAfterActivation(), torch.randn(64, 3, 6, 6)
    for _ in range(100):  # statistics as if trained
        model.train()(images)
    graph = capture(model.eval(), images[:2])
    policy = CompressionPolicy({"stem": (0, 2, 3, 4, 5, 6, 7)}, {"stem": 8})
    plain, fitted = (apply_policy(model, graph, policy) for _ in range(2))

    reconstruct(model, fitted, graph, policy, [images], generator=torch.Generator().manual_seed(0))

    for small in (plain, fitted):
        reestimate_batch_norm(small, [images])
    unseen = torch.randn(64, 3, 6, 6)
    assert relative_error(fitted, model, unseen) < relative_error(plain, model, unseen)


class OwnBranch(nn.Module):
    """As in MobileNet-V2: a projection is added to what a branch makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.project = nn.Linear(6, 14), nn.Linear(14, 6)
        self.expand, self.back = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.project(functional.relu(self.wide(x)))
        return x + self.back(functional.relu(self.expand(x)))


def test_a_layer_whose_output_a_branch_reads_is_not_fitted_beside_that_branch() -> None:
    torch.manual_seed(0)
    model, images = OwnBranch().eval(), torch.randn(512, 6)
    graph = capture(model, images[:2])
    policy = CompressionPolicy({"wide": tuple(range(9))}, {"wide": 14})
    fitted = apply_policy(model, graph, policy)

    reconstruct(model, fitted, graph, policy, [images], generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        hidden = functional.relu(fitted.get_submodule("wide")(images))
        alone = torch.linalg.lstsq(
            torch.cat([hidden, torch.ones(512, 1)], 1), model.project(functional.relu(model.wide(images)))
        ).solution
        assert torch.allclose(fitted.get_submodule("project")(hidden), hidden @ alone[:-1] + alone[-1], atol=0.05)


def test_a_branch_that_changes_before_the_sum_is_fitted_alone() -> None:
    torch.manual_seed(0)
    # The output is changed in place: the tensor is the same, and what is in it is not what the layer put out.
    assert 0.01 < rebuilt(TwoBranches(trained_norm(), nn.ReLU(inplace=True))) < 1


def test_statistics_of_batch_norms_are_put_back_where_the_candidate_fails() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5)).eval()
    images = torch.randn(8, 3, 4, 4)
    graph = capture(model, images[:2])
    policy = CompressionPolicy({"0": (0, 1, 2)}, {"0": 6})
    small = apply_policy(model, graph, policy)
    before = {name: buffer.clone() for name, buffer in small.named_buffers()}

    def fail(*_: object) -> None:
        raise MemoryError

    small.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        reconstruct(model, small, graph, policy, [images], generator=torch.Generator().manual_seed(0))

    assert not any(module.training for module in small.modules())
    assert all(torch.equal(buffer, before[name]) for name, buffer in small.named_buffers())


def images_at_once(n_batches: int) -> set[int]:
    """How many images the forward passes of a reconstruction on batches of 16 take."""
    model, batches = net(), [torch.randn(16, 3, 8, 8) for _ in range(n_batches)]
    graph = capture(model, batches[0])
    policy = CompressionPolicy({"0": (0, 2, 4)}, {"0": 6})
    small, seen = apply_policy(model, graph, policy), set()
    for network in (model, small):
        network.register_forward_pre_hook(lambda _, inputs: seen.add(len(inputs[0])))
    reconstruct(model, small, graph, policy, batches, generator=torch.Generator().manual_seed(0))
    return seen


def test_no_forward_pass_takes_more_images_than_its_largest_output_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first layer puts out 6 maps of 8x8 values of 4 bytes.
    monkeypatch.setattr(reconstruction, "MOST_BYTES", 40 * 4 * 6 * 8 * 8)

    assert images_at_once(n_batches=2) == {32}
    assert images_at_once(n_batches=3) == {40}
    assert images_at_once(n_batches=20) == {40}


def test_positions_make_up_for_images_that_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "MOST_BYTES", 16 * 4 * 6 * 8 * 8)
    model, batches = net(), list(torch.randn(64, 3, 8, 8).split(16))
    graph = capture(model, batches[0])
    policy = CompressionPolicy({"0": (0, 2, 4)}, {"0": 6})
    once, again = apply_policy(model, graph, policy), apply_policy(model, graph, policy)

    reconstruct(model, once, graph, policy, batches, generator=torch.Generator().manual_seed(0), n_positions=2)
    reconstruct(model, again, graph, policy, batches[:1], generator=torch.Generator().manual_seed(0), n_positions=8)

    assert all(torch.equal(one, other) for one, other in zip(once.parameters(), again.parameters(), strict=True))


def test_a_network_of_two_inputs_is_fitted_on_tuples_as_one_of_one_input_is_on_tensors() -> None:
    class TwoInputs(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
            return self.body(x + shift)

    one, images, shift = net(), torch.randn(32, 3, 8, 8), torch.randn(32, 1, 8, 8)
    two = TwoInputs(one)
    pairs = list(zip(images.split(8), shift.split(8), strict=True))

    def fitted(model: nn.Module, batches: list[Batch], prefix: str) -> nn.Module:
        graph = capture(model, batches[0])
        policy = CompressionPolicy({f"{prefix}0": (0, 2, 4)}, {f"{prefix}0": 6})
        small = apply_policy(model, graph, policy)
        reconstruct(model, small, graph, policy, batches, generator=torch.Generator().manual_seed(0))
        return small

    small = fitted(two, [*pairs], "body.")
    torch.testing.assert_close(small(images, shift), fitted(one, [*(images + shift).split(8)], "")(images + shift))


class Block(nn.Module):
    """A block whose last norm starts at zero, beside one of linear layers over maps with the channels last."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.stem, self.inner, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.norm = nn.BatchNorm2d(6)
        self.wide, self.narrow = nn.Linear(6, 12), nn.Linear(12, 6)
        self.unused, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
        nn.init.constant_(self.norm.weight, scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = (x + self.norm(self.last(self.inner(x).relu()))).permute(0, 2, 3, 1)
        x = x + self.narrow(self.wide(x).relu())
        out: Tensor = self.head(functional.linear(x.mean((1, 2)), self.unused.weight))
        return out


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_silenced_branches_and_linear_layers_over_maps_are_fitted(scale: float) -> None:
    torch.manual_seed(0)
    model, images = Block(scale).eval(), torch.randn(96, 3, 6, 6)
    reestimate_batch_norm(model, [images])
    graph = capture(model, images[:2])
    kept = {
        group.name: tuple(range(group.size * 2 // 3)) for group in graph.prunable if group.name in ("inner", "wide")
    }
    policy = CompressionPolicy(kept, {"inner": 8, "wide": 12})
    plain, fitted = (apply_policy(model, graph, policy) for _ in range(2))

    reconstruct(model, fitted, graph, policy, [images], generator=torch.Generator().manual_seed(0))

    assert kept.keys() == {"inner", "wide"}
    with torch.no_grad():
        off, left = (float((network(images) - model(images)).square().mean()) for network in (plain, fitted))
    assert left < 0.7 * off


def test_images_that_fit_are_counted_by_the_largest_output_of_maps_with_the_channels_last() -> None:
    graph = capture(Block(1.0).eval(), torch.randn(2, 3, 20, 10))

    # 12 channels at 20 times 10 positions, behind the layer called wide.
    assert {operator.name: operator.out_size for operator in graph.operators}["wide"] == (20, 10)
    assert most_images(graph) == MOST_BYTES // (4 * 12 * 200)


class Bare(nn.Module):
    """A layer, and products with a weight that none holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 12)
        self.matrix = nn.Parameter(torch.randn(8, 12))
        self.turned, self.bias = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(self.layer(x).relu(), self.matrix)
        return torch.addmm(self.bias, x.relu(), self.turned)


def test_weights_that_no_layer_holds_are_left_as_they_are() -> None:
    torch.manual_seed(0)
    model, x = Bare().eval(), torch.randn(32, 6)
    graph = capture(model, x)
    policy = CompressionPolicy({"layer": tuple(range(8)), "matrix": tuple(range(6))}, {"layer": 12, "matrix": 8})
    plain, fitted = (apply_policy(model, graph, policy) for _ in range(2))

    reconstruct(model, fitted, graph, policy, [x], generator=torch.Generator().manual_seed(0))

    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), fitted.parameters(), strict=True))


class NormOfTurnedTokens(nn.Module):
    """As in LeViT: the batch norm reads the output of a layer without bias in another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.project, self.norm = nn.Linear(6, 14), nn.Linear(14, 6, bias=False), nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.project(functional.relu(self.wide(x)))
        return self.norm(x.flatten(0, 1)).reshape(x.shape)


def test_a_batch_norm_that_reads_the_output_in_another_shape_makes_up_for_its_mean() -> None:
    torch.manual_seed(0)
    model, images = NormOfTurnedTokens(), 2 + torch.randn(256, 4, 6)
    for _ in range(100):  # statistics as if trained
        model.train()(images)
    graph = capture(model.eval(), images[:2])
    policy = CompressionPolicy({"wide": tuple(range(9))}, {"wide": 14})
    fitted = apply_policy(model, graph, policy)

    reconstruct(model, fitted, graph, policy, [images], generator=torch.Generator().manual_seed(0), ridge=1e-9)

    with torch.no_grad():
        hidden = functional.relu(fitted.get_submodule("wide")(images)).flatten(0, 1)
        wanted = model.project(functional.relu(model.wide(images))).flatten(0, 1)
        hidden, wanted = hidden - hidden.mean(0), wanted - wanted.mean(0)
        least = hidden @ torch.linalg.lstsq(hidden, wanted).solution
        found = hidden @ fitted.get_submodule("project").weight.t()
        assert (found - least).square().mean() < 2e-3 * wanted.square().mean()
