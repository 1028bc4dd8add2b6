"""What every method of one search shares: network, decisions, start plan, and how a candidate is scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from envs.action import nearest, project
from envs.allocation import losses
from envs.evaluator import (
    COMPARED_IMAGES,
    CandidateEvaluator,
    EvaluateFunction,
    Evaluation,
    ReconstructFunction,
    Sensitivity,
    probed_levels,
)
from envs.journal import Journal
from envs.plans import count_shared, noise_floor, sensitivity, uniform
from envs.reward import RewardFunction, compute_reward
from envs.space import Ratios, SearchSpace
from graph_encoder.batches import Batch
from graph_encoder.network import NetworkGraph
from latency.budget import Budget, BudgetError
from latency.cost import CostModel
from latency.decision import layer_decisions
from latency.device import TableError
from latency.predict import LatencyModel
from latency.table import LatencyTable
from latency.worker import Processor
from pruning.calibration import RangeMethod
from pruning.layer_policy import LayerPolicy
from pruning.policy import CompressionPolicy
from pruning.reconstruction import reconstruct

from .config import ConfigError, SearchSettings
from .progress import count

PROBES = "probes"
"""Name of the sensitivity probes in the journal."""
PROBED_KEEP_RATIO = 0.3

OnEvaluation = Callable[[Evaluation], None]


class WatchedEvaluator(CandidateEvaluator):
    """A `CandidateEvaluator` that tells each evaluation, replayed ones too, once it is safe in the journal."""

    def __init__(self, *arguments: Any, on_evaluation: OnEvaluation, **options: Any) -> None:
        """Take the arguments of `CandidateEvaluator` and the function to call with each score."""
        super().__init__(*arguments, **options)
        self._on_evaluation = on_evaluation

    def score(self, policy: CompressionPolicy, **options: Any) -> Evaluation:
        """As `CandidateEvaluator.score`, then tell."""
        evaluation = super().score(policy, **options)
        self._on_evaluation(evaluation)
        return evaluation

    def compare(self, policy: CompressionPolicy, *, n_images: int) -> Evaluation:
        """As `CandidateEvaluator.compare`, then tell."""
        evaluation = super().compare(policy, n_images=n_images)
        self._on_evaluation(evaluation)
        return evaluation


class Found(Protocol):
    """A plan as a journal or a result names it.

    Attributes:
        kept: units by group name; groups that are not named stay whole.
        layers: sparsity and bits by layer name, as in a policy file; layers that are not named are untouched.
    """

    @property
    def kept(self) -> Mapping[str, int]: ...  # noqa: D102 - the class says it

    @property
    def layers(self) -> Mapping[str, Mapping[str, Any]]: ...  # noqa: D102


@dataclass(frozen=True)
class Scoring:
    """How candidates are built and scored.

    Attributes:
        evaluate: accuracy of a network on all search images.
        calibration: batches of training images for batch-norm statistics.
        n_images: search images; for the noise floor of the sensitivity probes.
        few_images: evaluate functions on a share of the search images.
        reconstruct: repairs a candidate's weights before it is scored, or None.
        range_images: batches for the ranges of quantized activations; those of ``calibration`` if None.
        calibration_method: how these ranges are chosen.
        reward: what a plan is worth.
        channels_last: memory format of the candidates.
        autocast: whether batch-norm statistics are re-estimated in bfloat16.
    """

    evaluate: EvaluateFunction
    calibration: Sequence[Batch]
    n_images: int
    reward: RewardFunction
    few_images: Mapping[float, EvaluateFunction] | None = None
    reconstruct: ReconstructFunction | None = None
    range_images: Sequence[Batch] | None = None
    calibration_method: RangeMethod = "mse"
    channels_last: bool = False
    autocast: bool = False


@dataclass(frozen=True)
class SearchProblem:
    """One search, whatever the method.

    Attributes:
        model: the dense network; never changed.
        graph: its capture.
        space: decisions and budget, with the start plan.
        scoring: how a candidate is scored.
        journal: where every evaluation is recorded.
        seed: of the search.
        sensitivity: the probes' result, None where they were not made.
        probe_evaluations: what the probes cost, in evaluations.
        probe_seconds: what they cost in time.
        starts_from_probes: whether the start plan follows from them.
        shows_probes: whether agents see them.
        lost_when_quantized: accuracy that the whole network loses when it is quantized, if that is too little to tell
            and single precision is not on offer; None if it is.
    """

    model: nn.Module
    graph: NetworkGraph
    space: SearchSpace
    scoring: Scoring
    journal: Journal
    seed: int
    sensitivity: Sensitivity | None = None
    probe_evaluations: float = 0.0
    probe_seconds: float = 0.0
    starts_from_probes: bool = False
    shows_probes: bool = False
    lost_when_quantized: float | None = None

    def evaluator(
        self,
        searcher: str,
        on_evaluation: OnEvaluation,
        *,
        max_evaluations: float = math.inf,
        evaluate: EvaluateFunction | None = None,
    ) -> WatchedEvaluator:
        """A fresh evaluator for one searcher: its own count, cache and journal entries."""
        scoring = self.scoring
        return WatchedEvaluator(
            self.model,
            self.graph,
            evaluate or scoring.evaluate,
            scoring.calibration,
            cost=self.space.cost_of,
            few_images=None if evaluate else scoring.few_images,
            journal=self.journal,
            max_evaluations=max_evaluations,
            reconstruct=scoring.reconstruct,
            range_images=scoring.range_images,
            calibration_method=scoring.calibration_method,
            channels_last=scoring.channels_last,
            autocast=scoring.autocast,
            searcher=searcher,
            seed=self.seed,
            on_evaluation=on_evaluation,
        )

    def reward(self, accuracy: float, cost: int) -> float:
        """What a plan of that accuracy and cost is worth."""
        return compute_reward(self.scoring.reward, accuracy, cost, self.space.limit)

    def noise_floor(self) -> float:
        """Smallest loss of accuracy that the search images can tell from none."""
        assert self.sensitivity is not None
        n_images = count_shared(self.scoring.n_images, self.sensitivity.fidelity)
        return noise_floor(self.sensitivity.dense_accuracy, n_images)

    def policy(self, found: Found) -> CompressionPolicy:
        """The plan that keeps so many of the most important units of each group, and treats the layers so."""
        pairs = zip(self.space.names, self.space.sizes, strict=True)
        counts = np.array([found.kept.get(name, size) for name, size in pairs], dtype=np.int64)
        layers = {name: LayerPolicy.from_plain(entry, f"layer '{name}'") for name, entry in found.layers.items()}
        return replace(self.space.policy(counts), layers=layers)

    @property
    def bits_note(self) -> str:
        """Why single precision is not on offer; empty if it is."""
        if self.lost_when_quantized is None:
            return ""
        lost = 100 * max(self.lost_when_quantized, 0)
        offered = [self.space.ladders[index][-1] == self.space.sizes[index] for index in self.space.rungs_of_bits]
        but = f", but in {count(sum(offered), 'layer')} that may be faster in it" if any(offered) else ""
        return (
            f"quantized, with all of its channels, the network loses {lost:.2f} points of accuracy, which the "
            f"{self.scoring.n_images:,} search images cannot tell from none: no budget is spent on single "
            f"precision{but}"
        )

    def losses(self) -> list[NDArray[np.float64]]:
        """What each decision is taken to lose alone, see `envs.allocation.losses`."""
        assert self.sensitivity is not None
        return losses(self.space, self.sensitivity, self.noise_floor())

    def sensitivity_offsets(self) -> Ratios:
        """Keep-ratio offsets that follow from the probes, shape ``(n,)``."""
        assert self.sensitivity is not None
        floors = self.sensitivity.floors(self.noise_floor())
        return sensitivity(self.space, self.sensitivity.at(PROBED_KEEP_RATIO), floors)


def space_by(
    settings: SearchSettings,
    graph: NetworkGraph,
    importance: Mapping[str, Tensor],
    budgets: Sequence[Budget],
    table: LatencyTable | None,
) -> SearchSpace:
    """What the settings of a search leave to decide.

    Raises:
        BudgetError: if a budget cannot be met, or is one of latency and there is no table.
        LatencyError: if the table lacks a layer of the network.
        ConfigError: if there is nothing to decide, or a protected group is not there.
    """
    try:
        space = SearchSpace.build(
            graph,
            importance,
            budgets,
            kind=settings.target.kind if settings.target else "macs",
            channels="channels" in settings.decide,
            layers=layer_decisions(
                graph,
                settings.layer_choices,
                sparsity=settings.sparsity,
                densities=settings.densities,
                bits=settings.bits,
                protect_first=settings.protect_first,
            ),
            sparsity=settings.sparsity,
            reduce_range=bool(settings.reduce_range),
            rounding=settings.rounding,
            min_keep_ratio=settings.min_keep_ratio,
            protect_first=settings.protect_first,
            protected=settings.protected,
            span=settings.span,
            table=table,
        )
    except BudgetError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if space.timed is not None:
        _check_calibrated(space.timed.cost)
    return started_uniformly(space)


def started_uniformly(space: SearchSpace) -> SearchSpace:
    """The space with the uniform plan within its budgets as start: shifted alone, bits would rise with the channels."""
    if not space.bounds or all(decision.choice == "density" for decision in space.layers):
        return space
    return space.with_prior(space.places(project(uniform(space), space)))


def settle_range(settings: SearchSettings, table: LatencyTable | None) -> SearchSettings:
    """Settings that say whether 8-bit weights take half of their levels, where plans may be run in integers.

    Where that was left open, they do if the processor saturates that the network is for: the table's, else this one.
    """
    if settings.reduce_range is not None or not settings.decides_integers:
        return settings
    processor = table.fingerprint.processor if table else Processor.here()
    return settings.model_copy(update={"reduce_range": processor.saturates})


def _check_calibrated(cost: CostModel | LatencyModel) -> None:
    """Raise `TableError` for a table that knows the layers, and not what whole networks of them take."""
    assert isinstance(cost, LatencyModel)
    found = cost.calibration
    if not found.n_networks or (cost.has_integers and not found.n_mixed):
        what, option = ("networks with 8 bits", " --integers") if found.n_networks else ("whole networks", "")
        msg = (
            f"the latency table is not calibrated: no {what} of this kind were timed, and it would ask too little. "
            f"'secateur latency build{option}' into the same file, for this model with its shape and number of "
            "classes, goes on where it stopped"
        )
        raise TableError(msg)


def least_squares(seed: int) -> ReconstructFunction:
    """AMC's reconstruction as an evaluator calls it; ``seed`` chooses the positions that are fitted."""

    def repair(
        dense: nn.Module,
        candidate: nn.Module,
        graph: NetworkGraph,
        policy: CompressionPolicy,
        batches: Sequence[Batch],
    ) -> None:
        # Drawn anew for each candidate, so that equal plans give equal weights in any order.
        generator = torch.Generator().manual_seed(seed)
        reconstruct(dense, candidate, graph, policy, batches, generator=generator)

    return repair


