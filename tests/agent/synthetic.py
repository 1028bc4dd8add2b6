"""Small environments with the observation of a network search and an answer known in advance."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

CONV, ADD, GROUP = 1, 2, 3
FORWARD, BACKWARD, PRODUCES, PRODUCED_BY, CONSUMED_BY, CONSUMES = range(6)
N_FEATURES, N_GLOBALS = 6, 3


def chain_space(n_decisions: int, padding: int = 0, n_actions: int | None = None) -> spaces.Dict:
    """The space of :func:`chain_observation`."""
    nodes, edges = 2 * n_decisions + padding, 2 * (n_decisions - 1) + 4 * n_decisions + padding
    decisions = n_actions if n_actions is not None else n_decisions + padding

    def box(low: float, high: float, *shape: int) -> spaces.Box:
        return spaces.Box(low, high, shape, np.float32)

    return spaces.Dict(
        {
            "nodes": box(-10, 10, nodes, N_FEATURES),
            "kinds": box(0, GROUP, nodes),
            "edges": box(0, nodes - 1, 2, edges),
            "edge_types": box(0, CONSUMES, edges),
            "node_mask": box(0, 1, nodes),
            "edge_mask": box(0, 1, edges),
            "decisions": box(0, nodes - 1, decisions),
            "decision_mask": box(0, 1, decisions),
            "globals": box(-10, 10, N_GLOBALS),
        }
    )


def chain_observation(features: np.ndarray, padding: int = 0, garbage: float = 0.0) -> dict[str, np.ndarray]:
    """A chain of convolutions, one decision group on each.

    Args:
        features: one row a decision, ``(n, N_FEATURES)``, given to the convolution and its group.
        padding: extra nodes, edges and decisions, masked.
        garbage: value of every number of the padding.
    """
    n = len(features)
    conv, group = np.arange(n), n + np.arange(n)
    following = np.minimum(conv + 1, n - 1)
    pairs = [
        (conv[:-1], conv[1:], FORWARD),
        (conv[1:], conv[:-1], BACKWARD),
        (conv, group, PRODUCES),
        (group, conv, PRODUCED_BY),
        (group, following, CONSUMED_BY),
        (following, group, CONSUMES),
    ]
    edges = np.concatenate([np.stack([source, target]) for source, target, _ in pairs], axis=1)
    types = np.concatenate([np.full(len(source), kind) for source, _, kind in pairs])

    def pad(array: np.ndarray, value: float = garbage) -> np.ndarray:
        width = [(0, 0)] * (array.ndim - 1) + [(0, padding)]
        return np.pad(array.astype(np.float32), width, constant_values=value)

    return {
        "nodes": pad(np.concatenate([features, features]).T).T,
        "kinds": pad(np.repeat([CONV, GROUP], n), min(garbage, GROUP)),
        "edges": pad(edges),
        "edge_types": pad(types, min(garbage, CONSUMES)),
        "node_mask": pad(np.ones(2 * n), 0),
        "edge_mask": pad(np.ones(edges.shape[1]), 0),
        "decisions": pad(group),
        "decision_mask": pad(np.ones(n), 0),
        "globals": np.array([0.5, 0.5, 0.9], np.float32),
    }


class PlanEnv(gym.Env[dict[str, np.ndarray], np.ndarray]):
    """One action an episode for all decisions; a subclass says in :meth:`accuracy` what a plan is worth.

    The evaluation that uses up ``budget`` is flagged, and a step after it raises, as in the environments of a search.
    With ``padding`` there is room for more decisions than there are.
    """

    def __init__(
        self, features: np.ndarray, *, noise: float = 0.0, budget: int = 10**9, seed: int = 0, padding: int = 0
    ) -> None:
        super().__init__()
        self.n_decisions = len(features)
        self.observation = chain_observation(features, padding)
        self.observation_space = chain_space(self.n_decisions, padding)
        self.action_space = spaces.Box(-1, 1, (self.n_decisions + padding,), np.float32)
        self.noise = noise
        self.budget = budget
        self.evaluations = 0
        self.values: list[float] = []
        self.proposed: list[np.ndarray] = []
        self._noise_generator = np.random.default_rng(seed)

    def accuracy(self, action: np.ndarray) -> float:
        raise NotImplementedError

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        return dict(self.observation), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        if self.evaluations >= self.budget:
            msg = "the evaluation budget is spent"
            raise RuntimeError(msg)
        self.evaluations += 1
        value = self.accuracy(np.clip(action[: self.n_decisions], -1, 1).astype(np.float64))
        self.values.append(value)
        self.proposed.append(np.array(action))
        reward = value + self.noise * float(self._noise_generator.standard_normal())
        spent = self.evaluations >= self.budget
        info = {
            "evaluation": SimpleNamespace(evaluations_used=self.evaluations),
            "accuracy": reward,
            "budget_spent": spent,
            "kept_ratios": 0.5 + 0.5 * action,
        }
        return dict(self.observation), reward, True, False, info

    def state_dict(self) -> dict[str, Any]:
        return {"evaluations": self.evaluations, "noise": self._noise_generator.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.evaluations = state["evaluations"]
        self._noise_generator.bit_generator.state = state["noise"]


class TargetEnv(PlanEnv):
    """Reward ``-mean_i (a_i - target_i)^2``, the target a function of the node's features: best action known."""

    def __init__(self, n_decisions: int = 6, *, seed: int = 0, **options: Any) -> None:
        generator = np.random.default_rng(seed)
        features = generator.uniform(-1, 1, (n_decisions, N_FEATURES))
        self.target = 0.8 * np.tanh(1.5 * features[:, 0] - features[:, 1])
        super().__init__(features, seed=seed, **options)

    def accuracy(self, action: np.ndarray) -> float:
        return -float(np.mean((action - self.target) ** 2))


