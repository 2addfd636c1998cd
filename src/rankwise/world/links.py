"""What lies between ranks: latency and messages of each pair, and how far their clocks are apart."""

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

SIZES = tuple(2**power for power in range(14, 25))
ENOUGH_S = 0.05
"""Messages grow until one takes this long: on a fast link a small one tells nothing, and on a slow one a
large one takes for ever."""

REPEATS = 4
PASSING, TIMES = 2, 8
"""Messages that pass each other one after the other, as in the sum of two ranks, and how often. The word that
a large message may come waits behind another large one now and then, so that some take twice as long, the
more the longer this goes on: so ranks meet before, as in training, and the mean counts."""


@dataclass(frozen=True)
class Message:
    """Mean times of messages of `bytes`: `one_way_s` in the slower direction, and `both_ways_s` of each of
    two that pass each other, as in an allreduce."""

    bytes: int
    one_way_s: float
    both_ways_s: float


@dataclass(frozen=True)
class Link:
    """What lies between two ranks, the lower one first.

    `latency_s` is half of what 8 bytes take there and back; `messages` are of growing size; the second rank's
    wall clock is `ahead_s` seconds ahead of the first one's, give or take `ahead_error_s`.
    """

    ranks: tuple[int, int]
    latency_s: float
    messages: tuple[Message, ...]
    ahead_s: float
    ahead_error_s: float

    @property
    def bytes_per_s(self) -> float:
        """How fast the largest message was in the slower direction."""
        return self.messages[-1].bytes / self.messages[-1].one_way_s

    @property
    def both_bytes_per_s(self) -> float:
        """How fast each of two such messages was that passed each other."""
        return self.messages[-1].bytes / self.messages[-1].both_ways_s


def measure_links(
    transport: Transport,
    *,
    timer: Callable[[], float] = time.perf_counter,
    wall_ns: Callable[[], int] = time.time_ns,
) -> Iterator[Link]:
    """The links of all pairs, one pair at a time so that none has to share; all ranks go through it."""
    for pair in itertools.combinations(range(transport.size), 2):
        found, times_s = np.zeros(3), np.zeros((len(SIZES), 2))
        if transport.rank in pair:
            low, high = clock_bounds(transport, wall_ns, *pair)
            latency_s, its_times_s = _messages(transport, pair, timer)
            if transport.rank == pair[0]:
                found[:] = latency_s, (low + high) / 2e9, (high - low) / 2e9
                times_s[: len(its_times_s)] = its_times_s
        for array in (found, times_s):
            transport.allreduce(array.reshape(-1), "sum").wait(Watch())
        latency_s, ahead_s, error_s = map(float, found)
        messages = (
            Message(size, float(one_s), float(both_s))
            for size, (one_s, both_s) in zip(SIZES, times_s, strict=True)
            if one_s > 0
        )
        yield Link(pair, latency_s, tuple(messages), ahead_s, error_s)


def _messages(
    transport: Transport, pair: tuple[int, int], timer: Callable[[], float]
) -> tuple[float, list[tuple[float, float]]]:
    """The latency, and times of messages of growing size, one way and both ways; the first rank has them."""
    first, second = pair
    there, back = _Way(transport, first, second, timer), _Way(transport, second, first, timer)
    latency_s, times_s = there.latency_s(), []
    less_s = back.latency_s()
    told = np.zeros(2)  # how long a message takes back, and whether that is enough
    for size in SIZES:
        message = np.zeros(size, np.uint8)
        one_s, told[0] = there.one_way_s(message, latency_s), back.one_way_s(message, less_s)
        both_s = there.passing_s(message)
        there.hand_over(told, back=True)
        one_s = max(one_s, float(told[0]))
        times_s.append((one_s, both_s))
        told[1] = one_s >= ENOUGH_S
        there.hand_over(told)  # the first rank's times decide for both
        if told[1]:
            break
    return latency_s, times_s


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

    def one_way_s(self, message: Buffer, latency_s: float) -> float:
        took_s = statistics.mean(self._there_and_back(message) for _ in range(REPEATS))
        return max(took_s - latency_s, 1e-9)

    def passing_s(self, message: Buffer) -> float:
        took_s = statistics.mean(self._to_each_other(message) for _ in range(TIMES))
        return max(took_s / PASSING, 1e-9)

    def hand_over(self, values: Buffer, *, back: bool = False) -> None:
        """From the source to the destination, or back."""
        ends = (self._dest, self._source) if back else (self._source, self._dest)
        self._pass(values, *ends)

    def _there_and_back(self, message: Buffer) -> float:
        """Seconds from the source's sending to its receiving of 8 bytes in return."""
        started_s = self._timer()
        self._pass(message, self._source, self._dest)
        self._pass(self._answer, self._dest, self._source)
        return self._timer() - started_s

    def _to_each_other(self, message: Buffer) -> float:
        """Seconds until some messages and as many from the other side have passed each other."""
        other = self._dest if self._transport.rank == self._source else self._source
        theirs = np.empty_like(message)
        self._there_and_back(self._answer)
        started_s = self._timer()
        for _ in range(PASSING):
            receiving = self._transport.receive(theirs, other)
            self._transport.send(message, other).wait(Watch())
            receiving.wait(Watch())
        return self._timer() - started_s

    def _pass(self, message: Buffer, source: int, dest: int) -> None:
        if self._transport.rank == source:
            self._transport.send(message, dest).wait(Watch())
        else:
            self._transport.receive(message, source).wait(Watch())
