import errno
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from experiments import machine
from experiments.config import RunConfig
from experiments.machine import describe_machine, keep_freed_memory, set_up_device, usable_cores
from experiments.run import (
    RunBusyError,
    RunError,
    RunExistsError,
    RunFolder,
    claimed,
    locked,
    numbered_folder,
    refuse_existing,
)
from latency.device import TableError
from pruning.files import FileWriteError

from .outcomes import MACHINE, outcome

Configured = Callable[..., RunConfig]


@pytest.fixture
def folder(tmp_path: Path, tiny_config: Configured) -> RunFolder:
    return RunFolder.create(tmp_path / "mine", tiny_config(), MACHINE, ["secateur", "search"])


def test_new_run_records_configuration_machine_and_command(folder: RunFolder, tiny_config: Configured) -> None:
    opened = RunFolder.open(folder.root)

    assert (opened.config, opened.machine, opened.command) == (tiny_config(), MACHINE, "secateur search")


def test_existing_run_is_refused_with_what_to_do(folder: RunFolder, tiny_config: Configured) -> None:
    with pytest.raises(RunError) as caught:
        RunFolder.create(folder.root, tiny_config(), MACHINE, [])

    assert str(caught.value) == (
        f"{folder.root} exists already; continue it with 'secateur resume {folder.root}', or choose another name "
        "with --out"
    )


def test_other_folder_is_refused_without_talk_of_resuming(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(RunError) as caught:
        refuse_existing(tmp_path)

    assert str(caught.value) == f"{tmp_path} exists already; choose another name with --out"


def test_empty_folder_may_become_a_run(tmp_path: Path, tiny_config: Configured) -> None:
    assert RunFolder.create(tmp_path, tiny_config(), MACHINE, []).config_file.exists()


def test_opening_the_folder_of_runs_names_those_in_it(folder: RunFolder) -> None:
    with pytest.raises(RunError, match=rf"\(no config.yaml in it\); runs in {folder.root.parent}: mine$"):
        RunFolder.open(folder.root.parent)


def test_file_system_without_locks_is_warned_about_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("experiments.run.fcntl.flock", refuse)
    with locked(tmp_path / "lock", "on it"):
        pass

    assert caplog.messages == [
        f"'{tmp_path / 'lock'}' cannot be locked (No locks available): see to it that one process works on it"
    ]


def test_opening_what_is_no_run_names_the_runs_beside_it(folder: RunFolder) -> None:
    with pytest.raises(RunError) as caught:
        RunFolder.open(folder.root.parent / "other")

    assert str(caught.value) == (
        f"{folder.root.parent / 'other'} is not a run folder (no config.yaml in it); runs in {folder.root.parent}: mine"
    )


def test_results_of_an_unfinished_run_say_how_to_finish_it(folder: RunFolder) -> None:
    with pytest.raises(RunError) as caught:
        folder.outcome()

    assert str(caught.value) == (
        f"run {folder.root} is not finished (no results.json in it); continue it with 'secateur resume {folder.root}'"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "Input should be an object"),
        (outcome().model_dump_json(exclude={"machine", "seed"}), "seed: Field required, and 1 more"),
        (outcome().model_dump_json().replace('"version":1', '"version":2'), "version: Input should be 1"),
        ("", "Invalid JSON: EOF while parsing a value at line 1 column 0"),
        (None, "Is a directory"),
    ],
)
def test_results_that_cannot_be_read_are_refused_by_name(folder: RunFolder, content: str | None, reason: str) -> None:
    if content is None:
        folder.results_file.mkdir()
    else:
        folder.results_file.write_text(content)

    with pytest.raises(RunError) as caught:
        folder.outcome()

    assert str(caught.value) == (
        f"cannot read '{folder.results_file}': {reason}; it was changed, or written by another version of secateur: "
        f"put it back, or delete it, and 'secateur resume {folder.root}' makes it again"
    )


def test_records_that_are_missing_are_told(folder: RunFolder) -> None:
    folder.machine_file.unlink()
    (folder.root / "command.txt").unlink()

    with pytest.raises(RunError) as machine_told:
        _ = folder.machine
    with pytest.raises(RunError) as command_told:
        _ = folder.command

    assert str(machine_told.value) == (
        f"cannot read '{folder.machine_file}': No such file or directory; put it back, or that of another run on the "
        "same machine in its place"
    )
    assert str(command_told.value) == (
        f"cannot read '{folder.root / 'command.txt'}': No such file or directory; put it back, or write into it what "
        "started the run"
    )


def test_a_run_folder_that_cannot_be_made_is_told(tmp_path: Path, tiny_config: Configured) -> None:
    (tmp_path / "file").touch()
    root = tmp_path / "file" / "run"

    with pytest.raises(FileWriteError) as caught:
        RunFolder.create(root, tiny_config(), MACHINE, [])

    assert str(caught.value) == f"cannot make the run folder '{root}': Not a directory; name another with --out"


