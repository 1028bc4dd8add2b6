from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from envs.action import start_plan
from envs.space import SearchSpace
from experiments.measured_budget import MOST_PROJECTIONS, within_measured_budget
from graph_encoder.capture import capture
from latency.budget import Budget
from latency.table import build_table, needed_kinds, start_table
from pruning.policy import CompressionPolicy
from tests.latency.synthetic import FormulaDevice


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)]
    model = nn.Sequential(*layers, nn.Conv2d(64, 8, 1))
    graph = capture(model, torch.zeros(2, 3, 8, 8))
    device = FormulaDevice()
    table = build_table(start_table(device), device, needed_kinds(graph, {g.name: 1 for g in graph.prunable}, [32]))
    importance = {group.name: np.arange(group.size) for group in graph.prunable}
    return SearchSpace.build(
        graph, importance, Budget(kind="latency", share=0.6), rounding=1, protect_first=False, table=table
    )


@pytest.fixture(scope="module")
def beside_bytes(space: SearchSpace) -> SearchSpace:
    """The same under a budget of bytes, too, which leaves less than the latency does."""
    budget = Budget(kind="bytes", share=0.5)
    counted = SearchSpace.build(space.graph, space.importance, budget, rounding=1, protect_first=False)
    return replace(space, bounds=(*space.bounds, *counted.bounds))


def by_the_table(space: SearchSpace, policy: CompressionPolicy) -> float:
    return space.cost_of(policy) / space.cost.dense


def test_a_plan_within_the_budget_on_the_clock_is_left_as_it_is(space: SearchSpace, tmp_path: Path) -> None:
    policy = space.policy(start_plan(space))

    kept, measured = within_measured_budget(policy, space, lambda p: by_the_table(space, p), tmp_path / "m.json")

    assert kept == policy
    assert len(measured.readings) == 1 and measured.is_within
    assert measured.readings[0].predicted <= measured.allowed == space.limit / space.cost.dense  # type: ignore[operator]


def test_a_plan_that_the_clock_finds_slower_is_made_smaller_until_it_keeps_the_budget(
    space: SearchSpace, tmp_path: Path
) -> None:
    policy = space.policy(start_plan(space))

    # Half as slow again as the table says, whatever the plan: one projection to a smaller budget mends it.
    kept, measured = within_measured_budget(policy, space, lambda p: 1.5 * by_the_table(space, p), tmp_path / "m.json")

    assert measured.is_within
    assert [reading.measured for reading in measured.readings] == [
        pytest.approx(1.5 * by_the_table(space, each)) for each in (policy, kept)
    ]
    assert len(kept.kept) > 0 and by_the_table(space, kept) <= measured.allowed / 1.5


def test_a_smaller_plan_keeps_the_other_budgets_and_only_the_time_is_cut(
    beside_bytes: SearchSpace, tmp_path: Path
) -> None:
    policy = beside_bytes.policy(start_plan(beside_bytes))
    share = beside_bytes.cost_of(policy) / beside_bytes.cost.dense

    # So slow that the plan, which bytes made small, is over the time by a tenth.
    kept, measured = within_measured_budget(
        policy, beside_bytes, lambda p: 0.66 / share * by_the_table(beside_bytes, p), tmp_path / "m.json"
    )

    bound = beside_bytes.bounds[1]
    assert measured.is_within and len(measured.readings) > 1
    assert beside_bytes.cost_of(kept, bound.cost) <= bound.limit


def test_it_ends_where_the_clock_never_agrees(space: SearchSpace, tmp_path: Path) -> None:
    _, measured = within_measured_budget(space.policy(start_plan(space)), space, lambda _: 0.65, tmp_path / "m.json")

    assert not measured.is_within
    assert len(measured.readings) == 1 + MOST_PROJECTIONS


def test_a_continued_run_reads_what_was_measured_and_no_clock(space: SearchSpace, tmp_path: Path) -> None:
    readings = iter([0.7, 0.5])
    first = within_measured_budget(
        space.policy(start_plan(space)), space, lambda _: next(readings), tmp_path / "m.json"
    )

    again = within_measured_budget(
        space.policy(start_plan(space)), space, lambda _: pytest.fail("a clock"), tmp_path / "m.json"
    )

    assert again == first
