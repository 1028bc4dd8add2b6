"""Rounds of timed calls, and ONNX Runtime sessions. One file that needs no other, because a remote device gets it too.

Run as a script in a folder with a ``job.json`` (`run_job` says what it holds), it writes ``result.json`` there.
"""

import json
import os
import platform
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Timer = Callable[[], tuple[int, int]]
"""Makes a call, or a few; returns two readings of them in nanoseconds.

Those of a `Stopwatch` are the time by the clock, and how much of it the thread waited for a processor.
"""

SETTLING_NS, MOST_SETTLING_CALLS = 5_000_000, 6
"""Nanoseconds for which a network is called before a call of it is timed, and how often at most."""


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
            lost = waited() - before
            # A wait as long as the call began before it, or went on after it, while the counter was read.
            return elapsed, lost if lost < elapsed else 0

        return timed


def _waiting_counter() -> Callable[[], int]:
    """Reads how long the present thread was runnable and did not run; always 0 where the system does not say."""
    try:
        descriptor = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
    except OSError:
        return lambda: 0

    def waited() -> int:
        return int(os.pread(descriptor, 64, 0).split()[1])

    weakref.finalize(waited, os.close, descriptor)
    try:
        waited()
    except (OSError, IndexError, ValueError):
        return lambda: 0
    return waited


