"""PPO for searches of a few hundred evaluations: whole-rollout batches, mirrored noise, a scheduled spread."""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.vec_env import VecEnv

from .noise import geometric, rollout_noise
from .policies import GraphActorCriticPolicy


class GraphPPO(PPO):
    """`stable_baselines3.PPO` that prepares its own noise before each rollout.

    The first episode of a rollout follows the mean (in the first rollout: the start plan), and the others come in
    mirrored pairs (`agent.noise`).

    Args:
        policy: a `GraphActorCriticPolicy`.
        env: the vectorised environment.
        std_end: spread of the plans when the run is over; it falls geometrically from the policy's own.
        episode_length: steps of an episode, 1 for a plan for the whole network.
        options: of `stable_baselines3.PPO`.
    """

    policy: GraphActorCriticPolicy

    def __init__(self, policy: Any, env: VecEnv, *, std_end: float, episode_length: int, **options: Any) -> None:
        super().__init__(policy, env, **options)
        self.std_end = std_end
        self.episode_length = episode_length
        self._std_start = float(self.policy.std)
        self._generator = torch.Generator().manual_seed(self.seed or 0)

    def begin_rollout(self, remaining: float) -> None:
        """Set the spread and draw the noise of the next rollout; ``remaining`` is the share of the run to come."""
        self.policy.set_std(geometric(self._std_start, self.std_end, remaining))
        n_decisions = get_action_dim(self.action_space)
        self.policy.rollout_noise = rollout_noise(
            self.n_steps, self.episode_length, self.n_envs, n_decisions, self._generator
        )

    def train(self) -> None:
        """As `stable_baselines3.PPO.train`; logs the spread as well."""
        super().train()
        self.logger.record("train/std", float(self.policy.std))

    def extra_state(self) -> dict[str, Any]:
        """What the next rollout depends on besides the policy: the generator of the noise."""
        return {"generator": self._generator.get_state()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Continue from `extra_state`."""
        self._generator.set_state(state["generator"])
