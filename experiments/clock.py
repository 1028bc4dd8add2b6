"""The device of a latency table, where it is this machine: networks timed there against the dense one."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from latency.device import Fingerprint, LocalDevice, measured_quietly, pace_of
from latency.measure import LatencyReport, Variant, measure
from latency.pace import Pace
from latency.runtimes import Artifact, LatencyError, Runtime, find_runtime
from latency.table import LatencyTable
from pruning.export import export_onnx

ROUNDS = 60
"""Rounds in which networks and the dense one take turns."""


@dataclass(frozen=True)
class Clock:
    """Times networks as the device of a table does; build it with `Clock.of_table`.

    Attributes:
        device: this machine with the runtime of the table, its threads, and the processors that they stay on.
        known_ns: time of the reference layer by the table.
    """

    device: LocalDevice
    known_ns: float

    @classmethod
    def of_table(cls, table: LatencyTable) -> Clock:
        """The clock of the table's device.

        Raises:
            TableError: if that is not this machine, with both named.
            LatencyError: if its runtime is not installed, or its processors are not this process's to use.
        """
        asked = table.fingerprint
        device = LocalDevice(find_runtime(asked.runtime), asked.threads, asked.cpus)
        asked.check(device.fingerprint)
        return cls(device, table.reference_ns)

    def artifact(self, network: nn.Module, images: Tensor) -> Artifact:
        """The network as the runtime takes it; ``images`` are a few inputs, on which an ONNX file is checked."""
        if self.device.takes == "module":
            return network
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.onnx"
            export_onnx(network, images[:2], path, images=images)
            return path.read_bytes()

    def time(self, networks: Mapping[str, Artifact], images: Tensor, rounds: int = ROUNDS) -> LatencyReport:
        """Times of the networks, in turn, for one image; again where something else kept the processor busy."""
        return measured_quietly(self.device, self.pace, networks, images[:1].cpu(), rounds)

    def measure(self, variants: Sequence[Variant], x: Tensor, n_runs: int) -> LatencyReport:
        """As `latency.measure.measure`; what the table's runtime does, again where something else kept it busy."""
        runtime = self.device.runtime.name
        own = {variant.model: variant.artifact for variant in variants if variant.runtime == runtime}
        others = [variant for variant in variants if variant.runtime != runtime]
        with self.device.in_force():
            if not own:
                return measure(others, x, n_runs=n_runs)
            found = measured_quietly(self.device, self.pace, own, x, n_runs)
            return found.joined(measure(others, x, n_runs=n_runs)) if others else found

    @property
    def warning(self) -> str:
        """What to tell of readings that were disturbed; empty if none was, or none was made."""
        return self.pace.warning if "pace" in vars(self) else ""

    @cached_property
    def pace(self) -> Pace:
        """Of the table's reference layer."""
        return pace_of(self.device, self.known_ns)


@dataclass(frozen=True)
class TableDevice:
    """The device that plans were searched for, and whether it is this machine; `TableDevice.of` finds out.

    Attributes:
        fingerprint: of the latency table, None without one.
        clock: the device, None without a table or where it is not this machine.
        elsewhere: why times read here are another device's; empty if they are not.
    """

    fingerprint: Fingerprint | None = None
    clock: Clock | None = None
    elsewhere: str = ""

    @classmethod
    def of(cls, table: Path | None) -> TableDevice:
        """The device of the table in a file; `TableError` if that cannot be read."""
        if table is None:
            return cls()
        loaded = LatencyTable.load(table)
        try:
            return cls(loaded.fingerprint, Clock.of_table(loaded))
        except LatencyError as error:
            return cls(loaded.fingerprint, elsewhere=str(error))

    @property
    def runtime(self) -> Runtime | None:
        """Its runtime, where it is this machine."""
        return self.clock.device.runtime if self.clock else None

    def measure(self, variants: Sequence[Variant], x: Tensor, n_runs: int) -> LatencyReport:
        """As `Clock.measure`, where it is this machine; else as it comes."""
        return self.clock.measure(variants, x, n_runs) if self.clock else measure(variants, x, n_runs=n_runs)

    def in_force(self) -> AbstractContextManager[None]:
        """Its threads and processors for a while, where it is this machine; else those of this process stay."""
        return self.clock.device.in_force() if self.clock else nullcontext()
