"""What ranks exchange: each exchange is logged, and its payload counted."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from rankwise.comm.clock_sync import CommonClock
from rankwise.comm.transport import Buffer, Op, Pending, Transport
from rankwise.ledger.exchange_log import ExchangeLog, OpenExchange
from rankwise.ledger.phases import Ledger
from rankwise.ledger.regions import collect_in
from rankwise.ledger.shares import Asks, Collect, Give, Highest, Swap, Take
from rankwise.ledger.stalls import NO_STALLS
from rankwise.ledger.timeline import Timeline
from rankwise.ledger.waits import Pattern, Times

NOTHING = np.empty(0, np.uint8)

MANY_RANKS = 16
"""Ranks from which on each compares a share of the logs. A few have all of them with fewer exchanges."""

REPLAY_TAG = 2
"""Keeps the numbers of a replay apart from the program's messages, and from those of clocks."""


def nothing_owed() -> None:
    """A rank owes the others nothing."""


def raising(error: BaseException) -> Callable[[], None]:
    """What a rank owes that has met an error where nobody could hear of it: to raise it."""

    def owed() -> None:
        raise error

    return owed


@dataclass
class Traffic:
    """Payload that this rank handed to the transport and took from it (not what a library adds)."""

    bytes_sent: int = 0
    bytes_received: int = 0
    messages_sent: int = 0
    messages_received: int = 0

    def sent(self, size: int, messages: int = 1) -> None:
        """Count messages of `size` bytes each that left this rank."""
        self.bytes_sent += size * messages
        self.messages_sent += messages

    def received(self, size: int, messages: int = 1) -> None:
        """Count messages of `size` bytes each that came to this rank."""
        self.bytes_received += size * messages
        self.messages_received += messages


class BackgroundExchange:
    """An exchange that was started and goes on in the background until `wait`."""

    def __init__(self, exchanges: Exchanges, logged: OpenExchange, pending: Pending) -> None:
        self._exchanges = exchanges
        self._logged = logged
        self._pending = pending

    def poll(self) -> None:
        """Let it go on for a moment: MPI works on an exchange in the background only when it is called."""
        with self._logged.beside():
            self._pending.poll()

    def wait(self) -> int:
        """Come to its end; called once. Returns the rank whose message was received, else -1. Raises
        RankLost."""
        source = self._exchanges.finish(self._logged, lambda: self._pending)
        self._exchanges.under_way.discard(self._pending)
        return source


