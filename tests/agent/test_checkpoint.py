from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agent.checkpoint import (
    SearchWarning,
    load_checkpoint,
    read_state,
    save_checkpoint,
    write_state,
)
from graph_encoder.randomness import random_states, set_random_states
from pruning import files
from pruning.files import CheckpointError, FileWriteError


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("touch exploded",)


def test_a_state_comes_back_with_its_types(tmp_path: Path) -> None:
    state: Mapping[str, Any] = {
        "none": None,
        "wide": 2**100,
        "tuple": (1, (2.5, "x")),
        "array": np.arange(6, dtype=np.uint32).reshape(2, 3),
        "bools": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
        "tensor": torch.tensor([1.0, float("nan")]),
        "numpy": np.float64(0.1),
        "nested": [{"deep": np.int64(3)}],
    }

    write_state(tmp_path / "state.pt", state)
    found = read_state(tmp_path / "state.pt")

    assert found["none"] is None
    assert found["wide"] == 2**100
    assert found["tuple"] == (1, (2.5, "x"))
    assert found["array"].dtype == np.uint32
    assert found["array"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["bools"].tolist() == [True, False]
    assert found["empty"].shape == (0, 3)
    assert torch.equal(found["tensor"].isnan(), torch.tensor([False, True]))
    assert found["numpy"] == 0.1
    assert found["nested"] == [{"deep": 3}]


def test_the_global_generators_continue(tmp_path: Path) -> None:
    write_state(tmp_path / "random.pt", random_states())

    def draw() -> list[float]:
        return [float(torch.rand(())), float(np.random.rand())]  # noqa: NPY002

    expected = draw()
    draw()
    set_random_states(read_state(tmp_path / "random.pt"))

    assert draw() == expected


def test_a_file_that_would_execute_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"schema": 1, "policy": Bomb()}, tmp_path / "bomb.pt")

    with pytest.raises(
        CheckpointError, match=r"^'.*bomb\.pt' cannot be read as an agent's state: Weights only load failed"
    ):
        read_state(tmp_path / "bomb.pt")

    assert not (tmp_path / "exploded").exists()


def test_another_schema_is_refused(tmp_path: Path) -> None:
    torch.save({"schema": 99}, tmp_path / "new.pt")

    with pytest.raises(
        CheckpointError, match=r"^'.*new\.pt' has schema 99; this version reads 1, so use the version that wrote it$"
    ):
        read_state(tmp_path / "new.pt")


def test_the_newest_two_checkpoints_stay(tmp_path: Path) -> None:
    for step in (5, 10, 999, 1000):
        save_checkpoint(tmp_path, step, {"step": step})

    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000999.pt", "step-000001000.pt"]
    assert load_checkpoint(tmp_path) == {"schema": 1, "step": 1000}


def test_no_checkpoint_is_no_state(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "missing") is None


FIFTY = struct.pack("<f", 50.0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data[:-40] + bytes(40),
        lambda data: data.replace(FIFTY, FIFTY[:-1] + b"\x43"),
    ],
    ids=["truncated", "empty", "no directory", "one byte of a weight"],
)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step, "weights": torch.arange(100.0)})
    newest = tmp_path / "step-000000002.pt"
    newest.write_bytes(damage(newest.read_bytes()))

    with pytest.warns(
        SearchWarning,
        match=r"^'.*step-000000002\.pt' cannot be read as an agent's state: .*; the checkpoint before it is used "
        r"instead$",
    ):
        state = load_checkpoint(tmp_path)

    assert state is not None
    assert state["step"] == 1


def test_nothing_but_damaged_checkpoints_is_an_error(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / f"step-{step:09d}.pt").write_bytes(b"torn")
    heard: list[str] = []

    with pytest.raises(
        CheckpointError,
        match=r"^none of the 2 checkpoints in '.*' can be read; remove the folder to start the search over "
        r"\(evaluations in the journal are not run again\)$",
    ):
        load_checkpoint(tmp_path, heard.append)

    assert len(heard) == 2


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, {"step": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)

    with pytest.raises(
        FileWriteError,
        match=r"^cannot write '.*step-000000002\.pt': no space left on the disk; free some and run the "
        r"same command again \(an older file of that name is untouched\)$",
    ):
        save_checkpoint(tmp_path, 2, {"step": 2})

    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001.pt"]
