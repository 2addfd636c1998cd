"""What exporters know of a run: its ranks, and where each of them spent its time.

It is read from the run folder in one place, here. Exporters take values only, so what comes to fill them
from another kind of ledger serves all formats at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rankwise.errors import TimelineError, UsageError, one_line
from rankwise.export.parts import Collective, Communicator, Message, Region
from rankwise.export.program_calls import ProgramCalls, program_calls
from rankwise.ledger.phases import PHASES
from rankwise.ledger.timeline import RankTimeline, read_timeline
from rankwise.ledger.waits import Pattern
from rankwise.report.exchanges import Exchange, read_exchanges
from rankwise.report.program_trace import read_calls
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record

OUTSIDE = 0
"""The number of no epoch: what a rank did before the first one and after the last."""


@dataclass(frozen=True)
class PhaseTime:
    """Time of one rank in one phase of one epoch. `epoch` is OUTSIDE for what belongs to none, and None for
    all of a rank's time, where it is not known how much of it was in which epoch."""

    rank: int
    epoch: int | None
    phase: str
    ns: int


@dataclass(frozen=True)
class RunContent:
    """One run. `name` is the path that was given, `timelines` those that could be read; times in them are ns
    since the start of rank 0's process. `remarks` say what is missing, a line each."""

    name: str
    record: Record
    timelines: tuple[RankTimeline, ...]
    remarks: tuple[str, ...]
    program: ProgramCalls | None = None
    """Of a program without a `Run`: what it did in MPI, if its calls are there."""

    @cached_property
    def phases(self) -> tuple[PhaseTime, ...]:
        """Where each rank spent its time. The rows of a rank add up to its wall time exactly."""
        return tuple(_phases(self.record, self.timelines))

    @cached_property
    def exchanges(self) -> list[Exchange]:
        """Each rank's part in the exchanges of the steps that were kept."""
        return read_exchanges(list(self.timelines), slack_ns=2 * self.record.clock.error_bound_ns)

    @cached_property
    def regions(self) -> tuple[Region, ...]:
        """Epochs, and of the steps that were kept the phases and exchanges, in order of rank and time; of a
        program its calls and regions."""
        if self.program:
            return self.program.regions
        by_rank: dict[int, list[Exchange]] = defaultdict(list)
        for exchange in self.exchanges:
            by_rank[exchange.rank].append(exchange)
        return tuple(region for line in self.timelines for region in _regions(line, by_rank[line.rank]))

    @cached_property
    def messages(self) -> tuple[Message, ...]:
        """Messages of which both ends are known."""
        if self.program:
            return self.program.messages
        everybody = Communicator(tuple(row.rank for row in self.record.ranks))
        parts = [one for one in self.exchanges if one.pattern in (Pattern.SEND, Pattern.RECEIVE)]
        found = []
        for ends in _together(parts):
            by_pattern = {end.pattern: end for end in ends}
            if len(by_pattern) == 2:
                found.append(Message(by_pattern[Pattern.SEND], by_pattern[Pattern.RECEIVE], everybody))
        return tuple(found)

    @cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """Exchanges of several ranks together, of which at least two parts are known."""
        if self.program:
            return self.program.collectives
        parts = [one for one in self.exchanges if one.pattern not in (Pattern.SEND, Pattern.RECEIVE)]
        return tuple(_collective(group) for group in _together(parts) if len(group) > 1)


def read_run(path: Path) -> RunContent:
    """The run in a folder. Raises UsageError, one line, if there is none."""
    folder = RunFolder(path)
    record = folder.read()
    if not record.ranks:
        raise UsageError(f"{path} has no rank in its record: nothing to export")
    if record.is_of_calls:
        return _program(str(path), record, folder)
    timelines, remarks, missing = [], [], []
    for row in record.ranks:
        place = folder.timeline_of(row.rank)
        try:
            line = read_timeline(place)
            if line.rank != row.rank:
                raise TimelineError(f"the timeline {place} is that of rank {line.rank}")
            timelines.append(line)
        except TimelineError as error:
            if place.exists():
                remarks.append(f"{one_line(error)}: what it holds of rank {row.rank} is left out")
            else:
                missing.append(row.rank)
    if missing:
        remarks.append(f"{path}: no timeline of rank {', '.join(map(str, missing))}")
    return RunContent(str(path), record, tuple(timelines), tuple(remarks))


