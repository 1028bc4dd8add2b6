import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.config import RunConfig
from experiments.interrupt import StopFlag
from experiments.measure_run import SavedLatency
from experiments.outcome import DENSE
from experiments.progress import RunDisplay
from experiments.search import start_run
from latency.device import LocalDevice
from latency.measure import LatencyReport
from latency.worker import Processor, allowed_cpus

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def run(tiny_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("measured") / "run"
    with RunDisplay() as display:
        config = tiny_config(search__methods=["uniform"], measure__onnx=True)
        start_run(config, root, ["secateur", "search"], display, StopFlag())
    return root


def test_saved_networks_are_timed_beside_the_dense_one_with_each_number_of_threads(run: Path, command: Command) -> None:
    done = command("latency", "measure", run, "--threads", "1", "--threads", "2", "--rounds", "20", "--json")
    assert done.code == 0
    readings = json.loads(done.out)
    assert [(r["method"], r["threads"]) for r in readings] == [(DENSE, 1), ("uniform", 1), (DENSE, 2), ("uniform", 2)]
    for reading in readings:
        assert 0 < reading["lower_quartile_ms"] <= reading["median_ms"] <= reading["upper_quartile_ms"]
        assert reading["low"] <= reading["ratio"] <= reading["high"]
        assert reading["rounds"] == 20
        assert reading["verdict"] != "undecided" or reading["repeats_needed"] > 20
    assert {reading["ratio"] for reading in readings if reading["method"] == DENSE} == {1.0}
    lines = command("latency", "measure", run, "--rounds", "20").out.splitlines()
    assert [line.split()[:2] for line in lines] == [["run", "method"], ["run", DENSE], ["run", "uniform"]]


@pytest.fixture
def other(run: Path, tmp_path: Path) -> Path:
    """Another run of the same network."""
    return Path(shutil.copytree(run, tmp_path / "other"))


def test_networks_of_several_runs_are_timed_in_the_same_rounds_beside_the_first_ones_dense(
    run: Path, other: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[Path]] = []
    measure = LocalDevice.measure

    def noted(device: LocalDevice, networks: dict[str, Path], *arguments: Any, **options: Any) -> LatencyReport:
        calls.append(list(networks.values()))
        return measure(device, networks, *arguments, **options)

    monkeypatch.setattr(LocalDevice, "measure", noted)
    # Its dense network is not needed.
    shutil.rmtree(other / "methods" / "dense")

    done = command("latency", "measure", run, other, "--rounds", "20", "--json")

    networks = [(run, DENSE), (run, "uniform"), (other, "uniform")]
    assert calls == [[root / "methods" / method / "model" / "model.onnx" for root, method in networks]]
    readings = json.loads(done.out)
    assert [(r["run"], r["method"]) for r in readings] == [(root.name, method) for root, method in networks]
    assert [r["of_first"] is None for r in readings] == [True, True, False]
    low, ratio, high = readings[2]["of_first"]
    assert low <= ratio <= high
    lines = command("latency", "measure", run, other, "--rounds", "6").out.splitlines()
    assert lines[0].endswith("of dense (95 %)  of the first run's (95 %)")
    assert [line.count("%)") for line in lines[1:]] == [0, 1, 2]


def test_a_run_is_timed_once_and_runs_of_one_name_are_told_apart(run: Path, command: Command, tmp_path: Path) -> None:
    again, twin = tmp_path / "linked", Path(shutil.copytree(run, tmp_path / "twin" / "run"))
    again.symlink_to(run)

    done = command("latency", "measure", run, again, twin, "--rounds", "6", "--json")

    assert [r["run"] for r in json.loads(done.out)] == [str(run), str(run), str(twin)]


def test_runs_of_other_inputs_are_refused_and_those_of_other_networks_named(
    run: Path, other: Path, command: Command
) -> None:
    manifest = other / "methods" / "uniform" / "model" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"constructor": "mine:net"}))
    done = command("latency", "measure", run, other, "--rounds", "6")
    assert (
        f"warning: run {other} compresses 'mine:net', and run {run} 'tests.experiments.tiny:network'; all shares are "
        "of the dense network of 'run'\n"
    ) in done.err

    content["inputs"][0][0] = [2, 1, 9, 9]
    manifest.write_text(json.dumps(content))
    refused = command("latency", "measure", run, other)
    assert refused.code == 1
    assert refused.err == (
        f"error: run {other} takes inputs of float32 1x9x9, and run {run} of float32 1x8x8; networks are compared on "
        "the same input, so time them apart\n"
    )


