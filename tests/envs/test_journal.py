import errno
import json
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from stable_baselines3.common.vec_env import SubprocVecEnv

from envs.journal import ClockReading, Journal, JournalEntry, JournalError
from envs.network_env import NetworkEnv
from latency.budget import Budget

from .conftest import SmallNetwork, make_evaluator, make_space

SEARCH = {"network": "a1", "budget": "50 macs"}


def entry(index: int, **changes: object) -> JournalEntry:
    base = JournalEntry(
        index=index,
        searcher="ppo",
        seed=3,
        purpose="candidate",
        digest=f"digest {index}",
        kept={"layer1.conv1": 4},
        fidelity=1.0,
        accuracy=0.1 + index / 3,
        cost=1000,
        seconds=1.25,
        evaluations_used=index + 1.0,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def test_entries_come_back_bit_equal(tmp_path: Path) -> None:
    path = tmp_path / "run" / "journal.jsonl"
    journal = Journal(path)
    written = [entry(0), entry(1), entry(2, searcher="cem")]
    for each in written:
        journal.append(each)
    assert Journal(path).entries() == written
    assert Journal(path).entries("ppo", 3) == written[:2]
    assert Journal(path).entries("ppo", 4) == []


def test_readings_of_a_clock_lie_among_the_entries_and_are_found_by_plan_and_rounds(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    reading = ClockReading("ppo", "digest 0", predicted=0.4, measured=0.41, low=0.4, high=0.1 + 1 / 3, rounds=60)
    with Journal(path) as journal:
        for each in (entry(0), reading, entry(1)):
            journal.append(each)
    again = Journal(path)
    assert again.entries() == [entry(0), entry(1)] and len(again) == 2
    assert again.reading("digest 0", 60) == reading
    assert again.reading("digest 0", 240) is again.reading("digest 1", 60) is None


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_line_cut_short_by_a_kill_is_dropped_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cut: int
) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for index in range(3):
        journal.append(entry(index))
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    path.write_bytes(whole[:-cut])

    with caplog.at_level(logging.WARNING):
        recovered = Journal(path)

    message = (
        f"the last line of '{path}' was cut short ({len(last) - cut} bytes) and was dropped: at most one evaluation is "
        "lost, 2 remain"
    )
    assert recovered.recovered == message
    assert message in caplog.text
    recovered.append(entry(2))
    assert path.read_bytes() == whole


def test_a_damaged_line_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"index": \n{}\n')
    with pytest.raises(
        JournalError, match=rf"^line 1 of the journal '{re.escape(str(path))}' is not JSON: .* something else$"
    ):
        Journal(path)
    path.write_text('{"index": 0}\n')
    with pytest.raises(JournalError, match=r"holds \['index'\], but an evaluation has the fields \['accuracy', "):
        Journal(path)


def test_a_full_disk_is_reported_and_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append(entry(0))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        message = (
            f"evaluation 1 could not be written to '{path}': No space left on device. Everything before it is safe: "
            "make room and resume the run"
        )
        with pytest.raises(JournalError, match=f"^{re.escape(message)}$"):
            journal.append(entry(1))
    assert Journal(path).entries() == journal.entries() == [entry(0)]


def test_every_entry_is_synchronised_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synchronised: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synchronised.append(os.fstat(descriptor).st_size))
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(entry(0))
    journal.append(entry(1))
    lines = journal.path.read_bytes().splitlines(keepends=True) if journal.path else []
    assert synchronised == [len(lines[0]), len(lines[0]) + len(lines[1])]


def test_reading_leaves_a_line_that_is_being_written_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path).append(entry(0))
    with path.open("ab") as file:
        file.write(b'{"index": 1, "sear')
    before = path.read_bytes()

    assert Journal(path).entries() == [entry(0)]
    assert path.read_bytes() == before


def test_a_journal_comes_back_as_that_of_its_search(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, search=SEARCH)
    journal.append(entry(0))
    Journal(path, search=SEARCH).append(entry(1))

    assert json.loads(path.read_bytes().splitlines()[0]) == {"journal": 1, "search": SEARCH}
    for again in (Journal(path, search=SEARCH), Journal(path)):
        assert again.entries() == [entry(0), entry(1)]
        assert again.search == SEARCH


def test_a_journal_of_another_search_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, search=SEARCH | {"rounding": "8"}).append(entry(0))

    with pytest.raises(JournalError) as caught:
        Journal(path, search=SEARCH | {"budget": "30 macs"})

    assert str(caught.value) == (
        f"the journal '{path}' is of another search: budget 50 macs, now 30 macs; rounding 8, now unknown; pass the "
        "same again, or another file"
    )


