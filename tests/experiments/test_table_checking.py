import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latency.table import LatencyTable
from latency.worker import allowed_cpus

Command = Callable[..., Any]
TINY = ("--model", "tests.experiments.tiny:network", "--shape", "1,8,8", "--classes", "3")


def test_a_table_is_built_checked_and_refused_elsewhere(command: Command, tmp_path: Path) -> None:
    table, page = tmp_path / "table.json", tmp_path / "page.md"
    options = ("--runtime", "pytorch-eager", "--rounding", "4")

    built = command("latency", "build", *TINY, *options, "--networks", "3", "--out", table, "--json")
    assert built.code == 0
    (facts,) = json.loads(built.out)
    assert facts["networks"] == 4
    assert facts["dense_ms"] > 0
    assert 2 <= built.err.count(" layers measured") <= 11

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
    assert "They differ in threads '1', here '2'. " in other.err


@pytest.mark.skipif(not allowed_cpus(), reason="the system does not let a process choose its processors")
def test_a_table_built_on_chosen_processors_is_checked_there(command: Command, tmp_path: Path) -> None:
    table, last = tmp_path / "table.json", allowed_cpus()[-1]
    options = ("--runtime", "pytorch-eager", "--rounding", "4", "--networks", "2", "--out", table)
    assert command("latency", "build", *TINY, *options, "--cpus", last).code == 0
    assert LatencyTable.load(table).fingerprint.cpus == (last,)
    (found,) = json.loads(command("latency", "check", table, *TINY, "--rounding", "4", "--policies", "4", "--json").out)
    assert found["device"].endswith(f", cpus {last}")


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


def test_plans_that_are_all_alike_have_no_order(command: Command, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    options = ("--runtime", "pytorch-eager", "--rounding", "16")
    command("latency", "build", *TINY, *options, "--networks", "2", "--out", table)

    done = command("latency", "check", table, *TINY, "--rounding", "16", "--policies", "3", "--json")

    (found,) = json.loads(done.out, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert found["spearman"] is None


def test_a_network_that_cannot_be_built_leaves_no_table(command: Command, tmp_path: Path) -> None:
    done = command("latency", "build", "--model", "resnet57", "--out", tmp_path / "new" / "table.json")

    assert done.code == 1 and done.err.startswith("error: unknown model 'resnet57'")
    assert not (tmp_path / "new").exists()
