"""Which test comes by which line, and how long it takes."""

from __future__ import annotations

import ast
import hashlib
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.mutants.catalogue import PACKAGE, modules, text_of
from tests.mutants.child import TEST_VARIABLE, Job
from tests.mutants.workshop import Report, Workshop

SETTINGS = """
[run]
parallel = true
concurrency = thread
context = ${{{variable}-}}
data_file = {data}
include = {modules}
patch = _exit
"""
"""For coverage. A process that a test starts has the test's id as its context."""


@dataclass(frozen=True)
class Map:
    """The tests of a tree with their seconds, and for each line of a module the places of its tests among
    them. `texts` tell of which version of the modules."""

    markers: str
    texts: dict[str, str]
    seconds: dict[str, float]
    lines: dict[str, dict[str, list[int]]]

    def tests_of(self, tree: Path, module: str, line: int) -> list[str]:
        """The tests, the shortest first, that may tell of a change of this line of a module."""
        ids, by_line = [*self.seconds], self.lines.get(module, {})
        lines = _lines_that_tell(ast.parse(text_of(tree, module)), line)
        tests = {ids[place] for number in lines for place in by_line.get(str(number), ())}
        return sorted(tests, key=lambda test: (self.seconds[test], test))


def digests(tree: Path) -> dict[str, str]:
    """What tells whether a module's text has changed."""
    return {module: hashlib.sha256(text_of(tree, module).encode()).hexdigest() for module in modules()}


def file_of(test: str) -> str:
    """The file in which a test stands."""
    return test.partition("::")[0]


def say(text: str) -> None:
    """Tell how far things are."""
    print(text, file=sys.stderr, flush=True)


def measure(tree: Path, markers: str, files: Sequence[str], workers: int) -> Map:
    """Run the tests, each file in a process of its own, and note who comes by where."""
    seconds: dict[str, float] = {}
    with Workshop(tree, workers) as shop:
        data, settings = shop.folder / "coverage", shop.folder / "coverage.ini"
        data.mkdir()
        include = "".join(f"\n    */{PACKAGE / module}" for module in modules())
        settings.write_text(SETTINGS.format(variable=TEST_VARIABLE, data=data / "data", modules=include))

        def do(file: str) -> Report:
            with shop.copy() as copy:
                report = shop.run(Job((file,), markers, stops=False, coverage=settings), copy)
                if not report.failed:
                    return report
                # Two threads that start at once may get in each other's way when both begin to be traced.
                job = Job((file,), markers, frozenset(report.failed), report.seconds, False, settings)
                again = shop.run(job, copy)
                return replace(report, failed=again.failed, seconds=report.seconds | again.seconds)

        for file, report in shop.each(do, files):
            seconds |= report.seconds
            say(f"{file}: {report.end}, {len(report.seconds)} tests, {sum(report.seconds.values()):.0f} s")
            if report.failed:
                say(f"fail under coverage, so may come by other lines too: {report.failed}\n{report.text}")
        return Map(markers, digests(tree), seconds, _read(data, [*seconds]))


def _read(folder: Path, ids: list[str]) -> dict[str, dict[str, list[int]]]:
    from coverage import CoverageData

    places = {test: place for place, test in enumerate(ids)}
    found: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for path in folder.glob("data*"):
        data = CoverageData(str(path))
        data.read()
        for file in data.measured_files():
            module = file.rpartition(f"/{PACKAGE}/")[2]
            for line, tests in data.contexts_by_lineno(file).items():
                found[module][str(line)] |= {places[test] for test in tests if test in places}
    return {
        module: {line: sorted(tests) for line, tests in lines.items() if tests}
        for module, lines in found.items()
    }


def _lines_that_tell(tree: ast.Module, line: int) -> list[int]:
    """The lines by which a test comes if it may tell of a change of this one.

    In a function these are the lines of the statement. Defaults and decorators run when a module is loaded,
    as does what stands in no function: for them it is the function's body, for the rest all functions.
    """
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    every = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    around = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt | ast.ExceptHandler) and _first(node) <= line <= (node.end_lineno or 0)
    ]
    innermost = around[-1]
    if isinstance(innermost, kinds):
        return _body(innermost)
    if not any(isinstance(node, kinds) for node in around):
        return [number for node in every for number in _body(node)]
    body = getattr(innermost, "body", None)
    end = max(_first(innermost) + 1, _first(body[0])) if body else (innermost.end_lineno or 0) + 1
    return [*range(_first(innermost), end)]


def _first(node: ast.stmt | ast.ExceptHandler) -> int:
    return min(int(each.lineno) for each in (*getattr(node, "decorator_list", ()), node))


def _body(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[int]:
    return [*range(_first(function.body[0]), (function.end_lineno or 0) + 1)]
