"""Agents in the environments of a search."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from agent.config import AgentConfig, Algorithm, DDPGConfig, PPOConfig
from agent.train import TrainResult, train_agent
from envs.evaluator import Sensitivity
from envs.journal import Journal
from envs.network_env import NetworkEnv
from envs.space import SearchSpace
from experiments.agents import search_env
from experiments.config import SearchSettings
from experiments.problem import Scoring, SearchProblem
from graph_encoder.features import column
from latency.budget import Budget
from tests.envs.conftest import SmallNetwork, make_evaluator, make_space, remaining_share

GRANTED = 8
"""Evaluations of each environment."""
CONFIGS: dict[Algorithm, AgentConfig] = {
    "ppo": PPOConfig(hidden=8, std=0.8, std_end=0.6, rollout=6, updates=2, checkpoint_every=1),
    "ddpg": DDPGConfig(
        hidden=8, std=0.8, std_end=0.6, rollout=6, updates=1, learning_starts=4, batch_size=8, checkpoint_every=1
    ),
}


class Killed(RuntimeError):
    pass


@cache
def network() -> tuple[nn.Module, SearchSpace]:
    """The network of all environments and its decisions."""
    model = SmallNetwork(width=16).eval()
    return model, make_space(model, Budget(share=0.5))


def journalled_env(path: Path, lives: int) -> NetworkEnv:
    """An environment with a journal of its own, killed in the evaluation after so many."""
    model, space = network()
    share = remaining_share(model)

    def evaluate(candidate: nn.Module) -> float:
        nonlocal lives
        if lives == 0:
            raise Killed
        lives -= 1
        return share(candidate)

    evaluator = make_evaluator(model, space, evaluate=evaluate, journal=Journal(path), max_evaluations=GRANTED)
    return NetworkEnv(space, evaluator, measured_dropout=0.5)


def train(algorithm: Algorithm, folder: Path, lives: int = 10**9) -> TrainResult:
    """Train in two environments of which the second may be killed."""
    envs = [journalled_env(folder / "0.jsonl", 10**9), journalled_env(folder / "1.jsonl", lives)]
    return train_agent(
        CONFIGS[algorithm],
        DummyVecEnv([lambda env=env: env for env in envs]),  # type: ignore[misc]
        n_evaluations=2 * GRANTED,
        seed=0,
        checkpoints=folder / "checkpoints",
    )


def scored(folder: Path) -> list[list[tuple[str, float]]]:
    """Plans and accuracies that the journals hold."""
    journals = [Journal(path).entries() for path in sorted(folder.glob("*.jsonl"))]
    return [[(entry.digest, entry.accuracy) for entry in entries] for entries in journals]


@pytest.mark.parametrize("algorithm", ["ppo", "ddpg"])
def test_several_environments_continue_with_their_journals_as_if_never_killed(
    algorithm: Algorithm, tmp_path: Path
) -> None:
    whole = train(algorithm, tmp_path / "whole")

    with pytest.raises(Killed):
        train(algorithm, tmp_path / "killed", lives=5)
    assert any((tmp_path / "killed" / "checkpoints").iterdir())
    resumed = train(algorithm, tmp_path / "killed")

    assert resumed.rewards == whole.rewards
    assert resumed.evaluations == whole.evaluations <= 2 * GRANTED
    assert scored(tmp_path / "killed") == scored(tmp_path / "whole")
    for name, weights in whole.policy.state_dict().items():
        assert torch.equal(resumed.policy.state_dict()[name], weights), name


@pytest.mark.parametrize("environment", ["network", "layerwise"])
@pytest.mark.parametrize(("measured_dropout", "shown"), [(0.0, True), (1.0, False)])
def test_measured_features_are_dropped_as_the_settings_say(
    environment: str, measured_dropout: float, shown: bool
) -> None:
    model, space = network()
    scoring = Scoring(remaining_share(model), [], n_images=100, reward=lambda accuracy, cost, limit: accuracy)
    probes = Sensitivity(space.names, (0.3,), 0.9, np.full((space.n, 1), 0.1), 1.0)
    problem = SearchProblem(
        model, space.graph, space, scoring, Journal(), seed=0, sensitivity=probes, shows_probes=True
    )
    settings = SearchSettings(environment=environment, measured_dropout=measured_dropout)

    env = search_env(problem, problem.evaluator("ppo", lambda _: None), settings)

    observation, _ = env.reset(seed=0)
    assert observation["nodes"][:, column("has_sensitivity_30%")].any() == shown
