"""Copies whose forward is the symbolic trace with its numbers rewritten: everything but forward is as it was."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from graph_encoder.capture import capture, trace_operators
from graph_encoder.copies import copied
from graph_encoder.network import NetworkGraph
from pruning.policy import CompressionPolicy
from pruning.proof import prove
from pruning.surgery import apply_policy
from tests.graph_encoder.networks import EXAMPLE, build, seeded


class Body(nn.Module):
    """A part that forward uses and a part that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("steps", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x)).relu()
        return out


class WithAuxiliaryHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.body = Body()
        self.spare = nn.Parameter(torch.zeros(2))
        self.register_buffer("note", torch.zeros(1))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)
        self.offset = torch.full((1, 3, 1, 1), 0.5)
        self.fc = nn.Linear(216, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.body(x - self.offset).view(-1, 216))
        return out


def captured(model: nn.Module) -> tuple[NetworkGraph, CompressionPolicy]:
    graph = capture(model, EXAMPLE)
    return graph, CompressionPolicy({"body.conv": (0, 2, 5)}, {"body.conv": 6})


def test_rewritten_copy_keeps_every_name_of_the_state_dict_in_its_order() -> None:
    model = WithAuxiliaryHead()
    graph, policy = captured(model)

    small = apply_policy(model, graph, policy)

    assert isinstance(small, fx.GraphModule)
    assert list(small.state_dict()) == list(model.state_dict())
    assert [name for name, _ in small.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert list(copied(small).state_dict()) == list(model.state_dict())


def test_rewritten_copy_shares_nothing_and_computes_what_masking_computes() -> None:
    model = seeded(WithAuxiliaryHead)
    before = copy.deepcopy(model.state_dict())
    graph, policy = captured(model)

    proofs = prove(model, graph, EXAMPLE, generator=torch.Generator().manual_seed(0))
    small = apply_policy(model, graph, policy)
    with torch.no_grad():
        for tensor in [*small.parameters(), *small.buffers()]:
            tensor.fill_(7)

    assert [proof for proof in proofs if not proof.holds] == []
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert model.offset.unique().tolist() == [0.5]


def test_rewritten_copy_has_every_training_mode_of_the_model() -> None:
    model = WithAuxiliaryHead().train()
    model.body.norm.eval()
    graph, policy = captured(model)

    small = apply_policy(model, graph, policy)

    modes = {name: module.training for name, module in model.named_modules()}
    assert {name: module.training for name, module in small.named_modules()} == modes
    assert modes[""] and modes["body"] and not modes["body.norm"]


def test_rewritten_copy_keeps_the_forward_hooks_of_the_root() -> None:
    model = seeded(WithAuxiliaryHead)
    graph, policy = captured(model)
    model.register_forward_pre_hook(lambda _, args: (args[0] * 0,))
    model.register_forward_hook(lambda _, __, output: output + 100)

    small = apply_policy(model, graph, policy)

    bare = apply_policy(seeded(WithAuxiliaryHead), graph, policy)
    bare.load_state_dict(small.state_dict())
    for network in (small, copied(small)):
        torch.testing.assert_close(network(EXAMPLE), bare(EXAMPLE * 0) + 100)


class TiedBackwards(nn.Module):
    """``late`` comes first in forward and second in the module; both hold one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.late = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.late.weight = self.early.weight
        self.stem = nn.Conv2d(3, 8, 1)
        self.inner = nn.Conv2d(8, 4, 1)
        self.fc = nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.early(self.late(x).relu()).relu()
        out: Tensor = self.fc(self.inner(x).view(-1, 256))
        return out


def test_parameters_of_tied_layers_are_predicted_where_numbers_are_rewritten() -> None:
    model = seeded(TiedBackwards)
    graph = capture(model, EXAMPLE)
    policy = CompressionPolicy({"stem": (0, 3, 4), "inner": (1, 2)}, {"stem": 8, "inner": 4})

    small = apply_policy(model, graph, policy)

    removed = {graph.group_index["stem"]: 5, graph.group_index["inner"]: 2}
    assert graph.rewrites and small.early.weight is small.late.weight
    assert sum(p.numel() for p in small.parameters()) == sum(term.value(removed) for term in graph.param_terms)
    macs = sum(operator.macs for operator in trace_operators(small, EXAMPLE))
    assert macs == sum(term.value(removed) for term in graph.mac_terms)
    proofs = prove(model, graph, EXAMPLE, generator=torch.Generator().manual_seed(0))
    assert [proof for proof in proofs if not proof.holds] == []


def test_a_candidate_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("OptionA")
    graph = capture(model, EXAMPLE)
    traced = []
    trace = fx.Tracer.trace

    def counted(tracer: fx.Tracer, root: nn.Module) -> Any:
        traced.append(root)
        return trace(tracer, root)

    monkeypatch.setattr(fx.Tracer, "trace", counted)

    apply_policy(model, graph, CompressionPolicy({"conv2": (0, 5, 6)}, {"conv2": 8}))

    assert len(traced) == 1
