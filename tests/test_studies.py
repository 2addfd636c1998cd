"""Studies: the paper's settings, and runs that are kept, resumed, retried and reported."""

from __future__ import annotations

import csv
import html
import io
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rankwise.config import read_preset
from rankwise.runs.folder import RunFolder
from rankwise.runs.progress import ProgressFile
from rankwise.runs.record import Record
from rankwise.studies import plan, runner
from rankwise.studies.study_progress import Pace, StudyProgress, in_words

from . import records
from .conftest import Command
from .effort import only_in_full
from .processes import wait_for
from .test_cli import call, count_epochs

QUICK = ["--dataset", "digits", "--quick", "--output", "study"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def _training_is_a_stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what stands around it; two tests below and those of the other studies train for real."""
    monkeypatch.setattr(runner, "_train", lambda run, folder, _: records.trained(run, folder))


def test_the_settings_are_the_papers() -> None:
    """Table 1 has 2 to 8 processes and Table 2 batches from 1 to 64 at 4 processes, both 25 epochs; the
    baseline and replication have 15; all else is as in the recipe of the paper."""
    recipe = read_preset("paper")
    shared = {name: recipe[name] for name in ("model", "optimizer", "lr", "momentum")}
    ours = plan.trials("all", plan.FULL)
    assert all(trial.options | shared == trial.options for trial in ours)
    (baseline,) = plan.trials("baseline", plan.FULL)
    assert [baseline.options[name] for name in ("ranks", "batch_size", "epochs")] == [1, 4, 15]
    replication = plan.FULL.replication().options
    assert [replication[name] for name in ("ranks", "batch_size", "epochs")] == [4, 16, 15]
    averaged = {name: recipe[name] for name in ("strategy", "topology", "shards", "optimizer_state")}
    table_1 = [plan.FULL.averaging(ranks).options for ranks in range(2, 9)]
    table_2 = [plan.FULL.averaging(4, batch_size=size).options for size in (1, 2, 4, 8, 16, 32, 64)]
    assert all(options | averaged == options and options["epochs"] == 25 for options in table_1 + table_2)
    for experiment, table in (("processes", table_1), ("batch-size", table_2)):
        planned = [trial.options for trial in plan.trials(experiment, plan.FULL)]
        assert all(options in planned for options in table)
    assert [options["ranks"] for options in table_1] == [2, 3, 4, 5, 6, 7, 8]
    assert [options["batch_size"] for options in table_2] == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("scale", [plan.FULL, plan.QUICK], ids=["full", "quick"])
def test_shared_settings_are_run_once(scale: plan.Scale) -> None:
    """No two trials of a study have the same options and turn, and none the same name."""
    ours = plan.trials("all", scale)
    assert len({trial.name for trial in ours}) == len(ours)
    assert all(trial not in ours[:n] for n, trial in enumerate(ours))
    parts = [trial for name in plan.EXPERIMENTS[:-1] for trial in plan.trials(name, scale)]
    assert {trial.name for trial in parts} == {trial.name for trial in ours}
    assert len(parts) > len(ours), "4 processes with batch 16 stand in Table 1 and in Table 2"


def test_as_many_updates() -> None:
    """The longer runs give each worker as many steps as 3 processes give in 25 epochs, to an epoch."""
    for ranks in range(3, 9):
        epochs = plan.FULL.with_as_many_updates(ranks, "fixed").options["epochs"]
        steps_an_epoch = 50_000 / (ranks - 1) / 16
        assert 0 <= epochs * steps_an_epoch - 25 * 50_000 / 2 / 16 < steps_an_epoch


def test_time_left_learns() -> None:
    """Before anything is finished the expectation counts, then what runs took for what was expected."""
    assert Pace().seconds_for(60) == 60
    assert Pace().after(10, 20).after(30, 60).seconds_for(60) == 120
    words = {12: "12 s", 61: "1 min", 3599: "1 h 00 min", 3601: "1 h 00 min", 4500: "1 h 15 min"}
    assert {seconds: in_words(seconds) for seconds in words} == words


@pytest.mark.parametrize("terminal", [False, True])
def test_the_board(tmp_path: Path, terminal: bool) -> None:
    """A terminal shows one bar over all runs, with the running one's epoch and accuracy; elsewhere a line
    a run tells its accuracy and what is left."""
    screen = io.StringIO()
    folder = RunFolder(tmp_path)
    folder.metrics.write_text(records.epochs(1)[0].model_dump_json() + "\n")
    progress = ProgressFile(folder.progress, 0, 1)
    progress.start(2)
    progress.add(500, 800.0)
    console = Console(file=screen, force_terminal=terminal, width=140)
    with StudyProgress(console, [10.0, 30.0, 20.0]) as board:
        board.keep(records.record(1, epochs=records.epochs(10, wall_s=2.0)))
        board.start("second")
        board.look("second", folder, epochs=3, samples_per_epoch=1000)
        board.finish("second", records.record(1))
        board.fail("third", "no luck")
    shown = screen.getvalue()
    assert "1 of 3 runs are finished already" in shown
    assert "third failed: no luck" in shown
    if terminal:
        # 10 of 60 expected seconds are done and half of the next 30; the first run took twice as long.
        for words in ("run 2 of 3", "second: epoch 2/3, accuracy 20.0%", "42%", "about 1 min left"):
            assert words in shown
    else:
        assert "[2/3] second: best accuracy 73.33%, 0 s; about 10 s left" in shown


BAD_INPUT: list[tuple[list[str], list[str]]] = [
    (["reproduce", "basline", *QUICK], ["baseline"]),
    (["reproduce", "baseline", *QUICK, "--repeats", "0"], ["--repeats 0", "1"]),
    (["reproduce", "baseline", "--dataset", "cifar11"], ["cifar10"]),
    (["reproduce", "baseline", "--data-dir", "nowhere"], ["nowhere"]),
    (
        ["reproduce", "baseline", "--dataset", "digits", "--output", "/proc/it"],
        ["/proc/it", "--output"],
    ),
]


@pytest.mark.parametrize(("words", "expected"), BAD_INPUT, ids=lambda value: " ".join(value)[-50:])
def test_bad_input(
    words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Bad input ends with code 2 and one line that says what to do, before anything is written."""
    assert call(*words) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("preparing")]
    assert len(lines) == 1, err
    assert all(word in lines[0] for word in expected), lines[0]
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_training_is_a_stub")
def test_a_folder_of_something_else(capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with another study's settings, or with other files, is refused and stays as it is."""
    assert call("reproduce", "baseline", *QUICK) == 0
    before = sorted(Path("study").rglob("*"))
    capsys.readouterr()
    assert call("reproduce", "baseline", "--dataset", "digits", "--output", "study") == 2
    assert "quick" in capsys.readouterr().err
    assert call("reproduce", "baseline", "--dataset", "synthetic:3000", "--quick", "--output", "study") == 2
    assert "dataset = digits" in capsys.readouterr().err
    assert sorted(Path("study").rglob("*")) == before
    Path("other").mkdir()
    Path("other/thesis.txt").write_text("mine")
    assert call("reproduce", "baseline", "--dataset", "digits", "--quick", "--output", "other") == 2
    assert [path.name for path in Path("other").iterdir()] == ["thesis.txt"]


@pytest.mark.usefixtures("_training_is_a_stub")
def test_finished_runs_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """The same command again trains nothing, even without the run folders; one more seed trains that
    seed alone. What is kept of a run says nothing of where it lay."""
    assert call("reproduce", "baseline", *QUICK) == 0
    (record,) = Path("study/records").iterdir()
    first = record.read_bytes()
    assert str(Path.cwd()).encode() not in first
    capsys.readouterr()
    shutil.rmtree("study/runs")
    assert call("reproduce", "baseline", *QUICK, "--repeats", "2") == 0
    err = capsys.readouterr().err
    assert "1 of 2 runs are finished already" in err
    assert "seed0" not in err
    assert record.read_bytes() == first
    assert len(list(Path("study/records").iterdir())) == 2
    capsys.readouterr()
    assert call("reproduce", "baseline", *QUICK, "--repeats", "2") == 0
    assert "best accuracy" not in capsys.readouterr().err


@pytest.mark.mpi
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("warm_processes")
def test_from_the_command_to_the_page(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One command runs real ranks and ends with a page, tables and records; and the author's stopwatch, in a
    real run, does not show the waiting that the ledger counts."""
    monkeypatch.setattr(plan, "QUICK", replace(plan.QUICK, threads=(3,)))
    assert call("reproduce", "timing", *QUICK, "--format", "json") == 0
    done = json.loads(capsys.readouterr().out)
    page = Path(done["page"]).read_text()
    verdicts = {verdict["claim"]: verdict for verdict in done["verdicts"]}
    assert verdicts["Communication takes less than 1 s"]["answer"] != "undecided"
    assert "Not run" in verdicts["Batch 8 is the sweet spot"]["evidence"]
    assert all(html.escape(verdict["answer"]) in page for verdict in verdicts.values())
    names = {trial.name for trial in plan.trials("timing", plan.QUICK)}
    assert {path.stem for path in Path("study/records").iterdir()} == {f"{name}-seed0" for name in names}
    record = Record.model_validate_json(
        Path(f"study/records/{plan.QUICK.stopwatch_run(4).name}-seed0.json").read_bytes()
    )
    stopwatch_s = [row.measured["author_communication_s"] for row in record.ranks]
    assert all(stopwatch_s)
    assert sum(stopwatch_s) < sum(row.phases_ns["wait"] for row in record.ranks) / 1e9
    rows = list(csv.DictReader(Path("study/tables/epochs.csv").read_text().splitlines()))
    for runs in (
        "cores shared out, a part of the samples",
        "all cores for every process, a part of the samples",
    ):
        assert (runs, "3") in {(row["runs"], row["processes"]) for row in rows}


@only_in_full
@pytest.mark.mpi
@pytest.mark.timeout(700)
def test_a_study_goes_on_after_an_interrupt(command: Command, tmp_path: Path) -> None:
    """Ctrl-C ends the running ranks with a valid record and the study with 130; the same command resumes
    that very run and finishes the study."""
    words = ["-m", "rankwise", "reproduce", "replication", *QUICK]
    process = command.start(command.python, *words)
    name = plan.QUICK.replication().name + "-seed0"
    place = tmp_path / "study" / "runs" / name
    # Another run comes first, and a busy machine takes its time.
    wait_for(lambda: (place / "metrics.jsonl").exists() and count_epochs(place) >= 1, 300)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "same command" in err.splitlines()[-1]
    assert RunFolder(place).read().outcome == "interrupted"
    done = command.rankwise(*words[2:], timeout=300)
    assert done.code == 0, done
    record = RunFolder(place).read()
    assert (record.outcome, record.resumed_from_epoch) == ("completed", 1)
    assert "1 of 2 runs are finished already" in done.err


@pytest.mark.usefixtures("warm_processes")
def test_a_failing_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that fails is tried again, then reported with its own words; the others are run all the
    same, and the study ends with code 1."""
    diverging: dict[str, Any] = plan.QUICK.limits | {"lr": 1e30}
    trials = [plan.Trial(plan.QUICK.alone().options | diverging), plan.QUICK.alone()]
    trials[1] = plan.Trial(trials[1].options | {"batch_size": 64})
    monkeypatch.setattr(plan, "trials", lambda *_: trials)
    commands = []
    supervise = runner._supervise
    monkeypatch.setattr(runner, "_supervise", lambda c, *rest: commands.append(c) or supervise(c, *rest))
    assert call("reproduce", "baseline", *QUICK) == 1
    err = capsys.readouterr().err
    assert "1 of 2 runs failed" in err.splitlines()[-1]
    assert "smaller --lr" in err.splitlines()[-1]
    assert len(commands) == 3
    assert [path.stem for path in Path("study/records").iterdir()] == [trials[1].name + "-seed0"]
