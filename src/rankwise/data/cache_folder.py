"""Where decoded datasets are kept: in the folder asked for, the user's own, or one in the temp folder."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

import platformdirs

from rankwise.errors import DataError, one_line


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise DataError unless `needed` bytes are free in `folder`."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise DataError(f"{what} cannot be put into {folder}: {one_line(error)}") from error
    if free < needed:
        raise DataError(
            f"{what} needs {needed:,} bytes in {folder}, where {free:,} are free: "
            "make room there, or set XDG_CACHE_HOME to a folder on a larger disk"
        )


def cache_folders(cache_dir: Path | None) -> list[Path]:
    """Where finished datasets may stand: the folder that was asked for, or the user's and the fallback."""
    if cache_dir is not None:
        return [cache_dir.absolute()]
    home = platformdirs.user_cache_path("rankwise", appauthor=False)  # which obeys XDG_CACHE_HOME
    fallback = _fallback()
    return [home, *([fallback] if _is_private(fallback) else [])]


def _fallback() -> Path:
    """The folder in the shared temp folder for users whose home cannot hold a cache."""
    return Path(tempfile.gettempdir()) / f"rankwise-{os.getuid()}"


def _is_private(folder: Path) -> bool:
    """Whether a folder in the shared temp folder is ours alone, and not laid out for us by another user."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def writable_folder(cache_dir: Path | None) -> Path:
    """The cache folder, made if need be; without `cache_dir`, one in the temp folder if home is read-only."""
    chosen = cache_folders(cache_dir)[0]
    try:
        if not chosen.is_absolute():  # a user without a home, for whom it would be a folder named ~
            raise NotADirectoryError("it is no absolute path")
        chosen.mkdir(parents=True, exist_ok=True)
        if os.access(chosen, os.W_OK | os.X_OK):
            return chosen
        reason = "no permission to write there"
    except OSError as error:
        reason = one_line(error)
    if cache_dir is not None:
        raise DataError(f"the cache folder {chosen} cannot be used: {reason}; choose another")

    fallback = _fallback()
    with suppress(OSError):
        fallback.mkdir(mode=0o700, exist_ok=True)
    if not (_is_private(fallback) and os.access(fallback, os.W_OK | os.X_OK)):
        raise DataError(
            f"neither {chosen} ({reason}) nor {fallback} (not a folder of yours alone) can hold the cache: "
            "set XDG_CACHE_HOME to a folder that you can write to"
        )
    return fallback