def interleave(
    timers: Sequence[Timer], n_runs: int, n_warmup: int, *, settled: bool = True
) -> tuple[list[list[int]], list[list[int]]]:
    """Time one call of each in turn, ``n_runs`` rounds; each round starts one call later, so that none is always first.

    Before each timed call come untimed ones of the same, for `SETTLING_NS` and at most `MOST_SETTLING_CALLS`, at least
    one: what ran before has left cold caches, which a small network feels and a large one does not. Without ``settled``
    there are none.

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
            if settled:
                _settle(timers[index])
            elapsed[index][run], waited[index][run] = timers[index]()
    return elapsed, waited


def _settle(timer: Timer) -> None:
    spent = 0
    for _ in range(MOST_SETTLING_CALLS):
        spent += timer()[0]
        if spent >= SETTLING_NS:
            break


def without_waits(elapsed_ns: Sequence[int], waited_ns: Sequence[int], threads: int) -> list[int]:
    """What calls took less what they waited for a processor, where one thread did the work.

    With several threads one may wait while the others work: what was lost is not the wait of one of them.
    """
    if threads != 1:
        return list(elapsed_ns)
    return [elapsed - waited for elapsed, waited in zip(elapsed_ns, waited_ns, strict=True)]


def onnx_call(
    model: bytes | str, inputs: Sequence[Any], threads: int, settings: Mapping[str, str] | None = None
) -> Callable[[], object]:
    """A call of an ONNX model on the CPU.

    Args:
        model: content or path of the file.
        inputs: NumPy arrays, in the order of the model's inputs.
        threads: threads inside an operator; operators run one after the other.
        settings: further entries of the session's configuration.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Its idle threads would spin on the cores that the next call in the round is timed on.
    for name, value in {"session.force_spinning_stop": "1", **(settings or {})}.items():
        options.add_session_config_entry(name, value)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {entry.name: value for entry, value in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: session.run(None, feed)


_X86 = ("", "x86_64", "amd64", "x86", "i386", "i686")
_ON_X86 = {"sse4_2", "avx", "fma", "f16c", "avx2", "avx_vnni", "avx512f", "avx512dq", "avx512bw", "avx512vl"}
_ON_X86 |= {"avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"}
_ON_ARM = {"neon", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "svei8mm", "svebf16", "sme", "sme2"}
VECTOR_FEATURES = frozenset(_ON_X86 | _ON_ARM)
"""Instruction sets that runtimes choose their kernels by, as Linux calls them on x86 and ARM."""


@dataclass(frozen=True)
class Processor:
    """What tells one processor from another, as far as the system says it.

    Virtual machines often give a family's name alone (``AMD EPYC``), and Linux on ARM gives none.

    Attributes:
        name: as the system gives it; the architecture where it gives none.
        architecture: ``x86_64``, ``aarch64``, ``arm64``, ...
        model: vendor, family, model and stepping (x86), or implementer, variant and part of each kind of core (ARM);
            empty where the system does not say.
        features: those of `VECTOR_FEATURES` that it has, sorted; empty where the system does not say.
        cores: processors that the system has, whether this process may use them or not.
    """

    name: str
    architecture: str = ""
    model: str = ""
    features: tuple[str, ...] = ()
    cores: int = 0

    @property
    def saturates(self) -> bool:
        """Whether runtimes add pairs of 8-bit products in 16 bits there, where large ones are cut off.

        x86 without VNNI does; a processor of which too little is known is taken to. On this one
        `pruning.qdq.saturates` tries it out.
        """
        return self.architecture.lower() in _X86 and not {"avx_vnni", "avx512_vnni"}.intersection(self.features)

    @classmethod
    def here(cls) -> "Processor":
        """The processor of this machine."""
        info = Path("/proc/cpuinfo")
        architecture, cores = platform.machine(), os.cpu_count() or 0
        if info.exists():
            return cls.of_cpuinfo(info.read_text(), architecture, cores)
        # On Windows this holds vendor, family, model and stepping; on macOS the name does.
        model = platform.processor()
        return cls(_name_on_macos() or model or architecture, architecture, model, (), cores)

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> "Processor":
        """The processor whose fields were written as JSON."""
        return cls(**{**values, "features": tuple(values["features"])})

    @classmethod
    def of_cpuinfo(cls, text: str, architecture: str, cores: int) -> "Processor":
        """The processor that Linux describes in ``/proc/cpuinfo``, a paragraph for each of its cores."""
        paragraphs = [_fields(paragraph) for paragraph in text.split("\n\n")]
        names = [fields["model name"] for fields in paragraphs if "model name" in fields]
        found = {
            word for fields in paragraphs for word in f"{fields.get('flags', '')} {fields.get('Features', '')}".split()
        }
        models = {_model(fields): None for fields in paragraphs}
        model = ", ".join(one for one in models if one)
        features = tuple(sorted(found & VECTOR_FEATURES))
        return cls(names[0] if names else architecture, architecture, model, features, cores)


def _fields(paragraph: str) -> dict[str, str]:
    lines = (line.partition(":") for line in paragraph.splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _model(fields: dict[str, str]) -> str:
    """What kind of core a paragraph of ``/proc/cpuinfo`` is of; empty if it does not say."""
    if "CPU part" in fields:
        names = {"implementer": "CPU implementer", "variant": "CPU variant", "part": "CPU part"}
    elif "vendor_id" in fields:
        names = {"": "vendor_id", "family": "cpu family", "model": "model", "stepping": "stepping"}
    else:
        return ""
    return " ".join(f"{word} {fields.get(name, 'unknown')}".strip() for word, name in names.items())


def _name_on_macos() -> str:
    try:
        found = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()


def cpu_name() -> str:
    """Name of the processor as the system gives it."""
    return Processor.here().name


def allowed_cpus() -> list[int]:
    """Numbers of the processors that this process may run on, empty where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def refusal_of_cpus(cpus: Sequence[int]) -> str:
    """Why this process cannot stay on the processors with these numbers; empty if it can."""
    allowed = allowed_cpus()
    if cpus and set(cpus) <= set(allowed):
        return ""
    reason = f"this process may run on {allowed}" if allowed else "this system does not let a process choose any"
    return f"cpus {list(cpus)} cannot be used: {reason}"


def run_job(folder: Path) -> dict[str, Any]:
    """Time the networks that ``job.json`` in a folder lists.

    The job holds ``networks`` (each a ``model`` file and ``inputs``, files of one array each), ``threads``,
    ``n_runs``, ``n_warmup``, ``settled``, and ``cpus`` to stay on, none for all.
    """
    import numpy as np
    import onnxruntime

    job = json.loads((folder / "job.json").read_text())
    if job["cpus"]:
        if refusal := refusal_of_cpus(job["cpus"]):
            raise ValueError(refusal)
        os.sched_setaffinity(0, job["cpus"])
    stopwatch, timers = Stopwatch(), []
    for network in job["networks"]:
        inputs = [np.load(folder / name, allow_pickle=False) for name in network["inputs"]]
        timers.append(stopwatch.timer(onnx_call(str(folder / network["model"]), inputs, job["threads"])))
    elapsed, waited = interleave(timers, job["n_runs"], job["n_warmup"], settled=job["settled"])
    return {
        "elapsed_ns": elapsed,
        "waited_ns": waited,
        "processor": asdict(Processor.here()),
        "cpus": allowed_cpus(),
        "version": onnxruntime.__version__,
    }


if __name__ == "__main__":
    here = Path(sys.argv[1])
    (here / "result.json").write_text(json.dumps(run_job(here)))
