"""Plans under a budget of latency, from a table whose times rise and fall with whole vectors of channels."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs.action import project, rounded_down, start_plan
from envs.allocation import greedy, knapsack
from envs.layerwise_env import LayerwiseEnv
from envs.network_env import NetworkEnv
from envs.plans import global_magnitude, uniform
from envs.space import SearchSpace
from graph_encoder.capture import capture
from graph_encoder.features import GLOBAL_FEATURES, NODE_FEATURES
from latency.budget import Budget
from latency.decision import layer_decisions
from latency.layers import layers_of
from latency.table import Calibration, LatencyTable, build_table, needed_kinds, network_key, start_table
from tests.latency.synthetic import IntegerFormulaDevice

from .conftest import SmallNetwork, images, l1_importance, make_evaluator

MODEL = SmallNetwork(width=16).eval()
GRAPH = capture(MODEL, images())
IMPORTANCE = l1_importance(MODEL, GRAPH)


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    device = IntegerFormulaDevice()
    needed = needed_kinds(GRAPH, {group.name: 1 for group in GRAPH.prunable}, [8, 32])
    return build_table(start_table(device), device, needed)


@pytest.fixture(scope="module")
def converting(table: LatencyTable) -> LatencyTable:
    """The same table where tensors between integers and floats cost about as much as a layer."""
    calibration = Calibration(1, 0.05, 8, 0.03, integer_scale=1, conversion=0.04, element=1e-5, n_mixed=8)
    return replace(table, calibrations={network_key(GRAPH): calibration})


def space_of(table: LatencyTable, share: float, *, rounding: int, bits: bool) -> SearchSpace:
    layers = layer_decisions(GRAPH, ["bits"]) if bits else ()
    budget = Budget(kind="latency", share=share)
    return SearchSpace.build(
        GRAPH, IMPORTANCE, budget, layers=layers, rounding=rounding, protect_first=False, table=table
    )


@pytest.mark.parametrize("seed", [15, 19, 21, 28, 29])
def test_layer_by_layer_zeros_are_the_start_plan_whatever_the_table_says(table: LatencyTable, seed: int) -> None:
    generator = np.random.default_rng(seed)
    kinds = {
        kind: replace(times, ratios=times.ratios * generator.uniform(0.2, 3, times.ratios.shape))
        for kind, times in table.kinds.items()
    }
    plain = space_of(replace(table, kinds=kinds), 1.0, rounding=1, bits=True)
    share = float(generator.uniform(1.02 * plain.lowest_cost / plain.cost.dense, 0.8))
    space = space_of(replace(table, kinds=kinds), share, rounding=1, bits=True)
    env = LayerwiseEnv(space, make_evaluator(MODEL, space, evaluate=lambda _: 0.5))

    env.reset(seed=0)
    for _ in range(space.n):
        *_, info = env.step(np.zeros(1, dtype=np.float32))

    counts = np.rint(info["kept_ratios"] * space.sizes).astype(np.int64)
    assert counts.tolist() == start_plan(space).tolist()


def assert_no_step_is_left(space: SearchSpace, counts: np.ndarray) -> None:
    """No larger count of any one decision fits, the next or any above."""
    for index, ladder in enumerate(space.ladders):
        for count in ladder[ladder > counts[index]]:
            more = counts.copy()
            more[index] = count
            assert not space.fits(more)


@pytest.mark.parametrize(
    ("rounding", "bits", "share"),
    # Channels alone cannot be as fast as 0.4.
    [
        (1, False, 0.6),
        (1, False, 0.9),
        (4, False, 0.6),
        (4, True, 0.4),
        (4, True, 0.6),
        (16, True, 0.4),
        (16, True, 0.9),
    ],
)
def test_layer_by_layer_every_plan_keeps_a_latency_budget_to_the_last_step(
    table: LatencyTable, rounding: int, bits: bool, share: float
) -> None:
    space = space_of(table, share, rounding=rounding, bits=bits)
    env = LayerwiseEnv(space, make_evaluator(MODEL, space, evaluate=lambda _: 0.5))
    rng, seen = np.random.default_rng(0), set()
    for _ in range(25):
        actions = rng.choice([-1.0, 1.0], space.n) if rng.random() < 0.5 else rng.uniform(-1, 1, space.n)
        env.reset(seed=0)
        for action in actions:
            *_, info = env.step(np.array([action], dtype=np.float32))
        counts = np.rint(info["kept_ratios"] * space.sizes).astype(np.int64)
        assert info["cost"] == space.cost(counts) <= (space.limit or 0)
        assert_no_step_is_left(space, counts)
        seen.add(tuple(counts))
    # A stair of 16 channels costs the same all over, so that few plans are left to choose among.
    assert len(seen) > 1


def test_layerwise_environment_passes_the_checks_under_a_latency_budget(table: LatencyTable) -> None:
    space = space_of(table, 0.5, rounding=4, bits=True)
    env = LayerwiseEnv(space, make_evaluator(MODEL, space, evaluate=lambda _: 0.5))
    check_env(env, skip_render_check=True)

    obs, _ = env.reset(seed=0)
    seen = dict(zip(GLOBAL_FEATURES, obs["globals"].tolist(), strict=True))
    assert (seen["has_budget"], seen["budget_is_latency"], seen["budget_is_bytes"]) == (1, 1, 0)
    assert seen["budget_share"] == pytest.approx(0.5, abs=1e-3)


def test_an_agent_sees_which_layers_take_time(table: LatencyTable) -> None:
    space = space_of(table, 0.5, rounding=4, bits=False)
    kind = next(layer.kind for layer in layers_of(GRAPH) if layer.name == "down")
    times = table.kinds[kind]
    slow = replace(table, kinds=table.kinds | {kind: replace(times, ratios=5 * times.ratios)})
    column = NODE_FEATURES.index("relative_macs")

    seen = [
        NetworkEnv(s, make_evaluator(MODEL, s, evaluate=lambda _: 0.5)).reset(seed=0)[0]["nodes"][:, column]
        for s in (space, space_of(slow, 0.5, rounding=4, bits=False))
    ]

    row = [operator.name for operator in GRAPH.operators].index("down")
    others = [i for i, operator in enumerate(GRAPH.operators) if operator.weight and i != row]
    assert seen[1][row] > seen[0][row]
    assert (seen[1][others] < seen[0][others]).all()


@pytest.mark.parametrize("rounding", [4, 16])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9])
def test_every_projection_keeps_a_budget_where_conversions_cost_time(
    converting: LatencyTable, rounding: int, part: float
) -> None:
    space = space_of(converting, 1, rounding=rounding, bits=True)
    dense = space.cost.dense
    space = space.with_limit("latency", int(space.lowest_cost + part * (dense - space.lowest_cost)))
    rng = np.random.default_rng(0)
    for _ in range(25):
        counts = project(rng.uniform(-0.5, 0.5, space.n), space)
        assert space.cost(counts) <= (space.limit or 0)
        assert_no_step_is_left(space, counts)


def test_all_layers_in_integers_are_the_fastest_where_conversions_cost_time(converting: LatencyTable) -> None:
    space = space_of(converting, 1, rounding=16, bits=True)
    n_groups = len(space.groups)
    assert (space.fastest[n_groups:] == 8).all()

    # No plan of all is faster.
    cost = space.cost
    assert space.lowest_cost == min(cost(np.array(plan)) for plan in itertools.product(*space.ladders))


def test_floats_are_the_fastest_where_conversions_cost_more_than_integers_save(converting: LatencyTable) -> None:
    dear = Calibration(1, 0.05, 8, 0.03, integer_scale=1, conversion=5, element=0, n_mixed=8)
    space = space_of(replace(converting, calibrations={network_key(GRAPH): dear}), 1, rounding=16, bits=True)
    n_groups = len(space.groups)
    # The last layer reads a mean, which is too small for its conversion to count.
    assert space.fastest[n_groups:].tolist() == [32] * (space.n - n_groups - 1) + [8]
    assert (space.fastest[:n_groups] == space.minimum[:n_groups]).all()


def test_no_count_is_left_where_a_larger_one_is_faster(table: LatencyTable) -> None:
    space = space_of(table, 0.7, rounding=1, bits=True)
    rng, n_wider = np.random.default_rng(1), 0
    for _ in range(50):
        least = rounded_down(rng.uniform(0, 1, space.n) * space.sizes, space)
        counts = space.widened(least)
        assert (counts >= least).all()
        assert space.cost(counts) <= space.cost(least)
        n_wider += bool((counts > least).any())
        for index, ladder in enumerate(space.ladders):
            for count in ladder[ladder > counts[index]]:
                more = counts.copy()
                more[index] = count
                assert space.cost(more) >= space.cost(counts)
    assert n_wider > 40


def test_widening_keeps_the_other_budgets(table: LatencyTable) -> None:
    layers = layer_decisions(GRAPH, ["bits"])
    budgets = (Budget(kind="latency", share=0.8), Budget(kind="params", share=0.5))
    space = SearchSpace.build(GRAPH, IMPORTANCE, budgets, layers=layers, rounding=1, protect_first=False, table=table)
    rng, params = np.random.default_rng(2), space.bounds[1]
    n_wider = 0
    for _ in range(100):
        least = rounded_down(rng.uniform(0, 0.9, space.n) * space.sizes, space)
        if params.cost(least) > params.limit:
            continue
        counts = space.widened(least)
        assert params.cost(counts) <= params.limit
        n_wider += bool((counts > least).any())
    assert n_wider > 20


def test_every_group_keeps_whole_vectors_where_narrower_layers_are_slower(table: LatencyTable) -> None:
    # Every layer takes a whole vector's time for each 16 channels begun, and longer for counts that divide badly.
    space = space_of(table, 1, rounding=1, bits=False)
    limit = int(space.lowest_cost * 1.02)
    assert space.cost(space.minimum) > limit
    assert project(np.zeros(space.n), space.with_limit("latency", limit)).tolist() == [16] * space.n


@pytest.mark.parametrize("bits", [False, True])
def test_one_shot_plans_keep_a_latency_budget(table: LatencyTable, bits: bool) -> None:
    space = space_of(table, 0.7, rounding=4, bits=bits)
    rng = np.random.default_rng(0)
    lost = [np.sort(rng.random(len(ladder)))[::-1] for ladder in space.ladders]

    for ratios in (uniform(space), global_magnitude(space), greedy(space, lost), knapsack(space, lost)):
        counts = project(ratios, space)
        assert space.fits(counts)
        assert_no_step_is_left(space, counts)


def test_allocation_takes_integers_although_one_layer_alone_saves_nothing(converting: LatencyTable) -> None:
    space = space_of(converting, 0.6, rounding=16, bits=True)
    n_groups = len(space.groups)
    alone = space.sizes.copy()
    alone[n_groups + 1] = 8
    assert space.cost(alone) > space.cost.dense
    # Channels are dear, and bits next to free.
    lost = [np.linspace(1, 0, len(ladder)) * (1 if at < n_groups else 0.01) for at, ladder in enumerate(space.ladders)]

    for ratios in (greedy(space, lost), knapsack(space, lost)):
        counts = project(ratios, space)
        assert space.fits(counts)
        assert (counts[n_groups:] == 8).sum() >= 3


def test_greedy_near_the_floor_takes_away_no_more_than_a_widened_plan_needs(table: LatencyTable) -> None:
    # Rounded to 3, the least counts are slower than the floor, and only what is widened is as fast.
    space = space_of(table, 1, rounding=3, bits=True)
    limit = int(1.05 * space.lowest_cost)
    assert space.cost(space.minimum) > limit
    space = space.with_limit("latency", limit)
    ratios = greedy(space, [np.linspace(0.1, 0, len(ladder)) for ladder in space.ladders])
    counts = np.rint(space.kept_at(ratios) * space.sizes).astype(np.int64)
    assert space.fits(space.widened(counts))
    assert (counts > space.minimum).any()


def test_magnitude_under_a_latency_budget_cuts_all_groups_at_the_lowest_threshold_that_fits(
    table: LatencyTable,
) -> None:
    # With whole vectors of 16 the table is monotone, so that a lower threshold is never within the budget.
    space = space_of(table, 0.7, rounding=16, bits=False)
    ratios = global_magnitude(space)
    scores = {name: np.sort(space.importance[name] / space.importance[name].mean())[::-1] for name in space.names}
    counts = np.rint(ratios * space.sizes).astype(np.int64)

    free = [
        (name, int(count))
        for name, count, least in zip(space.names, counts, space.minimum, strict=True)
        if count > least
    ]
    cut = [(name, count) for name, count in free if count < len(scores[name])]
    assert len(cut) > 1
    kept, removed = (np.array([scores[name][count + at] for name, count in cut]) for at in (-1, 0))
    assert kept.min() > removed.max()


def test_greedy_ends_where_no_step_is_left_although_the_budget_is_not_met(table: LatencyTable) -> None:
    """Least counts that are no whole vectors are slower than the budget, and more channels are within it."""
    space = space_of(table, 0.9, rounding=1, bits=False)
    slowest_least = space.with_limit("latency", space.lowest_cost)
    assert space.cost(space.minimum) > space.lowest_cost

    ratios = greedy(slowest_least, [np.linspace(1, 0, len(ladder)) for ladder in space.ladders])

    assert slowest_least.fits(project(ratios, slowest_least))
