"""Agents at work on a search problem: the environment they act in, their training, their plan for another network."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import cast

from gymnasium import spaces

from agent.checkpoint import warn
from agent.config import AgentConfig
from agent.train import train_agent
from agent.transfer import Task, Training, act, load_agent, save_agent
from envs.action import decode
from envs.evaluator import CandidateEvaluator
from envs.layerwise_env import LayerwiseEnv
from envs.network_env import NetworkEnv
from pruning.files import CheckpointError
from pruning.policy import CompressionPolicy

from .config import SearchSettings, Start
from .problem import SearchProblem
from .run import MethodFolder

SearchEnv = NetworkEnv | LayerwiseEnv


def search_env(problem: SearchProblem, evaluator: CandidateEvaluator, settings: SearchSettings) -> SearchEnv:
    """The environment that an agent acts in; it shows the sensitivity probes if the agent pays for them."""
    sensitivity = problem.sensitivity if problem.shows_probes else None
    environment = NetworkEnv if settings.environment == "network" else LayerwiseEnv
    return environment(
        problem.space,
        evaluator,
        reward=problem.scoring.reward,
        sensitivity=sensitivity,
        noise_floor=problem.noise_floor() if sensitivity else 0.01,
        measured_dropout=settings.measured_dropout,
    )


def search_by_agent(
    problem: SearchProblem,
    evaluator: CandidateEvaluator,
    settings: SearchSettings,
    config: AgentConfig,
    files: MethodFolder | None,
    tensorboard: Path | None,
    start_from: Path | None = None,
    notify: Callable[[str], None] = warn,
) -> None:
    """Train an agent until the evaluations are spent; what it proposed is in the evaluator's history.

    Args:
        problem: network, decisions, start and scoring.
        evaluator: scores and counts.
        settings: environment and seed.
        config: the agent's hyper-parameters, which say what agent it is.
        files: where checkpoints and the trained agent go; none saves neither.
        tensorboard: where its training is logged.
        start_from: file of a trained agent to start from.
        notify: told of damaged checkpoints, and of a replay buffer that is too small for the whole search.
    """
    env = search_env(problem, evaluator, settings)
    result = train_agent(
        config,
        env,
        n_evaluations=math.floor(evaluator.max_evaluations),
        seed=problem.seed,
        episode_length=1 if settings.environment == "network" else problem.space.n,
        logdir=tensorboard,
        checkpoints=files.checkpoints if files else None,
        start_from=start_from,
        notify=notify,
    )
    if files:
        dropout = settings.measured_dropout if problem.shows_probes else 1.0
        training = Training(_task(problem, settings), dropout)
        save_agent(files.agent_file, result.config, result.policy, training)


def plan_by_agent(
    path: Path,
    problem: SearchProblem,
    evaluator: CandidateEvaluator,
    settings: SearchSettings,
    notify: Callable[[str], None],
) -> tuple[AgentConfig, CompressionPolicy]:
    """The plan of a trained agent, frozen, for the network of ``problem``: one forward pass, no evaluation.

    Args:
        path: the agent's file.
        problem: network, decisions and start.
        evaluator: not asked to score anything but the dense network.
        settings: what is decided; the plan is made for the whole network at once, whatever environment they name.
        notify: told what the agent was not trained for.

    Returns:
        The agent's hyper-parameters, and its plan.

    Raises:
        CheckpointError: if the file is no agent, or one that reads other features or never decided what is decided.
    """
    settings = settings.model_copy(update={"environment": "network"})
    env = search_env(problem, evaluator, settings)
    agent = load_agent(path, cast("spaces.Dict", env.observation_space), cast("spaces.Box", env.action_space))
    here = _task(problem, settings)
    if refusal := agent.training.refusal(here):
        msg = f"the agent in '{path}' cannot plan here: {refusal}"
        raise CheckpointError(msg)
    for difference in agent.training.differences(
        here, shows_measured=problem.shows_probes, knows_places=agent.config.n_frequencies > 0
    ):
        notify(f"the agent in '{path}' is not used as it was trained: {difference}")
    observation, _ = env.reset(seed=problem.seed)
    return agent.config, decode(act(agent.policy, observation), problem.space)


def _task(problem: SearchProblem, settings: SearchSettings) -> Task:
    """What an agent plans in this problem."""
    decides_density, space = "density" in settings.decide, problem.space
    offered = {bits for index in space.rungs_of_bits for bits in space.ladders[index].tolist()}
    return Task(
        environment=settings.environment,
        start=_start(problem),
        decide=settings.decide,
        budgets=tuple(bound.cost.kind for bound in space.bounds) or ("none",),
        sparsity=settings.sparsity if decides_density else "",
        densities=settings.densities if decides_density else (),
        bits=tuple(bits for bits in settings.bits if bits in offered),
        span=settings.span,
    )


def _start(problem: SearchProblem) -> Start:
    """The kind of plan that the scores of an agent correct."""
    return "sensitivity" if problem.starts_from_probes else "uniform"
