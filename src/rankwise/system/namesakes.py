"""A user's files that are called like modules of Python's own, or of the libraries that rankwise needs:
`statistics.py`, a folder `random` with an `__init__.py`, `torch.py`."""

from __future__ import annotations

import builtins
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import FrozenImporter, ModuleSpec, PathFinder
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

ALIAS = "_users_"
"""What stands before the name of a namesake where modules are kept, so that both have a place there."""

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

_OF_NOBODY = ("antigravity", "this", "__main__", "idlelib", "test")
"""Modules that no library imports."""


def namesakes(folder: Path, script: Path | None = None) -> dict[str, Path | None]:
    """The modules of a folder of which Python, or what rankwise needs, has one of the same name: where each
    begins. A `script` that python was given is none that others import: None."""
    ours = sys.stdlib_module_names - {*sys.builtin_module_names, *_LOADED_AT_START, *_OF_NOBODY}
    own = {path.stem: path for path in folder.glob("*.py")}
    own |= {path.parent.name: path for path in folder.glob("*/__init__.py")}  # a package comes first
    ways = _ways_elsewhere(folder)
    others = {name for name in own.keys() - sys.stdlib_module_names if name.isidentifier()}
    if others := {name for name in others if PathFinder.find_spec(name, ways) is not None}:
        ours |= others & needed()
    return {name: None if path == script else path for name, path in sorted(own.items()) if name in ours}


def needed() -> set[str]:
    """The modules of rankwise and of all that it requires, as far as it is installed."""
    found = {"rankwise"}
    seen: set[str] = set()
    waiting = ["rankwise"]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            its = distribution(name)
        except PackageNotFoundError:
            continue
        found |= set(_modules_of(its))
        for line in its.requires or ():
            # What an extra brings is imported only by who asked for it.
            is_asked_for = name == "rankwise" or "extra ==" not in line
            if is_asked_for and (required := re.match(r"[\w.-]+", line)):
                waiting.append(re.sub(r"[-_.]+", "-", required[0]).lower())
    return found


def keep_apart(folder: Path, script: Path | None = None) -> None:
    """From now on files in `folder` import their namesakes of others' modules from there, as in a program
    that python started, and everybody else, libraries too, gets those of Python and of the libraries. Of the
    `script` itself nobody means to import a second one."""
    found = namesakes(folder, script)
    if not found:
        return
    own = {name: path for name, path in found.items() if path is not None}
    sys.meta_path.insert(0, _Finder(folder, found))
    import_any = builtins.__import__

    def import_right(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        if not level and name.partition(".")[0] in own and _is_in(folder, globals):
            name = ALIAS + name
        return import_any(name, globals, locals, fromlist or (), level)

    builtins.__import__ = import_right


class _Finder(MetaPathFinder):
    """Finds what is called the same in two places: by its name outside of `folder`, and by its alias where it
    stands there."""

    def __init__(self, folder: Path, found: Mapping[str, Path | None]) -> None:
        self._folder = folder
        self._found = found

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in self._found:
            ways = _ways_elsewhere(self._folder)
            return FrozenImporter.find_spec(fullname) or PathFinder.find_spec(fullname, ways)
        own = self._found.get(fullname.removeprefix(ALIAS)) if fullname.startswith(ALIAS) else None
        if own is None:
            return None
        inside = [str(own.parent)] if own.name == "__init__.py" else None
        return spec_from_file_location(fullname, own, submodule_search_locations=inside)


def _ways_elsewhere(folder: Path) -> list[str]:
    """Where modules are found but for `folder`."""
    return [way for way in sys.path if Path(way or ".").resolve() != folder]


def _modules_of(its: Distribution) -> Iterator[str]:
    """The first names of what a package has installed."""
    for line in (its.read_text("RECORD") or "").splitlines():
        yield re.split(r"[/,.]", line, maxsplit=1)[0]


def _is_in(folder: Path, importer: Mapping[str, object] | None) -> bool:
    if importer is None:
        return False
    if importer.get("__name__") == "__main__":  # whose file may be told from a folder that was left since
        return True
    file = importer.get("__file__")
    if not isinstance(file, str):
        return False
    path = Path(file).resolve()
    return path.is_relative_to(folder) and "site-packages" not in path.relative_to(folder).parts
