"""A finished run, made up, for tests of what is shown of one."""

from experiments.figures import Plan
from experiments.machine import Machine
from experiments.outcome import Latency, MethodOutcome, RunOutcome

MACHINE = Machine(
    processor="a processor",
    cores=2,
    system="Linux",
    python="3.11",
    packages={"torch": "2.15"},
    device="cpu",
    threads=2,
    commit="abc123",
    date="2026-01-02T03:04:05+00:00",
)


def row(method: str, before: float, after: float, **others: object) -> MethodOutcome:
    """One row of the table; accuracies are those of the test."""
    fields = {
        "method": method,
        "search_accuracy": before,
        "validation_accuracy": before,
        "tuned_validation_accuracy": after,
        "test_accuracy": before,
        "tuned_test_accuracy": after,
        "macs": 500,
        "params": 60,
        "size_bytes": 240,
        "evaluations": 10,
        "seconds": 20.0,
        "seconds_evaluating": 19.0,
        "keep_ratios": {"conv1": 0.5, "conv2": 0.75},
        "latencies": tuple(
            Latency(runtime=name, median_ms=ms, lower_quartile_ms=ms - 0.1, upper_quartile_ms=ms + 0.1, n_runs=5)
            for name, ms in (("pytorch-eager", 2.0), ("onnxruntime", 1.0))
        ),
    }
    return MethodOutcome.model_validate(fields | others)


def dense() -> MethodOutcome:
    """The dense network's row."""
    return row("dense", 0.9, 0.91, macs=1000, params=100, size_bytes=400, evaluations=0, seconds=0, keep_ratios={})


def outcome(*rows: MethodOutcome, **others: object) -> RunOutcome:
    """A run with the dense network and these rows."""
    fields = {
        "model": "small_resnet",
        "data": "bundled",
        "budget": "at most 50 % of its MACs",
        "budget_kind": "macs",
        "cost_limit": 500,
        "seed": 0,
        "command": "secateur search digits",
        "machine": MACHINE,
        "n_validation": 750,
        "n_test": 750,
        "rows": (dense(), *rows),
    }
    return RunOutcome.model_validate(fields | others)


def plans() -> list[Plan]:
    """A few evaluated plans."""
    return [
        Plan("probes", 1, 0.85, 800),
        Plan("uniform", 1, 0.7, 498),
        *(Plan("ppo", i, 0.7 + 0.01 * i, 500 - i) for i in range(1, 11)),
    ]
