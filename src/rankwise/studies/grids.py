"""The tables of a study, for its page and as CSV files: the paper's numbers beside ours, cell by cell."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rankwise.report import page
from rankwise.runs.record import Record
from rankwise.studies import paper
from rankwise.studies.ledgers import PARTS, Breakdown, Growth, breakdown, growth, mean_breakdown
from rankwise.studies.plan import Trial
from rankwise.studies.results import (
    Results,
    best_accuracy,
    cpu_percent,
    last_accuracy,
    last_loss,
    loss_gap,
    lowest_loss,
    total_s,
    train_loss,
)
from rankwise.studies.statistics import Estimate
from rankwise.studies.verdicts import FEW, MANY, Verdict
from rankwise.system.files import write_atomically

Cell = str | int | float | Estimate | None


@dataclass(frozen=True)
class Grid:
    """A table with a name for its file. Columns name their units; an Estimate is a mean over seeds."""

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def table(self, folded: bool = False) -> page.Table:
        """For a page: a mean with its interval in one cell."""
        rows = tuple(tuple(_shown(cell) for cell in row) for row in self.rows)
        return page.Table(self.columns, rows, self.caption, folded)

    def write(self, folder: Path) -> None:
        """Write it as a CSV file, under its name. Raises StorageError."""
        write_atomically(folder / f"{self.name}.csv", self.to_csv().encode())

    def to_rows(self) -> list[dict[str, Any]]:
        """The rows for JSON, by column: a mean is an object, and None what is missing or no finite number."""
        return [dict(zip(self.columns, map(_for_json, row), strict=True)) for row in self.rows]

    def to_csv(self) -> str:
        """Twelve digits; beside a column of means the half width of the 95% interval and the seeds."""
        means = [any(isinstance(row[i], Estimate) for row in self.rows) for i in range(len(self.columns))]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_spread(self.columns, means, lambda name: (name, f"{name}, half width", "seeds")))
        for row in self.rows:
            writer.writerow(map(_digits, _spread(row, means, _csv_cells)))
        return text.getvalue()


def _spread(
    cells: Iterable[Cell], means: list[bool], spread: Callable[[Cell], tuple[Cell, ...]]
) -> list[Cell]:
    return [
        part for cell, mean in zip(cells, means, strict=True) for part in (spread(cell) if mean else (cell,))
    ]


def _csv_cells(cell: Cell) -> tuple[Cell, ...]:
    return (cell.mean, cell.half_width, cell.n) if isinstance(cell, Estimate) else (cell, None, None)


def _digits(cell: Cell) -> Cell:
    """Without the noise of binary fractions: 63.02, and not 63.019999999999996."""
    return float(f"{cell:.12g}") if isinstance(cell, float) else cell


def _for_json(cell: Cell) -> Any:
    if isinstance(cell, Estimate):
        return {name: _for_json(value) for name, value in asdict(cell).items()}
    return None if isinstance(cell, float) and not math.isfinite(cell) else _digits(cell)


def _shown(cell: Cell) -> page.Cell:
    if not isinstance(cell, Estimate):
        return cell
    return _rounded(cell.mean) if cell.half_width is None else f"{cell.mean:.4g} ± {cell.half_width:.2g}"


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


@dataclass(frozen=True)
class Quantity:
    """A column of the paper's tables."""

    title: str
    ours: Callable[[Record], float]
    theirs: Callable[[paper.Result], float]


QUANTITIES = (
    Quantity("accuracy (%)", lambda r: 100 * best_accuracy(r), lambda row: round(100 * row.accuracy, 2)),
    Quantity("validation loss", lowest_loss, lambda row: row.val_loss),
    Quantity("time (s)", total_s, lambda row: row.time_s),
    Quantity("CPU use (%)", cpu_percent, lambda row: row.cpu_percent),
)


def _beside_the_paper(
    results: Results, name: str, caption: str, head: str, rows: Mapping[int | str, tuple[Trial, paper.Result]]
) -> Grid:
    columns = [head]
    for quantity in QUANTITIES:
        columns += [f"{quantity.title}: paper", f"{quantity.title}: here"]
    return Grid(
        name,
        caption,
        (*columns, "last accuracy (%): here"),
        tuple(
            (
                label,
                *(
                    cell
                    for quantity in QUANTITIES
                    for cell in (quantity.theirs(theirs), results.estimate(trial, quantity.ours))
                ),
                results.estimate(trial, lambda record: 100 * last_accuracy(record)),
            )
            for label, (trial, theirs) in rows.items()
        ),
    )


