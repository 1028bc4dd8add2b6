"""Plans under several budgets at once, all of them kept by construction."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.action import counts_of, project
from envs.allocation import greedy, knapsack
from envs.layerwise_env import LayerwiseEnv
from envs.plans import global_magnitude, uniform
from envs.space import KEEP_LESS, SPARE_LESS, SearchSpace
from graph_encoder.capture import capture
from graph_encoder.features import GLOBAL_FEATURES
from graph_encoder.network import ChannelGroup, LinearDim, NetworkGraph, Term
from latency.budget import Budget, BudgetError, BudgetLike, read_budgets
from latency.cost import CostKind, predict_cost
from latency.decision import LayerChoice, layer_decisions
from latency.table import LatencyTable, build_table, needed_kinds, start_table
from tests.latency.synthetic import IntegerFormulaDevice

from .conftest import SmallNetwork, images, l1_importance, make_evaluator, random_graph

MODEL = SmallNetwork(width=16).eval()
GRAPH = capture(MODEL, images())
IMPORTANCE = l1_importance(MODEL, GRAPH)
CHOICES: dict[CostKind, set[LayerChoice]] = {
    "macs": {"density"},
    "params": {"density"},
    "bytes": {"density", "weight_bits"},
    "bops": {"density", "weight_bits", "act_bits"},
}
"""What each cost depends on."""


def mixed_space(budget: BudgetLike, choices: list[LayerChoice], **options: object) -> SearchSpace:
    layers = layer_decisions(GRAPH, choices, bits=(2, 4, 8, 32))
    return SearchSpace.build(GRAPH, IMPORTANCE, read_budgets(budget), layers=layers, **options)  # type: ignore[arg-type]


def assert_spent_to_the_last_step(space: SearchSpace, counts: np.ndarray) -> None:
    """Every budget is kept, and no further rounding step fits within all of them."""
    assert all(bound.cost(counts) <= bound.limit for bound in space.bounds)
    for index, ladder in enumerate(space.ladders):
        assert counts[index] in ladder
        if counts[index] < ladder[-1]:
            more = counts.copy()
            more[index] = space.next_rung(index, int(counts[index]))
            assert any(bound.cost(more) > bound.limit for bound in space.bounds)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_groups=st.integers(1, 10),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    rounding=st.sampled_from([None, 1, 8]),
    scale=st.sampled_from([0.0, 0.3, 5.0]),
)
def test_every_plan_of_a_random_network_keeps_all_budgets_to_the_last_step(
    seed: int, n_groups: int, shares: tuple[float, float], rounding: int | None, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, n_groups)
    # Parameters that follow other laws than the multiply-adds do, and leave some of the layers out.
    params = [replace(term, factor=int(rng.integers(1, 5000))) for term in graph.mac_terms if rng.random() < 0.7]
    graph = replace(graph, param_terms=(*params, Term("constant", 10, ())))
    importance = {group.name: rng.random(group.size) for group in graph.groups}
    kinds: list[CostKind] = ["macs", "params"]
    budgets = []
    for kind, share in zip(kinds, shares, strict=True):
        dense = SearchSpace.build(graph, importance, None, kind=kind, rounding=rounding)
        lowest = dense.lowest_cost
        budgets.append(Budget(kind=kind, absolute=int(np.ceil(lowest + share * (dense.cost.dense - lowest)))))
    space = SearchSpace.build(graph, importance, budgets, rounding=rounding, prior=rng.normal(0, 0.3, n_groups))

    assert_spent_to_the_last_step(space, counts_of(rng.normal(0, scale, n_groups), space))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kinds=st.lists(st.sampled_from(list(CHOICES)), min_size=2, max_size=3, unique=True),
    data=st.data(),
)
def test_mixed_plans_keep_all_budgets_as_their_policy_costs(
    seed: int, kinds: list[CostKind], data: st.DataObject
) -> None:
    choices = sorted(set[LayerChoice]().union(*(CHOICES[kind] for kind in kinds)))
    budgets = [Budget(kind=kind, share=data.draw(st.floats(0.2, 0.9))) for kind in kinds]
    space = mixed_space(budgets, choices)

    counts = counts_of(np.random.default_rng(seed).uniform(-1, 1, space.n), space)

    assert_spent_to_the_last_step(space, counts)
    policy = space.policy(counts)
    for bound in space.bounds:
        assert predict_cost(GRAPH, policy, bound.cost.kind) <= bound.limit  # type: ignore[arg-type]


def test_what_a_tight_budget_leaves_of_another_goes_to_what_it_does_not_count() -> None:
    """Few multiply-adds and plenty of bytes: channels are few, and every layer keeps its 32 bits."""
    space = mixed_space("30% macs, 90% bytes", ["weight_bits"])
    counts = counts_of(np.zeros(space.n), space)

    n_groups = len(space.groups)
    assert (counts[:n_groups] < space.sizes[:n_groups]).all()
    np.testing.assert_array_equal(counts[n_groups:], space.sizes[n_groups:])


def test_a_budget_that_is_slack_changes_nothing() -> None:
    alone, beside = mixed_space("30% macs", ["density"]), mixed_space("30% macs, 100% params", ["density"])
    action = np.random.default_rng(0).uniform(-1, 1, alone.n)

    np.testing.assert_array_equal(counts_of(action, alone), counts_of(action, beside))


@pytest.mark.parametrize("order", [0, 1])
def test_the_order_of_budgets_does_not_change_the_plan(order: int) -> None:
    texts = ["40% macs", "25% bytes"]
    space = mixed_space([texts[order], texts[1 - order]], ["density", "weight_bits"])
    other = mixed_space(texts, ["density", "weight_bits"])
    action = np.random.default_rng(1).uniform(-1, 1, space.n)

    np.testing.assert_array_equal(counts_of(action, space), counts_of(action, other))
    assert space.limit == space.bounds[0].limit and space.cost.kind == ("macs", "bytes")[order]


def additive(sizes: tuple[int, ...], macs: tuple[int, ...], params: tuple[int, ...]) -> NetworkGraph:
    """Groups of which each unit costs so many multiply-adds and parameters."""
    groups = tuple(ChannelGroup(f"g{i}", size, (), (f"layer{i}",), ()) for i, size in enumerate(sizes))

    def terms(factors: tuple[int, ...]) -> tuple[Term, ...]:
        pairs = enumerate(zip(sizes, factors, strict=True))
        return tuple(Term(f"layer{i}", factor, (LinearDim(size, ((i, 1),)),)) for i, (size, factor) in pairs)

    return NetworkGraph((), (), groups, terms(macs), terms(params))


@pytest.mark.parametrize("seed", range(6))
def test_knapsack_finds_the_least_loss_of_all_plans_that_keep_both_budgets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes, macs, params = (tuple(rng.integers(low, high, 4).tolist()) for low, high in ((3, 8), (1, 20), (1, 20)))
    graph = additive(sizes, macs, params)
    importance = {group.name: np.ones(group.size) for group in graph.groups}
    budgets = read_budgets("60% macs, 55% params")
    space = SearchSpace.build(graph, importance, budgets, rounding=1, min_keep_ratio=0.0)
    lost = [np.append(np.sort(rng.random(size - 1))[::-1], 0.0) for size in sizes]

    counts = np.rint(knapsack(space, lost) * space.sizes).astype(np.int64)

    def loss(plan: tuple[int, ...]) -> float:
        return sum(float(of[count - 1]) for of, count in zip(lost, plan, strict=True))

    plans = itertools.product(*(range(1, size + 1) for size in sizes))
    assert space.fits(counts)
    assert loss(tuple(counts.tolist())) == pytest.approx(
        min(loss(plan) for plan in plans if space.fits(np.array(plan)))
    )


def test_greedy_buys_each_budget_where_it_is_cheapest() -> None:
    # g0 holds all of the multiply-adds that can be saved cheaply, g1 all of the parameters; g2 little of both.
    graph = additive((11, 11, 11), (100, 1, 1), (1, 100, 1))
    importance = {group.name: np.ones(group.size) for group in graph.groups}
    space = SearchSpace.build(graph, importance, read_budgets("60% macs, 80% params"), rounding=1, min_keep_ratio=0.0)
    lost = [np.linspace(0.1, 0, 11)] * 3

    counts = np.rint(greedy(space, lost) * space.sizes).astype(np.int64)

    # Of 1,122 at most 673 and 897: five units of g0 and three of g1 go, one fewer of either is too few.
    np.testing.assert_array_equal(counts, [6, 8, 11])


def test_one_shot_plans_keep_both_budgets() -> None:
    space = mixed_space("40% macs, 25% bytes", ["density", "weight_bits"])
    rng = np.random.default_rng(0)
    lost = [np.sort(rng.random(len(ladder)))[::-1] for ladder in space.ladders]

    for ratios in (uniform(space), global_magnitude(space), greedy(space, lost), knapsack(space, lost)):
        assert_spent_to_the_last_step(space, project(ratios, space))


def test_layer_by_layer_all_budgets_are_kept_to_the_last_step() -> None:
    space = mixed_space("40% macs, 30% bytes", ["density", "weight_bits"])
    env = LayerwiseEnv(space, make_evaluator(MODEL, space, evaluate=lambda _: 0.5))
    rng = np.random.default_rng(0)
    for _ in range(20):
        env.reset(seed=0)
        for action in rng.uniform(-1, 1, space.n):
            *_, info = env.step(np.array([action], dtype=np.float32))
        assert_spent_to_the_last_step(space, np.rint(info["kept_ratios"] * space.sizes).astype(np.int64))


def test_agents_see_every_kind_and_the_budget_that_is_shortest() -> None:
    space = mixed_space("90% macs, 30% bytes", ["density"])
    env = LayerwiseEnv(space, make_evaluator(MODEL, space, evaluate=lambda _: 0.5))
    obs, _ = env.reset(seed=0)
    for _ in range(space.n):
        obs, *_ = env.step(np.zeros(1, dtype=np.float32))
    seen = dict(zip(GLOBAL_FEATURES, obs["globals"].tolist(), strict=True))

    assert (seen["budget_is_bytes"], seen["budget_is_params"]) == (1, 0)
    assert seen["budget_share"] == pytest.approx(0.9, abs=1e-3)
    # Plenty of multiply-adds are left, and hardly any byte.
    assert seen["remaining"] < 0.02 < 0.9 - seen["cost_share"]


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    device = IntegerFormulaDevice()
    needed = needed_kinds(GRAPH, {group.name: 1 for group in GRAPH.prunable}, [8, 32])
    return build_table(start_table(device), device, needed)


def timed_space(budget: BudgetLike, choices: list[LayerChoice], table: LatencyTable) -> SearchSpace:
    layers = layer_decisions(GRAPH, choices)
    return SearchSpace.build(GRAPH, IMPORTANCE, read_budgets(budget), layers=layers, rounding=1, table=table)


@pytest.mark.parametrize("budget", ["60% latency, 20% bytes", "25% bytes, 40% latency", "60% latency, 30% macs"])
def test_latency_beside_another_budget_is_kept_too(budget: str, table: LatencyTable) -> None:
    space = timed_space(budget, ["density", "bits"] if "bytes" in budget else ["density"], table)
    for seed in range(20):
        counts = counts_of(np.random.default_rng(seed).uniform(-1, 1, space.n), space)
        assert_spent_to_the_last_step(space, counts)
        for bound in space.bounds:
            assert space.cost_of(space.policy(counts), bound.cost) <= bound.limit


def test_zeros_change_no_latency_and_are_worth_bytes(table: LatencyTable) -> None:
    space = timed_space("60% latency, 20% bytes", ["density", "bits"], table)
    counts = space.sizes.copy()
    counts[space.names.index("inner:density")] = 10

    by_kind = {bound.cost.kind: (bound.cost(counts), bound.cost(space.sizes)) for bound in space.bounds}

    assert by_kind["latency"][0] == by_kind["latency"][1]
    assert by_kind["bytes"][0] < by_kind["bytes"][1]


def test_zeros_alone_are_refused_where_latency_is_the_only_budget(table: LatencyTable) -> None:
    message = (
        "zeros in layer 'inner' do not change what this runtime computes, so a latency budget cannot buy them; leave "
        "density out of search.decide, or take a budget of macs, params or bytes, alone or beside it"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        timed_space("60% latency", ["density"], table)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            "50% macs, 30% macs",
            "there are 2 budgets of macs: 0.5 of the dense macs, 0.3 of the dense macs; give one of each kind",
        ),
        (
            ["50%", "3M flops"],
            "there are 2 budgets of macs: 0.5 of the dense macs, 1,500,000 macs; give one of each kind",
        ),
        (
            "62,700,000 macs",
            "'62,700,000 macs': '62' has neither a unit nor a percent sign; commas separate budgets, so write numbers "
            "without them, and each share as '50% macs'",
        ),
    ],
)
def test_budgets_that_contradict_each_other_are_refused(budget: BudgetLike, message: str) -> None:
    with pytest.raises(BudgetError, match=f"^{re.escape(message)}$"):
        read_budgets(budget)


def test_the_budget_that_cannot_be_met_is_named_with_its_least() -> None:
    lowest = SearchSpace.build(GRAPH, IMPORTANCE, None, kind="bytes").lowest_cost
    dense = predict_cost(GRAPH, mixed_space(None, []).policy(mixed_space(None, []).sizes), "bytes")
    limit = int(0.001 * dense)
    message = (
        f"a budget of {limit:,} bytes ({limit / dense:.1%} of the dense {dense:,} bytes) cannot be met: with every "
        f"decision at its least the network still costs {lowest:,} bytes ({lowest / dense:.1%}). Pass at least "
        f"{lowest:,} bytes, or {SPARE_LESS}, or {KEEP_LESS}, or decide bits too"
    )
    with pytest.raises(BudgetError, match=f"^{re.escape(message)}$"):
        mixed_space("50% macs, 0.1% bytes", [])


def test_a_budget_that_nothing_decided_changes_is_named() -> None:
    macs = SearchSpace.build(GRAPH, IMPORTANCE, None).cost.dense
    message = (
        f"a budget of {macs // 2:,} macs ({macs // 2 / macs:.1%} of the dense {macs:,} macs) cannot be met: nothing "
        "that is decided (weight_bits) changes it; decide channels or density, or leave macs out of the budget"
    )
    with pytest.raises(BudgetError, match=f"^{re.escape(message)}$"):
        mixed_space("30% bytes, 50% macs", ["weight_bits"], channels=False)


def test_a_latency_that_the_other_budget_forbids_is_named_with_its_least_within_it(table: LatencyTable) -> None:
    with pytest.raises(BudgetError, match=r" ms\) cannot be met: with every decision at its least within .* bytes the"):
        timed_space("1% latency, 20% bytes", ["bits"], table)
