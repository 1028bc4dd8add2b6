"""`secateur check` with a table: the least latency, and budgets below it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from envs.space import SearchSpace
from experiments.config import load_config
from experiments.floor import Floor
from experiments.search import search_space
from experiments.timed_network import TimedNetwork
from latency.budget import Budget, least_in_words
from latency.decision import layer_decisions
from latency.device import Fingerprint
from latency.measure import Comparison
from latency.table import LatencyTable, build_table, needed_kinds, start_table
from tests.latency.synthetic import SLIDE_RULE, FormulaDevice, IntegerFormulaDevice, as_calibrated

Command = Callable[..., Any]
TINY = ("tests.experiments.test_floor:wide", "--shape", "1,8,8", "--classes", "3", "--rounding", "4")


def wide(num_classes: int, in_channels: int) -> nn.Module:
    """Wide enough for the steps of a device whose times rise every 16 channels."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 48, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(48, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )


def saved_table(folder: Path, device: FormulaDevice, bits: list[int]) -> Path:
    device.fingerprint = Fingerprint(SLIDE_RULE, "onnxruntime", "1.0", 1)
    network = TimedNetwork.build(TINY[0], "1,8,8", 3, 4)
    built = build_table(start_table(device), device, needed_kinds(network.graph, network.steps, bits))
    table = as_calibrated(built, network.graph)
    table.save(folder / "table.json")
    return folder / "table.json"


def joint_space(table: Path) -> SearchSpace:
    """What a search of channels and bits decides of the tiny network."""
    network = TimedNetwork.build(TINY[0], "1,8,8", 3, 4)
    importance = {group.name: np.zeros(group.size) for group in network.graph.prunable}
    layers = layer_decisions(network.graph, ["bits"])
    return SearchSpace.build(
        network.graph, importance, None, kind="latency", layers=layers, rounding=4, table=LatencyTable.load(table)
    )


def test_check_tells_the_floor_of_each_way_to_decide(command: Command, tmp_path: Path) -> None:
    table = saved_table(tmp_path, IntegerFormulaDevice(), [8, 32])

    done = command("check", *TINY, "--latency-table", table, "--json")

    assert done.code == 0
    found = json.loads(done.out)["latency"]
    assert [floor["decide"] for floor in found["floors"]] == [["channels"], ["bits"], ["channels", "bits"]]
    pruned, quantized, joint = (floor["predicted_share"] for floor in found["floors"])
    # Integers take a third of the time, and what is not a layer stays.
    assert 1 / 3 < quantized < 0.5
    assert joint < min(pruned, quantized)
    space = joint_space(table)
    assert joint == pytest.approx(space.cost(space.minimum) / space.cost.dense)
    assert found["notes"][0].startswith(
        "not measured on the clock: the table was measured with onnxruntime 1.0, 1 thread(s), on slide rule; here is "
    )


def test_a_budget_below_the_floor_is_refused_with_the_least_that_can_be_met(command: Command, tmp_path: Path) -> None:
    table = saved_table(tmp_path, IntegerFormulaDevice(), [8, 32])
    space = joint_space(table)
    lowest, dense = space.lowest_cost, space.cost.dense

    done = command("check", *TINY, "--latency-table", table, "--budget", "1% latency")

    assert done.code == 1
    assert done.out.splitlines()[-1] == (
        f"budget refused  a budget of {dense // 100 / 1e6:.4g} ms (1.0% of the dense {dense / 1e6:.4g} ms) is below "
        f"the floor with channels, bits: {lowest / 1e6:.4g} ms ({lowest / dense:.1%}) by the table, not measured. Pass "
        f"at least {least_in_words(lowest, dense, 'latency')}, or lower search.min_keep_ratio or search.rounding, "
        "or spare fewer groups (search.protect_first, search.protected)"
    )


def test_a_budget_that_only_bits_reach_says_so(command: Command, tmp_path: Path) -> None:
    table = saved_table(tmp_path, IntegerFormulaDevice(), [8, 32])
    pruned = joint_space(table)
    counts = pruned.minimum.copy()
    counts[len(pruned.names) :] = 32
    limit = (pruned.cost(counts) + pruned.lowest_cost) // 2

    done = command("check", *TINY, "--latency-table", table, "--budget", f"{limit / 1e6} ms")

    assert done.code == 0
    assert "  the budget is out of reach of 'channels' or 'bits', and within that of 'channels, bits'" in done.out


def test_what_does_not_change_another_budget_is_left_out(command: Command, tmp_path: Path) -> None:
    table = saved_table(tmp_path, IntegerFormulaDevice(), [8, 32])
    options = ("--latency-table", table, "--budget", "90% latency, 50% macs")

    done, bits = command("check", *TINY, *options), command("check", *TINY, *options, "--set", "search.decide=[bits]")

    reason = "cannot be met: nothing that is decided (bits) changes it; decide channels or density, or leave macs out"
    assert done.code == 0
    assert re.search(rf"\n  bits: a budget of .* {re.escape(reason)} of the budget\n", done.out)
    assert done.out.splitlines()[-1] == (
        "budget met      at most 90 % of its latency and 50 % of its MACs; the floor is above"
    )
    assert bits.code == 1 and reason in bits.out.splitlines()[-1]


