"""Between a search environment and Stable-Baselines3: what was evaluated, and rewards worth learning from."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import ArrayLike, NDArray
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

logger = logging.getLogger(__name__)

MOST_KNOWN = 100
"""Known plans in a row after which a search ends, for agents and the searches they are compared with alike.

Where one plan in ten is still new, so long a row has a chance of 3 in 100,000: what ends is a search whose few plans
are all scored, or one that has settled.
"""


@dataclass(frozen=True)
class Episode:
    """One plan that was scored.

    Attributes:
        actions: in ``[-1, 1]``, ``(steps, D)``.
        reward: its undiscounted return.
        evaluations: counted so far by the environment.
        info: the environment's, of the last step.
    """

    actions: NDArray[np.float32]
    reward: float
    evaluations: float
    info: Mapping[str, Any] = field(repr=False)


OnEpisode = Callable[[Episode], None]


class Ledger(VecEnvWrapper):
    """Keeps the books of a search: evaluations, episodes, the best plan.

    Reads ``info["evaluation"].evaluations_used`` and ``info["budget_spent"]`` of the environment's last steps.

    Attributes:
        rewards: return of every finished episode.
        best: the episode with the highest return, None before the first.
        is_spent: whether an environment has no evaluation left.
        known_in_a_row: plans since the last that counted as an evaluation.
    """

    def __init__(self, venv: VecEnv, on_episode: OnEpisode) -> None:
        """Open the books.

        Raises:
            ValueError: if environments of this process share an evaluator.
        """
        super().__init__(venv)
        _check_environments(venv)
        self.rewards: list[float] = []
        self.best: Episode | None = None
        self.is_spent = False
        self.known_in_a_row = 0
        self._on_episode = on_episode
        self._evaluations = [0.0] * venv.num_envs
        self._running: list[list[NDArray[np.float32]]] = [[] for _ in range(venv.num_envs)]
        self._returns = [0.0] * venv.num_envs
        self._actions: NDArray[np.float32] = np.zeros(0, np.float32)

    @property
    def evaluations(self) -> float:
        """Evaluations counted so far; of several environments, their sum."""
        return math.fsum(self._evaluations)

    @property
    def is_over(self) -> bool:
        """Whether the search ends: no evaluation is left, or no plan has been new for long."""
        return self.is_spent or self.known_in_a_row >= MOST_KNOWN

    def reset(self) -> VecEnvObs:
        """Start every environment's next episode."""
        return self.venv.reset()

    def step_async(self, actions: np.ndarray) -> None:
        """Note the actions and pass them on."""
        self._actions = actions
        self.venv.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """Step, and enter what ended in the books."""
        observations, rewards, dones, infos = self.venv.step_wait()
        for index, done in enumerate(dones):
            self._running[index].append(np.array(self._actions[index], np.float32))
            self._returns[index] += float(rewards[index])
            if done:
                self._enter(index, infos[index])
        return observations, rewards, dones, infos

    def _enter(self, index: int, info: dict[str, Any]) -> None:
        before, self._evaluations[index] = self._evaluations[index], float(info["evaluation"].evaluations_used)
        self.known_in_a_row = 0 if self._evaluations[index] > before else self.known_in_a_row + 1
        self.is_spent = self.is_spent or bool(info["budget_spent"])
        episode = Episode(np.stack(self._running[index]), self._returns[index], self.evaluations, info)
        self._running[index], self._returns[index] = [], 0.0
        self.rewards.append(episode.reward)
        if self.best is None or episode.reward > self.best.reward:
            self.best = episode
        self._on_episode(episode)

    def state_dict(self) -> dict[str, Any]:
        """The books, and the state of every environment below."""
        best = None if self.best is None else {"actions": self.best.actions, "reward": self.best.reward}
        return {
            "environments": self.env_method("state_dict"),
            "rewards": list(self.rewards),
            "best": best,
            "best_evaluations": 0.0 if self.best is None else self.best.evaluations,
            "evaluations": list(self._evaluations),
            "running": [[np.array(action) for action in actions] for actions in self._running],
            "returns": list(self._returns),
            "is_spent": self.is_spent,
            "known_in_a_row": self.known_in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Return to `state_dict`; the best episode comes back without its info."""
        for index, one in enumerate(state["environments"]):
            self.env_method("load_state_dict", one, indices=[index])
        self.rewards = list(state["rewards"])
        best = state["best"]
        self.best = best and Episode(best["actions"], best["reward"], state["best_evaluations"], {})
        self._evaluations = list(state["evaluations"])
        self._running = [list(actions) for actions in state["running"]]
        self._returns = list(state["returns"])
        self.is_spent = state["is_spent"]
        self.known_in_a_row = state["known_in_a_row"]


class StandardisedRewards(VecEnvWrapper):
    """Shows the agent rewards whose returns have mean about 0 and standard deviation about 1.

    A reward that ends an episode is centred, and all are divided by the scale. The centre is the first return until
    `update` is called, and the scale 1; from then on they are mean and standard deviation of all returns so far.
    They change between rollouts only, so that the plans of one rollout are compared on one scale.
    """

    def __init__(self, venv: Ledger) -> None:
        super().__init__(venv)
        self._ledger = venv
        self.centre: float | None = None
        self.scale = 1.0

    def reset(self) -> VecEnvObs:
        """Start every environment's next episode."""
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        """Step, and standardise."""
        observations, rewards, dones, infos = self.venv.step_wait()
        if self.centre is None and dones.any():
            self.centre = self._ledger.rewards[0]
        rewards = (rewards - (self.centre or 0.0) * dones) / self.scale
        return observations, rewards.astype(np.float32), dones, infos

    def update(self) -> None:
        """Take mean and standard deviation of the returns so far."""
        if len(self._ledger.rewards) > 1:
            self.centre = float(np.mean(self._ledger.rewards))
            self.scale = spread_or_one(self._ledger.rewards)


def tell_exhausted(env: gym.Env[Any, Any] | VecEnv, evaluations: float, n_evaluations: int, known: str = "") -> None:
    """Log that a search ended before its evaluations were spent.

    Args:
        env: that was searched in; ``is_rounded`` of it says whether its plans would be more without rounding.
        evaluations: spent.
        n_evaluations: granted.
        known: how little was new in the end; by default, that the last `MOST_KNOWN` plans were known.
    """
    venv = vectorised(env)
    is_rounded = venv.has_attr("is_rounded") and any(venv.get_attr("is_rounded"))
    logger.warning(
        "the search ends after %g of %d evaluations: %s. Few plans fit a budget in a small network%s",
        evaluations,
        n_evaluations,
        known or f"the last {MOST_KNOWN} plans it proposed were all known",
        " or with coarse rounding; a lower search.rounding makes more of them" if is_rounded else "",
    )


def _check_environments(venv: VecEnv) -> None:
    """Raise ValueError where evaluations would be counted wrongly.

    Environments that share an evaluator would each count its evaluations as their own; schedules and limits take an
    episode for one plan, and a plan for one evaluation.
    """
    for name in ("fidelity", "refinement_steps"):
        if venv.has_attr(name) and any(value != 1 for value in venv.get_attr(name)):
            msg = (
                f"an environment has {name} {venv.get_attr(name)[0]:g}: what is trained here takes an episode for one "
                f"plan, scored on all search images; leave {name} at 1, or write a training loop of your own"
            )
            raise ValueError(msg)
    # Environments in processes of their own share nothing.
    environments = venv.unwrapped.envs if isinstance(venv.unwrapped, DummyVecEnv) else []
    first: dict[int, int] = {}
    for index, environment in enumerate(environments):
        evaluator = getattr(environment.unwrapped, "evaluator", None)
        if evaluator is not None and first.setdefault(id(evaluator), index) != index:
            msg = (
                f"environments {first[id(evaluator)]} and {index} share one evaluator, whose evaluations would be "
                "counted twice; give each an evaluator of its own, with its share of the evaluations granted"
            )
            raise ValueError(msg)


def spread_or_one(returns: ArrayLike) -> float:
    """Standard deviation of returns, or 1 where they are equal but for rounding."""
    std = float(np.std(np.asarray(returns, dtype=np.float64)))
    return std if std > 1e-8 else 1.0


def vectorised(env: gym.Env[Any, Any] | VecEnv) -> VecEnv:
    """The environment as Stable-Baselines3 takes it, without the monitor it would add."""
    return env if isinstance(env, VecEnv) else DummyVecEnv([lambda: env])
