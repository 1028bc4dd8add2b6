"""The device that networks are timed on by a command: this machine, or another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from latency.device import LocalDevice
from latency.remote import RemoteDevice, RemoteError
from latency.runtimes import ONNXRUNTIME, LatencyError, find_runtime


@dataclass(frozen=True)
class Remote:
    """Another machine: its name for SSH, and Python there."""

    host: str
    python: str


def device_for(
    runtime: str, threads: int, remote: Remote | None, cpus: Sequence[int] = ()
) -> LocalDevice | RemoteDevice:
    """This machine, or another one; there is only ONNX Runtime on that.

    Args:
        runtime: name of the runtime.
        threads: its threads.
        remote: the other machine; this one if not given.
        cpus: numbers of the processors to stay on; all if empty.

    Raises:
        LatencyError: if the runtime or a processor cannot be used.
    """
    if remote is None:
        return LocalDevice(find_runtime(runtime), threads, tuple(cpus))
    if runtime != ONNXRUNTIME:
        msg = f"another machine is timed with {ONNXRUNTIME} only, not with '{runtime}'; leave out one of them"
        raise RemoteError(msg)
    return RemoteDevice(remote.host, remote.python, threads, tuple(cpus))


def read_cpus(text: str | None) -> tuple[int, ...]:
    """Numbers of processors, separated by commas; none if not given.

    Raises:
        LatencyError: if the text is anything else.
    """
    numbers = text.split(",") if text else []
    if not all(number.strip().isdecimal() for number in numbers):
        msg = f"cpus '{text}' are no numbers of processors; give them with commas between, as in 0,1"
        raise LatencyError(msg)
    return tuple(sorted({int(number) for number in numbers}))
