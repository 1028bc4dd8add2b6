from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from envs.action import project, start_plan
from envs.journal import Journal, JournalEntry, Purpose
from envs.space import SearchSpace
from experiments.clock import TableDevice
from experiments.config import LatencyConfig, RunConfig, SearchSettings
from experiments.interrupt import Interrupted, StopFlag
from experiments.measured_budget import (
    MOST_PROJECTIONS,
    ROUNDS_OF_READINGS,
    MeasuredPlan,
    PlanClock,
    TimeShare,
    kept_by_the_clock,
    spent_by_the_clock,
    within_measured_budget,
)
from experiments.methods import other_finalists
from experiments.problem import SearchProblem
from experiments.progress import RunDisplay
from experiments.run import MethodFolder
from experiments.search import start_run
from experiments.subject import Subject
from graph_encoder.capture import capture
from latency.budget import Budget, read_budgets
from latency.measure import Comparison, LatencyReport, summarise
from latency.runtimes import LatencyError
from latency.table import build_table, needed_kinds, start_table
from pruning.export import ExportError
from pruning.policy import CompressionPolicy
from tests.latency.synthetic import FormulaDevice

from .test_floor import TINY, saved_table


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)]
    model = nn.Sequential(*layers, nn.Conv2d(64, 8, 1))
    graph = capture(model, torch.zeros(2, 3, 8, 8))
    device = FormulaDevice()
    table = build_table(start_table(device), device, needed_kinds(graph, {g.name: 1 for g in graph.prunable}, [32]))
    importance = {group.name: np.arange(group.size) for group in graph.prunable}
    return SearchSpace.build(
        graph, importance, Budget(kind="latency", share=0.6), rounding=1, protect_first=False, table=table
    )


@pytest.fixture(scope="module")
def beside_bytes(space: SearchSpace) -> SearchSpace:
    """The same under a budget of bytes, too, which leaves less than the latency does."""
    budget = Budget(kind="bytes", share=0.5)
    counted = SearchSpace.build(space.graph, space.importance, budget, rounding=1, protect_first=False)
    return replace(space, bounds=(*space.bounds, *counted.bounds))


FIRST, SECOND, THIRD = ROUNDS_OF_READINGS


def by_the_table(space: SearchSpace, policy: CompressionPolicy) -> float:
    return space.cost_of(policy) / space.cost.dense


def found(share: float, rounds: int, half_width: float = 1e-6) -> Comparison:
    return Comparison(share, share - half_width, share + half_width, rounds, 0)


def exactly(share: Callable[[CompressionPolicy], float]) -> TimeShare:
    """A clock without noise."""
    return lambda policy, rounds: found(share(policy), rounds)


def kept(
    policy: CompressionPolicy,
    space: SearchSpace,
    clock: TimeShare,
    journal: Journal | None = None,
    others: Sequence[CompressionPolicy] = (),
) -> MeasuredPlan:
    return within_measured_budget(policy, space, clock, Journal() if journal is None else journal, "uniform", others)


def test_a_plan_within_the_budget_on_the_clock_is_left_as_it_is(space: SearchSpace) -> None:
    policy = space.policy(start_plan(space))

    measured = kept(policy, space, exactly(lambda p: 0.99 * by_the_table(space, p)))

    assert measured.policy == policy
    assert len(measured.readings) == 1 and measured.is_within
    assert measured.readings[0].predicted <= measured.allowed == space.limit / space.cost.dense  # type: ignore[operator]


def test_a_plan_that_the_clock_finds_slower_is_made_smaller_until_it_keeps_the_budget(space: SearchSpace) -> None:
    policy = space.policy(start_plan(space))

    # Half as slow again as the table says, whatever the plan: one projection to a smaller budget mends it.
    measured = kept(policy, space, exactly(lambda p: 1.5 * by_the_table(space, p)))

    assert measured.is_within
    assert [reading.measured for reading in measured.readings if reading.rounds == FIRST] == [
        pytest.approx(1.5 * by_the_table(space, each)) for each in (policy, measured.policy)
    ]
    assert len(measured.policy.kept) > 0 and by_the_table(space, measured.policy) <= measured.allowed / 1.5


