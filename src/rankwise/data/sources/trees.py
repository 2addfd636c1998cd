"""Named files in a folder or in a zip, whoever packed it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import unicodedata
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import IO

from rankwise.errors import DataError, one_line
from rankwise.system.files import misspelt

FILE_BYTES = 256 << 20
"""A file that is larger, or claims to be, is not read."""

_LITTER = ("thumbs.db", "desktop.ini")
"""What Windows leaves in folders of images."""


class Tree(ABC):
    """Names are relative, with `/` between their parts. Hidden files and what systems leave behind are left
    out."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def where(self, name: str) -> str:
        """A file for an error."""
        return str(self.path / name)

    def classes(self, root: str) -> dict[str, list[str]]:
        """The images below `root` ("" is the whole), by their classes, both in order: its folders' names.

        A name is the same however its accents are put together.
        """
        found: dict[str, list[str]] = {}
        depth = root.count("/") + 1 if root else 0
        for name, is_folder in self._names(root):
            parts = name.split("/")[depth:]
            if any(part.startswith(".") for part in parts):
                continue
            if len(parts) > 1 or is_folder:
                images = found.setdefault(unicodedata.normalize("NFC", parts[0]), [])
                if not is_folder and parts[-1].lower() not in _LITTER:
                    images.append(name)
        return {name: sorted(images) for name, images in sorted(found.items())}

    def loose(self) -> list[str]:
        """The files beside the folders, in order."""
        return sorted(
            name
            for name, is_folder in self._names("", deep=False)
            if not is_folder and not name.startswith(".") and name.lower() not in _LITTER
        )

    def folders(self) -> dict[str, str]:
        """The folders at the top by their names in small letters."""
        names = sorted(name for name, is_folder in self._names("", deep=False) if is_folder)
        return {name.lower(): name for name in reversed(names)}

    @abstractmethod
    def _names(self, root: str, *, deep: bool = True) -> Iterator[tuple[str, bool]]:
        """What is below `root`, each name with whether it is a folder; not `deep`: directly below."""

    @abstractmethod
    def digest(self, roots: list[str]) -> str:
        """Changes when an image below one of the roots does, judged by names, sizes and times."""

    @abstractmethod
    def open(self, name: str) -> IO[bytes]:
        """A file to read, which may be sought in. Several threads may open and read at once. Raises DataError
        for what is no file, or is huge."""


