"""The same measurement on another machine, over SSH: it needs Python and onnxruntime there, and nothing else."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from graph_encoder.batches import count_images

from .device import REFERENCE, Fingerprint
from .layers import reference_layer
from .measure import LatencyReport, summarise
from .runtimes import ONNXRUNTIME, Artifact, Fed, LatencyError, find_runtime
from .worker import Processor, without_waits

_HOME = re.compile(r"~[\w.-]*")
_CUT = 75
_BOOTSTRAP = f"""
import io, os, pathlib, subprocess, sys, tarfile, tempfile, threading
if sys.version_info < (3, 10):
    sys.exit("its Python is " + sys.version.split()[0] + ", and 3.10 or newer is needed; name one by --host-python")
source, alone = sys.stdin.buffer, threading.Event()
with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
    content = source.read(int.from_bytes(source.read(8), "big"))
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            pathlib.Path(folder, os.path.basename(member.name)).write_bytes(archive.extractfile(member).read())
    child = subprocess.Popen(
        [sys.executable, os.path.join(folder, "worker.py"), folder],
        stdin=subprocess.DEVNULL, stdout=2, env=dict(os.environ, TMPDIR=folder),
    )
    def stop_when_alone():
        source.read(1)
        alone.set()
        child.kill()
    threading.Thread(target=stop_when_alone, daemon=True).start()
    code = child.wait()
    answer = pathlib.Path(folder, "result.json").read_text() if code == 0 else ""
print(answer, flush=True)
os._exit({_CUT} if alone.is_set() else 1 if code else 0)
"""
"""Runs on the other machine: unpacks the job into a folder of its own, works, answers, and leaves nothing behind. Its
standard input stays open for as long as this side is there; when it ends, the work ends."""
_SSH_FAILED, _NO_COMMAND = 255, 127


class RemoteError(LatencyError):
    """Another machine that could not be reached, or could not measure."""


@dataclass(frozen=True)
class RemoteDevice:
    """Another machine, timed with ONNX Runtime.

    Attributes:
        host: as `ssh` takes it: ``user@host``, or a name of the SSH configuration. Keys must be set up: nothing is
            asked for.
        python: command or path of Python there.
        threads: threads of ONNX Runtime.
        cpus: numbers of the processors to stay on there; all if empty.
        timeout_s: seconds that one job may take, connection and transfer included.
        ssh: command and options of SSH.
    """

    host: str
    python: str = "python3"
    threads: int = 1
    cpus: tuple[int, ...] = ()
    timeout_s: float = 1800
    ssh: tuple[str, ...] = ("ssh",)

    def __post_init__(self) -> None:
        if not self.host or self.host.startswith("-"):
            msg = f"'{self.host}' is no host; give user@host, or a name of the SSH configuration"
            raise RemoteError(msg)

    @property
    def takes(self) -> str:
        """ONNX files."""
        return find_runtime(ONNXRUNTIME).takes

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Processor, runtime, version, threads and where they stay; asks the machine once."""
        answer = self._run([], 0, 0)
        return Fingerprint(
            Processor.of_json(answer["processor"]), ONNXRUNTIME, answer["version"], self.threads, self.cpus
        )

    def times_ns(
        self, networks: Sequence[Fed], n_runs: int, n_warmup: int, *, settled: bool = True
    ) -> NDArray[np.float64]:
        """Time the networks in turn, less what a call of one thread waited for a processor."""
        answer = self._run(networks, n_runs, n_warmup, settled=settled)
        pairs = zip(answer["elapsed_ns"], answer["waited_ns"], strict=True)
        return np.array([without_waits(own, waits, self.threads) for own, waits in pairs], dtype=float)

    def measure(
        self,
        networks: Mapping[str, Artifact],
        inputs: Tensor | tuple[Tensor, ...],
        *,
        n_runs: int = 50,
        n_warmup: int = 10,
        with_reference: bool = False,
    ) -> LatencyReport:
        """Time ONNX files there, a settled call of each in turn; see `latency.measure.measure`.

        Raises:
            RemoteError: if the machine cannot be reached, has no Python or no onnxruntime, breaks the connection, or
                takes longer than `timeout_s`. Nothing stays behind there.
        """
        values = inputs if isinstance(inputs, tuple) else (inputs,)
        fed: dict[str, Fed] = {name: (network, values) for name, network in networks.items()}
        if with_reference:
            fed[REFERENCE] = reference_layer(self.takes)
        answer = self._run([*fed.values()], n_runs, n_warmup)
        entries = tuple(
            summarise(name, ONNXRUNTIME, elapsed, waited, self.threads)
            for name, elapsed, waited in zip(fed, answer["elapsed_ns"], answer["waited_ns"], strict=True)
        )
        cpus, versions = tuple(answer["cpus"]), {ONNXRUNTIME: str(answer["version"])}
        processor = Processor.of_json(answer["processor"])
        return LatencyReport(entries, count_images([values]), self.threads, processor.name, cpus, versions)

    def _run(self, networks: Sequence[Fed], n_runs: int, n_warmup: int, *, settled: bool = True) -> dict[str, Any]:
        calls = {"n_runs": n_runs, "n_warmup": n_warmup, "settled": settled}
        settings = {"threads": self.threads, "cpus": list(self.cpus)} | calls
        content = _packed(networks, settings)
        options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5"]
        command = [*self.ssh, *options, self.host, f"{_quoted(self.python)} {shlex.join(['-c', _BOOTSTRAP])}"]
        code, out, err = _talk(command, len(content).to_bytes(8, "big") + content, self.timeout_s)
        if code is None:
            msg = (
                f"'{self.host}' did not answer within {self.timeout_s:g} s; see that nothing else keeps it busy, or "
                "time fewer networks or rounds at once"
            )
            raise RemoteError(msg)
        if code != 0:
            raise RemoteError(self._failure(code, err))
        try:
            # A login shell may print a greeting first.
            answer: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
        except (ValueError, IndexError) as error:
            msg = f"'{self.host}' answered what is no result: '{out[-200:].strip()}'"
            raise RemoteError(msg) from error
        return answer

    def _failure(self, code: int, err: str) -> str:
        last = (err.strip().splitlines() or [f"exit code {code}"])[-1]
        if code == _CUT:
            return f"the connection to '{self.host}' failed: it was cut while the job ran"
        if code == _SSH_FAILED:
            return f"the connection to '{self.host}' failed: {last}"
        if code == _NO_COMMAND:
            return f"'{self.host}' has no Python at '{self.python}': {last}"
        if "No module named" in last:
            module = last.rpartition("No module named ")[2].strip("'")
            return f"'{self.host}' lacks the package '{module}'; there: {self.python} -m pip install onnxruntime"
        return f"'{self.host}' could not measure: {last}"


