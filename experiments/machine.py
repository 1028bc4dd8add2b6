"""What a run ran on: machine, versions, commit; and the device and thread count it asked for."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from graph_encoder.errors import SecateurError
from latency.measure import cpu_name

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of mallopt(3): from how many freed bytes on the heap shrinks, and how many allocations are maps of their
own, which the system gets back when they are freed."""
PACKAGES = ("torch", "torchvision", "torch-geometric", "stable-baselines3", "gymnasium", "onnxruntime", "numpy")


class DeviceError(SecateurError, ValueError):
    """The device asked for is not there."""


class Machine(BaseModel):
    """The record of a machine that is saved with each run."""

    model_config = ConfigDict(frozen=True)

    processor: str
    instructions: str = ""  # that PyTorch computes with, AVX2 for one; records did not always say so
    cores: int
    system: str
    python: str
    packages: dict[str, str]
    device: str
    threads: int
    commit: str
    date: str

    def differences(self, other: Machine) -> list[str]:
        """What sets ``other`` apart from this machine, of the things that change a run's numbers."""
        names = ["device", "threads", "processor", "commit"]
        if self.instructions and other.instructions:
            names.append("instructions")
        mine, theirs = (
            {name: getattr(m, name) for name in names} | {p: m.packages.get(p, "none") for p in PACKAGES}
            for m in (self, other)
        )
        return [f"{name} was {mine[name]} and is {theirs[name]}" for name in mine if mine[name] != theirs[name]]


def set_up_device(device: str, threads: int) -> torch.device:
    """The torch device called ``device``, with ``threads`` CPU threads in force (0: `default_threads`).

    For a CPU the process keeps the memory that it frees, see `keep_freed_memory`.

    Raises:
        DeviceError: if torch does not know the device or cannot use it here.
    """
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        available = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        available += ["mps"] if torch.backends.mps.is_available() else []
        reason = str(error).splitlines()[0]
        msg = f"device '{device}' cannot be used here ({reason}); available: {', '.join(available)}"
        raise DeviceError(msg) from error
    torch.set_num_threads(threads or default_threads())
    if found.type == "cpu":
        keep_freed_memory()
    return found


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for what is allocated next; whether it can (glibc on Linux).

    Layers allocate and free tens of megabytes each time they run. As it stands glibc gives them back to the system,
    which hands them out again page by page and cleared: a good part of the time of layers that compute little.
    """
    if platform.system() != "Linux":
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False  # another C library
    return bool(set_option(_M_MMAP_MAX, 0)) and bool(set_option(_M_TRIM_THRESHOLD, -1))


def default_threads() -> int:
    """CPU threads where nobody chose a number: ``$OMP_NUM_THREADS``, which others obey too, else one a usable core."""
    outermost = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(outermost) if outermost.isdigit() and int(outermost) > 0 else usable_cores()


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine(device: torch.device) -> Machine:
    """The machine as it is now."""
    return Machine(
        processor=cpu_name(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        cores=os.cpu_count() or 1,
        system=platform.platform(),
        python=platform.python_version(),
        packages={name: version(name) for name in PACKAGES},
        device=_device_name(device),
        threads=torch.get_num_threads(),
        commit=current_commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


_PROJECT = Path(__file__).resolve().parent.parent


def current_commit() -> str:
    """Short hash of the project's commit, with ``+changes`` if files differ; ``unknown`` outside its checkout."""
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != _PROJECT:
            return "unknown"  # an installed copy within somebody else's repository
        return _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_PROJECT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
