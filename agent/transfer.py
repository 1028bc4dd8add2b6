"""A trained agent as a file, and its policy on another network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from pydantic import ValidationError
from stable_baselines3.common.policies import BasePolicy

from graph_encoder.features import GLOBAL_FEATURES, NODE_FEATURES
from pruning.files import CheckpointError

from .checkpoint import read_state, write_state
from .config import AgentConfig, Algorithm, DDPGConfig, PPOConfig
from .ddpg import GraphDDPGPolicy
from .policies import GraphActorCriticPolicy

_CONFIGS: dict[Algorithm, type[AgentConfig]] = {kind.algorithm: kind for kind in (PPOConfig, DDPGConfig)}


FEATURES = (*NODE_FEATURES, *GLOBAL_FEATURES)
"""What an agent of this version reads."""


@dataclass(frozen=True)
class Task:
    """What an agent plans, beside the network.

    Attributes:
        environment: "network" for a plan of a whole network at once, "layerwise" for one group a step.
        start: kind of plan that its scores correct, "sensitivity" or "uniform".
        decide: what is decided: "channels", and choices inside layers.
        budgets: kinds of the budgets, "none" alone without any.
        sparsity: pattern of the zeros, where densities are decided.
        densities: percents of a layer's weights to choose among, where they are decided.
        bits: bits to choose among, where they are decided.
        span: how far a score of 1 moves a decision; 0 in a file from before it was kept.
    """

    environment: str
    start: str
    decide: tuple[str, ...]
    budgets: tuple[str, ...]
    sparsity: str = ""
    densities: tuple[int, ...] = ()
    bits: tuple[int, ...] = ()
    span: float = 0.0


@dataclass(frozen=True)
class Training:
    """What an agent saw and decided while it was trained, on which its plans for other networks depend.

    Attributes:
        task: what it planned.
        measured_dropout: share of its episodes that did not show measured features; 1 if none did.
        features: names of what it read of nodes and of the whole, in order.
    """

    task: Task
    measured_dropout: float
    features: tuple[str, ...] = FEATURES

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Training:
        """Read what `dataclasses.asdict` made."""
        return cls(Task(**state["task"]), state["measured_dropout"], tuple(state["features"]))

    def refusal(self, here: Task) -> str | None:
        """Why it cannot plan ``here`` at all: it never decided what is to be decided; None if it can."""
        unknown = [choice for choice in here.decide if choice not in self.task.decide]
        if not unknown:
            return None
        return (
            f"it learned to decide {_listed(self.task.decide)} and is to decide {_listed(here.decide)} here, but knows "
            f"nothing of {_listed(unknown)}; train one with search.decide [{', '.join(here.decide)}], or let this one "
            f"decide with --set 'search.decide=[{', '.join(self.task.decide)}]'"
        )

    def differences(self, here: Task, *, shows_measured: bool, knows_places: bool) -> list[str]:
        """What it was not trained for where it is to plan, one sentence each with what to do; empty if nothing.

        Args:
            here: what it is to plan.
            shows_measured: whether it is shown measured features.
            knows_places: whether it reads the places of the layers in the network.
        """
        found, there = [], self.task
        if there.environment != here.environment:
            found.append(
                f"it was trained in the {there.environment} environment and plans in the {here.environment} one here; "
                f"train it with search.environment {here.environment}"
            )
        if there.start != here.start:
            found.append(
                f"it learned to correct a {there.start} plan and corrects a {here.start} one here; train it with "
                f"search.start {here.start}"
            )
        if there.span and here.span and there.span != here.span:
            found.append(
                f"its scores were to move a decision by up to {there.span:g} and move it by up to {here.span:g} here; "
                f"pass --set search.span={there.span:g}"
            )
        found += self._other_choices(here)
        if not shows_measured and self.measured_dropout == 0:
            found.append(
                "it saw measured sensitivities in every episode of its training and sees none here; train it with "
                "search.measured_dropout above 0"
            )
        if knows_places:
            found.append(
                "it tells layers apart by their places in the network that it was trained on, where other networks "
                "have other layers; to plan those, train it with n_frequencies 0, as search.for_transfer does"
            )
        return found

    def _other_choices(self, here: Task) -> list[str]:
        there, found = self.task, []
        if set(there.decide) != set(here.decide):
            found.append(
                f"it learned to decide {_listed(there.decide)} together and decides {_listed(here.decide)} here; train "
                f"it with search.decide [{', '.join(here.decide)}]"
            )
        if set(there.budgets) != set(here.budgets):
            found.append(
                f"it was trained under a budget of {_listed(there.budgets)} and plans under one of "
                f"{_listed(here.budgets)} here; train it with the same kind of budget"
            )
        for name in ("sparsity", "densities", "bits"):
            before, now = getattr(there, name), getattr(here, name)
            if before and now and before != now:
                # A search may have left out some of what was asked for.
                is_part = name != "sparsity" and set(before) < set(now)
                way = f"pass --set 'search.{name}={_value(before)}', or " if is_part else ""
                found.append(
                    f"it was trained with search.{name} {_value(before)} and plans with {_value(now)} here; {way}train "
                    f"it with search.{name} {_value(now)}"
                )
        return found


@dataclass(frozen=True)
class SavedAgent:
    """A trained agent, read from its file.

    Attributes:
        config: its hyper-parameters.
        policy: its policy, for the network that it is to plan, in evaluation mode.
        training: what it was trained on.
    """

    config: AgentConfig
    policy: BasePolicy
    training: Training


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
    state = {"config": config.model_dump(), "policy": dict(policy.state_dict()), "training": asdict(training)}
    write_state(path, {"algorithm": config.algorithm, **state})


def load_agent(path: Path, observation_space: spaces.Dict, action_space: spaces.Box) -> SavedAgent:
    """Read a trained agent into a policy for a network of any size.

    Args:
        path: what `save_agent` wrote.
        observation_space: graphs of the network that the agent is applied to.
        action_space: its decisions.

    Raises:
        CheckpointError: if the file cannot be read or does not say what the agent was trained on, or the agent reads
            other features than the observations hold.
    """
    state = read_state(path)
    if state.get("algorithm") not in get_args(Algorithm):
        msg = (
            f"'{path}' holds an agent of algorithm {state.get('algorithm')!r}; known: {', '.join(get_args(Algorithm))}"
        )
        raise CheckpointError(msg)
    algorithm: Algorithm = state["algorithm"]
    config, training = _training(state, _CONFIGS[algorithm], path)
    _check_features(training.features, path)
    policy = build_policy(config, observation_space, action_space)
    load_weights(policy, state["policy"], path)
    policy.set_training_mode(False)
    return SavedAgent(config, policy, training)


def _training(state: Mapping[str, Any], kind: type[AgentConfig], path: Path) -> tuple[AgentConfig, Training]:
    try:
        return kind.model_validate(state["config"]), Training.from_state(state["training"])
    except (KeyError, TypeError, ValidationError) as error:
        msg = (
            f"'{path}' does not say how its agent was trained, or in other words than this version, so it is of "
            "another one; train the agent again, or use the version that trained it"
        )
        raise CheckpointError(msg) from error


def _check_features(features: Sequence[str], path: Path) -> None:
    """Refuse an agent that reads other features, by their names."""
    if tuple(features) == FEATURES:
        return
    gone, new = set(features) - set(FEATURES), set(FEATURES) - set(features)
    changed = [f"without {_listed(sorted(gone))}"] * bool(gone) + [f"with {_listed(sorted(new))} new"] * bool(new)
    msg = (
        f"the agent in '{path}' reads {len(features)} features and this version has {len(FEATURES)}, "
        f"{' and '.join(changed) or 'in another order'}; train it again, or use the version that trained it"
    )
    raise CheckpointError(msg)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)


def _value(value: str | Sequence[int]) -> str:
    return value if isinstance(value, str) else f"[{', '.join(map(str, value))}]"


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
