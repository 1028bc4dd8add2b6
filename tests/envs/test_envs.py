import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check
from numpy.typing import NDArray
from stable_baselines3.common.env_checker import check_env as sb3_check
from stable_baselines3.common.vec_env import SubprocVecEnv

import envs  # noqa: F401 - registers the environments
from envs.action import counts_of, start_plan
from envs.evaluator import CandidateEvaluator, EvaluationBudgetSpent, Sensitivity
from envs.journal import Journal
from envs.layerwise_env import LayerwiseEnv
from envs.network_env import NetworkEnv
from envs.observation import Sizes
from envs.plans import sensitivity
from envs.space import SearchSpace
from graph_encoder.features import BOUND, GLOBAL_FEATURES, column
from graph_encoder.network import KINDS
from latency.budget import Budget
from latency.cost import CostModel

from .conftest import SmallNetwork, make_evaluator, make_space

Env = NetworkEnv | LayerwiseEnv
BOTH = pytest.mark.parametrize("kind", [NetworkEnv, LayerwiseEnv])
MADE = pytest.mark.parametrize("name", ["secateur/NetworkCompression-v0", "secateur/LayerwiseCompression-v0"])


def episode(env: Env, seed: int, actions: Callable[[int], NDArray[np.float32]]) -> list[Any]:
    obs, _ = env.reset(seed=seed)
    seen: list[Any] = [obs]
    terminated, step = False, 0
    while not terminated:
        obs, reward, terminated, truncated, info = env.step(actions(step))
        seen += [obs, reward, terminated, truncated, info]
        step += 1
    return seen


def half_measured(space: SearchSpace) -> dict[str, Any]:
    """Options of an environment that shows what was measured in half of its episodes."""
    lost = np.linspace(0.1, 0.5, space.n)[:, None]
    return {
        "sensitivity": Sensitivity(space.names, (0.3,), 0.9, lost, 1.0),
        "noise_floor": 0.01,
        "measured_dropout": 0.5,
    }


