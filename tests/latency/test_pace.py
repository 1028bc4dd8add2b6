from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from latency.layers import LayerKind
from latency.pace import BUSY, Pace
from latency.runtimes import Fed
from latency.table import build_table, network_ratios, start_table

from .synthetic import FormulaDevice

QUIET = 100.0


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latency.pace.MOST_TRIES", 4)
    monkeypatch.setattr("latency.pace.PAUSE_S", 0.0)
    monkeypatch.setattr("latency.table.PAUSE_S", 0.0)


def readings(*of_reference: float) -> Iterator[tuple[int, float]]:
    return iter(enumerate(of_reference))


def test_a_quiet_reading_is_taken_at_once() -> None:
    pace, told = Pace(QUIET), readings(QUIET * BUSY, 1.0)

    assert pace.quietest(lambda: next(told)) == 0
    assert (pace.least_ns, pace.warning) == (QUIET, "")


def test_a_disturbed_reading_is_repeated_until_one_is_quiet() -> None:
    pace, told = Pace(QUIET), readings(130.0, 120.0, 104.0, QUIET)

    assert pace.quietest(lambda: next(told)) == 2
    assert pace.warning == ""


def test_a_faster_reading_shows_that_the_one_before_was_disturbed() -> None:
    pace, told = Pace(), readings(130.0, QUIET, 108.0, 103.0)

    assert pace.quietest(lambda: next(told)) == 0  # nothing is known yet
    assert pace.quietest(lambda: next(told)) == 1
    assert pace.quietest(lambda: next(told)) == 3
    assert pace.least_ns == QUIET


def test_the_least_disturbed_is_taken_where_none_is_quiet_and_what_stays_slow_is_not_waited_for() -> None:
    slow = [150.0, 140.0, 145.0, 142.0]
    pace, told = Pace(QUIET), readings(*slow, 143.0, QUIET, 143.0, QUIET)

    assert len(slow) == 4
    assert pace.quietest(lambda: next(told)) == 1
    assert pace.quietest(lambda: next(told)) == 4
    assert pace.quietest(lambda: next(told)) == 5
    assert pace.quietest(lambda: next(told)) == 7
    assert pace.warning == (
        "warning: something else kept the processor busy in 1 of 4 readings, however often they were repeated; times "
        "are less exact for it"
    )


class Disturbed(FormulaDevice):
    """Every second reading is disturbed: the first takes half as long again, and what is called later up to thrice."""

    def __init__(self) -> None:
        super().__init__()
        self.readings = 0

    def times_ns(
        self, networks: Sequence[Fed], n_runs: int, n_warmup: int, *, settled: bool = True
    ) -> NDArray[np.float64]:
        times = super().times_ns(networks, n_runs, n_warmup, settled=settled)
        self.readings += 1
        return times if self.readings % 2 else times * np.linspace(1.5, 3.0, len(times))[:, None]


CONV = LayerKind("conv", (3, 3), (1, 1), (8, 8))
NEEDED = {CONV: ((16, 32), (16, 32))}


def test_tables_and_whole_networks_are_those_of_a_quiet_machine() -> None:
    disturbed, quiet = Disturbed(), FormulaDevice()
    expected = build_table(start_table(quiet), quiet, NEEDED)
    networks = [nn.Conv2d(n, n, 3) for n in (16, 64)]

    found = build_table(start_table(disturbed), disturbed, NEEDED)
    times = network_ratios(disturbed, networks, (torch.zeros(1),), Pace(found.reference_ns))

    assert found.kinds[CONV].ratios == pytest.approx(expected.kinds[CONV].ratios)
    assert times == pytest.approx(network_ratios(quiet, networks, (torch.zeros(1),), Pace(expected.reference_ns)))
    # Half of what was read after the first reading was disturbed, and was read again.
    assert disturbed.readings == 1 + 2 * 2


def test_a_table_begins_with_the_quietest_of_several_readings() -> None:
    disturbed = Disturbed()
    disturbed.readings = 1

    assert start_table(disturbed).reference_ns > 1.4 * start_table(disturbed, n_looks=3).reference_ns
