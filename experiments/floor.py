"""The least latency that a network can be brought to: by the table, and on the clock of its device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from envs.evaluator import CandidateEvaluator
from envs.space import KEEP_LESS, SPARE_LESS, SearchSpace
from graph_encoder.network import NetworkGraph
from latency.budget import Budget, BudgetError, in_words, least_in_words
from latency.device import TableError
from latency.measure import Comparison
from latency.runtimes import LatencyError
from latency.table import LatencyTable

from .clock import Clock
from .config import ConfigError, Decision, RunConfig
from .outcome import DENSE
from .search import space_of_graph

CHOICES: tuple[tuple[Decision, ...], ...] = (("channels",), ("bits",), ("channels", "bits"))
"""What floors are looked for: pruning alone, bits alone, and both."""


@dataclass(frozen=True)
class Floor:
    """The fastest network known of those that a search may choose.

    Attributes:
        decide: what the search decides.
        predicted_ns: its latency by the table.
        dense_ns: that of the dense network.
        measured: its latency on the clock against the dense network's, None where it was not measured.
    """

    decide: tuple[Decision, ...]
    predicted_ns: int
    dense_ns: int
    measured: Comparison | None = None

    def reaches(self, limit_ns: int) -> bool:
        """Whether table and clock allow a budget; a clock that cannot tell does not forbid it."""
        slower = self.measured is not None and self.measured.low > limit_ns / self.dense_ns
        return self.predicted_ns <= limit_ns and not slower

    @property
    def least_ns(self) -> int:
        """The least budget that table and clock allow, on the table's scale."""
        measured = self.measured.low if self.measured else 0.0
        return max(self.predicted_ns, math.ceil(measured * self.dense_ns))

    @property
    def name(self) -> str:
        """What is decided, in words."""
        return ", ".join(self.decide)

    def __str__(self) -> str:
        table = f"{in_words(self.predicted_ns, 'latency')} ({self.predicted_ns / self.dense_ns:.1%}) by the table"
        if self.measured is None:
            return f"{self.name}: {table}, not measured"
        clock = f"{self.measured.ratio:.1%} ({self.measured.low:.1%} to {self.measured.high:.1%}) on the clock"
        return f"{self.name}: {table}, {clock}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        clock = self.measured
        return {
            "decide": list(self.decide),
            "predicted_ms": self.predicted_ns / 1e6,
            "predicted_share": self.predicted_ns / self.dense_ns,
            "measured_share": clock and [clock.low, clock.ratio, clock.high],
        }


@dataclass(frozen=True)
class LatencyFloors:
    """What was found of a network under a table.

    Attributes:
        floors: one for each way to decide that the table can time.
        notes: what was left out, and why.
        refusal: why the budget is refused, None if it can be met or there is none.
    """

    floors: tuple[Floor, ...]
    notes: tuple[str, ...]
    refusal: str | None

    def lines(self) -> list[str]:
        """What a person reads."""
        return [
            f"latency floor   dense {in_words(self.floors[0].dense_ns, 'latency')} by the table",
            *(f"  {floor}" for floor in self.floors),
            *(f"  {note}" for note in self.notes),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"floors": [floor.to_dict() for floor in self.floors], "notes": self.notes, "refusal": self.refusal}


def find_floors(
    model: nn.Module, graph: NetworkGraph, config: RunConfig, budgets: Sequence[Budget], images: Tensor
) -> LatencyFloors:
    """Find, build and time the fastest networks that a search may choose, with every layer at its least.

    Args:
        model: the dense network.
        graph: its capture.
        config: names the table, and says what a search may do. Where it does not say what is decided, floors are found
            for channels, for bits and for both.
        budgets: what is asked for; other kinds than latency are kept by the floor.
        images: inputs of the network, a few: statistics and ranges are read off them.

    Raises:
        BudgetError: if a budget of another kind cannot be met, whatever is decided.
        TableError: if the table does not hold the layers of the network.
        ConfigError: if nothing can be decided.
        ExportError: if the runtime takes ONNX and the network cannot be written as such.
    """
    assert config.latency.table is not None
    table = LatencyTable.load(config.latency.table)
    asked = next((budget for budget in budgets if budget.kind == "latency"), None)
    others = [budget for budget in budgets if budget.kind != "latency"]
    choices = (config.search.decide,) if "decide" in config.search.model_fields_set else CHOICES
    spaces: dict[tuple[Decision, ...], SearchSpace] = {}
    notes: list[str] = []
    refused: list[Exception] = []
    for decide in choices:
        whole = config.model_copy(
            update={
                "budget": (Budget(kind="latency", share=1), *others),
                "search": config.search.model_copy(update={"decide": decide}),
            }
        )
        try:
            spaces[decide] = space_of_graph(whole, graph)
        except (BudgetError, TableError, ConfigError) as error:
            refused.append(error)
            hint = " (with --integers)" if "bits" in decide and isinstance(error, TableError) else ""
            notes.append(f"{', '.join(decide)}: {error}{hint}")
    if not spaces:
        raise refused[0]
    floors = [Floor(decide, space.lowest_cost, space.cost.dense) for decide, space in spaces.items()]
    try:
        clock = Clock.of_table(table)
    except LatencyError as error:
        notes.append(f"not measured on the clock: {error}")
    else:
        ratios = _measured(clock, model, graph, list(spaces.values()), images)
        floors = [replace(floor, measured=ratio) for floor, ratio in zip(floors, ratios, strict=True)]
        if clock.warning:
            notes.append(clock.warning)
    limit = asked.limit(floors[0].dense_ns) if asked else None
    refusal = None
    if limit is not None:
        if not any(floor.reaches(limit) for floor in floors):
            refusal = _refusal(limit, floors)
        elif out := [floor.name for floor in floors if not floor.reaches(limit)]:
            within = [floor.name for floor in floors if floor.reaches(limit)]
            notes.append(f"the budget is out of reach of {_or(out)}, and within that of {_or(within)}")
    return LatencyFloors(tuple(floors), tuple(notes), refusal)


def _refusal(limit: int, floors: Sequence[Floor]) -> str:
    best = min(floors, key=lambda floor: floor.least_ns)
    least = least_in_words(best.least_ns, best.dense_ns, "latency")
    # By the clock the fastest network may be slower than the dense one.
    ways = f"{KEEP_LESS}, or {SPARE_LESS}"
    todo = f"Pass at least {least}, or {ways}" if best.least_ns < best.dense_ns else ways[0].upper() + ways[1:]
    return (
        f"a budget of {in_words(limit, 'latency')} ({limit / best.dense_ns:.1%} of the dense "
        f"{in_words(best.dense_ns, 'latency')}) is below the floor with {best}. {todo}"
    )


def _or(names: Sequence[str]) -> str:
    return " or ".join(f"'{name}'" for name in names)


def _measured(
    clock: Clock, model: nn.Module, graph: NetworkGraph, spaces: Sequence[SearchSpace], images: Tensor
) -> Iterator[Comparison]:
    """Each space's fastest network on the clock, in turns with all others and the dense one."""
    builder = CandidateEvaluator(model, graph, lambda _: 0.0, [images])
    networks = {DENSE: clock.artifact(model, images)}
    for place, space in enumerate(spaces):
        networks[f"floor {place}"] = clock.artifact(builder.build(space.policy(space.fastest)), images)
    report = clock.time(networks, images)
    return (report.compare(f"floor {place}", DENSE, clock.device.runtime.name) for place in range(len(spaces)))
