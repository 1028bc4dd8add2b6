"""What a plan is worth: functions of accuracy, cost and budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from graph_encoder.errors import SecateurError

RewardFunction = Callable[[float, int, int | None], float]
"""``reward(accuracy in [0, 1], cost, most allowed cost or None) -> float``."""

GALEN = "galen"
GALEN_BETA = -1.0


class RewardError(SecateurError, ValueError):
    """A reward function that fails, or returns no finite number; the message names it."""


def accuracy_reward(accuracy: float, cost: int, limit: int | None) -> float:
    """The accuracy itself: the budget is met by construction, so cost need not be weighed."""
    return accuracy


def accuracy_guaranteed_reward(accuracy: float, cost: int, limit: int | None) -> float:
    """``-(1 - accuracy) * log(cost)``, for a search without a budget.

    Any error counts more than any saving, so the search removes what costs no accuracy: "accuracy-guaranteed
    compression" of He et al. 2018 (AMC), whose FLOPs are multiply-adds.
    """
    return -(1 - accuracy) * math.log(cost)


@dataclass(frozen=True)
class GalenReward:
    """``accuracy + beta * abs(cost / target - 1)``, for a search without a budget (Krieger et al. 2023, Galen).

    ``target`` is ``c * T_ref`` there: a share of what the dense network costs. A plan is drawn to the target from both
    sides, and none is held to it.

    Attributes:
        target: cost aimed at, in the unit of the cost.
        beta: what missing the target by its own size is worth, below 0, as a share of the images: at -1 a cost that is
            one percent off weighs as much as one point of accuracy.
    """

    target: int
    beta: float = GALEN_BETA

    def __post_init__(self) -> None:
        if not (self.target > 0 and self.beta < 0 and math.isfinite(self.beta)):
            msg = f"the reward '{GALEN}' has target {self.target} and beta {self.beta}; they must lie above and below 0"
            raise ValueError(msg)

    def __call__(self, accuracy: float, cost: int, limit: int | None) -> float:
        """Reward of a plan; ``limit`` is not looked at."""
        return accuracy + self.beta * abs(cost / self.target - 1)


REWARDS: dict[str, RewardFunction] = {
    "accuracy": accuracy_reward,
    "accuracy_guaranteed": accuracy_guaranteed_reward,
}


def resolve_reward(
    reward: str | RewardFunction | None, limit: int | None, *, target: int | None = None, beta: float = GALEN_BETA
) -> RewardFunction:
    """The function meant by a name, a function or nothing (accuracy under a budget, else accuracy-guaranteed).

    Args:
        reward: name or function.
        limit: most that a plan may cost, None without a budget.
        target: cost that the reward ``galen`` aims at.
        beta: its slope.

    Raises:
        ValueError: if the name is unknown, or ``galen`` has a budget or no target.
    """
    if callable(reward):
        return reward
    if reward == GALEN:
        if target is None or limit is not None:
            msg = (
                f"the reward '{GALEN}' aims at a target cost and takes no budget; found "
                f"{'no target' if target is None else 'a budget'}: pass a target such as '20% latency', and budget none"
            )
            raise ValueError(msg)
        return GalenReward(target, beta)
    name = reward or ("accuracy" if limit is not None else "accuracy_guaranteed")
    if name not in REWARDS:
        msg = (
            f"reward '{name}' is unknown; pass one of {sorted([*REWARDS, GALEN])} or a function "
            "(accuracy, cost, limit) -> float"
        )
        raise ValueError(msg)
    return REWARDS[name]


def compute_reward(reward: RewardFunction, accuracy: float, cost: int, limit: int | None) -> float:
    """Call ``reward`` and check what it returns.

    Raises:
        RewardError: if it fails, or that is not a finite number.
    """
    name = getattr(reward, "__name__", reward)
    try:
        value = reward(accuracy, cost, limit)
    except RewardError:  # it has told itself
        raise
    except Exception as error:
        msg = (
            f"the reward function '{name}' failed for accuracy {accuracy} and cost {cost} with "
            f"{type(error).__name__}: {error}"
        )
        raise RewardError(msg) from error
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)) or not math.isfinite(value):
        msg = (
            f"the reward function '{name}' returned {value!r} ({type(value).__name__}) "
            f"for accuracy {accuracy} and cost {cost}; it must return a finite float"
        )
        raise RewardError(msg)
    return float(value)
