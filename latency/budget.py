"""What a compressed network may cost."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from numbers import Real
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from graph_encoder.errors import SecateurError

from .cost import FLOPS_PER_MAC, CostKind

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_PATTERN = re.compile(
    r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*(%|[kmgt])?\s*(macs|flops|params|bytes|b|bops|latency)?\s*",
    re.IGNORECASE | re.ASCII,
)
_BARE = re.compile(r"\s*[0-9]*\.?[0-9]+\s*")
_TIME = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*([mu\u00b5\u03bc]s)\s*")
_NS = {"ms": 10**6, "us": 10**3, "\u00b5s": 10**3, "\u03bcs": 10**3}
"""Nanoseconds of each unit; of the two micro signs one is the Greek letter."""
_KINDS: dict[str, CostKind] = {
    "": "macs",
    "macs": "macs",
    "flops": "macs",
    "params": "params",
    "bytes": "bytes",
    "b": "bytes",
    "bops": "bops",
    "latency": "latency",
}


def in_words(cost: int, kind: CostKind) -> str:
    """A cost as a person reads it: ``"62,700,000 macs"``, ``"3.5 ms"``."""
    if kind != "latency":
        return f"{cost:,} {kind}"
    return f"{cost / _NS['ms']:.4g} ms" if cost < 10**4 * _NS["ms"] else f"{round(cost / _NS['ms']):,} ms"


def least_in_words(cost: int, dense: int, kind: CostKind) -> str:
    """A cost with its share of the dense one, both rounded up, so that a budget of either can be met."""
    # To the four digits that are written.
    step = 10 ** max(0, len(str(cost)) - 4) if kind == "latency" else 1
    return f"{in_words(-(-cost // step) * step, kind)} ({math.ceil(1000 * cost / dense) / 1000:.1%})"


class BudgetError(SecateurError, ValueError):
    """A budget that cannot be read or cannot be met; the message says what is possible."""


class Budget(BaseModel):
    """The most that a compressed network may cost: a share of the dense network's cost, or an absolute number."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: CostKind = "macs"
    """Multiply-adds for a batch of one, parameters, bytes, bit operations, or latency."""
    share: float | None = Field(default=None, gt=0, le=1)
    """Fraction of the dense network's cost, above 0 and at most 1."""
    absolute: int | None = Field(default=None, gt=0)
    """Of what is counted; of latency, nanoseconds."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.share is None) == (self.absolute is None):
            msg = f"a budget is either a share or an absolute number, got share={self.share}, absolute={self.absolute}"
            raise ValueError(msg)
        return self

    @classmethod
    def parse(cls, text: str | float) -> Budget:
        """Read a budget as a person writes it.

        A percentage or a bare number up to 1 is a share of the dense network's cost: ``"50%"``, ``0.5``,
        ``"30% params"``. A number with a unit is absolute: ``"62.7M macs"``, ``"125M flops"`` (two flops are one
        multiply-add), ``"400k params"``, ``"1.5 MB"`` (a megabyte is 10**6 bytes), ``"20G bops"``, ``"3.5 ms"``.
        Without a unit, multiply-adds are meant.

        Raises:
            BudgetError: if the text is none of these, or a share is not above 0 and at most 1.
        """
        written = str(text).replace("\u00a0", " ")
        if time := _TIME.fullmatch(written.lower()):
            number = float(time[1]) * _NS[time[2]]
            if number < 1:
                msg = f"budget '{text}' is less than a nanosecond; nothing runs in no time"
                raise BudgetError(msg)
            return cls(kind="latency", absolute=math.floor(_finite(number, text)))
        match = _PATTERN.fullmatch(written)
        if match is None:
            msg = (
                f"budget '{text}' cannot be read; write a share of the dense network's cost such as '50%' or "
                "'30% params', or a number such as '62.7M macs', '125M flops', '400k params', '1.5 MB', '20G bops' or "
                "'3.5 ms'"
            )
            raise BudgetError(msg)
        scale, unit = (match[2] or "").lower(), (match[3] or "").lower()
        number = _finite(float(match[1]), text)
        kind = _KINDS[unit]
        if scale == "%" or (not scale and number <= 1):
            share = number / 100 if scale == "%" else number
            if not 0 < share <= 1:
                msg = (
                    f"budget '{text}' is a share of {share:.4g} of the dense network's cost; it must lie above 0 and "
                    "at most 1 (100%)"
                )
                raise BudgetError(msg)
            return cls(kind=kind, share=share)
        if kind == "latency":
            msg = f"budget '{text}' is a latency above 1 without a unit of time; write '{match[1]} ms', or a share"
            raise BudgetError(msg)
        count = _finite(number * _UNITS[scale], text) / (FLOPS_PER_MAC if unit == "flops" else 1)
        if not unit:
            msg = (
                f"budget '{text}' is above 1 and has no unit; write '{text} macs', '{text} flops', '{text} params', "
                f"'{text} bytes', '{text} bops' or a share such as '50%'"
            )
            raise BudgetError(msg)
        if count < 1:
            msg = (
                f"budget '{text}' is less than one of what is counted; nothing is left of a network that costs nothing"
            )
            raise BudgetError(msg)
        return cls(kind=kind, absolute=math.floor(count))

    def limit(self, dense_cost: int) -> int:
        """The most that may be spent, given what the dense network costs, in the budget's kind.

        Raises:
            BudgetError: if an absolute budget is above the cost of the dense network.
        """
        if self.share is not None:
            # Tolerates the last bit of the float, so that a tenth of 1,000 is 100 and not 99.
            return min(dense_cost, math.floor(self.share * dense_cost * (1 + 1e-12)))
        assert self.absolute is not None
        if self.absolute > dense_cost:
            msg = (
                f"the budget of {in_words(self.absolute, self.kind)} is above what the dense network costs, "
                f"{in_words(dense_cost, self.kind)}; there is nothing to remove, so pass less"
            )
            raise BudgetError(msg)
        return self.absolute

    def __str__(self) -> str:
        if self.absolute is not None:
            return in_words(self.absolute, self.kind)
        return f"{self.share:.4g} of the dense {self.kind}"


def _finite(number: float, text: object) -> float:
    if not math.isfinite(number):
        msg = f"budget '{text}' is larger than any number that can be counted with; pass less, or none for no budget"
        raise BudgetError(msg)
    return number


BudgetLike = Budget | str | float | Sequence[Budget | str | float] | None
"""How a person asks for budgets: one, several in one text, a list, or none."""


def read_budgets(value: BudgetLike) -> tuple[Budget, ...]:
    """Every budget that is asked for: ``"50%"``, ``"50% macs, 20% bytes"``, a list of such, or none at all.

    Args:
        value: budgets, or texts as `Budget.parse` reads them, separated by commas; ``"none"`` and None are no budget.

    Raises:
        BudgetError: if one cannot be read, or two are of the same kind.
    """
    if value is None or value == "none":
        return ()
    if isinstance(value, str):
        return _of_different_kinds(_in_text(value))
    if isinstance(value, Budget):
        return (value,)
    if isinstance(value, float | Real):
        # NumPy's numbers are written with their type.
        return (Budget.parse(float(value)),)
    return _of_different_kinds([budget for each in value for budget in read_budgets(each)])


def _in_text(text: str) -> list[Budget]:
    parts = text.split(",")
    if len(parts) > 1 and (bare := next((part.strip() for part in parts if _BARE.fullmatch(part)), None)):
        msg = (
            f"'{text}': '{bare}' has neither a unit nor a percent sign; commas separate budgets, so write numbers "
            "without them, and each share as '50% macs'"
        )
        raise BudgetError(msg)
    try:
        return [Budget.parse(part.strip()) for part in parts]
    except BudgetError as error:
        if len(parts) > 1:
            msg = f"'{text}': {error} (commas separate budgets; write numbers without them)"
            raise BudgetError(msg) from None
        raise


def _of_different_kinds(budgets: Sequence[Budget]) -> tuple[Budget, ...]:
    for budget in budgets:
        if len(same := [str(other) for other in budgets if other.kind == budget.kind]) > 1:
            msg = f"there are {len(same)} budgets of {budget.kind}: {', '.join(same)}; give one of each kind"
            raise BudgetError(msg)
    return tuple(budgets)
