"""`secateur/NetworkCompression-v0`: one action is a plan for the whole network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from .action import Counts, SearchSpace, counts_of
from .evaluator import CandidateEvaluator, Evaluation, Sensitivity
from .observation import Observation, Observer, Progress, Sizes
from .reward import RewardFunction, compute_reward, resolve_reward


class NetworkEnv(gymnasium.Env[Observation, NDArray[np.float32]]):
    """Choose how many units every channel group of a network keeps, all at once.

    **Action**: ``Box(-1, 1, (D,), float32)``, one score for each decision, in network order. Rows beyond the
    network's own ``n`` decisions are padding and are ignored; scores outside the box are clipped.

    | budget | what a score does |
    |---|---|
    | yes | moves the group's keep ratio by up to ``span``; a common shift meets the budget (`envs.action.project`) |
    | no | -1 keeps the least allowed, 1 keeps everything, plus the offset of the base plan |

    The base plan is the search space's prior in the first step of an episode, and the plan as it stands in any
    refinement step. An action of zeros is the base plan.

    **Observation**: a flat ``Dict`` of float32 boxes. ``N`` nodes: the operators, then one node a decision.

    | key | shape | range | meaning |
    |---|---|---|---|
    | ``nodes`` | ``(N, F)`` | -10 to 10 | `graph_encoder.features.NODE_FEATURES`, no unit |
    | ``kinds`` | ``(N,)`` | index | kind of node, in `graph_encoder.network.KINDS` |
    | ``edges`` | ``(2, E)`` | index | source and target node |
    | ``edge_types`` | ``(E,)`` | index | in `graph_encoder.features.EDGE_TYPES` |
    | ``node_mask``, ``edge_mask`` | ``(N,)``, ``(E,)`` | 0 or 1 | 0 for padding |
    | ``decisions`` | ``(D,)`` | index | node of each decision |
    | ``decision_mask`` | ``(D,)`` | 0 or 1 | 0 for padding |
    | ``globals`` | ``(G,)`` | -10 to 10 | `graph_encoder.features.GLOBAL_FEATURES`, no unit |

    **Reward**: ``reward(accuracy, cost, limit)`` of the plan after the first step; in refinement steps its change, so
    that the undiscounted return of an episode is the reward of its last plan.

    **Start**: the search space's start plan (nothing is scored yet). ``reset`` forgets the last episode. The only
    chance is whether measured features are shown, drawn from the environment's own generator.

    **End**: terminated after ``refinement_steps`` steps; never truncated.

    **info** of a step: ``accuracy`` (0 to 1), ``cost`` (in the budget's unit), ``policy`` (group name to the units
    kept), ``kept_ratios`` (shape ``(n,)``), ``budget_spent`` (whether another evaluation would raise) and
    ``evaluation``, an `Evaluation` with ``cached``, ``seconds`` and ``evaluations_used``. These three depend on what
    was scored before, not on the episode, and so do not take part in its comparison.

    **Errors**: `EvaluationBudgetSpent` from a step that would go over the evaluator's limit, `EvaluateError` for a bad
    accuracy, `ValueError` for an action of the wrong shape or with NaN.

    **Versions**: v0, first.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own attribute

    def __init__(
        self,
        space: SearchSpace,
        evaluator: CandidateEvaluator,
        *,
        reward: str | RewardFunction | None = None,
        refinement_steps: int = 1,
        sensitivity: Sensitivity | None = None,
        noise_floor: float = 0.01,
        measured_dropout: float = 0.0,
        fidelity: float = 1.0,
        sizes: Sizes | None = None,
    ) -> None:
        """Set up the environment.

        Args:
            space: the decisions and the budget.
            evaluator: scores the plans.
            reward: a name in `envs.reward.REWARDS` or a function; accuracy under a budget, else accuracy-guaranteed.
            refinement_steps: actions an episode.
            sensitivity: measured features to show.
            noise_floor: smallest loss of accuracy that counts, in ``(0, 1)``.
            measured_dropout: probability that an episode does not show the measured features.
            fidelity: share of the search images that plans are scored on.
            sizes: room to leave in observation and action; what the network needs if not given.

        Raises:
            ValueError: if an argument is out of range.
        """
        if refinement_steps < 1:
            msg = f"refinement_steps is {refinement_steps}; an episode has at least 1 step"
            raise ValueError(msg)
        self.space, self.evaluator = space, evaluator
        self.refinement_steps, self.measured_dropout, self.fidelity = refinement_steps, measured_dropout, fidelity
        self._reward = resolve_reward(reward, space.limit)
        self._observer = Observer(space, evaluator.model, sensitivity=sensitivity, noise_floor=noise_floor, sizes=sizes)
        self.observation_space = cast("spaces.Space[Observation]", self._observer.observation_space)
        self.action_space = spaces.Box(-1, 1, (self._observer.sizes.decisions,), dtype=np.float32)
        self._counts: Counts = space.start
        self._step = 0
        self._last_accuracy = self._last_reward = 0.0
        self._show_measured = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Return to the start plan; ``options`` are not used."""
        super().reset(seed=seed)
        self._counts = self.space.start
        self._step = 0
        self._last_accuracy = self._last_reward = 0.0
        self._show_measured = bool(self.np_random.random() >= self.measured_dropout)
        return self._observe(), {}

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Score the plan that ``action`` stands for."""
        self._counts = counts_of(self._own(action), self.space, self._base())
        policy = self.space.policy(self._counts)
        evaluation = self.evaluator.score(policy, fidelity=self.fidelity)
        worth = compute_reward(self._reward, evaluation.accuracy, evaluation.cost, self.space.limit)
        reward = worth - self._last_reward
        self._step += 1
        self._last_accuracy, self._last_reward = evaluation.accuracy, worth
        info = step_info(self.space, self._counts, evaluation, self.evaluator.is_spent(self.fidelity))
        return self._observe(), reward, self._step >= self.refinement_steps, False, info

    def state_dict(self) -> dict[str, Any]:
        """The episode as it stands, in plain values; the evaluator has a state of its own."""
        return {
            "counts": self._counts.tolist(),
            "step": self._step,
            "last_accuracy": self._last_accuracy,
            "last_reward": self._last_reward,
            "show_measured": self._show_measured,
            "generator": self.np_random.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the episode that `state_dict` described."""
        self._counts = np.array(state["counts"], dtype=np.int64)
        self._step = int(state["step"])
        self._last_accuracy, self._last_reward = float(state["last_accuracy"]), float(state["last_reward"])
        self._show_measured = bool(state["show_measured"])
        self.np_random.bit_generator.state = state["generator"]

    def _base(self) -> NDArray[np.float64]:
        if self._step == 0:
            return self.space.prior
        ratios = self._counts / self.space.sizes
        # Without a budget an action of 0 means the middle of the range, so the base is the distance from it.
        return ratios if self.space.limit is not None else ratios - (1 + self.space.min_keep_ratio) / 2

    def _own(self, action: NDArray[np.float32]) -> NDArray[np.float64]:
        """The scores of the network's own decisions."""
        array = np.asarray(action, dtype=np.float64)
        if array.shape != self.action_space.shape:
            msg = f"action has shape {array.shape}; this environment takes shape {self.action_space.shape}"
            raise ValueError(msg)
        return array[: self.space.n]

    def _observe(self) -> Observation:
        n = self.space.n
        progress = Progress(
            counts=self._counts,
            decided=np.full(n, self._step >= self.refinement_steps),
            decisions=np.arange(n),
            dense_accuracy=self.evaluator.dense_accuracy(self.fidelity),
            last_accuracy=self._last_accuracy,
            progress=self._step / self.refinement_steps,
        )
        return self._observer.observe(progress, show_measured=self._show_measured)


def step_info(space: SearchSpace, counts: Counts, evaluation: Evaluation, budget_spent: bool) -> dict[str, Any]:
    """What a scored step tells besides the reward; every value is newly made."""
    return {
        "accuracy": evaluation.accuracy,
        "cost": evaluation.cost,
        "policy": {name: list(units) for name, units in space.policy(counts).kept.items()},
        "kept_ratios": counts / space.sizes,
        "budget_spent": budget_spent,
        "evaluation": evaluation,
    }
