"""Searches without learning, over plans for a whole network: what an agent has to beat.

Each takes the environment of a whole-network search, proposes plans until its evaluations are spent, and is a function
of its seed and of the rewards: run again on the same journal, it proposes the same plans, and so continues.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from .search_env import MOST_KNOWN, Episode, tell_exhausted


@dataclass(frozen=True)
class BaselineResult:
    """What a search without learning came to.

    Attributes:
        rewards: of every plan, in order.
        best: the plan with the highest reward.
    """

    rewards: tuple[float, ...]
    best: Episode


class Scorer:
    """Scores plans with the environment until it has no evaluation left, or no plan has been new for long.

    Attributes:
        episodes: plans scored so far.
        is_spent: whether the environment has no evaluation left.
        known_in_a_row: plans since the last that counted as an evaluation.
    """

    def __init__(self, env: gym.Env[Any, Any], most_plans: int) -> None:
        self.episodes: list[Episode] = []
        self.is_spent = False
        self.known_in_a_row = 0
        self._env = env
        self._most_plans = most_plans

    @property
    def evaluations(self) -> float:
        """Evaluations counted so far."""
        return self.episodes[-1].evaluations if self.episodes else 0.0

    @property
    def goes_on(self) -> bool:
        """Whether another plan may be scored."""
        return not (self.is_spent or self.known_in_a_row >= MOST_KNOWN or len(self.episodes) >= self._most_plans)

    def score(self, plans: NDArray[np.float64]) -> NDArray[np.float64]:
        """Rewards of the plans ``(k, D)``, ``(k,)``; of fewer if the search ends within."""
        rewards = []
        for plan in plans:
            if not self.goes_on:
                break
            rewards.append(self._score(plan.astype(np.float32)))
        return np.array(rewards)

    def _score(self, action: NDArray[np.float32]) -> float:
        self._env.reset()
        _, reward, terminated, truncated, info = self._env.step(action)
        if not (terminated or truncated):
            msg = "the episode went on after one plan; a baseline takes the whole-network environment, one step long"
            raise ValueError(msg)
        self.is_spent = bool(info["budget_spent"])
        evaluations = float(info["evaluation"].evaluations_used)
        self.known_in_a_row = 0 if evaluations > self.evaluations else self.known_in_a_row + 1
        self.episodes.append(Episode(action[None], float(reward), evaluations, info))
        return float(reward)


Baseline = Literal["random", "cem"]


def run_baseline(
    baseline: Baseline,
    env: gym.Env[Any, Any],
    *,
    n_evaluations: int,
    seed: int,
) -> BaselineResult:
    """Search until the environment's evaluations are spent.

    Args:
        baseline: "random" is `random_search`, "cem" is `cross_entropy`.
        env: one step an episode, one score a decision in ``[-1, 1]``, zeros the start plan; ``info["budget_spent"]``
            and ``info["evaluation"].evaluations_used`` as for agents.
        n_evaluations: evaluations granted; a search that proposes known plans over and over, which are free, ends
            after `MOST_KNOWN` of them in a row, or four times as many plans as evaluations were granted.
        seed: of the search.

    Raises:
        ValueError: if an episode is longer than one step, or no evaluation is granted.
    """
    space = cast("spaces.Box", env.action_space)
    n_decisions = int(np.prod(space.shape))
    if n_evaluations < 1:
        msg = f"{n_evaluations} evaluations are granted; a search takes at least 1"
        raise ValueError(msg)
    scorer = Scorer(env, 4 * n_evaluations)
    env.reset(seed=seed)
    generator = np.random.default_rng(seed)
    search = cross_entropy if baseline == "cem" else random_search
    search(scorer, n_decisions, generator)
    if scorer.known_in_a_row >= MOST_KNOWN:
        tell_exhausted(env, scorer.evaluations, n_evaluations)
    elif not scorer.is_spent and scorer.evaluations < n_evaluations:
        known = f"most of the {len(scorer.episodes)} plans were known before"
        tell_exhausted(env, scorer.evaluations, n_evaluations, known)
    best = max(scorer.episodes, key=lambda episode: episode.reward)
    return BaselineResult(rewards=tuple(episode.reward for episode in scorer.episodes), best=best)


def random_search(scorer: Scorer, n_decisions: int, generator: np.random.Generator, *, std: float = 0.3) -> None:
    """Score the start plan, and then Gaussian plans around it.

    Args:
        scorer: ends the search.
        n_decisions: scores a plan.
        generator: of the plans.
        std: spread around the start plan, on the scale of actions.
    """
    scorer.score(np.zeros((1, n_decisions)))
    while scorer.goes_on:
        scorer.score(np.clip(std * generator.standard_normal((1, n_decisions)), -1, 1))


def cross_entropy(
    scorer: Scorer,
    n_decisions: int,
    generator: np.random.Generator,
    *,
    population: int = 21,
    n_elite: int = 6,
    std: float = 0.4,
    mean_step: float = 0.9,
    std_step: float = 0.2,
) -> None:
    """Cross-entropy method with a diagonal Gaussian (de Boer et al. 2005, section 3.2, with smoothing).

    It starts at the start plan. The first plan of a generation is the Gaussian's mean, the others mirrored pairs.

    Args:
        scorer: ends the search.
        n_decisions: scores a plan.
        generator: of the plans.
        population: plans a generation, odd for whole pairs.
        n_elite: best plans of a generation, whose mean and standard deviation the Gaussian moves to.
        std: its spread at the start, on the scale of actions.
        mean_step: share of the way that its mean moves, in ``(0, 1]``.
        std_step: share of the way that its spread moves; small, since so few elites underestimate it.
    """
    mean, spread = np.zeros(n_decisions), np.full(n_decisions, std)
    while scorer.goes_on:
        half = generator.standard_normal((population // 2, n_decisions))
        noise = np.concatenate([np.zeros((1, n_decisions)), half, -half])
        plans = np.clip(mean + spread * noise, -1, 1)
        rewards = scorer.score(plans)
        if len(rewards) < len(plans):
            break
        elite = plans[np.argsort(-rewards, kind="stable")[:n_elite]]
        mean = mean + mean_step * (elite.mean(axis=0) - mean)
        spread = spread + std_step * (elite.std(axis=0) - spread)
