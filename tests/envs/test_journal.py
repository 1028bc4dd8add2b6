import errno
import logging
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from envs.journal import Journal, JournalEntry, JournalError


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
