"""One method of a search: its evaluations, what it proposes, and the plan chosen among its finalists."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from agent.baselines import run_baseline
from agent.checkpoint import warn
from agent.config import AgentConfig, default_config
from envs.action import project
from envs.allocation import greedy, knapsack
from envs.evaluator import EvaluateFunction
from envs.journal import JournalEntry
from envs.network_env import NetworkEnv
from envs.plans import global_magnitude, uniform
from envs.space import Ratios, SearchSpace
from pruning.policy import CompressionPolicy

from .agents import search_by_agent
from .config import AGENTS, ONE_SHOT, PROBING, ConfigError, Method, SearchSettings
from .problem import OnEvaluation, SearchProblem, WatchedEvaluator
from .progress import count
from .run import MethodFolder

_FINALISTS = " finalists"
"""What follows a method's name in the journal where its finalists are scored."""


class MethodSearch(BaseModel):
    """What one method found."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    method: Method
    evaluations: float
    """Evaluations counted: candidates, finalists pro rata, and the probes where the method used them."""
    plans: int = 0
    """Different plans scored on the search images."""
    cache_hits: int
    """Plans proposed again, which were free."""
    seconds: float
    """Wall time of the search, probes and finalists included."""
    seconds_evaluating: float
    """Part of it spent building and scoring candidates."""
    search_accuracy: float
    """Best accuracy on the search images."""
    validation_accuracy: float
    """Accuracy of the chosen plan on the whole validation split."""
    cost: int
    """Cost of the chosen plan, in the budget's kind."""
    kept: dict[str, int]
    """Units that the chosen plan keeps of each group; groups not named stay dense."""
    layers: dict[str, dict[str, Any]] = {}
    """Sparsity and bits that it gives each layer, as in a policy file; layers not named are untouched."""


def search_with(
    method: Method,
    problem: SearchProblem,
    settings: SearchSettings,
    *,
    on_evaluation: OnEvaluation,
    on_finalist: OnEvaluation | None = None,
    evaluate_all: EvaluateFunction | None = None,
    n_validation: int = 0,
    agent: AgentConfig | None = None,
    files: MethodFolder | None = None,
    tensorboard: Path | None = None,
    notify: Callable[[str], None] = warn,
) -> MethodSearch:
    """Search with one method and choose among its best plans.

    Args:
        method: which.
        problem: network, decisions, start and scoring, the same for all methods.
        settings: evaluations, finalists and so on.
        on_evaluation: told of each evaluation.
        on_finalist: told of each finalist scored on the whole validation split.
        evaluate_all: accuracy on the whole validation split, for the finalists; none takes the best search score.
        n_validation: images of the whole validation split.
        agent: hyper-parameters, for an agent; its own defaults if not given.
        files: where an agent saves itself, and continues from; none saves nothing.
        tensorboard: where an agent logs its training.
        notify: told of damaged checkpoints, and of a replay buffer that is too small for the whole search.

    Raises:
        ConfigError: if probes and finalists leave nothing to search with, or the method ranks channels, and none are
            decided.
    """
    started = time.perf_counter()
    check_has_channels(method, problem.space)
    names = (method, f"{method}{_FINALISTS}")
    # A resumed search replays these for free; the time they took when they were made is counted all the same.
    before = math.fsum(entry.seconds for name in names for entry in problem.journal.entries(name, problem.seed))
    weight = max(1.0, n_validation / problem.scoring.n_images) if evaluate_all else 1.0
    probes = problem.probe_evaluations if settings.uses_probes(method) else 0.0
    granted = check_enough(method, settings, probes, weight)
    evaluator = problem.evaluator(method, on_evaluation, max_evaluations=granted)
    propose(method, problem, evaluator, settings, agent, files, tensorboard, notify)
    searchers = [evaluator]
    best = ranked_plans(problem, evaluator)
    if evaluate_all and weight > 1:
        searchers.append(
            problem.evaluator(f"{method}{_FINALISTS}", on_finalist or on_evaluation, evaluate=evaluate_all)
        )
        for entry in best[: _n_finalists(method, settings)]:
            searchers[1].score(problem.policy(entry), purpose="finalist")
    chosen = ranked_plans(problem, searchers[-1])[0]
    probe_seconds = problem.probe_seconds if probes else 0.0
    return MethodSearch(
        method=method,
        evaluations=probes + evaluator.evaluations_used + weight * sum(s.evaluations_used for s in searchers[1:]),
        plans=len(best),
        cache_hits=evaluator.cache_hits,
        seconds=probe_seconds + before + time.perf_counter() - started,
        seconds_evaluating=probe_seconds + math.fsum(searcher.seconds for searcher in searchers),
        search_accuracy=best[0].accuracy,
        validation_accuracy=chosen.accuracy,
        cost=chosen.cost,
        kept=chosen.kept,
        layers=chosen.layers,
    )


