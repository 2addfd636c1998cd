"""A tidy table: one row for each run, rank, epoch and phase."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from rankwise.export.run_content import RunContent

COLUMNS = ("run", "ranks", "rank", "role", "host", "epoch", "phase", "seconds")


def write_csv(runs: Sequence[RunContent], path: Path) -> list[str]:
    """Write all phases of all runs to `path`; returns what a reader should know, a line each."""
    remarks = []
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for run in runs:
            ranks = {row.rank: row for row in run.record.ranks}
            unsplit = sorted({time.rank for time in run.phases if time.epoch is None})
            if unsplit:
                remarks.append(
                    f"{run.name}: the time of rank {', '.join(map(str, unsplit))} is not known by epoch: "
                    "its rows have an empty epoch"
                )
            for time in run.phases:
                row = ranks[time.rank]
                epoch = "" if time.epoch is None else time.epoch
                about = (run.name, len(ranks), time.rank, row.role, row.host, epoch, time.phase)
                table.writerow((*about, decimal_seconds(time.ns)))
    return remarks


def decimal_seconds(ns: int) -> str:
    """Nanoseconds as seconds, all nine decimals of them, so that sums stay exact."""
    return f"{ns // 10**9}.{ns % 10**9:09d}"
