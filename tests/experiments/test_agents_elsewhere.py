from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from envs.journal import Journal
from experiments.agents import plan_by_agent, search_by_agent
from experiments.config import RunConfig
from experiments.interrupt import StopFlag
from experiments.problem import SearchProblem
from experiments.progress import RunDisplay
from experiments.run import MethodFolder
from experiments.search import build_problem, importance_of
from experiments.subject import prepare_subject

Configured = Callable[..., RunConfig]

DEEPER: dict[str, Any] = {"name": "tests.experiments.tiny:deeper_network"}


def problem_of(config: RunConfig) -> SearchProblem:
    with RunDisplay(quiet=True) as display:
        subject = prepare_subject(config, torch.device("cpu"), display, StopFlag(), check=lambda _: None)
    return build_problem(subject, importance_of(subject), Journal())


def trained(config: RunConfig, folder: Path) -> MethodFolder:
    """The folder of an agent that searched from the uniform plan."""
    problem, files = problem_of(config), MethodFolder(folder)
    evaluator = problem.evaluator("ppo", lambda _: None, max_evaluations=4)
    search_by_agent(problem, evaluator, config.search, config.ppo, files, None)
    return files


def told_when_planning(agent: MethodFolder, config: RunConfig) -> list[str]:
    """What is said of the agent where it plans a network with a layer more."""
    told: list[str] = []
    elsewhere = problem_of(config.model_copy(update={"model": config.model.model_copy(update=DEEPER)}))
    plan_by_agent(agent.agent_file, elsewhere, elsewhere.evaluator("", lambda _: None), config.search, told.append)
    return told


def test_agent_trained_for_other_networks_is_used_there_as_it_was_trained(
    tiny_config: Configured, tmp_path: Path
) -> None:
    agent = trained(tiny_config(search__for_transfer=True), tmp_path)

    assert told_when_planning(agent, tiny_config()) == []


def test_agent_that_knows_layers_by_their_places_says_so_on_another_network(
    tiny_config: Configured, tmp_path: Path
) -> None:
    agent = trained(tiny_config(), tmp_path)

    assert told_when_planning(agent, tiny_config()) == [
        f"the agent in '{agent.agent_file}' is not used as it was trained: it tells layers apart by their places in "
        "the network that it was trained on, where other networks have other layers; to plan those, train it with "
        "n_frequencies 0, as search.for_transfer does"
    ]
