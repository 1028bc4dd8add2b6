"""The full MNIST as a data source: ``data.source: experiments.mnist:splits``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from .images import DataError, cache_folder

FOLDER_VARIABLE = "SECATEUR_MNIST"
"""Environment variable with the folder of torchvision's copy; torchvision's folder in the cache if not set."""

Pair = tuple[Tensor, Tensor]


def splits() -> dict[str, Pair | Callable[[], Pair]]:
    """MNIST as torchvision keeps it: the last twelfth of the training images is for validation.

    Raises:
        DataError: if it is not there; nothing is downloaded.
    """
    root = Path(os.environ.get(FOLDER_VARIABLE) or cache_folder() / "torchvision")
    images, labels = _read(root, train=True)
    last = len(images) - len(images) // 12
    return {
        "train": (images[:last], labels[:last]),
        "validation": (images[last:], labels[last:]),
        "test": lambda: _read(root, train=False),
    }


def _read(root: Path, *, train: bool) -> Pair:
    from torchvision.datasets import MNIST

    try:
        data = MNIST(root, train=train)
    except RuntimeError as error:
        msg = (
            f"no MNIST in '{root}' ({error}); torchvision.datasets.MNIST('{root}', download=True) fetches it, and "
            f"{FOLDER_VARIABLE} names another folder"
        )
        raise DataError(msg) from error
    return data.data[:, None], data.targets
