"""A trace in OTF2, the format of Score-P, Scalasca and Vampir: one location for each rank.

Times are those of the timelines, in ns since the start of rank 0's process: a tick of the clock is 1 ns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rankwise.errors import TimelineError, UsageError, one_line
from rankwise.export.run_content import NAMES, Collective, Message, Region, RunContent
from rankwise.ledger.waits import Pattern
from rankwise.report.exchanges import Exchange

TICKS_PER_S = 1_000_000_000

ANCHOR = "traces.otf2"
"""The file of an archive that readers open."""

NOT_WRITTEN = "the otf2 library could not write all of it: is the disk full? choose another --output"

ATTRIBUTES = ("epoch", "step", "samples", "bytes", "waited for rank")
"""Numbers that a region's beginning may carry."""

Write = Callable[[Any], None]
"""Writes one event with OTF2's writer of a location."""

Event = tuple[int, Write]
"""When an event was, and how it is written."""


def write_otf2(runs: Sequence[RunContent], path: Path) -> list[str]:
    """Write the archive of one run into the folder `path`: what readers open is `traces.otf2` in it.

    Returns what a reader should know, a line each. Raises UsageError without a timeline.
    """
    (run,) = runs
    if not (run.timelines or run.calls):
        raise TimelineError(f"{run.name} has no timeline that can be read: otf2 is made of timelines")
    import _otf2  # whose errors are what otf2's own functions raise, and it has no other name for them
    import otf2

    times_ns = (*(one.start_ns for one in run.regions), *(one.posted_ns for one in run.exchanges))
    if min(times_ns, default=0) < 0:
        raise TimelineError(f"a timeline of {run.name} begins before the run: otf2 knows no negative times")
    regions: dict[int, list[Region]] = {row.rank: [] for row in run.record.ranks}
    for region in run.regions:
        regions[region.rank].append(region)
    kept = {rank: nested(own) for rank, own in regions.items()}
    remarks = [
        f"{len(own) - len(kept[rank])} regions of rank {rank} do not nest: they are left out"
        for rank, own in regions.items()
        if len(kept[rank]) < len(own)
    ]
    counts: Counter[str] = Counter()
    try:
        archive = otf2.writer.Writer(str(path), timer_resolution=TICKS_PER_S)
        try:
            archive.creator = f"rankwise {run.record.rankwise_version}"
            archive.description = f"{run.name}: {run.record.trained}"
            definitions = _define(archive.definitions, run)
            events = _Events(run, (region for own in kept.values() for region in own), definitions)
            for rank, location in definitions.locations.items():
                writer = archive.event_writer_from_location(location)
                for _, write in events.of(kept[rank]):
                    write(writer)
                    counts[location.name] += 1
            # The writer takes the moment of writing for that of the first event, and has no option for it.
            archive._realtime_timestamp = started_s(run) + (archive._first_timestamp or 0) / 1e9
        finally:
            archive.close()
        complete = _events_in(path / ANCHOR) == counts  # closing raises nothing if the disk is full
    except _otf2.Error as error:
        raise UsageError(f"{NOT_WRITTEN} ({one_line(error)[:200]})") from None
    if not complete:
        raise UsageError(NOT_WRITTEN)
    return remarks


def _events_in(anchor: Path) -> Counter[str]:
    """How many events an archive holds of each location that has any."""
    import otf2

    with otf2.reader.open(str(anchor)) as trace:
        return Counter(location.name for location, _ in trace.events)


def started_s(run: RunContent) -> float:
    """When the run's clock showed 0, in seconds since 1970."""
    return datetime.fromisoformat(run.record.started_at).timestamp()


def nested(regions: Iterable[Region]) -> list[Region]:
    """The regions of one rank, in order of their beginning, without those that end behind the one in which
    they begin: no reader could show them."""
    kept: list[Region] = []
    around: list[Region] = []
    for region in regions:
        while around and around[-1].end_ns <= region.start_ns:
            around.pop()
        if region.start_ns <= region.end_ns and (not around or region.end_ns <= around[-1].end_ns):
            kept.append(region)
            around.append(region)
    return kept