def three_plans(space: SearchSpace) -> list[CompressionPolicy]:
    """Three plans within the budget, which keep more of one layer and less of another."""
    shifts = ((0.0, 0.0, 0.0), (0.6, -0.6, 0.0), (-0.6, 0.6, 0.0))
    plans = [space.policy(project(np.array(shift), space)) for shift in shifts]
    assert len({plan.digest for plan in plans}) == 3
    return plans


def test_another_finalist_that_keeps_the_budget_on_the_clock_takes_the_place_of_the_best(space: SearchSpace) -> None:
    best, second, third = three_plans(space)
    shares = {best.digest: 0.65, second.digest: 0.61, third.digest: 0.59}
    clock = exactly(lambda plan: shares[plan.digest])

    measured = kept(best, space, clock, others=(second, third))

    assert measured.policy == third and measured.is_within
    assert list(dict.fromkeys(reading.digest for reading in measured.readings)) == list(shares)


def test_the_best_is_made_smaller_where_the_other_finalists_are_slow_or_cannot_be_timed(space: SearchSpace) -> None:
    best, second, third = three_plans(space)

    def clock(plan: CompressionPolicy, rounds: int) -> Comparison:
        if plan == third:
            msg = "it cannot be exported"
            raise LatencyError(msg)
        return found(0.7 if plan == second else 1.2 * by_the_table(space, plan), rounds)

    measured = kept(best, space, clock, others=(second, third))

    assert measured.is_within and measured.policy not in (best, second, third)
    assert measured.readings[-1].digest == measured.policy.digest


def test_the_last_reading_is_that_of_the_plan_that_stays_where_no_smaller_one_can_be_timed(space: SearchSpace) -> None:
    best, second, _ = three_plans(space)
    known = {best.digest: 0.65, second.digest: 0.7}

    def clock(plan: CompressionPolicy, rounds: int) -> Comparison:
        if plan.digest not in known:
            msg = "it cannot be exported"
            raise LatencyError(msg)
        return found(known[plan.digest], rounds)

    measured = kept(best, space, clock, others=(second,))

    assert (measured.policy, measured.unmeasured) == (best, "it cannot be exported")
    assert measured.readings[-1].digest == best.digest


def test_the_best_is_made_smaller_where_no_finalist_keeps_the_budget(space: SearchSpace) -> None:
    best, second, third = three_plans(space)
    shares = {second.digest: 0.61, third.digest: 0.7}
    clock = exactly(lambda plan: shares.get(plan.digest, 1.2 * by_the_table(space, plan)))

    measured = kept(best, space, clock, others=(second, third))

    assert measured.policy == kept(best, space, clock).policy not in (best, second, third)
    assert measured.is_within


def test_the_last_reading_is_of_the_plan_that_stays(space: SearchSpace) -> None:
    fastest = space.policy(space.fastest)

    measured = kept(fastest, space, exactly(lambda plan: 0.7 if plan == fastest else 0.8), others=three_plans(space))

    assert measured.policy == fastest and not measured.is_within
    assert measured.readings[-1].digest == fastest.digest and measured.readings[-1].measured == 0.7


def test_finalists_are_those_scored_on_most_images_the_best_first(space: SearchSpace) -> None:
    plans, journal = three_plans(space), Journal()
    scoring = cast("Any", SimpleNamespace(reward=lambda accuracy, *_: accuracy))
    problem = replace(problem_with(space, journal), scoring=scoring)

    def score(searcher: str, purpose: Purpose, accuracies: Sequence[float]) -> None:
        for index, (plan, accuracy) in enumerate(zip(plans, accuracies, strict=False)):
            counts = {name: len(units) for name, units in plan.kept.items()}
            cost = space.cost_of(plan)
            journal.append(
                JournalEntry(index, searcher, 0, purpose, plan.digest, counts, 1.0, accuracy, cost, 0.0, index + 1.0)
            )

    score("ppo", "candidate", (0.3, 0.2, 0.9))
    assert other_finalists("ppo", problem, SearchSettings(finalists=2), plans[2]) == [plans[0]]
    score("ppo finalists", "finalist", (0.4, 0.5))
    assert other_finalists("ppo", problem, SearchSettings(finalists=2), plans[2]) == [plans[1], plans[0]]
    assert other_finalists("ppo", problem, SearchSettings(finalists=2), plans[1]) == [plans[0]]
    assert other_finalists("uniform", problem, SearchSettings(), plans[0]) == []


