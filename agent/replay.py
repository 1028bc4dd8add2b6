"""A replay buffer for rewards that differ by a hundredth."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples

from .search_env import spread_or_one

_ARRAYS = ("actions", "rewards", "dones", "timeouts")


class StandardisedReplayBuffer(DictReplayBuffer):
    """`DictReplayBuffer` whose samples carry standardised returns.

    A sample's reward is what its episode earns from there to its end (``n``-step returns with ``n`` as far as the
    episode goes; Sutton and Barto 2018, section 7.1), and its next observation is the last one: nothing has to be
    bootstrapped over the steps in which a plan earns nothing yet, unless the episode was truncated.

    Rewards are divided by the standard deviation of the returns stored, and those that end an episode are centred on
    the mean return first, so every episode's return is shifted by the same amount. Accuracies of 0.75 to 0.80
    would else have the critic spend its training on the constant.

    Args:
        gamma: discount a step.
        options: of `stable_baselines3.common.buffers.DictReplayBuffer`.
    """

    def __init__(self, *arguments: Any, gamma: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.gamma = gamma

    def _get_samples(  # type: ignore[override]
        self, batch_inds: np.ndarray, env: Any = None
    ) -> DictReplayBufferSamples:
        # Stable-Baselines3 draws batches from the global generator, whose state is part of a checkpoint.
        envs = np.random.randint(0, high=self.n_envs, size=len(batch_inds))  # noqa: NPY002
        mean, std = self.reward_statistics()
        ends, returns, steps = batch_inds.copy(), np.zeros(len(batch_inds)), np.zeros(len(batch_inds))
        goes_on = np.ones(len(batch_inds), dtype=bool)
        while goes_on.any():
            at, where = ends[goes_on], envs[goes_on]
            is_last = self.dones[at, where] * (1 - self.timeouts[at, where])
            returns[goes_on] += self.gamma ** steps[goes_on] * (self.rewards[at, where] - mean * is_last) / std
            steps[goes_on] += 1
            # An episode that is still being played goes as far as it is stored.
            goes_on[goes_on] = (self.dones[at, where] == 0) & ((at + 1) % self.buffer_size != self.pos)
            ends[goes_on] = (ends[goes_on] + 1) % self.buffer_size
        column: dict[str, Any] = {
            "dones": self.dones[ends, envs] * (1 - self.timeouts[ends, envs]),
            "rewards": returns,
            "discounts": self.gamma**steps,
        }
        return DictReplayBufferSamples(
            observations={key: self.to_torch(rows[batch_inds, envs]) for key, rows in self.observations.items()},
            actions=self.to_torch(self.actions[batch_inds, envs]),
            next_observations={key: self.to_torch(rows[ends, envs]) for key, rows in self.next_observations.items()},
            **{name: self.to_torch(values.astype(np.float32)).reshape(-1, 1) for name, values in column.items()},
        )

    def reward_statistics(self) -> tuple[float, float]:
        """Mean and standard deviation of the returns of the episodes stored; the deviation is 1 where there is none."""
        # Oldest first; the oldest episode may have lost its first steps, and its return then lacks what they earned:
        # nothing, unless plans are refined in several steps.
        order = np.roll(np.arange(self.size()), -self.pos if self.full else 0)
        returns: list[float] = []
        for rewards, dones in zip(self.rewards[order].T.astype(np.float64), self.dones[order].T, strict=True):
            ends = np.flatnonzero(dones > 0)
            if len(ends):
                starts = np.concatenate([[0], ends[:-1] + 1])
                returns.extend(np.add.reduceat(rewards[: ends[-1] + 1], starts))
        return (float(np.mean(returns)), spread_or_one(returns)) if returns else (0.0, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Everything stored, without the empty room."""
        size = self.size()
        state: dict[str, Any] = {name: getattr(self, name)[:size].copy() for name in _ARRAYS}
        state["observations"] = {key: _packed(rows[:size]) for key, rows in self.observations.items()}
        state["next_observations"] = {key: _packed(rows[:size]) for key, rows in self.next_observations.items()}
        return state | {"position": self.pos, "full": self.full}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to `state_dict`."""
        size = len(state["rewards"])
        for name in _ARRAYS:
            getattr(self, name)[:size] = state[name]
        for name in ("observations", "next_observations"):
            for key, rows in getattr(self, name).items():
                rows[:size] = state[name][key]
        self.pos, self.full = state["position"], state["full"]


def _packed(rows: np.ndarray) -> np.ndarray:
    """One row if all are equal (they broadcast back): a graph that stays the same is saved once."""
    return rows[:1].copy() if len(rows) and (rows == rows[:1]).all() else rows.copy()


def affordable_size(wanted: int, observation_space: spaces.Dict, n_decisions: int, max_bytes: int) -> int:
    """Transitions, at most ``wanted``, that a buffer of ``max_bytes`` holds; at least 1."""
    observation = sum(int(np.prod(box.shape or ())) for box in observation_space.values())
    per_transition = 4 * (2 * observation + n_decisions + 3)
    return max(1, min(wanted, max_bytes // per_transition))
