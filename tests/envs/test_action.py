import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from envs.action import counts_of, decode, project, start_plan
from envs.plans import count_shared, global_magnitude, noise_floor, sensitivity, uniform
from envs.space import KEEP_LESS, SPARE_LESS, SearchSpace
from graph_encoder.network import ChannelGroup, LinearDim, NetworkGraph, Term
from latency.budget import Budget, BudgetError
from latency.decision import LayerDecision

from .conftest import SmallNetwork, make_space, random_graph


def importance_of(graph: NetworkGraph, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {group.name: rng.random(group.size) for group in graph.groups}


def random_space(seed: int, n_groups: int, share: float, rounding: int | None, least: float) -> SearchSpace:
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, n_groups)
    importance = importance_of(graph, rng)
    dense = SearchSpace.build(graph, importance, None, rounding=rounding, min_keep_ratio=least)
    reachable = dense.lowest_cost + share * (dense.cost.dense - dense.lowest_cost)
    budget = Budget(absolute=int(np.ceil(reachable)))
    return SearchSpace.build(
        graph, importance, budget, rounding=rounding, min_keep_ratio=least, prior=rng.normal(0, 0.3, n_groups)
    )


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_groups=st.integers(1, 12),
    share=st.floats(0, 1),
    rounding=st.sampled_from([None, 1, 8, 32]),
    least=st.sampled_from([0.0, 0.1, 0.5]),
    scale=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
)
def test_every_plan_meets_the_budget_and_leaves_no_room_for_another_step(
    seed: int, n_groups: int, share: float, rounding: int | None, least: float, scale: float
) -> None:
    space = random_space(seed, n_groups, share, rounding, least)
    action = np.random.default_rng(seed).normal(0, scale, n_groups)

    counts = counts_of(action, space)

    assert space.limit is not None
    assert space.cost(counts) <= space.limit
    assert (counts >= 1).all()
    assert (counts >= np.minimum(np.ceil(least * space.sizes - 1e-9), space.sizes)).all()
    for index, count in enumerate(counts.tolist()):
        rungs = space.ladders[index]
        assert count in rungs
        for above in rungs[rungs > count][:1]:
            longer = counts.copy()
            longer[index] = above
            assert space.cost(longer) > space.limit


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n_groups=st.integers(2, 12))
def test_a_higher_score_never_keeps_less(seed: int, n_groups: int) -> None:
    space = random_space(seed, n_groups, 0.4, 1, 0.0)
    action = np.random.default_rng(seed).uniform(-1, 0.5, n_groups)
    favoured = action.copy()
    favoured[0] += 0.5
    # One unit may move with the remainders, which is what rounding means.
    assert counts_of(favoured, space)[0] >= counts_of(action, space)[0] - 1


def equal_groups(n_groups: int, size: int, cost_of_unit: int) -> NetworkGraph:
    groups = tuple(ChannelGroup(f"g{i}", size, (), (f"layer{i}",), ()) for i in range(n_groups))
    terms = tuple(Term(f"layer{i}", cost_of_unit, (LinearDim(size, ((i, 1),)),)) for i in range(n_groups))
    return NetworkGraph((), (), groups, terms, terms)


def test_equal_scores_share_the_budget_evenly_and_the_rest_goes_round_once() -> None:
    graph = equal_groups(4, 20, 10)
    space = SearchSpace.build(graph, importance_of(graph, np.random.default_rng(0)), Budget(absolute=425))
    np.testing.assert_array_equal(counts_of(np.zeros(4), space), [11, 11, 10, 10])
    np.testing.assert_array_equal(counts_of(np.full(4, 0.7), space), [11, 11, 10, 10])


def test_a_score_moves_the_keep_ratio_by_the_span() -> None:
    # Mean 0.5 by the budget; scores of 0.4 and -0.4 at a span of 0.5 move it by 0.2 each way.
    graph = equal_groups(2, 100, 10)
    space = SearchSpace.build(graph, importance_of(graph, np.random.default_rng(0)), Budget(share=0.5), rounding=1)
    np.testing.assert_array_equal(counts_of([0.4, -0.4], space), [70, 30])


def test_the_group_with_the_largest_remainder_is_rounded_up() -> None:
    # Unrounded: 7.8, 6.5, 5.7 and 20 in all. Rounded down 7, 6, 5; two steps are left for 0.8 and 0.7.
    graph = equal_groups(3, 10, 10)
    space = SearchSpace.build(graph, importance_of(graph, np.random.default_rng(0)), Budget(absolute=200), span=1)
    np.testing.assert_array_equal(counts_of([0.13, 0.0, -0.08], space), [8, 6, 6])


