"""The page about a program that made no `Run`: where its ranks' time went, who waited for whom, and in which
lines of its code."""

from __future__ import annotations

from collections.abc import Iterable

from rankwise.ledger.program_ledger import PROGRAM_PHASES
from rankwise.report import run_tables
from rankwise.report.charts import times
from rankwise.report.page import Block, Notice, Number, Numbers, Page, Paragraph, Row, Section, Table
from rankwise.report.program_summary import verdict
from rankwise.report.runs import Run
from rankwise.report.words import count, percent
from rankwise.runs.record import CallSite, Record

MOST_LINES = 10

HOW_TO_READ = (
    "A rank waited until the last entry of another rank before its own call was over, and that one is "
    "charged; the rest of the call is transfer. One-sided calls and files count as transfer as a whole. "
    "Calls of MPI from C are not seen, and count as own work. `meanwhile` is where the late rank was in the "
    "middle of the wait, by its own calls of MPI."
)

LABELS = {
    "startup": "start-up",
    "compute": "own work",
    "wait": "waiting",
    "transfer": "transfer",
    "pack": "pickling",
    "other": "other",
    "instrument": "measuring",
}
"""What a program's phases are called in a chart."""


def program_page(run: Run, notices: Iterable[Block]) -> Page:
    """The page about one program's run."""
    record = run.record
    return Page(
        f"{record.trained}, {count(len(record.ranks), 'rank')}",
        f"Run {run.name}: a program that uses MPI, started {record.started_at}.",
        (
            Section("At a glance", (*notices, _numbers(record))),
            Section("What holds it back", tuple(Paragraph(line) for line in verdict(record))),
            Section("The lines that cost most", tuple(lines(record))),
            Section("Where the time of each rank went", tuple(rank_times(record))),
            Section("Who waits for whom", tuple(waits(record))),
            *(Section("Regions", (table,)) for table in run_tables.regions(record)),
            Section("Environment", run_tables.environments([run])),
        ),
    )


def lines(record: Record) -> Iterable[Block]:
    """The lines of code that cost most, and for whom they waited."""
    if not record.call_sites:
        yield Paragraph("No line of the program called MPI.")
        return
    yield Paragraph(HOW_TO_READ)
    yield Table(
        (
            *("rank", "line", "function", "call", "calls", "waiting, s", "transfer, s", "pickling, s"),
            *("waited for", "meanwhile"),
        ),
        tuple(_row(site) for site in record.call_sites[:MOST_LINES]),
        f"The {min(MOST_LINES, len(record.call_sites))} that cost most of {len(record.call_sites)}, "
        "a line of code and a rank in each row",
    )


def _row(site: CallSite) -> tuple[str | int | float | None, ...]:
    longest = sorted(site.wait_on_ns, key=lambda rank: site.wait_on_ns[rank], reverse=True)
    late = ", ".join(f"rank {rank}" for rank in longest[:3])
    where = max(site.late_at.items(), key=lambda item: item[1])[0] if site.late_at else None
    spent = (site.wait_ns, site.transfer_ns, site.pack_ns)
    seconds = (ns / 1e9 for ns in spent)
    return (site.rank, site.place, site.function, site.call, site.count, *seconds, late or None, where)


def rank_times(record: Record) -> Iterable[Block]:
    """A bar for each rank."""
    bars = {
        str(row.rank): {phase: row.phases_ns.get(phase, 0) / 1e9 for phase in LABELS} for row in record.ranks
    }
    yield times.bars(
        "rank", bars, "seconds", "Seconds of each rank; they add up to its wall time.", labels=LABELS
    )


def waits(record: Record) -> Iterable[Block]:
    """Who waited for whom."""
    if any(row.wait_on_ns for row in record.ranks):
        yield Row((times.wait_map(record), run_tables.waited_for(record)))
    elif len(record.ranks) == 1:
        yield Paragraph("A single rank waits for nobody.")
    else:
        yield Notice("No rank waited for another, as far as their calls tell.")


def _numbers(record: Record) -> Numbers:
    time_ns = sum(row.wall_ns - row.phases_ns["startup"] for row in record.ranks)
    spent = {phase: sum(row.phases_ns[phase] for row in record.ranks) for phase in PROGRAM_PHASES}
    found = [Number("wall time", f"{record.wall_s:,.1f} s", "start-up included")]
    if time_ns > 0:
        found += [
            Number(LABELS[phase], percent(spent[phase] / time_ns), "of the ranks' time since start-up")
            for phase in ("compute", "wait", "transfer", "pack")
        ]
    return Numbers(tuple(found))