def table_1(results: Results) -> Grid:
    """Table 1: by the number of processes."""
    return _beside_the_paper(
        results,
        "table-1-processes",
        "By the number of processes, at batch 16",
        "processes",
        {ranks: (results.scale.averaging(ranks), theirs) for ranks, theirs in paper.TABLE_1.items()},
    )


def table_2(results: Results) -> Grid:
    """Table 2: by the batch size."""
    return _beside_the_paper(
        results,
        "table-2-batch-size",
        "By the batch size, with 4 processes",
        "batch size",
        {
            size: (results.scale.averaging(4, batch_size=size), theirs)
            for size, theirs in paper.TABLE_2.items()
        },
    )


def baseline_and_replication(results: Results) -> Grid:
    """Sections 5.1 and 5.2."""
    return _beside_the_paper(
        results,
        "baseline-and-replication",
        "One process, and replication",
        "run",
        {
            "one process, batch 4": (results.scale.alone(), paper.BASELINE),
            "replication, 4 processes, batch 16": (results.scale.replication(), paper.REPLICATION),
        },
    )


def figure_1(results: Results) -> Grid:
    """Figure 1: one process, epoch by epoch, the mean over seeds."""
    records = results.of(results.scale.alone())
    rows = []
    for epochs in zip(*(record.evaluated for record in records), strict=True):
        n = len(epochs)
        accuracy = 100 * sum(row.val_accuracy for row in epochs) / n
        rows.append(
            (
                epochs[0].epoch,
                _rounded(accuracy),
                _rounded(sum(row.val_loss or 0.0 for row in epochs) / n),
                _rounded(sum(train_loss(row) for row in epochs) / n),
            )
        )
    columns = ("epoch", "accuracy (%)", "validation loss", "training loss")
    return Grid("figure-1-one-process", "Figure 1: one process, epoch by epoch", columns, tuple(rows))


PART_NAMES = {
    "data_s": "data",
    "training_s": "training",
    "worker_wait_s": "waiting for workers",
    "evaluation_wait_s": "waiting for evaluation",
    "master_wait_s": "waiting for the master else",
    "exchange_s": "exchange",
    "rest_s": "rest",
}
"""The parts of an epoch in words: the master is waited for while it evaluates, and else."""


def figure_2(results: Results) -> Grid:
    """Figure 2: the paper's stopwatches beside our ledgers, seconds of all epochs."""
    rows: list[tuple[Cell, ...]] = []
    for ranks, theirs in paper.FIGURE_2.items():
        records = results.of(results.scale.averaging(ranks))
        ours = mean_breakdown(records) if records else None
        epochs = results.scale.epochs
        rows.append(
            (
                ranks,
                round(theirs.train_loading_s + theirs.test_loading_s, 2),
                _scaled(ours, epochs, "data_s"),
                theirs.training_s,
                _scaled(ours, epochs, "training_s"),
                round(theirs.worker_communication_s, 2),
                _scaled(ours, epochs, "exchange_s"),
                theirs.evaluation_s,
                _scaled(ours, epochs, "evaluation_wait_s"),
                "not timed",
                _scaled(ours, epochs, "worker_wait_s", "master_wait_s"),
            )
        )
    columns = ["processes"]
    for part in ("data", "training", "communication", "evaluation", "other waiting"):
        columns += [f"{part} (s): paper", f"{part} (s): here"]
    return Grid("figure-2-time", "Seconds of all epochs", tuple(columns), tuple(rows))


def _scaled(ours: Breakdown | None, epochs: int, *parts: str) -> float | None:
    return _rounded(epochs * sum(getattr(ours, part) for part in parts)) if ours else None


def mechanism(results: Results) -> Grid:
    """What accuracy depends on: shards and steps told apart."""
    scale = results.scale
    trials = [scale.averaging(ranks) for ranks in scale.processes]
    trials += [scale.averaging(ranks, shards="redealt") for ranks in scale.redealt]
    trials += [scale.with_as_many_updates(*setting) for setting in scale.as_many_updates]
    rows: list[tuple[Cell, ...]] = [
        (
            trial.options["ranks"],
            trial.options["shards"],
            trial.options["epochs"],
            sum(row.steps for row in records[0].epochs),
            results.estimate(trial, lambda record: 100 * best_accuracy(record)),
            results.estimate(trial, lambda record: train_loss(record.epochs[-1])),
            results.estimate(trial, last_loss),
            results.estimate(trial, loss_gap),
        )
        for trial in trials
        if (records := results.of(trial))
    ]
    columns = (
        "processes",
        "shards",
        "epochs",
        "steps of a worker",
        "best accuracy (%)",
        "last training loss",
        "last validation loss",
        "validation above training loss",
    )
    return Grid("mechanism-of-accuracy", "Shards and steps told apart", columns, tuple(rows))


