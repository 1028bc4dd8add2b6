"""What a plan is worth: functions of accuracy, cost and budget."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

RewardFunction = Callable[[float, int, int | None], float]
"""``reward(accuracy in [0, 1], cost, most allowed cost or None) -> float``."""


def accuracy_reward(accuracy: float, cost: int, limit: int | None) -> float:
    """The accuracy itself: the budget is met by construction, so cost need not be weighed."""
    return accuracy


def accuracy_guaranteed_reward(accuracy: float, cost: int, limit: int | None) -> float:
    """``-(1 - accuracy) * log(cost)``, for a search without a budget.

    Any error counts more than any saving, so the search removes what costs no accuracy: "accuracy-guaranteed
    compression" of He et al. 2018 (AMC), whose FLOPs are multiply-adds.
    """
    return -(1 - accuracy) * math.log(cost)


REWARDS: dict[str, RewardFunction] = {
    "accuracy": accuracy_reward,
    "accuracy_guaranteed": accuracy_guaranteed_reward,
}


def resolve_reward(reward: str | RewardFunction | None, limit: int | None) -> RewardFunction:
    """The function meant by a name, a function or nothing (accuracy under a budget, else accuracy-guaranteed).

    Raises:
        ValueError: if the name is unknown.
    """
    if callable(reward):
        return reward
    name = reward or ("accuracy" if limit is not None else "accuracy_guaranteed")
    if name not in REWARDS:
        msg = (
            f"reward '{name}' is unknown; pass one of {sorted(REWARDS)} or a function (accuracy, cost, limit) -> float"
        )
        raise ValueError(msg)
    return REWARDS[name]


def compute_reward(reward: RewardFunction, accuracy: float, cost: int, limit: int | None) -> float:
    """Call ``reward`` and check what it returns.

    Raises:
        ValueError: if it is not a finite number.
    """
    value = reward(accuracy, cost, limit)
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)) or not math.isfinite(value):
        msg = (
            f"the reward function returned {value!r} ({type(value).__name__}) for accuracy {accuracy} and cost {cost}; "
            "it must return a finite float"
        )
        raise ValueError(msg)
    return float(value)
