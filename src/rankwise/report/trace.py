"""What each rank did when, as a trace that Perfetto opens (https://ui.perfetto.dev).

The format is Chrome's Trace Event JSON. Hosts are its processes and ranks its threads, so each rank has
one track, on which slices nest: epoch, step, phase or exchange, and in an exchange its waiting and its
transfer. Arrows go from the exchange of the sender to the transfer of the receiver.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rankwise.errors import StorageError, TimelineError, UsageError
from rankwise.ledger.phases import PHASES
from rankwise.ledger.timeline import RankTimeline, read_timeline
from rankwise.report.exchanges import Exchange, arrows, read_exchanges
from rankwise.report.program_trace import program_trace, read_calls
from rankwise.report.trace_events import INSIDE_NS, Event, a_slice, names_of, places_of, region_track
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record
from rankwise.system.files import write_atomically


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
    remarks: list[str] = []
    if record.is_of_calls:
        trace = program_trace(read_calls(folder))
        found, hosts, kept = trace.events, trace.hosts, trace.kept
        titles, about_kept = {rank: f"rank {rank}" for rank in hosts}, {"kept": kept}
    else:
        timelines, remarks = _read(folder, [row.rank for row in record.ranks])
        found = events(record, timelines)
        hosts = {line.rank: line.host for line in timelines}
        titles = {line.rank: f"rank {line.rank} {line.role}" for line in timelines}
        kept = max((line.kept for line in timelines), key=len)
        about_kept = {f"kept of rank {line.rank}": line.kept for line in timelines}
    places = places_of(hosts, [rank for rank in hosts if region_track(rank) in {e.rank for e in found}])
    content = {
        "displayTimeUnit": "ms",
        "otherData": {"run": str(run), **about_kept},
        "traceEvents": [*names_of(hosts, titles, places), *(e.as_json(places[e.rank]) for e in found)],
    }
    try:
        write_atomically(output, json.dumps(content, separators=(",", ":")).encode())
    except StorageError as error:
        raise UsageError(f"{error}; choose another --output") from None
    ranks = f"{len(hosts)} rank{'s' if len(hosts) > 1 else ''}"
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
        found += [
            *_regions(timeline),
            *_epochs(timeline),
            *_steps(timeline),
            *_phases(timeline, begun),
            *_throughput(timeline),
        ]
    for exchange in exchanges:
        found += _exchange(exchange)
    # An end of an arrow needs a slice to hold on to, and may lie in a step that was not kept.
    slices = {(event.rank, event.start_ns) for event in found if event.kind == "X"}
    pairs = [(one, two) for one, two in arrows(exchanges) if (one.rank, one.posted_ns) in slices]
    for number, (source, target) in enumerate(pairs, start=1):
        found.append(Event("s", source.rank, source.title, source.posted_ns + INSIDE_NS, arrow=number))
        found.append(Event("f", target.rank, source.title, target.transfer_ns + INSIDE_NS, arrow=number))
    return found


def _epochs(timeline: RankTimeline) -> Iterator[Event]:
    for row in timeline.epochs:
        phases = {f"{phase}_s": int(row[phase]) / 1e9 for phase in PHASES if row[phase]}
        name, samples = f"epoch {row['epoch']}", int(row["samples"])
        yield a_slice(timeline.rank, name, row["start_ns"], row["end_ns"], samples=samples, **phases)


def _regions(timeline: RankTimeline) -> Iterator[Event]:
    regions = timeline.regions
    for row in regions[np.lexsort((-regions["end_ns"], regions["start_ns"]))]:
        path = timeline.region_paths[row["path"]]
        track = region_track(timeline.rank)
        yield a_slice(track, path[-1], row["start_ns"], row["end_ns"], path=" > ".join(path))


def _steps(timeline: RankTimeline) -> Iterator[Event]:
    for row in timeline.steps:
        name = f"step {row['step']}" if row["step"] else "end of epoch"
        about = {"epoch": int(row["epoch"]), "samples": int(row["samples"])}
        yield a_slice(timeline.rank, name, row["start_ns"], row["end_ns"], **about)


def _phases(timeline: RankTimeline, exchanges: set[int]) -> Iterator[Event]:
    """The phases of kept steps; those that are a whole exchange, which began at these times, are not
    among them."""
    for row in timeline.spans:
        if row["start_ns"] not in exchanges and row["start_ns"] < row["end_ns"]:
            yield a_slice(timeline.rank, PHASES[row["phase"]], row["start_ns"], row["end_ns"])


def _exchange(exchange: Exchange) -> Iterator[Event]:
    entered_ns, transfer_ns, left_ns = exchange.entered_ns, exchange.transfer_ns, exchange.left_ns
    about: dict[str, Any] = {"bytes": exchange.bytes}
    if transfer_ns == entered_ns:
        yield a_slice(exchange.rank, exchange.title, entered_ns, left_ns, **about)
        return
    about["waited_for"] = f"rank {exchange.late}"
    yield a_slice(exchange.rank, exchange.title, entered_ns, left_ns, **about)
    yield a_slice(exchange.rank, "wait", entered_ns, transfer_ns, **about)
    if transfer_ns < left_ns:
        yield a_slice(exchange.rank, "transfer", transfer_ns, left_ns, **about)


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
