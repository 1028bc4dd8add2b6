"""How a search's evaluations are divided into rollouts and batches."""

from __future__ import annotations


def rollout_size(n_evaluations: int, wanted: int) -> int:
    """Evaluations of a rollout, near ``wanted``, that fill the budget but for one last evaluation or more.

    Stable-Baselines3 learns from full rollouts only, so what is left over when the budget ends is never learned from;
    but one evaluation should be left, for the plan after the last update.

    Returns:
        Of the sizes between 3/4 and 5/4 of ``wanted`` the one that leaves least over, and of equals the nearest to
        ``wanted``; half of the budget where it does not hold two rollouts of the smallest; at least 2.
    """
    sizes = range(max(2, wanted * 3 // 4), max(2, wanted * 5 // 4) + 1)
    usable = n_evaluations - 1
    if usable < 2 * sizes[0]:
        return max(2, usable // 2)
    return min(sizes, key=lambda size: (usable % size, abs(size - wanted)))
