"""One clock for all ranks, where hosts have clocks of their own.

Offsets are bounded by ping-pongs as in SKaMPI (Worsch, Reussner, Augustin 2002): if rank 0 sends at s1,
the other host reads c, and rank 0 has the answer at s2, then its clock is ahead by at least c - s2 and
at most c - s1. The tightest bounds of several rounds are taken; the offset is their midpoint and its
error at most half their width; between two hosts other than rank 0's the errors of both add up. Between
two measurements a clock is taken to drift evenly.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rankwise.comm.transport import Transport
from rankwise.ledger.stalls import NO_STALLS
from rankwise.ledger.waits import Times

ROUNDS = 16

CLOCK_TAG = 1
"""Keeps ping-pongs apart from the program's messages, which have tag 0."""


class CommonClock:
    """Translates this rank's clock to rank 0's. Where all ranks read one clock it changes nothing.

    `error_bound_ns` is how far apart two ranks may be after it, in the worst measurement.
    """

    def __init__(self, transport: Transport, clock: Callable[[], int]) -> None:
        self._transport = transport
        self._clock = clock
        self._leaders = sorted({leader for leader in transport.clock_of if leader != 0})
        self._readings: list[tuple[int, int]] = []
        self.error_bound_ns = 0

    @property
    def readings(self) -> list[tuple[int, int]]:
        """When this rank's clock was read, on itself, and how far it was ahead of rank 0's; in ns."""
        return self._readings

    @property
    def several(self) -> bool:
        """Whether ranks read different clocks."""
        return bool(self._leaders)

    def measure(self) -> None:
        """Measure the offset to rank 0 now; all ranks together, and they should come at one time."""
        if not self.several:
            return
        mine = self._transport.rank
        bounds = np.zeros((len(self._leaders), 2), np.int64)
        for place, leader in enumerate(self._leaders):
            if mine in (0, leader):
                bounds[place] = clock_bounds(self._transport, self._clock, 0, leader)
        self._transport.broadcast(bounds, 0).wait(NO_STALLS)
        middles = dict(zip(self._leaders, bounds.sum(axis=1) // 2, strict=True))
        self._readings.append((self._clock(), int(middles.get(self._transport.clock_of[mine], 0))))
        errors = np.sort((bounds[:, 1] - bounds[:, 0] + 1) // 2)
        self.error_bound_ns = max(self.error_bound_ns, int(errors[-2:].sum()))

    def to_common(self, times_ns: Times) -> Times:
        """Times of this rank's clock on rank 0's."""
        if not self._readings:
            return times_ns
        # Relative to the first reading, so that a float's 53 bits are enough.
        at, offset = np.array(self._readings, np.int64).T
        ahead = np.interp(times_ns - at[0], at - at[0], offset - offset[0])
        return np.asarray(times_ns - offset[0] - np.rint(ahead).astype(np.int64))


def clock_bounds(
    transport: Transport, clock_ns: Callable[[], int], reference: int, other: int
) -> tuple[int, int]:
    """Bounds in ns on how far the other rank's clock is ahead of the reference rank's. Both call it; only the
    reference rank's result means anything."""
    low, high = -(2**62), 2**62
    reading = np.zeros(1, np.int64)
    for _ in range(ROUNDS):
        if transport.rank == reference:
            sent_ns = clock_ns()
            transport.send(reading, other, CLOCK_TAG).wait(NO_STALLS)
            transport.receive(reading, other, CLOCK_TAG).wait(NO_STALLS)
            low, high = max(low, int(reading[0]) - clock_ns()), min(high, int(reading[0]) - sent_ns)
        else:
            transport.receive(reading, reference, CLOCK_TAG).wait(NO_STALLS)
            reading[0] = clock_ns()
            transport.send(reading, reference, CLOCK_TAG).wait(NO_STALLS)
    return low, high
