"""A latency budget kept by the clock: finalists are measured, and projected again where they are over it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from envs.action import project
from envs.evaluator import CandidateEvaluator
from envs.space import SearchSpace
from latency.runtimes import LatencyError
from latency.table import LatencyTable
from pruning.files import write_atomic
from pruning.policy import CompressionPolicy

from .clock import Clock
from .outcome import DENSE
from .progress import RunDisplay
from .run import MethodFolder
from .subject import Subject

MOST_PROJECTIONS = 3
"""Times that a plan which comes out slower than the table said is made smaller."""

TimeShare = Callable[[CompressionPolicy], float]
"""Measured latency of a plan's network over that of the dense one, from turns in one run."""


class Reading(BaseModel):
    """One plan on the clock."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    predicted: float
    """Latency by the table, over that of the dense network."""
    measured: float
    """Latency on the clock, over that of the dense network in the same run."""


class MeasuredPlan(BaseModel):
    """A plan after it was measured."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    policy: dict[str, Any]
    """The plan, as a policy file has it."""
    readings: tuple[Reading, ...]
    """The plan that was found, and each that followed; the last is `policy`."""
    allowed: float
    """The budget, over the latency of the dense network."""

    @property
    def is_within(self) -> bool:
        """Whether the clock agrees that the budget is kept."""
        return self.readings[-1].measured <= self.allowed


def kept_by_the_clock(
    policy: CompressionPolicy,
    own: MethodFolder,
    subject: Subject,
    space: SearchSpace,
    builder: CandidateEvaluator,
    display: RunDisplay,
) -> CompressionPolicy:
    """The plan that keeps the budget on the clock of the table's device, if that is this one.

    Args:
        policy: plan within the budget by the table.
        own: folder of the method that found it.
        subject: the dense network and its images.
        space: the decisions.
        builder: builds the network of a plan.
        display: told what was read.
    """
    assert subject.config.latency.table is not None
    name = own.root.name
    try:
        clock = Clock.of_table(LatencyTable.load(subject.config.latency.table))
    except LatencyError as error:
        display.say(f"warning: {name} is not measured: {error}")
        return policy
    images = subject.calibration()[0]
    dense = clock.artifact(subject.model, images)

    def time_share(plan: CompressionPolicy) -> float:
        networks = {DENSE: dense, name: clock.artifact(builder.build(plan), images)}
        return clock.time(networks, images).compare(name, DENSE, clock.runtime.name).ratio

    policy, measured = within_measured_budget(policy, space, time_share, own.measured_file)
    last, n_more = measured.readings[-1], len(measured.readings) - 1
    smaller = f", after {n_more} smaller {'plan' if n_more == 1 else 'plans'}" if n_more else ""
    display.say(
        f"{name}: {last.predicted:.1%} of the dense latency by the table, {last.measured:.1%} on the clock{smaller}"
    )
    if not measured.is_within:
        display.say(
            f"warning: {name} is over the budget of {measured.allowed:.1%} on the clock; build the table again on a "
            "quiet machine, or pass a smaller budget"
        )
    return policy


def within_measured_budget(
    policy: CompressionPolicy, space: SearchSpace, time_share: TimeShare, file: Path
) -> tuple[CompressionPolicy, MeasuredPlan]:
    """The plan, or one of the same shape that is small enough for the clock too.

    Where the clock says more than the budget, the plan is projected again to the budget scaled by predicted over
    measured, up to `MOST_PROJECTIONS` times. Budgets of other kinds stay as they are, and are kept by every plan.

    Args:
        policy: plan within the budget by the table.
        space: its decisions, with a budget of latency, alone or among others.
        time_share: measures a plan.
        file: where readings are kept: a continued run reads them there and looks at no clock again.
    """
    if file.exists():
        known = MeasuredPlan.model_validate_json(file.read_text())
        return CompressionPolicy.from_plain(known.policy, f"the plan in '{file}'"), known
    assert space.timed is not None
    limit, cost = space.timed.limit, space.timed.cost
    allowed = limit / cost.dense
    found = space.keep_ratios(policy)
    base = np.array([found[name] for name in space.names])
    readings = [_reading(policy, space, time_share)]
    while readings[-1].measured > allowed and len(readings) <= MOST_PROJECTIONS:
        smaller = math.floor(limit * readings[-1].predicted / readings[-1].measured)
        if smaller < space.lowest_of(cost):
            break
        policy = space.policy(project(base, space.with_limit("latency", smaller)))
        readings.append(_reading(policy, space, time_share))
    plan = MeasuredPlan(policy=policy.to_plain(), readings=tuple(readings), allowed=allowed)
    write_atomic(file, plan.model_dump_json(indent=2).encode())
    return policy, plan


def _reading(policy: CompressionPolicy, space: SearchSpace, time_share: TimeShare) -> Reading:
    assert space.timed is not None
    cost = space.timed.cost
    return Reading(predicted=space.cost_of(policy, cost) / cost.dense, measured=time_share(policy))
