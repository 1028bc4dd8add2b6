"""Searches simulated in seconds, on a model of plans that runs have measured: what hyper-parameters are tried out on.

Run as ``python -m experiments.studies.plan_model RUN RUN --methods cem,ppo --set ppo.std_end=0.1 --seeds 5``, with runs
of one network, budget and start that decide channels. No test image is involved.

The model is an ensemble of critics (`agent.plan_value`), fitted to the search accuracies of all their plans. A plan's
simulated score is what the model says plus a normal deviate, the same one whenever that plan is scored: of two plans
equally good one classifies more of a few thousand images rightly. What a search gains by choosing lucky plans, and what
its plan is worth by the model, stand apart in the table.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, cast

import numpy as np
import torch
import typer
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor, nn

from agent.config import default_config
from agent.plan_value import PlanValue
from envs.journal import Journal
from envs.space import SearchSpace
from graph_encoder.network import NetworkGraph

from ..agents import search_env
from ..config import METHODS, ConfigError, Method, RunConfig, load_as, parse_setting
from ..interrupt import StopFlag
from ..machine import set_up_device
from ..methods import search_with
from ..outcome import percent
from ..pages import Table
from ..problem import SearchProblem, probe
from ..progress import RunDisplay
from ..rank_correlation import spearman
from ..run import RunError, RunFolder
from ..search import build_problem, importance_of, space_of_graph
from ..subject import prepare_subject
from .results_cells import spread

N_CRITICS = 4
STEPS = 1500
BATCH = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
PLAN_OPTIONS = {"plan_hidden": 48, "plan_layers": 1}
HELD_OUT = 0.2
"""Share of the plans on which a model that has not seen them is checked."""


@dataclass(frozen=True)
class Plans:
    """Plans that were measured.

    Attributes:
        ratios: what each decision keeps, shape ``(n, D)``, in ``(0, 1]``.
        accuracies: on the search images, shape ``(n,)``.
    """

    ratios: NDArray[np.float64]
    accuracies: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.accuracies)

    def take(self, chosen: NDArray[np.int64]) -> Plans:
        """Those at the places ``chosen``."""
        return Plans(self.ratios[chosen], self.accuracies[chosen])

    @classmethod
    def of_runs(cls, runs: Sequence[Path], space: SearchSpace) -> Plans:
        """Every plan that the runs scored on all search images, once.

        Raises:
            ConfigError: if a plan does not belong to the space, or there are fewer than ten.
        """
        kept: dict[str, tuple[NDArray[np.float64], float]] = {}
        for run in runs:
            for entry in Journal(RunFolder.open(run).journal_file).entries():
                if entry.purpose == "candidate" and entry.fidelity == 1:
                    if unknown := sorted(set(entry.kept) - set(space.names)):
                        msg = f"a plan of run {run} decides '{unknown[0]}', which run {runs[0]} does not"
                        raise ConfigError(msg)
                    counts = [entry.kept.get(name, size) for name, size in zip(space.names, space.sizes, strict=True)]
                    kept[entry.digest] = np.array(counts) / space.sizes, entry.accuracy
        if len(kept) < 10:
            msg = f"the runs measured {len(kept)} plans; a model takes at least 10, and some hundreds to be of use"
            raise ConfigError(msg)
        ratios, accuracies = zip(*kept.values(), strict=True)
        return cls(np.stack(ratios), np.array(accuracies))


class PlanModel:
    """Accuracy of any plan of one network, by critics fitted to measured ones.

    Attributes:
        space: what is decided.
    """

    def __init__(self, problem: SearchProblem, config: RunConfig) -> None:
        """Take the network's graph as agents see it; `fit` comes next."""
        env = search_env(problem, problem.evaluator("model", lambda _: None), config.search)
        observation, _ = env.reset(seed=0)
        self.space = problem.space
        self._observation_space = cast("spaces.Dict", env.observation_space)
        self._observation = {name: torch.as_tensor(value)[None].float() for name, value in observation.items()}
        self._critics = nn.ModuleList()
        self._mean, self._scale = 0.0, 1.0

    def fit(self, plans: Plans, seed: int, steps: int) -> None:
        """Train new critics on the plans, each on the same batches from other first weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = default_config("ddpg").encoder()
            self._critics = nn.ModuleList(
                PlanValue(self._observation_space, encoder=encoder, **PLAN_OPTIONS) for _ in range(N_CRITICS)
            )
        self._mean, self._scale = float(plans.accuracies.mean()), float(plans.accuracies.std())
        actions = self._actions(plans.ratios)
        targets = torch.as_tensor((plans.accuracies - self._mean) / self._scale).float()
        optimizer = torch.optim.AdamW(self._critics.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            chosen = torch.randint(len(plans), (BATCH,), generator=generator)
            errors = self._values(actions[chosen]) - targets[chosen]
            optimizer.zero_grad()
            errors.square().mean(dim=1).sum().backward()
            optimizer.step()
            schedule.step()

    def accuracy(self, ratios: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of plans that keep ``ratios`` of shape ``(n, D)``: mean of the critics, shape ``(n,)``."""
        with torch.no_grad():
            values = self._values(self._actions(ratios)).mean(dim=0).double().numpy()
        found: NDArray[np.float64] = np.clip(self._mean + self._scale * values, 0, 1)
        return found

    def _actions(self, ratios: NDArray[np.float64]) -> Tensor:
        """The scores that lead to the ratios, but for a common shift, which a budget makes void."""
        scores = (ratios - self.space.prior) / self.space.span
        return torch.as_tensor(scores - scores.mean(axis=1, keepdims=True)).float()

    def _values(self, actions: Tensor) -> Tensor:
        """What every critic says, ``(critics, n)``, standardised."""
        rows = {name: value.expand(len(actions), *value.shape[1:]) for name, value in self._observation.items()}
        return torch.stack([critic(rows, actions)[:, 0] for critic in self._critics])