def test_a_smaller_plan_keeps_the_other_budgets_and_only_the_time_is_cut(beside_bytes: SearchSpace) -> None:
    policy = beside_bytes.policy(start_plan(beside_bytes))
    share = beside_bytes.cost_of(policy) / beside_bytes.cost.dense

    # So slow that the plan, which bytes made small, is over the time by a tenth.
    measured = kept(policy, beside_bytes, exactly(lambda p: 0.66 / share * by_the_table(beside_bytes, p)))

    bound = beside_bytes.bounds[1]
    assert measured.is_within and len(measured.readings) > 1
    assert beside_bytes.cost_of(measured.policy, bound.cost) <= bound.limit


def test_it_ends_where_the_clock_never_agrees(space: SearchSpace) -> None:
    measured = kept(space.policy(start_plan(space)), space, exactly(lambda _: 0.65))

    assert not measured.is_within
    assert len({reading.digest for reading in measured.readings}) == 1 + MOST_PROJECTIONS


@pytest.mark.parametrize(("of_the_fastest", "is_within"), [(0.5, True), (0.7, False)])
def test_the_fastest_plan_is_read_before_a_budget_is_given_up(
    space: SearchSpace, of_the_fastest: float, is_within: bool
) -> None:
    policy, lowest = space.policy(start_plan(space)), space.lowest_of(space.cost)
    # So slow that the scaled budget is less than any plan takes by the table.
    clock = exactly(lambda p: of_the_fastest if space.cost_of(p) == lowest else 50.0)

    measured = kept(policy, space, clock)

    assert [space.cost_of(measured.policy), measured.is_within] == [lowest, is_within]
    assert list(dict.fromkeys(r.digest for r in measured.readings)) == [policy.digest, measured.policy.digest]
    assert spent(problem_with(space, Journal()), clock).space.limit == lowest


def test_how_much_smaller_a_plan_is_made_follows_from_the_finer_reading(space: SearchSpace) -> None:
    policy = space.policy(start_plan(space))

    # The first reading is far off, and its interval lies above the limit; 2 % less time would do.
    def clock(plan: CompressionPolicy, rounds: int) -> Comparison:
        return found((1.3 if rounds == FIRST and plan == policy else 1.02) * by_the_table(space, plan), rounds)

    measured = kept(policy, space, clock)

    assert measured.is_within
    assert by_the_table(space, measured.policy) > 0.9 * measured.allowed


def test_a_third_reading_decides_where_two_lie_apart(space: SearchSpace) -> None:
    policy, asked = space.policy(start_plan(space)), []

    # Something else keeps the machine busy during the second.
    def clock(plan: CompressionPolicy, rounds: int) -> Comparison:
        asked.append(rounds)
        share = by_the_table(space, plan) / by_the_table(space, policy)
        return found({FIRST: 0.62, SECOND: 0.78, THIRD: 0.63}[rounds] * share, rounds)

    measured = kept(policy, space, clock)

    assert asked[:3] == [FIRST, SECOND, THIRD]
    assert measured.is_within
    assert by_the_table(space, measured.policy) > 0.8 * measured.allowed  # 0.77 by the second


@pytest.mark.parametrize(("median", "n_plans"), [(0.61, 2), (0.59, 1)])
def test_a_reading_that_noise_leaves_open_is_taken_again_and_the_second_decides(
    space: SearchSpace, median: float, n_plans: int
) -> None:
    asked: list[int] = []

    # The first reading errs to the other side of the limit of 60 %; the second is right, and ends on neither side.
    def clock(policy: CompressionPolicy, rounds: int) -> Comparison:
        asked.append(rounds)
        if len(asked) > 2:
            return found(0.5, rounds)
        return found(1.2 - median, rounds, 0.04) if rounds == FIRST else found(median, rounds, 0.02)

    measured = kept(space.policy(start_plan(space)), space, clock)

    assert asked == [FIRST, SECOND, FIRST][: n_plans + 1]
    assert len({reading.digest for reading in measured.readings}) == n_plans
    assert measured.is_within


