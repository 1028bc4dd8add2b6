"""A trained agent as a file, and its policy on another network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.policies import BasePolicy

from pruning.files import CheckpointError

from .checkpoint import read_state, write_state
from .config import AgentConfig, Algorithm, DDPGConfig, PPOConfig
from .ddpg import GraphDDPGPolicy
from .policies import GraphActorCriticPolicy

_CONFIGS: dict[Algorithm, type[AgentConfig]] = {"ppo": PPOConfig, "ddpg": DDPGConfig}


@dataclass(frozen=True)
class Training:
    """What an agent saw and decided while it was trained, on which its plans for other networks depend.

    Attributes:
        environment: "network" where it planned a whole network at once, "layerwise" where one group a step.
        start: kind of plan that its scores correct, "sensitivity" or "uniform".
        measured_dropout: share of its episodes that did not show measured features; 1 if none did.
    """

    environment: str
    start: str
    measured_dropout: float

    def differences(self, environment: str, start: str, *, shows_measured: bool) -> list[str]:
        """What it was not trained for where it is to plan, one sentence each with what to do; empty if nothing."""
        found = []
        if self.environment != environment:
            found.append(
                f"it was trained in the {self.environment} environment and plans in the {environment} one here; train "
                f"it with search.environment {environment}"
            )
        if self.start != start:
            found.append(
                f"it learned to correct a {self.start} plan and corrects a {start} one here; train it with "
                f"search.start {start}"
            )
        if not shows_measured and self.measured_dropout == 0:
            found.append(
                "it saw measured sensitivities in every episode of its training and sees none here; train it with "
                "search.measured_dropout above 0"
            )
        return found


@dataclass(frozen=True)
class SavedAgent:
    """A trained agent, read from its file.

    Attributes:
        config: its hyper-parameters.
        policy: its policy, for the network that it is to plan, in evaluation mode.
        training: what it was trained on; None if the file is of a version that did not record it.
    """

    config: AgentConfig
    policy: BasePolicy
    training: Training | None


def policy_options(config: AgentConfig) -> dict[str, Any]:
    """Keyword arguments of the policy class that ``config`` is for."""
    if isinstance(config, DDPGConfig):
        return {
            "encoder": config.encoder(),
            "plan_hidden": config.plan_hidden,
            "plan_layers": config.plan_layers,
            "n_critics": config.n_critics,
        }
    return {"encoder": config.encoder(), "std": config.std}


def build_policy(config: AgentConfig, observation_space: spaces.Dict, action_space: spaces.Box) -> BasePolicy:
    """A new policy for the sizes of one network; its weights have the same shapes for every network."""
    policy_class = GraphDDPGPolicy if isinstance(config, DDPGConfig) else GraphActorCriticPolicy
    return policy_class(observation_space, action_space, lambda _: 1e-3, **policy_options(config))


def save_agent(path: Path, config: AgentConfig, policy: BasePolicy, training: Training) -> None:
    """Write a trained agent: its hyper-parameters, its weights and what it was trained on.

    Raises:
        FileWriteError: if the disk refuses.
    """
    algorithm = "ddpg" if isinstance(config, DDPGConfig) else "ppo"
    state = {"config": config.model_dump(), "policy": dict(policy.state_dict()), "training": asdict(training)}
    write_state(path, {"algorithm": algorithm, **state})


def load_agent(path: Path, observation_space: spaces.Dict, action_space: spaces.Box) -> SavedAgent:
    """Read a trained agent into a policy for a network of any size.

    Args:
        path: what `save_agent` wrote.
        observation_space: graphs of the network that the agent is applied to.
        action_space: its decisions.

    Raises:
        CheckpointError: if the file cannot be read, or the agent reads other features than the observations hold.
    """
    state = read_state(path)
    if state.get("algorithm") not in get_args(Algorithm):
        msg = (
            f"'{path}' holds an agent of algorithm {state.get('algorithm')!r}; known: {', '.join(get_args(Algorithm))}"
        )
        raise CheckpointError(msg)
    algorithm: Algorithm = state["algorithm"]
    config = _CONFIGS[algorithm].model_validate(state["config"])
    policy = build_policy(config, observation_space, action_space)
    load_weights(policy, state["policy"], path)
    policy.set_training_mode(False)
    training = Training(**state["training"]) if "training" in state else None
    return SavedAgent(config, policy, training)


def load_weights(policy: BasePolicy, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Load weights read from ``path``; `CheckpointError` names the first that does not fit."""
    own = policy.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        here, there = (tuple(side[name].shape) if name in side else "none" for side in (own, weights))
        if here != there:
            msg = (
                f"'{path}' does not fit: weight '{name}' has shape {there} there and {here} here; the agent was "
                "trained on observations with other features, or with another configuration"
            )
            raise CheckpointError(msg)
    policy.load_state_dict(dict(weights))


def act(policy: BasePolicy, observation: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """The policy's own action, without noise, ``(D,)`` in ``[-1, 1]``, for one observation."""
    action, _ = policy.predict(dict(observation), deterministic=True)
    return np.asarray(action, dtype=np.float32)
