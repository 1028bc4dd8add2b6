import re

import pytest
import torch
from torch import nn

from graph_encoder.capture import capture
from graph_encoder.network import NetworkGraph
from latency.decision import LayerDecision, layer_decisions, layer_policies
from pruning.policy import LayerPolicy, PolicyError


def graph() -> NetworkGraph:
    """A stem, a layer of 24 channels, a depthwise one, one of 32, and a classifier."""
    layers = [
        nn.Conv2d(3, 16, 3),
        nn.Conv2d(16, 24, 3),
        nn.Conv2d(24, 24, 3, groups=24),
        nn.Conv2d(24, 32, 1),
        nn.Flatten(),
        nn.Linear(32, 5),
    ]
    return capture(nn.Sequential(*layers), torch.zeros(1, 3, 7, 7))


def names(decisions: tuple[LayerDecision, ...]) -> list[str]:
    return [decision.name for decision in decisions]


def test_ends_and_depthwise_layers_stay_dense() -> None:
    assert names(layer_decisions(graph(), ["density"])) == ["1:density", "3:density"]
    assert names(layer_decisions(graph(), ["density"], protect_first=False)) == ["0:density", "1:density", "3:density"]


def test_layers_that_the_pattern_does_not_divide_stay_dense() -> None:
    # 24 output channels are no multiple of 16; 16 input channels are one of 16, 24 are not.
    assert names(layer_decisions(graph(), ["density"], sparsity="block16")) == ["3:density"]
    assert names(layer_decisions(graph(), ["density"], sparsity="4:16")) == ["1:density"]


def test_n_of_m_has_one_density_of_its_own() -> None:
    assert {decision.levels for decision in layer_decisions(graph(), ["density"], sparsity="2:4")} == {(50, 100)}


def test_ends_keep_eight_bits_at_least_and_order_is_by_layer() -> None:
    found = layer_decisions(graph(), ["weight_bits", "act_bits"], bits=(2, 4, 8, 32))
    assert names(found) == [f"{layer}:{what}_bits" for layer in (0, 1, 2, 3, 5) for what in ("weight", "act")]
    assert {decision.levels for decision in found if decision.layer in "05"} == {(8, 32)}
    assert {decision.levels for decision in found if decision.layer in "123"} == {(2, 4, 8, 32)}


def test_without_the_bits_of_an_untouched_layer_every_layer_is_quantized() -> None:
    found = layer_decisions(graph(), ["bits"], bits=(2, 3, 4))
    assert [decision.levels for decision in found] == [(8,), (2, 3, 4), (2, 3, 4), (2, 3, 4), (8,)]
    assert {decision.size for decision in found} == {32}
    least = {decision.name: decision.levels[0] for decision in found}
    assert layer_policies(found, least, "unstructured")["1"] == LayerPolicy("dense", 1.0, 2, 2)


def test_levels_become_policies_and_untouched_layers_are_left_out() -> None:
    decisions = layer_decisions(graph(), ["density", "bits"], sparsity="block8")
    levels = {"1:density": 30, "1:bits": 8, "3:density": 100, "3:bits": 32, "5:bits": 8}
    assert layer_policies(decisions, levels, "block8") == {
        "1": LayerPolicy("block8", 0.3, 8, 8),
        "5": LayerPolicy("dense", 1.0, 8, 8),
    }


def test_weights_of_integer_layers_take_half_of_their_levels_where_asked() -> None:
    decisions = layer_decisions(graph(), ["density", "weight_bits", "act_bits"], bits=(6, 8, 32))
    found = layer_policies(
        decisions,
        {"1:density": 30, "1:weight_bits": 8, "1:act_bits": 8, "3:weight_bits": 8, "3:act_bits": 6, "5:act_bits": 8},
        "unstructured",
        reduce_range=True,
    )
    assert found == {
        "1": LayerPolicy("unstructured", 0.3, 8, 8, reduce_range=True),
        "3": LayerPolicy("dense", 1.0, 8, 6),
        "5": LayerPolicy("dense", 1.0, 32, 8),
    }


def test_a_third_is_a_density_too() -> None:
    decision = LayerDecision("1", "density", (34, 100))
    assert layer_policies([decision], {"1:density": 34}, "1:3") == {"1": LayerPolicy("1:3")}


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ((50, 30, 100), "levels of a:density are [50, 30, 100]; there must be some, and they must ascend"),
        ((), "levels of a:density are []; there must be some, and they must ascend"),
    ],
)
def test_levels_that_are_no_ladder_are_refused(levels: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LayerDecision("a", "density", levels)


def test_bits_that_no_policy_knows_are_refused() -> None:
    message = "levels of a:bits hold 9; allowed are 1, 2, 3, 4, 5, 6, 7, 8, 16, 32"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LayerDecision("a", "bits", (9, 32))
    with pytest.raises(PolicyError, match=r"^sparsity is 'blocks'; it must be one of dense, unstructured, "):
        layer_decisions(graph(), ["density"], sparsity="blocks")