def _quoted(program: str) -> str:
    """A path as the shell there takes it; a home folder at its start is left to that shell."""
    home, slash, rest = program.partition("/")
    return f"{home}/{shlex.quote(rest)}" if slash and _HOME.fullmatch(home) else shlex.quote(program)


def _packed(networks: Sequence[Fed], settings: Mapping[str, Any]) -> bytes:
    """The job, its files and the measuring script as an archive; files that several networks share go once."""
    files: dict[str, bytes] = {"worker.py": Path(__file__).with_name("worker.py").read_bytes()}
    names: dict[int, str] = {}

    def store(key: object, suffix: str, content: bytes) -> str:
        name = names.setdefault(id(key), f"{len(names)}{suffix}")
        files[name] = content
        return name

    entries = []
    for artifact, inputs in networks:
        if not isinstance(artifact, bytes | Path):
            msg = f"another machine takes ONNX files (bytes or path), got {type(artifact).__name__}; export it first"
            raise RemoteError(msg)
        model = store(artifact, ".onnx", artifact if isinstance(artifact, bytes) else artifact.read_bytes())
        entries.append({"model": model, "inputs": [store(x, ".npy", _as_npy(x)) for x in inputs]})
    files["job.json"] = json.dumps({**settings, "networks": entries}).encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _as_npy(x: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, x.detach().contiguous().numpy(), allow_pickle=False)
    return buffer.getvalue()


def _talk(command: Sequence[str], content: bytes, timeout_s: float) -> tuple[int | None, str, str]:
    """Run ``command``, hand it ``content``, and keep its input open until it ends; None for the code of a time-out."""
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        process.kill()

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=err)
        except OSError as error:
            msg = f"cannot start '{command[0]}': {error.strerror}; install the SSH client of this system"
            raise RemoteError(msg) from error
        timer = threading.Timer(timeout_s, expire)
        timer.start()
        assert process.stdin is not None
        try:
            process.stdin.write(content)
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended early; its exit code and its last words say why
        finally:
            try:
                process.wait()
            finally:
                timer.cancel()
                process.kill()
                process.wait()
                _close(process.stdin)
        out.seek(0)
        err.seek(0)
        texts = (stream.read().decode(errors="replace") for stream in (out, err))
        return (None if expired.is_set() else process.returncode, *texts)  # type: ignore[return-value]


def _close(stream: Any) -> None:
    with suppress(BrokenPipeError):
        stream.close()
