import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pruning.calibration import CalibrationError, Grid, Observer, RangeMethod, shared_values, weight_steps


def observed(values: Tensor) -> Observer:
    observer = Observer("what 'conv' reads")
    observer.see(values)
    observer.count_from_now_on()
    observer.see(values)
    return observer


def test_no_values_at_all_change_nothing() -> None:
    observer = Observer("what an expert without tokens reads")
    for _ in range(2):
        observer.see(torch.empty(0, 4))
        observer.see(draw(50))
        observer.count_from_now_on()

    expected = observed(draw(50))
    assert observer.batches == 1
    assert observer.grid(16, "mse") == expected.grid(16, "mse")


def draw(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def squared_error(grid: Grid, values: Tensor) -> float:
    exact = values.double().numpy()
    return float(((grid.values(grid.nearest(exact)) - exact) ** 2).mean())


@pytest.mark.parametrize(("lowest", "highest"), [(0.0, 2.0), (-1.0, 3.0), (-5.0, 0.0)])
def test_grid_meets_zero_and_both_ends_within_half_a_step(lowest: float, highest: float) -> None:
    grid = Grid.spanning(lowest, highest, 16)
    values = grid.values(np.arange(16.0))

    assert 0.0 in values
    assert abs(values[0] - lowest) <= grid.step / 2 + 1e-12
    assert abs(values[-1] - highest) <= grid.step / 2 + 1e-12


def test_minmax_spans_everything_seen_in_all_batches() -> None:
    observer = Observer("x")
    observer.see(torch.tensor([0.5, 2.0]))
    observer.see(torch.tensor([-1.0, 0.0]))

    assert observer.grid(4, "minmax") == Grid(1.0, 1, 4)


def test_percentile_leaves_out_the_rarest_values() -> None:
    values = torch.linspace(0, 1, 100_001)
    values[-1] = 50.0

    # The outlier makes a bin as wide as 50 / 2048, and the range ends with a bin.
    assert observed(values).grid(256, "percentile").step * 255 == pytest.approx(1, abs=2 * 50 / 2048)


@pytest.mark.parametrize("levels", [4, 16, 256])
@pytest.mark.parametrize("kind", ["signed", "positive"])
def test_mse_range_is_as_good_as_the_best_of_a_search_over_both_ends(levels: int, kind: str) -> None:
    values = draw(20_000) ** 3
    values = values.relu() if kind == "positive" else values

    found = squared_error(observed(values).grid(levels, "mse"), values)

    ends = np.linspace(0.01, 1, 60)
    low, high = float(values.min()), float(values.max())
    best = min(
        squared_error(Grid.spanning(low * one, high * other, levels), values)
        for one in (ends if kind == "signed" else [1.0])
        for other in ends
    )
    assert found <= 1.15 * best


def test_entropy_range_leaves_outliers_out_and_does_not_mind_the_zeros_of_a_relu() -> None:
    values = draw(50_000).relu()
    few = torch.cat([values, torch.tensor([60.0])])

    assert 2.5 < observed(few).grid(256, "entropy").step * 255 < 8
    assert observed(values).grid(256, "entropy").step * 255 > 0.8 * float(values.max())


def test_lsq_starts_from_twice_the_mean_magnitude_over_the_root_of_the_top_level() -> None:
    values = draw(50_000).relu()

    expected = 2 * float(values.mean()) / math.sqrt(15)
    assert observed(values).grid(16, "lsq").step == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse", "lsq"])
def test_values_that_are_all_zero_have_a_grid(method: RangeMethod) -> None:
    grid = observed(torch.zeros(100)).grid(256, method)

    assert grid.step > 0 and grid.zero_point == 0


def test_values_that_are_not_finite_are_named_with_their_place() -> None:
    observer = Observer("what 'conv' reads")
    observer.see(torch.zeros(3))
    with pytest.raises(CalibrationError) as caught:
        observer.see(torch.tensor([1.0, math.nan, math.inf]))
    assert str(caught.value) == (
        "calibration met 2 values that are NaN or infinite in what 'conv' reads (batch 2); check the calibration "
        "images and the weights"
    )


def test_place_that_saw_nothing_is_named() -> None:
    with pytest.raises(CalibrationError) as caught:
        Observer("what 'conv' reads").grid(256, "mse")
    assert str(caught.value) == (
        "calibration saw nothing of what 'conv' reads: it did not run as a module of its own on the calibration "
        "batches; leave the layer out of the policy"
    )


def test_weight_steps_are_each_channels_own() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.0], [7.0, 0.0, 0.0]])

    assert weight_steps(weight, 3, "minmax").tolist() == pytest.approx(torch.tensor([[2 / 3], [7 / 3]]))
    # One bit: the mean magnitude of what is not zero. LSQ: 2 * mean / sqrt(top), of all.
    assert weight_steps(weight, 1, "mse").tolist() == [[1.5], [7.0]]
    assert weight_steps(weight, 2, "lsq").tolist() == [[2.0], [pytest.approx(14 / 3)]]


def test_mse_steps_of_weights_are_near_the_best_of_a_fine_search() -> None:
    weight = draw(512).view(1, -1)

    def error(step: float) -> float:
        return float((((weight / step).round().clamp(-7, 7) * step - weight) ** 2).sum())

    best = min(error(step) for step in np.linspace(0.05, 1, 1000))
    assert error(float(weight_steps(weight, 4, "mse"))) <= 1.02 * best


def test_weights_that_are_not_finite_and_methods_that_weights_do_not_have_are_refused() -> None:
    with pytest.raises(CalibrationError) as caught:
        weight_steps(torch.tensor([[math.nan, 1.0]]), 4, "mse")
    assert str(caught.value) == "1 weights are NaN or infinite; load or train them again"
    with pytest.raises(CalibrationError) as caught:
        weight_steps(torch.ones(1, 2), 4, "entropy")
    assert str(caught.value) == "weights have no calibration method 'entropy'; pass minmax, mse or lsq"


def test_shared_values_are_the_means_of_well_separated_clusters_and_zeros_belong_to_none() -> None:
    clusters = [torch.tensor([-2.0, -2.2]), torch.tensor([0.9, 1.0, 1.1]), torch.tensor([3.0]), torch.tensor([5.0])]
    weight = torch.cat([*clusters, torch.zeros(50)])

    values, index = shared_values(weight, 4)

    torch.testing.assert_close(values, torch.tensor([-2.1, 1.0, 3.0, 5.0]))
    assert index[:7].tolist() == [0, 0, 1, 1, 1, 2, 3]


def test_no_single_move_of_a_weight_to_another_shared_value_is_better() -> None:
    weight = draw(400)
    values, index = shared_values(weight, 8)

    distance = (weight[:, None] - values).abs()
    assert torch.equal(distance.argmin(1), index.long())
    for cluster in range(8):
        if (index == cluster).any():
            torch.testing.assert_close(values[cluster], weight[index == cluster].mean(), atol=2e-2, rtol=0)
