"""A latency budget kept by the clock: searches spend what the clock leaves of it, and what they find is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
from latency.table import LatencyTable
from pruning.policy import CompressionPolicy

from .clock import ROUNDS, Clock
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
        policy: the plan that was found, or the finalist or smaller plan that took its place.
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


def spent_by_the_clock(
    problem: SearchProblem, subject: Subject, builder: CandidateEvaluator, display: RunDisplay
) -> SearchProblem:
    """The same problem with as much latency to spend by the table as the clock finds the budget to be.

    Plans of about one cost are about equally wrong in the table. A search that knows spends what is there; a plan that
    is made smaller afterwards was chosen for another budget, and one that the table took for slower than it is leaves
    some of the budget. Where the clock finds the start plan over the budget, it is made smaller as those that are found
    are (`within_measured_budget`); where it surely finds room, larger by what the upper end of the reading's interval
    leaves, once, and stays so if the clock agrees. What the start plan then costs by the table is spent. Without a
    clock (the table's device is not this one, or `LatencyConfig.clock` rules it out) the table is all there is.

    Args:
        problem: with a budget of latency or without.
        subject: the dense network and its images.
        builder: builds the network of a plan.
        display: told of the budget that is spent.
    """
    space, bound = problem.space, problem.space.timed
    if bound is None or not subject.config.latency.clock:
        return problem
    plan = space.policy(start_plan(space))
    # A search that began without a clock is not compared with others that spend more or less.
    began = any(entry.purpose == "candidate" for entry in problem.journal.entries())
    settled = "plans were searched for without a clock before" if began else ""
    clock = _PlanClock(subject, builder, bound.cost.dense, settled)
    measured = within_measured_budget(plan, space, clock, problem.journal, "start")
    if measured.policy == plan and measured.is_within:
        measured = _with_room_spent(measured, space, clock, problem.journal)
    if measured.unmeasured or measured.policy == plan:
        return problem
    limit = space.cost_of(measured.policy, bound.cost)
    _tell_of_disturbance(measured.readings, display)
    asks = "little" if limit < bound.limit else "much"
    display.say(
        f"the table asks too {asks} of the start plan: for the budget of {measured.allowed:.1%} of the dense latency, "
        f"searches spend {limit / bound.cost.dense:.1%} by the table"
    )
    changed = space.with_limit("latency", limit)
    return replace(problem, space=changed if problem.sensitivity else started_uniformly(changed))


def _with_room_spent(small: MeasuredPlan, space: SearchSpace, time_share: TimeShare, journal: Journal) -> MeasuredPlan:
    """The start plan, larger by what the clock leaves of the budget, if the clock agrees; else as it is."""
    assert space.timed is not None
    cost, reading = space.timed.cost, small.readings[-1]
    room = space.with_limit("latency", math.floor(space.timed.limit * reading.predicted / reading.high))
    larger = room.policy(start_plan(room))
    if space.cost_of(larger, cost) <= space.timed.limit:
        return small
    reader = _PlanReader(space, time_share, journal, "start")
    try:
        fits = reader.read(larger).measured <= small.allowed
    except LatencyError:
        return small
    return MeasuredPlan(larger, (*small.readings, *reader.readings), small.allowed) if fits else small


def kept_by_the_clock(
    policy: CompressionPolicy,
    own: MethodFolder,
    subject: Subject,
    space: SearchSpace,
    builder: CandidateEvaluator,
    journal: Journal,
    display: RunDisplay,
    others: Sequence[CompressionPolicy] = (),
) -> MeasuredPlan:
    """The plan that keeps the budget on the clock of the table's device, if that is this one.

    A plan whose network is being fine-tuned or saved already stays as it is, also where a clock can be asked only now.

    Args:
        policy: plan within what searches spend by the table.
        own: folder of the method that found it.
        subject: the dense network and its images.
        space: the decisions.
        builder: builds the network of a plan.
        journal: holds what was read before, and gets what is read now.
        display: told what was read.
        others: finalists that may take its place, the best first.
    """
    name, settled = own.root.name, ""
    if own.tuned_file.exists() or own.finetuning.exists() or own.model.exists():
        settled = "its network is fine-tuned or saved already, which another plan would undo"
    assert space.timed is not None
    clock = _PlanClock(subject, builder, space.timed.cost.dense, settled)
    plan = within_measured_budget(policy, space, clock, journal, name, others)
    if plan.unmeasured:
        display.say(f"warning: {name} is not measured: {plan.unmeasured}")
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
    reader, lowest = _PlanReader(space, time_share, journal, name), space.lowest_of(cost)
    readings, allowed = reader.readings, reader.allowed
    found = space.keep_ratios(policy)
    base = np.array([found[name] for name in space.names])
    try:
        last = reader.read(policy)
        if last.measured > allowed:
            for other in others:
                if reader.read(other).measured <= allowed:
                    return MeasuredPlan(other, tuple(readings), allowed)
        for _ in range(MOST_PROJECTIONS):
            if last.measured <= allowed or space.cost_of(policy, cost) <= lowest:
                break
            smaller = max(lowest, math.floor(limit * last.predicted / last.measured))
            policy = space.policy(project(base, space.with_limit("latency", smaller)))
            last = reader.read(policy)
    except LatencyError as error:
        return MeasuredPlan(policy, tuple(readings), allowed, unmeasured=str(error))
    if readings[-1] != last:
        readings.append(last)  # of the plan that stays, where no smaller one was left to read
    return MeasuredPlan(policy, tuple(readings), allowed)


def _lie_apart(one: ClockReading, other: ClockReading) -> bool:
    """Whether no ratio lies in the intervals of both."""
    return one.high < other.low or other.high < one.low


@dataclass(frozen=True)
class _PlanReader:
    """What the clock says of plans, from the journal where that holds it.

    Attributes:
        space: the decisions, with a budget of latency.
        time_share: measures a plan.
        journal: holds what was read before, and gets what is read now.
        name: of the search that found the plans.
        readings: all of them, in order.
    """

    space: SearchSpace
    time_share: TimeShare
    journal: Journal
    name: str
    readings: list[ClockReading] = field(default_factory=list)

    @property
    def allowed(self) -> float:
        """The budget, over the latency of the dense network by the table."""
        assert self.space.timed is not None
        return self.space.timed.limit / self.space.timed.cost.dense

    def read(self, plan: CompressionPolicy) -> ClockReading:
        """A plan's last reading: the first that lies within the budget, or that agrees with the one before."""
        before = len(self.readings)
        for rounds in ROUNDS_OF_READINGS:
            reading = self._reading(plan, rounds)
            self.readings.append(reading)
            is_second = len(self.readings) > before + 1
            if reading.high <= self.allowed or (is_second and not _lie_apart(*self.readings[-2:])):
                break
        return self.readings[-1]

    def _reading(self, plan: CompressionPolicy, rounds: int) -> ClockReading:
        before = self.journal.reading(plan.digest, rounds)
        if before is not None:
            return before
        assert self.space.timed is not None
        cost = self.space.timed.cost
        predicted, found = self.space.cost_of(plan, cost) / cost.dense, self.time_share(plan, rounds)
        reading = ClockReading(self.name, plan.digest, predicted, found.ratio, found.low, found.high, rounds)
        self.journal.append(reading)
        return reading


@dataclass(frozen=True)
class _PlanClock:
    """Times plans against the dense network; before the first, no clock is asked for and nothing is exported.

    Where the budget is a time and no share, it says how long a plan takes over what the table says of the dense
    network: an error of the table's there would be one of the plan's.

    Attributes:
        subject: the dense network and its images.
        builder: builds the network of a plan.
        dense_ns: latency of the dense network by the table.
        settled: why it is too late to ask a clock, if it is.
    """

    subject: Subject
    builder: CandidateEvaluator
    dense_ns: int
    settled: str = ""

    @cached_property
    def _clock(self) -> Clock:
        if self.settled:
            raise LatencyError(self.settled)
        assert self.subject.config.latency.table is not None
        return Clock.of_table(LatencyTable.load(self.subject.config.latency.table))

    @cached_property
    def _dense(self) -> Artifact:
        return self._clock.artifact(self.subject.model, self._images)

    @cached_property
    def _images(self) -> Tensor:
        return self.subject.calibration()[0]

    def __call__(self, policy: CompressionPolicy, rounds: int) -> Comparison:
        clock = self._clock
        networks = {DENSE: self._dense, "plan": clock.artifact(self.builder.build(policy), self._images)}
        report, runtime = clock.time(networks, self._images, rounds), clock.device.runtime.name
        found = report.compare("plan", DENSE, runtime)
        if not any(budget.kind == "latency" and budget.absolute for budget in self.subject.config.budget):
            return found
        by_table = 1e6 * report.entry(DENSE, runtime).median_ms / self.dense_ns
        return replace(found, ratio=found.ratio * by_table, low=found.low * by_table, high=found.high * by_table)
