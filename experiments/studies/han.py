"""Learning both weights and connections (Han et al. 2015): a network with 12 times fewer weights, and how it got there.

``python -m experiments.studies.han`` does the paper's LeNet-300-100 and LeNet-5 on the bundled digits; with ``lenet5
--set finetune.epochs=8`` one of them in another way; with ``mine.yaml`` a network and images of your own:
`experiments/configs/han/lenet5.yaml` is a pattern, and `experiments/studies/han_config.py` has every key. It writes
``report.html`` into the root. A sitting may end at any time; the next one starts again with the
training at which it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from pruning.files import write_atomic
from pruning.policy import PolicyError
from pruning.sparsity import sparse_weight

from ..config import ConfigError, config_file, load_as, parse_setting
from ..images import DataError
from ..interrupt import Interrupted, StopFlag, stop_on_signals
from ..machine import set_up_device
from ..models import ModelError
from ..pages import write_html, write_markdown
from ..progress import RunDisplay
from ..user_function import UserFunctionError
from .han_config import HanConfig
from .han_page import TITLE, Finding, sections_of
from .han_study import Images, Outcome, Trial

BUNDLED = ("lenet_300_100", "lenet5")


def carry_out(name: str, config: HanConfig, images: Images, root: Path, display: RunDisplay, stop: StopFlag) -> Finding:
    """Do what is missing of one network's trials, and read what was found.

    Args:
        name: of its folder.
        config: how it is pruned.
        images: what it is trained on and judged by.
        root: folder of all networks.
        display: told what runs.
        stop: checked after each epoch.
    """
    trials = [Trial(config, images, seed, root / name / f"seed{seed}", stop) for seed in config.trials]
    outcomes = [Outcome(**_once(trial, "outcome", trial.outcome, display)) for trial in trials]
    first = trials[0]
    curves: Mapping[str, Any] = {}
    if config.prune.curves:
        curves = _once(first, "regularisations", first.regularisations, display)
    dense, pruned = first.load("dense"), first.load(f"round{config.prune.rounds}")
    weights = {
        layer: (sparse_weight(dense, layer)[0].detach(), sparse_weight(pruned, layer)[0].detach())
        for layer in first.layers
    }
    return Finding(config, outcomes, images.shape, weights, curves, images.sizes)


def _once(trial: Trial, name: str, work: Callable[[], Mapping[str, Any]], display: RunDisplay) -> dict[str, Any]:
    path = trial.folder / f"{name}.json"
    if not path.exists():
        display.say(f"{trial.folder}: {name}")
        write_atomic(path, json.dumps(work(), indent=1).encode())
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def main(
    configs: Annotated[
        list[str] | None, typer.Argument(help=f"YAML files or bundled names; by default {' and '.join(BUNDLED)}.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A key of the configuration, for all: --set prune.rounds=8.")
    ] = None,
    root: Annotated[Path, typer.Option(help="Folder of the trained networks and the report.")] = Path("runs/han"),
    page: Annotated[Path | None, typer.Option(help="Page of Markdown to write beside the report.")] = None,
) -> None:
    """Prune networks by Han's rule, with controls, and write the report."""
    with stop_on_signals() as stop, RunDisplay() as display:
        try:
            options = dict(map(parse_setting, settings or []))
            findings = []
            for name in configs or BUNDLED:
                config = load_as(HanConfig, config_file(name, "han"), options)
                set_up_device("cpu", config.threads)
                findings.append(carry_out(Path(name).stem, config, Images(config), root, display, stop))
        except Interrupted as stopped:
            display.say(f"{stopped}; run the same command to go on")
            raise typer.Exit(130) from stopped
        except (ConfigError, DataError, ModelError, PolicyError, UserFunctionError) as error:
            display.say(str(error))
            raise typer.Exit(1) from error
        words = [*(configs or []), *(f"--set {setting}" for setting in settings or [])]
        sections = sections_of(findings, " ".join(["python -m experiments.studies.han", *words]))
        write_html(root / "report.html", TITLE, sections)
        display.say(f"wrote {root / 'report.html'}")
        if page is not None:
            write_markdown(page, TITLE, sections)
            display.say(f"wrote {page}")


if __name__ == "__main__":
    typer.run(main)
