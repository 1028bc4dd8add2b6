import itertools
import re

import numpy as np
import pytest

from envs.allocation import greedy, knapsack, losses
from envs.evaluator import Sensitivity
from envs.space import SearchSpace
from graph_encoder.network import ChannelGroup, LinearDim, NetworkGraph, Term
from latency.budget import Budget


def chain(sizes: tuple[int, ...], costs: tuple[int, ...]) -> NetworkGraph:
    """Groups whose costs add up: so many multiply-adds a unit."""
    groups = tuple(ChannelGroup(f"g{i}", size, (), (f"layer{i}",), ()) for i, size in enumerate(sizes))
    pairs = enumerate(zip(sizes, costs, strict=True))
    terms = tuple(Term(f"layer{i}", cost, (LinearDim(size, ((i, 1),)),)) for i, (size, cost) in pairs)
    return NetworkGraph((), (), groups, terms, terms)


def space_of(graph: NetworkGraph, share: float | None) -> SearchSpace:
    importance = {group.name: np.ones(group.size) for group in graph.groups}
    budget = None if share is None else Budget(share=share)
    return SearchSpace.build(graph, importance, budget, rounding=1, min_keep_ratio=0.0)


def counts_of(ratios: np.ndarray, space: SearchSpace) -> np.ndarray:
    return np.rint(ratios * space.sizes).astype(np.int64)


def test_losses_run_in_straight_lines_through_the_probes_and_never_rise() -> None:
    space = space_of(chain((10, 10), (1, 1)), 0.5)
    # The second group seems to lose less when more is taken: that is noise.
    measured = Sensitivity(space.names, (0.3, 0.6), 0.9, np.array([[0.35, 0.08], [0.02, 0.04]]), 1.0)

    first, second = losses(space, measured, floor=0.001)

    assert first[2] == pytest.approx(0.35)
    assert first[5] == pytest.approx(0.08)
    assert first[3] == pytest.approx(0.35 - 0.27 / 3)
    assert first[9] == 0
    assert first[0] == pytest.approx(0.35 + 2 * 0.35 / 7)
    assert second[2] == second[5] == pytest.approx(0.04)
    assert (np.diff(first) <= 0).all()


def test_a_loss_below_the_noise_counts_as_the_noise() -> None:
    space = space_of(chain((10,), (1,)), 0.5)
    measured = Sensitivity(space.names, (0.3,), 0.9, np.array([[-0.01]]), 1.0)

    assert losses(space, measured, floor=0.005)[0][2] == 0.005


def test_greedy_takes_what_loses_least_for_its_saving() -> None:
    # A unit of g1 saves ten times as much and loses as much: all of the saving comes from there.
    space = space_of(chain((10, 10), (1, 10)), 0.5)
    lost = [np.linspace(0.1, 0, 10), np.linspace(0.1, 0, 10)]

    np.testing.assert_array_equal(counts_of(greedy(space, lost), space), [10, 4])


@pytest.mark.parametrize("seed", range(6))
def test_knapsack_finds_the_least_loss_of_all_plans(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes, costs = tuple(rng.integers(3, 8, 4).tolist()), tuple(rng.integers(1, 20, 4).tolist())
    space = space_of(chain(sizes, costs), 0.6)
    lost = [np.append(np.sort(rng.random(size - 1))[::-1], 0.0) for size in sizes]

    counts = counts_of(knapsack(space, lost), space)

    def loss(plan: tuple[int, ...]) -> float:
        return sum(float(of[count - 1]) for of, count in zip(lost, plan, strict=True))

    plans = itertools.product(*(range(1, size + 1) for size in sizes))
    best = min(loss(plan) for plan in plans if space.cost(np.array(plan)) <= (space.limit or 0))
    assert space.cost(counts) <= (space.limit or 0)
    assert loss(tuple(counts.tolist())) == pytest.approx(best)


def test_knapsack_meets_the_budget_where_savings_do_not_add_up() -> None:
    """One layer between two groups: halving both saves three quarters of it, not all."""
    groups = tuple(ChannelGroup(f"g{i}", 20, (), ("layer",), ()) for i in range(2))
    terms = (Term("layer", 1, (LinearDim(20, ((0, 1),)), LinearDim(20, ((1, 1),)))),)
    space = space_of(NetworkGraph((), (), groups, terms, terms), 0.25)
    lost = [np.linspace(1, 0, 20) ** 2] * 2

    counts = counts_of(knapsack(space, lost), space)

    assert 0.2 * space.cost.dense <= space.cost(counts) <= 0.25 * space.cost.dense


@pytest.mark.parametrize(("allocate", "name"), [(greedy, "greedy allocation"), (knapsack, "the knapsack")])
def test_allocation_without_a_budget_is_refused(allocate: object, name: str) -> None:
    space = space_of(chain((4,), (1,)), None)
    message = f"{name} needs a budget to stop at; build the search space with one"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        allocate(space, [np.zeros(4)])  # type: ignore[operator]