def test_what_the_search_decides_can_be_said(command: Command, tmp_path: Path) -> None:
    table = saved_table(tmp_path, FormulaDevice(), [32])

    both = command("check", *TINY, "--latency-table", table)
    one = command("check", *TINY, "--latency-table", table, "--set", "search.decide=[channels]", "--json")
    bits = command("check", *TINY, "--latency-table", table, "--set", "search.decide=[bits]")

    assert re.search(r"\n  bits: the table does not hold .*, 8 bits'; .* \(with --integers\)\n", both.out)
    assert len(json.loads(one.out)["latency"]["floors"]) == 1
    assert bits.code == 1 and bits.err.startswith("error: the table does not hold the layer kind ")


def test_a_latency_budget_without_a_table_names_the_option(command: Command) -> None:
    done = command("check", *TINY, "--budget", "40% latency")

    assert done.code == 1
    assert done.out.splitlines()[-1] == (
        "budget refused  a budget of latency is projected with a table of this device, and there is none; make one "
        "with `secateur latency build` and name it with --latency-table (latency.table), or hand it to "
        "`secateur.compress`"
    )


def test_a_budget_of_another_kind_is_checked_too(command: Command) -> None:
    within, under = (
        command("check", *TINY, "--budget", text) for text in ("50% macs, 20% bytes", "50% macs, 4% bytes")
    )

    assert (within.code, under.code) == (0, 1)
    macs, size = within.out.splitlines()[-1].split("; ")
    # 9,216, 442,368, 884,736 and 96 of them.
    assert macs.startswith("budget met      668,208 macs (50.0%), of which ") and macs.endswith("%) is the least")
    # 160, 6,960, 13,856 and 99 parameters of 4 bytes.
    assert size.startswith("16,860 bytes (20.0%), of which ") and size.endswith("%) is the least")
    assert under.out.splitlines()[-1].startswith(
        "budget refused  a budget of 3,372 bytes (4.0% of the dense 84,300 bytes)"
    )


def test_a_search_refuses_a_latency_below_the_floor_before_any_training(
    tiny_yaml: Path, command: Command, tmp_path: Path
) -> None:
    table = saved_table(tmp_path, FormulaDevice(), [32])
    options = ("--model", TINY[0], "--budget", "1% latency", "--latency-table", table, "--rounding", "4")

    done = command("search", tiny_yaml, *options, "--out", tmp_path / "run")

    config = load_config(tiny_yaml, {"search.rounding": 4, "latency.table": str(table), "budget": "99% latency"})
    graph = TimedNetwork.build(TINY[0], "1,8,8", 3, 4).graph
    lowest = search_space(config, graph, {group.name: torch.zeros(group.size) for group in graph.prunable}).lowest_cost
    assert done.code == 1
    (least,) = re.findall(r"Pass at least (\S+ ms) \(\S+%\), or lower search\.min_keep_ratio", done.err)
    # What is advised can be met, and hardly less.
    assert lowest <= Budget.parse(least).absolute < 1.001 * lowest
    assert "or decide bits too" in done.err and "epoch" not in done.err
    assert not (tmp_path / "run").exists()


def reading(low: float, ratio: float, high: float) -> Comparison:
    return Comparison(ratio, low, high, 60, 0)


@pytest.mark.parametrize(
    ("measured", "reaches", "least"),
    [
        (None, True, 300),
        (reading(0.35, 0.36, 0.37), True, 350),
        # The clock is sure that it takes longer than the 400 asked for.
        (reading(0.45, 0.46, 0.47), False, 450),
        # It cannot tell, and so forbids nothing.
        (reading(0.38, 0.45, 0.55), True, 380),
    ],
)
def test_the_clock_refuses_what_it_is_sure_of(measured: Comparison | None, reaches: bool, least: int) -> None:
    floor = Floor(("channels",), 300, 1000, measured)

    assert floor.reaches(400) is reaches
    assert floor.least_ns == least


@pytest.mark.slow
def test_the_floor_is_timed_on_the_runtime_of_the_table(command: Command, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    options = ("--integers", "--networks", "2", "--out", table)
    assert command("latency", "build", "--model", *TINY, *options).code == 0

    done = command("check", *TINY, "--latency-table", table, "--budget", "1% latency", "--json")

    found = json.loads(done.out)["latency"]
    assert all(0 < low <= ratio <= high < 5 for low, ratio, high in (f["measured_share"] for f in found["floors"]))
    assert done.code == 1 and "on the clock" in found["refusal"]