def walk(regions: Iterable[Region]) -> Iterator[tuple[bool, Region]]:
    """The beginnings (True) and ends of nested regions of one rank, as they follow upon each other."""
    around: list[Region] = []
    for region in regions:
        while around and around[-1].end_ns <= region.start_ns:
            yield False, around.pop()
        yield True, region
        around.append(region)
    while around:
        yield False, around.pop()


@dataclass(frozen=True)
class _Definitions:
    """What the events of an archive refer to. `places` are those of the ranks in the communicator of all."""

    places: dict[int, int]
    locations: dict[int, Any]
    regions: dict[str, Any]
    attributes: dict[str, Any]
    communicators: dict[tuple[int, ...], Any]


def _define(into: Any, run: RunContent) -> _Definitions:
    from otf2.enums import GroupType, Paradigm, Type

    root = into.system_tree_node("machine", class_name="machine")
    locations = {}
    for row in run.record.ranks:
        node = into.system_tree_node(row.host, parent=root, class_name="node")
        process = into.location_group(f"rank {row.rank}", system_tree_parent=node)
        locations[row.rank] = into.location(f"rank {row.rank} {row.role}", group=process)
    into.group(
        "ranks", group_type=GroupType.COMM_LOCATIONS, paradigm=Paradigm.MPI, members=list(locations.values())
    )
    world = tuple(locations)
    communicators = {}
    for members in dict.fromkeys((world, *(_members(one) for one in run.collectives))):
        name = "all ranks" if members == world else f"ranks {', '.join(map(str, members))}"
        group = into.group(
            name,
            group_type=GroupType.COMM_GROUP,
            paradigm=Paradigm.MPI,
            members=[locations[rank] for rank in members],
        )
        communicators[members] = into.comm(name, group=group)
    attributes = {name: into.attribute(name, type=Type.UINT64) for name in ATTRIBUTES}
    regions = {name: _region(into, name) for name in dict.fromkeys(region.name for region in run.regions)}
    places = {rank: place for place, rank in enumerate(world)}
    return _Definitions(places, locations, regions, attributes, communicators)


def _region(into: Any, name: str) -> Any:
    from otf2.enums import Paradigm, RegionFlag, RegionRole

    roles = {
        NAMES[Pattern.ALL_TO_ALL]: RegionRole.COLL_ALL2ALL,
        NAMES[Pattern.ALL_TO_ONE]: RegionRole.COLL_ALL2ONE,
        NAMES[Pattern.ONE_TO_ALL]: RegionRole.COLL_ONE2ALL,
        NAMES[Pattern.SEND]: RegionRole.POINT2POINT,
        NAMES[Pattern.RECEIVE]: RegionRole.POINT2POINT,
    }
    if name in roles:
        return into.region(name, region_role=roles[name], paradigm=Paradigm.MPI)
    flags = RegionFlag.PHASE if name in ("epoch", "step") else RegionFlag.NONE
    return into.region(name, region_role=RegionRole.CODE, paradigm=Paradigm.USER, region_flags=flags)


def _members(collective: Collective) -> tuple[int, ...]:
    return tuple(part.rank for part in collective.parts)


@dataclass(frozen=True)
class _Around:
    """What an exchange says besides its region: where it was started in the background, behind the region's
    beginning, and before its end."""

    posted: Event | None = None
    at_beginning: Event | None = None
    at_end: Event | None = None


