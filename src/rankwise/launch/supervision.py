"""Standing between mpiexec and the user: signals, what ranks print, and that nothing is left of them."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO

from rankwise.comm.mpi_environment import clear_shared_memory, mpi_environment, own_session
from rankwise.errors import LaunchError
from rankwise.launch.forking import ForkServer
from rankwise.system import machine
from rankwise.system.signals import STOP, handling, leave_lost_terminal

LEAVE_S = 3.0
"""How long ranks may take to leave after mpiexec has ended."""

GRACE_S = 30.0
"""How long interrupted ranks may take to agree, to save and to leave."""

ABORT_S = 5.0
"""How long mpiexec may take to end all ranks after one has failed and told it to: now and then Open MPI's
does not do it when a rank was lost before."""


_MARK = re.compile(r"\[\d+,(\d+)\]<std(?:out|err)>: ?")
"""What Open MPI's mpiexec puts in front of a rank's line, with --output tag."""

_MARK_OF_HYDRA = re.compile(r"\[(\d+)\] ")
"""What MPICH's puts there with -prepend-rank."""


@dataclass(frozen=True)
class MpiexecResult:
    """How the ranks ended: mpiexec's code, whether the user stopped them, mpiexec's last words."""

    code: int
    interrupted: bool
    last_words: str


