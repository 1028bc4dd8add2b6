"""Training an agent on a search environment until its evaluations are spent; stopped runs continue exactly."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.vec_env import VecEnv

from graph_encoder.randomness import random_states, set_random_states
from pruning.files import CheckpointError

from .checkpoint import (
    Notify,
    load_checkpoint,
    read_state,
    save_checkpoint,
    warn,
)
from .config import AgentConfig, DDPGConfig, PPOConfig
from .ddpg import GraphDDPG, GraphDDPGPolicy
from .policies import GraphActorCriticPolicy
from .ppo import GraphPPO
from .replay import affordable_size
from .schedule import rollout_size
from .search_env import Episode, Ledger, StandardisedRewards, tell_exhausted, vectorised
from .tensorboard import tensorboard_logger
from .transfer import load_weights, policy_options

Agent = GraphPPO | GraphDDPG


@dataclass(frozen=True)
class TrainResult:
    """What a search by an agent came to.

    Attributes:
        config: the agent's hyper-parameters.
        policy: the trained policy.
        rewards: return of every episode, in order.
        best: the episode with the highest return; its ``info`` is empty if it was found before a resume.
        evaluations: counted by the environment.
        n_steps: steps of the environments.
    """

    config: AgentConfig
    policy: BasePolicy
    rewards: tuple[float, ...]
    best: Episode
    evaluations: float
    n_steps: int


def train_agent(
    config: AgentConfig,
    env: gym.Env[Any, Any] | VecEnv,
    *,
    n_evaluations: int,
    seed: int,
    episode_length: int = 1,
    logdir: Path | None = None,
    checkpoints: Path | None = None,
    start_from: Path | None = None,
    notify: Notify = warn,
    device: str = "cpu",
) -> TrainResult:
    """Train until the environment's evaluations are spent.

    The environment counts: ``info["evaluation"].evaluations_used`` and ``info["budget_spent"]`` at the end of every
    episode. Plans that are known already are free, but a search that proposes little else ends: after `MOST_KNOWN` of
    them in a row, or four episodes for every evaluation granted. Several environments are stepped together, each with
    evaluations of its own: the first to spend them ends the search. The first plan is that of an action of zeros, the
    last one of the trained policy (unless ``start_from`` or free plans shift them).

    If ``checkpoints`` holds any, the run continues from the newest: on a CPU with the same number of threads the
    result is that of a run never interrupted, bit by bit.

    Args:
        config: the agent's hyper-parameters, which say what agent it is.
        env: a Gymnasium environment over graphs (see `GraphEncoder`) with actions in ``[-1, 1]``, or several of one
            size, vectorised. If ``checkpoints`` is given, with ``state_dict`` and ``load_state_dict``, which hold all
            that later steps depend on, what was scored so far included.
        n_evaluations: evaluations that the environments grant in all.
        seed: of weights, noise and batches.
        episode_length: steps of an episode: 1 for a plan for the whole network, the number of decisions layer by layer.
        logdir: folder for TensorBoard.
        checkpoints: folder for checkpoints.
        start_from: file of a trained agent (`save_agent`) of the same configuration to start from.
        notify: told of damaged checkpoints, and of a replay buffer that is too small for the whole search.
        device: of the agent's networks.

    Raises:
        CheckpointError: if a checkpoint or ``start_from`` cannot be read, or is of another search.
        FileWriteError: if a checkpoint cannot be written.
        ValueError: if the spaces are not those of a search, or environments share an evaluator.
    """
    plan = SearchPlan(config, n_evaluations, seed, episode_length, device)
    search = Search(plan, env, notify)
    if start_from is not None:
        load_weights(search.agent.policy, read_state(start_from)["policy"], start_from)
    is_resumed = checkpoints is not None and search.resume(checkpoints)
    n_steps = search.agent.num_timesteps
    logger = tensorboard_logger(logdir, n_steps + 1 if is_resumed else 0)
    search.agent.set_logger(logger)
    try:
        search.run(checkpoints)
    finally:
        logger.close()
    return search.result()


@dataclass(frozen=True)
class SearchPlan:
    """What must be the same for a run to be continued, and what follows from it.

    Attributes:
        config: hyper-parameters.
        n_evaluations: granted in all.
        seed: of the run.
        episode_length: steps of an episode.
        device: of the networks.
    """

    config: AgentConfig
    n_evaluations: int
    seed: int
    episode_length: int
    device: str

    def identity(self) -> dict[str, Any]:
        """What a checkpoint is compared by."""
        return {
            "config": {"algorithm": self.config.algorithm, **self.config.model_dump()},
            "n_evaluations": self.n_evaluations,
            "seed": self.seed,
            "episode_length": self.episode_length,
        }

    def most_steps(self) -> int:
        """Steps after which a search that proposes known plans over and over is ended."""
        return 4 * self.n_evaluations * self.episode_length

    def build(self, env: VecEnv, notify: Notify = warn) -> Agent:
        """A new agent for the environment; ``notify`` is told if its memory does not hold the whole search."""
        config = self.config
        if isinstance(config, DDPGConfig):
            return self._build_ddpg(config, env, notify)
        assert isinstance(config, PPOConfig)
        return self._build_ppo(config, env)

    def _rollout_steps(self, wanted: int, n_envs: int) -> int:
        """Steps of each environment in a rollout."""
        return self.episode_length * rollout_size(self.n_evaluations // n_envs, max(1, wanted // n_envs))

    def _build_ppo(self, config: PPOConfig, env: VecEnv) -> GraphPPO:
        n_steps = self._rollout_steps(config.rollout, env.num_envs)
        transitions = n_steps * env.num_envs
        n_batches = -(-transitions // config.batch_size)
        batch_size = -(-transitions // n_batches)
        with warnings.catch_warnings():
            # The last batch of a rollout may be smaller.
            warnings.filterwarnings("ignore", "You have specified a mini-batch size")
            return GraphPPO(
                GraphActorCriticPolicy,
                env,
                std_end=config.std_end,
                episode_length=self.episode_length,
                n_steps=n_steps,
                batch_size=batch_size,
                n_epochs=max(1, round(config.updates / n_batches)),
                learning_rate=config.learning_rate,
                clip_range=config.clip_range,
                gamma=config.gamma,
                gae_lambda=config.gae_lambda,
                vf_coef=config.vf_coef,
                policy_kwargs=policy_options(config),
                seed=self.seed,
                device=self.device,
            )

    def _build_ddpg(self, config: DDPGConfig, env: VecEnv, notify: Notify) -> GraphDDPG:
        assert isinstance(env.observation_space, spaces.Dict)
        n_steps = self._rollout_steps(config.rollout, env.num_envs)
        episodes = n_steps // self.episode_length * env.num_envs
        wanted, n_decisions = self.most_steps(), get_action_dim(env.action_space)
        buffer_size = affordable_size(wanted, env.observation_space, n_decisions, config.buffer_bytes)
        if buffer_size < wanted:
            notify(
                f"the replay buffer holds {buffer_size:,} of the {wanted:,} transitions that the search may make, "
                f"since buffer_bytes is {config.buffer_bytes:,}; the oldest go first: raise it to keep them all"
            )
        return GraphDDPG(
            GraphDDPGPolicy,
            env,
            std=config.std,
            std_end=config.std_end,
            actor_learning_rate=config.actor_learning_rate,
            policy_delay=config.policy_delay,
            candidates=config.candidates,
            episode_length=self.episode_length,
            learning_rate=config.critic_learning_rate,
            learning_starts=config.learning_starts * self.episode_length,
            buffer_size=buffer_size,
            batch_size=config.batch_size,
            tau=config.tau,
            gamma=config.gamma,
            train_freq=(n_steps, "step"),
            gradient_steps=config.updates * episodes,
            policy_kwargs=policy_options(config),
            seed=self.seed,
            device=self.device,
        )


class Search:
    """An agent, its environment, and the books between them."""

    def __init__(self, plan: SearchPlan, env: gym.Env[Any, Any] | VecEnv, notify: Notify = warn) -> None:
        self.plan = plan
        self._notify = notify
        self.new_episodes: list[Episode] = []
        self.ledger = Ledger(vectorised(env), self.new_episodes.append)
        self.rewards = StandardisedRewards(self.ledger)
        # DDPG's buffer standardises by itself, over all it holds.
        self.agent = plan.build(self.rewards if plan.config.algorithm == "ppo" else self.ledger, notify)

    def run(self, checkpoints: Path | None) -> None:
        """Train until the evaluations are spent, or no new plan comes."""
        steps = self.plan.most_steps() - self.agent.num_timesteps
        is_fresh = self.agent.num_timesteps == 0
        if steps > 0 and not self.ledger.is_over:
            hooks = SearchHooks(self, checkpoints)
            self.agent.learn(steps, callback=hooks, log_interval=None, reset_num_timesteps=is_fresh)  # type: ignore[arg-type]
        ledger = self.ledger
        if not ledger.is_spent and (ledger.is_over or ledger.evaluations < self.plan.n_evaluations):
            known = "" if ledger.is_over else f"most of the {len(ledger.rewards)} plans were known before"
            tell_exhausted(ledger, ledger.evaluations, self.plan.n_evaluations, known)

    def result(self) -> TrainResult:
        """What the search came to."""
        assert self.ledger.best is not None
        self.agent.policy.set_training_mode(False)
        return TrainResult(
            config=self.plan.config,
            policy=self.agent.policy,
            rewards=tuple(self.ledger.rewards),
            best=self.ledger.best,
            evaluations=self.ledger.evaluations,
            n_steps=self.agent.num_timesteps,
        )

    def remaining(self) -> float:
        """Share of the evaluations still to come."""
        return max(0.0, 1 - self.ledger.evaluations / self.plan.n_evaluations)

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, at the start of a rollout."""
        agent = self.agent
        return {
            "search": self.plan.identity(),
            "policy": dict(agent.policy.state_dict()),
            "optimizers": [optimizer.state_dict() for optimizer in _optimizers(agent)],
            "num_timesteps": agent.num_timesteps,
            "n_updates": agent._n_updates,
            "episode_num": agent._episode_num,
            "last_obs": agent._last_obs,
            "last_episode_starts": agent._last_episode_starts,
            "extra": agent.extra_state(),
            "ledger": self.ledger.state_dict(),
            "random": random_states(),
        }

    def resume(self, checkpoints: Path) -> bool:
        """Continue from the newest checkpoint, if there is one."""
        state = load_checkpoint(checkpoints, self._notify)
        if state is None:
            return False
        try:
            self._check_same_search(state["search"], checkpoints)
            self._load_state(state, checkpoints)
        except KeyError as missing:
            msg = (
                f"the checkpoints in '{checkpoints}' lack {missing}, so they are of another version; use that one, or "
                "remove the folder to start the search over (evaluations in the journal are not run again)"
            )
            raise CheckpointError(msg) from missing
        return True

    def _load_state(self, state: Mapping[str, Any], checkpoints: Path) -> None:
        agent = self.agent
        # The seeds that Stable-Baselines3 gave the environments wait for their next reset: let them have it now.
        self.ledger.reset()
        self.ledger.load_state_dict(state["ledger"])
        load_weights(agent.policy, state["policy"], checkpoints)
        for optimizer, saved in zip(_optimizers(agent), state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        agent.num_timesteps = state["num_timesteps"]
        agent._n_updates = state["n_updates"]
        agent._episode_num = state["episode_num"]
        agent._last_obs = state["last_obs"]
        agent._last_episode_starts = state["last_episode_starts"]
        agent.load_extra_state(state["extra"])
        set_random_states(state["random"])

    def _check_same_search(self, saved: Mapping[str, Any], checkpoints: Path) -> None:
        identity = self.plan.identity()
        for name, wanted in {**identity.pop("config"), **identity}.items():
            found = {**saved["config"], **saved}.get(name)
            if found != wanted:
                msg = (
                    f"the checkpoints in '{checkpoints}' are of a search with {name} = {found!r}, and this one has "
                    f"{wanted!r}; resume with the same settings, or choose another folder"
                )
                raise CheckpointError(msg)


class SearchHooks(BaseCallback):
    """Checkpoints and noise before each rollout; logging and the end of the search after each step.

    Only the start of a rollout is a place from which a run continues bit by bit: within one, the noise is partly used
    and the rollout buffer partly filled.
    """

    def __init__(self, search: Search, checkpoints: Path | None) -> None:
        super().__init__()
        self._search = search
        self._checkpoints = checkpoints
        self._saved_at = search.ledger.evaluations

    def _on_rollout_start(self) -> None:
        search = self._search
        # What the last training logged would be lost in a resumed run if it waited for the next step.
        self.logger.dump(self.num_timesteps)
        if search.ledger.evaluations - self._saved_at >= search.plan.config.checkpoint_every:
            self._save()
        search.rewards.update()
        search.agent.begin_rollout(search.remaining())

    def _on_step(self) -> bool:
        if self._search.new_episodes:
            self._log(self._search.new_episodes)
            self._search.new_episodes.clear()
        return not self._search.ledger.is_over

    def _save(self) -> None:
        self._saved_at = self._search.ledger.evaluations
        if self._checkpoints is not None:
            save_checkpoint(self._checkpoints, self.num_timesteps, self._search.state())

    def _log(self, episodes: list[Episode]) -> None:
        best = self._search.ledger.best
        assert best is not None
        for episode in episodes:
            self.logger.record_mean("plan/reward", episode.reward)
            self.logger.record_mean("plan/accuracy", float(episode.info["accuracy"]))
        ratios = np.concatenate([np.ravel(episode.info["kept_ratios"]) for episode in episodes])
        self.logger.record("plan/best_reward", best.reward)
        self.logger.record("plan/keep_ratio_mean", float(ratios.mean()))
        self.logger.record("plan/keep_ratios", ratios)
        self.logger.record("plan/evaluations", self._search.ledger.evaluations)
        self.logger.dump(self.num_timesteps)


def _optimizers(agent: Agent) -> list[torch.optim.Optimizer]:
    if isinstance(agent, GraphDDPG):
        return [agent.actor.optimizer, agent.critic.optimizer]
    return [agent.policy.optimizer]
