from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from envs.action import counts_of
from envs.journal import Journal
from experiments.config import ConfigError, RunConfig
from experiments.interrupt import StopFlag
from experiments.problem import SearchProblem
from experiments.progress import RunDisplay
from experiments.run import RunFolder
from experiments.search import start_run
from experiments.studies.plan_model import PlanModel, Plans, Simulation, app, load_problem, simulate

N_EVALUATIONS = 60


@pytest.fixture(scope="module")
def run(tiny_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished random search that started from the sensitivity plan."""
    folder = tmp_path_factory.mktemp("plan_model") / "run"
    config = tiny_config(search__methods=["random"], search__evaluations=N_EVALUATIONS, search__search_images=90)
    with RunDisplay(quiet=True) as display:
        start_run(config, folder, ["secateur"], display, StopFlag())
    return folder


@pytest.fixture(scope="module")
def problem(run: Path) -> SearchProblem:
    folder = RunFolder.open(run)
    with RunDisplay(quiet=True) as display:
        return load_problem(folder, folder.config, display)


def random_ratios(problem: SearchProblem, n: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    actions = np.clip(0.5 * generator.standard_normal((n, problem.space.n)), -1, 1)
    return np.array([counts_of(action, problem.space) / problem.space.sizes for action in actions])


def made_up(ratios: np.ndarray) -> Plans:
    """The first group is worth most, and each less the more it has."""
    worth = np.sqrt(ratios) @ np.array([0.3, 0.1, 0.05])
    return Plans(ratios, 0.4 + worth)


@pytest.fixture(scope="module")
def model(run: Path, problem: SearchProblem) -> PlanModel:
    """Fitted to made-up accuracies, of which little is left unexplained."""
    fitted = PlanModel(problem, RunFolder.open(run).config)
    fitted.fit(made_up(random_ratios(problem, 60, seed=0)), seed=0, steps=250)
    return fitted


def test_plans_are_those_of_the_journal_each_once(run: Path, problem: SearchProblem) -> None:
    plans = Plans.of_runs([run, run], problem.space)

    entries = [e for e in Journal(RunFolder.open(run).journal_file).entries() if e.purpose == "candidate"]
    assert len(plans) == len({entry.digest for entry in entries})
    assert plans.accuracies.tolist() == [entry.accuracy for entry in entries]
    first = dict(zip(problem.space.names, plans.ratios[0] * problem.space.sizes, strict=True))
    assert {name: first[name] for name in entries[0].kept} == entries[0].kept


def test_too_few_plans_are_refused(run: Path, problem: SearchProblem, tmp_path: Path) -> None:
    for name in ("config.yaml", "journal.jsonl"):
        (tmp_path / name).write_text(
            "\n".join((run / name).read_text().splitlines()[: 8 if "j" in name else None]) + "\n"
        )

    with pytest.raises(
        ConfigError, match=r"^the runs measured \d plans; a model takes at least 10, and some hundreds to be of use$"
    ):
        Plans.of_runs([tmp_path], problem.space)


def test_the_model_predicts_plans_that_it_has_not_seen(model: PlanModel, problem: SearchProblem) -> None:
    unseen = made_up(random_ratios(problem, 40, seed=1))

    found = model.accuracy(unseen.ratios)

    assert np.mean((found - unseen.accuracies) ** 2) < 0.1 * unseen.accuracies.var()


def test_a_network_scores_what_the_model_says_of_its_plan_and_the_same_luck_each_time(
    model: PlanModel, problem: SearchProblem
) -> None:
    noisy, exact = (Simulation.of(model, problem, noise) for noise in (0.01, 0.0))
    evaluator = problem.evaluator("test", lambda _: None)
    ratios = np.unique(random_ratios(problem, 60, seed=2), axis=0)
    networks = [evaluator.build(problem.space.policy((r * problem.space.sizes).round().astype(int))) for r in ratios]

    without, scores = ([one.evaluate(network) for network in networks] for one in (exact, noisy))

    assert without == pytest.approx(model.accuracy(ratios).tolist())
    assert scores == [noisy.evaluate(network) for network in networks]
    assert np.std(np.subtract(scores, without)) == pytest.approx(0.01, rel=0.5)
    assert noisy.evaluate(problem.model) == noisy.dense_accuracy


def test_a_simulated_search_comes_near_the_best_plan_of_the_model(
    run: Path, model: PlanModel, problem: SearchProblem
) -> None:
    exact, config = Simulation.of(model, problem, 0.0), RunFolder.open(run).config
    best = model.accuracy(random_ratios(problem, 2000, seed=3)).max()

    score, worth = simulate(
        problem,
        exact,
        config.model_copy(update={"search": config.search.model_copy(update={"evaluations": 100})}),
        "cem",
        seed=0,
    )

    assert score == pytest.approx(worth)
    assert worth > best - 0.01


@pytest.mark.slow
def test_the_command_prints_a_row_for_each_method(run: Path) -> None:
    done = CliRunner().invoke(app, [str(run), "--methods", "random,ppo", "--seeds", "2", "--steps", "20"])

    assert done.exit_code == 0
    assert [line.split(" | ")[0] for line in done.output.splitlines() if "%" in line and "|" in line] == [
        "| random",
        "| ppo",
    ]


def test_a_mistyped_method_is_refused(run: Path) -> None:
    done = CliRunner().invoke(app, [str(run), "--methods", "random,cme"])

    assert done.exit_code == 1
    assert "unknown method 'cme'; allowed: uniform, magnitude" in done.output
