"""What each rank did when, as a trace that Perfetto opens (https://ui.perfetto.dev).

The format is Chrome's Trace Event JSON. Hosts are its processes and ranks its threads, so each rank has
one track, on which slices nest: epoch, step, phase or exchange, and in an exchange its waiting and its
transfer. Arrows go from the exchange of the sender to the transfer of the receiver.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankwise.errors import StorageError, TimelineError, UsageError
from rankwise.ledger.phases import PHASES
from rankwise.ledger.timeline import RankTimeline, read_timeline
from rankwise.report.exchanges import Exchange, arrows, read_exchanges
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record
from rankwise.system.files import write_atomically

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


@dataclass(frozen=True)
class Written:
    """What a trace holds, in a line, and what is missing in it, a line each."""

    about: str
    remarks: list[str]


def write_trace(run: Path, output: Path) -> Written:
    """Write the trace of the run in folder `run` to `output`.

    Raises UsageError, one line, if there is no run or no timeline in it, or `output` cannot be written.
    """
    folder = RunFolder(run)
    record = folder.read()
    timelines, remarks = _read(folder, [row.rank for row in record.ranks])
    places = _places(timelines)
    found = events(record, timelines)
    content = {
        "displayTimeUnit": "ms",
        "otherData": {"run": str(run), **{f"kept of rank {t.rank}": t.kept for t in timelines}},
        "traceEvents": [*_names(timelines, places), *(e.as_json(places[e.rank]) for e in found)],
    }
    try:
        write_atomically(output, json.dumps(content, separators=(",", ":")).encode())
    except StorageError as error:
        raise UsageError(f"{error}; choose another --output") from None
    ranks = f"{len(timelines)} rank{'s' if len(timelines) > 1 else ''}"
    kept = max((t.kept for t in timelines), key=len)
    about = f"{output}: {ranks}, {len(found)} events; in full: {kept}; open it at https://ui.perfetto.dev"
    return Written(about, remarks)


def _read(folder: RunFolder, ranks: list[int]) -> tuple[list[RankTimeline], list[str]]:
    """The timelines that can be read, and a line for those that cannot."""
    paths = {rank: folder.timeline_of(rank) for rank in ranks}
    missing = [rank for rank, path in paths.items() if not path.exists()]
    if len(missing) == len(ranks):
        raise TimelineError(f"there is no timeline in {folder.timeline}: nothing to trace")
    remarks = [f"no timeline of rank {', '.join(map(str, missing))}: not in the trace"] if missing else []
    timelines = []
    for rank, path in paths.items():
        if rank not in missing:
            try:
                timelines.append(read_timeline(path))
            except TimelineError as error:
                remarks.append(f"{error}: rank {rank} is not in the trace")
    if not timelines:
        raise TimelineError(remarks[-1])
    return timelines, remarks


def events(record: Record, timelines: list[RankTimeline]) -> list[Event]:
    """All that happened in a run: outer slices before inner ones, an arrow's beginning before its end,
    which is the order that viewers keep to at one time."""
    exchanges = read_exchanges(timelines, slack_ns=2 * record.clock.error_bound_ns)
    found: list[Event] = [*_total_throughput(record, timelines[0])]
    for timeline in timelines:
        begun = {exchange.entered_ns for exchange in exchanges if exchange.rank == timeline.rank}
        found += [*_epochs(timeline), *_steps(timeline), *_phases(timeline, begun), *_throughput(timeline)]
    for exchange in exchanges:
        found += _exchange(exchange)
    # An end of an arrow needs a slice to hold on to, and may lie in a step that was not kept.
    slices = {(event.rank, event.start_ns) for event in found if event.kind == "X"}
    pairs = [(one, two) for one, two in arrows(exchanges) if (one.rank, one.posted_ns) in slices]
    for number, (source, target) in enumerate(pairs, start=1):
        found.append(Event("s", source.rank, source.title, source.posted_ns + INSIDE_NS, arrow=number))
        found.append(Event("f", target.rank, source.title, target.transfer_ns + INSIDE_NS, arrow=number))
    return found


def _slice(rank: int, name: str, start_ns: int, end_ns: int, **args: Any) -> Event:
    return Event("X", rank, name, int(start_ns), int(end_ns - start_ns), args)


def _epochs(timeline: RankTimeline) -> Iterator[Event]:
    for row in timeline.epochs:
        phases = {f"{phase}_s": int(row[phase]) / 1e9 for phase in PHASES if row[phase]}
        name, samples = f"epoch {row['epoch']}", int(row["samples"])
        yield _slice(timeline.rank, name, row["start_ns"], row["end_ns"], samples=samples, **phases)


def _steps(timeline: RankTimeline) -> Iterator[Event]:
    for row in timeline.steps:
        name = f"step {row['step']}" if row["step"] else "end of epoch"
        about = {"epoch": int(row["epoch"]), "samples": int(row["samples"])}
        yield _slice(timeline.rank, name, row["start_ns"], row["end_ns"], **about)


def _phases(timeline: RankTimeline, exchanges: set[int]) -> Iterator[Event]:
    """The phases of kept steps; those that are a whole exchange, which began at these times, are not
    among them."""
    for row in timeline.spans:
        if row["start_ns"] not in exchanges and row["start_ns"] < row["end_ns"]:
            yield _slice(timeline.rank, PHASES[row["phase"]], row["start_ns"], row["end_ns"])


def _exchange(exchange: Exchange) -> Iterator[Event]:
    entered_ns, transfer_ns, left_ns = exchange.entered_ns, exchange.transfer_ns, exchange.left_ns
    about: dict[str, Any] = {"bytes": exchange.bytes}
    if transfer_ns == entered_ns:
        yield _slice(exchange.rank, exchange.title, entered_ns, left_ns, **about)
        return
    about["waited_for"] = f"rank {exchange.late}"
    yield _slice(exchange.rank, exchange.title, entered_ns, left_ns, **about)
    yield _slice(exchange.rank, "wait", entered_ns, transfer_ns, **about)
    if transfer_ns < left_ns:
        yield _slice(exchange.rank, "transfer", transfer_ns, left_ns, **about)


def _throughput(timeline: RankTimeline) -> Iterator[Event]:
    """Samples per second: of each step that is kept, and between those of the whole epoch."""
    for epoch in timeline.epochs:
        mean = _rate(epoch, epoch["samples"])
        steps = timeline.steps[timeline.steps["epoch"] == epoch["epoch"]]
        rates = {int(epoch["start_ns"]): mean} | {int(step["end_ns"]): mean for step in steps}
        rates |= {int(step["start_ns"]): _rate(step, step["samples"]) for step in steps}
        rates |= {int(epoch["end_ns"]): 0.0}
        yield from (_counter(timeline.rank, f"rank {timeline.rank}", *rate) for rate in rates.items())


def _total_throughput(record: Record, timeline: RankTimeline) -> Iterator[Event]:
    """Samples per second of all ranks in each epoch, which begins and ends when it does for one of them."""
    samples = {row.epoch: row.train_samples for row in record.epochs}
    for epoch in timeline.epochs:
        rate = _rate(epoch, samples.get(int(epoch["epoch"]), 0))
        yield _counter(timeline.rank, "all ranks", epoch["start_ns"], rate)
        yield _counter(timeline.rank, "all ranks", epoch["end_ns"], 0.0)


def _rate(row: Any, samples: int) -> float:
    """Samples per second in the time of an epoch or step."""
    return float(1e9 * samples / max(int(row["end_ns"] - row["start_ns"]), 1))


def _counter(rank: int, name: str, time_ns: int, samples_per_s: float) -> Event:
    return Event("C", rank, name, int(time_ns), args={"samples/s": round(samples_per_s, 1)})


def _places(timelines: list[RankTimeline]) -> dict[int, dict[str, int]]:
    """Process and thread of each rank. Viewers take equal numbers for one thread: none is used twice."""
    hosts = list(dict.fromkeys(timeline.host for timeline in timelines))
    most = 1 + max(timeline.rank for timeline in timelines)
    return {t.rank: {"pid": most + 1 + hosts.index(t.host), "tid": 1 + t.rank} for t in timelines}


def _names(timelines: list[RankTimeline], places: dict[int, dict[str, int]]) -> Iterator[dict[str, Any]]:
    """How hosts and ranks are called, and that ranks stand in their order."""
    for timeline in timelines:
        for name, args in (
            ("process_name", {"name": f"host {timeline.host}"}),
            ("thread_name", {"name": f"rank {timeline.rank} {timeline.role}"}),
            ("thread_sort_index", {"sort_index": timeline.rank}),
        ):
            yield {"ph": "M", "name": name, **places[timeline.rank], "args": args}
