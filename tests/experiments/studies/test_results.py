import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import typer
from safetensors.torch import save_file

from experiments.config import RunConfig
from experiments.data import DataError
from experiments.interrupt import StopFlag
from experiments.methods import MethodSearch
from experiments.models import build_model
from experiments.outcome import RunOutcome
from experiments.progress import RunDisplay
from experiments.run import RunBusyError, RunFolder, locked
from experiments.studies import records, results
from experiments.studies.matrix import JOINT_METHODS, Cell, matrix
from experiments.studies.results import Sitting
from experiments.studies.results_cells import interval, spread
from experiments.studies.results_page import render_page
from latency.budget import BudgetError
from pruning.layer_policy import LayerPolicy
from pruning.policy import CompressionPolicy

from ..outcomes import MACHINE, outcome, row
from ..tiny import CLASSES

CELLS = {cell.name: cell for cell in matrix("ppo")}
NAMES = list(CELLS)
MODEL = "methods/ppo/model/model.onnx"
SEARCH, APPLIED = (CELLS[name] for name in ("resnet56-ppo-seed0", "transfer-resnet56"))


def finish(root: Path, name: str, judged: dict[str, str], **accuracies: float) -> None:
    """Write the result of one cell as a run does."""
    rows = [row(method, accuracy, accuracy + 0.1) for method, accuracy in accuracies.items()]
    (root / name).mkdir(parents=True)
    (root / name / "results.json").write_text(outcome(*rows).model_dump_json())
    for method, digits in judged.items():
        folder = RunFolder(root / name).method(method)
        folder.root.mkdir(parents=True)
        folder.judged_file.write_text(digits)


def sitting_at(root: Path) -> Sitting:
    """A sitting with weights and lists of images, but without the images."""
    for path in ("models/resnet56-cifar10.safetensors", "lists/test-even.txt", "lists/test-odd.txt"):
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).touch()
    return Sitting(root, root / "records", root / "no-images", root / "models", "ppo")


def carry_out(sitting: Sitting, cell: Cell) -> None:
    with RunDisplay(quiet=True) as display:
        sitting.carry_out(cell, display, StopFlag())


def section(page: str, title: str) -> list[str]:
    """Lines of one section of the page."""
    return page.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()


def test_matrix_holds_every_method_and_seed_once_and_the_most_telling_first() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert NAMES[:3] == ["resnet56-uniform-seed0", "resnet56-sensitivity-seed0", "resnet56-magnitude-seed0"]
    assert [f"tuned-resnet20-seed{seed}" in NAMES for seed in range(6)] == [True] * 5 + [False]
    assert NAMES.index("resnet18_cifar-joint") == NAMES.index("tuned-resnet56-dense-seed0") + 1


@pytest.mark.parametrize("cell", [SEARCH, APPLIED], ids=lambda cell: cell.name)
def test_a_cell_is_kept_from_a_second_sitting(tmp_path: Path, cell: Cell) -> None:
    sitting, mine = sitting_at(tmp_path), tmp_path / cell.name / "network"
    mine.mkdir(parents=True)

    with (
        locked(tmp_path / f".{cell.name}.lock", ""),
        pytest.raises(RunBusyError, match=f"^another process works on cell {cell.name}; wait for it or stop it$"),
    ):
        carry_out(sitting, cell)

    assert mine.exists()


def test_the_weights_of_a_network_are_kept_from_a_second_sitting(tmp_path: Path) -> None:
    message = "^another process works on the weights and the table of resnet56; wait for it or stop it$"
    with locked(tmp_path / ".resnet56.lock", ""), pytest.raises(RunBusyError, match=message):
        carry_out(sitting_at(tmp_path), SEARCH)

    assert not (tmp_path / SEARCH.name).exists()


def test_a_cell_that_another_sitting_has_finished_is_not_done_again(tmp_path: Path) -> None:
    record = tmp_path / "records" / APPLIED.name / "applied.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")

    carry_out(sitting_at(tmp_path), APPLIED)

    assert record.read_text() == "{}"


def test_a_cell_that_was_killed_while_its_folder_was_made_starts_again(tmp_path: Path) -> None:
    (tmp_path / SEARCH.name).mkdir()
    (tmp_path / SEARCH.name / "machine.json").touch()

    # The folder is no obstacle: it comes as far as the images, which are not there.
    with pytest.raises(DataError, match="no-images"):
        carry_out(sitting_at(tmp_path), SEARCH)

    assert (tmp_path / SEARCH.name / "config.yaml").exists()


