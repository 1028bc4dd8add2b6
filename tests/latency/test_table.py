import json
import os
import platform
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graph_encoder.capture import capture
from graph_encoder.network import LinearDim, NetworkGraph
from latency.decision import layer_decisions
from latency.device import Fingerprint, LocalDevice, TableError
from latency.layers import LayerKind
from latency.predict import LatencyModel, calibrated
from latency.runtimes import ONNXRUNTIME, Artifact, LatencyError, PyTorchEager, find_runtime
from latency.table import (
    Calibration,
    KindTimes,
    LatencyTable,
    build_table,
    class_of,
    knots_of,
    needed_kinds,
    network_key,
    reachable_counts,
    start_table,
)
from latency.worker import Processor, allowed_cpus
from pruning.qdq import saturates

from .synthetic import EMPTY_NS, FormulaDevice, IntegerFormulaDevice, formula_ns

CONV = LayerKind("conv", (3, 3), (1, 1), (8, 8))


def two_convolutions(first: int = 40, second: int = 24) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, first, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(second, 5),
    )


@pytest.fixture(scope="module")
def graph() -> NetworkGraph:
    return capture(two_convolutions(), torch.randn(2, 3, 8, 8))


def built(graph: NetworkGraph, device: FormulaDevice, steps: dict[str, int] | None = None) -> LatencyTable:
    needed = needed_kinds(graph, steps or {group.name: 1 for group in graph.prunable}, [32])
    return build_table(start_table(device), device, needed)


def by_formula(first: int, second: int) -> float:
    return formula_ns(3, first, 64) + formula_ns(first, second, 64) + formula_ns(second, 5, 1)


def test_knots_lie_on_both_sides_of_the_first_stairs_for_each_class() -> None:
    assert [class_of(count) for count in (1, 4, 8, 12, 16, 24, 48, 63)] == [1, 4, 8, 4, 16, 8, 16, 1]
    assert knots_of(range(1, 33)) == (1, 4, 8, 12, 15, 16, 17, 20, 24, 28, 31, 32)


def test_knots_grow_apart_and_end_at_the_widest() -> None:
    assert knots_of(range(16, 16 * 41, 16)) == tuple(16 * stair for stair in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40))


def test_reachable_counts_by_hand() -> None:
    # 10 fixed channels, a group of 8 units of one channel in steps of 4, one of 3 units of two channels.
    dim = LinearDim(24, ((0, 1), (1, 2)))
    assert reachable_counts(dim, {0: 4}, {0: 8, 1: 3}) == (20, 24)
    assert reachable_counts(dim, {0: 4, 1: 1}, {0: 8, 1: 3}) == (16, 18, 20, 22, 24)
    assert reachable_counts(dim, {}, {0: 8, 1: 3}) == (24,)


def test_a_whole_group_may_be_off_its_step() -> None:
    assert reachable_counts(LinearDim(10, ((0, 1),)), {0: 4}, {0: 10}) == (4, 8, 10)
    # 8, 16 or 20 of one group beside 8, 16 or 24 of another.
    both = reachable_counts(LinearDim(44, ((0, 1), (1, 1))), {0: 8, 1: 8}, {0: 20, 1: 24})
    assert both == (16, 24, 28, 32, 36, 40, 44)


def test_times_between_knots_of_one_class_by_hand() -> None:
    times = KindTimes(CONV, (16, 48), (16, 32), np.array([[1.0, 2.0], [3.0, 6.0]]))
    assert times(16, 16) == 1
    assert times(32, 16) == 2
    assert times(32, 32) == 4


def test_a_table_holds_convolutions_whose_groups_lose_channels_within(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 24, 3, padding=1, groups=2), nn.Conv2d(24, 5, 1))
    graph = capture(model, torch.randn(2, 3, 8, 8))
    assert [group.size for group in graph.prunable] == [8, 12]  # one channel of each convolution group
    built(graph, FormulaDevice()).save(tmp_path / "table.json")
    latency = LatencyModel(graph, LatencyTable.load(tmp_path / "table.json"))
    for first, second in [(8, 12), (1, 1), (3, 7), (4, 8)]:
        told = formula_ns(3, 2 * first, 64) + formula_ns(first, 2 * second, 64) + formula_ns(2 * second, 5, 64)
        assert latency(np.array([first, second])) == pytest.approx(EMPTY_NS + told, rel=1e-3, abs=4)


