"""A user's own images: a folder a class under `train/` and `test/`, or a zip of that."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import math
import os
import stat
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rankwise.data.dataset import Decoded, Images, Labels, Report, Samples, Source
from rankwise.errors import DataError, one_line

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
"""What Pillow may read; its other formats include some that start programs."""
DEEP_MODES = ("I", "F")
"""Modes of 16 bits and more a channel; turned into RGB they would be cut off at 255."""

FILE_BYTES = 256 << 20
"""A file that is larger, or claims to be, is not read."""
PART_BYTES = 16 << 20
"""Images handed on at once."""

SPLITS = ("train", "test")


class Folder(Source):
    """Images of one size in `PATH/train/CLASS/` and `PATH/test/CLASS/`, or in a zip with these inside.

    Images become RGB; if all are grey, they stay grey. Classes and images stand in the order of
    their names. Hidden files are left out, and so are files beside the folders of the classes.
    """

    def __init__(self, argument: str | None) -> None:
        if not argument:
            raise DataError(
                "dataset 'folder:' has no path: write folder:PATH, a folder or a zip with train/ and test/"
            )
        self._path = Path(os.path.expanduser(argument)).absolute()
        self.name = f"folder:{self._path}"

    def check(self) -> None:
        with _open_tree(self._path) as tree:
            for split in SPLITS:
                tree.require(split)

    def key(self) -> dict[str, object]:
        with _open_tree(self._path) as tree:
            return {"files": tree.digest()}

    def decode(self, report: Report, downloads: Path) -> Decoded:
        with _open_tree(self._path) as tree:
            by_class = {split: tree.classes(split) for split in SPLITS}
        classes = _common_classes(by_class["train"], by_class["test"], self._path)
        found = {
            split: [(image, label) for label, name in enumerate(classes) for image in by_class[split][name]]
            for split in SPLITS
        }
        shape = _common_shape(self._path, [image for split in SPLITS for image, _ in found[split]], report)
        train, test = (
            Samples(len(found[split]), shape, _parts(self._path, found[split], shape)) for split in SPLITS
        )
        return Decoded(classes, train, test, str(self._path))


def _common_classes(train: dict[str, list[str]], test: dict[str, list[str]], path: Path) -> tuple[str, ...]:
    """The names of the classes, which are the same in both splits and have images in both."""
    for ours, theirs, split, other in ((train, test, "train", "test"), (test, train, "test", "train")):
        if not ours:
            raise DataError(f"{split}/ of {path} has no class folders: put the images into {split}/CLASS/")
        for name in ours:
            if name not in theirs:
                raise DataError(
                    f"class {name!r} of {path} is in {split}/ and not in {other}/: it must be in both"
                )
            if not ours[name]:
                raise DataError(
                    f"class {name!r} of {path} has no images in {split}/: add some or remove the class"
                )
    return tuple(sorted(train))


# ── images ────────────────────────────────────────────────────────────────────────────────────────


def _common_shape(path: Path, images: list[str], report: Report) -> tuple[int, int, int]:
    """(height, width, channels) of all images, from their headers; DataError at the first of another size."""
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # what is wrong, the DataError says
    first_size, all_grey = None, True
    with _open_tree(path) as tree:
        for done, image in enumerate(images):
            if done % 1000 == 0:
                report("looking at the sizes of the images", done, len(images))
            where = str(path / image)
            width, height, grey = _header(tree.read(image), where)
            first_size = first_size or (width, height)
            if (width, height) != first_size:
                raise DataError(
                    f"image {where!r} has {width}x{height} pixels and {images[0]!r} has "
                    f"{first_size[0]}x{first_size[1]}: all must have one size"
                )
            all_grey = all_grey and grey
    assert first_size, "a class has images"
    return first_size[1], first_size[0], 1 if all_grey else 3


def _parts(
    path: Path, samples: list[tuple[str, int]], shape: tuple[int, int, int]
) -> Iterator[tuple[Images, Labels]]:
    """The images, decoded, and their classes."""
    step = max(1, PART_BYTES // math.prod(shape))
    with _open_tree(path) as tree:
        for start in range(0, len(samples), step):
            chosen = samples[start : start + step]
            images = np.empty((len(chosen), *shape), np.uint8)
            for place, (image, _) in zip(images, chosen, strict=True):
                place[...] = _pixels(tree.read(image), str(path / image), shape)
            yield images, np.array([label for _, label in chosen], np.int64)


@contextlib.contextmanager
def _pillow(image: str) -> Iterator[None]:
    """Pillow's errors and warnings become a DataError that names the image."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except DataError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(f"image {image!r} is too large: {one_line(error)}") from error
        except Exception as error:  # on damaged files Pillow raises nearly anything
            raise DataError(
                f"image {image!r} cannot be decoded: {one_line(error)}; repair it or take it away"
            ) from error


def _header(content: bytes, image: str) -> tuple[int, int, bool]:
    """Width, height, and whether it is grey."""
    from PIL import Image

    with _pillow(image), Image.open(io.BytesIO(content), formats=FORMATS) as picture:
        if picture.mode.startswith(DEEP_MODES):
            raise DataError(f"image {image!r} has more than 8 bits a channel: save it with 8")
        return picture.width, picture.height, picture.mode in ("1", "L")


def _pixels(content: bytes, image: str, shape: tuple[int, int, int]) -> Images:
    """The decoded image as [height, width, channels]."""
    from PIL import Image

    with _pillow(image), Image.open(io.BytesIO(content), formats=FORMATS) as picture:
        pixels = np.asarray(picture.convert("L" if shape[2] == 1 else "RGB"), np.uint8).reshape(
            picture.height, -1, shape[2]
        )
        if pixels.shape != shape:
            raise DataError(f"image {image!r} changed while it was read: start again")
        return pixels


