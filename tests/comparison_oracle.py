"""The comparison of logs as one rank makes it for itself with the logs of all: the oracle of the one that
ranks share."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np

from rankwise.ledger.messages import Name, message_name
from rankwise.ledger.waits import (
    ENTRY,
    Log,
    Pattern,
    Split,
    Times,
    _late,
    _Stage,
    _until,
    _within,
    hidden,
    overlap,
    wait_until,
)


def split_alone(log: Log, rank: int) -> Split:
    """Split collective exchanges for one rank; `log` [ranks, exchanges], all ranks took part in all."""
    held_up = _held_up(log)
    mine = [_Stage(*(part[rank] for part in (stage.start, stage.length, stage.cause))) for stage in held_up]
    wait_ns = np.sum([stage.length * (stage.cause != rank) for stage in mine], axis=0)
    stopped_ns = np.sum([stage.length * (stage.cause == rank) for stage in mine], axis=0)
    charged = np.zeros(len(log), np.int64)
    for stage in mine:
        np.add.at(charged, stage.cause, stage.length)
    charged[rank] = 0
    # The parts of each wait in which the late one was held up itself, in the exchange before.
    first = mine[0]
    now, before = np.arange(1, log.shape[1]), np.arange(log.shape[1] - 1)
    by = first.cause[now]
    starts, ends = first.start[now], (first.start + first.length)[now]
    for stage in held_up:
        start, cause = stage.start[by, before], stage.cause[by, before]
        shared = overlap(starts, ends, start, start + stage.length[by, before])
        shared = np.where((cause != rank) & (by != rank), shared, 0)
        np.subtract.at(charged, by, shared)
        np.add.at(charged, cause, shared)

    longest = np.argmax([stage.length * (stage.cause != rank) for stage in mine], axis=0)
    blamed = np.choose(longest, [stage.cause for stage in mine])
    return Split(
        wait_ns=wait_ns,
        late=np.where(wait_ns > 0, blamed, rank),
        stopped_ns=stopped_ns,
        charged_ns={r: int(ns) for r, ns in enumerate(charged) if ns},
        hidden_ns=int(hidden(_until(log, held_up[0].cause)[rank], log[rank]).sum()),
    )


def _held_up(log: Log) -> list[_Stage]:
    """What held up each rank in each exchange, one after the other: a rank that it could not do without and
    that had not come yet; one that came even later, though before it could leave; the stall of one."""
    ranks, exchanges = log.shape
    posted, entered, left = log["posted_ns"], log["entered_ns"], log["left_ns"]
    late = _late(log)
    needed = _Stage(entered, wait_until(_until(log, late), entered, left), late)

    start = needed.start + needed.length
    latest, until = np.zeros_like(late), start.copy()
    for other in range(ranks):
        later = (posted[other] > until) & (posted[other] <= left)
        latest, until = np.where(later, other, latest), np.where(later, posted[other], until)
    sat_through = _Stage(start, until - start, latest)

    # One stall per exchange, the longest: a rank that sat through it had time for short ones beside it.
    stalled, columns = (log["stall_end_ns"] - log["stall_start_ns"]).argmax(axis=0), np.arange(exchanges)
    start = np.maximum(until, log["stall_start_ns"][stalled, columns])
    length = overlap(start, left, start, log["stall_end_ns"][stalled, columns])
    stall = _Stage(start, length, np.broadcast_to(stalled, log.shape))
    return list(_within(log["inside_ns"], needed, sat_through, stall))


class MatcherOfAll:
    """Brings the two ends of each message of one rank together, with the logs of all."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._mine: dict[Name, Log] = {}
        self._theirs: dict[Name, Log] = {}

    def split(self, logs: list[Log]) -> tuple[list[Name], Split]:
        """Take in the messages that every rank reports now; split those of which both ends are known now.

        Returns which of this rank's messages these are, and what they were made of.
        """
        rank = self._rank
        self._mine |= {message_name(row, rank): row for row in logs[rank]}
        for owner, log in enumerate(logs):
            self._theirs |= {message_name(row, owner): row for row in log[log["peer"] == rank]}
        names = [name for name in self._mine if name in self._theirs]
        mine = np.array([self._mine.pop(name) for name in names], ENTRY)
        theirs = np.array([self._theirs.pop(name) for name in names], ENTRY)

        until, entered, left, peer = theirs["posted_ns"], mine["entered_ns"], mine["left_ns"], mine["peer"]
        # A sender that left before its receiver came did not wait: the library had taken its message.
        held = (mine["pattern"] == Pattern.RECEIVE) | (left >= until)
        wait = np.minimum(np.where(held, wait_until(until, entered, left), 0), mine["inside_ns"])
        rest, room = entered + wait, mine["inside_ns"] - wait
        # Of the two ends' stalls the longer one is what held the message up.
        sat_out = overlap(rest, left, theirs["stall_start_ns"], theirs["stall_end_ns"]) * held
        stopped = overlap(rest, left, mine["stall_start_ns"], mine["stall_end_ns"])
        sat_out, stopped = np.minimum(sat_out, room), np.minimum(stopped, room)
        sat_out, stopped = np.where(stopped > sat_out, 0, sat_out), np.where(stopped > sat_out, stopped, 0)
        all_wait = wait + sat_out

        charged = np.zeros(len(logs), np.int64)
        np.add.at(charged, peer, all_wait)
        for place in np.flatnonzero(wait * (mine["pattern"] == Pattern.RECEIVE)):
            # The part of it in which the sender itself waited is charged to the rank that it waited for.
            by, start, end = int(peer[place]), int(entered[place]), int(rest[place])
            for cause, their_start, their_end in _receive_waits(logs, by, start, end):
                shared = max(0, min(end, their_end) - max(start, their_start)) if cause != rank else 0
                charged[by] -= shared
                charged[cause] += shared
        return names, Split(
            wait_ns=all_wait,
            late=np.where(all_wait > 0, peer, rank),
            stopped_ns=stopped,
            charged_ns={r: int(ns) for r, ns in enumerate(charged) if ns},
            hidden_ns=int(hidden(until, mine).sum()),
        )