def test_noise_that_makes_more_channels_cheaper_is_split() -> None:
    times = KindTimes(CONV, (16, 32, 48), (16,), np.array([[1.0], [3.0], [2.0]]))
    assert [times(count, 16) for count in (16, 32, 48)] == [1, 2.5, 2.5]


def test_every_plan_is_predicted_as_the_device_computes_it(graph: NetworkGraph) -> None:
    model = LatencyModel(graph, built(graph, FormulaDevice()))
    generator = np.random.default_rng(0)
    for first, second in [(40, 24), (1, 1), *generator.integers(1, (41, 25), (50, 2)).tolist()]:
        assert model(np.array([first, second])) == pytest.approx(EMPTY_NS + by_formula(first, second), rel=1e-3, abs=4)


def test_only_counts_that_rounding_allows_are_measured_and_predicted(graph: NetworkGraph) -> None:
    device = FormulaDevice()
    table = built(graph, device, {group.name: 8 for group in graph.prunable})
    # Both convolutions are of one kind: {3, 8, 16, 24, 32, 40} -> {8, 16, 24, 32, 40}; then {8, 16, 24} -> 5.
    assert device.layers == 6 * 5 + 3
    model = LatencyModel(graph, table)
    assert model(np.array([24, 16])) == pytest.approx(EMPTY_NS + by_formula(24, 16), rel=1e-3, abs=4)
    message = (
        "the table does not hold a layer (conv 3x3, stride 1x1, to 8x8, 32 bits) that writes 12 channels; it was "
        "measured at 8, 16, 24, 32, 40. Round channel counts as it was built, or build it with a finer rounding; if it "
        "was built for another network, 'secateur latency build' into the same file adds this one"
    )
    with pytest.raises(TableError, match=f"^{re.escape(message)}$"):
        model(np.array([12, 16]))


