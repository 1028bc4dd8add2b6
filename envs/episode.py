"""What the two environments share: a network, its evaluator, and an episode that can be saved and continued."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from .action import start_plan
from .evaluator import CandidateEvaluator, Sensitivity
from .observation import Observation, Observer, Progress, Sizes
from .reward import RewardFunction, compute_reward, resolve_reward
from .space import Counts, SearchSpace


class CompressionEnv(gymnasium.Env[Observation, NDArray[np.float32]]):
    """Base of `NetworkEnv` and `LayerwiseEnv`, which say what a step decides."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own attribute
    one_decision: ClassVar[bool] = False
    """Whether a step decides one group, or all of them."""
    _counts: Counts
    _start: Counts

    def __init__(
        self,
        space: SearchSpace,
        evaluator: CandidateEvaluator,
        *,
        reward: str | RewardFunction | None = None,
        sensitivity: Sensitivity | None = None,
        noise_floor: float = 0.01,
        measured_dropout: float = 0.0,
        fidelity: float = 1.0,
        sizes: Sizes | None = None,
        render_mode: str | None = None,
    ) -> None:
        """Set up the environment.

        Args:
            space: the decisions and the budget.
            evaluator: scores the plans.
            reward: a name in `envs.reward.REWARDS` or a function; accuracy under a budget, else accuracy-guaranteed.
            sensitivity: measured features to show, at any of the keep ratios `SENSITIVITY_KEEP_RATIOS`: each has
                columns of its own, which with their presence flags stay 0 where it was not measured.
            noise_floor: smallest loss of accuracy that counts, in ``(0, 1)``, of decisions that were scored.
            measured_dropout: probability that an episode does not show the measured features.
            fidelity: share of the search images that plans are scored on.
            sizes: room to leave in observation and action; what the network needs if not given.
            render_mode: none; there is nothing to see but what the report shows.

        Raises:
            ValueError: if an argument is out of range.
        """
        if render_mode is not None:
            msg = f"render_mode is '{render_mode}'; the environment draws nothing, so leave it out"
            raise ValueError(msg)
        self.render_mode = None
        self.space, self.evaluator = space, evaluator
        self.measured_dropout, self.fidelity = measured_dropout, fidelity
        self._reward = resolve_reward(reward, space.limit)
        self._observer = Observer(
            space,
            evaluator.model,
            sensitivity=sensitivity,
            noise_floor=noise_floor,
            sizes=sizes,
            one_decision=self.one_decision,
        )
        self.observation_space = cast("spaces.Space[Observation]", self._observer.observation_space)
        self.action_space = spaces.Box(
            -1, 1, (1 if self.one_decision else self._observer.sizes.decisions,), dtype=np.float32
        )
        self._start = start_plan(space)
        self._begin()

    @property
    def is_rounded(self) -> bool:
        """Whether plans round the units of a group, so that there would be more without."""
        return self.space.is_rounded

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Return to the start plan; ``options`` are not used."""
        super().reset(seed=seed)
        self._begin()
        self._show_measured = bool(self.np_random.random() >= self.measured_dropout)
        return self._observe(), {}

    def state_dict(self) -> dict[str, Any]:
        """The episode and the evaluator as they stand, in plain values."""
        return {
            "evaluator": self.evaluator.state_dict(),
            "counts": self._counts.tolist(),
            "step": self._step,
            "last_accuracy": self._last_accuracy,
            "last_worth": self._last_worth,
            "show_measured": self._show_measured,
            "generator": self.np_random.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the episode that `state_dict` described, with an evaluator on the same journal.

        Raises:
            ReplayError: if the journal lacks evaluations that had been made by then.
        """
        self.evaluator.load_state_dict(state["evaluator"])
        self._counts = np.array(state["counts"], dtype=np.int64)
        self._step = int(state["step"])
        self._last_accuracy, self._last_worth = float(state["last_accuracy"]), float(state["last_worth"])
        self._show_measured = bool(state["show_measured"])
        self.np_random.bit_generator.state = state["generator"]

    def _begin(self) -> None:
        self._counts = self._start.copy()
        self._step = 0
        self._last_accuracy = self._last_worth = 0.0
        self._show_measured = True

    def _score(self) -> tuple[float, dict[str, Any]]:
        """Score the plan as it stands: what its reward adds to the episode's, and a newly made ``info``."""
        policy = self.space.policy(self._counts)
        evaluation = self.evaluator.score(policy, fidelity=self.fidelity)
        worth = compute_reward(self._reward, evaluation.accuracy, evaluation.cost, self.space.limit)
        gained = worth - self._last_worth
        self._last_accuracy, self._last_worth = evaluation.accuracy, worth
        return gained, {
            "accuracy": evaluation.accuracy,
            "cost": evaluation.cost,
            "policy": {name: list(units) for name, units in policy.kept.items()},
            "kept_ratios": self._counts / self.space.sizes,
            "budget_spent": self.evaluator.is_spent(self.fidelity),
            "evaluation": evaluation,
        }

    def _observe(self) -> Observation:
        decided, decisions, progress = self._stage()
        return self._observer.observe(
            Progress(
                counts=self._counts,
                decided=decided,
                decisions=decisions,
                dense_accuracy=self.evaluator.dense_accuracy(self.fidelity),
                last_accuracy=self._last_accuracy,
                progress=progress,
            ),
            show_measured=self._show_measured,
        )

    def _stage(self) -> tuple[NDArray[np.bool_], NDArray[np.int64], float]:
        """Which groups are decided, which the next action decides, and how far the episode is, 0 to 1."""
        raise NotImplementedError
