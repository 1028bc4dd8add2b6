"""A critic over graphs: what a plan for a network is worth."""

from __future__ import annotations

from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from graph_encoder.encoders import Observation, TypedMessagePassing, vocabulary_size

from .policies import GraphFeatures, zero_linear

ACTION_SCALE = 0.3
"""Divides the actions that the critic reads, so that the usual spread of plans has a spread of about one."""


class PlanValue(nn.Module):
    """Value of a plan: the graph is encoded, the plan is written onto its decision nodes, and read off node by node.

    The value is a sum over decisions. Each reads its own action, its distance from the mean action (a budget makes a
    common shift of all actions void) and, over ``plan_layers`` rounds of messages, what was decided around it. The
    graph itself is encoded without the plan, and so once for a whole batch of plans of one network.

    Shapes:
        - **input:** observations of ``batch`` graphs, actions ``(batch, D)``
        - **output:** ``(batch, 1)``

    Args:
        observation_space: graphs, see `GraphEncoder`.
        encoder: keyword arguments of `GraphEncoder`.
        plan_hidden: width of what is computed for each plan anew.
        plan_layers: rounds of messages after the plan is written; 0 leaves the decisions to themselves.
    """

    def __init__(
        self, observation_space: spaces.Dict, *, encoder: dict[str, Any], plan_hidden: int, plan_layers: int
    ) -> None:
        super().__init__()
        self.features = GraphFeatures(observation_space, **encoder)
        hidden = self.features.features_dim
        self.action = nn.Linear(2, plan_hidden)
        self.modulation = nn.Linear(2 * hidden, 2 * plan_hidden)
        self.read = nn.Sequential(nn.Linear(plan_hidden, plan_hidden), nn.SiLU(), zero_linear(plan_hidden))
        self.network = zero_linear(hidden)
        self.plan_layers = plan_layers
        if plan_layers:
            self.nodes = nn.Linear(hidden, plan_hidden)
            n_edge_types = vocabulary_size(observation_space, "edge_types")
            self.messages = TypedMessagePassing(plan_hidden, plan_layers, n_edge_types)

    def forward(self, observation: Observation, actions: Tensor) -> Tensor:
        """Value each plan of the batch."""
        encoding = self.features.graph(observation)
        features = self.features.collect(observation, encoding)
        plan = self._write(features.decisions, features.mask, actions)
        if self.plan_layers:
            plan = self._pass_on(plan, encoding.nodes, observation)
        count = features.mask.sum(dim=1, keepdim=True).clamp(min=1)
        values = self.read(plan).squeeze(-1) * features.mask
        total: Tensor = values.sum(dim=1, keepdim=True) / count.sqrt() + self.network(features.network)
        return total

    def _write(self, decisions: Tensor, mask: Tensor, actions: Tensor) -> Tensor:
        # A padded action may be anything, NaN included.
        actions = torch.where(mask > 0, actions, 0.0) / ACTION_SCALE
        mean = actions.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        scale, shift = self.modulation(decisions).chunk(2, dim=-1)
        written = self.action(torch.stack([actions, actions - mean], dim=-1))
        plan: Tensor = nn.functional.silu(written * (1 + scale) + shift) * mask.unsqueeze(-1)
        return plan

    def _pass_on(self, plan: Tensor, nodes: Tensor, observation: Observation) -> Tensor:
        index = observation["decisions"].long().unsqueeze(-1).expand_as(plan)
        x = self.nodes(nodes).scatter_add(1, index, plan)
        x = self.messages(x, observation["edges"], observation["edge_types"], observation["edge_mask"])
        around: Tensor = x.gather(1, index)
        return plan + around
