"""Finds tests that pass by doing nothing: `python -m tests.proofs`, a part of `make check`.

A test must assert, expect an error or a warning, or use a function of the tests that does. And none may
return before its first assertion: a case in which there is nothing to assert is no case. Fixtures count for
nothing: they come before what a test does.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
EXPECTATIONS = {"raises", "warns", "fail"}
"""What pytest has for tests that assert nothing themselves."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Place = tuple[Path, str]
"""A name in a file."""


class Finding(NamedTuple):
    """A test that proves nothing, or not in all its cases."""

    path: Path
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}"


def findings(folder: Path) -> list[Finding]:
    """The tests below a folder that prove nothing, in the order in which they stand there."""
    functions: list[tuple[Path, Function]] = []
    imports: dict[Place, Place] = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            if isinstance(node, Function):
                functions.append((path, node))
            elif isinstance(node, ast.ImportFrom) and node.level:
                source = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                for name in node.names:
                    imports[path, name.asname or name.name] = (source.with_suffix(".py"), name.name)
    proving: set[Place] = set()
    while True:  # until no more are found that use those that were found before
        more = {
            (path, function.name)
            for path, function in functions
            if not _is_fixture(function) and _first_proof(path, function, imports, proving)
        }
        if more == proving:
            break
        proving = more
    tests = (place for place in functions if place[0].name.startswith("test_"))
    return [
        finding
        for path, test in tests
        if test.name.startswith("test_")
        for finding in _judge(path, test, imports, proving)
    ]


def _judge(path: Path, test: Function, imports: dict[Place, Place], proving: set[Place]) -> Iterator[Finding]:
    """What is wrong with a test."""
    if (path, test.name) not in proving:
        yield Finding(path, test.lineno, f"{test.name} asserts nothing")
        return
    first = _first_proof(path, test, imports, proving, inner=False) or sys.maxsize
    for node in _parts(test, inner=False):
        if isinstance(node, ast.Return) and node.lineno < first:
            yield Finding(path, node.lineno, f"{test.name} returns before it asserts anything")


def _first_proof(
    path: Path, function: Function, imports: dict[Place, Place], proving: set[Place], *, inner: bool = True
) -> int | None:
    """The first line of a function that can fail a test; `inner` ones in functions inside it too."""
    own = {argument.arg for argument in ast.walk(function.args) if isinstance(argument, ast.arg)}

    def proves(node: ast.AST) -> bool:
        match node:
            case ast.Assert() | ast.Raise(exc=ast.Call(func=ast.Name(id="AssertionError"))):
                return True
            case ast.Attribute(value=ast.Name(id="pytest"), attr=name):
                return name in EXPECTATIONS
            case ast.Name(id=name, ctx=ast.Load()) if name not in own:  # called, or given to who calls it
                return imports.get((path, name), (path, name)) in proving
        return False

    return min((node.lineno for node in _parts(function, inner=inner) if proves(node)), default=None)


def _parts(node: ast.AST, *, inner: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if inner or not isinstance(child, Function | ast.Lambda | ast.ClassDef):
            yield child
            yield from _parts(child, inner=inner)


def _is_fixture(function: Function) -> bool:
    return any(
        ast.unparse(decorator).split("(")[0] == "pytest.fixture" for decorator in function.decorator_list
    )


def main(folder: Path = HERE) -> int:
    """Print what is found in a folder; returns 1 if that is anything."""
    found = findings(folder)
    for finding in found:
        print(finding._replace(path=finding.path.relative_to(folder.parent)))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
