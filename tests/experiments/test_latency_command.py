import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs.action import counts_of
from envs.space import Bound
from experiments.latency_command import Subject
from latency.predict import LatencyModel
from latency.table import LatencyTable, build_table, needed_kinds, start_table
from tests.latency.synthetic import FormulaDevice

Command = Callable[..., Any]
TINY = ("--model", "tests.experiments.tiny:network", "--shape", "1,8,8", "--classes", "3")


def test_plans_of_one_seed_are_the_same_and_lie_on_the_rungs() -> None:
    subject = Subject.build("tests.experiments.tiny:network", "1,8,8", 3, rounding=4)
    plans = subject.plans(20, seed=0)
    assert plans == subject.plans(20, seed=0) != subject.plans(20, seed=1)
    sizes = dict(zip(subject.space.names, subject.space.sizes.tolist(), strict=True))
    assert all(count % 4 == 0 or count == sizes[name] for plan in plans for name, count in plan.items())


def test_mixes_of_one_seed_are_the_same_with_all_in_integers_first() -> None:
    subject = Subject.build("tests.experiments.tiny:network", "1,8,8", 3, rounding=4)
    (plan,) = subject.plans(1, seed=0)
    mixes = subject.mixed(plan, 6, seed=0)
    assert mixes == subject.mixed(plan, 6, seed=0) != subject.mixed(plan, 6, seed=1)
    assert all({name: mix[name] for name in plan} == plan for mix in mixes)
    assert all({mix[one.name] for one in subject.bits} == {8} for mix in (mixes[0], mixes[3]))
    assert {mix[one.name] for mix in mixes for one in subject.bits} == {8, 32}
    layers = subject.policy(mixes[1]).layers
    assert {name for name, layer in layers.items() if layer.act_bits == 8} == {
        one.layer for one in subject.bits if mixes[1][one.name] == 8
    }


def test_a_table_is_built_checked_and_refused_elsewhere(command: Command, tmp_path: Path) -> None:
    table, page = tmp_path / "table.json", tmp_path / "page.md"
    options = ("--runtime", "pytorch-eager", "--rounding", "4")

    built = command("latency", "build", *TINY, *options, "--networks", "3", "--out", table, "--json")
    assert built.code == 0
    (facts,) = json.loads(built.out)
    assert facts["networks"] == 4
    assert facts["dense_ms"] > 0

    again = command("latency", "build", *TINY, *options, "--networks", "3", "--out", table, "--json")
    assert json.loads(again.out) == [facts]

    for _ in range(2):
        checked = command(
            "latency", "check", table, *TINY, "--rounding", "4", "--policies", "4", "--page", page, "--json"
        )
    (found,) = json.loads(checked.out)
    assert found["policies"] == 4
    assert 0 <= found["median_absolute_error"] <= found["largest_error"]
    assert -1 <= found["spearman"] <= 1
    assert page.read_text().count("## tests.experiments.tiny:network") == 2
    assert page.read_text().startswith("# Latency tables against whole networks\n")

    other = command("latency", "build", *TINY, *options, "--threads", "2", "--out", table)
    fingerprint = LatencyTable.load(table).fingerprint
    assert other.code == 1
    assert other.err.startswith(f"error: the table was measured with {fingerprint}; here is pytorch-eager ")
    assert ", 2 thread(s), on " in other.err


def test_a_network_that_the_table_was_not_built_for_is_refused(command: Command, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    options = ("--runtime", "pytorch-eager", "--rounding", "8")
    command("latency", "build", *TINY, *options, "--networks", "2", "--out", table)
    done = command("latency", "check", table, "--model", "tests.experiments.tiny:deeper_network", *TINY[2:])
    assert done.code == 1
    assert done.err.endswith("build it for this network\n") or "build it for this network first" in done.err


@pytest.mark.slow
def test_a_table_is_calibrated_and_checked_with_integers_among_floats(command: Command, tmp_path: Path) -> None:
    table, page = tmp_path / "table.json", tmp_path / "page.md"
    options = ("--rounding", "4", "--networks", "2", "--out", table)
    command("latency", "build", *TINY, *options)
    check = ("latency", "check", table, *TINY, "--rounding", "4", "--policies", "3", "--integers", "--json")
    refused = command(*check)
    assert refused.code == 1 and refused.err.startswith("error: the table does not hold the layer kind ")

    (facts,) = json.loads(command("latency", "build", *TINY, *options, "--integers", "--json").out)

    assert (facts["networks"], facts["mixed_networks"]) == (3, 6)
    assert facts["integer_scale"] > 0 and min(facts["conversion_us"], facts["element_ns"]) >= 0
    (found,) = json.loads(command(*check, "--page", page).out)
    assert found["integers"] and found["policies"] == 3
    assert 0 <= found["median_absolute_error"] <= found["largest_error"]

    content = json.loads(table.read_text())
    for calibration in content["calibrations"].values():
        calibration["n_mixed"] = 0
    table.write_text(json.dumps(content))
    unfit = command(*check)
    assert unfit.err == (
        f"error: the table '{table}' is not calibrated for 'tests.experiments.tiny:network' with these inputs; build "
        "it for this network first with --integers\n"
    )


def test_an_unknown_runtime_is_refused_before_anything_is_written(command: Command, tmp_path: Path) -> None:
    done = command("latency", "build", *TINY, "--runtime", "onnxrt", "--out", tmp_path / "table.json")
    assert done.code == 1
    assert done.err.startswith("error: unknown runtime 'onnxrt'; did you mean onnxruntime? Allowed: pytorch-eager, ")
    assert not list(tmp_path.iterdir())


def test_another_machine_has_one_runtime_only(command: Command, tmp_path: Path) -> None:
    options = ("--host", "board", "--runtime", "pytorch-eager", "--out", tmp_path / "table.json")
    done = command("latency", "build", *TINY, *options)
    assert done.code == 1
    assert done.err == (
        "error: another machine is timed with onnxruntime only, not with 'pytorch-eager'; leave out one of them\n"
    )


@pytest.mark.parametrize("rounding", [1, 4])
@pytest.mark.parametrize("share", [0.2, 0.45, 0.8])
def test_a_latency_budget_is_met_by_construction(rounding: int, share: float) -> None:
    subject = Subject.build("tests.experiments.tiny:network", "1,8,8", 3, rounding)
    device = FormulaDevice()
    table = build_table(start_table(device), device, needed_kinds(subject.graph, subject.steps, [32]))
    cost = LatencyModel(subject.graph, table, subject.space.names)
    lowest = cost(subject.space.minimum)
    # Odd counts take slower kernels, so that the least network need not be the fastest.
    limit = lowest + int(share * abs(cost.dense - lowest))
    space = replace(subject.space, cost=cost, bounds=(Bound(cost, limit),))
    generator = np.random.default_rng(0)
    for _ in range(10):
        counts = counts_of(generator.uniform(-1, 1, space.n), space)
        assert cost(counts) <= limit
        if rounding == 4:
            # With counts that are whole vectors the device is monotone: there is no step left that fits.
            for index in range(space.n):
                more = counts.copy()
                more[index] = space.next_rung(index, int(counts[index]))
                assert more[index] == counts[index] or cost(more) > limit
