"""Measured cost: milliseconds a forward pass, several networks and runtimes interleaved in one run."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from graph_encoder.batches import count_images

from .runtimes import ONNXRUNTIME, PYTORCH, Artifact, LatencyError, Runtime, find_runtime
from .worker import Stopwatch, Timer, allowed_cpus, interleave, refusal_of_cpus, without_waits
from .worker import cpu_name as cpu_name  # read from here by the other rooms

DISTURBED = 0.02
"""A call is disturbed if it waited for a processor longer than this share of its time."""
CONFIDENCE = 0.95
"""Probability that the interval of a comparison holds the median ratio."""
RESOLUTION = 0.01
"""Smallest difference between two times that is worth telling, as a share of the baseline's."""
_LEAST_ROUNDS = math.ceil(1 - math.log2(1 - CONFIDENCE))
"""Fewer hold no interval."""


@dataclass(frozen=True)
class Variant:
    """One network as one runtime takes it.

    Attributes:
        model: name of the network.
        runtime: name of the runtime.
        artifact: a module or an ONNX file, whatever its bits.
        inputs: its own, batch first, on the CPU; those of all networks if None.
    """

    model: str
    runtime: str
    artifact: Artifact
    inputs: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class LatencyEntry:
    """Times of one network on one runtime.

    Attributes:
        model: name of the network.
        runtime: name of the runtime.
        median_ms: median time of a call.
        lower_quartile_ms: a quarter of the calls were faster.
        upper_quartile_ms: a quarter of the calls were slower.
        n_runs: timed calls.
        disturbed: share of the calls that had to wait for a processor.
        times_ms: time of every call, in the order of the rounds.
    """

    model: str
    runtime: str
    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    n_runs: int
    disturbed: float
    times_ms: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Whether a network is faster than a baseline, from the ratios of their times in each round.

    Attributes:
        ratio: median of time over the baseline's time; below 1 is faster.
        low: lower end of the interval that holds the true median with probability `CONFIDENCE`.
        high: its upper end.
        n_runs: rounds.
        repeats_needed: rounds after which the interval would end on this side of 1, or, where the ratio is nearer to
            1 than `RESOLUTION`, would leave no larger difference; more than ``n_runs`` while it is undecided.
    """

    ratio: float
    low: float
    high: float
    n_runs: int
    repeats_needed: int

    @property
    def verdict(self) -> Literal["faster", "slower", "equal", "undecided"]:
        """Where the interval lies: below 1, above 1, around 1 within the resolution, or around 1 and wider."""
        if self.high < 1 or self.low > 1:
            return "faster" if self.high < 1 else "slower"
        return "equal" if self.low > 1 - RESOLUTION and self.high < 1 + RESOLUTION else "undecided"

    def __str__(self) -> str:
        text = f"{self.verdict}: {self.ratio:.3f} of the baseline's time ({self.low:.3f} to {self.high:.3f})"
        if self.verdict != "undecided":
            return text
        return (
            f"{text}; the machine is too noisy to tell them apart in {self.n_runs} rounds, about "
            f"{self.repeats_needed} would be needed"
        )


@dataclass(frozen=True)
class LatencyReport:
    """Times of all networks of one interleaved run, and where they were taken.

    Attributes:
        entries: one for each network and runtime.
        batch_size: images a call.
        threads: threads of each runtime.
        cpu: name of the processor.
        cpus: numbers of the processors that the process was allowed to use; empty where the system does not say.
        versions: version of each runtime.
    """

    entries: tuple[LatencyEntry, ...]
    batch_size: int
    threads: int
    cpu: str
    cpus: tuple[int, ...]
    versions: Mapping[str, str]

    def entry(self, model: str, runtime: str = PYTORCH) -> LatencyEntry:
        """The times of one network on one runtime; `KeyError` if it was not measured."""
        for entry in self.entries:
            if (entry.model, entry.runtime) == (model, runtime):
                return entry
        msg = f"'{model}' was not measured on '{runtime}'; measured: {[(e.model, e.runtime) for e in self.entries]}"
        raise KeyError(msg)

    def joined(self, other: LatencyReport) -> LatencyReport:
        """This report with the entries of another one of the same inputs, threads and processors."""
        return replace(self, entries=self.entries + other.entries, versions={**self.versions, **other.versions})

    def compare(self, model: str, baseline: str, runtime: str = PYTORCH) -> Comparison:
        """Whether ``model`` is faster than ``baseline`` on the same runtime; see `compare`."""
        return compare(self.entry(model, runtime).times_ms, self.entry(baseline, runtime).times_ms)


def measure_latency(
    models: Mapping[str, nn.Module],
    x: Tensor,
    *,
    onnx: Mapping[str, bytes | Path] | None = None,
    n_runs: int = 50,
    n_warmup: int = 10,
    threads: int | None = None,
) -> LatencyReport:
    """Time networks in PyTorch, and ONNX files in ONNX Runtime, in one interleaved run; see `measure`.

    Args:
        models: networks to time with PyTorch, by name; run in eval mode and channels-last.
        x: input of shape ``(batch, ...)`` on the CPU.
        onnx: ONNX files (path or content) to time with ONNX Runtime, by name; each takes ``x`` as its only input.
        n_runs: timed calls of each, at least 5.
        n_warmup: calls made first and thrown away.
        threads: threads of each runtime; PyTorch's present number if not given.
    """
    variants = [Variant(name, PYTORCH, model) for name, model in models.items()]
    variants += [Variant(name, ONNXRUNTIME, source) for name, source in (onnx or {}).items()]
    return measure(variants, x, n_runs=n_runs, n_warmup=n_warmup, threads=threads)


def measure(
    variants: Sequence[Variant],
    inputs: Tensor | tuple[Tensor, ...],
    *,
    n_runs: int = 50,
    n_warmup: int = 10,
    threads: int | None = None,
    cpus: Sequence[int] | None = None,
    stopwatch: Stopwatch | None = None,
) -> LatencyReport:
    """Time every variant, a settled call of each in turn, ``n_runs`` rounds, one runtime after the other.

    Taking turns makes the networks share whatever else the machine does, so that their ratios can be trusted where
    the times themselves drift. The report holds medians and quartiles, not means: one context switch moves a mean
    by more than a pruned layer does. With one thread, the time that a call waited for a processor, which Linux
    counts, is taken off; where it does not count, nothing is. Modes, memory formats, thread count and affinity are
    left as they were.

    Args:
        variants: networks and runtimes.
        inputs: inputs of every network that has none of its own, batch first, on the CPU.
        n_runs: timed calls of each, at least 5.
        n_warmup: calls made first and thrown away.
        threads: threads of each runtime; PyTorch's present number if not given.
        cpus: numbers of the processors to stay on; those allowed now if not given.
        stopwatch: what times a call.

    Raises:
        ValueError: if ``n_runs < 5``, an input is not on the CPU, or there is nothing to time.
        LatencyError: if a runtime is unknown or not installed, or does not take its artifact.
    """
    values = inputs if isinstance(inputs, tuple) else (inputs,)
    _check(variants, values, n_runs)
    stopwatch = stopwatch or Stopwatch()
    threads = threads or torch.get_num_threads()
    runtimes = {name: find_runtime(name) for name in dict.fromkeys(variant.runtime for variant in variants)}
    with affinity(cpus), torch_threads(threads), torch.inference_mode():
        timed: dict[int, LatencyEntry] = {}
        for name, runtime in runtimes.items():
            # One runtime at a time: the idle threads of another one would spin on the processors that this one needs.
            places = [place for place, variant in enumerate(variants) if variant.runtime == name]
            timers = [_timer(runtime, variants[place], values, threads, stopwatch) for place in places]
            elapsed, waited = interleave(timers, n_runs, n_warmup)
            for place, own, waits in zip(places, elapsed, waited, strict=True):
                timed[place] = summarise(variants[place].model, name, own, waits, threads)
        allowed = tuple(allowed_cpus())
    entries = tuple(timed[place] for place in range(len(variants)))
    versions = {name: runtime.version() for name, runtime in runtimes.items()}
    return LatencyReport(entries, count_images([values]), threads, cpu_name(), allowed, versions)


def summarise(
    model: str, runtime: str, elapsed_ns: Sequence[int], waited_ns: Sequence[int], threads: int
) -> LatencyEntry:
    """Median and quartiles of the calls of one network, from what `latency.worker.interleave` returns."""
    elapsed, waited = np.array(elapsed_ns, dtype=float), np.array(waited_ns, dtype=float)
    disturbed = float((waited > DISTURBED * elapsed).mean())
    times_ms = np.array(without_waits(elapsed_ns, waited_ns, threads), dtype=float) / 1e6
    lower, median, upper = (float(q) for q in np.percentile(times_ms, [25, 50, 75]))
    return LatencyEntry(model, runtime, median, lower, upper, len(times_ms), disturbed, tuple(times_ms.tolist()))


def compare(times: ArrayLike, baseline: ArrayLike) -> Comparison:
    """Tell two networks apart by the ratios of their times in the same rounds.

    The interval of the median ratio lies between two order statistics (the sign test inverted: Conover, "Practical
    Nonparametric Statistics", section 3.2), so that it holds whatever the distribution of the ratios. Its width
    shrinks with the square root of the rounds, which gives the rounds that would be needed.

    Args:
        times: times of shape ``(rounds,)``, one for each round, at least 6 (fewer hold no interval at 95 %).
        baseline: times of the baseline in the same rounds.

    Raises:
        ValueError: if there are not as many times as baseline times, or too few.
    """
    mine, other = np.asarray(times, dtype=float), np.asarray(baseline, dtype=float)
    if mine.shape != other.shape or mine.ndim != 1:
        msg = f"times have shape {mine.shape} and the baseline's {other.shape}; each needs one a round"
        raise ValueError(msg)
    ratios = np.sort(mine / other)
    n = len(ratios)
    rank = _lower_rank(n)
    if rank == 0:
        msg = f"{n} rounds hold no interval of confidence {CONFIDENCE:g}; measure at least {_LEAST_ROUNDS}"
        raise ValueError(msg)
    ratio, low, high = float(np.median(ratios)), float(ratios[rank - 1]), float(ratios[n - rank])
    # On the scale on which a ratio and its inverse are alike.
    below, above, distance = math.log(ratio / low), math.log(high / ratio), abs(math.log(ratio))
    if distance < RESOLUTION:
        # Both sides have to end within the resolution.
        half_width, distance = max(below, above), RESOLUTION
    else:
        # The side towards 1 has to end before it.
        half_width = above if ratio < 1 else below
    needed = max(_LEAST_ROUNDS, math.ceil(n * (half_width / distance) ** 2))
    found = Comparison(ratio, low, high, n, needed)
    # A ratio that is itself near the edge of the resolution is undecided with an interval that is narrow enough.
    return replace(found, repeats_needed=max(needed, n + 1)) if found.verdict == "undecided" else found


def _lower_rank(n: int) -> int:
    """Rank (1 is the smallest of ``n``) below which the median lies with probability ``(1 - CONFIDENCE) / 2``."""
    # In whole numbers: a power of a half to the thousandth is no float any more.
    allowed, rank, below = Fraction(1 - CONFIDENCE) / 2 * 2**n, 0, 1
    while below <= allowed:
        rank += 1
        below += math.comb(n, rank)
    return rank


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """PyTorch's number of threads, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def affinity(cpus: Sequence[int] | None) -> Iterator[None]:
    """Keep the threads of this process on some processors for a while; nothing is kept where not given.

    Those that run already, too, for they may be the ones that compute. Each gets back what it had, and those that were
    started meanwhile what the calling one had.

    Raises:
        LatencyError: if this process may not run on one of them, or the system does not let it choose.
    """
    if cpus is None:
        yield
        return
    check_cpus(cpus)
    before = allowed_cpus()
    threads = {}
    for task in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # it may end first
            threads[int(task.name)] = os.sched_getaffinity(int(task.name))
            os.sched_setaffinity(int(task.name), cpus)
    try:
        yield
    finally:
        for task in Path("/proc/self/task").iterdir():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), threads.get(int(task.name), before))


def check_cpus(cpus: Sequence[int]) -> None:
    """Raise `LatencyError` if this process may not run on one of the processors, or cannot choose."""
    if refusal := refusal_of_cpus(cpus):
        raise LatencyError(refusal)


def _timer(runtime: Runtime, variant: Variant, values: tuple[Tensor, ...], threads: int, stopwatch: Stopwatch) -> Timer:
    inputs = values if variant.inputs is None else variant.inputs
    return runtime.timer(runtime.load(variant.artifact, inputs, threads), stopwatch)


def _check(variants: Sequence[Variant], values: tuple[Tensor, ...], n_runs: int) -> None:
    if n_runs < 5:
        msg = f"n_runs is {n_runs}; quartiles need at least 5 timed calls"
        raise ValueError(msg)
    for x in values:
        if x.device.type != "cpu":
            msg = f"x lies on '{x.device}'; inputs are handed over on the CPU, so pass x.cpu()"
            raise ValueError(msg)
    if not variants:
        msg = "there is nothing to time: no network was given"
        raise ValueError(msg)
