from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from agent.checkpoint import read_state, write_state
from agent.config import AgentConfig, DDPGConfig, PPOConfig
from agent.train import train_agent
from agent.transfer import FEATURES, Task, Training, act, build_policy, load_agent, save_agent
from pruning.files import CheckpointError
from tests.agent.synthetic import TargetEnv

SMALL: dict[str, Any] = {"hidden": 8, "n_layers": 1, "n_frequencies": 0}
CONFIGS = [PPOConfig(updates=5, **SMALL), DDPGConfig(updates=1, batch_size=8, **SMALL)]
OF_ANOTHER_VERSION = (
    "'{}' does not say how its agent was trained, or in other words than this version, so it is of another one; train "
    "the agent again, or use the version that trained it"
)
CHANNELS = Task("network", "sensitivity", decide=("channels",), budgets=("macs",))
TRAINING = Training(CHANNELS, measured_dropout=0.25)


def trained(config: AgentConfig, path: Path) -> TargetEnv:
    env = TargetEnv(4, budget=41)
    result = train_agent(config, env, n_evaluations=41, seed=0)
    save_agent(path, result.config, result.policy, TRAINING)
    return env


@pytest.mark.parametrize("config", CONFIGS, ids=["ppo", "ddpg"])
def test_a_saved_agent_acts_as_it_did_and_plans_networks_of_other_sizes(config: AgentConfig, tmp_path: Path) -> None:
    env, larger = trained(config, tmp_path / "agent.pt"), TargetEnv(11, seed=5)
    assert isinstance(larger.observation_space, spaces.Dict)

    here = load_agent(tmp_path / "agent.pt", env.observation_space, env.action_space)  # type: ignore[arg-type]
    there = load_agent(tmp_path / "agent.pt", larger.observation_space, larger.action_space)  # type: ignore[arg-type]

    assert (here.config, here.training) == (config, TRAINING)
    assert act(here.policy, env.observation) == pytest.approx(env.proposed[-1], abs=1e-6)
    plan = act(there.policy, larger.observation)
    assert plan.shape == (11,)
    assert len(np.unique(plan)) > 5  # it tells layers apart


@pytest.mark.parametrize("config", CONFIGS, ids=["ppo", "ddpg"])
def test_no_weight_depends_on_the_network(config: AgentConfig) -> None:
    small, large = (
        build_policy(config, env.observation_space, env.action_space)  # type: ignore[arg-type]
        for env in (TargetEnv(2), TargetEnv(30))
    )

    shapes = [{name: w.shape for name, w in policy.state_dict().items()} for policy in (small, large)]
    assert shapes[0] == shapes[1]


def test_training_may_start_from_a_saved_agent(tmp_path: Path) -> None:
    first = trained(CONFIGS[0], tmp_path / "agent.pt")
    again = TargetEnv(4, budget=41)

    train_agent(CONFIGS[0], again, n_evaluations=41, seed=1, start_from=tmp_path / "agent.pt")

    assert again.proposed[0] == pytest.approx(first.proposed[-1], abs=1e-6)


def test_an_agent_that_reads_other_features_is_refused(tmp_path: Path) -> None:
    env = trained(CONFIGS[0], tmp_path / "agent.pt")
    other = spaces.Dict({**env.observation_space.spaces, "globals": spaces.Box(-1, 1, (7,), np.float32)})  # type: ignore[attr-defined]

    with pytest.raises(
        CheckpointError,
        match=r"^'.*agent\.pt' does not fit: weight 'features_extractor\.graph\.features\.weight' has shape \(8, 9\) "
        r"there and \(8, 13\) here; the agent was trained on observations with other features, or with another "
        r"configuration$",
    ):
        load_agent(tmp_path / "agent.pt", other, env.action_space)  # type: ignore[arg-type]


def test_an_unknown_algorithm_is_refused(tmp_path: Path) -> None:
    env = TargetEnv(2)
    write_state(tmp_path / "agent.pt", {"algorithm": "sac", "config": {}, "policy": {"w": torch.zeros(1)}})

    with pytest.raises(CheckpointError, match=r"^'.*agent\.pt' holds an agent of algorithm 'sac'; known: ppo, ddpg$"):
        load_agent(tmp_path / "agent.pt", env.observation_space, env.action_space)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "training", [None, {"environment": "network", "start": "sensitivity", "measured_dropout": 1.0}]
)
def test_an_agent_whose_file_does_not_say_what_it_was_trained_on_is_refused(
    training: dict[str, Any] | None, tmp_path: Path
) -> None:
    env = trained(CONFIGS[0], tmp_path / "agent.pt")
    state = read_state(tmp_path / "agent.pt")
    del state["training"]
    write_state(tmp_path / "other.pt", state if training is None else {**state, "training": training})

    with pytest.raises(CheckpointError) as caught:
        load_agent(tmp_path / "other.pt", env.observation_space, env.action_space)  # type: ignore[arg-type]
    assert str(caught.value) == OF_ANOTHER_VERSION.format(tmp_path / "other.pt")


