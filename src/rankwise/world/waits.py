"""Waiting told apart from transfer, from the times at which all ranks entered and left their exchanges.

The rules are Scalasca's wait-state patterns (Geimer et al. 2010, doi:10.1002/cpe.1556). With e and x
the entry and exit of a rank on the common clock, and E the moment from which on whom it cannot do
without took part:

    wait = min(max(E - e, 0), x - e)

- all to all ("Wait at NxN"): E is when the latest rank came;
- one to all ("Late Broadcast"): when the root came;
- all to one ("Early Reduce"): for the root when the latest sender came, for a sender when the root did;
- a receive ("Late Sender"): when its sender came, whoever that was if any would do;
- a send ("Late Receiver"): when the receiver came, if the sender was still there (it was synchronous).

What algorithm an MPI library uses is its own affair: a root may be unable to send before a receiver has
come, and a receiver may get its data through another. So whoever came later than those that a rank
needs, but while it was still there, is taken to have held it up from then on.

A rank comes to an exchange when it posts it. It waits from when it has nothing else to do: for an
exchange in the background only from its `wait()`; what went on before was hidden behind computing.
The rest of an exchange is transfer.

A rank that did not run for a while inside an exchange (stopped, or without a core) holds up the others
as if it had come only then: what falls into its lapse is their wait for it, and its own ``other``.

Who is late may itself have been waiting: a master hands out the mean late because a worker sent late.
What of rank i's wait for r falls into r's own wait for k, in the exchange before, is charged to k.
"""

from __future__ import annotations

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
            "lapse_start_ns",
            "lapse_end_ns",
            "posted_busy_ns",
            "entered_busy_ns",
        )
    ]
)
"""`peer` is the root, or the other rank of a message; `number` counts collective exchanges, or the messages
from one rank to another; the lapse is the longest stretch in which the rank did not run in the exchange;
the busy times are what the rank had computed by then (`Ledger.busy_ns`)."""

TIMES = ("posted_ns", "entered_ns", "left_ns", "lapse_start_ns", "lapse_end_ns")


class Pattern(IntEnum):
    """Who cannot do without whom in an exchange."""

    ALL_TO_ALL = 0
    ALL_TO_ONE = 1
    ONE_TO_ALL = 2
    SEND = 3
    RECEIVE = 4


@dataclass(frozen=True)
class Split:
    """What some exchanges of one rank were made of, in ns.

    `wait_ns` and `late` [exchanges] say how long it waited in each, and for whom (itself if for nobody);
    `charged_ns` adds the waiting up by the rank that caused it; `stopped_ns` is its own lapses,
    `hidden_ns` what went on behind its computing (at most: an exchange may have been over earlier).
    """

    wait_ns: Times
    late: Times
    charged_ns: dict[int, int]
    stopped_ns: int
    hidden_ns: int


def split(log: Log, rank: int) -> Split:
    """Split collective exchanges for one rank; `log` [ranks, exchanges], all ranks took part in all."""
    held_up = _held_up(log)
    wait = sum((stage.length * (stage.cause != np.arange(len(log))[:, None]) for stage in held_up), start=0)
    mine = [_Stage(*(part[rank] for part in (stage.start, stage.length, stage.cause))) for stage in held_up]
    charged = np.zeros(len(log), np.int64)
    for stage in mine:
        np.add.at(charged, stage.cause, stage.length)
    stopped_ns, charged[rank] = int(charged[rank]), 0
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
        wait_ns=wait[rank],
        late=np.where(wait[rank] > 0, blamed, rank),
        charged_ns={r: int(ns) for r, ns in enumerate(charged) if ns},
        stopped_ns=stopped_ns,
        hidden_ns=int(_hidden(_until(log, _late(log))[rank], log[rank]).sum()),
    )


@dataclass(frozen=True)
class _Stage:
    """Stretches [ranks, exchanges] in which ranks were held up, and by whom; by itself a rank was stopped."""

    start: Times
    length: Times
    cause: Times


