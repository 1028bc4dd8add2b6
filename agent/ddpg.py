"""DDPG over graphs.

In a search over plans for a whole network an episode is one step, so the critic is a learned model of the reward: the
actor climbs it, and it can rank plans for a fraction of the price of an evaluation.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import DDPG
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, PyTorchObs, Schedule, TrainFreq
from stable_baselines3.common.utils import obs_as_tensor, polyak_update, update_learning_rate
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.td3.policies import TD3Policy
from torch import Tensor, nn

from graph_encoder.encoders import Observation, one_if_all_equal

from .noise import geometric, rollout_noise
from .plan_value import PlanValue
from .policies import DecisionHead, GraphFeatures
from .replay import StandardisedReplayBuffer


class GraphActor(BasePolicy):
    """Deterministic plan: ``tanh`` of one head shared by all decisions; all zeros until trained."""

    def __init__(self, observation_space: spaces.Dict, action_space: spaces.Box, *, encoder: dict[str, Any]) -> None:
        features = GraphFeatures(observation_space, **encoder)
        super().__init__(observation_space, action_space, features_extractor=features, squash_output=True)
        self.mu = DecisionHead(features.features_dim)

    def forward(self, obs: Observation) -> Tensor:
        """Actions ``(batch, D)`` in ``[-1, 1]``, 0 on padded decisions."""
        assert self.features_extractor is not None
        features = self.features_extractor(obs)
        actions: Tensor = torch.tanh(self.mu(features.decisions)) * features.mask
        return actions

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> Tensor:
        plan: Tensor = self(observation)
        return plan


class GraphCritic(BasePolicy):
    """Independent critics, each with an encoder of its own: none reads the actor's, which it could not train."""

    def __init__(
        self, observation_space: spaces.Dict, action_space: spaces.Box, *, n_critics: int, **critic: Any
    ) -> None:
        super().__init__(observation_space, action_space)
        self.q_networks = nn.ModuleList(PlanValue(observation_space, **critic) for _ in range(n_critics))

    def forward(self, obs: Observation, actions: Tensor) -> tuple[Tensor, ...]:
        """Every critic's value of the plans, each ``(batch, 1)``."""
        return tuple(critic(obs, actions) for critic in self.q_networks)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        msg = "a critic values actions and chooses none; ask the actor"
        raise NotImplementedError(msg)


class GraphDDPGPolicy(TD3Policy):
    """Actor, critics and their targets over graphs."""

    actor: GraphActor  # type: ignore[assignment]
    actor_target: GraphActor  # type: ignore[assignment]
    critic: GraphCritic  # type: ignore[assignment]
    critic_target: GraphCritic  # type: ignore[assignment]

    def __init__(
        self,
        observation_space: spaces.Dict,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *,
        encoder: dict[str, Any],
        plan_hidden: int,
        plan_layers: int,
        n_critics: int,
    ) -> None:
        """Build the networks.

        Args:
            observation_space: graphs, see `GraphEncoder`.
            action_space: one score a decision, in ``[-1, 1]``.
            lr_schedule: from the share of the run that remains to Adam's step size.
            encoder: keyword arguments of `GraphEncoder`, for actor and critics alike.
            plan_hidden: see `PlanValue`.
            plan_layers: see `PlanValue`.
            n_critics: critics, all trained on the same batches, by the sum of their losses.
        """
        self._encoder = encoder
        self._critic: dict[str, Any] = {"plan_hidden": plan_hidden, "plan_layers": plan_layers, "n_critics": n_critics}
        super().__init__(
            observation_space, action_space, lr_schedule, n_critics=n_critics, optimizer_kwargs={"fused": True}
        )

    def make_actor(self, features_extractor: Any = None) -> GraphActor:  # type: ignore[override]
        """A new actor; it always has an encoder of its own."""
        return GraphActor(*self._spaces(), encoder=self._encoder).to(self.device)

    def make_critic(self, features_extractor: Any = None) -> GraphCritic:  # type: ignore[override]
        """New critics; they always have encoders of their own."""
        return GraphCritic(*self._spaces(), encoder=self._encoder, **self._critic).to(self.device)

    def _spaces(self) -> tuple[spaces.Dict, spaces.Box]:
        assert isinstance(self.observation_space, spaces.Dict)
        assert isinstance(self.action_space, spaces.Box)
        return self.observation_space, self.action_space


