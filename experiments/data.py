"""Images for training, searching and testing: the recipe that names them, their splits, batches and accuracy."""

import difflib
import posixpath
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from graph_encoder.modes import evaluation_mode, mixed_precision
from pruning.integer_network import in_integers

from .image_folder import classes_and_size, first_image, read_image_folder
from .images import DataError, ImageSplit, MissingSplitError, Scaling, choose, read_list
from .sources import FunctionSource, check_built_in, read_bundled, read_cifar
from .user_function import is_reference

__all__ = [
    "DataError",
    "DataRecipe",
    "ImageData",
    "ImageSplit",
    "SplitRecipe",
    "TrainBatches",
    "calibration_batches",
    "labelled_batches",
    "make_evaluate",
    "make_judge",
    "normalise",
]

_BUILT_IN: dict[str, dict[str, Any]] = {
    "bundled": {"mean": (0.1307,), "std": (0.3081,), "crop_padding": 2, "flip": False},
    "cifar10": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)},
    "cifar100": {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)},
}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_padding": 4, "flip": True}
_GRAY = {"mean": (0.449,), "std": (0.226,)}

_WHY_UNSEEN = (
    "The search must score plans on images that the network was not trained on: on its training images the best of "
    "many plans is mostly the one that remembers them best"
)


class SplitRecipe(BaseModel):
    """Where the images of one split are."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    folder: str
    """Folder below the root, with one folder for each class; in a recipe by default the name of the split. The bundled
    sources have train, validation and test."""
    list_file: Path | None = None
    """Text file that names the images to take, one a line: those of a folder by their paths below it, CIFAR's as
    train/00012 or test/00012, a function's as 000012, the digits as 0012; all images if unset."""

    @field_validator("folder")
    @classmethod
    def _written_in_one_way(cls, folder: str) -> str:
        # So that test/ and test are the same folder.
        return posixpath.normpath(folder)


