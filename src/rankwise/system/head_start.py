"""The process that imports what ranks need, started while this one still reads its own command line.

Both take about as long as each other: what ranks need is torch, and the launcher has options to check. So
this module, which is loaded first, imports next to nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

SERVER = "rankwise.launch.fork_server"

RANK_MARKS = ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "MPI_LOCALRANKID")
"""What Open MPI, PMIx, PMI (MPICH, Intel MPI, srun) and MVAPICH set for the processes they start."""

_OTHER_WAYS = ("--help", "-h", "--no-fork", "--tune", "--host")
"""With these no ranks may be forked, or not here, or not yet."""

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Importing:
    """A process that imports what ranks need, the end of the socket over which it is told what to fork, and
    the environment with which it was started."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    environment: Mapping[str, str]

    def end(self) -> None:
        """It forks no more. What it has forked is of its own by now."""
        self.control.close()
        self.process.kill()
        self.process.wait()


_begun: list[Importing] = []


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """While inside, modules are imported: what they make stays, so no collection looks through it, then or
    later, nor writes into memory that forks share."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def begin(words: Sequence[str]) -> None:
    """Start one if this command line asks for several ranks of this host, as far as that is plain to see.
    Whatever speaks against it later, it is only a process that was not needed."""
    is_rank = any(mark in os.environ for mark in RANK_MARKS)
    if sys.platform == "linux" and _starts_ranks(words) and not is_rank:
        environment = dict(os.environ)
        mpiexec = path_of_mpiexec()
        if mpiexec and mpiexec.with_name("ompi_info").exists():
            environment["LD_LIBRARY_PATH"] = with_libraries_of(mpiexec, environment)
        with contextlib.suppress(OSError):
            _begun.append(start(environment))


def _starts_ranks(words: Sequence[str]) -> bool:
    if words[:1] != ["train"] or any(word.startswith(_OTHER_WAYS) for word in words):
        return False
    after = words[words.index("--ranks") + 1 :] if "--ranks" in words else ()
    given = [*after[:1], *(word.removeprefix("--ranks=") for word in words if word.startswith("--ranks="))]
    return len(given) == 1 and given[0].isdecimal() and int(given[0]) > 1


def begun() -> Importing | None:
    """The one that was started ahead; it is the caller's from now on."""
    return _begun.pop() if _begun else None


def start(environment: Mapping[str, str]) -> Importing:
    """Start one, which ends with this process. Raises OSError."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", SERVER, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                preexec_fn=partial(ctypes.CDLL(None).prctl, _PR_SET_PDEATHSIG, signal.SIGKILL),
            )
        except BaseException:
            ours.close()
            raise
    return Importing(process, ours, environment)


def path_of_mpiexec() -> Path | None:
    """The mpiexec of this Python's environment, else of the PATH; None if there is none."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which("mpiexec", path=places) or shutil.which("mpirun", path=places)
    return Path(found) if found else None


def with_libraries_of(mpiexec: Path, environment: Mapping[str, str]) -> str:
    """LD_LIBRARY_PATH as Open MPI's mpiexec gives it to its ranks: its own libraries come first."""
    own = str(mpiexec.parent.parent / "lib")
    return ":".join(filter(None, [own, environment.get("LD_LIBRARY_PATH")]))
