from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from experiments.clock import Clock, TableDevice
from latency.device import REFERENCE, LocalDevice, pace_of
from latency.layers import LayerKind
from latency.measure import LatencyReport, Variant, summarise
from latency.pace import BUSY, Pace
from latency.runtimes import ONNXRUNTIME, PYTORCH, Artifact, Fed, LatencyError, PyTorchEager, find_runtime
from latency.table import build_table, network_ratios, start_table

from .synthetic import FormulaDevice

QUIET = 100.0


@pytest.fixture(autouse=True)
def read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in use; other tests read once."""
    monkeypatch.setattr("latency.pace.MOST_TRIES", 4)


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

    assert [pace.quietest(lambda: next(told)) for _ in range(4)] == [1, 4, 5, 7]
    # The second was slow as well, though it was not read again.
    assert (pace.least_ns, pace.busy, pace.readings) == (QUIET, 2, 4)
    assert pace.warning == (
        "warning: in 2 of 4 readings the processor was slower than at its best, however often they were repeated: "
        "something else kept it busy, or its clock is slower now; times are less exact"
    )


def test_what_fails_in_a_later_try_does_not_undo_the_ones_before() -> None:
    def broken(told: Iterator[tuple[int, float]]) -> tuple[int, float]:
        if found := next(told, None):
            return found
        msg = "the connection was cut"
        raise LatencyError(msg)

    pace, told = Pace(QUIET), readings(150.0, 140.0)

    assert pace.quietest(lambda: broken(told)) == 1
    with pytest.raises(LatencyError, match="cut"):
        pace.quietest(lambda: broken(told))


def test_a_clock_reads_again_and_keeps_the_times_of_the_quiet_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([(1.6e-4, 3.0), (1.0e-4, 1.0)])

    def timed(device: LocalDevice, networks: Mapping[str, object], *_: object, **options: object) -> LatencyReport:
        reference, net = next(told)
        times = {"net": net, REFERENCE: reference}
        entries = [summarise(name, device.runtime.name, [int(1e6 * ms)] * 9, [0] * 9, 1) for name, ms in times.items()]
        return LatencyReport(tuple(entries), 1, 1, "", (), {})

    monkeypatch.setattr(LocalDevice, "measure", timed)
    clock = Clock(LocalDevice(find_runtime(PYTORCH)), QUIET)

    assert clock.time({"net": nn.Identity()}, torch.zeros(2, 3, 4, 4)).entry("net", PYTORCH).median_ms == 1.0


def test_only_what_the_tables_runtime_does_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def timed(variants: Sequence[Variant], *_: object, **options: object) -> LatencyReport:
        asked.append([variant.model for variant in variants])
        slow = 2e-4 if len(asked) == 1 else 1e-4
        entries = [summarise(each.model, each.runtime, [int(1e6 * slow)] * 9, [0] * 9, 1) for each in variants]
        return LatencyReport(tuple(entries), 1, 1, "", (), {})

    for room in ("experiments.clock", "latency.device"):
        monkeypatch.setattr(f"{room}.measure", timed)
    variants = [Variant("file", ONNXRUNTIME, b""), Variant("module", PYTORCH, nn.Identity())]
    device = TableDevice(clock=Clock(LocalDevice(find_runtime(ONNXRUNTIME)), QUIET))

    report = device.measure(variants, torch.zeros(1), 9)
    without = TableDevice().measure(variants, torch.zeros(1), 9)

    assert asked == [["file", REFERENCE], ["file", REFERENCE], ["module"], ["file", "module"]]
    assert report.entry("file", ONNXRUNTIME).median_ms == 1e-4
    assert [entry.model for entry in without.entries] == ["file", "module"]


def test_a_runtime_that_cannot_run_the_reference_layer_says_so() -> None:
    class Picky(PyTorchEager):
        name = "picky"

        def load(self, artifact: Artifact, inputs: tuple[Tensor, ...], threads: int) -> Callable[[], object]:
            msg = "shapes are fixed"
            raise RuntimeError(msg)

    with pytest.raises(LatencyError, match=r"^runtime 'picky' cannot run the reference layer: shapes are fixed$"):
        pace_of(LocalDevice(Picky()))


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
    assert times == pytest.approx(network_ratios(quiet, networks, (torch.zeros(1),), pace_of(quiet)))
    # Half of what was read after the first reading was disturbed, and was read again.
    assert disturbed.readings == 1 + 2 * 2


def test_a_table_begins_with_the_quietest_of_several_readings() -> None:
    disturbed = Disturbed()
    disturbed.readings = 1

    assert start_table(disturbed).reference_ns > 1.4 * start_table(disturbed, n_looks=3).reference_ns