def test_an_agent_with_hyper_parameters_of_another_version_is_refused(tmp_path: Path) -> None:
    env = trained(CONFIGS[0], tmp_path / "agent.pt")
    state = read_state(tmp_path / "agent.pt")
    write_state(tmp_path / "other.pt", {**state, "config": {**state["config"], "temperature": 1.0}})

    with pytest.raises(CheckpointError) as caught:
        load_agent(tmp_path / "other.pt", env.observation_space, env.action_space)  # type: ignore[arg-type]
    assert str(caught.value) == OF_ANOTHER_VERSION.format(tmp_path / "other.pt")


def test_an_agent_that_is_used_as_it_was_trained_has_nothing_to_say() -> None:
    uniform = replace(CHANNELS, start="uniform")

    assert TRAINING.differences(CHANNELS, shows_measured=True, knows_places=False) == []
    assert TRAINING.differences(CHANNELS, shows_measured=False, knows_places=False) == []
    assert Training(uniform, measured_dropout=1.0).differences(uniform, shows_measured=False, knows_places=False) == []
    assert TRAINING.refusal(CHANNELS) is None


def test_an_agent_tells_everything_that_it_was_not_trained_for() -> None:
    training = Training(replace(CHANNELS, environment="layerwise"), measured_dropout=0.0)

    assert training.differences(replace(CHANNELS, start="uniform"), shows_measured=False, knows_places=True) == [
        "it was trained in the layerwise environment and plans in the network one here; train it with "
        "search.environment network",
        "it learned to correct a sensitivity plan and corrects a uniform one here; train it with search.start uniform",
        "it saw measured sensitivities in every episode of its training and sees none here; train it with "
        "search.measured_dropout above 0",
        "it tells layers apart by their places in the network that it was trained on, where other networks have other "
        "layers; to plan those, train it with n_frequencies 0, as search.for_transfer does",
    ]


JOINT = Task(
    "network",
    "sensitivity",
    decide=("channels", "density", "bits"),
    budgets=("bytes",),
    sparsity="block16",
    densities=(10, 100),
    bits=(8, 32),
)


def test_an_agent_that_never_decided_what_is_to_be_decided_is_refused_with_both_named() -> None:
    assert TRAINING.refusal(JOINT) == (
        "it learned to decide channels and is to decide channels, density and bits here, but knows nothing of density "
        "and bits; train one with search.decide [channels, density, bits], or let this one decide with --set "
        "'search.decide=[channels]'"
    )
    assert Training(JOINT, 1.0).refusal(CHANNELS) is None


def test_scores_that_move_decisions_by_more_than_in_training_are_told() -> None:
    here, training = replace(CHANNELS, span=0.5), Training(replace(CHANNELS, span=0.3), 1.0)

    assert training.differences(here, shows_measured=True, knows_places=False) == [
        "its scores were to move a decision by up to 0.3 and move it by up to 0.5 here; pass --set search.span=0.3"
    ]
    # A file from before it was kept says nothing of it.
    assert TRAINING.differences(here, shows_measured=True, knows_places=False) == []


def test_other_budgets_levels_and_patterns_are_told_with_both_named() -> None:
    training = Training(JOINT, 1.0)
    here = replace(JOINT, budgets=("macs", "latency"), sparsity="2:4", densities=(50, 100), bits=(4, 8, 32))

    assert training.differences(here, shows_measured=True, knows_places=False) == [
        "it was trained under a budget of bytes and plans under one of macs and latency here; train it with the same "
        "kind of budget",
        "it was trained with search.sparsity block16 and plans with 2:4 here; train it with search.sparsity 2:4",
        "it was trained with search.densities [10, 100] and plans with [50, 100] here; train it with search.densities "
        "[50, 100]",
        "it was trained with search.bits [8, 32] and plans with [4, 8, 32] here; pass --set 'search.bits=[8, 32]', or "
        "train it with search.bits [4, 8, 32]",
    ]
    assert training.differences(replace(CHANNELS, budgets=("bytes",)), shows_measured=True, knows_places=False) == [
        "it learned to decide channels, density and bits together and decides channels here; train it with "
        "search.decide [channels]"
    ]


def test_what_an_agent_was_trained_for_is_in_its_file(tmp_path: Path) -> None:
    env = TargetEnv(2)
    policy = build_policy(CONFIGS[0], env.observation_space, env.action_space)  # type: ignore[arg-type]
    save_agent(tmp_path / "agent.pt", CONFIGS[0], policy, Training(JOINT, 0.5))

    loaded = load_agent(tmp_path / "agent.pt", env.observation_space, env.action_space)  # type: ignore[arg-type]

    assert loaded.training == Training(JOINT, 0.5, FEATURES)


def test_features_that_came_or_went_are_named(tmp_path: Path) -> None:
    env = TargetEnv(2)
    policy = build_policy(CONFIGS[0], env.observation_space, env.action_space)  # type: ignore[arg-type]
    save_agent(tmp_path / "agent.pt", CONFIGS[0], policy, Training(JOINT, 0.5, (*FEATURES[1:], "colour")))

    with pytest.raises(CheckpointError) as caught:
        load_agent(tmp_path / "agent.pt", env.observation_space, env.action_space)  # type: ignore[arg-type]
    assert str(caught.value) == (
        f"the agent in '{tmp_path / 'agent.pt'}' reads {len(FEATURES)} features and this version has {len(FEATURES)}, "
        f"without colour and with {FEATURES[0]} new; train it again, or use the version that trained it"
    )
