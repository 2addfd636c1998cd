"""What lies between ranks: latency and messages of each pair, and how far their clocks are apart."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from rankwise.comm.clock_sync import clock_bounds
from rankwise.comm.transport import Buffer, Transport
from rankwise.ledger.stalls import NO_STALLS

ROUNDS = 50
"""Messages of 8 bytes there and back, of which the median counts."""

SIZES = tuple(2**power for power in range(14, 25))
ENOUGH_S = 0.05
"""Messages grow until one takes this long: on a fast link a small one shows nothing, and on a slow one a
large one takes for ever."""

REPEATS = 4
PASSING, MEETINGS = 2, 8
"""Messages that pass each other one after the other, as in the sum of two ranks, after each of so many
meetings. The word that a large message may come waits behind another large one now and then, so that some
take twice as long, the more the longer this goes on: so ranks meet before, as in training, and the mean
counts."""


MOST_RANKS = 16
"""Ranks of which all pairs are measured."""


def pairs_of(ranks: int) -> list[tuple[int, int]]:
    """The pairs whose links are measured: all of a few ranks, of many those a power of two apart, by which
    sums over all ranks go."""
    pairs = itertools.combinations(range(ranks), 2)
    if ranks <= MOST_RANKS:
        return [*pairs]
    return [(first, second) for first, second in pairs if (second - first).bit_count() == 1]


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
    """The links of pairs of ranks (`pairs_of`), one at a time so that none has to share; all ranks go through
    it."""
    for pair in pairs_of(transport.size):
        found = np.zeros(3 + 2 * len(SIZES))
        times_s = found[3:].reshape(-1, 2)  # a view, so that all goes in one exchange
        if transport.rank in pair:
            low, high = clock_bounds(transport, wall_ns, *pair)
            latency_s, its_times_s = _messages(transport, pair, timer)
            if transport.rank == pair[0]:
                found[:3] = latency_s, (low + high) / 2e9, (high - low) / 2e9
                times_s[: len(its_times_s)] = its_times_s
        transport.allreduce(found, "sum").wait(NO_STALLS)
        latency_s, ahead_s, error_s = map(float, found[:3])
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
    shared = np.zeros(2)  # how long a message takes back, and whether that is enough
    for size in SIZES:
        message = np.zeros(size, np.uint8)
        there_s, shared[0] = there.answered_s(message), back.answered_s(message)
        both_s = there.passing_s(message)
        back.hand_over(shared)
        one_s = max(there_s - latency_s, float(shared[0]) - latency_s, 1e-9)
        times_s.append((one_s, both_s))
        shared[1] = one_s >= ENOUGH_S
        there.hand_over(shared)  # the first rank's times decide for both
        if shared[1]:
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

    def answered_s(self, message: Buffer) -> float:
        return statistics.mean(self._there_and_back(message) for _ in range(REPEATS))

    def passing_s(self, message: Buffer) -> float:
        return max(statistics.mean(self._to_each_other(message) for _ in range(MEETINGS)) / PASSING, 1e-9)

    def hand_over(self, values: Buffer) -> None:
        self._pass(values, self._source, self._dest)

    def _there_and_back(self, message: Buffer) -> float:
        """Seconds from the source's sending to its receiving of 8 bytes in return."""
        started_s = self._timer()
        self.hand_over(message)
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
            self._transport.send(message, other).wait(NO_STALLS)
            receiving.wait(NO_STALLS)
        return self._timer() - started_s

    def _pass(self, message: Buffer, source: int, dest: int) -> None:
        if self._transport.rank == source:
            self._transport.send(message, dest).wait(NO_STALLS)
        else:
            self._transport.receive(message, source).wait(NO_STALLS)
