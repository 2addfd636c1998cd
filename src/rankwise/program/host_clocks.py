"""The clocks of a program's hosts, compared on a communicator of our own: nothing goes over the program's."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from rankwise.comm.clock_sync import CommonClock
from rankwise.system import machine


class HostClocks:
    """How far this rank's clock is ahead of rank 0's, measured when the program has begun MPI and before it
    ends.

    Made by all ranks together, before the methods of mpi4py are replaced.
    """

    def __init__(
        self, mpi: Any, clock: Callable[[], int] = time.monotonic_ns, name: str | None = None
    ) -> None:
        comm = mpi.COMM_WORLD.Dup()
        names = comm.allgather(name or machine.clock_name())
        exchanges: Any = _Exchanges(comm, [names.index(its) for its in names])
        self._clock = CommonClock(exchanges, clock)

    @property
    def several(self) -> bool:
        """Whether ranks read different clocks."""
        return self._clock.several

    def measure(self) -> dict[str, Any]:
        """Compare them now; all ranks together. Returns all readings of this rank (when, and how far ahead),
        and the bound on their errors, in ns."""
        self._clock.measure()
        return {"readings": self._clock.readings, "clock_error_ns": self._clock.error_bound_ns}


def as_mpi(distributed: Any) -> Any:
    """What comparing clocks asks of mpi4py, by torch.distributed; all ranks together make a group for it."""
    return SimpleNamespace(COMM_WORLD=_Group(distributed))


class _Group:
    def __init__(self, distributed: Any) -> None:
        self._distributed = distributed
        self._group: Any = None

    def Dup(self) -> _Group:
        self._group = self._distributed.new_group(backend="gloo")
        return self

    def Get_rank(self) -> int:
        return int(self._distributed.get_rank())

    def allgather(self, value: Any) -> list[Any]:
        found = [None] * self._distributed.get_world_size()
        self._distributed.all_gather_object(found, value, group=self._group)
        return found

    def Send(self, array: Any, to: int, tag: int) -> None:
        self._distributed.send(_tensor(array), to, group=self._group, tag=tag)

    def Recv(self, array: Any, source: int, tag: int) -> None:
        self._distributed.recv(_tensor(array), source, group=self._group, tag=tag)

    def Bcast(self, array: Any, root: int) -> None:
        self._distributed.broadcast(_tensor(array), root, group=self._group)


def _tensor(array: Any) -> Any:
    return sys.modules["torch"].from_numpy(array)


class _Done:
    """An exchange that was over when it was begun."""

    def wait(self, stalls: Any) -> None:
        """Nothing is left to wait for."""


class _Exchanges:
    """What comparing clocks asks of a world, by calls that block."""

    def __init__(self, comm: Any, clock_of: list[int]) -> None:
        self._comm = comm
        self.rank: int = comm.Get_rank()
        self.clock_of = clock_of

    def send(self, array: Any, to: int, tag: int) -> _Done:
        self._comm.Send(array, to, tag)
        return _Done()

    def receive(self, array: Any, source: int, tag: int) -> _Done:
        self._comm.Recv(array, source, tag)
        return _Done()

    def broadcast(self, array: Any, root: int) -> _Done:
        self._comm.Bcast(array, root)
        return _Done()
