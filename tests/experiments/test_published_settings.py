"""The configurations of published settings, each through a whole tiny run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.config import config_file, load_config
from experiments.interrupt import StopFlag
from experiments.outcome import RunOutcome
from experiments.progress import RunDisplay
from experiments.search import start_run
from latency.budget import Budget
from latency.cost import CostKind
from pruning.layer_policy import LayerPolicy
from pruning.policy import CompressionPolicy
from tests.latency.synthetic import IntegerFormulaDevice

from .conftest import OPTIONS
from .test_floor import TINY, saved_table

SMALLER = {key: value for key, value in OPTIONS.items() if key not in ("budget", "search.methods")} | {
    "model.name": TINY[0],
    "search.evaluations": 18,
    "search.rounding": 4,
    "ddpg.learning_starts": 2,
    "finetune.epochs": 1,
}
"""What makes a run tiny and leaves its setting alone."""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_table(tmp_path_factory.mktemp("table"), IntegerFormulaDevice(), [8, 32])


@pytest.mark.parametrize(
    ("name", "decide", "kind", "budget", "target"),
    [
        ("haq_latency", ("bits",), "latency", Budget(kind="latency", share=0.6), None),
        ("haq_size", ("weight_bits",), "bytes", Budget(kind="bytes", share=0.2), None),
        ("galen_pruning", ("channels",), "latency", None, Budget(kind="latency", share=0.2)),
        ("galen_bits", ("bits",), "latency", None, Budget(kind="latency", share=0.2)),
        ("galen_joint", ("channels", "bits"), "latency", None, Budget(kind="latency", share=0.2)),
    ],
)
def test_published_setting_runs_as_it_says(
    name: str,
    decide: tuple[str, ...],
    kind: CostKind,
    budget: Budget | None,
    target: Budget | None,
    table: Path,
    tmp_path: Path,
) -> None:
    as_it_comes = load_config(config_file(name))
    assert as_it_comes.budget == ((budget,) if budget else ())
    assert as_it_comes.search.target == target
    assert (as_it_comes.search.methods, as_it_comes.search.environment) == (("ddpg",), "layerwise")
    # Galen's agent reads sensitivities, HAQ's none; neither starts from a plan that follows from them.
    assert (as_it_comes.search.start, as_it_comes.search.show_sensitivity) == ("uniform", name.startswith("galen"))

    options = SMALLER | ({} if name == "haq_size" else {"latency.table": str(table)})
    with RunDisplay(quiet=True) as display:
        outcome = start_run(
            load_config(config_file(name), options), tmp_path / "run", ["secateur"], display, StopFlag()
        )

    row = outcome.row("ddpg")
    assert (outcome.probe_evaluations > 0) == name.startswith("galen")
    assert outcome.budget_kind == kind
    assert outcome.has_budget == (budget is not None)
    assert row.cost <= outcome.cost_limit
    policy = CompressionPolicy.load(tmp_path / "run" / "methods" / "ddpg" / "policy.json")
    assert not policy.kept or "channels" in decide
    # Whole layers stay in floats where their activations do.
    untouched = LayerPolicy()
    for layer in policy.layers.values():
        assert layer.weight_bits == untouched.weight_bits or set(decide) & {"bits", "weight_bits"}
        assert layer.act_bits == untouched.act_bits or "bits" in decide
    assert RunOutcome.load(tmp_path / "run" / "results.json") == outcome


def test_every_bundled_configuration_is_named_by_the_command(command: Callable[..., object]) -> None:
    names = sorted(path.stem for path in config_file("digits").parent.glob("*.yaml"))
    shown = " ".join(str(command("search", "--help").out).replace("│", " ").split())  # type: ignore[attr-defined]

    assert all(name in shown for name in names)
