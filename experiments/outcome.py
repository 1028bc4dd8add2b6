"""What a run found: the value that results.json holds, and the table that a person reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict
from rich.table import Table
from rich.text import Text

from envs.journal import ClockReading
from latency.budget import Budget, in_words
from latency.cost import CostKind
from latency.device import Fingerprint
from latency.measure import LatencyEntry
from latency.runtimes import ONNXRUNTIME, PYTORCH, SPARSE

from .machine import Machine

Split = Literal["validation", "test"]

DENSE = "dense"
NO_BUDGET = "no budget"
ANOTHER_DEVICE = "another device than the latency table's"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Latency(_Record):
    """Milliseconds of one call of a network on one runtime."""

    runtime: str
    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    n_runs: int

    ratio: tuple[float, float, float] | None = None
    """Lower quartile, median and upper quartile of its time over the dense network's in the same round."""

    @classmethod
    def of(cls, entry: LatencyEntry, dense: LatencyEntry | None) -> Latency:
        """What was measured of a network, beside the dense one on the same runtime where that was timed too."""
        quartiles = None
        if dense is not None:
            lower, median, upper = np.percentile(np.divide(entry.times_ms, dense.times_ms), [25, 50, 75]).tolist()
            quartiles = (lower, median, upper)
        return cls(
            runtime=entry.runtime,
            median_ms=entry.median_ms,
            lower_quartile_ms=entry.lower_quartile_ms,
            upper_quartile_ms=entry.upper_quartile_ms,
            n_runs=entry.n_runs,
            ratio=quartiles,
        )

    def speed(self, method: str, dense: Latency) -> Speed:
        """How the network of ``method`` compares with the dense one; records without ratios have ranges of times."""
        lower, ratio, upper = self.ratio or (
            self.lower_quartile_ms / dense.upper_quartile_ms,
            self.median_ms / dense.median_ms,
            self.upper_quartile_ms / dense.lower_quartile_ms,
        )
        return Speed(method, self.runtime, lower, ratio, upper)

    def __str__(self) -> str:
        # Two digits where the calls scatter by more than a tenth: a third would only show the noise.
        digits = 3 if self.upper_quartile_ms - self.lower_quartile_ms < 0.1 * self.median_ms else 2
        median, lower, upper = (
            significant(ms, digits) for ms in (self.median_ms, self.lower_quartile_ms, self.upper_quartile_ms)
        )
        return f"{median} [{lower}-{upper}]"


@dataclass(frozen=True)
class Speed:
    """A network's time over the dense one's, in turns.

    Attributes:
        method: what found the network.
        runtime: what ran it.
        lower: lower quartile of the ratio.
        ratio: its median; below 1 is faster.
        upper: its upper quartile.
        dense_runtime: what ran the dense network, empty for the same.
    """

    method: str
    runtime: str
    lower: float
    ratio: float
    upper: float
    dense_runtime: str = ""

    @property
    def verdict(self) -> Literal["faster", "slower", "unclear"]:
        """On which side of 1 the quartiles lie; unclear where they lie on both."""
        if self.upper < 1:
            return "faster"
        return "slower" if self.lower > 1 else "unclear"

    @property
    def quartiles(self) -> str:
        """The ratio in words."""
        other = f" on {self.dense_runtime}" if self.dense_runtime else ""
        return f"{self.ratio:.3g} of the dense network's time{other} (quartiles {self.lower:.3g} to {self.upper:.3g})"

    def to_dict(self) -> dict[str, str | float]:
        """Verdict and numbers, for scripts."""
        return {
            "verdict": self.verdict,
            "ratio": self.ratio,
            "lower_quartile": self.lower,
            "upper_quartile": self.upper,
            "dense_runtime": self.dense_runtime or self.runtime,
        }

    def __str__(self) -> str:
        verdict = "cannot be told from the dense network" if self.verdict == "unclear" else self.verdict
        return f"{self.method} on {self.runtime}: {verdict}, {self.quartiles}"


class LayerForm(_Record):
    """In what form `pruning.sparse_network.sparsify` runs one layer, and why."""

    layer: str
    form: str
    """``dense``, ``winograd`` (dense too), ``unstructured``, or ``block 4``, ``block 8``, ``block 16``."""
    density: float
    """Share of the weights that are not zero."""
    stored: float
    """Share of the weights that the form holds, zeros among them; all of them if dense."""
    reason: str


