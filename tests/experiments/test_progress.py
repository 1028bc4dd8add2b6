import io
import signal
import threading

import pytest
from rich.console import Console

from experiments.interrupt import Interrupted, stop_on_signals
from experiments.progress import RunDisplay, Workload, duration


def test_time_left_follows_from_the_mean_of_each_kind_of_work() -> None:
    work = Workload({"evaluation": 10, "epoch": 2})
    work.record("evaluation", 4, 8.0)
    work.record("epoch", 1, 30.0)

    assert work.seconds_left() == pytest.approx(6 * 2.0 + 1 * 30.0)


def test_work_not_timed_yet_is_taken_to_cost_what_the_dearest_does() -> None:
    work = Workload({"evaluation": 10, "epoch": 2})
    unknown = work.seconds_left()
    work.record("evaluation", 4, 2.0)

    assert unknown is None
    assert work.seconds_left() == pytest.approx(6 * 0.5 + 2 * 0.5)


def test_plain_console_gets_one_line_a_stage() -> None:
    text = io.StringIO()
    with RunDisplay(Console(file=text, width=40)) as display, display.stage("ppo", 2, "evaluation") as stage:
        stage.advance(note="best 80 %")
        stage.advance()

    lines = text.getvalue().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("ppo: 2 evaluations in 0.0 s")
    assert lines[0].endswith(", best 80 %")


def test_plain_console_is_told_now_and_then_how_long_it_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    text, now = io.StringIO(), [0.0]
    monkeypatch.setattr("experiments.progress.time.perf_counter", lambda: now[0])
    with RunDisplay(Console(file=text, width=200)) as display:
        with display.stage("training", 100, "epoch") as stage:
            now[0] += 100
            stage.advance()  # before anything was planned
        display.plan({"evaluation": 1000.0})
        with display.stage("ppo", 1000, "evaluation") as stage:
            for _ in range(40):
                now[0] += 20
                stage.advance()

    assert [line for line in text.getvalue().splitlines() if "left" in line] == [
        "ppo: 1 of 1000 evaluations; about 5 h 33 min left of the run",
        "ppo: 32 of 1000 evaluations; about 5 h 22 min left of the run",
    ]


def test_quiet_display_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with RunDisplay(quiet=True) as display, display.stage("ppo", 1, "evaluation") as stage:
        display.say("hello")
        stage.advance()

    assert capsys.readouterr() == ("", "")


def test_text_of_a_user_is_not_read_as_markup() -> None:
    text = io.StringIO()
    RunDisplay(Console(file=text)).say("runs/[red]mine[/red]")

    assert text.getvalue() == "runs/[red]mine[/red]\n"


@pytest.mark.parametrize(("seconds", "text"), [(8.26, "8.3 s"), (250, "4 min 10 s"), (7505, "2 h 05 min")])
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_waits_for_the_next_safe_point(number: signal.Signals) -> None:
    with stop_on_signals() as stop:
        stop.check()
        signal.raise_signal(number)

        with pytest.raises(Interrupted, match=number.name):
            stop.check()


@pytest.mark.parametrize(
    ("number", "again"), [(signal.SIGINT, "press Ctrl-C again"), (signal.SIGTERM, "send it again")]
)
def test_signal_is_announced_while_the_step_still_runs(number: signal.Signals, again: str) -> None:
    told: list[str] = []
    heard = threading.Event()

    def announce(text: str) -> None:
        told.append(text)
        heard.set()

    with stop_on_signals(announce):
        signal.raise_signal(number)
        assert heard.wait(10)

    assert told == [
        f"{number.name} received: stopping after the running step (an evaluation, an epoch); {again} to stop at once"
    ]


def test_second_interrupt_is_not_waited_for() -> None:
    with stop_on_signals(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals():
        pass

    assert signal.getsignal(signal.SIGTERM) is before
