"""What the benchmarks of the kernels share: zeros at random, timing in turn, and readings beside their targets."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from latency.measure import cpu_name
from latency.worker import Timer, interleave
from pruning.files import write_atomic
from pruning.kernels.native import Library, library

from ..pages import Table


@dataclass(frozen=True)
class Scheme:
    """How a layer is made sparse: the largest of the wanted blocks that divides its channels."""

    block: int
    density: float

    def block_of(self, out_channels: int) -> int:
        """The block for a layer of so many output channels."""
        return next(block for block in (self.block, 8, 4, 1) if block <= self.block and not out_channels % block)

    def mask(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Which weights of a layer are not zero, at random."""
        block = self.block_of(shape[0])
        kept = torch.rand(shape[0] // block, 1, *shape[1:], generator=generator) < self.density
        return kept.expand(-1, block, *shape[1:]).flatten(0, 1)

    def __str__(self) -> str:
        name = "unstructured" if self.block == 1 else f"block {self.block}"
        return f"{name}, {1 - self.density:.0%}"


@dataclass(frozen=True)
class Reading:
    """One ratio of the page, beside what it should be.

    Attributes:
        what: what was measured, in words.
        threads: of PyTorch meanwhile.
        ratio: time of the best dense side over that of the sparse one.
        to_torch: the same for the best layout of eager PyTorch.
        ideal: what the non-zeros would allow, or None.
        least: the ratio that it should at least be, or None.
        goal: the ratio that is aimed at, or None.
    """

    what: str
    threads: int
    ratio: float
    to_torch: float
    ideal: float | None
    least: float | None
    goal: float | None

    @property
    def row(self) -> list[str]:
        """As a row of the table of targets."""
        ideal, least, goal = ("" if value is None else f"{value:.1f}" for value in (self.ideal, self.least, self.goal))
        # What the page prints is what is compared: 1.996 is printed as 2.00.
        ratio = round(self.ratio, 2)
        reached = ["" if wanted is None else "yes" if ratio >= wanted else "no" for wanted in (self.least, self.goal)]
        times = [f"{ratio:.2f}", f"{self.to_torch:.2f}", ideal]
        return [self.what, str(self.threads), *times, least, reached[0], goal, reached[1]]


def table_of(readings: Iterable[Reading]) -> str:
    """All readings as Markdown."""
    heads = ["what", "threads", "ratio", "to PyTorch's best layout", "ideal", "at least", "reached", "goal", "reached"]
    return Table(heads, [reading.row for reading in readings], words=("reached",)).markdown()


def machine_line(native: Library) -> str:
    """What the figures of a page were measured on."""
    versions = f"torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}, kernels: {native.instruction_set}"
    return f"{cpu_name()}, {versions}; one thread multiplies and adds at {native.peak_flops() / 1e9:.0f} GFLOP/s."


def require_library() -> Library:
    """The compiled library, or an end with what to do."""
    native = library()
    if native is None:
        msg = "the sparse kernels are not compiled; run: python setup.py build_ext --inplace"
        raise SystemExit(msg)
    return native


def write_page(page: Path, head: Sequence[str], measured: Iterable[tuple[str, str, list[Reading]]]) -> None:
    """Write a page after each of its tables, so that a run that is cut short keeps what it has.

    Args:
        page: file to write.
        head: paragraphs before the table of targets.
        measured: title, table and ratios of each section, measured as they are asked for.
    """
    readings: list[Reading] = []
    sections: list[str] = []
    for title, table, found in measured:
        readings += found
        sections += [f"## {title}", table]
        write_atomic(
            page, ("\n\n".join([*head, "## Beside the targets", table_of(readings), *sections]) + "\n").encode()
        )


def time_calls_in_turn(
    sides: dict[str, Callable[[], object]], rounds: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Seconds of each call by the clock and of processor time, by side, shape ``(rounds,)``.

    Each round starts one side later; see `latency.worker.interleave`.
    """
    elapsed, busy = interleave([_processor_timer(call) for call in sides.values()], rounds, n_warmup=3)
    first, second = (dict(zip(sides, np.array(readings) / 1e9, strict=True)) for readings in (elapsed, busy))
    return first, second


def _processor_timer(call: Callable[[], object]) -> Timer:
    """Reads the clock and the processor time of all threads; `latency.worker.Stopwatch` sees one thread only."""

    def timed() -> tuple[int, int]:
        start, start_busy = time.perf_counter_ns(), time.process_time_ns()
        call()
        return time.perf_counter_ns() - start, time.process_time_ns() - start_busy

    return timed


def ratio_with_quartiles(base: np.ndarray, side: np.ndarray) -> str:
    """Ratio of the medians of two sides, with the quartiles of the ratio over the rounds."""
    low, high = np.percentile(base / side, [25, 75])
    return f"{np.median(base) / np.median(side):.2f} ({low:.2f} to {high:.2f})"


def fastest(sides: Iterable[str], seconds: Mapping[str, np.ndarray]) -> str:
    """The side with the least median."""
    return min(sides, key=lambda side: float(np.median(seconds[side])))


def prune(model: nn.Module, scheme: Scheme, generator: torch.Generator) -> nn.Module:
    """A copy with random zeros in all convolutions but the first."""
    pruned = copy.deepcopy(model)
    for module in [module for module in pruned.modules() if isinstance(module, nn.Conv2d)][1:]:
        module.weight.data *= scheme.mask(module.weight.shape, generator)
    return pruned


def processor_time_ratio(busy: dict[str, np.ndarray], dense: Iterable[str], side: str) -> float:
    """How much more processor time the most frugal dense side takes than a sparse one, by medians."""
    return float(min(np.median(busy[name]) for name in dense) / np.median(busy[side]))


def geometric_mean(ratios: Sequence[float], counts: Sequence[int]) -> float:
    """Of ratios, each as often as its layer occurs."""
    return math.exp(sum(n * math.log(ratio) for ratio, n in zip(ratios, counts, strict=True)) / sum(counts))


def random_network(constructor: Callable[[], nn.Module], size: int) -> tuple[nn.Module, Tensor]:
    """A network with random weights, and an input."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return constructor().eval(), torch.randn(1, 3, size, size)
