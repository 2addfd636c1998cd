"""One rank's log of its exchanges, and what comparing it with all others' tells about its time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from rankwise.ledger import Ledger
from rankwise.timeline import EXCHANGE, Timeline
from rankwise.world.clocks import CommonClock
from rankwise.world.replay import Replay
from rankwise.world.waits import (
    ENTRY,
    TIMES,
    Log,
    Mail,
    Name,
    Pattern,
    Split,
    message_name,
    split,
    violations,
)

DUE_AFTER = 4096
"""Collective exchanges after which logs should be compared; bounds their memory."""

_COLUMNS = ENTRY.names or ()
_BLANK = dict.fromkeys(_COLUMNS, 0)

Row = dict[str, int]
"""A row of ENTRY that is being filled; `left_ns` is 0 until the exchange is over."""


@dataclass(frozen=True)
class Page:
    """What a rank tells all others: its exchanges that are over, the start of its process, on the common
    clock, and how long it has computed."""

    collective: Log
    messages: Log
    start_ns: int
    busy_ns: int


class Logbook:
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
        self.replay = Replay(size)
        self._begin(rank)
        self.origin_ns = ledger.start_ns
        self.wait_on_ns: Counter[int] = Counter()
        self.hidden_ns = 0
        self.violations = 0

    def _begin(self, rank: int) -> None:
        self._rank = rank
        self._collective: list[Row] = []
        self._messages: list[Row] = []
        self._told: dict[Name, Row] = {}
        self._mail = Mail(rank)
        self._sent_to: Counter[int] = Counter()
        self._received_from: Counter[int] = Counter()
        self._collectives = self._compared = 0

    def collective(self, pattern: Pattern, root: int, size: int) -> Row:
        """An exchange of all ranks of so many bytes."""
        row = _blank(pattern, size, root, self._collectives)
        self._collectives += 1
        self._collective.append(row)
        return row

    def send(self, dest: int, size: int) -> Row:
        """A message of so many bytes to one rank."""
        row = _blank(Pattern.SEND, size, dest, self._sent_to[dest])
        self._sent_to[dest] += 1
        self._messages.append(row)
        return row

    def receive(self, size: int) -> Row:
        """A message of so many bytes from a rank that is known when it has come."""
        row = _blank(Pattern.RECEIVE, size)
        self._messages.append(row)
        return row

    def post(self, row: Row) -> None:
        """The ledger's running phase is that in which the exchange begins."""
        row["posted_ns"], row["posted_busy_ns"] = self._ledger.mark_ns, self._ledger.busy_ns

    def enter(self, row: Row) -> None:
        """The ledger's running phase is that in which the rank does nothing but this exchange, which begins
        with it unless it was posted before."""
        row["entered_ns"], row["entered_busy_ns"] = self._ledger.mark_ns, self._ledger.busy_ns
        if not row["posted_ns"]:
            row["posted_ns"], row["posted_busy_ns"] = row["entered_ns"], row["entered_busy_ns"]

    def leave(self, row: Row, source: int, lapse: tuple[int, int]) -> None:
        """The exchange was over when the ledger's running phase began; `source` is whose message came, or -1,
        `lapse` start and end of the longest stretch in which this rank did not run."""
        row["left_ns"] = self._ledger.mark_ns
        row["lapse_start_ns"], row["lapse_end_ns"] = lapse
        if source >= 0:
            row["peer"], row["number"] = source, self._received_from[source]
            self._received_from[source] += 1

    def fail(self, row: Row) -> None:
        """The exchange failed, because a rank was lost: what it took was finding that out."""
        self._ledger.move("transfer", "recovery", self._ledger.mark_ns - row["entered_ns"])

    @property
    def due(self) -> bool:
        """Whether the log is so long that it should be compared; the same on all ranks at one exchange."""
        return self._collectives - self._compared >= DUE_AFTER

    def ideal_ns(self) -> int:
        """Time since start-up until now, had exchanges taken none but been waited for all the same."""
        return self.replay.ideal_ns(self._rank, self._ledger.busy_ns)

    def page(self) -> Page:
        """What is over and was not told yet. Collective exchanges are told in order, up to the first that
        is not over."""
        self._compared = self._collectives
        page = self.last_page()
        finished = [row for row in self._messages if row["left_ns"]]
        self._messages = [row for row in self._messages if not row["left_ns"]]
        self._told |= {message_name(row, self._rank): row for row in finished}
        return page

    def last_page(self) -> Page:
        """The same, and it may be told again."""
        unfinished = (number for number, row in enumerate(self._collective) if not row["left_ns"])
        start_ns = np.array([self._ledger.start_ns])
        return Page(
            self._on_common_clock(_table(self._collective[: next(unfinished, None)])),
            self._on_common_clock(_table([row for row in self._messages if row["left_ns"]])),
            int(self._clock.to_common(start_ns)[0]),
            self._ledger.busy_ns,
        )

    def leave_out(
        self, pages: list[Page], members: list[int], clock: CommonClock, new: list[bool] | None = None
    ) -> None:
        """Begin anew with these members, some of them `new`, and their clock.

        What the others had together is compared once more, by their last pages, as if nobody else had been
        there: who waited for a lost rank was in transfer. A new one gets its replay later.
        """
        new = new or [False] * len(members)
        kept = [page for page, is_new in zip(pages, new, strict=True) if not is_new]
        survivors = [member for member, is_new in zip(members, new, strict=True) if not is_new]
        self.origin_ns = pages[0].start_ns
        if not new[members.index(self._number)]:
            self._close(kept, [self._members.index(member) for member in survivors])
            self.replay.welcome([page.busy_ns for page in pages])
        self._members = members
        self._clock = clock
        self._begin(members.index(self._number))

    def _close(self, pages: list[Page], survivors: list[int]) -> None:
        """Compare what these ranks had together."""
        count = min(len(page.collective) for page in pages)
        rank = survivors.index(self._rank)
        collective: Log = np.stack([page.collective[:count] for page in pages])
        roots = collective["peer"][0]
        kept = np.isin(roots, [-1, *survivors])
        collective = collective[:, kept]
        new_of = {old: new for new, old in enumerate(survivors)} | {-1: -1}
        collective["peer"] = [[new_of[int(root)] for root in roots[kept]]] * len(pages)
        self._members = [self._members[rank] for rank in survivors]
        entries = [row for row, keep in zip(self._collective[:count], kept, strict=True) if keep]
        self._take(entries, split(collective, rank))
        self.replay.leave_out(survivors)
        self.replay.add(collective, [page.messages[:0] for page in pages])

    def compare(self, pages: list[Page]) -> None:
        """Tell waiting from transfer in what all ranks have told; `pages` in rank order."""
        count = min(len(page.collective) for page in pages)
        collective: Log = np.stack([page.collective[:count] for page in pages])
        messages = [page.messages for page in pages]
        self.origin_ns = pages[0].start_ns
        self._take(self._collective[:count], split(collective, self._rank))
        names, found = self._mail.split(messages)
        self._take([self._told.pop(name) for name in names], found)
        self.violations += violations(collective)
        self.replay.add(collective, messages)
        del self._collective[:count]

    def _take(self, entries: list[Row], found: Split) -> None:
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


def _blank(pattern: Pattern, size: int, peer: int = 0, number: int = 0) -> Row:
    row = _BLANK.copy()
    row["pattern"], row["bytes"], row["peer"], row["number"] = pattern, size, peer, number
    return row


def _table(entries: list[Row]) -> Log:
    return np.array([tuple(row[name] for name in _COLUMNS) for row in entries], ENTRY)
