"""Where the time of a program's ranks went, from what they logged of their calls: it adds up to the wall time
of each, and each wait has the line where it was, who was late, and where that one was meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rankwise.ledger.call_log import Kind, RankLog, Rows, Site
from rankwise.ledger.last_entry import Times
from rankwise.ledger.message_ends import NEVER, match
from rankwise.ledger.program_charges import Charges, charges
from rankwise.ledger.program_waits import Waits, find_waits
from rankwise.ledger.regions import RegionTime
from rankwise.ledger.regions import inside as inside_of

PROGRAM_PHASES = ("startup", "compute", "pack", "transfer", "wait", "other", "instrument")
"""The phases of a program that rankwise knows nothing of."""

_IN_MPI = tuple(
    kind for kind in Kind if kind not in (Kind.STARTUP, Kind.INSTRUMENT, Kind.PART, Kind.FAILED, Kind.OPEN)
)
_SENT = (Kind.SEND, Kind.EXCHANGE, Kind.POST_SEND)


@dataclass
class Line:
    """What one line of the program cost one rank: calls, bytes, ns; whom it waited for, and where those were
    meanwhile."""

    rank: int
    site: Site
    count: int = 0
    bytes: int = 0
    wait_ns: int = 0
    transfer_ns: int = 0
    pack_ns: int = 0
    wait_on_ns: Counter[int] = field(default_factory=Counter)
    late_at: Counter[str] = field(default_factory=Counter)


@dataclass
class RankTimes:
    """One rank's time, in ns; `phases_ns` adds up to `wall_ns`. `is_over` says whether it came to its end;
    `last` is where it was if it did not."""

    rank: int
    wall_ns: int
    phases_ns: dict[str, int]
    wait_on_ns: dict[int, int]
    bytes_sent: int
    bytes_received: int
    messages_sent: int
    lines: list[Line]
    is_over: bool
    last: str
    regions: dict[tuple[str, ...], RegionTime]


def account(logs: Sequence[RankLog], over_ns: int | None = None) -> list[RankTimes]:
    """The time of each rank; `logs` are on one clock. `over_ns` is when the last rank was seen to be gone:
    one that was killed inside a call was there until then."""
    messages = match(logs)
    waits = find_waits(logs, messages)
    by_rank = {log.rank: log for log in logs}
    rows = {log.rank: log.rows for log in logs}
    came = messages.received[(messages.received["over_ns"] < NEVER) & (messages.received["begun"] >= 0)]
    return [
        _account(
            log,
            waits[log.rank],
            charges(log.rank, waits, rows),
            by_rank,
            over_ns,
            int(came["bytes"][came["rank"] == log.rank].sum()),
        )
        for log in logs
    ]


def _account(
    log: RankLog,
    waits: Waits,
    charged: Charges,
    logs: dict[int, RankLog],
    over_ns: int | None,
    bytes_received: int,
) -> RankTimes:
    rows, said = log.rows, log.said
    is_open = rows["kind"] == Kind.OPEN
    begun_ns = said.get("begun_ns", said["start_ns"])
    signs = [begun_ns, int(rows["entered_ns"].max(initial=0)), int(rows["left_ns"].max(initial=0))]
    ended_ns = said.get("ended_ns") or max(signs)
    if is_open.any() and "ended_ns" not in said:
        ended_ns = max(ended_ns, over_ns or 0)
    inside = np.where(is_open, ended_ns - rows["entered_ns"], rows["inside_ns"])
    inside = np.maximum(inside, 0)
    inside[rows["kind"] == Kind.PART] = 0
    pack = rows["dumps_ns"] + rows["loads_ns"]
    # Whoever it was for did not come while this rank was there.
    wait = np.where(is_open, inside, waits.wait_ns)
    in_mpi = np.isin(rows["kind"], _IN_MPI)
    transfer = np.where(in_mpi, inside - wait - pack, 0)
    wall_ns = ended_ns - said["start_ns"]
    phases_ns = dict.fromkeys(PROGRAM_PHASES, 0)
    phases_ns["startup"] = begun_ns - said["start_ns"] + int(inside[rows["kind"] == Kind.STARTUP].sum())
    phases_ns["pack"] = int(pack[in_mpi].sum())
    phases_ns["wait"] = int(wait[in_mpi | is_open].sum())
    phases_ns["transfer"] = int(transfer.sum())
    phases_ns["other"] = int(inside[rows["kind"] == Kind.FAILED].sum())
    phases_ns["instrument"] = int(inside[rows["kind"] == Kind.INSTRUMENT].sum())
    rest_ns = wall_ns - sum(phases_ns.values())
    cost_ns = min(int(in_mpi.sum()) * said.get("cost_ns", 0), max(rest_ns, 0))
    phases_ns["instrument"] += cost_ns
    phases_ns["compute"] = rest_ns - cost_ns
    causes, which = np.unique(charged.cause, return_inverse=True)
    for_causes = np.bincount(which, weights=charged.ns, minlength=len(causes)).astype(np.int64)
    sent = np.isin(rows["kind"], _SENT)
    return RankTimes(
        rank=log.rank,
        wall_ns=wall_ns,
        phases_ns=phases_ns,
        wait_on_ns={int(rank): int(ns) for rank, ns in zip(causes, for_causes, strict=True) if ns},
        bytes_sent=int(rows["bytes"][sent].sum()),
        bytes_received=bytes_received,
        messages_sent=int(sent.sum()),
        lines=_lines(log, charged, logs, wait, transfer, pack),
        is_over="ended_ns" in said,
        last=_where(log, int(np.flatnonzero(rows["site"] >= 0)[-1]), inside=bool(is_open.any()))
        if (rows["site"] >= 0).any()
        else "its first line",
        regions=_regions(log, {"wait": wait, "pack": pack, **_by_kind(rows, inside, transfer)}),
    )


def _by_kind(rows: Rows, inside: Times, transfer: Times) -> dict[str, Times]:
    kinds = {"other": Kind.FAILED, "startup": Kind.STARTUP, "instrument": Kind.INSTRUMENT}
    return {
        "transfer": transfer,
        **{phase: np.where(rows["kind"] == kind, inside, 0) for phase, kind in kinds.items()},
    }


def _regions(log: RankLog, phases: dict[str, Times]) -> dict[tuple[str, ...], RegionTime]:
    """What a rank did in its regions, by their paths; each call belongs to those in which it was entered."""
    times = {}
    for number, path in enumerate(log.region_paths):
        rows = log.regions[log.regions["site"] == number]
        if not len(rows):
            continue
        within = inside_of(rows["entered_ns"], rows["left_ns"], log.rows["entered_ns"]) >= 0
        spent = Counter({phase: int(ns[within].sum()) for phase, ns in phases.items()})
        spent["compute"] = int((rows["left_ns"] - rows["entered_ns"]).sum()) - sum(spent.values())
        times[path] = RegionTime(len(rows), spent)
    return times


def _lines(
    log: RankLog, charged: Charges, logs: dict[int, RankLog], wait: Times, transfer: Times, pack: Times
) -> list[Line]:
    """What each line cost, in no order."""
    rows = log.rows
    numbers, of_site = np.unique(rows["site"], return_inverse=True)
    added_up = [  # floats, which hold whole ns up to a hundred days
        np.bincount(of_site.reshape(-1), weights=part, minlength=len(numbers)).astype(np.int64)
        for part in (np.maximum(rows["polls"], 1), rows["bytes"], wait, transfer, pack)
    ]
    lines = {
        number: Line(
            log.rank,
            log.sites[number],
            count=count,
            bytes=size,
            wait_ns=wait_ns,
            transfer_ns=transfer_ns,
            pack_ns=pack_ns,
        )
        for number, count, size, wait_ns, transfer_ns, pack_ns in zip(
            numbers.tolist(), *(part.tolist() for part in added_up), strict=True
        )
        if number >= 0
    }
    has_site = rows["site"][charged.row] >= 0
    sites, causes, ns_of = rows["site"][charged.row][has_site], charged.cause[has_site], charged.ns[has_site]
    where = np.stack([sites, causes, *_meanwhile(logs, causes, charged.moment_ns[has_site])])
    kinds, of_kind = np.unique(where, axis=1, return_inverse=True)
    spent = np.bincount(of_kind.reshape(-1), weights=ns_of, minlength=kinds.shape[1]).astype(np.int64)
    for (site, late, before, after), ns in zip(kinds.T.tolist(), spent.tolist(), strict=True):
        lines[site].wait_on_ns[late] += ns
        lines[site].late_at[f"rank {late}: {_between(logs[late], before, after)}"] += ns
    return [*lines.values()]


def _meanwhile(logs: dict[int, RankLog], late: Times, moments: Times) -> tuple[Times, Times]:
    """The lines between which the late rank of each wait was in its middle: -2 and a line if it was inside a
    call there; -1 before its first call, or behind its last one."""
    before, after = np.full(len(late), -1), np.full(len(late), -1)
    for rank in np.unique(late):
        if int(rank) not in logs:
            continue
        rows = logs[int(rank)].rows
        rows = rows[rows["site"] >= 0]
        if not len(rows):
            continue
        of_it = late == rank
        last = np.searchsorted(rows["entered_ns"], moments[of_it], side="right") - 1
        inside = (last >= 0) & (rows["left_ns"][last] > moments[of_it])
        sites = np.append(rows["site"], -1)  # at -1 as well, before the first
        before[of_it] = np.where(inside, -2, sites[last])
        after[of_it] = np.where(inside, rows["site"][last], sites[np.minimum(last + 1, len(rows))])
    return before, after


def _between(log: RankLog, before: int, after: int) -> str:
    """Where a rank was, in words."""
    if after < 0:
        return f"after {log.sites[before].place}" if before >= 0 else "in no call of MPI that is known"
    there = log.sites[after]
    if before == -2:
        return f"in {there.call} at {there.place}"
    if before < 0:
        return f"before {there.place}"
    came = log.sites[before]
    if came.place == there.place:
        return f"on its way back to {there.place}"
    same_file = came.file == there.file
    return f"between {came.place} and {f'line {there.line}' if same_file else there.place}"


def _where(log: RankLog, row: int, *, inside: bool) -> str:
    """Where a rank was seen last."""
    rows: Rows = log.rows
    site = log.sites[rows["site"][row]]
    return f"{'in' if inside else 'after'} {site.call} at {site.place}"
