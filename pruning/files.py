"""Files that a reader finds old or new, never half written, and archives read with their checksums."""

import contextlib
import errno
import os
import secrets
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from graph_encoder.errors import SecateurError


class FileWriteError(SecateurError, OSError):
    """A file could not be written; what stood there before is untouched."""

    def __str__(self) -> str:
        return self.strerror or super().__str__()


class CheckpointError(SecateurError, RuntimeError):
    """A checkpoint or an agent's file that cannot be read, or cannot be used here; the message says which and why."""


def is_disk_full(error: BaseException) -> bool:
    """Whether the system refused a write because the disk, or the user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def write_atomic(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Replace ``path`` by a file that holds ``content``, in one step.

    The bytes go to a temporary file in the same folder (a rename across file systems is a copy), reach the disk,
    and only then take the name. Missing parent folders are made.

    Args:
        path: file to write or replace.
        content: all of its bytes, or a function that writes them to the open file, which saves a copy in memory:
            ``lambda file: torch.save(state, file)``.

    Raises:
        FileWriteError: if the disk is full, the folder cannot be written, or any other system error; no partial
            file is left, and an older file at ``path`` keeps its content.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    content(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save hides the system's refusal behind a RuntimeError about positions in its archive.
        refusal = error if isinstance(error, OSError) else error.__context__
        if not isinstance(refusal, OSError):
            raise
        reason = refusal.strerror or str(refusal)
        if is_disk_full(refusal):
            size = f" for {len(content):,} bytes" if isinstance(content, bytes) else ""
            reason = f"no space left on the disk{size}; free some and run the same command again"
        msg = f"cannot write '{path}': {reason} (an older file of that name is untouched)"
        raise FileWriteError(refusal.errno, msg) from error


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` outlive a power cut, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    # The file is whole under its name by now; a file system that cannot synchronise folders loses nothing else.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_checked(path: Path, device: torch.device | str = "cpu") -> Any:
    """Read what `torch.save` wrote: tensors and plain values only, every checksum looked at.

    `torch.load` alone does not look at the checksums of its archives: a flipped bit would become a weight.

    Raises:
        zipfile.BadZipFile: if the archive is damaged; a file that holds code, or none, raises as `torch.load` does.
    """
    with zipfile.ZipFile(path) as archive:
        if (record := archive.testzip()) is not None:
            msg = f"the checksum of '{record}' is wrong"
            raise zipfile.BadZipFile(msg)
    return torch.load(path, map_location=device, weights_only=True)