def other_finalists(
    method: Method, problem: SearchProblem, settings: SearchSettings, chosen: CompressionPolicy
) -> list[CompressionPolicy]:
    """The finalists of a method that has ended beside the one it chose, the best first."""
    journal = problem.journal
    # Where the search images are all there are, they were not scored again.
    scored = journal.entries(f"{method}{_FINALISTS}", problem.seed) or journal.entries(method, problem.seed)
    policies = [problem.policy(entry) for entry in _ranked(problem, scored)[: _n_finalists(method, settings)]]
    return [policy for policy in policies if policy.digest != chosen.digest]


def propose(
    method: Method,
    problem: SearchProblem,
    evaluator: WatchedEvaluator,
    settings: SearchSettings,
    agent: AgentConfig | None,
    files: MethodFolder | None,
    tensorboard: Path | None,
    notify: Callable[[str], None],
) -> None:
    """Let one method propose plans until its evaluations are spent; what it proposed is in the evaluator's history.

    Where everything on offer keeps the budgets, there is one plan, and it is scored.
    """
    space = problem.space
    if space.has_one_plan:
        evaluator.score(space.policy(space.maximum))
    elif method in ONE_SHOT:
        evaluator.score(space.policy(project(_one_shot(method, problem), space)))
    elif method in ("ppo", "ddpg"):
        config = agent or default_config(method)
        search_by_agent(problem, evaluator, settings, config, files, tensorboard, notify=notify)
    else:
        env = NetworkEnv(space, evaluator, reward=problem.scoring.reward)
        granted = math.floor(evaluator.max_evaluations)
        run_baseline("cem" if method == "cem" else "random", env, n_evaluations=granted, seed=problem.seed)


def _one_shot(method: Method, problem: SearchProblem) -> Ratios:
    """Keep-ratio offsets of a method that proposes a single plan, shape ``(n,)``."""
    if method == "sensitivity":
        return problem.sensitivity_offsets()
    if method in ("greedy", "knapsack"):
        return (greedy if method == "greedy" else knapsack)(problem.space, problem.losses())
    return global_magnitude(problem.space) if method == "magnitude" else uniform(problem.space)


def ranked_plans(problem: SearchProblem, evaluator: WatchedEvaluator) -> list[JournalEntry]:
    """The plans scored, best reward first; those scored on more images come before those scored on fewer."""
    return _ranked(problem, evaluator.history)


def _ranked(problem: SearchProblem, entries: Iterable[JournalEntry]) -> list[JournalEntry]:
    plans = [entry for entry in entries if entry.purpose in ("candidate", "finalist")]
    return sorted(plans, key=lambda entry: (-entry.fidelity, -problem.reward(entry.accuracy, entry.cost)))


def _n_finalists(method: Method, settings: SearchSettings) -> int:
    return 1 if method in ONE_SHOT else settings.finalists


def check_has_channels(method: Method, space: SearchSpace) -> None:
    """Raise `ConfigError` for global magnitude where no channel group is decided: it has nothing to rank."""
    if method == "magnitude" and not space.groups:
        msg = (
            f"the method '{method}' ranks channels, and no channel group is decided here: let channels be decided "
            "(search.decide, search.protect_first, search.protected), or choose another method"
        )
        raise ConfigError(msg)


def check_enough(method: Method, settings: SearchSettings, probes: float, weight: float) -> float:
    """Evaluations that a method may spend on proposals: those granted, without probes and finalists.

    Args:
        method: which.
        settings: evaluations, finalists and whether the method uses the probes.
        probes: evaluations of the sensitivity probes.
        weight: evaluations that a finalist counts as: validation images over search images.

    Raises:
        ConfigError: if less than one is left; it says what helps this method.
    """
    n_finalists = _n_finalists(method, settings)
    spent = {
        "the sensitivity probes take": probes if settings.uses_probes(method) else 0.0,
        f"rescoring {count(n_finalists, 'finalist')} takes": n_finalists * weight if weight > 1 else 0.0,
    }
    by_probes, by_rescoring = spent.values()
    left = settings.evaluations - by_probes - by_rescoring
    if left >= 1:
        return left
    ways = [f"grant at least {math.ceil(by_probes + by_rescoring) + 1}"]
    if by_probes:
        ways.append("lower search.probe_share")
    if by_probes and method not in PROBING:
        uniform = "set search.start to uniform" if settings.starts_from_probes else ""
        unseen = "set search.show_sensitivity to false" if settings.show_sensitivity and method in AGENTS else ""
        ways.append(" and ".join(filter(None, (uniform, unseen))))
    if by_rescoring and n_finalists > 1:
        ways.append("lower search.finalists")
    if by_rescoring:
        ways.append("raise search.search_images, so that fewer images are left for rescoring")
    takes = " and ".join(f"{what} {evaluations:g}" for what, evaluations in spent.items() if evaluations)
    msg = (
        f"{method} is granted {count(settings.evaluations, 'evaluation')}, but {takes}, which leaves less than one; "
        f"{', or '.join(ways)}"
    )
    raise ConfigError(msg)