class DataRecipe(BaseModel):
    """Which images, their splits and their preparation.

    What is left unset takes the source's own value: the digits are shifted by 2 pixels and never mirrored, CIFAR has
    its own mean and standard deviation, everything else has those of ImageNet.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: str = "bundled"
    """bundled, cifar10, cifar100, an image folder or an archive of one, or package.module:function."""
    root: Path | None = None
    """Folder of torchvision's copy of CIFAR; unset is a folder in the cache."""
    download: bool = False
    """Let torchvision fetch CIFAR if it is not there."""
    train: SplitRecipe = SplitRecipe(folder="train")
    """Training images: fine-tuning and batch-norm statistics."""
    validation: SplitRecipe = SplitRecipe(folder="validation")
    """Images the network was not trained on: the search scores plans on them."""
    test: SplitRecipe = SplitRecipe(folder="test")
    """Images that only the report reads, once."""
    size: int | None = Field(default=None, ge=1)
    """Height and width in pixels that images are brought to; unset takes them as they are."""
    resize: int | None = Field(default=None, ge=1)
    """Pixels that the shorter side is scaled to before the centre is cut out, at least ``size``; unset scales it to
    ``size``. Networks of ImageNet that read 224 pixels were mostly tested with 256."""
    grayscale: bool = False
    """Read an image folder with one channel in place of three."""
    crop_padding: int = Field(default=4, ge=0)
    """Pixels of black around a training image before it is cropped at random."""
    flip: bool = True
    """Mirror half of the training images, left to right."""
    mean: tuple[float, ...] = ()
    """Mean of each channel, of values in 0 to 1."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel, of values in 0 to 1."""

    @property
    def scaling(self) -> Scaling | None:
        """What images are brought to; None takes them as they are."""
        return Scaling(self.size, self.resize or self.size) if self.size is not None else None

    @property
    def is_chosen(self) -> bool:
        """Whether somebody named the source; without one the images are the bundled digits, which few people mean."""
        return "source" in self.model_fields_set

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_sources_values(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        source = given.get("source", "bundled")
        own = _IMAGENET | (_GRAY if given.get("grayscale") else {}) | _BUILT_IN.get(str(source), {})
        return own | {name: _in_own_folder(name, value) for name, value in given.items() if value is not None}

    @model_validator(mode="after")
    def _check(self) -> "DataRecipe":
        if len(self.mean) != len(self.std) or not self.mean or min(self.std) <= 0:
            msg = f"mean and std need one value for each channel, std above 0; found mean {self.mean}, std {self.std}"
            raise ValueError(msg)
        if self.resize is not None and (self.size is None or self.resize < self.size):
            msg = (
                f"resize is {self.resize} and size {self.size}: images are scaled until the shorter side has resize "
                "pixels, and size is what is cut out of them; give a size, and a resize of at least as much"
            )
            raise ValueError(msg)
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
            one, other = splits[first], splits[second]
            if one.folder == other.folder and (one.list_file is None or other.list_file is None):
                msg = (
                    f"{first} and {second} would share the images of '{one.folder}'; give both a list_file, "
                    f"such as the even and the odd list that `secateur split` writes"
                )
                raise ValueError(msg)
        return self


def _in_own_folder(name: str, value: Any) -> Any:
    return {"folder": name} | value if name in ("train", "validation", "test") and isinstance(value, dict) else value


class ImageData:
    """The splits of a recipe, each read when it is first asked for.

    Attributes:
        recipe: what it was made from.
    """

    def __init__(self, recipe: DataRecipe) -> None:
        self.recipe = recipe
        self._check_source()
        self._check_lists()

    @cached_property
    def train(self) -> ImageSplit:
        """Images for training, fine-tuning and batch-norm statistics.

        Raises:
            DataError: if they are all of one class.
        """
        return self._of_classes(self._read(self.recipe.train))

    @cached_property
    def sample(self) -> ImageSplit:
        """One training image and the names of all classes: what a network must fit.

        A folder's other images are not decoded for it, which can take minutes. (An archive is read whole in any case.)
        """
        source, split = self.recipe.source, self.recipe.train
        if source not in _BUILT_IN and Path(source).is_dir():
            first = first_image(
                Path(source), split.folder, split.list_file, self.recipe.scaling, grayscale=self.recipe.grayscale
            )
            return self._of_classes(self._checked(first))
        return self.train.take(torch.tensor([0]))

    @cached_property
    def validation(self) -> ImageSplit:
        """Images that plans are scored on.

        Raises:
            DataError: if there are none, saying why training images will not do.
        """
        try:
            return self._read_like_train("validation")
        except MissingSplitError as error:
            msg = (
                f"no validation data: {error}. {_WHY_UNSEEN}. Name a folder of unseen images with "
                "data.validation.folder, or hold some out with lists of files (`secateur split` writes the even and "
                "the odd files of a folder)"
            )
            raise DataError(msg) from error

    @cached_property
    def test(self) -> ImageSplit:
        """Images for the last figure of a report.

        Nothing that chooses between plans, recipes or epochs may touch this: a choice made on the test images makes
        their accuracy a part of the search. So it is not even opened before the report asks for it.
        """
        return self._read_like_train("test")

    def check_test(self) -> None:
        """Refuse a test split that does not fit the training images, without decoding an image of it.

        Without one of the default name a report does without test accuracy; another was asked for.

        Raises:
            MissingSplitError: if one was asked for and is not there.
            DataError: if it holds no image, images of another size or other classes, or its list names an image that
                is not there.
        """
        source, split = self.recipe.source, self.recipe.test
        try:
            if source in _BUILT_IN:
                check_built_in(split.folder, source)
                if split.list_file is not None:
                    self._read(split)  # whose names are made with the images
            elif (root := Path(source)).exists():
                classes, size = classes_and_size(root, split.folder, split.list_file)
                self._check_like_train("test", classes, None if self.recipe.size else size)
            elif (images := self._function.check(split.folder)) is not None:
                self._check_images("test", _resized(self._checked(_listed(images, split)), self.recipe.scaling))
        except MissingSplitError as error:
            if split == DataRecipe.model_fields["test"].default:
                return
            msg = (
                f"no test data: {error}. Name the folder with data.test.folder, or leave data.test out: the report "
                "then shows validation accuracy alone"
            )
            raise MissingSplitError(msg) from error

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in label order."""
        return self.train.classes

    @cached_property
    def _function(self) -> FunctionSource:
        return FunctionSource(self.recipe.source)

    def _read(self, split: SplitRecipe) -> ImageSplit:
        recipe = self.recipe
        source = recipe.source
        if source not in _BUILT_IN and Path(source).exists():
            return self._checked(
                read_image_folder(
                    Path(source), split.folder, split.list_file, recipe.scaling, grayscale=recipe.grayscale
                )
            )
        if source == "bundled":
            images = read_bundled(split.folder)
        elif source in ("cifar10", "cifar100"):
            name = cast("Literal['cifar10', 'cifar100']", source)
            images = read_cifar(name, split.folder, recipe.root, download=recipe.download)
        else:
            images = self._function.read(split.folder)
        return _resized(self._checked(_listed(images, split)), recipe.scaling)

    def _read_like_train(self, name: Literal["validation", "test"]) -> ImageSplit:
        images = self._read(getattr(self.recipe, name))
        self._check_images(name, images)
        return images

    def _check_images(self, name: str, images: ImageSplit) -> None:
        height, width = images.images.shape[2:]
        self._check_like_train(name, images.classes, (width, height))

    def _check_like_train(self, name: str, classes: tuple[str, ...], size: tuple[int, int] | None) -> None:
        self._check_classes(name, classes, self.sample.classes)
        height, width = self.sample.images.shape[2:]
        if size not in (None, (width, height)):
            own = "x".join(map(str, size or ()))
            msg = (
                f"images of {name} are {own} pixels, those of train {width}x{height}, in '{self.recipe.source}'; give "
                f"a size to bring all images to, such as --set data.size={min(height, width)}"
            )
            raise DataError(msg)

    def _check_classes(self, name: str, own: tuple[str, ...], trained: tuple[str, ...]) -> None:
        if own != trained:
            only_here, only_train = sorted(set(own) - set(trained)), sorted(set(trained) - set(own))
            msg = (
                f"the class folders of {name} and train differ in '{self.recipe.source}': only {name} has "
                f"{only_here or 'none'}, only train has {only_train or 'none'}; labels are places in the sorted names, "
                f"so both need the same folders"
            )
            raise DataError(msg)

    def _of_classes(self, trained: ImageSplit) -> ImageSplit:
        if len(trained.classes) < 2:
            source, folder = self.recipe.source, self.recipe.train.folder
            (only,) = trained.classes
            msg = f"the training images of '{source}' are all of one class, '{only}'; two or more are needed"
            if Path(source).exists():
                msg += (
                    f", each a folder in '{folder}' with images of its own: is there one folder level too many between "
                    f"'{folder}' and the classes?"
                )
            raise DataError(msg)
        return trained

    def _checked(self, split: ImageSplit) -> ImageSplit:
        shape, n_channels = tuple(split.images.shape), len(self.recipe.mean)
        if shape[1] != n_channels:
            msg = (
                f"images of '{self.recipe.source}' have {shape[1]} channels, but mean and std have {n_channels} "
                f"values; give one value for each channel"
            )
            if shape[3] == n_channels:
                msg += f". Their shape is {shape}: if that is (N, H, W, C), give them as (N, C, H, W), such as by "
                msg += "images.permute(0, 3, 1, 2)"
            raise DataError(msg)
        return split

    def _check_source(self) -> None:
        source = self.recipe.source
        if source in _BUILT_IN or is_reference(source) or Path(source).exists():
            return
        beside = Path(source).parent
        there = [str(beside / path.name) for path in beside.iterdir()] if beside.is_dir() else []
        nearest = difflib.get_close_matches(source, [*_BUILT_IN, *there], n=1)
        hint = f"; did you mean '{nearest[0]}'?" if nearest else "; there is no such folder or file."
        msg = (
            f"unknown data source '{source}'{hint} Allowed: {', '.join(_BUILT_IN)}, the path of an image folder or of "
            f"a .tar or .zip of one, or package.module:function"
        )
        raise DataError(msg)

    def _check_lists(self) -> None:
        # Only the lists are read here, not the images: an overlap would otherwise show at the end of a search.
        listed = [
            (name, split.folder, split.list_file, set(read_list(split.list_file)))
            for name in ("train", "validation", "test")
            if (split := cast("SplitRecipe", getattr(self.recipe, name))).list_file is not None
        ]
        for i, (first, folder, first_file, first_names) in enumerate(listed):
            for second, other_folder, second_file, second_names in listed[i + 1 :]:
                if folder == other_folder and (shared := sorted(first_names & second_names)):
                    msg = (
                        f"{first} and {second} share {len(shared)} images of '{folder}', first '{shared[0]}' (lists "
                        f"'{first_file}' and '{second_file}'); an image may be in one split only"
                    )
                    raise DataError(msg)


def check_classes_are_covered(train: ImageSplit, validation: ImageSplit) -> str | None:
    """Warn when plans are scored on images that lack a class of the training images.

    Returns:
        The warning, or None if every class is there.
    """
    trained, seen = set(train.labels.tolist()), set(validation.labels.tolist())
    missing = [train.classes[label] for label in sorted(trained - seen)]
    if not missing:
        return None
    named = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    return (
        f"the validation split has no image of {len(missing)} of the {len(trained)} classes of the training split "
        f"({named}): what plans lose on these is not seen by the search; hold out some images of every class"
    )


def _listed(images: ImageSplit, split: SplitRecipe) -> ImageSplit:
    """Those of a split's images that its list names, all of them where it has none."""
    if split.list_file is None:
        return images
    return choose(images, read_list(split.list_file), split.list_file)


def _resized(split: ImageSplit, scaling: Scaling | None) -> ImageSplit:
    if scaling is None or scaling.keeps(*split.images.shape[2:]):
        return split
    images = transforms.resize(split.images, [scaling.shorter], antialias=True)
    images = transforms.center_crop(images, [scaling.size, scaling.size])
    return ImageSplit(images, split.labels, split.paths, split.classes)


def normalise(images: Tensor, recipe: DataRecipe) -> Tensor:
    """Images as a network reads them: float32, ``(value / 255 - mean) / std``, channels last in memory.

    Args:
        images: uint8, ``(N, C, H, W)``; the result is on the same device.
        recipe: holds mean and standard deviation, one value for each of the C channels.
    """
    mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (recipe.mean, recipe.std))
    values = images.to(torch.float32, memory_format=torch.channels_last)
    return values.mul_(1 / (255 * std)).sub_(mean / std)  # two passes over the images in place of three


