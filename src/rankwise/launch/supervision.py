"""Standing between mpiexec and the user: signals, what ranks print, and that nothing is left of them."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import IO

from rankwise.comm.mpi_environment import mpi_environment
from rankwise.errors import LaunchError
from rankwise.system import machine
from rankwise.system.signals import handling

LEAVE_S = 3.0
"""How long ranks may take to leave after mpiexec has ended."""

GRACE_S = 30.0
"""How long interrupted ranks may take to agree, to save and to leave."""

ABORT_S = 5.0
"""How long mpiexec may take to end all ranks after one has failed and told it to: now and then Open MPI's
does not do it when a rank was lost before."""


@dataclass(frozen=True)
class MpiexecResult:
    """How the ranks ended: mpiexec's code, whether the user stopped them, mpiexec's last words."""

    code: int
    interrupted: bool
    last_words: str


def supervise(
    command: list[str], show: Callable[[str], None], failed: Callable[[], bool] = lambda: False
) -> MpiexecResult:
    """Run mpiexec to its end, in a session of its own so that a terminal's Ctrl-C does not reach it.

    SIGINT, SIGTERM and SIGUSR1 here become SIGUSR1 to mpiexec, which passes it on to the ranks untouched
    (SIGTERM it would follow with SIGKILL a quarter of a second later). A second one ends the ranks
    at once. `show` gets what ranks print, line by line; mpiexec's own banners are held back. `failed` says
    whether a rank has left word that the run fails.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=mpi_environment(),
            start_new_session=True,
            preexec_fn=partial(machine.die_with_parent, signal.SIGTERM),
        )
    except OSError as error:
        raise LaunchError(f"cannot start {command[0]}: {error.strerror}") from None
    assert process.stdout is not None
    assert process.stderr is not None
    banners: list[str] = []
    readers = [
        threading.Thread(target=_pass_on, args=(stream, show, banners))
        for stream in (process.stdout, process.stderr)
    ]
    for reader in readers:
        reader.start()
    failed_at = math.inf
    with _stop_signals(process) as asked_at:
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
            now = time.monotonic()
            if failed():
                failed_at = min(failed_at, now)
            late = now > failed_at + ABORT_S or (asked_at and now > asked_at[0] + GRACE_S)
            if late or len(asked_at) > 1:
                _kill(process)
    _end_session(process.pid)
    for reader in readers:
        reader.join()
    return MpiexecResult(process.returncode, bool(asked_at), "\n".join(banners))


@contextlib.contextmanager
def _stop_signals(process: subprocess.Popen[bytes]) -> Iterator[list[float]]:
    """While inside, SIGINT, SIGTERM and SIGUSR1 (a batch system's notice) ask the ranks to stop; gives the
    moments at which they came."""
    asked_at: list[float] = []

    def ask(_signal: int, _frame: FrameType | None) -> None:
        asked_at.append(time.monotonic())
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGUSR1)

    with handling((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1), ask):
        yield asked_at


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End mpiexec and, through it, the ranks; then whatever is left of its session."""
    process.terminate()
    try:
        process.wait(3)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _end_session(leader: int) -> None:
    """Wait until no process of mpiexec's session is left: it may end a moment before its last rank."""
    give_up = time.monotonic() + LEAVE_S
    while left := machine.session(leader):
        if time.monotonic() > give_up:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _pass_on(stream: IO[bytes], show: Callable[[str], None], banners: list[str]) -> None:
    """Show a stream line by line, but keep aside what stands between two rulers of dashes: banners
    of mpiexec, which say in twenty lines what rankwise says in one."""
    in_banner = False
    for raw in stream:
        line = raw.decode(errors="replace").rstrip("\n").replace("\0", "")  # Open MPI ends a line with NUL
        if len(line) > 20 and set(line) == {"-"}:
            in_banner = not in_banner
        elif in_banner or line.startswith(("prterun", "mpirun", "mpiexec", "Abort(", "NBC_Progress:")):
            banners.append(line)
        elif line and "plm:ssh: Warning" not in line:
            show(line)
