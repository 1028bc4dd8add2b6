"""From a policy to an accuracy: build the candidate, repair its statistics, score it, count and remember it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from graph_encoder.batches import Batch, count_images, first_images, inputs_of, tensors_of
from graph_encoder.copies import copied
from graph_encoder.errors import SecateurError
from graph_encoder.modes import evaluation_mode, lay_channels_last
from graph_encoder.network import NetworkGraph
from graph_encoder.randomness import kept_randomness
from latency.cost import predict_cost
from pruning.batch_norm import reestimate_batch_norm
from pruning.calibration import CalibrationError, RangeMethod
from pruning.layer_policy import LayerPolicy
from pruning.policy import CompressionPolicy
from pruning.quantize import quantize_layers
from pruning.sparsity import apply_masks, sparse_weight
from pruning.surgery import apply_policy

from .action import nearest
from .journal import Journal, JournalEntry, Purpose
from .plans import count_shared, noise_floor
from .space import Counts, SearchSpace

EvaluateFunction = Callable[[nn.Module], float]
"""Accuracy in ``[0, 1]`` of a network on a fixed set of images that it was not trained on."""

ReconstructFunction = Callable[[nn.Module, nn.Module, NetworkGraph, CompressionPolicy, Sequence[Batch]], None]
"""``reconstruct(dense, candidate, graph, policy, batches)``, in place on the candidate."""

CostFunction = Callable[[CompressionPolicy], int]

Key = tuple[str, float, bool]
"""What tells evaluations apart: digest of the policy, share of the images, and whether outputs were compared."""

DENSE_DIGEST = "dense"
RANGE_IMAGES = 128
"""Images that the ranges of quantized activations are read off."""
COMPARED_IMAGES = 256
"""Calibration images on which outputs are compared with the dense network's."""
PROBED_LEVELS = 3
"""Most levels of a choice inside a layer that its sensitivity is measured at."""
RESOLVED_LOSS = 1e-6
"""Least loss that follows from a comparison of outputs: rounding errors lie below."""
ROUNDING = 1e-6
"""By so much an accuracy of 1 may come out above 1, as a mean or a sum of shares in single precision does."""


class EvaluationBudgetSpent(RuntimeError):
    """Another evaluation would go over the number that was granted."""


class EvaluateError(SecateurError, ValueError):
    """The evaluate function returned something that is no accuracy; the message names it."""


class ReplayError(SecateurError, RuntimeError):
    """A saved evaluator does not fit its journal; the message says what is missing."""


@dataclass(frozen=True)
class Evaluation:
    """What one plan scored. Two are equal if the same plan scored the same; when and how fast does not count.

    Attributes:
        digest: digest of the policy.
        accuracy: in ``[0, 1]``.
        cost: of the plan, in the budget's unit.
        fidelity: share of the search images it was scored on.
        index: place among the evaluations, from 0; of the first time if ``cached``.
        seconds: wall time of building and scoring.
        cached: whether the score was known and so was free.
        evaluations_used: evaluations counted when the score was handed out.
        divergence: of a comparison of outputs, which has an accuracy of 0; None of a score.
    """

    digest: str
    accuracy: float
    cost: int
    fidelity: float
    index: int = field(compare=False)
    seconds: float = field(compare=False)
    cached: bool = field(compare=False)
    evaluations_used: float = field(compare=False)
    divergence: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """Accuracy lost when one decision alone keeps a part of what the untouched network has.

    Attributes:
        names: of the decisions.
        keep_ratios: places (`SearchSpace.places`) at which each stood: of a group, shares of the units that stayed.
        dense_accuracy: with nothing removed, batch-norm statistics re-estimated, in ``[0, 1]``.
        lost: accuracy lost, shape ``(decisions, keep_ratios)``; below 0 where the score rose.
        fidelity: share of the search images each was scored on.
        by_level: accuracy that each choice inside a layer is taken to lose, by its name and the levels that were
            measured; it follows from outputs, see `CandidateEvaluator.probe_sensitivity`.
    """

    names: tuple[str, ...]
    keep_ratios: tuple[float, ...]
    dense_accuracy: float
    lost: NDArray[np.float64]
    fidelity: float
    by_level: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    def at(self, keep_ratio: float) -> NDArray[np.float64]:
        """Accuracy lost at one keep ratio, shape ``(decisions,)``; `ValueError` if it was not measured."""
        if keep_ratio not in self.keep_ratios:
            msg = f"sensitivity was not measured at keep ratio {keep_ratio}; measured: {self.keep_ratios}"
            raise ValueError(msg)
        return self.lost[:, self.keep_ratios.index(keep_ratio)]

    def floors(self, noise_floor: float) -> NDArray[np.float64]:
        """Smallest loss of each decision that counts, ``(decisions,)``: of those that were scored, ``noise_floor``."""
        return np.array([RESOLVED_LOSS if name in self.by_level else noise_floor for name in self.names])

    def of_levels(self, decision: str, levels: Counts, untouched: int) -> NDArray[np.float64]:
        """Accuracy that a choice inside a layer is taken to lose at each of ``levels``, never rising with them.

        The logarithm of the loss runs in straight lines between the levels that were measured: a bit less is a grid
        twice as coarse, and an error of four times the power. At ``untouched`` nothing is lost.
        """
        measured = sorted(self.by_level[decision].items())
        logs = np.log([max(loss, RESOLVED_LOSS) for _, loss in measured])
        lost = np.where(levels == untouched, 0.0, np.exp(np.interp(levels, [level for level, _ in measured], logs)))
        return np.asarray(np.maximum.accumulate(lost[::-1])[::-1], dtype=np.float64)


