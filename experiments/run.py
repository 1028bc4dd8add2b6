"""The folder of a run: what lies where, how one is made, opened and refused."""

from __future__ import annotations

import errno
import fcntl
import logging
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError

from graph_encoder.errors import SecateurError
from latency.table import LatencyTable
from pruning.export import ExportError
from pruning.files import FileWriteError, write_atomic

from .config import RunConfig, load_config
from .machine import Machine
from .outcome import RunOutcome
from .progress import RunLog

_log = logging.getLogger(__name__)


class RunError(SecateurError, RuntimeError):
    """A run folder that cannot be used as asked; the message says what to do."""


class RunBusyError(RunError):
    """Another process does what is to be done."""


class RunExistsError(RunError):
    """Something is there already."""


@contextmanager
def reading(file: Path, todo: str) -> Iterator[None]:
    """Name the file of a run that cannot be read, and what to do about it, in a `RunError` of one line."""
    try:
        yield
    except (OSError, ValueError, SafetensorError, ExportError) as error:
        msg = f"cannot read '{file}': {_reason(error)}; {todo}"
        raise RunError(msg) from error


def _reason(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return getattr(error, "strerror", None) or str(error)
    first, *others = error.errors(include_url=False)
    more = f", and {len(others)} more" if others else ""
    return f"{': '.join([*map(str, first['loc']), first['msg']])}{more}"


@contextmanager
def locked(file: Path, where: str) -> Iterator[None]:
    """Keep other processes out while this one works; the system frees the lock when it ends, however it ends.

    Args:
        file: what stands for the work; it and its folder are made if missing, and stay.
        where: where the other process works, for the message.

    Raises:
        RunBusyError: if another process holds the lock.
        FileWriteError: if the file or its folder cannot be made.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        opened = file.open("w")
    except OSError as error:
        msg = f"cannot write into the folder '{file.parent}': {error.strerror}; choose another one"
        raise FileWriteError(error.errno, msg) from error
    with opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            msg = f"another process works {where}; wait for it or stop it"
            raise RunBusyError(msg) from None
        except OSError as error:
            # Some network file systems know no locks.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            _log.warning("'%s' cannot be locked (%s): see to it that one process works %s", file, error.strerror, where)
        yield


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run.

    Attributes:
        root: the folder.
    """

    root: Path

    @property
    def config_file(self) -> Path:
        """The resolved configuration, YAML."""
        return self.root / "config.yaml"

    @property
    def machine_file(self) -> Path:
        """Machine, versions and commit, JSON."""
        return self.root / "machine.json"

    @property
    def dense_file(self) -> Path:
        """Weights of the dense network that the run compresses, safetensors."""
        return self.root / "dense.safetensors"

    @property
    def importance_file(self) -> Path:
        """Importance of every unit, safetensors."""
        return self.root / "importance.safetensors"

    @property
    def journal_file(self) -> Path:
        """Every evaluation, JSON lines."""
        return self.root / "journal.jsonl"

    @property
    def results_file(self) -> Path:
        """What the run found, JSON; there once the run is finished."""
        return self.root / "results.json"

    @property
    def log(self) -> RunLog:
        """What the run said."""
        return RunLog(self.root / "log.txt")

    @property
    def report_file(self) -> Path:
        """The report, HTML."""
        return self.root / "report.html"

    @property
    def tensorboard(self) -> Path:
        """Log folder for TensorBoard, one folder a method below."""
        return self.root / "tensorboard"

    def method(self, name: str) -> MethodFolder:
        """Where the files of one method lie."""
        return MethodFolder(self.root / "methods" / name)

    @property
    def config(self) -> RunConfig:
        """What the run was asked for, as `resume_run` may have changed it; its latency table is the run's own copy."""
        kept = {"latency.table": str(self.table_file)} if self.table_file.exists() else None
        return load_config(self.config_file, kept)

    @property
    def table_file(self) -> Path:
        """The latency table, where latency is the budget."""
        return self.root / "latency.json"

    @property
    def machine(self) -> Machine:
        """The machine that the run was started on.

        Raises:
            RunError: if the record cannot be read.
        """
        with reading(self.machine_file, "put it back, or that of another run on the same machine in its place"):
            return Machine.model_validate_json(self.machine_file.read_text())

    @property
    def command(self) -> str:
        """The command that started the run, and those that changed it since.

        Raises:
            RunError: if the record cannot be read.
        """
        with reading(self._command_file, "put it back, or write into it what started the run"):
            return "; ".join(self._command_file.read_text().split("\n")).strip()

    def note_command(self, command: Sequence[str]) -> None:
        """Keep what changed the run beside what started it."""
        content = f"{self._command_file.read_text()}\n{shlex.join(command)}"
        write_atomic(self._command_file, content.encode())

    @property
    def _command_file(self) -> Path:
        return self.root / "command.txt"

    @property
    def resume_command(self) -> str:
        """What continues the run, as one types it."""
        return shlex.join(["secateur", "resume", str(self.root)])

    @property
    def lock_file(self) -> Path:
        """Made first, by the one process that starts the run; see `locked`."""
        return self.root / ".lock"

    def outcome(self) -> RunOutcome:
        """What the run found.

        Raises:
            RunError: if it is not finished, or its results cannot be read.
        """
        if not self.results_file.exists():
            todo = f"continue it with '{self.resume_command}'"
            msg = f"run {self.root} is not finished (no results.json in it); {todo}"
            raise RunError(msg)
        todo = (
            "it was changed, or written by another version of secateur: put it back, or delete it, and "
            f"'{self.resume_command}' makes it again"
        )
        with reading(self.results_file, todo):
            return RunOutcome.load(self.results_file)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process out of the folder; see `locked`.

        Raises:
            RunBusyError: if another process works in the folder.
        """
        with locked(self.lock_file, f"in run folder {self.root}"):
            yield

    @classmethod
    def create(cls, root: Path, config: RunConfig, machine: Machine, command: Sequence[str]) -> RunFolder:
        """Make the folder of a new run.

        Raises:
            RunExistsError: if something is there already.
            TableError: if the latency table cannot be read.
            FileWriteError: if the folder cannot be made.
        """
        refuse_existing(root)
        # Nothing is made of what is refused.
        table = LatencyTable.load(config.latency.table) if config.latency.table else None
        folder = cls(root)
        try:
            root.mkdir(parents=True, exist_ok=True)
            # Of two runs that are started here at once, one makes this file.
            try:
                folder.lock_file.touch(exist_ok=False)
            except FileExistsError:
                raise _exists_already(root) from None
        except OSError as error:
            msg = f"cannot make the run folder '{root}': {error.strerror}; name another with --out"
            raise FileWriteError(error.errno, msg) from error
        write_atomic(folder.machine_file, machine.model_dump_json(indent=2).encode())
        write_atomic(root / "command.txt", shlex.join(command).encode())
        if table is not None:
            # The run goes on with the times that it began with, whatever becomes of the table.
            write_atomic(folder.table_file, table.to_json().encode())
        write_atomic(folder.config_file, config.to_yaml().encode())
        return folder

    @classmethod
    def open(cls, root: Path) -> RunFolder:
        """The folder of a run that was started before.

        Raises:
            RunError: if there is no run.
        """
        if not (root / "config.yaml").exists():
            within, beside = (sorted(where.glob("*/config.yaml")) for where in (root, root.parent))
            runs = ", ".join(path.parent.name for path in within or beside) or "none"
            where = root if within else root.parent
            msg = f"{root} is not a run folder (no config.yaml in it); runs in {where}: {runs}"
            raise RunError(msg)
        return cls(root)


@dataclass(frozen=True)
class MethodFolder:
    """Paths of one method's files in a run.

    Attributes:
        root: the folder.
    """

    root: Path

    @property
    def search_file(self) -> Path:
        """What the search found, JSON; there once it is finished."""
        return self.root / "search.json"

    @property
    def policy_file(self) -> Path:
        """The plan chosen, JSON."""
        return self.root / "policy.json"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of the search while it runs."""
        return self.root / "checkpoints"

    @property
    def agent_file(self) -> Path:
        """The trained agent, for other networks."""
        return self.root / "agent.pt"

    @property
    def finetuning(self) -> Path:
        """Checkpoints of the fine-tuning while it runs."""
        return self.root / "finetuning"

    @property
    def tuned_file(self) -> Path:
        """Weights after fine-tuning, safetensors; there once it is finished."""
        return self.root / "tuned.safetensors"

    def forget(self, *paths: Path) -> bool:
        """Delete files and folders of the method, so that they are made again; whether there were any."""
        made = [path for path in paths if path.exists()]
        for path in made:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return bool(made)

    @property
    def judged_file(self) -> Path:
        """A digit for each test image, in their order: 1 where the network to take away classifies it rightly."""
        return self.root / "test_judged.txt"

    @property
    def model(self) -> Path:
        """The compressed network: safetensors, policy and ONNX."""
        return self.root / "model"


_LOCK = re.compile(r"\..+\.lock")


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Let one process alone make ``out``, a file or folder that is not there; its lock is a hidden file beside it.

    Raises:
        RunExistsError: if something is there already.
        RunBusyError: if another process makes it.
        FileWriteError: if the folder around it cannot be made or written.
    """
    refuse_existing(out)
    out = out.resolve()
    with locked(out.with_name(f".{out.name}.lock"), f"on {out}"):
        # The process that held the lock may have made it since.
        refuse_existing(out)
        yield


def refuse_existing(path: Path) -> None:
    """Raise `RunExistsError` if something other than an empty folder is at ``path``; nothing is ever overwritten.

    Locks that `claimed` left there are nothing.
    """
    if path.exists() and not (path.is_dir() and all(_LOCK.fullmatch(entry.name) for entry in path.iterdir())):
        raise _exists_already(path)


def _exists_already(path: Path) -> RunExistsError:
    todo = f"continue it with '{RunFolder(path).resume_command}', or " if (path / "config.yaml").exists() else ""
    msg = f"{path} exists already; {todo}choose another name with --out"
    return RunExistsError(msg)


def numbered_folder(parent: Path, stem: str) -> Path:
    """``parent/stem-N`` with the next free number."""
    pattern = re.compile(re.escape(stem) + r"-(\d+)")
    present = parent.iterdir() if parent.is_dir() else ()
    taken = [int(match[1]) for path in present if (match := pattern.fullmatch(path.name))]
    return parent / f"{stem}-{max(taken, default=0) + 1}"
