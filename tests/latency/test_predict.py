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


def test_faster_kernels_for_even_counts_show_in_the_prediction(model: LatencyModel) -> None:
    inner = model.names.index("inner")
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
    calibration = Calibration(0.8, 1.5, 8, 0.03, integer_scale=1.1, conversion=0.02, element=1e-5, n_mixed=8)
    return LatencyModel(graph, table, layers=layer_decisions(graph, ["bits"]), calibration=calibration)


def test_bits_change_the_time_of_their_layer_and_of_no_other(mixed: LatencyModel) -> None:
    before, counts = mixed.by_owner(mixed.sizes), mixed.sizes.copy()
    counts[mixed.names.index("inner:bits")] = 8
    after = mixed.by_owner(counts)

    assert {name for name in after if after[name] != before[name]} == {"inner"}
    assert after["inner"] < 0.5 * before["inner"]


def with_bits(model: LatencyModel, channels: list[int], integer: set[str]) -> np.ndarray:
    names = [name.partition(":")[0] for name in model.names if name.endswith(":bits")]
    return np.array(channels + [8 if name in integer else 32 for name in names])


def test_conversions_cost_what_they_were_calibrated_at_by_hand(mixed: LatencyModel) -> None:
    assert mixed.names[:2] == ("stem", "inner")
    plan = with_bits(mixed, [20, 36], {"inner"})
    sums = mixed.sums(plan)
    # What it reads is quantized, and converted back for the sum; what it writes is converted for the depthwise layer.
    assert (sums.conversions, sums.elements) == (3, 64 * (2 * 20 + 36))
    layers = sum(mixed.by_owner(plan).values())
    offset = mixed.dense - sum(mixed.by_owner(mixed.sizes).values())
    unit = offset / 1.5
    expected = unit * (0.02 * sums.conversions + 1e-5 * sums.elements)
    assert mixed(plan) - layers - offset == pytest.approx(expected, rel=1e-3)


def test_integers_that_meet_floats_everywhere_can_take_longer_than_floats(mixed: LatencyModel) -> None:
    channels = [4, 4]
    all_of = {name.partition(":")[0] for name in mixed.names if name.endswith(":bits")}
    alone = mixed(with_bits(mixed, channels, {"inner"}))
    assert mixed(with_bits(mixed, channels, all_of)) < mixed(with_bits(mixed, channels, set())) < alone


def test_meter_counts_channels_and_bits_as_the_difference_of_two_plans(mixed: LatencyModel) -> None:
    generator = np.random.default_rng(4)
    is_bits = np.array([name.endswith(":bits") for name in mixed.names])
    for _ in range(30):
        counts = np.where(is_bits, generator.choice([8, 32], len(is_bits)), generator.integers(1, mixed.sizes + 1))
        meter = mixed.meter(counts)
        assert meter.cost == mixed(counts)
        for _ in range(6):
            index = int(generator.integers(len(counts)))
            to = int(generator.choice([8, 32]) if is_bits[index] else generator.integers(1, mixed.sizes[index] + 1))
            other = counts.copy()
            other[index] = to
            assert meter.with_more(index, to - int(counts[index])) == mixed(other)
            meter.keep_more(index, to - int(counts[index]))
            counts = other
            assert meter.cost == mixed(counts)


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
