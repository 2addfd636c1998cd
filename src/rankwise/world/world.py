"""One rank's view of all ranks, with its time and its bytes accounted."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankwise.ledger import Ledger
from rankwise.timeline import EXCHANGE, Timeline
from rankwise.world.clocks import CommonClock
from rankwise.world.replay import Replay
from rankwise.world.transport import Buffer, Op, Pending, Transport
from rankwise.world.waits import (
    ENTRY,
    TIMES,
    Log,
    Pattern,
    Split,
    Times,
    split,
    split_messages,
    violations,
)

SETTLE_AFTER = 4096
"""Collective exchanges after which ranks compare their logs at the latest; bounds the memory of a log."""


_COLUMNS = ENTRY.names or ()

Entry = dict[str, int]
"""A row of ENTRY that is being filled."""


@dataclass
class Traffic:
    """Payload that this rank handed to the transport and took from it (not what a library adds)."""

    bytes_sent: int = 0
    bytes_received: int = 0
    messages_sent: int = 0

    def add(self, *, sent: int, received: int, messages: int) -> None:
        """Count one exchange."""
        self.bytes_sent += sent
        self.bytes_received += received
        self.messages_sent += messages


class Exchange:
    """An exchange that was started and goes on in the background until `wait`."""

    def __init__(self, world: World, pending: Pending, entry: Entry) -> None:
        self._world = world
        self._pending = pending
        self._entry = entry

    def wait(self) -> int:
        """Come to its end. Returns the rank whose message was received, else -1. Called once."""
        return self._world._exchange(self._entry, lambda: self._pending)


class World:
    """All ranks as this one sees them.

    Buffers are contiguous numpy arrays of the same shape and dtype on every rank. `stopping` is set
    by whoever wants the run to end (a signal handler); strategies carry it to all ranks with the
    next synchronisation, so that all of them stop at the same point.

    Once `cross_check` is set, each blocking collective exchange is preceded by a barrier whose time is
    added up in `barrier_wait_ns`: the stopwatch that the logs do without, to check them by.
    """

    def __init__(self, transport: Transport, ledger: Ledger | None = None) -> None:
        self._transport = transport
        self.ledger = ledger or Ledger()
        self.timeline = Timeline(self.ledger)
        self.traffic = Traffic()
        self.stopping = False
        self.rank = transport.rank
        self.size = transport.size
        self.cross_check = False
        self.barrier_wait_ns = 0
        self.wait_on_ns: Counter[int] = Counter()
        self.hidden_ns = 0
        self.clock_violations = 0
        self.origin_ns = self.ledger.start_ns
        self._clock = CommonClock(transport, self.ledger.clock)
        self._replay = Replay(self.size)
        self._log: list[Entry] = []
        self._messages: list[Entry] = []
        self._collectives = self._settled = 0
        self._unreceived: dict[tuple[int, int, int], Log] = {}
        self._sent_to: Counter[int] = Counter()
        self._received_from: Counter[int] = Counter()

    def allreduce(self, buffer: Buffer, op: Op = "sum") -> None:
        """Sum (or maximum) over all ranks, element by element, in place."""
        if self.size > 1:
            self._meet()
            self.traffic.add(sent=buffer.nbytes, received=buffer.nbytes, messages=1)
            entry = self._collective(Pattern.ALL_TO_ALL, -1, buffer)
            self._exchange(entry, lambda: self._transport.allreduce(buffer, op))

    def start_allreduce(self, buffer: Buffer, op: Op = "sum") -> Exchange:
        """The same in the background; `buffer` must be left alone until its `wait`."""
        self.traffic.add(sent=buffer.nbytes, received=buffer.nbytes, messages=1)
        entry = self._collective(Pattern.ALL_TO_ALL, -1, buffer)
        return self._start(entry, lambda: self._transport.allreduce(buffer, op))

    def gather(self, buffer: Buffer, root: int = 0) -> Buffer | None:
        """All buffers as rows of one array [size, *shape] in rank order on the root; None elsewhere."""
        self._meet()
        into = np.empty((self.size, *buffer.shape), buffer.dtype) if self.rank == root else None
        entry = self._collective(Pattern.ALL_TO_ONE, root, buffer)
        self._exchange(entry, lambda: self._transport.gather(buffer, root, into))
        others = (self.size - 1) * buffer.nbytes
        if self.rank == root:
            self.traffic.add(sent=0, received=others, messages=0)
        else:
            self.traffic.add(sent=buffer.nbytes, received=0, messages=1)
        return into

    def broadcast(self, buffer: Buffer, root: int = 0) -> None:
        """Overwrite the buffer of every rank with the root's."""
        if self.size == 1:
            return
        self._meet()
        entry = self._collective(Pattern.ONE_TO_ALL, root, buffer)
        self._exchange(entry, lambda: self._transport.broadcast(buffer, root))
        others = (self.size - 1) * buffer.nbytes
        if self.rank == root:
            self.traffic.add(sent=others, received=0, messages=self.size - 1)
        else:
            self.traffic.add(sent=0, received=buffer.nbytes, messages=0)

    def send(self, buffer: Buffer, dest: int) -> None:
        """Send to one other rank."""
        self._exchange(self._outgoing(buffer, dest), lambda: self._transport.send(buffer, dest))

    def start_send(self, buffer: Buffer, dest: int) -> Exchange:
        """The same in the background; `buffer` must be left alone until its `wait`."""
        return self._start(self._outgoing(buffer, dest), lambda: self._transport.send(buffer, dest))

    def receive(self, buffer: Buffer, source: int | None = None) -> int:
        """Overwrite the buffer with the next message from `source`, or from whoever comes first; returns
        whose it is."""
        return self._exchange(self._incoming(buffer), lambda: self._transport.receive(buffer, source))

    def start_receive(self, buffer: Buffer, source: int | None = None) -> Exchange:
        """The same in the background. Wait for several from one rank in the order in which they started."""
        return self._start(self._incoming(buffer), lambda: self._transport.receive(buffer, source))

    def allgather(self, buffer: Buffer) -> Buffer:
        """All buffers as rows of one array [size, *shape] in rank order, on every rank."""
        into = np.empty((self.size, *buffer.shape), buffer.dtype)
        self._meet()
        entry = self._collective(Pattern.ALL_TO_ALL, -1, buffer)
        self._exchange(entry, lambda: self._transport.allgather(buffer, into))
        others = (self.size - 1) * buffer.nbytes
        self.traffic.add(sent=buffer.nbytes, received=others, messages=1)
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

    def describe(self) -> str:
        """The library behind this world, with its version."""
        return self._transport.describe()

    def abort(self, code: int) -> None:
        """End all ranks at once."""
        self._transport.abort(code)

    def close(self) -> None:
        """Leave in good order, all ranks together."""
        self._transport.close()

    def since_start(self, times_ns: Times) -> Times:
        """Times of this rank's clock in ns since the start of rank 0's process."""
        return self._clock.to_common(times_ns) - self.origin_ns

    @property
    def clock_error_ns(self) -> int:
        """How far apart the clocks of different ranks may be after translation."""
        return self._clock.error_bound_ns

    @property
    def ideal_ns(self) -> int:
        """Time since start-up until now, had exchanges taken none but been waited for all the same."""
        return self._replay.ideal_ns(self.rank, self.ledger.busy_ns)

    def settle(self) -> None:
        """Tell waiting from transfer in all exchanges since the last time; all ranks together.

        Until then an exchange counts as transfer as a whole. `wait_on_ns` has the waiting by the rank
        that was waited for.
        """
        if self.size == 1:
            self._log.clear()
            return
        self._settled = self._collectives
        with self.ledger.phase("instrument"):
            self._clock.measure()
            finished = [entry for entry in self._messages if entry["left_ns"]]
            self._messages = [entry for entry in self._messages if not entry["left_ns"]]
            unfinished = (number for number, entry in enumerate(self._log) if not entry["left_ns"])
            own = _table(self._log[: next(unfinished, None)])
            own_messages = _table(finished)
            start_ns = np.array([self.ledger.start_ns])
            mine = [self._on_common_clock(own), self._on_common_clock(own_messages)]
            told = (*mine, self._clock.to_common(start_ns)[0])
        parts = self.allgather_object(told)
        with self.ledger.phase("instrument"):
            self.origin_ns = int(parts[0][2])
            messages: list[Log] = [part for _, part, _ in parts]
            count = min(len(part) for part, _, _ in parts)
            collective: Log = np.stack([part[:count] for part, _, _ in parts])
            self._take(own[:count], split(collective, self.rank))
            self._take(own_messages, split_messages(messages, self.rank, self._unreceived))
            self.clock_violations += violations(collective)
            self._replay.add(collective, messages)
            del self._log[:count]

    def _take(self, entries: Log, found: Split) -> None:
        """Put into ledger and timeline what was found out about exchanges of this rank."""
        self.ledger.move("transfer", "wait", int(found.wait_ns.sum()))
        self.ledger.move("transfer", "other", found.stopped_ns)
        self.wait_on_ns.update(found.charged_ns)
        self.hidden_ns += found.hidden_ns
        rows = np.zeros(len(entries), EXCHANGE)
        for name in rows.dtype.names or ():
            if name in _COLUMNS:
                rows[name] = entries[name]
        rows["wait_ns"], rows["late"] = found.wait_ns, found.late
        self.timeline.add_exchanges(rows)

    def _meet(self) -> None:
        """Comes before every blocking collective exchange: where ranks must meet anyway."""
        if self._collectives - self._settled >= SETTLE_AFTER:
            self.settle()
        if self.cross_check:
            started_ns = self.ledger.clock()
            token = np.zeros(1)
            entry = self._collective(Pattern.ALL_TO_ALL, -1, token)
            self._exchange(entry, lambda: self._transport.allreduce(token, "max"))
            self.barrier_wait_ns += self.ledger.clock() - started_ns

    def _collective(self, pattern: Pattern, root: int, buffer: Buffer) -> Entry:
        entry = _blank(pattern, buffer) | {"peer": root, "number": self._collectives}
        self._collectives += 1
        self._log.append(entry)
        return entry

    def _outgoing(self, buffer: Buffer, dest: int) -> Entry:
        entry = _blank(Pattern.SEND, buffer) | {"peer": dest, "number": self._sent_to[dest]}
        self._sent_to[dest] += 1
        self._messages.append(entry)
        self.traffic.add(sent=buffer.nbytes, received=0, messages=1)
        return entry

    def _incoming(self, buffer: Buffer) -> Entry:
        entry = _blank(Pattern.RECEIVE, buffer)
        self._messages.append(entry)
        return entry

    def _start(self, entry: Entry, start: Callable[[], Pending]) -> Exchange:
        ledger = self.ledger
        before = ledger.enter("transfer")
        entry["posted_ns"], entry["posted_busy_ns"] = ledger.mark_ns, ledger.busy_ns
        try:
            return Exchange(self, start(), entry)
        finally:
            ledger.enter(before)

    def _exchange(self, entry: Entry, pending: Callable[[], Pending]) -> int:
        """See an exchange to its end that `pending` starts, or gives if it was started before."""
        ledger = self.ledger
        before = ledger.enter("transfer")
        entry["entered_ns"], entry["entered_busy_ns"] = ledger.mark_ns, ledger.busy_ns
        if not entry["posted_ns"]:
            entry["posted_ns"], entry["posted_busy_ns"] = ledger.mark_ns, ledger.busy_ns
        try:
            ended = pending().wait()
        finally:
            ledger.enter(before)
        entry["left_ns"] = ledger.mark_ns
        entry["lapse_start_ns"], entry["lapse_end_ns"] = ended.lapse_start_ns, ended.lapse_end_ns
        if ended.source >= 0:
            entry["peer"], entry["number"] = ended.source, self._received_from[ended.source]
            self._received_from[ended.source] += 1
            self.traffic.add(sent=0, received=entry["bytes"], messages=0)
        return ended.source

    def _on_common_clock(self, entries: Log) -> Log:
        translated = entries.copy()
        for name in TIMES:
            translated[name] = self._clock.to_common(entries[name])
        return translated


def _blank(pattern: Pattern, buffer: Buffer) -> Entry:
    return dict.fromkeys(_COLUMNS, 0) | {"pattern": pattern, "bytes": buffer.nbytes}


def _table(entries: list[Entry]) -> Log:
    return np.array([tuple(entry[name] for name in _COLUMNS) for entry in entries], ENTRY)
