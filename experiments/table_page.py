"""The page of what checks of latency tables found, which every check adds a section to."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from pruning.files import write_atomic

from .machine import current_commit
from .pages import Table
from .table_checking import CheckedTable

_PAGE = """# Latency tables against whole networks

Each section was written by the command in it. Random policies: a keep ratio is drawn for the network, and each
group's within 0.3 of it; counts are rounded as a search rounds them. Measured is the median over rounds of a network's
time over the reference layer's in the same round, times the reference layer's time in the table; the error is
predicted over measured, less 1. With `--integers` layers have 8 bits too, by turns all of them, in runs, and each by
itself. `docs/latency.md` says how the table predicts.
"""


def write_page(path: Path, checks: Sequence[CheckedTable], command: str) -> None:
    """Add the comparisons to a page of Markdown as a section of their own; the page is made if it is missing."""
    heads = ["network", "image", "policies", "seed", "measured, ms", "median error", "upper quartile"]
    lines = [
        f"## {', '.join(check.model for check in checks)}",
        "",
        f"    {command}",
        "",
        Table([*heads, "largest", "Spearman"], [_row(check) for check in checks], words=("image",)).markdown(),
        "",
        f"{checks[0].table.fingerprint}; Python {platform.python_version()}, torch {torch.__version__}, commit "
        f"{current_commit()}.",
    ]
    before = path.read_text() if path.exists() else _PAGE
    write_atomic(path, "\n".join([before, *lines, ""]).encode())


def _row(check: CheckedTable) -> list[str]:
    found = check.to_dict()
    return [
        check.model,
        "x".join(map(str, check.shape)),
        str(found["policies"]),
        str(check.seed),
        f"{found['fastest_ms']} to {found['slowest_ms']}",
        f"{found['median_absolute_error']:.1%}",
        f"{found['upper_quartile_of_error']:.1%}",
        f"{found['largest_error']:.1%}",
        "-" if found["spearman"] is None else f"{found['spearman']:.3f}",
    ]
