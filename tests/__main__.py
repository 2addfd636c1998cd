"""Runs all tests, by groups that can run side by side: `python -m tests`, and `python -m tests full`.

Tests whose ranks are threads run on all cores at once, those that start ranks (`mpi`) three at a time, those
that measure time or fight for cores (`alone`) one after the other. `full` adds the cases that are marked so
and more examples of each property, and runs what computes once more as processors of other makes would.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from .groups import PLACE

SIDE_BY_SIDE = ("--dist", "loadgroup", "--numprocesses")
COMPUTES = "not mpi and not alone and not full and not browser"


@dataclass(frozen=True)
class Group:
    """Tests that one pytest runs. `all_have` is a mark that all of them have. `instructions` are those that
    libraries may use of a processor's."""

    name: str
    marked: str
    options: tuple[str, ...] = ()
    all_have: str | None = None
    instructions: dict[str, str] = field(default_factory=dict)


DAILY = (
    Group("threads", "not mpi and not alone", (*SIDE_BY_SIDE, "auto", "--maxprocesses", "4")),
    Group("mpi", "mpi and not alone", (*SIDE_BY_SIDE, "3"), "mpi"),
    Group("alone", "alone", (), "alone"),
)


def instructions(mkl: str, aten: str, onednn: str) -> dict[str, str]:
    """Variables that keep MKL, torch's own kernels and oneDNN to an instruction set and older ones."""
    return {"MKL_ENABLE_INSTRUCTIONS": mkl, "ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn}


OTHER_MAKES = tuple(
    Group(f"as with {name}", COMPUTES, DAILY[0].options, None, variables)
    for name, variables in (
        ("SSE4", instructions("SSE4_2", "default", "SSE41")),
        ("AVX2", instructions("AVX2", "avx2", "AVX2")),
        ("AVX-512", instructions("AVX512", "avx512", "AVX512_CORE")),
    )
)


def main(*words: str) -> int:
    """Run the groups; the last line counts all tests."""
    full = words == ("full",)
    if words and not full:
        print(f"python -m tests takes 'full' or nothing, not {' '.join(words)}", file=sys.stderr)
        return 2
    rows, code = [], 0
    with tempfile.TemporaryDirectory() as folder:
        results, by_mark = Path(folder, "results.xml"), Path(folder, "by-mark.json")
        # Python may be told to keep no bytecode; here each rank and each group would compile the same again.
        common = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        common[PLACE] = str(by_mark)
        for group in (*DAILY, *OTHER_MAKES) if full else DAILY:
            marked = group.marked if full else f"{group.marked} and not full"
            print(f"\n== {group.name}", flush=True)
            started_s = time.monotonic()
            results.unlink(missing_ok=True)
            command = [sys.executable, "-m", "pytest", "-m", marked, *group.options, f"--junitxml={results}"]
            if group.all_have and by_mark.exists():
                command += json.loads(by_mark.read_text()).get(group.all_have, [])
            else:
                command += ["-p", "tests.groups"]
            # Other makes are a matter of each example, not of how many there are.
            extent = {"RANKWISE_TESTS": "full"} if full and not group.instructions else {}
            done = subprocess.run(command, env={**common, **group.instructions, **extent}, check=False)
            code = code or done.returncode
            rows.append((group.name, time.monotonic() - started_s, *counts(results)))
    print()
    for name, seconds, passed, failed, skipped in rows:
        print(f"{name:15} {seconds / 60:5.1f} min  {passed:5} passed {failed:3} failed {skipped:3} skipped")
    passed, failed, skipped = (sum(row[place] for row in rows) for place in (2, 3, 4))
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return code


def counts(results: Path) -> tuple[int, int, int]:
    """How many tests of a group passed, failed and were skipped; none of one that did not come to its end."""
    if not results.exists():
        return 0, 0, 0
    (suite,) = ElementTree.parse(results).getroot().iter("testsuite")
    total, failed, skipped = (
        sum(int(suite.get(name, 0)) for name in names)
        for names in (("tests",), ("failures", "errors"), ("skipped",))
    )
    return total - failed - skipped, failed, skipped


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
