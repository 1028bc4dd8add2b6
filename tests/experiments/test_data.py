import errno
import gzip
import io
import logging
import os
import re
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from experiments.data import (
    DataError,
    DataRecipe,
    ImageData,
    ImageSplit,
    SplitRecipe,
    TrainBatches,
    calibration_batches,
    check_classes_are_covered,
    make_evaluate,
    normalise,
)
from experiments.image_folder import first_image, read_image_folder, split_lists, write_split_lists
from experiments.images import MissingSplitError, Scaling


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SECATEUR_CACHE", str(folder))
    return folder


def image(value: int, size: tuple[int, int] = (6, 6)) -> Image.Image:
    return Image.new("RGB", size, (value, 0, 255 - value))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image folder: in every split cats 0 to 3 are as red as their number times 10, dogs 40 more."""
    root = tmp_path / "pets"
    for split in ("train", "validation", "test"):
        for label, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                image(10 * i + 40 * label).save(folder / f"{i:03d}.png")
    return root


@pytest.mark.parametrize("kind", ["", "pets.zip", "pets.tar.gz"])
def test_test_split_that_was_chosen_has_to_be_there(root: Path, tmp_path: Path, kind: str) -> None:
    source = packed(root, tmp_path / kind) if kind else root

    with pytest.raises(DataError) as caught:
        ImageData(DataRecipe(source=str(source), test=SplitRecipe(folder="tset"))).check_test()

    assert str(caught.value) == (
        f"no test data: no folder 'tset' in '{source}'; it has test, train, validation. Name the folder with "
        "data.test.folder, or leave data.test out: the report then shows validation accuracy alone"
    )


def test_test_split_is_looked_for_without_reading_it_and_the_default_one_may_be_missing(root: Path) -> None:
    (root / "test" / "cat" / "000.png").write_bytes(b"no image")
    (root / "test").rename(root / "others")

    ImageData(DataRecipe(source=str(root), test=SplitRecipe(folder="others"))).check_test()
    ImageData(DataRecipe(source=str(root))).check_test()


@pytest.mark.parametrize("source", ["bundled", "mine:data"])
def test_test_list_that_names_missing_images_is_refused_before_anything_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    pair = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    monkeypatch.setattr("experiments.user_function.load_function", lambda _: lambda: {"train": pair, "test": pair})
    listed = tmp_path / "mine.txt"
    listed.write_text("999999\n")
    test = SplitRecipe(folder="test", list_file=listed)

    with pytest.raises(DataError, match="names 1 of 1 images that are not there, first '999999'"):
        ImageData(DataRecipe(source=source, mean=(0.5,), std=(0.5,), test=test)).check_test()


def test_list_of_a_split_is_taken_in_the_folder_of_its_name() -> None:
    recipe = DataRecipe.model_validate({name: {"list_file": "a.txt"} for name in ("train", "validation", "test")})

    assert [recipe.train.folder, recipe.validation.folder, recipe.test.folder] == ["train", "validation", "test"]


def packed(root: Path, path: Path, prefix: str = "") -> Path:
    files = [file for file in sorted(root.rglob("*")) if file.is_file() or not any(file.iterdir())]
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in files:
                archive.write(file, prefix + file.relative_to(root).as_posix())
    else:
        with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as tar:
            for file in files:
                tar.add(file, prefix + file.relative_to(root).as_posix())
    return path


def test_bundled_digits_are_split_by_class_without_overlap() -> None:
    data = ImageData(DataRecipe())
    splits = (data.train, data.validation, data.test)

    assert [len(split) for split in splits] == [3500, 750, 750]
    assert [split.labels.bincount().tolist() for split in splits] == [[350] * 10, [75] * 10, [75] * 10]
    assert len({path for split in splits for path in split.paths}) == 5000
    assert data.train.images.shape[1:] == (1, 28, 28)
    assert data.train.images.dtype == torch.uint8
    # Figures of the whole of MNIST, which the recipe normalises with, hold for the 3,500 digits too.
    pixels = normalise(data.train.images, data.recipe)
    assert abs(float(pixels.mean())) < 0.02
    assert abs(float(pixels.std()) - 1) < 0.02


def test_image_folder_gives_pixels_labels_and_sorted_names(root: Path) -> None:
    split = ImageData(DataRecipe(source=str(root))).validation

    assert split.classes == ("cat", "dog")
    assert split.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert split.paths[:2] == ("cat/000.png", "cat/001.png")
    assert split.images[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40, 50, 60, 70]
    assert split.images[:, 2, 5, 5].tolist() == [255, 245, 235, 225, 215, 205, 195, 185]


@pytest.mark.parametrize("name", ["pets.tar", "pets.tar.gz", "pets.zip"])
@pytest.mark.parametrize("prefix", ["", "./", "pets/"])
def test_archive_reads_like_the_folder_it_was_packed_from(root: Path, tmp_path: Path, name: str, prefix: str) -> None:
    archive = packed(root, tmp_path / name, prefix)
    unpacked, from_archive = read_image_folder(root, "train"), read_image_folder(archive, "train")

    assert from_archive.paths == unpacked.paths
    assert torch.equal(from_archive.images, unpacked.images)
    assert torch.equal(from_archive.labels, unpacked.labels)


def test_second_reading_comes_from_the_cache_until_the_file_changes(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read_image_folder(root, "train")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_: pytest.fail("decoded again"))
        second = read_image_folder(root, "train")
    image(200).save(root / "train" / "cat" / "000.png")
    changed = read_image_folder(root, "train")

    assert torch.equal(first.images, second.images)
    assert second.paths == first.paths
    assert second.classes == first.classes
    assert changed.images[0, 0, 0, 0] == 200
    assert len(list(cache.rglob("*.safetensors"))) == 2


def test_damaged_cache_is_made_anew(root: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = read_image_folder(root, "train")
    (file,) = cache.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])

    with caplog.at_level(logging.WARNING):
        again = read_image_folder(root, "train")

    assert torch.equal(first.images, again.images)
    assert "cannot be read" in caplog.text


def test_images_of_other_sizes_are_scaled_and_cropped_about_the_centre(root: Path) -> None:
    wide = Image.new("RGB", (24, 12), (0, 0, 0))
    wide.paste((250, 250, 250), (6, 0, 18, 12))
    wide.save(root / "train" / "cat" / "000.png")

    split = read_image_folder(root, "train", scaling=Scaling(6, 6))

    assert split.images.shape == (8, 3, 6, 6)
    assert split.images[0, :, :, 1:5].min() > 240
    # Of 24 by 12 pixels the 6 by 6 in the middle, where all is white.
    assert read_image_folder(root, "train", scaling=Scaling(6, 12)).images[0].min() > 240


def test_size_applies_to_arrays_too() -> None:
    data = ImageData(DataRecipe(size=14))
    assert data.validation.images.shape == (750, 1, 14, 14)
    whole = ImageData(DataRecipe()).validation.images
    assert torch.equal(ImageData(DataRecipe(size=14, resize=28)).validation.images, whole[:, :, 7:21, 7:21])


@pytest.mark.parametrize("size", [None, 29])
def test_images_are_not_scaled_to_less_than_is_cut_out(size: int | None) -> None:
    with pytest.raises(ValueError, match=f"resize is 28 and size {size}: images are scaled until"):
        DataRecipe(size=size, resize=28)


def test_even_and_odd_lists_divide_a_folder(root: Path, tmp_path: Path) -> None:
    even, odd = write_split_lists(root, "test", tmp_path / "lists")

    assert even.read_text().split() == ["cat/000.png", "cat/002.png", "dog/000.png", "dog/002.png"]
    assert odd.read_text().split() == ["cat/001.png", "cat/003.png", "dog/001.png", "dog/003.png"]
    recipe = DataRecipe(
        source=str(root),
        validation=SplitRecipe(folder="test", list_file=even),
        test=SplitRecipe(folder="test", list_file=odd),
    )
    data = ImageData(recipe)
    assert data.validation.images[:, 0, 0, 0].tolist() == [0, 20, 40, 60]
    assert data.test.images[:, 0, 0, 0].tolist() == [10, 30, 50, 70]


def test_lists_that_are_there_are_not_written_again(root: Path, tmp_path: Path) -> None:
    even, odd = split_lists(root, "test", tmp_path)
    even.write_text("cat/000.png\n")

    assert split_lists(root, "test", tmp_path) == (even, odd)
    assert even.read_text() == "cat/000.png\n"
    # One of them alone may be what somebody edited: it is not written over.
    odd.unlink()
    assert failure(lambda: split_lists(root, "test", tmp_path)) == (
        f"'{even}' lists other images; delete it, or name another folder with --out"
    )
    assert not odd.exists()
    even.unlink()
    assert split_lists(root, "test", tmp_path) == (even, odd)
    assert len(even.read_text().split()) == len(odd.read_text().split()) == 4


def test_list_that_leaves_a_class_out_does_not_shift_labels(root: Path, tmp_path: Path) -> None:
    names = tmp_path / "dogs.txt"
    names.write_text("dog/001.png\n\n")
    assert read_image_folder(root, "train", names).labels.tolist() == [1]


def test_test_images_are_not_opened_by_training_and_searching(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = Image.open

    def recorded(file: Path) -> Image.Image:
        opened.append(file.relative_to(root).parts[0])
        return original(file)

    monkeypatch.setattr(Image, "open", recorded)
    data = ImageData(DataRecipe(source=str(root)))
    _ = data.train, data.validation, data.classes

    assert sorted(set(opened)) == ["train", "validation"]
    _ = data.test
    assert sorted(set(opened)) == ["test", "train", "validation"]


def test_function_of_the_user_gives_the_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_images.py").write_text(
        "import numpy as np\n"
        "def pair(value):\n"
        "    return np.full((3, 1, 4, 4), value, np.uint8), np.array([0, 1, 2])\n"
        "def load():\n"
        "    return {'train': pair(1), 'validation': pair(2), 'test': lambda: pair(3)}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    data = ImageData(DataRecipe(source="my_images:load", mean=(0.5,), std=(0.5,)))

    assert data.train.labels.tolist() == [0, 1, 2]
    assert data.classes == ("0", "1", "2")
    assert int(data.test.images.max()) == 3


def test_function_of_the_user_is_called_once_and_so_is_what_it_returns_for_a_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    def pair(name: str) -> tuple[np.ndarray, list[int]]:
        calls.append(name)
        return np.full((2, 1, 4, 4), len(calls), np.uint8)[:, :, ::-1], [0, 1]

    def load() -> dict[str, Callable[[], tuple[np.ndarray, list[int]]]]:
        calls.append("load")
        return {name: partial(pair, name) for name in ("train", "validation", "test")}

    monkeypatch.setattr("experiments.user_function.load_function", lambda _: load)
    data = ImageData(DataRecipe(source="mine:data", mean=(0.5,), std=(0.5,)))

    data.check_test()
    _ = data.validation
    assert calls == ["load", "validation", "train"]
    _ = data.train, data.sample, data.validation, data.test
    assert calls == ["load", "validation", "train", "test"]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            [np.zeros((1, 4, 4)), np.zeros((1, 5, 5))],
            [0, 1],
            "the images of split 'train' of 'mine:data' are list and make no tensor (",
        ),
        (
            np.zeros((2, 1, 4, 4), np.uint8),
            np.array(["cat", "dog"]),
            "the labels of split 'train' of 'mine:data' are ndarray and make no tensor (",
        ),
    ],
)
def test_what_makes_no_tensor_is_told(
    monkeypatch: pytest.MonkeyPatch, images: object, labels: object, message: str
) -> None:
    monkeypatch.setattr("experiments.user_function.load_function", lambda _: lambda: {"train": (images, labels)})

    told = failure(lambda: ImageData(DataRecipe(source="mine:data", mean=(0.5,), std=(0.5,))).train)

    assert told.startswith(message)
    assert told.endswith("); give one array of numbers of one shape")


def split_of(images: Tensor, labels: Tensor) -> ImageSplit:
    return ImageSplit(images, labels, tuple(map(str, range(len(images)))), tuple("0123456789"))


def test_normalised_values_are_by_hand() -> None:
    recipe = DataRecipe(mean=(0.5, 0.0), std=(0.25, 1.0))
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1).expand(1, 2, 3, 5)
    found = normalise(images, recipe)

    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([-2.0, 1.0]))
    assert found.is_contiguous(memory_format=torch.channels_last)


class Reader(nn.Module):
    """Reads the class off the first pixel, and counts what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(1.0)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.seen.append(len(x))
        value = (self.dropout(x)[:, 0, 0, 0] * 255).round().long()
        return nn.functional.one_hot(value, 10).float()