def test_a_build_that_was_killed_goes_on_where_it_was(graph: NetworkGraph, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    needed = needed_kinds(graph, {group.name: 1 for group in graph.prunable}, [32])
    device = FormulaDevice(stop_after=4)
    table = start_table(device)
    with pytest.raises(KeyboardInterrupt):
        build_table(table, device, needed, save=lambda grown: grown.save(path))
    measured = device.layers

    again = FormulaDevice()
    done = build_table(LatencyTable.load(path), again, needed)

    assert 0 < measured < sum(len(inputs) * len(outputs) for inputs, outputs in needed.values())
    assert measured + again.layers == sum(len(inputs) * len(outputs) for inputs, outputs in needed.values())
    assert LatencyModel(graph, done).dense == pytest.approx(LatencyModel(graph, built(graph, FormulaDevice())).dense)


def test_a_table_grows_by_the_layers_of_another_network(graph: NetworkGraph) -> None:
    table = built(graph, FormulaDevice())
    wide = capture(two_convolutions(64, 40), torch.randn(2, 3, 8, 8))
    needed = needed_kinds(wide, {group.name: 1 for group in wide.prunable}, [32])
    grown = build_table(table, FormulaDevice(), needed)
    assert LatencyModel(graph, grown).dense == pytest.approx(LatencyModel(graph, table).dense)
    assert LatencyModel(wide, grown)(np.array([50, 33])) == pytest.approx(
        EMPTY_NS + by_formula(50, 33), rel=1e-3, abs=4
    )


def test_a_table_survives_its_file(graph: NetworkGraph, tmp_path: Path) -> None:
    table = replace(built(graph, FormulaDevice()), calibrations={network_key(graph): Calibration(0.9, -0.5, 8, 0.02)})
    table.save(tmp_path / "table.json")
    loaded = LatencyTable.load(tmp_path / "table.json")
    assert (loaded.fingerprint, loaded.calibrations) == (table.fingerprint, table.calibrations)
    model, again = LatencyModel(graph, table), LatencyModel(graph, loaded)
    assert again.dense == pytest.approx(model.dense, abs=2)  # nanoseconds are whole, ratios rounded
    assert again(np.array([7, 9])) == LatencyModel(graph, loaded)(np.array([7, 9]))


class NoLayersOf40(FormulaDevice):
    """Fails, as a runtime may in its own way, at layers of 40 outputs."""

    def _one(self, network: Artifact) -> float:
        layer = network[0] if isinstance(network, nn.Sequential) else network
        if isinstance(layer, nn.Conv2d) and layer.out_channels == 40:
            msg = "no such kernel"
            raise OSError(msg)
        return super()._one(network)


def test_a_layer_that_the_device_cannot_run_is_named(graph: NetworkGraph) -> None:
    device = NoLayersOf40()
    needed = needed_kinds(graph, {group.name: 1 for group in graph.prunable}, [32])

    with pytest.raises(LatencyError, match=r"^the device cannot run a layer: .*to 40 channels: no such kernel$"):
        build_table(start_table(FormulaDevice()), device, needed)


def test_a_table_of_another_device_is_refused_by_name(graph: NetworkGraph) -> None:
    message = (
        "the table was measured with formula 1.0, 1 thread(s), on slide rule; here is formula 1.0, 2 thread(s), on "
        "slide rule. They differ in threads '1', here '2'. Times of one do not hold for the other: build a table here, "
        "or go to the device of the table"
    )
    with pytest.raises(TableError, match=f"^{re.escape(message)}$"):
        build_table(start_table(FormulaDevice()), FormulaDevice(threads=2), {})


VIRTUAL = """
processor\t: {core}
vendor_id\t: AuthenticAMD
cpu family\t: {family}
model\t\t: 1
model name\t: AMD EPYC
stepping\t: 1
flags\t\t: fpu sse4_2 avx2 {flags}
"""
BOARD = """
processor\t: {core}
BogoMIPS\t: 108.00
Features\t: fp asimd crc32 asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x1
CPU part\t: {part}
"""


def on_x86(family: int, flags: str) -> Processor:
    cores = [VIRTUAL.format(core=core, family=family, flags=flags) for core in range(2)]
    return Processor.of_cpuinfo("\n".join(cores), "x86_64", 2)


MILAN, TURIN = on_x86(25, ""), on_x86(26, "avx512f avx512_vnni")
ROCKCHIP = Processor.of_cpuinfo(BOARD.format(core=0, part="0xd05") + BOARD.format(core=1, part="0xd0b"), "aarch64", 2)


def test_processors_are_told_apart_by_what_linux_says_beside_the_name() -> None:
    assert Processor("AMD EPYC", "x86_64", "AuthenticAMD family 25 model 1 stepping 1", ("avx2", "sse4_2"), 2) == MILAN
    assert TURIN.features == ("avx2", "avx512_vnni", "avx512f", "sse4_2")
    big_little = "implementer 0x41 variant 0x1 part 0xd05, implementer 0x41 variant 0x1 part 0xd0b"
    assert Processor("aarch64", "aarch64", big_little, ("asimd", "asimddp"), 2) == ROCKCHIP
    assert Processor.of_cpuinfo("", "riscv64", 4) == Processor("riscv64", "riscv64", "", (), 4)


def test_x86_without_vnni_adds_pairs_of_products_in_sixteen_bits() -> None:
    unknown = Processor("Intel64 Family 6", "AMD64")
    assert [one.saturates for one in (MILAN, TURIN, ROCKCHIP, unknown)] == [True, False, False, True]
    assert Processor.here().saturates == saturates()


def test_this_processor_says_what_it_is() -> None:
    here = Processor.here()
    assert here.name and here.architecture == platform.machine() and here.cores == os.cpu_count()


@pytest.mark.parametrize(
    ("mine", "theirs", "difference"),
    [
        (
            MILAN,
            TURIN,
            "processor model 'AuthenticAMD family 25 model 1 stepping 1', here 'AuthenticAMD family 26 model 1 "
            "stepping 1'; processor features 'avx2 sse4_2', here 'avx2 avx512_vnni avx512f sse4_2'",
        ),
        (MILAN, replace(MILAN, cores=8), "processor cores '2', here '8'"),
        (ROCKCHIP, replace(ROCKCHIP, features=("asimd",)), "processor features 'asimd asimddp', here 'asimd'"),
    ],
)
def test_processors_of_one_name_refuse_the_tables_of_each_other(
    mine: Processor, theirs: Processor, difference: str
) -> None:
    table = LatencyTable(Fingerprint(mine, "formula", "1.0", 1), 1.0, 0.0)
    table.fingerprint.check(Fingerprint(mine, "formula", "1.0", 1))
    name = f"formula 1.0, 1 thread(s), on {mine.name}"
    message = (
        f"the table was measured with {name}; here is {name}. They differ in {difference}. Times of one do not hold "
        "for the other: build a table here, or go to the device of the table"
    )
    with pytest.raises(TableError, match=f"^{re.escape(message)}$"):
        table.fingerprint.check(Fingerprint(theirs, "formula", "1.0", 1))


def test_a_table_without_a_layer_of_the_network_says_which(graph: NetworkGraph) -> None:
    message = (
        "the table does not hold the layer kind 'conv 3x3, stride 1x1, to 8x8, 32 bits'; 'secateur latency build' into "
        "the same file, for this model with its shape and number of classes, adds what is missing"
    )
    table = start_table(FormulaDevice())
    with pytest.raises(TableError, match=f"^{re.escape(message)}$"):
        LatencyModel(graph, table)
    (kind, *_) = needed_kinds(graph, {group.name: 1 for group in graph.prunable}, [8])
    with pytest.raises(TableError, match="8 bits'; 'secateur latency build --integers' into the same file"):
        table.times(kind)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda table: table.update(empty="NaN"), "ValueError: empty of NaN"),
        (lambda table: table["kinds"][0]["ratios"][0].__setitem__(0, -5), "ValueError: a layer's time of -5.0"),
        (lambda table: table["kinds"][0]["ratios"][0].__setitem__(0, 1e999), "ValueError: a layer's time of inf"),
        (
            lambda table: table["kinds"][0].update(outputs=table["kinds"][0]["outputs"][::-1]),
            "ValueError: channel counts [4, 3, 2, 1] in place of rising whole numbers",
        ),
        (
            lambda table: table["calibrations"].update(key={"scale": None}),
            "ValueError: a calibration with scale None",
        ),
    ],
)
def test_a_table_with_numbers_that_cannot_be_is_refused(
    damage: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    build_table(start_table(FormulaDevice()), FormulaDevice(), {CONV: ((3,), (1, 2, 3, 4))}).save(path)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))

    with pytest.raises(TableError) as caught:
        LatencyTable.load(path)
    assert str(caught.value) == f"cannot read the latency table '{path}': {message}; build it again"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format_version": 6}', "cannot read the latency table '{}': KeyError: 'kinds'; build it again"),
        (
            '{"ratio": 1}',
            "'{}' is no latency table; 'secateur latency build --model ... --out TABLE' makes one",
        ),
        *(
            (
                f'{{"format_version": {version}}}',
                f"the latency table '{{}}' has format version {version}, and this release reads 6: build it again, in "
                "a new file, and start anew the runs that were begun with it",
            )
            for version in (5, 9)
        ),
        *(
            (
                f'{{"format_version": 6, "kinds": [], "reference_ns": {number}}}',
                f"cannot read the latency table '{{}}': ValueError: reference_ns of {found}; build it again",
            )
            for number, found in (("0", "0"), ("-5", "-5"), ("NaN", "nan"))
        ),
        (None, "cannot read the latency table '{}': No such file or directory"),
    ],
)
def test_a_file_that_is_no_table_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TableError, match=f"^{re.escape(message.format(path))}$"):
        LatencyTable.load(path)


