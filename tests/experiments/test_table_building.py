from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.run import locked

Command = Callable[..., Any]
TINY = ("--model", "tests.experiments.tiny:network", "--shape", "1,8,8", "--classes", "3")


def test_an_unknown_runtime_is_refused_before_anything_is_written(command: Command, tmp_path: Path) -> None:
    done = command("latency", "build", *TINY, "--runtime", "onnxrt", "--out", tmp_path / "table.json")
    assert done.code == 1
    assert done.err.startswith("error: unknown runtime 'onnxrt'; did you mean onnxruntime? Allowed: pytorch-eager, ")
    assert not list(tmp_path.iterdir())


def test_two_builds_of_one_table_are_refused(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    with locked(tmp_path / ".table.json.lock", "elsewhere"):
        done = command("latency", "build", *TINY, "--out", out)

    assert done.code == 1
    assert done.err == f"error: another process works on the table {out}; wait for it or stop it\n"
    assert not out.exists()


def test_another_machine_has_one_runtime_only(command: Command, tmp_path: Path) -> None:
    options = ("--host", "board", "--runtime", "pytorch-eager", "--out", tmp_path / "table.json")
    done = command("latency", "build", *TINY, *options)
    assert done.code == 1
    assert done.err == (
        "error: another machine is timed with onnxruntime only, not with 'pytorch-eager'; leave out one of them\n"
    )
