"""Image folders, ``<root>/<split>/<class>/<image>``, as files or inside an archive that is never unpacked to disk."""

import gzip
import io
import lzma
import posixpath
import re
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps

from .images import DataError, ImageSplit, MissingSplitError, Scaling, cached_split, check_listed, read_list, write_list

_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
_APPLE = "__MACOSX"
"""Folder of what the archiver of macOS adds beside the files."""
_LAST_NUMBER = re.compile(r"(\d+)\D*$")

ImageFile = Path | bytes
"""A file on disk, or the bytes of a member of an archive."""


@dataclass(frozen=True)
class _Tree:
    """What lies below a folder: its files, and every folder, empty ones too, by their paths relative to it."""

    files: Mapping[str, ImageFile]
    folders: Collection[str]

    def below(self, folder: str) -> "_Tree":
        """What of it lies below one of its folders."""
        start = f"{folder}/"
        return _Tree(
            {name.removeprefix(start): file for name, file in self.files.items() if name.startswith(start)},
            [name.removeprefix(start) for name in self.folders if name.startswith(start)],
        )

    @property
    def tops(self) -> set[str]:
        """What lies in it at once, but for what begins with a dot."""
        return {top for name in (*self.files, *self.folders) if not (top := name.split("/", 1)[0]).startswith(".")}


def read_image_folder(
    root: Path, folder: str, list_file: Path | None = None, scaling: Scaling | None = None, *, grayscale: bool = False
) -> ImageSplit:
    """Decode the images of one split; the second time they come from the cache.

    Args:
        root: a folder, or a .tar (compressed or not) or .zip archive of one.
        folder: the split's folder below ``root``; it holds one folder for each class.
        list_file: text file with the images to take, relative to ``folder``, one a line; all if None.
        scaling: what images are brought to. None takes them as they are, and they must all be of one size.
        grayscale: one channel in place of three.

    Raises:
        DataError: if there is no such folder, it is empty or a class in it holds no image, an image is broken or of
            another size, or the list names an image that is not there.
    """
    names = read_list(list_file) if list_file is not None else None

    def read() -> ImageSplit:
        files = image_files(root, folder)
        return _decode(root, folder, files, _listed(files, list_file), scaling, grayscale)

    return cached_split((_fingerprint(root, folder), folder, names, scaling, grayscale), read)


def first_image(
    root: Path, folder: str, list_file: Path | None = None, scaling: Scaling | None = None, *, grayscale: bool = False
) -> ImageSplit:
    """The first image of a split and the classes of all of it, without decoding the others.

    The arguments and errors are those of `read_image_folder`.
    """
    files = image_files(root, folder)
    names = _listed(files, list_file)
    return _decode(root, folder, files, names[:1], scaling, grayscale)


def classes_and_size(
    root: Path, folder: str, list_file: Path | None = None
) -> tuple[tuple[str, ...], tuple[int, int] | None]:
    """Names of a split's classes, in label order, and the width and height of its first image; no image is decoded.

    The size is what the image's header says, None where it has none. Arguments and errors are those of
    `read_image_folder`.
    """
    files = image_files(root, folder)
    first = files[_listed(files, list_file)[0]]
    try:
        with Image.open(_readable(first)) as opened:
            return _classes(files), opened.size
    except Exception:  # Pillow raises many types on broken input, which is named when it is decoded
        return _classes(files), None


def write_split_lists(root: Path, folder: str, out: Path) -> tuple[Path, Path]:
    """Divide one folder in two by the numbers in the file names, to hold out validation images for a search.

    The number is the last one in the name: ``cat/0012.jpg`` is even.

    Args:
        root: a folder or an archive, as for `read_image_folder`.
        folder: the split's folder below ``root``.
        out: folder in which ``<folder>-even.txt`` and ``<folder>-odd.txt`` are written.

    Returns:
        The paths of the even and the odd list.

    Raises:
        DataError: if a name holds no number, all numbers are even or all odd, or lists of other images are there.
    """
    lists: tuple[list[str], list[str]] = ([], [])
    for name in image_files(root, folder):
        number = _LAST_NUMBER.search(PurePosixPath(name).stem)
        if number is None:
            msg = f"'{folder}/{name}' in '{root}' has no number in its name, so it is neither even nor odd"
            raise DataError(msg)
        lists[int(number[1]) % 2].append(name)
    if not all(lists):
        msg = f"the images of '{folder}' in '{root}' are all {'odd' if lists[1] else 'even'}: nothing to divide"
        raise DataError(msg)
    paths = _list_files(folder, out)
    for path, names in zip(paths, lists, strict=True):
        if path.exists() and read_list(path) != tuple(names):
            msg = f"'{path}' lists other images; delete it, or name another folder with --out"
            raise DataError(msg)
    for path, names in zip(paths, lists, strict=True):
        write_list(path, names)
    return paths


def split_lists(root: Path, folder: str, out: Path) -> tuple[Path, Path]:
    """The lists of `write_split_lists`, which writes them unless they are there."""
    even, odd = _list_files(folder, out)
    return (even, odd) if even.exists() and odd.exists() else write_split_lists(root, folder, out)


