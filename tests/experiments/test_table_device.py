"""Times of finished networks, on the device that they were searched for and on others."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from experiments.clock import TableDevice
from experiments.config import RunConfig
from experiments.interrupt import StopFlag
from experiments.measured_budget import PlanClock
from experiments.outcome import DENSE, Latency, RunOutcome, headings, missing_speedups
from experiments.progress import RunDisplay
from experiments.report import render_report
from experiments.search import start_run
from experiments.turns import variants_of
from graph_encoder.capture import capture
from latency.device import LocalDevice, TableError
from latency.measure import Comparison
from latency.runtimes import PYTORCH, Artifact, OnnxRuntime, PyTorchEager, find_runtime
from latency.table import LatencyTable, build_table, needed_kinds, start_table
from latency.worker import Processor, allowed_cpus
from tests.latency.synthetic import FormulaDevice, as_calibrated

from .outcomes import outcome, plans, row
from .tiny import network

Command = Callable[..., Any]


class Abacus(FormulaDevice):
    """Takes a nanosecond for each weight."""

    def _one(self, network: Artifact) -> float:
        assert isinstance(network, nn.Module)
        return 1.0 + sum(parameter.numel() for parameter in network.parameters())


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table that says of itself that it is this machine's, with one thread of PyTorch."""
    graph = capture(network(num_classes=3, in_channels=1), torch.zeros(2, 1, 8, 8))
    device = Abacus()
    needed = needed_kinds(graph, {group.name: 1 for group in graph.prunable}, [32])
    built = as_calibrated(build_table(start_table(device), device, needed), graph)
    here = LocalDevice(find_runtime(PYTORCH)).fingerprint
    path = tmp_path_factory.mktemp("table") / "table.json"
    replace(built, fingerprint=here).save(path)
    return path