@pytest.mark.parametrize("is_there", [False, True])
def test_of_runs_started_at_once_in_one_folder_one_has_it(
    tmp_path: Path, tiny_config: Configured, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    root = tmp_path / "run"
    if is_there:
        root.mkdir()
    # Each looked before the other began.
    monkeypatch.setattr("experiments.run.refuse_existing", lambda _: None)
    RunFolder.create(root, tiny_config(), MACHINE, ["first"])

    with pytest.raises(RunExistsError) as caught:
        RunFolder.create(root, tiny_config(), MACHINE, ["second"])

    assert str(caught.value).startswith(f"{root} exists already; continue it with")
    assert RunFolder(root).command == "first"


def test_a_table_that_cannot_be_read_leaves_no_folder(tmp_path: Path, tiny_config: Configured) -> None:
    config = tiny_config(latency__table=str(tmp_path / "missing.json"))

    with pytest.raises(TableError):
        RunFolder.create(tmp_path / "mine", config, MACHINE, ["secateur"])

    assert not (tmp_path / "mine").exists()


def test_a_copy_within_another_repository_tells_no_commit_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in (["init"], ["-c", "user.name=a", "-c", "user.email=b", "commit", "--allow-empty", "-m", "theirs"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)
    installed = tmp_path / "site-packages"
    installed.mkdir()

    monkeypatch.setattr(machine, "_PROJECT", tmp_path)
    own = machine.current_commit()
    monkeypatch.setattr(machine, "_PROJECT", installed)

    assert len(own) >= 7
    assert machine.current_commit() == "unknown"


def test_second_process_is_kept_out(folder: RunFolder) -> None:
    code = "import sys; from pathlib import Path; from experiments.run import RunFolder\n"
    code += "with RunFolder(Path(sys.argv[1])).locked(): print('locked', flush=True); sys.stdin.read()"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(folder.root)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout.readline() == "locked\n"

        with pytest.raises(RunError) as caught, folder.locked():
            pass
        other.kill()

    assert str(caught.value) == f"another process works in run folder {folder.root}; wait for it or stop it"
    with folder.locked():
        assert folder.config_file.exists()


def test_what_another_process_makes_is_refused_while_it_does_and_once_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new" / "weights.safetensors"
    with claimed(out), pytest.raises(RunBusyError) as busy, claimed(out):
        pass

    @contextmanager
    def waited(_file: Path, _where: str) -> Iterator[None]:
        out.touch()
        yield

    monkeypatch.setattr("experiments.run.locked", waited)
    with pytest.raises(RunExistsError) as made, claimed(out):
        pass

    assert str(busy.value) == f"another process works on {out}; wait for it or stop it"
    assert str(made.value) == f"{out} exists already; choose another name with --out"


def test_numbers_of_runs_go_on_after_the_highest(tmp_path: Path) -> None:
    for name in ("digits-1", "digits-9", "digits-x", "other-20"):
        (tmp_path / name).mkdir()

    assert numbered_folder(tmp_path, "digits") == tmp_path / "digits-10"
    (tmp_path / "net[1]-1").mkdir()
    assert numbered_folder(tmp_path, "net[1]") == tmp_path / "net[1]-2"
    assert numbered_folder(tmp_path / "missing", "digits") == tmp_path / "missing" / "digits-1"


@pytest.mark.parametrize(
    ("asked", "variable", "threads"), [(3, "2", 3), (0, "2", 2), (0, "2,4", 2), (0, "", usable_cores())]
)
def test_threads_are_those_asked_for_else_of_the_environment_else_one_a_core(
    asked: int, variable: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    before = torch.get_num_threads()
    try:
        found = describe_machine(set_up_device("cpu", asked))
    finally:
        torch.set_num_threads(before)

    assert found.threads == threads


_FREED = """
import os
import torch
from experiments.machine import keep_freed_memory, set_up_device

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

def left():
    before = resident()
    large = [torch.ones(size << 18) for size in (40, 64)]  # MiB of float32
    del large
    return resident() - before

print(left(), end=" ")
set_up_device("cpu", 1)
print(left())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_that_is_freed_stays_with_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", _FREED], capture_output=True, text=True, check=True)

    given_back, kept = (int(mebibytes) for mebibytes in done.stdout.split())
    assert given_back < 10
    assert kept > 90


def test_other_systems_keep_their_own_way_with_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Windows")

    assert not keep_freed_memory()


def test_machine_differences_are_told_by_name() -> None:
    other = MACHINE.model_copy(update={"threads": 8, "packages": {"torch": "3.0"}, "date": "later"})

    assert MACHINE.differences(other) == ["threads was 2 and is 8", "torch was 2.15 and is 3.0"]
