"""Every evaluation of a search and every reading of a clock, one JSON line each, on disk before it is used."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from graph_encoder.errors import SecateurError

logger = logging.getLogger(__name__)

Purpose = Literal["candidate", "probe", "comparison", "finalist", "dense"]

JOURNAL_VERSION = 1
"""Version that the first line of a journal tied to one search gives."""


class JournalError(SecateurError, RuntimeError):
    """The journal cannot be read or written, or is another search's; the message names the file and the reason."""


@dataclass(frozen=True)
class JournalEntry:
    """One evaluation.

    Attributes:
        index: place among the evaluations of this searcher and seed, from 0.
        searcher: name of the search that asked.
        seed: its seed.
        purpose: a candidate plan, a sensitivity probe, a comparison of outputs, a finalist, or the dense network (which
            is free).
        digest: digest of the policy.
        kept: units left by group name; groups not named are dense.
        fidelity: share of the search images it was scored on, in ``(0, 1]``.
        accuracy: in ``[0, 1]``; 0 for a comparison, which scores nothing.
        cost: of the plan, in the budget's unit.
        seconds: wall time of building and scoring.
        evaluations_used: evaluations counted so far, this one included.
        layers: sparsity and bits by layer name, as in a policy file; layers not named are untouched.
        divergence: of a comparison, from the dense network's outputs (`envs.evaluator.CandidateEvaluator.compare`).
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
    divergence: float | None = None

    @property
    def charge(self) -> float:
        """What the evaluation counts as: its share of the images; the dense network is no candidate and is free."""
        return 0.0 if self.purpose == "dense" else self.fidelity


@dataclass(frozen=True)
class ClockReading:
    """A plan's time on a clock, over that of the dense network in the same rounds. A continued search reads it again.

    Attributes:
        searcher: name of the search whose plan it was.
        digest: digest of the policy.
        predicted: latency by the table, over that of the dense network.
        measured: median over the rounds; of a budget that is a time and no share, scaled to the dense network's time by
            the table.
        low: lower end of the interval that holds the true median at 95 %.
        high: its upper end.
        rounds: rounds in which both networks took turns.
    """

    searcher: str
    digest: str
    predicted: float
    measured: float
    low: float
    high: float
    rounds: int


class Journal:
    """An append-only list of `JournalEntry` and `ClockReading`, in a file or in memory.

    Reading changes nothing on disk. The first entry appended claims the file for this process until `close`, so that
    two processes cannot mix their entries: the second one is refused and does not disturb the first. The workers of a
    vectorised environment therefore take a journal each.

    A journal may be tied to one search, which its first line then describes. Opening it for another search is refused;
    opening it without saying for which is not.

    A last line that was cut short by a kill is left out. The log and `recovered` say so, and the first entry appended
    removes it from the file.

    Attributes:
        path: the file, or None for a journal in memory.
        search: what the journal is tied to, by name; empty if to nothing.
        recovered: what was dropped when the file was opened, empty if nothing.
    """

    def __init__(self, path: Path | str | None = None, *, search: Mapping[str, str] | None = None) -> None:
        """Open or create the journal at ``path``.

        Args:
            path: the file; none keeps the journal in memory.
            search: what the results of the evaluations depend on, by name, to tie the journal to; none opens any
                journal, and ties a new one to nothing.

        Raises:
            JournalError: if a line other than the last is not an entry, or the journal is not tied to ``search``.
        """
        self.path = Path(path) if path is not None else None
        self.search = dict(search or {})
        self.recovered = ""
        self._entries: list[JournalEntry] = []
        self._readings: list[ClockReading] = []
        self._claim: _Claim | None = None
        self._length = self._cut = 0
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._read(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        # A copy, in another process for instance, has to claim the file for itself.
        return self.__dict__ | {"_claim": None}

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self, searcher: str | None = None, seed: int | None = None) -> list[JournalEntry]:
        """Entries in the order in which they were written, of one searcher and seed if given."""
        return [
            entry
            for entry in self._entries
            if (searcher is None or entry.searcher == searcher) and (seed is None or entry.seed == seed)
        ]

    def reading(self, digest: str, rounds: int) -> ClockReading | None:
        """What a clock said of the plan with that digest in so many rounds, None if it was not asked."""
        return next((each for each in self._readings if (each.digest, each.rounds) == (digest, rounds)), None)

    def append(self, entry: JournalEntry | ClockReading) -> None:
        """Write ``entry`` and wait until it is on disk.

        Raises:
            JournalError: if another process writes the file or has written it since it was read, if the disk is full,
                or if the file cannot be written; the entry is then not in the journal.
        """
        if self.path is not None:
            try:
                self._secure(self.path)
                self._write(self.path, entry)
            except OSError as error:
                what = f"evaluation {entry.index}" if isinstance(entry, JournalEntry) else "a reading of the clock"
                msg = (
                    f"{what} could not be written to '{self.path}': {error.strerror}. "
                    "Everything before it is safe: make room and resume the run"
                )
                raise JournalError(msg) from error
        self._keep(entry)

    def close(self) -> None:
        """Let other processes write the file; the next entry appended claims it anew."""
        self._claim = None

    def _keep(self, entry: JournalEntry | ClockReading) -> None:
        if isinstance(entry, JournalEntry):
            self._entries.append(entry)
        else:
            self._readings.append(entry)

    def _secure(self, path: Path) -> None:
        """Make sure that nobody else writes the file, and that it holds what was read and written here."""
        if self._claim is None or self._claim.process != os.getpid():
            self._claim = _claimed(path)
        expected = self._length + self._cut
        found = path.stat().st_size if path.exists() else 0
        if found != expected:
            msg = (
                f"the journal '{path}' holds {found:,} bytes, but {expected:,} were read and written here: something "
                "else has changed it; start again to go on from what it holds now"
            )
            raise JournalError(msg)
        if self._cut:
            os.truncate(path, self._length)
            self._cut = 0

    def _write(self, path: Path, entry: JournalEntry | ClockReading) -> None:
        lines = [{name: value for name, value in asdict(entry).items() if value is not None}]
        if self.search and self._length == 0:
            lines.insert(0, {"journal": JOURNAL_VERSION, "search": self.search})
        content = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()
        try:
            with path.open("ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            # Part of the line may have been written; the next entry must not be glued to it.
            if path.exists():
                os.truncate(path, self._length)
            raise
        self._length += len(content)

    def _read(self, path: Path) -> None:
        whole, newline, rest = path.read_bytes().rpartition(b"\n")
        self._length, self._cut = len(whole + newline), len(rest)
        values = [_parse(line, path, number) for number, line in enumerate(whole.split(b"\n"), start=1) if newline]
        tied_to = _search(values[0]) if values else None
        first = 0 if tied_to is None else 1
        for number, each in enumerate(values[first:], start=first + 1):
            self._keep(_entry(each, path, number))
        if rest:
            self.recovered = (
                f"the last line of '{path}' was cut short ({len(rest)} bytes) and was dropped: at most one evaluation "
                f"is lost, {len(self)} remain"
            )
            logger.warning("%s", self.recovered)
        if values and self.search:
            _check_same_search(path, tied_to or {}, self.search, len(self))
        self.search = tied_to or self.search


class _Claim:
    """The right of this process to write a file, held until the object is forgotten or the process ends, however."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """Lock the open file; `JournalError` if another process holds it."""
        self.process = os.getpid()
        weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            msg = (
                f"another process writes the journal '{path}'; wait for it or stop it, or give each process a journal "
                "of its own"
            )
            raise JournalError(msg) from None
        except OSError as error:
            # Some network file systems know no locks; `Journal` still notices lines that are not its own.
            logger.warning("'%s' cannot be locked (%s): see to it that one process writes it", path, error.strerror)


_claims: weakref.WeakValueDictionary[tuple[int, int, int], _Claim] = weakref.WeakValueDictionary()
"""By process, device and file, as the system would refuse a process its own lock, and a fork inherits this table."""


def _claimed(path: Path) -> _Claim:
    """The claim of this process on the file at ``path``, which is made if missing."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    file = os.fstat(descriptor)
    key = (os.getpid(), file.st_dev, file.st_ino)
    claim = _claims.get(key)
    if claim is None:
        _claims[key] = claim = _Claim(path, descriptor)
    else:
        os.close(descriptor)
    return claim


