import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from experiments.config import RunConfig, load_config

OPTIONS: dict[str, Any] = {
    "model.name": "tests.experiments.tiny:network",
    "data": {"source": "tests.experiments.tiny:images", "mean": [0.4], "std": [0.25], "crop_padding": 0, "flip": False},
    "budget": "50%",
    "search.methods": ["uniform", "random"],
    "search.evaluations": 12,
    "search.search_images": 45,
    "search.calibration_images": 60,
    "search.batch_size": 45,
    "search.finalists": 1,
    "train.epochs": 6,
    "train.batch_size": 24,
    "train.learning_rate": 0.05,
    "ppo.hidden": 8,
    "ppo.updates": 2,
    "ddpg.hidden": 8,
    "ddpg.learning_starts": 4,
    "ddpg.updates": 1,
    "measure.n_runs": 5,
    "measure.onnx": False,
    "threads": 1,
}
"""A run of the whole pipeline in seconds."""


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache of the tests' own, so that what a user has lying about changes nothing."""
    os.environ["SECATEUR_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., RunConfig]:
    """Configuration of a run in seconds, with other options on top."""

    def configured(**options: Any) -> RunConfig:
        return load_config(None, OPTIONS | {key.replace("__", "."): value for key, value in options.items()})

    return configured


@pytest.fixture
def with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that is faster in bfloat16, whatever this one is."""
    _set_bfloat16(monkeypatch, is_there=True, pays=True)


@pytest.fixture
def with_slow_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that computes in bfloat16 and is slower with it."""
    _set_bfloat16(monkeypatch, is_there=True, pays=False)


@pytest.fixture
def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that does not."""
    _set_bfloat16(monkeypatch, is_there=False, pays=False)


def _set_bfloat16(monkeypatch: pytest.MonkeyPatch, *, is_there: bool, pays: bool) -> None:
    for module in ("graph_encoder.modes", *(f"experiments.{name}" for name in ("precision", "search", "training"))):
        monkeypatch.setattr(f"{module}.has_bfloat16", lambda _: is_there)
    monkeypatch.setattr("experiments.precision.bfloat16_pays", lambda _: pays)


@pytest.fixture
def tiny_yaml(tmp_path: Path, tiny_config: Callable[..., RunConfig]) -> Path:
    """The same as a file for the command."""
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_config().to_yaml())
    return path


@dataclass(frozen=True)
class Finished:
    """What a command left behind: exit code and what it wrote."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Run the command in this process, which saves loading PyTorch again."""

    from experiments.cli import main

    def run(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return Finished(code, *capsys.readouterr())

    return run