def random_actions(env: Env, seed: int) -> Callable[[int], NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    drawn = [rng.uniform(-1, 1, env.action_space.shape).astype(np.float32) for _ in range(20)]
    return lambda step: drawn[step]


def assert_same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif isinstance(left, np.ndarray):
        np.testing.assert_array_equal(left, right)
    else:
        assert left == right


def glob(obs: dict[str, NDArray[np.float32]], name: str) -> float:
    return float(obs["globals"][GLOBAL_FEATURES.index(name)])


def group_column(space: SearchSpace, obs: dict[str, NDArray[np.float32]], name: str) -> NDArray[np.float32]:
    first = len(space.graph.operators)
    return obs["nodes"][first : first + space.n, column(name)]


@MADE
@pytest.mark.parametrize("budget", [Budget(share=0.5), None])
def test_gymnasium_and_stable_baselines_accept_it(name: str, budget: Budget | None, model: SmallNetwork) -> None:
    space = make_space(model, budget)
    env = gymnasium.make(name, space=space, evaluator=make_evaluator(model, space))
    gymnasium_check(env.unwrapped, skip_render_check=True)
    with warnings.catch_warnings():
        # Stable-Baselines3 advises flat vectors; graphs come as matrices, and the policies read them as such.
        warnings.filterwarnings("ignore", message="Your observation .* has an unconventional shape")
        sb3_check(env.unwrapped)


@BOTH
def test_same_seed_same_episode(kind: type[Env], model: SmallNetwork, space: SearchSpace) -> None:
    first, second = (kind(space, make_evaluator(model, space), **half_measured(space)) for _ in range(2))
    actions, shown = random_actions(first, 0), set()
    for seed in range(8):
        one, other = episode(first, seed, actions), episode(second, seed, actions)
        assert_same(one, other)
        shown.add(bool(group_column(space, one[0], "has_sensitivity_30%").any()))
    assert shown == {True, False}


@BOTH
def test_reset_forgets_the_last_episode(kind: type[Env], model: SmallNetwork, space: SearchSpace) -> None:
    env = kind(space, make_evaluator(model, space))
    wanted = random_actions(env, 1)
    fresh = episode(env, 3, wanted)
    episode(env, 4, random_actions(env, 2))
    env.reset(seed=5)
    env.step(random_actions(env, 6)(0))
    assert_same(episode(env, 3, wanted), fresh)


def test_one_action_is_a_whole_plan(model: SmallNetwork, space: SearchSpace) -> None:
    env = NetworkEnv(space, make_evaluator(model, space))
    obs, _ = env.reset(seed=0)
    action = np.array([0.5, -0.5, 0.2], dtype=np.float32)
    after, reward, terminated, truncated, info = env.step(action)

    counts = counts_of(action, space)
    built = env.evaluator.build(space.policy(counts))
    left = sum(p.numel() for p in built.parameters()) / sum(p.numel() for p in model.parameters())
    assert reward == info["accuracy"] == left
    assert (terminated, truncated) == (True, False)
    np.testing.assert_array_equal(info["kept_ratios"], counts / space.sizes)
    assert info["policy"] == {name: list(units) for name, units in space.policy(counts).kept.items()}
    assert info["cost"] == space.cost(counts) <= (space.limit or 0)
    assert info["evaluation"].evaluations_used == 1
    np.testing.assert_allclose(group_column(space, obs, "keep_ratio"), start_plan(space) / space.sizes, rtol=1e-6)
    np.testing.assert_allclose(group_column(space, after, "keep_ratio"), counts / space.sizes, rtol=1e-6)
    assert glob(obs, "last_accuracy") == 0
    assert glob(after, "last_accuracy") == pytest.approx(left)
    assert (glob(obs, "progress"), glob(after, "progress")) == (0, 1)


def test_observation_names_the_network(model: SmallNetwork, space: SearchSpace) -> None:
    env = NetworkEnv(space, make_evaluator(model, space))
    obs, _ = env.reset(seed=0)
    n_operators = len(space.graph.operators)
    np.testing.assert_array_equal(obs["decisions"], n_operators + np.arange(space.n))
    assert {KINDS[int(k)] for k in obs["kinds"][n_operators:]} == {"group"}
    assert glob(obs, "budget_share") == pytest.approx(0.5, abs=1e-4)
    assert glob(obs, "cost_share") == pytest.approx(space.cost(start_plan(space)) / space.cost.dense)
    assert glob(obs, "dense_accuracy") == 1
    kept = {
        operator.name: float(obs["nodes"][row, column("cost_kept")])
        for row, operator in enumerate(space.graph.operators)
    }
    assert kept["conv1"] == 1
    ratio = dict(zip(space.names, start_plan(space) / space.sizes, strict=True))
    assert kept["inner"] == kept["outer"] == pytest.approx(ratio["inner"])
    assert kept["last"] == pytest.approx(ratio["down"] * ratio["last"])


def test_layers_that_cost_more_with_fewer_channels_leave_observations_in_their_space(
    model: SmallNetwork, space: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_owner = type(space.cost).by_owner

    def dearer(cost: CostModel, counts: NDArray[np.int64]) -> dict[str, int]:
        factor = 1 if (counts == space.sizes).all() else 1000
        return {owner: factor * value for owner, value in by_owner(cost, counts).items()}

    monkeypatch.setattr(type(space.cost), "by_owner", dearer)
    env = NetworkEnv(space, make_evaluator(model, space))
    obs, _ = env.reset(seed=0)

    assert obs["nodes"][:, column("cost_kept")].max() == BOUND
    assert env.observation_space.contains(obs)


def test_refinement_starts_from_the_plan_as_it_stands_and_rewards_the_change(
    model: SmallNetwork, space: SearchSpace
) -> None:
    env = NetworkEnv(space, make_evaluator(model, space), refinement_steps=3)
    env.reset(seed=0)
    _, first, ended, _, info = env.step(np.array([0.8, -0.4, 0.1], dtype=np.float32))
    assert not ended
    _, same, _, _, info_same = env.step(np.zeros(3, dtype=np.float32))
    assert same == 0
    assert info_same["policy"] == info["policy"]
    assert info_same["evaluation"].cached
    _, last, ended, _, info_last = env.step(np.array([-0.5, 0.5, 0.0], dtype=np.float32))
    assert ended
    assert first + same + last == pytest.approx(info_last["accuracy"])


def test_refinement_without_a_budget_keeps_the_plan_on_zeros(model: SmallNetwork) -> None:
    space = make_space(model)
    env = NetworkEnv(space, make_evaluator(model, space), refinement_steps=2)
    env.reset(seed=0)
    _, _, _, _, first = env.step(np.array([0.3, -0.4, 0.1], dtype=np.float32))
    _, _, _, _, second = env.step(np.zeros(3, dtype=np.float32))
    assert first["policy"] == second["policy"]


def test_padding_changes_nothing_but_the_room(model: SmallNetwork, space: SearchSpace) -> None:
    tight = NetworkEnv(space, make_evaluator(model, space))
    padded = NetworkEnv(space, make_evaluator(model, space), sizes=Sizes(nodes=40, edges=150, decisions=9))
    small, _ = tight.reset(seed=0)
    large, _ = padded.reset(seed=0)
    assert padded.action_space.shape == (9,)
    for key, value in small.items():
        inside = large[key][tuple(slice(size) for size in value.shape)]
        np.testing.assert_array_equal(inside, value)
    assert large["node_mask"].sum() == small["node_mask"].sum() == len(small["node_mask"])
    assert large["edge_mask"].sum() == len(small["edge_mask"])
    assert large["decision_mask"].sum() == 3
    action = np.array([0.5, -0.5, 0.2], dtype=np.float32)
    _, reward, _, _, info = padded.step(np.concatenate([action, np.full(6, 0.9, dtype=np.float32)]))
    _, same_reward, _, _, same_info = tight.step(action)
    assert (reward, info["policy"]) == (same_reward, same_info["policy"])
    with pytest.raises(RuntimeError, match=r"^the episode is over after 1 steps; call reset\(\)$"):
        tight.step(action)


def test_a_decision_with_one_choice_is_none_of_an_agents(model: SmallNetwork, space: SearchSpace) -> None:
    ladders = (space.ladders[0], space.ladders[1][-1:], space.ladders[2])
    fixed = replace(space, ladders=ladders)
    whole, _ = NetworkEnv(fixed, make_evaluator(model, fixed)).reset(seed=0)
    assert whole["decision_mask"].tolist() == [1, 0, 1]

    env = LayerwiseEnv(fixed, make_evaluator(model, fixed))
    observation, _ = env.reset(seed=0)
    masks = [observation["decision_mask"].tolist()]
    for _ in range(2):
        observation, *_ = env.step(np.ones(1, dtype=np.float32))
        masks.append(observation["decision_mask"].tolist())
    assert masks == [[1], [0], [1]]


def test_too_little_room_is_refused(model: SmallNetwork, space: SearchSpace) -> None:
    needs = len(space.graph.operators) + space.n
    message = f"the observation has room for 4 nodes, but this network needs {needs}; pass at least {needs}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        NetworkEnv(space, make_evaluator(model, space), sizes=Sizes(4, 500, 9))


def test_measured_features_are_shown_and_can_be_dropped(model: SmallNetwork, space: SearchSpace) -> None:
    measured = make_evaluator(model, space).probe_sensitivity(space, (0.3, 0.6))
    shown, _ = NetworkEnv(space, make_evaluator(model, space), sensitivity=measured).reset(seed=0)
    hidden, _ = NetworkEnv(space, make_evaluator(model, space), sensitivity=measured, measured_dropout=1.0).reset(
        seed=0
    )
    assert (group_column(space, shown, "has_sensitivity_30%") == 1).all()
    assert (group_column(space, shown, "sensitivity_30%") > group_column(space, shown, "sensitivity_60%")).all()
    assert not group_column(space, hidden, "has_sensitivity_30%").any()
    assert not group_column(space, hidden, "sensitivity_30%").any()


@pytest.mark.parametrize("measured", [(0.3,), (0.6,), (0.3, 0.6)])
def test_each_keep_ratio_that_was_measured_is_shown_and_no_other(
    measured: tuple[float, ...], model: SmallNetwork, space: SearchSpace
) -> None:
    lost = np.linspace(0.1, 0.5, space.n)[:, None] * np.array([1 / ratio for ratio in measured]) * 0.3
    sensitivity = Sensitivity(space.names, measured, 0.9, lost, 1.0)

    shown, _ = NetworkEnv(space, make_evaluator(model, space), sensitivity=sensitivity, noise_floor=0.01).reset(seed=0)

    for ratio in (0.3, 0.6):
        # 1 - log(lost) / log(floor), by hand: 0 where 1 % is lost, 1 where everything is.
        expected = 1 + np.log10(sensitivity.at(ratio)) / 2 if ratio in measured else np.zeros(space.n)
        np.testing.assert_allclose(group_column(space, shown, f"sensitivity_{ratio:.0%}"), expected, rtol=1e-5)
        assert (group_column(space, shown, f"has_sensitivity_{ratio:.0%}") == (ratio in measured)).all()


def test_the_reward_of_a_user_is_used(model: SmallNetwork, space: SearchSpace) -> None:
    env = NetworkEnv(space, make_evaluator(model, space), reward=lambda accuracy, cost, limit: accuracy - cost / limit)
    env.reset(seed=0)
    _, reward, _, _, info = env.step(np.zeros(3, dtype=np.float32))
    assert reward == info["accuracy"] - info["cost"] / (space.limit or 0)


def test_the_evaluators_limit_stops_the_environment(model: SmallNetwork, space: SearchSpace) -> None:
    env = NetworkEnv(space, make_evaluator(model, space, max_evaluations=1))
    env.reset(seed=0)
    assert not env.evaluator.is_spent()
    *_, info = env.step(np.zeros(3, dtype=np.float32))
    assert info["budget_spent"]
    env.reset()
    with pytest.raises(EvaluationBudgetSpent):
        env.step(np.array([1, -1, 0], dtype=np.float32))


def test_a_refinement_step_over_the_evaluations_granted_raises_within_the_episode(model: SmallNetwork) -> None:
    space = make_space(model)
    env = NetworkEnv(space, make_evaluator(model, space, max_evaluations=1), refinement_steps=2)
    env.reset(seed=0)
    *_, ended, _, info = env.step(np.zeros(3, dtype=np.float32))

    assert info["budget_spent"] and not ended
    with pytest.raises(EvaluationBudgetSpent):
        env.step(np.array([1, -1, 0], dtype=np.float32))


def test_an_action_of_the_wrong_shape_is_refused(model: SmallNetwork, space: SearchSpace) -> None:
    env = NetworkEnv(space, make_evaluator(model, space))
    env.reset(seed=0)
    message = "action has shape (2,); this environment takes shape (3,)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        env.step(np.zeros(2, dtype=np.float32))


@BOTH
def test_an_episode_continues_from_its_saved_state(kind: type[Env], model: SmallNetwork, space: SearchSpace) -> None:
    options = {"refinement_steps": 3} if kind is NetworkEnv else {}
    journal = Journal()
    options |= half_measured(space)
    env = kind(space, make_evaluator(model, space, journal=journal), **options)
    actions = random_actions(env, 0)
    env.reset(seed=1)
    env.step(actions(0))
    state = env.state_dict()

    def rest(of: Env) -> list[list[Any]]:
        return [list(x) for x in (of.step(actions(1)), of.step(actions(2)), *(of.reset() for _ in range(8)))]

    expected = rest(env)
    other = kind(space, make_evaluator(model, space, journal=journal), **options)
    other.reset(seed=99)
    other.load_state_dict(state)
    assert_same(rest(other), expected)
    shown = {bool(group_column(space, obs, "has_sensitivity_30%").any()) for obs, *_ in expected[2:]}
    assert shown == {True, False}
    assert other.evaluator.evaluations_used == env.evaluator.evaluations_used > 0


def wide_space(share: float, rounding: int | dict[str, int]) -> tuple[SmallNetwork, SearchSpace]:
    model = SmallNetwork(width=20).eval()
    space = make_space(model, Budget(share=share), rounding=rounding, protect_first=False)
    return model, space.with_prior(sensitivity(space, np.linspace(0.4, 0.02, space.n), floor=0.01))


@pytest.mark.parametrize("rounding", [1, 8, {"inner": 8, "last": 20}])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.95])
def test_layerwise_meets_the_budget_and_leaves_no_room_for_another_step(
    share: float, rounding: int | dict[str, int]
) -> None:
    model, space = wide_space(share, rounding)
    env = LayerwiseEnv(space, make_evaluator(model, space, evaluate=lambda _: 0.5))
    rng = np.random.default_rng(0)
    for _ in range(60):
        actions = rng.choice([-1.0, 1.0], space.n) if rng.random() < 0.5 else rng.uniform(-1, 1, space.n)
        env.reset(seed=0)
        for action in actions:
            *_, info = env.step(np.array([action], dtype=np.float32))
        counts = np.rint(info["kept_ratios"] * space.sizes).astype(np.int64)
        assert space.cost(counts) <= (space.limit or 0)
        for index in range(space.n):
            longer = counts.copy()
            longer[index] = space.next_rung(index, int(counts[index]))
            assert longer[index] == counts[index] or space.cost(longer) > (space.limit or 0)