def test_accuracy_is_the_share_of_right_answers_and_modes_are_put_back() -> None:
    labels = torch.arange(10)
    images = labels.view(-1, 1, 1, 1).expand(10, 1, 4, 4).to(torch.uint8)
    labels = labels.clone()
    labels[:3] = 9
    model = Reader()
    model.dropout.eval()

    evaluate = make_evaluate(split_of(images, labels), DataRecipe(mean=(0.0,), std=(1.0,)), batch_size=4)

    assert evaluate(model) == 0.7
    assert model.seen == [4, 4, 2]
    assert model.training
    assert not model.dropout.training


def test_few_images_are_a_fixed_draw() -> None:
    images = torch.arange(200).view(-1, 1, 1, 1).expand(200, 1, 2, 2).to(torch.uint8)
    split = split_of(images, torch.zeros(200, dtype=torch.int64))
    seen: list[Tensor] = []

    class Recorder(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.clone())
            return x[:, 0, 0]

    for _ in range(2):
        make_evaluate(split, DataRecipe(), n_images=20)(Recorder())
    make_evaluate(split, DataRecipe(), n_images=1000)(Recorder())

    assert torch.equal(seen[0], seen[1])
    assert len(seen[0].unique()) == 20
    assert len(seen[2]) == 200


def test_calibration_batches_are_full_distinct_training_images() -> None:
    images = torch.arange(200).view(-1, 1, 1, 1).expand(200, 1, 2, 2).to(torch.uint8)
    split = split_of(images, torch.zeros(200, dtype=torch.int64))
    batches = calibration_batches(split, DataRecipe(crop_padding=0), n_images=50, batch_size=20)

    assert [len(batch) for batch in batches] == [20, 20]
    assert len(torch.cat(batches)[:, 0, 0, 0].unique()) == 40


