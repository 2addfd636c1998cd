"""Users' own code: by ``module:attribute``, and scripts."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import threading
import warnings
import zipfile
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import MAGIC_NUMBER
from pathlib import Path
from types import ModuleType
from typing import Any

from rankwise.errors import ConfigError, UsageError, one_line
from rankwise.system.files import misspelt

_lock = threading.RLock()
_added: list[str] = []
"""The folder that was put behind Python's path, if it was not on it."""


def import_from(path: str, what: str, error: type[UsageError]) -> Any:
    """The attribute of the module, which may stand in the current folder, behind all that is installed.

    Raises `error`, one line that says `what` it was to be.
    """
    module, _, attribute = path.partition(":")
    try:
        return getattr(import_users(module), attribute)
    except Exception as reason:
        raise error(f"{what} {path} cannot be imported: {one_line(reason)}") from reason


def is_source(script: Path) -> bool:
    """Whether a file is Python's source, and neither compiled already nor a package in one file."""
    with script.open("rb") as file:
        return not (file.read(len(MAGIC_NUMBER)) == MAGIC_NUMBER or zipfile.is_zipfile(script))


def require_python(script: Path) -> None:
    """Raises ConfigError if a script cannot be run: it is no file, cannot be read, or is no Python."""
    if not script.is_file():
        raise ConfigError(f"{script} is no file{misspelt(script)}: expected a Python script")
    try:
        if not is_source(script):
            return
        content = script.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python gives them when it runs
            compile(content, str(script), "exec", dont_inherit=True)
    except OSError as error:
        raise ConfigError(f"{script} cannot be read: {error.strerror or error}") from None
    except SyntaxError as error:
        where = f", line {error.lineno}" if error.lineno else ""
        raise ConfigError(f"{script} is no Python{where}: {error.msg}; expected a Python script") from None
    except ValueError as error:
        raise ConfigError(f"{script} is no Python: {one_line(error)}; expected a Python script") from None


def import_users(module: str) -> ModuleType:
    """A module of the current folder, or one that is installed. Raises what importing it raises."""
    with _seeing_current_folder():
        return importlib.import_module(module)


def find_users(module: str) -> ModuleSpec | None:
    """Where such a module is, without importing it; None if there is none. Raises what importing its package
    raises."""
    with _seeing_current_folder():
        return importlib.util.find_spec(module)


@contextlib.contextmanager
def _seeing_current_folder() -> Iterator[None]:
    """The current folder is on Python's path, from here on. Ranks that are threads take turns: they share the
    path and what Python keeps of it."""
    with _lock:
        here = os.getcwd()
        if _added and _added != [here]:  # this process has changed its folder
            with contextlib.suppress(ValueError):
                sys.path.remove(_added.pop())
        if here not in sys.path:
            sys.path.append(here)
            _added[:] = [here]
        importlib.invalidate_caches()  # the user may have just written it
        yield