@pytest.fixture(scope="module")
def run(tiny_config: Callable[..., RunConfig], table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run") / "run"
    options = {"budget": "80% latency", "latency__table": str(table), "search__methods": ["uniform"]}
    with RunDisplay(quiet=True) as display:
        start_run(tiny_config(**options, finetune__epochs=0), root, ["secateur"], display, StopFlag())
    return root


def test_a_run_under_latency_says_of_which_device_and_what_the_clock_read(run: Path, table: Path) -> None:
    outcome = RunOutcome.load(run / "results.json")
    assert outcome.device == LatencyTable.load(table).fingerprint
    assert outcome.elsewhere == ""
    readings = outcome.row("uniform").clock_readings
    assert readings[0].predicted <= 1 and all(each.low <= each.measured <= each.high for each in readings)


def test_what_the_clock_lets_searches_spend_is_what_rewards_see_and_the_report_tells(
    tiny_config: Callable[..., RunConfig], table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Half of the time that the table says, of any plan.
    monkeypatch.setattr(PlanClock, "__call__", lambda _, policy, rounds: Comparison(0.3, 0.29, 0.31, rounds, 0))
    rewarded = {"search__reward": "tests.experiments.tiny:accuracy_within_the_limit", "search__methods": ["random"]}
    budgets = {"budget": "60% latency, 90% macs", "latency__table": str(table)}
    with RunDisplay(quiet=True) as display:
        config = tiny_config(**rewarded, **budgets, finetune__epochs=0)
        found = start_run(config, tmp_path / "run", ["secateur"], display, StopFlag())

    latency, macs = found.budgets
    assert latency.asked == int(0.6 * latency.dense_cost) < latency.limit < latency.dense_cost
    assert macs.asked_limit is None
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The start plan was well within the budget on the clock, so searches spent" in page


def test_networks_are_timed_with_the_threads_and_on_the_processors_of_the_table(table: Path, tmp_path: Path) -> None:
    loaded, before, last = LatencyTable.load(table), allowed_cpus(), tuple(allowed_cpus()[-1:])
    replace(loaded, fingerprint=replace(loaded.fingerprint, threads=3, cpus=last)).save(tmp_path / "table.json")

    device = TableDevice.of(tmp_path / "table.json")

    with device.in_force():
        assert torch.get_num_threads() == 3 and allowed_cpus() == list(last)
    assert torch.get_num_threads() != 3 and allowed_cpus() == before
    told = outcome(row("ppo", 0.8, 0.88), device=device.fingerprint)
    assert (told.timed_threads, told.machine.threads) == (3, 2)
    assert "CPU, 3 threads, all networks" in render_report(told, plans(), "")
    assert told.model_copy(update={"elsewhere": "there"}).timed_threads == 2


def without_results(run: Path, folder: Path) -> Path:
    """The run as it was before its last step."""
    copy = shutil.copytree(run, folder)
    (copy / "results.json").unlink()
    return copy


def test_a_run_continued_on_another_device_keeps_its_plan_and_says_whose_times_it_shows(
    run: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = without_results(run, tmp_path / "run")
    other = Processor("another processor", "x86_64")
    monkeypatch.setattr(Processor, "here", classmethod(lambda cls: other))

    done = command("resume", elsewhere, "--require-speedup")

    before, after = (RunOutcome.load(folder / "results.json") for folder in (run, elsewhere))
    assert after.row("uniform").clock_readings == before.row("uniform").clock_readings
    policy = "methods/uniform/policy.json"
    assert (elsewhere / policy).read_bytes() == (run / policy).read_bytes()
    with pytest.raises(TableError) as refused:
        LatencyTable.load(run / "latency.json").fingerprint.check(LocalDevice(find_runtime(PYTORCH)).fingerprint)
    assert after.elsewhere == str(refused.value)
    assert done.code == 3
    assert f"no speed-up:\n  timed on another device than the latency table's: {after.elsewhere}\n" in done.err
    assert f"Times are of another device than the latency table's: {after.elsewhere}." in done.out
    assert "eager ms, another device" in headings(after)
    page = (elsewhere / "report.html").read_text()
    assert "measured speed, pytorch-eager, another device than the latency table" in page
    assert "eager ms, another device" in page


@pytest.mark.slow
def test_a_policy_applied_with_the_table_of_another_device_has_no_speedup(
    run: Path, table: Path, tmp_path: Path, command: Command
) -> None:
    loaded = LatencyTable.load(table)
    replace(loaded, fingerprint=replace(loaded.fingerprint, version="0.1")).save(tmp_path / "table.json")
    options = (run / "config.yaml", "--weights", run / "dense.safetensors", "--latency-table", tmp_path / "table.json")

    done = command(
        "apply", run / "methods/uniform/policy.json", *options, "--require-speedup", "--out", tmp_path / "out", "--json"
    )

    assert done.code == 3
    told = json.loads(done.out)["no_speedup"]
    assert told.startswith("timed on another device than the latency table's: ") and "version '0.1', here " in told


@pytest.mark.skipif(not allowed_cpus(), reason="the system does not let a process choose its processors")
def test_what_a_run_saved_is_told_apart_by_device_when_it_is_timed_again(run: Path, command: Command) -> None:
    options = ("latency", "measure", run, "--runtime", "pytorch-eager", "--rounds", "6")
    last = allowed_cpus()[-1]

    same, other = (json.loads(command(*options, *more, "--json").out) for more in ((), ("--cpus", last)))

    assert [reading["another_device"] for reading in same] == ["", ""]
    assert all(f"They differ in cpus '', here '{last}'. " in reading["another_device"] for reading in other)
    done = command(*options, "--cpus", last)
    assert done.out.count("another device than the latency table's") == 2
    assert done.err.count(f"warning: another device than the latency table's ({run}): ") == 1


def timed(runtime: str, *ratio: float) -> Latency:
    return Latency(runtime=runtime, median_ms=2.0, lower_quartile_ms=1.9, upper_quartile_ms=2.1, n_runs=5, ratio=ratio)


def test_only_the_runtime_that_plans_were_searched_for_tells_of_a_speedup(table: Path) -> None:
    device = LatencyTable.load(table).fingerprint
    fast, slow = (0.7, 0.71, 0.72), (1.1, 1.2, 1.3)

    def run_with(on_table: tuple[float, ...], on_other: tuple[float, ...]) -> RunOutcome:
        times = (timed(PYTORCH, *on_table), timed("onnxruntime", *on_other))
        dense = row(DENSE, 0.9, 0.9, latencies=tuple(timed(each.runtime, 1, 1, 1) for each in times))
        return outcome(row("ppo", 0.8, 0.88, latencies=times), device=device).model_copy(
            update={"rows": (dense, row("ppo", 0.8, 0.88, latencies=times))}
        )

    assert missing_speedups(run_with(fast, slow)) == []
    assert missing_speedups(run_with(slow, fast)) == [
        "ppo on pytorch-eager: slower, 1.2 of the dense network's time (quartiles 1.1 to 1.3)"
    ]
    unseen = run_with(fast, fast).model_copy(update={"device": replace(device, runtime="openvino")})
    assert missing_speedups(unseen) == [f"ppo: not timed on {unseen.device}"]


def test_a_runtime_that_plans_were_searched_for_is_timed_beside_the_others() -> None:
    class Engine(OnnxRuntime):
        name = "engine"

    networks, onnx = {"ppo": nn.ReLU()}, {"ppo": Path("model.onnx")}
    assert [(one.runtime, one.artifact) for one in variants_of(networks, onnx, {}, Engine())] == [
        (PYTORCH, networks["ppo"]),
        ("onnxruntime", onnx["ppo"]),
        ("engine", onnx["ppo"]),
    ]
    assert len(variants_of(networks, onnx, {}, PyTorchEager())) == len(variants_of(networks, onnx, {})) == 2
