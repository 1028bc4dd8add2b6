import time
from collections.abc import Callable
from functools import partial

from experiments.studies.bench_setup import time_calls_in_turn


def test_untimed_calls_go_before_each_timed_one_and_every_side_starts_a_round() -> None:
    called: list[str] = []
    sides: dict[str, Callable[[], object]] = {name: partial(called.append, name) for name in "abc"}

    seconds, busy = time_calls_in_turn(sides, rounds=3)

    a, b, c = "a" * 7, "b" * 7, "c" * 7
    assert "".join(called[-63:]) == a + b + c + b + c + a + c + a + b
    assert [times.shape for found in (seconds, busy) for times in found.values()] == [(3,)] * 6


def test_sleep_takes_seconds_and_no_processor_time() -> None:
    seconds, busy = time_calls_in_turn({"sleep": partial(time.sleep, 0.02)}, rounds=3)
    assert seconds["sleep"].min() >= 0.02
    assert busy["sleep"].min() < 0.01