def test_a_run_killed_between_readings_comes_to_the_plan_of_one_that_was_not(
    space: SearchSpace, tmp_path: Path
) -> None:
    policy, truth = space.policy(start_plan(space)), [0.7, 0.5]
    whole = kept(policy, space, exactly(lambda p: truth[p != policy]))

    def killed(_: CompressionPolicy, rounds: int) -> Comparison:
        nonlocal n_read
        n_read += 1
        if n_read == 3:
            raise KeyboardInterrupt
        return found(truth[0], rounds)

    n_read = 0
    with Journal(tmp_path / "journal.jsonl") as journal, pytest.raises(KeyboardInterrupt):
        kept(policy, space, killed, journal)
    # The first plan would come out otherwise now.
    again = kept(
        policy, space, exactly(lambda p: truth[1] if p != policy else 0.9), Journal(tmp_path / "journal.jsonl")
    )

    assert len(whole.readings) == 3 and again == whole


def test_a_continued_run_reads_what_was_measured_and_needs_no_clock(space: SearchSpace, tmp_path: Path) -> None:
    policy = space.policy(start_plan(space))
    with Journal(tmp_path / "journal.jsonl") as journal:
        first = kept(policy, space, exactly(lambda p: 0.7 if p == policy else 0.5), journal)

    def refused(_: CompressionPolicy, rounds: int) -> Comparison:
        msg = "the table is of another device"
        raise LatencyError(msg)

    assert first.policy != policy
    assert kept(policy, space, refused, Journal(tmp_path / "journal.jsonl")) == first
    without = kept(policy, space, refused)
    assert (without.policy, without.readings, without.unmeasured) == (policy, (), "the table is of another device")
    assert not without.is_within


@pytest.mark.parametrize("made", ["tuned.safetensors", "finetuning", "model"])
def test_a_plan_that_was_made_without_a_clock_is_not_made_smaller_by_one_found_later(
    space: SearchSpace, tmp_path: Path, made: str
) -> None:
    own = MethodFolder(tmp_path / "uniform")
    (own.root / made).mkdir(parents=True)
    policy, never = space.policy(start_plan(space)), cast("Any", None)

    with RunDisplay(quiet=True) as display:
        plan = kept_by_the_clock(policy, own, never, space, Journal(), display)

    assert plan.policy == policy
    assert plan.unmeasured == "its network is fine-tuned or saved already, which another plan would undo"


def problem_with(space: SearchSpace, journal: Journal) -> SearchProblem:
    never = cast("Any", None)
    return SearchProblem(nn.Identity(), space.graph, space, never, journal, seed=0)


def test_no_clock_is_asked_without_a_budget_of_latency_or_where_it_is_ruled_out(space: SearchSpace) -> None:
    untimed = problem_with(replace(space, bounds=()), Journal())

    assert PlanClock.of(subject_by(clock=False), problem_with(space, Journal()), TableDevice(), StopFlag()) is None
    assert PlanClock.of(subject_by(clock=True), untimed, TableDevice(), StopFlag()) is None


@pytest.mark.parametrize("clock", [True, False])
def test_a_run_without_the_clock_times_no_plan(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: bool
) -> None:
    table = saved_table(tmp_path, FormulaDevice(), [32])
    latency = {"latency__table": str(table), "latency__clock": clock, "budget": "80% latency"}
    search = {"search__methods": ["uniform"], "search__rounding": 4}
    config = tiny_config(**latency, **search, model__name=TINY[0], finetune__epochs=0)

    with RunDisplay() as display:
        outcome = start_run(config, tmp_path / "run", ["secateur"], display, StopFlag())

    # No clock is of the table's device, which is asked for and found missing.
    assert ("uniform is not measured" in capsys.readouterr().err) == clock
    assert outcome.row("uniform").cost <= 0.8 * outcome.dense_cost and not outcome.row("uniform").clock_readings


def subject_by(*, clock: bool) -> Subject:
    return cast("Subject", SimpleNamespace(config=RunConfig(latency=LatencyConfig(clock=clock))))


@dataclass(frozen=True)
class FakeClock:
    """Answers as it is told."""

    time_share: TimeShare
    is_absolute: bool = False

    def __call__(self, policy: CompressionPolicy, rounds: int) -> Comparison:
        return self.time_share(policy, rounds)


def spent(problem: SearchProblem, time_share: TimeShare, *, is_absolute: bool = False) -> SearchProblem:
    with RunDisplay(quiet=True) as display:
        return spent_by_the_clock(problem, cast("Any", FakeClock(time_share, is_absolute)), display)