def test_a_journal_tied_to_no_search_is_refused_for_one(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for index in range(2):
        Journal(path).append(entry(index))

    with pytest.raises(JournalError) as caught:
        Journal(path, search=SEARCH)

    assert str(caught.value) == (
        f"the journal '{path}' holds 2 evaluations and does not say of what network and arguments, so they cannot be "
        "used here; pass another file"
    )


def test_a_first_line_cut_short_leaves_a_new_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, search=SEARCH).append(entry(0))
    path.write_bytes(path.read_bytes()[:20])

    journal = Journal(path, search=SEARCH)
    journal.append(entry(0))

    assert Journal(path, search=SEARCH).entries() == [entry(0)]


APPENDING = """
import json, os, sys, time
from envs.journal import ClockReading, Journal, JournalEntry, JournalError

def append(journal, index):
    try:
        journal.append(JournalEntry(**json.loads(sys.argv[2])[index]))
    except JournalError as error:
        print(error, flush=True)
    else:
        print("done", flush=True)

journal = Journal(sys.argv[1])
{code}
"""


def command(path: Path, code: str) -> list[str]:
    entries = json.dumps([asdict(entry(index)) for index in range(2)])
    return [sys.executable, "-c", APPENDING.format(code=code), str(path), entries]


def run(path: Path, code: str) -> str:
    """What a process of its own printed that opened the journal and ran the code."""
    return subprocess.run(command(path, code), capture_output=True, text=True, check=True).stdout.strip()


@contextmanager
def waiting(path: Path, code: str) -> Iterator[subprocess.Popen[str]]:
    """A process that opened the journal, ran the code, printed a line and waits."""
    process = subprocess.Popen(command(path, f"{code}; time.sleep(60)"), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "done\n"
        yield process
        process.kill()
        process.wait()


def refusal(path: Path) -> str:
    return (
        f"another process writes the journal '{path}'; wait for it or stop it, or give each process a journal of its "
        "own"
    )


def test_a_second_process_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append(entry(0))

    assert run(path, "append(journal, 1)") == refusal(path)

    journal.append(entry(1))
    assert Journal(path).entries() == [entry(0), entry(1)]


def test_a_journal_that_was_closed_goes_to_whoever_writes_next(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append(entry(0))

    assert run(path, "append(journal, 1)") == "done"
    assert Journal(path).entries() == [entry(0), entry(1)]


def test_a_fork_is_refused_what_its_parent_writes(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    forking = "append(journal, 0); child = os.fork(); child and os.wait(); append(journal, 1)"

    assert run(path, forking).splitlines() == ["done", refusal(path), "done"]
    assert Journal(path).entries() == [entry(0), entry(1)]


def test_a_killed_process_leaves_the_journal_free(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with waiting(path, "append(journal, 0)") as process:
        journal = Journal(path)
        with pytest.raises(JournalError, match=f"^{re.escape(refusal(path))}$"):
            journal.append(entry(1))
        process.send_signal(signal.SIGKILL)
        process.wait()

    journal.append(entry(1))

    assert Journal(path).entries() == [entry(0), entry(1)]


def test_entries_of_another_process_since_it_was_read_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    assert run(path, "append(journal, 0)") == "done"
    written = path.stat().st_size

    with pytest.raises(JournalError) as caught:
        journal.append(entry(0))

    assert str(caught.value) == (
        f"the journal '{path}' holds {written} bytes, but 0 were read and written here: something else has changed it; "
        "start again to go on from what it holds now"
    )
    assert path.stat().st_size == written


def test_a_copy_of_an_open_journal_does_not_take_the_claim_along(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(entry(0))

    copy = pickle.loads(pickle.dumps(journal))
    copy.append(entry(1))

    with pytest.raises(JournalError, match="something else has changed it"):
        journal.append(entry(1))
    assert Journal(journal.path).entries() == copy.entries()


class Worker(NetworkEnv):
    """A search environment as a worker of a vectorised one builds it, which tells why it cannot start."""

    def __init__(self, path: Path) -> None:
        model = SmallNetwork().eval()
        space = make_space(model, Budget(share=0.5))
        super().__init__(space, make_evaluator(model, space, journal=Journal(path)))

    def start(self) -> str:
        try:
            self.reset(seed=0)
        except JournalError as error:
            return str(error)
        return ""


def start_workers(*paths: Path) -> list[str]:
    vectorised = SubprocVecEnv([lambda path=path: Worker(path) for path in paths])  # type: ignore[misc]
    try:
        return vectorised.env_method("start")
    finally:
        vectorised.close()


@pytest.mark.slow
def test_workers_take_a_journal_each_and_are_refused_a_common_one(tmp_path: Path) -> None:
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"

    assert sorted(start_workers(one, one)) == ["", refusal(one)]
    assert [each.purpose for each in Journal(one).entries()] == ["dense"]
    assert start_workers(one, other) == ["", ""]