def test_a_calibration_finds_the_scale_and_the_offset_that_networks_were_made_with(graph: NetworkGraph) -> None:
    table = built(graph, FormulaDevice())
    generator = np.random.default_rng(0)
    plans = generator.integers(1, (41, 25), (60, 2))
    times = np.array([0.7 * by_formula(*plan) + 3_000 for plan in plans.tolist()])

    model = LatencyModel(graph, table)
    found = calibrated(table, model, plans, times / table.reference_ns).calibrations[network_key(graph)]

    assert found.scale == pytest.approx(0.7, rel=0.01)
    assert found.offset * table.reference_ns == pytest.approx(3_000, rel=0.05)
    assert found.error < 0.01


def test_a_calibration_finds_what_integers_and_conversions_were_made_to_cost(graph: NetworkGraph) -> None:
    device = IntegerFormulaDevice()
    needed = needed_kinds(graph, {group.name: 1 for group in graph.prunable}, [8, 32])
    table = build_table(start_table(device), device, needed)
    model = LatencyModel(graph, table, layers=layer_decisions(graph, ["bits"]))
    generator = np.random.default_rng(1)
    plans = np.append(generator.integers(1, (41, 25), (60, 2)), generator.choice([8, 32], (60, 3)), axis=1)
    plans[:10, 2:] = 32
    sums = np.array([model.sums(plan) for plan in plans])
    ratios = 0.05 + sums @ [0.7, 0.9, 0.05, 1e-5]

    found = calibrated(table, model, plans, ratios).calibrations[network_key(graph)]

    assert (found.scale, found.integer_scale) == pytest.approx((0.7, 0.9), rel=0.03)
    assert (found.conversion, found.element) == pytest.approx((0.05, 1e-5), rel=0.1)
    assert found.offset == pytest.approx(0.05, rel=0.1)
    assert found.n_networks + found.n_mixed == 60
    assert found.error < 0.01