def test_a_finished_cell_is_kept_as_figures_plans_and_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sitting = sitting_at(tmp_path)
    finish(tmp_path, SEARCH.name, {"ppo": "10"}, ppo=0.8)
    run, record = tmp_path / SEARCH.name, tmp_path / "records" / SEARCH.name
    (run / "methods/ppo/policy.json").write_text("{}")
    for name in ("config.yaml", "machine.json", "journal.jsonl", "dense.safetensors", "methods/ppo/agent.pt"):
        (run / name).write_text("large, or of one machine")
    monkeypatch.setattr(results, "resume_run", lambda *_: None)

    carry_out(sitting, SEARCH)

    assert sitting.is_done(SEARCH)
    names = {str(path.relative_to(record)) for path in record.rglob("*") if path.is_file()}
    assert names == {"results.json", "methods/ppo/policy.json", "methods/ppo/test_judged.txt"}
    assert (record / "results.json").read_bytes() == (run / "results.json").read_bytes()


def test_a_cell_is_timed_first_and_beside_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, sitting = CELLS["resnet56-macs-and-latency"], sitting_at(tmp_path)
    finish(tmp_path, cell.name, {"ppo": "10"}, ppo=0.8)
    (tmp_path / cell.name / "config.yaml").touch()
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, b"[]")

    monkeypatch.setattr(results, "resume_run", lambda *_: None)
    monkeypatch.setattr(subprocess, "run", run)

    carry_out(sitting, cell)

    (command,) = commands
    # Shares are of the first one's dense network, and the other's plan is compared with the first one's.
    assert command[3:7] == ["latency", "measure", str(tmp_path / cell.name), str(tmp_path / "resnet56-macs")]


def test_recorded_plans_are_timed_again_in_networks_made_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: Callable[..., RunConfig]
) -> None:
    cell, sitting = CELLS["resnet56-macs-and-latency"], sitting_at(tmp_path)
    for name, layers in ((cell.name, {"14": LayerPolicy(weight_bits=8, act_bits=8)}), ("resnet56-macs", {})):
        finish(sitting.records, name, {"ppo": "10"}, ppo=0.8)
        CompressionPolicy({"3": (0, 2, 3)}, {"3": 16}, layers).save(sitting.records / name / "methods/ppo/policy.json")
    config = tiny_config(measure__onnx=True)
    weights = tmp_path / "weights.safetensors"
    save_file(build_model(config.model.name, CLASSES, 1).state_dict(), weights)
    model = config.model.model_copy(update={"weights": weights})
    monkeypatch.setattr(Sitting, "config", lambda *_: config.model_copy(update={"model": model}))
    monkeypatch.setattr(results, "TIMED_ROUNDS", 6)

    def time_again() -> bytes:
        with RunDisplay(quiet=True) as display:
            sitting.time_again(cell, display, StopFlag())
        return (sitting.records / cell.name / "timed.json").read_bytes()

    readings = json.loads(time_again())
    names = [(each["run"], each["method"], each["threads"]) for each in readings]
    runs = [(cell.name, "dense"), (cell.name, "ppo"), ("resnet56-macs", "ppo")]
    assert names == [(*run, threads) for threads in (1, 2) for run in runs]
    assert not (sitting.records / "resnet56-macs" / "timed.json").exists()
    assert sitting.was_timed_again(cell)

    def kinds(name: str) -> list[str]:
        return [node.op_type for node in onnx.load(tmp_path / "again" / name / MODEL).graph.node]

    assert ("QuantizeLinear" in kinds(cell.name), "QuantizeLinear" in kinds("resnet56-macs")) == (True, False)

    # Networks that are there are taken, and those of other plans made anew.
    built = (tmp_path / "again" / "resnet56-macs" / MODEL).stat().st_mtime_ns
    results_file = sitting.records / cell.name / "results.json"
    results_file.write_text(results_file.read_text().replace('"seed":0', '"seed":1'))
    CompressionPolicy({"3": (0,)}, {"3": 16}).save(sitting.records / cell.name / "methods/ppo/policy.json")
    time_again()
    assert "QuantizeLinear" not in kinds(cell.name)
    assert (tmp_path / "again" / "resnet56-macs" / MODEL).stat().st_mtime_ns == built


