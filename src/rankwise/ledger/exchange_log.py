"""One rank's log of its exchanges, and what it learns of its time when all ranks compare theirs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import numpy as np

from rankwise.errors import RankLost
from rankwise.ledger.ideal_time import IdealTime, Replay, in_segments
from rankwise.ledger.messages import Found, MessageMatcher, Name, message_name
from rankwise.ledger.phases import Ledger
from rankwise.ledger.regions import LedgerRegions
from rankwise.ledger.shares import Asks, Highest, compare_shares
from rankwise.ledger.stalls import StallDetector
from rankwise.ledger.timeline import EXCHANGE, Timeline
from rankwise.ledger.waits import (
    ENTRY,
    TIMES,
    Log,
    Pattern,
    Split,
    Times,
    split,
    summed,
    violations,
)

DUE_AFTER = 4096
"""Collective exchanges after which logs should be compared; bounds their memory."""

_COLUMNS = ENTRY.names or ()
_BLANK = dict.fromkeys(_COLUMNS, 0)
_SEND, _RECEIVE = Pattern.SEND, Pattern.RECEIVE

LogRow = dict[str, int]
"""A row of ENTRY that is being filled; `left_ns` is 0 until the exchange is over."""


class CommonClock(Protocol):
    """Translates a rank's clock to one that all ranks share."""

    def to_common(self, times_ns: Times) -> Times:
        """Times of this rank's clock, in ns, on the common one."""


COLLECTIVES, FIRST, MESSAGES, START_NS, BUSY_NS = range(5)
"""What ranks must know of each other before logs are compared: the numbers of collective exchanges and of
messages in a chunk, the number of the first collective one, and the chunk's `start_ns` and `busy_ns`."""


@dataclass(frozen=True)
class Chunk:
    """What a rank reports to all others: its exchanges that are over and the start of its process, on the
    common clock, and how long it has computed."""

    collective: Log
    messages: Log
    start_ns: int
    busy_ns: int

    @property
    def standing(self) -> Times:
        """What the others must know before logs are compared."""
        first = self.collective["number"][0] if len(self.collective) else 0
        return np.array([len(self.collective), first, len(self.messages), self.start_ns, self.busy_ns])


@dataclass(frozen=True)
class Closed:
    """What a rank has found in the exchanges of those that go on together: its rows, what they were made of,
    and the ideal time."""

    rows: list[LogRow]
    found: Split
    ideal_time: IdealTime


