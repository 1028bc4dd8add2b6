"""How fast a step of fine-tuning with a fixed pattern of zeros is, and how much memory it takes, beside masks."""

from __future__ import annotations

import ctypes
import multiprocessing
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
from .bench_setup import Reading, Scheme, fastest, prune, random_network, ratio_with_quartiles, time_in_turn

SCHEMES = (Scheme(16, 0.2), Scheme(1, 0.2), Scheme(1, 0.1))
MASKS = ("masks", "masks, channels last")
HELD = ("hold_zeros", "hold_zeros(skip=True)")
TARGET = (1.0, 1.3)
_M_MMAP_THRESHOLD = -3
"""Parameter of mallopt(3): larger allocations are maps of their own, which the system gets back when they are freed."""
_LARGE = 1 << 16
"""Bytes from which on that is so."""


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
            seconds, busy = time_in_turn(steps, rounds)
        best, frugal = fastest(MASKS, seconds), fastest(MASKS, busy)
        for side in steps:
            kept, peak = memory_of(side, scheme, batch, threads)
            by_work = float(np.median(busy[frugal]) / np.median(busy[side]))
            times = [f"{np.median(seconds[side]) * 1e3:.1f}", ratio_with_quartiles(seconds[best], seconds[side])]
            rows.append([str(scheme), side, *times, f"{by_work:.2f}", f"{kept:.1f}", f"{peak:.1f}"])
        for side in HELD:
            ratio = float(np.median(seconds[best]) / np.median(seconds[side]))
            what = f"training step of ResNet-56, batch {batch}, {scheme}, {side}"
            readings.append(Reading(what, threads, ratio, ratio, None, *TARGET))
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

    seconds, _ = time_in_turn({side: partial(backward, run) for side, run in sides.items()}, rounds)
    *others, own = sides
    best = fastest(others, seconds)
    rows = [
        [side, f"{np.median(times) * 1e3:.2f}", ratio_with_quartiles(seconds[best], times)]
        for side, times in seconds.items()
    ]
    table = Table(["side", "ms", "ratio to the faster of the others (quartiles)"], rows).markdown()
    ratio = float(np.median(seconds[best]) / np.median(seconds[own]))
    return table, [Reading("mask and fake-quantize in one pass", threads, ratio, ratio, None, None, None)]
