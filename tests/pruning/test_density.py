import pytest
import torch
from torch import nn

from pruning.density import Gradual, OneShot, PruneRetrain, at_density, threshold_layers
from pruning.layer_policy import LayerPolicy, PolicyError
from pruning.sparsity import zero_weights


def test_gradual_density_is_the_cubic_of_zhu_and_gupta() -> None:
    schedule = Gradual(start=10, end=50, every=10)
    # Sparsities 0.8 * (1 - (1 - i / 4) ** 3) at steps 10 + 10 i.
    sparsities = [0.0, 0.8 * 37 / 64, 0.8 * 7 / 8, 0.8 * 63 / 64, 0.8]
    assert [1 - schedule.density(0.2, 10 + 10 * i) for i in range(5)] == pytest.approx(sparsities)


def test_gradual_density_moves_in_stairs_and_stays_at_its_ends() -> None:
    schedule = Gradual(start=10, end=55, every=10, initial=0.9)
    stairs = [schedule.density(0.2, step) for step in range(100)]
    assert set(stairs[:20]) == {0.9} and set(stairs[55:]) == {0.2}
    changes = [step for step in range(1, 100) if stairs[step] != stairs[step - 1]]
    assert changes == [20, 30, 40, 50, 55]
    assert stairs == sorted(stairs, reverse=True)


def test_one_shot_keeps_all_until_its_step() -> None:
    assert [OneShot(3).density(0.1, step) for step in (0, 2, 3, 9)] == [1, 1, 0.1, 0.1]


def test_each_round_of_prune_and_retrain_keeps_the_same_share() -> None:
    schedule = PruneRetrain(rounds=3, steps=5)
    densities = [schedule.density(0.064, step) for step in (0, 4, 5, 10, 14, 15, 99)]
    assert densities == pytest.approx([0.4, 0.4, 0.16, 0.064, 0.064, 0.064, 0.064])


def test_n_of_m_on_its_way_keeps_a_whole_number_of_m() -> None:
    layer = LayerPolicy("1:4")
    patterns = [at_density(layer, density).sparsity for density in (1.0, 0.8, 0.75, 0.6, 0.5, 0.3, 0.25)]
    assert patterns == ["4:4", "4:4", "3:4", "3:4", "2:4", "2:4", "1:4"]
    assert at_density(LayerPolicy("block8", 0.1), 0.4) == LayerPolicy("block8", 0.4)
    assert at_density(LayerPolicy(), 0.4) == LayerPolicy()


def test_threshold_drops_what_lies_below_the_quality_parameter_times_the_standard_deviation() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-3.0, 3, 1, -1], [1, -1, 3, -3]]))
    # Mean 0 and variance 5: thresholds of 1 and 0.99 standard deviations of 2.236 leave the threes, 0.4 leaves all.
    assert threshold_layers(model, {"0": 0.4})["0"] == LayerPolicy("unstructured", 1.0)
    layers = threshold_layers(model, {"0": 1.0})
    assert layers == {"0": LayerPolicy("unstructured", 0.5)}
    zero_weights(model, layers)
    assert model[0].weight.tolist() == [[-3, 3, 0, 0], [0, 0, 3, -3]]


def test_threshold_of_a_later_round_counts_the_zeros_of_earlier_ones() -> None:
    model = nn.Sequential(nn.Linear(6, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-3.0, 3, 1, -1, 0, 0]]))
    # The standard deviation of all six is 1.826; that of the four that are left would be 2.236, and drop the ones.
    assert threshold_layers(model, {"0": 0.5})["0"].density == 4 / 6
    assert threshold_layers(model, {"0": 0.6})["0"].density == 2 / 6
    assert threshold_layers(model, {"0": 0.0})["0"].density == 4 / 6


def test_a_threshold_above_all_weights_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-3.0, 3, 1, -1]]))
    with pytest.raises(PolicyError) as caught:
        threshold_layers(model, {"0": 1.5})
    assert str(caught.value) == (
        "a quality parameter of 1.5 leaves 0 of the 4 weights of layer '0'; pass at least 0 and at most 1.34, its "
        "largest weight in standard deviations"
    )


def test_schedules_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError) as caught:
        Gradual(start=5, end=5)
    assert str(caught.value) == (
        "a gradual schedule from step 5 to 5, every 100 steps, from density 1: it needs 0 <= start < end, every >= 1 "
        "and a density above 0 and at most 1"
    )
    with pytest.raises(ValueError, match=r"^0 rounds of 5 steps of retraining; both must be at least 1$"):
        PruneRetrain(rounds=0, steps=5)
