"""Finished cells of the matrix, and how figures from them are written."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..outcome import MethodOutcome, RunOutcome, percent
from ..run import RunFolder

_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""97.5 % quantile of Student's t by degrees of freedom."""


class Cells:
    """The finished cells of a matrix, by name."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        """Read what is finished of the cells ``names`` below ``root``."""
        self.names = names
        self.root = root
        self.outcomes = {n: RunOutcome.load(p) for n in names if (p := root / n / "results.json").exists()}
        self.applied = self._read("applied.json")
        self.timed = self._read("timed.json")
        self.floors = self._read("floor.json")

    def _read(self, file: str) -> dict[str, Any]:
        return {n: json.loads(path.read_text()) for n in self.names if (path := self.root / n / file).exists()}

    def methods(self, table: str) -> dict[str, list[str]]:
        """Names of the cells of each method's searches of one table, in the matrix's order, run or not."""
        parts = [name.removeprefix(f"{table}-").split("-") for name in self.names if name.startswith(f"{table}-")]
        return {method: self.seeds(table, method) for method, *seed in parts if len(seed) == 1}

    def seeds(self, table: str, method: str) -> list[str]:
        """Names of the cells of one method in one table."""
        return [name for name in self.names if name.rpartition("-seed")[0] == f"{table}-{method}"]

    def rows(self, names: Iterable[str], method: str) -> list[MethodOutcome]:
        """A method's rows of the finished ones of the cells ``names``."""
        return [self.outcomes[name].row(method) for name in names if name in self.outcomes]

    def judged(self, name: str, method: str) -> NDArray[np.float64]:
        """1 or 0 for each test image that a finished cell's network classified rightly or not, shape ``(n,)``."""
        digits = RunFolder(self.root / name).method(method).judged_file.read_bytes()
        return np.array(list(digits), dtype=np.float64) - ord("0")


def spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation of accuracies, in percent; one value alone as it is."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = percent(statistics.mean(known))
    return mean if len(known) == 1 else f"{mean} ± {100 * statistics.stdev(known):.2f}"


def interval(differences: Sequence[float]) -> str:
    """Mean difference in points, with a 95 % interval from two values on."""
    if not differences or not any(differences):
        return "-"
    mean = statistics.mean(differences)
    if len(differences) == 1:
        return in_points(mean)
    half = _STUDENT[len(differences) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))
    return in_points(mean, half)


def in_points(mean: float, half: float | None = None) -> str:
    """A difference in points, with its interval if there is one."""
    if half is None:
        return f"{100 * mean:+.2f}"
    return f"{100 * mean:+.2f} [{100 * (mean - half):+.2f}, {100 * (mean + half):+.2f}]"
