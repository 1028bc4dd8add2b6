"""A latency budget kept by the clock: searches spend what the clock leaves of it, and what they find is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from torch import Tensor

from envs.action import project, start_plan
from envs.evaluator import CandidateEvaluator
from envs.journal import ClockReading, Journal
from envs.space import SearchSpace
from latency.measure import Comparison
from latency.runtimes import Artifact, LatencyError
from pruning.export import ExportError
from pruning.policy import CompressionPolicy

from .clock import ROUNDS, Clock, TableDevice
from .interrupt import StopFlag
from .outcome import DENSE
from .problem import SearchProblem, started_uniformly
from .progress import RunDisplay, count
from .run import MethodFolder
from .subject import Subject

MOST_PROJECTIONS = 3
"""Times that a plan which comes out slower than the table said is made smaller."""
ROUNDS_OF_READINGS = (ROUNDS, 4 * ROUNDS, 8 * ROUNDS)
"""Rounds of a plan's first reading; of the one that follows unless the first one's interval lies within the budget, for
four times as many halve the interval; and of a third where the two intervals lie apart."""

TimeShare = Callable[[CompressionPolicy, int], Comparison]
"""Times a plan's network against the dense one, in turns, so many rounds; `LatencyError` if it cannot."""


@dataclass(frozen=True)
class MeasuredPlan:
    """A plan after it was measured.

    Attributes:
        policy: the plan that was found, or the finalist or other plan that took its place.
        readings: what the clock said of the plan that was found and of each that was read after it, of ``policy`` last.
        allowed: the budget, over the latency of the dense network.
        unmeasured: why the clock does not say all that was asked of `policy`; empty if it does.
    """

    policy: CompressionPolicy
    readings: tuple[ClockReading, ...]
    allowed: float
    unmeasured: str = ""

    @property
    def is_within(self) -> bool:
        """Whether the clock agrees that the budget is kept."""
        return not self.unmeasured and self.readings[-1].measured <= self.allowed


def spent_by_the_clock(problem: SearchProblem, clock: PlanClock, display: RunDisplay) -> SearchProblem:
    """The same problem with as much latency to spend by the table as the clock finds the budget to be.

    Plans of about one cost are about equally wrong in the table. A search that knows spends what is there; a plan that
    is made smaller afterwards was chosen for another budget, and one that the table took for slower than it is leaves
    some of the budget. The start plan is made smaller, or larger, as those that are found are made smaller
    (`within_measured_budget`), and what it then costs by the table is spent. More is spent of shares of the dense
    latency alone: what the dense network takes in milliseconds changes from one hour to the next. Where no clock
    answers, as the table's device is not this one, the table is all there is.

    Args:
        problem: with a budget of latency.
        clock: of the run.
        display: told of the budget that is spent.
    """
    space, bound = problem.space, problem.space.timed
    assert bound is not None
    plan = space.policy(start_plan(space))
    time_share: TimeShare = clock
    if any(entry.purpose == "candidate" for entry in problem.journal.entries()):
        # A search that began with the whole budget is not compared with others that spend more or less.
        time_share = _refusing("plans were searched for before this was asked")
    measured = within_measured_budget(plan, space, time_share, problem.journal, "start")
    if measured.policy == plan and measured.is_within and not clock.is_absolute:
        measured = _with_room_spent(measured, problem, time_share)
    _tell_of_disturbance(measured.readings, display)
    if measured.unmeasured or measured.policy == plan:
        return problem
    limit = space.cost_of(measured.policy, bound.cost)
    asks = "little" if limit < bound.limit else "much"
    display.say(
        f"the table asks too {asks} of the start plan: for the budget of {measured.allowed:.1%} of the dense latency, "
        f"searches spend {limit / bound.cost.dense:.1%} by the table"
    )
    return replace(problem, space=_limited(problem, limit))


def _with_room_spent(small: MeasuredPlan, problem: SearchProblem, time_share: TimeShare) -> MeasuredPlan:
    """The start plan where the clock leaves room: larger by as much as surely is there, if the clock agrees."""
    space, bound, reading = problem.space, problem.space.timed, small.readings[-1]
    assert bound is not None
    # A limit of all that the dense network takes would leave nothing to search.
    room = min(math.floor(bound.limit * reading.predicted / reading.high), bound.cost.dense - 1)
    if room <= bound.limit:
        return small
    roomy = _limited(problem, room)
    larger = space.policy(start_plan(roomy))
    if space.cost_of(larger, bound.cost) <= bound.limit:
        return small
    found = within_measured_budget(larger, space, time_share, problem.journal, "start")
    is_more = space.cost_of(found.policy, bound.cost) > bound.limit
    return found if found.is_within and is_more else replace(small, readings=small.readings + found.readings)


