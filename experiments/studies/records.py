"""What stays of a finished cell when its run folder is gone: figures, plans and verdicts, small enough to publish."""

from __future__ import annotations

from pathlib import Path

from pruning.files import write_atomic

KEPT = ("*.json", "methods/*/policy.json", "methods/*/test_judged.txt", "network/policy.json")
"""Files of a cell's folder that its record holds, under the same names."""
LEFT_OUT = ("machine.json", "latency.json")
"""Of these: the machine is in the results, and a table of latencies belongs to one device."""


def keep(folder: Path, record: Path, last: str) -> None:
    """Copy what is kept of a finished cell.

    Args:
        folder: of the cell.
        record: where its record is to lie, at the same relative paths.
        last: the file whose presence says that the record is whole; it is written after all others.
    """
    files = {path.relative_to(folder) for pattern in KEPT for path in folder.glob(pattern)} - set(map(Path, LEFT_OUT))
    for name in sorted(files, key=lambda name: (name == Path(last), name)):
        (record / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(record / name, (folder / name).read_bytes())