class GraphDDPG(DDPG):
    """`stable_baselines3.DDPG` for searches of a few hundred evaluations.

    - The first plan of a rollout is the actor's (in the first rollout: the start plan), the others add mirrored
      Gaussian noise to it (`agent.noise`); nothing is drawn uniformly from the box, where good plans are rare.
    - With ``candidates`` above 1, each noisy plan is the one that a critic ranks first among that many. The critic is
      drawn at random each time, so that where critics disagree plans get tried (Thompson sampling).
    - Rewards are standardised over the whole buffer when they are sampled.
    - The actor climbs the mean of the critics, once in ``policy_delay`` critic steps.

    Args:
        policy: `GraphDDPGPolicy`.
        env: the vectorised environment.
        std: spread of the noise at the start of the run, on the scale of actions.
        std_end: spread at its end; it falls geometrically.
        actor_learning_rate: Adam's step size for the actor; ``learning_rate`` is that of the critics.
        policy_delay: critic steps for each actor step.
        candidates: plans ranked before one is evaluated.
        episode_length: steps of an episode, 1 for a plan for the whole network.
        options: of `stable_baselines3.DDPG`; ``train_freq`` is the number of steps of a rollout.
    """

    policy: GraphDDPGPolicy
    replay_buffer: StandardisedReplayBuffer
    actor: GraphActor  # type: ignore[assignment]
    critic: GraphCritic  # type: ignore[assignment]

    def __init__(
        self,
        policy: Any,
        env: VecEnv,
        *,
        std: float,
        std_end: float,
        actor_learning_rate: float,
        policy_delay: int,
        candidates: int,
        episode_length: int,
        **options: Any,
    ) -> None:
        super().__init__(
            policy,
            env,
            replay_buffer_class=StandardisedReplayBuffer,
            replay_buffer_kwargs={"gamma": options["gamma"]},
            **options,
        )
        self.std_start, self.std_end = std, std_end
        self.actor_learning_rate = actor_learning_rate
        self.policy_delay = policy_delay
        self.candidates = candidates
        self.episode_length = episode_length
        self.std = std
        self._noise: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(self.seed or 0)

    def begin_rollout(self, remaining: float) -> None:
        """Set the spread and draw the noise of the next rollout; ``remaining`` is the share of the run to come."""
        assert isinstance(self.train_freq, TrainFreq)
        self.std = geometric(self.std_start, self.std_end, remaining)
        self._noise = rollout_noise(
            self.train_freq.frequency,
            self.episode_length,
            self.n_envs,
            get_action_dim(self.action_space),
            self._generator,
        )

    def extra_state(self) -> dict[str, Any]:
        """What the next rollout depends on besides the policy: replay buffer and generator of the noise."""
        return {"buffer": self.replay_buffer.state_dict(), "generator": self._generator.get_state()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Continue from `extra_state`."""
        self.replay_buffer.load_state_dict(state["buffer"])
        self._generator.set_state(state["generator"])

    def _sample_action(
        self, learning_starts: int, action_noise: Any = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        obs = cast("Observation", obs_as_tensor(self._last_obs, self.device))  # type: ignore[arg-type]
        noise = self._noise.pop(0)
        with torch.no_grad():
            plan = self.actor(obs)
            plans = self._explore(obs, plan, noise)
            if self.candidates > 1 and self.num_timesteps > learning_starts and bool(noise.any()):
                is_noisy = noise.to(plan.device).any(dim=1, keepdim=True)
                plans = torch.where(is_noisy, self._best_candidates(obs, plan, noise), plans)
        actions = plans.cpu().numpy()
        return actions, actions

    def _explore(self, obs: Observation, plan: Tensor, noise: Tensor) -> Tensor:
        """Plans ``(batch, D)`` around ``plan``, inside the box; padded decisions stay at 0."""
        mask = (obs["decision_mask"] > 0).to(plan.dtype)
        return (plan + self.std * noise.to(plan.device) * mask).clamp(-1, 1)

    def _best_candidates(self, obs: Observation, plan: Tensor, noise: Tensor) -> Tensor:
        """For each environment, the plan that one critic ranks first among ``noise``'s and new ones."""
        n_envs, n_decisions = plan.shape
        draws = torch.randn((self.candidates - 1, n_envs, n_decisions), generator=self._generator)
        plans = torch.stack([self._explore(obs, plan, draw) for draw in [noise, *draws]])
        rows = {key: value.repeat(self.candidates, *[1] * (value.dim() - 1)) for key, value in obs.items()}
        critic = self.critic.q_networks[int(torch.randint(len(self.critic.q_networks), (), generator=self._generator))]
        values = critic(rows, plans.flatten(0, 1)).view(self.candidates, n_envs)
        return plans[values.argmax(dim=0), torch.arange(n_envs)]

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """Fit the critics to replayed returns, and let the actor climb their mean."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.critic.optimizer)
        update_learning_rate(self.actor.optimizer, self.actor_learning_rate)
        critic_losses, actor_losses = [], []
        for _ in range(gradient_steps):
            self._n_updates += 1
            batch = self.replay_buffer.sample(batch_size)
            critic_losses.append(self._train_critics(batch))
            if self._n_updates % self.policy_delay == 0:
                actor_losses.append(self._train_actor(batch.observations))
                polyak_update(self.critic.parameters(), self.critic_target.parameters(), self.tau)
                polyak_update(self.actor.parameters(), self.actor_target.parameters(), self.tau)
        self.logger.record("train/std", self.std)
        self.logger.record("train/critic_loss", float(np.mean(critic_losses)))
        if actor_losses:
            self.logger.record("train/actor_loss", float(np.mean(actor_losses)))

    def targets(self, next_observations: Observation, returns: Tensor, dones: Tensor, discounts: Tensor) -> Tensor:
        """What the critics should say, ``(batch, 1)``: returns, and the value of what follows a truncated episode."""
        if bool((dones == 1).all()):
            return returns
        with torch.no_grad():
            following = torch.cat(self.critic_target(next_observations, self.actor_target(next_observations)), dim=1)
            return returns + (1 - dones) * discounts * following.min(dim=1, keepdim=True).values

    def _train_critics(self, batch: DictReplayBufferSamples) -> float:
        assert batch.discounts is not None
        targets = self.targets(batch.next_observations, batch.rewards, batch.dones, batch.discounts)
        values = self.critic(batch.observations, batch.actions)
        loss = torch.stack([nn.functional.mse_loss(value, targets) for value in values]).sum()
        _descend(self.critic.optimizer, loss)
        return loss.item()

    def _train_actor(self, observations: Observation) -> float:
        # A search for one network shows a single observation: one row says it all.
        rows = one_if_all_equal(observations)
        loss = -torch.stack(self.critic(rows, self.actor(rows))).mean()
        _descend(self.actor.optimizer, loss)
        return loss.item()


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
