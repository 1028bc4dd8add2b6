import math
import os
import re
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from latency.measure import Variant, affinity, compare, measure, measure_latency, summarise
from latency.runtimes import ONNXRUNTIME, PYTORCH, LatencyError
from latency.worker import Stopwatch, Timer, allowed_cpus, interleave


class Work(nn.Module):
    """Takes as many nanoseconds of a fake clock as it is told."""

    def __init__(self, clock: "FakeClock", nanoseconds: int, waiting: int = 0) -> None:
        super().__init__()
        self.clock, self.nanoseconds, self.waiting = clock, nanoseconds, waiting

    def __deepcopy__(self, memo: object) -> "Work":
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.nanoseconds + self.waiting
        self.clock.waited += self.waiting
        return x


class FakeClock:
    def __init__(self) -> None:
        self.now, self.waited = 0, 0

    def stopwatch(self) -> Stopwatch:
        return Stopwatch(lambda: self.now, lambda: self.waited)


def relu_onnx() -> bytes:
    shape = ["n", 3, 4, 4]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "relu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def test_images_of_a_call_are_counted_where_the_first_input_is_a_number() -> None:
    class Scale(nn.Module):
        def forward(self, scale: Tensor, x: Tensor) -> Tensor:
            return scale * x

    report = measure([Variant("scaled", PYTORCH, Scale())], (torch.tensor(2.0), torch.zeros(3, 2)), n_runs=5)

    assert report.batch_size == 3


def test_times_are_those_of_the_clock() -> None:
    clock = FakeClock()
    variants = [Variant("short", PYTORCH, Work(clock, 2_000_000)), Variant("long", PYTORCH, Work(clock, 8_000_000))]
    report = measure(variants, torch.zeros(1, 3), n_runs=9, n_warmup=1, stopwatch=clock.stopwatch())
    assert report.entry("short").median_ms == 2
    assert report.entry("long").times_ms == (8.0,) * 9
    assert report.entry("long").median_ms / report.entry("short").median_ms == 4


def test_waiting_for_a_processor_is_taken_off_with_one_thread_and_told() -> None:
    clock = FakeClock()
    one = summarise("net", PYTORCH, [5_000_000] * 3 + [2_000_000], [3_000_000] * 3 + [0], threads=1)
    assert (one.median_ms, one.disturbed) == (2, 0.75)
    report = measure(
        [Variant("net", PYTORCH, Work(clock, 2_000_000, waiting=1_000_000))],
        torch.zeros(1),
        n_runs=5,
        threads=2,
        stopwatch=clock.stopwatch(),
    )
    assert (report.entry("net").median_ms, report.entry("net").disturbed) == (3, 1)


def test_waiting_of_this_thread_is_seen_where_the_system_counts_it() -> None:
    timed = Stopwatch().timer(lambda: time.sleep(0.002))
    elapsed, waited = timed()
    assert elapsed >= 2_000_000
    assert 0 <= waited < elapsed


@pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="the system does not say")
def test_waiting_is_the_second_number_that_the_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter([b"5 0 9\n", b"5 7 9\n", b"6 40 10\n"])
    monkeypatch.setattr("latency.worker.os.pread", lambda *_: next(said))

    elapsed, waited = Stopwatch().timer(lambda: time.sleep(0.001))()

    assert elapsed > waited == 33


def test_rounds_take_turns_none_is_always_first_and_short_calls_settle_for_longer() -> None:
    order: list[str] = []

    def timer(name: str, nanoseconds: int) -> Timer:
        def timed() -> tuple[int, int]:
            order.append(name)
            return nanoseconds, 0

        return timed

    timers = [timer("a", 1000), timer("b", 3_000_000), timer("c", 30_000_000)]
    elapsed, _ = interleave(timers, n_runs=3, n_warmup=1)
    assert elapsed == [[1000] * 3, [3_000_000] * 3, [30_000_000] * 3]
    a, b, c = "a" * 7, "b" * 3, "c" * 2
    assert "".join(order) == "abc" + (a + b + c) + (b + c + a) + (c + a + b)


def test_what_another_network_left_in_the_caches_is_not_timed() -> None:
    clock, last = FakeClock(), [""]

    class Cached(nn.Module):
        """Takes twice as long after another one, as a network does whose weights have left the caches."""

        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            clock.now += 1_000_000 * (1 if last[0] == self.name else 2)
            last[0] = self.name
            return x

    variants = [Variant(name, PYTORCH, Cached(name)) for name in ("one", "other")]
    report = measure(variants, torch.zeros(1), n_runs=5, stopwatch=clock.stopwatch())
    assert {entry.median_ms for entry in report.entries} == {1.0}


def test_report_says_where_and_how_it_was_measured() -> None:
    threads = torch.get_num_threads()
    report = measure_latency(
        {"eager": nn.ReLU()}, torch.zeros(2, 3, 4, 4), onnx={"eager": relu_onnx()}, n_runs=5, n_warmup=0, threads=1
    )
    assert (report.batch_size, report.threads, report.cpus) == (2, 1, tuple(allowed_cpus()))
    assert report.versions[PYTORCH] == torch.__version__
    assert set(report.versions) == {PYTORCH, ONNXRUNTIME}
    assert report.cpu
    entry = report.entry("eager", ONNXRUNTIME)
    assert 0 < entry.lower_quartile_ms <= entry.median_ms <= entry.upper_quartile_ms
    assert (entry.n_runs, len(entry.times_ms)) == (5, 5)
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(not allowed_cpus(), reason="the system does not let a process choose its processors")
def test_affinity_holds_for_threads_that_run_already_and_is_given_back() -> None:
    before, seen, over = allowed_cpus(), [], threading.Event()
    started = threading.Event()

    def look() -> None:
        for _ in range(2):
            started.wait()
            started.clear()
            seen.append(os.sched_getaffinity(0))
            over.set()

    worker = threading.Thread(target=look)
    worker.start()
    with affinity(before[:1]):
        started.set()
        over.wait()
        over.clear()
    started.set()
    worker.join()

    assert seen == [{before[0]}, set(before)]


