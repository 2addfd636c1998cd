"""The processes that a test starts: where each stands when they hang, and that nothing of them is left.

All have the test's mark in their environment, whatever sessions and parents they end up in; so tests that run
side by side can tell theirs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import psutil

from rankwise.comm.mpi_environment import shared_memory_of

MARK = "RANKWISE_TEST"
HOOK = Path(__file__).with_name("stacks")
GRACE_S = 5.0
"""How long what belongs to an ended process may take to go; a busy kernel is slow."""


class Stack(NamedTuple):
    """A Python process and the file into which it writes where it stands."""

    rank: str
    job: str
    pid: int
    path: Path

    @property
    def name(self) -> str:
        return f"rank {self.rank}, " if self.rank else ""


class Belongings:
    """What belongs to the programs of a test."""

    living: ClassVar[list[Belongings]] = []
    """Those of the tests and fixtures that are under way."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rankwise-test-"))
        self.living.append(self)
        self.launcher_was_killed = False
        """Whether a test killed a launcher: its mpiexec ends with it, and may leave behind what killed ranks
        have in shared memory."""

    def environment(self, given: dict[str, str]) -> dict[str, str]:
        """An environment, and in it the mark, the way to the hook, and a place for the sessions of Open MPI.

        Those of killed ones stay, and no mpiexec of another test that has the number of one may find it.
        """
        path = os.pathsep.join([str(HOOK), *filter(None, [given.get("PYTHONPATH")])])
        sessions = {f"PRTE_MCA_prte_{where}_tmpdir_base": str(self.sessions) for where in ("local", "remote")}
        return given | sessions | {MARK: str(self.folder), "PYTHONPATH": path}

    @property
    def sessions(self) -> Path:
        """Where Open MPI's folders are."""
        return self.folder.with_suffix(".mpi")

    def processes(self) -> list[int]:
        """The live processes that have the mark, and forks of a warm Python, which cannot show it."""
        mark = f"{MARK}={self.folder}\0".encode()
        marked = {pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if mark in _environ(pid)}
        return sorted(marked.union(stack.pid for stack in self.stacks() if _began(stack.pid, stack.path)))

    def stacks(self) -> list[Stack]:
        """The Python processes that were started so far, in rank order, those that are none first."""
        found = []
        for path in self.folder.iterdir() if self.folder.exists() else ():
            rank, job, pid = path.name.split(",")
            found.append(Stack(rank, job, int(pid), path))
        return sorted(found, key=lambda stack: (int(stack.rank or -1), stack.pid))

    def where(self) -> str:
        """Where each live process stands: Python's with the stacks of all threads."""
        live = set(self.processes())
        asked = {stack: stack.path.stat().st_size for stack in self.stacks() if stack.pid in live}
        for stack in asked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(stack.pid, signal.SIGUSR2)
        # Stopped processes never answer, and what hangs in the kernel neither.
        _wait(lambda: all(stack.path.stat().st_size > size for stack, size in asked.items()), 2)
        time.sleep(0.1)  # for the rest of what they write
        told = []
        for stack, size in asked.items():
            words = stack.path.read_text(errors="replace")[size:].strip() or "does not say where it stands"
            told.append(f"{stack.name}{_describe(stack.pid)}\n{words}")
        others = sorted(live - {stack.pid for stack in asked})
        return "\n\n".join([*told, *map(_describe, others)]) or "no process of the test is left"

    def files(self) -> dict[str, list[Path]]:
        """What each job of Open MPI has in shared memory, and its folder."""
        jobs = {stack.job for stack in self.stacks() if stack.job}
        return {
            job: [
                *shared_memory_of(job),
                *self.sessions.glob(f"ompi.{launcher_of(job)}"),
            ]
            for job in jobs
        }

    def close(self) -> list[str]:
        """End and remove what is left, after a while in which it may go by itself; tells what it was."""
        _wait(lambda: not self.processes(), GRACE_S)
        left = []
        for pid in self.processes():
            left.append(_describe(pid))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _wait(lambda: not self.processes(), GRACE_S)
        for paths in self.files().values():
            # An mpiexec removes its folder, and what killed ranks have in shared memory. If it was killed
            # itself, nobody is left to do so; that is no fault of ours, and its folder shows it. Without the
            # folder the job has ended in order, and nothing of it may be left.
            if not (self.launcher_was_killed or any(path.is_dir() for path in paths)):
                left += map(str, paths)
            for path in paths:
                if not path.is_dir():
                    path.unlink(missing_ok=True)
        for folder in (self.sessions, self.folder):
            shutil.rmtree(folder, ignore_errors=True)
        self.living.remove(self)
        return left


class Process(subprocess.Popen[str]):
    """A process whose timeouts tell where all processes of the test stand, and what it has printed."""

    def __init__(self, belongings: Belongings, words: Sequence[str], **options: Any) -> None:
        self._belongings = belongings
        self._is_told = False
        super().__init__(words, text=True, **options)

    def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:
        with self._telling(timeout):
            return super().communicate(input, timeout)

    def wait(self, timeout: float | None = None) -> int:
        with self._telling(timeout):
            return super().wait(timeout)

    def ends_within(self, timeout_s: float) -> bool:
        """Whether it ends in time."""
        return _wait(lambda: self.poll() is not None, timeout_s)

    @contextlib.contextmanager
    def _telling(self, timeout_s: float | None) -> Iterator[None]:
        try:
            yield
        except subprocess.TimeoutExpired:
            if self._is_told:
                raise
            self._is_told = True  # what follows may take too long as well
            where = self._belongings.where()
            try:
                printed = super().communicate(timeout=0.2)
            except subprocess.TimeoutExpired as error:
                printed = tuple(
                    (part or b"").decode(errors="replace") for part in (error.output, error.stderr)
                )
            finally:
                self._is_told = False
            out, err = printed
            raise AssertionError(
                f"not at its end after {timeout_s} s: {_line(map(str, self.args))}\n\n{where}\n\n"
                f"--- stdout so far\n{out}\n--- stderr so far\n{err}"
            ) from None


def wait_for(happened: Callable[[], Any], timeout_s: float = 120) -> None:
    """Wait until it has happened."""
    if not _wait(happened, timeout_s):
        raise AssertionError(f"it did not happen in {timeout_s} s\n\n{where_all_stand()}")


def where_all_stand() -> str:
    """Where the processes of all tests and fixtures under way stand."""
    return "\n\n".join(belongings.where() for belongings in Belongings.living)


def launcher_of(job: str) -> int:
    """The process of the mpiexec that runs a job of Open MPI: prterun-HOST-PID@NUMBER."""
    return int(job.partition("@")[0].rpartition("-")[2])


def _wait(happened: Callable[[], Any], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _environ(pid: int) -> bytes:
    """The environment with which a process was started; empty for one that has ended."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def _began(pid: int, stack: Path) -> bool:
    """Whether a process is the live one that wrote a stack, and not another one of its number."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= stack.stat().st_mtime
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False


def _describe(pid: int) -> str:
    try:
        process = psutil.Process(pid)
        return f"process {pid} ({process.status()}): {_line(process.cmdline())}"
    except psutil.Error:
        return f"process {pid} (gone)"


def _line(words: Iterable[str]) -> str:
    """A command, on one line that can be read."""
    return " ".join(" ".join(words).split())[:200]
