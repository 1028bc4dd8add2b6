"""Rewards as a configuration names them: Galen's, and functions of a user's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from experiments.config import ConfigError, RunConfig, load_config
from experiments.interrupt import StopFlag
from experiments.outcome import headings
from experiments.progress import RunDisplay
from experiments.search import start_run
from latency.table import LatencyTable
from tests.latency.synthetic import IntegerFormulaDevice

from .test_floor import TINY, saved_table, wide

Command = Callable[..., Any]
GALEN = {
    "budget": "none",
    "search__reward": "galen",
    "search__methods": ["random", "ddpg"],
    "search__start": "uniform",
    "search__evaluations": 10,
    "finetune__epochs": 0,
}


def failing(accuracy: float, cost: int, limit: int | None) -> float:
    return accuracy / (cost - cost)


def wordy(accuracy: float, cost: int, limit: int | None) -> str:
    return "good"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_table(tmp_path_factory.mktemp("table"), IntegerFormulaDevice(), [8, 32])


def test_galens_reward_ranks_plans_by_accuracy_and_distance_from_the_target_latency(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, table: Path
) -> None:
    config = tiny_config(
        **GALEN,
        search__target="40% latency",
        search__beta=-0.5,
        search__decide=["channels", "bits"],
        search__rounding=4,
        latency__table=str(table),
        model__name=TINY[0],
    )
    with RunDisplay(quiet=True) as display:
        outcome = start_run(config, tmp_path / "run", ["secateur"], display, StopFlag())

    assert outcome.budget == "no budget, aiming at 40 % of its latency"
    assert (outcome.budget_kind, outcome.has_budget) == ("latency", False)
    assert "latency by the table" in headings(outcome)
    assert outcome.row("random").cost < outcome.dense_cost
    page = (tmp_path / "run" / "report.html").read_text()
    assert "aiming at 40 % of its latency" in page


def test_compress_takes_galens_reward(table: Path) -> None:
    model = wide(num_classes=3, in_channels=1).eval()
    done = secateur.compress(
        model,
        torch.zeros(1, 1, 8, 8),
        evaluate=lambda _: 0.5,
        budget=None,
        reward="galen",
        target="60% latency",
        table=LatencyTable.load(table),
        calibration=[torch.rand(4, 1, 8, 8)],
        method="random",
        evaluations=15,
        start="uniform",
        rounding=4,
    )
    # All are as accurate, so the nearest to the target is chosen.
    costs = [entry.cost for entry in done.history if entry.purpose == "candidate"]
    nearest = min(costs, key=lambda cost: abs(cost - 0.6 * done.dense_cost))
    assert done.cost == nearest
    assert len(set(costs)) > 2


def test_compress_refuses_a_target_without_its_reward() -> None:
    message = "^the reward 'galen' aims at a target and takes no budget; pass the three together"
    for options in ({"target": "20% macs"}, {"reward": "galen"}, {"reward": "galen", "target": "20%", "budget": "50%"}):
        with pytest.raises(ConfigError, match=message):
            secateur.compress(
                wide(3, 1),
                torch.zeros(1, 1, 8, 8),
                evaluate=lambda _: 0.5,
                **{"budget": None, "method": "random"} | options,  # type: ignore[arg-type]
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"budget": "none"},
            "search.reward: galen aims at search.target and takes no budget; found no search.target. Set "
            "search.target, such as '20% latency', and budget none",
        ),
        (
            {"search.target": "20% latency"},
            "search.reward: galen aims at search.target and takes no budget; found the budget 0.5 of the dense macs. "
            "Set search.target, such as '20% latency', and budget none",
        ),
        (
            {"search.target": "20% latency", "search.reward": "accuracy"},
            "search.target: 0.2 of the dense latency is what the reward galen aims at; set search.reward to galen, or "
            "pass a budget, which every plan keeps",
        ),
        ({"budget": "none", "search.beta": 0.5}, "search.beta: input should be less than 0; found 0.5"),
    ],
)
def test_a_target_that_cannot_be_aimed_at_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"search.reward": "galen", "search.methods": ["ddpg"]} | options)
    assert str(caught.value) == f"the options: {message}"


def test_a_reward_function_that_fails_is_told_with_its_name_and_line(
    tiny_yaml: Path, command: Command, tmp_path: Path
) -> None:
    reward = "tests.experiments.test_reward:failing"

    done = command("search", tiny_yaml, "--set", f"search.reward={reward}", "--out", tmp_path / "run")

    assert done.code == 1
    line = failing.__code__.co_firstlineno + 1
    (last,) = [text for text in done.err.splitlines() if text.startswith("error: ")]
    assert last.startswith(f"error: the reward function '{reward}', called with (0.")
    assert last.endswith(f" failed at {__file__}:{line} with ZeroDivisionError: float division by zero")
    assert "Traceback" not in done.err


def test_a_reward_function_that_returns_no_number_is_told_with_its_name(
    tiny_yaml: Path, command: Command, tmp_path: Path
) -> None:
    reward = "tests.experiments.test_reward:wordy"

    done = command("search", tiny_yaml, "--set", f"search.reward={reward}", "--out", tmp_path / "run")

    assert done.code == 1
    assert f"error: the reward function '{reward}' returned 'good' (str) for accuracy 0." in done.err
    assert "Traceback" not in done.err
