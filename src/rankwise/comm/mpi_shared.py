"""Sums in shared memory among the ranks of MPI, which is asked meanwhile whether all of them live."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from rankwise.comm import shared_memory
from rankwise.comm.mpi_pending import poll_until, translated
from rankwise.comm.shared_memory import SharedMemory, Spot, Sum
from rankwise.comm.transport import Buffer, Op
from rankwise.ledger.stalls import StallDetector

if TYPE_CHECKING:
    from mpi4py import MPI

ALARM_TAG = 30_011
"""Of a message that nobody sends, a program of a user's that talks among the same ranks neither."""

GLANCES = 32
"""Looks at the memory, some microseconds of them, before MPI is asked whether all ranks live, where each rank
has a core."""


class Alarm:
    """Asks MPI whether the ranks of a communicator live: a receive that stands open, and fails when one is
    lost or the communicator revoked. To ask lets MPI go on with what it does in the background, too."""

    def __init__(self, mpi: Any, comm: MPI.Intracomm) -> None:
        self._mpi = mpi
        self._comm = comm
        self._request: MPI.Request | None = None

    def ask(self) -> None:
        """Raises MPI's errors of a lost rank."""
        if self._request is None:
            self._request = self._comm.Irecv(np.empty(0), self._mpi.ANY_SOURCE, ALARM_TAG)
        self._request.Test()

    def end(self) -> None:
        """The communicator is left."""
        request, self._request = self._request, None
        if request is not None:
            with suppress(self._mpi.Exception):  # it has failed with the communicator
                request.Cancel()
                request.Wait()


class SharedPending:
    """A sum in shared memory that is polled for, as `MpiPending` polls MPI."""

    def __init__(
        self,
        mpi: Any,
        part: Sum,
        alarm: Alarm,
        *,
        spin_ns: int,
        glances: int,
        look: Callable[[], None],
    ) -> None:
        self._mpi = mpi
        self._part = part
        self._alarm = alarm
        self._spin_ns = spin_ns
        self._glances = range(glances)
        self._look = look

    def poll(self) -> None:
        """It goes on where it is waited for."""

    def wait(self, stalls: StallDetector) -> int:
        try:
            self._part.add_up(partial(self._meet, stalls))
        except self._mpi.Exception as error:
            raise translated(self._mpi, error) from None
        return -1

    def _meet(self, stalls: StallDetector, spot: Spot) -> None:
        ask = self._alarm.ask

        def is_over() -> bool:
            for _ in self._glances:
                if spot():
                    return True
            ask()
            return spot()

        poll_until(is_over, stalls, spin_ns=self._spin_ns, look=self._look)


class Sums:
    """The sums in shared memory of one rank, `number`, whose `memory` all ranks of `comm` have mapped."""

    def __init__(self, mpi: Any, memory: SharedMemory, number: int) -> None:
        self._mpi = mpi
        self._memory = memory
        self._number = number
        self._repairs = 0
        self._alarm: Alarm | None = None

    def takes(self, buffer: Buffer) -> bool:
        """Whether a buffer is added up here: the same on all ranks."""
        return shared_memory.takes(buffer)

    def begin(
        self,
        comm: MPI.Intracomm,
        members: Sequence[int],
        rank: int,
        buffer: Buffer,
        op: Op,
        *,
        spin_ns: int,
        crowded: bool,
        look: Callable[[], None],
    ) -> SharedPending:
        """Begin a sum of all ranks of `comm`, which are these members."""
        if self._alarm is None:
            self._alarm = Alarm(self._mpi, comm)
        part = Sum(self._memory, members, rank, buffer, op)
        glances = 1 if crowded else GLANCES
        return SharedPending(self._mpi, part, self._alarm, spin_ns=spin_ns, glances=glances, look=look)

    def leave(self) -> None:
        """Ranks take another communicator from here on, or none."""
        if self._alarm is not None:
            self._alarm.end()
            self._alarm = None

    def repaired(self) -> None:
        """The ranks have made a world without those that were lost, once more."""
        self._repairs += 1
        self._memory.begin_again(self._repairs)
        self.leave()


def shared_sums(mpi: Any, comm: MPI.Intracomm, *, one_host: bool) -> tuple[Sums | None, str]:
    """Sums in shared memory for all ranks of `comm`, which make this together; or None, with a reason where
    they were to be expected."""
    if not one_host or comm.Get_size() == 1 or shared_memory.why_not():
        return None, ""
    memory, offer, why = None, None, ""
    try:
        if comm.Get_rank() == 0:
            memory, offer = shared_memory.make(comm.Get_size())
    except OSError as error:
        why = f"memory cannot be shared ({error})"
    offer = comm.bcast(offer)
    try:
        if memory is None and offer is not None:
            memory = shared_memory.find(offer, comm.Get_size())
    except OSError as error:
        why = f"memory of another rank cannot be mapped ({error})"
    reasons = [reason for reason in comm.allgather(why) if reason]
    if comm.Get_rank() == 0 and offer is not None:
        shared_memory.close(offer)
    if memory is None or reasons:
        return None, reasons[0]
    return Sums(mpi, memory, comm.Get_rank()), ""
