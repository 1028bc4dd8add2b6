"""Where networks are timed, and what it is: the processor, the runtime and its threads; and how fast it is just now."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .layers import empty_artifact, reference_layer
from .measure import LatencyReport, Variant, affinity, check_cpus, measure, torch_threads
from .pace import PAUSE_S, Pace
from .runtimes import Artifact, Fed, LatencyError, Runtime
from .worker import Processor, Stopwatch, interleave, without_waits

REFERENCE = "reference layer"
"""Its name in the reports of devices."""
_LOOKS = 3
"""Readings of it that tell how fast it runs now."""

Floats = NDArray[np.float64]
Inputs = Tensor | tuple[Tensor, ...]


class TableError(LatencyError):
    """A table that cannot be read, or is not of this device or this network."""


@dataclass(frozen=True)
class Fingerprint:
    """What a table holds for.

    Attributes:
        processor: what computes.
        runtime: name of the runtime.
        version: its version.
        threads: its threads.
        cpus: numbers of the processors that they stay on; empty if they may run on all.
    """

    processor: Processor
    runtime: str
    version: str
    threads: int
    cpus: tuple[int, ...] = ()

    def __str__(self) -> str:
        pinned = f", cpus {', '.join(map(str, self.cpus))}" if self.cpus else ""
        return f"{self.runtime} {self.version}, {self.threads} thread(s), on {self.processor.name}{pinned}"

    def differences(self, other: Fingerprint) -> list[str]:
        """What sets ``other`` apart, each with both values; empty for the same device."""
        mine, theirs = (
            {f"processor {name}": value for name, value in asdict(one.processor).items()}
            | {name: getattr(one, name) for name in ("runtime", "version", "threads", "cpus")}
            for one in (self, other)
        )
        return [
            f"{name} {_told(mine[name])}, here {_told(theirs[name])}" for name in mine if mine[name] != theirs[name]
        ]

    def check(self, here: Fingerprint) -> None:
        """Raise `TableError` if what a table was measured with is another device than ``here``."""
        if differences := self.differences(here):
            msg = (
                f"the table was measured with {self}; here is {here}. They differ in {'; '.join(differences)}. Times "
                "of one do not hold for the other: build a table here, or go to the device of the table"
            )
            raise TableError(msg)


def _told(value: Any) -> str:
    return f"'{' '.join(map(str, value)) if isinstance(value, tuple) else value}'"


class Device(Protocol):
    """Where networks are timed: this machine, or another one."""

    @property
    def takes(self) -> str:
        """What its runtime takes: ``"module"`` or ``"onnx"``."""

    @property
    def fingerprint(self) -> Fingerprint:
        """What it is."""

    def times_ns(self, networks: Sequence[Fed], n_runs: int, n_warmup: int, *, settled: bool = True) -> Floats:
        """Nanoseconds of each network on its inputs, interleaved: shape ``(networks, n_runs)``."""


class MeasuringDevice(Device, Protocol):
    """A device that says more of the networks that it times."""

    def measure(
        self, networks: Mapping[str, Artifact], inputs: Inputs, *, n_runs: int = 50, with_reference: bool = False
    ) -> LatencyReport:
        """Times of networks that take the same inputs, if asked with the reference layer, called `REFERENCE`."""


@dataclass(frozen=True)
class LocalDevice:
    """This machine.

    Attributes:
        runtime: what runs the networks.
        threads: its threads.
        cpus: numbers of the processors to stay on; all that are allowed if empty. `LatencyError` if one is not.
    """

    runtime: Runtime
    threads: int = 1
    cpus: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.cpus:
            check_cpus(self.cpus)

    @property
    def takes(self) -> str:
        """What the runtime takes."""
        return self.runtime.takes

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Processor, runtime, version, threads and where they stay."""
        return Fingerprint(Processor.here(), self.runtime.name, self.runtime.version(), self.threads, self.cpus)

    def times_ns(self, networks: Sequence[Fed], n_runs: int, n_warmup: int, *, settled: bool = True) -> Floats:
        """Time the networks in turn, less what a call of one thread waited for a processor."""
        stopwatch = Stopwatch()
        with self.in_force(), torch.inference_mode():
            calls = [self.runtime.load(artifact, inputs, self.threads) for artifact, inputs in networks]
            timers = [self.runtime.timer(call, stopwatch) for call in calls]
            elapsed, waited = interleave(timers, n_runs, n_warmup, settled=settled)
        rows = [without_waits(own, waits, self.threads) for own, waits in zip(elapsed, waited, strict=True)]
        return np.array(rows, dtype=float)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """PyTorch's number of threads, and the processors that this one may run on, as the device has them."""
        with affinity(self.cpus or None), torch_threads(self.threads):
            yield

    def measure(
        self,
        networks: Mapping[str, Artifact],
        inputs: Inputs,
        *,
        n_runs: int = 50,
        n_warmup: int = 10,
        with_reference: bool = False,
    ) -> LatencyReport:
        """Time networks that take the same inputs, a settled call of each in turn; see `latency.measure.measure`."""
        variants = [Variant(name, self.runtime.name, artifact) for name, artifact in networks.items()]
        if with_reference:
            variants.append(Variant(REFERENCE, self.runtime.name, *reference_layer(self.takes)))
        return measure(variants, inputs, n_runs=n_runs, n_warmup=n_warmup, threads=self.threads, cpus=self.cpus or None)


def pace_of(device: Device, known_ns: float = math.inf) -> Pace:
    """How fast the reference layer runs: the least of a few readings now, and of what a table says.

    Raises:
        LatencyError: if the runtime cannot run the layer.
    """
    try:
        now, _ = quietest_look(device, n_runs=30, n_looks=_LOOKS)
    except LatencyError:
        raise
    except Exception as error:  # those of a runtime share no base class
        msg = f"runtime '{device.fingerprint.runtime}' cannot run the reference layer: {error}"
        raise LatencyError(msg) from error
    return Pace(min(now, known_ns))


def measured_quietly(
    device: MeasuringDevice, pace: Pace, networks: Mapping[str, Artifact], inputs: Inputs, n_runs: int
) -> LatencyReport:
    """Times of networks in rounds in which the reference layer is fast; see `Pace.quietest`."""

    def read() -> tuple[LatencyReport, float]:
        report = device.measure(networks, inputs, n_runs=n_runs, with_reference=True)
        return report, 1e6 * report.entry(REFERENCE, device.fingerprint.runtime).median_ms

    return pace.quietest(read)


def quietest_look(device: Device, n_runs: int, n_looks: int = 1) -> tuple[float, float]:
    """Median nanoseconds of the reference layer, and an empty network's time over it, in the quietest of some readings.

    Args:
        device: where to measure.
        n_runs: timed calls of each reading.
        n_looks: readings, `latency.pace.PAUSE_S` apart.
    """
    looks = []
    for look in range(n_looks):
        if look:
            time.sleep(PAUSE_S)
        reference, empty = device.times_ns(anchors(device), n_runs, n_warmup=20)
        looks.append((float(np.median(reference)), float(np.median(empty / reference))))
    return min(looks)


def anchors(device: Device) -> list[Fed]:
    """The reference layer and the empty network."""
    return [reference_layer(device.takes), (empty_artifact(device.takes), (torch.zeros(1, 1),))]
