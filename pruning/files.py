"""Files that a reader finds old or new, never half written, and archives read with their checksums."""

import errno
import os
import secrets
import zipfile
from pathlib import Path
from typing import Any

import torch


class FileWriteError(OSError):
    """A file could not be written; what stood there before is untouched."""


def write_atomic(path: Path, content: bytes) -> None:
    """Replace ``path`` by a file that holds ``content``, in one step.

    The bytes go to a temporary file in the same folder (a rename across file systems is a copy), reach the disk,
    and only then take the name. Missing parent folders are made.

    Args:
        path: file to write or replace.
        content: all of its bytes.

    Raises:
        FileWriteError: if the disk is full, the folder cannot be written, or any other system error; no partial
            file is left, and an older file at ``path`` keeps its content.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"no space left on the disk for {len(content):,} bytes; free some and run the same command again"
        msg = f"cannot write '{path}': {reason} (an older file of that name is untouched)"
        raise FileWriteError(error.errno, msg) from error


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