class Started:
    """An mpiexec that has been started, and what it shows and says; `asked_at` are the moments at which its
    ranks were asked to stop, `server` that of which they are forks, `session` the folder that it has to
    itself."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        readers: list[threading.Thread],
        server: ForkServer | None = None,
        session: Path | None = None,
    ) -> None:
        self.process = process
        self.readers = readers
        self.server = server
        self.session = session
        self.banners: list[str] = []
        self.asked_at: list[float] = []

    def ask_to_stop(self) -> None:
        """Ask the ranks to save and to leave. The signal becomes SIGUSR1 in them, which mpiexec passes on
        untouched (SIGTERM it would follow with SIGKILL a quarter of a second later)."""
        self.asked_at.append(time.monotonic())
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)

    @property
    def is_over(self) -> bool:
        """Whether mpiexec has ended."""
        return self.process.poll() is not None

    def end(self) -> None:
        """End mpiexec and its ranks, if they are there, and wait until they are gone."""
        if not self.is_over:
            self.kill()
        self.clear_up()

    def kill(self) -> None:
        """End mpiexec and, through it, the ranks; then whatever is left of its session."""
        self.process.terminate()
        try:
            self.process.wait(3)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def clear_up(self) -> None:
        """mpiexec has ended: wait for its ranks and for what they have printed."""
        server = None if self.server is None else self.server.release()
        _end_sessions([self.process.pid] if server is None else [self.process.pid, server])
        clear_shared_memory(self.process.pid)
        if self.session is not None:
            shutil.rmtree(self.session, ignore_errors=True)
        for reader in self.readers:
            reader.join()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@dataclass(frozen=True)
class Line:
    """A line that a rank has printed, of which mpiexec told the number, or None; `is_error` is for stderr."""

    text: str
    rank: int | None
    is_error: bool


def start(
    command: list[str],
    show: Callable[[Line], None],
    *,
    is_rank: bool = False,
    is_hydra: bool = False,
    server: ForkServer | None = None,
) -> Started:
    """Start mpiexec in a session of its own, so that a terminal's Ctrl-C does not reach it.

    `show` gets what ranks print, line by line; mpiexec's own banners are held back. With `is_rank` the
    command is the only rank itself, with `is_hydra` it is MPICH's or Intel MPI's mpiexec, told to put each
    line's rank in front of it. Ranks are forks of the `server`. Raises LaunchError.
    """
    environment = mpi_environment()
    session = None if is_rank else own_session(environment)
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
            preexec_fn=partial(machine.die_with_parent, signal.SIGTERM),
        )
    except OSError as error:
        if session is not None:
            session.rmdir()
        raise LaunchError(f"cannot start {command[0]}: {error.strerror}") from None
    assert process.stdout is not None
    assert process.stderr is not None
    started = Started(process, [], server, session)
    for stream in (process.stdout, process.stderr):
        words = (stream, stream is process.stderr, show, started.banners)
        which = {"is_rank": is_rank, "is_hydra": is_hydra}
        reader = threading.Thread(target=_pass_on, args=words, kwargs=which)
        started.readers.append(reader)
        reader.start()
    return started


def supervise(
    started: Started,
    failed: Callable[[], bool] = lambda: False,
    look: Callable[[], None] = lambda: None,
) -> MpiexecResult:
    """Stand by an mpiexec to its end.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 here ask the ranks to stop; a second one ends them at once. `failed`
    says whether a rank has left word that the run fails. `look` is called ten times in a second.
    """
    process, failed_at = started.process, math.inf
    with _stop_signals(started) as by_user:
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
            look()
            now = time.monotonic()
            if failed():
                failed_at = min(failed_at, now)
            asked_at = started.asked_at
            late = now > failed_at + ABORT_S or (asked_at and now > asked_at[0] + GRACE_S)
            if late or len(by_user) > 1:
                started.kill()
    started.clear_up()
    last_words = "\n".join(started.banners)
    killed = re.search(r"a rank was ended by signal (\d+)", last_words)
    # MPICH gives a signal's number as code, as if a rank had said it, and ORs those of several ranks.
    code = 128 + int(killed[1]) if killed else process.returncode
    return MpiexecResult(code, bool(by_user), last_words)


@contextlib.contextmanager
def _stop_signals(started: Started) -> Iterator[list[int]]:
    """While inside, SIGINT, SIGTERM, SIGHUP and SIGUSR1 (a batch system's notice) ask the ranks to stop;
    gives those that came."""
    came: list[int] = []

    def ask(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_lost_terminal()
            if came:  # of a closed terminal both the kernel and the shell tell
                return
        came.append(number)
        started.ask_to_stop()

    with handling(STOP, ask):
        yield came


def _end_sessions(leaders: list[int]) -> None:
    """Wait until no process is left of the session of mpiexec, which may end a moment before its last rank,
    nor of those that others began for it."""
    give_up = time.monotonic() + LEAVE_S
    while left := machine.sessions(leaders):
        if time.monotonic() > give_up:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _pass_on(
    stream: IO[bytes],
    is_error: bool,
    show: Callable[[Line], None],
    banners: list[str],
    *,
    is_rank: bool,
    is_hydra: bool,
) -> None:
    """Show a stream line by line, but keep aside what mpiexec and MPI say themselves: banners between two
    rulers of dashes, which say in twenty lines what rankwise says in one."""
    held: dict[int | None, _Banner] = defaultdict(_Banner)
    noisy: set[int | None] = set()
    for raw in stream:
        line = raw.decode(errors="replace").rstrip("\n").replace("\0", "")  # Open MPI ends a line with NUL
        marks = list(_MARK.finditer(line))
        if is_rank:
            show(Line(line, 0, is_error))
            continue
        if marks and marks[0].start() == 0:
            ends = [*(mark.start() for mark in marks[1:]), len(line)]
            parts: list[tuple[int | None, str]] = [
                (int(mark[1]), line[mark.end() : end]) for mark, end in zip(marks, ends, strict=True)
            ]
        elif is_hydra and (mark := _MARK_OF_HYDRA.match(line)):
            parts = [(int(mark[1]), line[mark.end() :])]
        elif line.startswith(("prterun", "mpirun", "mpiexec", "Abort(", "NBC_Progress:")):
            banners.append(line)
            continue
        elif _OF_HYDRA.match(line):
            if told := _BY_SIGNAL.search(line):
                banners.append(f"a rank was ended by signal {told[2]} ({told[1]})")
            continue
        elif "plm:ssh: Warning" in line:
            continue
        else:
            parts = [(None, line)]
        for rank, text in parts:
            if is_hydra and text.startswith("Abort("):
                banners.append(text)
                continue
            if text.startswith(_NOISE):  # of MPI, where a rank was lost; an empty line follows
                banners.append(text)
                noisy.add(rank)
                continue
            if rank in noisy and not text:
                noisy.discard(rank)
                continue
            for shown in held[rank].take(text, banners, of_rank=rank is not None):
                if shown or rank is not None:
                    show(Line(shown, rank, is_error))
    for rank, banner in held.items():
        for shown in banner.rest():
            show(Line(shown, rank, is_error))


class _Banner:
    """Tells banners from what a rank prints. Where lines have the marks of ranks, a rank's own ruler is told
    from that of a banner by the line that follows."""

    def __init__(self) -> None:
        self._ruler: str | None = None
        self._is_inside = self._was_inside = False

    def take(self, line: str, banners: list[str], *, of_rank: bool) -> list[str]:
        """The next line; returns what is to be shown by now."""
        is_ruler = len(line) > 20 and set(line) == {"-"}
        was_inside, self._was_inside = self._was_inside, self._is_inside
        if was_inside and not (line or self._is_inside):
            return []  # the empty line behind a banner
        if self._is_inside:
            self._is_inside = not is_ruler
            if not is_ruler:
                banners.append(line)
            return []
        if self._ruler is not None:
            before, self._ruler = self._ruler, None
            if of_rank and not line.startswith(_OF_MPI):
                return [before, *self.take(line, banners, of_rank=True)]
            self._is_inside = not is_ruler
            if not is_ruler:
                banners.append(line)
            return []
        if is_ruler:
            self._ruler = line
            return []
        return [line]

    def rest(self) -> list[str]:
        """What is still held back at the end."""
        return [] if self._ruler is None else [self._ruler]


_OF_HYDRA = re.compile(
    r"=   (BAD TERMINATION|PID \d|EXIT CODE|CLEANING UP|YOU CAN IGNORE)|YOUR APPLICATION TERMINATED WITH|"
    r"This typically refers to a problem with your|Please see the FAQ page for debugging|={83}$"
)
"""What MPICH's mpiexec says of a rank that did not end well."""

_BY_SIGNAL = re.compile(r"EXIT STRING: (.+) \(signal (\d+)\)")

_NOISE = "NBC_Progress: an error"

_OF_MPI = (
    "MPI_ABORT was invoked",
    "It looks like MPI",
    "Open MPI",
    "An MPI process",
    "A call to",
    "WARNING:",
)
"""How banners begin that MPI prints in a rank."""
