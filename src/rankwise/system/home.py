"""Where this user keeps things: at home, or in a folder of the temp folder that is theirs alone."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path


def has_home() -> bool:
    """Whether the user has a home: containers run as users without a name, for whom there is none."""
    return os.path.isabs(os.path.expanduser("~"))


def private_place() -> Path:
    """Where in the shared temp folder this user may have a folder."""
    return Path(tempfile.gettempdir()) / f"rankwise-{os.getuid()}"


def private_folder() -> Path | None:
    """That folder, made if need be; None if it is another's, or cannot be written."""
    folder = private_place()
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder if is_private(folder) and os.access(folder, os.W_OK | os.X_OK) else None


def is_private(folder: Path) -> bool:
    """Whether a folder in the shared temp folder is ours alone, and not laid out for us by another user."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