def test_searches_that_began_without_a_clock_go_on_without_one(space: SearchSpace) -> None:
    journal = Journal()
    problem, policy = problem_with(space, journal), space.policy(start_plan(space))
    journal.append(JournalEntry(0, "cem", 0, "candidate", policy.digest, {}, 1.0, 0.7, 10, 0.1, 1.0))

    for share in (0.5, 2.0):
        assert spent(problem, exactly(lambda p, share=share: share * by_the_table(space, p))) is problem


def no_clock(_: CompressionPolicy, rounds: int) -> Comparison:
    msg = "the table is of another device"
    raise LatencyError(msg)


def test_searches_spend_what_the_clock_leaves_of_the_budget(space: SearchSpace, tmp_path: Path) -> None:
    policy = space.policy(start_plan(space))
    with Journal(tmp_path / "journal.jsonl") as journal:
        # The first, coarse reading is not what counts.
        found_out = spent(
            problem_with(space, journal),
            lambda plan, rounds: found((2.0 if rounds == FIRST else 1.25) * by_the_table(space, plan), rounds),
        )

    # As much as fits in the rounding of the plan.
    assert 0.9 < (found_out.space.limit or 0) / ((space.limit or 0) / 1.25) <= 1
    # What is found there is within the budget on such a clock, as it is.
    plan = found_out.space.policy(start_plan(found_out.space))
    assert kept(plan, space, exactly(lambda p: 1.25 * by_the_table(space, p))).policy == plan != policy
    # A continued run spends the same, also where there is no clock.
    with Journal(tmp_path / "journal.jsonl") as journal:
        again = spent(problem_with(space, journal), no_clock)
    assert again.space.limit == found_out.space.limit


def test_searches_spend_more_where_the_table_takes_plans_for_slower_than_they_are(
    space: SearchSpace, tmp_path: Path
) -> None:
    allowed = (space.limit or 0) / space.cost.dense

    def clock(plan: CompressionPolicy, rounds: int) -> Comparison:
        return found(0.8 * by_the_table(space, plan), rounds, half_width=0.01)

    with Journal(tmp_path / "journal.jsonl") as journal:
        larger = spent(problem_with(space, journal), clock).space

    # The upper end of the interval is what has to fit, so the budget is not spent to the last.
    plan = larger.policy(start_plan(larger))
    assert 0.9 * allowed < 0.8 * by_the_table(space, plan) < allowed < (larger.limit or 0) / space.cost.dense
    assert kept(plan, space, clock).policy == plan
    # A continued run spends the same, also where there is no clock.
    with Journal(tmp_path / "journal.jsonl") as journal:
        assert spent(problem_with(space, journal), no_clock).space.limit == larger.limit


def test_room_that_the_clock_gives_back_in_part_is_spent_in_part(space: SearchSpace) -> None:
    allowed = (space.limit or 0) / space.cost.dense
    start = space.policy(start_plan(space))

    # A third of the start plan's time is lost for nothing: as much more as its proportion promises is too much.
    def clock(plan: CompressionPolicy) -> float:
        return 0.5 * allowed + 2 * (by_the_table(space, plan) - by_the_table(space, start))

    larger = spent(problem_with(space, Journal()), exactly(clock)).space
    plan = larger.policy(start_plan(larger))

    assert by_the_table(space, start) < (larger.limit or 0) / space.cost.dense < 2 * allowed
    assert clock(plan) <= allowed


def test_searches_spend_no_more_where_nothing_is_left_to_keep_or_the_clock_refuses_it(space: SearchSpace) -> None:
    start = space.policy(start_plan(space))
    fast = exactly(lambda plan: 0.5 * by_the_table(space, plan))
    refusing = exactly(lambda plan: 0.5 if plan == start else 0.61)

    for limit, clock, is_absolute in (
        (space.cost.dense, fast, False),
        (space.limit or 0, refusing, False),
        # What a dense network takes in milliseconds is another matter tomorrow.
        (space.limit or 0, fast, True),
    ):
        problem = problem_with(space.with_limit("latency", limit), Journal())
        assert spent(problem, clock, is_absolute=is_absolute) is problem


