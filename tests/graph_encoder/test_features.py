import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graph_encoder.capture import capture
from graph_encoder.features import (
    BOUND,
    EDGE_TYPE_INDEX,
    KIND_INDEX,
    NODE_FEATURES,
    LayerNode,
    column,
    edges,
    kinds,
    sensitivity_features,
    static_node_features,
)
from graph_encoder.network import NetworkGraph

CHANGING = {"keep_ratio", "cost_kept", "is_decided", "is_current"}
MEASURED = {name for name in NODE_FEATURES if "sensitivity" in name}
# These need a grouped convolution or unequal minima, which the network below has not.
NOT_IN_THE_NETWORK = {"log_groups"}


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.inner_bn = nn.BatchNorm2d(width)
        self.outer = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.outer_bn = nn.BatchNorm2d(width)
        self.down = nn.Conv2d(width, 2 * width, 1, stride=2)
        self.classify = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_bn(self.stem(x)))
        x = torch.relu(x + self.outer_bn(self.outer(torch.relu(self.inner_bn(self.inner(x))))))
        return self.classify(torch.relu(self.down(x)).mean((2, 3)))


def network(width: int, seed: int = 0) -> tuple[nn.Module, NetworkGraph]:
    torch.manual_seed(seed)
    model = Residual(width).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 1.5)
    return model, capture(model, torch.randn(2, 3, 16, 16))


def table(width: int) -> tuple[np.ndarray, NetworkGraph]:
    model, graph = network(width)
    generator = np.random.default_rng(0)
    importance = {group.name: generator.lognormal(0, 0.5, group.size) for group in graph.prunable}
    least = [math.ceil(0.1 * group.size) / group.size for group in graph.prunable]
    return static_node_features(graph, model, graph.prunable, importance, least), graph


def of(values: np.ndarray, graph: NetworkGraph, operator: str, feature: str) -> float:
    row = [o.name for o in graph.operators].index(operator)
    return float(values[row, column(feature)])


def test_features_of_a_convolution_by_hand() -> None:
    values, graph = table(16)
    macs, params = 16 * 32 * 64, 16 * 32 + 32
    weighted = 5
    assert of(values, graph, "down", "log_in_channels") == 4 / 8
    assert of(values, graph, "down", "log_out_channels") == 5 / 8
    assert of(values, graph, "down", "log_stride") == 1
    assert of(values, graph, "down", "log_kernel_area") == 0
    assert of(values, graph, "stem", "log_kernel_area") == pytest.approx(math.log2(9) / 4)
    assert of(values, graph, "down", "log_out_positions") == 6 / 8
    assert of(values, graph, "down", "log_macs") == pytest.approx(math.log10(1 + macs) / 6)
    assert of(values, graph, "down", "log_params") == pytest.approx(math.log10(1 + params) / 4)
    assert of(values, graph, "down", "relative_macs") == pytest.approx(math.log2(macs / graph.macs * weighted) / 4)
    assert of(values, graph, "down", "has_scale") == 0
    assert of(values, graph, "stem", "has_scale") == 1


def test_weight_statistics_do_not_depend_on_width() -> None:
    # Kaiming-uniform with a = sqrt(5), torch's default, is uniform on +-1/sqrt(fan_in): mean |w| sqrt(fan_in) is 1/2.
    for width in (16, 128):
        values, graph = table(width)
        assert of(values, graph, "inner", "weight_mean_abs") == pytest.approx(0.5, abs=0.03)
        assert of(values, graph, "inner", "weight_std") == pytest.approx(1 / math.sqrt(3), abs=0.03)


def test_networks_of_different_width_lie_in_the_same_range() -> None:
    narrow, wide = table(8)[0], table(128)[0]
    assert narrow.shape == wide.shape
    assert np.abs(narrow).max() < BOUND / 3
    assert np.abs(wide).max() < BOUND / 3
    # Sixteen times the width moves no feature by more than the logarithm says: 8 doublings of MACs at most.
    assert np.abs(wide - narrow).max() <= 1.1


def test_no_feature_is_the_same_on_all_nodes() -> None:
    values, _ = table(16)
    constant = {name for name in NODE_FEATURES if np.ptp(values[:, column(name)]) == 0}
    assert constant == CHANGING | MEASURED | NOT_IN_THE_NETWORK


def test_unequal_channels_show_in_the_statistics() -> None:
    model, graph = network(16)
    with torch.no_grad():
        model.inner.weight[:2] *= 20
    importance = {group.name: np.ones(group.size) for group in graph.prunable}
    importance["inner"] = model.inner.weight.detach().abs().flatten(1).sum(1).numpy()
    values = static_node_features(graph, model, graph.prunable, importance, [0.1] * len(graph.prunable))
    assert of(values, graph, "inner", "channel_norm_variation") > 5 * of(
        values, graph, "outer", "channel_norm_variation"
    )
    assert of(values, graph, "inner", "channel_norm_skew") > 0.5
    row = len(graph.operators) + [group.name for group in graph.prunable].index("inner")
    other = len(graph.operators) + [group.name for group in graph.prunable].index("down")
    assert values[row, column("importance_p90")] > 2
    assert values[row, column("importance_p10")] < -0.5
    assert values[other, column("importance_p90")] == values[other, column("importance_p10")] == 0


