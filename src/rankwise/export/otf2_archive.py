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
from rankwise.export.parts import Call, Collective, Communicator, Message, Region
from rankwise.export.program_calls import operation_of
from rankwise.export.run_content import RunContent
from rankwise.ledger.call_log import Kind
from rankwise.ledger.waits import Pattern
from rankwise.report.exchanges import Exchange

TICKS_PER_S = 1_000_000_000

ANCHOR = "traces.otf2"
"""The file of an archive that readers open."""

NOT_WRITTEN = "the otf2 library could not write all of it: is the disk full? choose another --output"

ATTRIBUTES = ("epoch", "step", "samples", "bytes", "waited for rank")
"""Numbers that a region's beginning may carry."""

_MESSAGES = (Kind.SEND, Kind.RECEIVE, Kind.EXCHANGE, Kind.POST_SEND, Kind.POST_RECEIVE)

Write = Callable[[Any], None]
"""Writes one event with OTF2's writer of a location."""

Event = tuple[int, Write]
"""When an event was, and how it is written."""


def write_otf2(runs: Sequence[RunContent], path: Path) -> list[str]:
    """Write the archive of one run into the folder `path`: what readers open is `traces.otf2` in it.

    Returns what a reader should know, a line each. Raises UsageError without a timeline, or calls.
    """
    (run,) = runs
    if run.record.is_of_calls and not run.regions:
        why = "; ".join(run.remarks) or "the program made none"
        raise TimelineError(
            f"{run.name} has no calls of MPI, of which otf2 is made ({why}): export it as csv"
        )
    if not (run.timelines or run.program):
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
    """What the events of an archive refer to."""

    locations: dict[int, Any]
    regions: dict[str, Any]
    attributes: dict[str, Any]
    communicators: dict[Communicator, Any]


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
    communicators: dict[Communicator, Any] = {}
    used = [Communicator(world), *(message.communicator for message in run.messages)]
    used += (collective.communicator for collective in run.collectives)
    names: Counter[str] = Counter()
    for one in dict.fromkeys(used):
        name = "all ranks" if one.ranks == world else f"ranks {', '.join(map(str, one.ranks))}"
        names[name] += 1
        name += f", no. {names[name]}" if names[name] > 1 else ""
        group = into.group(
            name,
            group_type=GroupType.COMM_GROUP,
            paradigm=Paradigm.MPI,
            members=[locations[rank] for rank in one.ranks],
        )
        communicators[one] = into.comm(name, group=group)
    attributes = {name: into.attribute(name, type=Type.UINT64) for name in ATTRIBUTES}
    regions = {one.name: one for one in reversed(run.regions)}
    regions = {name: _region(into, regions[name]) for name in dict.fromkeys(one.name for one in run.regions)}
    return _Definitions(locations, regions, attributes, communicators)


def _region(into: Any, region: Region) -> Any:
    from otf2.enums import Paradigm, RegionFlag, RegionRole

    name, call = region.name, region.call
    if call is not None:
        return into.region(
            name,
            canonical_name=call.name,
            region_role=_role_of_call(call),
            paradigm=Paradigm.MPI,
            source_file=call.file,
            begin_line_number=call.line,
            end_line_number=call.line,
        )
    if region.exchanges:
        return into.region(name, region_role=_role(region.exchanges[0].pattern), paradigm=Paradigm.MPI)
    flags = RegionFlag.PHASE if name in ("epoch", "step") else RegionFlag.NONE
    return into.region(name, region_role=RegionRole.CODE, paradigm=Paradigm.USER, region_flags=flags)


def _role(pattern: Pattern) -> Any:
    from otf2.enums import RegionRole

    return {
        Pattern.ALL_TO_ALL: RegionRole.COLL_ALL2ALL,
        Pattern.ALL_TO_ONE: RegionRole.COLL_ALL2ONE,
        Pattern.ONE_TO_ALL: RegionRole.COLL_ONE2ALL,
    }.get(pattern, RegionRole.POINT2POINT)