def _program(name: str, record: Record, folder: RunFolder) -> RunContent:
    try:
        calls = program_calls(read_calls(folder))
    except TimelineError as error:
        return RunContent(name, record, (), (one_line(error),))
    return RunContent(name, record, (), calls.remarks, calls)


def _phases(record: Record, timelines: Iterable[RankTimeline]) -> Iterator[PhaseTime]:
    lines = {line.rank: line for line in timelines}
    for row in record.ranks:
        if record.is_of_calls:  # which has no epochs
            yield from (PhaseTime(row.rank, OUTSIDE, phase, ns) for phase, ns in row.phases_ns.items())
            continue
        epochs = {int(one["epoch"]): one for one in lines[row.rank].epochs} if row.rank in lines else {}
        outside = {
            phase: row.phases_ns.get(phase, 0) - sum(int(one[phase]) for one in epochs.values())
            for phase in PHASES
        }
        if not epochs or min(outside.values()) < 0:  # the record of a run that was cut off may be the older
            yield from (PhaseTime(row.rank, None, phase, ns) for phase, ns in row.phases_ns.items())
            continue
        yield from (PhaseTime(row.rank, OUTSIDE, phase, ns) for phase, ns in outside.items())
        for number, one in epochs.items():
            yield from (PhaseTime(row.rank, number, phase, int(one[phase])) for phase in PHASES)


def _regions(timeline: RankTimeline, exchanges: list[Exchange]) -> list[Region]:
    rank = timeline.rank
    begun = {exchange.entered_ns for exchange in exchanges}
    found = []
    for row in timeline.epochs:
        numbers = (("epoch", int(row["epoch"])), ("samples", int(row["samples"])))
        found.append(Region(rank, "epoch", int(row["start_ns"]), int(row["end_ns"]), 0, numbers))
    for row in timeline.steps:
        name = "step" if row["step"] else "end of epoch"
        place = tuple((key, int(row[key])) for key in ("epoch", "step", "samples"))
        found.append(Region(rank, name, int(row["start_ns"]), int(row["end_ns"]), 1, place))
    found += [
        Region(rank, PHASES[row["phase"]], int(row["start_ns"]), int(row["end_ns"]), 2)
        for row in timeline.spans
        if row["start_ns"] not in begun and row["start_ns"] < row["end_ns"]  # others are whole exchanges
    ]
    for one in exchanges:
        size = (("bytes", one.bytes),)
        found.append(Region(rank, NAMES[one.pattern], one.entered_ns, one.left_ns, 2, size, (one,)))
        if one.entered_ns < one.transfer_ns:
            late = (("waited for rank", one.late),)
            found.append(Region(rank, "wait", one.entered_ns, one.transfer_ns, 3, late))
        if one.transfer_ns < one.left_ns:
            found.append(Region(rank, "transfer", one.transfer_ns, one.left_ns, 3))
    return sorted(found, key=lambda region: (region.start_ns, -region.end_ns, region.depth))


NAMES = {
    Pattern.ALL_TO_ALL: "all to all",
    Pattern.ALL_TO_ONE: "all to one",
    Pattern.ONE_TO_ALL: "one to all",
    Pattern.SEND: "send",
    Pattern.RECEIVE: "receive",
}
"""Regions that are exchanges, by what was exchanged."""


def _collective(group: list[Exchange]) -> Collective:
    parts = tuple(sorted(group, key=lambda part: part.rank))
    return Collective(group[0].pattern, group[0].peer, parts, Communicator(tuple(one.rank for one in parts)))


def _together(parts: list[Exchange]) -> Iterator[list[Exchange]]:
    """The parts that belong to one exchange. Numbers begin again after a rank was lost, so the same number
    may come once more, later: a rank has only one part in an exchange."""
    groups: dict[tuple[int, ...], list[list[Exchange]]] = defaultdict(list)
    for part in sorted(parts, key=lambda part: part.left_ns):
        same = groups[part.key]
        if not same or part.rank in {one.rank for one in same[-1]}:
            same.append([])
        same[-1].append(part)
    for same in groups.values():
        yield from same