class OpenExchange:
    """An exchange of one rank, until it is over: it moves the ledger's cursor, looks for stalls, and fills
    its row of the log.

    A `with` block is the time in which the rank does nothing but this exchange. Inside, the caller brings it
    to its end, hands `stalls` to what waits, and sets `source` to the rank whose message was received. An
    exchange in the background is begun, and looked after, inside `beside()` before. Time that ends with
    RankLost went into finding out that a rank is lost, and is charged to ``recovery``.
    """

    __slots__ = ("_before", "_ledger", "_log", "_row", "source", "stalls")

    def __init__(self, log: ExchangeLog, ledger: Ledger, row: LogRow) -> None:
        self._log = log
        self._ledger = ledger
        self._row = row
        self.stalls = StallDetector(ledger.clock, ledger.cpu_clock)
        self.source = -1

    def __enter__(self) -> OpenExchange:
        ledger, row = self._ledger, self._row
        self._before = ledger.enter("transfer")
        # The detector goes from one of the ledger's readings of the clocks to the next, so that no stop of
        # this rank falls between them.
        self.stalls.begin(ledger.mark_ns, ledger.cpu_mark_ns)
        row["entered_ns"], row["entered_busy_ns"] = ledger.mark_ns, ledger.busy_ns
        if not row["posted_ns"]:
            row["posted_ns"], row["posted_busy_ns"] = row["entered_ns"], row["entered_busy_ns"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ledger, row = self._ledger, self._row
        ledger.enter(self._before)
        if error is not None:
            self._charge(error, row["entered_ns"])
            return
        self.stalls.judge(ledger.mark_ns, ledger.cpu_mark_ns)
        row["left_ns"] = ledger.mark_ns
        row["stall_start_ns"], row["stall_end_ns"] = self.stalls.stall
        if self.source >= 0:
            row["peer"], row["number"] = self.source, self._log.number_of_message_from(self.source)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """A moment of the exchange beside other work: it is begun, or looked after."""
        ledger, row = self._ledger, self._row
        before = ledger.enter("transfer")
        began_ns = ledger.mark_ns
        self.stalls.begin(began_ns, ledger.cpu_mark_ns)
        if not row["posted_ns"]:
            row["posted_ns"], row["posted_busy_ns"] = began_ns, ledger.busy_ns
        try:
            yield
        except BaseException as error:
            ledger.enter(before)
            self._charge(error, began_ns)
            raise
        ledger.enter(before)
        self.stalls.judge(ledger.mark_ns, ledger.cpu_mark_ns)

    def _charge(self, error: BaseException, began_ns: int) -> None:
        if isinstance(error, RankLost):
            self._log.failed_ns = self._ledger.mark_ns - began_ns
            self._ledger.move("transfer", "recovery", self._log.failed_ns)


class ExchangeLog:
    """Logs the exchanges of one rank; `compare` moves what was waiting in them to where it belongs.

    `wait_on_ns` is the waiting by the rank that was waited for, under the number that it began with,
    `hidden_ns` what went on behind computing, `failed_ns` how long the last exchange took that ended with
    RankLost, `violations` how often clocks contradicted each other, `origin_ns` the start of rank 0's process
    on the common clock.
    """

    def __init__(self, rank: int, size: int, ledger: Ledger, timeline: Timeline, clock: CommonClock) -> None:
        self._ledger = ledger
        self._timeline = timeline
        self._clock = clock
        self._members = list(range(size))
        self._number = rank
        self.ideal_time = IdealTime(size)
        self.regions = LedgerRegions(ledger)
        self._begin(rank)
        self.origin_ns = ledger.start_ns
        self.wait_on_ns: Counter[int] = Counter()
        self.hidden_ns = 0
        self.failed_ns = 0
        self.violations = 0

    def _begin(self, rank: int) -> None:
        self._rank = rank
        self._collective: list[LogRow] = []
        self._messages: list[LogRow] = []
        self._reported: dict[Name, LogRow] = {}
        self._matcher = MessageMatcher(rank)
        self._sent_to: Counter[int] = Counter()
        self._received_from: Counter[int] = Counter()
        self._collectives = self._compared = 0

    def open(self, pattern: Pattern, peer: int, size: int) -> OpenExchange:
        """The next exchange of this rank, of `size` bytes. `peer` is the root (-1 if there is none), or the
        other rank of a message; that of a receive does not matter, it is known when the message has come."""
        row = _BLANK.copy()
        row["pattern"], row["peer"], row["bytes"] = pattern, peer, size
        if pattern is _SEND:
            row["number"] = self._sent_to[peer]
            self._sent_to[peer] += 1
            self._messages.append(row)
        elif pattern is _RECEIVE:
            self._messages.append(row)
        else:
            row["number"] = self._collectives
            self._collectives += 1
            self._collective.append(row)
        return OpenExchange(self, self._ledger, row)

    def number_of_message_from(self, source: int) -> int:
        """The number of the message that has come from `source` now."""
        self._received_from[source] += 1
        return self._received_from[source] - 1

    @property
    def due(self) -> bool:
        """Whether the log is so long that it should be compared; the same on all ranks at one exchange."""
        return self._collectives - self._compared >= DUE_AFTER

    def ideal_ns(self) -> int:
        """Time since start-up until now, had exchanges taken none but been waited for all the same."""
        return self.ideal_time.ideal_ns(self._rank, self._ledger.busy_ns)

    def chunk(self) -> Chunk:
        """What is over and was not reported yet. Collective exchanges are reported in order, up to the first
        that is not over."""
        self._compared = self._collectives
        chunk = self.last_chunk()
        finished = [row for row in self._messages if row["left_ns"]]
        self._messages = [row for row in self._messages if not row["left_ns"]]
        self._reported |= {message_name(row, self._rank): row for row in finished}
        return chunk

    def last_chunk(self) -> Chunk:
        """The same, which a later chunk may report again."""
        unfinished = (number for number, row in enumerate(self._collective) if not row["left_ns"])
        start_ns = np.array([self._ledger.start_ns])
        return Chunk(
            self._on_common_clock(_table(self._collective[: next(unfinished, None)])),
            self._on_common_clock(_table([row for row in self._messages if row["left_ns"]])),
            int(self._clock.to_common(start_ns)[0]),
            self._ledger.busy_ns,
        )

    def closing(self, chunk: Chunk, standings: Times, members: list[int], new: Sequence[bool]) -> Asks:
        """Compare once more what those had together that go on, as if they had been alone: a rank that waited
        for a lost one was in transfer. All of `members` take part, with those that are `new` among them
        behind the others; they have nothing to compare, and get None.

        `chunk` is this rank's last one, `standings` those of all, in rank order. Nothing is changed until
        `leave_out`.
        """
        rank, kept = members.index(self._number), len(members) - sum(new)
        if rank >= kept:
            count = int((yield Highest(np.zeros(1, np.int64)))[0])
            yield from compare_shares(rank, len(members), chunk.collective[:0], together=kept)
            yield from IdealTime(len(members)).add_own(None, rank, count)
            return None
        standings = standings[:kept]
        first = int(standings[standings[:, COLLECTIVES] > 0, FIRST].max(initial=0))
        # What nobody of them has compared yet, and all of them have logged.
        upto = int((standings[:, FIRST] + standings[:, COLLECTIVES]).min())
        numbers = chunk.collective["number"]
        log = chunk.collective[(numbers >= first) & (numbers < upto)]
        places = [self._members.index(member) for member in members[:kept]]
        is_theirs = np.isin(log["peer"], [-1, *places])
        log = log[is_theirs]
        new_of = {old: new for new, old in enumerate(places)} | {-1: -1}
        log["peer"] = [new_of[root] for root in log["peer"].tolist()]
        rows = [row for row in self._collective if first <= row["number"] < upto]
        rows = [row for row, its in zip(rows, is_theirs, strict=True) if its]
        if any(new):  # which know of none
            yield Highest(np.array([len(log)]))
        found = yield from compare_shares(rank, len(members), log, together=kept)
        ideal_time = self.ideal_time.of(places)
        yield from ideal_time.add_own(log, rank, len(log))
        return Closed(rows, summed(found), ideal_time.of(range(kept)))

    def leave_out(
        self, closed: Closed | None, standings: Times, members: list[int], clock: CommonClock
    ) -> None:
        """Begin anew with these members and their clock, with what `closing` gave. A new one gets its ideal
        time later."""
        self.origin_ns = int(standings[0, START_NS])
        if closed is not None:
            self._members = members
            self._take(closed.rows, closed.found)
            self.ideal_time = closed.ideal_time
            self.ideal_time.welcome(standings[:, BUSY_NS].tolist())
        self._members = members
        self._clock = clock
        self._begin(members.index(self._number))

    def compare(self, chunks: list[Chunk]) -> None:
        """Find what was waiting in what all ranks have reported; `chunks` in rank order."""
        count = min(len(chunk.collective) for chunk in chunks)
        collective: Log = np.stack([chunk.collective[:count] for chunk in chunks])
        messages = [chunk.messages for chunk in chunks]
        self.origin_ns = chunks[0].start_ns
        self._take(self._collective[:count], split(collective, self._rank))
        self._take_messages(self._matcher.split(messages))
        self.violations += violations(collective)
        self.ideal_time.add(collective, messages)
        del self._collective[:count]

    def compare_shares(self, chunk: Chunk, standings: Times) -> Asks:
        """The same where each rank has its own chunk only, and compares a share; `standings` are those of
        all, in rank order."""
        count = int(standings[:, COLLECTIVES].min())
        self.origin_ns = int(standings[0, START_NS])
        log = chunk.collective[:count]
        found = yield from compare_shares(self._rank, len(standings), log)
        messages, replay = None, None
        if standings[:, MESSAGES].any():
            mine = in_segments(chunk.messages, log)
            messages, *others = yield from self._matcher.compare(mine, len(standings))
            replay = Replay(mine, *others)
        yield from self.ideal_time.add_own(log, self._rank, count, replay)
        self._take(self._collective[:count], summed(found))
        if messages is not None:
            self._take_messages(messages)
        self.violations += int(found["contradicts"].sum())
        del self._collective[:count]

    def _take_messages(self, found: Found) -> None:
        self._take([self._reported.pop(name) for name in found.names], found.split)

    def _take(self, rows: list[LogRow], found: Split) -> None:
        log = _table(rows)
        # Each exchange lies in one period of the ledger, in which it was transfer as a whole.
        periods = np.searchsorted(np.array(self._ledger.ends_ns, np.int64), log["left_ns"])
        for period in np.unique(periods):
            of_it = periods == period
            self._ledger.move("transfer", "wait", int(found.wait_ns[of_it].sum()), int(period))
            self._ledger.move("transfer", "other", int(found.stopped_ns[of_it].sum()), int(period))
        self.regions.found(log["left_ns"], found.wait_ns, found.stopped_ns)
        for rank, ns in found.charged_ns.items():
            self.wait_on_ns[self._members[rank]] += ns
        self.hidden_ns += found.hidden_ns
        exchanges = np.zeros(len(log), EXCHANGE)
        for name in set(_COLUMNS) & set(EXCHANGE.names or ()):
            exchanges[name] = log[name]
        exchanges["wait_ns"], exchanges["late"] = found.wait_ns, np.array(self._members)[found.late]
        self._timeline.add_exchanges(exchanges)

    def _on_common_clock(self, log: Log) -> Log:
        translated = log.copy()
        for name in TIMES:
            translated[name] = self._clock.to_common(log[name])
        translated["inside_ns"] = log["left_ns"] - log["entered_ns"]
        return translated


def _table(rows: list[LogRow]) -> Log:
    return np.array([tuple(row[name] for name in _COLUMNS) for row in rows], ENTRY)
