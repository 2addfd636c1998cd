"""Each mutant of a sample is tried on the tests of a tree; what came of it is stored at once, a line each."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from tests.mutants.catalogue import GROUPS, Mutant, change, difference, draw, places, text_of
from tests.mutants.child import Job
from tests.mutants.coverage_map import Map, digests, file_of, say
from tests.mutants.workshop import Report, Workshop


@dataclass(frozen=True)
class Result:
    """What came of a mutant: ``killed`` by a test, ``hung`` or ``crashed``; ``survived`` or ``not covered``;
    ``absent`` where the tree does not have such a line. `tests` come by the line, `tried` of them may run."""

    key: str
    group: str
    module: str
    line: int
    gone: str
    new: str
    outcome: str = "absent"
    by: str = ""
    tests: int = 0
    tried: int = 0
    seconds: float = 0.0

    @property
    def killed(self) -> bool:
        """Whether the tests tell of it."""
        return self.outcome in ("killed", "hung", "crashed")


def load(path: Path) -> tuple[dict[str, Any], dict[str, Result]]:
    """Read what a file holds so far: what all results have in common, and results by their keys."""
    head, *rows = map(json.loads, path.read_text("utf-8").splitlines())
    return head, {row["key"]: Result(**row) for row in rows}


class Trial:
    """A sample of this checkout's mutants, on the tests of `tree`, which the map knows: for each the shortest
    that take `most_s` in sum. `first` holds tests to begin with, by the mutants' keys."""

    def __init__(
        self,
        tree: Path,
        known: Map,
        store: Path,
        *,
        first: Mapping[str, str],
        workers: int,
        most_s: float,
    ) -> None:
        self._most_s = most_s
        self._tree, self._map, self._store, self._first = tree, known, store, first
        self._shop = Workshop(tree, workers)
        self._unfit: set[str] = set()
        self._theirs = {m.key: m for group in GROUPS for place in places(tree, group) for m in place}
        if known.texts != digests(tree):
            raise SystemExit("the map was made of other versions of the modules: make it again")

    def run(self, seed: int, sample: int, groups: Iterable[str]) -> None:
        """Try the mutants of these groups that have no result yet."""
        drawn = [mutant for mutant in draw(Path(), seed=seed, sample=sample) if mutant.group in groups]
        with self._shop:
            head = {"seed": seed, "sample": sample, "groups": sorted(groups), "most_s": self._most_s}
            done = self._begin(drawn, head | {"texts": self._map.texts})
            left = [mutant for mutant in drawn if mutant.key not in done]
            results = self._shop.each(self._try, left)
            for number, (_, result) in enumerate(results, len(drawn) - len(left) + 1):
                with self._store.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(result)) + "\n")
                told = f"{result.outcome} {result.by}"
                some = f"{result.seconds:.1f} s, {result.tried} of {result.tests} tests"
                say(f"{number}/{len(drawn)} {result.key}: {told} ({some})")

    def _begin(self, drawn: list[Mutant], head: dict[str, Any]) -> Mapping[str, Result]:
        """What is known already. Before anything is: which tests do not pass in this way without a change."""
        if self._store.exists():
            stored, done = load(self._store)
            self._unfit = set(stored.pop("unfit"))
            if stored != head:
                raise SystemExit(f"{self._store} holds results of another sample, or of other versions")
            return done
        theirs = [self._theirs[mutant.key] for mutant in drawn if mutant.key in self._theirs]
        tests = {test for mutant in theirs for test in self._tests(mutant)[1]}
        say(f"{len(tests)} of {len(self._map.seconds)} tests come by these mutants: do they pass without?")
        by_file = [[*some] for _, some in groupby(sorted(tests), key=file_of)]
        for some, report in self._shop.each(self._check, by_file):
            unfit = [test for test in some if test in report.failed or test not in report.seconds]
            self._unfit |= {*unfit}
            if unfit:
                say(f"left out, since they fail without any change: {unfit}\n{report.text}")
        self._store.parent.mkdir(parents=True, exist_ok=True)
        self._store.write_text(json.dumps(head | {"unfit": sorted(self._unfit)}) + "\n", "utf-8")
        return {}

    def _check(self, tests: list[str]) -> Report:
        with self._shop.copy() as copy:
            return self._run(copy, tests, stops=False)

    def _try(self, mutant: Mutant) -> Result:
        began = time.monotonic()
        gone, new = difference(text_of(Path(), mutant.module), change(Path(), mutant) or "")
        result = Result(mutant.key, mutant.group, mutant.module, mutant.line, gone, new)
        if (theirs := self._theirs.get(mutant.key)) is None:
            return result
        tests, some = self._tests(theirs)
        with self._shop.copy({theirs.module: change(self._tree, theirs) or ""}) as copy:
            outcome, by = self._judge(copy, some, self._first.get(mutant.key, ""))
        spent_s = round(time.monotonic() - began, 1)
        return replace(result, outcome=outcome, by=by, tests=len(tests), tried=len(some), seconds=spent_s)

    def _judge(self, copy: Path, tests: list[str], first: str) -> tuple[str, str]:
        if not tests:
            return "not covered", ""
        for left in ([first] if first in tests else [], tests):
            while left:
                report = self._run(copy, left)
                if report.end != "over":
                    return report.end, ""
                if not report.failed:
                    break
                by = report.failed[0]
                again = self._run(copy, [by]) if by in left else report
                if again.failed or again.end != "over":
                    return "killed", by
                # It failed by chance: the tests behind it are still to run.
                left = [test for test in left if test not in report.seconds]
        return "survived", ""

    def _tests(self, mutant: Mutant) -> tuple[list[str], list[str]]:
        """The tests that come by a mutant, and those of them to try."""
        tests = self._map.tests_of(self._tree, mutant.module, mutant.line)
        tests = [test for test in tests if test not in self._unfit]
        sums = accumulate(self._map.seconds[test] for test in tests)
        first = self._first.get(mutant.key)
        pairs = zip(tests, sums, strict=True)
        return tests, [test for test, until_s in pairs if until_s <= self._most_s or test == first]

    def _run(self, copy: Path, tests: list[str], *, stops: bool = True) -> Report:
        files, seconds = tuple(sorted({file_of(test) for test in tests})), self._map.seconds
        job = Job(files, self._map.markers, frozenset(tests), seconds, stops)
        return self._shop.run(job, copy, max(60, 20 + 5 * sum(seconds[test] for test in tests)))
