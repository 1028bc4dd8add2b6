import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from agent.checkpoint import read_state
from envs.journal import Journal, JournalEntry
from envs.network_env import NetworkEnv
from experiments.config import RunConfig, load_config
from experiments.data import ImageData
from experiments.finish import evaluated_plans
from experiments.images import DataError, ImageSplit
from experiments.interrupt import Interrupted, StopFlag
from experiments.outcome import RunOutcome
from experiments.problem import PROBES
from experiments.progress import RunDisplay
from experiments.run import RunBusyError, RunError, RunFolder
from experiments.search import create_run, resume_run, start_run
from pruning.policy import CompressionPolicy
from tests.event_files import Series, hyperparameters, scalars

from .stopping import StopAfter, StopWhen
from .tiny import images as tiny_images

Configured = Callable[..., RunConfig]
AGENT_RUN = {
    "search__methods": ["random", "cem", "ppo", "ddpg"],
    "search__evaluations": 40,
    "search__measured_dropout": 0.5,
    "finetune__epochs": 2,
    # Wide noise, so that new plans go on coming, and checkpoints among them.
    **{f"{agent}__std": 0.8 for agent in ("ppo", "ddpg")},
    **{f"{agent}__std_end": 0.5 for agent in ("ppo", "ddpg")},
    **{f"{agent}__rollout": 6 for agent in ("ppo", "ddpg")},
    **{f"{agent}__checkpoint_every": 4 for agent in ("ppo", "ddpg")},
}

KILLED = """
import os, signal, sys, threading
from pathlib import Path
from experiments.interrupt import StopFlag
from experiments.progress import RunDisplay
from experiments.search import resume_run
killer = threading.Timer(float(sys.argv[2]), os.kill, (os.getpid(), signal.SIGKILL))
killer.daemon = True
killer.start()
with RunDisplay(quiet=True) as display:
    resume_run(Path(sys.argv[1]), display, StopFlag())
"""


def search(config: RunConfig, root: Path, stop: StopFlag | None = None) -> RunOutcome:
    with RunDisplay(quiet=True) as display:
        return start_run(config, root, ["secateur", "search"], display, stop or StopFlag())


def resume(root: Path, stop: StopFlag | None = None) -> RunOutcome:
    with RunDisplay(quiet=True) as display:
        return resume_run(root, display, stop or StopFlag())


def timeless(root: Path) -> dict[str, Any]:
    """Everything that a run found, without clock readings."""
    outcome = RunOutcome.load(root / "results.json").model_dump()
    clocks = {"seconds", "seconds_evaluating", "latencies", "probe_seconds", "machine"}
    journal = [json.loads(line) for line in (root / "journal.jsonl").read_text().splitlines()]
    return {
        "rows": [{k: v for k, v in row.items() if k not in clocks} for row in outcome["rows"]],
        "journal": [{k: v for k, v in entry.items() if k not in clocks} for entry in journal],
        "policies": {p.parent.name: p.read_text() for p in root.glob("methods/*/policy.json")},
        "weights": {p.parent.name: p.read_bytes() for p in root.glob("methods/*/tuned.safetensors")},
        "agents": {p.parent.name: agent_weights(p) for p in root.glob("methods/*/agent.pt")},
        "curves": curves(root / "tensorboard"),
    }


def agent_weights(path: Path) -> dict[str, Any]:
    """Weights of a trained agent."""
    return {name: tensor.tolist() for name, tensor in read_state(path)["policy"].items()}


def curves(root: Path) -> dict[str, list[str]]:
    """Every curve in TensorBoard, by folder and tag; as text, so that NaN equals NaN."""
    folders = {path.parent for path in root.rglob("events.out.tfevents.*")}
    series = {f"{folder.relative_to(root)}: {tag}": s for folder in folders for tag, s in scalars(folder).items()}
    # The final numbers are no curves: they are those of the rows.
    return {name: [str(point) for point in s] for name, s in series.items() if ": result/" not in name}