class Exchanges:
    """The exchanges of one rank with the others. Each of them may raise RankLost.

    `size` is the number of ranks that work, `rank` this one's place among them, -1 while it stands by.
    Buffers are contiguous numpy arrays of the same shape and dtype on every rank. `traffic` counts what the
    program exchanges, `overhead` what it takes to account for that.

    What a rank has still to do with the others, or an error that could not be raised where it was found, is
    `owed` before its next collective exchange.

    Once `cross_check` is set, each blocking collective exchange is preceded by a barrier whose time is
    added up in `barrier_wait_ns`: a stopwatch to check the logs by, which do without one.
    """

    def __init__(self, transport: Transport, ledger: Ledger) -> None:
        self._transport = transport
        self._take_place()
        self.ledger = ledger
        self.timeline = Timeline(ledger)
        self.traffic, self.overhead = Traffic(), Traffic()
        self.owed: Callable[[], None] = nothing_owed
        self.cross_check = False
        self.barrier_wait_ns = 0
        self._in_exchange: Callable[[], None] = lambda: None
        self.under_way: set[Pending] = set()
        self._clock = self._measured_clock()
        self.exchange_log = ExchangeLog(self.rank, self.size, ledger, self.timeline, self._clock)
        collect_in(self.exchange_log.regions)

    def allreduce(self, buffer: Buffer, op: Op = "sum") -> None:
        """Sum (or maximum) over all ranks, element by element, in place."""
        if self.size > 1:
            self._meet()
            self.traffic.sent(buffer.nbytes)
            self.traffic.received(buffer.nbytes)
            logged = self.exchange_log.open(Pattern.ALL_TO_ALL, -1, buffer.nbytes)
            self.finish(logged, lambda: self._transport.allreduce(buffer, op))

    def start_allreduce(self, buffer: Buffer, op: Op = "sum") -> BackgroundExchange:
        """The same in the background; `buffer` must be left alone until its `wait`."""
        self.traffic.sent(buffer.nbytes)
        self.traffic.received(buffer.nbytes)
        logged = self.exchange_log.open(Pattern.ALL_TO_ALL, -1, buffer.nbytes)
        return self._start(logged, lambda: self._transport.allreduce(buffer, op, background=True))

    def gather(self, buffer: Buffer, root: int = 0) -> Buffer | None:
        """All buffers as rows of one array [size, *shape] in rank order on the root; None elsewhere."""
        self._meet()
        into = np.empty((self.size, *buffer.shape), buffer.dtype) if self.rank == root else None
        logged = self.exchange_log.open(Pattern.ALL_TO_ONE, root, buffer.nbytes)
        self.finish(logged, lambda: self._transport.gather(buffer, root, into))
        if self.rank == root:
            self.traffic.received(buffer.nbytes, self.size - 1)
        else:
            self.traffic.sent(buffer.nbytes)
        return into

    def broadcast(self, buffer: Buffer, root: int = 0) -> None:
        """Overwrite the buffer of every rank with the root's."""
        if self.size == 1:
            return
        self._meet()
        logged = self.exchange_log.open(Pattern.ONE_TO_ALL, root, buffer.nbytes)
        self.finish(logged, lambda: self._transport.broadcast(buffer, root))
        if self.rank == root:
            self.traffic.sent(buffer.nbytes, self.size - 1)
        else:
            self.traffic.received(buffer.nbytes)

    def send(self, buffer: Buffer, dest: int) -> None:
        """Send to one other rank."""
        self.traffic.sent(buffer.nbytes)
        logged = self.exchange_log.open(Pattern.SEND, dest, buffer.nbytes)
        self.finish(logged, lambda: self._transport.send(buffer, dest))

    def start_send(self, buffer: Buffer, dest: int) -> BackgroundExchange:
        """The same in the background; `buffer` must be left alone until its `wait`."""
        self.traffic.sent(buffer.nbytes)
        logged = self.exchange_log.open(Pattern.SEND, dest, buffer.nbytes)
        return self._start(logged, lambda: self._transport.send(buffer, dest))

    def receive(self, buffer: Buffer, source: int | None = None, *, owing: Sequence[int] = ()) -> int:
        """Overwrite the buffer with the next message from `source`, by default from the rank whose message
        comes first; returns that rank. Raises OutOfStepError if the programs of all that could send one have
        ended, or that of any rank still `owing` one."""
        self.traffic.received(buffer.nbytes)
        logged = self.exchange_log.open(Pattern.RECEIVE, 0, buffer.nbytes)
        return self.finish(logged, lambda: self._transport.receive(buffer, source, owing=owing))

    def start_receive(self, buffer: Buffer, source: int | None = None) -> BackgroundExchange:
        """The same in the background. Wait for several from one rank in the order in which they started."""
        self.traffic.received(buffer.nbytes)
        logged = self.exchange_log.open(Pattern.RECEIVE, 0, buffer.nbytes)
        return self._start(logged, lambda: self._transport.receive(buffer, source))

    def settle(self) -> None:
        """Do what is owed, once."""
        owed, self.owed = self.owed, nothing_owed
        owed()

    def _before(self) -> None:
        """Comes before each collective exchange of the program: what is owed, and logs that are full."""
        self.settle()
        if self.exchange_log.due:
            self.reconcile()

    def allgather(self, buffer: Buffer) -> Buffer:
        """All buffers as rows of one array [size, *shape] in rank order, on every rank."""
        self._before()
        return self._allgather(buffer, self.traffic)

    def allgather_object(self, value: Any) -> list[Any]:
        """Every rank's picklable value, in rank order. For set-up and farewell, never for weights."""
        self._before()
        return self._allgather_object(value, self.traffic)

    @contextmanager
    def at_each_exchange(self, action: Callable[[], None]) -> Iterator[None]:
        """Inside, `action` is called in each exchange, after this rank has begun it and before it is over."""
        before, self._in_exchange = self._in_exchange, action
        try:
            yield
        finally:
            self._in_exchange = before

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.allgather_object(None)

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """The root's picklable value, on every rank. For newcomers, never for what is trained."""
        mine = np.frombuffer(pickle.dumps(value), np.uint8) if self.rank == root else NOTHING
        length = np.array([len(mine)])
        self.broadcast(length, root)
        content = mine.copy() if self.rank == root else np.empty(length[0], np.uint8)
        self.broadcast(content, root)
        return value if self.rank == root else pickle.loads(content.tobytes())

    def reconcile(self) -> None:
        """Find out what was waiting in all exchanges since the last time; all ranks together.

        Until then an exchange counts as transfer as a whole. What is found out is in `exchange_log`. What
        this exchanges itself is logged, and counted in `overhead`.
        """
        if self._clock.several:
            # A late rank is waited for here, where it counts, and not in the measurement.
            self._allgather_object(None, self.overhead)
        with self.ledger.phase("instrument"):
            self._clock.measure()
            chunk = self.exchange_log.chunk()
            if self.size < MANY_RANKS:
                self.exchange_log.compare(self._allgather_object(chunk, self.overhead))
                return
            standings = self._allgather(chunk.standing, self.overhead)
            self._go_through(self.exchange_log.compare_shares(chunk, standings))

    def since_start(self, times_ns: Times) -> Times:
        """Times of this rank's clock in ns since the start of rank 0's process."""
        return self._clock.to_common(times_ns) - self.exchange_log.origin_ns

    @property
    def clock_error_ns(self) -> int:
        """How far apart the clocks of different ranks may be after translation."""
        return self._clock.error_bound_ns

    def finish(self, logged: OpenExchange, start: Callable[[], Pending]) -> int:
        """Come to the end of an exchange, which `start` returns. Returns the rank whose message was received,
        else -1."""
        with logged as exchange:
            pending = start()
            self._in_exchange()
            exchange.source = pending.wait(exchange.stalls)
        return exchange.source

    def _take_place(self) -> None:
        self.rank, self.size = self._transport.rank, self._transport.size

    def _start(self, logged: OpenExchange, start: Callable[[], Pending]) -> BackgroundExchange:
        with logged.beside():
            pending = start()
        self.under_way.add(pending)
        return BackgroundExchange(self, logged, pending)

    def _allgather(self, buffer: Buffer, traffic: Traffic) -> Buffer:
        if self.cross_check:
            self._cross_check()
        into = np.empty((self.size, *buffer.shape), buffer.dtype)
        logged = self.exchange_log.open(Pattern.ALL_TO_ALL, -1, buffer.nbytes)
        self.finish(logged, lambda: self._transport.allgather(buffer, into))
        traffic.sent(buffer.nbytes, self.size - 1)
        traffic.received(buffer.nbytes, self.size - 1)
        return into

    def _allgather_object(self, value: Any, traffic: Traffic) -> list[Any]:
        if self.size == 1:
            return [value]
        mine = np.frombuffer(pickle.dumps(value), np.uint8)
        lengths = self._allgather(np.array([len(mine)]), traffic)[:, 0]
        rows = self._allgather(np.pad(mine, (0, lengths.max() - len(mine))), traffic)
        return [pickle.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]

    def _go_through(self, asks: Asks) -> Any:
        """Hand the other ranks what each of them asks for; returns what this one has then."""
        answer: Any = None
        given: list[Pending] = []
        while True:
            try:
                asked = asks.send(answer)
            except StopIteration as ending:
                for pending in given:
                    pending.wait(NO_STALLS)
                    self.under_way.discard(pending)
                return ending.value
            match asked:
                case Give(to, value):  # one for each message of the program: too many for the log
                    given.append(self._transport.send(np.array([value]), to, REPLAY_TAG))
                    self.under_way.add(given[-1])
                    answer = None
                    continue
                case Take(source):
                    number = np.empty(1, np.int64)
                    self._transport.receive(number, source, REPLAY_TAG).wait(NO_STALLS)
                    answer = int(number[0])
                    continue
                case Swap(rows, counts, counts_in):
                    answer = np.empty(counts_in.sum(), rows.dtype)
                    start = partial(self._transport.swap, rows, counts, answer, counts_in)
                case Highest(values):
                    answer = values
                    start = partial(self._transport.allreduce, answer, "max")
                case Collect(values):
                    answer = np.empty((self.size, *values.shape), values.dtype)
                    start = partial(self._transport.allgather, values, answer)
            self.finish(self.exchange_log.open(Pattern.ALL_TO_ALL, -1, answer.nbytes), start)
            self.overhead.sent(answer.nbytes)
            self.overhead.received(answer.nbytes)

    def _meet(self) -> None:
        """Comes before every blocking collective exchange of the program: where ranks must meet anyway."""
        self._before()
        if self.cross_check:
            self._cross_check()

    def _cross_check(self) -> None:
        started_ns = self.ledger.clock()
        token = np.zeros(1)
        logged = self.exchange_log.open(Pattern.ALL_TO_ALL, -1, token.nbytes)
        self.finish(logged, lambda: self._transport.allreduce(token, "max"))
        self.barrier_wait_ns += self.ledger.clock() - started_ns

    def _measured_clock(self) -> CommonClock:
        clock = CommonClock(self._transport, self.ledger.clock)
        clock.measure()
        return clock
