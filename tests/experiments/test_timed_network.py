from dataclasses import replace

import numpy as np
import pytest

from envs.action import counts_of
from envs.space import Bound
from experiments.timed_network import TimedNetwork
from latency.predict import LatencyModel
from latency.table import build_table, needed_kinds, start_table
from tests.latency.synthetic import FormulaDevice


def test_plans_of_one_seed_are_the_same_and_lie_on_the_rungs() -> None:
    network = TimedNetwork.build("tests.experiments.tiny:network", "1,8,8", 3, rounding=4)
    plans = network.plans(20, seed=0)
    assert plans == network.plans(20, seed=0) != network.plans(20, seed=1)
    sizes = dict(zip(network.space.names, network.space.sizes.tolist(), strict=True))
    assert all(count % 4 == 0 or count == sizes[name] for plan in plans for name, count in plan.items())


def test_mixes_of_one_seed_are_the_same_with_all_in_integers_first() -> None:
    network = TimedNetwork.build("tests.experiments.tiny:network", "1,8,8", 3, rounding=4)
    (plan,) = network.plans(1, seed=0)
    mixes = network.mixed(plan, 6, seed=0)
    assert mixes == network.mixed(plan, 6, seed=0) != network.mixed(plan, 6, seed=1)
    assert all({name: mix[name] for name in plan} == plan for mix in mixes)
    assert all({mix[one.name] for one in network.bits} == {8} for mix in (mixes[0], mixes[3]))
    assert {mix[one.name] for mix in mixes for one in network.bits} == {8, 32}
    layers = network.policy(mixes[1]).layers
    assert {name for name, layer in layers.items() if layer.act_bits == 8} == {
        one.layer for one in network.bits if mixes[1][one.name] == 8
    }


def test_every_mix_has_a_layer_in_integers() -> None:
    network = TimedNetwork.build("tests.experiments.tiny:network", "1,8,8", 3, rounding=4)
    (plan,) = network.plans(1, seed=0)

    mixes = [mix for seed in range(20) for mix in network.mixed(plan, 6, seed)]

    assert all(8 in {mix[one.name] for one in network.bits} for mix in mixes)


@pytest.mark.parametrize("rounding", [1, 4])
@pytest.mark.parametrize("share", [0.2, 0.45, 0.8])
def test_a_latency_budget_is_met_by_construction(rounding: int, share: float) -> None:
    network = TimedNetwork.build("tests.experiments.tiny:network", "1,8,8", 3, rounding)
    device = FormulaDevice()
    table = build_table(start_table(device), device, needed_kinds(network.graph, network.steps, [32]))
    cost = LatencyModel(network.graph, table, network.space.names)
    lowest = cost(network.space.minimum)
    # Odd counts take slower kernels, so that the least network need not be the fastest.
    limit = lowest + int(share * abs(cost.dense - lowest))
    space = replace(network.space, cost=cost, bounds=(Bound(cost, limit),))
    generator = np.random.default_rng(0)
    for _ in range(10):
        counts = counts_of(generator.uniform(-1, 1, space.n), space)
        assert cost(counts) <= limit
        if rounding == 4:
            # With counts that are whole vectors the device is monotone: there is no step left that fits.
            for index in range(space.n):
                more = counts.copy()
                more[index] = space.next_rung(index, int(counts[index]))
                assert more[index] == counts[index] or cost(more) > limit
