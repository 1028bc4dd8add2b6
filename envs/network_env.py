"""`secateur/NetworkCompression-v0`: one action is a plan for the whole network."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .action import counts_of
from .episode import CompressionEnv
from .evaluator import CandidateEvaluator
from .observation import Observation
from .space import SearchSpace


class NetworkEnv(CompressionEnv):
    """Choose how many units every channel group of a network keeps, all at once.

    **Action**: ``Box(-1, 1, (D,), float32)``, one score for each decision, in network order. Rows beyond the
    network's own ``n`` decisions are padding and are ignored; scores outside the box are clipped.

    | budget | what a score does |
    |---|---|
    | yes | moves the decision's place by up to ``span``; a common shift meets all budgets (`envs.action.project`) |
    | no | -1 keeps the least allowed, 1 keeps everything, plus the offset of the base plan |

    A place is a keep ratio, and for bits the share of their ladder (`SearchSpace.places`). The base plan is the search
    space's prior in the first step of an episode, and the plan as it stands in any refinement step. An action of zeros
    is the base plan.

    **Observation**: a flat ``Dict`` of float32 boxes. ``N`` nodes: the operators, then one node a decision.

    | key | shape | range | meaning |
    |---|---|---|---|
    | ``nodes`` | ``(N, F)`` | -10 to 10 | `graph_encoder.features.NODE_FEATURES`, no unit |
    | ``kinds`` | ``(N,)`` | index | kind of node, in `graph_encoder.network.KINDS` |
    | ``edges`` | ``(2, E)`` | index | source and target node |
    | ``edge_types`` | ``(E,)`` | index | in `graph_encoder.features.EDGE_TYPES` |
    | ``node_mask``, ``edge_mask`` | ``(N,)``, ``(E,)`` | 0 or 1 | 0 for padding |
    | ``decisions`` | ``(D,)`` | index | node of each decision |
    | ``decision_mask`` | ``(D,)`` | 0 or 1 | 0 for padding, and where there is one choice only |
    | ``globals`` | ``(G,)`` | -10 to 10 | `graph_encoder.features.GLOBAL_FEATURES`, no unit |

    **Reward**: ``reward(accuracy, cost, limit)`` of the plan after the first step; in refinement steps its change, so
    that the undiscounted return of an episode is the reward of its last plan.

    **Start**: the search space's start plan (nothing is scored yet). ``reset`` forgets the last episode. The only
    chance is whether measured features are shown, drawn from the environment's own generator.

    **End**: terminated after ``refinement_steps`` steps; never truncated.

    **info** of a step: ``accuracy`` (0 to 1), ``cost`` (in the first budget's unit), ``policy`` (group name to the
    units kept), ``kept_ratios`` (shape ``(n,)``), ``budget_spent`` (whether another evaluation would raise) and
    ``evaluation``, an `Evaluation` with ``cached``, ``seconds`` and ``evaluations_used``. These three depend on what
    was scored before, not on the episode, and so do not take part in its comparison.

    **Errors**: `EvaluationBudgetSpent` from a step that would go over the evaluator's limit, `EvaluateError` for a bad
    accuracy, `ValueError` for an action of the wrong shape or with NaN.

    **Versions**: v0, first.
    """

    def __init__(
        self, space: SearchSpace, evaluator: CandidateEvaluator, *, refinement_steps: int = 1, **options: Any
    ) -> None:
        """Set up the environment.

        Args:
            space: the decisions and the budget.
            evaluator: scores the plans.
            refinement_steps: actions an episode.
            options: of `CompressionEnv`.

        Raises:
            ValueError: if an argument is out of range.
        """
        if refinement_steps < 1:
            msg = f"refinement_steps is {refinement_steps}; an episode has at least 1 step"
            raise ValueError(msg)
        self.refinement_steps = refinement_steps
        super().__init__(space, evaluator, **options)

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Score the plan that ``action`` stands for."""
        if self._step >= self.refinement_steps:
            msg = f"the episode is over after {self.refinement_steps} steps; call reset()"
            raise RuntimeError(msg)
        self._counts = counts_of(self._own(action), self.space, self._base())
        reward, info = self._score()
        self._step += 1
        return self._observe(), reward, self._step >= self.refinement_steps, False, info

    def _base(self) -> NDArray[np.float64]:
        if self._step == 0:
            return self.space.prior
        places = self.space.places(self._counts)
        # Without a budget an action of 0 means the middle of the range, so the base is the distance from it.
        return places if self.space.bounds else places - self.space.middle

    def _own(self, action: NDArray[np.float32]) -> NDArray[np.float64]:
        """The scores of the network's own decisions."""
        array = np.asarray(action, dtype=np.float64)
        if array.shape != self.action_space.shape:
            msg = f"action has shape {array.shape}; this environment takes shape {self.action_space.shape}"
            raise ValueError(msg)
        return array[: self.space.n]

    def _stage(self) -> tuple[NDArray[np.bool_], NDArray[np.int64], float]:
        n = self.space.n
        is_over = self._step >= self.refinement_steps
        return np.full(n, is_over), np.arange(n), self._step / self.refinement_steps
