"""The messages between ranks, of each of which two logs know one end: waiting in them, and who caused it.

The rules are those of `rankwise.ledger.waits`.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass

import numpy as np

from rankwise.ledger.shares import Asked, deal
from rankwise.ledger.waits import ENTRY, Log, Pattern, Split, Times, hidden, overlap, wait_until

Name = tuple[int, int, int]
"""Source, destination and number of a message."""

PASSED_ON = np.dtype([("cause", "i8"), ("ns", "i8")])
"""What of the waiting for a rank is charged to whom that one waited for."""


def message_name(row: Mapping[str, int] | Log, owner: int) -> Name:
    """The message of which `row` is the end of `owner`."""
    peer, number = int(row["peer"]), int(row["number"])
    return (owner, peer, number) if row["pattern"] == Pattern.SEND else (peer, owner, number)


def names_of(log: Log, owners: int | Times) -> list[Name]:
    """The messages of which rows of a log are the ends, of one owner or of one each."""
    is_send = log["pattern"] == Pattern.SEND
    source, dest = np.where(is_send, owners, log["peer"]), np.where(is_send, log["peer"], owners)
    return list(zip(source.tolist(), dest.tolist(), log["number"].tolist(), strict=True))


@dataclass(frozen=True)
class Found:
    """Messages of one rank of which both ends are known now, and what they were made of."""

    names: list[Name]
    split: Split


class MessageMatcher:
    """Brings the two ends of each message of one rank together, also if one is logged much later."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._mine: dict[Name, Log] = {}
        self._theirs: dict[Name, Log] = {}

    def split(self, logs: list[Log]) -> Found:
        """Take in the messages that every rank reports now; split those of which both ends are known now."""
        theirs, owners = _sent_to(self._rank, logs)
        names, mine, others = self._match(logs[self._rank], theirs, owners)
        received = mine["pattern"] == Pattern.RECEIVE
        passed = [np.zeros(0, PASSED_ON)]
        by = [np.zeros(0, np.int64)]
        for late in np.unique(mine["peer"][received]):
            ends = received & (mine["peer"] == late)
            waits = _receive_waits(logs[late], *_sent_to(int(late), logs))
            stretches = mine[ends]["entered_ns"], others[ends]["posted_ns"]
            to = np.full(ends.sum(), self._rank)
            its, _ = waits.passed_on(mine[ends], *stretches, to)
            passed.append(its)
            by.append(np.full(len(its), late))
        return Found(names, self._found(mine, others, np.concatenate(passed), np.concatenate(by)))

    def compare(self, mine: Log, ranks: int) -> Generator[Asked, Log, tuple[Found, Log, Times]]:
        """The same together with all ranks, each with its own messages, of a dtype that has all of ENTRY.
        Returns the others' ends of this rank's messages as well, and whose they are."""
        theirs, owners = yield from deal(mine, mine["peer"], ranks)
        names, its, others = self._match(mine, theirs, owners)
        # Whoever received from this rank waited for whom this one waited for meanwhile.
        sent = its["pattern"] == Pattern.SEND
        receivers = others[sent]
        waits = _receive_waits(mine, theirs, owners)
        passed, to = waits.passed_on(
            receivers, receivers["entered_ns"], its[sent]["posted_ns"], its[sent]["peer"]
        )
        given, by = yield from deal(passed, to, ranks)
        return Found(names, self._found(its, others, given, by)), theirs, owners

    def _match(self, mine: Log, theirs: Log, owners: Times) -> tuple[list[Name], Log, Log]:
        """Both ends of the messages of which they are known now."""
        columns = list(ENTRY.names or ())
        mine, theirs = mine[columns].astype(ENTRY), theirs[columns].astype(ENTRY)
        self._mine |= dict(zip(names_of(mine, self._rank), mine, strict=True))
        self._theirs |= dict(zip(names_of(theirs, owners), theirs, strict=True))
        names = [name for name in self._mine if name in self._theirs]
        return (
            names,
            np.array([self._mine.pop(name) for name in names], ENTRY),
            np.array([self._theirs.pop(name) for name in names], ENTRY),
        )

    def _found(self, mine: Log, theirs: Log, passed: Log, by: Times) -> Split:
        """What messages were made of; `passed` of the waiting for ranks `by` is charged to others."""
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
        causes, which = np.unique(np.concatenate([peer, by, passed["cause"]]), return_inverse=True)
        charged = np.zeros(len(causes), np.int64)
        np.add.at(charged, which, np.concatenate([all_wait, -passed["ns"], passed["ns"]]))
        return Split(
            wait_ns=all_wait,
            late=np.where(all_wait > 0, peer, self._rank),
            stopped_ns=stopped,
            charged_ns={int(cause): int(ns) for cause, ns in zip(causes, charged, strict=True) if ns},
            hidden_ns=int(hidden(until, mine).sum()),
        )


@dataclass(frozen=True)
class _Waits:
    """When a rank waited in receives, in the order in which that began, and for whom."""

    start: Times
    end: Times
    cause: Times

    def passed_on(self, receives: Log, entered: Times, until: Times, receivers: Times) -> tuple[Log, Times]:
        """What of others' waiting for this rank fell into its own, by cause, and whose it was: `receives` are
        their rows [messages], which waited from `entered` `until` this rank had sent."""
        wait = np.minimum(wait_until(until, entered, receives["left_ns"]), receives["inside_ns"])
        end = entered + wait
        # Those that touch each stretch stand one behind the other, where none begins before its elder.
        first = np.searchsorted(np.maximum.accumulate(self.end), entered, side="right")
        count = np.maximum(np.searchsorted(self.start, end, side="left") - first, 0)
        which = np.repeat(np.arange(len(receives)), count)
        place = np.arange(len(which)) - np.repeat(np.cumsum(count) - count - first, count)
        cause, to = self.cause[place], receivers[which]
        ns = np.where(cause == to, 0, overlap(entered[which], end[which], self.start[place], self.end[place]))
        pairs, number = np.unique(np.stack([to, cause])[:, ns > 0], axis=1, return_inverse=True)
        passed = np.zeros(pairs.shape[1], PASSED_ON)
        passed["cause"] = pairs[1]
        np.add.at(passed["ns"], number.reshape(-1), ns[ns > 0])
        return passed, pairs[0]


def _receive_waits(mine: Log, theirs: Log, owners: Times) -> _Waits:
    """Those of a rank in `mine` whose messages' other ends are in `theirs`."""
    received = mine[mine["pattern"] == Pattern.RECEIVE]
    is_send = theirs["pattern"] == Pattern.SEND
    sent, owners = theirs[is_send], owners[is_send]
    most = max(received["number"].max(initial=0), sent["number"].max(initial=0)) + 1
    _, here, there = np.intersect1d(
        received["peer"] * most + received["number"], owners * most + sent["number"], return_indices=True
    )
    start = received["entered_ns"][here]
    end = np.minimum(sent["posted_ns"][there], received["left_ns"][here])
    waited = np.flatnonzero(end > start)
    waited = waited[np.argsort(start[waited], kind="stable")]
    return _Waits(start[waited], end[waited], received["peer"][here][waited])


def _sent_to(rank: int, logs: list[Log]) -> tuple[Log, Times]:
    """All others' ends of a rank's messages, and whose they are."""
    parts = [log[log["peer"] == rank] for log in logs]
    owners = np.repeat(np.arange(len(logs)), [len(part) for part in parts])
    return np.concatenate(parts), owners
