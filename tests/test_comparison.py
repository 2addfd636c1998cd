"""Runs side by side: what stands in the columns, what is said once, and what a reader is warned of."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from rankwise.report.comparison import Comparison, compare
from rankwise.report.comparison_formats import terminal
from rankwise.runs.record import Efficiency, Record, Target

from . import records
from .test_cli import call


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def compared(**runs: Record) -> Comparison:
    """The comparison of records, each in a folder of the name given."""
    for name, record in runs.items():
        records.run_folder(Path(name), record)
    return compare(Path(name) for name in runs)


def keys(comparison: Comparison) -> set[str]:
    """The names of its columns."""
    return {column.key for column in comparison.columns}


def screen(comparison: Comparison, width: int = 80) -> list[str]:
    """What a terminal of some width shows."""
    console = Console(file=io.StringIO(), width=width, markup=False)
    console.print(terminal(comparison, width))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_the_numbers_of_a_run() -> None:
    """Each column holds what the record says, worked out by hand: best epoch, medians over epochs, shares
    of all ranks' time."""
    epochs = records.epochs(4)
    for number, (accuracy, wall_s) in enumerate([(0.3, 3.0), (0.7, 2.0), (0.8, 2.0), (0.75, 9.0)]):
        epochs[number].val_accuracy, epochs[number].wall_s = accuracy, wall_s
        epochs[number].since_launch_s = 5.0 + 2 * number
    epochs[3].train_s = 4.0  # samples/s: 3 times 10,000 / 1.5, once 10,000 / 4
    ranks = [
        records.rank(0, phases_s={"forward": 6.0, "transfer": 2.0}),
        records.rank(1, phases_s={"forward": 9.0}, wait_on_s={"0": 3.0}),
    ]
    record = records.record(
        ranks,
        epochs=epochs,
        config={"target_accuracy": 0.65},
        target=Target.of(0.65, epochs, None),
        cpu_percent=87.5,
        efficiency=Efficiency(parallel=0.9, load_balance=0.95),
    )
    row = compared(run=record).rows[0]
    assert (row["best_accuracy"], row["best_epoch"]) == (0.8, 3)
    assert row["final_val_loss"] == epochs[3].val_loss
    assert row["time_to_target_s"] == 7.0
    assert row["epoch_s"] == 2.5
    assert row["samples_per_s"] == pytest.approx(10_000 / 1.5)
    assert row["wait_share"] == pytest.approx(3 / 20)
    assert row["transfer_share"] == pytest.approx(2 / 20)
    assert (row["ranks"], row["epochs"], row["cpu_percent"]) == (2, 4, 87.5)
    assert (row["parallel_efficiency"], row["load_balance"]) == (0.9, 0.95)


def test_speedup_is_measured_by_the_first_run() -> None:
    """Speedup is the first run's median seconds an epoch over this one's; a run whose epoch is other work
    has none."""
    found = compared(
        first=records.record(epochs=records.epochs(3, wall_s=6.0)),
        faster=records.record(epochs=records.epochs(3, wall_s=2.0)),
        part=records.record(epochs=records.epochs(3, wall_s=1.0), config={"train_limit": 100}),
        other=records.record(epochs=records.epochs(3, wall_s=1.0), config={"dataset": "cifar10"}),
        begun=records.record(epochs=[], outcome="running"),
    )
    assert [row["speedup"] for row in found.rows] == [1.0, 3.0, None, None, None]


def test_options_that_differ_become_columns() -> None:
    """An option in which runs differ is a column of its own, one in which they agree is none; where a run
    lies does not count. An option that an earlier version did not know has its default."""
    old = records.record(config={"lr": 0.1, "out": "a", "flip": "none"})
    del old.config["flip"]
    usual = keys(compared(alone=old))
    assert keys(compared(a=old, b=records.record(config={"out": "b"}))) - usual == {"lr"}
    assert keys(compared(c=old, d=records.record(config={"lr": 0.1, "flip": "random"}))) - usual == {"flip"}


