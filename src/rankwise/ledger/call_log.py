"""The calls of an MPI program as its ranks log them: rows of numbers, one a call, that survive the rank.

The first row of a file is that of the call that was entered last, which has no other one if the rank did not
come out of it: so a rank that is killed leaves the call in which it was. Names stand beside, a line of JSON
each: where in the code calls are made, which ranks a communicator holds, and what else happened to the rank.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[Any]
"""Calls of dtype CALL, in the order in which they were entered."""

CALL = np.dtype(
    [
        (name, "i8")
        for name in (
            *("kind", "site", "comm", "entered_ns", "left_ns", "peer", "tag", "bytes", "source", "got_tag"),
            *("inside_ns", "dumps_ns", "loads_ns", "request", "polls"),
        )
    ]
)
"""`peer` is the other rank of a message, or the root; `source` the rank whose message came, and `got_tag` its
tag; ranks count in the communicator, below 0 is nobody. `inside_ns` is the time in MPI: of polls one after
the other, which share a row, without what was between them; below 0, in a file, is all from entry to exit.
What most calls have stands first, so that they need not write the rest. `request` is the row that began what
a part of a wait is the end of."""


UNKNOWN = dict.fromkeys(("comm", "peer", "tag", "source", "got_tag", "inside_ns", "request"), -1)
"""What stands in a row until a call writes it; 0 in the other columns."""


class Kind(IntEnum):
    """What a call waits for, if it does."""

    PLAIN = 0  # not to be split: one-sided, files
    STARTUP = 1
    COLLECTIVE = 2
    SEND = 3
    RECEIVE = 4
    EXCHANGE = 5
    WAIT = 6
    PART = 7  # of the wait in the row before: one of the requests that it has brought to their end
    POST_COLLECTIVE = 8
    POST_SEND = 9
    POST_RECEIVE = 10
    INSTRUMENT = 11
    PROBE = 12
    FAILED = 13  # with an error of MPI's or of its arguments
    OPEN = 14  # the rank did not come out of it
    REGION = 15  # of the program's own, in a file of its own: `site` is its path


@dataclass(frozen=True)
class Site:
    """A line of the program that calls MPI."""

    file: str
    line: int
    function: str
    call: str

    @property
    def place(self) -> str:
        """File and line."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Comm:
    """A communicator, by what its members call it alike: their ranks in the world, and the how-manieth with
    these members it is. `peers` are those of an intercommunicator's other side, else the members."""

    members: tuple[int, ...]
    peers: tuple[int, ...]
    number: int

    @property
    def name(self) -> tuple[tuple[int, ...], int]:
        """The same on all its members."""
        return tuple(sorted({*self.members, *self.peers})), self.number


@dataclass
class RankLog:
    """What one rank has left: its calls (`others` are those of threads beside the main one), and what it said
    of itself."""

    rank: int
    rows: Rows
    others: Rows
    sites: list[Site] = field(default_factory=list)
    comms: list[Comm] = field(default_factory=list)
    said: dict[str, Any] = field(default_factory=dict)
    regions: Rows = field(default_factory=lambda: np.zeros(0, CALL))
    region_paths: list[tuple[str, ...]] = field(default_factory=list)
    """The paths of regions, which their rows have the numbers of."""


def regions_path(folder: Path, rank: int) -> Path:
    """Where the rows of a rank's regions lie, in the order in which they ended."""
    return folder / f"rank-{rank:04d}-regions.rows"


def paths_of(folder: Path, rank: int) -> tuple[Path, Path]:
    """Where a rank's rows lie, and what it says beside."""
    return folder / f"rank-{rank:04d}.rows", folder / f"rank-{rank:04d}.jsonl"


def read_logs(folder: Path, *, rows: bool = True) -> list[RankLog]:
    """What the ranks have left in a folder, in rank order, without their calls if `rows` are not wanted. A
    line that was being written does not count, nor a rank that was ended before it could say who it is."""
    logs = []
    for path in sorted(folder.glob("rank-*.jsonl")):
        rank = int(path.stem.removeprefix("rank-"))
        main, _ = paths_of(folder, rank)
        beside = [
            _rows(path) if rows else np.zeros(0, CALL)
            for path in sorted(folder.glob(f"{main.stem}-thread-*.rows"))
        ]
        others = np.concatenate([np.zeros(0, CALL), *beside])
        log = RankLog(
            rank,
            _rows(main) if rows else np.zeros(0, CALL),
            others[np.argsort(others["entered_ns"], kind="stable")],
        )
        log.regions = _rows(regions_path(folder, rank)) if rows else log.regions
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                _take(log, json.loads(line))
        if "start_ns" in log.said:
            _to_common(log)
            logs.append(log)
    return logs


def _to_common(log: RankLog) -> None:
    """Bring a rank's times to rank 0's clock, where hosts have clocks of their own: between two readings they
    drift evenly."""
    readings = log.said.get("readings")
    if not readings:
        return
    at, ahead = np.array(readings, np.int64).T

    def common(times_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        drift = np.interp(times_ns - at[0], at - at[0], ahead - ahead[0])
        return np.asarray(times_ns - ahead[0] - np.rint(drift).astype(np.int64))

    for rows in (log.rows, log.others, log.regions):
        for name in ("entered_ns", "left_ns"):
            rows[name] = np.where(rows[name] > 0, common(rows[name]), 0)
    for name in ("start_ns", "begun_ns", "ended_ns"):
        if name in log.said:
            log.said[name] = int(common(np.array([log.said[name]]))[0])


def _rows(path: Path) -> Rows:
    try:
        content = path.read_bytes()
    except OSError:
        return np.zeros(0, CALL)
    rows = np.frombuffer(content, CALL, len(content) // CALL.itemsize)
    rows, last = rows[1:], rows[:1]
    rows = rows[rows["entered_ns"] > 0]  # a copy, which may be written to
    rows["inside_ns"] = np.where(
        rows["inside_ns"] < 0, rows["left_ns"] - rows["entered_ns"], rows["inside_ns"]
    )
    # What a rank was in when it was killed; rows refer to others by number, so it comes behind them.
    is_open = len(last) and last["entered_ns"][0] > rows["entered_ns"].max(initial=0)
    if not is_open:
        return rows
    last = last.copy()
    last["kind"], last["inside_ns"] = Kind.OPEN, 0
    return np.concatenate([rows, last])


def _take(log: RankLog, said: dict[str, Any]) -> None:
    match said.pop("what"):
        case "site":
            log.sites.append(Site(**said))
        case "comm":
            log.comms.append(Comm(tuple(said["members"]), tuple(said["peers"]), said["number"]))
        case "region":
            log.region_paths.append(tuple(said["path"]))
        case _:
            log.said |= said
