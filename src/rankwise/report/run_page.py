"""The page about one run or several: what is there is shown, what is missing is named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

from rankwise.report import program_page, run_tables
from rankwise.report.charts import learning, scaling, timeline, times
from rankwise.report.diagnosis import diagnose
from rankwise.report.page import Block, Notice, Page, Paragraph, Row, Section
from rankwise.report.program_summary import verdict
from rankwise.report.runs import Run, read_runs
from rankwise.report.words import count
from rankwise.runs.record import Record


def write_report(folders: Sequence[Path], output: Path) -> tuple[str, ...]:
    """Write the page about some run folders; returns a line for each thing that is missing or amiss.

    Raises UsageError if no folder holds a record that can be read, or the page cannot be written.
    """
    reading = read_runs(folders)
    run_page(reading.runs, reading.warnings).write(output)
    return reading.warnings


def run_page(runs: Sequence[Run], warnings: Iterable[str] = ()) -> Page:
    """The page about one run or several. `warnings` are shown before anything else."""
    notices = tuple(Notice(f"{line[:1].upper()}{line[1:]}.") for line in warnings)
    outcomes = tuple(notice for run in runs for notice in _outcome(run))
    make = _page_of_one if len(runs) == 1 else _page_of_several
    return make(runs, (*notices, *outcomes))


def _page_of_one(runs: Sequence[Run], notices: Iterable[Notice]) -> Page:
    (run,) = runs
    record = run.record
    if record.is_of_calls:
        return program_page.program_page(run, notices)
    return Page(
        f"{record.trained}, {count(len(record.ranks), 'rank')}",
        f"Run {run.name}: {scaling.strategy(record)}, started {_when(record)}.",
        (
            Section("At a glance", (*notices, run_tables.numbers(record))),
            Section("What holds it back", tuple(_diagnosis(record))),
            Section("Learning", tuple(_learning(runs))),
            Section(
                "Where the time of each rank went",
                (*_times(record), run_tables.efficiencies(runs), *run_tables.goodput(runs)),
            ),
            Section("Who waits for whom", tuple(_waits(record))),
            *(Section("Regions", (table,)) for table in run_tables.regions(record)),
            Section("A few steps", tuple(_steps(run))),
            Section("Throughput", tuple(_throughput(runs))),
            *(Section("Faults", (table,)) for table in run_tables.faults(record)),
            *(Section("Generations of ranks", (table,)) for table in run_tables.generations(record)),
            Section(
                "Configuration and environment",
                (run_tables.options(runs), *run_tables.environments(runs)),
            ),
        ),
    )


def _page_of_several(runs: Sequence[Run], notices: Iterable[Notice]) -> Page:
    return Page(
        f"{len(runs)} runs compared",
        ", ".join(run.name for run in runs),
        (
            Section("At a glance", (*notices, run_tables.overview(runs))),
            Section("Learning", tuple(_learning(runs))),
            Section("Speedup and efficiency over ranks", tuple(_scaling(runs))),
            Section(
                "Where the time went",
                (times.run_bars(runs), run_tables.efficiencies(runs), *run_tables.goodput(runs)),
            ),
            Section("Throughput", tuple(_throughput(runs))),
            *(Section(f"Run {run.name}", tuple(_one_of_several(run))) for run in runs),
            Section(
                "Configuration and environment",
                (
                    run_tables.differences(runs),
                    run_tables.options(runs),
                    *run_tables.environments(runs),
                ),
            ),
        ),
    )


def _one_of_several(run: Run) -> Iterable[Block]:
    if run.record.is_of_calls:
        yield from (Paragraph(line) for line in verdict(run.record))
        yield from program_page.lines(run.record)
        yield from program_page.rank_times(run.record)
        yield from program_page.waits(run.record)
        return
    yield from _diagnosis(run.record)
    yield from _times(run.record)
    yield from _waits(run.record)
    yield from _steps(run)
    yield from run_tables.faults(run.record)
    yield from run_tables.generations(run.record)


def _outcome(run: Run) -> Iterable[Notice]:
    """Why a run is not complete, and which of its ranks died."""
    record = run.record
    told = {"running": "is not over", "interrupted": "was interrupted", "failed": "failed"}
    if record.outcome in told:
        why = f": {record.message}" if record.message else ""
        yield Notice(f"Run {run.name} {told[record.outcome]}{why}.")
    for row in record.ranks:
        if row.died_at_s is not None:
            yield Notice(
                f"Rank {row.rank} of {run.name} died after {row.died_at_s:.1f} s: its time ends there."
            )


def _diagnosis(record: Record) -> Iterable[Block]:
    diagnosis = diagnose(record)
    yield Paragraph(diagnosis.summary)
    for finding in diagnosis.findings:
        yield Paragraph(finding.text, lead=finding.headline)


def _learning(runs: Sequence[Run]) -> Iterable[Block]:
    evaluated = [run for run in runs if run.record.evaluated]
    with_loss = [run for run in runs if learning.has(run, "train_loss", "val_loss")]
    if not (evaluated or with_loss):
        yield Notice("No epoch was evaluated, and no loss logged, so there are no learning curves.")
        return
    charts = [learning.accuracy(evaluated)] if evaluated else []  # a loop of a user's own logs what it likes
    charts += [learning.loss(with_loss)] if with_loss else []
    yield Row(tuple(charts))
    if len(runs) > 1 and evaluated:
        yield learning.accuracy_over_time(evaluated)


def _times(record: Record) -> Iterable[Block]:
    yield times.rank_bars(record)
    yield from run_tables.stopwatches(record)


def _waits(record: Record) -> Iterable[Block]:
    if any(row.wait_on_ns for row in record.ranks):
        yield Row((times.wait_map(record), run_tables.waited_for(record)))
    elif len(record.ranks) == 1:
        yield Paragraph("A single rank waits for nobody.")
    else:
        yield Notice("The record does not say who waited for whom.")


def _steps(run: Run) -> Iterable[Block]:
    if not run.timelines:
        yield Notice("The run folder holds no timelines, so there is nothing to show step by step.")
        return
    missing = len(run.record.ranks) - len(run.timelines)
    if missing:
        yield Notice(f"Without the timelines of {count(missing, 'rank')}, which could not be read.")
    charts = timeline.steps(run.timelines)
    if not charts:
        yield Notice("The timelines hold no step that all workers took.")
    yield from charts


def _throughput(runs: Sequence[Run]) -> Iterable[Block]:
    trained = _trained(runs)
    if not trained:
        yield Notice("No epoch was completed, so there is no throughput.")
    elif len(runs) == 1:
        yield Row((learning.throughput(trained), learning.epoch_seconds(runs[0])))
    else:
        yield learning.throughput(trained)


def _scaling(runs: Sequence[Run]) -> Iterable[Block]:
    trained = _trained(runs)
    if len({run.record.config["dataset"] for run in trained}) > 1:
        yield Notice("The runs trained on different datasets, so there is no speedup to show.")
    elif len({len(run.record.ranks) for run in trained}) < 2:
        yield Notice(
            "The runs with epochs have one number of ranks, so there is no speedup over ranks to show."
        )
    else:
        yield Row((scaling.speedup(trained), scaling.efficiency(trained)))


def _trained(runs: Sequence[Run]) -> Sequence[Run]:
    """The runs that completed an epoch."""
    return [run for run in runs if run.record.epochs]


def _when(record: Record) -> str:
    return f"{datetime.fromisoformat(record.started_at):%-d %B %Y, %H:%M %Z}"