def _list_files(folder: str, out: Path) -> tuple[Path, Path]:
    stem = folder.strip("/").replace("/", "-")
    return out / f"{stem}-even.txt", out / f"{stem}-odd.txt"


def image_files(root: Path, folder: str) -> dict[str, ImageFile]:
    """Every image of a split by its path relative to ``folder`` (``class/name.jpg``), sorted by path.

    Links are followed; what begins with a dot is left out.

    Raises:
        DataError: if ``root`` or a folder below it cannot be read, it has no such folder, or the folder or that of a
            class holds no image.
    """
    if not root.exists():
        msg = f"no image folder or archive '{root}'"
        raise DataError(msg)
    folder = _clean(folder)
    with _unreadable_named(root):
        tree = _folder_tree(root, folder) if root.is_dir() else _archive_tree(root, folder)
    # A class is a folder: an image that lies beside the class folders has no label.
    within = {name: file for name, file in tree.files.items() if "/" in name and not _is_hidden(name)}
    classes = {name.split("/", 1)[0] for name in (*within, *tree.folders) if not _is_hidden(name)}
    files = {name: file for name, file in within.items() if PurePosixPath(name).suffix.lower() in _SUFFIXES}
    if not files:
        msg = (
            f"no images in '{folder}' of '{root}'; expected {folder}/<class>/<image> with one of the suffixes "
            f"{', '.join(sorted(_SUFFIXES))}"
        )
        raise MissingSplitError(msg)
    if empty := sorted(classes - {name.split("/", 1)[0] for name in files}):
        msg = (
            f"no images in the class folder '{folder}/{empty[0]}' of '{root}', no file with one of the suffixes "
            f"{', '.join(sorted(_SUFFIXES))}; labels are the places of the class folders, so put images into it, or "
            "take the folder away from every split"
        )
        raise DataError(msg)
    return dict(sorted(files.items()))


