"""One rank's log of its exchanges, and what comparing it with all others' tells about its time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rankwise.ledger.ideal_time import IdealTime
from rankwise.ledger.phases import Ledger
from rankwise.ledger.timeline import EXCHANGE, Timeline
from rankwise.ledger.waits import (
    ENTRY,
    TIMES,
    Log,
    MessageMatcher,
    Name,
    Pattern,
    Split,
    Times,
    message_name,
    split,
    violations,
)

DUE_AFTER = 4096
"""Collective exchanges after which logs should be compared; bounds their memory."""

_COLUMNS = ENTRY.names or ()
_BLANK = dict.fromkeys(_COLUMNS, 0)

LogRow = dict[str, int]
"""A row of ENTRY that is being filled; `left_ns` is 0 until the exchange is over."""


class CommonClock(Protocol):
    """Translates a rank's clock to one that all ranks share."""

    def to_common(self, times_ns: Times) -> Times:
        """Times of this rank's clock, in ns, on the common one."""


@dataclass(frozen=True)
class Chunk:
    """What a rank tells all others: its exchanges that are over, the start of its process, on the common
    clock, and how long it has computed."""

    collective: Log
    messages: Log
    start_ns: int
    busy_ns: int


class ExchangeLog:
    """Logs the exchanges of one rank; `compare` moves what was waiting in them to where it belongs.

    `wait_on_ns` is the waiting by the rank that was waited for, under the number that it began with,
    `hidden_ns` what went on behind computing, `violations` how often clocks contradicted each other,
    `origin_ns` the start of rank 0's process on the common clock.
    """

    def __init__(self, rank: int, size: int, ledger: Ledger, timeline: Timeline, clock: CommonClock) -> None:
        self._ledger = ledger
        self._timeline = timeline
        self._clock = clock
        self._members = list(range(size))
        self._number = rank
        self.ideal_time = IdealTime(size)
        self._begin(rank)
        self.origin_ns = ledger.start_ns
        self.wait_on_ns: Counter[int] = Counter()
        self.hidden_ns = 0
        self.violations = 0

    def _begin(self, rank: int) -> None:
        self._rank = rank
        self._collective: list[LogRow] = []
        self._messages: list[LogRow] = []
        self._told: dict[Name, LogRow] = {}
        self._matcher = MessageMatcher(rank)
        self._sent_to: Counter[int] = Counter()
        self._received_from: Counter[int] = Counter()
        self._collectives = self._compared = 0

    def collective(self, pattern: Pattern, root: int, size: int) -> LogRow:
        """An exchange of all ranks of so many bytes."""
        row = _blank(pattern, size, root, self._collectives)
        self._collectives += 1
        self._collective.append(row)
        return row

    def send(self, dest: int, size: int) -> LogRow:
        """A message of so many bytes to one rank."""
        row = _blank(Pattern.SEND, size, dest, self._sent_to[dest])
        self._sent_to[dest] += 1
        self._messages.append(row)
        return row

    def receive(self, size: int) -> LogRow:
        """A message of so many bytes from a rank that is known when it has come."""
        row = _blank(Pattern.RECEIVE, size)
        self._messages.append(row)
        return row

    def post(self, row: LogRow) -> None:
        """The ledger's running phase is that in which the exchange begins."""
        row["posted_ns"], row["posted_busy_ns"] = self._ledger.mark_ns, self._ledger.busy_ns

    def enter(self, row: LogRow) -> None:
        """The ledger's running phase is that in which the rank does nothing but this exchange, which begins
        with it unless it was posted before."""
        row["entered_ns"], row["entered_busy_ns"] = self._ledger.mark_ns, self._ledger.busy_ns
        if not row["posted_ns"]:
            row["posted_ns"], row["posted_busy_ns"] = row["entered_ns"], row["entered_busy_ns"]

    def leave(self, row: LogRow, source: int, stall: tuple[int, int]) -> None:
        """The exchange was over when the ledger's running phase began; `source` is whose message came, or -1,
        `stall` start and end of the longest stretch in which this rank did not run."""
        row["left_ns"] = self._ledger.mark_ns
        row["stall_start_ns"], row["stall_end_ns"] = stall
        if source >= 0:
            row["peer"], row["number"] = source, self._received_from[source]
            self._received_from[source] += 1

    def fail(self, row: LogRow) -> None:
        """The exchange failed, because a rank was lost: what it took was finding that out."""
        self._ledger.move("transfer", "recovery", self._ledger.mark_ns - row["entered_ns"])

    @property
    def due(self) -> bool:
        """Whether the log is so long that it should be compared; the same on all ranks at one exchange."""
        return self._collectives - self._compared >= DUE_AFTER

    def ideal_ns(self) -> int:
        """Time since start-up until now, had exchanges taken none but been waited for all the same."""
        return self.ideal_time.ideal_ns(self._rank, self._ledger.busy_ns)

    def chunk(self) -> Chunk:
        """What is over and was not told yet. Collective exchanges are told in order, up to the first that
        is not over."""
        self._compared = self._collectives
        chunk = self.last_chunk()
        finished = [row for row in self._messages if row["left_ns"]]
        self._messages = [row for row in self._messages if not row["left_ns"]]
        self._told |= {message_name(row, self._rank): row for row in finished}
        return chunk

    def last_chunk(self) -> Chunk:
        """The same, and it may be told again."""
        unfinished = (number for number, row in enumerate(self._collective) if not row["left_ns"])
        start_ns = np.array([self._ledger.start_ns])
        return Chunk(
            self._on_common_clock(_table(self._collective[: next(unfinished, None)])),
            self._on_common_clock(_table([row for row in self._messages if row["left_ns"]])),
            int(self._clock.to_common(start_ns)[0]),
            self._ledger.busy_ns,
        )

    def leave_out(
        self, chunks: list[Chunk], members: list[int], clock: CommonClock, new: list[bool] | None = None
    ) -> None:
        """Begin anew with these members, some of them `new`, and their clock.

        What the others had together is compared once more, by their last chunks, as if nobody else had been
        there: who waited for a lost rank was in transfer. A new one gets its ideal time later.
        """
        new = new or [False] * len(members)
        kept = [chunk for chunk, is_new in zip(chunks, new, strict=True) if not is_new]
        survivors = [member for member, is_new in zip(members, new, strict=True) if not is_new]
        self.origin_ns = chunks[0].start_ns
        if not new[members.index(self._number)]:
            self._close(kept, [self._members.index(member) for member in survivors])
            self.ideal_time.welcome([chunk.busy_ns for chunk in chunks])
        self._members = members
        self._clock = clock
        self._begin(members.index(self._number))

    def _close(self, chunks: list[Chunk], survivors: list[int]) -> None:
        """Compare what these ranks had together."""
        count = min(len(chunk.collective) for chunk in chunks)
        rank = survivors.index(self._rank)
        collective: Log = np.stack([chunk.collective[:count] for chunk in chunks])
        roots = collective["peer"][0]
        kept = np.isin(roots, [-1, *survivors])
        collective = collective[:, kept]
        new_of = {old: new for new, old in enumerate(survivors)} | {-1: -1}
        collective["peer"] = [[new_of[int(root)] for root in roots[kept]]] * len(chunks)
        self._members = [self._members[rank] for rank in survivors]
        entries = [row for row, keep in zip(self._collective[:count], kept, strict=True) if keep]
        self._take(entries, split(collective, rank))
        self.ideal_time.leave_out(survivors)
        self.ideal_time.add(collective, [chunk.messages[:0] for chunk in chunks])

    def compare(self, chunks: list[Chunk]) -> None:
        """Tell waiting from transfer in what all ranks have told; `chunks` in rank order."""
        count = min(len(chunk.collective) for chunk in chunks)
        collective: Log = np.stack([chunk.collective[:count] for chunk in chunks])
        messages = [chunk.messages for chunk in chunks]
        self.origin_ns = chunks[0].start_ns
        self._take(self._collective[:count], split(collective, self._rank))
        names, found = self._matcher.split(messages)
        self._take([self._told.pop(name) for name in names], found)
        self.violations += violations(collective)
        self.ideal_time.add(collective, messages)
        del self._collective[:count]

    def _take(self, entries: list[LogRow], found: Split) -> None:
        self._ledger.move("transfer", "wait", int(found.wait_ns.sum()))
        self._ledger.move("transfer", "other", found.stopped_ns)
        for rank, ns in found.charged_ns.items():
            self.wait_on_ns[self._members[rank]] += ns
        self.hidden_ns += found.hidden_ns
        log = _table(entries)
        rows = np.zeros(len(log), EXCHANGE)
        for name in set(_COLUMNS) & set(EXCHANGE.names or ()):
            rows[name] = log[name]
        rows["wait_ns"], rows["late"] = found.wait_ns, np.array(self._members)[found.late]
        self._timeline.add_exchanges(rows)

    def _on_common_clock(self, log: Log) -> Log:
        translated = log.copy()
        for name in TIMES:
            translated[name] = self._clock.to_common(log[name])
        return translated


def _blank(pattern: Pattern, size: int, peer: int = 0, number: int = 0) -> LogRow:
    row = _BLANK.copy()
    row["pattern"], row["bytes"], row["peer"], row["number"] = pattern, size, peer, number
    return row


def _table(entries: list[LogRow]) -> Log:
    return np.array([tuple(row[name] for name in _COLUMNS) for row in entries], ENTRY)
