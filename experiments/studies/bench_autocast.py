"""A step of training in single precision, under plain autocast, and as fine-tuning takes it.

Run as ``python -m experiments.studies.bench_autocast``.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch.nn import functional as F

from graph_encoder.modes import has_bfloat16, mixed_precision
from latency.measure import cpu_name
from pruning.files import write_atomic

from ..machine import current_commit, keep_freed_memory
from ..models import build_model
from ..pages import Table
from .bench_setup import ratio_with_quartiles, time_calls_in_turn

NETWORKS = {
    "resnet20": (64, 32),
    "mobilenet_v2_cifar": (32, 32),
    "mobilenet_v2": (16, 96),
    "mobilenet_v3_small": (32, 64),
    "efficientnet_b0": (16, 64),
    "mnasnet1_0": (16, 96),
    "convnext_tiny": (8, 64),
}
"""Images of a step and their size: small, so that all of them take seconds on two cores."""


SIDES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "float32": nullcontext,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
    "as fine-tuned": partial(mixed_precision, "cpu", True),
}
WORDS = """A step of training (forward, loss, backward; channels last, random weights and images) in single precision,
under `torch.autocast` to bfloat16, and as fine-tuning takes it with `finetune.autocast`: depthwise convolutions with a
stride, a dilation or a kernel over 3x3 get their gradients from single precision there, as PyTorch has only plain loops
for them in bfloat16. The three take turns. A ratio above 1 says how much faster the step is as fine-tuned, by medians,
with the quartiles over the rounds."""


def main(
    rounds: Annotated[int, typer.Option(help="Timed steps of each side.", min=2)] = 8,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    page: Annotated[Path, typer.Option(help="Page to write.")] = Path("docs/benchmarks/autocast.md"),
) -> None:
    """Time the steps and write a page."""
    if not has_bfloat16("cpu"):
        msg = "PyTorch has no kernels in bfloat16 for this processor, so that there is nothing to compare"
        raise SystemExit(msg)
    torch.set_num_threads(threads)
    keep_freed_memory()  # as training does
    heads = ["network", "images", *(f"ms {side}" for side in SIDES), "float32 over it", "autocast over it"]
    rows: list[list[str]] = []
    for network, (n, size) in NETWORKS.items():
        seconds, _ = time_calls_in_turn(_steps(network, n, size), rounds)
        own = seconds["as fine-tuned"]
        times = [f"{1e3 * np.median(side):.0f}" for side in seconds.values()]
        ratios = [ratio_with_quartiles(seconds[side], own) for side in ("float32", "autocast")]
        rows.append([network, f"{n} of {size}x{size}", *times, *ratios])
        command = shlex.join(["python", "-m", "experiments.studies.bench_autocast", *sys.argv[1:]])
        record = f"{cpu_name()}, {threads} thread(s), torch {torch.__version__}, commit {current_commit()}."
        table = Table(heads, rows, words=("network", "images")).markdown()
        write_atomic(
            page,
            ("\n\n".join(["# Training in bfloat16", WORDS, table, f"Command: `{command}`.", record]) + "\n").encode(),
        )


def _steps(network: str, n: int, size: int) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    model = build_model(network, 10).train().to(memory_format=torch.channels_last)
    x, labels = torch.randn(n, 3, size, size).to(memory_format=torch.channels_last), torch.randint(10, (n,))

    def step(context: Callable[[], AbstractContextManager[object]]) -> None:
        with context():
            loss = F.cross_entropy(model(x).float(), labels)
        model.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]

    return {side: partial(step, context) for side, context in SIDES.items()}


if __name__ == "__main__":
    typer.run(main)
