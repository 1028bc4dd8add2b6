"""A run that is stopped anywhere and resumed is the run that was never stopped, bit by bit."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agent.checkpoint import read_state, write_state
from agent.config import AgentConfig, Algorithm, DDPGConfig, PPOConfig
from agent.train import TrainResult, train_agent
from pruning.files import CheckpointError
from tests.agent.synthetic import FewPlansEnv, LayerwiseTargetEnv, TargetEnv
from tests.event_files import scalars

N_EVALUATIONS = 31
SMALL: dict[str, Any] = {"hidden": 8, "n_layers": 1, "n_frequencies": 2, "checkpoint_every": 5}
CONFIGS: dict[Algorithm, AgentConfig] = {
    "ppo": PPOConfig(rollout=6, updates=3, **SMALL),
    "ddpg": DDPGConfig(rollout=4, updates=1, learning_starts=6, batch_size=8, candidates=3, **SMALL),
}
FREQUENT = {name: config.model_copy(update={"checkpoint_every": 1}) for name, config in CONFIGS.items()}


class Killed(RuntimeError):
    pass


class MortalEnv(TargetEnv):
    """Dies in the step after so many."""

    def __init__(self, lives: int = 10**9) -> None:
        super().__init__(3, budget=N_EVALUATIONS, noise=0.05)
        self.lives = lives

    def step(self, action: np.ndarray) -> Any:
        if self.lives == 0:
            raise Killed
        self.lives -= 1
        return super().step(action)


class MortalLayerwiseEnv(LayerwiseTargetEnv):
    def __init__(self, lives: int = 10**9) -> None:
        super().__init__(3, budget=N_EVALUATIONS, noise=0.05)
        self.lives = lives

    def step(self, action: np.ndarray) -> Any:
        if self.lives == 0:
            raise Killed
        self.lives -= 1
        return super().step(action)


def train(algorithm: Algorithm, env: Any, folder: Path, **options: Any) -> TrainResult:
    return train_agent(
        options.pop("config", CONFIGS[algorithm]),
        env,
        n_evaluations=options.pop("n_evaluations", N_EVALUATIONS),
        seed=options.pop("seed", 0),
        episode_length=3 if isinstance(env, LayerwiseTargetEnv) else 1,
        checkpoints=folder / "checkpoints",
        logdir=folder / "tensorboard",
        **options,
    )


@dataclass(frozen=True)
class Whole:
    folder: Path
    result: TrainResult


def assert_same(folder: Path, result: TrainResult, whole: Whole) -> None:
    expected = whole.result
    assert result.rewards == expected.rewards
    assert result.best.actions.tolist() == expected.best.actions.tolist()
    assert result.n_steps == expected.n_steps
    for name, weights in expected.policy.state_dict().items():
        assert torch.equal(result.policy.state_dict()[name], weights), name
    assert scalars(folder / "tensorboard") == scalars(whole.folder / "tensorboard")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Algorithm], Whole]:
    """Runs that were never stopped, each made once."""

    @cache
    def run(algorithm: Algorithm) -> Whole:
        folder = tmp_path_factory.mktemp(f"whole-{algorithm}")
        return Whole(folder, train(algorithm, MortalEnv(), folder))

    return run


_EVERY_STEP = [pytest.param(step, marks=() if step in (0, 3, 13, 30) else pytest.mark.slow) for step in range(31)]


@pytest.mark.parametrize("algorithm", ["ppo", "ddpg"])
@pytest.mark.parametrize("killed_at", _EVERY_STEP)
def test_a_killed_search_continues_as_if_it_had_not_been(
    algorithm: Algorithm, killed_at: int, whole: Callable[[Algorithm], Whole], tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        train(algorithm, MortalEnv(killed_at), tmp_path)
    result = train(algorithm, MortalEnv(), tmp_path)

    assert len(result.rewards) == N_EVALUATIONS
    assert_same(tmp_path, result, whole(algorithm))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "ddpg"])
@pytest.mark.parametrize("killed_at", [2, 40, 55, 80])
def test_a_killed_layerwise_search_continues_as_if_it_had_not_been(
    algorithm: Algorithm, killed_at: int, tmp_path: Path
) -> None:
    whole = Whole(tmp_path / "whole", train(algorithm, MortalLayerwiseEnv(), tmp_path / "whole"))

    with pytest.raises(Killed):
        train(algorithm, MortalLayerwiseEnv(killed_at), tmp_path / "killed")
    result = train(algorithm, MortalLayerwiseEnv(), tmp_path / "killed")

    assert_same(tmp_path / "killed", result, whole)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "ddpg"])
def test_a_search_killed_many_times_continues(
    algorithm: Algorithm, whole: Callable[[Algorithm], Whole], tmp_path: Path
) -> None:
    for lives in (9, 11, 8, 5):
        with pytest.raises(Killed):
            train(algorithm, MortalEnv(lives), tmp_path / "killed")
    result = train(algorithm, MortalEnv(), tmp_path / "killed")

    assert_same(tmp_path / "killed", result, whole(algorithm))


@pytest.mark.parametrize("algorithm", ["ppo", pytest.param("ddpg", marks=pytest.mark.slow)])
def test_a_search_killed_among_known_plans_ends_where_it_would_have(algorithm: Algorithm, tmp_path: Path) -> None:
    def search(folder: str, lives: int = 10**9) -> TrainResult:
        env = FewPlansEnv(2, budget=300, lives=lives)
        return train(algorithm, env, tmp_path / folder, n_evaluations=300, config=FREQUENT[algorithm])

    whole = search("whole")
    with pytest.raises(KeyboardInterrupt):
        search("killed", lives=60)

    assert any((tmp_path / "killed" / "checkpoints").iterdir())
    assert search("killed").n_steps == whole.n_steps


def test_a_checkpoint_that_lacks_something_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train("ppo", MortalEnv(20), tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        state = read_state(path)
        del state["ledger"]["known_in_a_row"]
        write_state(path, state)

    with pytest.raises(CheckpointError) as caught:
        train("ppo", MortalEnv(), tmp_path)
    assert str(caught.value) == (
        f"the checkpoints in '{tmp_path / 'checkpoints'}' lack 'known_in_a_row', so they are of another version; use "
        "that one, or remove the folder to start the search over (evaluations in the journal are not run again)"
    )


def test_a_damaged_checkpoint_costs_no_more_than_the_steps_since_the_one_before(
    whole: Callable[[Algorithm], Whole], tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        train("ppo", MortalEnv(20), tmp_path / "killed")
    newest = max((tmp_path / "killed" / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:1000])
    heard: list[str] = []

    result = train("ppo", MortalEnv(), tmp_path / "killed", notify=heard.append)

    assert len(heard) == 1
    assert newest.name in heard[0]
    assert_same(tmp_path / "killed", result, whole("ppo"))


def test_a_checkpoint_of_another_search_is_refused(tmp_path: Path) -> None:
    train("ppo", MortalEnv(), tmp_path)

    with pytest.raises(
        CheckpointError,
        match=r"^the checkpoints in '.*checkpoints' are of a search with seed = 0, and this one has 1; resume with the "
        r"same settings, or choose another folder$",
    ):
        train("ppo", MortalEnv(), tmp_path, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "ddpg"])
def test_a_process_that_is_killed_without_warning_continues(
    algorithm: Algorithm, whole: Callable[[Algorithm], Whole], tmp_path: Path
) -> None:
    waits = np.random.default_rng(0).uniform(0, 0.5, size=5)
    command, project = [sys.executable, "-m", __name__, algorithm, str(tmp_path / "killed")], Path(__file__).parents[2]
    ends = []

    for wait in waits:
        process = subprocess.Popen(command, cwd=project)
        _wait_for_checkpoint(tmp_path / "killed" / "checkpoints", process)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        ends.append(process.wait())
    # The later ones may have come to the end of the search before.
    assert ends[0] == -signal.SIGKILL and set(ends) <= {-signal.SIGKILL, 0}
    assert list((tmp_path / "killed" / "checkpoints").iterdir())
    result = train(algorithm, MortalEnv(), tmp_path / "killed")

    assert_same(tmp_path / "killed", result, whole(algorithm))


def _wait_for_checkpoint(folder: Path, process: subprocess.Popen[bytes]) -> None:
    before = sorted(folder.iterdir()) if folder.exists() else []
    while process.poll() is None and (sorted(folder.iterdir()) if folder.exists() else []) == before:
        time.sleep(0.01)


if __name__ == "__main__":
    torch.set_num_threads(1)

    class SlowEnv(MortalEnv):
        def step(self, action: np.ndarray) -> Any:
            time.sleep(0.05)
            return super().step(action)

    train(sys.argv[1], SlowEnv(), Path(sys.argv[2]))  # type: ignore[arg-type]
