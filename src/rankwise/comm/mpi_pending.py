"""Waiting for what MPI does in the background, without a core of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rankwise.comm.mpi_environment import survives_failures
from rankwise.comm.transport import Buffer
from rankwise.errors import RankLost, one_line
from rankwise.ledger.stalls import StallDetector

if TYPE_CHECKING:
    from mpi4py import MPI

CROWDED_SPIN_NS = 500_000
"""The same on a host with more ranks than cores, where another rank may have use for the core."""

LONGEST_NAP_NS = 1_000_000

PATIENCE_NS = 1_000_000_000
"""How long a rank waits before it asks whether the program of another has ended, or tells it of its own."""


def poll_until(
    is_over: Callable[[], bool], stalls: StallDetector, *, spin_ns: int, look: Callable[[], None]
) -> None:
    """Ask until something is over: at once, for `spin_ns` yielding in between, and then with short naps;
    `look` is called once a second meanwhile."""
    started_ns = stalls.look()
    nap_ns, next_look_ns = 0, PATIENCE_NS
    while not is_over():
        waited_ns = stalls.look(nap_ns) - started_ns
        if waited_ns < spin_ns:
            os.sched_yield()
            continue
        nap_ns = min(2 * nap_ns, LONGEST_NAP_NS) or 50_000
        time.sleep(nap_ns / 1e9)
        if waited_ns > next_look_ns:
            look()
            next_look_ns = waited_ns + PATIENCE_NS
    stalls.look(nap_ns)


class MpiPending:
    """An exchange of MPI's that is polled: at once, then yielding, then with short naps.

    A rank inside a blocking MPI call burns its core, which on a machine with more ranks than cores
    is another rank's. `post` starts it; with `receives` the request is asked which rank's message it brought;
    `then` is what blocks, once the request is over, and `look` is called once a second meanwhile. The buffers
    are held here: MPI works on their memory, also when the caller has let go of them.
    """

    def __init__(
        self,
        mpi: Any,
        post: Callable[[], MPI.Request],
        *buffers: Buffer | None,
        spin_ns: int = CROWDED_SPIN_NS,
        receives: bool = False,
        then: Callable[[], None] = lambda: None,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        self._mpi = mpi
        self._spin_ns = spin_ns
        self._status = mpi.Status() if receives else None
        self._buffers = buffers
        self._then = then
        self._look = look
        try:
            self._request = post()
        except mpi.Exception as error:
            raise translated(mpi, error) from None
        self._is_over = False

    def poll(self) -> None:
        # Once only: testing a request that is over would overwrite its status.
        try:
            self._is_over = self._is_over or self._request.Test(self._status)
        except self._mpi.Exception as error:
            raise translated(self._mpi, error) from None

    def wait(self, stalls: StallDetector) -> int:
        def is_over() -> bool:
            return self._is_over or self._request.Test(self._status)

        try:
            poll_until(is_over, stalls, spin_ns=self._spin_ns, look=self._look)
            self._then()
        except self._mpi.Exception as error:
            raise translated(self._mpi, error) from None
        return -1 if self._status is None else self._status.Get_source()


def translated(mpi: Any, error: Any) -> Exception:
    """RankLost for MPI's errors of a lost rank; its other errors stay."""
    lost = [mpi.ERR_PROC_FAILED, mpi.ERR_PROC_FAILED_PENDING, mpi.ERR_REVOKED]
    if survives_failures():
        # Open MPI sometimes says only this of a collective exchange whose other end has just gone.
        lost += [mpi.ERR_OTHER, mpi.ERR_INTERN]
    return RankLost(f"a rank was lost: {one_line(error)}") if error.Get_error_class() in lost else error
