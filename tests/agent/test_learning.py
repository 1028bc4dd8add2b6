"""Targets by hand, and environments whose best plan is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import DummyVecEnv

from agent.config import AgentConfig, Algorithm, DDPGConfig, PPOConfig, default_config
from agent.ddpg import GraphDDPG
from agent.noise import geometric
from agent.ppo import GraphPPO
from agent.replay import StandardisedReplayBuffer, affordable_size
from agent.search_env import vectorised
from agent.train import Search, SearchPlan, TrainResult, train_agent
from agent.transfer import act
from tests.agent.synthetic import FewPlansEnv, LayerwiseTargetEnv, TargetEnv, chain_observation, chain_space
from tests.event_files import scalars

SMALL: dict[str, Any] = {"hidden": 16, "n_layers": 1, "n_frequencies": 3}
CONFIGS: dict[Algorithm, AgentConfig] = {
    "ppo": PPOConfig(updates=10, **SMALL),
    "ddpg": DDPGConfig(updates=1, batch_size=16, plan_layers=0, **SMALL),
}


def search(algorithm: Algorithm, n_evaluations: int, env: TargetEnv, **options: Any) -> TrainResult:
    return train_agent(CONFIGS[algorithm], env, n_evaluations=n_evaluations, seed=options.pop("seed", 0), **options)


def ddpg(env: TargetEnv | DummyVecEnv, **config: Any) -> GraphDDPG:
    plan = SearchPlan(DDPGConfig(**SMALL, **config), n_evaluations=40, seed=0, episode_length=1, device="cpu")
    agent = plan.build(vectorised(env))
    assert isinstance(agent, GraphDDPG)
    return agent


def test_a_plan_without_noise_stays_where_other_environments_have_some() -> None:
    env = DummyVecEnv([lambda: TargetEnv(3), lambda: TargetEnv(3)])
    agent = ddpg(env, candidates=9, learning_starts=1)
    agent._last_obs, agent.num_timesteps = env.reset(), 50
    agent._noise = [torch.tensor([[0.0, 0.0, 0.0], [1.0, -1.0, 1.0]])]
    with torch.no_grad():
        plans = agent.actor(obs_as_tensor(agent._last_obs, agent.device)).numpy()

    found, _ = agent._sample_action(1, n_envs=2)

    assert found[0].tolist() == plans[0].tolist()
    assert not np.array_equal(found[1], plans[1])


def test_generalised_advantages_by_hand() -> None:
    observation = chain_observation(np.zeros((1, 6)))
    space, action_space = chain_space(1), TargetEnv(1).action_space
    buffer = DictRolloutBuffer(3, space, action_space, gamma=0.5, gae_lambda=0.5, n_envs=1)
    # The second step starts an episode, so nothing flows back over that border.
    for start, reward, value in ((True, 1.0, 0.2), (True, 2.0, 0.4), (False, 4.0, 0.8)):
        buffer.add(
            {name: rows[None] for name, rows in observation.items()},
            np.zeros((1, 1)),
            np.array([reward]),
            np.array([start]),
            torch.tensor([value]),
            torch.zeros(1),
        )

    buffer.compute_returns_and_advantage(last_values=torch.tensor([1.6]), dones=np.array([False]))

    last = 4.0 + 0.5 * 1.6 - 0.8
    middle = 2.0 + 0.5 * 0.8 - 0.4 + 0.25 * last
    assert buffer.advantages.flatten().tolist() == pytest.approx([1.0 - 0.2, middle, last])


def test_a_truncated_episode_bootstraps_and_a_terminated_one_does_not() -> None:
    agent = ddpg(TargetEnv(2), gamma=0.5)
    for parameter in agent.critic_target.parameters():
        parameter.data += 0.1
    following = {
        name: torch.as_tensor(rows)[None].repeat(2, *[1] * rows.ndim) for name, rows in TargetEnv(2).observation.items()
    }
    value = torch.cat(agent.critic_target(following, agent.actor_target(following)), dim=1).min(dim=1).values

    ones, dones = torch.ones(2, 1), torch.tensor([[0.0], [1.0]])

    targets = agent.targets(following, ones, dones, discounts=0.5 * ones)

    assert targets.flatten().tolist() == pytest.approx([1.0 + 0.5 * value[0].item(), 1.0])
    assert value[0].item() != 0.0


def test_the_replay_buffer_tells_truncated_from_terminated() -> None:
    env = TargetEnv(2)
    buffer = StandardisedReplayBuffer(4, env.observation_space, env.action_space, device="cpu", gamma=1.0)
    one = {name: rows[None] for name, rows in env.observation.items()}
    for truncated in (True, False):
        info = {"TimeLimit.truncated": truncated}
        buffer.add(one, one, np.zeros((1, 2)), np.zeros(1), np.ones(1), [info])

    dones = buffer._get_samples(np.array([0, 1])).dones

    assert dones.flatten().tolist() == [0.0, 1.0]


def test_replayed_returns_are_standardised() -> None:
    env = TargetEnv(2)
    buffer = StandardisedReplayBuffer(4, env.observation_space, env.action_space, device="cpu", gamma=1.0)
    one = {name: rows[None] for name, rows in env.observation.items()}
    for reward, done in ((0.0, 0), (0.7, 1), (0.1, 0), (0.9, 1)):
        buffer.add(one, one, np.zeros((1, 2)), np.array([reward]), np.array([done]), [{}])

    rewards = buffer._get_samples(np.arange(4)).rewards

    # Returns of 0.7 and 1.0: mean 0.85, deviation 0.15. The third step earns 0.1 besides what the fourth does.
    assert rewards.flatten().tolist() == pytest.approx([-1.0, -1.0, 1.0, 1 / 3], abs=1e-5)


def test_replayed_returns_are_discounted_and_end_where_the_episode_does() -> None:
    env = TargetEnv(2)
    buffer = StandardisedReplayBuffer(8, env.observation_space, env.action_space, device="cpu", gamma=0.5)
    one = {name: rows[None] for name, rows in env.observation.items()}
    # Terminated, truncated, still being played.
    for reward, done, truncated in ((1.0, 0, 0), (2.0, 1, 0), (4.0, 0, 0), (0.0, 1, 1), (3.0, 0, 0), (5.0, 0, 0)):
        info = {"TimeLimit.truncated": bool(truncated)}
        buffer.add(one, one, np.zeros((1, 2)), np.array([reward]), np.array([done]), [info])
    mean, std = buffer.reward_statistics()

    samples = buffer._get_samples(np.arange(6))

    # Undiscounted returns of 3 and 4; the truncated episode's end is not centred, as what follows it already is.
    assert (mean, std) == (3.5, 0.5)
    assert samples.rewards.flatten().tolist() == pytest.approx([0.5, -3.0, 8.0, 0.0, 11.0, 10.0])
    assert samples.dones.flatten().tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert samples.discounts is not None
    assert samples.discounts.flatten().tolist() == [0.25, 0.5, 0.25, 0.5, 0.25, 0.5]


def test_the_buffer_is_cut_to_its_memory() -> None:
    space = chain_space(10)
    numbers = sum(int(np.prod(box.shape or ())) for box in space.values())
    per_transition = 4 * (2 * numbers + 10 + 3)

    assert affordable_size(300, space, 10, max_bytes=per_transition * 1000) == 300
    assert affordable_size(300, space, 10, max_bytes=per_transition * 7 + 1) == 7


@pytest.mark.parametrize(
    ("buffer_bytes", "size", "told"),
    [
        (10**9, 4 * 40, []),
        (
            10_000,
            15,
            [
                "the replay buffer holds 15 of the 160 transitions that the search may make, since buffer_bytes is "
                "10,000; the oldest go first: raise it to keep them all"
            ],
        ),
    ],
)
def test_the_buffer_holds_the_whole_search_or_says_that_it_does_not(
    buffer_bytes: int, size: int, told: list[str]
) -> None:
    heard: list[str] = []
    plan = SearchPlan(DDPGConfig(**SMALL, buffer_bytes=buffer_bytes), 40, 0, 1, "cpu")
    agent = Search(plan, TargetEnv(2), heard.append).agent

    assert isinstance(agent, GraphDDPG)
    assert agent.replay_buffer.buffer_size == size
    assert heard == told


def test_exploration_stays_near_the_start_plan_before_learning() -> None:
    env = TargetEnv(4, budget=15)
    search("ddpg", 40, env)
    # Uniform in the box, as Stable-Baselines3 warms up, the standard deviation would be 0.58.
    plans = np.array([env.proposed[index] for index in range(1, 11)])

    assert not env.proposed[0].any()
    assert 0.2 < plans.std() < 0.4


def test_exploration_leaves_padded_decisions_alone() -> None:
    env = TargetEnv(3, budget=12, padding=2)
    search("ddpg", 12, env)
    plans = np.array(env.proposed)

    assert not plans[:, 3:].any()
    assert plans[1, :3].all()


@pytest.mark.parametrize(("algorithm", "rollout"), [("ppo", 20), ("ddpg", 10)])
def test_the_spread_falls_with_the_evaluations_spent(algorithm: Algorithm, rollout: int, tmp_path: Path) -> None:
    result = search(algorithm, 41, TargetEnv(3, budget=41), logdir=tmp_path)
    spreads = scalars(tmp_path)["train/std"]

    def at(evaluations: int) -> float:
        return geometric(0.3, 0.05, 1 - evaluations / 41)

    assert spreads == [(step, pytest.approx(at(step - rollout))) for step, _ in spreads]
    assert [step for step, _ in spreads][-2:] == [40 - rollout, 40]
    if algorithm == "ppo":
        assert float(result.policy.std) == pytest.approx(at(40))


def test_ppo_learns_from_standardised_rewards() -> None:
    # The budget ends with the second rollout of 20, whose last step is not stored then.
    plan = SearchPlan(CONFIGS["ppo"], n_evaluations=41, seed=0, episode_length=1, device="cpu")
    search = Search(plan, TargetEnv(3, budget=40))

    search.run(None)

    assert isinstance(search.agent, GraphPPO)
    returns = np.array(search.ledger.rewards)
    expected = (returns[20:39] - returns[:20].mean()) / returns[:20].std()
    assert search.agent.rollout_buffer.rewards[:19, 0] == pytest.approx(expected, abs=1e-5)


def test_ddpg_waits_for_twenty_episodes_layer_by_layer_too() -> None:
    plan = SearchPlan(DDPGConfig(**SMALL), n_evaluations=40, seed=0, episode_length=3, device="cpu")
    agent = plan.build(vectorised(LayerwiseTargetEnv(3)))

    assert isinstance(agent, GraphDDPG)
    assert agent.learning_starts == 20 * 3


def test_ppo_updates_within_a_few_evaluations() -> None:
    agent = SearchPlan(PPOConfig(**SMALL), 300, 0, 1, "cpu").build(vectorised(TargetEnv(3)))

    assert agent.n_steps == 23
    assert agent.batch_size == 23
    assert agent.n_epochs == 40


@pytest.mark.parametrize(("rollout", "batches"), [(128, 2), (160, 2), (23, 1)])
@pytest.mark.filterwarnings("error")
def test_rollouts_of_any_size_are_split_into_batches_of_about_one(rollout: int, batches: int) -> None:
    agent = SearchPlan(PPOConfig(**SMALL | {"rollout": rollout}), 300, 0, 1, "cpu").build(vectorised(TargetEnv(3)))

    assert isinstance(agent, GraphPPO)
    assert agent.batch_size == -(-agent.n_steps // batches)
    assert agent.n_epochs == 40 // batches


@pytest.mark.parametrize("algorithm", ["ppo", "ddpg"])
def test_a_search_spends_its_budget_and_no_more(algorithm: Algorithm) -> None:
    env = TargetEnv(3, budget=47)

    result = search(algorithm, 47, env)

    assert env.evaluations == 47
    assert result.evaluations == 47
    assert result.best.reward == pytest.approx(max(env.values))


@pytest.mark.parametrize("algorithm", ["ppo", "ddpg"])
def test_the_first_plan_is_the_start_plan_and_the_last_is_that_of_the_trained_policy(algorithm: Algorithm) -> None:
    env = TargetEnv(4, budget=41)  # rollouts of 20, or of 10, and one plan

    result = search(algorithm, 41, env)

    assert not env.proposed[0].any()
    assert env.proposed[-1] == pytest.approx(act(result.policy, env.observation), abs=1e-6)


@pytest.mark.parametrize("algorithm", ["ppo", "ddpg"])
def test_one_seed_gives_one_search(algorithm: Algorithm) -> None:
    results = [search(algorithm, 45, TargetEnv(3, budget=45), seed=seed) for seed in (0, 0, 1)]

    assert results[0].rewards == results[1].rewards
    assert results[0].rewards != results[2].rewards


@pytest.mark.parametrize("algorithm", ["ppo", "ddpg"])
def test_a_search_among_known_plans_ends_and_says_so(algorithm: Algorithm, caplog: pytest.LogCaptureFixture) -> None:
    result = search(algorithm, 10, FewPlansEnv(2))

    assert len(result.rewards) == 40 and result.evaluations <= 4
    assert caplog.messages == [
        f"the search ends after {result.evaluations:g} of 10 evaluations: most of the 40 plans were known before. Few "
        "plans fit a budget in a small network or with coarse rounding; a lower search.rounding makes more of them"
    ]


@pytest.mark.parametrize("algorithm", ["ppo", "ddpg"])
def test_a_search_that_spends_more_than_is_granted_is_not_called_short(
    algorithm: Algorithm, caplog: pytest.LogCaptureFixture
) -> None:
    assert search(algorithm, 5, TargetEnv(2)).evaluations == 20
    assert caplog.messages == []


@pytest.mark.parametrize("algorithm", ["ppo", "ddpg"])
def test_a_search_ends_a_hundred_plans_after_the_last_new_one(
    algorithm: Algorithm, caplog: pytest.LogCaptureFixture
) -> None:
    env = FewPlansEnv(2, budget=300)

    result = search(algorithm, 300, env)

    plans = [tuple(plan > 0) for plan in env.proposed]
    assert result.n_steps == len(plans) == 100 + max(plans.index(plan) + 1 for plan in plans)
    assert result.evaluations == len(set(plans)) == 4
    assert caplog.messages == [
        "the search ends after 4 of 300 evaluations: the last 100 plans it proposed were all known. Few plans fit a "
        "budget in a small network or with coarse rounding; a lower search.rounding makes more of them"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "ddpg"])
def test_an_agent_finds_the_plan_that_is_a_function_of_the_features(algorithm: Algorithm) -> None:
    env = TargetEnv(10, budget=300)
    start = env.accuracy(np.zeros(10))

    result = train_agent(default_config(algorithm), env, n_evaluations=300, seed=0)

    found = env.accuracy(act(result.policy, env.observation).astype(np.float64))
    assert found > 0.1 * start  # both are negative; the optimum is 0


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "share_left"), [("ppo", 0.3), ("ddpg", 0.5)])
def test_layer_by_layer_ppo_takes_away_seventy_percent_of_the_error_and_ddpg_half(
    algorithm: Algorithm, share_left: float
) -> None:
    env = LayerwiseTargetEnv(3, budget=200)
    start = env.whole.accuracy(np.zeros(3))

    result = train_agent(default_config(algorithm), env, n_evaluations=200, seed=0, episode_length=3)

    observation, _ = env.reset()
    plan = []
    for _ in range(3):
        plan.append(float(act(result.policy, observation)[0]))
        env.actions.append(plan[-1])
        observation = env._observe()
    assert env.whole.accuracy(np.array(plan)) > share_left * start  # both are negative; the optimum is 0


def test_several_environments_share_one_budget() -> None:
    envs = [TargetEnv(3, budget=20) for _ in range(2)]

    result = train_agent(CONFIGS["ppo"], DummyVecEnv([lambda: envs[0], lambda: envs[1]]), n_evaluations=40, seed=0)

    assert [env.evaluations for env in envs] == [20, 20]
    assert result.evaluations == 40
