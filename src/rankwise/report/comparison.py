"""Runs side by side: one list of columns, which every format of `comparison_formats` shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankwise.config import TrainConfig
from rankwise.report.runs import different_datasets
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record

Value = str | int | float | None


@dataclass(frozen=True)
class Column:
    """One thing to compare. `key` is its name with unit in CSV and JSON, where values are raw; tables
    show it under `title` as `text` puts it. A setting that all runs share is said once, above the table."""

    key: str
    title: str
    value: Callable[[Record], Value] = field(repr=False)
    text: Callable[[Any], str] = str
    setting: bool = False


@dataclass(frozen=True)
class Comparison:
    """`rows` hold each run's values by column key, None where a run has none; `warnings` what a reader
    should know before comparing, a line each."""

    names: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[dict[str, Value], ...]
    warnings: tuple[str, ...]

    @property
    def shared(self) -> list[Column]:
        """Settings that several runs have in common."""
        return [column for column in self.columns if self._is_shared(column)]

    @property
    def shown(self) -> list[Column]:
        """Columns that a table needs: neither shared nor empty."""
        return [
            column
            for column in self.columns
            if not self._is_shared(column) and any(row[column.key] is not None for row in self.rows)
        ]

    def text(self, column: Column, row: dict[str, Value]) -> str:
        """A value as tables show it."""
        value = row[column.key]
        return "-" if value is None else column.text(value)

    def shared_line(self) -> str:
        """The shared settings as one line, empty if there are none."""
        settings = [c for c in self.shared if self.rows[0][c.key] is not None]
        if not settings:
            return ""
        return "All runs: " + ", ".join(f"{c.title} {self.text(c, self.rows[0])}" for c in settings)

    def _is_shared(self, column: Column) -> bool:
        values = [row[column.key] for row in self.rows]
        return column.setting and len(values) > 1 and all(value == values[0] for value in values)


def compare(paths: Iterable[Path]) -> Comparison:
    """The runs in these folders, in the order given; the first one is what the others are measured by.

    Raises UsageError for a folder without a record, or with one that is damaged or of a newer version.
    """
    given: dict[Path, list[Path]] = {}
    for path in paths:
        given.setdefault(path.resolve(), []).append(path)
    folders = [same[0] for same in given.values()]
    records = [RunFolder(folder).read() for folder in folders]
    names = _names(folders)
    columns = (*SETTINGS, *_differing_options(records), *RESULTS, _speedup(records[0]))
    rows = tuple({column.key: column.value(record) for column in columns} for record in records)
    warnings = [
        f"{same[0]} was given more than once: it is shown once" for same in given.values() if len(same) > 1
    ]
    return Comparison(names, columns, rows, (*warnings, *_warnings(names, records)))


def _names(folders: list[Path]) -> tuple[str, ...]:
    """The folders' own names, or whole paths where two are called alike."""
    names = [folder.resolve().name for folder in folders]
    return tuple(
        name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)
    )


def _warnings(names: Sequence[str], records: Sequence[Record]) -> list[str]:
    found = list(different_datasets(dict(zip(names, records, strict=True))))
    for name, record in zip(names, records, strict=True):
        if record.outcome != "completed":
            why = f": {record.message}" if record.message else ""
            found.append(f"{name} is not complete, it is {record.outcome}{why}")
        if record.resumed_from_epoch is not None:
            since = record.resumed_from_epoch
            found.append(f"{name} was resumed after epoch {since}: its time and shares are those since then")
    return found


_DEFAULTS = TrainConfig().model_dump(mode="json")
_PLACES = {"out", "data_dir", "cache_dir", "track"}
"""Options that say where things lie, and nothing about the run."""


def _option(name: str) -> Callable[[Record], Value]:
    # A record of an earlier version lacks the options that came later: they had their defaults.
    def value(record: Record) -> Value:
        return record.config.get(name, _DEFAULTS[name])  # type: ignore[no-any-return]

    return value