class FewPlansEnv(TargetEnv):
    """`TargetEnv` whose plans say up or down for each decision, so that there are but few; a known one is free."""

    def __init__(self, n_decisions: int = 2, *, lives: int = 10**9, is_rounded: bool = True, **options: Any) -> None:
        super().__init__(n_decisions, **options)
        self.is_rounded = is_rounded
        self.known: list[list[bool]] = []
        self.lives = lives

    def accuracy(self, action: np.ndarray) -> float:
        return super().accuracy(np.where(action > 0, 0.5, -0.5))

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        if self.lives == 0:
            raise KeyboardInterrupt
        self.lives -= 1
        stepped = super().step(action)
        plan = [bool(score > 0) for score in action]
        if plan in self.known:
            self.evaluations -= 1
        else:
            self.known.append(plan)
        stepped[-1]["evaluation"].evaluations_used = self.evaluations
        return stepped

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"known": [list(plan) for plan in self.known]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.known = [list(plan) for plan in state["known"]]


class LayerwiseTargetEnv(gym.Env[dict[str, np.ndarray], np.ndarray]):
    """`TargetEnv`, one decision a step: 0 until the last one, then the reward of the whole plan."""

    def __init__(self, n_decisions: int = 4, **options: Any) -> None:
        super().__init__()
        self.whole = TargetEnv(n_decisions, **options)
        self.n_decisions = n_decisions
        self.observation_space = chain_space(n_decisions, n_actions=1)
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)
        self.actions: list[float] = []

    def _observe(self) -> dict[str, np.ndarray]:
        index = min(len(self.actions), self.n_decisions - 1)
        observation = self.whole.observation
        return {
            **observation,
            "decisions": observation["decisions"][index : index + 1],
            "decision_mask": np.ones(1, np.float32),
        }

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        self.actions = []
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        self.actions.append(float(action[0]))
        if len(self.actions) < self.n_decisions:
            return self._observe(), 0.0, False, False, {}
        _, reward, terminated, truncated, info = self.whole.step(np.array(self.actions, np.float32))
        return self._observe(), reward, terminated, truncated, info

    def state_dict(self) -> dict[str, Any]:
        return {"actions": list(self.actions), "whole": self.whole.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.actions = list(state["actions"])
        self.whole.load_state_dict(state["whole"])
