"""What lies between ranks: latency and bandwidth of each pair, and how far their clocks are apart."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from rankwise.world.clocks import clock_bounds
from rankwise.world.transport import Buffer, Transport
from rankwise.world.watch import Watch

ROUNDS = 50
"""Messages of 8 bytes there and back, of which the median counts."""

FIRST_BYTES, MOST_BYTES = 2**16, 2**24
ENOUGH_S = 0.05
"""Messages grow until one takes this long, or is the largest: on a fast link a small one tells nothing, and
on a slow one a large one takes for ever."""

REPEATS = 3


@dataclass(frozen=True)
class Link:
    """What lies between two ranks, the lower one first.

    `latency_s` is half of what 8 bytes take there and back; `bytes_per_s` is how fast one large message is in
    the slower direction, `both_bytes_per_s` how fast each of two is that pass each other, as in an allreduce;
    the second rank's wall clock is `ahead_s` seconds ahead of the first one's, give or take `ahead_error_s`.
    """

    ranks: tuple[int, int]
    latency_s: float
    bytes_per_s: float
    both_bytes_per_s: float
    ahead_s: float
    ahead_error_s: float


def measure_links(
    transport: Transport,
    *,
    timer: Callable[[], float] = time.perf_counter,
    wall_ns: Callable[[], int] = time.time_ns,
) -> Iterator[Link]:
    """The links of all pairs, one pair at a time so that none has to share; all ranks go through it."""
    for pair in itertools.combinations(range(transport.size), 2):
        found = np.zeros(6)
        if transport.rank in pair:
            first, second = pair
            low, high = clock_bounds(transport, wall_ns, first, second)
            there, back = _Way(transport, first, second, timer), _Way(transport, second, first, timer)
            latency_s, there_per_s, back_per_s = there.latency_s(), there.bytes_per_s(), back.bytes_per_s()
            both_per_s = there.both_bytes_per_s(latency_s)
            if transport.rank == first:
                found[:5] = latency_s, (low + high) / 2e9, (high - low) / 2e9, there_per_s, both_per_s
            else:
                found[5] = back_per_s
        transport.allreduce(found, "sum").wait(Watch())
        latency_s, ahead_s, error_s, there_per_s, both_per_s, back_per_s = map(float, found)
        yield Link(pair, latency_s, min(there_per_s, back_per_s), both_per_s, ahead_s, error_s)


class _Way:
    """Times messages from one rank to another; both call the same, and the source has the times."""

    def __init__(self, transport: Transport, source: int, dest: int, timer: Callable[[], float]) -> None:
        self._transport = transport
        self._source, self._dest = source, dest
        self._timer = timer
        self._answer = np.zeros(1)

    def latency_s(self) -> float:
        message = np.zeros(1)
        self._there_and_back(message)  # the first one makes the connection
        return statistics.median(self._there_and_back(message) for _ in range(ROUNDS)) / 2

    def bytes_per_s(self) -> float:
        back_s = statistics.median(self._there_and_back(np.zeros(1)) for _ in range(REPEATS)) / 2
        return self._of_a_large_message(self._there_and_back, back_s)

    def both_bytes_per_s(self, latency_s: float) -> float:
        return self._of_a_large_message(self._to_each_other, latency_s)

    def _of_a_large_message(self, exchange: Callable[[Buffer], float], less_s: float) -> float:
        """Bytes a second of a message that takes long enough, of whose time `less_s` is no bandwidth's."""
        size = FIRST_BYTES
        while True:
            message = np.zeros(size, np.uint8)
            took_s = statistics.median(exchange(message) for _ in range(REPEATS)) - less_s
            self._answer[0] = took_s >= ENOUGH_S or size >= MOST_BYTES
            self._pass(self._answer, self._source, self._dest)  # the source's times decide for both
            if self._answer[0]:
                return size / max(took_s, 1e-9)
            size *= 2

    def _there_and_back(self, message: Buffer) -> float:
        """Seconds from the source's sending to its receiving of 8 bytes in return."""
        started_s = self._timer()
        self._pass(message, self._source, self._dest)
        self._pass(self._answer, self._dest, self._source)
        return self._timer() - started_s

    def _to_each_other(self, message: Buffer) -> float:
        """Seconds until a message and one as large from the other side have passed each other."""
        started_s = self._timer()
        other = self._dest if self._transport.rank == self._source else self._source
        receiving = self._transport.receive(np.empty_like(message), other)
        self._transport.send(message, other).wait(Watch())
        receiving.wait(Watch())
        return self._timer() - started_s

    def _pass(self, message: Buffer, source: int, dest: int) -> None:
        if self._transport.rank == source:
            self._transport.send(message, dest).wait(Watch())
        else:
            self._transport.receive(message, source).wait(Watch())