THREADS = {"auto": "cores shared out", "all": "all cores for every process"}
"""The two ways to give threads to ranks, in words."""


def by_processes(results: Results) -> dict[int, list[Record]]:
    """The runs of Table 1, by the number of processes."""
    runs = {ranks: results.of(results.scale.averaging(ranks)) for ranks in results.scale.processes}
    return {ranks: records for ranks, records in runs.items() if records}


def by_threads(results: Results, threads: str) -> dict[int, list[Record]]:
    """The runs that compare threads, on a part of the samples."""
    scale = results.scale
    runs = {
        ranks: [record for trial in scale.threads_turns(ranks, threads) for record in results.of(trial)]
        for ranks in scale.threads
    }
    return {ranks: records for ranks, records in runs.items() if records}


def epochs(results: Results) -> Grid:
    """The mean worker's epoch by all its parts: of Table 1's runs, and of those that compare threads."""
    sources = {
        f"{THREADS['auto']}, all samples": by_processes(results),
        **{f"{words}, a part of the samples": by_threads(results, name) for name, words in THREADS.items()},
    }
    rows: list[tuple[Cell, ...]] = []
    for words, found in sources.items():
        for ranks, records in found.items():
            mean, seconds = mean_breakdown(records), [breakdown(record).epoch_s for record in records]
            parts = [getattr(mean, part) for part in PARTS]
            times_s = (mean.epoch_s, min(seconds), max(seconds), *parts, mean.off_cpu_s)
            rows.append((words, ranks, len(records), *map(_rounded, times_s)))
    columns = (
        "runs",
        "processes",
        "measured",
        "epoch (s)",
        "fastest (s)",
        "slowest (s)",
        *(f"{name} (s)" for name in PART_NAMES.values()),
        "data and training off the CPU (s)",
    )
    return Grid("epochs", "An epoch of the mean worker, by its ledger", columns, tuple(rows))


GROWTH_NAMES = {
    "more_cores_s": "more cores at work",
    "oversubscription_s": "oversubscription",
    **{part: name for part, name in PART_NAMES.items() if part not in ("data_s", "training_s")},
}


def growths(results: Results) -> dict[str, Growth]:
    """What makes an epoch longer: from few to many processes, and from shared cores to all for each."""
    table = by_processes(results)
    shared, every = by_threads(results, "auto"), by_threads(results, "all")
    pairs = {
        f"{FEW} to {MANY} processes, {THREADS['auto']}": (table.get(FEW), table.get(MANY)),
        f"{FEW} to {MANY} processes, {THREADS['all']}": (every.get(FEW), every.get(MANY)),
        f"{MANY} processes, from shared cores to all": (shared.get(MANY), every.get(MANY)),
    }
    return {
        name: growth(mean_breakdown(before), mean_breakdown(after))
        for name, (before, after) in pairs.items()
        if before and after
    }


def growth_shares(results: Results) -> Grid:
    """The parts of each growth, in seconds an epoch and as shares that add up to 100%."""
    found = growths(results)
    columns = ["part"]
    for name in found:
        columns += [f"{name} (s an epoch)", f"{name} (share, %)"]
    parts = GROWTH_NAMES | {"total_s": "the whole"}
    rows = tuple(
        (
            name,
            *(cell for one in found.values() for cell in (_exact(getattr(one, part)), _share(one, part))),
        )
        for part, name in parts.items()
    )
    return Grid("growth-of-time", "What makes an epoch longer", tuple(columns), rows)


def _share(one: Growth, part: str) -> float | None:
    return _exact(100 * getattr(one, part) / one.total_s) if one.one_sided else None


def _exact(value: float) -> float:
    return round(value, 3) + 0.0  # no -0


def verdicts(judged: list[Verdict]) -> Grid:
    """The claims and what became of them."""
    rows = tuple((v.claim, v.source, v.answer, v.evidence, v.rule) for v in judged)
    return Grid("verdicts", "", ("the paper's claim", "where", "verdict", "evidence", "rule"), rows)


def all_grids(results: Results, judged: list[Verdict]) -> list[Grid]:
    """Every table of the study."""
    made = (
        table_1,
        table_2,
        baseline_and_replication,
        figure_1,
        figure_2,
        mechanism,
        epochs,
        growth_shares,
    )
    return [verdicts(judged), *(make(results) for make in made)]