class FolderTree(Tree):
    """The files of a folder."""

    def _names(self, root: str, *, deep: bool = True) -> Iterator[tuple[str, bool]]:
        for name, _, is_folder in self._walk(root, deep=deep):
            yield name, is_folder

    def _walk(
        self, folder: str, *, deep: bool = True, follows: bool = True
    ) -> Iterator[tuple[str, os.DirEntry[str], bool]]:
        """Linked files and linked class folders are followed; links deeper down could go in circles."""
        try:
            with os.scandir(self.path / folder) as entries:
                found = sorted(entries, key=attrgetter("name"))
        except OSError as error:
            raise DataError(f"{self.path / folder} cannot be read: {one_line(error)}") from error
        start = f"{folder}/" if folder else ""
        for entry in found:
            name, is_folder = start + entry.name, _is_folder(entry)
            if entry.name.startswith(".") or (not follows and is_folder and entry.is_symlink()):
                continue
            yield name, entry, is_folder
            if is_folder and deep:
                yield from self._walk(name, follows=False)

    def digest(self, roots: list[str]) -> str:
        sums = hashlib.sha256()
        for root in roots:
            for name, entry, _ in self._walk(root):
                try:
                    status = entry.stat()
                except OSError as error:
                    raise DataError(f"{self.path / name} cannot be read: {one_line(error)}") from error
                line = f"{name}\0{status.st_size} {status.st_mtime_ns}\0"
                sums.update(line.encode(errors="surrogatepass"))
        return sums.hexdigest()

    def open(self, name: str) -> IO[bytes]:
        path = self.path / name
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # to read a pipe would be to wait for ever
                raise DataError(f"image {str(path)!r} is no file: take it away")
            _refuse_huge(repr(str(path)), status.st_size)
            return path.open("rb")
        except OSError as error:
            raise DataError(f"image {str(path)!r} cannot be read: {one_line(error)}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Without asking the disk again, but for links; a link that leads nowhere is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


class ZipTree(Tree):
    """A zip, whose members are only ever read into memory, and only as far as they say they go."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, tops: tuple[str, ...]) -> None:
        """`tops` are the folders that stand at the top, unless all is in one other folder."""
        super().__init__(path)
        self._archive = archive
        named = {_name(member): member for member in archive.infolist()}
        members = {name: member for name, member in named.items() if not name.startswith(("__MACOSX/", "."))}
        first = {name.partition("/")[0] for name in members if "/" in name}
        top = first.pop() if len(first) == 1 else ""
        is_wrapped = top.lower() not in tops and any(name.count("/") > 1 for name in members)
        prefix = f"{top}/" if top and is_wrapped else ""
        self._members = {name.removeprefix(prefix): member for name, member in members.items()}

    def _names(self, root: str, *, deep: bool = True) -> Iterator[tuple[str, bool]]:
        start = f"{root}/" if root else ""
        folders: set[str] = set()  # which need not have members of their own
        for name, member in self._members.items():
            if not name.startswith(start) or name in (start, ""):
                continue
            self._refuse_hostile(name, member)
            below = name.removeprefix(start)
            parts = below.rstrip("/").split("/")
            for depth in range(1, len(parts) + below.endswith("/")):
                folder = start + "/".join(parts[:depth])
                if folder not in folders and (deep or depth == 1):
                    folders.add(folder)
                    yield folder, True
            if not name.endswith("/") and (deep or len(parts) == 1):
                yield name, False

    def _refuse_hostile(self, name: str, member: zipfile.ZipInfo) -> None:
        where = repr(self.where(name))
        if ".." in name.split("/") or name.startswith("/"):
            raise DataError(f"{where} points out of the zip: pack the images anew")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise DataError(f"{where} is a symbolic link: pack the images themselves")
        _refuse_huge(where, member.file_size)

    def digest(self, roots: list[str]) -> str:
        try:
            status = self.path.stat()
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {one_line(error)}") from error
        return f"{status.st_size} {status.st_mtime_ns}"

    def open(self, name: str) -> IO[bytes]:
        member = self._members[name]
        try:
            with self._archive.open(member) as file:
                return io.BytesIO(file.read(member.file_size))
        except Exception as error:  # each way of compressing has errors of its own
            raise DataError(
                f"image {self.where(name)!r} cannot be read: {one_line(error)}; pack the zip anew"
            ) from error


def _name(member: zipfile.ZipInfo) -> str:
    """A member's name. Zips of Windows may have backslashes in it, and other letters than the standard says:
    UTF-8 without its mark, or a code page with the name in UTF-8 beside it."""
    name = member.filename
    if not member.flag_bits & _IS_UTF8:
        with contextlib.suppress(UnicodeError):
            raw = name.encode("cp437")  # as which zipfile has read it
            name = _unicode_path(member.extra, raw) or raw.decode("utf-8")
    of_windows = member.create_system == 0 or "/" not in name
    return name.replace("\\", "/") if of_windows else name


_IS_UTF8 = 0x800
_UNICODE_PATH = 0x7075


def _unicode_path(extra: bytes, raw: bytes) -> str | None:
    """The name in UTF-8 in a member's extra fields, if there is one that belongs to the name `raw`
    (Info-ZIP's Unicode Path Extra Field)."""
    while len(extra) >= 4:
        kind, size = int.from_bytes(extra[:2], "little"), int.from_bytes(extra[2:4], "little")
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == _UNICODE_PATH and field[1:5] == zlib.crc32(raw).to_bytes(4, "little"):
            return field[5:].decode("utf-8")
    return None


def _refuse_huge(where: str, size: int) -> None:
    if size > FILE_BYTES:
        raise DataError(f"{where} has {size:,} bytes: images of more than {FILE_BYTES:,} are not read")


@contextlib.contextmanager
def open_tree(path: Path, tops: tuple[str, ...] = ()) -> Iterator[Tree]:
    """The files in a folder, or in a zip, which is open meanwhile; `tops` are names of folders that stand at
    its top, unless all is in one other folder. Raises DataError if it is neither."""
    if os.path.isdir(path):
        yield FolderTree(path)
        return
    if not os.path.isfile(path):
        raise DataError(
            f"{path} does not exist{misspelt(path)}: expected a folder or a zip with train/CLASS/ and "
            "test/CLASS/"
        )
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # on garbage zipfile raises more than its own BadZipFile
        raise DataError(f"{path} is no folder and no sound zip: {one_line(error)}") from error
    with archive:
        yield ZipTree(path, archive, tops)