def test_calibration_batches_are_augmented_as_in_training() -> None:
    white = split_of(torch.full((20, 1, 8, 8), 255, dtype=torch.uint8), torch.zeros(20, dtype=torch.int64))
    recipe = DataRecipe(crop_padding=2, mean=(0.0,), std=(1.0,))

    batch = calibration_batches(white, recipe, n_images=20)[0]

    assert set(batch.unique().tolist()) == {0.0, 1.0}, "no crop reaches over the border"
    assert torch.equal(batch, calibration_batches(white, recipe, n_images=20)[0])
    assert not torch.equal(batch, calibration_batches(white, recipe, n_images=20, seed=1)[0])


def test_an_epoch_of_training_batches_depends_on_seed_and_epoch_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    split = split_of(torch.randint(256, (50, 1, 8, 8), generator=generator, dtype=torch.uint8), torch.arange(50))
    recipe = DataRecipe(flip=True)

    def epoch(batches: TrainBatches, number: int) -> Tensor:
        return torch.cat([x for x, _ in batches(number)])

    one, other = TrainBatches(split, recipe, batch_size=16, seed=1), TrainBatches(split, recipe, batch_size=16, seed=1)
    _ = epoch(other, 0)

    assert len(one) == 3
    assert len(epoch(one, 4)) == 48
    assert torch.equal(epoch(one, 4), epoch(other, 4))
    assert not torch.equal(epoch(one, 4), epoch(one, 5))
    assert not torch.equal(epoch(one, 4), epoch(TrainBatches(split, recipe, batch_size=16, seed=2), 4))


