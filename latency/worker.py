"""Rounds of timed calls, and ONNX Runtime sessions. One file that needs no other, because a remote device gets it too.

Run as a script in a folder with a ``job.json`` (`run_job` says what it holds), it writes ``result.json`` there.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Timer = Callable[[], tuple[int, int]]
"""Makes one call; returns two readings of it in nanoseconds.

Those of a `Stopwatch` are the time by the clock, and how much of it the thread waited for a processor.
"""


class Stopwatch:
    """Times calls by the wall clock, and knows how long each waited because other processes had the processor."""

    def __init__(
        self, clock: Callable[[], int] = time.perf_counter_ns, waited: Callable[[], int] | None = None
    ) -> None:
        """Take the clock of this process, or others.

        Args:
            clock: nanoseconds now.
            waited: nanoseconds that this thread has waited for a processor so far; Linux's own count if not given.
        """
        self._clock = clock
        self._waited = waited or _waiting_counter()

    def timer(self, call: Callable[[], object]) -> Timer:
        """``call`` as one timed call."""
        clock, waited = self._clock, self._waited

        def timed() -> tuple[int, int]:
            before = waited()
            start = clock()
            call()
            elapsed = clock() - start
            return elapsed, waited() - before

        return timed


def _waiting_counter() -> Callable[[], int]:
    """Reads how long the present thread was runnable and did not run; always 0 where the system does not say."""
    try:
        descriptor = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        os.pread(descriptor, 64, 0).split()[1]
    except (OSError, IndexError):
        return lambda: 0
    return lambda: int(os.pread(descriptor, 64, 0).split()[1])


def interleave(timers: Sequence[Timer], n_runs: int, n_warmup: int) -> tuple[list[list[int]], list[list[int]]]:
    """Make one call of each in turn, ``n_runs`` rounds; each round starts one call later, so that none is always first.

    Returns:
        First and second readings in nanoseconds, each a list of ``n_runs`` values for each timer.
    """
    for timer in timers:
        for _ in range(n_warmup):
            timer()
    elapsed = [[0] * n_runs for _ in timers]
    waited = [[0] * n_runs for _ in timers]
    for run in range(n_runs):
        for turn in range(len(timers)):
            index = (run + turn) % len(timers)
            elapsed[index][run], waited[index][run] = timers[index]()
    return elapsed, waited


def onnx_call(model: bytes | str, inputs: Sequence[Any], threads: int) -> Callable[[], object]:
    """A call of an ONNX model on the CPU.

    Args:
        model: content or path of the file.
        inputs: NumPy arrays, in the order of the model's inputs.
        threads: threads inside an operator; operators run one after the other.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Its idle threads would spin on the cores that the next call in the round is timed on.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {entry.name: value for entry, value in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: session.run(None, feed)


def cpu_name() -> str:
    """Name of the processor as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def allowed_cpus() -> list[int]:
    """Numbers of the processors that this process may run on, empty where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def run_job(folder: Path) -> dict[str, Any]:
    """Time the networks that ``job.json`` in a folder lists.

    The job holds ``networks`` (each a ``model`` file and ``inputs``, files of one array each), ``threads``,
    ``n_runs``, ``n_warmup``, and ``cpus`` to stay on, or null.
    """
    import numpy as np
    import onnxruntime

    job = json.loads((folder / "job.json").read_text())
    if job["cpus"]:
        os.sched_setaffinity(0, job["cpus"])
    stopwatch, timers = Stopwatch(), []
    for network in job["networks"]:
        inputs = [np.load(folder / name, allow_pickle=False) for name in network["inputs"]]
        timers.append(stopwatch.timer(onnx_call(str(folder / network["model"]), inputs, job["threads"])))
    elapsed, waited = interleave(timers, job["n_runs"], job["n_warmup"])
    return {
        "elapsed_ns": elapsed,
        "waited_ns": waited,
        "cpu": cpu_name(),
        "cpus": allowed_cpus(),
        "version": onnxruntime.__version__,
    }


if __name__ == "__main__":
    here = Path(sys.argv[1])
    (here / "result.json").write_text(json.dumps(run_job(here)))