def test_where_the_clock_finds_nothing_to_save_what_is_spent_stays_below_the_dense_network(space: SearchSpace) -> None:
    larger = spent(problem_with(space, Journal()), exactly(lambda plan: 0.1 * by_the_table(space, plan))).space

    assert (space.limit or 0) < (larger.limit or 0) < space.cost.dense


def test_what_is_spent_is_the_whole_budget_or_as_much_less_as_the_clock_asks(space: SearchSpace) -> None:
    allowed = (space.limit or 0) / space.cost.dense
    for clock in (exactly(lambda p: by_the_table(space, p)), exactly(lambda _: allowed), no_clock):
        problem = problem_with(space, Journal())
        assert spent(problem, clock) is problem
    # Half of the time is a constant that the table knows nothing of: once is not enough.
    twice = spent(problem_with(space, Journal()), exactly(lambda p: 0.3 + 0.6 * by_the_table(space, p)))
    plan = twice.space.policy(start_plan(twice.space))
    assert by_the_table(space, plan) > 0.4 and 0.3 + 0.6 * by_the_table(space, plan) <= allowed


@pytest.mark.parametrize(("budget", "expected"), [("60% latency", 0.5), ("3 ms", 0.75)])
def test_a_time_is_compared_with_a_time(space: SearchSpace, budget: str, expected: float) -> None:
    # The dense network takes 6 ms, where the table says 4.
    model, images = nn.Conv2d(3, 4, 1), torch.zeros(2, 3, 4, 4)
    times = {"dense": 6.0, "plan": 3.0}
    entries = tuple(summarise(name, "formula", [int(1e6 * ms)] * 9, [0] * 9, 1) for name, ms in times.items())
    clock = SimpleNamespace(
        artifact=lambda network, _: network,
        time=lambda *_: LatencyReport(entries, 1, 1, "", (), {}),
        device=SimpleNamespace(runtime=SimpleNamespace(name="formula")),
    )
    subject = SimpleNamespace(
        config=SimpleNamespace(budget=read_budgets(budget)), model=model, calibration=lambda: [images]
    )
    builder, device = SimpleNamespace(build=lambda _: model), TableDevice(clock=cast("Any", clock))
    plan = PlanClock(cast("Any", subject), cast("Any", builder), 4_000_000, device, StopFlag())

    found = plan(space.policy(start_plan(space)), 9)

    assert (found.low, found.ratio, found.high) == pytest.approx((expected,) * 3)


def test_a_signal_ends_a_run_before_the_next_reading(space: SearchSpace) -> None:
    stop = StopFlag()
    stop.signal_name = "SIGTERM"
    clock = PlanClock(cast("Any", None), cast("Any", None), 1, TableDevice(), stop)

    with pytest.raises(Interrupted):
        kept(space.policy(start_plan(space)), space, clock)


def test_a_plan_that_cannot_be_exported_is_not_measured_and_stays(space: SearchSpace) -> None:
    def refused(*_: object) -> None:
        msg = "the file's outputs are not those of the network"
        raise ExportError(msg)

    subject = SimpleNamespace(model=nn.Identity(), calibration=lambda: [torch.zeros(2, 3, 8, 8)])
    device = TableDevice(clock=cast("Any", SimpleNamespace(artifact=refused)))
    clock = PlanClock(cast("Any", subject), cast("Any", None), 1, device, StopFlag())
    policy = space.policy(start_plan(space))

    measured = kept(policy, space, clock)

    assert measured.policy == policy and not measured.readings
    assert measured.unmeasured == "it cannot be exported: the file's outputs are not those of the network"


def test_a_plan_over_the_budget_by_the_table_is_told_where_no_clock_answers(
    space: SearchSpace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    over = space.with_limit("latency", int(0.8 * space.cost.dense))
    policy, own = space.policy(start_plan(over)), MethodFolder(tmp_path / "ppo")

    with RunDisplay() as display:
        kept_by_the_clock(policy, own, cast("Any", FakeClock(no_clock)), space, Journal(), display)

    told = " ".join(capsys.readouterr().err.split())
    takes = f"{by_the_table(space, policy):.1%}"
    assert by_the_table(space, policy) > 0.6
    assert told == (
        f"warning: ppo is not measured: the table is of another device. It takes {takes} by the table, of 60.0% allowed"
    )
