"""Policies that read a network as a graph: no weight of theirs has a shape that depends on the network.

Stable-Baselines3 ties ``action_net`` and ``log_std`` to the size of the action. Here one head, shared by all
decisions, reads each decision's embedding, and one number is the spread of them all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn

from graph_encoder.encoders import Encoding, GraphEncoder, Observation


class DecisionFeatures(NamedTuple):
    """What the heads read.

    Attributes:
        decisions: embedding of each decision's node beside the network's, ``(batch, D, 2 * hidden)``.
        mask: 1 for a real decision, 0 for padding, ``(batch, D)``.
        network: ``(batch, hidden)``.
    """

    decisions: Tensor
    mask: Tensor
    network: Tensor


class GraphFeatures(BaseFeaturesExtractor):
    """Encodes the graph and collects what the heads read; trained end to end with them."""

    def __init__(self, observation_space: spaces.Dict, **encoder: Any) -> None:
        """Build a `GraphEncoder`; ``encoder`` holds its keyword arguments."""
        graph = GraphEncoder(observation_space, **encoder)
        super().__init__(observation_space, features_dim=graph.hidden)
        self.graph = graph

    def forward(self, observation: Observation) -> DecisionFeatures:
        """Features of every decision; those of padded ones are arbitrary and masked by the heads."""
        return self.collect(observation, self.graph(observation))

    def collect(self, observation: Observation, encoding: Encoding) -> DecisionFeatures:
        """Pick the decisions' embeddings out of an encoding."""
        nodes, network = encoding
        index = observation["decisions"].long().unsqueeze(-1).expand(-1, -1, nodes.shape[-1])
        chosen = nodes.gather(1, index)
        beside = network.unsqueeze(1).expand_as(chosen)
        mask = (observation["decision_mask"] > 0).to(nodes.dtype)
        return DecisionFeatures(torch.cat([chosen, beside], dim=-1), mask, network)


class DecisionHead(nn.Module):
    """One number a decision, from ``(batch, D, 2 * hidden)`` to ``(batch, D)``; zero for every input until trained."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * hidden, hidden)
        self.out = zero_linear(hidden)

    def forward(self, decisions: Tensor) -> Tensor:
        """Score every decision."""
        scores: Tensor = self.out(nn.functional.silu(self.hidden(decisions))).squeeze(-1)
        return scores


def zero_linear(in_features: int) -> nn.Linear:
    """A linear layer to one number that starts at zero."""
    layer = nn.Linear(in_features, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class PlanDistribution:
    """A Gaussian for every decision, with one spread for all.

    Log-probability and entropy are *means* over the real decisions, so the ratio that PPO clips is the geometric mean
    of the decisions' ratios, and a deeper network does not get smaller steps (length-normalised ratios: Zheng et al.
    2025, GSPO, arXiv:2507.18071, section 4.1).

    Args:
        mean: ``(batch, D)`` in ``[-1, 1]``.
        std: positive scalar.
        mask: 1 for a real decision, 0 for padding, ``(batch, D)``.
    """

    def __init__(self, mean: Tensor, std: Tensor, mask: Tensor) -> None:
        self.mean = mean * mask
        self.mask = mask
        self.normal = torch.distributions.Normal(self.mean, std.expand_as(mean), validate_args=False)

    def actions(self, noise: Tensor) -> Tensor:
        """Plans from standard normal ``noise`` ``(batch, D)``; 0 on padded decisions."""
        return self.mean + self.normal.stddev * noise * self.mask

    def log_prob(self, actions: Tensor) -> Tensor:
        """Mean log-density of the decisions of each plan ``(batch, D)``, ``(batch,)``."""
        # Of a padded action, which may be anything, not even the gradient may be.
        return self._mean(self.normal.log_prob(torch.where(self.mask > 0, actions, 0.0)))

    def entropy(self) -> Tensor:
        """Mean entropy of the decisions, in nats, ``(batch,)``."""
        return self._mean(self.normal.entropy())

    def _mean(self, values: Tensor) -> Tensor:
        kept = torch.where(self.mask > 0, values, 0.0)
        return kept.sum(dim=1) / self.mask.sum(dim=1).clamp(min=1)


class GraphActorCriticPolicy(ActorCriticPolicy):
    """Actor and critic of PPO over graphs, for one decision a step or for the plan of a whole network.

    Actor and critic have an encoder each. The actor's last layer starts at zero, so that the first plan is the start
    plan. The spread is set from outside (`set_std`), and so is the noise of a rollout, in :attr:`rollout_noise`:
    standard normal tensors ``(n_envs, D)``, used up one a step; drawn on the spot when there are none left.
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *,
        encoder: dict[str, Any],
        std: float,
        use_sde: bool = False,
    ) -> None:
        """Build the networks.

        Args:
            observation_space: graphs, see `GraphEncoder`.
            action_space: one score a decision, in ``[-1, 1]``.
            lr_schedule: from the share of the run that remains to Adam's step size.
            encoder: keyword arguments of `GraphEncoder`.
            std: spread of the first plans.
            use_sde: False; Stable-Baselines3 passes it to every policy.
        """
        self.rollout_noise: list[Tensor] = []
        self._initial_std = std
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=[],
            use_sde=use_sde,
            features_extractor_class=GraphFeatures,
            features_extractor_kwargs=encoder,
            share_features_extractor=False,
        )

    std: Tensor

    def _build(self, lr_schedule: Schedule) -> None:
        hidden = self.features_dim
        self.action_net = DecisionHead(hidden)
        self.value_net = nn.Sequential(  # type: ignore[assignment]
            nn.Linear(hidden, hidden), nn.SiLU(), zero_linear(hidden)
        )
        self.register_buffer("std", torch.tensor(self._initial_std))
        self.optimizer = self.optimizer_class(
            self.parameters(),
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )

    def set_std(self, std: float) -> None:
        """Set the spread of the plans."""
        self.std.fill_(std)

    def get_distribution(self, obs: PyTorchObs) -> PlanDistribution:  # type: ignore[override]
        """The plans that the actor would propose."""
        features = self.pi_features_extractor(obs)
        return PlanDistribution(torch.tanh(self.action_net(features.decisions)), self.std, features.mask)

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        """Value of each observation, ``(batch, 1)``."""
        values: Tensor = self.value_net(self.vf_features_extractor(obs).network)
        return values

    def forward(  # type: ignore[override]
        self, obs: PyTorchObs, deterministic: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Actions ``(batch, D)``, values ``(batch, 1)`` and log-probabilities ``(batch,)``."""
        distribution = self.get_distribution(obs)
        actions = self._choose(distribution, deterministic)
        return actions, self.predict_values(obs), distribution.log_prob(actions)

    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values ``(batch, 1)``, log-probabilities and entropies ``(batch,)`` of actions taken."""
        distribution = self.get_distribution(obs)
        return self.predict_values(obs), distribution.log_prob(actions), distribution.entropy()

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        return self._choose(self.get_distribution(observation), deterministic)

    def _choose(self, distribution: PlanDistribution, deterministic: bool) -> Tensor:
        if deterministic:
            return distribution.mean
        drawn = self.rollout_noise.pop(0) if self.rollout_noise else torch.randn_like(distribution.mean)
        return distribution.actions(drawn.to(distribution.mean.device))
