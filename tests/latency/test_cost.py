import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from graph_encoder.capture import capture
from graph_encoder.network import LinearDim, NetworkGraph, Term
from latency.cost import CostModel, count_macs, count_params, flops_of, predict_cost, size_bytes


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
    assert counter.get_total_flops() == flops_of(count_macs(model, x))


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
    assert predict_cost(graph, dict(zip(names, (5, 9), strict=True)), kind) == expected  # type: ignore[arg-type]


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


def test_meter_counts_each_step_as_the_difference_of_two_costs() -> None:
    cost = CostModel(two_group_graph())
    meter = cost.meter(np.array([4, 3]))
    assert meter.increase(1, 2) == cost(np.array([4, 5])) - cost(np.array([4, 3]))
    meter.keep_more(1, 2)
    meter.keep_more(0, 1)
    assert meter.cost == cost(np.array([5, 5]))


def test_cost_stays_exact_above_what_a_float_holds() -> None:
    # 2**53 + 1 is the first integer that a double cannot hold.
    graph = NetworkGraph((), (), (), (Term("big", 2**53, (LinearDim(1),)), Term("one", 1, (LinearDim(1),))), ())
    assert CostModel(graph).dense == 2**53 + 1
