"""Every evaluation of a search, one JSON line each, on disk before its result is used."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)

Purpose = Literal["candidate", "probe", "finalist", "dense"]


class JournalError(RuntimeError):
    """The journal cannot be read or written; the message names the file, the line and the reason."""


@dataclass(frozen=True)
class JournalEntry:
    """One evaluation.

    Attributes:
        index: place among the evaluations of this searcher and seed, from 0.
        searcher: name of the search that asked.
        seed: its seed.
        purpose: a candidate plan, a sensitivity probe, a finalist, or the dense network (which is free).
        digest: digest of the policy.
        kept: units left by group name; groups not named are dense.
        fidelity: share of the search images it was scored on, in ``(0, 1]``.
        accuracy: in ``[0, 1]``.
        cost: of the plan, in the budget's unit.
        seconds: wall time of building and scoring.
        evaluations_used: evaluations counted so far, this one included.
        layers: sparsity and bits by layer name, as in a policy file; layers not named are untouched.
    """

    index: int
    searcher: str
    seed: int
    purpose: Purpose
    digest: str
    kept: dict[str, int]
    fidelity: float
    accuracy: float
    cost: int
    seconds: float
    evaluations_used: float
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def charge(self) -> float:
        """What the evaluation counts as: its share of the images; the dense network is no candidate and is free."""
        return 0.0 if self.purpose == "dense" else self.fidelity


class Journal:
    """An append-only list of `JournalEntry`, in a file or in memory.

    Opening a file whose last line was cut short by a kill drops that line, says so in the log and in `recovered`.

    Attributes:
        path: the file, or None for a journal in memory.
        recovered: what was dropped when the file was opened, empty if nothing.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        """Open or create the journal at ``path``.

        Raises:
            JournalError: if a line other than the last is not an entry.
        """
        self.path = Path(path) if path is not None else None
        self.recovered = ""
        self._entries: list[JournalEntry] = []
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._read(self.path)

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self, searcher: str | None = None, seed: int | None = None) -> list[JournalEntry]:
        """Entries in the order in which they were written, of one searcher and seed if given."""
        return [
            entry
            for entry in self._entries
            if (searcher is None or entry.searcher == searcher) and (seed is None or entry.seed == seed)
        ]

    def append(self, entry: JournalEntry) -> None:
        """Write ``entry`` and wait until it is on disk.

        Raises:
            JournalError: if the disk is full or the file cannot be written; the entry is then not in the journal.
        """
        if self.path is not None:
            self._write(self.path, entry)
        self._entries.append(entry)

    @staticmethod
    def _write(path: Path, entry: JournalEntry) -> None:
        line = json.dumps(asdict(entry), allow_nan=False) + "\n"
        length = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            # Part of the line may have been written; the next entry must not be glued to it.
            if path.exists():
                os.truncate(path, length)
            msg = (
                f"evaluation {entry.index} could not be written to '{path}': {error.strerror}. "
                "Everything before it is safe: make room and resume the run"
            )
            raise JournalError(msg) from error

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        whole, _, rest = content.rpartition(b"\n")
        lines = whole.split(b"\n") if whole else []
        for number, line in enumerate(lines, start=1):
            self._entries.append(_parse(line, path, number))
        if rest:
            os.truncate(path, len(content) - len(rest))
            self.recovered = (
                f"the last line of '{path}' was cut short ({len(rest)} bytes) and was dropped: at most one evaluation "
                f"is lost, {len(self)} remain"
            )
            logger.warning("%s", self.recovered)


def _parse(line: bytes, path: Path, number: int) -> JournalEntry:
    names = {one.name for one in fields(JournalEntry)}
    # Journals from before choices inside layers have no such field.
    needed = names - {"layers"}
    try:
        values = json.loads(line)
    except ValueError as error:
        msg = f"line {number} of the journal '{path}' is not JSON: {error}; the file was changed by something else"
        raise JournalError(msg) from error
    if not isinstance(values, dict) or not needed <= set(values) <= names:
        found = sorted(values) if isinstance(values, dict) else type(values).__name__
        msg = f"line {number} of the journal '{path}' holds {found}, but an evaluation has the fields {sorted(names)}"
        raise JournalError(msg)
    return JournalEntry(**values)
