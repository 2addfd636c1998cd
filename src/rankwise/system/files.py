"""Files that are whole or not there: written beside their place, synced, and renamed into it; and claims on
what only one process may write."""

from __future__ import annotations

import difflib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rankwise.errors import StorageError


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path`; a reader sees the old file or the new one, never a part.

    Raises StorageError (disk full, no permission); the file that was there before stays.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def write_first(path: Path, content: bytes) -> None:
    """Put `content` at `path`, where several processes may want to at once: the first one does, and a reader
    sees all of it or no file.

    Raises FileExistsError if another was first, and OSError if the content cannot be written; an empty file
    is left then, as far as that goes.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        with path.open("xb") as file:
            if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):  # a file system without links
                file.write(content)
                return
        raise
    finally:
        Path(temporary).unlink(missing_ok=True)


def misspelt(path: Path) -> str:
    """Words on what was perhaps meant by a path that does not exist, empty if nothing there is like it."""
    with suppress(OSError):
        if near := difflib.get_close_matches(path.name, os.listdir(path.parent), n=1):
            return f" (did you mean {path.with_name(near[0])}?)"
    return ""


class Claimed(Exception):
    """Another process holds the claim; it says which, as that process wrote."""


def claim(path: Path, who: str) -> int | None:
    """Claim what the file at `path` stands for, until the descriptor that is returned is closed, or this
    process ends in whatever way. `who` says who holds it.

    Returns None where the file system knows no locks. Raises Claimed if it is held, and OSError if the file
    cannot be written.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace")
            os.close(descriptor)
            raise Claimed(holder or "another process") from None
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                return None
            raise
        if _stands_at(path, descriptor):
            break
        os.close(descriptor)  # who held it has taken the file away, and the next one would make a new one
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, who.encode(), 0)
    return descriptor


def _stands_at(path: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    return False


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A place beside `path` to write a file or folder to, which is moved to `path` at the end. If that fails,
    or the writing does, nothing is left of it. Raises OSError."""
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield folder / path.name
        os.rename(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
