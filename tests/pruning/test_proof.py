from dataclasses import replace

import pytest
import torch
import torchvision
from torch import Tensor, nn

from graph_encoder.capture import capture
from graph_encoder.network import NetworkGraph
from pruning.proof import prove


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


class Constant(nn.Module):
    """The input reaches the output with nothing left of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(1e-6 * self.first(x))
        return out


def test_outputs_that_do_not_depend_on_the_inputs_prove_nothing() -> None:
    torch.manual_seed(0)
    model, x = Constant(), torch.randn(3, 4)

    proof = prove(model, capture(model, x), x, generator=torch.Generator().manual_seed(0))[0]

    assert proof.message == "the outputs hardly depend on the inputs: nothing to compare"
    assert not proof.holds


def test_outputs_that_are_not_numbers_prove_nothing() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.full((3, 4), float("nan"))

    proof = prove(model, capture(model, x), x, generator=torch.Generator().manual_seed(0))[0]

    assert proof.message == "the outputs hold NaN or infinity"
