"""How fast a step of fine-tuning with a fixed pattern of zeros is, and how much memory it takes, beside masks.

Run as ``python -m experiments.studies.bench_training``. All sides of a table are called in turn in one process.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as masking

from pruning.kernels.functional import mask_fake_quantize
from pruning.sparse_training import hold_zeros

from ..pages import Table
from ..resnet import CifarResNet
from .bench_setup import (
    Reading,
    Scheme,
    fastest,
    machine_line,
    prune,
    random_network,
    ratio_with_quartiles,
    require_library,
    time_calls_in_turn,
    write_page,
)

SCHEMES = (Scheme(16, 0.2), Scheme(1, 0.2), Scheme(1, 0.1))
MASKS = ("masks", "masks, channels last")
HELD = ("hold_zeros", "hold_zeros(skip=True)")
TARGET = (1.0, 1.3)
_M_MMAP_THRESHOLD = -3
"""Parameter of mallopt(3): larger allocations are maps of their own, which the system gets back when they are freed."""
_LARGE = 1 << 16
"""Bytes from which on that is so."""


EXPLANATION = (
    "All sides of a table are called in turn in one process. A ratio is the median of the best of the others over that "
    "of the side, with the quartiles over the rounds; beside it stands the same ratio of the processor time of all "
    "threads together, which leaves out what other programs did meanwhile. Zeros are at random in all convolutions but "
    "the first."
)


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each side")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="*", default=[32], help="images of a step")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks/training.md"), help="page to write")
    options = parser.parse_args()
    command = f"Command: `python -m experiments.studies.bench_training {' '.join(sys.argv[1:])}`."
    head = ["# Fine-tuning with a fixed pattern beside masks", machine_line(require_library()), EXPLANATION, command]
    write_page(options.page, head, measured_sections(options))


def measured_sections(options: argparse.Namespace) -> Iterator[tuple[str, str, list[Reading]]]:
    """Title, table and ratios of everything that the options ask for, as it is measured."""
    for threads in options.threads:
        torch.set_num_threads(threads)
        for batch in options.batches:
            title = f"Fine-tuning ResNet-56 for CIFAR with a fixed pattern, batch {batch}, {threads} thread(s)"
            yield title, *bench_training(batch, options.rounds, threads)
        title = f"Mask and fake-quantize a weight of 512x512x3x3, forward and backward, {threads} thread(s)"
        yield title, *bench_fake_quantize(options.rounds, threads)


def bench_training(batch: int, rounds: int, threads: int) -> tuple[str, list[Reading]]:
    """The table of all schemes as Markdown, and the ratios to the faster of the two layouts with masks."""
    text = (
        "Masks are those of torch.nn.utils.prune, float32; hold_zeros runs channels last, as finetune does. The "
        "memory kept is that of the tensors from the forward to the backward pass; the peak is that by which resident "
        "memory grows within a step, over three steps after two others, each side in a process of its own (Linux with "
        "glibc), where freed blocks of 64 KiB and more go back to the system at once."
    )
    heads = ["scheme", "side", "ms a step", "ratio to masks, best layout (quartiles)", "of processor time", "MiB kept"]
    rows, readings = [], []
    for scheme in SCHEMES:
        with ExitStack() as stack:
            steps = {side: stack.enter_context(training_step(side, scheme, batch)) for side in (*MASKS, *HELD)}
            seconds, busy = time_calls_in_turn(steps, rounds)
        best, frugal = fastest(MASKS, seconds), fastest(MASKS, busy)
        memory = {side: memory_of(side, scheme, batch, threads) for side in steps}
        for side, (kept, peak) in memory.items():
            by_work = float(np.median(busy[frugal]) / np.median(busy[side]))
            times = [f"{np.median(seconds[side]) * 1e3:.1f}", ratio_with_quartiles(seconds[best], seconds[side])]
            rows.append([str(scheme), side, *times, f"{by_work:.2f}", f"{kept:.1f}", f"{peak:.1f}"])
        for side in HELD:
            ratio = float(np.median(seconds[best]) / np.median(seconds[side]))
            what = f"training step of ResNet-56, batch {batch}, {scheme}, {side}"
            readings.append(Reading(what, threads, ratio, ratio, None, *TARGET))
            saved = min(memory[other][1] for other in MASKS) / memory[side][1]
            readings.append(Reading(f"peak memory of the {what}", threads, saved, saved, None, 1.0, None))
    table = Table([*heads, "MiB at the peak"], rows, words=("side",)).markdown()
    return f"{text}\n\n{table}", readings


@contextmanager
def training_step(side: str, scheme: Scheme, batch: int) -> Iterator[Callable[[], object]]:
    """A step of `pruning.finetune`'s loop on a network that holds zeros, kept as ``side`` says."""
    model = prune(random_network(lambda: CifarResNet(9), 32)[0], scheme, torch.Generator().manual_seed(1)).train()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (batch,), generator=generator)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    del layers["conv1"]
    with ExitStack() as stack:
        if side in MASKS:
            for module in layers.values():
                masking.custom_from_mask(module, "weight", module.weight != 0)  # type: ignore[no-untyped-call]
        else:
            stack.enter_context(hold_zeros(model, layers, skip=side == HELD[1]))
        if side != MASKS[0]:
            x = x.contiguous(memory_format=torch.channels_last)
        if side == MASKS[1]:
            model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4, nesterov=True)

        def step() -> None:
            loss = F.cross_entropy(model(x), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        yield step


def memory_of(side: str, scheme: Scheme, batch: int, threads: int) -> tuple[float, float]:
    """MiB kept for the backward pass, and by which resident memory grows within a step, in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_memory_here, side, scheme, batch, threads).result()


def _memory_here(side: str, scheme: Scheme, batch: int, threads: int) -> tuple[float, float]:
    torch.set_num_threads(threads)
    # glibc would keep what is freed, in gaps that can take more than a step's tensors do.
    if not ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE):
        msg = "mallopt refused to set the threshold of mapped memory; peaks would count the allocator's gaps"
        raise RuntimeError(msg)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with training_step(side, scheme, batch) as step:
        # The first steps also load code and make the optimizer's momenta.
        for _ in range(2):
            step()
        # What `getrusage` calls the peak begins with that of the parent process; writing 5 begins it anew (proc(5)).
        Path("/proc/self/clear_refs").write_text("5")
        before = _peak_kib()
        for _ in range(3):
            step()
        growth = _peak_kib() - before
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            step()
    return sum(kept.values()) / 2**20, growth / 1024


def _peak_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def bench_fake_quantize(rounds: int, threads: int) -> tuple[str, list[Reading]]:
    """One pass over the weights against three, and against PyTorch's own fake quantization of the masked weight."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 512, 3, 3, generator=generator).requires_grad_()
    mask = torch.rand(weight.shape, generator=generator) < 0.2
    scale, lowest, highest = weight.detach().abs().amax((1, 2, 3)) / 127, -127, 127
    zero_point, upstream = torch.zeros(512, dtype=torch.int32), torch.randn(weight.shape, generator=generator)

    def three_passes() -> Tensor:
        levels = weight / scale.reshape(-1, 1, 1, 1)
        rounded = levels + (levels.round() - levels).detach()
        return rounded.clamp(lowest, highest) * scale.reshape(-1, 1, 1, 1) * mask

    sides: dict[str, Callable[[], Tensor]] = {
        "rounding, scaling, masking": three_passes,
        "mask, then torch.fake_quantize": lambda: torch.fake_quantize_per_channel_affine(
            weight * mask, scale, zero_point, 0, lowest, highest
        ),
        "mask_fake_quantize": lambda: mask_fake_quantize(weight, mask, scale, lowest, highest),
    }

    def backward(run: Callable[[], Tensor]) -> object:
        return torch.autograd.grad(run(), weight, upstream)

    seconds, _ = time_calls_in_turn({side: partial(backward, run) for side, run in sides.items()}, rounds)
    *others, own = sides
    best = fastest(others, seconds)
    rows = [
        [side, f"{np.median(times) * 1e3:.2f}", ratio_with_quartiles(seconds[best], times)]
        for side, times in seconds.items()
    ]
    table = Table(["side", "ms", "ratio to the faster of the others (quartiles)"], rows).markdown()
    ratio = float(np.median(seconds[best]) / np.median(seconds[own]))
    return table, [Reading("mask and fake-quantize in one pass", threads, ratio, ratio, None, None, None)]


if __name__ == "__main__":
    main()
