"""A run that decides densities: its networks run sparse, and the report says how."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import secateur
from experiments.config import RunConfig
from experiments.interrupt import StopFlag
from experiments.outcome import Latency, LayerForm, RunOutcome, headings, missing_speedups, table_cells
from experiments.progress import RunDisplay
from experiments.report import render_report
from experiments.search import start_run
from experiments.sparse_times import sparse_sentences
from experiments.turns import prepared_networks
from pruning.kernels.native import library

from .outcomes import outcome, row
from .tiny import network

needs_kernels = pytest.mark.skipif(library() is None, reason="the kernels are not compiled")


@pytest.fixture(scope="module")
def sparse_run(tiny_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("sparse") / "run"
    options = {"search__decide": ["density"], "search__methods": ["uniform"], "budget": "20% macs"}
    with RunDisplay(quiet=True) as display:
        start_run(tiny_config(**options, search__sparsity="block4"), run, ["secateur"], display, StopFlag())
    return run


@needs_kernels
def test_networks_of_the_run_are_timed_through_the_sparse_plan_with_their_layers_forms(sparse_run: Path) -> None:
    found = RunOutcome.load(sparse_run / "results.json")

    runtimes = {each.method: [latency.runtime for latency in each.latencies] for each in found.rows}
    assert runtimes == {"dense": ["pytorch-eager", "sparse"], "uniform": ["pytorch-eager", "sparse"]}
    policy = secateur.CompressionPolicy.load(sparse_run / "methods" / "uniform" / "policy.json")
    assert {form.layer for form in found.row("uniform").layer_forms} == {"0", "3", "6", "9", "14"}
    for form in found.row("uniform").layer_forms:
        if form.layer in policy.layers:
            assert form.density == pytest.approx(policy.layers[form.layer].density, abs=0.05)
    assert {form.form for form in found.row("dense").layer_forms} == {"dense"}
    assert "Sparse or dense, layer by layer" in (sparse_run / "report.html").read_text()


@needs_kernels
def test_a_saved_network_loads_and_runs_sparse(sparse_run: Path) -> None:
    folder = sparse_run / "methods" / "uniform" / "model"
    model = secateur.load_compressed(folder, lambda: network(num_classes=3, in_channels=1))
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    fast = secateur.sparsify(model, x)
    again = secateur.sparsify(model, x, choices=json.loads(json.dumps(fast.report.choices)))

    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again(x), fast(x), rtol=0, atol=0)
    assert fast.report.native_calls == 1


def timed(method: str, **milliseconds: float) -> dict[str, object]:
    """Fields of a row timed on these runtimes, without any scatter."""
    latencies = tuple(
        Latency(runtime=runtime, median_ms=ms, lower_quartile_ms=ms, upper_quartile_ms=ms, n_runs=5)
        for runtime, ms in milliseconds.items()
    )
    form = LayerForm(layer="conv<1>", form="block 8", density=0.1, stored=0.125, reason=f"{method} is sparse")
    return {"latencies": latencies, "layer_forms": (form,)}


def two_rows() -> RunOutcome:
    dense = row("dense", 0.9, 0.9, **timed("dense", onnxruntime=2.0, sparse=2.5))
    found = outcome(row("ppo", 0.8, 0.88, **timed("ppo", onnxruntime=2.0, sparse=0.5)))
    return found.model_copy(update={"rows": (dense, found.row("ppo"))})


def test_a_sparse_network_is_compared_with_the_dense_one_on_its_fastest_runtime() -> None:
    assert sparse_sentences(two_rows()) == [
        "ppo: 0.500 [0.500-0.500] ms through sparsify, dense 2.00 [2.00-2.00] ms on onnxruntime, 4.0x as fast."
    ]


def test_zeros_count_as_a_speedup_by_their_sparse_time_against_the_fastest_dense_one() -> None:
    # As fast as the dense network on ONNX Runtime, where zeros save nothing.
    assert missing_speedups(two_rows()) == []
    slow = two_rows().row("ppo").model_copy(update=timed("ppo", onnxruntime=2.0, sparse=2.2))
    found = two_rows().model_copy(update={"rows": (two_rows().row("dense"), slow)})

    assert missing_speedups(found) == [
        "ppo on sparse: slower, 1.1 of the dense network's time on onnxruntime (quartiles 1.1 to 1.1)"
    ]
    label = "measured speed, sparse against the dense network on onnxruntime: slower than the dense network"
    assert f"<b>0.91x</b><span>{label}" in render_report(found, [], "")


def test_table_and_report_show_the_sparse_time_and_the_reasons_only_where_there_are_some() -> None:
    assert "sparse ms" not in headings(outcome(row("ppo", 0.8, 0.88)))
    place = headings(two_rows()).index("sparse ms")
    assert [cells[place] for cells in table_cells(two_rows())] == ["2.50 [2.50-2.50]", "0.500 [0.500-0.500]"]

    page = render_report(two_rows(), [], "")
    assert "<td>conv&lt;1&gt;</td><td>block 8</td><td>10.0%</td><td>12.5%</td><td>ppo is sparse</td>" in page
    assert "ppo: 1 of 1 layers run sparse" in page
    assert "layer by layer" not in render_report(outcome(row("ppo", 0.8, 0.88)), [], "")


@needs_kernels
def test_what_cannot_be_prepared_is_named_and_left_out() -> None:
    with RunDisplay(quiet=True) as display:
        said: list[str] = []
        display.say = said.append  # type: ignore[method-assign]
        model = network(num_classes=3, in_channels=1).eval()
        found = prepared_networks(
            {"double": model.double(), "ours": network(3, 1).eval()}, torch.zeros(1, 1, 8, 8), display
        )
    assert list(found) == ["ours"]
    assert said == [
        "warning: double is not timed with its zeros: the runtime 'sparse' cannot prepare Sequential: '0.weight' is "
        "torch.float64 on 'cpu'; sparse networks run in torch.float32 on 'cpu', so convert the network and its inputs "
        "first"
    ]