@dataclass(frozen=True)
class Simulation:
    """Scores networks by a model of plans, in place of images.

    Attributes:
        model: of the plans.
        graph: of the dense network.
        widths: output channels of the dense network's weights, by name.
        dense_accuracy: of the network from which nothing was removed, which is no plan.
        noise: standard deviation of a score around what the model says.
    """

    model: PlanModel
    graph: NetworkGraph
    widths: Mapping[str, int]
    dense_accuracy: float
    noise: float

    @classmethod
    def of(cls, model: PlanModel, problem: SearchProblem, noise: float) -> Simulation:
        """In place of the images of a problem whose probes were made."""
        assert problem.sensitivity is not None
        widths = {name: len(weight) for name, weight in problem.model.named_parameters()}
        return cls(model, problem.graph, widths, problem.sensitivity.dense_accuracy, noise)

    def evaluate(self, network: nn.Module) -> float:
        """A score, by what the network has kept of each group."""
        ratios = self.ratios(network)
        if (ratios == 1).all():
            return self.dense_accuracy
        counts = np.round(ratios * self.model.space.sizes).astype(np.uint64)
        luck = np.random.default_rng(counts.tolist()).standard_normal()
        return float(np.clip(self.model.accuracy(ratios[None])[0] + self.noise * luck, 0, 1))

    def ratios(self, network: nn.Module) -> NDArray[np.float64]:
        """Share that each group keeps, shape ``(D,)``."""
        weights = dict(network.named_parameters())
        weight_of = {operator.name: operator.weight for operator in self.graph.operators}
        names = [weight_of[group.producers[0]] for group in self.model.space.groups]
        return np.array([len(weights[name]) / self.widths[name] for name in names])


def simulate(
    problem: SearchProblem, simulation: Simulation, config: RunConfig, method: Method, seed: int
) -> tuple[float, float]:
    """One search.

    Returns:
        The score that its plan was chosen by, and what that plan is worth by the model.
    """
    scoring = replace(problem.scoring, evaluate=simulation.evaluate, calibration=[])
    simulated = replace(problem, scoring=scoring, journal=Journal(), seed=seed)
    found = search_with(method, simulated, config.search, on_evaluation=lambda _: None, agent=config.agent(method))
    pairs = zip(simulated.space.names, simulated.space.sizes, strict=True)
    ratios = np.array([[found.kept.get(name, size) / size for name, size in pairs]])
    return found.search_accuracy, float(simulation.model.accuracy(ratios)[0])