def make_judge(
    split: ImageSplit,
    recipe: DataRecipe,
    *,
    n_images: int | None = None,
    batch_size: int = 250,
    device: torch.device | str = "cpu",
    autocast: bool = False,
    seed: int = 0,
) -> Callable[[nn.Module], Tensor]:
    """Build the function that says which of a fixed set of images a network classifies rightly.

    The images stay on ``device`` as bytes; every call sees the same ones in the same batches, so two networks are
    compared on common random numbers.

    Args:
        split: images and labels.
        recipe: for mean and standard deviation.
        n_images: how many to use, drawn without replacement; all if None or more than there are.
        batch_size: images a forward pass.
        device: where the images stay; the networks must be there too.
        autocast: run the network in bfloat16 where PyTorch deems it safe and the device has it.
        seed: of the draw of ``n_images``.

    Returns:
        A function from a network to booleans of shape ``(n,)``, on the CPU. It runs in evaluation and inference mode,
        in integers where the network has 8 bits and there are kernels (`pruning.integer_network`), and leaves the
        network's modes as they were.
    """
    device = torch.device(device)
    if n_images is not None and n_images < len(split):
        split = split.take(_draw(len(split), n_images, torch.Generator().manual_seed(seed)))
    # As floats they would take four times the memory; normalising a batch takes far less time than a network does.
    images, labels = torch.split(split.images.to(device), batch_size), split.labels.to(device)

    def judge(model: nn.Module) -> Tensor:
        with evaluation_mode(model), torch.no_grad(), mixed_precision(device.type, autocast):
            network = in_integers(model)
            found = torch.cat([network(normalise(batch, recipe)).argmax(dim=1) for batch in images])
        return (found == labels).cpu()

    return judge