def _role_of_call(call: Call) -> Any:
    from otf2.enums import RegionRole

    if call.kind in _MESSAGES:
        return RegionRole.POINT2POINT
    if call.kind not in (Kind.COLLECTIVE, Kind.POST_COLLECTIVE):
        return RegionRole.FUNCTION
    operation = operation_of(call.name)
    if operation is None:
        return RegionRole.COLL_OTHER
    pattern, name = operation
    return RegionRole.BARRIER if name == "barrier" else _role(pattern)


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
    other end. What is begun and completed apart has a number that no other one of its rank has.
    """

    def __init__(self, run: RunContent, kept: Iterable[Region], definitions: _Definitions) -> None:
        self._definitions = definitions
        self._around: dict[int, _Around] = {}
        there = {id(part) for region in kept for part in region.exchanges}
        number = 0
        for message in run.messages:
            if {id(message.sent), id(message.received)} <= there:
                self._around[id(message.sent)] = self._sent(message, number)
                self._around[id(message.received)] = self._received(message, number + 1)
                number += 2
        for collective in run.collectives:
            if {id(part) for part in collective.parts} <= there:
                for part in collective.parts:
                    self._around[id(part)] = self._collective(part, number, collective)
                number += 1

    def of(self, regions: Iterable[Region]) -> list[Event]:
        """The events of one rank, in order of time."""
        found: list[Event | None] = []
        posted: list[Event | None] = []
        for enters, region in walk(regions):
            around = [self._around.get(id(part), _Around()) for part in region.exchanges]
            if enters:
                found += [self._enter(region), *(one.at_beginning for one in around)]
                posted += [one.posted for one in around]
            else:
                found += [*(one.at_end for one in around), self._leave(region)]
        events = [event for event in (*found, *posted) if event]
        return sorted(events, key=lambda event: event[0])  # stable: what is at one time stays as it is

    def _enter(self, region: Region) -> Event:
        which = self._definitions.regions[region.name]
        numbers = {self._definitions.attributes[name]: value for name, value in region.numbers}
        return region.start_ns, lambda to: to.enter(region.start_ns, which, attributes=numbers or None)

    def _leave(self, region: Region) -> Event:
        which = self._definitions.regions[region.name]
        return region.end_ns, lambda to: to.leave(region.end_ns, which)

    def _sent(self, message: Message, number: int) -> _Around:
        part, about = message.sent, self._about(message, message.received.rank)
        posted_ns, left_ns = part.posted_ns, part.left_ns
        if posted_ns < part.entered_ns:
            return _Around(
                posted=(posted_ns, lambda to: to.mpi_isend(posted_ns, *about, number)),
                at_end=(left_ns, lambda to: to.mpi_isend_complete(left_ns, number)),
            )
        return _Around(at_beginning=(posted_ns, lambda to: to.mpi_send(posted_ns, *about)))

    def _received(self, message: Message, number: int) -> _Around:
        part, about = message.received, self._about(message, message.sent.rank)
        posted_ns, left_ns = part.posted_ns, part.left_ns
        if posted_ns < part.entered_ns:
            return _Around(
                posted=(posted_ns, lambda to: to.mpi_irecv_request(posted_ns, number)),
                at_end=(left_ns, lambda to: to.mpi_irecv(left_ns, *about, number)),
            )
        return _Around(at_end=(left_ns, lambda to: to.mpi_recv(left_ns, *about)))

    def _about(self, message: Message, other: int) -> tuple[int, Any, int, int]:
        """The other rank's place in the communicator, that, the tag, and the bytes."""
        its = message.communicator
        return its.ranks.index(other), self._definitions.communicators[its], message.tag, message.sent.bytes

    def _collective(self, part: Exchange, number: int, collective: Collective) -> _Around:
        from otf2.enums import CollectiveOp, Undefined

        its = collective.communicator
        named = collective.operation or COMMON[collective.pattern]
        root = its.ranks.index(collective.root) if collective.root in its.ranks else Undefined.UINT32.value
        about = (
            getattr(CollectiveOp, named.upper()),
            self._definitions.communicators[its],
            root,
            *_sizes(part, collective),
        )
        posted_ns, left_ns = part.posted_ns, part.left_ns
        if posted_ns < part.entered_ns:
            return _Around(
                posted=(posted_ns, lambda to: to.non_blocking_collective_request(posted_ns, number)),
                at_end=(left_ns, lambda to: to.non_blocking_collective_complete(left_ns, *about, number)),
            )
        return _Around(
            at_beginning=(posted_ns, lambda to: to.mpi_collective_begin(posted_ns)),
            at_end=(left_ns, lambda to: to.mpi_collective_end(left_ns, *about)),
        )


COMMON = {Pattern.ALL_TO_ALL: "allreduce", Pattern.ALL_TO_ONE: "gather", Pattern.ONE_TO_ALL: "bcast"}
"""As what a collective stands of which only the pattern is known."""


def _sizes(part: Exchange, collective: Collective) -> tuple[int, int]:
    """The bytes that a rank has sent and received in a collective, from what each rank gave to it."""
    others = [one for one in collective.parts if one is not part]
    is_root = part.rank == collective.root
    match collective.pattern:
        case Pattern.ALL_TO_ONE:
            return (0, sum(one.bytes for one in others)) if is_root else (part.bytes, 0)
        case Pattern.ONE_TO_ALL if (collective.operation or "").startswith("scatter"):
            given = next((one.bytes for one in collective.parts if one.rank == collective.root), 0)
            return (given, 0) if is_root else (0, given // len(collective.parts))
        case Pattern.ONE_TO_ALL:
            return (part.bytes * len(others), 0) if is_root else (0, part.bytes)
        case _:
            return part.bytes, part.bytes