app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, all of one network, budget and start.")],
    methods: Annotated[str, typer.Option(help="Searches to simulate, divided by commas.")] = "random,cem,ppo,ddpg",
    settings: Annotated[list[str] | None, typer.Option("--set", help="As for search.")] = None,
    seeds: Annotated[int, typer.Option(help="Searches of each method.", min=1)] = 5,
    noise: Annotated[
        float | None, typer.Option(help="Deviation of a score, in accuracy; by default what the model leaves.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Gradient steps of the model.", min=1)] = STEPS,
) -> None:
    """Fit the model, say how good it is, and simulate searches on it."""
    with RunDisplay() as display:
        try:
            _carry_out(runs, methods, settings or [], seeds, noise, steps, display)
        except (ConfigError, RunError) as error:
            display.say(str(error))
            raise typer.Exit(1) from error


def _carry_out(
    runs: list[Path],
    methods: str,
    settings: list[str],
    seeds: int,
    noise: float | None,
    steps: int,
    display: RunDisplay,
) -> None:
    chosen, first = _methods(methods), RunFolder.open(runs[0])
    config = load_as(RunConfig, first.config_file, dict(parse_setting(text) for text in settings))
    problem = load_problem(first, config, display)
    plans, model = Plans.of_runs(runs, problem.space), PlanModel(problem, config)
    left = _check(model, plans, steps, display)
    model.fit(plans, 0, steps)
    simulation = Simulation.of(model, problem, left if noise is None else noise)
    lines = []
    for method in chosen:
        started = time.perf_counter()
        found = [simulate(problem, simulation, config, method, seed) for seed in range(seeds)]
        scores, worth = zip(*found, strict=True)
        lines.append([method, spread(worth), spread(scores), f"{(time.perf_counter() - started) / seeds:.1f}"])
    display.say(f"{seeds} seeds, noise {100 * simulation.noise:.2f} points, {', '.join(settings) or 'defaults'}")
    display.say(Table(["method", "worth by the model", "score chosen by", "s a search"], lines).markdown())


def _methods(names: str) -> list[Method]:
    known = {str(method): method for method in METHODS}
    if unknown := [name for name in names.split(",") if name not in known]:
        msg = f"unknown method '{unknown[0]}'; allowed: {', '.join(METHODS)}"
        raise ConfigError(msg)
    return [known[name] for name in names.split(",")]


def load_problem(folder: RunFolder, config: RunConfig, display: RunDisplay) -> SearchProblem:
    """What the first run searched, with its probes, which its journal holds."""
    subject = prepare_subject(
        config,
        set_up_device(config.device, config.threads),
        display,
        StopFlag(),
        weights=folder.dense_file,
        check=lambda subject: space_of_graph(config, subject.graph),
    )
    problem = build_problem(subject, importance_of(subject), Journal(folder.journal_file))
    if problem.space.layers:
        msg = f"run {folder.root} decides {', '.join(config.search.decide)}; a model is made of channels only"
        raise ConfigError(msg)
    is_start = config.search.starts_from_probes
    return probe(
        problem,
        config.search.probe_share,
        lambda _: None,
        as_start=is_start,
        shown=config.search.agents_see_probes,
        notify=display.say,
    )


def _check(model: PlanModel, plans: Plans, steps: int, display: RunDisplay) -> float:
    """Say how well plans are predicted that the model has not seen; what it leaves unexplained, in accuracy."""
    order = np.random.default_rng(0).permutation(len(plans))
    n_held = max(2, round(HELD_OUT * len(plans)))
    held, seen = plans.take(order[:n_held]), plans.take(order[n_held:])
    model.fit(seen, 0, steps)
    predicted = model.accuracy(held.ratios)
    left = float(np.sqrt(np.mean((predicted - held.accuracies) ** 2)))
    explained = 1 - left**2 / float(held.accuracies.var())
    display.say(
        f"{len(plans)} plans, {percent(plans.accuracies.min())} to {percent(plans.accuracies.max())}; of {n_held} held "
        f"out the model explains {explained:.0%} of the variance, rank correlation "
        f"{spearman(predicted, held.accuracies):.3f}, error {100 * left:.2f} points"
    )
    return left


if __name__ == "__main__":
    app()
