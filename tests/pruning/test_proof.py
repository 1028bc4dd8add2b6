from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import Tensor, nn

from graph_encoder.capture import capture
from graph_encoder.network import NetworkGraph, TraceError
from pruning.proof import TOLERANCE, leave_refuted_dense, prove


def with_wrong_consumer(graph: NetworkGraph, index: int) -> NetworkGraph:
    """The graph, but the inputs of one group's consumer are taken for those beside them."""
    group = graph.groups[index]
    members = tuple(replace(m, indices=m.indices.roll(1, 0)) if m.role == "in" else m for m in group.members)
    groups = tuple(replace(group, members=members) if i == index else g for i, g in enumerate(graph.groups))
    return replace(graph, groups=groups)


@pytest.mark.parametrize("name", ["mobilenet_v2", "shufflenet_v2_x1_0"])
def test_a_wrong_group_of_a_deep_network_of_random_weights_is_caught_among_all_others(name: str) -> None:
    torch.manual_seed(0)
    model, x = torchvision.models.get_model(name, weights=None, num_classes=10).eval(), torch.randn(2, 3, 64, 64)
    graph = capture(model, x)
    consumed = [i for i, g in enumerate(graph.groups) if g.is_prunable and any(m.role == "in" for m in g.members)]

    def proof(of: NetworkGraph) -> bool:
        return prove(model, of, x, generator=torch.Generator().manual_seed(0), each_group=False)[0].holds

    assert proof(graph)
    assert not any(proof(with_wrong_consumer(graph, index)) for index in consumed[:: len(consumed) // 4])


class Faint(nn.Module):
    """Begins with small weights beside larger biases, and with branches and a head that add nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.wide, self.narrow = (nn.ModuleList(nn.Conv2d(*size, 1) for _ in range(6)) for size in ((8, 12), (12, 8)))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(6))
        self.scale, self.head = nn.Parameter(torch.full((8, 1, 1), 1e-6)), nn.Linear(8, 5)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and name != "scale":
                nn.init.normal_(parameter, std=2e-3)
            elif name.endswith("bias"):
                nn.init.normal_(parameter)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for wide, narrow, norm in zip(self.wide, self.narrow, self.norms, strict=True):
            x = norm(x).relu() + self.scale * narrow(wide(x).relu())
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def test_a_wrong_group_of_a_network_through_which_nothing_comes_yet_is_caught() -> None:
    torch.manual_seed(0)
    model, x = Faint().eval(), torch.randn(2, 3, 8, 8)
    graph = capture(model, x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def proof(of: NetworkGraph) -> bool:
        return prove(model, of, x, generator=torch.Generator().manual_seed(0), each_group=False)[0].holds

    assert len(graph.prunable) == 7 and proof(graph)
    assert not any(proof(with_wrong_consumer(graph, i)) for i, group in enumerate(graph.groups) if group.is_prunable)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Constant(nn.Module):
    """The input reaches the output with nothing left of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(0 * self.first(x))
        return out


class Rounds(nn.Module):
    """Rounds its map to a ten thousandth of its scale, as deep networks do by and by."""

    def __init__(self, *, single_alone: bool = False) -> None:
        super().__init__()
        self.single_alone = single_alone
        self.first, self.second = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.single_alone and x.dtype == torch.float64:
            msg = "no kernel for double precision"
            raise RuntimeError(msg)
        return self.second(self.first(x).relu()) + 8192 - 8192


def test_rounding_is_told_from_a_wrong_group_in_double_precision() -> None:
    torch.manual_seed(0)
    # So large that of the many values some are rounded otherwise, whatever the order of the sums.
    model, x = Rounds(), torch.randn(4, 3, 64, 64)
    graph = capture(model, x)
    (group,) = graph.prunable

    def error(of: NetworkGraph, network: nn.Module = model) -> float:
        return prove(network, of, x, generator=torch.Generator().manual_seed(0), each_group=False)[0].error

    assert error(graph) < 1e-9
    assert error(with_wrong_consumer(graph, graph.group_index[group.name])) > 1e-2
    # Where a network runs in single precision alone, there is no telling.
    assert TOLERANCE < error(graph, Rounds(single_alone=True)) < 1e-2
    assert next(model.parameters()).dtype == torch.float32


def test_outputs_that_do_not_depend_on_the_inputs_prove_nothing() -> None:
    torch.manual_seed(0)
    model, x = Constant(), torch.randn(3, 4)

    proof = prove(model, capture(model, x), x, generator=torch.Generator().manual_seed(0))[0]

    assert proof.message == "the outputs hardly depend on the inputs: nothing to compare"
    assert not proof.holds


class WithLoss(nn.Module):
    """A network that returns one number for the whole batch beside what it says of each image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scores = self.last(torch.relu(self.first(x)))
        return {"scores": scores, "loss": scores.sum()}


def test_an_output_of_the_whole_batch_is_left_out_of_the_proof() -> None:
    torch.manual_seed(0)
    model, x = WithLoss(), torch.randn(4, 4)

    graph = leave_refuted_dense(model, capture(model, x), x)

    assert [group.name for group in graph.prunable] == ["first"]
    assert all(proof.holds for proof in prove(model, graph, x, generator=torch.Generator().manual_seed(0)))


def test_outputs_that_are_not_numbers_prove_nothing() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.full((3, 4), float("nan"))

    proof = prove(model, capture(model, x), x, generator=torch.Generator().manual_seed(0))[0]

    assert proof.message == "the outputs hold NaN or infinity"


class ScaledByWidth(nn.Module):
    """What it computes depends on a width that no shape depends on, and that a run on shapes alone does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 6, 1, bias=False)
        self.last = nn.Linear(6, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        out: Tensor = self.last((self.second(y) / y.new_tensor(float(y.shape[1]))).relu().mean((2, 3)))
        return out


def test_a_group_that_the_proof_refutes_stays_dense_and_says_so() -> None:
    torch.manual_seed(0)
    model, x = ScaledByWidth(), torch.zeros(1, 3, 8, 8)
    graph = capture(model, x)
    assert [group.name for group in graph.prunable] == ["first", "second"]

    safe = leave_refuted_dense(model, graph, x)

    assert [group.name for group in safe.prunable] == ["second"]
    reason = safe.group("first").reason
    assert reason.startswith("removing is not what silencing is: outputs differ by ")
    assert safe.skipped["first"] == reason


def test_a_sound_graph_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    model, x = torchvision.models.resnet18(num_classes=10).eval(), torch.zeros(1, 3, 64, 64)
    graph = capture(model, x)

    assert leave_refuted_dense(model, graph, x) is graph


class ScaledByEither(nn.Module):
    """Right as long as one of two widths is whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        z = self.second(y).relu()
        out: Tensor = self.last(z.mean((2, 3)) * y.new_tensor(float(max(y.shape[1], z.shape[1]))))
        return out


def test_groups_that_are_refuted_together_alone_are_an_error() -> None:
    torch.manual_seed(0)
    model, x = ScaledByEither(), torch.zeros(1, 3, 8, 8)

    with pytest.raises(TraceError, match=r"^removing channels of several groups at once is not what silencing them is"):
        leave_refuted_dense(model, capture(model, x), x)


class Tokens(nn.Module):
    """Reads integers, and computes with a width."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.last = nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.first(self.embed(x).mean(1))
        return self.last(h * h.new_tensor(h.shape[1] ** -0.5))


class Boxes(nn.Module):
    """Two outputs, of which one is ten thousand times as large; the other follows from a width."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.boxes = nn.Linear(8, 16), nn.Linear(16, 5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h: Tensor = self.first(x)
        return {"logits": self.last(h * h.new_tensor(h.shape[1] ** -0.5)), "boxes": 1e4 * self.boxes(x)}


class Divided(nn.Module):
    """Nothing can be said of one group, whose silenced channels are divided by zero; another follows from a width."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale, self.second = nn.Linear(8, 12), nn.Parameter(torch.full((12,), 2.0)), nn.Linear(12, 16)
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.second(self.first(x) / self.scale)
        return self.last(h * h.new_tensor(h.shape[1] ** -0.5))


@pytest.mark.parametrize(
    ("model", "x", "dense"),
    [
        (Tokens(), torch.arange(12).reshape(2, 6), "first"),
        (Boxes(), torch.randn(2, 8), "first"),
        (Divided(), torch.randn(2, 8), "second"),
    ],
)
def test_a_width_in_a_number_is_seen_whatever_goes_in_and_comes_out(model: nn.Module, x: Tensor, dense: str) -> None:
    graph = capture(model, x)
    assert dense in {group.name for group in graph.prunable}

    left = leave_refuted_dense(model, graph, x)

    assert left.group(dense).reason.startswith("removing is not what silencing is")
    others = {group.name for group in graph.prunable} - {dense}
    assert {group.name for group in left.prunable} == others


class WithHook(nn.Module):
    """A hook that holds the network itself is called by its copies, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        original = self

        def hook(_: nn.Module, args: tuple[Tensor], __: Tensor) -> Tensor:
            return original.last.forward(original.first(args[0]).relu())

        self.register_forward_hook(hook)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


def with_closure() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
    return model


def with_closure_on_a_layer() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    layer = model[0]
    model[1].forward = lambda _: nn.functional.linear(torch.ones(4, 6), layer.weight).relu()
    return model


class ClassNumbers(nn.Module):
    """Its outputs are integers, which other weights leave as they are as often as not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu()).argmax(1)


@pytest.mark.parametrize("model", [ClassNumbers(), nn.Sequential(nn.ReLU(), nn.Flatten())])
def test_outputs_of_integers_and_networks_without_weights_are_no_closures(model: nn.Module) -> None:
    x = torch.randn(2, 6)
    graph = capture(model.eval(), x)

    assert leave_refuted_dense(model, graph, x) == graph


@pytest.mark.parametrize("make", [with_closure, with_closure_on_a_layer, WithHook])
def test_a_network_whose_copies_run_its_own_layers_is_refused(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(2, 6)
    graph = capture(model, x)

    with pytest.raises(TraceError, match="computes with weights of the original: a forward or a hook in it is"):
        leave_refuted_dense(model, graph, x)
