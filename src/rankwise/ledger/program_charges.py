"""To whom the waits of a program's ranks are charged: to the rank that was late, and the part in which that
one waited itself to the rank that it waited for. One step back, not further."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rankwise.ledger.call_log import Rows
from rankwise.ledger.last_entry import Times
from rankwise.ledger.program_waits import Waits


@dataclass(frozen=True)
class Charges:
    """Parts of one rank's waits: of its `row`, `ns` for which `cause` is charged; at `moment_ns` that one was
    in the middle of it. Those of a row add up to its wait."""

    row: Times
    cause: Times
    ns: Times
    moment_ns: Times


def charges(rank: int, waits: Mapping[int, Waits], rows: Mapping[int, Rows]) -> Charges:
    """Those of one rank; `waits` and `rows` are those of all ranks, on one clock."""
    mine, own = waits[rank], rows[rank]
    waited = np.flatnonzero((mine.wait_ns > 0) & (mine.late >= 0))
    starts = own["entered_ns"][waited] + own["dumps_ns"][waited]
    ends = starts + mine.wait_ns[waited]
    late = mine.late[waited]
    parts: list[tuple[Times, Times, Times, Times]] = []
    passed_on, last_end = np.zeros(len(waited), np.int64), starts.copy()
    for other in np.unique(late):
        if int(other) not in rows:
            continue
        its, of_it = _waiting(waits[int(other)], rows[int(other)]), np.flatnonzero(late == other)
        # Which of the late one's waits each of these touches: a stretch of them, as they are in order.
        first = np.searchsorted(its.ends, starts[of_it], side="right")
        count = np.maximum(np.searchsorted(its.starts, ends[of_it], side="left") - first, 0)
        which = np.repeat(of_it, count)
        there = np.repeat(first - (np.cumsum(count) - count), count) + np.arange(count.sum())
        begins = np.maximum(its.starts[there], starts[which])
        stops = np.minimum(its.ends[there], ends[which])
        goes_on = (its.late[there] != rank) & (stops > begins)
        which, there, begins, stops = which[goes_on], there[goes_on], begins[goes_on], stops[goes_on]
        np.add.at(passed_on, which, stops - begins)
        np.maximum.at(last_end, which, stops)
        parts.append((waited[which], its.late[there], stops - begins, (begins + stops) // 2))
    rest = ends - starts - passed_on
    # What is left is the late one's own; it was at work behind its last wait, if not all along.
    from_ns = np.where(last_end < ends, last_end, starts)
    left = rest > 0
    parts.append((waited[left], late[left], rest[left], ((from_ns + ends) // 2)[left]))
    return Charges(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True)
class _Waiting:
    """When a rank waited, in order of time, and for whom; its main thread is in one call at a time."""

    starts: Times
    ends: Times
    late: Times


def _waiting(waits: Waits, rows: Rows) -> _Waiting:
    waited = np.flatnonzero((waits.wait_ns > 0) & (waits.late >= 0))
    starts = rows["entered_ns"][waited] + rows["dumps_ns"][waited]
    order = np.argsort(starts, kind="stable")
    waited, starts = waited[order], starts[order]
    return _Waiting(starts, starts + waits.wait_ns[waited], waits.late[waited])