class _Events:
    """Turns the regions that are kept of each rank into OTF2's events, and exchanges among them into messages
    and collectives.

    A message or collective of which a part is missing is a region alone: readers would wait in vain for the
    other end.
    """

    def __init__(self, run: RunContent, kept: Iterable[Region], definitions: _Definitions) -> None:
        self._definitions = definitions
        self._messages: dict[int, tuple[int, Message]] = {}
        self._collectives: dict[int, tuple[int, Collective]] = {}
        there = {id(region.exchange) for region in kept}
        for number, message in enumerate(run.messages):
            ends = {id(message.sent), id(message.received)}
            if ends <= there:
                self._messages |= dict.fromkeys(ends, (number, message))
        for number, collective in enumerate(run.collectives):
            parts = {id(part) for part in collective.parts}
            if parts <= there:
                self._collectives |= dict.fromkeys(parts, (number, collective))

    def of(self, regions: Iterable[Region]) -> list[Event]:
        """The events of one rank, in order of time."""
        found: list[Event | None] = []
        posted: list[Event | None] = []
        for enters, region in walk(regions):
            around = self._around(region.exchange) if region.exchange else _Around()
            if enters:
                found += [self._enter(region), around.at_beginning]
                posted.append(around.posted)
            else:
                found += [around.at_end, self._leave(region)]
        events = [event for event in (*found, *posted) if event]
        return sorted(events, key=lambda event: event[0])  # stable: what is at one time stays as it is

    def _enter(self, region: Region) -> Event:
        which = self._definitions.regions[region.name]
        numbers = {self._definitions.attributes[name]: value for name, value in region.numbers}
        return region.start_ns, lambda to: to.enter(region.start_ns, which, attributes=numbers or None)

    def _leave(self, region: Region) -> Event:
        which = self._definitions.regions[region.name]
        return region.end_ns, lambda to: to.leave(region.end_ns, which)

    def _around(self, part: Exchange) -> _Around:
        if id(part) in self._messages:
            return self._message(part, *self._messages[id(part)])
        if id(part) in self._collectives:
            return self._collective(part, *self._collectives[id(part)])
        return _Around()

    def _message(self, part: Exchange, number: int, message: Message) -> _Around:
        sends = part is message.sent
        other = self._definitions.places[(message.received if sends else message.sent).rank]
        all_ranks = self._definitions.communicators[tuple(self._definitions.places)]
        about = (other, all_ranks, 0, message.sent.bytes)
        posted_ns, entered_ns, left_ns = part.posted_ns, part.entered_ns, part.left_ns
        match posted_ns < entered_ns, sends:
            case True, True:
                return _Around(
                    posted=(posted_ns, lambda to: to.mpi_isend(posted_ns, *about, number)),
                    at_end=(left_ns, lambda to: to.mpi_isend_complete(left_ns, number)),
                )
            case True, False:
                return _Around(
                    posted=(posted_ns, lambda to: to.mpi_irecv_request(posted_ns, number)),
                    at_end=(left_ns, lambda to: to.mpi_irecv(left_ns, *about, number)),
                )
            case False, True:
                return _Around(at_beginning=(entered_ns, lambda to: to.mpi_send(entered_ns, *about)))
            case _:
                return _Around(at_end=(left_ns, lambda to: to.mpi_recv(left_ns, *about)))

    def _collective(self, part: Exchange, number: int, collective: Collective) -> _Around:
        from otf2.enums import CollectiveOp, Undefined

        members = _members(collective)
        others, is_root = len(members) - 1, part.rank == collective.root
        operation, sent, received = {
            Pattern.ALL_TO_ALL: (CollectiveOp.ALLREDUCE, 1, 1),
            Pattern.ALL_TO_ONE: (CollectiveOp.GATHER, not is_root, others * is_root),
            Pattern.ONE_TO_ALL: (CollectiveOp.BCAST, others * is_root, not is_root),
        }[collective.pattern]
        root = members.index(collective.root) if collective.root in members else Undefined.UINT32.value
        communicator = self._definitions.communicators[members]
        about = (operation, communicator, root, sent * part.bytes, received * part.bytes)
        posted_ns, entered_ns, left_ns = part.posted_ns, part.entered_ns, part.left_ns
        if posted_ns < entered_ns:
            return _Around(
                posted=(posted_ns, lambda to: to.non_blocking_collective_request(posted_ns, number)),
                at_end=(left_ns, lambda to: to.non_blocking_collective_complete(left_ns, *about, number)),
            )
        return _Around(
            at_beginning=(entered_ns, lambda to: to.mpi_collective_begin(entered_ns)),
            at_end=(left_ns, lambda to: to.mpi_collective_end(left_ns, *about)),
        )
