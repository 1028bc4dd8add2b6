"""Compression from a user's own loop: one call in place of a configuration and a run folder."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from torch import Tensor, nn

from envs.evaluator import EvaluateFunction, Evaluation
from envs.journal import Journal, JournalEntry
from envs.reward import GALEN, GALEN_BETA, REWARDS, RewardFunction, resolve_reward
from graph_encoder.capture import capture, example_tensors
from graph_encoder.network import NetworkGraph
from graph_encoder.randomness import kept_randomness
from latency.budget import BudgetLike, read_budgets
from latency.decision import DENSITIES
from latency.table import LatencyTable
from pruning.batch_norm import batch_norms
from pruning.calibration import RangeMethod
from pruning.importance import Criterion, rank_units
from pruning.policy import CompressionPolicy
from pruning.proof import leave_refuted_dense

from .calibration import CalibrationData, read_calibration
from .config import (
    METHODS,
    ONE_SHOT,
    ConfigError,
    Decision,
    Environment,
    Method,
    SearchSettings,
    Start,
    validated,
)
from .identity import batches_digest, search_identity, without_places
from .methods import search_with
from .problem import PROBES, OnEvaluation, Scoring, SearchProblem, least_squares, probe, settle_range, space_by


@dataclass(frozen=True)
class Compressed:
    """What `compress` found.

    Attributes:
        model: the smaller network, batch norms re-estimated, in evaluation mode; ready to fine-tune.
        policy: what it keeps.
        graph: the capture of the dense network, with which the policy can be applied again.
        accuracy: of ``model``, by the user's function.
        dense_accuracy: of the dense network.
        cost: of ``model``, in the budget's kind.
        dense_cost: of the dense network.
        evaluations: evaluations counted, sensitivity probes included.
        history: every evaluation recorded of this method and seed and of the probes that it used, in order.
    """

    model: nn.Module
    policy: CompressionPolicy
    graph: NetworkGraph
    accuracy: float
    dense_accuracy: float
    cost: int
    dense_cost: int
    evaluations: float
    history: tuple[JournalEntry, ...]


def compress(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    *,
    evaluate: EvaluateFunction,
    budget: BudgetLike,
    calibration: CalibrationData = (),
    range_images: CalibrationData = (),
    method: Method = "ppo",
    evaluations: int = 300,
    seed: int = 0,
    environment: Environment = "network",
    start: Start = "sensitivity",
    decide: Sequence[Decision] = ("channels",),
    sparsity: str = "unstructured",
    densities: Sequence[int] = DENSITIES,
    bits: Sequence[int] = (8, 32),
    reduce_range: bool | None = None,
    calibration_method: RangeMethod = "mse",
    table: LatencyTable | None = None,
    criterion: Criterion = "l1",
    importance: Mapping[str, Tensor] | None = None,
    rounding: int | None = None,
    min_keep_ratio: float = 0.1,
    protect_first: bool = True,
    protected: Sequence[str] = (),
    reconstruct: bool = False,
    reward: str | RewardFunction | None = None,
    target: str | None = None,
    beta: float = GALEN_BETA,
    n_images: int = 1000,
    journal: Path | None = None,
    on_evaluation: OnEvaluation | None = None,
) -> Compressed:
    """Search how to prune ``model`` under a budget, scoring candidates with a function of your own.

    ``model`` is not changed. ``evaluate`` must score on images that the network was not trained on, always the same
    ones: on training images the best of many plans is mostly the one that remembers them best.

    Args:
        model: the trained network. Of one that `torch.compile` made, the network inside is taken, with a warning:
            every plan would be compiled anew.
        example_inputs: what its ``forward`` takes, a batch of any size; a tuple where that is several tensors.
        evaluate: accuracy in ``[0, 1]`` of a network in evaluation mode.
        budget: most that the result may cost: ``"50%"``, ``"30% params"``, ``"62.7M macs"``, ``"1.5 MB"``,
            ``"40% latency"``, a `Budget`, or several, each of another kind (``"50% macs, 20% bytes"``); None weighs
            cost against accuracy in the reward.
        calibration: batches of training inputs for batch-norm statistics, prepared and augmented as in training, on
            the model's device: a list or another iterable, such as a data loader, of a few hundred images in all, read
            once and held in memory. A batch is a tensor, or a tuple of tensors where ``forward`` takes several; what
            follows them in a tuple or list, such as labels, is left out. Without any, a network with batch norms scores
            far below what it is worth. Bits, and sensitivities inside layers, need some.
        range_images: the same, prepared as in use and not augmented, for the ranges of activations with bits; by
            default the first of ``calibration``.
        method: ``ppo``, ``ddpg``, ``cem``, ``random``, ``knapsack``, ``greedy``, ``sensitivity``, ``magnitude`` or
            ``uniform``.
        evaluations: candidates that may be scored, sensitivity probes (one a group, one for the whole network, and one
            for it quantized, a share of one for each level of a layer that is tried) included.
        seed: of the search, below 2**32.
        environment: a plan for the whole network at once, or layer by layer (agents only).
        start: plan that the search starts from; ``"uniform"`` saves the probes.
        decide: what is decided: ``"channels"``, and inside each layer ``"density"`` of the weights and ``"bits"`` of
            weights and activations (or ``"weight_bits"`` and ``"act_bits"`` apart).
        sparsity: pattern of the zeros: ``"unstructured"``, ``"block4"``, ``"block8"``, ``"block16"``, ``"2:4"``.
        densities: percents of a layer's weights that may stay, ascending; 100 leaves a layer as it is.
        bits: bits that may be chosen, ascending; 32 leaves a layer as it is.
        reduce_range: let 8-bit weights beside 8-bit activations take half of their levels, so that no sum of two
            products saturates on x86 processors without VNNI; by default as the processor of the table, else this one,
            needs it, if ``"bits"`` are decided and none are fewer than 8.
        calibration_method: how ranges of activations are chosen on ``range_images``: ``"minmax"``,
            ``"percentile"``, ``"entropy"``, ``"mse"``, or ``"lsq"`` before training.
        table: times of the network's layers, for a budget of latency; see ``secateur latency build``.
        criterion: importance by which channels are ranked; ``taylor`` needs labels, so for it pass what
            `pruning.importance.rank_units` returns as ``importance``.
        importance: finite scores by group name in place of a criterion, higher is kept.
        rounding: keep multiples of so many units; by default 8 where a group has 128 or more, else 1.
        min_keep_ratio: least share of a group that stays; at least one unit always does.
        protect_first: leave the groups dense that the first layer writes.
        protected: further groups to leave dense.
        reconstruct: fit the pruned layers' outputs to the dense network's by least squares; needs ``calibration``, and
            takes no more of it than fits into memory at once (`pruning.reconstruction.most_images`).
        reward: ``"accuracy"``, ``"accuracy_guaranteed"`` or a function (accuracy, cost, limit) -> float; or
            ``"galen"``, without a budget: ``accuracy + beta * abs(cost / target - 1)``.
        target: cost that the reward galen aims at, as a budget is written: ``"20% latency"``.
        beta: what missing that target by its own size is worth, in accuracy; below 0.
        n_images: images that ``evaluate`` scores on: what the probes can tell from noise.
        journal: file in which every evaluation is recorded; a second call with the same file and arguments goes on
            where the first one stopped. The file keeps methods and seeds apart and lets ``evaluations`` grow; for
            another network, other weights, calibration or arguments it is refused (``reduce_range`` left out is that of
            the processor). Whether ``evaluate`` is still the same function on the same images cannot be seen from here.
        on_evaluation: told of each evaluation.

    Raises:
        TraceError: if the network cannot be captured, or ``example_inputs`` are no tensors.
        BudgetError: if the budget cannot be met, with the lowest reachable cost.
        EvaluateError: if ``evaluate`` returns something that is no accuracy.
        CalibrationError: if bits, or sensitivities inside layers, have no calibration images.
        ConfigError: if an argument is none of those allowed, a batch of ``calibration`` or ``range_images`` is not what
            ``forward`` takes, the probes leave no evaluation to search with, ``magnitude`` has no channels to rank, or
            ``reconstruct`` nothing to fit on.
        JournalError: if the journal is of another search, or another process writes it.
    """
    _check_choice("method", method, METHODS)
    _check_choice("environment", environment, get_args(Environment))
    _check_choice("start", start, get_args(Start))
    _check_choice("criterion", criterion, get_args(Criterion))
    if reward is not None and not callable(reward):
        _check_choice("reward", reward, [*REWARDS, GALEN], "or a function (accuracy, cost, limit) -> float")
    asked: dict[str, Any] = {
        "evaluations": evaluations,
        "seed": seed,
        "environment": environment,
        "start": start,
        "decide": decide,
        "sparsity": sparsity,
        "densities": densities,
        "bits": bits,
        "reduce_range": reduce_range,
        "calibration_method": calibration_method,
        "rounding": rounding,
        "min_keep_ratio": min_keep_ratio,
        "protect_first": protect_first,
        "protected": protected,
    }
    if target is not None or reward == GALEN:
        asked |= {"reward": GALEN, "target": target, "beta": beta}
    settings = validated(SearchSettings, asked, "compress")
    settings.check_choices()
    settings = settle_range(settings, table)
    if (settings.target is not None) != (reward == GALEN) or (settings.target and budget is not None):
        msg = f"the reward '{GALEN}' aims at a target and takes no budget; pass the three together: reward='{GALEN}', "
        msg += "target='20% latency', budget=None"
        raise ConfigError(msg)
    if n_images < 1:
        msg = f"n_images is {n_images}; it is how many images evaluate scores on, at least 1"
        raise ConfigError(msg)
    model, inputs = _uncompiled(model), example_tensors(example_inputs)
    batches = read_calibration(calibration, inputs, model)
    ranges = read_calibration(range_images, inputs, model, "range_images") or None
    if reconstruct and not batches:
        msg = "reconstruct fits layers on training inputs; pass some batches as calibration"
        raise ConfigError(msg)
    budgets = read_budgets(budget)
    if not budgets and method in ONE_SHOT:
        msg = f"the method '{method}' needs a budget; without one choose among ppo, ddpg, cem and random"
        raise ConfigError(msg)
    if criterion == "taylor" and importance is None:
        msg = "the criterion 'taylor' needs labelled batches; pass what pruning.importance.rank_units makes of them"
        raise ConfigError(msg)
    if not batches and batch_norms(model):
        _warn(
            "the network has batch norms and no calibration: every plan is scored with the statistics of the whole "
            "network, far below what it is worth; pass a few hundred training images as calibration",
            stacklevel=3,
        )
    graph = leave_refuted_dense(model, capture(model, example_inputs), example_inputs)
    is_ranked = importance is None
    if importance is None:
        importance = rank_units(model, graph, criterion)
    else:
        _check_importance(importance, graph)
    space = space_by(settings, graph, importance, budgets, table)
    scoring = Scoring(
        evaluate=evaluate,
        calibration=batches,
        n_images=n_images,
        reward=resolve_reward(
            reward,
            space.limit,
            target=settings.target.limit(space.cost.dense) if settings.target else None,
            beta=beta,
        ),
        reconstruct=least_squares(seed) if reconstruct else None,
        range_images=ranges,
        calibration_method=calibration_method,
    )
    identity = None
    if journal is not None:
        identity = search_identity(
            model,
            graph,
            batches,
            criterion if is_ranked else importance,
            budget=", ".join(f"{bound.limit} {bound.cost.kind}" for bound in space.bounds) or f"None {space.cost.kind}",
            table=table.digest if table else None,
            environment=environment,
            start=start,
            decide=list(decide),
            sparsity=sparsity,
            densities=list(densities),
            bits=list(bits),
            calibration_method=calibration_method,
            rounding=rounding,
            min_keep_ratio=min_keep_ratio,
            protect_first=protect_first,
            protected=sorted(protected),
            reconstruct=reconstruct,
            reward=f"{reward} {beta:g} {target}" if settings.target else _name_of(reward),
            n_images=n_images,
            # Named only where they are, so that they part no other journals.
            **({"reduce_range": True} if settings.reduce_range else {}),
            **({"range_images": batches_digest(ranges)} if ranges else {}),
        )
    # Agents seed the global generators, which are the caller's.
    with Journal(journal, search=identity) as opened, kept_randomness():
        problem = SearchProblem(model, graph, space, scoring, opened, seed)
        return _search(problem, method, settings, on_evaluation or _ignore)


def _search(
    problem: SearchProblem, method: Method, settings: SearchSettings, on_evaluation: OnEvaluation
) -> Compressed:
    if settings.uses_probes(method):
        as_start = settings.starts_from_probes
        problem = probe(problem, 1.0, on_evaluation, as_start=as_start, shown=as_start, notify=_warn)
        if problem.bits_note:
            _warn(problem.bits_note, stacklevel=4)
    found = search_with(method, problem, settings, on_evaluation=on_evaluation)
    policy = problem.policy(found)
    builder = problem.evaluator("", _ignore)
    dense_accuracy = builder.dense_accuracy()
    searchers = {builder.searcher, method} | ({PROBES} if problem.sensitivity else set())
    return Compressed(
        model=builder.build(policy),
        policy=policy,
        graph=problem.graph,
        accuracy=found.search_accuracy,
        dense_accuracy=dense_accuracy,
        cost=found.cost,
        dense_cost=problem.space.cost.dense,
        evaluations=found.evaluations,
        history=tuple(entry for entry in problem.journal.entries(seed=problem.seed) if entry.searcher in searchers),
    )


def _uncompiled(model: nn.Module) -> nn.Module:
    """The network that `torch.compile` was given, where ``model`` is what it made."""
    inside = getattr(model, "_orig_mod", None)
    if not isinstance(inside, nn.Module):
        return model
    _warn(
        "the network was made by torch.compile, which would compile every plan anew: the network that it was made of "
        "is searched and returned; compile the result, found.model, again",
        stacklevel=4,
    )
    return inside


def _name_of(reward: str | RewardFunction | None) -> str:
    """What a journal calls a reward: its name, or what Python prints of it without its place in memory."""
    return getattr(reward, "__qualname__", None) or without_places(str(reward))


def _check_importance(importance: Mapping[str, Tensor], graph: NetworkGraph) -> None:
    """Refuse scores that are not one for each unit of each group that may be pruned."""
    for group in graph.prunable:
        scores = importance.get(group.name)
        found = "not there" if scores is None else f"of shape {tuple(np.shape(scores))}"
        if scores is None or tuple(np.shape(scores)) != (group.size,):
            msg = (
                f"importance of the group '{group.name}' is {found}; it needs one score for each of its {group.size} "
                "units, as pruning.importance.rank_units returns them for a captured network"
            )
            raise ConfigError(msg)


def _check_choice(name: str, value: str, allowed: Sequence[str], otherwise: str = "") -> None:
    if value in allowed:
        return
    close = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else "."
    msg = f"unknown {name} '{value}'{hint} Allowed: {', '.join(filter(None, (*allowed, otherwise)))}"
    raise ConfigError(msg)


def _warn(message: str, stacklevel: int = 5) -> None:
    """Warn, by default from as deep as `probe` stands, in the line that calls `compress`."""
    warnings.warn(message, UserWarning, stacklevel=stacklevel)


def _ignore(_evaluation: Evaluation) -> None:
    """Tell nobody."""