class MethodOutcome(_Record):
    """One row of the table: the dense network, a baseline or an agent."""

    method: str
    """``dense`` or the method's name."""
    evaluations: float = 0.0
    """Evaluations counted: candidates, finalists pro rata, and the probes where the method used them."""
    plans: int = 0
    """Different plans scored."""
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
    """Accuracy on the test split before fine-tuning."""
    tuned_test_accuracy: float | None = None
    """The same after fine-tuning."""
    macs: int
    """Multiply-adds of one image with a weight that is not zero."""
    params: int
    """Parameters that are not zero."""
    size_bytes: int
    """Bytes that the parameters can be packed into, as a budget of bytes counts them (`pruning.stored_size`)."""
    onnx_bytes: int | None = None
    """Size of the ONNX file; None where none was written."""
    cost: int = 0
    """What the plan costs, in the first budget's kind; of the dense network 0 in older records."""
    further_costs: dict[CostKind, int] = {}
    """What it costs in the kinds of the other budgets; none for the dense network."""
    keep_ratios: dict[str, float] = {}
    """What each decision left, in the network's order: share of channels by group, of weights and bits by layer."""
    clock_readings: tuple[ClockReading, ...] = ()
    """Under a latency budget: predicted and measured time of the plans that were read, the one that is kept last."""
    latencies: tuple[Latency, ...] = ()
    """Measured times, one a runtime; through `sparsify` too where a method decided densities."""
    layer_forms: tuple[LayerForm, ...] = ()
    """What `sparsify` chose, layer by layer, where the network was timed through it."""

    @property
    def has_zeros(self) -> bool:
        """Whether layers hold zeros, as far as the network was timed through `sparsify`."""
        return any(layer.density < 1 for layer in self.layer_forms)

    def accuracy(self, split: Split, *, tuned: bool) -> float | None:
        """Accuracy of the chosen plan before fine-tuning, or after it, on a split; None where it was not scored."""
        if split == "validation":
            return self.tuned_validation_accuracy if tuned else self.validation_accuracy
        return self.tuned_test_accuracy if tuned else self.test_accuracy

    @property
    def overhead(self) -> float | None:
        """Share of the search's wall time spent outside evaluating candidates."""
        return 1 - self.seconds_evaluating / self.seconds if self.seconds > 0 else None


class Allowance(_Record):
    """One budget of a run, in numbers."""

    kind: CostKind
    """What is counted."""
    limit: int
    """Most that a plan could cost (latency in nanoseconds), by the table where it is latency."""
    asked_limit: int | None = None
    """The latency asked for, where the clock let searches spend more or less by the table, `limit`; else None."""
    dense_cost: int
    """What the untouched network costs."""

    @property
    def asked(self) -> int:
        """What was asked for."""
        return self.limit if self.asked_limit is None else self.asked_limit


