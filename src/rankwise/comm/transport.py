"""What carries bytes between ranks: the contract that MPI and the threads of one process fulfil."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from rankwise.comm.half_precision import add_bf16, add_fp16
from rankwise.errors import OutOfStepError
from rankwise.ledger.stalls import StallDetector
from rankwise.ledger.waits import Times
from rankwise.system.call_sites import here

Buffer = NDArray[Any]
Op = Literal["sum", "max", "sum-fp16", "sum-bf16"]
"""The last two add up floats of 16 bits in arrays of uint16 (`comm.half_precision`)."""

COMBINE: dict[Op, Callable[..., Any]] = {
    "sum": np.add,
    "max": np.maximum,
    "sum-fp16": add_fp16,
    "sum-bf16": add_bf16,
}
"""What adds two arrays up, into `out`."""


def ended_before(rank: int, whereabouts: str, mine: int) -> OutOfStepError:
    """The error of rank `mine`, which waits for a rank whose program has ended."""
    return OutOfStepError(
        f"rank {rank} has come to the end of its program{whereabouts}, while rank {mine} waits for it at "
        f"{here()}: end it on all ranks at the same point"
    )


class Pending(Protocol):
    """An exchange that goes on; its buffers are the transport's until `wait` returns."""

    def poll(self) -> None:
        """Let it go on for a moment: an exchange may stand still until it is looked at."""

    def wait(self, stalls: StallDetector) -> int:
        """Come to its end, looking for stalls meanwhile; called once. Returns a receive's source, else -1.
        Raises RankLost if a rank without which it cannot end was lost, or the world is repaired, and
        OutOfStepError if the program of such a rank has ended."""


class Transport(Protocol):
    """What carries bytes between ranks.

    Collective calls are made by all ranks in the same order. Every call up to `swap` starts
    an exchange and returns at once.
    """

    rank: int
    size: int
    in_threads: bool
    """Whether ranks are threads of one process, which share what a process has one of."""

    clock_of: list[int]
    """For each rank the lowest rank that reads the same monotonic clock, as all those of one host do."""

    host_of: list[int]
    """For each rank the lowest rank on a host of the same name."""

    why_no_sharing: str
    """Why ranks of one host do not add up in memory that they share, where that was to be expected."""

    def allreduce(self, buffer: Buffer, op: Op, *, background: bool = False) -> Pending:
        """Combine the buffers of all ranks element by element, in place on every rank.

        One in the `background` goes on while it is polled, another not before it is waited for.
        """

    def gather(self, buffer: Buffer, root: int, into: Buffer | None) -> Pending:
        """Put rank k's buffer into row k of `into`, which only the root has."""

    def broadcast(self, buffer: Buffer, root: int) -> Pending:
        """Overwrite every rank's buffer with the root's."""

    def send(self, buffer: Buffer, dest: int, tag: int = 0) -> Pending:
        """Send to one rank."""

    def receive(
        self, buffer: Buffer, source: int | None, tag: int = 0, *, owing: Sequence[int] = ()
    ) -> Pending:
        """Overwrite the buffer with the next message with this tag from `source`, or from the rank whose
        message comes first if that is None. It then fails if the programs of all others have ended, or that
        of any rank `owing` one."""

    def allgather(self, buffer: Buffer, into: Buffer) -> Pending:
        """Put rank k's buffer into row k of `into` on every rank."""

    def swap(self, buffer: Buffer, counts: Times, into: Buffer, counts_in: Times) -> Pending:
        """Hand each rank its part of `buffer`, `counts` [ranks] elements of it in rank order, and put what
        the others have for this one into `into`, `counts_in` of each."""

    def set_aside(self, ranks: int) -> None:
        """From now on the ranks from this number on stand by: their `rank` is -1, and only `stand_by` and
        `repair` are for them. All call it."""

    def stand_by(self, alive: Callable[[], None]) -> bool:
        """Sleep until others call off what they are in, or are done (False), with a call of `alive` now and
        then."""

    def call_off(self, under_way: Iterable[Pending]) -> None:
        """Exchanges of all ranks fail with RankLost, and ranks that stand by are called. `under_way` are this
        rank's exchanges in the background, which are given up."""

    def repair(self, *, fill: bool) -> list[int]:
        """Go on without ranks that are gone and, if all that are left want to `fill` up, with some that stood
        by in their place. All that are left call it after `call_off`, and it waits for them. Returns the
        numbers with which the ranks began, in the order of their new ones; `rank`, `size`, `clock_of` and
        `host_of` are new."""

    def agree(self, mine: bool) -> bool:
        """Whether all ranks say yes; False if one was lost. All that are left get the same answer, whatever
        happens meanwhile."""

    def describe(self) -> str:
        """The library behind this transport, with its version."""

    def abort(self, code: int) -> None:
        """End all ranks at once, this one included, without waiting for any."""

    def close(self, whereabouts: str = "") -> None:
        """Leave in good order, all ranks together. Those that wait for this one in an exchange instead get
        OutOfStepError with its `whereabouts`, after some seconds at the latest."""