def _differing_options(records: list[Record]) -> list[Column]:
    """Options other than the usual settings in which these runs differ."""
    usual = {column.key for column in SETTINGS} | _PLACES
    columns = [
        Column(name, name.replace("_", " "), _option(name), setting=True)
        for name in _DEFAULTS
        if name not in usual
    ]
    return [c for c in columns if any(c.value(record) != c.value(records[0]) for record in records)]


def _speedup(first: Record) -> Column:
    """How much faster than the first run, by median seconds an epoch (evaluation and checkpoint included).

    None where an epoch is not the same work: another dataset, or another part of it.
    """

    def value(record: Record) -> Value:
        same = all(
            _option(name)(record) == _option(name)(first)
            for name in ("dataset", "train_limit", "val_limit", "validation_split")
        )
        return (
            first.median_epoch_s / record.median_epoch_s if same and first.epochs and record.epochs else None
        )

    return Column("speedup", "speedup", value, "{:.2f}".format)


def _time_to_target_s(record: Record) -> Value:
    """From launch until the target accuracy was reached."""
    return record.target.from_launch_s if record.target else None


def _share(phase: str) -> Callable[[Record], Value]:
    """Part of all ranks' wall time that went to a phase."""

    def value(record: Record) -> Value:
        wall_ns = sum(row.wall_ns for row in record.ranks)
        return sum(row.phases_ns[phase] for row in record.ranks) / wall_ns if wall_ns else None

    return value


def _of_epochs(value: Callable[[Record], Value]) -> Callable[[Record], Value]:
    """None as long as no epoch is done."""
    return lambda record: value(record) if record.epochs else None


def _evaluated(value: Callable[[Record], Value]) -> Callable[[Record], Value]:
    """A value of runs that were evaluated, None for others."""
    return lambda record: value(record) if record.evaluated else None


def _last_val_loss(record: Record) -> Value:
    return next((row.val_loss for row in reversed(record.epochs) if row.val_loss is not None), None)


_one_decimal: Callable[[float], str] = "{:.1%}".format
_seconds: Callable[[float], str] = "{:.1f}".format

SETTINGS = (
    Column("outcome", "outcome", lambda r: r.outcome, setting=True),
    Column("dataset", "dataset", _option("dataset"), setting=True),
    Column("model", "model", _option("model"), setting=True),
    Column("strategy", "strategy", _option("strategy"), setting=True),
    Column("topology", "topology", _option("topology"), setting=True),
    Column("ranks", "ranks", lambda r: len(r.ranks), setting=True),
    Column("batch_size", "batch size", _option("batch_size"), setting=True),
    Column("epochs", "epochs done", lambda r: len(r.epochs), setting=True),
    Column("target_accuracy", "target accuracy", _option("target_accuracy"), _one_decimal, setting=True),
)

RESULTS = (
    Column("best_accuracy", "best accuracy", _evaluated(lambda r: r.best.val_accuracy), "{:.2%}".format),
    Column("best_epoch", "in epoch", _evaluated(lambda r: r.best.epoch)),
    Column("final_val_loss", "last val loss", _last_val_loss, "{:.4f}".format),
    Column("wall_s", "time (s)", lambda r: r.wall_s, _seconds),
    Column("time_to_target_s", "to target (s)", _time_to_target_s, _seconds),
    Column("epoch_s", "an epoch (s)", _of_epochs(lambda r: r.median_epoch_s), "{:.2f}".format),
    Column(
        "samples_per_s",
        "samples/s",
        _of_epochs(lambda r: r.median_samples_per_s),
        "{:,.0f}".format,
    ),
    Column("cpu_percent", "CPU", lambda r: r.cpu_percent or None, "{:.0f}%".format),
    Column("parallel_efficiency", "parallel eff.", lambda r: r.efficiency.parallel, _one_decimal),
    Column("load_balance", "load balance", lambda r: r.efficiency.load_balance, _one_decimal),
    Column("wait_share", "waiting", _share("wait"), _one_decimal),
    Column("transfer_share", "transfer", _share("transfer"), _one_decimal),
)
