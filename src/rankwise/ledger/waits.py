"""Waiting apart from transfer, found from the times at which all ranks entered and left their exchanges.

The rules are Scalasca's wait-state patterns (Geimer et al. 2010, doi:10.1002/cpe.1556). With e and x
the entry and exit of a rank on the common clock, and E the moment at which the last of the ranks came that
it cannot do without:

    wait = min(max(E - e, 0), x - e)

- all to all ("Wait at NxN"): E is when the latest rank came;
- one to all ("Late Broadcast"): when the root came;
- all to one ("Early Reduce"): for the root when the latest sender came, for a sender when the root did;
- a receive ("Late Sender"): when the rank came that sent the message, also if any sender would do;
- a send ("Late Receiver"): when the receiver came, if the sender was still there (it was synchronous).

An MPI library chooses its own algorithm: a root may be unable to send before a receiver has come, and a
receiver may get its data through another. So a rank that came later than those that are needed, but
before this rank left, is taken to have held it up from then on.

A rank comes to an exchange when it posts it. It waits from when it has nothing else to do: for an
exchange in the background only from its `wait()`; what went on before was hidden behind computing.
The rest of an exchange is transfer.

A rank that did not run for a while inside an exchange (stopped, or without a core) holds up the others
as if it had come only then: what falls into its stall is their wait for it, and its own ``other``.

A late rank may itself have been waiting: a master hands out the mean late because a worker sent late.
The part of rank i's wait for r that falls into r's own wait for k, in the exchange before, is charged to k.

No rank waits longer than it was in an exchange by its own clock, also if that is longer on the common one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Log = NDArray[Any]
"""Exchanges as ranks logged them, of dtype ENTRY."""

Times = NDArray[np.int64]

ENTRY = np.dtype(
    [
        (name, "i8")
        for name in (
            "pattern",
            "peer",
            "number",
            "bytes",
            "posted_ns",
            "entered_ns",
            "left_ns",
            "inside_ns",
            "stall_start_ns",
            "stall_end_ns",
            "posted_busy_ns",
            "entered_busy_ns",
        )
    ]
)
"""`peer` is the root, or the other rank of a message; `number` counts collective exchanges, or the messages
from one rank to another; `inside_ns` is the time from `entered_ns` to `left_ns` on the rank's own clock; the
stall is the longest stretch in which the rank did not run in the exchange; the busy times are what the rank
had computed by then (`Ledger.busy_ns`)."""

TIMES = ("posted_ns", "entered_ns", "left_ns", "stall_start_ns", "stall_end_ns")


class Pattern(IntEnum):
    """Which ranks cannot do without which in an exchange."""

    ALL_TO_ALL = 0
    ALL_TO_ONE = 1
    ONE_TO_ALL = 2
    SEND = 3
    RECEIVE = 4


@dataclass(frozen=True)
class Split:
    """What some exchanges of one rank were made of, in ns.

    `wait_ns` and `late` [exchanges] say how long it waited in each, and for which rank (itself if it did not
    wait); `stopped_ns` [exchanges] is its own stalls; `charged_ns` adds the waiting up by the rank that
    caused it; `hidden_ns` is what went on behind its computing (at most: an exchange may have been over
    earlier).
    """

    wait_ns: Times
    late: Times
    stopped_ns: Times
    charged_ns: dict[int, int]
    hidden_ns: int


def split(log: Log, rank: int) -> Split:
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
        shared = _overlap(starts, ends, start, start + stage.length[by, before])
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
        hidden_ns=int(_hidden(_until(log, held_up[0].cause)[rank], log[rank]).sum()),
    )


@dataclass(frozen=True)
class _Stage:
    """Stretches [ranks, exchanges] in which ranks were held up, and by which rank; one that held itself up
    was stopped."""

    start: Times
    length: Times
    cause: Times


def _held_up(log: Log) -> list[_Stage]:
    """What held up each rank in each exchange, one after the other: a rank that it could not do without and
    that had not come yet; one that came even later, though before it could leave; the stall of one."""
    ranks, exchanges = log.shape
    posted, entered, left = log["posted_ns"], log["entered_ns"], log["left_ns"]
    late = _late(log)
    needed = _Stage(entered, _wait(_until(log, late), entered, left), late)

    start = needed.start + needed.length
    latest, until = np.zeros_like(late), start.copy()
    for other in range(ranks):
        later = (posted[other] > until) & (posted[other] <= left)
        latest, until = np.where(later, other, latest), np.where(later, posted[other], until)
    sat_through = _Stage(start, until - start, latest)

    # One stall per exchange, the longest: a rank that sat through it had time for short ones beside it.
    stalled, columns = (log["stall_end_ns"] - log["stall_start_ns"]).argmax(axis=0), np.arange(exchanges)
    start = np.maximum(until, log["stall_start_ns"][stalled, columns])
    length = _overlap(start, left, start, log["stall_end_ns"][stalled, columns])
    stall = _Stage(start, length, np.broadcast_to(stalled, log.shape))
    return list(_within(log["inside_ns"], needed, sat_through, stall))


def _within(inside_ns: Times, *stages: _Stage) -> Iterator[_Stage]:
    """The stages, cut where together they are longer than the rank was inside."""
    for stage in stages:
        length = np.minimum(stage.length, inside_ns)
        inside_ns = inside_ns - length
        yield _Stage(stage.start, length, stage.cause)


def _late(log: Log) -> Times:
    """The last to come of the ranks that each rank could not do without [ranks, exchanges]."""
    pattern, root = log["pattern"], log["peer"]
    is_root = root == np.arange(len(log))[:, None]
    for_all = (pattern == Pattern.ALL_TO_ALL) | ((pattern == Pattern.ALL_TO_ONE) & is_root)
    return np.where(for_all, log["posted_ns"].argmax(axis=0), root)


def _until(log: Log, late: Times) -> Times:
    return np.take_along_axis(log["posted_ns"], late, axis=0)


class MessageMatcher:
    """Brings the two ends of each message of one rank together, also if one is logged much later."""

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
        wait = np.minimum(np.where(held, _wait(until, entered, left), 0), mine["inside_ns"])
        rest, room = entered + wait, mine["inside_ns"] - wait
        # Of the two ends' stalls the longer one is what held the message up.
        sat_out = _overlap(rest, left, theirs["stall_start_ns"], theirs["stall_end_ns"]) * held
        stopped = _overlap(rest, left, mine["stall_start_ns"], mine["stall_end_ns"])
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
            hidden_ns=int(_hidden(until, mine).sum()),
        )


Name = tuple[int, int, int]
"""Source, destination and number of a message."""


def message_name(row: Mapping[str, int] | Log, owner: int) -> Name:
    """The message of which `row` is the end of `owner`."""
    peer, number = int(row["peer"]), int(row["number"])
    return (owner, peer, number) if row["pattern"] == Pattern.SEND else (peer, owner, number)


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


def violations(log: Log) -> int:
    """The number of exchanges of all [ranks, exchanges] in which clocks contradict each other: a rank left
    before another had come."""
    contradicts = log["left_ns"].min(axis=0) < log["posted_ns"].max(axis=0)
    return int((contradicts & (log["pattern"][0] == Pattern.ALL_TO_ALL)).sum())


def _wait(until: Times, entered: Times, left: Times) -> Times:
    # Clocks of several hosts may contradict each other so far that an exchange seems to end before it began.
    return np.asarray(np.minimum(np.maximum(until - entered, 0), np.maximum(left - entered, 0)))


def _overlap(start: Times, end: Times, other_start: Times, other_end: Times) -> Times:
    return np.asarray(np.maximum(np.minimum(end, other_end) - np.maximum(start, other_start), 0))


def _hidden(until: Times, row: Log) -> Times:
    return np.asarray(np.maximum(row["entered_ns"] - np.maximum(until, row["posted_ns"]), 0))