def make_evaluate(split: ImageSplit, recipe: DataRecipe, **options: Any) -> Callable[[nn.Module], float]:
    """Build the function that measures a network's accuracy in [0, 1]; the arguments are those of `make_judge`."""
    judge = make_judge(split, recipe, **options)
    return lambda model: judge(model).double().mean().item()


def calibration_batches(
    split: ImageSplit,
    recipe: DataRecipe,
    *,
    n_images: int = 1000,
    batch_size: int = 250,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> list[Tensor]:
    """A fixed random subset of the training images for re-estimating batch-norm statistics.

    They are augmented as in training, since the statistics that a network was trained with are those of augmented
    images: on ResNet-56 for CIFAR-10, plain images cost the dense network 3.5 points of accuracy, augmented ones none.

    Args:
        split: the training images: statistics are part of the network, so they may not come from validation images.
        recipe: for mean and standard deviation.
        n_images: how many, drawn without replacement; all if there are fewer.
        batch_size: images a batch, at most ``n_images``.
        device: where the batches are put.
        seed: of the draw and the augmentation.

    Returns:
        Normalised float32 batches of shape ``(batch_size, C, H, W)``, all full; images that would not fill
        another are left out.
    """
    n_images = min(n_images, len(split))
    batch_size = min(batch_size, n_images)
    n_images -= n_images % batch_size
    generator = torch.Generator().manual_seed(seed)
    chosen = _draw(len(split), n_images, generator)
    images = _augmented(split.images[chosen].to(device), recipe, generator)
    return list(torch.split(normalise(images, recipe), batch_size))


def labelled_batches(
    split: ImageSplit,
    recipe: DataRecipe,
    *,
    n_images: int = 1000,
    batch_size: int = 250,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> list[tuple[Tensor, Tensor]]:
    """The images that `calibration_batches` draws, not augmented but as in use, with their labels.

    Args:
        split: the training images.
        recipe: for mean and standard deviation.
        n_images: how many, drawn without replacement; all if there are fewer.
        batch_size: images a batch; the last one may be smaller.
        device: where the batches are put.
        seed: of the draw.

    Returns:
        Pairs of normalised float32 images, ``(N, C, H, W)``, and labels, int64 ``(N,)``.
    """
    chosen = _draw(len(split), n_images, torch.Generator().manual_seed(seed))
    images, labels = normalise(split.images[chosen].to(device), recipe), split.labels[chosen].to(device)
    return list(zip(images.split(batch_size), labels.split(batch_size), strict=True))


def _draw(n: int, n_drawn: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(n, generator=generator)[:n_drawn]


class TrainBatches:
    """Training batches with augmentation: calling it with an epoch gives that epoch's batches.

    An epoch's order, crops and flips depend on the seed and the epoch alone, so a resumed run sees the batches that an
    uninterrupted one sees. Augmentation works on a whole batch at a time. What does not fill a batch is left
    out of the epoch (another few images each time): a batch norm cannot train on a batch of one.
    """

    def __init__(
        self,
        split: ImageSplit,
        recipe: DataRecipe,
        *,
        batch_size: int = 128,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self._images = split.images.to(device)
        self._labels = split.labels.to(device)
        self._recipe = recipe
        self._batch_size = min(batch_size, len(split))
        self._seed = seed

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self._images) // self._batch_size

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images ``(B, C, H, W)`` and labels ``(B,)`` of one epoch."""
        state = np.random.SeedSequence([self._seed, epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        order = torch.randperm(len(self._images), generator=generator).to(self._images.device)
        for indices in torch.split(order[: len(self) * self._batch_size], self._batch_size):
            images = _augmented(self._images[indices], self._recipe, generator)
            yield normalise(images, self._recipe), self._labels[indices]


def _augmented(images: Tensor, recipe: DataRecipe, generator: torch.Generator) -> Tensor:
    """Crop each image at its own place out of itself with a black border, and mirror half of them."""
    n, _, height, width = images.shape
    device = images.device
    if padding := recipe.crop_padding:
        padded = F.pad(images, (padding,) * 4)
        places = torch.randint(2 * padding + 1, (2, n), generator=generator).to(device)
        # (N, C, place down, place across, H, W), a view: only the chosen window of each image is copied.
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        images = windows[torch.arange(n, device=device), :, places[0], places[1]]
    if recipe.flip:
        mirrored = (torch.rand(n, generator=generator) < 0.5).to(device)
        images = torch.where(mirrored.view(n, 1, 1, 1), images.flip(3), images)
    return images
