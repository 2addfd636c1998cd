"""Reads run folders for a report: what is there, and a line for each thing that is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rankwise.errors import TimelineError, UsageError, one_line
from rankwise.ledger.timeline import RankTimeline, read_timeline
from rankwise.runs.folder import RunFolder
from rankwise.runs.program_record import left_behind
from rankwise.runs.record import Record


@dataclass(frozen=True)
class Run:
    """A run as a report knows it. Its name is no other run's; `timelines` are those that could be read."""

    name: str
    record: Record
    timelines: tuple[RankTimeline, ...] = ()


@dataclass(frozen=True)
class Reading:
    """The runs that could be read, and one line for each thing that could not, or is amiss."""

    runs: tuple[Run, ...]
    warnings: tuple[str, ...]


def read_runs(folders: Iterable[Path]) -> Reading:
    """Read run folders. Raises UsageError if there is no record to be read in any of them."""
    runs: dict[str, Run] = {}
    warnings: list[str] = []
    for path in dict.fromkeys(folders):
        folder = RunFolder(path)
        try:
            record = _read(folder)
        except UsageError as error:
            warnings.append(one_line(error))
            continue
        name = path.resolve().name
        name = str(path) if name in runs else name
        runs[name] = Run(name, record, tuple(_timelines(folder, record, warnings)))
    if not runs:
        raise UsageError("; ".join(warnings))
    warnings += different_datasets({run.name: run.record for run in runs.values()})
    return Reading(tuple(runs.values()), tuple(warnings))


def _read(folder: RunFolder) -> Record:
    """The record; of a program whose ranks all ended before one could be written, what they have logged."""
    try:
        return folder.read()
    except UsageError:
        left = None if folder.record.exists() else left_behind(folder)
        if left is None:
            raise
        return left


def _timelines(folder: RunFolder, record: Record, warnings: list[str]) -> Iterable[RankTimeline]:
    """The timelines of a run's ranks, with a warning for each that is damaged; a run may have none at all."""
    if not any(folder.timeline.glob("*.npz")):
        return
    for row in record.ranks:
        try:
            yield read_timeline(folder.timeline_of(row.rank))
        except TimelineError as error:
            warnings.append(one_line(error))


def different_datasets(runs: Mapping[str, Record]) -> Iterable[str]:
    """A warning if runs, by their names, trained on different datasets."""
    datasets: dict[str, list[str]] = {}
    for name, record in runs.items():
        datasets.setdefault(record.config["dataset"], []).append(name)
    if len(datasets) > 1:
        named = "; ".join(f"{dataset}: {', '.join(names)}" for dataset, names in datasets.items())
        yield f"these runs trained on different datasets, so their figures do not compare ({named})"
