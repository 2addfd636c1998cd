"""Where decoded datasets are kept: in the folder asked for, the user's own, or one in the temp folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import platformdirs

from rankwise.errors import DataError, one_line
from rankwise.system.home import is_private, private_folder, private_place


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
    """Where finished datasets may stand: the folder that was asked for, or the user's and the fallback.
    Raises DataError for one that is no folder."""
    if cache_dir is not None:
        if cache_dir.exists() and not cache_dir.is_dir():
            raise DataError(f"--cache-dir {cache_dir} was given, which is no folder")
        return [cache_dir.absolute()]
    home, fallback = _home(), private_place()
    return [*([home] if home else []), *([fallback] if is_private(fallback) else [])]


def _home() -> Path | None:
    """The folder in the user's home, or where XDG_CACHE_HOME says; None for a user without a home, as in
    containers."""
    try:
        home = platformdirs.user_cache_path("rankwise", appauthor=False)
    except RuntimeError:  # of platformdirs 4.11; before, the path began with ~
        return None
    return home if home.is_absolute() else None


def writable_folder(cache_dir: Path | None) -> Path:
    """The cache folder, made if need be; without `cache_dir`, one in the temp folder if home is read-only."""
    chosen = cache_dir.absolute() if cache_dir is not None else _home()
    reason = "which this user has not"
    if chosen is not None:
        try:
            chosen.mkdir(parents=True, exist_ok=True)
            if os.access(chosen, os.W_OK | os.X_OK):
                return chosen
            reason = "no permission to write there"
        except OSError as error:
            reason = one_line(error)
    if cache_dir is not None:
        raise DataError(f"the cache folder {chosen} cannot be used: {reason}; choose another")

    fallback = private_folder()
    if fallback is None:
        raise DataError(
            f"neither {chosen or 'a home'} ({reason}) nor {private_place()} (not a folder of yours alone) "
            f"can hold the cache: "
            "set XDG_CACHE_HOME to a folder that you can write to"
        )
    return fallback
