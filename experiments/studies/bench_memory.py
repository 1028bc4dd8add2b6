"""What it saves that a search keeps the memory that it frees (`experiments.machine.keep_freed_memory`).

Run as ``python -m experiments.studies.bench_memory``, on Linux with glibc. Each side is a process of its own, and the
two take turns.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import nn
from torch.nn import functional as F

from graph_encoder.modes import has_bfloat16
from latency.measure import cpu_name
from pruning.files import write_atomic
from pruning.integer_network import in_integers
from pruning.layer_policy import LayerPolicy
from pruning.quantize import quantize_layers

from ..machine import current_commit, keep_freed_memory
from ..models import build_model
from ..pages import Table
from .bench_setup import ratio_with_quartiles

NETWORKS = ("resnet56", "resnet18_cifar", "mobilenet_v2_cifar")
SCORED, TRAINED = 250, 128
"""Images of a batch, as `search.batch_size` and `train.batch_size` have them by default."""
N_WARMUP = 2
SIDES = {"given back": False, "kept": True}
WORDS = f"""Each process runs one batch again and again, in turns with the other one: forward in evaluation mode
({SCORED} images), in single precision and with 8 bits in integers as candidates are scored, and a step of training
({TRAINED} images, in bfloat16 where PyTorch has it). Weights and images are random. A ratio above 1 says that keeping
the memory is faster, by medians, with the quartiles over the rounds; the peak is that of the whole process."""

_call: Callable[[], object]


def main(
    rounds: Annotated[int, typer.Option(help="Timed batches of each side.", min=2)] = 12,
    threads: Annotated[
        list[int] | None, typer.Option(help="CPU threads; several may be given.  [default: 1, 2]")
    ] = None,
    page: Annotated[Path, typer.Option(help="Page to write.")] = Path("docs/benchmarks/memory.md"),
) -> None:
    """Run the same work in processes that keep freed memory and in others that do not, and write a page."""
    rows: list[list[str]] = []
    heads = [
        "network",
        "work",
        "threads",
        "ms given back",
        "ms kept",
        "ratio (quartiles)",
        "peak, MiB",
        "peak kept, MiB",
    ]
    record = f"{cpu_name()}, torch {torch.__version__}, commit {current_commit()}."
    command = f"Command: `python -m experiments.studies.bench_memory {' '.join(sys.argv[1:])}`".rstrip(" `") + "`."
    for n_threads in threads or [1, 2]:
        for network in NETWORKS:
            for work in _WORK:
                seconds, peaks = _in_turn(network, work, n_threads, rounds)
                times = [f"{1e3 * np.median(side):.1f}" for side in seconds]
                ratio = ratio_with_quartiles(*seconds)
                rows.append([network, work, str(n_threads), *times, ratio, *(f"{peak:,.0f}" for peak in peaks)])
                # A run that is cut short keeps what it has.
                table = Table(heads, rows, words=("network", "work")).markdown()
                text = "\n\n".join(["# Memory that a search keeps", WORDS, table, command, record]) + "\n"
                write_atomic(page, text.encode())


def _in_turn(network: str, work: str, threads: int, rounds: int) -> tuple[list[np.ndarray], list[float]]:
    """Seconds of each round, ``(rounds,)``, and the peak of memory, of either side."""
    context = multiprocessing.get_context("spawn")
    pools = [
        ProcessPoolExecutor(1, context, initializer=_set_up, initargs=(network, work, threads, kept))
        for kept in SIDES.values()
    ]
    found = np.zeros((len(pools), N_WARMUP + rounds))
    try:
        for place in range(found.shape[1]):
            # Each round starts with the other one.
            for side in np.roll(range(len(pools)), place):
                found[side, place] = pools[side].submit(_timed).result()
        peaks = [pool.submit(_peak).result() for pool in pools]
    finally:
        for pool in pools:
            pool.shutdown()
    return list(found[:, N_WARMUP:]), peaks


def _set_up(network: str, work: str, threads: int, kept: bool) -> None:
    global _call
    if kept and not keep_freed_memory():
        msg = "the C library is not glibc, and has no such choice"
        raise RuntimeError(msg)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    _call = _WORK[work](build_model(network, 10).to(memory_format=torch.channels_last))


def _timed() -> float:
    start = time.perf_counter()
    _call()
    return time.perf_counter() - start


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _images(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32).to(memory_format=torch.channels_last)


def _scored(model: nn.Module) -> Callable[[], object]:
    return partial(torch.inference_mode()(model.eval().forward), _images(SCORED))


def _scored_in_integers(model: nn.Module) -> Callable[[], object]:
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    bits = dict.fromkeys(layers, LayerPolicy(weight_bits=8, act_bits=8))
    return _scored(in_integers(quantize_layers(model.eval(), bits, [_images(16)]).eval()))


def _trained(model: nn.Module) -> Callable[[], object]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    x, labels = _images(TRAINED), torch.randint(10, (TRAINED,))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16("cpu")):
            loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


_WORK = {"scored": _scored, "scored with 8 bits": _scored_in_integers, "trained": _trained}


if __name__ == "__main__":
    typer.run(main)
