"""What exporters know of a program without a `Run`: its calls and regions, and which of its calls are the
ends of one message, or parts of one collective."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rankwise.export.parts import Call, Collective, Communicator, Message, Region
from rankwise.ledger.call_log import Comm, Kind, RankLog
from rankwise.ledger.last_entry import Times
from rankwise.ledger.message_ends import Ends, match
from rankwise.ledger.program_waits import collectives, heads
from rankwise.ledger.waits import Pattern
from rankwise.report import program_trace
from rankwise.report.exchanges import Exchange

_ALL, _TO_ONE, _TO_ALL = Pattern.ALL_TO_ALL, Pattern.ALL_TO_ONE, Pattern.ONE_TO_ALL

OPERATIONS = {
    **dict.fromkeys(("barrier", "monitoredbarrier"), (_ALL, "barrier")),
    **dict.fromkeys(("bcast", "broadcast", "broadcastobjectlist"), (_TO_ALL, "bcast")),
    **dict.fromkeys(("gather", "gatherobject"), (_TO_ONE, "gather")),
    **dict.fromkeys(("scatter", "scatterobjectlist"), (_TO_ALL, "scatter")),
    **dict.fromkeys(("allgather", "allgatherobject", "allgatherintotensor"), (_ALL, "allgather")),
    **dict.fromkeys(("alltoall", "alltoallsingle"), (_ALL, "alltoall")),
    **dict.fromkeys(("reducescatter", "reducescattertensor"), (_ALL, "reduce_scatter")),
    "reducescatterblock": (_ALL, "reduce_scatter_block"),
    "gatherv": (_TO_ONE, "gatherv"),
    "scatterv": (_TO_ALL, "scatterv"),
    "reduce": (_TO_ONE, "reduce"),
    **{
        name: (_ALL, name) for name in ("allgatherv", "alltoallv", "alltoallw", "allreduce", "scan", "exscan")
    },
}
"""The pattern and the common name of collectives, by the names of their calls in small letters without `_`.
Making a communicator is none of them, nor is what neighbours exchange."""

Operation = tuple[Pattern, str]


@dataclass(frozen=True)
class ProgramCalls:
    """The calls of all ranks' main threads and the regions that the program named, in order of rank and time;
    the messages and collectives among them; what is missing, a line each."""

    regions: tuple[Region, ...]
    messages: tuple[Message, ...]
    collectives: tuple[Collective, ...]
    remarks: tuple[str, ...]


def program_calls(logs: Sequence[RankLog]) -> ProgramCalls:
    """What the ranks' `logs`, on one clock, tell; times are ns since the start of rank 0's process.

    A message is there if both its ends are calls of main threads that are shown, a collective if all its
    parts are; those between the sides of an intercommunicator are not.
    """
    calls, count = program_trace.calls_of(logs)
    shown = _Shown(logs, calls)
    messages, together = tuple(_messages(logs, shown)), tuple(_collectives(logs, shown))
    found = []
    for log in logs:
        found += [
            Region(log.rank, path[-1], begins_ns, ends_ns, len(path) - 1000)
            for path, begins_ns, ends_ns in program_trace.regions_of(log, logs[0].said["start_ns"])
        ]
        for one in shown.of_rank[log.rank].values():
            found += _regions(one, _call(log, one.row), tuple(shown.ended_in[one.rank, one.row]))
    found.sort(key=lambda region: (region.rank, region.start_ns, -region.end_ns, region.depth))
    left_out = (f"{len(calls)} of {count} calls are in it, the longest",) if len(calls) < count else ()
    return ProgramCalls(tuple(found), messages, together, left_out)


def _regions(one: program_trace.Call, call: Call | None, parts: tuple[Exchange, ...]) -> Iterator[Region]:
    name = f"{one.name} at {one.place}" if one.place else one.name
    yield Region(one.rank, name, one.entered_ns, one.left_ns, 0, (("bytes", one.bytes),), parts, call)
    if one.wait_ns:
        late = (("waited for rank", one.late),)
        yield Region(one.rank, "wait", one.came_ns, one.transfer_ns, 1, late)
        if one.transfer_ns < one.over_ns:
            yield Region(one.rank, "transfer", one.transfer_ns, one.over_ns, 1)


def _call(log: RankLog, row: int) -> Call | None:
    number = int(log.rows["site"][row])
    if number < 0:
        return None
    site = log.sites[number]
    return Call(site.call, Kind(int(log.rows["kind"][row])), site.file, site.line)


class _Shown:
    """The calls that are shown: of each rank by row. `ended_in` are the parts that are over in each."""

    def __init__(self, logs: Sequence[RankLog], calls: Sequence[program_trace.Call]) -> None:
        self.of_rank: dict[int, dict[int, program_trace.Call]] = {log.rank: {} for log in logs}
        for one in calls:
            self.of_rank[one.rank][one.row] = one
        self.ended_in: dict[tuple[int, int], list[Exchange]] = defaultdict(list)
        self._heads = {log.rank: heads(log.rows) for log in logs}
        self._is_shown = {log.rank: np.zeros(len(log.rows), bool) for log in logs}
        for rank, rows in self.of_rank.items():
            self._is_shown[rank][list(rows)] = True

    def both(self, rank: int, begun: Times, over: Times) -> NDArray[np.bool_]:
        """Whether the calls are shown that began something, and in which it was over; -1 is no call."""
        there = (begun >= 0) & (over >= 0)
        shown = self._is_shown[rank]
        there[there] = shown[begun[there]] & shown[self._heads[rank][over[there]]]
        return there

    def part(self, rank: int, begun: int, over: int, pattern: Pattern, peer: int, key: int) -> Exchange:
        """A rank's part in what row `begun` began and row `over` ended."""
        head = int(self._heads[rank][over])
        began, ended = self.of_rank[rank][begun], self.of_rank[rank][head]
        part = Exchange(
            rank=rank,
            pattern=pattern,
            peer=peer,
            key=(key,),
            posted_ns=began.entered_ns,
            entered_ns=ended.entered_ns,
            transfer_ns=ended.transfer_ns,
            left_ns=ended.left_ns,
            late=ended.late,
            bytes=began.bytes,
        )
        self.ended_in[rank, head].append(part)
        return part


