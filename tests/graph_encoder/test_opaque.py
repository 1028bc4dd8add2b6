"""What capture says of networks with modules that cannot run without values."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from graph_encoder.capture import capture, trace_operators
from graph_encoder.network import NetworkGraph, TraceError
from pruning.policy import CompressionPolicy
from pruning.proof import prove, random_policy
from pruning.surgery import apply_policy

from .networks import EXAMPLE, seeded
from .opaque_networks import OPAQUE, Branch, Item, Numpy, ResidualWith

ITEM = "Tensor.item() cannot be called on meta tensors (aten._local_scalar_dense.default on shapes [()])"


def offered(graph: NetworkGraph) -> list[str]:
    return [group.name for group in graph.prunable]


def removed(graph: NetworkGraph, policy: CompressionPolicy) -> dict[int, int]:
    return {graph.group_index[name]: policy.sizes[name] - len(kept) for name, kept in policy.kept.items()}


def holds(model: nn.Module, graph: NetworkGraph, x: Tensor = EXAMPLE) -> bool:
    return all(proof.holds for proof in prove(model, graph, x, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", OPAQUE)
def test_only_what_meets_a_module_that_cannot_be_captured_stays_dense(name: str) -> None:
    build, opaque = OPAQUE[name]
    expected = ["stem", "blocks.0.conv1", "blocks.1.conv1", "blocks.2.conv1", "reduce"]
    met = {"blocks.1.inner.0": "blocks.1.conv1", "head": "reduce"}

    graph = capture(seeded(build), EXAMPLE)

    assert graph.opaque == opaque
    assert offered(graph) == [name for name in expected if name not in [met[module] for module in opaque]]
    for module in opaque:
        assert graph.skipped[module].startswith("cannot be captured (")
        assert graph.group(met[module]).reason.startswith("is read by a module that cannot be captured (")
        assert graph.group(met[module]).reason.endswith(f"), in '{module}'")


@pytest.mark.parametrize("name", OPAQUE)
def test_what_is_offered_around_such_a_module_is_proved_and_costs_what_is_predicted(name: str) -> None:
    model = seeded(OPAQUE[name][0])
    graph = capture(model, EXAMPLE)
    policy = random_policy(graph, torch.Generator().manual_seed(1))

    small = apply_policy(model, graph, policy)

    assert holds(model, graph)
    counted = sum(operator.macs for operator in trace_operators(small, EXAMPLE))
    assert counted == sum(term.value(removed(graph, policy)) for term in graph.mac_terms)
    assert sum(p.numel() for p in small.parameters()) == sum(
        term.value(removed(graph, policy)) for term in graph.param_terms
    )


def test_reasons_name_the_module_what_stopped_it_and_what_it_costs() -> None:
    graph = capture(seeded(lambda: ResidualWith(Item)), EXAMPLE)

    assert graph.skipped["blocks.1.inner.0"] == (
        f"cannot be captured ({ITEM}) and stays as it is; the 4,096 multiply-adds counted for it are those of "
        f"PyTorch's operators on random inputs"
    )
    assert graph.group("blocks.1.conv1").reason == (
        f"is read by a module that cannot be captured ({ITEM}), in 'blocks.1.inner.0'"
    )


@pytest.mark.parametrize("name", ["item", "numpy"])
def test_operators_of_such_a_module_are_counted_in_a_run_on_values(name: str) -> None:
    model = seeded(OPAQUE[name][0])
    graph = capture(model, EXAMPLE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(EXAMPLE[:1])

    assert graph.macs * 2 == counter.get_total_flops()
    assert sum(operator.macs for operator in trace_operators(model, EXAMPLE)) == graph.macs
    inside = [operator for operator in graph.operators if operator.name.startswith(graph.opaque)]
    assert inside and not any(operator.weight for operator in inside)


def test_capture_around_a_module_depends_on_no_value_of_the_example_and_leaves_the_network_as_it_was() -> None:
    model = seeded(lambda: ResidualWith(Branch, Numpy)).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()

    first, second = capture(model, EXAMPLE), capture(model, torch.zeros_like(EXAMPLE))

    assert first.skipped == second.skipped and first.operators == second.operators
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())


class Between(nn.Module):
    """``inner`` between two convolutions, inside a block of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.mix = nn.Conv2d(8, 6, 1)
        self.block = inner
        self.out = nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.mix(self.stem(x).relu()))
        out: Tensor = self.head(self.out(x).mean((2, 3)))
        return out


class IsPositive(nn.Module):
    def forward(self, x: Tensor) -> bool:
        return x.mean().item() > 0


class Asks(nn.Module):
    """Does what a number that another module returns says."""

    def __init__(self) -> None:
        super().__init__()
        self.flag = IsPositive()
        self.a, self.b = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.a(x) if self.flag(x) else self.b(x)
        return out


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


