"""Images of one split in memory, the error every data problem becomes, and the cache of decoded images."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from graph_encoder.errors import SecateurError
from pruning.files import FileWriteError, write_atomic

_log = logging.getLogger(__name__)

# Part of every cache key: raise it when the same files decode to something else.
_CACHE_FORMAT = 3


_ANY_NAME = "surrogateescape"
"""How names of files that are not UTF-8 are written and read."""


class DataError(SecateurError, ValueError):
    """Images that cannot be used; the message names the file or folder and what to do."""


class MissingSplitError(DataError):
    """A source has no such split at all."""


class Scaling(NamedTuple):
    """What images are brought to: the shorter side is scaled, and a square about the centre is cut out.

    Attributes:
        size: side of the square, in pixels.
        shorter: pixels of the shorter side, at least as many.
    """

    size: int
    shorter: int

    def keeps(self, height: int, width: int) -> bool:
        """Whether images of so many pixels are left as they are."""
        return height == width == self.size == self.shorter


@dataclass(frozen=True)
class ImageSplit:
    """The images of one split.

    Attributes:
        images: uint8, ``(N, C, H, W)``.
        labels: int64, ``(N,)``: indices into ``classes``.
        paths: what each image is called, relative to the split's folder.
        classes: names of the classes, in label order.
    """

    images: Tensor
    labels: Tensor
    paths: tuple[str, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Tensor) -> "ImageSplit":
        """The images at ``indices`` (int64), in that order."""
        return ImageSplit(
            self.images[indices], self.labels[indices], tuple(self.paths[i] for i in indices.tolist()), self.classes
        )


def cache_folder() -> Path:
    """Where decoded images and trained networks are kept: ``$SECATEUR_CACHE``, else ``~/.cache/secateur`` (XDG)."""
    if chosen := os.environ.get("SECATEUR_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "secateur"


def cached_split(key: Sequence[object], read: Callable[[], ImageSplit]) -> ImageSplit:
    """What ``read()`` returns, from the cache if it was read before under the same key.

    A cache that cannot be read is made anew, one that cannot be written is done without.

    Args:
        key: everything that decides the result (the size and time of an archive, the folder, the image size); each
            part with a stable ``repr``.
        read: decodes the images.
    """
    digest = hashlib.sha256(repr((_CACHE_FORMAT, *key)).encode()).hexdigest()[:32]
    path = cache_folder() / "images" / f"{digest}.safetensors"
    if path.exists():
        try:
            return _load(path)
        except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
            _log.warning("the image cache '%s' cannot be read (%s): decoding the images again", path, error)
    split = read()
    try:
        write_atomic(path, _dump(split))
    except FileWriteError as error:
        _log.warning("decoded images are not kept for the next run: %s", error)
    return split


def _dump(split: ImageSplit) -> bytes:
    names = {"paths": json.dumps(split.paths), "classes": json.dumps(split.classes)}
    return safetensors.torch.save({"images": split.images, "labels": split.labels}, metadata=names)


def _load(path: Path) -> ImageSplit:
    with safetensors.safe_open(path, framework="pt") as file:
        names = file.metadata()
        return ImageSplit(
            file.get_tensor("images"),
            file.get_tensor("labels"),
            tuple(json.loads(names["paths"])),
            tuple(json.loads(names["classes"])),
        )


def write_list(path: Path, names: Sequence[str]) -> None:
    """Write relative paths as `read_list` reads them; `FileWriteError` if that cannot be done."""
    write_atomic(path, "".join(f"{name}\n" for name in names).encode(errors=_ANY_NAME))


def read_list(path: Path) -> tuple[str, ...]:
    """The relative paths in a list file, one a line; blank lines are skipped.

    Raises:
        DataError: if the file cannot be read, is empty, or names a path twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig", errors=_ANY_NAME).split("\n")
    except OSError as error:
        msg = f"cannot read the list of images '{path}': {error}"
        raise DataError(msg) from error
    # Names end in a suffix: blanks after it belong to the line.
    names = [line.rstrip() for line in lines if line.strip()]
    if not names:
        msg = f"the list of images '{path}' is empty; it holds one relative path a line, such as 'cat/0001.jpg'"
        raise DataError(msg)
    if len(set(names)) < len(names):
        repeated = next(name for i, name in enumerate(names) if name in names[:i])
        msg = f"the list of images '{path}' names '{repeated}' more than once"
        raise DataError(msg)
    return tuple(names)


def choose(split: ImageSplit, names: Sequence[str], list_file: Path) -> ImageSplit:
    """The images of ``split`` that a list names, in the list's order.

    Raises:
        DataError: if the list names an image that is not there.
    """
    position = {path: i for i, path in enumerate(split.paths)}
    check_listed(names, position, list_file)
    return split.take(torch.tensor([position[name] for name in names]))


def check_listed(names: Sequence[str], present: dict[str, int] | dict[str, Path | bytes], list_file: Path) -> None:
    """Check that every listed name is there.

    Raises:
        DataError: naming the first one that is not, and how many are missing.
    """
    missing = [name for name in names if name not in present]
    if missing:
        msg = (
            f"the list '{list_file}' names {len(missing)} of {len(names)} images that are not there, first "
            f"'{missing[0]}'; paths are relative to the split's folder, as '{next(iter(present))}' is"
        )
        raise DataError(msg)
