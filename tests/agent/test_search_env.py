from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from agent.search_env import Episode, Ledger, StandardisedRewards, vectorised
from tests.agent.synthetic import LayerwiseTargetEnv, TargetEnv


def test_the_ledger_keeps_returns_the_best_plan_and_the_count() -> None:
    env = TargetEnv(3, budget=3)
    heard: list[Episode] = []
    ledger = Ledger(vectorised(env), heard.append)
    ledger.reset()
    plans = np.array([[0, 0, 0], env.target, [1, 1, 1]], np.float32)

    for plan in plans:
        assert not ledger.is_spent
        ledger.step(plan[None])

    assert ledger.is_spent
    assert ledger.rewards == pytest.approx(env.values)
    assert ledger.best is not None
    assert ledger.best.actions.tolist() == [plans[1].tolist()]
    assert [episode.evaluations for episode in heard] == [1, 2, 3]


def test_an_episode_of_many_steps_is_one_plan() -> None:
    ledger = Ledger(vectorised(LayerwiseTargetEnv(3)), lambda _: None)
    ledger.reset()

    for action in (0.1, 0.2, 0.3, 0.4):
        ledger.step(np.array([[action]], np.float32))

    assert len(ledger.rewards) == 1
    assert ledger.best is not None
    assert ledger.best.actions.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_returns_are_standardised_between_rollouts_only() -> None:
    env = LayerwiseTargetEnv(2)
    ledger = Ledger(vectorised(env), lambda _: None)
    rewards = StandardisedRewards(ledger)
    rewards.reset()

    def episode(action: float) -> list[float]:
        return [float(rewards.step(np.array([[action]], np.float32))[1][0]) for _ in range(2)]

    first, second = episode(0.0), episode(0.5)
    raw = list(ledger.rewards)
    rewards.update()
    third = episode(0.5)

    assert first == [0.0, 0.0]
    assert second == pytest.approx([0.0, raw[1] - raw[0]])
    assert third == pytest.approx([0.0, (raw[1] - np.mean(raw)) / np.std(raw)])


def test_the_books_survive_a_round_trip() -> None:
    def ledger() -> Ledger:
        made = Ledger(vectorised(LayerwiseTargetEnv(2, noise=0.1)), lambda _: None)
        made.reset()
        return made

    def step(of: Ledger, action: float) -> float:
        return float(of.step(np.array([[action]], np.float32))[1][0])

    one, other = ledger(), ledger()
    for action in (0.1, 0.2, 0.3):
        step(one, action)

    other.load_state_dict(one.state_dict())

    assert step(other, 0.4) == step(one, 0.4)
    assert other.rewards == one.rewards
    assert other.best is not None
    assert other.best.reward == max(one.rewards)


def test_environments_that_share_an_evaluator_are_refused() -> None:
    envs = [TargetEnv(2) for _ in range(3)]
    for env, evaluator in zip(envs, "aba", strict=True):
        env.evaluator = SimpleNamespace(name=evaluator)  # type: ignore[attr-defined]
    apart = VecMonitor(DummyVecEnv([lambda env=env: env for env in envs]))
    assert Ledger(apart, lambda _: None).num_envs == 3

    envs[2].evaluator = envs[0].evaluator  # type: ignore[attr-defined]
    message = (
        "environments 0 and 2 share one evaluator, whose evaluations would be counted twice; give each an evaluator of "
        "its own, with its share of the evaluations granted"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        Ledger(apart, lambda _: None)


@pytest.mark.parametrize(("name", "value"), [("fidelity", 0.5), ("refinement_steps", 3)])
def test_environments_that_count_otherwise_are_refused(name: str, value: float) -> None:
    env = TargetEnv(3)
    setattr(env, name, value)

    with pytest.raises(ValueError, match=f"an environment has {name} {value:g}: what is trained here takes an episode"):
        Ledger(vectorised(env), lambda _: None)
