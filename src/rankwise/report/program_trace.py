"""What each rank of a program did in MPI when, as events of a trace: each call a slice, in it its waiting and
its transfer, and an arrow from the entry of the rank that was late to where the wait for it ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rankwise.errors import TimelineError
from rankwise.ledger.call_log import Kind, RankLog, read_logs
from rankwise.ledger.last_entry import Times
from rankwise.ledger.program_waits import Waits, find_waits
from rankwise.report.trace_events import INSIDE_NS, Event, a_slice, region_track
from rankwise.runs.folder import RunFolder

MOST_CALLS = 100_000
"""Calls that a trace shows: viewers open no more than some hundred MB. Those that took longest stay."""


@dataclass(frozen=True)
class ProgramTrace:
    """The events of a program, its ranks with their hosts, and what is kept of its calls."""

    events: list[Event]
    hosts: dict[int, str]
    kept: str


@dataclass(frozen=True)
class Call:
    """A call of a rank's main thread. Times are ns since the start of rank 0's process; `wait_ns` of it, from
    `came_ns` on, was waiting for `late`, which came with its call `late_row` (-1 for nobody)."""

    rank: int
    row: int
    name: str
    place: str
    function: str
    entered_ns: int
    came_ns: int
    over_ns: int
    left_ns: int
    wait_ns: int
    late: int
    late_row: int
    bytes: int

    @property
    def transfer_ns(self) -> int:
        """When its waiting was over, and its transfer began."""
        return self.came_ns + self.wait_ns


def read_calls(folder: RunFolder) -> list[RankLog]:
    """What the ranks of a program logged. Raises TimelineError if it is not there."""
    logs = read_logs(folder.calls)
    if not logs:
        raise TimelineError(f"there are no calls in {folder.calls}: nothing to trace")
    return logs


def program_trace(logs: Sequence[RankLog]) -> ProgramTrace:
    """The trace of a program from what its ranks logged."""
    calls, all_calls = calls_of(logs)
    found: list[Event] = []
    for log in logs:
        found += _regions(log, logs[0].said["start_ns"])
    for one in calls:
        found += _call(one)
    shown = {(one.rank, one.row): one for one in calls}
    number = 0
    for one in calls:
        source = shown.get((one.late, one.late_row))
        if one.wait_ns and source and source.entered_ns <= one.transfer_ns:
            number += 1
            found.append(Event("s", source.rank, source.name, source.entered_ns + INSIDE_NS, arrow=number))
            found.append(Event("f", one.rank, source.name, one.transfer_ns + INSIDE_NS, arrow=number))
    kept = "all calls" if len(calls) == all_calls else f"the {len(calls)} longest of {all_calls} calls"
    return ProgramTrace(found, {log.rank: log.said["host"] for log in logs}, kept)


def calls_of(logs: Sequence[RankLog]) -> tuple[list[Call], int]:
    """The longest calls of all ranks, in order of rank and time, and how many calls there are."""
    waits, start_ns = find_waits(logs), logs[0].said["start_ns"]
    chosen = {log.rank: _shown(log) for log in logs}
    count = sum(map(len, chosen.values()))
    if count > MOST_CALLS:
        lengths = np.concatenate([_length(log)[chosen[log.rank]] for log in logs])
        least_ns = np.partition(lengths, -MOST_CALLS)[-MOST_CALLS]
        chosen = {log.rank: chosen[log.rank][_length(log)[chosen[log.rank]] >= least_ns] for log in logs}
    return [one for log in logs for one in _calls(log, waits[log.rank], chosen[log.rank], start_ns)], count


def _length(log: RankLog) -> Times:
    return np.asarray(log.rows["left_ns"] - log.rows["entered_ns"])


def _shown(log: RankLog) -> Times:
    kinds = log.rows["kind"]
    return np.flatnonzero((kinds != Kind.PART) & (kinds != Kind.INSTRUMENT) & (log.rows["left_ns"] > 0))


def _calls(log: RankLog, waits: Waits, chosen: Times, start_ns: int) -> Iterator[Call]:
    for number in chosen.tolist():
        row = log.rows[number]
        site = log.sites[row["site"]] if row["site"] >= 0 else None
        entered_ns, left_ns = int(row["entered_ns"]) - start_ns, int(row["left_ns"]) - start_ns
        came_ns = min(entered_ns + int(row["dumps_ns"]), left_ns)
        over_ns = max(left_ns - int(row["loads_ns"]), came_ns)
        yield Call(
            *(log.rank, number, site.call if site else "start of MPI", site.place if site else ""),
            site.function if site else "",
            *(entered_ns, came_ns, over_ns, left_ns, min(int(waits.wait_ns[number]), over_ns - came_ns)),
            *(int(waits.late[number]), int(waits.late_row[number]), int(row["bytes"])),
        )


def _call(one: Call) -> Iterator[Event]:
    about = {"line": one.place, "function": one.function, "bytes": one.bytes}
    if one.wait_ns:
        about["waited_for"] = f"rank {one.late}"
    yield a_slice(one.rank, one.name, one.entered_ns, one.left_ns, **about)
    for name, start_ns, end_ns in (
        ("pack", one.entered_ns, one.came_ns),
        ("wait", one.came_ns, one.transfer_ns),
        ("transfer", one.transfer_ns, one.over_ns if one.wait_ns else one.transfer_ns),
        ("pack", one.over_ns, one.left_ns),
    ):
        if start_ns < end_ns:
            yield a_slice(one.rank, name, start_ns, end_ns)


def regions_of(log: RankLog, start_ns: int) -> Iterator[tuple[tuple[str, ...], int, int]]:
    """The regions that a program named on one rank, outer ones first: path, beginning and end."""
    for row in log.regions[np.lexsort((-log.regions["left_ns"], log.regions["entered_ns"]))]:
        times = int(row["entered_ns"]) - start_ns, int(row["left_ns"]) - start_ns
        yield (log.region_paths[row["site"]], *times)


def _regions(log: RankLog, start_ns: int) -> Iterator[Event]:
    for path, begins_ns, ends_ns in regions_of(log, start_ns):
        yield a_slice(region_track(log.rank), path[-1], begins_ns, ends_ns, path=" > ".join(path))