def test_layerwise_zeros_are_the_start_plan() -> None:
    model, space = wide_space(0.4, 1)
    env = LayerwiseEnv(space, make_evaluator(model, space))
    env.reset(seed=0)
    for _ in range(space.n):
        *_, info = env.step(np.zeros(1, dtype=np.float32))
    np.testing.assert_array_equal(info["kept_ratios"], start_plan(space) / space.sizes)


def test_the_wall_keeps_what_the_rest_needs_and_uses_what_the_rest_cannot(
    model: SmallNetwork, space: SearchSpace
) -> None:
    env = LayerwiseEnv(space, make_evaluator(model, space))
    env.reset(seed=0)
    low, high = env.wall(0)
    limit = space.limit or 0
    rest_least, rest_most = space.minimum.copy(), space.sizes.copy()
    rest_least[0], rest_most[0] = high, low
    assert space.cost(rest_least) <= limit
    assert space.cost(rest_most) <= limit or low == space.minimum[0]
    rest_least[0] += 1
    rest_most[0] += 1
    assert space.cost(rest_least) > limit
    assert space.cost(rest_most) > limit


def test_layerwise_shows_the_group_it_decides_and_rewards_at_the_end(model: SmallNetwork, space: SearchSpace) -> None:
    env = LayerwiseEnv(space, make_evaluator(model, space))
    obs, _ = env.reset(seed=0)
    rewards = []
    for step in range(space.n):
        assert obs["decisions"].tolist() == [len(space.graph.operators) + step]
        assert group_column(space, obs, "is_current").argmax() == step
        assert group_column(space, obs, "is_decided").sum() == step
        obs, reward, terminated, _, info = env.step(np.zeros(1, dtype=np.float32))
        assert info["group"] == space.names[step]
        assert terminated == (step == space.n - 1)
        rewards.append(reward)
    assert rewards[:-1] == [0] * (space.n - 1)
    assert rewards[-1] == info["accuracy"] > 0
    assert env.evaluator.evaluations_used == 1
    with pytest.raises(RuntimeError, match=r"^the episode is over: all 3 groups are decided; call reset\(\)$"):
        env.step(np.zeros(1, dtype=np.float32))