def test_every_training_image_is_a_crop_of_itself_with_a_border_or_its_mirror() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (40, 2, 5, 6), generator=generator, dtype=torch.uint8)
    recipe = DataRecipe(crop_padding=2, flip=True, mean=(0.0, 0.0), std=(1.0, 1.0))
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)))
    used: set[tuple[int, int, bool]] = set()

    for x, labels in TrainBatches(split_of(images, torch.arange(40)), recipe, batch_size=10)(0):
        for found, index in zip((x * 255).round().to(torch.uint8).numpy(), labels.tolist(), strict=True):
            crops = {
                (top, left, flip): window[:, :, ::-1] if flip else window
                for top in range(5)
                for left in range(5)
                for flip in (False, True)
                for window in [padded[index, :, top : top + 5, left : left + 6]]
            }
            places = [place for place, crop in crops.items() if np.array_equal(crop, found)]
            assert places
            used.update(places)

    assert {top for top, _, _ in used} == set(range(5))
    assert {left for _, left, _ in used} == set(range(5))
    assert {flip for _, _, flip in used} == {False, True}


def failure(action: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        action()
    return str(caught.value)


def test_empty_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "images" / "train" / "cat").mkdir(parents=True)
    assert failure(lambda: read_image_folder(tmp_path / "images", "train")) == (
        f"no images in 'train' of '{tmp_path / 'images'}'; expected train/<class>/<image> with one of the suffixes "
        ".bmp, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff, .webp"
    )


def test_broken_image_is_named(root: Path) -> None:
    path = root / "train" / "dog" / "002.png"
    path.write_bytes(path.read_bytes()[:20])
    assert re.fullmatch(
        rf"broken image 'train/dog/002.png' in '{root}' \(.+\); replace it, or leave it out with a list file",
        failure(lambda: read_image_folder(root, "train")),
    )


def test_broken_image_in_an_archive_is_named(root: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    image(1, (64, 64)).save(buffer, "JPEG")
    (root / "train" / "dog" / "002.jpg").write_bytes(buffer.getvalue()[:-300])
    archive = packed(root, tmp_path / "pets.tar")
    assert failure(lambda: read_image_folder(archive, "train", scaling=Scaling(6, 6))).startswith(
        f"broken image 'train/dog/002.jpg' in '{archive}' ("
    )


def test_images_of_two_sizes_need_a_size(root: Path) -> None:
    image(1, (7, 6)).save(root / "train" / "dog" / "001.png")
    assert failure(lambda: read_image_folder(root, "train")) == (
        f"'train/dog/001.png' in '{root}' is 7x6 pixels, 'train/cat/000.png' is 6x6; give a size to bring all images "
        "to, such as --set data.size=6"
    )


def test_class_folders_that_differ_are_named(root: Path) -> None:
    (root / "validation" / "dog").rename(root / "validation" / "wolf")
    assert failure(lambda: ImageData(DataRecipe(source=str(root))).validation) == (
        f"the class folders of validation and train differ in '{root}': only validation has ['wolf'], only train has "
        "['dog']; labels are places in the sorted names, so both need the same folders"
    )


@pytest.mark.parametrize("kind", ["", "pets.tar"])
def test_test_images_of_other_classes_are_refused_before_they_are_read(root: Path, tmp_path: Path, kind: str) -> None:
    (root / "test" / "dog").rename(root / "test" / "wolf")
    (root / "test" / "cat" / "000.png").write_bytes(b"no image")
    source = packed(root, tmp_path / kind) if kind else root

    assert failure(ImageData(DataRecipe(source=str(source))).check_test).startswith(
        f"the class folders of test and train differ in '{source}': only test has ['wolf'], only train has ['dog']; "
    )


def labelled_alike() -> dict[str, tuple[Tensor, Tensor]]:
    return {"train": (torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))}


