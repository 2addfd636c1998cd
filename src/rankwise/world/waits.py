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
    ranks, exchanges = log.shape
    posted, entered, left = log["posted_ns"], log["entered_ns"], log["left_ns"]
    latest = posted.argmax(axis=0)
    pattern, root = log["pattern"], log["peer"]
    is_root = root == np.arange(ranks)[:, None]
    for_all = (pattern == Pattern.ALL_TO_ALL) | ((pattern == Pattern.ALL_TO_ONE) & is_root)
    late = np.where(for_all, latest, root)
    until = np.take_along_axis(posted, late, axis=0)
    wait = _wait(until, entered, left)
    # One lapse an exchange: the one that ended last is what everybody had to sit through.
    lapsed = log["lapse_end_ns"].argmax(axis=0)
    columns = np.arange(exchanges)
    lapse_start = np.maximum(log["lapse_start_ns"][lapsed, columns], entered + wait)
    lapse = _overlap(lapse_start, left, lapse_start, log["lapse_end_ns"][lapsed, columns])

    charged = np.zeros(ranks, np.int64)
    np.add.at(charged, late[rank], wait[rank])
    others = lapsed != rank
    np.add.at(charged, lapsed, lapse[rank] * others)
    # The parts of each wait in which the late one was waiting itself, in the exchange before.
    now, before = columns[1:], columns[:-1]
    by = late[rank, now]
    starts, ends = entered[rank, now], entered[rank, now] + wait[rank, now]
    for start, length, cause in (
        (entered[by, before], wait[by, before], late[by, before]),
        (lapse_start[by, before], lapse[by, before], lapsed[before]),
    ):
        shared = np.where(cause != rank, _overlap(starts, ends, start, start + length), 0)
        np.subtract.at(charged, by, shared)
        np.add.at(charged, cause, shared)

    all_wait = wait[rank] + lapse[rank] * others
    blamed = np.where(others & (lapse[rank] > wait[rank]), lapsed, late[rank])
    return Split(
        wait_ns=all_wait,
        late=np.where(all_wait > 0, blamed, rank),
        charged_ns={r: int(ns) for r, ns in enumerate(charged) if ns},
        stopped_ns=int((lapse[rank] * ~others).sum()),
        hidden_ns=int(_hidden(until[rank], log[rank]).sum()),
    )


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