def evaluations_to_probe(
    space: SearchSpace, share: float, n_images: int, n_calibration: int, *, as_start: bool
) -> float:
    """Evaluations that `probe` takes.

    One a group that can be cut and one more, what comparisons count as, and those of the quantized network.

    Args:
        space: what is decided.
        share: of the search images that the probes use.
        n_images: search images.
        n_calibration: calibration images.
        as_start: as for `probe`.
    """
    n_groups = len(space.groups)
    # Where a group cannot be cut, its plan is that of the whole network, and no plan counts twice.
    n_cut = int((nearest(np.full(space.n, PROBED_KEEP_RATIO), space) < space.sizes)[:n_groups].sum())
    ladders = zip(space.layers, space.ladders[n_groups:], strict=True)
    n_compared = sum(len(probed_levels(ladder, decision.size)) for decision, ladder in ladders)
    n_compared += n_cut + (n_cut < n_groups) if space.layers else 0
    # And the whole network again, where it was scored on a share of the images.
    n_quantized = 1 + (share < 1) if as_start and _saves_when_quantized(space) else 0
    return (n_cut + 1) * share + n_compared * min(COMPARED_IMAGES, n_images, n_calibration) / n_images + n_quantized


def probe(
    problem: SearchProblem,
    share: float,
    on_evaluation: OnEvaluation,
    *,
    as_start: bool,
    shown: bool,
    notify: Callable[[str], None],
) -> SearchProblem:
    """Measure each decision's sensitivity.

    Args:
        problem: with a uniform start.
        share: of the search images that the probes use.
        on_evaluation: told of each probe.
        as_start: make the plan that follows the start of every method, and offer none of them single precision where
            that buys nothing (`_without_idle_floats`); the probes then count for each of them.
        shown: show agents the result; the probes then count for each of these.
        notify: told if the calibration images do not fit the network.
    """
    evaluator = problem.evaluator(PROBES, on_evaluation)
    measured = evaluator.probe_sensitivity(
        problem.space, (PROBED_KEEP_RATIO,), fidelity=share, n_images=problem.scoring.n_images
    )
    n_images = count_shared(problem.scoring.n_images, share)
    warning = check_calibration_is_like_training(evaluator.dense_accuracy(share), measured.dense_accuracy, n_images)
    if warning:
        notify(warning)
    if as_start:
        problem = _without_idle_floats(problem, measured.dense_accuracy if share == 1 else None, evaluator)
    probed = replace(
        problem,
        sensitivity=measured,
        probe_evaluations=evaluator.evaluations_used,
        probe_seconds=evaluator.seconds,
        starts_from_probes=as_start,
        shows_probes=shown,
    )
    return replace(probed, space=problem.space.with_prior(probed.sensitivity_offsets())) if as_start else probed