@pytest.mark.parametrize("read", [lambda data: data.sample, lambda data: data.train])
@pytest.mark.parametrize("is_folder", [True, False])
def test_images_of_one_class_are_refused(root: Path, read: Callable[[ImageData], ImageSplit], is_folder: bool) -> None:
    (root / "train").rename(root / "pets")
    (root / "train").mkdir()
    (root / "pets").rename(root / "train" / "pets")
    source = str(root) if is_folder else "tests.experiments.test_data:labelled_alike"

    with pytest.raises(DataError) as caught:
        read(ImageData(DataRecipe(source=source)))

    only, hint = "0", ""
    if is_folder:
        only = "pets"
        hint = (
            ", each a folder in 'train' with images of its own: is there one folder level too many between 'train' and "
        )
        hint += "the classes?"
    assert str(caught.value) == (
        f"the training images of '{source}' are all of one class, '{only}'; two or more are needed{hint}"
    )


def test_a_default_test_folder_without_classes_is_none(root: Path) -> None:
    for path in (root / "test").glob("*/*"):
        path.rename(root / "test" / f"{path.parent.name}-{path.name}")

    ImageData(DataRecipe(source=str(root))).check_test()
    with pytest.raises(MissingSplitError, match=r"^no images in 'test' of "):
        _ = ImageData(DataRecipe(source=str(root))).test


@pytest.mark.parametrize("kind", ["", "pets.tar", "pets.zip"])
def test_class_folder_without_a_readable_image_is_refused(root: Path, tmp_path: Path, kind: str) -> None:
    for path in (root / "train" / "cat").iterdir():
        path.rename(path.with_suffix(".gif"))
    # What programs leave behind is no class and no image.
    for path in (root / "train" / ".cache" / "a.txt", root / "__MACOSX" / "train" / "dog" / "._000.png"):
        path.parent.mkdir(parents=True)
        path.touch()
    source = packed(root, tmp_path / kind) if kind else root

    assert failure(lambda: read_image_folder(source, "train/")) == (
        f"no images in the class folder 'train/cat' of '{source}', no file with one of the suffixes .bmp, .jpeg, "
        ".jpg, .pgm, .png, .ppm, .tif, .tiff, .webp; labels are the places of the class folders, so put images into "
        "it, or take the folder away from every split"
    )
    assert read_image_folder(source, "test").classes == ("cat", "dog")


@pytest.mark.parametrize("kind", ["", "pets.tar", "pets.zip"])
def test_empty_class_folder_is_refused_as_it_would_shift_labels(root: Path, tmp_path: Path, kind: str) -> None:
    read_image_folder(root, "train")
    (root / "train" / "ant").mkdir()
    source = packed(root, tmp_path / kind) if kind else root

    assert failure(lambda: read_image_folder(source, "train")).startswith(
        f"no images in the class folder 'train/ant' of '{source}', no file with one of the suffixes .bmp, "
    )


@pytest.mark.parametrize("kind", ["pets.tar", "pets.zip", "pets.tgz"])
def test_hidden_entries_beside_the_folder_of_an_archive_are_nothing(root: Path, tmp_path: Path, kind: str) -> None:
    (root / "._data").touch()
    (root / "__MACOSX").mkdir()
    (root / "data").mkdir()
    (root / "train").rename(root / "data" / "train")
    for split in ("validation", "test"):
        shutil.rmtree(root / split)

    assert read_image_folder(packed(root, tmp_path / kind), "train").classes == ("cat", "dog")
    assert read_image_folder(packed(root / "data" / "train", tmp_path / f"flat-{kind}"), ".").classes == ("cat", "dog")


