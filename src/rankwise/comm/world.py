"""One rank's view of all ranks, with its time and its bytes accounted."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rankwise.comm.clock_sync import CommonClock
from rankwise.comm.transport import Buffer, Op, Pending, Transport
from rankwise.errors import RankLost
from rankwise.ledger.exchange_log import Chunk, ExchangeLog, LogRow
from rankwise.ledger.ideal_time import IdealTime
from rankwise.ledger.phases import Ledger
from rankwise.ledger.stalls import StallDetector
from rankwise.ledger.timeline import Timeline
from rankwise.ledger.waits import Pattern, Times

NOTHING = np.empty(0, np.uint8)


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


class Exchange:
    """An exchange that was started and goes on in the background until `wait`."""

    def __init__(self, world: World, pending: Pending, row: LogRow, stalls: StallDetector) -> None:
        self._world = world
        self._pending = pending
        self._row = row
        self._stalls = stalls

    def poll(self) -> None:
        """Let it go on for a moment: MPI works on an exchange in the background only when it is called."""
        with self._world.ledger.phase("transfer"):
            self._pending.poll()

    def wait(self) -> int:
        """Come to its end. Returns the rank whose message was received, else -1. Called once."""
        source = self._world.finish(self._row, lambda: self._pending, self._stalls)
        self._world.under_way.discard(self._pending)
        return source


class World:
    """All ranks as this one sees them.

    Buffers are contiguous numpy arrays of the same shape and dtype on every rank. `stopping` is set
    by whoever wants the run to end (a signal handler); strategies carry it to all ranks with the
    next synchronisation, so that all of them stop at the same point.

    `members` are the numbers that the ranks began with, `number` this one's: they stay when ranks are lost
    and `rank` changes.

    With `survives` the others go on if this rank ends. `in_exchange` is called in each exchange, after
    this rank has begun it and before it is over.

    Once `cross_check` is set, each blocking collective exchange is preceded by a barrier whose time is
    added up in `barrier_wait_ns`: the stopwatch that the logs do without, to check them by.
    """

    def __init__(self, transport: Transport, ledger: Ledger | None = None) -> None:
        self._transport = transport
        self.ledger = ledger or Ledger()
        self.timeline = Timeline(self.ledger)
        self.traffic = Traffic()
        self.stopping = False
        self.rank = self.number = transport.rank
        self.size = transport.size
        self.in_threads = transport.in_threads
        self.cross_check = False
        self.barrier_wait_ns = 0
        self.in_exchange: Callable[[], None] = lambda: None
        self.survives = False
        self._is_new = False
        self._refused = False
        self._clock = CommonClock(transport, self.ledger.clock)
        self._clock.measure()
        self.members = list(range(self.size))
        self.under_way: set[Pending] = set()
        self.exchange_log = ExchangeLog(self.rank, self.size, self.ledger, self.timeline, self._clock)

    def allreduce(self, buffer: Buffer, op: Op = "sum") -> None:
        """Sum (or maximum) over all ranks, element by element, in place."""
        if self.size > 1:
            self._meet()
            self.traffic.sent(buffer.nbytes)
            self.traffic.received(buffer.nbytes)
            row = self.exchange_log.collective(Pattern.ALL_TO_ALL, -1, buffer.nbytes)
            self.finish(row, lambda: self._transport.allreduce(buffer, op))

    def start_allreduce(self, buffer: Buffer, op: Op = "sum") -> Exchange:
        """The same in the background; `buffer` must be left alone until its `wait`."""
        self.traffic.sent(buffer.nbytes)
        self.traffic.received(buffer.nbytes)
        row = self.exchange_log.collective(Pattern.ALL_TO_ALL, -1, buffer.nbytes)
        return self._start(row, lambda: self._transport.allreduce(buffer, op, background=True))

    def gather(self, buffer: Buffer, root: int = 0) -> Buffer | None:
        """All buffers as rows of one array [size, *shape] in rank order on the root; None elsewhere."""
        self._meet()
        into = np.empty((self.size, *buffer.shape), buffer.dtype) if self.rank == root else None
        row = self.exchange_log.collective(Pattern.ALL_TO_ONE, root, buffer.nbytes)
        self.finish(row, lambda: self._transport.gather(buffer, root, into))
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
        row = self.exchange_log.collective(Pattern.ONE_TO_ALL, root, buffer.nbytes)
        self.finish(row, lambda: self._transport.broadcast(buffer, root))
        if self.rank == root:
            self.traffic.sent(buffer.nbytes, self.size - 1)
        else:
            self.traffic.received(buffer.nbytes)

    def send(self, buffer: Buffer, dest: int) -> None:
        """Send to one other rank."""
        self.traffic.sent(buffer.nbytes)
        row = self.exchange_log.send(dest, buffer.nbytes)
        self.finish(row, lambda: self._transport.send(buffer, dest))

    def start_send(self, buffer: Buffer, dest: int) -> Exchange:
        """The same in the background; `buffer` must be left alone until its `wait`."""
        self.traffic.sent(buffer.nbytes)
        row = self.exchange_log.send(dest, buffer.nbytes)
        return self._start(row, lambda: self._transport.send(buffer, dest))

    def receive(self, buffer: Buffer, source: int | None = None) -> int:
        """Overwrite the buffer with the next message from `source`, or from whoever comes first; returns
        whose it is."""
        self.traffic.received(buffer.nbytes)
        row = self.exchange_log.receive(buffer.nbytes)
        return self.finish(row, lambda: self._transport.receive(buffer, source))

    def start_receive(self, buffer: Buffer, source: int | None = None) -> Exchange:
        """The same in the background. Wait for several from one rank in the order in which they started."""
        self.traffic.received(buffer.nbytes)
        row = self.exchange_log.receive(buffer.nbytes)
        return self._start(row, lambda: self._transport.receive(buffer, source))

    def allgather(self, buffer: Buffer) -> Buffer:
        """All buffers as rows of one array [size, *shape] in rank order, on every rank."""
        into = np.empty((self.size, *buffer.shape), buffer.dtype)
        self._meet()
        row = self.exchange_log.collective(Pattern.ALL_TO_ALL, -1, buffer.nbytes)
        self.finish(row, lambda: self._transport.allgather(buffer, into))
        self.traffic.sent(buffer.nbytes, self.size - 1)
        self.traffic.received(buffer.nbytes, self.size - 1)
        return into

    def allgather_object(self, value: Any) -> list[Any]:
        """Every rank's picklable value, in rank order. For set-up and farewell, never for weights."""
        if self.size == 1:
            return [value]
        mine = np.frombuffer(pickle.dumps(value), np.uint8)
        lengths = self.allgather(np.array([len(mine)]))[:, 0]
        rows = self.allgather(np.pad(mine, (0, lengths.max() - len(mine))))
        return [pickle.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]

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

    def set_aside(self, ranks: int) -> None:
        """The ranks from this number on stand by: their `rank` is -1 until `stand_by` has come to its end.
        All ranks together."""
        if ranks >= self.size:
            return
        chunks = self.allgather_object(self.exchange_log.last_chunk())
        self._transport.set_aside(ranks)
        self._count()
        self.members = list(range(ranks))
        if self.rank >= 0:
            clock = CommonClock(self._transport, self.ledger.clock)
            clock.measure()
            self._clock = clock
            self.exchange_log.leave_out(chunks[:ranks], self.members, clock)

    def stand_by(self) -> list[Any] | None:
        """Sleep until this rank has taken the place of one that was lost, or the others are done.

        Returns what `repair` does, with None for this one's standing; or None.
        """
        self._is_new = True

        def alive() -> None:
            self.ledger.enter("other")

        while self._transport.stand_by(alive):
            with self.ledger.phase("recovery"):
                standings = self._regroup(None, fill=True)
            if standings is not None:
                return standings
        return None

    def arrive(self, ideal_time: IdealTime) -> None:
        """This rank, which stood by, is one like the others from now on, and goes on with their ideal
        ideal_time."""
        self._is_new = False
        self.exchange_log.ideal_time = ideal_time

    def repair(self, standing: Any = None, *, fill: bool = True) -> list[Any]:
        """Go on without ranks that were lost; all that are left call it, after an exchange raised RankLost.

        With `fill` ranks that stand by take the places of those that were lost, behind those that are
        left. Each tells its `standing` (picklable); returns those of all, in the order of their new ranks,
        None for those that have just come. `rank`, `size` and `members` are new. If more are lost meanwhile
        it begins again by itself.
        """
        with self.ledger.phase("recovery"):
            self._transport.call_off(self.under_way)
            self.under_way.clear()
            if not self._refused:
                # Others may be asking whether all have come so far: they must not wait for an answer.
                self._transport.agree(False)
            standings = self._regroup(standing, fill=fill)
            assert standings is not None  # it works, so it still does
            return standings

    def _regroup(self, standing: Any, *, fill: bool) -> list[Any] | None:
        """Meet those that are left; returns None if this rank goes on standing by."""
        while True:
            self.members = self._transport.repair(fill=fill)
            self._count()
            if self.rank < 0:
                return None
            clock = CommonClock(self._transport, self.ledger.clock)
            told: list[tuple[bool, Any, Chunk]] = []
            try:
                clock.measure()
                told = self.allgather_object((self._is_new, standing, self.exchange_log.last_chunk()))
            except RankLost:
                pass
            self._refused = not self._transport.agree(bool(told))
            if not self._refused:
                break
            self._transport.call_off(())
        self._clock = clock
        new = [is_new for is_new, _, _ in told]
        self.exchange_log.leave_out([chunk for _, _, chunk in told], self.members, clock, new)
        return [None if is_new else its for is_new, its, _ in told]

    def confirm(self, so_far: bool = True) -> None:
        """All ranks have come so far. If one has not, or was lost, it raises RankLost on all."""
        with self.ledger.phase("recovery"):
            self._refused = not self._transport.agree(so_far)
            if self._refused:
                raise RankLost("a rank was lost")

    def _count(self) -> None:
        self.rank, self.size = self._transport.rank, self._transport.size

    def describe(self) -> str:
        """The library behind this world, with its version."""
        return self._transport.describe()

    def abort(self, code: int) -> None:
        """End all ranks at once."""
        self._transport.abort(code)

    def close(self) -> None:
        """Leave in good order, all ranks together."""
        self._transport.close()

    @property
    def hosts(self) -> list[list[int]]:
        """The ranks of each host, the host of rank 0 first."""
        host_of = self._transport.host_of
        return [[rank for rank, its in enumerate(host_of) if its == first] for first in sorted({*host_of})]

    def since_start(self, times_ns: Times) -> Times:
        """Times of this rank's clock in ns since the start of rank 0's process."""
        return self._clock.to_common(times_ns) - self.exchange_log.origin_ns

    @property
    def clock_error_ns(self) -> int:
        """How far apart the clocks of different ranks may be after translation."""
        return self._clock.error_bound_ns

    def reconcile(self) -> None:
        """Tell waiting from transfer in all exchanges since the last time; all ranks together.

        Until then an exchange counts as transfer as a whole. What is found out is in `exchange_log`.
        """
        traffic = replace(self.traffic)
        if self._clock.several:
            self.barrier()  # whoever is late is waited for here, where it counts, and not in the measurement
        with self.ledger.phase("instrument"):
            self._clock.measure()
            self.exchange_log.compare(self.allgather_object(self.exchange_log.chunk()))
        self.traffic = traffic  # which is the program's, and not what it took to account for it

    def _meet(self) -> None:
        """Comes before every blocking collective exchange: where ranks must meet anyway."""
        if self.exchange_log.due:
            self.reconcile()
        if self.cross_check:
            started_ns = self.ledger.clock()
            token = np.zeros(1)
            row = self.exchange_log.collective(Pattern.ALL_TO_ALL, -1, token.nbytes)
            self.finish(row, lambda: self._transport.allreduce(token, "max"))
            self.barrier_wait_ns += self.ledger.clock() - started_ns

    def _start(self, row: LogRow, start: Callable[[], Pending]) -> Exchange:
        ledger = self.ledger
        with ledger.phase("transfer"):
            stalls = StallDetector(ledger.clock, ledger.cpu_clock, (ledger.mark_ns, ledger.cpu_mark_ns))
            self.exchange_log.post(row)
            pending = start()
        stalls.judge(ledger.mark_ns, ledger.cpu_mark_ns)
        self.under_way.add(pending)
        return Exchange(self, pending, row, stalls)

    def finish(self, row: LogRow, start: Callable[[], Pending], stalls: StallDetector | None = None) -> int:
        """Come to the end of an exchange, which `start` gives, in phase transfer. Returns whose message came,
        or -1.

        The stall detector goes from the ledger's one reading of the clocks to the other, so that no stop of
        this rank falls between them.
        """
        ledger, exchange_log = self.ledger, self.exchange_log
        before = ledger.enter("transfer")
        began = ledger.mark_ns, ledger.cpu_mark_ns
        if stalls is None:
            stalls = StallDetector(ledger.clock, ledger.cpu_clock, began)
        else:
            stalls.begin(*began)
        exchange_log.enter(row)
        try:
            pending = start()
            self.in_exchange()
            source = pending.wait(stalls)
        except BaseException as error:
            ledger.enter(before)
            if isinstance(error, RankLost):
                exchange_log.fail(row)
            raise
        ledger.enter(before)
        stalls.judge(ledger.mark_ns, ledger.cpu_mark_ns)
        exchange_log.leave(row, source, stalls.stall)
        return source
