"""The events of a trace in Chrome's Trace Event JSON, and the tracks on which they lie."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

INSIDE_NS = 1
"""How far behind the beginning of a slice the end of an arrow lies: viewers bind it to the innermost slice
there, and on the border to the slice before that is not clear."""


@dataclass(frozen=True)
class Event:
    """One event of a trace: a slice (kind X), an end of an arrow (s, f), a counter's new value (C).
    Times are in ns since the run's start."""

    kind: str
    rank: int
    name: str
    start_ns: int
    duration_ns: int = 0
    args: dict[str, Any] = field(default_factory=dict)
    arrow: int = 0

    def as_json(self, place: dict[str, int]) -> dict[str, Any]:
        """The event on the track of its rank, in the format's microseconds."""
        event = {"ph": self.kind, "name": self.name, "ts": self.start_ns / 1e3, **place}
        match self.kind:
            case "X":
                return event | {"dur": self.duration_ns / 1e3, "args": self.args}
            case "C":
                return event | {"args": self.args}
            case _:  # "e" binds an arrow's end to the slice around it, instead of the next one
                return event | {"cat": "exchange", "id": self.arrow, "bp": "e"}


def a_slice(rank: int, name: str, start_ns: int, end_ns: int, **args: Any) -> Event:
    """A stretch of a rank's time."""
    return Event("X", rank, name, int(start_ns), int(end_ns - start_ns), args)


def region_track(rank: int) -> int:
    """In place of a rank's number: the track of its regions, which need not nest with what it does."""
    return -1 - rank


def places_of(hosts: Mapping[int, str], with_regions: Collection[int] = ()) -> dict[int, dict[str, int]]:
    """Process and thread of each rank, and of its regions if it has any. Viewers take equal numbers for one
    thread: none is used twice."""
    names = list(dict.fromkeys(hosts.values()))
    most = 1 + max(hosts)
    pids = {rank: most + 1 + names.index(host) for rank, host in hosts.items()}
    behind = most + 1 + len(names)
    places = {rank: {"pid": pid, "tid": 1 + rank} for rank, pid in pids.items()}
    return places | {region_track(rank): {"pid": pids[rank], "tid": behind + rank} for rank in with_regions}


def names_of(
    hosts: Mapping[int, str], titles: Mapping[int, str], places: Mapping[int, dict[str, int]]
) -> Iterator[dict[str, Any]]:
    """How hosts and ranks are called, and that ranks stand in their order, each above its regions."""
    for rank, host in hosts.items():
        tracks = [
            (rank, titles[rank], 2 * rank),
            (region_track(rank), f"regions of rank {rank}", 2 * rank + 1),
        ]
        for track, title, order in tracks:
            if track not in places:
                continue
            for name, args in (
                ("process_name", {"name": f"host {host}"}),
                ("thread_name", {"name": title}),
                ("thread_sort_index", {"sort_index": order}),
            ):
                yield {"ph": "M", "name": name, **places[track], "args": args}
