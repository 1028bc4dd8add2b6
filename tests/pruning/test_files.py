import errno
import os
from pathlib import Path

import pytest

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
        f"[Errno {errno.ENOSPC}] cannot write '{path}': no space left on the disk for 5,000 bytes; free some and run "
        "the same command again (an older file of that name is untouched)"
    )
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]
