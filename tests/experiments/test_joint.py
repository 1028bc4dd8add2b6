"""Channels, zeros and bits decided together, from the configuration to files that load."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import secateur
from envs.journal import JournalError
from experiments.config import ConfigError, RunConfig, load_config
from experiments.interrupt import StopFlag
from experiments.machine import describe_machine
from experiments.outcome import RunOutcome, headings, table_cells
from experiments.progress import RunDisplay
from experiments.run import RunFolder
from experiments.search import create_run, resume_run, start_run
from latency.worker import Processor
from pruning.export import load_compressed
from pruning.quantize import quantized_layers
from pruning.stored_size import parameter_bytes

from .tiny import network

JOINT = {
    "search__decide": ["channels", "density", "bits"],
    "search__sparsity": "block4",
    "search__methods": ["uniform", "knapsack", "ppo"],
    "search__evaluations": 40,
    "ppo__rollout": 4,
    "budget": "20% bytes",
    "finetune__epochs": 2,
    "finetune__quantized_epochs": 1,
}


@pytest.fixture(scope="module")
def joint_run(tiny_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("joint") / "run"
    with RunDisplay(quiet=True) as display:
        start_run(tiny_config(**JOINT), run, ["secateur"], display, StopFlag())
    return run


def test_every_network_loads_with_its_channels_zeros_and_bits(joint_run: Path) -> None:
    for method in ("uniform", "knapsack", "ppo"):
        folder = joint_run / "methods" / method / "model"
        policy = secateur.CompressionPolicy.load(folder / "policy.json")
        model = load_compressed(folder, lambda: network(num_classes=3, in_channels=1))

        assert policy.layers
        tensors = dict(model.named_parameters())
        for name, layer in policy.layers.items():
            weight = tensors[f"{name}.weight"]
            # The zeros were held while the network was fine-tuned: a block more or less is rounding.
            assert float((weight != 0).float().mean()) == pytest.approx(layer.density, abs=4 * 4 / weight.numel())
        bits = {name: (each.policy.weight_bits, each.policy.act_bits) for name, each in quantized_layers(model).items()}
        assert bits == {n: (p.weight_bits, p.act_bits) for n, p in policy.layers.items() if p.is_quantized}


def test_bytes_of_the_table_are_those_of_the_policy_and_within_the_budget(joint_run: Path) -> None:
    outcome = RunOutcome.load(joint_run / "results.json")
    model = network(num_classes=3, in_channels=1)
    graph = secateur.capture(model, torch.zeros(2, 1, 8, 8))
    for row in outcome.rows[1:]:
        policy = secateur.CompressionPolicy.load(joint_run / "methods" / row.method / "model" / "policy.json")
        assert row.size_bytes == sum(parameter_bytes(graph, policy).values()) <= outcome.cost_limit
        assert outcome.cost_limit == outcome.dense_cost // 5
        assert set(row.keep_ratios) == {"3", "6", "9"} | {f"{n}:bits" for n in (0, 3, 6, 9, 14)} | {
            f"{n}:density" for n in (3, 6, 9)
        }


def test_a_run_under_several_budgets_keeps_and_shows_each(
    tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = tiny_config(**JOINT | {"budget": "50% macs, 20% bytes, 10% bops", "finetune__epochs": 0})
    with RunDisplay(quiet=True) as display:
        outcome = start_run(config, tmp_path / "run", ["secateur"], display, StopFlag())

    assert outcome.budget == "at most 50 % of its MACs and 20 % of its bytes and 10 % of its bit operations"
    assert [budget.kind for budget in outcome.budgets] == ["macs", "bytes", "bops"]
    for row in outcome.rows[1:]:
        costs = {"macs": row.macs, "bytes": row.size_bytes, "bops": row.further_costs["bops"]}
        assert all(costs[budget.kind] <= budget.limit for budget in outcome.budgets)
        assert row.cost == row.macs and row.further_costs["bytes"] == row.size_bytes
    cells = dict(zip(headings(outcome), table_cells(outcome)[1], strict=True))
    for column in ("MACs", "bytes", "bit operations"):
        assert cells[column].endswith("%)")
    assert "bit operations" in (tmp_path / "run" / "report.html").read_text()


BITS = {"search__decide": ["channels", "bits"], "search__methods": ["uniform"], "budget": "20% bytes"}
WITHOUT_VNNI = Processor("a processor", "x86_64", "", ("avx2",), 2)


@pytest.mark.parametrize(
    ("features", "options", "settled"),
    [
        (("avx2",), {}, True),
        (("avx2", "avx_vnni"), {}, False),
        (("avx2",), {"search__reduce_range": False}, False),
        (("avx2", "avx_vnni"), {"search__reduce_range": True}, True),
        (("avx2",), {"search__decide": ["channels"], "budget": "50%"}, None),
        (("avx2",), {"search__decide": ["weight_bits", "act_bits"], "budget": "20% bops"}, None),
        (("avx2",), {"search__bits": [4, 8, 32]}, None),
        (("avx2",), {"search__bits": [16, 32], "budget": "60% bytes"}, None),
    ],
)
def test_the_range_of_eight_bits_goes_by_this_processor_if_integers_are_decided(
    tiny_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    features: tuple[str, ...],
    options: dict[str, object],
    settled: bool | None,
) -> None:
    here = replace(WITHOUT_VNNI, features=features)
    monkeypatch.setattr(Processor, "here", classmethod(lambda _: here))

    with RunDisplay(quiet=True) as display:
        run = create_run(tiny_config(**BITS | options), tmp_path / "run", ["secateur"], display)

    assert RunFolder.open(run.root).config.search.reduce_range is settled


@pytest.mark.parametrize("is_on", [True, False])
def test_the_range_of_eight_bits_stays_with_the_run_on_another_processor(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_on: bool
) -> None:
    config = tiny_config(**BITS | {"search__reduce_range": is_on})
    with RunDisplay(quiet=True) as display:
        create_run(config, tmp_path / "run", ["secateur"], display)
    other = replace(WITHOUT_VNNI, features=("avx2", "avx_vnni") if is_on else ("avx2",))
    monkeypatch.setattr(Processor, "here", classmethod(lambda _: other))
    said: list[str] = []
    with RunDisplay(quiet=True) as display:
        display.say = said.append  # type: ignore[method-assign]
        resume_run(tmp_path / "run", display, StopFlag())

    policy = secateur.CompressionPolicy.load(tmp_path / "run" / "methods" / "uniform" / "policy.json")
    integers = [layer for layer in policy.layers.values() if layer.weight_bits == layer.act_bits == 8]
    assert {layer.reduce_range for layer in integers} == {is_on}
    assert any(line.startswith("search.reduce_range: weights of 8 bits take half") for line in said) == is_on


def test_a_run_from_before_the_range_was_settled_keeps_all_levels(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(**BITS)
    RunFolder.create(tmp_path / "run", config, describe_machine(torch.device("cpu")), ["secateur"])
    monkeypatch.setattr(Processor, "here", classmethod(lambda _: WITHOUT_VNNI))
    with RunDisplay(quiet=True) as display:
        resume_run(tmp_path / "run", display, StopFlag())

    policy = secateur.CompressionPolicy.load(tmp_path / "run" / "methods" / "uniform" / "policy.json")
    assert {layer.reduce_range for layer in policy.layers.values()} == {False}


@pytest.mark.parametrize(("asked", "expected"), [(None, True), (False, False), (True, True)])
def test_compress_goes_by_the_processor_too_and_ties_its_journal_to_the_range(
    asked: bool | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Processor, "here", classmethod(lambda _: WITHOUT_VNNI))
    arguments = {
        "evaluate": lambda _: 0.5,
        "budget": "30% bytes",
        "calibration": [torch.rand(16, 1, 8, 8)],
        "method": "uniform",
        "decide": ["bits"],
        "bits": (8,),
        "journal": tmp_path / "journal.jsonl",
    }
    model = network(num_classes=3, in_channels=1).eval()

    found = secateur.compress(model, torch.zeros(1, 1, 8, 8), reduce_range=asked, **arguments)

    assert {layer.reduce_range for layer in found.policy.layers.values()} == {expected}
    with pytest.raises(JournalError, match="is of another search: reduce_range"):
        secateur.compress(model, torch.zeros(1, 1, 8, 8), reduce_range=not expected, **arguments)


def test_resuming_a_finished_joint_search_replays_its_journal(joint_run: Path) -> None:
    before = (joint_run / "journal.jsonl").read_text()
    outcome = RunOutcome.load(joint_run / "results.json")
    (joint_run / "results.json").unlink()

    with RunDisplay(quiet=True) as display:
        again = resume_run(joint_run, display, StopFlag())

    assert (joint_run / "journal.jsonl").read_text() == before
    assert [row.keep_ratios for row in again.rows] == [row.keep_ratios for row in outcome.rows]
    assert any(json.loads(line)["layers"] for line in before.splitlines())


def test_compress_decides_bits_alone() -> None:
    model = network(num_classes=3, in_channels=1).eval()
    calibration = [torch.rand(16, 1, 8, 8)]
    done = secateur.compress(
        model,
        torch.zeros(1, 1, 8, 8),
        evaluate=lambda _: 0.5,
        budget="50% bops",
        calibration=calibration,
        method="random",
        evaluations=12,
        start="uniform",
        decide=["weight_bits", "act_bits"],
        bits=(4, 8, 32),
    )

    assert done.cost <= done.dense_cost // 2
    assert not done.policy.kept
    assert {layer.weight_bits for layer in done.policy.layers.values()} <= {4, 8, 32}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("decide", [], "search.decide: name what is decided, each once; found nothing"),
        (
            "decide",
            ["bits", "act_bits"],
            "search.decide: bits decides weights and activations together; leave it out to decide weight_bits and "
            "act_bits apart",
        ),
        (
            "sparsity",
            "block3",
            "search.sparsity: sparsity is 'block3'; it must be one of dense, unstructured, block4, block8, block16, or "
            "'N:M' such as '2:4'",
        ),
        (
            "sparsity",
            "dense",
            "search.sparsity: sparsity is the pattern that zeros follow; to decide no density, leave it out of "
            "search.decide",
        ),
    ],
)
def test_decisions_that_contradict_each_other_are_refused(option: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {f"search.{option}": value})
    assert str(caught.value).startswith(f"the options: {message}")