class RunOutcome(_Record):
    """Everything that results.json holds."""

    version: Literal[1] = 1
    """Of this format; a file of another one is refused."""
    model: str
    data: str
    budget: str
    """In words, as `budget_words` says it."""
    budget_kind: CostKind
    """What the first budget counts; without one, what the reward weighs."""
    cost_limit: int
    """Most that a plan could cost, in that kind (latency in nanoseconds)."""
    dense_cost: int = 0
    """Cost of the untouched network, in the same kind; 0 in a record of channels alone from before it was kept."""
    further_budgets: tuple[Allowance, ...] = ()
    """The budgets after the first, whose limits every plan kept."""
    is_reconstructed: bool = False
    """Whether plans were repaired by least squares before they were scored (and before fine-tuning); False in a record
    from before it was kept."""
    seed: int
    command: str
    machine: Machine
    """The machine that the run was started on."""
    timed_on: Machine | None = None
    """The machine that networks were timed on, where a run was continued otherwise; None if it is that one."""
    device: Fingerprint | None = None
    """What the latency table was measured on, that plans were searched for; None without a table."""
    elsewhere: str = ""
    """Why the times of the networks are another device's; empty if they were read on `device`, or there is none."""
    asked_limit: int | None = None
    """As that of `Allowance`, for the first budget."""
    probe_evaluations: float = 0.0
    """Evaluations that the sensitivity probes count as; made once, counted for each method that uses them."""
    probe_seconds: float = 0.0
    bits_note: str = ""
    """Why single precision was not on offer, see `SearchProblem.bits_note`; empty if it was."""
    has_one_plan: bool = False
    """Whether everything on offer kept the budget, so that there was nothing to search for."""
    granted_evaluations: int | None = None
    """Evaluations that each searching method was granted; one that finds nothing new to propose ends with fewer."""
    n_validation: int
    n_test: int
    warnings: tuple[str, ...] = ()
    """What the run warned of, each once."""
    rows: tuple[MethodOutcome, ...]

    @property
    def splits(self) -> dict[Split, int]:
        """The splits that accuracies are shown on, and their images; test images choose nothing."""
        sizes: dict[Split, int] = {"validation": self.n_validation, "test": self.n_test}
        return {split: n for split, n in sizes.items() if n}

    @property
    def is_tuned(self) -> bool:
        """Whether any compressed network was fine-tuned."""
        return any(row.tuned_validation_accuracy is not None for row in self.rows if row.method != DENSE)

    def best(self, *, tuned: bool) -> list[MethodOutcome]:
        """The methods with the highest validation accuracy before fine-tuning, or after it; none if none was scored.

        Of those that keep a latency budget on the clock too, where any does.
        """
        all_rows = [row for row in self.rows if row.method != DENSE]
        rows = [row for row in all_rows if not _is_over_on_the_clock(row, self)] or all_rows
        most = max((a for row in rows if (a := row.accuracy("validation", tuned=tuned)) is not None), default=None)
        return [row for row in rows if most is not None and row.accuracy("validation", tuned=tuned) == most]

    @property
    def budgets(self) -> tuple[Allowance, ...]:
        """Every budget; without any, what the reward weighs, up to all of the dense network's."""
        return (
            Allowance(
                kind=self.budget_kind,
                limit=self.cost_limit,
                asked_limit=self.asked_limit,
                dense_cost=self.dense_cost,
            ),
            *self.further_budgets,
        )

    @property
    def timed_threads(self) -> int:
        """Threads that networks were timed with."""
        here = self.timed_on or self.machine
        return here.threads if self.device is None or self.elsewhere else self.device.threads

    @property
    def has_budget(self) -> bool:
        """Whether plans had a limit to keep."""
        return not self.budget.startswith(NO_BUDGET)

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


def budget_words(budgets: Sequence[Budget], target: Budget | None = None) -> str:
    """Budgets, or the target of a search without one, as a headline says them: ``at most 50 % of its MACs``."""
    if not budgets:
        return f"{NO_BUDGET}, aiming at {_most_words(target)}" if target else NO_BUDGET
    return f"at most {' and '.join(map(_most_words, budgets))}"


def _most_words(budget: Budget) -> str:
    nouns = {"macs": "MACs", "params": "parameters", "bytes": "bytes", "bops": "bit operations", "latency": "latency"}
    if budget.share:
        return f"{100 * budget.share:.4g} % of its {nouns[budget.kind]}"
    assert budget.absolute is not None
    return in_words(budget.absolute, budget.kind)


_OWN_COLUMN = {"bops": "bit operations", "latency": "latency by the table"}
"""Kinds of budget that get a column; the other kinds have one anyway."""
_ON_THE_CLOCK = "latency on the clock"


def headings(outcome: RunOutcome) -> list[str]:
    """Headings of the table's columns."""
    accuracies = [
        f"{split}, fine-tuned" if tuned else f"{split} accuracy"
        for tuned in _stages(outcome)
        for split in outcome.splits
    ]
    budgets = [_OWN_COLUMN[budget.kind] for budget in outcome.budgets if budget.kind in _OWN_COLUMN]
    budgets += [_ON_THE_CLOCK] if _is_on_the_clock(outcome) else []
    sizes = ["bytes", *(["ONNX file"] if _has_files(outcome) else [])]
    return ["method", *accuracies, *budgets, "MACs", "params", *sizes, *_times(outcome), "evaluations", "seconds"]


def _stages(outcome: RunOutcome) -> tuple[bool, ...]:
    """Before fine-tuning, and after it where anything was."""
    return (False, True) if outcome.is_tuned else (False,)


def table_cells(outcome: RunOutcome) -> list[list[str]]:
    """The table's rows as text, one cell for each of `headings`."""
    dense = outcome.row(DENSE)
    return [
        [
            row.method,
            *(percent(row.accuracy(split, tuned=tuned)) for tuned in _stages(outcome) for split in outcome.splits),
            *(_cost(row, outcome, budget) for budget in outcome.budgets if budget.kind in _OWN_COLUMN),
            *([_clock_cell(row, outcome)] if _is_on_the_clock(outcome) else []),
            _with_share(row.macs, dense.macs),
            _with_share(row.params, dense.params),
            _bytes(row.size_bytes, dense.size_bytes),
            *([_bytes(row.onnx_bytes, dense.onnx_bytes)] if _has_files(outcome) else []),
            *(_time(row, dense, runtime) for runtime in _times(outcome).values()),
            f"{row.evaluations:.4g}" if row.method != DENSE else "",
            f"{row.seconds:.1f}" if row.method != DENSE else "",
        ]
        for row in outcome.rows
    ]