@pytest.mark.skipif(not allowed_cpus(), reason="the system does not let a process choose its processors")
def test_affinity_holds_while_it_measures_and_is_given_back() -> None:
    before = allowed_cpus()
    report = measure([Variant("net", PYTORCH, nn.ReLU())], torch.zeros(1), n_runs=5, cpus=before[:1])
    assert report.cpus == (before[0],)
    assert allowed_cpus() == before
    message = f"cpus [4096] cannot be used: this process may run on {before}"
    with pytest.raises(LatencyError, match=f"^{re.escape(message)}$"):
        measure([Variant("net", PYTORCH, nn.ReLU())], torch.zeros(1), cpus=[4096])


def test_the_network_keeps_its_mode_and_layout() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout()).train()
    measure_latency({"net": model}, torch.zeros(1, 3, 8, 8), n_runs=5, n_warmup=0)
    assert model.training and model[1].training
    assert model[0].weight.is_contiguous()


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^n_runs is 4; quartiles need at least 5 timed calls$"):
        measure_latency({"net": nn.ReLU()}, torch.zeros(1), n_runs=4)


def test_nothing_to_time_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^there is nothing to time: no network was given$"):
        measure([], torch.zeros(1))


def test_interval_of_ten_ratios_by_hand() -> None:
    # P(B <= 1) = 11/1024 <= 0.025 < P(B <= 2) = 56/1024: the second smallest and the second largest.
    found = compare([81, 92, 83, 94, 85, 96, 87, 98, 89, 90], [100] * 10)
    assert (found.ratio, found.low, found.high) == (pytest.approx(0.895), 0.83, 0.96)
    assert found.verdict == "faster"
    assert compare([100] * 10, [81, 92, 83, 94, 85, 96, 87, 98, 89, 90]).verdict == "slower"


def test_candidates_that_noise_hides_are_undecided_and_need_more_rounds() -> None:
    generator = np.random.default_rng(0)

    def rounds(n: int) -> tuple[np.ndarray, np.ndarray]:
        return 0.98 * np.exp(generator.normal(0, 0.1, n)), np.exp(generator.normal(0, 0.1, n))

    few = compare(*rounds(40))
    assert few.verdict == "undecided"
    assert few.repeats_needed > 40
    assert str(few).startswith("undecided: ")
    assert str(few).endswith(
        f"; the machine is too noisy to tell them apart in 40 rounds, about {few.repeats_needed} would be needed"
    )
    # A ratio's deviation is 0.14: a median of n rounds is known to 1.96 * 1.25 * 0.14 / sqrt(n), which is 2 % at 295.
    many = compare(*rounds(2000))
    assert many.verdict == "faster"
    assert 100 < many.repeats_needed < 900


@pytest.mark.parametrize("ratio", [0.985, 0.991, 0.995, 1.0, 1.008, 1.02])
def test_what_is_undecided_needs_more_rounds_than_were_run(ratio: float) -> None:
    generator = np.random.default_rng(0)
    found = [compare(ratio * generator.lognormal(0, 0.05, 60), generator.lognormal(0, 0.05, 60)) for _ in range(100)]
    undecided = [one.repeats_needed for one in found if one.verdict == "undecided"]
    assert undecided and min(undecided) > 60


def test_both_sides_of_the_interval_count_where_the_ratio_is_near_1() -> None:
    # Median 0.999, second smallest 0.97, second largest 1.001: the lower side is the wide one.
    found = compare([0.9, 0.97, 0.98, 0.99, 0.999, 0.999, 1.0, 1.0, 1.001, 1.1], [1.0] * 10)
    assert (found.verdict, found.ratio) == ("undecided", 0.999)
    assert found.repeats_needed == math.ceil(10 * (math.log(0.999 / 0.97) / 0.01) ** 2)


@pytest.mark.parametrize("seed", range(3))
def test_interval_holds_the_true_median_as_often_as_it_says(seed: int) -> None:
    generator = np.random.default_rng(seed)
    # Skewed, as times are: the median ratio of two log-normal times of equal medians is 1.
    held = 0
    for _ in range(400):
        a, b = generator.lognormal(0, 0.5, (2, 25))
        found = compare(a, b)
        held += found.low <= 1 <= found.high
    assert held / 400 > 0.925


def test_equal_times_need_no_more_rounds() -> None:
    found = compare([1.0] * 10, [1.0] * 10)
    assert (found.verdict, found.repeats_needed) == ("equal", 6)
    assert str(found) == "equal: 1.000 of the baseline's time (1.000 to 1.000)"


def test_too_few_rounds_hold_no_interval() -> None:
    with pytest.raises(ValueError, match=r"^5 rounds hold no interval of confidence 0\.95; measure at least 6$"):
        compare([1.0] * 5, [1.0] * 5)
    with pytest.raises(ValueError, match=r"^times have shape \(5,\) and the baseline's \(6,\); each needs one a round"):
        compare([1.0] * 5, [1.0] * 6)


def test_a_wait_while_the_counter_is_read_is_not_taken_off_the_call() -> None:
    waits = iter([0, 900])  # more than the call took, so not within it
    ticks = iter([1000, 1100])

    assert Stopwatch(lambda: next(ticks), lambda: next(waits)).timer(lambda: None)() == (100, 0)