def test_a_further_run_with_nothing_to_time_is_refused(run: Path, other: Path, command: Command) -> None:
    (other / "methods" / "uniform" / "model" / "model.onnx").unlink()
    empty = command("latency", "measure", run, other)
    assert empty.code == 1
    assert empty.err.startswith(
        f"error: run {other} holds too little to time with 'onnxruntime': no ONNX file of uniform"
    )


@pytest.mark.skipif(not allowed_cpus(), reason="the system does not let a process choose its processors")
def test_readings_say_on_which_processors_they_were_taken_and_how_disturbed(run: Path, command: Command) -> None:
    last = allowed_cpus()[-1]
    done = command("latency", "measure", run, "--cpus", last, "--rounds", "6", "--json")
    for reading in json.loads(done.out):
        assert reading["cpus"] == [last]
        assert Processor.of_json(reading["processor"]) == Processor.here()
        assert 0 <= reading["disturbed"] <= 1

    refused = command("latency", "measure", run, "--cpus", f"{last},4096")
    assert refused.code == 1
    assert refused.err == (f"error: cpus [{last}, 4096] cannot be used: this process may run on {allowed_cpus()}\n")
    unread = command("latency", "measure", run, "--cpus", "0-1")
    assert unread.err == ("error: cpus '0-1' are no numbers of processors; give them with commas between, as in 0,1\n")


def test_an_undecided_network_is_printed_with_the_rounds_that_would_tell() -> None:
    decided = SavedLatency(
        run="mine",
        method="ppo",
        runtime="onnxruntime 1.0",
        threads=1,
        processor=Processor("a processor"),
        cpus=(0,),
        median_ms=2.0,
        lower_quartile_ms=1.9,
        upper_quartile_ms=2.1,
        disturbed=0.25,
        rounds=60,
        ratio=0.9,
        low=0.8,
        high=0.95,
        verdict="faster",
        repeats_needed=25,
        accuracy=0.875,
    )
    undecided = replace(decided, ratio=0.98, high=1.02, verdict="undecided", repeats_needed=240)
    assert decided.cells()[:3] == ["mine", "ppo", "87.50 %"]
    assert decided.cells()[3:] == ["1", "2 (1.9 to 2.1)", "25%", "90.0% (80.0% to 95.0%)", "", "faster"]
    assert undecided.cells()[-1] == "undecided, about 240 rounds would tell"
    assert undecided.to_dict()["repeats_needed"] == 240


def test_a_runtime_of_modules_times_the_networks_that_were_saved(run: Path, command: Command) -> None:
    done = command("latency", "measure", run, "--runtime", "pytorch-eager", "--rounds", "6", "--json")
    assert done.code == 0
    assert [(r["method"], r["runtime"].split()[0]) for r in json.loads(done.out)] == [
        (DENSE, "pytorch-eager"),
        ("uniform", "pytorch-eager"),
    ]


def test_a_network_without_a_file_is_left_out_and_a_run_without_any_is_refused(run: Path, command: Command) -> None:
    twin = run / "methods" / "random"
    (twin / "model").mkdir(parents=True)
    results = (run / "results.json").read_text()
    outcome = json.loads(results)
    outcome["rows"].append({**outcome["rows"][1], "method": "random"})
    (run / "results.json").write_text(json.dumps(outcome))
    reason = "(it was run with measure.onnx off, or the export failed, which its output says)"
    done = command("latency", "measure", run, "--rounds", "6")
    assert done.code == 0
    assert f"left out of {run}: no ONNX file of random {reason}" in done.err
    assert [line.split()[1] for line in done.out.splitlines()] == ["method", DENSE, "uniform"]
    (run / "results.json").write_text(results)

    path = run / "methods" / "uniform" / "model" / "model.onnx"
    content = path.read_bytes()
    path.unlink()
    done = command("latency", "measure", run)
    path.write_bytes(content)
    assert done.code == 1
    assert done.err == (
        f"error: run {run} holds too little to time with 'onnxruntime': no ONNX file of uniform {reason}\n"
    )


@pytest.mark.parametrize("task", [("measure", "run"), ("build", "--model", "resnet20", "--out", "table.json")])
def test_no_threads_are_refused(task: tuple[str, ...], command: Command) -> None:
    done = command("latency", *task, "--threads", "0")
    assert done.code == 2
    assert "Invalid value for '--threads'" in done.err
