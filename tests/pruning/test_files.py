import errno
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from pruning.files import FileWriteError, write_atomic


def test_content_replaces_an_older_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.bin"
    write_atomic(path, b"old and longer")
    write_atomic(path, b"new")

    assert path.read_bytes() == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.bin"]


def test_full_disk_leaves_the_older_file_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.bin"
    write_atomic(path, b"old")

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(FileWriteError) as caught:
        write_atomic(path, b"x" * 5000)

    assert str(caught.value) == (
        f"cannot write '{path}': no space left on the disk for 5,000 bytes; free some and run "
        "the same command again (an older file of that name is untouched)"
    )
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


def test_state_that_the_system_refuses_halfway_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    write_atomic(path, lambda file: torch.save({"weights": torch.zeros(4)}, file))
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(FileWriteError) as caught:
            write_atomic(path, lambda file: torch.save({"weights": torch.zeros(100_000)}, file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)

    assert str(caught.value) == (f"cannot write '{path}': File too large (an older file of that name is untouched)")
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]


def test_error_of_what_is_written_is_not_taken_for_the_disks(tmp_path: Path) -> None:
    def write(_: object) -> None:
        msg = "no such layer"
        raise RuntimeError(msg)

    with pytest.raises(RuntimeError, match=r"^no such layer$"):
        write_atomic(tmp_path / "state.pt", write)

    assert list(tmp_path.iterdir()) == []
