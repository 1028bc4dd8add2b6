"""Whether scoring in bfloat16, or in integers, ranks plans as single precision does, and what it saves.

Run as ``python -m experiments.studies.bench_precision run.yaml --plans 40``: the configuration is that of a search.
Where it decides bits, convolutions of 8 bits are scored in integers whatever ``search.autocast`` says.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor, nn

from envs.action import counts_of
from envs.evaluator import CandidateEvaluator
from envs.journal import Journal
from graph_encoder.modes import has_bfloat16
from pruning.files import write_atomic

from ..config import RunConfig, load_config, parse_setting
from ..interrupt import StopFlag
from ..machine import describe_machine, set_up_device
from ..outcome import budget_words
from ..pages import Table
from ..problem import SearchProblem
from ..progress import RunDisplay
from ..rank_correlation import spearman
from ..search import build_problem, importance_of, space_of_graph, with_range
from ..subject import prepare_subject

SPREAD = 0.5
"""Standard deviation of the actions that the plans come from."""

_TURNS = """The same plans were scored both ways,
in turn, on the same images: random actions around the uniform plan, all within the budget."""
_BFLOAT16 = f"""# Scoring in bfloat16

`search.autocast` re-estimates batch norms and scores candidates in bfloat16. {_TURNS}"""
_INTEGERS = f"""# Scoring 8 bits in integers

Where bits are decided, `search.autocast` re-estimates batch norms in bfloat16, and convolutions of 8 bits are scored
by integer kernels whatever it says; "single precision" is without both. {_TURNS}"""


class _Simulated(nn.Module):
    """A network that is not looked into, so that its layers stay in single precision."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits


def main(
    config: Annotated[Path, typer.Argument(help="Configuration of a search.")],
    plans: Annotated[int, typer.Option(help="Random plans.", min=3)] = 40,
    settings: Annotated[list[str] | None, typer.Option("--set", help="As for search.")] = None,
    page: Annotated[Path | None, typer.Option(help="Page to write, if not the one of docs/benchmarks.")] = None,
) -> None:
    """Score random plans in single precision and in bfloat16, or in integers where bits are decided."""
    options = dict(parse_setting(text) for text in settings or [])
    if not load_config(config, options).search.decides_bits and not has_bfloat16("cpu"):
        msg = "PyTorch has no kernels in bfloat16 for this processor, so there is nothing to compare"
        raise typer.BadParameter(msg)
    with RunDisplay() as display:
        problems = [
            _problem(load_config(config, options | {"search.autocast": autocast}), display)
            for autocast in (False, True)
        ]
        accuracies, seconds = _scored(problems, plans, display)
    full, half = accuracies
    difference = 100 * (half - full)
    asked, machine = load_config(config, options), describe_machine(torch.device("cpu"))
    faster, words = ("integers", _INTEGERS) if asked.search.decides_bits else ("bfloat16", _BFLOAT16)
    lines = [
        ["network, budget", f"{asked.model.name}, {budget_words(asked.budget)}"],
        ["plans, decisions", f"{plans}, {problems[0].space.n}"],
        ["images", f"{problems[0].scoring.n_images:,}"],
        ["accuracies in single precision", f"{full.min():.2%} to {full.max():.2%}"],
        ["rank correlation (Spearman)", f"{spearman(full, half):.3f}"],
        [f"{faster} less single precision, points", f"{difference.mean():+.2f} ± {difference.std(ddof=1):.2f}"],
        ["best plan by either, scored in single precision", f"{full.max():.2%}, {full[half.argmax()]:.2%}"],
        [f"time, single precision over {faster} (quartiles)", _ratio(seconds[0] / seconds[1])],
    ]
    others = "".join(f" --set {shlex.quote(text)}" for text in settings or [])
    command = (
        f"Command: `python -m experiments.studies.bench_precision {config.name} --plans {plans}{others}`, with "
        f"{config.name}:\n\n```yaml\n{config.read_text().strip()}\n```"
    )
    record = f"Seed {asked.search.seed}; {machine.processor}, torch {torch.__version__}, commit {machine.commit}."
    text = "\n\n".join([words, Table(["what", "found"], lines).markdown(), command, record]) + "\n"
    name = "integers" if asked.search.decides_bits else "precision"
    write_atomic(page or Path(f"docs/benchmarks/{name}.md"), text.encode())


def _problem(config: RunConfig, display: RunDisplay) -> SearchProblem:
    device, config = set_up_device(config.device, config.threads), with_range(config)
    subject = prepare_subject(
        config, device, display, StopFlag(), check=lambda subject: space_of_graph(config, subject.graph)
    )
    return build_problem(subject, importance_of(subject), Journal())


def _scored(
    problems: list[SearchProblem], n_plans: int, display: RunDisplay
) -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]]:
    """Accuracies and seconds of each plan, one array a precision."""
    space = problems[0].space
    generator = np.random.default_rng(problems[0].seed)
    single, faster = problems
    evaluators: list[CandidateEvaluator] = [
        single.evaluator("", lambda _: None, evaluate=lambda network: single.scoring.evaluate(_Simulated(network))),
        faster.evaluator("", lambda _: None),
    ]
    found = np.zeros((len(problems), n_plans))
    seconds = np.zeros_like(found)
    with display.stage("plans, both ways", n_plans, "evaluation") as stage:
        for place in range(n_plans):
            policy = space.policy(counts_of(np.clip(SPREAD * generator.standard_normal(space.n), -1, 1), space))
            for row, evaluator in enumerate(evaluators):
                start = time.perf_counter()
                found[row, place] = evaluator.score(policy).accuracy
                seconds[row, place] = time.perf_counter() - start
            stage.advance(1, float(seconds[:, place].sum()), "")
    return list(found), list(seconds)


def _ratio(ratios: NDArray[np.float64]) -> str:
    lower, median, upper = np.percentile(ratios, [25, 50, 75])
    return f"{median:.2f} ({lower:.2f} to {upper:.2f})"


if __name__ == "__main__":
    typer.run(main)