def curve(root: Path, method: str, tag: str) -> Series:
    """Steps and values of one scalar of one method."""
    return scalars(root / "tensorboard" / method)[tag]


def test_same_configuration_gives_the_same_run(tiny_config: Configured, tmp_path: Path) -> None:
    config = tiny_config(finetune__epochs=1)
    search(config, tmp_path / "one")
    search(config, tmp_path / "two")

    assert timeless(tmp_path / "one") == timeless(tmp_path / "two")


def test_agents_can_be_shown_sensitivities_without_starting_from_them(
    tiny_config: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []
    monkeypatch.setattr(
        "experiments.agents.NetworkEnv", lambda *args, **options: shown.append(options) or NetworkEnv(*args, **options)
    )
    methods = ["random", "ddpg"]
    outcome = search(
        tiny_config(search__start="uniform", search__show_sensitivity=True, search__methods=methods), tmp_path / "run"
    )

    # Three groups and the whole network: the agent pays for what it sees, and nobody else does.
    assert outcome.probe_evaluations == 4
    assert [options["sensitivity"] is None for options in shown] == [False]
    entries = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    candidates = {m: [e for e in entries if (e["searcher"], e["purpose"]) == (m, "candidate")] for m in methods}
    assert len(candidates["ddpg"]) <= len(candidates["random"]) - 4
    assert candidates["random"][0]["kept"] == candidates["ddpg"][0]["kept"]


def test_run_whose_budget_all_plans_keep_scores_the_one_that_is_left(tiny_config: Configured, tmp_path: Path) -> None:
    root, methods = tmp_path / "run", ["uniform", "magnitude", "knapsack", "random", "cem", "ppo", "ddpg"]
    options = {"search__decide": ["channels", "bits"], "search__evaluations": 40, "search__methods": methods}
    outcome = search(tiny_config(budget="80% bytes", **options), root)

    # Eight bits in every layer lose nothing here, and leave most of the budget.
    policy, *others = [CompressionPolicy.load(root / "methods" / method / "policy.json") for method in methods]
    assert others == [policy] * (len(methods) - 1)
    assert not policy.kept
    assert {layer.weight_bits for layer in policy.layers.values()} == {8}
    candidates = [entry for entry in Journal(root / "journal.jsonl").entries() if entry.purpose == "candidate"]
    assert [entry.searcher for entry in candidates] == methods
    log, report = (root / "log.txt").read_text(), (root / "report.html").read_text()
    assert outcome.bits_note.startswith("quantized, with all of its channels, the network loses ")
    assert outcome.bits_note in log
    assert outcome.bits_note[1:] in report
    assert "Everything on offer keeps the budget: there is one plan, and nothing was searched for." in report
    for method in methods:
        assert f"{method}: everything on offer keeps the budget: there is one plan" in log
    assert not list(root.glob("methods/*/agent.pt"))


@pytest.mark.parametrize("environment", ["network", "layerwise"])
def test_agents_decide_channels_alone_where_single_precision_buys_nothing(
    tiny_config: Configured, tmp_path: Path, environment: str
) -> None:
    root, methods = tmp_path / "run", ["ppo", "ddpg"]
    options = AGENT_RUN | {"search__decide": ["channels", "bits"], "search__methods": methods, "finetune__epochs": 0}
    outcome = search(tiny_config(budget="20% bytes", search__environment=environment, **options), root)

    assert outcome.bits_note
    for method in methods:
        plans = [entry for entry in Journal(root / "journal.jsonl").entries(method) if entry.purpose == "candidate"]
        bits = {entry["weight_bits"] for plan in plans for entry in plan.layers.values()}
        assert bits == {8}
        assert {len(plan.layers) for plan in plans} == {5}
        assert len({tuple(plan.kept.items()) for plan in plans}) == len(plans) > 10
        assert read_state(root / "methods" / method / "agent.pt")["training"]["task"]["bits"] == (8,)


def test_resumed_agent_tells_all_of_its_search(
    tiny_config: Configured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(**AGENT_RUN | {"search__methods": ["ppo"], "finetune__epochs": 0})

    def told(root: Path, looks: int) -> str:
        capsys.readouterr()
        with RunDisplay() as display:
            if looks:
                with pytest.raises(Interrupted):
                    start_run(config, root, ["secateur"], RunDisplay(quiet=True), StopAfter(looks))
                assert list(root.glob("methods/ppo/checkpoints/*"))
                resume_run(root, display, StopFlag())
            else:
                start_run(config, root, ["secateur"], display, StopFlag())
        line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("ppo: "))
        evaluations, _, best = line.partition(" in ")
        return f"{evaluations} {best.split(', ')[1]}"

    assert told(tmp_path / "resumed", 25) == told(tmp_path / "straight", 0)


def test_methods_that_use_no_probes_make_none(tiny_config: Configured, tmp_path: Path) -> None:
    outcome = search(tiny_config(search__methods=["uniform", "magnitude"]), tmp_path / "run")

    entries = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    assert {entry["searcher"] for entry in entries if entry["purpose"] == "candidate"} == {"uniform", "magnitude"}
    assert [entry for entry in entries if entry["searcher"] == PROBES] == []
    assert outcome.probe_evaluations == 0


@pytest.mark.parametrize(
    ("options", "methods", "told"),
    [
        (
            {"search.decide": ["density"]},
            ("uniform", "sensitivity", "random", "cem", "ppo", "ddpg"),
            "search.methods: magnitude is left out, as it ranks channels, and search.decide names none\n",
        ),
        ({"search.decide": ["density"], "search.methods": ["magnitude"]}, ("magnitude",), ""),
        (
            {"search.decide": ["channels", "density"]},
            ("uniform", "magnitude", "sensitivity", "random", "cem", "ppo", "ddpg"),
            "",
        ),
    ],
)
def test_methods_that_nobody_chose_rank_no_channels_where_none_are_decided(
    options: dict[str, Any], methods: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    text = io.StringIO()
    with RunDisplay(Console(file=text, width=200)) as display:
        folder = create_run(load_config(None, {"threads": 1} | options), tmp_path / "run", [], display)

    assert folder.config.search.methods == methods
    assert text.getvalue() == told


def test_other_seed_gives_another_search(tiny_config: Configured, tmp_path: Path) -> None:
    search(tiny_config(), tmp_path / "one")
    # The same network: what differs is what is searched.
    weights = str(RunFolder(tmp_path / "one").dense_file)
    for name, seed in (("again", 0), ("two", 1)):
        search(tiny_config(search__seed=seed, model__weights=weights), tmp_path / name)

    def plans(name: str) -> list[dict[str, int]]:
        entries = Journal(tmp_path / name / "journal.jsonl").entries("random")
        return [dict(entry.kept) for entry in entries if entry.purpose == "candidate"]

    assert plans("one") == plans("again") != plans("two")


def test_run_stopped_at_any_step_goes_on_to_the_same_end(tiny_config: Configured, tmp_path: Path) -> None:
    config = tiny_config(finetune__epochs=2)
    search(config, tmp_path / "whole")

    with pytest.raises(Interrupted) as caught:
        search(config, tmp_path / "stopped", StopAfter(9))
    looks = 1
    while True:
        try:
            resume(tmp_path / "stopped", StopAfter(looks))
            break
        except Interrupted:
            looks += 3

    assert str(caught.value) == (
        f"stopped by SIGTERM; everything so far is saved: continue with 'secateur resume {tmp_path / 'stopped'}'"
    )
    assert timeless(tmp_path / "stopped") == timeless(tmp_path / "whole")


def test_checkpoints_are_gone_once_a_search_is_written_and_none_is_needed_later(
    tiny_config: Configured, tmp_path: Path
) -> None:
    options = {"search__evaluations": 30, "ppo__rollout": 4, "ppo__checkpoint_every": 4}
    folder = RunFolder(tmp_path / "run")
    own = folder.method("ppo")
    with pytest.raises(Interrupted):
        search(
            tiny_config(search__methods=["ppo"], **options),
            folder.root,
            StopWhen(lambda: any(own.checkpoints.glob("*.pt"))),
        )
    shutil.copytree(own.checkpoints, tmp_path / "kept")
    resume(folder.root)
    found = timeless(folder.root)
    assert not own.checkpoints.exists()

    # As a run leaves them that is killed right after it wrote what its search found.
    folder.results_file.unlink()
    shutil.copytree(tmp_path / "kept", own.checkpoints)
    resume(folder.root)
    assert not own.checkpoints.exists()
    assert timeless(folder.root) == found

    # What the user is told to do about a damaged file: the whole search is played again from the journal.
    folder.results_file.unlink()
    own.search_file.unlink()
    resume(folder.root)
    assert timeless(folder.root) == found


def test_tensorboard_shows_each_evaluation_once_after_a_stop(tiny_config: Configured, tmp_path: Path) -> None:
    config = tiny_config()
    search(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        search(config, tmp_path / "stopped", StopAfter(8))
    resume(tmp_path / "stopped")

    for tag in ("evaluation/accuracy", "evaluation/best_reward", "evaluation/cost"):
        assert curve(tmp_path / "stopped", "random", tag) == curve(tmp_path / "whole", "random", tag)


def test_methods_are_compared_at_equal_numbers_from_the_same_start(tiny_config: Configured, tmp_path: Path) -> None:
    methods = ["sensitivity", "random", "cem", "ppo", "ddpg"]
    config = tiny_config(**AGENT_RUN | {"search__methods": methods, "search__evaluations": 12, "finetune__epochs": 0})
    outcome = search(config, tmp_path / "run")
    journal = timeless(tmp_path / "run")["journal"]

    def first_plan(searcher: str) -> dict[str, int]:
        return next(e["kept"] for e in journal if (e["searcher"], e["purpose"]) == (searcher, "candidate"))

    for method in methods[1:]:
        assert first_plan(method) == first_plan("sensitivity")
        assert outcome.row(method).evaluations == 12


def test_search_reads_no_test_image(tiny_config: Configured, tmp_path: Path) -> None:
    outcome = search(tiny_config(data__source="tests.experiments.tiny:images_without_test"), tmp_path / "run")

    assert outcome.n_test == 0
    assert outcome.row("random").test_accuracy is None
    assert outcome.row("random").validation_accuracy is not None


def test_a_broken_test_split_ends_the_run_and_mended_it_goes_on(
    tiny_config: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: ImageData) -> ImageSplit:
        msg = "the image 'test/0/7.png' is broken"
        raise DataError(msg)

    with monkeypatch.context() as patched:
        patched.setattr(ImageData, "test", property(broken))
        with pytest.raises(DataError, match=r"7\.png") as caught:
            search(tiny_config(), tmp_path / "run")
    # Everything is chosen, trained and saved by then.
    for method in ("uniform", "random"):
        own = RunFolder(tmp_path / "run").method(method)
        assert own.search_file.exists() and (own.model / "manifest.json").exists()
    assert caught.value.__notes__ == [f"everything before is saved: continue with 'secateur resume {tmp_path / 'run'}'"]
    assert not RunFolder(tmp_path / "run").results_file.exists()

    with RunDisplay(quiet=True) as display:
        outcome = resume_run(tmp_path / "run", display, StopFlag())

    assert outcome.row("random").test_accuracy is not None


@pytest.mark.parametrize("name", ["train", "validation"])
def test_a_run_is_not_continued_on_other_images(
    tiny_config: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with pytest.raises(Interrupted):
        search(tiny_config(), tmp_path / "run", StopWhen(RunFolder(tmp_path / "run").dense_file.exists))
    images, labels = tiny_images()[name]
    changed = {**tiny_images(), name: (255 - images, labels)}
    with monkeypatch.context() as patched:
        patched.setattr("tests.experiments.tiny.images", lambda: changed)
        with pytest.raises(RunError) as caught:
            resume(tmp_path / "run")

    assert str(caught.value) == (
        f"the training or validation images of {tmp_path / 'run'} are others than when it was begun, and its "
        "evaluations would not compare with new ones; put those images back, or start a new run"
    )
    assert resume(tmp_path / "run").row("random").evaluations == 12


def test_a_run_that_does_not_say_on_which_images_it_was_begun_is_not_continued(
    tiny_config: Configured, tmp_path: Path
) -> None:
    file = RunFolder(tmp_path / "run").dense_file
    with pytest.raises(Interrupted):
        search(tiny_config(), tmp_path / "run", StopWhen(file.exists))
    save_file(load_file(file), file)

    with pytest.raises(RunError) as caught:
        resume(tmp_path / "run")
    assert str(caught.value) == (
        f"'{file}' does not say on which images the run was begun: it was changed, or written by another version of "
        "secateur; put it back, or start a new run"
    )


def test_what_a_damaged_file_of_a_run_held_is_made_again(tiny_config: Configured, tmp_path: Path) -> None:
    outcome = search(tiny_config(finetune__epochs=1, finetune__dense_control=False), tmp_path / "run")
    folder, before = RunFolder(tmp_path / "run"), timeless(tmp_path / "run")
    folder.results_file.unlink()
    own = folder.method("random")
    again = f"'secateur resume {folder.root}' makes it again"
    todo = {
        own.search_file: f"Invalid JSON: EOF while parsing a value at line 1 column 0; delete it, and {again} from the "
        "evaluations in the journal",
        folder.importance_file: f"Error while deserializing header: header too small; delete it, and {again}",
        own.tuned_file: "Error while deserializing header: header too small; delete it, and 'secateur resume' "
        "fine-tunes the network again",
    }

    for file, told in todo.items():
        file.write_bytes(b"")
        with pytest.raises(RunError) as caught:
            resume(folder.root)
        assert str(caught.value) == f"cannot read '{file}': {told}"
        file.unlink()

    assert resume(folder.root).row("random").validation_accuracy == outcome.row("random").validation_accuracy
    assert timeless(folder.root) == before


def test_resuming_a_finished_run_needs_neither_images_nor_network(
    tiny_config: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = search(tiny_config(), tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    folder.report_file.unlink()
    monkeypatch.setattr("experiments.search._execute", None)

    with RunDisplay(quiet=True) as display:
        assert resume_run(folder.root, display, StopFlag()) == outcome

    assert folder.report_file.exists()


def test_a_run_that_another_process_works_on_is_not_removed(
    tiny_config: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: object) -> RunOutcome:
        msg = "another process works here"
        raise RunBusyError(msg)

    monkeypatch.setattr("experiments.search.resume_run", busy)
    with pytest.raises(RunBusyError):
        search(tiny_config(), tmp_path / "run")

    assert RunFolder(tmp_path / "run").config_file.exists()


def test_figures_show_what_was_scored_and_no_comparison_of_outputs() -> None:
    journal = Journal()
    scored = JournalEntry(0, "cem", 0, "candidate", "a", {}, 1.0, 0.7, 10, 0.1, 1.0)
    journal.append(scored)
    journal.append(replace(scored, index=1, purpose="comparison", digest="b", accuracy=0.0, divergence=0.3))
    journal.append(replace(scored, index=2, purpose="dense", digest="dense"))

    assert [plan.accuracy for plan in evaluated_plans(journal)] == [0.7]


def test_resume_warns_of_another_number_of_threads(
    tiny_config: Configured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Interrupted):
        search(tiny_config(), tmp_path / "run", StopAfter(3))
    folder = RunFolder(tmp_path / "run")
    folder.machine_file.write_text(folder.machine.model_copy(update={"threads": 64}).model_dump_json())

    with RunDisplay() as display:
        outcome = resume_run(folder.root, display, StopFlag())

    assert "warning: threads was 64 and is 1; the continued run may differ from an uninterrupted one" in (
        capsys.readouterr().err
    )
    assert (outcome.machine.threads, outcome.timed_threads) == (64, 1)
    assert "<dt>continued</dt><dd>threads was 64 and is 1</dd>" in folder.report_file.read_text()


@pytest.mark.parametrize(
    ("options", "is_told"),
    [
        ({"budget": "12%"}, True),
        ({"budget": "12%", "search__reconstruct": True}, False),
        ({"budget": "90%"}, False),
    ],
    ids=["little is left", "plans are repaired", "much is left"],
)
def test_first_plan_that_leaves_little_accuracy_is_warned_about(
    tiny_config: Configured, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], is_told: bool
) -> None:
    root = tmp_path / "run"
    with RunDisplay() as display:
        start_run(tiny_config(**options), root, ["secateur", "search"], display, StopFlag())

    warned = [line for line in capsys.readouterr().err.splitlines() if "search.reconstruct=true" in line]
    assert len(warned) == is_told
    if is_told:
        found = RunOutcome.load(root / "results.json").row("uniform").search_accuracy
        (dense,) = (
            entry.accuracy
            for entry in Journal(root / "journal.jsonl").entries(PROBES)
            if entry.purpose == "probe" and not entry.kept
        )
        told = f"uniform's plan is right on {found:.1%} of the search images, the dense network on {dense:.1%}: "
        assert warned[0].startswith(f"warning: {told}")


def test_hyperparameters_are_shown_once_with_the_final_metrics(tiny_config: Configured, tmp_path: Path) -> None:
    search(tiny_config(finetune__epochs=1, finetune__dense_control=False), tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    folder.results_file.unlink()
    row = resume(folder.root).row("random")

    accuracies = ["search", "validation", "tuned_validation", "test", "tuned_test"]
    names = [
        *(f"{name}_accuracy" for name in accuracies),
        "cost",
        "macs",
        "params",
        "size_bytes",
        "evaluations",
        "seconds",
    ]
    shown = scalars(folder.tensorboard / "random")
    assert {tag: series for tag, series in shown.items() if tag.startswith("result/")} == {
        f"result/{name}": [(0, pytest.approx(getattr(row, name)))] for name in names
    }
    assert hyperparameters(folder.tensorboard / "random").items() >= {
        ("model", "tests.experiments.tiny:network"),
        ("data", "tests.experiments.tiny:images"),
        ("budget", "at most 50 % of its MACs"),
        ("search.evaluations", 12.0),
        ("finetune.epochs", 1.0),
    }


def test_live_curves_are_the_first_cards_of_tensorboard(tiny_config: Configured, tmp_path: Path) -> None:
    search(tiny_config(search__methods=["uniform", "ppo"], search__evaluations=12), tmp_path / "run")
    folders = {path.parent for path in (tmp_path / "run").rglob("events.out.tfevents.*")}
    tags = sorted({tag for folder in folders for tag in scalars(folder)})

    assert tags[:4] == [f"evaluation/{name}" for name in ("accuracy", "best_reward", "cost", "reward")]


@pytest.mark.slow
@pytest.mark.parametrize("environment", ["network", "layerwise"])
def test_run_killed_at_random_moments_goes_on_to_the_same_end(
    environment: str, tiny_config: Configured, tmp_path: Path
) -> None:
    config = tiny_config(**AGENT_RUN, search__environment=environment)
    search(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        search(config, tmp_path / "killed", StopAfter(1))
    moments = random.Random(0)

    n_kills, resumed = 0, set()
    while True:
        # Later and later, so that a slow machine gets to the end too.
        seconds = moments.uniform(0.1, 0.8) * (1 + (n_kills / 4) ** 2)
        arguments = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), str(seconds)]
        done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ, check=False)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        n_kills += 1
        resumed |= {path.parents[1].name for path in (tmp_path / "killed/methods").glob("*/checkpoints/*.pt")}

    assert n_kills >= 3
    assert resumed  # some kill left checkpoints to go on from
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")