@pytest.mark.parametrize("damage", ["flip", "cut", "cut between members"])
def test_damaged_tar_is_no_smaller_data_set(root: Path, tmp_path: Path, damage: str) -> None:
    path = packed(root, tmp_path / "pets.tar")
    with tarfile.open(path) as archive:
        start = archive.getmembers()[7].offset
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[start + 5] ^= 1
    else:
        del content[start + (100 if damage == "cut" else 0) :]
    path.write_bytes(content)

    assert re.fullmatch(
        rf"cannot read the archive '{path}': it is damaged or cut off at byte {start:,} \(.+\); a folder or one of .+",
        failure(lambda: read_image_folder(path, "train")),
    )


def test_flipped_bit_in_a_compressed_archive_is_found(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "pets.tar.gz"
    with gzip.open(path, "wb", compresslevel=0) as file:
        file.write(packed(root, tmp_path / "pets.tar").read_bytes())
    content = bytearray(path.read_bytes())
    content[content.find(b"IDAT") + 10] ^= 1
    path.write_bytes(content)

    assert "CRC check failed" in failure(lambda: read_image_folder(path, "train"))


def test_images_of_another_size_than_the_training_images_are_refused(root: Path, tmp_path: Path) -> None:
    for path in (root / "test").glob("*/*"):
        image(1, (9, 8)).save(path)
    message = (
        f"images of test are 9x8 pixels, those of train 6x6, in '{root}'; give a size to bring all images to, such as "
        "--set data.size=6"
    )

    assert failure(ImageData(DataRecipe(source=str(root))).check_test) == message
    assert failure(lambda: ImageData(DataRecipe(source=str(root))).test) == message
    ImageData(DataRecipe(source=str(root), size=6)).check_test()


def test_test_images_of_a_function_are_of_the_size_of_the_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {
        name: (torch.zeros(4, 1, size, size, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
        for name, size in (("train", 16), ("test", 24))
    }
    monkeypatch.setattr("experiments.user_function.load_function", lambda _: lambda: splits)
    recipe = DataRecipe(source="mine:data", mean=(0.5,), std=(0.5,))

    assert failure(ImageData(recipe).check_test).startswith(
        "images of test are 24x24 pixels, those of train 16x16, in 'mine:data'; give a size "
    )
    ImageData(recipe.model_copy(update={"size": 16})).check_test()


def test_pgm_of_16_bits_keeps_its_values(tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], ">u2")
    (tmp_path / "train" / "a" / "0.pgm").write_bytes(b"P5 2 2 65535\n" + values.tobytes())

    assert (read_image_folder(tmp_path, "train").images[0] == torch.tensor([[0, 100], [200, 255]])).all()


def test_lists_hold_any_name(root: Path, tmp_path: Path) -> None:
    for number, name in enumerate((" lead", "two\u2028parts", os.fsdecode(b"\xff\xfe"))):
        (root / "test" / "cat" / f"00{number}.png").rename(root / "test" / "cat" / f"{name}{number}.png")

    even, odd = write_split_lists(root, "test", tmp_path / "lists")
    odd.write_bytes(b"\xef\xbb\xbf" + odd.read_bytes().replace(b"\n", b" \r\n"))

    found = [read_image_folder(root, "test", names).paths for names in (even, odd)]
    assert sorted(found[0] + found[1]) == sorted(read_image_folder(root, "test").paths)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"classes": 2}, "'classes' of 'mine:data' is int; give a list of names, in label order"),
        (
            {"train": (torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2**40]))},
            "the labels that 'mine:data' returned reach 1,099,511,627,776; number the classes from 0, or name all of "
            "them under the key 'classes'",
        ),
    ],
)
def test_function_with_labels_of_no_class(
    monkeypatch: pytest.MonkeyPatch, returned: dict[str, object], message: str
) -> None:
    images = (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    monkeypatch.setattr("experiments.user_function.load_function", lambda _: lambda: {"train": images} | returned)

    assert failure(lambda: ImageData(DataRecipe(source="mine:data", mean=(0.5,), std=(0.5,))).train) == message


@pytest.mark.parametrize("read", [read_image_folder, first_image])
def test_folder_that_may_not_be_read_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path, str], ImageSplit]
) -> None:
    closed = next(path for path in sorted((root / "train").iterdir()) if path.is_dir())
    really = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return really(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(DataError) as caught:
        read(root, "train")

    assert str(caught.value) == (
        f"cannot read '{closed}' in '{root}': Permission denied; allow it to be read, or take it away"
    )


def test_links_to_images_and_folders_are_followed(root: Path, tmp_path: Path) -> None:
    whole = read_image_folder(root, "train")
    (root / "train" / "dog").rename(tmp_path / "dogs")
    (root / "train" / "dog").symlink_to(tmp_path / "dogs")
    (root / "train" / "cat" / "002.png").unlink()
    (root / "train" / "cat" / "002.png").hardlink_to(root / "test" / "cat" / "002.png")
    (root / "train" / "cat" / "round").symlink_to(root / "train")
    # Two that lead to each other are followed once.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "back").symlink_to(root / "train" / "cat")
    (root / "train" / "cat" / "there").symlink_to(tmp_path / "other")

    linked = read_image_folder(root, "train")

    assert linked.paths == whole.paths
    assert torch.equal(linked.images, whole.images)


def test_links_inside_an_archive_are_followed(root: Path, tmp_path: Path) -> None:
    whole = read_image_folder(root, "train")
    with tarfile.open(tmp_path / "linked.tar", "w") as archive:
        archive.add(root / "train" / "cat" / "000.png", "data/train/cat/000.png")
        archive.add(root / "train" / "dog", "data/dogs")
        for name, kind, target in (
            ("data/train/cat/001.png", tarfile.LNKTYPE, "data/train/cat/000.png"),
            ("data/train/cat/002.png", tarfile.SYMTYPE, "001.png"),
            ("data/train/cat/003.png", tarfile.SYMTYPE, "../../nowhere.png"),
            ("data/train/dog", tarfile.SYMTYPE, "../dogs"),
            ("data/train/cat/up", tarfile.SYMTYPE, ".."),
        ):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            archive.addfile(link)

    linked = read_image_folder(tmp_path / "linked.tar", "train")

    assert linked.paths == tuple(path for path in whole.paths if path != "cat/003.png")
    assert torch.equal(linked.images[:3], whole.images[:1].expand(3, -1, -1, -1))
    assert torch.equal(linked.images[3:], whole.images[4:])


def test_folders_that_look_alike_are_told_apart_by_the_cache(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(root, other)
    path = other / "train" / "cat" / "000.png"
    size, time = path.stat().st_size, path.stat().st_mtime_ns
    image(11).save(path)
    assert path.stat().st_size == size
    os.utime(path, ns=(time, time))

    assert int(read_image_folder(root, "train").images[0, 0, 0, 0]) == 0
    assert int(read_image_folder(other, "train").images[0, 0, 0, 0]) == 11


@pytest.mark.parametrize("grayscale", [True, False])
def test_images_of_16_bits_keep_their_values(tmp_path: Path, grayscale: bool) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.fromarray(np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)).save(tmp_path / "train" / "a" / "0.png")

    images = read_image_folder(tmp_path, "train", grayscale=grayscale).images

    assert images.shape[1] == (1 if grayscale else 3)
    assert (images[0] == torch.tensor([[0, 100], [200, 255]])).all()


@pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "floats"), (np.int32, "integers")])
def test_images_without_a_greatest_value_are_refused(tmp_path: Path, dtype: type, kind: str) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.fromarray(np.ones((2, 2), dtype)).save(tmp_path / "train" / "a" / "0.tif")

    assert failure(lambda: read_image_folder(tmp_path, "train")) == (
        f"broken image 'train/a/0.tif' in '{tmp_path}' (its values are {kind} of 32 bits, of which none stands for "
        "white; save it with 8 or 16 bits); replace it, or leave it out with a list file"
    )


