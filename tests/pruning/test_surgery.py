import copy

import pytest
import torch
from torch import nn

from graph_encoder.capture import capture, trace_operators
from pruning.policy import CompressionPolicy, PolicyError
from pruning.proof import prove, random_policy
from pruning.surgery import apply_policy, mask_policy
from tests.graph_encoder.networks import EXAMPLE, NETWORKS, build


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_removing_any_units_computes_what_silencing_them_computes(name: str, seed: int) -> None:
    model = build(name)
    graph = capture(model, EXAMPLE)

    proofs = prove(model, graph, EXAMPLE, generator=torch.Generator().manual_seed(seed))

    assert proofs[0].removed > 0
    assert [proof for proof in proofs if not proof.holds] == []


def test_the_proof_fails_where_a_group_is_wrong() -> None:
    model = build("Residual")
    graph = capture(model, EXAMPLE)
    group = graph.group("stem")
    wrong = [m for m in group.members if m.tensor != "norm.bias"]
    object.__setattr__(group, "members", tuple(wrong))

    proof = prove(model, graph, EXAMPLE, generator=torch.Generator().manual_seed(0), each_group=False)[0]

    assert not proof.holds


@pytest.mark.parametrize("name", NETWORKS)
def test_predicted_cost_is_the_cost_of_the_model_that_was_built(name: str) -> None:
    model = build(name)
    graph = capture(model, EXAMPLE)
    policy = random_policy(graph, torch.Generator().manual_seed(3))

    small = apply_policy(model, graph, policy)

    removed = {graph.group_index[n]: policy.sizes[n] - len(kept) for n, kept in policy.kept.items()}
    macs = sum(operator.macs for operator in trace_operators(small, EXAMPLE))
    assert macs == sum(term.value(removed) for term in graph.mac_terms) < graph.macs
    assert sum(p.numel() for p in small.parameters()) == sum(term.value(removed) for term in graph.param_terms)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_input_model_stays_bit_equal_and_shares_nothing(name: str) -> None:
    model = build(name)
    before = copy.deepcopy(model.state_dict())
    graph = capture(model, EXAMPLE)
    policy = random_policy(graph, torch.Generator().manual_seed(0))

    small = apply_policy(model, graph, policy)
    mask_policy(model, graph, policy)
    with torch.no_grad():
        for tensor in [*small.parameters(), *small.buffers()]:
            tensor.zero_()

    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert small.state_dict().keys() == before.keys()


def test_the_copy_is_the_users_own_class_and_can_be_trained() -> None:
    model = build("SqueezeExcite")
    graph = capture(model, EXAMPLE)

    small = apply_policy(model, graph, CompressionPolicy({"conv": (0, 5)}, {"conv": 8}))
    small.train()
    small(EXAMPLE).sum().backward()

    assert type(small) is type(model)
    assert isinstance(small.conv, nn.Conv2d) and small.conv.out_channels == 2
    assert isinstance(small.norm, nn.BatchNorm2d) and small.norm.num_features == 2
    assert small.up.weight.grad is not None and small.up.weight.shape == (2, 4, 1, 1)


def test_only_a_removal_that_a_held_number_counts_gives_up_the_users_class() -> None:
    model = build("OptionA")
    graph = capture(model, EXAMPLE)

    inner = apply_policy(model, graph, CompressionPolicy({"conv1": (1, 2)}, {"conv1": 8}))
    outer = apply_policy(model, graph, CompressionPolicy({"conv2": (0, 5, 6)}, {"conv2": 8}))

    assert type(inner) is type(model)
    # One of the four channels in front stays, two of those behind.
    assert "(0, 0, 0, 0, 1, 2)" in outer.code  # type: ignore[operator]


def test_tied_parameters_stay_tied() -> None:
    model = build("SharedWeights")
    model.head.weight = nn.Parameter(torch.randn(5, 8))
    model.other = model.shared
    graph = capture(model, EXAMPLE)

    small = apply_policy(model, graph, CompressionPolicy({"stem": (0, 3, 4)}, {"stem": 8}))

    assert small.other is small.shared
    assert small.shared.weight.shape == (3, 3, 3, 3)


def test_policy_that_does_not_fit_is_refused_with_every_misfit() -> None:
    model = build("Residual")
    graph = capture(model, EXAMPLE)
    policy = CompressionPolicy({"nose": (0,), "conv1": (0,), "head": (0, 1)}, {"nose": 2, "conv1": 7, "head": 5})
    message = (
        r"^the policy does not fit the network: the network has no channel group 'nose'; group 'conv1' has 6 units, "
        r"the policy was made for 7; group 'head' has to stay dense \(is an output of the network\)$"
    )
    with pytest.raises(PolicyError, match=message):
        apply_policy(model, graph, policy)


def test_tensors_that_follow_from_others_are_no_hindrance() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
            self.features: list[torch.Tensor] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.features = [self.first(x)]
            out: torch.Tensor = self.last(self.features[0])
            return out

    model, x = Keeping(), torch.randn(2, 3, 8, 8)
    graph = capture(model, x)
    model(x)
    assert not model.features[0].is_leaf
    policy = CompressionPolicy({"first": (0, 2)}, {"first": 8})

    small = apply_policy(model, graph, policy)

    assert small(x).shape == model(x).shape
    assert all(proof.holds for proof in prove(model, graph, x, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(mask_policy(model, graph, policy)(x), small(x), rtol=0, atol=1e-5)