def test_what_remains_of_the_budget_shrinks_with_each_decision(model: SmallNetwork, space: SearchSpace) -> None:
    env = LayerwiseEnv(space, make_evaluator(model, space))
    obs, _ = env.reset(seed=0)
    remaining = [glob(obs, "remaining")]
    for _ in range(space.n):
        obs, *_ = env.step(np.ones(1, dtype=np.float32))
        remaining.append(glob(obs, "remaining"))
    assert remaining[0] == pytest.approx(1)
    assert remaining == sorted(remaining, reverse=True)
    assert 0 <= remaining[-1] < 0.1


def make_env(kind: type[Env]) -> Env:
    model = SmallNetwork().eval()
    space = make_space(model, Budget(share=0.5))
    evaluator: CandidateEvaluator = make_evaluator(model, space)
    return kind(space, evaluator)


@pytest.mark.slow
@BOTH
def test_several_processes_give_what_one_gives(kind: type[Env]) -> None:
    alone = make_env(kind)
    actions = random_actions(alone, 0)
    vectorised = SubprocVecEnv([lambda: make_env(kind)] * 2)
    try:
        vectorised.seed(0)
        vectorised.reset()
        alone.reset(seed=0)
        for step in range(3):
            _, reward, terminated, _, info = alone.step(actions(step))
            _, rewards, done, infos = vectorised.step(np.stack([actions(step)] * 2))
            assert rewards.tolist() == [np.float32(reward)] * 2
            assert done.tolist() == [terminated] * 2
            assert [each.get("policy") for each in infos] == [info.get("policy")] * 2
            if terminated:
                break
    finally:
        vectorised.close()
