import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from envs import allocation
from envs.action import project
from envs.allocation import greedy, knapsack, losses
from envs.evaluator import Sensitivity
from envs.plans import uniform
from envs.space import Bound, SearchSpace
from graph_encoder.network import ChannelGroup, LinearDim, NetworkGraph, Operator, Term
from latency.budget import Budget
from latency.decision import LayerDecision


def chain(sizes: tuple[int, ...], costs: tuple[int, ...]) -> NetworkGraph:
    """Groups whose costs add up: so many multiply-adds a unit."""
    groups = tuple(ChannelGroup(f"g{i}", size, (), (f"layer{i}",), ()) for i, size in enumerate(sizes))
    pairs = enumerate(zip(sizes, costs, strict=True))
    terms = tuple(Term(f"layer{i}", cost, (LinearDim(size, ((i, 1),)),)) for i, (size, cost) in pairs)
    return NetworkGraph((), (), groups, terms, terms)


Allocate = Callable[[SearchSpace, list[np.ndarray]], np.ndarray]


class Vectors:
    """A cost by whole vectors of 8 channels, and half a vector more where they do not divide: 16 are less than 15."""

    kind = "macs"

    def __init__(self, groups: Sequence[str], sizes: np.ndarray, times: Sequence[int]) -> None:
        self.names, self.sizes, self.times = tuple(groups), sizes, np.array(times)
        self.dense = self(sizes)

    def __call__(self, kept: np.ndarray) -> int:
        return int((self.times * (2 * -(-kept // 8) + (kept % 8 != 0))).sum())

    def meter(self, kept: np.ndarray) -> "VectorsMeter":
        return VectorsMeter(self, kept)


class VectorsMeter:
    def __init__(self, cost: Vectors, kept: np.ndarray) -> None:
        self._full, self._kept = cost, kept.copy()

    @property
    def cost(self) -> int:
        return self._full(self._kept)

    def with_more(self, decision: int, units: int) -> int:
        kept = self._kept.copy()
        kept[decision] += units
        return self._full(kept)

    def keep_more(self, decision: int, units: int) -> None:
        self._kept[decision] += units


def space_of_vectors(times: Sequence[int], share: float, size: int = 24) -> SearchSpace:
    space = space_of(chain((size,) * len(times), (1,) * len(times)), 1.0)
    cost = Vectors(space.names, space.sizes, times)
    return replace(space, cost=cost, bounds=(Bound(cost, int(share * cost.dense)),))  # type: ignore[arg-type]


def loss_of(plan: Sequence[int], lost: list[np.ndarray]) -> float:
    """Of a plan on ladders that hold every count from 1 on."""
    return sum(float(of[count - 1]) for of, count in zip(lost, plan, strict=True))


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

    plans = itertools.product(*(range(1, size + 1) for size in sizes))
    best = min(loss_of(plan, lost) for plan in plans if space.cost(np.array(plan)) <= (space.limit or 0))
    assert space.cost(counts) <= (space.limit or 0)
    assert loss_of(counts.tolist(), lost) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(4))
def test_knapsack_finds_the_least_loss_where_a_count_below_may_cost_more(seed: int) -> None:
    rng = np.random.default_rng(seed)
    space = space_of_vectors(rng.integers(1, 9, 3).tolist(), 0.6)
    lost = [np.append(np.sort(rng.random(23))[::-1], 0.0) for _ in range(3)]

    counts = counts_of(knapsack(space, lost), space)

    plans = itertools.product(range(1, 25), repeat=3)
    best = min(loss_of(plan, lost) for plan in plans if space.cost(np.array(plan)) <= (space.limit or 0))
    assert space.cost(counts) <= (space.limit or 0)
    assert loss_of(counts.tolist(), lost) == pytest.approx(best)


@pytest.mark.parametrize("allocate", [greedy, knapsack])
@pytest.mark.parametrize("seed", range(4))
def test_no_count_that_costs_more_bars_the_way_to_one_that_costs_less(allocate: Allocate, seed: int) -> None:
    """Losses by measured sensitivities that differ a lot: a plan that knows them loses less than one that does not."""
    rng = np.random.default_rng(seed)
    space = space_of_vectors(rng.integers(1, 9, 6).tolist(), 0.5)
    lost = [10 ** rng.uniform(-3, -1) * np.linspace(1, 0, 24) for _ in range(6)]

    counts = counts_of(allocate(space, lost), space)

    assert space.cost(counts) <= (space.limit or 0)
    assert loss_of(counts.tolist(), lost) <= loss_of(project(uniform(space), space).tolist(), lost)
    # Every count is whole vectors: others keep less for more.
    assert (counts % 8 == 0).all()


def test_knapsack_meets_the_budget_where_savings_do_not_add_up() -> None:
    """One layer between two groups: halving both saves three quarters of it, not all."""
    groups = tuple(ChannelGroup(f"g{i}", 20, (), ("layer",), ()) for i in range(2))
    terms = (Term("layer", 1, (LinearDim(20, ((0, 1),)), LinearDim(20, ((1, 1),)))),)
    space = space_of(NetworkGraph((), (), groups, terms, terms), 0.25)
    lost = [np.linspace(1, 0, 20) ** 2] * 2

    counts = counts_of(knapsack(space, lost), space)

    assert 0.2 * space.cost.dense <= space.cost(counts) <= 0.25 * space.cost.dense


@pytest.mark.parametrize("allocate", [greedy, knapsack])
def test_allocation_gives_bits_to_the_layers_that_lose_without(allocate: Allocate) -> None:
    """Two equal layers, one a thousand times as sensitive: losses far below any noise decide."""
    graph = NetworkGraph(
        tuple(Operator(f"layer{i}", "linear", 64, 64, weight=f"layer{i}.weight") for i in range(2)),
        (),
        (),
        (),
        tuple(Term(f"layer{i}.weight", 1, (LinearDim(64), LinearDim(64))) for i in range(2)),
    )
    layers = [LayerDecision(f"layer{i}", "weight_bits", (2, 4, 6, 8)) for i in range(2)]
    space = SearchSpace.build(graph, {}, Budget(kind="bytes", share=0.18), layers=layers)
    by_level = {
        "layer0:weight_bits": {2: 1e-2, 4: 6e-4, 8: 2e-6},
        "layer1:weight_bits": {2: 1e-5, 4: 5e-6, 8: 2e-6},
    }
    measured = Sensitivity(space.names, (0.3,), 0.9, np.zeros((2, 1)), 1.0, by_level)

    counts = project(allocate(space, losses(space, measured, floor=0.005)), space)

    assert counts.tolist() == [8, 2]


def bits_of_layers(n: int, share: float, kind: str) -> SearchSpace:
    """Bits of weights and activations apart, so that what two decisions of a layer save does not add up."""
    operators = tuple(Operator(f"layer{i}", "linear", 64, 64, macs=4096, weight=f"layer{i}.weight") for i in range(n))
    terms = tuple(Term(f"layer{i}", 1, (LinearDim(64), LinearDim(64))) for i in range(n))
    sizes = tuple(replace(term, owner=f"{term.owner}.weight") for term in terms)
    choices = [
        LayerDecision(f"layer{i}", choice, (2, 4, 8, 32)) for choice in ("weight_bits", "act_bits") for i in range(n)
    ]
    budget = Budget.parse(f"{share:%} {kind}")
    return SearchSpace.build(NetworkGraph(operators, (), (), terms, sizes), {}, budget, layers=choices)


@pytest.mark.parametrize("share", [0.02, 0.05, 0.15])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_knapsack_loses_no_more_than_greedy_where_savings_multiply(seed: int, share: float) -> None:
    space, rng = bits_of_layers(4, share, "bops"), np.random.default_rng(seed)
    lost = [np.append(np.sort(rng.random(3) * 10.0 ** rng.uniform(-3, 0))[::-1], 0.0) for _ in range(space.n)]

    def worth(allocate: Allocate) -> float:
        counts = project(allocate(space, lost), space)
        return sum(float(of[list(ladder).index(n)]) for of, ladder, n in zip(lost, space.ladders, counts, strict=True))

    assert worth(knapsack) <= worth(greedy) + 1e-12


def test_knapsack_takes_the_greedy_plan_where_no_choice_meets_what_it_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    space = bits_of_layers(3, 0.05, "bops")
    lost = [np.array([3.0, 2.0, 1.0, 0.0])] * space.n
    monkeypatch.setattr(allocation, "_choose", lambda *_: None)

    assert project(knapsack(space, lost), space).tolist() == project(greedy(space, lost), space).tolist()


@pytest.mark.parametrize(("allocate", "name"), [(greedy, "greedy allocation"), (knapsack, "the knapsack")])
def test_allocation_without_a_budget_is_refused(allocate: Allocate, name: str) -> None:
    space = space_of(chain((4,), (1,)), None)
    message = f"{name} needs a budget to stop at; build the search space with one"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        allocate(space, [np.zeros(4)])
