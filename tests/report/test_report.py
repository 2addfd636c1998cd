"""`rankwise report` from the command line: what is there is shown, what is missing is named in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rankwise.cli import main
from rankwise.report.page import Block, Chart, Notice, Page, Row, Table
from rankwise.report.run_page import run_page
from rankwise.report.runs import read_runs
from rankwise.runs.record import Efficiency, Epoch, Evaluated
from tests.records import epochs, rank, record, run_folder


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def call(*words: str) -> int:
    """Run the command line in this process; its exit code."""
    try:
        main(["report", *words])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def page_of(*folders: str) -> Page:
    reading = read_runs(map(Path, folders))
    return run_page(reading.runs, reading.warnings)


def blocks(page: Page) -> list[Block]:
    """All blocks of a page, those in rows too."""
    found: list[Block] = []
    for section in page.sections:
        for block in section.blocks:
            found += block.blocks if isinstance(block, Row) else (block,)
    return found


def notices(page: Page) -> str:
    return "\n".join(str(block.text) for block in blocks(page) if isinstance(block, Notice))


def charts(page: Page) -> list[str]:
    return [block.caption for block in blocks(page) if isinstance(block, Chart)]


def test_a_report_is_one_file(capsys: pytest.CaptureFixture[str]) -> None:
    """A report of a whole run is one HTML file, and nothing is said on stderr."""
    run_folder(Path("run"), record(2), steps=3)
    assert call("run", "--output", "page.html") == 0
    assert Path("page.html").read_text().startswith("<!doctype html>")
    assert {path.name for path in Path().iterdir()} == {"run", "page.html"}
    assert capsys.readouterr() == ("report: page.html\n", "")


def test_by_default_it_is_called_report_html() -> None:
    """Without --output the page is report.html in the current folder."""
    run_folder(Path("run"), record(1))
    assert call("run") == 0
    assert Path("report.html").is_file()


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "newer", "foreign"])
def test_a_folder_without_a_good_record(damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No record, a damaged one or one of a newer schema: exit code 2, one line that names it, no page."""
    folder = run_folder(Path("run"), record(2))
    content = folder.record.read_text()
    match damage:
        case "missing":
            folder.record.unlink()
        case "empty":
            folder.record.write_text("")
        case "truncated":
            folder.record.write_text(content[:500])
        case "newer":
            folder.record.write_text(json.dumps(json.loads(content) | {"schema_version": 99}))
        case "foreign":
            folder.record.write_text("[1, 2]")
    assert call("run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("rankwise: run")
    assert not Path("report.html").exists()


@pytest.mark.parametrize("output", ["missing/page.html", "run"])
def test_an_output_that_cannot_be_written(output: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is not there, or a folder in the file's place: exit code 2 and one line."""
    run_folder(Path("run"), record(1))
    assert call("run", "--output", output) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"cannot write {output}" in error


def test_no_run_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    """A report of nothing is wrong use."""
    assert call() == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bad_run_among_good_ones(capsys: pytest.CaptureFixture[str]) -> None:
    """The runs that can be read are shown; the other one is named in one line, and on the page."""
    run_folder(Path("good"), record(2))
    assert call("good", "nothing") == 0
    assert capsys.readouterr().err == "rankwise: nothing holds no run: there is no record.json in it\n"
    assert "Nothing holds no run" in notices(page_of("good", "nothing"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text"])
def test_a_damaged_timeline(content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """A timeline that is cut short or no timeline at all costs one line and its lane, not the page."""
    folder = run_folder(Path("run"), record(3), steps=3)
    whole = folder.timeline_of(1).read_bytes()
    folder.timeline_of(1).write_bytes(content or whole[: len(whole) // 2])
    assert call("run") == 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "rank-0001.npz" in error
    page = page_of("run")
    assert "Without the timelines of 1 rank" in notices(page)
    assert any("The last steps" in caption for caption in charts(page))


def test_no_timelines() -> None:
    """A run that left no timelines is reported with all the rest, and the gap is named on the page."""
    run_folder(Path("run"), record(3))
    page = page_of("run")
    assert "holds no timelines" in notices(page)
    assert any("Accuracy" in caption for caption in charts(page))


def test_a_failed_run() -> None:
    """A run that failed in its first epoch shows why, what its ranks did, and that there is no curve."""
    ranks = [rank(0), rank(1, died_at_s=7.5)]
    content = record(
        ranks, epochs=[], outcome="failed", message="rank 1 failed: the loss is nan", efficiency=Efficiency()
    )
    run_folder(Path("run"), content)
    page = page_of("run")
    told = notices(page)
    assert "Run run failed: rank 1 failed: the loss is nan." in told
    assert "Rank 1 of run died after 7.5 s" in told
    assert "No epoch was evaluated" in told
    assert any("Seconds of each rank" in caption for caption in charts(page))


def test_what_a_loop_has_logged_is_shown() -> None:
    """A run with a loss in training or in evaluation and no accuracy, or an accuracy alone, shows what it
    has."""
    row = dict(epochs(1)[0])
    for name, left_out in {"loss": ["val_accuracy"], "accuracy": ["val_loss", "train_loss"]}.items():
        kind = Epoch if name == "loss" else Evaluated
        run_folder(Path(name), record(1, epochs=[kind(**row | dict.fromkeys(left_out))]))
        assert "No epoch was evaluated" not in notices(page_of(name))
    shown = {
        name: [its.alt for its in blocks(page_of(name)) if isinstance(its, Chart)]
        for name in ("loss", "accuracy")
    }
    assert "Loss over epochs." in shown["loss"]
    assert "Loss over epochs." not in shown["accuracy"]
    assert any(alt.startswith("Accuracy over epochs") for alt in shown["accuracy"])
    assert call("loss", "accuracy") == 0


def test_epochs_that_were_not_evaluated() -> None:
    """Curves and comparison leave out epochs that were not evaluated; a run without accuracy or loss says
    so."""
    first = Epoch(**{**dict(epochs(1)[0]), "train_loss": None, "val_loss": None, "val_accuracy": None})
    run_folder(Path("some"), record(1, epochs=[first, *epochs(2)[1:]]))
    run_folder(Path("none"), record(1, epochs=[first], outcome="interrupted"))
    texts = [block.alt for block in blocks(page_of("some")) if isinstance(block, Chart)]
    assert "Accuracy over epochs, at best 60.00% in epoch 2 of some." in texts
    assert "No epoch was evaluated" in notices(page_of("none"))
    assert not any("Accuracy" in caption for caption in charts(page_of("none")))
    assert call("some", "none") == 0


def test_runs_of_different_datasets(capsys: pytest.CaptureFixture[str]) -> None:
    """A comparison across datasets is warned of, names them, and shows no speedup."""
    run_folder(Path("a"), record(1))
    run_folder(Path("b"), record(2, config={"dataset": "cifar10"}))
    assert call("a", "b") == 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "digits: a; cifar10: b" in error
    page = page_of("a", "b")
    assert "digits: a; cifar10: b" in notices(page)
    assert not any("times faster" in caption for caption in charts(page))


def test_several_runs_are_compared() -> None:
    """Runs of one dataset on different numbers of ranks get their speedup, and each its own diagnosis."""
    for ranks in (1, 2, 4):
        run_folder(Path(f"on-{ranks}"), record(ranks))
    page = page_of("on-1", "on-2", "on-4")
    assert any("times faster" in caption for caption in charts(page))
    assert [s.title for s in page.sections if s.title.startswith("Run ")] == [
        "Run on-1",
        "Run on-2",
        "Run on-4",
    ]


def test_what_was_measured_beside_the_ledger_is_shown() -> None:
    """Barriers' stopwatches, what a strategy measured, and faults are shown where a record has them."""
    ranks = [
        rank(0, wait_on_s={1: 2.0}, barrier_wait_ns=2_500_000_000, measured={"send_s": 0.125}),
        rank(1, barrier_wait_ns=0),
    ]
    fault = {"rank": 1, "kind": "kill", "epoch": 2, "recovered_after_s": 0.25, "action": "continue"}
    run_folder(Path("run"), record(ranks, faults=[fault]))
    rows = [row for block in blocks(page_of("run")) if isinstance(block, Table) for row in block.rows]
    assert (0, 2.0, 2.5) in rows
    assert (1, 0.0, 0.0) in rows
    assert (0, 0.125) in rows
    assert (1, None) in rows
    assert ("1", "kill", "2", "0.25", "continue") in rows


def test_options_that_differ() -> None:
    """A comparison shows in which options runs differ, with every digit, and no others."""
    run_folder(Path("a"), record(1, config={"lr": 0.1}))
    run_folder(Path("b"), record(1, config={"lr": 0.123456789, "out": "b"}))
    (table,) = [
        block
        for block in blocks(page_of("a", "b"))
        if isinstance(block, Table) and block.caption == "Options that differ"
    ]
    assert table.rows == (("lr", "0.1", "0.123456789"),)


def test_runs_of_one_name_are_told_apart() -> None:
    """Two folders of the same name in different places are two runs, and one folder given twice is one."""
    run_folder(Path("a/run"), record(1))
    run_folder(Path("b/run"), record(2))
    names = [run.name for run in read_runs([Path("a/run"), Path("b/run"), Path("a/run")]).runs]
    assert names == ["run", "b/run"]


def test_a_report_needs_neither_torch_nor_mpi() -> None:
    """Reports can be made where nothing can be trained: torch and MPI are not even looked for."""
    run_folder(Path("run"), record(2), steps=2)
    code = (
        "import sys; sys.modules |= dict.fromkeys(['torch', 'mpi4py']); "
        "from rankwise.cli import main; main(['report', 'run'])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert Path("report.html").is_file()
