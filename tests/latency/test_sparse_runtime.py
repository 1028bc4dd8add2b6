import re

import pytest
import torch
from torch import nn

import latency.runtimes
from latency.measure import Variant, measure, torch_threads
from latency.runtimes import SPARSE, LatencyError, fastest_calls, find_runtime, prepare_sparse
from latency.worker import Stopwatch
from pruning.kernels.native import library

needs_kernels = pytest.mark.skipif(library() is None, reason="the kernels are not compiled")


def half_empty() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 8)).eval()
        model[3].weight.data *= torch.rand(8, 16 * 64) < 0.1
    return model


@needs_kernels
def test_a_sparse_network_is_measured_and_computes_what_the_module_does() -> None:
    model, x = half_empty(), torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    report = measure([Variant("a", SPARSE, model), Variant("b", SPARSE, prepare_sparse(model, (x,)))], x, n_runs=5)
    with torch.inference_mode():
        torch.testing.assert_close(find_runtime(SPARSE).load(model, (x,), 1)(), model(x), rtol=1e-4, atol=1e-4)
    assert [entry.model for entry in report.entries] == ["a", "b"]
    assert "kernels for" in report.versions[SPARSE]


@needs_kernels
def test_layers_are_chosen_by_the_times_of_this_room(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 3, 8, 8)
    for fastest, form in (("dense", "dense"), ("unstructured", "unstructured")):
        monkeypatch.setattr(
            latency.runtimes,
            "fastest_calls",
            lambda calls, fastest=fastest: {name: 1 + (name != fastest) for name in calls},
        )
        assert prepare_sparse(half_empty(), (x,)).report.choices == {"0": "dense", "3": form}


@pytest.mark.parametrize(
    ("threads", "seconds"), [(1, {"much": 4e-6, "little": 1e-6}), (2, {"much": 9e-6, "little": 1e-6})]
)
def test_the_fastest_call_counts_and_with_one_thread_less_what_it_waited(
    monkeypatch: pytest.MonkeyPatch, threads: int, seconds: dict[str, float]
) -> None:
    now = waited = 0
    hindered = iter([7000, *[0] * 100])

    def much() -> None:
        nonlocal now, waited
        now, waited = now + 9000, waited + 5000

    def little() -> None:
        nonlocal now
        now += 1000 + next(hindered)

    monkeypatch.setattr(latency.runtimes, "Stopwatch", lambda: Stopwatch(lambda: now, lambda: waited))
    with torch_threads(threads):
        assert fastest_calls({"much": much, "little": little}) == pytest.approx(seconds)


@needs_kernels
def test_a_network_that_cannot_be_prepared_is_named() -> None:
    message = (
        "the runtime 'sparse' cannot prepare Sequential: Sequential is in training mode; call model.eval() before "
        "preparing it for inference"
    )
    with pytest.raises(LatencyError, match=f"^{re.escape(message)}$"):
        prepare_sparse(half_empty().train(), (torch.zeros(1, 3, 8, 8),))
    with pytest.raises(LatencyError, match=r"^the runtime 'sparse' takes a torch.nn.Module, got bytes$"):
        find_runtime(SPARSE).load(b"", (), 1)


def test_without_compiled_kernels_the_runtime_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency.runtimes, "library", lambda: None)
    message = (
        "the runtime 'sparse' needs the compiled kernels, which the install makes where it finds a C++ compiler; "
        "install g++ or clang++ and secateur again"
    )
    with pytest.raises(LatencyError, match=f"^{re.escape(message)}$"):
        find_runtime(SPARSE)