# ── trees ─────────────────────────────────────────────────────────────────────────────────────────


class _Tree(ABC):
    """Named files, in a folder or in a zip; names are relative, with `/` between their parts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def require(self, split: str) -> None:
        """Raise DataError if there is no folder of this name."""
        if not self._has(split):
            raise DataError(
                f"{self._path} has no folder {split}/: expected train/CLASS/ and test/CLASS/ with images"
            )

    def classes(self, split: str) -> dict[str, list[str]]:
        """The images of each class, in order."""
        self.require(split)
        found: dict[str, list[str]] = {}
        for name, is_folder in self._names(split):
            parts = name.split("/")
            if any(part.startswith(".") for part in parts):
                continue
            if len(parts) > 2 or is_folder:
                found.setdefault(parts[1], [])
            if len(parts) > 2 and not is_folder:
                found[parts[1]].append(name)
        return {name: sorted(images) for name, images in sorted(found.items())}

    @abstractmethod
    def _has(self, split: str) -> bool: ...

    @abstractmethod
    def _names(self, split: str) -> Iterator[tuple[str, bool]]:
        """All below `split`, each name with whether it is a folder."""

    @abstractmethod
    def digest(self) -> str:
        """Changes when an image does, judged by names, sizes and times."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The content of a file."""


class _FolderTree(_Tree):
    def _has(self, split: str) -> bool:
        return os.path.isdir(self._path / split)

    def _names(self, split: str) -> Iterator[tuple[str, bool]]:
        for name, _, is_folder in self._walk(split):
            yield name, is_folder

    def _walk(self, folder: str, deeper: bool = False) -> Iterator[tuple[str, os.DirEntry[str], bool]]:
        """Linked files and linked class folders are followed; links deeper down could go in circles."""
        try:
            with os.scandir(self._path / folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{self._path / folder} cannot be read: {one_line(error)}") from error
        for entry in found:
            name, is_folder = f"{folder}/{entry.name}", os.path.isdir(entry)
            if entry.name.startswith(".") or (deeper and is_folder and entry.is_symlink()):
                continue
            yield name, entry, is_folder
            if is_folder:
                yield from self._walk(name, deeper=True)

    def digest(self) -> str:
        sums = hashlib.sha256()
        for split in SPLITS:
            self.require(split)
            for name, entry, _ in self._walk(split):
                try:
                    status = entry.stat()
                except OSError as error:
                    raise DataError(f"{self._path / name} cannot be read: {one_line(error)}") from error
                sums.update(repr((name, status.st_size, status.st_mtime_ns)).encode())
        return sums.hexdigest()

    def read(self, name: str) -> bytes:
        path = self._path / name
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # to read a pipe would be to wait for ever
                raise DataError(f"image {str(path)!r} is no file: take it away")
            _refuse_huge(repr(str(path)), status.st_size)
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"image {str(path)!r} cannot be read: {one_line(error)}") from error


class _ZipTree(_Tree):
    """A zip, whose members are only ever read into memory, and only as far as they say they go."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        super().__init__(path)
        self._archive = archive
        members = {
            member.filename: member
            for member in archive.infolist()
            if not member.filename.startswith(("__MACOSX/", "."))
        }
        tops = {name.partition("/")[0] for name in members if "/" in name}
        top = tops.pop() if len(tops) == 1 else ""
        prefix = f"{top}/" if top and top not in SPLITS else ""
        self._members = {name.removeprefix(prefix): member for name, member in members.items()}

    def _has(self, split: str) -> bool:
        return any(name.startswith(f"{split}/") for name in self._members)

    def _names(self, split: str) -> Iterator[tuple[str, bool]]:
        for name, member in self._members.items():
            if name.startswith(f"{split}/") and name != f"{split}/":
                self._refuse_hostile(name, member)
                yield name.rstrip("/"), member.is_dir()

    def _refuse_hostile(self, name: str, member: zipfile.ZipInfo) -> None:
        where = repr(str(self._path / name))
        if ".." in name.split("/"):
            raise DataError(f"{where} points out of the zip: pack the images anew")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise DataError(f"{where} is a symbolic link: pack the images themselves")
        _refuse_huge(where, member.file_size)

    def digest(self) -> str:
        try:
            status = self._path.stat()
        except OSError as error:
            raise DataError(f"{self._path} cannot be read: {one_line(error)}") from error
        return f"{status.st_size} {status.st_mtime_ns}"

    def read(self, name: str) -> bytes:
        member = self._members[name]
        try:
            with self._archive.open(member) as file:
                return file.read(member.file_size)
        except Exception as error:  # each way of compressing has errors of its own
            where = str(self._path / name)
            raise DataError(
                f"image {where!r} cannot be read: {one_line(error)}; pack the zip anew"
            ) from error


def _refuse_huge(where: str, size: int) -> None:
    if size > FILE_BYTES:
        raise DataError(f"{where} has {size:,} bytes: images of more than {FILE_BYTES:,} are not read")


@contextlib.contextmanager
def _open_tree(path: Path) -> Iterator[_Tree]:
    """The files in a folder, or in a zip, which is open meanwhile."""
    if os.path.isdir(path):
        yield _FolderTree(path)
        return
    if not os.path.isfile(path):
        raise DataError(
            f"{path} does not exist: expected a folder or a zip with train/CLASS/ and test/CLASS/"
        )
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # on garbage zipfile raises more than its own BadZipFile
        raise DataError(f"{path} is no folder and no sound zip: {one_line(error)}") from error
    with archive:
        yield _ZipTree(path, archive)