def _parse(line: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        msg = f"line {number} of the journal '{path}' is not JSON: {error}; the file was changed by something else"
        raise JournalError(msg) from error


def _search(first: Any) -> dict[str, str] | None:
    """What a journal with that first line is tied to; None if the line is an entry."""
    tied = isinstance(first, dict) and first.get("journal") == JOURNAL_VERSION and isinstance(first.get("search"), dict)
    return dict(first["search"]) if tied else None


def _entry(values: Any, path: Path, number: int) -> JournalEntry | ClockReading:
    if isinstance(values, dict) and set(values) == {one.name for one in fields(ClockReading)}:
        return ClockReading(**values)
    names = {one.name for one in fields(JournalEntry)}
    # Journals from before choices inside layers have no such field, and only comparisons have a divergence.
    if not isinstance(values, dict) or not names - {"layers", "divergence"} <= set(values) <= names:
        found = sorted(values) if isinstance(values, dict) else type(values).__name__
        msg = f"line {number} of the journal '{path}' holds {found}, but an evaluation has the fields {sorted(names)}"
        raise JournalError(msg)
    return JournalEntry(**values)


def _check_same_search(path: Path, before: Mapping[str, str], now: Mapping[str, str], n_entries: int) -> None:
    if not before:
        msg = (
            f"the journal '{path}' holds {n_entries} evaluations and does not say of what network and arguments, so "
            "they cannot be used here; pass another file"
        )
        raise JournalError(msg)
    names = dict.fromkeys([*now, *before])
    changed = [
        f"{name} {before.get(name, 'unknown')}, now {now.get(name, 'unknown')}"
        for name in names
        if before.get(name) != now.get(name)
    ]
    if changed:
        msg = f"the journal '{path}' is of another search: {'; '.join(changed)}; pass the same again, or another file"
        raise JournalError(msg)
