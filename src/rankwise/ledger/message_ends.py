"""The two ends of each message of an MPI program, matched by what MPI promises: of those between two ranks
with one tag on one communicator, the first receive that was begun gets the first that was sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.ledger.call_log import Comm, Kind, RankLog, Rows
from rankwise.ledger.last_entry import Times

NEVER = np.iinfo(np.int64).max

Ends = NDArray[Any]
"""Ends of messages of one rank, of dtype END."""

END = np.dtype(
    [
        (name, "i8")
        for name in (
            *("rank", "begun", "row", "partner", "comm", "tag", "order", "over_ns", "over_there_ns", "bytes"),
        )
    ]
)
"""`row` is that in which the rank waits for it and `begun` the one that began it, in the main thread (-1 in
others); `partner` a rank of the world; `comm` the communicator, by a number that all ranks share; `order`
when it was begun; `over_ns` when this end of it was over, and `over_there_ns` the other one, NEVER if that is
not known; `bytes` are those that were sent, or those of the buffer if the sender is not known."""

_SENDS = (Kind.SEND, Kind.EXCHANGE)
_RECEIVES = (Kind.RECEIVE, Kind.EXCHANGE)


@dataclass(frozen=True)
class Matched:
    """All ends of messages, of all ranks in order; `to_receive` [sent] and `to_send` [received] are the
    places of the other ends, -1 where there is none. `comms` have the numbers that ranks share."""

    sent: Ends
    received: Ends
    to_receive: Times
    to_send: Times
    comms: list[Comm]


def match(logs: Sequence[RankLog]) -> Matched:
    """The messages of a program's ranks."""
    comms = {comm.name: comm for log in logs for comm in log.comms}
    names = {name: number for number, name in enumerate(comms)}
    sent = _of_all(logs, names, sends=True)
    received = _of_all(logs, names, sends=False)
    keys = np.concatenate([_keys(sent, sends=True), _keys(received, sends=False)])
    _, number = np.unique(keys, axis=0, return_inverse=True) if len(keys) else (None, np.zeros(0, np.int64))
    number = number.reshape(-1)
    to_receive, to_send = _pairs(number[: len(sent)], sent, number[len(sent) :], received)
    for these, there, others in ((sent, to_receive, received), (received, to_send, sent)):
        known = there >= 0
        these["over_there_ns"][known] = others["over_ns"][there[known]]
    is_known = to_send >= 0
    received["bytes"][is_known] = sent["bytes"][to_send[is_known]]
    return Matched(sent, received, to_receive, to_send, [*comms.values()])


def match_ends(found: Matched, logs: Sequence[RankLog]) -> dict[int, tuple[Ends, Ends]]:
    """For each rank the ends of what it sent, and of what it received or found by a probe."""
    of_rank = {}
    for log in logs:
        mine = found.sent[found.sent["rank"] == log.rank]
        waited = np.concatenate([found.received[found.received["rank"] == log.rank], _probes(log)])
        of_rank[log.rank] = mine[mine["row"] >= 0], waited[waited["row"] >= 0]
    return of_rank


def _keys(ends: Ends, *, sends: bool) -> Times:
    """Communicator, sender, receiver and tag of each."""
    pair = (ends["rank"], ends["partner"]) if sends else (ends["partner"], ends["rank"])
    return np.stack([ends["comm"], *pair, ends["tag"]], axis=1)


def _pairs(of_sent: Times, sent: Ends, of_received: Times, received: Ends) -> tuple[Times, Times]:
    """For each sent one the place of the received one, and the other way round; -1 for none. The first of a
    kind belong together, and so on."""
    there, back = np.full(len(sent), -1), np.full(len(received), -1)
    by_sent, by_received = np.lexsort((sent["order"], of_sent)), np.lexsort((received["order"], of_received))
    first = _count_within(of_sent[by_sent])
    second = _count_within(of_received[by_received])
    longest = max(len(sent), len(received), 1)
    left, right = of_sent[by_sent] * longest + first, of_received[by_received] * longest + second
    _, at_left, at_right = np.intersect1d(left, right, assume_unique=True, return_indices=True)
    there[by_sent[at_left]] = by_received[at_right]
    back[by_received[at_right]] = by_sent[at_left]
    return there, back


