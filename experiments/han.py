"""Learning both weights and connections (Han et al. 2015) on MNIST: LeNet-300-100 and LeNet-5, 12 times fewer weights.

Run as ``python -m experiments.han``. It trains on the bundled digits, or with ``--mnist FOLDER`` on the full set that
torchvision keeps there, and writes ``docs/benchmarks/han.md`` with its figures. A sitting may end at any time; the
next one starts again with the training at which it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from pruning.files import write_atomic
from pruning.sparsity import sparse_weight

from .han_page import first_layer_figure, regularisation_figure, render, sensitivity_figure, weights_figure
from .han_study import STUDIES, Digits, Outcome, Trial, bundled_digits, full_mnist, scaled
from .images import DataError
from .interrupt import Interrupted, StopFlag, stop_on_signals
from .progress import RunDisplay

DEVIATIONS = """\
1. **Data.** {data} Digits are not augmented, as in the paper.
2. **Training.** Nesterov momentum with a learning rate that rises for a twentieth of the steps and falls to zero along
   half a cosine, the same for each retraining; the paper retrains at a tenth of the rate of the first training. Tried
   with LeNet-300-100, seed 0: at a tenth (12 epochs a round), the last round ended 1.9 points of validation accuracy
   below the dense network, at the full rate level with it.
3. **Quality parameters** are not set by hand: each is the threshold at which pruning that layer alone, without
   retraining, costs {tolerance:.0%} of validation accuracy, over the layer's standard deviation. In each round all are
   multiplied by the one factor at which the wanted share of all weights is left.
4. **Standard deviation** of all weights of a layer, the zeros of earlier rounds included; the paper does not say.
5. **Rounds** keep equal shares of what is left. Biases are not pruned and not counted; the paper counts some.
6. **No dropout** in these two networks, here as there, so its correction does not come in.
7. **Last epoch**: no epoch is chosen. The dense network is also trained for as long as the pruned ones, and the pruning
   in one step is retrained for as long as all rounds.
"""


def carry_out(trials: Mapping[tuple[str, int], Trial], first_seed: int, display: RunDisplay, stop: StopFlag) -> None:
    """Do what is missing of the trials, then of the curves."""
    for trial in trials.values():
        _once(trial.folder / "outcome.json", trial.run, display)
        stop.check()
    trial = trials[STUDIES[0].name, first_seed]
    _once(trial.folder / "regularisations.json", trial.regularisations, display)


def _once(path: Path, work: Callable[[], Outcome | dict[str, list[float]]], display: RunDisplay) -> None:
    if not path.exists():
        display.say(f"{path.parent.name}: {path.stem}")
        found = work()
        plain = asdict(found) if isinstance(found, Outcome) else found
        write_atomic(path, json.dumps(plain, indent=1).encode())


def write_page(trials: Mapping[tuple[str, int], Trial], digits: Digits, seeds: Sequence[int], page: Path) -> None:
    """Write the page and its figures from what is done; the figures of the first layer are those of the first seed."""
    studies = [trials[study.name, seeds[0]].study for study in STUDIES]
    outcomes = {
        study.name: [
            Outcome(**json.loads(path.read_text()))
            for seed in seeds
            if (path := trials[study.name, seed].folder / "outcome.json").exists()
        ]
        for study in studies
    }
    first = {name: trials[name, seeds[0]] for name, own in outcomes.items() if own}
    curves_file = trials[STUDIES[0].name, seeds[0]].folder / "regularisations.json"
    curves = json.loads(curves_file.read_text()) if curves_file.exists() else {}
    weights = {
        f"{name}, fc1": tuple(
            sparse_weight(trial.load(file), "fc1")[0].detach() for file in ("dense", f"round{trial.study.rounds}")
        )
        for name, trial in first.items()
    }
    figures = page.parent / page.stem
    write_atomic(figures / "sensitivity.png", sensitivity_figure(studies, outcomes))
    write_atomic(figures / "weights.png", weights_figure({name: (w[0], w[1]) for name, w in weights.items()}))
    write_atomic(figures / "first-layer.png", first_layer_figure(weights[f"{STUDIES[0].name}, fc1"][1]))
    if curves:
        rounds = outcomes[STUDIES[0].name][0].rounds
        write_atomic(figures / "regularisation.png", regularisation_figure(curves, rounds))
    render(studies, outcomes, curves, digits, seeds, DEVIATIONS, page)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and write the page; 130 if it was stopped."""
    parser = argparse.ArgumentParser(prog="python -m experiments.han", description=__doc__)
    parser.add_argument("--mnist", type=Path, help="folder with torchvision's copy of the full MNIST")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0")
    parser.add_argument("--root", type=Path, default=Path("runs/han"), help="folder of the trained networks")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks/han.md"), help="page to write")
    options = parser.parse_args(arguments)
    with stop_on_signals() as stop, RunDisplay() as display:
        try:
            digits = full_mnist(options.mnist) if options.mnist else bundled_digits()
            seeds = range(options.seeds)
            trials = {
                (study.name, seed): Trial(
                    scaled(study, digits), digits, seed, options.root / digits.name / f"{study.name}-seed{seed}", stop
                )
                for seed in seeds
                for study in STUDIES
            }
            carry_out(trials, seeds[0], display, stop)
        except Interrupted as stopped:
            display.say(f"{stopped}; run the same command to go on")
            return 130
        except DataError as error:
            display.say(str(error))
            return 1
        write_page(trials, digits, seeds, options.page)
        display.say(f"wrote {options.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