def test_conversions_are_never_taken_to_save_time(graph: NetworkGraph) -> None:
    device = IntegerFormulaDevice()
    needed = needed_kinds(graph, {group.name: 1 for group in graph.prunable}, [8, 32])
    table = build_table(start_table(device), device, needed)
    model = LatencyModel(graph, table, layers=layer_decisions(graph, ["bits"]))
    plans = np.append(np.tile([40, 24], (8, 1)), np.random.default_rng(1).choice([8, 32], (8, 3)), axis=1)
    plans[:3, 2:] = 32
    sums = np.array([model.sums(plan) for plan in plans])

    found = calibrated(table, model, plans, 2 + sums @ [0.7, 0.9, -0.05, -1e-5]).calibrations[network_key(graph)]

    assert min(found.conversion, found.element) >= 0


def test_a_calibration_needs_three_networks(graph: NetworkGraph) -> None:
    message = "a calibration fits two numbers to whole networks of floats, got 2; time at least 3"
    table = built(graph, FormulaDevice())
    with pytest.raises(TableError, match=f"^{message}$"):
        calibrated(table, LatencyModel(graph, table), [[40, 24], [20, 24]], [1.0, 2.0])


class Pinned(PyTorchEager):
    """Remembers the processors that it was allowed in each call."""

    def __init__(self) -> None:
        self.allowed: set[tuple[int, ...]] = set()

    def load(self, artifact: Artifact, inputs: tuple[Tensor, ...], threads: int) -> Callable[[], object]:
        return lambda: self.allowed.add(tuple(allowed_cpus()))


@pytest.mark.skipif(len(allowed_cpus()) < 2, reason="there is one processor, or the system does not let one choose")
def test_a_device_stays_on_its_processors_and_is_another_one_without_them() -> None:
    before, runtime = allowed_cpus(), Pinned()
    last = (before[-1],)
    device = LocalDevice(runtime, cpus=last)

    table = start_table(device, n_runs=2)

    assert runtime.allowed == {last} and allowed_cpus() == before
    table.fingerprint.check(LocalDevice(runtime, cpus=last).fingerprint)
    with pytest.raises(TableError, match=rf", cpus {last[0]}; here is .* They differ in cpus '{last[0]}', here ''\. "):
        table.fingerprint.check(LocalDevice(runtime).fingerprint)
    message = f"cpus [4096] cannot be used: this process may run on {before}"
    with pytest.raises(LatencyError, match=f"^{re.escape(message)}$"):
        LocalDevice(runtime, cpus=(4096,))


@pytest.mark.slow
def test_the_table_of_a_real_runtime_orders_layers_by_their_work(tmp_path: Path) -> None:
    device = LocalDevice(find_runtime(ONNXRUNTIME))
    kind = LayerKind("conv", (3, 3), (1, 1), (32, 32))
    table = build_table(start_table(device, n_runs=30), device, {kind: ((16, 128), (128,))}, n_runs=30)
    # Eight times the work, on a machine that may be busy.
    assert table.times(kind)(128, 128) > 1.5 * table.times(kind)(16, 128)
    table.save(tmp_path / "table.json")
    assert json.loads((tmp_path / "table.json").read_text())["fingerprint"]["runtime"] == ONNXRUNTIME
    assert LatencyTable.load(tmp_path / "table.json").fingerprint == device.fingerprint