def test_the_most_important_units_stay(space: SearchSpace) -> None:
    policy = decode(np.zeros(space.n), space)
    for name, kept in policy.kept.items():
        scores = space.importance[name]
        removed = np.setdiff1d(np.arange(len(scores)), kept)
        assert scores[list(kept)].min() >= scores[removed].max()
        assert list(kept) == sorted(kept)


def test_default_rounding_is_eight_channels_in_wide_groups_only() -> None:
    space = make_space(SmallNetwork(width=64), Budget(share=0.5))
    assert {int(ladder[-1]): set(np.diff(ladder).tolist()) for ladder in space.ladders} == {128: {8}, 192: {8}}
    assert space.is_rounded
    for width, rounding in ((64, 1), (32, None)):
        space = make_space(SmallNetwork(width=width), Budget(share=0.5), rounding=rounding)
        assert all((np.diff(ladder) == 1).all() for ladder in space.ladders)
        assert not space.is_rounded


def test_the_first_layer_is_protected_unless_asked(model: SmallNetwork) -> None:
    assert make_space(model, Budget(share=0.5)).names == ("inner", "down", "last")
    assert "conv1" in make_space(model, Budget(share=0.5), protect_first=False).names
    assert make_space(model, Budget(share=0.5), protected=["down"]).names == ("inner", "last")


@pytest.mark.parametrize(
    ("options", "ways"),
    [
        ({}, [SPARE_LESS, KEEP_LESS]),
        ({"min_keep_ratio": 0.0, "rounding": 1}, [SPARE_LESS]),
        ({"protect_first": False}, [KEEP_LESS]),
        ({"protect_first": False, "min_keep_ratio": 0.0, "rounding": 1}, []),
    ],
)
def test_a_budget_that_cannot_be_met_names_what_saves_most_first(options: dict[str, Any], ways: list[str]) -> None:
    # The first layer holds 90 % of the multiply-adds, and what it writes is spared by default.
    perceptron = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 50), nn.ReLU(), nn.Linear(50, 20), nn.ReLU(), nn.Linear(20, 3)
    ).eval()

    with pytest.raises(BudgetError) as caught:
        make_space(perceptron, Budget(absolute=1), **options)

    assert str(caught.value).split(", or ")[1:] == ways