def _saves_when_quantized(space: SearchSpace) -> bool:
    """Whether giving up single precision saves something of a budget, and costs more of none."""
    saved = [bound.cost(space.maximum) - bound.cost(space.quantized) for bound in space.bounds]
    return any(one > 0 for one in saved) and min(saved) >= 0


def _without_idle_floats(
    problem: SearchProblem, dense_accuracy: float | None, evaluator: WatchedEvaluator
) -> SearchProblem:
    """The problem without single precision, where that buys nothing.

    Plans spend what a budget leaves. Where the whole network loses no accuracy that the search images can tell when it
    is quantized, single precision would cost and not pay. It stays on offer in layers that are faster in it.

    Args:
        problem: with all choices.
        dense_accuracy: of the whole network on all search images, as candidates are scored; None if not known.
        evaluator: of the probes.
    """
    space = problem.space
    if not _saves_when_quantized(space):
        return problem
    if dense_accuracy is None:
        dense_accuracy = evaluator.score(CompressionPolicy({}), purpose="probe").accuracy
    lost = dense_accuracy - evaluator.score(space.policy(space.quantized), purpose="probe").accuracy
    left = space.without_idle_floats()
    can_be_met = all(left.lowest_of(bound.cost) <= bound.limit for bound in left.bounds)
    is_cut = any(len(own) < len(all_rungs) for own, all_rungs in zip(left.ladders, space.ladders, strict=True))
    if lost > noise_floor(dense_accuracy, problem.scoring.n_images) or not (can_be_met and is_cut):
        return problem
    return replace(problem, space=left, lost_when_quantized=lost)


def check_calibration_is_like_training(dense: float, reestimated: float, n_images: int) -> str | None:
    """Warn when re-estimating batch-norm statistics alone changes the accuracy of the dense network.

    Args:
        dense: accuracy of the dense network as it is, in ``[0, 1]``.
        reestimated: its accuracy with statistics from the calibration images.
        n_images: images that both were scored on.

    Returns:
        The warning, or None if less is lost than one point or the standard error of an accuracy, or gained than twice
        as much.
    """
    noticed = max(0.01, math.sqrt(dense * (1 - dense) / n_images))
    if reestimated - dense > 2 * noticed:
        return (
            f"with batch-norm statistics re-estimated the dense network scores {reestimated:.2%} in place of "
            f"{dense:.2%}: its own statistics do not fit its weights or these images, and plans, whose statistics are "
            f"re-estimated, look better beside it than they are. Compare them with {reestimated:.2%}"
        )
    if dense - reestimated <= noticed:
        return None
    return (
        f"with batch-norm statistics re-estimated the dense network scores {reestimated:.2%} in place of {dense:.2%}, "
        "so every plan will score below what it is worth. Prepare the calibration images as those it was trained on: "
        "the same normalisation and augmentation, and a few hundred of them"
    )
