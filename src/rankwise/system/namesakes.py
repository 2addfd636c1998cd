"""A user's files that are called like modules of Python's own: `statistics.py`, `random.py`."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

_LOADED_AT_START = (
    "os",
    "stat",
    "io",
    "abc",
    "codecs",
    "encodings",
    "site",
    "posixpath",
    "genericpath",
    "zipimport",
)
"""Modules of which Python itself takes its own in every program, whatever lies beside it."""

_ACTING = ("antigravity", "this", "__main__", "idlelib", "test")
"""Modules that do something when they are imported."""


def namesakes(folder: Path) -> dict[str, Path]:
    """The files of a folder that Python would take for its own modules, by name."""
    known = sys.stdlib_module_names - {*sys.builtin_module_names, *_LOADED_AT_START, *_ACTING}
    return {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem in known}


def keep_apart(folder: Path) -> None:
    """From now on files in `folder` import their namesakes of Python's modules from there, as in a program
    that python started, and everybody else, libraries too, gets Python's own."""
    found = namesakes(folder)
    if not found:
        return
    for name in found:
        import_module(name)  # now, as the folder is not yet where modules are found
    own: dict[str, ModuleType] = {}
    import_any = builtins.__import__

    def import_right(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        if level or name not in found or not _is_in(folder, globals):
            return import_any(name, globals, locals, fromlist or (), level)
        if name not in own:
            spec = spec_from_file_location(name, found[name])
            assert spec is not None
            assert spec.loader is not None
            own[name] = module_from_spec(spec)
            spec.loader.exec_module(own[name])
        return own[name]

    builtins.__import__ = import_right


def _is_in(folder: Path, importer: Mapping[str, object] | None) -> bool:
    file = (importer or {}).get("__file__")
    if not isinstance(file, str):
        return False
    path = Path(file).resolve()
    return path.is_relative_to(folder) and "site-packages" not in path.relative_to(folder).parts
