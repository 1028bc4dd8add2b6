from __future__ import annotations

import numpy as np
import pytest

from agent.baselines import Baseline, run_baseline
from tests.agent.synthetic import FewPlansEnv, LayerwiseTargetEnv, TargetEnv


@pytest.mark.parametrize("baseline", ["random", "cem"])
def test_a_baseline_spends_its_budget_and_no_more(baseline: Baseline) -> None:
    env = TargetEnv(4, budget=53)

    result = run_baseline(baseline, env, n_evaluations=53, seed=0)

    assert env.evaluations == len(result.rewards) == 53
    assert result.best.reward == max(env.values)


@pytest.mark.parametrize("baseline", ["random", "cem"])
def test_a_baseline_scores_the_start_plan_first(baseline: Baseline) -> None:
    env = TargetEnv(4, budget=5)
    run_baseline(baseline, env, n_evaluations=5, seed=0)

    assert not env.proposed[0].any()


@pytest.mark.parametrize("baseline", ["random", "cem"])
def test_a_baseline_run_again_proposes_the_same_plans(baseline: Baseline) -> None:
    one, again, other = (TargetEnv(4, budget=45) for _ in range(3))
    for env, seed in ((one, 0), (again, 0), (other, 1)):
        run_baseline(baseline, env, n_evaluations=45, seed=seed)

    assert np.array_equal(one.proposed, again.proposed)
    assert not np.array_equal(one.proposed, other.proposed)


def test_cross_entropy_finds_a_known_optimum() -> None:
    env = TargetEnv(6, budget=600)

    result = run_baseline("cem", env, n_evaluations=600, seed=0)

    assert result.best.actions[0] == pytest.approx(env.target, abs=0.05)


def test_random_search_is_the_best_of_what_it_drew() -> None:
    env = TargetEnv(6, budget=50)

    result = run_baseline("random", env, n_evaluations=50, seed=0)

    assert env.accuracy(result.best.actions[0]) == pytest.approx(max(env.values), abs=1e-6)
    assert 0.25 < np.std(env.proposed[1:]) < 0.35


@pytest.mark.parametrize("baseline", ["random", "cem"])
def test_a_baseline_ends_a_hundred_plans_after_the_last_new_one(
    baseline: Baseline, caplog: pytest.LogCaptureFixture
) -> None:
    env = FewPlansEnv(2, budget=300)

    result = run_baseline(baseline, env, n_evaluations=300, seed=0)

    plans = [tuple(plan > 0) for plan in env.proposed]
    assert len(result.rewards) == len(plans) == 100 + max(plans.index(plan) + 1 for plan in plans)
    assert env.evaluations == len(set(plans)) == 4
    assert caplog.messages == [
        "the search ends after 4 of 300 evaluations: the last 100 plans it proposed were all known. Few plans fit a "
        "budget in a small network or with coarse rounding; a lower search.rounding makes more of them"
    ]


@pytest.mark.parametrize("baseline", ["random", "cem"])
def test_a_baseline_that_spends_more_than_is_granted_is_not_called_short(
    baseline: Baseline, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(run_baseline(baseline, TargetEnv(2), n_evaluations=5, seed=0).rewards) == 20
    assert caplog.messages == []


def test_a_layerwise_environment_is_refused() -> None:
    message = "the episode went on after one plan; a baseline takes the whole-network environment, one step long"

    with pytest.raises(ValueError, match=f"^{message}$"):
        run_baseline("random", LayerwiseTargetEnv(3), n_evaluations=5, seed=0)


def test_a_search_without_evaluations_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^0 evaluations are granted; a search takes at least 1$"):
        run_baseline("random", TargetEnv(3), n_evaluations=0, seed=0)
