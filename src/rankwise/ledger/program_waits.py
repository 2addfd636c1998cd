"""Who waited for whom in the calls of an MPI program, found from what all its ranks have logged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rankwise.ledger.call_log import Comm, Kind, RankLog, Rows
from rankwise.ledger.last_entry import Times, last_before, last_to_come
from rankwise.ledger.message_ends import Ends, Matched, match, match_ends

_COLLECTIVE = (Kind.COLLECTIVE, Kind.POST_COLLECTIVE)
_ENTRIES = (
    *(*_COLLECTIVE, Kind.SEND, Kind.RECEIVE, Kind.PROBE, Kind.EXCHANGE, Kind.WAIT),
    *(Kind.POST_SEND, Kind.POST_RECEIVE),
)
_WAITING = (Kind.COLLECTIVE, Kind.SEND, Kind.RECEIVE, Kind.PROBE, Kind.EXCHANGE, Kind.WAIT)


@dataclass
class Waits:
    """Of one rank: for each of its rows how long it waited, for which rank, and with which of that rank's
    rows that one came (-1 for nobody)."""

    wait_ns: Times
    late: Times
    late_row: Times


@dataclass(frozen=True)
class _Rank:
    """A rank's log with what the comparison asks of it often: when its calls came to MPI, after pickling, and
    left it, before unpickling, those of other threads behind those of the main one; `in_order` are the rows
    that are entries (-1 in other threads), and `entries` their times."""

    log: RankLog
    count: int
    came: Times
    left: Times
    in_order: Times
    entries: Times


def find_waits(logs: Sequence[RankLog], messages: Matched | None = None) -> dict[int, Waits]:
    """The waits in the calls of each rank's main thread, by its number; `logs` are on one clock, and
    `messages` those of theirs, if they are known."""
    ranks = {log.rank: _prepared(log) for log in logs}
    found = {
        rank: Waits(*(np.full(len(its.log.rows), none) for none in (0, -1, -1)))
        for rank, its in ranks.items()
    }
    until = {rank: its.came[: its.count].copy() for rank, its in ranks.items()}
    for exchange in collectives(logs):
        _compare_collectives(exchange, ranks, until, found)
    ends = match_ends(messages or match(logs), logs)
    for rank, its in ranks.items():
        for of_rank in ends[rank]:
            _compare_messages(its, of_rank, ranks, until[rank], found[rank])
    for rank, its in ranks.items():
        _gather_parts(its, until[rank], found[rank])
        mine, rows, came, left = found[rank], its.log.rows, its.came[: its.count], its.left[: its.count]
        longest = np.minimum(left - came, rows["inside_ns"] - rows["dumps_ns"] - rows["loads_ns"])
        mine.wait_ns = np.clip(until[rank] - came, 0, np.maximum(longest, 0))
        mine.wait_ns[~np.isin(rows["kind"], _WAITING)] = 0
        nobody = (mine.wait_ns == 0) | (mine.late < 0)
        mine.wait_ns[nobody], mine.late[nobody], mine.late_row[nobody] = 0, -1, -1
    return found


def _prepared(log: RankLog) -> _Rank:
    rows = np.concatenate([log.rows, log.others])
    left = np.where(rows["left_ns"] > 0, rows["left_ns"], np.iinfo(np.int64).max)
    came = np.minimum(rows["entered_ns"] + rows["dumps_ns"], left)
    left = np.maximum(left - rows["loads_ns"], came)
    numbers = np.arange(len(rows))
    numbers[len(log.rows) :] = -1
    is_entry = np.isin(rows["kind"], _ENTRIES)
    order = np.argsort(came[is_entry], kind="stable")
    return _Rank(log, len(log.rows), came, left, numbers[is_entry][order], came[is_entry][order])


@dataclass(frozen=True)
class Exchanges:
    """The collectives of one communicator that all its members have come to: rows [members, exchanges], where
    those of other threads are counted behind those of the main one; `members` as they are ordered in the
    world."""

    comm: Comm
    members: tuple[int, ...]
    rows: Times


def collectives(logs: Sequence[RankLog]) -> Iterator[Exchanges]:
    """The collectives of each communicator, as far as all members have logged them: the first on one is the
    first on all."""
    comms = {comm.name: comm for log in logs for comm in log.comms}
    rows_of: dict[tuple[tuple[int, ...], int], dict[int, Times]] = defaultdict(dict)
    for log in logs:
        rows = np.concatenate([log.rows, log.others])
        which = np.flatnonzero(np.isin(rows["kind"], _COLLECTIVE) & (rows["comm"] >= 0))
        which = which[np.lexsort((rows["entered_ns"][which], rows["comm"][which]))]
        if not len(which):
            continue
        numbers, starts = np.unique(rows["comm"][which], return_index=True)
        for number, of_it in zip(numbers.tolist(), np.split(which, starts[1:]), strict=True):
            rows_of[log.comms[number].name][log.rank] = of_it
    for name, of_rank in rows_of.items():
        members, _ = name
        there = tuple(rank for rank in members if rank in of_rank)
        if len(there) > 1 and len(there) == len(members):
            count = min(len(of_rank[rank]) for rank in there)
            yield Exchanges(comms[name], there, np.stack([of_rank[rank][:count] for rank in there]))


def _compare_collectives(
    these: Exchanges, ranks: dict[int, _Rank], until: dict[int, Times], found: dict[int, Waits]
) -> None:
    entries = np.stack([ranks[rank].came[rows] for rank, rows in zip(these.members, these.rows, strict=True)])
    left = np.stack([_over(ranks[rank], rows) for rank, rows in zip(these.members, these.rows, strict=True)])
    last, late = last_to_come(entries, left)
    members = np.array(these.members)
    counts = np.array([ranks[rank].count for rank in these.members])
    told = np.where(
        these.rows < counts[:, None], these.rows, -1
    )  # waits, and their ends, are the main threads'
    for place, rank in enumerate(these.members):
        mine = told[place] >= 0
        rows = told[place][mine]
        until[rank][rows] = last[place][mine]
        found[rank].late[rows] = members[late[place]][mine]
        found[rank].late_row[rows] = np.take_along_axis(told, late[[place]], axis=0)[0][mine]
        nobody = late[place][mine] == place
        found[rank].late[rows[nobody]] = -1


def _over(rank: _Rank, rows: Times) -> Times:
    """When collectives were over for a rank: those in the background with the wait that ended them."""
    left = rank.left[rows].copy()
    log = rank.log.rows
    posted = np.concatenate([log["kind"], rank.log.others["kind"]])[rows] == Kind.POST_COLLECTIVE
    if posted.any():
        ends = _ends(log)
        left[posted] = [ends.get(int(row), 0) for row in rows[posted]]
    return left


def _ends(log: Rows) -> dict[int, int]:
    """When each request that came to its end did so, by the row that began it."""
    parts = log[log["kind"] == Kind.PART]
    return dict(zip(parts["request"].tolist(), parts["left_ns"].tolist(), strict=True))


def _compare_messages(its: _Rank, ends: Ends, ranks: dict[int, _Rank], until: Times, found: Waits) -> None:
    """Messages, and ends of requests: until the partner last came to MPI before its own end was over."""
    rows = its.log.rows
    parts = np.flatnonzero(rows["kind"] == Kind.PART)
    until[parts] = 0
    for other in np.unique(ends["partner"]):
        if other not in ranks or other == its.log.rank:
            continue
        partner, of_it = ranks[int(other)], ends[ends["partner"] == other]
        mine = of_it["row"]
        place = last_before(partner.entries, np.minimum(its.left[mine], of_it["over_there_ns"]))
        mine, place = mine[place >= 0], place[place >= 0]
        came = partner.entries[place]
        later = came > until[mine]
        mine, place = mine[later], place[later]
        until[mine], found.late[mine] = came[later], other
        found.late_row[mine] = partner.in_order[place]
    # What ends a collective in the background is the last member to begin it.
    post = rows["request"][parts]
    of_all = rows["kind"][post] == Kind.POST_COLLECTIVE
    row, post = parts[of_all], post[of_all]
    until[row], found.late[row], found.late_row[row] = until[post], found.late[post], found.late_row[post]


def heads(rows: Rows) -> Times:
    """For each row the one of which it is a part, itself if it is none. Between the two may stand what the
    log took itself, where it went on in a new piece of its file."""
    between = np.isin(rows["kind"], (Kind.PART, Kind.INSTRUMENT))
    return np.maximum.accumulate(np.where(between, 0, np.arange(len(rows))))


def _gather_parts(its: _Rank, until: Times, found: Waits) -> None:
    """A wait lasts until the last of its parts."""
    rows = its.log.rows
    parts = np.flatnonzero(rows["kind"] == Kind.PART)
    of_part = heads(rows)[parts]
    for place in np.argsort(until[parts], kind="stable"):  # the last one stays
        part, head = parts[place], of_part[place]
        if found.late[part] >= 0 and until[part] > until[head]:
            until[head], found.late[head] = until[part], found.late[part]
            found.late_row[head] = found.late_row[part]