def _held_up(log: Log) -> tuple[_Stage, _Stage, _Stage]:
    """What held up each rank in each exchange, one after the other: whom it could not do without and who
    was not there yet; who came even later, though before it could leave; whose lapse it sat through."""
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

    # One lapse an exchange: the one that ended last is what everybody had to sit through.
    lapsed, columns = log["lapse_end_ns"].argmax(axis=0), np.arange(exchanges)
    start = np.maximum(until, log["lapse_start_ns"][lapsed, columns])
    length = _overlap(start, left, start, log["lapse_end_ns"][lapsed, columns])
    return needed, sat_through, _Stage(start, length, np.broadcast_to(lapsed, log.shape))


def _late(log: Log) -> Times:
    """Whom each rank could not do without and who came last [ranks, exchanges]."""
    pattern, root = log["pattern"], log["peer"]
    is_root = root == np.arange(len(log))[:, None]
    for_all = (pattern == Pattern.ALL_TO_ALL) | ((pattern == Pattern.ALL_TO_ONE) & is_root)
    return np.where(for_all, log["posted_ns"].argmax(axis=0), root)


def _until(log: Log, late: Times) -> Times:
    return np.take_along_axis(log["posted_ns"], late, axis=0)


def split_messages(logs: list[Log], rank: int, unreceived: dict[tuple[int, int, int], Log]) -> Split:
    """Split the messages of one rank; `logs` holds those of every rank.

    `unreceived` holds what others sent to this rank in earlier logs and it has not received yet; it is
    brought up to date. A send that nobody has received yet was taken off the sender's hands: no wait.
    """
    mine = logs[rank]
    received: dict[tuple[int, int, int], Log] = {}
    for owner, log in enumerate(logs):
        for row in log[log["peer"] == rank]:
            (unreceived if row["pattern"] == Pattern.SEND else received)[_name(row, owner)] = row
    wait, late, hidden, stopped = np.zeros(len(mine), np.int64), np.full(len(mine), rank), 0, 0
    for place, row in enumerate(mine):
        is_send = row["pattern"] == Pattern.SEND
        other = received.get(_name(row, rank)) if is_send else unreceived.pop(_name(row, rank))
        if other is None or (is_send and row["left_ns"] < other["posted_ns"]):
            continue
        until, entered, left = other["posted_ns"], row["entered_ns"], row["left_ns"]
        hidden += int(_hidden(until, row))
        waited = int(_wait(until, entered, left))
        # Of the two ends' lapses the longer one is what held the message up.
        theirs = _overlap(entered + waited, left, other["lapse_start_ns"], other["lapse_end_ns"])
        own = _overlap(entered + waited, left, row["lapse_start_ns"], row["lapse_end_ns"])
        if own > theirs:
            stopped += int(own)
        else:
            waited += int(theirs)
        wait[place] = waited
        late[place] = row["peer"] if waited else rank
    charged = np.zeros(len(logs), np.int64)
    np.add.at(charged, late, wait)
    return Split(wait, late, {r: int(ns) for r, ns in enumerate(charged) if ns}, stopped, hidden)


def violations(log: Log) -> int:
    """In how many exchanges of all [ranks, exchanges] the clocks contradict each other: somebody left
    before somebody else had come."""
    contradicts = log["left_ns"].min(axis=0) < log["posted_ns"].max(axis=0)
    return int((contradicts & (log["pattern"][0] == Pattern.ALL_TO_ALL)).sum())


def _wait(until: Times, entered: Times, left: Times) -> Times:
    return np.asarray(np.minimum(np.maximum(until - entered, 0), left - entered))


def _overlap(start: Times, end: Times, other_start: Times, other_end: Times) -> Times:
    return np.asarray(np.maximum(np.minimum(end, other_end) - np.maximum(start, other_start), 0))


def _hidden(until: Times, row: Log) -> Times:
    return np.asarray(np.maximum(row["entered_ns"] - np.maximum(until, row["posted_ns"]), 0))


def _name(row: Log, owner: int) -> tuple[int, int, int]:
    """Source, destination and number of the message of which `row` is one end."""
    peer, number = int(row["peer"]), int(row["number"])
    return (owner, peer, number) if row["pattern"] == Pattern.SEND else (peer, owner, number)
