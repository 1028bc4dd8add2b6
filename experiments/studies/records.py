"""What stays of a finished cell when its run folder is gone: figures, plans and verdicts, small enough to publish."""

from __future__ import annotations

import shutil
from pathlib import Path

from pruning.files import write_atomic

KEPT = (
    "results.json",
    "applied.json",
    "timed.json",
    "floor.json",
    "methods/*/policy.json",
    "methods/*/test_judged.txt",
)
"""Files of a cell's folder that its record holds, under the same names."""


def keep(folder: Path, record: Path) -> None:
    """Copy what is kept of a finished cell, all of it or nothing.

    Args:
        folder: of the cell.
        record: folder that is to be its record.
    """
    partial = record.with_name(f".{record.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for path in (path for pattern in KEPT for path in folder.glob(pattern)):
        write_atomic(partial / path.relative_to(folder), path.read_bytes())
    partial.rename(record)