class Repeats(nn.Module):
    """An embedding whose vectors go through one layer three times, and a product with a weight as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(8, 4)
        self.matrix, self.bias = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        for _ in range(3):
            x = self.inner(x).relu()
        out: Tensor = self.head(torch.addmm(self.bias, x.mean(1), self.matrix))
        return out


def test_parameters_of_a_layer_that_runs_again_count_once_and_channels_are_told_from_inputs() -> None:
    torch.manual_seed(0)
    model = Repeats().eval()
    with torch.no_grad():
        # One channel of each is far stronger, of inputs none is.
        model.words.weight[:, 3] *= 20
        model.matrix[:, 3] *= 20
    graph = capture(model, torch.randint(50, (2, 6)))
    importance = {group.name: np.ones(group.size) for group in graph.prunable}
    values = static_node_features(graph, model, graph.prunable, importance, [0.1] * len(graph.prunable))

    row = len(graph.operators) + [group.name for group in graph.prunable].index("words")
    held = model.words.weight.numel() + 16 * 16 + 16 + model.matrix.numel() + 8
    assert values[row, column("log_params")] == pytest.approx(math.log10(1 + held) / 4)
    matrix = next(operator.name for operator in graph.operators if operator.weight == "matrix")
    for name in ("words", matrix):
        assert of(values, graph, name, "channel_norm_skew") > 0.5


def test_importance_of_either_sign_shows_relative_to_its_magnitude() -> None:
    model, graph = network(16)
    importance = {group.name: np.linspace(-3, 1, group.size) for group in graph.prunable}
    values = static_node_features(graph, model, graph.prunable, importance, [0.1] * len(graph.prunable))
    size = graph.group("inner").size
    row = len(graph.operators) + [group.name for group in graph.prunable].index("inner")
    magnitude = np.abs(np.linspace(-3, 1, size)).mean()
    assert values[row, column("importance_p50")] == pytest.approx(-1 / magnitude - 1)
    assert values[row, column("importance_p90")] == pytest.approx(0.6 / magnitude - 1)


def test_equal_channels_give_no_nan() -> None:
    model, graph = network(8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    values = static_node_features(
        graph, model, graph.prunable, {g.name: np.zeros(g.size) for g in graph.prunable}, [0.1] * len(graph.prunable)
    )
    assert np.isfinite(values).all()


def test_edges_join_groups_to_what_writes_and_reads_them() -> None:
    _, graph = network(8)
    inner = next(group for group in graph.prunable if group.name == "inner")
    index, types = edges(graph, [inner])
    names = [operator.name for operator in graph.operators] + ["GROUP"]
    typed = {(names[s], names[t], int(kind)) for (s, t), kind in zip(index.T, types, strict=True)}
    assert {
        ("inner", "GROUP", EDGE_TYPE_INDEX["produces"]),
        ("GROUP", "inner", EDGE_TYPE_INDEX["produced_by"]),
        ("GROUP", "outer", EDGE_TYPE_INDEX["consumed_by"]),
        ("outer", "GROUP", EDGE_TYPE_INDEX["consumes"]),
        ("stem", "inner", EDGE_TYPE_INDEX["forward"]),
        ("inner", "stem", EDGE_TYPE_INDEX["backward"]),
    } <= typed
    assert sum(kind == EDGE_TYPE_INDEX["forward"] for _, _, kind in typed) == len(graph.edges)


def test_kinds_of_nodes() -> None:
    _, graph = network(8)
    found = kinds(graph, graph.prunable)
    by_name = {operator.name: int(kind) for operator, kind in zip(graph.operators, found, strict=False)}
    assert by_name["inner"] == KIND_INDEX["conv"]
    assert by_name["classify"] == KIND_INDEX["linear"]
    assert (found[len(graph.operators) :] == KIND_INDEX["group"]).all()


def test_sensitivity_is_zero_at_the_noise_and_one_when_everything_is_lost() -> None:
    np.testing.assert_allclose(sensitivity_features(np.array([-0.1, 0.01, 0.1, 1.0]), 0.01), [0, 0, 0.5, 1], atol=1e-6)


def test_shares_of_work_are_those_of_time_where_times_are_known() -> None:
    model, graph = network(16)
    importance = {group.name: np.ones(group.size) for group in graph.prunable}
    times = {"stem": 1.0, "inner": 4.0, "outer": 2.0, "down": 1.0}

    values = static_node_features(
        graph, model, graph.prunable, importance, [0.1] * len(graph.prunable), [LayerNode("outer", "bits", 0.25)], times
    )

    share = dict(zip([o.name for o in graph.operators], values[:, column("relative_macs")], strict=False))
    # Five weighted operators; the last takes no time that is known.
    expected = {name: math.log2(time / 8 * 5) / 4 for name, time in times.items()} | {"classify": 0.0}
    assert {name: share[name] for name in expected} == pytest.approx(expected)
    inner = len(graph.operators) + [group.name for group in graph.prunable].index("inner")
    assert values[inner, column("relative_macs")] == pytest.approx(math.log2(6 / 8 * 5) / 4)
    assert values[-1, column("relative_macs")] == share["outer"]
