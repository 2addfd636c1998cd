"""A program's run in words and tables: where the time of its ranks went, and which lines cost it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rankwise.ledger.program_ledger import PROGRAM_PHASES
from rankwise.report.words import count, duration, percent
from rankwise.runs.record import CallSite, Record

MOST_RANKS = 16
"""Rows of the table in the terminal."""

WORTH_TELLING = 0.02
"""The smallest share of the ranks' time that is told as holding a program back."""


def program_summary(record: Record, folder: str) -> RenderableType:
    """Seconds of each rank by phase, and what cost most, in words."""
    table = Table(title="Seconds of each rank (they add up)", box=None)
    for name in ("rank", *PROGRAM_PHASES, "wall"):
        table.add_column(name, justify="right", no_wrap=True)
    shown = sorted(record.ranks, key=lambda row: row.phases_ns["wait"], reverse=True)[:MOST_RANKS]
    for row in sorted(shown, key=lambda row: row.rank):
        seconds = (row.phases_ns[phase] / 1e9 for phase in PROGRAM_PHASES)
        table.add_row(str(row.rank), *(f"{s:.2f}" for s in seconds), f"{row.wall_ns / 1e9:.2f}")
    parts: list[RenderableType] = [table]
    if len(record.ranks) > MOST_RANKS:
        parts.append(Text(f"(the {MOST_RANKS} of {len(record.ranks)} ranks that waited most)"))
    parts += [Text(line) for line in verdict(record)]
    program = record.config["model"]
    parts.append(
        Text(f"{record.outcome}: {program}, {count(len(record.ranks), 'rank')}, {record.wall_s:.1f} s")
    )
    parts.append(Text(f"run folder: {folder}"))
    return Group(*parts)


def verdict(record: Record) -> list[str]:
    """What holds a program back, in sentences, the most costly first."""
    time_ns = sum(row.wall_ns - row.phases_ns["startup"] for row in record.ranks)
    if not record.ranks or time_ns <= 0:
        return ["The program was over before anything could be told of it."]
    if not any(row.model_extra and row.model_extra.get("has_mpi") for row in record.ranks):
        return ["The program did not come to MPI: all its time is computing."]
    spent = {
        phase: sum(row.phases_ns[phase] for row in record.ranks)
        for phase in ("wait", "transfer", "pack", "instrument")
    }
    told = [
        f"What {name} calls in MPI is not seen, and counts as computing."
        for name in record.environment.calls_from_c[:1]
    ]
    if spent["wait"] >= WORTH_TELLING * time_ns:
        told += _waiting(record, spent["wait"], time_ns)
    if spent["transfer"] >= WORTH_TELLING * time_ns:
        told.append(_most(record, "transfer_ns", "Transfer", spent["transfer"], time_ns))
    if spent["pack"] >= WORTH_TELLING * time_ns:
        line = _most(record, "pack_ns", "Pickling", spent["pack"], time_ns)
        told.append(f"{line} The upper-case calls send arrays as they are.")
    if spent["instrument"] >= WORTH_TELLING * time_ns:
        told.append(f"Measuring took {percent(spent['instrument'] / time_ns)} of the ranks' time.")
    return told or [
        f"Nothing in MPI holds it back: waiting, transfer and pickling together are "
        f"{percent((spent['wait'] + spent['transfer'] + spent['pack']) / time_ns)} of the ranks' time."
    ]


def _waiting(record: Record, wait_ns: int, time_ns: int) -> list[str]:
    by_rank: Counter[str] = Counter()
    for row in record.ranks:
        by_rank.update(row.wait_on_ns)
    told = [f"Waiting took {percent(wait_ns / time_ns)} of the ranks' time since start-up."]
    if by_rank:
        rank, ns = by_rank.most_common(1)[0]
        told[0] += f" {percent(ns / wait_ns)} of it was for rank {rank}."
    waiting = [site for site in record.call_sites if site.wait_ns]
    if waiting:
        told.append(f"The line that waited most: {line_in_words(max(waiting, key=lambda s: s.wait_ns))}")
    return told


def line_in_words(site: CallSite) -> str:
    """A line that waited, as a sentence."""
    text = (
        f"rank {site.rank} waited {duration(site.wait_ns / 1e9)} in {site.call} at {site.place} "
        f"({site.function}, {count(site.count, 'call')})"
    )
    if site.wait_on_ns:
        late, _ = max(site.wait_on_ns.items(), key=lambda item: item[1])
        text += f", mostly for rank {late}" if len(site.wait_on_ns) > 1 else f" for rank {late}"
    if site.late_at:
        where = max(site.late_at.items(), key=lambda item: item[1])[0]
        text += f"; meanwhile {where.replace(':', ' was', 1)}"
    return f"{text}."


def _most(record: Record, key: str, name: str, spent_ns: int, time_ns: int) -> str:
    told = f"{name} took {percent(spent_ns / time_ns)} of the ranks' time."
    sites: Sequence[CallSite] = record.call_sites
    if sites:
        most = max(sites, key=lambda site: getattr(site, key))
        took = duration(getattr(most, key) / 1e9)
        told += f" Most of it in one line: {took} in {most.call} at {most.place} on rank {most.rank}."
    return told
