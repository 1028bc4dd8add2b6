"""The device that networks are timed on by a command: this machine, or another one."""

from __future__ import annotations

from dataclasses import dataclass

from latency.remote import RemoteDevice, RemoteError
from latency.runtimes import ONNXRUNTIME, find_runtime
from latency.table import Device, LocalDevice


@dataclass(frozen=True)
class Remote:
    """Another machine: its name for SSH, and Python there."""

    host: str
    python: str


def device_for(runtime: str, threads: int, remote: Remote | None) -> Device:
    """This machine, or another one; there is only ONNX Runtime on that.

    Raises:
        LatencyError: if the runtime cannot be used.
    """
    if remote is None:
        return LocalDevice(find_runtime(runtime), threads)
    if runtime != ONNXRUNTIME:
        msg = f"another machine is timed with {ONNXRUNTIME} only, not with '{runtime}'; leave out one of them"
        raise RemoteError(msg)
    return RemoteDevice(remote.host, remote.python, threads)
