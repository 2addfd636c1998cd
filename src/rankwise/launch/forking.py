"""The launcher's part in ranks that come by fork: a process that has torch before they are there."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from rankwise.comm.mpi_environment import Mpiexec, find_mpiexec, mpi_environment
from rankwise.launch import stand_in
from rankwise.launch.hosts import is_here
from rankwise.plan import RunPlan
from rankwise.system import head_start
from rankwise.system.head_start import Importing


class ForkServer:
    """The server of one start of ranks, a process of this host, as the launcher sees it. `token` is the name
    by which the ranks of any host find that of theirs."""

    def __init__(self, token: str, owner: socket.socket | None) -> None:
        self.token = token
        self._owner = owner

    def release(self) -> int | None:
        """It is needed no longer: it ends once its ranks have. Returns its process, which leads the session
        of its ranks; None if there is none here."""
        if self._owner is None:
            return None
        with self._owner as owner:
            self._owner = None
            owner.setblocking(False)
            try:
                told = owner.recv(64)
            except OSError:  # it is not there yet, and will find nobody
                return None
        return int(told) if told else None


class Forking:
    """Makes the servers of starts of ranks: they are forks of one process that imports torch while mpiexec
    starts, and has it when ranks are started again or take over. Without ranks `here` there is none."""

    def __init__(self, mpiexec: Mpiexec, *, here: bool) -> None:
        self._environment = _as_for_ranks(mpiexec)
        self._importing: Importing | None = None
        ahead = head_start.begun()
        if ahead is not None and here and _serves_the_same(ahead.environment, self._environment):
            self._importing = ahead
            return
        if ahead is not None:
            ahead.end()
        if here:
            with contextlib.suppress(OSError):
                self._importing = head_start.start(self._environment)

    def serve(self) -> ForkServer:
        """A server for ranks that are about to be started. Where none comes about here, the first of them
        starts one."""
        token = os.urandom(8).hex()
        if self._importing is None:
            return ForkServer(token, None)
        owner, theirs = socket.socketpair()
        with theirs, socket.socket(socket.AF_UNIX) as listener:
            try:
                listener.bind(stand_in.address(token, _in_bytes(self._environment)))
                listener.listen(socket.SOMAXCONN)
                socket.send_fds(self._importing.control, [b"."], [listener.fileno(), theirs.fileno()])
            except OSError:
                owner.close()
                return ForkServer(token, None)
        return ForkServer(token, owner)

    def end(self) -> None:
        """There are no more starts. Servers are processes of their own by now."""
        if self._importing is not None:
            self._importing.end()


def _in_bytes(environment: Mapping[str, str]) -> dict[bytes, bytes]:
    return {os.fsencode(name): os.fsencode(its) for name, its in environment.items()}


def _as_for_ranks(mpiexec: Mpiexec) -> dict[str, str]:
    """The environment that ranks will have, but for variables of MPI."""
    environment = mpi_environment()
    if mpiexec.is_open_mpi:
        environment["LD_LIBRARY_PATH"] = head_start.with_libraries_of(mpiexec.path, environment)
    return environment


def _serves_the_same(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether ranks find the same server in both environments."""
    return stand_in.address("", _in_bytes(one)) == stand_in.address("", _in_bytes(other))


def possible(plan: RunPlan) -> bool:
    """Whether ranks can come by fork. A program may have to do something before it imports torch."""
    several = plan.processes > 1 and not plan.program
    return plan.fork and several and sys.platform == "linux" and Path(stand_in.__file__).is_file()


@contextlib.contextmanager
def forks_of(plan: RunPlan) -> Iterator[Forking | None]:
    """What makes the servers of a run's ranks, as long as it is entered; None where they come otherwise."""
    hosts = plan.host_list
    if not possible(plan):
        if ahead := head_start.begun():
            ahead.end()
        yield None
        return
    here = not hosts or any(is_here(host.name) for host in hosts)
    made = Forking(find_mpiexec(), here=here and not stand_in.binds_threads(os.environ))
    try:
        yield made
    finally:
        made.end()


def rank_command(module: str, folder: Path, *mark: str, server: ForkServer | None) -> list[str]:
    """What mpiexec is to start as a rank of the run in `folder`, one of the start `mark`: Python with a
    module, or what asks the `server` for a fork that has it."""
    if server is None:
        # -P keeps files of this folder from being taken for modules of Python's or of a library.
        return [sys.executable, "-P", "-m", module, str(folder), *mark]
    return [sys.executable, "-IS", stand_in.__file__, server.token, str(folder), *mark]