class SelectsPositive(nn.Module):
    """The shape of what the inner module returns depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.positive = Positive()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.positive(x)
        return x * (found.sum() / found.shape[0])


class Box:
    def __init__(self, x: Tensor) -> None:
        self.x = x


class ReadsBox(nn.Module):
    def forward(self, box: Box) -> Tensor:
        return box.x * (1 + abs(box.x.mean().item()))


class Boxes(nn.Module):
    """Hands an activation over inside an object."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = ReadsBox()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.reads(Box(x))
        return out


class ReadsNote(nn.Module):
    note: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + abs(self.note.mean().item()))


class LeavesNote(nn.Module):
    """Hands an activation over as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(6, 7, 1)
        self.reads = ReadsNote()

    def forward(self, x: Tensor) -> Tensor:
        self.reads.note = self.wide(x)
        out: Tensor = self.reads(x)
        return out


@pytest.mark.parametrize(
    ("inner", "failing", "why"),
    [
        (Asks, "block.flag", "it returns a value of class 'bool', which may depend on activations"),
        (SelectsPositive, "block.positive", "its calls, or the shapes in them, depend on values"),
        (Boxes, "block.reads", "it is given an object of class 'Box', which may hold activations"),
        (LeavesNote, "block.reads", "it reads an activation of shape (2, 7, 8, 8) that it was not given"),
    ],
)
def test_module_that_cannot_stay_alone_stays_with_the_one_around_it(
    inner: type[nn.Module], failing: str, why: str
) -> None:
    model = seeded(lambda: Between(inner()))

    graph = capture(model, EXAMPLE)

    assert graph.opaque == ("block",)
    assert graph.skipped["block"].startswith(f"cannot be captured ('{failing}': {why}) and stays as it is")
    assert offered(graph) == ["stem", "out"]
    assert holds(model, graph)


def test_network_that_reads_values_itself_is_refused_by_what_failed_first() -> None:
    message = (
        r"^'flag' cannot be captured: Tensor\.item\(\) cannot be called on meta tensors "
        r"\(aten\._local_scalar_dense\.default on shapes \[\(\)\]\)\. The forward pass may not read"
    )
    with pytest.raises(TraceError, match=message):
        capture(Asks(), torch.randn(2, 6, 8, 8))


class Elsewhere(nn.Module):
    """Reads a weight of another layer: held in a list, on one side of a branch, or through a function."""

    def __init__(self, how: str, other: nn.Conv2d) -> None:
        super().__init__()
        self.how = how
        self.held = [other] if how == "branch" else []
        self.weight = other.weight if how == "shared" else None
        self.look = (lambda: other.weight) if how == "function" else None

    def forward(self, x: Tensor) -> Tensor:
        if x.mean().item() > 1e6 and self.held:
            return x * self.held[0].weight.std()
        weight = self.weight if self.look is None else self.look()
        return x if weight is None else x * weight.std()


@pytest.mark.parametrize("how", ["branch", "shared", "function"])
def test_weights_that_such_a_module_can_reach_stay_whole(how: str) -> None:
    class Net(Between):
        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.block = Elsewhere(how, self.stem)

    model = seeded(Net)
    graph = capture(model, EXAMPLE)

    assert offered(graph) == ["out"]
    assert graph.group("stem").reason == "is within reach of 'block', which cannot be captured, in 'stem'"
    assert holds(model, graph)


class Note(nn.Module):
    """May read, on the side of a branch that is not taken, an activation that another module left."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return x * self.notes[0].mean() if x.mean().item() > 1e6 else x


def test_activation_that_such_a_module_can_reach_keeps_its_channels() -> None:
    class Net(Between):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            self.block.notes[:] = [x]
            out: Tensor = self.head(self.out(self.block(self.mix(x))).mean((2, 3)))
            return out

    graph = capture(seeded(lambda: Net(Note())), EXAMPLE)

    assert graph.opaque == ("block",)
    assert offered(graph) == ["out"]


class HeldView(nn.Module):
    """Holds the width of a view beside a module that cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(216, 7)
        self.item = nn.Sequential(nn.Linear(7, 8), Gate())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.item(self.fc(self.conv(x).relu().view(-1, 216))))
        return out


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + abs(x.mean().item()))


def test_numbers_held_by_forward_are_rewritten_around_a_module_that_is_called_as_it_is() -> None:
    model = seeded(HeldView)
    graph = capture(model, EXAMPLE)

    small: Any = apply_policy(model, graph, CompressionPolicy({"conv": (0, 2, 5)}, {"conv": 6}))

    assert graph.opaque == ("item.1",) and len(graph.rewrites) == 1
    assert offered(graph) == ["conv", "fc"]
    assert holds(model, graph)
    assert isinstance(small.item[1], Gate) and small(EXAMPLE).shape == (2, 5)