class CandidateEvaluator:
    """Scores plans for one searcher: builds each network, counts the evaluation, journals it, never scores it twice.

    One evaluation is one candidate through batch-norm re-estimation and scoring on all search images. A score on a
    share of the images (``fidelity``) counts as that share; a plan scored before is free.

    Resuming: a new evaluator on the journal of the interrupted run, given the state of a checkpoint by
    `load_state_dict`, hands out the evaluations made after the checkpoint from the journal as they are asked for,
    whatever their order: they count, but are neither run nor written again. Without a state, that holds for the
    whole journal.

    Attributes:
        evaluations_used: evaluations counted so far.
        cache_hits: scores handed out for free so far.
        seconds: wall time of all evaluations counted so far, those of a replay as they were recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: NetworkGraph,
        evaluate: EvaluateFunction,
        calibration: Sequence[Batch],
        *,
        cost: CostFunction | None = None,
        few_images: Mapping[float, EvaluateFunction] | None = None,
        journal: Journal | None = None,
        max_evaluations: float = math.inf,
        reconstruct: ReconstructFunction | None = None,
        range_images: Sequence[Batch] | None = None,
        calibration_method: RangeMethod = "mse",
        channels_last: bool = False,
        autocast: bool = False,
        searcher: str = "",
        seed: int = 0,
    ) -> None:
        """Set up the scoring of plans.

        Args:
            model: the dense network; never changed.
            graph: its capture.
            evaluate: accuracy of a network on all search images.
            calibration: batches of training images for batch-norm statistics (and reconstruction), on the model's
                device, tuples where forward takes several inputs; empty to leave the statistics as they are.
            cost: what a plan costs, as an integer; multiply-adds if not given.
            few_images: evaluate functions on a share of the search images, by that share.
            journal: where evaluations are recorded; in memory if not given.
            max_evaluations: most evaluations that may be counted.
            reconstruct: repairs the candidate's weights before scoring, as AMC's least squares does.
            range_images: batches of training images as in use, not augmented, for the ranges of quantized activations;
                those of ``calibration`` if not given.
            calibration_method: how these ranges are chosen.
            channels_last: build candidates in that memory format, faster for convolutions on CPUs.
            autocast: re-estimate batch-norm statistics in bfloat16.
            searcher: name of the search in the journal.
            seed: its seed in the journal.

        Raises:
            ValueError: if a fidelity is not in ``(0, 1)``.
        """
        self.model, self.graph = model, graph
        self._cost: CostFunction = cost or (lambda policy: predict_cost(graph, policy))
        self.searcher, self.seed = searcher, seed
        self.max_evaluations = max_evaluations
        self.cache_hits = 0
        self.journal = Journal() if journal is None else journal
        self._calibration = list(calibration)
        self._range_images = first_images(self._calibration if range_images is None else range_images, RANGE_IMAGES)
        self._calibration_method: RangeMethod = calibration_method
        self._reconstruct = reconstruct
        self._channels_last = channels_last
        self._autocast = autocast
        self._evaluate = {**(few_images or {}), 1.0: evaluate}
        for share in few_images or {}:
            if not 0 < share < 1:
                msg = f"few_images holds an evaluate function for a share of {share}; a share lies in (0, 1)"
                raise ValueError(msg)
        self._known: dict[Key, JournalEntry] = {}
        self._unread: dict[Key, JournalEntry] = {}
        self._dense_outputs: Tensor | None = None
        self._last_floats: tuple[str, nn.Module] | None = None
        self._expect(self._own_entries())

    @property
    def evaluations_used(self) -> float:
        """Evaluations counted so far."""
        return math.fsum(entry.charge for entry in self._known.values())

    def is_spent(self, fidelity: float = 1.0) -> bool:
        """Whether a new plan scored on that share of the images would go over ``max_evaluations``."""
        # Shares such as 0.1 do not add up exactly.
        return self.evaluations_used + fidelity > self.max_evaluations + 1e-6

    @property
    def seconds(self) -> float:
        """Wall time spent inside evaluations so far."""
        return math.fsum(entry.seconds for entry in self._known.values())

    @property
    def history(self) -> tuple[JournalEntry, ...]:
        """The evaluations handed out so far, in that order."""
        return tuple(self._known.values())

    def dense_accuracy(self, fidelity: float = 1.0) -> float:
        """Accuracy of the dense network as it is; free, as it is no candidate."""
        key = (DENSE_DIGEST, fidelity, False)
        known = self._known.get(key) or self._replayed(key)
        if known is None:
            start = time.perf_counter()
            with kept_randomness():
                # Of candidates the function has networks of its own too: it may change what it scores.
                accuracy = self._accuracy(copied(self.model), fidelity)
            known = self._record(CompressionPolicy({}), DENSE_DIGEST, "dense", fidelity, accuracy, start)
        return known.accuracy

    def score(self, policy: CompressionPolicy, *, fidelity: float = 1.0, purpose: Purpose = "candidate") -> Evaluation:
        """Accuracy and cost of the network that ``policy`` leaves.

        Args:
            policy: what is kept.
            fidelity: share of the search images to score on: 1, or one of those in ``few_images``.
            purpose: what the journal says it was for.

        Raises:
            EvaluationBudgetSpent: if another evaluation would go over ``max_evaluations``; nothing is run.
            EvaluateError: if the evaluate function returns no accuracy; the evaluation is not counted.
            ValueError: if there is no evaluate function for ``fidelity``.
        """
        self._check_fidelity(fidelity)
        key = (policy.digest, fidelity, False)
        if key in self._known:
            self.cache_hits += 1
            return self._as_evaluation(self._known[key], cached=True)
        self._check_left(fidelity)
        entry = self._replayed(key)
        if entry is None:
            start = time.perf_counter()
            with kept_randomness():
                accuracy = self._accuracy(self.build(policy), fidelity)
            entry = self._record(policy, policy.digest, purpose, fidelity, accuracy, start)
        return self._as_evaluation(entry, cached=False)

    def compare(self, policy: CompressionPolicy, *, n_images: int) -> Evaluation:
        """How far the outputs of the network that ``policy`` leaves are from those of the whole network.

        The divergence is the sum of squared differences over the sum of squared deviations of the whole network's
        outputs from their mean over the images. It is no accuracy, but a few hundred images resolve what thousands
        cannot tell from noise by counting right answers. Kullback-Leibler divergence, which ZeroQ takes (Cai et al.
        2020, section 3.2), ranks alike (Spearman 0.99 on ResNet-20, 2 to 8 bits of layers and 30 % of groups), and
        needs outputs that are logits. The whole network has its statistics re-estimated too.

        The images are the first `COMPARED_IMAGES` calibration images, at most ``n_images``. A comparison counts as
        their share of the search images.

        Args:
            policy: what is kept.
            n_images: search images of a whole evaluation.

        Raises:
            CalibrationError: if there are no calibration images.
            EvaluationBudgetSpent: if it would go over ``max_evaluations``; nothing is run.
        """
        images = self._compared_images(min(COMPARED_IMAGES, n_images))
        n_compared = count_images(images)
        key = (policy.digest, n_compared / n_images, True)
        if key in self._known:
            self.cache_hits += 1
            return self._as_evaluation(self._known[key], cached=True)
        self._check_left(key[1])
        entry = self._replayed(key)
        if entry is None:
            start = time.perf_counter()
            with kept_randomness():
                if self._dense_outputs is None or len(self._dense_outputs) != n_compared:
                    self._dense_outputs = _outputs(self.build(CompressionPolicy({})), images)
                divergence = _divergence(self._dense_outputs, _outputs(self.build(policy), images))
            entry = self._record(policy, policy.digest, "comparison", key[1], 0.0, start, divergence)
        return self._as_evaluation(entry, cached=False)

    def build(self, policy: CompressionPolicy) -> nn.Module:
        """The network that ``policy`` leaves, as it is scored: repaired, quantized where it has bits, in eval mode.

        Repaired means reconstructed if asked for, and with batch-norm statistics re-estimated. Ranges of quantized
        activations are chosen on the first `RANGE_IMAGES` or so of their images.

        Raises:
            CalibrationError: if the policy has bits and there are no images for ranges.
        """
        if any(layer.is_quantized for layer in policy.layers.values()):
            floats = self._in_floats(policy)
            return quantize_layers(floats, policy.layers, self._range_images, method=self._calibration_method).eval()
        return self._repaired(policy).eval()

    def _in_floats(self, policy: CompressionPolicy) -> nn.Module:
        """What ``policy`` leaves before it gets bits, not to be changed; plans that differ in bits alone share it."""
        sparse = {name: policy.layers[name] for name in policy.sparse_layers}
        zeros = {name: LayerPolicy(sparsity=layer.sparsity, density=layer.density) for name, layer in sparse.items()}
        floats = replace(policy, layers=zeros)
        if self._last_floats is None or self._last_floats[0] != floats.digest:
            self._last_floats = None  # two networks need not be held at once
            self._last_floats = floats.digest, self._repaired(floats)
        return self._last_floats[1]

    def _repaired(self, policy: CompressionPolicy) -> nn.Module:
        """The network that ``policy``, which has no bits, leaves, reconstructed and with statistics re-estimated."""
        candidate = apply_policy(self.model, self.graph, policy)
        if self._channels_last:
            lay_channels_last(candidate)
        if self._reconstruct is not None:
            masks = {name: sparse_weight(candidate, name)[0] != 0 for name in policy.sparse_layers}
            self._reconstruct(self.model, candidate, self.graph, policy, self._calibration)
            # Least squares fits whole weights: what the plan made zero is zero again.
            apply_masks(candidate, masks)
        if self._calibration:
            reestimate_batch_norm(candidate, self._calibration, autocast=self._autocast)
        return candidate

    def _compared_images(self, n_images: int) -> list[Batch]:
        """The first ``n_images`` calibration images, fewer if there are no more, in batches."""
        if not self._calibration:
            msg = (
                "the sensitivity of choices inside layers is read off outputs on calibration images, and there are "
                "none; pass some batches of training images as calibration, or start from the uniform plan"
            )
            raise CalibrationError(msg)
        return first_images(self._calibration, n_images)

    def probe_sensitivity(
        self, space: SearchSpace, keep_ratios: Sequence[float] = (0.3,), *, fidelity: float = 1.0, n_images: int = 1000
    ) -> Sensitivity:
        """Measure what one decision at a time costs the network; probes count as evaluations.

        Each channel group is cut down and the network scored, and the whole network once, with its statistics
        re-estimated too, so that what this alone costs is laid on no group.

        A choice inside a layer loses less than images can tell from noise: outputs are compared in its place
        (`compare`), at `PROBED_LEVELS` levels or all, and a loss is taken to be proportional to the divergence. Where
        groups are decided too, theirs are measured as well, and the factor is the least squares fit to what they lose.
        Where there are none it is 1: ratios are what plans follow from.

        Args:
            space: whose decisions, rounding and ranking are used.
            keep_ratios: shares of a group's units that stay.
            fidelity: share of the search images to score on.
            n_images: search images of a whole evaluation.

        Raises:
            CalibrationError: if there are choices inside layers and no calibration images.
            EvaluationBudgetSpent: if the probes do not all fit; those made before are kept in the journal.
        """
        dense = self.score(CompressionPolicy({}), fidelity=fidelity, purpose="probe").accuracy
        lost = np.zeros((space.n, len(keep_ratios)))
        cuts = [nearest(np.full(space.n, ratio), space) for ratio in keep_ratios]
        groups = [
            (row, column, _alone(space, row, cut[row]))
            for column, cut in enumerate(cuts)
            for row in range(len(space.groups))
        ]
        for row, column, policy in groups:
            lost[row, column] = dense - self.score(policy, fidelity=fidelity, purpose="probe").accuracy
        if not space.layers:
            return Sensitivity(space.names, tuple(keep_ratios), dense, lost, fidelity)

        def divergence(policy: CompressionPolicy) -> float:
            # At 1 the outputs tell no more of the network's than their mean does: beyond, there is nothing to lose.
            found = self.compare(policy, n_images=n_images).divergence
            assert found is not None
            return min(found, 1.0)

        floor = noise_floor(dense, count_shared(n_images, fidelity))
        factor = _through_origin(
            [divergence(policy) for *_, policy in groups],
            [max(float(lost[row, column]), floor) for row, column, _ in groups],
        )
        by_level = {
            decision.name: {
                level: min(factor * divergence(_alone(space, index, level)), 1.0)
                for level in probed_levels(space.ladders[index], decision.size)
            }
            for index, decision in enumerate(space.layers, start=len(space.groups))
        }
        measured = Sensitivity(space.names, tuple(keep_ratios), dense, lost, fidelity, by_level)
        for index, decision in enumerate(space.layers, start=len(space.groups)):
            levels = np.array([cut[index] for cut in cuts])
            lost[index] = [measured.of_levels(decision.name, levels[[c]], decision.size)[0] for c in range(len(cuts))]
        return measured

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint: which journal entries were handed out, and how often one was for free."""
        return {"handed_out": [entry.index for entry in self._known.values()], "cache_hits": self.cache_hits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Return to the point at which `state_dict` was taken; entries after it will be replayed when asked for.

        Raises:
            ReplayError: if the journal lacks entries that the state refers to.
        """
        own = {entry.index: entry for entry in self._own_entries()}
        missing = [index for index in state["handed_out"] if index not in own]
        if missing:
            msg = (
                f"the saved state refers to evaluation {missing[0]} of searcher '{self.searcher}', seed {self.seed}, "
                f"but the journal '{self.journal.path}' holds {len(own)} of them; it is older than the checkpoint, or "
                "of another run"
            )
            raise ReplayError(msg)
        handed_out = [own.pop(index) for index in state["handed_out"]]
        self._known = {_key(entry): entry for entry in handed_out}
        self.cache_hits = int(state["cache_hits"])
        self._expect(own.values())

    def _own_entries(self) -> list[JournalEntry]:
        return self.journal.entries(self.searcher, self.seed)

    def _expect(self, entries: Any) -> None:
        self._unread = {_key(entry): entry for entry in entries}

    def _replayed(self, key: Key) -> JournalEntry | None:
        entry = self._unread.pop(key, None)
        if entry is not None:
            self._known[key] = entry
        return entry

    def _record(
        self,
        policy: CompressionPolicy,
        digest: str,
        purpose: Purpose,
        fidelity: float,
        accuracy: float,
        start: float,
        divergence: float | None = None,
    ) -> JournalEntry:
        kept = {name: len(units) for name, units in policy.kept.items()}
        entry = JournalEntry(
            index=len(self._own_entries()),
            searcher=self.searcher,
            seed=self.seed,
            purpose=purpose,
            digest=digest,
            kept=kept,
            layers={name: layer.to_plain() for name, layer in policy.layers.items()},
            fidelity=fidelity,
            accuracy=accuracy,
            cost=self._cost(policy),
            seconds=time.perf_counter() - start,
            evaluations_used=self.evaluations_used + (0.0 if purpose == "dense" else fidelity),
            divergence=divergence,
        )
        self.journal.append(entry)
        self._known[_key(entry)] = entry
        return entry

    def _as_evaluation(self, entry: JournalEntry, *, cached: bool) -> Evaluation:
        return Evaluation(
            digest=entry.digest,
            accuracy=entry.accuracy,
            cost=entry.cost,
            fidelity=entry.fidelity,
            index=entry.index,
            seconds=entry.seconds,
            cached=cached,
            evaluations_used=self.evaluations_used,
            divergence=entry.divergence,
        )

    def _accuracy(self, model: nn.Module, fidelity: float) -> float:
        self._check_fidelity(fidelity)
        with evaluation_mode(model), torch.no_grad():
            returned = self._evaluate[fidelity](model)
        return check_accuracy(returned)

    def _check_fidelity(self, fidelity: float) -> None:
        if fidelity not in self._evaluate:
            msg = (
                f"there is no evaluate function for a share of {fidelity} of the search images; "
                f"there are some for {sorted(self._evaluate)}: pass one of these, or add it to few_images"
            )
            raise ValueError(msg)

    def _check_left(self, fidelity: float) -> None:
        if self.is_spent(fidelity):
            msg = (
                f"{self.evaluations_used:g} of {self.max_evaluations:g} evaluations are used, and the next would count "
                f"as {fidelity:g}; grant more evaluations, or score on fewer images"
            )
            raise EvaluationBudgetSpent(msg)


def probed_levels(ladder: Counts, untouched: int) -> list[int]:
    """Levels that a choice inside a layer is measured at: but for the untouched all, or `PROBED_LEVELS` of them."""
    levels = ladder[ladder != untouched]
    picked = np.unique(np.linspace(0, len(levels) - 1, min(PROBED_LEVELS, len(levels))).round().astype(np.int64))
    return [int(level) for level in levels[picked]]


def _alone(space: SearchSpace, index: int, count: int) -> CompressionPolicy:
    """The untouched network but for one decision."""
    counts = space.sizes.copy()
    counts[index] = count
    return space.policy(counts)


def _key(entry: JournalEntry) -> Key:
    return entry.digest, entry.fidelity, entry.purpose == "comparison"


def _outputs(model: nn.Module, images: Sequence[Batch]) -> Tensor:
    """All that ``model`` returns for each of the images, in a row each; what is of no image, as a loss, is left out."""
    rows = []
    with evaluation_mode(model), torch.no_grad():
        for batch in images:
            n_images = count_images([batch])
            leaves = [leaf for leaf in tensors_of(model(*inputs_of(batch))) if leaf.dim()]
            of_images = [leaf.reshape(n_images, -1).float() for leaf in leaves if len(leaf) == n_images]
            rows.append(torch.cat(of_images, dim=1))
    return torch.cat(rows)


def _divergence(dense: Tensor, outputs: Tensor) -> float:
    # Classes that are masked out have infinite logits, in both.
    finite = torch.isfinite(dense).all(0)
    dense, outputs = dense[:, finite], outputs[:, finite]
    spread = ((dense - dense.mean(0)) ** 2).sum()
    divergence = float(((outputs - dense) ** 2).sum() / spread.clamp_min(1e-12))
    return divergence if math.isfinite(divergence) else 1.0


def _through_origin(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of the least squares line through the origin; 1 if nothing tells it."""
    squares = float(np.dot(x, x))
    return float(np.dot(x, y)) / squares if squares else 1.0


def check_accuracy(returned: object) -> float:
    """The accuracy that an evaluate function returned, as a float; 1 where it is above 1 by `ROUNDING` at most.

    Raises:
        EvaluateError: if it is not a number, is NaN, or lies outside ``[0, 1]``.
    """
    if isinstance(returned, bool) or not isinstance(returned, (int, float, np.integer, np.floating)):
        msg = (
            f"evaluate returned {returned!r} of type {type(returned).__name__}; it must return the accuracy as a float "
            "in [0, 1] (of a tensor or an array, return its .item())"
        )
        raise EvaluateError(msg)
    if 1 < returned <= 1 + ROUNDING:
        return 1.0
    if not 0 <= returned <= 1:
        hint = "; is it a percentage? divide by 100" if 1.5 <= returned <= 100 else ""
        if math.isnan(returned):
            hint = "; were there any images, and are the network's outputs finite?"
        msg = f"evaluate returned {float(returned)}, but an accuracy lies in [0, 1]{hint}"
        raise EvaluateError(msg)
    return float(returned)
