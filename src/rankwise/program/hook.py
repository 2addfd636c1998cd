"""Acts when the program itself imports mpi4py.MPI: methods inside mpi4py's own classes are replaced.

So types, subclasses, pickling and bound methods stay what they are, calls by map() or by libraries are seen,
and `mpi4py.rc` is the program's. It is a hack on CPython: a class's dict is written to, and the class told.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAME = "mpi4py.MPI"


class ImportHook(MetaPathFinder):
    """Calls `before` and `after` around the program's import of a module, once."""

    def __init__(
        self, before: Callable[[], None], after: Callable[[ModuleType], None], name: str = NAME
    ) -> None:
        self._before = before
        self._after = after
        self._name = name

    def install(self) -> None:
        """From now on; where the module is there already, at once."""
        if self._name in sys.modules:
            self._after(sys.modules[self._name])
        else:
            sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """An import is nothing to us any more."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec as the other finders have it, with a loader that tells us."""
        if fullname != self._name:
            return None
        self.remove()
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Telling(spec.loader, self._before, self._after)
                return spec
        return None


class _Telling(Loader):
    """A loader that does as another one, and tells when."""

    def __init__(self, loader: Any, before: Callable[[], None], after: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._before = before
        self._after = after

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        self._before()
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._after(module)


class Replaced:
    """Methods that stand in a class's own dict in place of others."""

    def __init__(self) -> None:
        self._before: list[tuple[type, str, Any]] = []

    def replace(self, owner: type, name: str, make: Callable[[Any], Any]) -> None:
        """Put what `make` makes of a method in its place; class methods and static ones stay that."""
        before = vars(owner).get(name)
        if before is None:
            return  # of another version of mpi4py
        if isinstance(before, classmethod | staticmethod):
            new: Any = type(before)(make(before.__func__))
        else:
            new = make(before)
        self._before.append((owner, name, before))
        _write(owner, name, new)

    def undo(self) -> None:
        """Everything as it was."""
        while self._before:
            _write(*self._before.pop())


def _write(owner: type, name: str, value: Any) -> None:
    """Write into the dict of a class that Python takes for one that cannot change."""
    (content,) = gc.get_referents(vars(owner))
    content[name] = value
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(owner))