def result_tables(outcome: RunOutcome, width: int) -> list[Table]:
    """The table at the end of a run, in as many parts as a terminal of ``width`` columns needs, methods in each."""
    methods, *columns = zip(headings(outcome), *table_cells(outcome), strict=True)
    parts: list[list[tuple[str, ...]]] = []
    left = 0
    for column in columns:
        # Two spaces and a border.
        needed = max(map(len, column)) + 3
        if needed > left:
            parts.append([])
            left = width - max(map(len, methods)) - 4
        parts[-1].append(column)
        left -= needed
    return [_table([methods, *part], "" if place else _title(outcome)) for place, part in enumerate(parts)]


def _table(columns: Sequence[Sequence[str]], title: str) -> Table:
    table = Table(title=Text(title) if title else None)
    for place, (heading, *_) in enumerate(columns):
        table.add_column(Text(heading), justify="right" if place else "left")
    for cells in list(zip(*columns, strict=True))[1:]:
        table.add_row(*map(Text, cells))
    return table


def _title(outcome: RunOutcome) -> str:
    images = " and ".join(f"{n:,} {split}" for split, n in outcome.splits.items())
    return f"{outcome.model} with {outcome.budget}, {outcome.data}; {images} images"


def speeds(outcome: RunOutcome) -> list[Speed]:
    """Every compressed network against the dense one, on each runtime that both were timed on."""
    dense = {latency.runtime: latency for latency in outcome.row(DENSE).latencies}
    return [
        latency.speed(row.method, dense[latency.runtime])
        for row in outcome.rows
        for latency in row.latencies
        if row.method != DENSE and latency.runtime in dense
    ]


def speed_notes(outcome: RunOutcome) -> list[str]:
    """Sentences on the times: that they are another device's, and on each runtime what is slower than the dense network
    or cannot be told from it.
    """  # noqa: D205 - one sentence
    notes, found = [], speeds(outcome)
    if outcome.elsewhere:
        notes.append(f"Times are of {ANOTHER_DEVICE}: {outcome.elsewhere}.")
    for runtime in dict.fromkeys(speed.runtime for speed in found):
        slower = [s for s in found if s.runtime == runtime and s.verdict == "slower"]
        alike = [s.method for s in found if s.runtime == runtime and s.verdict == "unclear"]
        if slower:
            named = ", ".join(f"{speed.method} takes {speed.quartiles}" for speed in slower)
            notes.append(f"Slower than the dense network on {runtime}: {named}.")
        if alike:
            notes.append(
                f"Times on {runtime}: the quartiles of {', '.join(alike)} lie on both sides of the dense network's. "
                "The machine was too noisy, or the saving too small, to tell them apart."
            )
    return notes


def missing_speedups(outcome: RunOutcome) -> list[str]:
    """Every network and runtime without a speed-up that is sure, in words; a network that nothing timed is one, too.

    Times of another device than the one that plans were searched for tell of no network.
    """
    if outcome.elsewhere:
        return [f"timed on {ANOTHER_DEVICE}: {outcome.elsewhere}"]
    dense = outcome.row(DENSE).latencies
    missing = []
    for row in outcome.rows:
        if row.method != DENSE:
            found = speeds_that_count(row.method, row.latencies, dense, has_zeros=row.has_zeros, device=outcome.device)
            missing += unsure_speedups(row.method, found, outcome.device)
    return missing


def unsure_speedups(method: str, counting: Sequence[Speed], device: Fingerprint | None) -> list[str]:
    """The speeds among those that count that are no sure speed-up, in words; a network without any is one, too.

    Args:
        method: that found the network.
        counting: from `speeds_that_count`.
        device: that the network was searched for, if for one.
    """
    if not counting:
        return [f"{method}: not timed on {device or 'any runtime'}"]
    return [str(speed) for speed in counting if speed.verdict != "faster"]