def test_a_record_that_was_not_finished_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sitting = sitting_at(tmp_path)
    finish(tmp_path, SEARCH.name, {"ppo": "10"}, ppo=0.8)
    monkeypatch.setattr(records, "write_atomic", lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        records.keep(tmp_path / SEARCH.name, sitting.records / SEARCH.name)

    assert not sitting.is_done(SEARCH)


def test_a_plan_is_applied_from_the_record_of_the_cell_that_found_it(tmp_path: Path) -> None:
    cell, sitting = CELLS["resnet56-reconstructed-ppo-seed0"], sitting_at(tmp_path)
    plan = tmp_path / "records" / SEARCH.name / "methods" / "ppo" / "policy.json"
    assert sitting.missing(cell) == plan

    plan.parent.mkdir(parents=True)
    plan.touch()

    assert sitting.missing(cell) is None


def test_what_was_searched_is_taken_from_the_record_and_not_searched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, sitting, record = CELLS["tuned-resnet56-ppo-seed0"], sitting_at(tmp_path), tmp_path / "records" / SEARCH.name
    assert sitting.missing(cell) == record / "results.json"
    finish(tmp_path / "records", SEARCH.name, {"ppo": "10"}, cem=0.7, ppo=0.8)
    layers = {"conv2": LayerPolicy(weight_bits=8, act_bits=8)}
    policy = CompressionPolicy({"conv1": (0, 3, 5)}, {"conv1": 6}, layers)
    policy.save(RunFolder(record).method("ppo").policy_file)
    seen: list[MethodSearch] = []

    def resume(folder: Path, *_: object) -> None:
        seen.append(MethodSearch.model_validate_json(RunFolder(folder).method("ppo").search_file.read_text()))

    monkeypatch.setattr(results, "resume_run", resume)

    assert sitting.missing(cell) is None
    carry_out(sitting, cell)

    (found,) = seen
    assert (found.method, found.evaluations, found.search_accuracy, found.validation_accuracy) == ("ppo", 10, 0.8, 0.8)
    assert found.kept == {"conv1": 3}
    assert found.layers == {"conv2": layers["conv2"].to_plain()}
    assert CompressionPolicy.load(RunFolder(tmp_path / cell.name).method("ppo").policy_file) == policy
    assert [path.name for path in (tmp_path / cell.name / "methods").iterdir()] == ["ppo"]


def test_an_agent_is_missing_where_only_the_record_of_its_cell_is_left(tmp_path: Path) -> None:
    finish(tmp_path / "records", "transfer-resnet20", {}, ppo=0.8)
    agent = tmp_path / "transfer-resnet20" / "methods" / "ppo" / "agent.pt"

    assert sitting_at(tmp_path).missing(APPLIED) == agent


def test_what_was_not_run_has_no_section_and_is_named_at_the_end(tmp_path: Path) -> None:
    finish(tmp_path, "resnet56-ppo-seed0", {}, ppo=0.82)
    judged = {"ppo": "10", "uniform": "10", "dense": "10"}
    finish(tmp_path, "tuned-resnet56-ppo-seed0", judged, uniform=0.8, ppo=0.82)
    finish(tmp_path, "resnet18_cifar-joint", {}, dense=0.9, ppo=0.82)
    facts = {"accuracy": 0.87, "machine": json.loads(outcome().model_dump_json())["machine"]}
    (tmp_path / "resnet56-reconstructed-ppo-seed0").mkdir()
    (tmp_path / "resnet56-reconstructed-ppo-seed0" / "applied.json").write_text(json.dumps(facts))

    page = render_page(tmp_path, NAMES, "ppo")

    titles = [line for line in page.splitlines() if line.startswith("## ")]
    assert titles == [
        "## ResNet-56 before fine-tuning",
        "## ResNet-56 before fine-tuning, with least-squares reconstruction",
        "## resnet56 after fine-tuning",
        "## Channels and bits under a latency budget",
        "## Every cell",
    ]
    *_, last = lines = section(page, "Every cell")
    listed = [line.split(" | ")[0][2:] for line in lines if line.startswith("| ")][2:]
    assert listed == [
        "resnet56-ppo-seed0",
        "resnet56-reconstructed-ppo-seed0",
        "tuned-resnet56-ppo-seed0",
        "resnet18_cifar-joint",
    ]
    assert last.startswith(f"Not run, {len(NAMES) - 4} of {len(NAMES)} cells: resnet56-uniform (seed 0, 1, 2), ")
    assert "resnet56-ppo (seed 1, 2)" in last
    assert "transfer-resnet56" in last
    assert "tuned-resnet56-ppo" not in last


def test_mean_and_spread_are_over_the_seeds_that_were_run(tmp_path: Path) -> None:
    finish(tmp_path, "resnet56-ppo-seed0", {}, ppo=0.82)
    finish(tmp_path, "resnet56-ppo-seed1", {}, ppo=0.84)

    table = section(render_page(tmp_path, NAMES, "ppo"), "ResNet-56 before fine-tuning")

    cells = next(line for line in table if line.startswith("| ppo")).split(" | ")
    assert cells[1:5] == ["83.00 % ± 1.41", "-", "2 of 3", "83.00 % ± 1.41"]


def test_searches_are_compared_with_the_cross_entropy_method_seed_by_seed(tmp_path: Path) -> None:
    finish(tmp_path, "resnet56-ppo-seed0", {}, ppo=0.82)
    finish(tmp_path, "resnet56-ppo-seed1", {}, ppo=0.90)
    finish(tmp_path, "resnet56-cem-seed0", {}, cem=0.81)
    finish(tmp_path, "resnet56-cem-seed2", {}, cem=0.50)

    table = section(render_page(tmp_path, NAMES, "ppo"), "ResNet-56 before fine-tuning")

    assert next(line for line in table if line.startswith("| ppo")).split(" | ")[2] == "+1.00"


def test_fine_tuned_networks_are_compared_seed_by_seed(tmp_path: Path) -> None:
    right = {"ppo": "1110", "dense": "1111"}
    finish(tmp_path, "tuned-resnet20-seed0", right | {"uniform": "1100"}, uniform=0.80, ppo=0.81)
    finish(tmp_path, "tuned-resnet20-seed1", right | {"uniform": "1000"}, uniform=0.70, ppo=0.73)

    table = section(render_page(tmp_path, NAMES, "ppo"), "resnet20 after fine-tuning")

    cells = next(line for line in table if line.startswith("| ppo")).split(" | ")
    # Differences of 1 and 3 points: mean 2, standard error 1, Student's t with one degree of freedom 12.706.
    assert cells[3] == "+2.00 [-10.71, +14.71]"
    # Of four images two were won, one by both seeds and one by one: 0, 0.5, 1, 0, with a standard error of 0.239.
    assert cells[5] == "+37.50 [-9.41, +84.41]"


def test_networks_may_be_fine_tuned_in_cells_of_their_own(tmp_path: Path) -> None:
    def finish_alone(name: str, method: str, accuracy: float, judged: str, macs: int) -> None:
        finish(tmp_path, f"tuned-resnet56-{name}-seed0", {method: judged}, **{method: accuracy})
        path = tmp_path / f"tuned-resnet56-{name}-seed0" / "results.json"
        found = RunOutcome.load(path)
        dense = found.row("dense").model_copy(update={"tuned_test_accuracy": None})  # not fine-tuned there
        tuned = found.row(method).model_copy(update={"macs": macs})
        path.write_text(found.model_copy(update={"rows": (dense, tuned)}).model_dump_json())

    finish_alone("uniform", "uniform", 0.80, "1100", 500)
    finish_alone("ppo", "ppo", 0.83, "1110", 500)
    two = section(render_page(tmp_path, NAMES, "ppo"), "resnet56 after fine-tuning")
    # Uniform pruning that may keep everything.
    finish_alone("dense", "uniform", 0.81, "1111", 1000)
    all_three = section(render_page(tmp_path, NAMES, "ppo"), "resnet56 after fine-tuning")

    assert [line.split(" | ")[0] for line in two if line.startswith("| ")][2:] == ["| uniform", "| ppo"]
    assert [line.split(" | ")[0] for line in all_three if line.startswith("| ")][2:] == [
        "| dense",
        "| uniform",
        "| ppo",
    ]
    cells = next(line for line in all_three if line.startswith("| ppo")).split(" | ")
    assert cells[:5] == ["| ppo", "83.00 %", "93.00 %", "+3.00", "+2.00"]
    # One of four images was won, and one was lost.
    assert cells[5].startswith("+25.00 [") and cells[6].startswith("-25.00 [")


def test_reconstructed_plans_stand_beside_the_same_plans_without(tmp_path: Path) -> None:
    for seed, before, after in ((0, 0.82, 0.87), (1, 0.84, 0.88)):
        finish(tmp_path, f"resnet56-ppo-seed{seed}", {}, ppo=before)
        (tmp_path / f"resnet56-reconstructed-ppo-seed{seed}").mkdir()
        (tmp_path / f"resnet56-reconstructed-ppo-seed{seed}" / "applied.json").write_text(
            json.dumps({"accuracy": after, "machine": json.loads(outcome().model_dump_json())["machine"]})
        )

    table = section(
        render_page(tmp_path, NAMES, "ppo"), "ResNet-56 before fine-tuning, with least-squares reconstruction"
    )

    assert "| ppo | 87.50 % ± 0.71 | 83.00 % ± 1.41 | 2 of 3 |" in table
    assert not any(line.startswith("| uniform") for line in table)


def test_what_was_found_for_latency_is_shown_with_the_times_of_its_files(tmp_path: Path) -> None:
    finish(tmp_path, "resnet18_cifar-joint", {}, ppo=0.79)
    own = {"run": "resnet18_cifar-joint", "threads": 1, "processor": {"name": "ash", "model": "family 2"}}
    reading = own | {"method": "ppo", "median_ms": 0.5, "ratio": 0.101, "low": 0.1, "high": 0.102}
    dense = own | {"method": "dense", "median_ms": 5.0, "ratio": 1.0, "low": 1.0, "high": 1.0}
    (tmp_path / "resnet18_cifar-joint" / "timed.json").write_text(json.dumps([dense, reading]))

    page = render_page(tmp_path, NAMES, "ppo")

    lines = page.split("### resnet18_cifar at 10% latency, 4 epochs of fine-tuning\n")[1].splitlines()
    cells = {line.split(" | ")[0]: line.split(" | ") for line in lines[5:7]}
    assert cells["| dense"][1:4] == ["90.00 %", "91.00 %", "-"]
    assert cells["| dense"][5:] == ["5 ms", "- |"]
    assert cells["| ppo"][1:4] == ["79.00 %", "89.00 %", "-2.00"]
    assert cells["| ppo"][5:] == ["10.1% [10.0%, 10.2%], 0.5 ms", "- |"]
    assert "### resnet56" not in page


def timed(root: Path, name: str, method: str, ratio: float, **others: float) -> None:
    """Write the time of one cell's network, 1 % to both sides of it in doubt, and of others' in the same rounds."""
    readings = [
        {
            "run": run,
            "method": method,
            "threads": 1,
            "processor": {"name": MACHINE.processor, "model": "family 1"},
            "median_ms": each,
            "ratio": each,
        }
        | {"low": each * 0.99, "high": each * 1.01, "of_first": [each / ratio * share for share in (0.98, 1, 1.02)]}
        for run, each in {name: ratio, **others}.items()
    ]
    (root / name / "timed.json").write_text(json.dumps(readings))


def test_the_floor_of_a_network_is_shown_as_it_was_measured(tmp_path: Path) -> None:
    finish(tmp_path, "resnet56-joint", {}, ppo=0.79)
    floor = {
        "decide": ["channels", "bits"],
        "predicted_ms": 0.5,
        "predicted_share": 0.41,
        "measured_share": [0.4, 0.42, 0.44],
    }
    (tmp_path / "resnet56-joint" / "floor.json").write_text(
        json.dumps({"floors": [floor], "notes": [], "refusal": None})
    )

    page = render_page(tmp_path, NAMES, "ppo")

    lines = page.split("### resnet56 at 1.1 times its floor as it was read then, 4 epochs of fine-tuning\n")[
        1
    ].splitlines()
    assert lines[1].endswith(
        " The fastest network that could be chosen: 0.5 ms, 41.0% of the dense network, by the table; "
        "42.0% [40.0%, 44.0%] when measured."
    )


@pytest.mark.parametrize("is_reconstructed", [True, False])
def test_reconstruction_is_told_where_plans_were_scored_with_it(tmp_path: Path, is_reconstructed: bool) -> None:
    finish(tmp_path, "resnet56-joint", {}, ppo=0.79)
    path = tmp_path / "resnet56-joint" / "results.json"
    found = RunOutcome.load(path).model_copy(update={"is_reconstructed": is_reconstructed})
    path.write_text(found.model_dump_json())

    assert ("repaired by least-squares reconstruction" in render_page(tmp_path, NAMES, "ppo")) == is_reconstructed


def test_a_plan_found_for_latency_is_compared_with_one_found_for_multiply_adds(tmp_path: Path) -> None:
    title, names = "The same multiply-adds, found for latency", ("resnet56-macs", "resnet56-macs-and-latency")

    def shares() -> list[str]:
        lines = section(render_page(tmp_path, NAMES, "ppo"), title)
        return [line.split(" | ")[4] for line in lines if line.startswith("| 50%")]

    finish(tmp_path, names[0], {}, ppo=0.79)
    timed(tmp_path, names[0], "ppo", 0.9)
    assert shares() == ["90.0% [89.1%, 90.9%], 0.9 ms"]

    finish(tmp_path, names[1], {}, ppo=0.79)
    timed(tmp_path, names[1], "ppo", 0.72, **{names[0]: 0.80})
    # What counts is the time beside the other one.
    assert shares() == ["80.0% [79.2%, 80.8%], 0.8 ms", "72.0% [71.3%, 72.7%], 0.72 ms"]
    assert (
        "With 100.0% of its multiply-adds, the plan found for multiply-adds alone takes 111.1% [108.9%, 113.3%] of the "
        "time of the one found for latency, on 1 thread."
    ) in section(render_page(tmp_path, NAMES, "ppo"), title)
    # The table of searches has no times of its own.
    finish(tmp_path, "resnet56-ppo-seed0", {}, ppo=0.79)
    head = next(
        line for line in section(render_page(tmp_path, NAMES, "ppo"), "ResNet-56 before fine-tuning") if "|" in line
    )
    assert "latency" not in head


def test_a_cell_that_is_timed_beside_another_waits_for_its_run(tmp_path: Path) -> None:
    cell, sitting = CELLS["resnet56-macs-and-latency"], sitting_at(tmp_path)
    assert (cell.beside, CELLS["resnet56-macs"].beside) == ("resnet56-macs", "")

    awaited = sitting.missing(cell)
    assert awaited is not None
    assert awaited.parent.name == "resnet56-macs"
    awaited.parent.mkdir(parents=True)
    awaited.touch()
    assert sitting.missing(cell) is None


def test_the_curves_say_what_networks_with_both_decided_dominate(tmp_path: Path) -> None:
    for name, accuracy, ratio in (
        ("channels-20", 0.60, 0.20),
        # Of what both have at 30 % the intervals tell the second and not the first.
        ("channels-30", 0.80, 0.308),
        ("channels-50", 0.80, 0.30),
        ("bits-30", 0.70, 0.30),
        ("both-20", 0.70, 0.19),
        ("both-30", 0.80, 0.31),
    ):
        finish(tmp_path, f"resnet18_cifar-curve-{name}", {}, ppo=accuracy)
        timed(tmp_path, f"resnet18_cifar-curve-{name}", "ppo", ratio)

    lines = section(render_page(tmp_path, NAMES, "ppo"), "Channels, bits, and both: ResNet-18")

    words = "A network with both decided is no slower on one thread, as far as the intervals tell, and no less accurate"
    assert f"{words} than 2 of 3 of channels and 1 of 1 of bits alone." in lines
    assert not any("Searched for on" in line for line in lines)


def test_points_of_a_curve_from_several_processors_are_told_apart(tmp_path: Path) -> None:
    for name, processor in (("channels-20", "oak"), ("bits-30", "elm"), ("both-20", "oak")):
        finish(tmp_path, f"resnet18_cifar-curve-{name}", {}, ppo=0.5)
        path = tmp_path / f"resnet18_cifar-curve-{name}" / "results.json"
        found = RunOutcome.load(path)
        machine = found.machine.model_copy(update={"processor": processor})
        path.write_text(found.model_copy(update={"machine": machine}).model_dump_json())

    lines = section(render_page(tmp_path, NAMES, "ppo"), "Channels, bits, and both: ResNet-18")

    assert "Searched for on 2 processors: oak (channels 20 %, both 20 %); elm (bits 30 %)." in lines


def test_a_table_of_methods_says_where_plans_were_searched_for_and_latencies_read(tmp_path: Path) -> None:
    name = "resnet18_cifar-methods-seed0"
    finish(tmp_path, name, {}, **dict.fromkeys(JOINT_METHODS, 0.5))
    timed(tmp_path, name, "ppo", 0.1)
    title, path = "ResNet-18 at 10% latency, before fine-tuning", tmp_path / name / "results.json"
    assert not any("another device" in line for line in section(render_page(tmp_path, NAMES, "ppo"), title))
    found = RunOutcome.load(path)
    machine = found.machine.model_copy(update={"processor": "elm"})
    path.write_text(found.model_copy(update={"machine": machine}).model_dump_json())

    lines = section(render_page(tmp_path, NAMES, "ppo"), title)

    read = f"latency was read on {MACHINE.processor}, another device."
    assert f"Searched for on elm, with its table; {read}" in lines


def test_the_page_says_where_latencies_were_read(tmp_path: Path) -> None:
    finish(tmp_path, "resnet18_cifar-curve-both-20", {}, ppo=0.5)
    assert "Latencies are" not in render_page(tmp_path, NAMES, "ppo")
    timed(tmp_path, "resnet18_cifar-curve-both-20", "ppo", 0.5)
    assert f"(`docs/latency.md`), read on {MACHINE.processor} (family 1). " in render_page(tmp_path, NAMES, "ppo")


def test_joint_searches_are_compared_with_the_agent_and_show_what_was_measured(tmp_path: Path) -> None:
    name = "resnet18_cifar-methods-seed0"
    finish(tmp_path, name, {}, **dict.fromkeys(JOINT_METHODS, 0.5) | {"cem": 0.80, "ppo": 0.82})
    timed(tmp_path, name, "cem", 0.12)

    table = section(render_page(tmp_path, NAMES, "ppo"), "ResNet-18 at 10% latency, before fine-tuning")

    cells = {line.split(" | ")[0]: line.split(" | ") for line in table if line.startswith("|")}
    assert cells["| method"][2] == "against ppo"
    assert (cells["| cem"][2], cells["| cem"][-1]) == ("-2.00", "12.00 % |")
    assert (cells["| ppo"][2], cells["| ppo"][-1]) == ("-", "- |")


def test_a_cell_that_fails_is_named_and_the_next_ones_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = []

    def carry_out(_self: Sitting, cell: Cell, *_: object) -> None:
        if cell.name == "resnet56-uniform-seed0":
            msg = "no such budget"
            raise BudgetError(msg)
        done.append(cell.name)

    monkeypatch.setattr(Sitting, "carry_out", carry_out)

    with pytest.raises(typer.Exit) as ended:
        results.main(
            root=tmp_path,
            records=tmp_path / "records",
            page=tmp_path / "results.md",
            only="^resnet56-(uniform|sensitivity)-seed0$",
        )

    assert ended.value.exit_code == 1
    assert done == ["resnet56-sensitivity-seed0"]
    assert "cell resnet56-uniform-seed0 failed: no such budget" in capsys.readouterr().err


def test_methods_of_one_table_do_not_appear_in_another(tmp_path: Path) -> None:
    for name in NAMES:
        method = name.split("-")[-2]
        if name.startswith("resnet56-") and name.endswith("-seed0") and "reconstructed" not in name:
            finish(tmp_path, name, {}, **{method: 0.8})

    table = section(render_page(tmp_path, NAMES, "ppo"), "ResNet-56 before fine-tuning")

    methods = [line.split(" | ")[0][2:] for line in table if line.startswith("| ")][2:]
    assert methods == ["dense", "uniform", "sensitivity", "magnitude", "ppo", "ddpg", "cem", "random"]


@pytest.mark.parametrize(
    ("values", "text"), [([], "-"), ([None], "-"), ([0.5], "50.00 %"), ([0.5, 0.6], "55.00 % ± 7.07")]
)
def test_spread_is_of_what_is_known(values: list[float | None], text: str) -> None:
    assert spread(values) == text


def test_one_difference_has_no_interval() -> None:
    assert interval([0.012]) == "+1.20"