def _classes(names: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(sorted({name.split("/", 1)[0] for name in names}))


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _listed(files: dict[str, ImageFile], list_file: Path | None) -> tuple[str, ...]:
    """Names of the images to take: those in the list, all without one."""
    if list_file is None:
        return tuple(files)
    names = read_list(list_file)
    check_listed(names, files, list_file)
    return names


@contextmanager
def _unreadable_named(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        msg = f"cannot read '{error.filename}' in '{root}': {error.strerror}; allow it to be read, or take it away"
        raise DataError(msg) from error


def _folder_tree(root: Path, folder: str) -> _Tree:
    top = root / folder
    if not top.is_dir():
        raise _missing_folder(root, folder, [path.name for path in root.iterdir() if path.is_dir()])
    files = {path.relative_to(top).as_posix(): path for path in _walk(top)}
    return _Tree(files, [path.name for path in top.iterdir() if path.is_dir()])


def _walk(top: Path, around: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Every file below ``top``, behind links to folders too."""
    here = top.resolve()
    # A link to a folder around it would lead round and round.
    if here in around or not top.is_dir():
        return
    for path in top.iterdir():
        if path.is_dir():
            yield from _walk(path, around | {here})
        elif path.is_file():
            yield path


# A zip that is encrypted, or compressed in a way that Python does not know, raises RuntimeError.
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError)


def _archive_tree(root: Path, folder: str) -> _Tree:
    try:
        whole = _zip_tree(root) if root.suffix.lower() == ".zip" else _tar_tree(root)
    except _BROKEN as error:
        msg = f"cannot read the archive '{root}': {error}; a folder or one of {', '.join(_ARCHIVES)} is expected"
        raise DataError(msg) from error
    whole = _Tree(
        {name: file for name, file in whole.files.items() if not name.startswith(f"{_APPLE}/")},
        [name for name in whole.folders if name.split("/", 1)[0] != _APPLE],
    )
    if folder == ".":
        return whole
    tops = whole.tops
    # Many archives hold everything in one folder named after themselves.
    is_wrapped = len(tops) == 1 and folder.split("/", 1)[0] not in tops
    found = whole.below(f"{next(iter(tops))}/{folder}" if is_wrapped else folder)
    if not found.files and not found.folders:
        raise _missing_folder(root, folder, tops)
    return found


class _WholeHeader(tarfile.TarInfo):
    """The header of a member, where `tarfile` would take one that is damaged or cut off for the archive's end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:  # type: ignore[override]
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise
            msg = f"it is damaged or cut off at byte {archive.offset:,} ({error})"
            raise tarfile.ReadError(msg) from error


def _tar_tree(root: Path) -> _Tree:
    members: dict[str, ImageFile] = {}
    folders: list[str] = []
    links: dict[str, str] = {}
    # A stream reads a compressed archive once from front to back; random access would decompress it again and again.
    # One that was compressed with gzip is read to its end, where the checksum is that `tarfile` leaves out.
    with (
        root.open("rb") as opened,
        gzip.open(opened) if opened.peek(2)[:2] == b"\x1f\x8b" else opened as stream,
        tarfile.open(fileobj=stream, mode="r|*", tarinfo=_WholeHeader) as archive,
    ):
        for member in archive:
            if member.isfile() and (file := archive.extractfile(member)) is not None:
                members[_clean(member.name)] = file.read()
            elif member.isdir():
                folders.append(_clean(member.name))
            elif member.islnk() or member.issym():
                # The first kind names a member, the second a place seen from its own.
                start = posixpath.dirname(member.name) if member.issym() else ""
                links[_clean(member.name)] = posixpath.normpath(posixpath.join(start, member.linkname))
        while stream.read(2**20):
            pass
    return _Tree(_linked(members, links), folders)


def _linked(members: dict[str, ImageFile], links: Mapping[str, str]) -> dict[str, ImageFile]:
    """Members with what links lead to: files, also by way of other links, and folders of files."""
    files: dict[str, str] = {}
    folders: dict[str, str] = {}
    for name, first in links.items():
        target, passed = first, {name}
        while target in links and target not in passed:
            passed.add(target)
            target = links[target]
        (files if target in members else folders)[name] = target
    whole = members | {name: members[target] for name, target in files.items()}
    for name, target in folders.items():
        # One to a folder around it would lead round and round.
        if not name.startswith(f"{target}/"):
            inside = {path: file for path, file in whole.items() if path.startswith(f"{target}/")}
            whole |= {name + path.removeprefix(target): file for path, file in inside.items()}
    return whole


def _zip_tree(root: Path) -> _Tree:
    with zipfile.ZipFile(root) as archive:
        folders = [info for info in archive.infolist() if info.is_dir()]
        files = {_clean(info.filename): archive.read(info) for info in archive.infolist() if not info.is_dir()}
    return _Tree(files, [_clean(info.filename) for info in folders])


def _clean(name: str) -> str:
    return str(PurePosixPath(name))


def _missing_folder(root: Path, folder: str, present: Collection[str]) -> MissingSplitError:
    msg = f"no folder '{folder}' in '{root}'; it has {', '.join(sorted(present)[:10]) or 'no folders'}"
    return MissingSplitError(msg)


def _fingerprint(root: Path, folder: str) -> tuple[object, ...]:
    """What changes when the images do, found without reading them."""
    if not root.is_dir():
        stat = root.stat() if root.exists() else None
        return (str(root.resolve()), stat and (stat.st_size, stat.st_mtime_ns))
    top = root / folder
    with _unreadable_named(root):
        folders = sorted(path.name for path in top.iterdir() if path.is_dir()) if top.is_dir() else []
        stats = ((path, path.stat()) for path in sorted(_walk(top)))
        files = [(path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return (str(root.resolve()), *folders, *files)


def _decode(
    root: Path,
    folder: str,
    files: Mapping[str, ImageFile],
    names: tuple[str, ...],
    scaling: Scaling | None,
    grayscale: bool,
) -> ImageSplit:
    # Classes come from the whole folder: a list that leaves one out must not shift the labels of the others.
    classes = _classes(files)
    label = {name: i for i, name in enumerate(classes)}
    pixels = np.empty(0, np.uint8)
    for i, name in enumerate(names):
        image = _decode_one(root, folder, name, files[name], scaling, grayscale)
        if i == 0:
            pixels = np.empty((len(names), *image.shape), np.uint8)
        if image.shape != pixels.shape[1:]:
            expected, found = (f"{s[1]}x{s[0]}" for s in (pixels.shape[1:], image.shape))
            msg = (
                f"'{folder}/{name}' in '{root}' is {found} pixels, '{folder}/{names[0]}' is {expected}; "
                f"give a size to bring all images to, such as --set data.size={min(pixels.shape[1:3])}"
            )
            raise DataError(msg)
        pixels[i] = image
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor([label[name.split("/", 1)[0]] for name in names])
    return ImageSplit(images, labels, names, classes)


def _decode_one(
    root: Path, folder: str, name: str, file: ImageFile, scaling: Scaling | None, grayscale: bool
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    try:
        with Image.open(_readable(file)) as opened:
            image = _eight_bits(opened).convert("L" if grayscale else "RGB")
    except Exception as error:  # Pillow's decoders raise many types on broken input
        msg = f"broken image '{folder}/{name}' in '{root}' ({error}); replace it, or leave it out with a list file"
        raise DataError(msg) from error
    if scaling is not None and not scaling.keeps(*image.size):
        # What Pillow leaves out at each edge, as a share of the side.
        border = (1 - scaling.size / scaling.shorter) / 2
        image = ImageOps.fit(image, (scaling.size, scaling.size), Image.Resampling.BILINEAR, border)
    array = np.asarray(image)
    return array[..., None] if grayscale else array


def _readable(file: ImageFile) -> io.BytesIO | Path:
    return io.BytesIO(file) if isinstance(file, bytes) else file


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image with values of 8 bits: Pillow would cut larger ones off.

    Raises:
        ValueError: if its values have no greatest one to divide by.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image).astype(np.int64) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "integers" if image.mode == "I" else "floats"
        msg = f"its values are {kind} of 32 bits, of which none stands for white; save it with 8 or 16 bits"
        raise ValueError(msg)
    return image
