"""Communicators by names that all their members give them: MPI has no number that ranks share."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rankwise.program.log import CallLog


class Communicators:
    """The communicators of this rank, by their handles.

    Asks MPI for groups alone, which is no communication. Must hear of each one when it is made: of those with
    the same members the first is the first on all of them, as making one is an exchange between them.
    """

    def __init__(self, mpi: Any, log: CallLog, known: dict[int, int]) -> None:
        self._mpi = mpi
        self._log = log
        self._world = mpi.COMM_WORLD.Get_group()
        self._made: Counter[tuple[int, ...]] = Counter()
        self.known = known
        for comm in (mpi.COMM_WORLD, mpi.COMM_SELF):
            self.add(comm)

    def add(self, comm: Any) -> int:
        """The number of a communicator on this rank; -1 if it is none that has members."""
        try:
            handle = comm.handle
            if handle in self.known:
                return self.known[handle]
            members = self._ranks(comm.Get_group())
            peers = self._ranks(comm.Get_remote_group()) if comm.Is_inter() else members
        except self._mpi.Exception:
            return -1
        everybody = tuple(sorted({*members, *peers}))
        self.known[handle] = self._log.add_comm(members, peers, self._made[everybody])
        self._made[everybody] += 1
        return self.known[handle]

    def forget(self, comm: Any) -> None:
        """It is about to be freed, and another may get its handle."""
        self.known.pop(comm.handle, None)

    def _ranks(self, group: Any) -> list[int]:
        """The ranks of a group in the world, -1 for those of another."""
        found = self._mpi.Group.Translate_ranks(group, None, self._world)
        group.Free()
        return [-1 if rank == self._mpi.UNDEFINED else rank for rank in found]