def test_shared_settings_are_said_once() -> None:
    """Settings that all runs share stand in one line, and not in the table; results always stand in the
    table, alike or not. A run alone shares nothing: all stands in the table."""
    found = compared(a=records.record(3), b=records.record(5))
    lines = screen(found)
    assert "dataset digits" in lines[0]
    assert "ranks" not in lines[0]
    table = "\n".join(lines[1:])
    assert "dataset" not in table
    assert [line.split() for line in lines if line.startswith("ranks")] == [["ranks", "3", "5"]]
    assert "best accuracy" in table
    assert "to target" not in table, "a column without any value"
    alone = screen(compare([Path("a")]))
    assert [line.split() for line in alone if line.startswith("dataset")] == [["dataset", "digits"]]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.text("abc-_0123", min_size=1, max_size=70), min_size=1, max_size=12, unique=True),
    width=st.integers(60, 200),
)
@example(names=["20261122-150405-paper-cnn-on-eight-hosts-of-the-old-cluster", "b"], width=60)
def test_a_table_fits_any_terminal(names: list[str], width: int) -> None:
    """Any number of runs with names of any length fit a terminal: no line is too long, no value is cut,
    each run has its column."""
    record = records.record(3, config={"strategy": "parameter-averaging", "target_accuracy": 0.5})
    columns = compared_alike(record, len(names)).columns
    row = {column.key: column.value(record) for column in columns}
    found = Comparison(tuple(names), columns, (row,) * len(names), ())
    lines = screen(found, width)
    assert all(len(line) <= width for line in lines)
    assert "…" not in "".join(lines)
    accuracies = [word for line in lines if line.startswith("best acc") for word in line.split()[2:]]
    assert accuracies == ["73.33%"] * len(names)


def compared_alike(record: Record, count: int) -> Comparison:
    """A comparison of runs that have the same record."""
    for number in range(count):
        if not Path(f"alike{number}").exists():
            records.run_folder(Path(f"alike{number}"), record)
    return compare(Path(f"alike{number}") for number in range(count))


@pytest.mark.parametrize("format", ["csv", "json", "markdown"])
def test_other_programs_get_only_the_format(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    """stdout holds the format and nothing else; CSV and JSON carry the same raw values."""
    found = compared(a=records.record(3), b=records.record(1, outcome="failed", message="it, burnt"))
    assert call("compare", "a", "b", "--format", format) == 0
    out, err = capsys.readouterr()
    assert err == "rankwise: b is not complete, it is failed: it, burnt\n"
    if format == "json":
        content = json.loads(out)
        assert content["runs"] == [{"run": n, **row} for n, row in zip("ab", found.rows, strict=True)]
        assert content["warnings"] == list(found.warnings)
    elif format == "csv":
        rows = list(csv.DictReader(io.StringIO(out)))
        expected: list[dict[str, Any]] = [
            {key: "" if value is None else str(value) for key, value in row.items()} for row in found.rows
        ]
        assert rows == [{"run": n, **row} for n, row in zip("ab", expected, strict=True)]
    else:
        shared, empty, *table = out.splitlines()
        assert shared.startswith("All runs: ")
        assert empty == ""
        assert len(table) == 4
        assert len({line.count("|") for line in table}) == 1
        assert "failed" in table[3]


def test_a_bar_in_a_name_does_not_break_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    """A name with a bar in it stays one cell of the markdown table."""
    compared(**{"a|b": records.record(3)})
    assert call("compare", "a|b", "--format", "markdown") == 0
    assert "| a\\|b |" in capsys.readouterr().out


def test_different_datasets_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Runs of different datasets are compared, with one line that names both."""
    compared(a=records.record(), b=records.record(config={"dataset": "cifar10"}), c=records.record())
    assert call("compare", "a", "b", "c") == 0
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "digits: a, c; cifar10: b" in err


def test_a_resumed_run_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    """The time of a resumed run is that of its last sitting, and one line says so."""
    compared(a=records.record(), b=records.record(resumed_from_epoch=2))
    assert call("compare", "a", "b") == 0
    err = capsys.readouterr().err
    assert err == "rankwise: b was resumed after epoch 2: its time and shares are those since then\n"


def test_a_run_given_twice(capsys: pytest.CaptureFixture[str]) -> None:
    """The same folder given twice, however it is written, is shown once, and a line says so."""
    compared(a=records.record(), b=records.record())
    assert call("compare", "a", "b", "./b/../a/", "--format", "json") == 0
    out, err = capsys.readouterr()
    assert [row["run"] for row in json.loads(out)["runs"]] == ["a", "b"]
    assert err == "rankwise: a was given more than once: it is shown once\n"


def test_runs_of_one_name_are_told_apart() -> None:
    """Two folders of one name in different places are shown with their paths."""
    paths = [Path("x/run"), Path("y/run"), Path("y/other")]
    for path in paths:
        records.run_folder(path, records.record())
    assert compare(paths).names == ("x/run", "y/run", "other")


@pytest.mark.parametrize(
    ("content", "word"),
    [(None, "no record.json"), ("{", "damaged"), ('{"schema_version": 99}', "newer"), ("{}", "damaged")],
    ids=["missing", "cut", "newer", "empty"],
)
def test_bad_records(content: str | None, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without a record, or with one that is damaged or newer, ends with code 2 and one line that
    names it."""
    compared(good=records.record())
    Path("bad").mkdir()
    if content is not None:
        Path("bad/record.json").write_text(content)
    assert call("compare", "good", "bad") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "bad" in err
    assert word in err


def test_nothing_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a run there is one line, and code 2."""
    assert call("compare") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