def test_list_that_names_a_missing_image(root: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("cat/001.png\ncat/900.png\ncat/901.png\n")
    assert failure(lambda: read_image_folder(root, "train", names)) == (
        f"the list '{names}' names 2 of 3 images that are not there, first 'cat/900.png'; paths are relative to the "
        "split's folder, as 'cat/000.png' is"
    )


def test_function_without_validation_images_gets_the_same_explanation(monkeypatch: pytest.MonkeyPatch) -> None:
    images = (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    monkeypatch.setattr("experiments.user_function.load_function", lambda _: lambda: {"train": images})
    recipe = DataRecipe(source="mine:data", mean=(0.5,), std=(0.5,))
    assert failure(lambda: ImageData(recipe).validation).startswith(
        "no validation data: 'mine:data' returned no split 'validation'; it has train. The search must score plans on "
    )


def test_no_validation_data_explains_why_it_is_needed(root: Path) -> None:
    (root / "validation").rename(root.parent / "elsewhere")
    assert failure(lambda: ImageData(DataRecipe(source=str(root))).validation) == (
        f"no validation data: no folder 'validation' in '{root}'; it has test, train. The search must score plans on "
        "images that the network was not trained on: on its training images the best of many plans is mostly the one "
        "that remembers them best. Name a folder of unseen images with data.validation.folder, or hold some "
        "out with lists of files (`secateur split` writes the even and the odd files of a folder)"
    )


@pytest.mark.parametrize(("source", "nearest"), [("bundeld", "bundled"), ("cifar1O", "cifar10")])
def test_unknown_source_gets_the_nearest_name(source: str, nearest: str) -> None:
    assert failure(lambda: ImageData(DataRecipe(source=source))) == (
        f"unknown data source '{source}'; did you mean '{nearest}'? Allowed: bundled, cifar10, cifar100, the path of "
        "an image folder or of a .tar or .zip of one, or package.module:function"
    )


def test_mistyped_path_gets_the_nearest_path(root: Path) -> None:
    assert f"; did you mean '{root}'? " in failure(lambda: ImageData(DataRecipe(source=f"{root}s")))


def test_splits_that_would_share_images_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="validation and test would share the images of 'test'; give both a list"):
        DataRecipe(source=str(root), validation=SplitRecipe(folder="test"))
    with pytest.raises(ValidationError, match="validation and test would share the images of 'test'; give both a list"):
        DataRecipe(source=str(root), validation=SplitRecipe(folder="./test/"))

    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("cat/000.png\ncat/001.png\n")
    other.write_text("cat/001.png\ncat/002.png\n")
    recipe = DataRecipe(
        source=str(root),
        validation=SplitRecipe(folder="test", list_file=one),
        test=SplitRecipe(folder="test", list_file=other),
    )
    assert failure(lambda: ImageData(recipe)) == (
        f"validation and test share 1 images of 'test', first 'cat/001.png' (lists '{one}' and '{other}'); an image "
        "may be in one split only"
    )


def test_mean_and_std_of_another_number_of_channels(root: Path) -> None:
    assert failure(lambda: ImageData(DataRecipe(source=str(root), mean=(0.5,), std=(0.5,))).train) == (
        f"images of '{root}' have 3 channels, but mean and std have 1 values; give one value for each channel"
    )


def test_cifar_is_not_downloaded_unless_asked(cache: Path) -> None:
    pytest.importorskip("torchvision")
    message = failure(lambda: ImageData(DataRecipe(source="cifar10")).train)
    assert message.startswith(f"cifar10 is not in '{cache / 'torchvision'}' (")
    assert message.endswith("); allow the download with `download: true` or `--download`")


def test_cifar_that_cannot_be_downloaded_is_an_error_that_says_what_to_do(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        msg = "no route to host"
        raise URLError(msg)

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unreachable)
    message = failure(lambda: ImageData(DataRecipe(source="cifar10", download=True)).train)

    assert message == (
        f"cifar10 is not in '{cache / 'torchvision'}' (<urlopen error no route to host>); it could not be downloaded; "
        "put torchvision's copy of it into a folder that `data.root` names"
    )


def test_name_without_a_number_is_neither_even_nor_odd(root: Path, tmp_path: Path) -> None:
    (root / "test" / "cat" / "000.png").rename(root / "test" / "cat" / "tom.png")
    assert failure(lambda: write_split_lists(root, "test", tmp_path)) == (
        f"'test/cat/tom.png' in '{root}' has no number in its name, so it is neither even nor odd"
    )


def test_sample_tells_size_and_classes_without_decoding_the_rest(root: Path) -> None:
    (root / "train" / "zebra").mkdir()
    (root / "train" / "zebra" / "9.png").write_bytes(b"no image")

    sample = ImageData(DataRecipe(source=str(root))).sample

    assert len(sample) == 1
    assert sample.classes == ("cat", "dog", "zebra")


def test_classes_that_validation_lacks_are_named() -> None:
    classes = tuple("abcdefgh")
    images, paths = torch.zeros(8, 3, 2, 2, dtype=torch.uint8), classes
    train = ImageSplit(images, torch.arange(8), paths, classes)

    assert check_classes_are_covered(train, train) is None
    assert check_classes_are_covered(train, train.take(torch.tensor([0, 2, 3, 4, 5, 6, 7]))) == (
        "the validation split has no image of 1 of the 8 classes of the training split (b): what plans lose on these "
        "is not seen by the search; hold out some images of every class"
    )
    assert "of 7 of the 8 classes of the training split (a, c, d, e, f and 2 more): " in str(
        check_classes_are_covered(train, train.take(torch.tensor([1])))
    )
    # A class that nothing was trained on is nobody's loss here.
    assert check_classes_are_covered(train.take(torch.tensor([1])), train) is None


def channels_last() -> dict[str, tuple[Tensor, Tensor]]:
    return {"train": (torch.zeros(4, 24, 20, 3, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))}


@pytest.mark.parametrize("size", [None, 16])
def test_images_with_the_channels_last_are_told_from_others(size: int | None) -> None:
    source = "tests.experiments.test_data:channels_last"

    assert failure(lambda: ImageData(DataRecipe(source=source, size=size)).train) == (
        f"images of '{source}' have 24 channels, but mean and std have 3 values; give one value for each channel. "
        "Their shape is (4, 24, 20, 3): if that is (N, H, W, C), give them as (N, C, H, W), such as by "
        "images.permute(0, 3, 1, 2)"
    )