def _limited(problem: SearchProblem, limit: int) -> SearchSpace:
    """The space with another limit of latency, and the start plan that belongs to it."""
    space = problem.space.with_limit("latency", limit)
    return space if problem.starts_from_probes else started_uniformly(space)


def kept_by_the_clock(
    policy: CompressionPolicy,
    own: MethodFolder,
    clock: PlanClock,
    space: SearchSpace,
    journal: Journal,
    display: RunDisplay,
    others: Sequence[CompressionPolicy] = (),
) -> MeasuredPlan:
    """The plan that keeps the budget on the clock of the table's device, if that is this one.

    A plan whose network is being fine-tuned or saved already stays as it is, also where a clock can be asked only now.

    Args:
        policy: plan within what searches spend by the table.
        own: folder of the method that found it.
        clock: of the run.
        space: the decisions.
        journal: holds what was read before, and gets what is read now.
        display: told what was read.
        others: finalists that may take its place, the best first.
    """
    name = own.root.name
    time_share: TimeShare = clock
    if own.tuned_file.exists() or own.finetuning.exists() or own.model.exists():
        time_share = _refusing("its network is fine-tuned or saved already, which another plan would undo")
    assert space.timed is not None
    plan = within_measured_budget(policy, space, time_share, journal, name, others)
    if plan.unmeasured:
        by_table = space.cost_of(plan.policy, space.timed.cost) / space.timed.cost.dense
        over = (
            f" It takes {by_table:.1%} by the table, of {plan.allowed:.1%} allowed" if by_table > plan.allowed else ""
        )
        display.say(f"warning: {name} is not measured: {plan.unmeasured}.{over}")
        return plan
    _tell_of_disturbance(plan.readings, display)
    last, n_more = plan.readings[-1], len({reading.digest for reading in plan.readings}) - 1
    kind = "finalist" if plan.policy in others else "smaller plan"
    after = f", a {kind} in its place" if plan.policy != policy else ""
    tried = f" ({count(n_more + 1, 'plan')} timed)" if n_more else ""
    display.say(
        f"{name}: {last.predicted:.1%} of the dense latency by the table, {last.measured:.1%} ({last.low:.1%} to "
        f"{last.high:.1%}) on the clock{after}{tried}"
    )
    if not plan.is_within:
        display.say(
            f"warning: {name} is over the budget of {plan.allowed:.1%} on the clock; build the table again on a "
            "quiet machine, or pass a smaller budget"
        )
    return plan


def _tell_of_disturbance(readings: Sequence[ClockReading], display: RunDisplay) -> None:
    for one, other in pairwise(readings):
        if one.digest == other.digest and _lie_apart(one, other):
            display.say(
                f"warning: two readings of one plan disagree, {one.measured:.1%} ({one.low:.1%} to {one.high:.1%}) and "
                f"{other.measured:.1%} ({other.low:.1%} to {other.high:.1%}): other programs kept the machine busy. "
                "Budgets of latency are kept on a quiet machine alone"
            )


def within_measured_budget(
    policy: CompressionPolicy,
    space: SearchSpace,
    time_share: TimeShare,
    journal: Journal,
    name: str,
    others: Sequence[CompressionPolicy] = (),
) -> MeasuredPlan:
    """The plan, or one that takes its place, that is small enough for the clock too.

    Where the clock says more than the budget, the first of ``others`` that keeps it is taken: plans that cost the same
    by the table differ on the clock, and what they score is known. Where none does, the plan is projected again to the
    budget scaled by predicted over measured, but to no less than the least that a plan takes by the table, up to
    `MOST_PROJECTIONS` times. Budgets of other kinds stay as they are, and are kept by every plan.

    A reading is enough if the interval that holds its true median at 95 % lies within the limit. Else it is taken again
    with more rounds, for how much smaller a plan is made follows from it; anew and not on top, for readings that end
    where they happen to look good are not those of the network. Two readings whose intervals lie apart were not both of
    the network: something else kept the machine busy, and a third is taken. The median of the last one decides: half of
    all plans at the limit are over it, and no number of rounds would tell.

    Args:
        policy: plan within what searches spend by the table.
        space: its decisions, with a budget of latency, alone or among others.
        time_share: measures a plan; not called for readings that the journal holds.
        journal: each reading is in it before it is used, so that a continued run comes to the same plan.
        name: of the search that found the plan.
        others: plans as costly by the table that may take its place, the best first.
    """
    assert space.timed is not None
    limit, cost = space.timed.limit, space.timed.cost
    allowed, lowest = limit / cost.dense, space.lowest_of(cost)
    found = space.keep_ratios(policy)
    base = space.places(np.rint([found[name] for name in space.names] * space.sizes).astype(np.int64))
    readings: list[ClockReading] = []
    last, unmeasured = None, ""

    def last_reading(plan: CompressionPolicy) -> ClockReading:
        before = len(readings)
        for reading in _readings(plan, space, time_share, journal, name):
            readings.append(reading)
            if reading.high <= allowed or (len(readings) > before + 1 and not _lie_apart(*readings[-2:])):
                break
        return readings[-1]

    try:
        last = last_reading(policy)
        if last.measured > allowed:
            for other in others:
                # One that cannot be timed takes no place.
                with suppress(LatencyError):
                    if last_reading(other).measured <= allowed:
                        return MeasuredPlan(other, tuple(readings), allowed)
        for _ in range(MOST_PROJECTIONS):
            if last.measured <= allowed or space.cost_of(policy, cost) <= lowest:
                break
            smaller = max(lowest, math.floor(limit * last.predicted / last.measured))
            projected = space.policy(project(base, space.with_limit("latency", smaller)))
            # Where the clock does not answer, the plan before stays: its network may have been trained already.
            policy, last = projected, last_reading(projected)
    except LatencyError as error:
        unmeasured = str(error)
    if last is not None and readings[-1] != last:
        readings.append(last)  # of the plan that stays, where no smaller one was left, or could be read
    return MeasuredPlan(policy, tuple(readings), allowed, unmeasured=unmeasured)


