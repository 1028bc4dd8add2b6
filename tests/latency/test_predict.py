import numpy as np
import pytest
import torch
from torch import nn

from graph_encoder.capture import capture
from latency.decision import LayerDecision, layer_decisions
from latency.predict import LatencyModel
from latency.runtimes import LatencyError
from latency.table import Calibration, build_table, needed_kinds, start_table

from .synthetic import FormulaDevice, IntegerFormulaDevice


class Residual(nn.Module):
    """A sum, a depthwise and a grouped layer: groups that several layers read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.inner = nn.Conv2d(24, 40, 3, padding=1)
        self.depthwise = nn.Conv2d(40, 40, 3, padding=1, groups=40)
        self.outer = nn.Conv2d(40, 24, 3, padding=1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = (x + self.outer(self.depthwise(self.inner(x).relu()).relu())).relu()
        return self.head(x.mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def model() -> LatencyModel:
    graph = capture(Residual(), torch.randn(2, 3, 8, 8))
    device = FormulaDevice()
    needed = needed_kinds(graph, {group.name: 1 for group in graph.prunable}, [32])
    table = build_table(start_table(device), device, needed)
    return LatencyModel(graph, table, calibration=Calibration(0.8, 1.5, 8, 0.03))


def plans(model: LatencyModel, n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, model.sizes + 1, (n, len(model.sizes)))


def test_layers_and_offset_add_up_to_the_network(model: LatencyModel) -> None:
    counts = plans(model, 1)[0]
    offset = model.dense - sum(model.by_owner(model.sizes).values())
    assert offset > 0
    assert set(model.by_owner(counts)) == {"stem", "inner", "depthwise", "outer", "head"}
    assert model(counts) == offset + sum(model.by_owner(counts).values())


def test_meter_counts_each_step_as_the_difference_of_two_plans(model: LatencyModel) -> None:
    generator = np.random.default_rng(1)
    for counts in plans(model, 20):
        meter = model.meter(counts)
        assert meter.cost == model(counts)
        for _ in range(5):
            group = int(generator.integers(len(counts)))
            units = int(generator.integers(0, model.sizes[group] - counts[group] + 1))
            more = counts.copy()
            more[group] += units
            assert meter.with_more(group, units) == model(more)
            meter.keep_more(group, units)
            counts = more
            assert meter.cost == model(counts)


def test_the_bound_never_falls_when_a_ratio_grows(model: LatencyModel) -> None:
    generator = np.random.default_rng(2)
    low = generator.uniform(0.05, 1, (200, len(model.sizes)))
    high = low + generator.uniform(0, 1, low.shape) * (1 - low)
    assert (model.of_ratios(high) >= model.of_ratios(low) - 1e-6).all()


def test_no_plan_costs_more_than_the_bound_of_ratios_that_it_stays_under(model: LatencyModel) -> None:
    generator = np.random.default_rng(3)
    ratios = generator.uniform(0.05, 1, (300, len(model.sizes)))
    floored = np.maximum(np.floor(ratios * model.sizes), 1).astype(int)
    ratios = np.maximum(ratios, floored / model.sizes)
    costs = np.array([model(counts) for counts in floored])
    assert (model.of_ratios(ratios) >= costs).all()
    # A bound that is never near would waste the budget: whole vectors meet it.
    assert model.of_ratios(np.ones((1, len(model.sizes))))[0] <= 4 / 3 * model.dense


def test_faster_kernels_for_even_counts_show_in_the_prediction(model: LatencyModel) -> None:
    inner = model.groups.index("inner")
    counts = model.sizes.copy()
    counts[inner] = 39
    assert model(counts) > model.dense
    assert model.meter(counts).with_more(inner, 1) < model(counts)


@pytest.fixture(scope="module")
def mixed() -> LatencyModel:
    """The same network with bits to decide for every layer; integers take a third of the time."""
    graph = capture(Residual(), torch.randn(2, 3, 8, 8))
    device = IntegerFormulaDevice()
    needed = needed_kinds(graph, {group.name: 1 for group in graph.prunable}, [8, 32])
    table = build_table(start_table(device), device, needed)
    return LatencyModel(graph, table, layers=layer_decisions(graph, ["bits"]))


def test_bits_change_the_time_of_their_layer_and_of_no_other(mixed: LatencyModel) -> None:
    before, counts = mixed.by_owner(mixed.sizes), mixed.sizes.copy()
    counts[mixed.groups.index("inner:bits")] = 8
    after = mixed.by_owner(counts)

    assert {name for name in after if after[name] != before[name]} == {"inner"}
    assert after["inner"] < 0.5 * before["inner"]


def test_meter_and_bound_hold_for_channels_and_bits_together(mixed: LatencyModel) -> None:
    generator = np.random.default_rng(4)
    n_bits = sum(name.endswith(":bits") for name in mixed.groups)
    for _ in range(30):
        counts = np.append(generator.integers(1, mixed.sizes[:-n_bits] + 1), generator.choice([8, 32], n_bits))
        low = np.flatnonzero(counts[-n_bits:] == 8)
        ratios = counts / mixed.sizes
        assert mixed.of_ratios(ratios[None])[0] >= mixed(counts)
        if len(low):
            place = len(counts) - n_bits + int(low[0])
            more = counts.copy()
            more[place] = 32
            # Between 8 and 32 bits the bound is still that of 8.
            between = ratios.copy()
            between[place] = 0.9
            assert mixed.of_ratios(between[None])[0] < mixed.of_ratios((more / mixed.sizes)[None])[0]
            assert mixed.meter(counts).with_more(place, 24) == mixed(more)


@pytest.mark.parametrize(
    ("decision", "message"),
    [
        (
            LayerDecision("inner", "weight_bits", (8, 32)),
            "inner:weight_bits decides weights and activations apart, and runtimes compute with both in integers or "
            "with neither; put bits in search.decide in its place",
        ),
        (
            LayerDecision("inner", "bits", (4, 8, 32)),
            "inner:bits may be 4 bits, which no table times: below 8 they are simulated, and take no less time; keep "
            "to 8 and 32, or take a budget of bytes or bops",
        ),
    ],
)
def test_what_saves_no_time_is_refused(decision: LayerDecision, message: str) -> None:
    graph = capture(Residual(), torch.randn(2, 3, 8, 8))
    with pytest.raises(LatencyError) as caught:
        LatencyModel(graph, start_table(FormulaDevice()), layers=[decision])
    assert str(caught.value) == message
