import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from graph_encoder.capture import capture
from graph_encoder.network import LinearDim, NetworkGraph, Term
from latency.cost import FLOPS_PER_MAC, CostKind, CostModel, count_macs, count_params, predict_cost, size_bytes
from latency.decision import LayerDecision
from pruning.policy import CompressionPolicy, LayerPolicy


def small_network(inner: int = 12, last: int = 16) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, inner, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(inner, last, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(last, 5),
    )


def test_macs_by_hand() -> None:
    # 8x8 image: 3*8*9 at 64 pixels, 8*12*9 and 12*16 at 16 pixels, 16*5 once.
    assert count_macs(small_network(), torch.randn(2, 3, 8, 8)) == 64 * 216 + 16 * 864 + 16 * 192 + 80


def test_flops_agree_with_the_counter_of_torch() -> None:
    model, x = small_network().eval(), torch.randn(1, 3, 8, 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert counter.get_total_flops() == FLOPS_PER_MAC * count_macs(model, x)


def test_count_params_and_bytes_by_hand() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert count_params(model) == 3 * 4 + 4 + 4 + 4
    # Running mean and variance are four floats each, the batch counter one int64.
    assert size_bytes(model) == 4 * count_params(model) + 4 * 8 + 8


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_cost_predicted_for_fewer_channels_is_that_of_the_narrower_network(kind: str) -> None:
    graph = capture(small_network(), torch.randn(2, 3, 8, 8))
    names = [group.name for group in graph.prunable if group.size in (12, 16)]
    narrow, x = small_network(inner=5, last=9), torch.randn(2, 3, 8, 8)
    expected = count_macs(narrow, x) if kind == "macs" else count_params(narrow)

    cost = CostModel(graph, kind, names)  # type: ignore[arg-type]

    assert cost(np.array([5, 9])) == expected
    policy = CompressionPolicy(
        {name: tuple(range(count)) for name, count in zip(names, (5, 9), strict=True)},
        dict(zip(names, (12, 16), strict=True)),
    )
    assert predict_cost(graph, policy, kind) == expected  # type: ignore[arg-type]


def two_group_graph() -> NetworkGraph:
    """7 * a * b + 3 * (20 - a removed twice), a and b of 10 and 6 units, b of two channels a unit."""
    from graph_encoder.network import ChannelGroup

    groups = (ChannelGroup("a", 10, (), (), ()), ChannelGroup("b", 6, (), (), ()))
    terms = (
        Term("first", 7, (LinearDim(10, ((0, 1),)), LinearDim(12, ((1, 2),)))),
        Term("second", 3, (LinearDim(20, ((0, 2),)),)),
    )
    return NetworkGraph((), (), groups, terms, ())


def test_cost_of_a_hand_made_graph() -> None:
    cost = CostModel(two_group_graph())
    assert cost.dense == 7 * 10 * 12 + 3 * 20
    assert cost(np.array([4, 5])) == 7 * 4 * 10 + 3 * 8
    assert cost.by_owner(np.array([4, 5])) == {"first": 280, "second": 24}


def test_fractional_cost_agrees_with_the_exact_one_at_whole_units() -> None:
    cost = CostModel(two_group_graph())
    ratios = np.array([[0.4, 0.5], [1.0, 1.0]])
    np.testing.assert_allclose(cost.of_ratios(ratios), [cost(np.array([4, 3])), cost.dense])


def quantized_graph() -> tuple[NetworkGraph, list[LayerDecision]]:
    """`small_network` with a density for its second convolution, bits for it and for its last layer."""
    graph = capture(small_network(), torch.randn(2, 3, 8, 8))
    layers = [
        LayerDecision("3", "density", (25, 50, 100)),
        LayerDecision("3", "weight_bits", (4, 8, 32)),
        LayerDecision("3", "act_bits", (8, 32)),
        LayerDecision("8", "bits", (8, 32)),
    ]
    return graph, layers


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Convolutions on an 8x8 image: 64 * 216 and 16 * 12 * 16 untouched, 16 * 864 a quarter dense; 80 at the end.
        ("macs", 64 * 216 + 16 * 864 // 4 + 16 * 192 + 80),
        ("params", 216 + 16 + 864 // 4 + 12 + 192 + 16 + 80 + 5),
        # Places of a quarter of 864 weights; scales of 12 and 5 channels; scale and zero point of two layers' inputs.
        ("bytes", 4 * (216 + 16 + 12 + 192 + 16 + 5) + (864 // 4 // 2 + 864 // 8 + 12 * 4 + 5) + (80 + 5 * 4 + 5)),
        ("bops", 32 * 32 * (64 * 216 + 16 * 192) + 16 * 864 // 4 * 4 * 8 + 80 * 8 * 8),
    ],
)
def test_choices_inside_layers_count_as_by_hand(kind: CostKind, expected: int) -> None:
    graph, layers = quantized_graph()
    cost = CostModel(graph, kind, (), layers)
    policy = CompressionPolicy(
        layers={"3": LayerPolicy("unstructured", 0.25, 4, 8), "8": LayerPolicy("dense", 1, 8, 8)}
    )

    assert cost.names == ("3:density", "3:weight_bits", "3:act_bits", "8:bits")
    # In bytes, one more for each decision: tensors are stored in whole bytes.
    assert cost(np.array([25, 4, 8, 8])) == expected + (4 if kind == "bytes" else 0)
    assert predict_cost(graph, policy, kind) == expected


@pytest.mark.parametrize("kind", ["macs", "params", "bytes", "bops"])
def test_meter_and_fractions_agree_with_the_cost_of_mixed_decisions(kind: CostKind) -> None:
    graph, layers = quantized_graph()
    names = [group.name for group in graph.prunable]
    cost = CostModel(graph, kind, names, layers)
    before = np.array([*(cost.sizes[: len(names)] // 2), 25, 4, 8, 8])
    after = before.copy()
    after[[0, -1]] += [2, 24]
    meter = cost.meter(before)

    meter.keep_more(0, 2)

    assert meter.with_more(len(before) - 1, 24) == cost(after)
    np.testing.assert_allclose(cost.of_ratios(after[None] / cost.sizes), [cost(after)], atol=1)


def test_meter_counts_each_step_as_the_difference_of_two_costs() -> None:
    cost = CostModel(two_group_graph())
    meter = cost.meter(np.array([4, 3]))
    assert meter.with_more(1, 2) == cost(np.array([4, 5]))
    meter.keep_more(1, 2)
    meter.keep_more(0, 1)
    assert meter.cost == cost(np.array([5, 5]))


def test_cost_stays_exact_above_what_a_float_holds() -> None:
    # 2**53 + 1 is the first integer that a double cannot hold.
    graph = NetworkGraph((), (), (), (Term("big", 2**53, (LinearDim(1),)), Term("one", 1, (LinearDim(1),))), ())
    assert CostModel(graph).dense == 2**53 + 1
