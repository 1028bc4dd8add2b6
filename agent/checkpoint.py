"""Files of an agent that execute no code when they are read, written whole or not at all."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pruning.files import CheckpointError, load_checked, write_atomic

SCHEMA = 1
KEPT = 2
"""Checkpoints that stay on disk."""

_ARRAY, _TUPLE = "__ndarray__", "__tuple__"
_NAME = re.compile(r"step-(\d{9})\.pt")

Notify = Callable[[str], None]


class SearchWarning(UserWarning):
    """Something that does not stop a search, such as a damaged checkpoint that was passed over."""


def warn(message: str) -> None:
    """Say something that does not stop the search."""
    warnings.warn(message, SearchWarning, stacklevel=2)


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` to ``path`` so that after a crash it holds the old or the new, and nothing else.

    Args:
        path: file to write.
        state: numbers, strings, None, tensors, arrays, nested in dicts, lists and tuples.

    Raises:
        FileWriteError: if the disk refuses.
    """
    encoded = _encode({"schema": SCHEMA, **state})
    write_atomic(path, lambda file: torch.save(encoded, file))


def read_state(path: Path) -> dict[str, Any]:
    """Read what `write_state` wrote.

    Raises:
        CheckpointError: if the file is missing, damaged, of another schema, or holds anything but plain values.
    """
    try:
        state = _decode(load_checked(path))
    except Exception as error:  # torch reports damage by many types, and each of them means the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        msg = f"'{path}' cannot be read as an agent's state: {reason}"
        raise CheckpointError(msg) from error
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        found = state.get("schema") if isinstance(state, dict) else type(state).__name__
        msg = f"'{path}' has schema {found!r}; this version reads {SCHEMA}, so use the version that wrote it"
        raise CheckpointError(msg)
    return state


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any]) -> None:
    """Write the checkpoint of ``step`` and remove all but the newest two.

    Raises:
        FileWriteError: if the disk refuses.
    """
    write_state(folder / f"step-{step:09d}.pt", state)
    for old in _checkpoints(folder)[KEPT:]:
        old.unlink()


def load_checkpoint(folder: Path, notify: Notify = warn) -> dict[str, Any] | None:
    """Read the newest checkpoint that is whole.

    Args:
        folder: where `save_checkpoint` wrote; need not exist.
        notify: told of every damaged one that is passed over.

    Returns:
        Its state; None if there has been no checkpoint.

    Raises:
        CheckpointError: if there are checkpoints and none can be read.
    """
    found = _checkpoints(folder)
    for path in found:
        try:
            state = read_state(path)
        except CheckpointError as error:
            notify(f"{error}; the checkpoint before it is used instead")
        else:
            return state
    if found:
        msg = (
            f"none of the {len(found)} checkpoints in '{folder}' can be read; remove the folder to start the search "
            "over (evaluations in the journal are not run again)"
        )
        raise CheckpointError(msg)
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder, newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        # torch has no unsigned integers wider than a byte to speak of; numpy's generator holds some.
        wide = value.astype(np.int64) if value.dtype in (np.uint32, np.uint64) else value
        return {_ARRAY: torch.from_numpy(np.ascontiguousarray(wide)).clone(), "dtype": str(value.dtype)}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return {_TUPLE: [_encode(item) for item in value]}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if _ARRAY in value:
            return value[_ARRAY].numpy().astype(value["dtype"])
        if _TUPLE in value:
            return tuple(_decode(item) for item in value[_TUPLE])
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value
