"""A run at its end, as one table in the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rankwise.ledger.phases import TRAINING
from rankwise.report import words
from rankwise.report.program_summary import program_summary
from rankwise.runs.record import Rank, Record, Target

GROUPS = {
    "start": ("startup",),
    "train": (*TRAINING, "compute"),
    "wait": ("wait", "recovery"),
    "sync": ("pack", "transfer"),
    "eval": ("evaluation",),
    "save": ("checkpoint",),
    "other": ("other", "instrument"),
}
"""Phases as the table shows them, several to a column so that it fits a terminal."""


def group_seconds(row: Rank) -> dict[str, float]:
    """Seconds of a rank in each group of phases; they add up to its wall time."""
    return {
        group: sum(row.phases_ns.get(phase, 0) for phase in phases) / 1e9 for group, phases in GROUPS.items()
    }


def summary(record: Record, folder: str) -> RenderableType:
    """Result, epochs and the time of each rank."""
    if record.is_of_calls:
        return program_summary(record, folder)
    parts: list[RenderableType] = []
    if record.epochs:
        parts.append(_epochs(record))
    parts.append(_ranks(record))
    parts.append(Text(_headline(record)))
    if cost := words.goodput(record.efficiency):
        parts.append(Text(cost))
    parts.append(Text(f"run folder: {folder}"))
    return Group(*parts)


def _headline(record: Record) -> str:
    config = record.config
    topology = f", {config['topology']}" if config["topology"] not in (None, config["strategy"]) else ""
    spares = f" and {words.count(config['spares'], 'spare')}" if config["spares"] else ""
    text = (
        f"{record.outcome}: {record.trained}, {config['strategy']}{topology}, "
        f"{words.count(config['ranks'], 'rank')}{spares}, {record.wall_s:.1f} s"
    )
    if record.evaluated:
        text += f"; best accuracy {record.best.val_accuracy:.2%} in epoch {record.best.epoch}"
    if record.epochs:
        if record.target:
            text += f"; {_target(record.target)}"
        text += f"; samples lost {record.samples.lost}, trained twice {record.samples.duplicated}"
    return text


def _target(target: Target) -> str:
    if not target.reached:
        return f"{target.accuracy:.2%} was not reached"
    return f"reached {target.accuracy:.2%} in epoch {target.epoch}, {words.target(target)}"


def _epochs(record: Record, most: int = 8) -> Table:
    table = Table(title="Epochs" if len(record.epochs) <= most else f"The last {most} epochs", box=None)
    for name in ("epoch", "train loss", "val loss", "accuracy", "seconds", "samples/s"):
        table.add_column(name, justify="right")
    for row in record.epochs[-most:]:
        table.add_row(
            str(row.epoch),
            words.loss(row.train_loss),
            "" if row.val_loss is None else f"{row.val_loss:.4f}",
            "" if row.val_accuracy is None else f"{row.val_accuracy:.2%}",
            f"{row.wall_s:.2f}",
            f"{row.samples_per_s:,.0f}",
        )
    return table


def _ranks(record: Record) -> Table:
    table = Table(title="Seconds of each rank (they add up)", box=None)
    for name in ("rank", *GROUPS, "wall", "MB sent"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in record.ranks:
        table.add_row(
            f"{row.rank} {row.role}",
            *(f"{seconds:.2f}" for seconds in group_seconds(row).values()),
            f"{row.wall_ns / 1e9:.2f}",
            f"{row.bytes_sent / 1e6:.1f}",
        )
    return table