def _lie_apart(one: ClockReading, other: ClockReading) -> bool:
    """Whether no ratio lies in the intervals of both."""
    return one.high < other.low or other.high < one.low


def _readings(
    policy: CompressionPolicy, space: SearchSpace, time_share: TimeShare, journal: Journal, name: str
) -> Iterator[ClockReading]:
    """What the clock says of one plan, from the journal where that holds it, with more rounds each time."""
    assert space.timed is not None
    cost = space.timed.cost
    for rounds in ROUNDS_OF_READINGS:
        reading = journal.reading(policy.digest, rounds)
        if reading is None:
            predicted, found = space.cost_of(policy, cost) / cost.dense, time_share(policy, rounds)
            reading = ClockReading(name, policy.digest, predicted, found.ratio, found.low, found.high, rounds)
            journal.append(reading)
        yield reading


def _refusing(reason: str) -> TimeShare:
    """What stands for a clock that may not be asked."""

    def refuse(policy: CompressionPolicy, rounds: int) -> Comparison:
        raise LatencyError(reason)

    return refuse


@dataclass(frozen=True)
class PlanClock:
    """Times plans against the dense network; before the first, nothing is timed and nothing is exported.

    Where the budget is a time and no share, it says how long a plan takes over what the table says of the dense
    network: an error of the table's there would be one of the plan's.

    Attributes:
        subject: the dense network and its images.
        builder: builds the network of a plan.
        dense_ns: latency of the dense network by the table.
        device: of the table.
        stop: looked at before each reading.
    """

    subject: Subject
    builder: CandidateEvaluator
    dense_ns: int
    device: TableDevice
    stop: StopFlag

    @classmethod
    def of(cls, subject: Subject, problem: SearchProblem, device: TableDevice, stop: StopFlag) -> PlanClock | None:
        """The clock of a run; None without a budget of latency, or where `LatencyConfig.clock` rules it out."""
        bound = problem.space.timed
        if bound is None or not subject.config.latency.clock:
            return None
        return cls(subject, problem.evaluator("", lambda _: None), bound.cost.dense, device, stop)

    @property
    def is_absolute(self) -> bool:
        """Whether the budget is a time."""
        return any(budget.kind == "latency" and budget.absolute for budget in self.subject.config.budget)

    @property
    def _clock(self) -> Clock:
        if self.device.clock is None:
            raise LatencyError(self.device.elsewhere)
        return self.device.clock

    @cached_property
    def _dense(self) -> Artifact:
        return self._clock.artifact(self.subject.model, self._images)

    @cached_property
    def _images(self) -> Tensor:
        return self.subject.calibration()[0]

    def __call__(self, policy: CompressionPolicy, rounds: int) -> Comparison:
        """As `TimeShare` says."""
        self.stop.check()
        clock = self._clock
        try:
            networks = {DENSE: self._dense, "plan": clock.artifact(self.builder.build(policy), self._images)}
        except ExportError as error:
            msg = f"it cannot be exported: {error}"
            raise LatencyError(msg) from error
        report, runtime = clock.time(networks, self._images, rounds), clock.device.runtime.name
        found = report.compare("plan", DENSE, runtime)
        if not self.is_absolute:
            return found
        by_table = 1e6 * report.entry(DENSE, runtime).median_ms / self.dense_ns
        return replace(found, ratio=found.ratio * by_table, low=found.low * by_table, high=found.high * by_table)