def _communicator(comm: Comm, ranks: set[int]) -> Communicator | None:
    """A communicator as exporters know it; None of one that has two sides, or members that left no log."""
    if comm.members != comm.peers or not ranks.issuperset(comm.members):
        return None
    return Communicator(comm.members, comm.number)


def _messages(logs: Sequence[RankLog], shown: _Shown) -> Iterator[Message]:
    found, ranks = match(logs), {log.rank for log in logs}
    known = [_communicator(comm, ranks) for comm in found.comms]
    sent = found.sent[found.to_receive >= 0]
    received = found.received[found.to_receive[found.to_receive >= 0]]
    there = _visible(sent, shown) & _visible(received, shown)
    for number, (one, other) in enumerate(zip(sent[there].tolist(), received[there].tolist(), strict=True)):
        begins, ends = (dict(zip(sent.dtype.names or (), values, strict=True)) for values in (one, other))
        communicator = known[begins["comm"]]
        if communicator is not None:
            to, of = begins["partner"], ends["partner"]
            yield Message(
                shown.part(of, begins["begun"], begins["row"], Pattern.SEND, to, number),
                shown.part(to, ends["begun"], ends["row"], Pattern.RECEIVE, of, number),
                communicator,
                begins["tag"],
            )


def _visible(ends: Ends, shown: _Shown) -> NDArray[np.bool_]:
    there = np.zeros(len(ends), bool)
    for rank in np.unique(ends["rank"]):
        of_it = ends["rank"] == rank
        there[of_it] = shown.both(int(rank), ends["begun"][of_it], ends["row"][of_it])
    return there


def _collectives(logs: Sequence[RankLog], shown: _Shown) -> Iterator[Collective]:
    by_rank = {log.rank: log for log in logs}
    over = {log.rank: _over(log) for log in logs}
    operations = {log.rank: [operation_of(site.call) for site in log.sites] for log in logs}
    number = 0
    for these in collectives(logs):
        communicator = _communicator(these.comm, set(by_rank))
        if communicator is None:
            continue
        of_ranks = [*zip(these.members, these.rows, strict=True)]
        there = np.all([_in_main_thread(over[rank], rows, rank, shown) for rank, rows in of_ranks], axis=0)
        for place in np.flatnonzero(there):
            rows = {rank: int(of_rank[place]) for rank, of_rank in of_ranks}
            told = {_told(by_rank[rank], row, operations[rank]) for rank, row in rows.items()}
            operation, root = told.pop()
            if told or operation is None:
                continue  # ranks that do not mean the same, or what no reader has a name for
            pattern, name = operation
            root = communicator.ranks[root] if 0 <= root < len(communicator.ranks) else -1
            if pattern is not _ALL and root < 0:
                continue
            parts = [
                shown.part(rank, row, int(over[rank][row]), pattern, root, number)
                for rank, row in rows.items()
            ]
            yield Collective(pattern, root, tuple(parts), communicator, name)
            number += 1


def _in_main_thread(over: Times, rows: Times, rank: int, shown: _Shown) -> NDArray[np.bool_]:
    """Which rows are of calls of the main thread that are shown."""
    there = rows < len(over)
    there[there] = shown.both(rank, rows[there], over[rows[there]])
    return there


def _over(log: RankLog) -> Times:
    """For each row the one in which it was over: itself, or of what went on in the background the part of a
    wait; -1 if it never was."""
    rows = log.rows
    over = np.arange(len(rows))
    over[rows["kind"] == Kind.POST_COLLECTIVE] = -1
    parts = np.flatnonzero(rows["kind"] == Kind.PART)
    over[rows["request"][parts]] = parts
    return over


def operation_of(call: str) -> Operation | None:
    """Which collective a call is by its name; None if it is none that has a common name."""
    name = call.lower().replace("_", "")
    return OPERATIONS.get(name) or OPERATIONS.get(name.removeprefix("i"))


def _told(log: RankLog, row: int, operations: Sequence[Operation | None]) -> tuple[Operation | None, int]:
    """Which collective a row is, and the root's place in its communicator."""
    site = int(log.rows["site"][row])
    return operations[site] if site >= 0 else None, int(log.rows["peer"][row])