def _count_within(groups: Times) -> Times:
    """The place of each in its group, of sorted groups."""
    if not len(groups):
        return groups
    places = np.arange(len(groups))
    starts = np.concatenate([[True], groups[1:] != groups[:-1]])
    return places - np.maximum.accumulate(np.where(starts, places, 0))


def _of_all(logs: Sequence[RankLog], names: dict[Any, int], *, sends: bool) -> Ends:
    found = [np.zeros(0, END)]
    for log in logs:
        found.append(_of_rows(log, log.rows, names, sends=sends, is_main=True))
        found.append(_of_rows(log, log.others, names, sends=sends, is_main=False))
    return np.concatenate(found)


def _of_rows(log: RankLog, rows: Rows, names: dict[Any, int], *, sends: bool, is_main: bool) -> Ends:
    at_once = np.flatnonzero(np.isin(rows["kind"], _SENDS if sends else _RECEIVES))
    parts = np.flatnonzero(rows["kind"] == Kind.PART) if is_main else np.zeros(0, np.int64)
    begun = rows["request"][parts]
    posts = Kind.POST_SEND if sends else Kind.POST_RECEIVE
    parts, begun = parts[rows["kind"][begun] == posts], begun[rows["kind"][begun] == posts]
    open_still = np.setdiff1d(np.flatnonzero(rows["kind"] == posts), begun)  # which nobody waited for
    waits = np.concatenate([at_once, parts, open_still])
    begins = np.concatenate([at_once, begun, open_still])
    ends = np.zeros(len(waits), END)
    if sends:
        peer, tag = rows["peer"][begins], rows["tag"][begins]
    else:
        peer, tag = rows["source"][waits], rows["got_tag"][waits]
        peer = np.where(peer >= 0, peer, rows["source"][begins])
        tag = np.where(tag >= 0, tag, rows["tag"][begins])
    ends["rank"] = log.rank
    ends["row"] = np.where(rows["kind"][waits] == posts, -1, waits) if is_main else -1
    ends["begun"] = begins if is_main else -1
    # The row of an exchange, or of one in the background, tells what is sent.
    tells = np.ones(len(waits), bool) if sends else rows["kind"][begins] != Kind.EXCHANGE
    ends["bytes"] = np.where(tells, rows["bytes"][begins], 0)
    ends["tag"], ends["order"] = tag, rows["entered_ns"][begins]
    ends["over_ns"], ends["over_there_ns"] = rows["left_ns"][waits] - rows["loads_ns"][waits], NEVER
    ends["over_ns"][(rows["left_ns"][waits] == 0) | (rows["kind"][waits] == posts)] = NEVER
    _name(ends, log, rows["comm"][begins], peer, names)
    return ends[(ends["partner"] >= 0)]


def _probes(log: RankLog) -> Ends:
    """Messages that a rank only looked for."""
    rows = log.rows
    found = np.flatnonzero((rows["kind"] == Kind.PROBE) & (rows["source"] >= 0))
    ends = np.zeros(len(found), END)
    ends["rank"], ends["row"], ends["begun"], ends["over_there_ns"] = log.rank, found, found, NEVER
    _name(ends, log, rows["comm"][found], rows["source"][found], {})
    return ends


def _name(ends: Ends, log: RankLog, comm: Times, peer: Times, names: dict[Any, int]) -> None:
    """Communicators and partners as all ranks know them; those of unknown communicators stay nobody's."""
    ends["partner"] = ends["comm"] = -1
    for number in np.unique(comm[comm >= 0]):
        its = log.comms[number]
        peers = np.array([*its.peers, -1])
        of_it = comm == number
        ends["partner"][of_it] = peers[
            np.where((peer[of_it] >= 0) & (peer[of_it] < len(its.peers)), peer[of_it], -1)
        ]
        ends["comm"][of_it] = names.get(its.name, -1)
