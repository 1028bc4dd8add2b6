"""The device of a latency table, where it is this machine: networks timed there against the dense one."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from latency.measure import LatencyReport, Variant, measure
from latency.runtimes import Artifact, Runtime, find_runtime
from latency.table import LatencyTable, LocalDevice
from pruning.export import export_onnx

ROUNDS = 60
"""Rounds in which networks and the dense one take turns."""


@dataclass(frozen=True)
class Clock:
    """Times networks as the device of a table does; build it with `Clock.of_table`.

    Attributes:
        runtime: what runs the networks.
        threads: its threads.
    """

    runtime: Runtime
    threads: int

    @classmethod
    def of_table(cls, table: LatencyTable) -> Clock:
        """The clock of the table's device.

        Raises:
            TableError: if that is not this machine, with both named.
            LatencyError: if its runtime is not installed.
        """
        runtime = find_runtime(table.fingerprint.runtime)
        table.check_device(LocalDevice(runtime, table.fingerprint.threads).fingerprint)
        return cls(runtime, table.fingerprint.threads)

    def artifact(self, network: nn.Module, images: Tensor) -> Artifact:
        """The network as the runtime takes it; ``images`` are a few inputs, on which an ONNX file is checked."""
        if self.runtime.takes == "module":
            return network
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.onnx"
            export_onnx(network, images[:2], path, images=images)
            return path.read_bytes()

    def time(self, networks: Mapping[str, Artifact], images: Tensor, rounds: int = ROUNDS) -> LatencyReport:
        """Times of the networks, in turn, for one image."""
        variants = [Variant(name, self.runtime.name, artifact) for name, artifact in networks.items()]
        return measure(variants, images[:1].cpu(), n_runs=rounds, threads=self.threads)
