"""What a forked process does: it runs pytest on some tests in a copy of a tree."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest

PR_SET_CHILD_SUBREAPER = 36

MOST_BYTES = 4 << 30
"""Memory of a process: numbers and arrays may get as large as they want."""

TEST_VARIABLE = "MUTANTS_TEST"
"""Tells processes that a test starts which test that is."""


@dataclass(frozen=True)
class Job:
    """Tests to run. `wanted` are their ids out of `seconds`, the tests that are known; others in these files,
    whose ids may change, run too. Without `wanted` all run. `coverage` is a file of settings to measure
    by."""

    files: tuple[str, ...]
    markers: str
    wanted: frozenset[str] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    stops: bool = True
    coverage: Path | None = None


def run(job: Job, copy: Path, place: Path, channel: Connection) -> None:
    """Run a job, with `place` for what it writes. Sends the seconds of each test that ran, what failed, in
    order, and pytest's code. Never returns."""
    os.setsid()
    # What the tests start and leave behind becomes a child of this process, which ends it.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    place.mkdir()
    log = os.open(place / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(copy)
    sys.path[:0] = paths = [str(copy / "src"), str(copy)]
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(place)}
    tempfile.tempdir = None
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("tests", "rankwise"):
            del sys.modules[name]  # this package, where the copy's is wanted
    measuring = None
    if job.coverage:
        import coverage

        os.environ["COVERAGE_PROCESS_START"] = str(job.coverage)
        measuring = coverage.Coverage(config_file=str(job.coverage))
        measuring.start()
    recorder = _Recorder(job, measuring)
    words = ["-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", "--tb=short", f"--basetemp={place}/t"]
    words += ["-m", job.markers, "-o", "tmp_path_retention_policy=none", *["-x"] * job.stops]
    code = pytest.main([*words, *job.files], plugins=[recorder])
    if measuring:
        measuring.stop()
        measuring.save()
    for process in psutil.Process().children(recursive=True):
        process.kill()
    channel.send((recorder.seconds, recorder.failed, int(code)))
    os._exit(0)  # there may be threads that never end


class _Recorder:
    """A plugin of pytest: picks the tests, puts them in order, and notes what comes of them."""

    def __init__(self, job: Job, measuring: Any) -> None:
        self._job, self._measuring = job, measuring
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        """A failure is all that is asked for, not its smallest example."""
        phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate, hypothesis.Phase.target]
        hypothesis.settings.register_profile("mutants", parent=hypothesis.settings(), phases=phases)
        hypothesis.settings.load_profile("mutants")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        """The shortest tests first; those that share a fixture of their file stay together."""
        wanted, seconds = self._job.wanted, self._job.seconds
        if wanted is None:
            return
        items[:] = [item for item in items if item.nodeid in wanted or item.nodeid not in seconds]
        sharing = {item.path for item in items if _shares(item)}
        whole = {path: sum(seconds.get(i.nodeid, 0) for i in items if i.path == path) for path in sharing}
        items.sort(key=lambda item: whole.get(item.path, seconds.get(item.nodeid, 0)))
        for item in items:
            limit_s = 20 + 10 * seconds.get(item.nodeid, 1)  # what hangs need not do so for long
            item.add_marker(pytest.mark.timeout(limit_s), append=False)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """What runs from here on runs for this test."""
        os.environ[TEST_VARIABLE] = item.nodeid
        if self._measuring:
            self._measuring.switch_context(item.nodeid)
        return (yield)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported has failed."""
        self.failed += [report.nodeid] * report.failed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test was set up, ran, or was taken down."""
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration
        self.failed += [report.nodeid] * (report.failed and report.nodeid not in self.failed)


def _shares(item: pytest.Function) -> bool:
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    return any(fixture.scope not in ("function", "session") for several in fixtures for fixture in several)
