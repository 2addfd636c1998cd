"""Runs all tests, by groups that can run side by side: `python -m tests`, and `python -m tests full`.

Tests whose ranks are threads run on all cores at once, and beside them, three at a time, those that start
ranks (`mpi`), which wait much; after both, one after the other, those that measure time or fight for cores
(`alone`). `full` adds the cases that are marked so and more examples of each property, and runs what computes
once more as processors of other makes would.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

SIDE_BY_SIDE = ("--dist", "loadgroup", "--numprocesses")
COMPUTES = "not mpi and not alone and not full and not browser"


@dataclass(frozen=True)
class Group:
    """Tests that one pytest runs. `instructions` are those that libraries may use of a processor's."""

    name: str
    marked: str
    options: tuple[str, ...] = ()
    instructions: dict[str, str] = field(default_factory=dict)


THREADS = Group("threads", "not mpi and not alone", (*SIDE_BY_SIDE, "auto", "--maxprocesses", "4"))
DAILY = ((THREADS, Group("mpi", "mpi and not alone", (*SIDE_BY_SIDE, "3"))), (Group("alone", "alone"),))
"""Groups that run side by side, and those that follow them."""


def instructions(mkl: str, aten: str, onednn: str) -> dict[str, str]:
    """Variables that keep MKL, torch's own kernels and oneDNN to an instruction set and older ones."""
    return {"MKL_ENABLE_INSTRUCTIONS": mkl, "ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn}


OTHER_MAKES = tuple(
    (Group(f"as with {name}", COMPUTES, THREADS.options, variables),)
    for name, variables in (
        ("SSE4", instructions("SSE4_2", "default", "SSE41")),
        ("AVX2", instructions("AVX2", "avx2", "AVX2")),
        ("AVX-512", instructions("AVX512", "avx512", "AVX512_CORE")),
    )
)


@dataclass(frozen=True)
class Row:
    """What came of a group; nothing passed in one that did not come to its end."""

    name: str
    code: int
    seconds: float = 0.0
    passed: int = 0
    failed: int = 0
    skipped: int = 0


class Started:
    """A group whose tests run. What it prints is `shown` at once, or at its end."""

    def __init__(self, group: Group, place: Path, *, full: bool, shown: bool) -> None:
        marked = group.marked if full else f"{group.marked} and not full"
        print(
            f"\n== {group.name}{'' if shown else ' (beside it; what it prints comes at its end)'}", flush=True
        )
        self._name, self._results = group.name, place.with_suffix(".xml")
        self._output = None if shown else place.with_suffix(".txt").open("w+b")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            marked,
            *group.options,
            f"--junitxml={self._results}",
        ]
        # Other makes are a matter of each example, not of how many there are.
        extent = {"RANKWISE_TESTS": "full"} if full and not group.instructions else {}
        environment = {**os.environ, **group.instructions, **extent}
        self._process = subprocess.Popen(command, env=environment, stdout=self._output)

    def finish(self) -> Row:
        """Wait for its end."""
        code = self._process.wait()
        if self._output is not None:
            print(f"\n== {self._name}", flush=True)
            self._output.seek(0)
            shutil.copyfileobj(self._output, sys.stdout.buffer)
            sys.stdout.flush()
            self._output.close()
        if not self._results.exists():
            return Row(self._name, code)
        (suite,) = ElementTree.parse(self._results).getroot().iter("testsuite")
        total, failed, skipped = (
            sum(int(suite.get(name, 0)) for name in names)
            for names in (("tests",), ("failures", "errors"), ("skipped",))
        )
        seconds = float(suite.get("time", 0))
        return Row(self._name, code, seconds, total - failed - skipped, failed, skipped)


def main(*words: str) -> int:
    """Run the groups; the last line counts all tests."""
    full = words == ("full",)
    if words and not full:
        print(f"python -m tests takes 'full' or nothing, not {' '.join(words)}", file=sys.stderr)
        return 2
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for together in (*DAILY, *OTHER_MAKES) if full else DAILY:
            started = [
                Started(group, Path(folder, f"{len(rows)}-{place}"), full=full, shown=not place)
                for place, group in enumerate(together)
            ]
            rows += [its.finish() for its in started]
    print()
    for row in rows:
        counts = f"{row.passed:5} passed {row.failed:3} failed {row.skipped:3} skipped"
        print(f"{row.name:15} {row.seconds / 60:5.1f} min  {counts}")
    passed = sum(row.passed for row in rows)
    failed = sum(row.failed for row in rows)
    skipped = sum(row.skipped for row in rows)
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return next((row.code for row in rows if row.code), 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