@pytest.mark.parametrize("options", [{"min_keep_ratio": 1.0}, {"rounding": 32}])
def test_groups_that_can_keep_nothing_but_all_are_told_with_what_forces_them(
    model: SmallNetwork, options: dict[str, Any]
) -> None:
    dense = make_space(model).cost.dense
    message = (
        f"a budget of {dense // 2:,} macs (50.0% of the dense {dense:,} macs) cannot be met: with every decision at "
        f"its least the network still costs {dense:,} macs (100.0%). Pass at least {dense:,} macs, or {KEEP_LESS}"
    )
    with pytest.raises(BudgetError, match=f"^{re.escape(message)}$"):
        make_space(model, Budget(share=0.5), protect_first=False, **options)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_importance_that_is_not_finite_is_named(model: SmallNetwork, bad: float) -> None:
    graph = make_space(model).graph
    importance = {group.name: np.ones(group.size) for group in graph.groups}
    importance["down"][3] = bad
    message = (
        f"importance of the group 'down' is {bad} for unit 3; every score must be finite: to keep a unit longest, give "
        "it one above the others of its group"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SearchSpace.build(graph, importance, Budget(share=0.5))


def test_a_budget_that_cannot_be_met_is_refused_with_the_lowest_cost(model: SmallNetwork) -> None:
    lowest = make_space(model).lowest_cost
    dense = make_space(model).cost.dense
    limit = int(0.01 * dense)
    message = (
        f"a budget of {limit:,} macs ({limit / dense:.1%} of the dense {dense:,} macs) cannot be met: with every "
        f"decision at its least the network still costs {lowest:,} macs ({lowest / dense:.1%}). Pass at least "
        f"{lowest:,} macs, or {SPARE_LESS}, or {KEEP_LESS}"
    )
    with pytest.raises(BudgetError, match=f"^{re.escape(message)}$"):
        make_space(model, Budget(share=0.01))
    np.testing.assert_array_equal(
        start_plan(make_space(model, Budget(absolute=lowest))), make_space(model, Budget(absolute=lowest)).minimum
    )


def test_a_budget_above_the_dense_cost_is_refused(model: SmallNetwork) -> None:
    with pytest.raises(BudgetError, match="is above what the dense network costs"):
        make_space(model, Budget(absolute=10**12))


def test_nan_in_an_action_is_named(space: SearchSpace) -> None:
    with pytest.raises(ValueError, match=r"^action holds nan for decision 'down'; every value must be finite$"):
        counts_of([0.0, float("nan"), 0.0], space)


def test_an_action_of_another_length_is_refused(space: SearchSpace) -> None:
    message = "action has shape (2,), but this network has 3 decisions; pass shape (3,)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        counts_of([0.0, 0.0], space)


def test_unknown_protected_groups_are_named(model: SmallNetwork) -> None:
    with pytest.raises(ValueError, match=r"^protected names no channel group of this network: \['dwon'\]; groups are "):
        make_space(model, Budget(share=0.5), protected=["dwon"])


def test_without_a_budget_the_ends_of_the_action_are_the_least_and_everything(model: SmallNetwork) -> None:
    space = make_space(model)
    np.testing.assert_array_equal(counts_of(np.full(space.n, -1), space), space.minimum)
    np.testing.assert_array_equal(counts_of(np.full(space.n, 1), space), space.sizes)


def test_parameters_can_be_the_budget(model: SmallNetwork) -> None:
    space = make_space(model, Budget(kind="params", share=0.4))
    assert space.cost.dense == sum(parameter.numel() for parameter in model.parameters())
    assert 0.35 * space.cost.dense < space.cost(start_plan(space)) <= 0.4 * space.cost.dense


def test_global_magnitude_cuts_all_groups_at_the_lowest_threshold_that_fits(space: SearchSpace) -> None:
    counts = np.rint(global_magnitude(space) * space.sizes).astype(np.int64)
    ordered = [np.sort(space.importance[name] / space.importance[name].mean())[::-1] for name in space.names]
    assert (counts > space.minimum).all()
    removed = np.array([scores[count] for scores, count in zip(ordered, counts, strict=True)])
    kept = np.array([scores[count - 1] for scores, count in zip(ordered, counts, strict=True)])
    assert kept.min() > removed.max()
    one_more = counts.copy()
    one_more[removed.argmax()] += 1
    assert space.cost(counts) <= (space.limit or 0) < space.cost(one_more)
    # What the threshold leaves of the budget goes to rounding steps.
    assert (project(global_magnitude(space), space) >= counts).all()


def test_global_magnitude_compares_groups_whatever_the_signs_and_sizes_of_their_scores(model: SmallNetwork) -> None:
    graph = make_space(model).graph
    rng = np.random.default_rng(0)
    importance = {group.name: rng.normal(-1, 2, group.size) for group in graph.groups}
    larger = {name: (100 if name == "down" else 1) * scores for name, scores in importance.items()}

    ratios, of_larger = (
        global_magnitude(SearchSpace.build(graph, each, Budget(share=0.5))) for each in (importance, larger)
    )

    np.testing.assert_array_equal(of_larger, ratios)
    assert (ratios > 0.2).all() and (ratios < 1).all()


def test_sensitivity_shifts_by_the_logarithm_of_what_is_lost(space: SearchSpace) -> None:
    offsets = sensitivity(space, np.array([0.1, 0.1 * np.e, -0.01]), floor=0.01)
    assert offsets[1] - offsets[0] == pytest.approx(0.25)
    assert offsets[2] == pytest.approx(offsets[0] + 0.25 * np.log(0.01 / 0.1))
    assert offsets.sum() == pytest.approx(0)


def test_a_layer_that_loses_four_times_as_much_gets_a_bit_more(model: SmallNetwork) -> None:
    layers = [LayerDecision(name, "bits", (2, 3, 4, 5, 6, 7, 8, 32)) for name in ("inner", "down")]
    space = make_space(model, Budget(kind="bytes", share=0.5), layers=layers)

    offsets = sensitivity(space, np.array([0.1, 0.1, 0.1, 1e-4, 4e-4]), floor=np.array([0.01] * 3 + [1e-6] * 2))

    assert offsets[4] - offsets[3] == pytest.approx(1 / 8)
    # On average bits stand where groups do, however little each layer loses.
    assert offsets[:3] == pytest.approx([0, 0, 0])
    assert offsets[3] + offsets[4] == pytest.approx(0)


def test_noise_floor_is_half_the_standard_error_and_at_least_one_image() -> None:
    assert noise_floor(0.9, 1000) == pytest.approx(0.009487 / 2, abs=1e-6)
    assert noise_floor(1.0, 1000) == 0.001


def test_a_share_of_the_images_is_rounded_and_at_least_one_image() -> None:
    assert [count_shared(n_images, 0.1) for n_images in (1000, 16, 14, 4)] == [100, 2, 1, 1]


def test_prior_is_the_plan_of_an_action_of_zeros(space: SearchSpace) -> None:
    prior = sensitivity(space, np.array([0.5, 0.05, 0.01]), floor=0.01)
    np.testing.assert_array_equal(counts_of(np.zeros(3), space.with_prior(prior)), project(prior, space))
    assert start_plan(space.with_prior(prior))[0] > start_plan(space)[0]
    np.testing.assert_array_equal(project(uniform(space), space), start_plan(space))
