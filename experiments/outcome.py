"""What a run found: the value that results.json holds, and the table that a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from rich.table import Table

from latency.budget import Budget

from .machine import Machine

DENSE = "dense"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Latency(_Record):
    """Milliseconds of one call of a network on one runtime."""

    runtime: str
    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    n_runs: int


class MethodOutcome(_Record):
    """One row of the table: the dense network, a baseline or an agent."""

    method: str
    """``dense`` or the method's name."""
    evaluations: float = 0.0
    """Evaluations counted: candidates, finalists pro rata, and the probes where the method used them."""
    cache_hits: int = 0
    """Plans proposed again, which cost nothing."""
    seconds: float = 0.0
    """Wall time of the search, finalists included, and the probes where the method used them."""
    seconds_evaluating: float = 0.0
    """Part of `seconds` spent building and scoring candidates."""
    search_accuracy: float | None = None
    """Best accuracy on the search images, in [0, 1]."""
    validation_accuracy: float | None = None
    """Accuracy of the chosen plan on the whole validation split, before fine-tuning."""
    tuned_validation_accuracy: float | None = None
    """The same after fine-tuning."""
    test_accuracy: float | None = None
    """Accuracy on the test split before fine-tuning; filled in by the report."""
    tuned_test_accuracy: float | None = None
    """The same after fine-tuning."""
    macs: int
    """Multiply-adds of one image, counted on the network that was built."""
    params: int
    """Parameters of the network that was built."""
    size_bytes: int
    """Bytes of its parameters and buffers."""
    keep_ratios: dict[str, float] = {}
    """Share of channels kept, by group, in the network's order."""
    latencies: tuple[Latency, ...] = ()
    """Measured times, one a runtime."""

    @property
    def overhead(self) -> float | None:
        """Share of the search's wall time spent outside evaluating candidates."""
        return 1 - self.seconds_evaluating / self.seconds if self.seconds > 0 else None


class RunOutcome(_Record):
    """Everything that results.json holds."""

    version: int = 1
    model: str
    data: str
    budget: str
    """In words, as `budget_words` says it."""
    budget_kind: str
    cost_limit: int
    seed: int
    command: str
    machine: Machine
    probe_evaluations: float = 0.0
    """Evaluations that the sensitivity probes count as; made once, counted for each method that uses them."""
    probe_seconds: float = 0.0
    n_validation: int
    n_test: int
    rows: tuple[MethodOutcome, ...]

    def row(self, method: str) -> MethodOutcome:
        """The row of one method; `KeyError` if it was not run."""
        for row in self.rows:
            if row.method == method:
                return row
        raise KeyError(method)

    @classmethod
    def load(cls, path: Path) -> RunOutcome:
        """Read results.json."""
        return cls.model_validate_json(path.read_text())


def budget_words(budget: Budget | None) -> str:
    """A budget as a headline says it: ``at most 20% of its MACs``."""
    if budget is None:
        return "no budget"
    noun = {"macs": "MACs", "params": "parameters"}[budget.kind]
    return (
        f"at most {100 * budget.share:.4g} % of its {noun}" if budget.share else f"at most {budget.absolute:,} {noun}"
    )


HEADINGS = ("accuracy", "fine-tuned", "MACs", "params", "bytes", "eager ms", "onnx ms", "evaluations", "seconds")


def table_cells(outcome: RunOutcome) -> list[list[str]]:
    """The table's rows as text: the method, then one cell for each of `HEADINGS`."""
    dense = outcome.row(DENSE)
    return [
        [
            row.method,
            percent(row.test_accuracy if outcome.n_test else row.validation_accuracy),
            percent(row.tuned_test_accuracy if outcome.n_test else row.tuned_validation_accuracy),
            _with_share(row.macs, dense.macs),
            _with_share(row.params, dense.params),
            f"{amount(row.size_bytes)}B",
            *_times(row, 2),
            f"{row.evaluations:.4g}" if row.method != DENSE else "",
            f"{row.seconds:.1f}" if row.method != DENSE else "",
        ]
        for row in outcome.rows
    ]


def result_table(outcome: RunOutcome) -> Table:
    """The table at the end of a run."""
    split = f"{outcome.n_test:,} test images" if outcome.n_test else f"{outcome.n_validation:,} validation images"
    table = Table(title=f"{outcome.model} with {outcome.budget}, {outcome.data}; accuracy on {split}")
    table.add_column("method")
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for cells in table_cells(outcome):
        table.add_row(*cells)
    return table


def plain_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as aligned lines, for output that is not a terminal."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def percent(accuracy: float | None) -> str:
    """An accuracy in [0, 1] as a percentage with two decimals, a dash if there is none."""
    return "-" if accuracy is None else f"{100 * accuracy:.2f} %"


def amount(count: int) -> str:
    """A count as a person reads it: ``125.5M``, ``853k``."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return str(count)


def _with_share(count: int, dense: int) -> str:
    return amount(count) if count == dense else f"{amount(count)} ({count / dense:.1%})"


def _times(row: MethodOutcome, n: int) -> list[str]:
    times = [f"{t.median_ms:.2f} [{t.lower_quartile_ms:.2f}-{t.upper_quartile_ms:.2f}]" for t in row.latencies]
    return (times + ["-"] * n)[:n]