def speeds_that_count(
    method: str,
    own: Sequence[Latency],
    dense: Sequence[Latency],
    *,
    has_zeros: bool,
    device: Fingerprint | None = None,
) -> list[Speed]:
    """The speeds by which a network is faster than the dense one or not.

    Each runtime counts that both were timed on, or the one of the device that the network was searched for alone.
    Without such a device, a network with zeros is judged by its time through `sparsify` alone, where there is one, for
    the others compute zeros as any other weight.
    """
    if device is not None:
        own, has_zeros = [latency for latency in own if latency.runtime == device.runtime], False
    sparse = next((latency for latency in own if latency.runtime == SPARSE), None)
    if has_zeros and sparse is not None:
        return [sparse_speed(method, sparse, dense)]
    by_runtime = {latency.runtime: latency for latency in dense}
    return [latency.speed(method, by_runtime[latency.runtime]) for latency in own if latency.runtime in by_runtime]


def sparse_speed(method: str, own: Latency, dense: Sequence[Latency]) -> Speed:
    """A network's time through `sparsify` over the dense network's on its fastest runtime."""
    fastest = min(dense, key=lambda latency: latency.median_ms)
    if fastest.runtime == own.runtime:
        return own.speed(method, fastest)
    # Not on one runtime, so not in the same rounds: only the ranges of the times can be compared.
    across = own.model_copy(update={"ratio": None}).speed(method, fastest)
    return replace(across, dense_runtime=fastest.runtime)


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


def significant(value: float, digits: int) -> str:
    """A positive number rounded to so many significant digits, without an exponent."""
    decimals = digits - 1 - math.floor(math.log10(value))
    return f"{round(value, decimals):.{max(0, decimals)}f}"


def _cost(row: MethodOutcome, outcome: RunOutcome, budget: Allowance) -> str:
    """What a budget counts, where no other column shows it."""
    cost = (row.cost if budget.kind == outcome.budget_kind else row.further_costs.get(budget.kind, 0)) or (
        budget.dense_cost
    )
    words = in_words(cost, "latency") if budget.kind == "latency" else amount(cost)
    return words if cost == budget.dense_cost else f"{words} ({cost / budget.dense_cost:.1%})"


def _is_on_the_clock(outcome: RunOutcome) -> bool:
    return any(row.clock_readings for row in outcome.rows)


def _clock_cell(row: MethodOutcome, outcome: RunOutcome) -> str:
    """The last reading of a row: share of the dense latency, with its interval at 95 %."""
    if not row.clock_readings:
        return "" if row.method == DENSE else "-"
    last = row.clock_readings[-1]
    over = " over" if _is_over_on_the_clock(row, outcome) else ""
    return f"{last.measured:.1%} ({last.low:.1%} to {last.high:.1%}){over}"


def _is_over_on_the_clock(row: MethodOutcome, outcome: RunOutcome) -> bool:
    """Whether the last reading of a row is over the latency budget."""
    limits = [budget.asked / budget.dense_cost for budget in outcome.budgets if budget.kind == "latency"]
    return bool(limits and row.clock_readings) and row.clock_readings[-1].measured > limits[0]


def _bytes(size: int | None, dense: int | None) -> str:
    """A size in bytes, with its share of the dense network's; a dash where there is none."""
    if size is None:
        return "-"
    share = f" ({size / dense:.1%})" if dense and size != dense else ""
    return f"{amount(size)}B{share}"


def _has_files(outcome: RunOutcome) -> bool:
    """Whether a network of the table was written as ONNX."""
    return any(row.onnx_bytes is not None for row in outcome.rows)


def _time(row: MethodOutcome, dense: MethodOutcome, runtime: str) -> str:
    latency = next((latency for latency in row.latencies if latency.runtime == runtime), None)
    if latency is None:
        return "-"
    whole = next((other for other in dense.latencies if other.runtime == latency.runtime), None)
    is_slower = whole is not None and row is not dense and latency.speed(row.method, whole).verdict == "slower"
    return f"{latency} slower" if is_slower else str(latency)


def _times(outcome: RunOutcome) -> dict[str, str]:
    """The runtimes of the table, by the heading of their column."""
    timed = {latency.runtime for row in outcome.rows for latency in row.latencies}
    columns = {"eager ms": PYTORCH, "onnx ms": ONNXRUNTIME} | ({"sparse ms": SPARSE} if SPARSE in timed else {})
    if outcome.device and outcome.device.runtime in timed - {*columns.values()}:
        columns[f"{outcome.device.runtime} ms"] = outcome.device.runtime
    where = ", another device" if outcome.elsewhere else ""
    return {f"{heading}{where}": runtime for heading, runtime in columns.items()}
