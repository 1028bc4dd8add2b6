import json
import logging
import re
import shutil
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from html import escape
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.main import get_command

from experiments.apply import agent_verdict
from experiments.cli import app
from experiments.config import METHODS, RunConfig
from experiments.interrupt import Interrupted, StopFlag
from experiments.outcome import Latency, RunOutcome, Speed
from experiments.progress import RunDisplay
from experiments.run import RunExistsError, RunFolder, claimed
from experiments.search import start_run
from experiments.standalone_training import finetune_saved
from latency.runtimes import LatencyError
from pruning.export import load_compressed, load_program

from . import outcomes
from .stopping import StopAfter, StopWhen
from .tiny import CLASSES, SIDE
from .tiny import images as tiny_images
from .tiny import network as tiny_network

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def finished_run(tiny_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished") / "run"
    with RunDisplay(quiet=True) as display:
        config = tiny_config(finetune__epochs=1, measure__onnx=True, measure__program=True)
        start_run(config, root, ["secateur"], display, StopFlag())
    return root


def test_saved_network_and_its_program_compute_the_same(finished_run: Path) -> None:
    saved, images = finished_run / "methods" / "random" / "model", torch.randn(3, 1, SIDE, SIDE)

    network = load_compressed(saved, lambda: tiny_network(CLASSES, 1))

    torch.testing.assert_close(load_program(saved / "model.pt2").module()(images), network(images))


def test_bytes_are_those_that_a_budget_of_bytes_counts_and_files_are_told_beside(finished_run: Path) -> None:
    for row in RunOutcome.load(finished_run / "results.json").rows:
        # Float parameters; the statistics of batch norms, which fold away, do not count.
        assert row.size_bytes == 4 * row.params
        assert row.onnx_bytes == (finished_run / "methods" / row.method / "model" / "model.onnx").stat().st_size


def test_search_ends_with_a_table_of_all_methods(command: Command, tiny_yaml: Path, tmp_path: Path) -> None:
    done = command("search", tiny_yaml, "--out", tmp_path / "run")

    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["method", "dense", "uniform", "random"]
    assert lines[0].split(maxsplit=5)[1:5] == ["validation", "accuracy", "test", "accuracy"]
    assert lines[-1].startswith("best on the validation images: ")
    assert Path(lines[-1].rpartition(", ")[2]).exists()
    assert "dense accuracy: " in done.err


def test_method_that_knows_every_plan_of_a_small_space_says_so(
    command: Command, tiny_yaml: Path, tmp_path: Path
) -> None:
    # One group is left, and it keeps 8 or 16 of its 16 units: with a budget below the dense cost, one plan.
    small = ["--set", 'search.protected=["3", "9"]', "--methods", "random", "--set", "search.rounding=8"]
    done = command("search", tiny_yaml, *small, "--budget", "90%", "--evaluations", "20", "--out", tmp_path / "run")
    row = RunOutcome.load(tmp_path / "run" / "results.json").row("random")
    plans = {e["digest"] for e in journal(tmp_path / "run") if (e["searcher"], e["purpose"]) == ("random", "candidate")}

    assert row.plans == len(plans) == 1
    assert row.evaluations < 19
    assert (
        f"random: ended with {row.evaluations:g} of 20 evaluations, as it proposed little but plans that it knew: "
        f"{row.plans} different plan"
    ) in done.err


def journal(run: Path) -> list[dict[str, Any]]:
    """Every evaluation of a run, as it was recorded."""
    return [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]


def in_json(run: Path) -> dict[str, Any]:
    """What a command prints of a run: where it is, and its outcome."""
    return {"run": str(run)} | RunOutcome.load(run / "results.json").model_dump(mode="json")


def test_json_holds_the_folder_and_the_outcome_and_nothing_else(
    command: Command, tiny_yaml: Path, tmp_path: Path
) -> None:
    done = command("search", tiny_yaml, "--out", tmp_path / "run", "--json")

    assert done.err == ""
    assert json.loads(done.out) == in_json(tmp_path / "run")


def test_run_that_a_bad_recipe_ends_is_continued_with_another(
    command: Command, tiny_yaml: Path, tmp_path: Path
) -> None:
    run, bad = tmp_path / "my run", ("--set", "finetune.learning_rate=1e30", "--set", "finetune.batch_size=24")
    failed = command("search", tiny_yaml, "--finetune-epochs", 1, *bad, "--out", run)
    assert failed.code == 1
    assert "lower the learning rate" in failed.err
    assert f"continue with 'secateur resume '{run}''" in failed.err
    found = (run / "journal.jsonl").read_bytes()

    before = (run / "config.yaml").read_bytes()
    refused = command("resume", run, "--set", "search.seed=3", "--set", "finetune.epochs=2")
    nowhere = command("resume", run, "--set", "device=abacus", "--set", "finetune.epochs=2")
    assert (refused.code, nowhere.code) == (1, 1)
    assert (run / "config.yaml").read_bytes() == before
    assert refused.err.startswith("error: search.seed: what was evaluated before would not compare with what follows")
    done = command("resume", run, "--set", "finetune.learning_rate=0.01")
    assert done.code == 0, done.err
    outcome = RunOutcome.load(run / "results.json")
    assert all(row.tuned_validation_accuracy is not None for row in outcome.rows)
    assert outcome.command.endswith(f"; secateur resume '{run}' --set finetune.learning_rate=0.01")
    assert (run / "journal.jsonl").read_bytes() == found

    too_late = command("resume", run, "--set", "finetune.epochs=2")
    assert too_late.code == 1
    assert too_late.err.startswith(f"error: run {run} is finished, and nothing of it is made again")


def test_networks_trained_by_another_recipe_are_trained_again_by_the_one_that_a_run_goes_on_with(
    command: Command, tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config, run, straight = tiny_config(finetune__epochs=1), tmp_path / "run", tmp_path / "straight"
    dense = run / "methods" / "dense" / "tuned.safetensors"
    with RunDisplay(quiet=True) as display:
        with pytest.raises(Interrupted):
            start_run(config, run, ["secateur"], display, StopWhen(dense.exists))
        tuned = dense.read_bytes()
        start_run(tiny_config(finetune__epochs=2), straight, ["secateur"], display, StopFlag())

    done = command("resume", run, "--set", "finetune.epochs=2")

    assert done.code == 0
    assert "finetune: 1 network trained otherwise before will be trained anew" in done.err
    assert dense.read_bytes() != tuned
    for method in ("dense", "uniform", "random"):
        weights = "methods", method, "tuned.safetensors"
        assert run.joinpath(*weights).read_bytes() == straight.joinpath(*weights).read_bytes()


def test_only_what_depends_on_a_changed_key_is_made_again(
    command: Command, tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    run, warned = tmp_path / "run", "the continued run may differ from an uninterrupted one"
    uniform = run / "methods" / "uniform"
    with RunDisplay(quiet=True) as display, pytest.raises(Interrupted):
        start_run(
            tiny_config(finetune__epochs=1), run, ["secateur"], display, StopWhen(uniform.joinpath("model").exists)
        )
    folder = RunFolder(run)
    folder.machine_file.write_text(folder.machine.model_copy(update={"threads": 64}).model_dump_json())
    tuned = (uniform / "tuned.safetensors").stat().st_mtime_ns

    done = command("resume", run, "--set", "measure.program=true", "--set", "finetune.dense_control=false")

    assert done.code == 0
    assert (uniform / "tuned.safetensors").stat().st_mtime_ns == tuned
    assert {path.parent.parent.name for path in run.glob("methods/*/model/model.pt2")} == {"dense", "uniform", "random"}
    outcome = RunOutcome.load(run / "results.json")
    assert outcome.row("dense").tuned_validation_accuracy is None
    assert any(warned in text for text in outcome.warnings)


def test_warnings_of_modules_and_of_the_end_are_kept_and_those_of_an_end_that_was_not_reached_are_not(
    command: Command, tiny_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, monkey = tmp_path / "run", pytest.MonkeyPatch()

    def fail(*_: object) -> None:
        logging.getLogger("somewhere").warning("the clock jumps")
        msg = "the clock stands"
        raise LatencyError(msg)

    config = tiny_config(finetune__epochs=2, finetune__learning_rate=3.0, finetune__batch_size=24)
    with RunDisplay(quiet=True) as display:
        monkey.setattr("experiments.finish.time_in_turn", fail)
        with pytest.raises(LatencyError):
            start_run(config, run, ["secateur"], display, StopFlag())
        monkey.undo()
    done = command("resume", run, "--set", "finetune.learning_rate=0.001")

    assert done.code == 0
    warnings = RunOutcome.load(run / "results.json").warnings
    assert "the clock jumps" in warnings
    assert not [text for text in warnings if "fine-tuning lowered" in text]


def test_what_a_run_warned_of_is_in_its_log_its_results_and_its_report(
    command: Command, tiny_yaml: Path, tmp_path: Path
) -> None:
    options = ("--budget", "12%", "--methods", "uniform", "--json")
    done = command("search", tiny_yaml, *options, "--out", tmp_path / "run")

    (warning,) = (text for text in json.loads(done.out)["warnings"] if "search.reconstruct=true" in text)
    said = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert any(line.partition(" ")[2] == f"warning: {warning}" for line in said)
    assert any(re.fullmatch(r"\S+ dense accuracy: .+", line) for line in said)
    assert escape(warning) in (tmp_path / "run" / "report.html").read_text()


def test_runs_that_cannot_be_made_below_a_link_to_nothing_end_with_an_error(
    command: Command, tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to("nowhere")

    done = command("search", tiny_yaml)

    assert done.code == 1
    assert done.err.startswith("error: cannot make the run folder 'runs/tiny-1': File exists")


def test_refused_run_leaves_the_empty_folder_that_was_there(command: Command, tiny_yaml: Path, tmp_path: Path) -> None:
    for name in ("there", "new"):
        if name == "there":
            (tmp_path / name).mkdir()
        done = command("search", tiny_yaml, "--data", "nonsense", "--out", tmp_path / name)
        assert done.code == 1
        assert "unknown data source 'nonsense'" in done.err

    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["there"]
    assert not list((tmp_path / "there").iterdir())


def test_what_the_proof_refutes_is_named(command: Command) -> None:
    options = ("--shape", "1,8,8", "--classes", 3, "--set", "search.protect_first=false")
    done = command("check", "tests.experiments.tiny:ScaledByWidth", *options)
    assert "first: removing is not what silencing is: outputs differ by " in done.out


def test_signal_ends_a_search_after_the_evaluation_and_resume_continues_it(
    command: Command, tiny_yaml: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = ("--set", "search.reward=tests.experiments.tiny:reward_that_is_interrupted", "--out", run)
    stopped = command("search", tiny_yaml, *options)

    assert stopped.code == 130
    assert stopped.err.endswith(
        f"stopped by SIGINT; everything so far is saved: continue with 'secateur resume {run}'\n"
    )
    assert journal(run)
    assert command("resume", run).code == 0


@pytest.mark.parametrize(("ratio", "code"), [((1.1, 1.2, 1.3), 3), ((0.7, 0.71, 0.72), 0), ((0.7, 0.9, 1.1), 3)])
def test_a_search_that_has_to_be_faster_ends_with_code_3_where_it_is_not_for_sure(
    command: Command, tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch, ratio: tuple[float, float, float], code: int
) -> None:
    row = outcomes.row("uniform", 0.7, 0.8)
    latencies = tuple(latency.model_copy(update={"ratio": ratio}) for latency in row.latencies)
    found = outcomes.outcome(row.model_copy(update={"latencies": latencies}))
    monkeypatch.setattr("experiments.search.start_run", lambda *_: found)

    assert command("search", tiny_yaml).code == 0
    assert command("search", tiny_yaml, "--require-speedup").code == code


def test_path_without_permission_is_named(
    command: Command, tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_file = Path.is_file

    def refusing(path: Path) -> bool:
        if path.parent == Path("/home/other"):
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refusing)
    done = command("search", tiny_yaml, "--weights", "/home/other/w.pt", "--out", tmp_path / "run")

    assert done.code == 1
    assert "error: no permission for '/home/other/w.pt': grant it, or name another" in done.err


def test_mistyped_reward_and_choices_that_nothing_is_decided_by_are_refused(command: Command, tiny_yaml: Path) -> None:
    reward = command("search", tiny_yaml, "--set", "search.reward=acuracy")
    assert reward.code == 1
    assert "search.reward: unknown reward 'acuracy'; did you mean 'accuracy'? Allowed: accuracy, " in reward.err
    pattern = command("search", tiny_yaml, "--set", "search.sparsity=2:4")
    assert pattern.code == 1
    assert (
        "search.sparsity is 2:4, and search.decide names no density: add it to search.decide, or leave" in pattern.err
    )
    bits = command("search", tiny_yaml, "--set", "search.bits=[4, 8]")
    assert "search.bits is 4, 8, and search.decide names no bits, weight_bits or act_bits" in bits.err


def test_reward_function_that_is_not_there_is_refused_before_training(
    command: Command, tiny_yaml: Path, tmp_path: Path
) -> None:
    # A recipe of its own: nobody has trained by it before.
    options = ("--set", "search.reward=nowhere:reward", "--set", "train.learning_rate=0.0123")
    done = command("search", tiny_yaml, *options, "--out", tmp_path / "run")

    assert done.code == 1
    assert "no module 'nowhere' for 'nowhere:reward'" in done.err
    assert "train" not in done.err


def test_every_method_keeps_the_budget_and_pays_for_what_it_used(finished_run: Path) -> None:
    outcome = RunOutcome.load(finished_run / "results.json")

    assert all(row.macs <= outcome.cost_limit for row in outcome.rows[1:])
    # Four probes, two for the finalist (90 images where a candidate has 45), and plans for the rest of 12.
    assert outcome.row("random").evaluations == 12
    assert outcome.row("uniform").evaluations == 3


def test_readme_names_every_file_of_a_run(finished_run: Path) -> None:
    section = (Path(__file__).parents[2] / "README.md").read_text().split("## Files of a run\n")[1].split("\n## ")[0]
    named = [name for row in section.splitlines() for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    patterns = [f"{name}*".replace("NAME", "*") if name.endswith("/") else name.replace("NAME", "*") for name in named]

    files = [path.relative_to(finished_run) for path in finished_run.rglob("[!.]*") if path.is_file()]
    assert [str(file) for file in files if not any(fnmatch(str(file), pattern) for pattern in patterns)] == []


def test_report_is_rebuilt_from_what_was_saved(command: Command, finished_run: Path) -> None:
    before = (finished_run / "report.html").read_bytes()
    (finished_run / "report.html").unlink()

    done = command("report", finished_run)

    assert done.code == 0
    assert (finished_run / "report.html").read_bytes() == before


def test_run_whose_number_is_taken_meanwhile_takes_the_next(
    command: Command, tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots: list[Path] = []

    def start(_config: RunConfig, root: Path, *_others: object) -> RunOutcome:
        root.mkdir(parents=True)
        roots.append(root)
        if len(roots) == 1:
            raise RunExistsError
        return outcomes.outcome(outcomes.row("uniform", 0.7, 0.8))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.search.start_run", start)

    assert command("search", tiny_yaml).code == 0
    assert roots == [Path("runs/tiny-1"), Path("runs/tiny-2")]


def test_finished_run_is_resumed_at_once(command: Command, finished_run: Path) -> None:
    journal = (finished_run / "journal.jsonl").read_bytes()

    done = command("resume", finished_run, "--json")

    assert json.loads(done.out) == in_json(finished_run)
    assert (finished_run / "journal.jsonl").read_bytes() == journal


def with_ratio(run: Path, folder: Path, *ratio: float) -> Path:
    """A copy of a finished run whose networks all took so many times the dense one's time: quartiles of the ratio."""
    copy = shutil.copytree(run, folder)
    outcome = RunOutcome.load(copy / "results.json")
    rows = [
        row.model_copy(update={"latencies": tuple(t.model_copy(update={"ratio": ratio}) for t in row.latencies)})
        for row in outcome.rows
    ]
    (copy / "results.json").write_text(outcome.model_copy(update={"rows": tuple(rows)}).model_dump_json())
    return copy


@pytest.mark.parametrize(
    ("ratio", "code", "words"),
    [
        ((0.7, 0.71, 0.72), 0, ""),
        ((1.1, 1.2, 1.3), 3, "slower, 1.2 of the dense network's time (quartiles 1.1 to 1.3)"),
        (
            (0.9, 0.99, 1.1),
            3,
            "cannot be told from the dense network, 0.99 of the dense network's time (quartiles 0.9 to 1.1)",
        ),
    ],
)
def test_a_speedup_that_is_required_and_missing_ends_with_code_3(
    command: Command, finished_run: Path, tmp_path: Path, ratio: tuple[float, float, float], code: int, words: str
) -> None:
    run = with_ratio(finished_run, tmp_path / "run", *ratio)

    required, asked_for_nothing = command("resume", run, "--require-speedup"), command("resume", run)

    assert (required.code, asked_for_nothing.code) == (code, 0)
    timed = [(method, runtime) for method in ("uniform", "random") for runtime in ("pytorch-eager", "onnxruntime")]
    missing = [f"  {method} on {runtime}: {words}" for method, runtime in timed] if words else []
    assert [line for line in required.err.splitlines() if line.startswith("  ")] == missing
    assert ("Slower than the dense network on pytorch-eager: uniform takes 1.2 of" in asked_for_nothing.out) is (
        ratio[0] > 1
    )


@pytest.mark.parametrize(
    ("times_ms", "verdict", "code"),
    [((1.0, 1.1, 1.2), "faster", 0), ((2.1, 2.2, 2.3), "slower", 3), ((1.0, 2.0, 3.0), "unclear", 3)],
)
def test_apply_tells_the_speed_and_ends_with_code_3_where_it_is_required_and_missing(
    command: Command,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    times_ms: tuple[float, ...],
    verdict: str,
    code: int,
) -> None:
    def timed(runtime: str, ms: tuple[float, ...]) -> Latency:
        lower, median, upper = ms
        return Latency(runtime=runtime, median_ms=median, lower_quartile_ms=lower, upper_quartile_ms=upper, n_runs=3)

    runtimes = ("pytorch-eager", "onnxruntime")
    both = [timed(name, times_ms) for name in runtimes], [timed(name, (2.0, 2.0, 2.0)) for name in runtimes]
    monkeypatch.setattr("experiments.apply._times", lambda *_: both)
    policy = finished_run / "methods" / "random" / "policy.json"
    options = (finished_run / "config.yaml", "--weights", finished_run / "dense.safetensors", "--require-speedup")

    done = command("apply", policy, *options, "--out", tmp_path / "out", "--json")

    told = json.loads(done.out)
    assert {told[f"speed_on_{name}"]["verdict"] for name in runtimes} == {verdict}
    assert done.code == code
    assert ("no_speedup" in told, done.err.startswith("no speed-up:\n  the compressed network on ")) == (code == 3,) * 2


def test_speed_is_told_in_words_on_the_terminal_and_in_numbers_for_scripts(
    command: Command, tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"speed_on_onnxruntime": Speed("the compressed network", "onnxruntime", 0.7, 0.71, 0.72)}
    monkeypatch.setattr("experiments.apply.apply_saved", lambda *_: facts)

    words, numbers = (command("apply", "policy.json", tiny_yaml, *option).out for option in ([], ["--json"]))

    assert words == "speed on onnxruntime: faster, 0.71 of the dense network's time (quartiles 0.7 to 0.72)\n"
    assert json.loads(numbers) == {
        "speed_on_onnxruntime": {
            "verdict": "faster",
            "ratio": 0.71,
            "lower_quartile": 0.7,
            "upper_quartile": 0.72,
            "dense_runtime": "onnxruntime",
        }
    }


def test_policy_of_a_run_is_applied_to_the_same_network(command: Command, finished_run: Path, tmp_path: Path) -> None:
    policy, weights = finished_run / "methods" / "random" / "policy.json", finished_run / "dense.safetensors"

    done = command(
        "apply", policy, finished_run / "config.yaml", "--weights", weights, "--out", tmp_path / "out", "--json"
    )

    told, row = json.loads(done.out), RunOutcome.load(finished_run / "results.json").row("random")
    assert (told["macs"], told["params"]) == (row.macs, row.params)
    assert told["accuracy"] == row.validation_accuracy
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "model.onnx",
        "model.pt2",
        "model.safetensors",
        "policy.json",
    ]


def test_apply_says_that_it_does_not_fine_tune(command: Command, finished_run: Path, tmp_path: Path) -> None:
    policy, weights = finished_run / "methods" / "random" / "policy.json", finished_run / "dense.safetensors"
    options = (finished_run / "config.yaml", "--weights", weights, "--set", "finetune.epochs=2")

    done = command("apply", policy, *options, "--out", tmp_path / "out")

    assert (
        "finetune.epochs is 2, but 'secateur apply' does not fine-tune: pass the same configuration to 'secateur "
        f"finetune {tmp_path / 'out'}'\n"
    ) in done.err


@pytest.fixture(scope="module")
def agent_run(tiny_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("agent") / "run"
    config = tiny_config(search__methods=["ppo"], search__evaluations=16)
    with RunDisplay(quiet=True) as display:
        start_run(config, root, ["secateur"], display, StopFlag())
    return root


def apply_agent(command: Command, run: Path, yaml: Path, out: Path, *options: object) -> dict[str, Any]:
    """Apply the agent of a run to a network that it has not seen."""
    model = ["--model", "tests.experiments.tiny:deeper_network"]
    done = command("apply", run / "methods" / "ppo", yaml, *model, "--out", out, "--json", *options)
    assert done.code == 0, done.err
    return dict(json.loads(done.out))


def test_agent_of_channels_is_refused_where_bits_are_to_be_decided(
    command: Command, agent_run: Path, tiny_yaml: Path, tmp_path: Path
) -> None:
    agent, out = agent_run / "methods" / "ppo", tmp_path / "out"
    bits = ("--budget", "20% bytes", "--set", "search.decide=[channels, bits]")

    done = command("apply", agent, tiny_yaml, *bits, "--out", out)

    assert done.code == 1
    assert (
        f"error: the agent in '{agent / 'agent.pt'}' cannot plan here: it learned to decide channels and is to decide "
        "channels and bits here, but knows nothing of bits; train one with search.decide [channels, bits], or let this "
        "one decide with --set 'search.decide=[channels]'"
    ) in done.err
    assert not out.exists()


def test_agent_of_another_kind_of_budget_warns_with_both_named(
    command: Command, agent_run: Path, tiny_yaml: Path, tmp_path: Path
) -> None:
    done = command("apply", agent_run / "methods" / "ppo", tiny_yaml, "--budget", "50% params", "--out", tmp_path / "o")

    assert done.code == 0
    assert (
        "is not used as it was trained: it was trained under a budget of macs and plans under one of params here; "
        "train it with the same kind of budget"
    ) in done.err


def test_frozen_agent_plans_another_network(command: Command, agent_run: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    told = apply_agent(command, agent_run, tiny_yaml, tmp_path / "out")

    assert told["verdict"] == agent_verdict(told["accuracy"], told["uniform_accuracy"], 0)
    assert 0.4 * told["dense_macs"] < told["macs"] <= 0.5 * told["dense_macs"]
    policy = json.loads((tmp_path / "out" / "policy.json").read_text())
    assert set(policy["groups"]) <= {"3", "6", "9", "12"}


@pytest.mark.parametrize(
    ("accuracy", "evaluations", "verdict"),
    [
        (0.82, 0, "the agent's plan scores 2.00 points more than uniform pruning within the same budget"),
        (
            0.77,
            0,
            "the agent did not help: its plan scores 3.00 points less than uniform pruning within the same budget. "
            "Refine it with --evaluations (some), or search this network with 'secateur search', which tries uniform "
            "pruning too",
        ),
        (
            0.8,
            12,
            "the agent did not help: its plan scores as much as uniform pruning within the same budget. Refine it with "
            "--evaluations (more than 12), or search this network with 'secateur search', which tries uniform pruning "
            "too",
        ),
    ],
)
def test_agent_that_does_not_help_is_called_so(accuracy: float, evaluations: int, verdict: str) -> None:
    assert agent_verdict(accuracy, 0.8, evaluations) == verdict


def test_refined_agent_is_no_worse_than_the_frozen_one(
    command: Command, agent_run: Path, tiny_yaml: Path, tmp_path: Path
) -> None:
    scored_on_all = ["--set", "search.search_images=90"]
    frozen = apply_agent(command, agent_run, tiny_yaml, tmp_path / "frozen", *scored_on_all)
    refined = apply_agent(command, agent_run, tiny_yaml, tmp_path / "refined", *scored_on_all, "--evaluations", 12)

    assert refined["accuracy"] >= frozen["accuracy"]


def test_compressed_network_is_fine_tuned(command: Command, finished_run: Path, tmp_path: Path) -> None:
    source, model = finished_run / "methods" / "uniform" / "model", "tests.experiments.tiny:network"
    arguments = [source, finished_run / "config.yaml", "--model", model, "--epochs", "3", "--out", tmp_path / "out"]

    done = command("finetune", *arguments, "--json")

    told = json.loads(done.out)
    tuned = RunOutcome.load(finished_run / "results.json").row("uniform").tuned_validation_accuracy
    assert told["validation_accuracy_before"] == tuned
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in before.items()} == {
        name: tensor.shape for name, tensor in after.items()
    }
    assert not torch.equal(before["3.weight"], after["3.weight"])
    assert {"model.onnx", "model.pt2"} < {path.name for path in (tmp_path / "out").iterdir()}


def test_folder_of_a_method_is_fine_tuned_with_the_dense_network_as_teacher(
    command: Command, finished_run: Path, tmp_path: Path
) -> None:
    arguments = [finished_run / "methods" / "uniform", finished_run / "config.yaml", "--epochs", "1"]
    arguments += ["--model", "tests.experiments.tiny:network", "--set", "measure.onnx=false"]
    teacher = ["--set", "finetune.distillation_weight=1", "--weights", finished_run / "dense.safetensors"]

    taught = command("finetune", *arguments, *teacher, "--out", tmp_path / "taught")
    alone = command("finetune", *arguments, "--out", tmp_path / "alone")

    assert (taught.code, alone.code) == (0, 0), taught.err
    by_teacher, by_labels = (load_file(tmp_path / name / "model.safetensors") for name in ("taught", "alone"))
    assert not torch.equal(by_teacher["3.weight"], by_labels["3.weight"])


def larger_images() -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (pixels.repeat(1, 1, 1, 2), labels) for name, (pixels, labels) in tiny_images().items()}


def test_network_fine_tuned_on_images_of_another_size_is_exported_for_them(
    command: Command, finished_run: Path, tmp_path: Path
) -> None:
    arguments = [finished_run / "methods" / "uniform", finished_run / "config.yaml", "--epochs", "1"]
    arguments += ["--model", "tests.experiments.tiny:network", "--data", "tests.experiments.test_cli:larger_images"]

    done = command("finetune", *arguments, "--set", "measure.program=false", "--out", tmp_path / "out")

    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    assert done.code == 0, done.err
    assert session.get_inputs()[0].shape[1:] == [1, SIDE, 2 * SIDE]
    assert "3.weight" in load_compressed(tmp_path / "out", lambda: tiny_network(CLASSES, 1)).state_dict()


@pytest.mark.parametrize("changed", ["images", "teacher"])
def test_stopped_fine_tuning_is_continued_on_the_same_images_and_teacher_alone(
    tiny_config: Callable[..., RunConfig],
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: str,
) -> None:
    weights = Path(shutil.copy(finished_run / "dense.safetensors", tmp_path))
    config = tiny_config(
        finetune__epochs=2, finetune__distillation_weight=0.5, model__weights=str(weights), measure__onnx=False
    )

    def finetune(out: str, stop: StopFlag) -> dict[str, Any]:
        with RunDisplay(quiet=True) as display:
            return finetune_saved(finished_run / "methods" / "uniform", config, tmp_path / out, display, stop)

    with pytest.raises(Interrupted):
        finetune("stopped", StopAfter(1))
    if changed == "images":
        splits = tiny_images()
        others = splits | {"train": (255 - splits["train"][0], splits["train"][1])}
        monkeypatch.setattr("tests.experiments.tiny.images", lambda: others)
    else:
        save_file({name: tensor.flip(0) for name, tensor in load_file(weights).items()}, weights)
    finetune("stopped", StopFlag())
    finetune("fresh", StopFlag())

    stopped, fresh = (load_file(tmp_path / name / "model.safetensors") for name in ("stopped", "fresh"))
    assert stopped.keys() == fresh.keys()
    assert all(torch.equal(stopped[name], fresh[name]) for name in fresh)


def test_distillation_without_a_teacher_is_refused_before_training(
    command: Command, finished_run: Path, tmp_path: Path
) -> None:
    source, model = finished_run / "methods" / "uniform" / "model", "tests.experiments.tiny:network"
    arguments = [source, finished_run / "config.yaml", "--model", model, "--epochs", "1", "--out", tmp_path / "out"]

    done = command("finetune", *arguments, "--set", "finetune.distillation_weight=0.5")

    assert (done.code, done.err) == (
        1,
        "error: finetune.distillation_weight is 0.5, so the dense network is the teacher, and no weights of it are "
        "given; pass --weights (a run keeps them in RUN/dense.safetensors), or set finetune.distillation_weight to 0\n",
    )


@pytest.mark.parametrize("step", ["apply", "finetune", "train"])
def test_a_step_is_refused_where_another_process_makes_the_same(
    command: Command, finished_run: Path, tmp_path: Path, step: str
) -> None:
    own, out = finished_run / "methods" / "uniform", tmp_path / "out.safetensors"
    source = {"apply": [own / "policy.json"], "finetune": [own], "train": []}[step]

    with claimed(out):
        done = command(step, *source, finished_run / "config.yaml", "--out", out)

    assert (done.code, done.err.splitlines()[-1]) == (
        1,
        f"error: another process works on {out}; wait for it or stop it",
    )


@pytest.mark.parametrize(("evaluations", "cost"), [(0, ""), (5, "; evaluations are made anew")])
def test_stopped_apply_says_what_is_made_anew(
    command: Command, tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch, evaluations: int, cost: str
) -> None:
    def stopped(*_: object) -> dict[str, Any]:
        raise Interrupted("SIGINT")  # noqa: EM101

    monkeypatch.setattr("experiments.apply.apply_saved", stopped)

    done = command("apply", "agent.pt", tiny_yaml, "--evaluations", evaluations)

    assert (done.code, done.err.splitlines()[-1]) == (
        130,
        "stopped by SIGINT; no result is written, and the same command continues a training that was begun" + cost,
    )


def test_run_in_place_of_one_of_its_networks_is_told(command: Command, finished_run: Path, tmp_path: Path) -> None:
    done = command("finetune", finished_run, finished_run / "config.yaml", "--epochs", "1", "--out", tmp_path / "out")

    networks = ", ".join(str(finished_run / "methods" / name / "model") for name in ("dense", "random", "uniform"))
    assert (done.code, done.err) == (
        1,
        f"error: '{finished_run}' holds no compressed network (no manifest.json in it); name one of the run's: "
        f"{networks}\n",
    )


def test_folder_does_not_choose_what_code_runs(command: Command, finished_run: Path, tmp_path: Path) -> None:
    source, own = finished_run / "methods" / "uniform" / "model", tmp_path / "own.yaml"
    config = yaml.safe_load((finished_run / "config.yaml").read_text())
    del config["model"]
    own.write_text(yaml.safe_dump(config))

    done = command("finetune", source, own, "--epochs", "1", "--out", tmp_path / "out")

    assert (done.code, done.err) == (
        1,
        f"error: '{source}' was made from 'tests.experiments.tiny:network'; a file must not choose what code runs, so "
        "pass --model tests.experiments.tiny:network if you trust it\n",
    )
    # A configuration that is handed in is the user's word.
    named = command("finetune", source, finished_run / "config.yaml", "--epochs", "1", "--out", tmp_path / "out")
    assert named.code == 0


def test_training_writes_weights_that_a_search_takes(command: Command, tiny_yaml: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"

    trained = command("train", tiny_yaml, "--out", weights, "--json")
    done = command(
        "search", tiny_yaml, "--weights", weights, "--methods", "uniform", "--out", tmp_path / "run", "--json"
    )

    assert done.code == 0
    dense = RunOutcome.load(tmp_path / "run" / "results.json").row("dense")
    assert dense.validation_accuracy == json.loads(trained.out)["validation_accuracy"]


def test_check_tells_groups_reachable_cost_and_proof(command: Command) -> None:
    done = command("check", "tests.experiments.tiny:network", "--shape", "1,8,8", "--classes", "3")

    lines = done.out.splitlines()
    assert done.code == 0
    # 64 x 6 x 9 + 16 x (16 x 6 + 16 x 16 + 12 x 16) x 9 + 12 x 3, counted by hand.
    assert lines[1].split() == ["multiply-adds", "81.83k"]
    assert lines[-1].split(maxsplit=1) == ["proof", "removing equals masking in 5 of 5 trials"]
    assert any(line.startswith("  14: 3 units: ") for line in lines)


def test_check_tells_what_a_search_decides_from_what_it_spares(command: Command) -> None:
    done = command("check", "tests.experiments.tiny:network", "--shape", "1,8,8", "--classes", "3")

    lines = done.out.splitlines()
    decided = lines.index("groups decided  3 by a search, with 44 units")
    spared = lines.index(
        "groups spared   1 of the first layer (search.protect_first) or in search.protected, with 6 units"
    )
    assert [line.split(":")[0] for line in lines[decided + 1 : spared]] == ["  3", "  6", "  9"]
    assert lines[spared + 1].startswith("  0: 6 units, ")


def test_check_as_json_names_every_group(command: Command) -> None:
    done = command("check", "tests.experiments.tiny:network", "--shape", "1,8,8", "--classes", "3", "--json")

    told = json.loads(done.out)
    assert [(group["name"], group["size"], group["decided"]) for group in told["groups"]] == [
        ("0", 6, False),
        ("3", 16, True),
        ("6", 16, True),
        ("9", 12, True),
        ("14", 3, False),
    ]
    assert told["passed"] is True


def test_check_heeds_a_budget_among_the_settings_and_refuses_what_it_does_not_heed(command: Command) -> None:
    network = ("check", "tests.experiments.tiny:network", "--shape", "1,8,8", "--classes", "3")

    refused = command(*network, "--set", "budget=1%")
    assert command(*network, "--budget", "none", "--set", "search.for_transfer=true").code == 0
    unheeded = command(*network, "--set", "model.weights=a.safetensors", "--set", "search.seed=3")

    assert refused.code == 1 and "budget refused" in refused.out
    assert (unheeded.code, unheeded.err) == (
        1,
        "error: --set model.weights, search.seed: check heeds budget, latency.* and search.* alone, and has --weights "
        "and --seed\n",
    )


def test_check_goes_by_the_settings_of_a_search(command: Command) -> None:
    network = ("check", "tests.experiments.tiny:network", "--shape", "1,8,8", "--classes", "3", "--json")
    usual, other = (
        json.loads(command(*network, *options).out)
        for options in (
            (),
            ("--rounding", "8", "--set", "search.protect_first=false", "--set", "search.protected=['3']"),
        )
    )

    assert [group["name"] for group in usual["groups"] if group["decided"]] == ["3", "6", "9"]
    assert [group["name"] for group in other["groups"] if group["decided"]] == ["0", "6", "9"]
    assert other["lowest"]["macs"] > usual["lowest"]["macs"]
    assert command(*network, "--set", "search.protected=[stem]").err == (
        "error: protected names no channel group of this network: ['stem']; groups are ['0', '14', '3', '6', '9']\n"
    )


def mute(num_classes: int) -> nn.Module:
    """A network that says nothing, and tells so when it is built."""
    sys.stdout.write("built\n")
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Threshold(float("inf"), 0.0), nn.Conv2d(4, num_classes, 3))


def test_json_of_check_is_json_whatever_was_found_and_printed(command: Command) -> None:
    done = command("check", "tests.experiments.test_cli:mute", "--shape", "1,8,8", "--classes", "3", "--json")

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    told = json.loads(done.out, parse_constant=refuse)
    assert (done.code, told["passed"]) == (1, False)
    assert told["proof"][0]["error"] is None
    assert told["proof"][0]["message"] == "the outputs hardly depend on the inputs: nothing to compare"
    assert "built" in done.err


def test_shape_that_is_none_is_told(command: Command) -> None:
    done = command("check", "resnet20", "--shape", "32,")

    assert (done.code, done.err) == (
        1,
        "error: shape '32,' is not understood; give channels, height and width, for example 3,224,224 (of a signal "
        "channels and length)\n",
    )


def test_split_divides_by_the_numbers_in_the_names(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "images" / "test" / "cat"
    folder.mkdir(parents=True)
    for number in range(4):
        Image.new("L", (4, 4)).save(folder / f"{number:02d}.png")

    done = command("split", tmp_path / "images", "--out", tmp_path)
    for_scripts = command("split", tmp_path / "images", "--out", tmp_path, "--json")

    assert done.out.splitlines() == [str(tmp_path / "test-even.txt"), str(tmp_path / "test-odd.txt")]
    assert json.loads(for_scripts.out) == done.out.splitlines()
    assert (tmp_path / "test-even.txt").read_text().split() == ["cat/00.png", "cat/02.png"]


def test_help_names_the_defaults_of_the_configuration() -> None:
    config, options = RunConfig(), {option.name: option.help for option in get_command(app).commands["search"].params}
    of_search, others = config.search, {"greedy", "knapsack"}

    assert f"{config.model.name} (default)" in options["model"]
    assert f"{config.data.source} (default)" in options["data"]
    assert options["budget"].startswith(f"{config.budget[0].share:.0%} (default), 30% params")
    assert f"; {of_search.evaluations} by default" in options["evaluations"]
    assert f"{of_search.environment} (default: " in options["environment"]
    assert f"{of_search.criterion} (default)" in options["criterion"]
    assert ("not by default" in options["reconstruct"]) is not of_search.reconstruct
    assert f"; {of_search.seed} by default" in options["seed"]
    assert f"{config.device} (default)" in options["device"]
    assert of_search.rounding is None and "by default 8 from 128 on, else 1" in options["rounding"]
    assert f"{config.threads} (default)" in options["threads"]
    assert f"{config.finetune.epochs} (default)" in options["finetune_epochs"]
    assert set(METHODS) == {*of_search.methods, *others}
    assert options["methods"].endswith("by default all but greedy and knapsack.")
    train = {option.name: option.help for option in get_command(app).commands["train"].params}
    assert f"; {config.train.epochs} by default" in train["epochs"]