def _receive_waits(logs: list[Log], rank: int, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The senders for which a rank waited in receives, from when and until when, as far as that touches a
    stretch of time and both ends are logged now."""
    log = logs[rank]
    touching = log[(log["pattern"] == Pattern.RECEIVE) & (log["left_ns"] > start) & (log["entered_ns"] < end)]
    for row in touching:
        sent = logs[int(row["peer"])]
        sent = sent[
            (sent["pattern"] == Pattern.SEND) & (sent["peer"] == rank) & (sent["number"] == row["number"])
        ]
        for posted_ns in sent["posted_ns"]:
            yield int(row["peer"]), int(row["entered_ns"]), int(min(posted_ns, row["left_ns"]))


class OneChain:
    """The replay of all logs, message by message, that goes on with whichever rank it can."""

    def __init__(self, ranks: int) -> None:
        self.waited_ns: Times = np.zeros(ranks, np.int64)
        self._sent_ns: dict[Name, int] = {}
        self._unsent: list[tuple[int, Log]] = []

    def add(self, collective: Log, messages: list[Log]) -> None:
        """Replay collective exchanges [ranks, exchanges] and each rank's messages, in the order in which
        the rank made them."""
        moments = [
            np.where(log["pattern"] == Pattern.SEND, log["posted_ns"], log["left_ns"]) for log in messages
        ]
        orders = [np.argsort(moment, kind="stable") for moment in moments]
        logs = [log[order] for log, order in zip(messages, orders, strict=True)]
        cuts = [
            # Exchanges in the background may end in another order than they began.
            np.maximum.accumulate(np.searchsorted(moment[order], row["entered_ns"], side="right"))
            for moment, order, row in zip(moments, orders, collective, strict=True)
        ]
        done = [0] * len(logs)
        for number in range(collective.shape[1]):
            until = [int(cut[number]) for cut in cuts]
            if until != done:
                self._messages([log[a:b] for log, a, b in zip(logs, done, until, strict=True)])
                done = until
            self._collective(collective[:, number])
        self._messages([log[a:] for log, a in zip(logs, done, strict=True)])

    def ideal_ns(self, rank: int, busy_ns: int) -> int:
        """A rank's ideal clock when it has computed for `busy_ns` in all."""
        return int(self.waited_ns[rank]) + busy_ns

    def _collective(self, row: Log) -> None:
        came = row["posted_busy_ns"] + self.waited_ns
        here = row["entered_busy_ns"] + self.waited_ns
        pattern, root = row["pattern"][0], row["peer"][0]
        if pattern == Pattern.ALL_TO_ALL:
            self.waited_ns += np.maximum(came.max() - here, 0)
        elif pattern == Pattern.ALL_TO_ONE:
            self.waited_ns[root] += max(came.max() - here[root], 0)
        else:
            self.waited_ns += np.maximum(came[root] - here, 0)

    def _messages(self, logs: list[Log]) -> None:
        """Go on with any rank whose next message can be replayed: a receive comes after its send.

        Receives whose send is not logged yet are left for later, so that they hold up no other rank.
        """
        self._unsent = [late for late in self._unsent if not self._message(*late)]
        left = [deque(log) for log in logs]
        while any(left):
            moved = False
            for rank, rows in enumerate(left):
                while rows and self._message(rank, rows[0]):
                    rows.popleft()
                    moved = True
            if not moved:
                self._unsent += [(rank, rows.popleft()) for rank, rows in enumerate(left) if rows]

    def _message(self, rank: int, row: Log) -> bool:
        name = message_name(row, rank)
        if row["pattern"] == Pattern.SEND:
            self._sent_ns[name] = self.ideal_ns(rank, int(row["posted_busy_ns"]))
        elif name in self._sent_ns:
            here = self.ideal_ns(rank, int(row["entered_busy_ns"]))
            self.waited_ns[rank] += max(self._sent_ns.pop(name) - here, 0)
        else:
            return False
        return True
